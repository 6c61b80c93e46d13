//! Traffic policies, and which endpoints serve.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::scene::{FAMILIES, Family, Saw, Scene, Want, balanced, by, node, service, vip, web};
use crate::lab::{cgroup_root, run, text};

const READY: [bool; 3] = [true, true, false];
const TERMINATING: [bool; 3] = [false, true, true];
const GONE: [bool; 3] = [false, false, true];

pub(super) fn internal_local(s: &mut Scene) {
    s.apply(&[service("inner", 110, json!({"internalTrafficPolicy": "Local"}))]);
    let slices = s.slices("inner", &[("w1", READY), ("w2", READY)], 8080);
    s.apply(&slices);
    for family in FAMILIES {
        let to = (vip(family, 110), 80);
        for from in s.pods() {
            s.tcp(from, to, &by(&["w1"]).seeing(Saw::Client));
        }
        for from in ["node-1", "host"] {
            s.tcp(from, to, &by(&["w1"]));
        }
        s.tcp("w2", to, &by(&["w2"]));
        // Endpoints elsewhere are none here.
        for from in ["w3", "node-3"] {
            s.tcp(from, to, &Want::Silence);
        }
    }
    let none = s.slices("inner", &[], 8080);
    s.apply(&none);
    for from in ["client", "w3", "node-3"] {
        s.tcp(from, (vip(Family::V4, 110), 80), &Want::Refused);
    }
}

pub(super) fn internal_local_of_host(s: &mut Scene) {
    let spec = json!({"internalTrafficPolicy": "Local", "selector": {"app": "host"},
        "ports": [{"port": 80, "targetPort": 18080}]});
    s.apply(&[service("inner-host", 111, spec)]);
    for family in FAMILIES {
        let to = (vip(family, 111), 80);
        for from in s.pods().iter().copied().chain(["node-1", "host"]) {
            s.tcp(from, to, &by(&["host"]));
        }
        for from in ["w3", "node-3"] {
            s.tcp(from, to, &Want::Silence);
        }
    }
}

pub(super) fn external_local(s: &mut Scene) {
    let ips = FAMILIES.map(|family| balanced(family, 22).to_string()).join(",");
    let mut object = service(
        "outer",
        112,
        json!({
            "type": "LoadBalancer",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 30998,
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30110}],
        }),
    );
    object["metadata"]["annotations"] = json!({"podway.dev/load-balancer-ips": ips});
    s.apply(&[object]);
    let slices = s.slices("outer", &[("w1", READY), ("w2", READY)], 8080);
    s.apply(&slices);
    let both = by(&["w1", "w2"]);
    for family in FAMILIES {
        s.tcp("outside", (node(family, 1), 30110), &by(&["w1"]).seeing(Saw::Client));
        s.tcp("outside", (node(family, 2), 30110), &by(&["w2"]).seeing(Saw::Client));
        s.tcp("outside", (node(family, 3), 30110), &Want::Silence);
        // Whoever is in the cluster gets what some node would give.
        for from in s.pods().iter().copied().chain(["w3", "node-1", "node-3", "host"]) {
            s.tcp(from, (balanced(family, 22), 80), &both);
            let own = if from == "w3" || from == "node-3" { 3 } else { 1 };
            s.tcp(from, (node(family, own), 30110), &both);
        }
        s.tcp("client", (balanced(family, 22), 80), &both.clone().seeing(Saw::Client));
        s.tcp("client", (vip(family, 112), 80), &both.clone().seeing(Saw::Client));
    }
    let outside = |s: &mut Scene| {
        let outcomes =
            s.client("outside").tries(super::client::Kind::Tcp, (balanced(Family::V4, 22), 80).into(), 6);
        let own = s.address("outside", Family::V4);
        outcomes.iter().all(|o| matches!(o, super::client::Outcome::Served { saw, .. } if *saw == own))
    };
    s.comes("a load balancer's clients are seen themselves", outside);
    health(s, 1, "200", 1);
    health(s, 2, "200", 1);
    health(s, 3, "503", 0);
    // What ends serves as long as nothing else does, but wants no more from a load balancer.
    let slices = s.slices("outer", &[("w1", TERMINATING), ("w2", READY)], 8080);
    s.apply(&slices);
    health(s, 1, "503", 0);
    s.tcp("outside", (node(Family::V4, 1), 30110), &by(&["w1"]).seeing(Saw::Client));
    let slices = s.slices("outer", &[("w2", READY)], 8080);
    s.apply(&slices);
    s.tcp("outside", (node(Family::V4, 1), 30110), &Want::Silence);
    let slices = s.slices("outer", &[], 8080);
    s.apply(&slices);
    s.tcp("outside", (node(Family::V4, 1), 30110), &Want::Refused);
    s.tcp("client", (balanced(Family::V6, 22), 80), &Want::Refused);
}

/// What the health-check node port says of so many endpoints here.
fn health(s: &mut Scene, n: u8, code: &str, endpoints: u64) {
    let to = SocketAddr::from((node(Family::V4, n), 30998));
    s.comes(&format!("the health check at node {n} says {code} and {endpoints}"), |s| {
        let output = s.client("outside").get(to);
        let body = output.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let body: Value = serde_json::from_str(body).unwrap_or_default();
        output.split(' ').nth(1) == Some(code) && body["localEndpoints"] == endpoints
    });
}

