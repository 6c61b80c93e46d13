use proptest::prelude::*;

use super::*;
use crate::foreign::testing::dump;

/// What a service looks like, in one line.
fn line(service: &ForeignService) -> String {
    let object = service.object.as_ref().map_or_else(|| "?".to_owned(), ToString::to_string);
    let address = service.address.map_or_else(|| "*".to_owned(), |a| a.to_string());
    let ends: Vec<String> = service.endpoints.iter().map(|e| format!("{}:{}", e.address, e.port)).collect();
    let mut text = format!(
        "{object} {address} {} {} {:?} {:?} {:?} {}",
        service.port,
        service.protocol,
        service.kind,
        service.action,
        service.masquerade,
        ends.join(",")
    );
    if let Some(seconds) = service.affinity_s {
        text += &format!(" affinity {seconds}");
    }
    if !service.source_ranges.is_empty() {
        text +=
            &format!(" from {:?}", service.source_ranges.iter().map(ToString::to_string).collect::<Vec<_>>());
    }
    if service.local_only {
        text += " local";
    }
    text
}

#[test]
fn real_dumps_of_both_back_ends_are_understood_completely() {
    for backend in ["legacy", "iptnft"] {
        let Some(text) = dump(&format!("kube-proxy-1.36-{backend}-10-services.txt")) else { return };
        let rules = parse(&text, Family::V4);
        assert_eq!(rules.problems, [], "{backend}");
        assert!(rules.masquerades);
        assert_eq!((rules.services.len(), rules.endpoints()), (11, 21), "{backend}");
        let mut lines: Vec<String> = rules.services.iter().map(line).collect();
        lines.sort();
        assert_eq!(
            lines[0],
            "default/kubernetes:https 10.96.0.1 443 TCP ClusterIp Forward OutsidePods 10.99.0.1:16443"
        );
        assert_eq!(
            lines[1],
            "default/s00000 10.96.19.178 80 TCP ClusterIp Forward OutsidePods 10.244.0.5:8080,10.244.0.6:8080"
        );
        assert!(lines.iter().skip(1).all(|l| l.ends_with("OutsidePods 10.244.0.5:8080,10.244.0.6:8080")));

        let Some(text) = dump(&format!("kube-proxy-1.36-{backend}-1000-services.txt.gz")) else { return };
        let rules = parse(&text, Family::V4);
        assert_eq!(rules.problems, [], "{backend}");
        assert_eq!((rules.services.len(), rules.endpoints()), (1001, 2001), "{backend}");
        assert!(rules.services.iter().all(|s| s.object.is_some() && s.kind == ForeignKind::ClusterIp));
        assert!(rules.services.iter().all(|s| s.masquerade == Masquerade::OutsidePods));
    }
}

