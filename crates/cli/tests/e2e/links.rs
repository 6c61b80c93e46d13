//! Broken, lossy and slow links between nodes, and nodes that come back: what passes, and where it shows.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::lab::{Lab, PAIR, can_run, text, wait_for};

#[test]
fn links_between_nodes_break_and_mend() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_links", PAIR, &["--nodes", "3"]);
    let b = lab.pod_ip("b").to_string();
    let link = |options: &[&str]| {
        let output = lab.run(&[&["link", "node-2", "node-1"], options].concat());
        assert!(output.status.success(), "{options:?}: {}", text(&output));
    };
    let ping = |options: &[&str]| -> usize {
        let out = text(&lab.try_exec("a", &[&["ping", "-W1"], options, &[b.as_str()]].concat()));
        let received =
            out.split(" received").next().and_then(|o| o.rsplit(' ').next()).and_then(|n| n.parse().ok());
        received.unwrap_or_else(|| panic!("{out}"))
    };
    assert_eq!(ping(&["-c3", "-i0.1"]), 3);

    link(&["--down"]);
    let status = text(&lab.run(&["status"]));
    assert!(status.contains("node-2 node-1   down"), "{status}");
    assert_eq!(ping(&["-c2", "-i0.1"]), 0);
    // The others are not hit.
    lab.on_node("node-1", &["ping", "-c1", "-W2", "172.18.1.3"]);
    link(&["--up"]);
    wait_for("pings to pass again", Duration::from_secs(10), || ping(&["-c1"]) == 1);
    assert!(!text(&lab.run(&["status"])).contains("FAULT"));

    // 1300 bytes and their headers fit into 1400 with the tunnel's 50, 1400 do not.
    link(&["--mtu", "1400"]);
    assert!(text(&lab.run(&["status"])).contains("packets above 1400 bytes are lost"));
    assert_eq!(ping(&["-c2", "-i0.1", "-s1300"]), 2);
    assert_eq!(ping(&["-c2", "-i0.1", "-s1400", "-Mdont"]), 0);

    // A limit that nothing exceeds costs nothing: packets are judged as they are on the wire, not in bundles.
    link(&["--mtu", "1500"]);
    let iperf = lab.exec("a", &["iperf3", "-J", "-c", &b, "-t", "1"]);
    let result: Value = serde_json::from_str(&iperf).unwrap();
    let sent = &result["end"]["sum_sent"];
    println!("{} bit/s, {} retransmits", sent["bits_per_second"], sent["retransmits"]);
    assert!(sent["bits_per_second"].as_f64().unwrap() > 20e6, "{sent}");

    // A quarter of the round trips is left.
    link(&["--loss", "50"]);
    let received = ping(&["-c80", "-i0.02"]);
    println!("{received} of 80");
    assert!((1..60).contains(&received), "{received} of 80");
    let rules = ["nft", "list", "table", "bridge", "podway_faults"];
    let in_fabric =
        Command::new("ip").args(["netns", "exec", "podway-t_links-fabric"]).args(rules).output().unwrap();
    assert!(text(&in_fabric).contains("numgen random"), "{}", text(&in_fabric));
    link(&["--up"]);
    assert_eq!(ping(&["-c20", "-i0.02"]), 20);
    let check = lab.run(&["check"]);
    assert!(check.status.success(), "{}", text(&check));
    let own = lab.run(&["link", "node-1", "node-1", "--down"]);
    assert!(text(&own).contains("no link to itself"), "{}", text(&own));
    let nobody = lab.run(&["link", "node-1", "node-9", "--down"]);
    assert!(text(&nobody).contains("has no node node-9"), "{}", text(&nobody));
}

/// Round-trip times in milliseconds of pings from a node.
fn round_trips(lab: &Lab, node: &str, to: &str, options: &[&str]) -> Vec<f64> {
    let out = text(&lab.run(&[&["node", "exec", node, "--", "ping", "-W3"], options, &[to]].concat()));
    let times = out.lines().filter_map(|l| l.split("time=").nth(1)?.split(' ').next()?.parse().ok());
    times.collect()
}

