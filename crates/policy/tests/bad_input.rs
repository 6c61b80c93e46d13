//! Policies that are wrong, odd or many: each is named with its field and the cause, and fails closed where it must.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use std::net::IpAddr;

use podway_model::{ClusterNetworkPolicy, NetworkPolicy, Pod};
use podway_policy::{Compiler, Update};
use serde_json::{Value, json};

fn pod(name: &str, last: u8, labels: &Value) -> Update {
    let value = json!({"metadata": {"namespace": "x", "name": name, "labels": labels},
        "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"podIP": format!("10.0.0.{last}")}});
    Update::Pod(Pod::parse(&value).unwrap())
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({"metadata": {"namespace": "x", "name": name}, "spec": spec})
}

fn allows(compiler: &Compiler, port: u16) -> bool {
    let addr = |last: u8| IpAddr::from([10, 0, 0, last]);
    compiler.table().judge(addr(2), addr(1), 6, port).allow()
}

#[test]
fn what_an_api_server_refuses_is_refused_by_name_field_and_cause_and_isolates() {
    let selector = |expression: Value| json!({"podSelector": {"matchExpressions": [expression]}});
    let block = |block: Value| json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": block}]}]});
    let port = |port: Value| json!({"podSelector": {}, "ingress": [{"ports": [port]}]});
    for (spec, field, cause, isolates) in [
        (
            selector(json!({"key": "app", "operator": "Like", "values": ["a"]})),
            "spec.podSelector.matchExpressions[0].operator",
            "\"Like\" is none of In, NotIn, Exists, DoesNotExist",
            // It does not say which pods.
            false,
        ),
        (
            json!({"podSelector": {}, "ingress": [{"from": [selector(json!({"key": "app", "operator": "Like"}))]}]}),
            "spec.ingress[0].from[0].podSelector.matchExpressions[0].operator",
            "is none of In, NotIn",
            true,
        ),
        (
            block(json!({"cidr": "10.0.0.0/8", "except": ["192.168.0.0/16"]})),
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "192.168.0.0/16 is not inside of 10.0.0.0/8",
            true,
        ),
        (block(json!({"cidr": "10.0.0.0/33"})), "spec.ingress[0].from[0].ipBlock.cidr", "10.0.0.0/33", true),
        (port(json!({"port": 90, "endPort": 80})), "spec.ingress[0].ports[0].endPort", "80", true),
        (
            port(json!({"port": "http", "endPort": 80})),
            "spec.ingress[0].ports[0].endPort",
            "named port",
            true,
        ),
        (port(json!({"port": 70_000})), "spec.ingress[0].ports[0].port", "70000 is not a port", true),
        (
            port(json!({"port": "NoName"})),
            "spec.ingress[0].ports[0].port",
            "cannot be the name of a port",
            true,
        ),
        (port(json!({"port": 80, "protocol": "ICMP"})), "spec.ingress[0].ports[0].protocol", "ICMP", true),
        (
            json!({"podSelector": {}, "policyTypes": ["Both"]}),
            "spec.policyTypes[0]",
            "neither Ingress nor Egress",
            true,
        ),
        (json!({"podSelector": {}, "ingress": 5}), "spec.ingress", "not a list", true),
        (
            json!({"podSelector": {}, "ingress": [{"to": []}]}),
            "spec.ingress[0].to",
            "is no field of a rule for ingress",
            true,
        ),
    ] {
        let value = policy("p", &spec);
        let rejection = NetworkPolicy::parse(&value).unwrap_err();
        let text = rejection.to_string();
        assert!(text.starts_with(&format!("NetworkPolicy x/p: {field}: ")), "{text}");
        assert!(text.contains(cause), "{text}");
        let mut compiler = Compiler::for_cluster();
        compiler.apply([pod("a", 1, &json!({})), pod("b", 2, &json!({}))]);
        compiler.apply(NetworkPolicy::closed(&value).map(Update::NetworkPolicy));
        assert_eq!(!allows(&compiler, 80), isolates, "{spec}");
    }
}

#[test]
fn what_is_odd_is_told_with_name_and_field() {
    let cluster = |name: &str| {
        let value = json!({"kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": {"tier": "Admin",
            "priority": 7, "subject": {"namespaces": {}},
            "egress": [{"action": "Deny", "to": [{"domainNames": ["example.com"]}]}]}});
        Update::ClusterPolicy(ClusterNetworkPolicy::parse(&value).unwrap())
    };
    for (updates, expected) in [
        (
            vec![policy("p", &json!({"podSelector": {"matchLabels": {"app": "none"}}}))],
            vec!["NetworkPolicy x/p: spec.podSelector: selects no pod"],
        ),
        (
            vec![policy("p", &json!({"podSelector": {}, "ingress": [{"ports": [{"port": "grpc"}]}]}))],
            vec!["NetworkPolicy x/p: spec.ingress: no pod that it selects has a port named \"grpc\""],
        ),
        (
            vec![policy(
                "p",
                &json!({"podSelector": {}, "egress": [{"ports": [{"port": "grpc"}, {"port": "http"}]}]}),
            )],
            vec!["NetworkPolicy x/p: spec.egress: no pod has a port named \"grpc\""],
        ),
        (vec![policy("p", &json!({"podSelector": {}, "ingress": [{"ports": [{"port": "http"}]}]}))], vec![]),
    ] {
        let mut compiler = Compiler::for_cluster();
        compiler.apply([pod("a", 1, &json!({})), pod("b", 2, &json!({}))]);
        compiler.apply(updates.iter().map(|v| Update::NetworkPolicy(NetworkPolicy::parse(v).unwrap())));
        let found: Vec<String> = compiler.findings().iter().map(ToString::to_string).collect();
        assert_eq!(found, expected);
    }
    let mut compiler = Compiler::for_cluster();
    compiler.apply([pod("a", 1, &json!({})), cluster("one"), cluster("two")]);
    let found: Vec<String> = compiler.findings().iter().map(ToString::to_string).collect();
    for part in [
        "ClusterNetworkPolicy one: spec.egress[0].to[0]",
        "is not understood; rule 1 therefore denies everything",
        "ClusterNetworkPolicy two: spec.priority: 7 is that of ClusterNetworkPolicy one, too",
    ] {
        assert!(found.iter().any(|f| f.contains(part)), "{part}: {found:#?}");
    }
}

#[test]
fn a_named_port_that_the_target_does_not_have_opens_nothing() {
    let mut compiler = Compiler::for_cluster();
    let update = |name: &str| {
        let spec =
            json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"ports": [{"port": name}]}]});
        Update::NetworkPolicy(NetworkPolicy::parse(&policy("p", &spec)).unwrap())
    };
    compiler.apply([pod("a", 1, &json!({"app": "a"})), pod("b", 2, &json!({})), update("grpc")]);
    assert!(![80, 8080, 65535].into_iter().any(|port| allows(&compiler, port)));
    compiler.apply([update("http")]);
    assert!(allows(&compiler, 8080) && !allows(&compiler, 80));
}