/// What the dumps do not hold: every other type of frontend, in the form that kube-proxy gives them.
const TYPES: &str = r#"
*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A KUBE-SERVICES -d 10.96.0.9/32 -p tcp -m comment --comment "ns/empty:http has no endpoints" -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable
-A KUBE-EXTERNAL-SERVICES -p udp -m comment --comment "ns/faraway:dns has no local endpoints" -m addrtype --dst-type LOCAL -m udp --dport 30053 -j DROP
-A KUBE-PROXY-FIREWALL -d 192.0.2.7/32 -p tcp -m comment --comment "ns/web:http traffic not accepted by KUBE-FW-WEB" -m tcp --dport 80 -j DROP
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-EXT-WEB - [0:0]
:KUBE-EXT-LOC - [0:0]
:KUBE-FW-WEB - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-SVL-LOC - [0:0]
:KUBE-SVC-LOC - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-SEP-B - [0:0]
[7:420] -A KUBE-NODEPORTS -d 127.0.0.0/8 -p tcp -m comment --comment "ns/web:http" -m tcp --dport 30080 -m nfacct --nfacct-name  localhost_nps_accepted_pkts -j KUBE-EXT-WEB
-A KUBE-NODEPORTS -p tcp -m comment --comment "ns/web:http" -m tcp --dport 30080 -j KUBE-EXT-WEB
-A KUBE-SERVICES -d 10.96.0.7/32 -p tcp -m comment --comment "ns/web:http cluster IP" -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -d 192.0.2.7/32 -p tcp -m comment --comment "ns/web:http loadbalancer IP" -m tcp --dport 80 -j KUBE-FW-WEB
-A KUBE-SERVICES -d 198.51.100.4/32 -p sctp -m comment --comment "ns/loc external IP" -m sctp --dport 90 -j KUBE-EXT-LOC
-A KUBE-FW-WEB -s 203.0.113.0/24 -m comment --comment "ns/web:http loadbalancer IP" -j KUBE-EXT-WEB
-A KUBE-FW-WEB -s 198.18.0.1/32 -m comment --comment "ns/web:http loadbalancer IP" -j KUBE-EXT-WEB
-A KUBE-EXT-WEB -m comment --comment "masquerade traffic for ns/web:http external destinations" -j KUBE-MARK-MASQ
-A KUBE-EXT-WEB -j KUBE-SVC-WEB
-A KUBE-EXT-LOC -s 10.244.0.0/16 -m comment --comment "pod traffic for ns/loc external destinations" -j KUBE-SVC-LOC
-A KUBE-EXT-LOC -m comment --comment "masquerade LOCAL traffic for ns/loc external destinations" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-LOC -m comment --comment "route LOCAL traffic for ns/loc external destinations" -m addrtype --src-type LOCAL -j KUBE-SVC-LOC
-A KUBE-EXT-LOC -j KUBE-SVL-LOC
-A KUBE-SVL-LOC -m comment --comment "ns/loc -> 10.244.1.2:90" -j KUBE-SEP-B
-A KUBE-SVC-LOC -m comment --comment "ns/loc -> 10.244.1.1:90" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A
-A KUBE-SVC-LOC -m comment --comment "ns/loc -> 10.244.1.2:90" -j KUBE-SEP-B
-A KUBE-SVC-WEB ! -s 10.244.0.0/16 -d 10.96.0.7/32 -p tcp -m comment --comment "ns/web:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-WEB -m comment --comment "ns/web:http -> 10.244.1.1:8080" -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-A --mask 255.255.255.255 --rsource -j KUBE-SEP-A
-A KUBE-SVC-WEB -m comment --comment "ns/web:http -> 10.244.1.1:8080" -j KUBE-SEP-A
-A KUBE-SEP-A -s 10.244.1.1/32 -m comment --comment "ns/web:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-A -p tcp -m comment --comment "ns/web:http" -m recent --set --name KUBE-SEP-A --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.244.1.1:8080
-A KUBE-SEP-B -p sctp -m comment --comment "ns/loc" -m sctp -j DNAT --to-destination 10.244.1.2:90
COMMIT
"#;

#[test]
fn every_type_of_service_is_read() {
    let rules = parse(TYPES, Family::V4);
    assert_eq!(rules.problems, []);
    let lines: Vec<String> = rules.services.iter().map(line).collect();
    assert_eq!(
        lines,
        [
            "ns/web:http 10.96.0.7 80 TCP ClusterIp Forward OutsidePods 10.244.1.1:8080 affinity 10800",
            "ns/web:http 192.0.2.7 80 TCP LoadBalancer Forward Always 10.244.1.1:8080 affinity 10800 from [\"203.0.113.0/24\", \"198.18.0.1/32\"]",
            "ns/loc 198.51.100.4 90 SCTP ExternalIp Forward No 10.244.1.2:90 local",
            "ns/web:http * 30080 TCP NodePort Forward Always 10.244.1.1:8080 affinity 10800",
            "ns/empty:http 10.96.0.9 80 TCP ClusterIp Reject No ",
            "ns/faraway:dns * 30053 UDP NodePort Drop No  local",
        ]
    );
}

