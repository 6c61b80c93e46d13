//! What packets meet between two nodes: the MTU that is derived, the one that is wrong, the one that shrinks.

use std::time::Duration;

use serde_json::Value;

use crate::lab::{Lab, PAIR, can_run, text, wait_for};

/// Bytes of ICMP payload that make an IPv4 packet of `mtu` bytes.
fn payload(mtu: u32) -> String {
    (mtu - 28).to_string()
}

fn ping_df(lab: &Lab, to: &str, mtu: u32) -> bool {
    let size = payload(mtu);
    lab.try_exec("default/a", &["ping", "-c1", "-W2", "-Mdo", "-s", &size, to]).status.success()
}

/// Sends for some seconds from pod a to pod b and returns the bits per second that arrived.
fn iperf(lab: &Lab, seconds: u32) -> f64 {
    let server = lab.pod_ip("b").to_string();
    let out = lab.exec("default/a", &["iperf3", "-J", "-c", &server, "-t", &seconds.to_string()]);
    let result: Value = serde_json::from_str(&out).unwrap();
    result["end"]["sum_received"]["bits_per_second"].as_f64().unwrap()
}

#[test]
fn bulk_transfer_over_vxlan_creates_no_fragment() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_bulk", PAIR, &["--nodes", "2"]);
    let speed = iperf(&lab, 3);
    println!("{:.1} Gbit/s", speed / 1e9);
    for node in ["node-1", "node-2"] {
        assert_eq!(lab.snmp(node, "Ip", "FragCreates"), 0, "{node}");
        assert_eq!(lab.snmp(node, "Ip", "FragFails"), 0, "{node}");
        assert_eq!(lab.snmp(node, "Ip", "ReasmReqds"), 0, "{node}");
    }
    let b = lab.pod_ip("b").to_string();
    assert!(ping_df(&lab, &b, 1450), "1450 bytes pass");
    assert!(!ping_df(&lab, &b, 1451), "1451 bytes do not");
}

#[test]
fn the_mtu_follows_the_underlay_and_its_family() {
    if !can_run() {
        return;
    }
    let cases: &[(&[&str], u32)] = &[
        (&["--underlay-mtu", "9000"], 8950),
        (&["--underlay-family", "ipv6", "--family", "dual"], 1430),
        (&["--mode", "direct"], 1500),
    ];
    for (options, mtu) in cases {
        let lab = Lab::of("t_mtu", PAIR, &[&["--nodes", "2"], *options].concat());
        let link = lab.exec("default/a", &["cat", "/sys/class/net/eth0/mtu"]);
        assert_eq!(link.trim(), mtu.to_string(), "{options:?}");
        let route = lab.exec("default/a", &["ip", "route", "show", "default"]);
        assert!(route.contains(&format!("mtu {mtu}")), "{options:?}: {route}");
        let b = lab.pod_ip("b").to_string();
        assert!(ping_df(&lab, &b, *mtu), "{options:?}: {mtu} bytes pass");
        assert!(!ping_df(&lab, &b, mtu + 1), "{options:?}: {} bytes do not", mtu + 1);
        let check = lab.run(&["check"]);
        assert!(check.status.success(), "{options:?}:\n{}", text(&check));
    }
}

/// The article's incident: pods that believe in 1500 bytes over a 1500-byte underlay.
#[test]
fn a_pod_mtu_that_ignores_the_tunnel_is_counted_and_named() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_incident", PAIR, &["--nodes", "2", "--pod-mtu", "1500"]);
    let speed = iperf(&lab, 2);
    println!("{:.1} Gbit/s", speed / 1e9);
    let fragments = lab.snmp("node-1", "Ip", "FragCreates");
    assert!(fragments > 1_000, "{fragments} fragments");
    let mut messages = Vec::new();
    wait_for("the event that names it", Duration::from_secs(20), || {
        messages = lab.events("PodMTUTooLarge");
        messages.iter().any(|m| m.contains("1500") && m.contains("1450"))
    });
    println!("{messages:?}");
    wait_for("the fragments in the metrics", Duration::from_secs(20), || {
        lab.metric("node-1", "podway_ip_fragments_created_total") > 1_000.0
    });
}

#[test]
fn a_path_that_narrows_is_found_within_ten_seconds_and_its_healing_too() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_narrow", PAIR, &["--nodes", "3"]);
    // Let the probes prove the paths first: this is about one that changes at run time.
    wait_for("proven paths", Duration::from_secs(20), || lab.metric("node-1", "podway_path_mtu_bytes") > 0.0);
    assert!(lab.events("PathMTUNarrow").is_empty());
    // The fabric's port to node-2 silently drops what is longer: a black hole without ICMP.
    let fabric = format!("podway-{}-fabric", lab.name);
    let set = |mtu: &str| {
        let port = ["-n", &fabric, "link", "set", "node-2", "mtu", mtu];
        let status = std::process::Command::new("ip").args(port).status().unwrap();
        assert!(status.success());
    };
    set("1400");
    let mut found = Vec::new();
    let took = wait_for("the warning", Duration::from_secs(10), || {
        found = lab.events("PathMTUNarrow");
        found.iter().any(|m| m.contains("node-1") && m.contains("node-2") && m.contains("1400"))
    });
    println!("found after {took:?}: {found:?}");
    assert!(found.iter().all(|m| m.contains("node-2")), "only paths to or from node-2 are narrow: {found:?}");
    set("1500");
    wait_for("the end of it", Duration::from_secs(30), || {
        lab.metric("node-1", "podway_path_mtu_narrow") == 0.0
    });
}
