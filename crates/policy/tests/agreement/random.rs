//! Random clusters, small enough that everything meets everything.

use std::net::IpAddr;

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::naive::Objects;

fn one(list: &'static [&'static str]) -> impl Strategy<Value = &'static str> {
    prop::sample::select(list)
}

fn labels() -> impl Strategy<Value = Value> {
    (prop::option::of(one(&["x", "y"])), prop::option::of(one(&["x", "y"]))).prop_map(|(a, b)| {
        let mut labels = json!({});
        a.into_iter().for_each(|v| labels["a"] = v.into());
        b.into_iter().for_each(|v| labels["b"] = v.into());
        labels
    })
}

fn selector() -> impl Strategy<Value = Value> {
    let key = || one(&["a", "b"]);
    prop_oneof![
        3 => Just(json!({})),
        3 => (key(), one(&["x", "y"])).prop_map(|(k, v)| json!({"matchLabels": {k: v}})),
        1 => (key(), prop::sample::subsequence(vec!["x", "y", "z"], 1..3), any::<bool>()).prop_map(|(k, v, not)| {
            json!({"matchExpressions": [{"key": k, "operator": if not { "NotIn" } else { "In" }, "values": v}]})
        }),
        1 => (key(), any::<bool>()).prop_map(|(k, not)| {
            json!({"matchExpressions": [{"key": k, "operator": if not { "DoesNotExist" } else { "Exists" }}]})
        }),
    ]
}

fn namespace_selector() -> impl Strategy<Value = Value> {
    let by_name = |n| json!({"matchLabels": {"kubernetes.io/metadata.name": n}});
    prop_oneof![2 => selector(), 1 => one(&["n0", "n1", "n2"]).prop_map(by_name)]
}

const CIDRS: &[&str] = &[
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/24",
    "10.0.1.0/24",
    "10.0.1.1/32",
    "172.16.0.0/16",
    "8.8.0.0/16",
    "::/0",
    "fd00::/16",
    "fd00:0:0:1::/64",
];
/// A range, and ranges inside of it.
const EXCEPT: &[(&str, &[&str])] = &[
    ("0.0.0.0/0", &["10.0.0.0/8", "8.8.8.0/24"]),
    ("10.0.0.0/8", &["10.0.1.0/24", "10.0.1.1/32", "10.0.0.0/24"]),
    ("10.0.1.0/24", &["10.0.1.1/32"]),
    ("::/0", &["fd00::/16", "fd00:0:0:1::/64"]),
];

fn block() -> impl Strategy<Value = Value> {
    let except = prop::sample::select(EXCEPT).prop_flat_map(|(cidr, inside)| {
        prop::sample::subsequence(inside.to_vec(), 1..=inside.len())
            .prop_map(move |except| json!({"ipBlock": {"cidr": cidr, "except": except}}))
    });
    prop_oneof![one(CIDRS).prop_map(|c| json!({"ipBlock": {"cidr": c}})), except]
}

fn peer() -> impl Strategy<Value = Value> {
    prop_oneof![
        2 => selector().prop_map(|s| json!({"podSelector": s})),
        1 => namespace_selector().prop_map(|s| json!({"namespaceSelector": s})),
        2 => (selector(), namespace_selector()).prop_map(|(p, n)| json!({"podSelector": p, "namespaceSelector": n})),
        2 => block(),
    ]
}

fn number() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![53_u16, 79, 80, 81, 8080, 65535])
}

fn protocol() -> impl Strategy<Value = &'static str> {
    one(&["TCP", "UDP", "SCTP"])
}

fn port() -> impl Strategy<Value = Value> {
    prop_oneof![
        number().prop_map(|n| json!({"port": n})),
        (number(), protocol()).prop_map(|(n, p)| json!({"port": n, "protocol": p})),
        (number(), number(), protocol())
            .prop_map(|(a, b, p)| json!({"port": a.min(b), "endPort": a.max(b), "protocol": p})),
        (one(&["web", "dns"]), protocol()).prop_map(|(n, p)| json!({"port": n, "protocol": p})),
        protocol().prop_map(|p| json!({"protocol": p})),
    ]
}

fn rules(peers: &'static str) -> impl Strategy<Value = Vec<Value>> {
    let rule = (prop::collection::vec(peer(), 0..3), prop::collection::vec(port(), 0..3));
    let rule = rule.prop_map(move |(p, ports)| json!({peers: p, "ports": ports}));
    prop::collection::vec(rule, 0..3)
}

fn audit() -> impl Strategy<Value = Value> {
    prop_oneof![4 => Just(json!({})), 1 => Just(json!({"podway.dev/audit": "true"}))]
}

fn network_policy(i: usize) -> impl Strategy<Value = Value> {
    let types = prop::sample::subsequence(vec!["Ingress", "Egress"], 0..=2);
    (one(&["n0", "n1", "n2"]), selector(), rules("from"), rules("to"), types, audit()).prop_map(
        move |(namespace, pods, ingress, egress, types, audit)| {
            json!({"kind": "NetworkPolicy",
                "metadata": {"name": format!("np{i}"), "namespace": namespace, "annotations": audit},
                "spec": {"podSelector": pods, "ingress": ingress, "egress": egress, "policyTypes": types}})
        },
    )
}