#[test]
fn bad_lines_are_told_with_their_number_and_cost_nothing_else() {
    let cases = [
        ("-A KUBE-SVC-WEB", "-A", "-A without the name of a chain"),
        (
            "-A KUBE-SEP-B -p sctp",
            "-A KUBE-SEP-B -j DNAT --to-destination 10.0.0:90",
            "not one address and port",
        ),
        ("-A KUBE-SEP-B -p sctp", "-A KUBE-SEP-B -d 10.0.0.0/33", "neither address nor prefix"),
        ("-A KUBE-SEP-B -p sctp", "-A KUBE-SEP-B --comment \"open", "a quote is not closed"),
        ("-A KUBE-SEP-B -p sctp", "-A KUBE-SEP-B --dport 70000", "not a port"),
        ("-A KUBE-SEP-B -p sctp", "-A KUBE-SEP-B -j", "its value is missing"),
        ("-A KUBE-SEP-B -p sctp", "dance", "not a rule, a chain or a table"),
        (":KUBE-SEP-B", ":", "a chain without a name"),
    ];
    for (begins, bad, cause) in cases {
        let mut wanted = 0;
        let text: Vec<&str> = (1..)
            .zip(TYPES.lines())
            .map(|(number, line)| {
                if wanted == 0 && line.starts_with(begins) {
                    wanted = number;
                    bad
                } else {
                    line
                }
            })
            .collect();
        let rules = parse(&text.join("\n"), Family::V4);
        let problem = rules.problems.first().unwrap_or_else(|| panic!("{bad}: no problem"));
        assert_eq!(problem.line, wanted, "{bad}: {problem}");
        assert!(problem.cause.contains(cause), "{bad}: {problem}");
        assert_eq!(rules.services.len(), 6, "{bad}");
    }
    let gone = TYPES.replace("-j KUBE-SVC-WEB\n", "-j KUBE-SVC-NONE\n");
    assert!(parse(&gone, Family::V4).problems[0].to_string().contains("there is no chain KUBE-SVC-NONE"));
    let cut = TYPES.trim_end().trim_end_matches("COMMIT");
    assert!(parse(cut, Family::V4).problems[0].cause.contains("has no COMMIT"));
    assert_eq!(parse("COMMIT\n-A x", Family::V4).problems.len(), 2);
}

#[test]
fn a_circle_of_chains_ends() {
    let text = "*nat\n-A KUBE-SERVICES -d 10.0.0.1/32 -p tcp --dport 1 -j KUBE-SVC-A\n\
                -A KUBE-SVC-A -j KUBE-SVC-B\n-A KUBE-SVC-B -j KUBE-SVC-A\nCOMMIT\n";
    let rules = parse(text, Family::V4);
    assert_eq!((rules.services.len(), rules.endpoints(), rules.problems.len()), (1, 0, 0));
}

#[test]
fn chains_and_jumps_are_found_for_removal() {
    let text = "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n:MINE - [0:0]\n\
                -A INPUT -j KUBE-FIREWALL\n-A INPUT -m comment --comment \"-j KUBE-FIREWALL\" -j MINE\n\
                -A KUBE-FIREWALL -j KUBE-X\nCOMMIT\n";
    assert_eq!(chains(text, is_kube_proxy_chain), [("filter".to_owned(), "KUBE-FIREWALL".to_owned())]);
    assert_eq!(
        jumps_to(text, is_kube_proxy_chain),
        [("filter".to_owned(), "-A INPUT -j KUBE-FIREWALL".to_owned())]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Cut, doubled and overwritten anywhere, a dump is read to its end.
    #[test]
    fn nothing_makes_it_panic(cuts in proptest::collection::vec((0usize..TYPES.len(), 0usize..60, ".{0,8}"), 1..6)) {
        let mut text = TYPES.to_owned();
        for (at, length, put) in cuts {
            let from = text.floor_char_boundary(at.min(text.len()));
            let to = text.ceil_char_boundary((from + length).min(text.len()));
            text.replace_range(from..to, &put);
        }
        let rules = parse(&text, Family::V4);
        prop_assert!(rules.problems.iter().all(|p| p.line >= 1 && p.line <= text.lines().count().max(1)));
        let _ = chains(&text, is_kube_proxy_chain);
        let _ = jumps_to(&text, is_kube_proxy_chain);
    }

    #[test]
    fn nor_does_any_text(text in "(\\PC{0,40}\n){0,8}") {
        let _ = parse(&text, Family::V6);
    }
}
