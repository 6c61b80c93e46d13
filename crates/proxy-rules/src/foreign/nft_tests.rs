use proptest::prelude::*;

use super::*;
use crate::foreign::testing::dump;

#[test]
fn real_dumps_are_understood_completely() {
    for (file, services, endpoints) in [
        ("kube-proxy-1.36-nftables-10-services.txt", 11, 21),
        ("kube-proxy-1.36-nftables-1000-services.txt.gz", 1001, 2001),
    ] {
        let Some(text) = dump(file) else { return };
        let rules = parse_text(&text);
        assert_eq!(rules.problems, [], "{file}");
        assert!(rules.masquerades, "{file}");
        assert_eq!((rules.services.len(), rules.endpoints()), (services, endpoints), "{file}");
        for service in &rules.services {
            let object = service.object.as_ref().map(ToString::to_string).unwrap_or_default();
            assert_eq!(service.kind, ForeignKind::ClusterIp, "{object}");
            assert_eq!(service.masquerade, Masquerade::OutsidePods, "{object}");
            assert_eq!((service.action, service.protocol), (Action::Forward, Protocol::Tcp));
            let ends: Vec<String> =
                service.endpoints.iter().map(|e| format!("{}:{}", e.address, e.port)).collect();
            match object.as_str() {
                "default/kubernetes:https" => {
                    assert_eq!(service.address, Some("10.96.0.1".parse().unwrap()));
                    assert_eq!((service.port, ends), (443, vec!["10.99.0.1:16443".to_owned()]));
                }
                name => {
                    assert!(name.starts_with("default/s"), "{name}");
                    assert_eq!(service.port, 80);
                    assert_eq!(ends, ["10.244.0.5:8080", "10.244.0.6:8080"], "{name}");
                }
            }
        }
    }
}

/// What the dumps do not hold, in the form that kube-proxy gives it and nft prints it.
pub(crate) const TYPES: &str = r#"table ip kube-proxy {
	comment "rules for kube-proxy"
	set cluster-ips {
		type ipv4_addr
		comment "Active ClusterIPs"
		elements = { 10.96.0.7, 10.96.0.9 }
	}

	map no-endpoint-services {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 10.96.0.9 . tcp . 80 comment "ns/empty:http" : goto reject-chain,
			     192.0.2.9 . tcp . 80 comment "ns/far:http" : drop }
	}

	map no-endpoint-nodeports {
		type inet_proto . inet_service : verdict
		elements = { udp . 30053 comment "ns/faraway:dns" : drop }
	}

	map firewall-ips {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 192.0.2.7 . tcp . 80 comment "ns/web:http" : goto firewall-AAAAAAAA-ns/web/tcp/http }
	}

	map service-ips {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 10.96.0.7 . tcp . 80 : goto service-AAAAAAAA-ns/web/tcp/http,
			     192.0.2.7 . tcp . 80 : goto external-AAAAAAAA-ns/web/tcp/http,
			     198.51.100.4 . sctp . 90 : goto external-BBBBBBBB-ns/loc/sctp/ }
	}

	map service-nodeports {
		type inet_proto . inet_service : verdict
		elements = { tcp . 30080 : goto external-AAAAAAAA-ns/web/tcp/http }
	}

	set affinity-CCCCCCCC-ns/web/tcp/http__10.244.1.1/8080 {
		type ipv4_addr
		flags dynamic,timeout
		timeout 3h
	}

	chain services {
		ip daddr . meta l4proto . th dport vmap @service-ips
	}

	chain mark-for-masquerade {
		meta mark set meta mark | 0x00004000
	}

	chain masquerading {
		meta mark & 0x00004000 == 0x00000000 return
		meta mark set meta mark ^ 0x00004000
		masquerade fully-random
	}

	chain reject-chain {
		comment "helper for @no-endpoint-services / @no-endpoint-nodeports"
		reject
	}

	chain firewall-AAAAAAAA-ns/web/tcp/http {
		ip saddr != { 198.18.0.1, 203.0.113.0/24 } drop
	}

	chain service-AAAAAAAA-ns/web/tcp/http {
		ip daddr 10.96.0.7 tcp dport 80 ip saddr != 10.244.0.0/16 jump mark-for-masquerade
		ip saddr @affinity-CCCCCCCC-ns/web/tcp/http__10.244.1.1/8080 goto endpoint-CCCCCCCC-ns/web/tcp/http__10.244.1.1/8080
		numgen random mod 1 vmap { 0 : goto endpoint-CCCCCCCC-ns/web/tcp/http__10.244.1.1/8080 }
	}

	chain external-AAAAAAAA-ns/web/tcp/http {
		jump mark-for-masquerade
		goto service-AAAAAAAA-ns/web/tcp/http
	}

	chain service-BBBBBBBB-ns/loc/sctp/ {
		numgen random mod 2 vmap { 0 : goto endpoint-DDDDDDDD-ns/loc/sctp/__10.244.1.1/90, 1 : goto endpoint-EEEEEEEE-ns/loc/sctp/__10.244.1.2/90 }
	}

	chain external-BBBBBBBB-ns/loc/sctp/ {
		ip saddr 10.244.0.0/16 goto service-BBBBBBBB-ns/loc/sctp/ comment "short-circuit pod traffic"
		fib saddr type local jump mark-for-masquerade comment "masquerade local traffic"
		fib saddr type local goto service-BBBBBBBB-ns/loc/sctp/ comment "short-circuit local traffic"
		numgen random mod 1 vmap { 0 : goto endpoint-EEEEEEEE-ns/loc/sctp/__10.244.1.2/90 }
	}

	chain endpoint-CCCCCCCC-ns/web/tcp/http__10.244.1.1/8080 {
		ip saddr 10.244.1.1 jump mark-for-masquerade
		update @affinity-CCCCCCCC-ns/web/tcp/http__10.244.1.1/8080 { ip saddr }
		meta l4proto tcp dnat to 10.244.1.1:8080
	}

	chain endpoint-DDDDDDDD-ns/loc/sctp/__10.244.1.1/90 {
		meta l4proto sctp dnat to 10.244.1.1:90
	}

	chain endpoint-EEEEEEEE-ns/loc/sctp/__10.244.1.2/90 {
		ip saddr 10.244.1.2 jump mark-for-masquerade
		meta l4proto sctp dnat to 10.244.1.2:90
	}

	chain nat-postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		jump masquerading
	}
}
table inet somebody {
	chain input {
		type filter hook input priority filter; policy accept;
		tcp dport { 22, 80 } accept
	}
}
"#;