fn cluster_rules(peers: &'static str) -> impl Strategy<Value = Vec<Value>> {
    let pods = (selector(), namespace_selector())
        .prop_map(|(p, n)| json!({"pods": {"podSelector": p, "namespaceSelector": n}}));
    let both = prop_oneof![namespace_selector().prop_map(|n| json!({"namespaces": n})), pods];
    let networks = prop::sample::subsequence(CIDRS.to_vec(), 1..3).prop_map(|n| json!({"networks": n}));
    let outward =
        prop_oneof![2 => both.clone(), 1 => selector().prop_map(|s| json!({"nodes": s})), 1 => networks];
    let peer = if peers == "to" { outward.boxed() } else { both.boxed() };
    let lower = |p: &str| p.to_lowercase();
    let match_ = prop_oneof![
        (protocol(), number()).prop_map(move |(p, n)| json!({lower(p): {"destinationPort": {"number": n}}})),
        (protocol(), number()).prop_map(
            move |(p, n)| json!({lower(p): {"destinationPort": {"range": {"start": 60, "end": n.max(61)}}}})
        ),
        one(&["web", "dns"]).prop_map(|n| json!({"destinationNamedPort": n})),
    ];
    let rule = (
        one(&["Accept", "Deny", "Pass"]),
        prop::collection::vec(peer, 1..3),
        prop::collection::vec(match_, 0..3),
    );
    let rule = rule.prop_map(move |(action, list, protocols)| {
        let mut rule = json!({"action": action, peers: list});
        if !protocols.is_empty() {
            rule["protocols"] = protocols.into();
        }
        rule
    });
    prop::collection::vec(rule, 0..3)
}

fn cluster_policy(i: usize) -> impl Strategy<Value = Value> {
    let subject = prop_oneof![
        namespace_selector().prop_map(|n| json!({"namespaces": n})),
        (selector(), namespace_selector())
            .prop_map(|(p, n)| json!({"pods": {"podSelector": p, "namespaceSelector": n}})),
    ];
    (one(&["Admin", "Baseline"]), 0..4_u16, subject, cluster_rules("from"), cluster_rules("to"), audit()).prop_map(
        move |(tier, priority, subject, ingress, egress, audit)| {
            json!({"kind": "ClusterNetworkPolicy", "metadata": {"name": format!("cnp{i}"), "annotations": audit},
                "spec": {"tier": tier, "priority": priority, "subject": subject, "ingress": ingress, "egress": egress}})
        },
    )
}

const PODS: usize = 7;

fn pod(i: usize) -> impl Strategy<Value = Value> {
    let port = (one(&["web", "dns"]), protocol(), number())
        .prop_map(|(n, p, c)| json!({"name": n, "protocol": p, "containerPort": c}));
    let is_host = prop::sample::select(vec![false, false, false, false, true]);
    (0..3_usize, labels(), prop::collection::vec(port, 0..3), is_host).prop_map(move |(n, labels, ports, host)| {
        let node = i % 2;
        let ips = if host {
            json!([{"ip": format!("172.16.0.{}", node + 1)}])
        } else {
            json!([{"ip": format!("10.0.{}.{}", i % 3, i + 1)}, {"ip": format!("fd00:0:0:{}::{}", i % 3, i + 1)}])
        };
        json!({"kind": "Pod", "metadata": {"name": format!("p{i}"), "namespace": format!("n{n}"), "labels": labels},
            "spec": {"nodeName": format!("node-{node}"), "hostNetwork": host, "containers": [{"ports": ports}]},
            "status": {"podIPs": ips}})
    })
}

pub(crate) fn cluster() -> impl Strategy<Value = Objects> {
    let namespaces: Vec<_> = (0..3)
        .map(|i| {
            labels().prop_map(
                move |l| json!({"kind": "Namespace", "metadata": {"name": format!("n{i}"), "labels": l}}),
            )
        })
        .collect();
    let nodes: Vec<_> = (0..2)
        .map(|i| {
            labels().prop_map(move |l| {
                json!({"kind": "Node", "metadata": {"name": format!("node-{i}"), "labels": l},
                    "status": {"addresses": [{"type": "InternalIP", "address": format!("172.16.0.{}", i + 1)}]}})
            })
        })
        .collect();
    let pods: Vec<_> = (0..PODS).map(pod).collect();
    let network: Vec<_> = (0..5).map(|i| prop::option::weighted(0.7, network_policy(i))).collect();
    let cluster: Vec<_> = (0..4).map(|i| prop::option::weighted(0.5, cluster_policy(i))).collect();
    (namespaces, nodes, pods, network, cluster).prop_map(|(namespaces, nodes, pods, network, cluster)| {
        Objects {
            namespaces,
            nodes,
            pods,
            network_policies: network.into_iter().flatten().collect(),
            cluster_policies: cluster.into_iter().flatten().collect(),
        }
    })
}

/// Addresses that packets may have.
pub(crate) fn addresses() -> Vec<IpAddr> {
    let mut all: Vec<String> = (0..PODS).map(|i| format!("10.0.{}.{}", i % 3, i + 1)).collect();
    all.extend((0..PODS).map(|i| format!("fd00:0:0:{}::{}", i % 3, i + 1)));
    all.extend(
        ["172.16.0.1", "172.16.0.2", "8.8.8.8", "8.8.4.4", "9.9.9.9", "2001:db8::1"].map(str::to_owned),
    );
    all.iter().map(|a| a.parse().unwrap()).collect()
}

pub(crate) const PORTS: [u16; 8] = [1, 53, 60, 79, 80, 81, 8080, 65535];
