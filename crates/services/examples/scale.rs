//! Time and memory of the compiler at scale: `cargo run --release -p podway-services --example scale`.
//!
//! `SERVICES` (10,000) and `ENDPOINTS` (250,000) say how large. Making the objects is not counted.
#![allow(clippy::print_stdout, reason = "it reports to whoever runs it")]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use podway_model::{EndpointSlice, Service};
use podway_services::{Compiler, table::NodeView};
use serde_json::{Value, json};

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Resident memory in MiB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
}

fn service(i: usize) -> Value {
    let cluster_ip = format!("10.96.{}.{}", i / 250, i % 250 + 1);
    // One in ten can be reached from outside.
    let outside = i.is_multiple_of(10);
    json!({
        "metadata": { "namespace": format!("team-{}", i % 100), "name": format!("service-{i}"),
                      "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": {
            "type": if outside { "NodePort" } else { "ClusterIP" },
            "clusterIP": cluster_ip, "clusterIPs": [cluster_ip],
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "nodePort": if outside { 20_000 + i } else { 0 } }],
        },
    })
}

fn slice(i: usize, endpoints: std::ops::Range<usize>, generation: usize) -> Value {
    let endpoints: Vec<Value> = endpoints
        .map(|e| {
            let node = (e * 7 + i) % 5000;
            json!({
                "addresses": [format!("10.{}.{}.{}", 128 + (e / 62_500), e / 250 % 250, e % 250 + 1)],
                "conditions": { "ready": !(e.is_multiple_of(25) && generation % 2 == 1), "serving": true, "terminating": false },
                "nodeName": format!("node-{node}"),
                "zone": format!("zone-{}", node % 3),
                "targetRef": { "kind": "Pod", "name": format!("service-{i}-7c9d8f6b5-{e:05}") },
            })
        })
        .collect();
    json!({
        "metadata": { "namespace": format!("team-{}", i % 100), "name": format!("service-{i}-1"),
                      "labels": { "kubernetes.io/service-name": format!("service-{i}") } },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": endpoints,
    })
}

fn main() {
    let (services, endpoints) = (number("SERVICES", 10_000), number("ENDPOINTS", 250_000));
    let each = (endpoints / services).max(1);
    let view = NodeView {
        name: "node-1".to_owned(),
        zone: Some("zone-1".to_owned()),
        addresses: vec![[192, 168, 0, 1].into()],
        node_port_addresses: vec![[192, 168, 0, 1].into()],
        pod_cidrs: vec!["10.128.0.0/9".parse().expect("a range")],
        ..NodeView::default()
    };
    println!("{services} services, {} endpoints", services * each);

    // As from a watch: an object comes, is read, applied and forgotten.
    let before = resident();
    let mut compiler = Compiler::new(view.clone());
    let (mut parsing, mut applying, mut count) = (Duration::ZERO, Duration::ZERO, 0);
    for i in 0..services {
        let (object, endpoints) = (service(i), slice(i, i * each..(i + 1) * each, 0));
        let start = Instant::now();
        let object = Service::parse(&object).expect("a Service");
        let endpoints = EndpointSlice::parse(&endpoints).expect("an EndpointSlice");
        parsing += start.elapsed();
        let start = Instant::now();
        count += compiler.apply_service(&object).table.len();
        count += compiler.apply_slice(&endpoints).table.len();
        applying += start.elapsed();
    }
    println!("read from JSON:     {parsing:>10.2?}");
    println!(
        "applied one by one: {applying:>10.2?}  {count} changes, {:.0} MiB of memory",
        resident() - before
    );

    let objects: Vec<Service> =
        (0..services).map(|i| Service::parse(&service(i)).expect("a Service")).collect();
    let slices: Vec<EndpointSlice> = (0..services)
        .map(|i| EndpointSlice::parse(&slice(i, i * each..(i + 1) * each, 0)).expect("an EndpointSlice"))
        .collect();
    let start = Instant::now();
    let mut other = Compiler::new(view);
    let count = other.load(&objects, &slices).table.len();
    println!("all at once:        {:>10.2?}  {count} changes", start.elapsed());
    drop(other);

    let rounds = 2000;
    let mut times = Vec::with_capacity(rounds);
    for round in 1..=rounds {
        let i = (round * 7919) % services;
        let changed =
            EndpointSlice::parse(&slice(i, i * each..(i + 1) * each, round)).expect("an EndpointSlice");
        let start = Instant::now();
        black_box(compiler.apply_slice(&changed));
        times.push(start.elapsed());
    }
    times.sort();
    println!(
        "one slice changed:  {:>10.2?}  p99 {:.2?}, of {rounds} with {each} endpoints",
        times[rounds / 2],
        times[rounds * 99 / 100]
    );
}
