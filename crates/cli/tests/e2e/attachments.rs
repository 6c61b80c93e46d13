//! The CNI plugin as a runtime calls it: many times, at once, and with both sides dying.

use std::{
    io::Write as _,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::lab::{Lab, can_run, podway, text, wait_for};

/// A namespace of its own to attach.
struct Sandbox(String);

impl Sandbox {
    fn new(name: &str) -> Self {
        let sandbox = Self(format!("pwt-cni-{name}"));
        let _ = Command::new("ip").args(["netns", "del", &sandbox.0]).stderr(Stdio::null()).status();
        let made = Command::new("ip").args(["netns", "add", &sandbox.0]).status().unwrap();
        assert!(made.success());
        sandbox
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).stderr(Stdio::null()).status();
    }
}

/// Calls the plugin for the lab's first node.
fn plugin(lab: &Lab, command: &str, container: &str, netns: &str, extra: &Value) -> Output {
    plugin_if(lab, command, container, netns, "eth0", extra)
}

fn plugin_if(lab: &Lab, command: &str, container: &str, netns: &str, ifname: &str, extra: &Value) -> Output {
    let mut config = json!({
        "cniVersion": "1.1.0", "name": "podway", "type": "podway-cni",
        "socket": format!("/run/podway/{}/node-1/agent.sock", lab.name),
    });
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    let mut child = Command::new(podway().with_file_name("podway-cni"))
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", container)
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", ifname)
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=sandbox")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn must(output: &Output, what: &str) {
    assert!(output.status.success(), "{what}: {}", text(output));
}

/// What the node holds for attachments: links, routes, leases, table entries.
fn holdings(lab: &Lab) -> (usize, usize, f64, f64) {
    let links = lab.on_node("node-1", &["ip", "-o", "link"]);
    let routes = lab.on_node("node-1", &["sh", "-c", "ip route show proto 80; ip -6 route show proto 80"]);
    let lines = |text: &str| text.lines().filter(|l| l.contains(" pw") || l.contains("dev pw")).count();
    let leased = lab.metric("node-1", "podway_pods");
    let endpoints = lab.metric("node-1", "podway_table_entries{table=\"endpoints\"}");
    (lines(&links), lines(&routes), leased, endpoints)
}

const EMPTY: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: empty}\n";

#[test]
fn a_thousand_attachments_and_fifty_at_once_leave_nothing() {
    if !can_run() {
        return;
    }
    // IPv6, because a /24 with a rest of 30 s for each address does not last for a thousand in a minute.
    let lab = Lab::of("t_cycles", EMPTY, &["--nodes", "1", "--family", "ipv6"]);
    let before = holdings(&lab);
    let sandbox = Sandbox::new("cycle");
    let none = json!({});
    let mut times = Vec::new();
    for i in 0..1000 {
        let id = format!("cycle{i}");
        let start = Instant::now();
        must(&plugin(&lab, "ADD", &id, &sandbox.path(), &none), "ADD");
        times.push(start.elapsed());
        must(&plugin(&lab, "DEL", &id, &sandbox.path(), &none), "DEL");
    }
    times.sort();
    println!("ADD p50 {:?}, p99 {:?}", times[500], times[990]);
    std::thread::scope(|scope| {
        let adds: Vec<_> = (0..50)
            .map(|i| {
                let lab = &lab;
                scope.spawn(move || {
                    let sandbox = Sandbox::new(&format!("many{i}"));
                    let id = format!("many{i}");
                    let add = plugin(lab, "ADD", &id, &sandbox.path(), &json!({}));
                    (sandbox, id, add)
                })
            })
            .collect();
        let mut addresses = Vec::new();
        let attached: Vec<_> = adds.into_iter().map(|t| t.join().unwrap()).collect();
        for (sandbox, id, add) in &attached {
            must(add, "one of 50 ADDs");
            let result: Value = serde_json::from_slice(&add.stdout).unwrap();
            addresses.push(result["ips"][0]["address"].as_str().unwrap().to_owned());
            must(&plugin(&lab, "CHECK", id, &sandbox.path(), &json!({"prevResult": result})), "CHECK");
        }
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 50, "every attachment has an address of its own");
        for (i, (sandbox, id, _)) in attached.iter().enumerate() {
            // Half of the namespaces go before their DEL, as they do when a runtime was late.
            let netns = if i % 2 == 0 { sandbox.path() } else { String::new() };
            must(&plugin(&lab, "DEL", id, &netns, &json!({})), "DEL");
            must(&plugin(&lab, "DEL", id, &netns, &json!({})), "DEL again");
        }
    });
    wait_for("nothing left", Duration::from_secs(20), || holdings(&lab) == before);
}

#[test]
fn garbage_collection_removes_what_the_runtime_forgot() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_gc", EMPTY, &["--nodes", "1"]);
    let (keep, lose) = (Sandbox::new("keep"), Sandbox::new("lose"));
    must(&plugin(&lab, "ADD", "keep", &keep.path(), &json!({})), "ADD");
    let kept = holdings(&lab);
    must(&plugin(&lab, "ADD", "lose", &lose.path(), &json!({})), "ADD");
    assert_ne!(holdings(&lab), kept);
    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "keep", "ifname": "eth0"}]});
    must(&plugin(&lab, "GC", "", "", &valid), "GC");
    wait_for("only the known one left", Duration::from_secs(10), || holdings(&lab) == kept);
    must(&plugin(&lab, "STATUS", "", "", &json!({})), "STATUS");
    must(&plugin(&lab, "DEL", "keep", &keep.path(), &json!({})), "DEL");
}

#[test]
fn addresses_run_out_with_a_clear_error() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_full", EMPTY, &["--nodes", "1"]);
    let sandbox = Sandbox::new("full");
    let mut attached = 0;
    let error = loop {
        // A namespace can be attached many times under other interface names.
        let (id, ifname) = (format!("full{attached}"), format!("e{attached}"));
        let output = plugin_if(&lab, "ADD", &id, &sandbox.path(), &ifname, &json!({}));
        if !output.status.success() {
            break text(&output);
        }
        attached += 1;
        assert!(attached <= 256, "a /24 does not hold {attached} addresses");
    };
    println!("after {attached}: {error}");
    assert!(attached > 240, "{attached}: {error}");
    assert!(error.contains("10.244.") && error.contains(&attached.to_string()), "{error}");
    let valid = json!({"cni.dev/valid-attachments": []});
    must(&plugin(&lab, "GC", "", "", &valid), "GC");
}