pub(super) fn terminating(s: &mut Scene) {
    let objects = [("end", "Cluster", 113_u8, 30111), ("end-local", "Local", 114, 30112)].map(
        |(name, policy, n, port)| {
            service(
                name,
                n,
                json!({
                    "type": "NodePort",
                    "internalTrafficPolicy": policy,
                    "externalTrafficPolicy": policy,
                    "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": port}],
                }),
            )
        },
    );
    s.apply(&objects);
    let with = |s: &mut Scene, pods: &[(&'static str, [bool; 3])]| {
        let slices = [s.slices("end", pods, 8080), s.slices("end-local", pods, 8080)].concat();
        s.apply(&slices);
    };
    // Nothing is ready: what still serves goes on.
    with(s, &[("w1", TERMINATING), ("w2", TERMINATING)]);
    for family in FAMILIES {
        let both = by(&["w1", "w2"]);
        for from in s.pods().iter().copied().chain(["w3", "host"]) {
            s.tcp(from, (vip(family, 113), 80), &both);
        }
        s.tcp("outside", (node(family, 3), 30111), &both);
        for from in s.pods().iter().copied().chain(["host"]) {
            s.tcp(from, (vip(family, 114), 80), &by(&["w1"]));
        }
        s.tcp("w3", (vip(family, 114), 80), &Want::Silence);
        s.tcp("outside", (node(family, 1), 30112), &by(&["w1"]).seeing(Saw::Client));
        s.tcp("outside", (node(family, 3), 30112), &Want::Silence);
    }
    // One is ready: it has all, but where only the own node's endpoints count and none of those is.
    with(s, &[("w1", TERMINATING), ("w2", TERMINATING), ("w3", READY)]);
    for family in FAMILIES {
        for from in s.pods() {
            s.tcp(from, (vip(family, 113), 80), &by(&["w3"]));
        }
        s.tcp("outside", (node(family, 1), 30111), &by(&["w3"]));
        s.tcp("client", (vip(family, 114), 80), &by(&["w1"]));
        s.tcp("w3", (vip(family, 114), 80), &by(&["w3"]));
        s.tcp("outside", (node(family, 1), 30112), &by(&["w1"]));
        s.tcp("outside", (node(family, 3), 30112), &by(&["w3"]));
    }
    with(s, &[("w1", GONE), ("w2", GONE)]);
    s.tcp("client", (vip(Family::V4, 113), 80), &Want::Refused);
    s.tcp("client", (vip(Family::V4, 114), 80), &Want::Refused);
    s.tcp("outside", (node(Family::V6, 1), 30112), &Want::Refused);
}

pub(super) fn readiness(s: &mut Scene) {
    s.apply(&[
        service("ready", 115, json!({"selector": web()})),
        service("any", 116, json!({"selector": web(), "publishNotReadyAddresses": true})),
    ]);
    let (ready, any) = ((vip(Family::V4, 115), 80), (vip(Family::V6, 116), 80));
    let all = by(&["w1", "w2", "w3"]);
    s.tcp("client", ready, &all);
    s.ready("w2", false);
    s.tcp("client", ready, &by(&["w1", "w3"]));
    s.tcp("client", any, &all);
    for pod in ["w1", "w3"] {
        s.ready(pod, false);
    }
    for from in ["client", "node-1"] {
        s.tcp(from, ready, &Want::Refused);
        s.tcp(from, any, &all);
    }
    s.apply(&[service("any", 116, json!({"selector": web(), "publishNotReadyAddresses": false}))]);
    s.tcp("client", any, &Want::Refused);
    for pod in ["w1", "w2", "w3"] {
        s.ready(pod, true);
    }
    s.tcp("client", ready, &all);
    s.tcp("client", any, &all);
}

pub(super) fn failed_pods(s: &mut Scene) {
    s.apply(&[
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "w9", "labels": {"app": "fails"}},
            "spec": {"nodeName": "node-2", "restartPolicy": "Never",
                "containers": [{"name": "main", "image": "web", "ports": [{"containerPort": 8080}]}]}}),
        service("fails", 117, json!({"selector": {"app": "fails"}})),
    ]);
    let to = (vip(Family::V4, 117), 80);
    s.tcp("client", to, &by(&["w9"]));
    let procs = cgroup_root().join(format!("podway/{}/node-2/default_w9/cgroup.procs", s.lab.name));
    for pid in pids(&procs) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    s.comes("the pod's endpoint is none any more", |s| {
        let shown = run(&["services", "default/fails", "--lab", s.lab.name, "-o", "json"]);
        let shown: Value = serde_json::from_str(&text(&shown)).unwrap_or_default();
        shown["service"]["ports"][0]["endpoints"].as_array().is_some_and(Vec::is_empty)
    });
    for from in ["client", "node-1"] {
        s.tcp(from, to, &Want::Refused);
    }
}

fn pids(procs: &std::path::Path) -> Vec<i32> {
    let text = std::fs::read_to_string(procs).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}
