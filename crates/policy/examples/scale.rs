//! How long the compiler takes, and how much comes out: `cargo run --release -p podway-policy --example scale`.
//!
//! Clusters of 100 namespaces with pods of ten applications each; policies select one application and allow others in
//! and out by label, by namespace and by range.
#![expect(clippy::print_stdout, reason = "this is what people see")]

use std::time::{Duration, Instant};

use podway_model::{Labels, Namespace, NetworkPolicy, Pod};
use podway_policy::{Compiler, Piece, Reachability, Update};
use serde_json::json;

const NAMESPACES: usize = 100;

fn pod(i: usize, application: usize) -> Update {
    let namespace = i % NAMESPACES;
    let labels = json!({"app": format!("app-{application}"), "pod-template-hash": format!("{i:x}")});
    let value = json!({"metadata": {"namespace": format!("ns-{namespace}"), "name": format!("pod-{i}"), "labels": labels},
        "spec": {"nodeName": format!("node-{}", i % 101), "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"podIP": format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255)}});
    Update::Pod(Pod::parse(&value).expect("the example's own pods are well-formed"))
}

fn policy(i: usize) -> Update {
    let (namespace, application) = (i % NAMESPACES, (i / NAMESPACES) % 10);
    let other = |by: usize| format!("app-{}", (application + by) % 10);
    let value = json!({"metadata": {"namespace": format!("ns-{namespace}"), "name": format!("policy-{i}")}, "spec": {
        "podSelector": {"matchLabels": {"app": format!("app-{application}")}},
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": other(1 + i % 3)}}}], "ports": [{"port": 8000 + i % 100}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"team": format!("team-{}", i % 7)}}}], "ports": [{"port": "http"}]}],
        "egress": [
            {"to": [{"podSelector": {"matchLabels": {"app": other(2)}}}]},
            {"to": [{"ipBlock": {"cidr": format!("192.168.{}.0/24", i % 50)}}], "ports": [{"port": 443}]},
            {"ports": [{"port": 53, "protocol": "UDP"}]}]}});
    Update::NetworkPolicy(NetworkPolicy::parse(&value).expect("the example's own policies are well-formed"))
}

fn namespaces() -> impl Iterator<Item = Update> {
    (0..NAMESPACES).map(|i| {
        let labels: Labels = [("team".to_owned(), format!("team-{}", i % 7))].into();
        Update::Namespace(Namespace::new(&format!("ns-{i}"), labels))
    })
}

/// Resident memory in MB: `VmRSS`, or `VmHWM` for the most since [`forget_peak`] (proc(5)).
fn resident(what: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with(what)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// Sets the peak of resident memory back to what it is now (proc(5), `clear_refs`).
fn forget_peak() {
    if std::fs::write("/proc/self/clear_refs", "5").is_err() {
        println!("the peak of memory is that of the whole run: /proc/self/clear_refs cannot be written");
    }
}

fn percentile(times: &mut [Duration], of: usize) -> Duration {
    times.sort_unstable();
    times[times.len() * of / 100]
}

fn main() {
    for (pods, policies, node) in [
        (1_000, 500, None),
        (10_000, 1_000, None),
        (10_000, 1_000, Some("node-1")),
        (10_000, 10_000, Some("node-1")),
        (10_000, 10_000, None),
    ] {
        let mut updates: Vec<Update> = namespaces().collect();
        updates.extend((0..pods).map(|i| pod(i, (i / NAMESPACES) % 10)));
        updates.extend((0..policies).map(policy));
        forget_peak();
        let before = resident("VmRSS");
        let start = Instant::now();
        let mut compiler = node.map_or_else(Compiler::for_cluster, Compiler::for_node);
        let changes = compiler.apply(updates).len();
        let took = start.elapsed();
        println!(
            "{pods} pods, {policies} policies, {}: compiled from nothing in {:.0} ms, {changes} changes, {:.0} MB on top \
             of {before:.0} MB with the objects, at most {:.0} MB on the way",
            node.map_or("all pods as endpoints", |_| "one node of 101"),
            took.as_secs_f64() * 1e3,
            resident("VmRSS") - before,
            resident("VmHWM") - before
        );
        println!("    {:?}", compiler.size());
        if pods <= 1_000 {
            let start = Instant::now();
            let mut reach = Reachability::new(&compiler);
            let addresses: Vec<_> =
                compiler.pods().flat_map(|pod| pod.addresses.clone()).map(|addr| reach.place(addr)).collect();
            let mut open = 0;
            for source in &addresses {
                for target in &addresses {
                    open += usize::from(reach.from_to(*source, *target).iter().any(Piece::allow));
                }
            }
            println!(
                "    all {} pairs over all ports in {:.0} ms, {open} of them may do something",
                addresses.len() * addresses.len(),
                start.elapsed().as_secs_f64() * 1e3
            );
        }
        let size = compiler.size();
        let mut times: Vec<Duration> = Vec::new();
        let mut most = 0;
        for round in 0..2_000 {
            let i = (round * 37) % pods;
            // Out to another application, and back.
            for application in [(i / NAMESPACES + 1) % 10, (i / NAMESPACES) % 10] {
                let update = pod(i, application);
                let start = Instant::now();
                let changes = compiler.apply([update]);
                times.push(start.elapsed());
                most = most.max(changes.len());
            }
        }
        println!(
            "    one label changed: p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms, at most {most} changes",
            percentile(&mut times, 50).as_secs_f64() * 1e3,
            percentile(&mut times, 99).as_secs_f64() * 1e3,
            times.last().map_or(0.0, Duration::as_secs_f64) * 1e3
        );
        let after = compiler.size();
        println!("    classes after {} changes: {} (before: {})", times.len(), after.classes, size.classes);
        assert_eq!(after, size, "label churn leaves nothing behind");
    }
}
