//! Agents that die, and machines that are to be left clean.

use std::{fs, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::lab::{Lab, PAIR, can_run, text, traces, wait_for};

#[test]
fn running_pods_do_not_notice_the_death_of_their_agents() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_death", PAIR, &["--nodes", "2"]);
    let b = lab.pod_ip("b").to_string();
    let endpoints = || lab.on_node("node-1", &["ip", "-d", "link"]);
    let before = endpoints();
    let ping = lab.start_in_pod("default/a", &["ping", "-c100", "-i0.05", "-W1", &b]);
    let iperf =
        lab.start_in_pod("default/a", &["iperf3", "-J", "-c", &b, "-t", "5", "-u", "-b", "2M", "-l", "1300"]);
    std::thread::sleep(Duration::from_millis(500));
    for node in ["node-1", "node-2"] {
        let pid = lab.agent_pid(node);
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        wait_for("a new agent", Duration::from_secs(20), || {
            let procs =
                crate::lab::cgroup_root().join(format!("podway/{}/{node}/agent/cgroup.procs", lab.name));
            let pids = fs::read_to_string(procs).unwrap_or_default();
            pids.lines().next().is_some_and(|p| p != pid.to_string())
        });
    }
    let ping = ping.wait_with_output().unwrap();
    let out = text(&ping);
    assert!(out.contains("100 packets transmitted, 100 received"), "{out}");
    let iperf = iperf.wait_with_output().unwrap();
    let result: Value =
        serde_json::from_slice(&iperf.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&iperf)));
    let sent = result["end"]["sum"]["packets"].as_u64().unwrap();
    let lost = result["end"]["sum"]["lost_packets"].as_u64().unwrap();
    println!("{lost} of {sent} datagrams lost");
    // A stream slow enough that no socket buffer overflows on a busy machine: what is lost, the datapath lost.
    assert!(sent > 500 && lost == 0, "{lost} of {sent} lost");
    for node in ["node-1", "node-2"] {
        wait_for("a ready successor", Duration::from_secs(20), || {
            let ready = lab.run(&["node", "exec", node, "--", "curl", "-sf", "http://127.0.0.1:9950/readyz"]);
            ready.status.success()
        });
    }
    assert_eq!(endpoints(), before, "the successor adopts every link as it is");
    let check = lab.run(&["check"]);
    assert!(check.status.success(), "{}", text(&check));
}

#[test]
fn cleanup_removes_every_trace_of_an_agent() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_cleanup", PAIR, &["--nodes", "2"]);
    let alive = lab.run(&["node", "exec", "node-1", "--", crate::lab::podway().to_str().unwrap(), "cleanup"]);
    assert!(!alive.status.success(), "cleanup under a living agent:\n{}", text(&alive));
    let forced = lab.run(&[
        "node",
        "exec",
        "node-1",
        "--",
        "sh",
        "-c",
        // The supervisor would start the agent again at once; stop both for the moment of the cleanup.
        &format!(
            "kill -STOP {}; kill -9 {}; {} cleanup --force",
            supervisor_pid(&lab),
            lab.agent_pid("node-1"),
            crate::lab::podway().display()
        ),
    ]);
    assert!(forced.status.success(), "{}", text(&forced));
    let links = lab.on_node("node-1", &["ip", "-o", "link"]);
    assert!(!links.contains("podway_vxlan") && !links.contains(" pw"), "{links}");
    let routes = lab.on_node("node-1", &["ip", "route", "show", "proto", "80"]);
    assert!(routes.trim().is_empty(), "{routes}");
    let tables = lab.on_node("node-1", &["nft", "list", "tables"]);
    assert!(!tables.contains("podway"), "{tables}");
    let programs = lab.on_node("node-1", &["sh", "-c", "ls /sys/fs/bpf/podway/t_cleanup/node-1 2>&1; true"]);
    assert!(programs.contains("No such file"), "{programs}");
    kill(Pid::from_raw(supervisor_pid(&lab)), Signal::SIGCONT).unwrap();
}

fn supervisor_pid(lab: &Lab) -> i32 {
    let file = fs::read_to_string(format!("/run/podway/labs/{}/supervisor.json", lab.name)).unwrap();
    let file: Value = serde_json::from_str(&file).unwrap();
    i32::try_from(file["pid"].as_i64().unwrap()).unwrap()
}

#[test]
fn down_leaves_nothing_even_after_a_crash() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_down", PAIR, &["--nodes", "2"]);
    assert!(!traces("t_down").is_empty());
    for pid in [supervisor_pid(&lab), lab.agent_pid("node-2")] {
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }
    let down = lab.down();
    assert!(down.status.success(), "{}", text(&down));
    assert_eq!(traces("t_down"), Vec::<String>::new());
    let again = lab.down();
    assert!(again.status.success(), "a second time:\n{}", text(&again));
}

#[test]
fn labs_live_side_by_side() {
    if !can_run() {
        return;
    }
    let one = Lab::of("t_side1", PAIR, &["--nodes", "2"]);
    let other = Lab::of("t_side2", PAIR, &["--nodes", "2", "--mode", "direct"]);
    for lab in [&one, &other] {
        let check = lab.run(&["check"]);
        assert!(check.status.success(), "{}:\n{}", lab.name, text(&check));
    }
    drop(one);
    let check = other.run(&["check"]);
    assert!(check.status.success(), "after the other went:\n{}", text(&check));
}