#[test]
fn a_thousand_policies_select_one_pod_and_each_counts() {
    let mut compiler = Compiler::for_cluster();
    let update = |i: u16| {
        let spec = json!({"podSelector": {"matchLabels": {"app": "a"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"n": format!("{}", i % 7)}}}],
                "ports": [{"port": 1000 + i}]}]});
        Update::NetworkPolicy(NetworkPolicy::parse(&policy(&format!("p{i}"), &spec)).unwrap())
    };
    compiler.apply((0..1000).map(update));
    compiler.apply([pod("a", 1, &json!({"app": "a"})), pod("b", 2, &json!({"n": "3"}))]);
    for i in 0..1000 {
        assert_eq!(allows(&compiler, 1000 + i), i % 7 == 3, "{i}");
    }
    let before = compiler.size();
    for i in 0..1000 {
        compiler.apply([pod("b", 2, &json!({"n": "3", "build": i.to_string()}))]);
    }
    assert_eq!(compiler.size(), before, "labels that nobody asks for make no classes");
    compiler.apply((0..1000).map(|i| Update::RemoveNetworkPolicy("x".into(), format!("p{i}"))));
    let after = compiler.size();
    assert_eq!((after.classes, after.sets, after.rules, after.entries), (1, 0, 0, 0));
}

#[test]
fn label_churn_touches_only_the_endpoints_concerned() {
    let mut compiler = Compiler::for_cluster();
    let spec = json!({"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}]});
    compiler.apply([Update::NetworkPolicy(NetworkPolicy::parse(&policy("p", &spec)).unwrap())]);
    let label = |i: u8| if i.is_multiple_of(2) { "a" } else { "b" };
    compiler.apply((1..200).map(|i| pod(&format!("pod-{i}"), i, &json!({"app": label(i)}))));
    let size = compiler.size();
    for round in 0..500_u32 {
        let i = u8::try_from(1 + round % 199).unwrap();
        for app in ["c", label(i)] {
            let changes = compiler.apply([pod(&format!("pod-{i}"), i, &json!({"app": app}))]);
            let of_others = changes.iter().filter(|change| match change {
                podway_policy::Change::Endpoint(addr, _) => *addr != IpAddr::from([10, 0, 0, i]),
                podway_policy::Change::Peer(podway_policy::PeerKey::Address(addr), _) => {
                    *addr != IpAddr::from([10, 0, 0, i])
                }
                _ => false,
            });
            assert_eq!(of_others.count(), 0, "{changes:?}");
        }
    }
    assert_eq!(compiler.size(), size);
}
