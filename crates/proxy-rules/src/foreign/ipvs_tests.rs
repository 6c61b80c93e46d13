use proptest::prelude::*;

use super::*;

/// As `ipvsadm -Sn` prints it (ipvsadm 1.31 on Linux 6.1).
const SAVED: &str = "\
-A -t 10.96.0.1:443 -s rr
-a -t 10.96.0.1:443 -r 10.99.0.1:16443 -m -w 1
-A -t 10.96.0.7:80 -s sh -b sh-fallback,sh-port
-a -t 10.96.0.7:80 -r 10.244.0.5:8080 -m -w 1
-a -t 10.96.0.7:80 -r 10.244.0.6:8080 -m -w 0
-A -u 10.96.0.10:53 -s lc -p 10800
-a -u 10.96.0.10:53 -r 10.244.0.5:53 -m -w 1
-A --sctp-service 10.96.0.9:90 -s rr
-A -t [fd00:96::1]:80 -s wlc
-a -t [fd00:96::1]:80 -r [fd00::5]:8080 -m -w 1
-A -f 5 -s rr
-a -f 5 -r 10.244.0.6:0 -g -w 1
";

fn line(service: &ForeignService) -> String {
    let ends: Vec<String> = service
        .endpoints
        .iter()
        .map(|e| format!("{} {} {}", e.address, e.port, e.weight.unwrap_or_default()))
        .collect();
    format!(
        "{} {} {} {:?} {:?} [{}]",
        service.address.map_or_else(|| "mark".to_owned(), |a| a.to_string()),
        service.port,
        service.protocol,
        service.action,
        service.affinity_s,
        ends.join(", ")
    )
}

#[test]
fn a_dump_is_read() {
    let rules = parse(SAVED);
    assert_eq!(rules.problems, []);
    let lines: Vec<String> = rules.services.iter().map(line).collect();
    assert_eq!(
        lines,
        [
            "10.96.0.1 443 TCP Forward None [10.99.0.1 16443 1]",
            "10.96.0.7 80 TCP Forward None [10.244.0.5 8080 1, 10.244.0.6 8080 0]",
            "10.96.0.10 53 UDP Forward Some(10800) [10.244.0.5 53 1]",
            "10.96.0.9 90 SCTP Reject None []",
            "fd00:96::1 80 TCP Forward None [fd00::5 8080 1]",
            "mark 0 TCP Forward None [10.244.0.6 0 1]",
        ]
    );
}

#[test]
fn bad_lines_are_told_with_their_number_and_cost_nothing_else() {
    for (bad, cause) in [
        ("-A -t 10.96.0.300:443 -s rr", "not an address and port"),
        ("-a -t 10.96.0.77:80 -r 10.244.0.5:8080 -m -w 1", "virtual server that is not there"),
        ("-a -t 10.96.0.1:443 -m -w 1", "-r is missing"),
        ("-a -t 10.96.0.1:443 -r -m", "its value is missing"),
        ("-a -t 10.96.0.1:443 -r 10.244.0.5:8080 -w many", "not a weight"),
        ("-A -t 10.96.0.1:443 -s rr", "added before"),
        ("-A -u 10.96.0.2:53 -p soon", "not a number of seconds"),
        ("-A -f no -s rr", "not a mark"),
        ("-A -s rr", "no virtual server"),
        ("-D -t 10.96.0.1:443", "neither -A nor -a"),
        ("TCP  0A600001:01BB rr", "no virtual server"),
    ] {
        let rules = parse(&format!("{SAVED}{bad}\n"));
        assert_eq!(rules.services.len(), 6, "{bad}");
        let problem = rules.problems.first().unwrap_or_else(|| panic!("{bad}: no problem"));
        assert_eq!(problem.line, SAVED.lines().count() + 1, "{bad}");
        assert!(problem.cause.contains(cause), "{bad}: {problem}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nothing_makes_it_panic(cuts in proptest::collection::vec((0usize..SAVED.len(), 0usize..30, ".{0,8}"), 1..6)) {
        let mut text = SAVED.to_owned();
        for (at, length, put) in cuts {
            let from = text.floor_char_boundary(at.min(text.len()));
            let to = text.ceil_char_boundary((from + length).min(text.len()));
            text.replace_range(from..to, &put);
        }
        let rules = parse(&text);
        prop_assert!(rules.problems.iter().all(|p| p.line <= text.lines().count()));
    }
}