/// Checked for both forms.
fn check_types(rules: &ForeignRules) {
    assert_eq!(rules.problems, []);
    assert!(rules.masquerades);
    let found: Vec<String> = rules
        .services
        .iter()
        .map(|s| {
            let object = s.object.as_ref().map(ToString::to_string).unwrap_or_default();
            let ends: Vec<String> = s.endpoints.iter().map(|e| format!("{}:{}", e.address, e.port)).collect();
            format!(
                "{object} {} {} {} {:?} {:?} {:?} {} {:?} {} {}",
                s.address.map_or_else(|| "*".to_owned(), |a| a.to_string()),
                s.port,
                s.protocol,
                s.kind,
                s.action,
                s.masquerade,
                ends.join(","),
                s.affinity_s,
                s.source_ranges.len(),
                s.local_only,
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            "ns/web:http 10.96.0.7 80 TCP ClusterIp Forward OutsidePods 10.244.1.1:8080 Some(10800) 0 false",
            "ns/web:http 192.0.2.7 80 TCP LoadBalancer Forward Always 10.244.1.1:8080 Some(10800) 2 false",
            "ns/loc 198.51.100.4 90 SCTP External Forward No 10.244.1.2:90 None 0 true",
            "ns/web:http * 30080 TCP NodePort Forward Always 10.244.1.1:8080 Some(10800) 0 false",
            "ns/empty:http 10.96.0.9 80 TCP Unknown Reject No  None 0 false",
            "ns/far:http 192.0.2.9 80 TCP External Drop No  None 0 true",
            "ns/faraway:dns * 30053 UDP NodePort Drop No  None 0 true",
        ]
    );
}

#[test]
fn every_type_of_service_is_read_from_text() {
    check_types(&parse_text(TYPES));
}

#[test]
fn bad_lines_are_told_with_their_number_and_cost_nothing_else() {
    let cases = [
        (
            "meta l4proto sctp dnat to 10.244.1.2:90",
            "meta l4proto sctp dnat to 10.244.1:90",
            "not an address and port",
        ),
        (
            "ip saddr != { 198.18.0.1, 203.0.113.0/24 } drop",
            "ip saddr != { 198.18.0.1",
            "a brace is not closed",
        ),
        ("ip saddr != { 198.18.0.1, 203.0.113.0/24 } drop", "ip saddr 198.18.0.1/64 drop", "not a prefix"),
        ("goto service-AAAAAAAA-ns/web/tcp/http\n\t}", "goto\n\t}", "goto without a chain"),
        ("chain mark-for-masquerade {", "chaos {", "neither chain, set nor map"),
        (
            "192.0.2.7 . tcp . 80 : goto ext",
            "192.0.2.7 . tcp 80 : goto ext",
            "an element that is not understood",
        ),
        ("198.51.100.4 . sctp . 90", "198.51.100.4 . icmp . 90", "not an address, protocol and port"),
        ("table inet somebody {", "somebody {", "not a table"),
    ];
    for (from, to, cause) in cases {
        let at = TYPES.find(from).unwrap_or_else(|| panic!("{from}"));
        let wanted = TYPES[..at].lines().count() + usize::from(TYPES[..at].ends_with('\n'));
        let text = TYPES.replacen(from, to, 1);
        let rules = parse_text(&text);
        let problem = rules.problems.first().unwrap_or_else(|| panic!("{to}: no problem"));
        assert_eq!(problem.line, wanted.max(1), "{to}: {problem}");
        assert!(problem.cause.contains(cause), "{to}: {problem}");
        assert!(rules.services.len() >= 6, "{to}: {} services", rules.services.len());
    }
    let cut = &TYPES[..TYPES.len() / 2];
    assert!(parse_text(cut).problems.iter().any(|p| p.cause.contains("in the middle of a table")));
}

#[test]
fn json_that_is_none_or_something_else_is_told() {
    for (text, cause) in [
        ("", "not JSON"),
        ("[1", "not JSON"),
        ("{}", "no list \"nftables\""),
        (r#"{"nftables":[7]}"#, "not an object"),
        (
            r#"{"nftables":[{"chain":{"family":"ip","table":"kube-proxy","name":"x"}}]}"#,
            "its table is not listed",
        ),
        (r#"{"nftables":[{"table":{"family":"ip"}}]}"#, "name is missing"),
        (
            r#"{"nftables":[{"table":{"family":"ip","name":"kube-proxy"}},
                {"map":{"family":"ip","table":"kube-proxy","name":"service-ips","elem":[[1,2,3]]}}]}"#,
            "an element that is not understood",
        ),
        (
            r#"{"nftables":[{"table":{"family":"ip","name":"kube-proxy"}},
                {"rule":{"family":"ip","table":"kube-proxy","chain":"c","expr":[{"dnat":{"addr":"x"}}]}}]}"#,
            "not an address and port",
        ),
    ] {
        let rules = parse_json(text);
        assert_eq!(rules.problems.len(), 1, "{text}: {:?}", rules.problems);
        assert!(rules.problems[0].cause.contains(cause), "{text}: {}", rules.problems[0]);
    }
}