fn least(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Processes that delay packets in a lab.
fn relays(lab: &Lab) -> Vec<i32> {
    let procs = crate::lab::cgroup_root().join(format!("podway/{}/links/cgroup.procs", lab.name));
    let text = std::fs::read_to_string(procs).unwrap_or_default();
    text.lines().map(|l| l.parse().unwrap()).collect()
}

#[test]
fn packets_between_two_nodes_are_late_and_no_others() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_delay", PAIR, &["--nodes", "3", "--family", "dual"]);
    let b = lab.get(&["pod", "b"])["status"]["podIPs"].clone();
    let b: Vec<&str> = b.as_array().unwrap().iter().map(|ip| ip["ip"].as_str().unwrap()).collect();
    assert_eq!(b.len(), 2);
    let link = |options: &[&str]| {
        let output = lab.run(&[&["link", "node-1", "node-2"], options].concat());
        assert!(output.status.success(), "{options:?}: {}", text(&output));
    };
    let (second, third) = ("172.18.1.2", "172.18.1.3");
    let count = &["-c5", "-i0.2"];
    assert!(least(&round_trips(&lab, "node-1", second, count)) < 20.0);

    link(&["--delay", "50"]);
    let status = text(&lab.run(&["status"]));
    assert!(status.contains("node-1 node-2   packets are 50 ms late in each direction"), "{status}");
    let json: Value = serde_json::from_slice(&lab.run(&["status", "-o", "json"]).stdout).unwrap();
    assert_eq!(json["faults"][0]["delayMicros"], 50_000, "{json}");
    // Each direction has its own 50 ms, whoever asks.
    for (from, to) in [("node-1", second), ("node-2", "172.18.1.1")] {
        let times = round_trips(&lab, from, to, count);
        println!("{from} to {to}: {times:?} ms");
        assert_eq!(times.len(), 5);
        assert!(times.iter().all(|t| *t >= 100.0), "{times:?}");
        assert!(least(&times) < 130.0, "{times:?}");
    }
    let others = [("node-1", third), ("node-2", third), ("node-3", second)];
    for (from, to) in others {
        assert!(least(&round_trips(&lab, from, to, count)) < 20.0, "{from} to {to}");
    }
    // What is in the tunnel is late as well, in both families, and every segment arrives whole and in order.
    for ip in &b {
        let start = Instant::now();
        let ping = lab.exec("a", &["ping", "-c3", "-i0.2", "-W3", ip]);
        assert!(ping.contains("3 received"), "{ping}");
        assert!(start.elapsed() > Duration::from_millis(500), "{:?}", start.elapsed());
        let min: f64 = ping.split("mdev = ").nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
        assert!((100.0..130.0).contains(&min), "{ping}");
        let iperf = lab.exec("a", &["iperf3", "-J", "-c", ip, "-t", "3"]);
        let result: Value = serde_json::from_str(&iperf).unwrap();
        let received = &result["end"]["sum_received"];
        println!("{ip}: {} bit/s", received["bits_per_second"]);
        assert!(received["bytes"].as_f64().unwrap() > 1e6, "{received}");
        let rtt = result["end"]["streams"][0]["sender"]["min_rtt"].as_f64().unwrap();
        assert!(rtt >= 100_000.0, "{rtt} us");
    }
    let check = lab.run(&["check"]);
    assert!(check.status.success(), "{}", text(&check));

    // A process that dies is started again.
    let pid = relays(&lab);
    assert_eq!(pid.len(), 1);
    kill(Pid::from_raw(pid[0]), Signal::SIGKILL).unwrap();
    wait_for("another process", Duration::from_secs(10), || relays(&lab).iter().any(|p| *p != pid[0]));
    wait_for("packets to pass", Duration::from_secs(10), || {
        !round_trips(&lab, "node-1", second, &["-c1"]).is_empty()
    });
    assert!(least(&round_trips(&lab, "node-1", second, count)) >= 100.0);

    // The newest command is all there is; a second link has a process of its own.
    link(&["--delay", "20.5", "--loss", "30"]);
    let other = lab.run(&["link", "node-3", "node-2", "--delay", "5"]);
    assert!(other.status.success(), "{}", text(&other));
    let status = text(&lab.run(&["status"]));
    assert!(status.contains("30 % of packets are lost, packets are 20.5 ms late"), "{status}");
    assert_eq!(relays(&lab).len(), 2);
    let times = round_trips(&lab, "node-1", second, &["-c60", "-i0.05"]);
    println!("{} of 60", times.len());
    assert!((5..55).contains(&times.len()) && (41.0..60.0).contains(&least(&times)), "{times:?}");
    assert!((10.0..30.0).contains(&least(&round_trips(&lab, "node-3", second, count))));

    let off = lab.run(&["link", "node-2", "node-3", "--delay", "0"]);
    assert!(off.status.success(), "{}", text(&off));
    link(&["--up"]);
    assert!(!text(&lab.run(&["status"])).contains("FAULT"));
    wait_for("the processes to end", Duration::from_secs(5), || relays(&lab).is_empty());
    for (from, to) in [("node-1", second), ("node-3", second)] {
        assert!(least(&round_trips(&lab, from, to, count)) < 20.0, "{from} to {to}");
    }
    let fabric = Command::new("ip").args(["-n", "podway-t_delay-fabric", "-o", "link"]).output().unwrap();
    assert!(text(&fabric).contains("fabric0") && !text(&fabric).contains(": delay"), "{}", text(&fabric));

    for (ms, part) in [("-1", ""), ("50ms", "0 to 10000"), ("10001", "0 to 10000"), ("", "milliseconds")] {
        let refused = lab.run(&["link", "node-1", "node-2", &format!("--delay={ms}")]);
        assert_eq!(refused.status.code(), Some(2), "{ms}: {}", text(&refused));
        assert!(text(&refused).contains(part), "{ms}: {}", text(&refused));
    }

    // A node that goes takes the delay along.
    link(&["--delay", "5"]);
    let removed = lab.run(&["node", "remove", "node-3"]);
    assert!(removed.status.success(), "{}", text(&removed));
    assert_eq!(relays(&lab).len(), 1);
    assert!(least(&round_trips(&lab, "node-1", second, count)) >= 10.0);
}