/// Both forms of the same rules give the same services: what nft prints as JSON for the text above.
#[test]
fn json_as_nft_prints_it_says_the_same() {
    let Some(json) = crate::foreign::testing::as_json("pwt-foreign-json", TYPES) else { return };
    check_types(&parse_json(&json));
    for file in ["kube-proxy-1.36-nftables-10-services.txt", "kube-proxy-1.36-nftables-1000-services.txt.gz"]
    {
        let Some(text) = dump(file) else { return };
        let Some(json) = crate::foreign::testing::as_json("pwt-foreign-json", &text) else { return };
        let sorted = |mut rules: ForeignRules| {
            rules.services.sort_by_key(|s| (s.address, s.port, s.protocol));
            rules
        };
        assert_eq!(sorted(parse_json(&json)), sorted(parse_text(&text)), "{file}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nothing_makes_it_panic(cuts in proptest::collection::vec((0usize..TYPES.len(), 0usize..60, ".{0,8}"), 1..6)) {
        let mut text = TYPES.to_owned();
        for (at, length, put) in cuts {
            let from = text.floor_char_boundary(at.min(text.len()));
            let to = text.ceil_char_boundary((from + length).min(text.len()));
            text.replace_range(from..to, &put);
        }
        let rules = parse_text(&text);
        prop_assert!(rules.problems.iter().all(|p| p.line <= text.lines().count().max(1)));
        let _ = parse_json(&text);
    }

    #[test]
    fn nor_does_any_text(text in "(\\PC{0,40}\n){0,8}") {
        let _ = parse_text(&text);
        let _ = parse_text(&format!("table ip kube-proxy {{\n{text}"));
        let _ = parse_text(&format!("table ip kube-proxy {{\nset a {{\nelements = {{ {text}"));
        let _ = parse_text(&format!("table ip kube-proxy {{\nchain a {{\n{text}"));
    }
}