/// `podway lab status -o json`.
fn status(lab: &Lab) -> Value {
    serde_json::from_slice(&lab.run(&["status", "-o", "json"]).stdout).unwrap()
}

/// What a node's agent sees of the path to another node, as status tells it; null while it has nothing to tell.
fn path(lab: &Lab, from: &str, to: &str) -> Value {
    let status = status(lab);
    let mut paths = status["paths"].as_array().unwrap().iter();
    paths.find(|p| p["from"] == from && p["to"] == to).cloned().unwrap_or_default()
}

/// Path probes of a node to another one that were answered, and that were lost, as its metrics tell it.
fn probes(lab: &Lab, from: &str, to: &str) -> [f64; 2] {
    ["answered", "lost"].map(|result| {
        lab.metric(from, &format!("podway_path_probes_total{{node=\"{to}\",result=\"{result}\"}}"))
    })
}

#[test]
fn partitions_losses_and_nodes_that_rejoin_show_in_status_and_metrics() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_shown", PAIR, &["--nodes", "3"]);
    let said = |args: &[&str]| {
        let output = lab.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let silent = |from: &str, to: &str| lab.metric(from, &format!("podway_path_silent{{node=\"{to}\"}}"));
    let all = ["node-1", "node-2", "node-3"];
    let limit = Duration::from_secs(20);
    let everybody_answers = || {
        let pairs = all.iter().flat_map(|a| all.iter().map(move |b| (*a, *b)));
        pairs.filter(|(a, b)| a != b).all(|(a, b)| silent(a, b) == 0.0)
    };
    wait_for("every agent to know every other", limit, everybody_answers);
    let quiet = said(&["status"]);
    assert!(!quiet.contains("FAULT") && !quiet.contains("AGENT SEES"), "{quiet}");
    assert_eq!(status(&lab)["paths"], serde_json::json!([]));

    // A partition: both ends see it, and nobody else sees anything.
    said(&["link", "node-1", "node-2", "--down"]);
    let took = wait_for("both to see the partition", limit, || {
        silent("node-1", "node-2") == 1.0 && silent("node-2", "node-1") == 1.0
    });
    println!("partition seen after {took:?}");
    for (from, to) in [("node-1", "node-3"), ("node-2", "node-3"), ("node-3", "node-1"), ("node-3", "node-2")]
    {
        assert_eq!(silent(from, to), 0.0, "{from} to {to}");
    }
    let shown = said(&["status"]);
    for line in ["node-1 node-2   down", "node-1 -> node-2   silent", "node-2 -> node-1   silent"] {
        assert!(shown.contains(line), "{line} in {shown}");
    }
    assert!(!shown.contains("-> node-3") && !shown.contains("node-3 ->"), "{shown}");
    let warned = said(&["logs", "node-1"]);
    assert!(warned.contains("does not answer path probes"), "{warned}");

    said(&["link", "node-1", "node-2", "--up"]);
    let took = wait_for("both to see that it is over", limit, || {
        silent("node-1", "node-2") == 0.0 && silent("node-2", "node-1") == 0.0
    });
    println!("healing seen after {took:?}");
    assert!(!said(&["status"]).contains("AGENT SEES"));

    // A lossy link: what is lost is counted at both ends, for this path alone.
    let before = [probes(&lab, "node-1", "node-2"), probes(&lab, "node-2", "node-1")];
    let others = probes(&lab, "node-1", "node-3");
    said(&["link", "node-1", "node-2", "--loss", "30"]);
    let since = || {
        let now = [probes(&lab, "node-1", "node-2"), probes(&lab, "node-2", "node-1")];
        [0, 1].map(|i| [now[i][0] - before[i][0], now[i][1] - before[i][1]])
    };
    // There and back, half of them are lost.
    let took = wait_for("losses at both ends", Duration::from_secs(60), || {
        since().iter().all(|[answered, lost]| *answered >= 4.0 && *lost >= 4.0)
    });
    println!("losses after {took:?}: {:?}", since());
    let seen = path(&lab, "node-1", "node-2");
    assert!(seen["probesLost"].as_f64().unwrap() >= before[0][1] + 4.0, "{seen}");
    let shown = said(&["status"]);
    assert!(shown.contains("node-1 node-2   30 % of packets are lost"), "{shown}");
    assert!(shown.contains("node-2 -> node-1   ") && shown.contains("probes lost so far"), "{shown}");
    let now = probes(&lab, "node-1", "node-3");
    assert!(now[0] > others[0] && now[1] == others[1], "{others:?} {now:?}");

    // A slow one.
    said(&["link", "node-1", "node-2", "--delay", "30"]);
    wait_for("the round trip to show", Duration::from_secs(60), || {
        let rtt = lab.metric("node-1", "podway_path_rtt_seconds{node=\"node-2\"}");
        (0.05..0.2).contains(&rtt) && path(&lab, "node-1", "node-2")["rttSeconds"].as_f64() > Some(0.05)
    });
    assert!(lab.metric("node-1", "podway_path_rtt_seconds{node=\"node-3\"}") < 0.02);
    said(&["link", "node-1", "node-2", "--up"]);

    // A node that goes away and comes back.
    said(&["node", "stop", "node-3"]);
    wait_for("the others to miss it", limit, || {
        silent("node-1", "node-3") == 1.0 && silent("node-2", "node-3") == 1.0
    });
    let gone = lab.run(&["status"]);
    assert_eq!(gone.status.code(), Some(1));
    let gone = text(&gone);
    assert!(gone.contains("nodes 2/3 ready") && gone.contains("stopped"), "{gone}");
    assert!(!gone.contains("AGENT SEES"), "its row says it: {gone}");
    said(&["node", "start", "node-3"]);
    let took = wait_for("everybody to answer again", limit, everybody_answers);
    println!("rejoined after {took:?}");
    assert!(said(&["status"]).contains("nodes 3/3 ready"));
    said(&["check"]);
}
