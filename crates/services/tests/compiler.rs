//! What the compiler makes of single changes: conflicts, numbers, findings, questions, work.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::net::IpAddr;

use podway_model::{EndpointSlice, Service};
use podway_services::{
    Changes, Choice, Compiler, Flow, HostPort, NotHandled, ServiceTable, TableChange, Verdict, decide,
    table::{
        Family, FrontendAddr, FrontendKey, FrontendKind, NodeView, Protocol, SERVICE_ID_REST, ServiceId,
        SetKind,
    },
};
use serde_json::{Value, json};

fn view() -> NodeView {
    NodeView {
        name: "node-1".to_owned(),
        zone: Some("a".to_owned()),
        addresses: vec![ip("192.168.0.1")],
        node_port_addresses: vec![ip("192.168.0.1")],
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        ..NodeView::default()
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A Service of one port with more in its spec.
fn service(name: &str, cluster_ip: &str, spec: &Value) -> Service {
    service_at(name, "2026-01-01T00:00:00Z", cluster_ip, spec)
}

fn service_at(name: &str, created: &str, cluster_ip: &str, spec: &Value) -> Service {
    let mut whole = json!({"clusterIP": cluster_ip, "ports": [{"port": 80}]});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    let ingress = whole.as_object_mut().unwrap().remove("ingress").unwrap_or(Value::Null);
    Service::parse(&json!({
        "metadata": {"namespace": "default", "name": name, "creationTimestamp": created},
        "spec": whole,
        "status": {"loadBalancer": {"ingress": ingress}},
    }))
    .unwrap()
}

/// A slice of a Service at port 8080.
fn slice(name: &str, of: &str, endpoints: &Value) -> EndpointSlice {
    EndpointSlice::parse(&json!({
        "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": endpoints,
    }))
    .unwrap()
}

fn pods(addresses: &[&str]) -> Value {
    addresses.iter().map(|addr| json!({"addresses": [addr], "nodeName": "node-1"})).collect()
}

fn at(addr: &str, port: u16) -> FrontendKey {
    FrontendKey { addr: FrontendAddr::Ip(ip(addr)), port, protocol: Protocol::Tcp }
}

fn destinations(compiler: &Compiler, dst: &str, port: u16) -> Vec<String> {
    let flow = Flow { src: ip("10.244.9.9"), dst: ip(dst), port, protocol: Protocol::Tcp };
    decide(compiler.table(), compiler.view(), &flow).destinations.iter().map(|(a, _)| a.to_string()).collect()
}

/// Texts of findings, after a change.
fn found(changes: &Changes) -> Vec<String> {
    changes.found.iter().map(ToString::to_string).collect()
}

#[test]
fn the_older_of_two_wins_and_the_other_takes_over() {
    let mut compiler = Compiler::new(view());
    let young = service_at("a", "2026-02-01T00:00:00Z", "172.30.0.1", &json!({}));
    let old = service_at("b", "2026-01-01T00:00:00Z", "172.30.0.1", &json!({}));
    compiler.apply_slice(&slice("a-1", "a", &pods(&["10.244.0.1"])));
    compiler.apply_slice(&slice("b-1", "b", &pods(&["10.244.0.2"])));
    assert!(compiler.apply_service(&young).found.is_empty());
    assert_eq!(destinations(&compiler, "172.30.0.1", 80), ["10.244.0.1"]);

    let changes = compiler.apply_service(&old);
    assert_eq!(
        found(&changes),
        [
            "Service default/a: spec.clusterIPs (spec.ports[0]): 172.30.0.1:80/TCP belongs to Service default/b, which is \
          older; Service default/a does not answer there until one of them is changed"
        ]
    );
    assert_eq!(destinations(&compiler, "172.30.0.1", 80), ["10.244.0.2"]);
    let report = compiler.explain("default", "a").unwrap();
    assert_eq!(report.ports[0].frontends[0].held_by.as_deref(), Some("Service default/b"));
    assert_eq!(report.findings.len(), 1);

    let changes = compiler.remove_service("default", "b");
    assert_eq!(changes.cleared.len(), 1);
    assert_eq!(destinations(&compiler, "172.30.0.1", 80), ["10.244.0.1"]);
    assert!(
        changes
            .table
            .iter()
            .all(|change| !matches!(change, TableChange::FrontendGone(_) | TableChange::VipGone(_)))
    );
    assert!(compiler.findings().is_empty());
}

#[test]
fn node_ports_host_ports_and_addresses_conflict_by_name() {
    let mut compiler = Compiler::new(view());
    let node_port = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30_080}]});
    compiler.apply_service(&service_at("a", "2026-01-01T00:00:00Z", "172.30.0.1", &node_port));
    let changes = compiler.apply_service(&service_at("b", "2026-01-02T00:00:00Z", "172.30.0.2", &node_port));
    assert!(found(&changes)[0].starts_with(
        "Service default/b: spec.ports[0].nodePort: the nodes' IPv4 addresses:30080/TCP belongs to Service default/a"
    ));
    let host_port = HostPort {
        created: "2026-01-03T00:00:00Z".to_owned(),
        host_ip: None,
        port: 30_080,
        protocol: Protocol::Tcp,
        pod_ips: vec![ip("10.244.0.7"), ip("fd00::7")],
        container_port: 80,
    };
    let changes = compiler.set_host_port("default", "pod", 0, &host_port);
    assert!(
        found(&changes)[0]
            .starts_with("Pod default/pod: hostPort 30080 of port 0: the nodes' IPv4 addresses:30080")
    );
    let v6 = FrontendKey { addr: FrontendAddr::Node(Family::V6), port: 30_080, protocol: Protocol::Tcp };
    assert_eq!(compiler.table().frontends[&v6].kind, FrontendKind::HostPort);
    compiler.remove_service("default", "a");
    let changes = compiler.remove_service("default", "b");
    assert_eq!(destinations(&compiler, "192.168.0.1", 30_080), ["10.244.0.7"]);
    assert_eq!(changes.cleared.len(), 1);
    compiler.remove_host_port("default", "pod", 0);
    assert!(compiler.table().is_empty());
}

#[test]
fn one_object_may_name_an_address_twice() {
    let mut compiler = Compiler::new(view());
    compiler.apply_service(&service(
        "web",
        "172.30.0.1",
        &json!({
            "type": "LoadBalancer", "externalIPs": ["192.0.2.1"], "ingress": [{"ip": "192.0.2.1"}],
            "loadBalancerSourceRanges": ["203.0.113.0/24"],
        }),
    ));
    assert!(compiler.findings().is_empty(), "{:?}", compiler.findings());
    // The guarded one, or an external IP would be a way around the ranges.
    assert_eq!(compiler.table().frontends[&at("192.0.2.1", 80)].kind, FrontendKind::LoadBalancer);
    let changes = compiler.apply_service(&service(
        "web",
        "172.30.0.1",
        &json!({"type": "NodePort", "ports": [{"name": "a", "port": 80, "nodePort": 30_080}, {"name": "b", "port": 81, "nodePort": 30_080}]}),
    ));
    assert_eq!(
        found(&changes),
        [
            "Service default/web: spec.ports[1].nodePort: is the same as spec.ports[0].nodePort, which is used; give each port its own"
        ]
    );
}

#[test]
fn numbers_stay_and_rest() {
    let mut compiler = Compiler::new(view());
    let id = |compiler: &Compiler| *compiler.table().services.keys().next().unwrap();
    compiler.apply_service(&service("web", "172.30.0.1", &json!({})));
    assert_eq!(id(&compiler), ServiceId(0));
    // Another port number and address, the same port by name.
    compiler.apply_service(&service("web", "172.30.0.9", &json!({"ports": [{"port": 81}]})));
    assert_eq!(id(&compiler), ServiceId(0));
    let mut seen = Vec::new();
    for _ in 0..SERVICE_ID_REST + 3 {
        compiler.remove_service("default", "web");
        compiler.apply_service(&service("web", "172.30.0.1", &json!({})));
        seen.push(id(&compiler).0);
    }
    let first_again = seen.iter().position(|id| *id == 0).unwrap();
    assert!(first_again >= SERVICE_ID_REST, "0 is used again after {first_again}");
    assert!(seen.iter().all(|id| *id as usize <= SERVICE_ID_REST + 1), "dense");
}

#[test]
fn numbers_survive_a_restart() {
    let load = |compiler: &mut Compiler, names: &[&str]| {
        for (i, name) in names.iter().enumerate() {
            compiler.apply_service(&service(name, &format!("172.30.0.{}", i + 1), &json!({})));
        }
    };
    let mut before = Compiler::new(view());
    load(&mut before, &["a", "b", "c"]);
    let mut after = Compiler::new(view());
    after.adopt(before.table());
    load(&mut after, &["new", "c", "a"]);
    after.release_adopted();
    let number = |compiler: &Compiler, name: &str| {
        compiler.table().services.iter().find(|(_, meta)| &*meta.name == name).map(|(id, _)| id.0)
    };
    assert_eq!(
        (number(&after, "a"), number(&after, "c"), number(&after, "new")),
        (Some(0), Some(2), Some(3))
    );
    let changes = ServiceTable::diff(before.table(), after.table());
    let mut table = before.table().clone();
    for change in &changes {
        table.apply(change);
        assert!(table.violations().is_empty());
    }
    assert_eq!(&table, after.table());
}

#[test]
fn work_is_that_of_the_service() {
    for services in [10, 1000] {
        let mut compiler = Compiler::new(view());
        let name = |i: usize| format!("web-{i}");
        for i in 0..services {
            compiler.apply_service(&service(
                &name(i),
                &format!("172.30.{}.{}", i / 250, i % 250 + 1),
                &json!({}),
            ));
            let addr = format!("10.244.{}.{}", i / 250, i % 250 + 1);
            compiler.apply_slice(&slice(&format!("{}-1", name(i)), &name(i), &pods(&[&addr])));
        }
        let before = compiler.work();
        let changes = compiler.apply_slice(&slice(
            "web-3-1",
            "web-3",
            &pods(&["10.244.0.4", "10.244.99.1", "10.244.99.2"]),
        ));
        let after = compiler.work();
        let done = (
            after.compiled - before.compiled,
            after.endpoints - before.endpoints,
            after.frontends - before.frontends,
        );
        assert_eq!(done, (1, 3, 1), "with {services} services");
        assert_eq!(changes.table.len(), 1, "{:?}", changes.table);
        assert!(
            matches!(&changes.table[0], TableChange::Set(id, Some(set)) if id.kind == SetKind::Cluster && set.len() == 3)
        );
        // What is the same costs nothing.
        let again = compiler.apply_slice(&slice(
            "web-3-1",
            "web-3",
            &pods(&["10.244.0.4", "10.244.99.1", "10.244.99.2"]),
        ));
        assert!(again.is_empty());
        assert_eq!(compiler.work(), after);
        // Nor do nodes, nor more ranges for pods.
        compiler.set_node("node-7", &[ip("192.168.0.7")]);
        let mut wider = view();
        wider.pod_cidrs.push("10.245.0.0/16".parse().unwrap());
        compiler.set_view(wider);
        assert_eq!(compiler.work(), after);
    }
}

#[test]
fn strays_are_used_and_told_of() {
    let mut compiler = Compiler::new(view());
    compiler.apply_service(&service("web", "172.30.0.1", &json!({})));
    let endpoints = json!([{"addresses": ["10.244.0.1"]}, {"addresses": ["198.51.100.1"]}, {"addresses": ["198.51.100.2"]}]);
    let changes = compiler.apply_slice(&slice("web-1", "web", &endpoints));
    assert_eq!(
        found(&changes),
        [
            "EndpointSlice default/web-1: endpoints[1].addresses[0]: 198.51.100.1 (and 1 more) is in no pod range and on no \
          node; it is used as it is, for whoever made the slice may mean something outside of the cluster"
        ]
    );
    assert_eq!(destinations(&compiler, "172.30.0.1", 80).len(), 3);
    // They turn out to be pods in the network of a node.
    let changes = compiler.set_node("node-2", &[ip("198.51.100.1"), ip("198.51.100.2")]);
    assert_eq!((changes.table.len(), changes.found.len(), changes.cleared.len()), (0, 0, 1));
    let changes = compiler.remove_node("node-2");
    assert_eq!((changes.found.len(), changes.cleared.len()), (1, 0));
    let mut wider = view();
    wider.pod_cidrs.push("198.51.100.0/24".parse().unwrap());
    assert_eq!(compiler.set_view(wider).cleared.len(), 1);
    assert_eq!(compiler.set_view(view()).found.len(), 1);
}

#[test]
fn a_family_that_the_service_lacks_is_told_of() {
    let mut compiler = Compiler::new(view());
    compiler.apply_service(&service(
        "web",
        "172.30.0.1",
        &json!({"externalIPs": ["2001:db8::1"], "type": "LoadBalancer", "ingress": [{"ip": "192.0.2.1"}],
                "loadBalancerSourceRanges": ["2001:db8::/32"]}),
    ));
    let mut other = slice("web-6", "web", &json!([]));
    other = EndpointSlice::parse(&json!({
        "metadata": {"namespace": other.namespace, "name": other.name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv6", "ports": [{"port": 80}], "endpoints": [{"addresses": ["fd00::1"]}],
    }))
    .unwrap();
    compiler.apply_slice(&other);
    let texts: Vec<String> = compiler.findings().iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), 3, "{texts:#?}");
    assert!(
        texts[0].starts_with(
            "EndpointSlice default/web-6: addressType: 1 endpoints of Service web are IPv6, but"
        )
    );
    assert!(texts[1].starts_with(
        "Service default/web: spec.externalIPs: 2001:db8::1 is IPv6, but the Service has no IPv6"
    ));
    assert!(texts[2].starts_with(
        "Service default/web: spec.loadBalancerSourceRanges: no range is IPv4, so nobody is let in"
    ));
    let flow = Flow { src: ip("203.0.113.1"), dst: ip("192.0.2.1"), port: 80, protocol: Protocol::Tcp };
    assert_eq!(decide(compiler.table(), compiler.view(), &flow).verdict, Verdict::Drop);
    let report = compiler.explain("default", "web").unwrap();
    assert_eq!(report.unused_slices[0].why, "its endpoints are IPv6, and the Service has no IPv6 cluster IP");
}

#[test]
fn explain_says_why_an_endpoint_is_not_used() {
    let mut compiler = Compiler::new(view());
    let local = json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "nodePort": 30_080}]});
    compiler.apply_service(&service("web", "172.30.0.1", &local));
    let end = |addr: &str, node: &str, zone: &str, ready: bool| {
        json!({"addresses": [addr], "nodeName": node, "hints": {"forZones": [{"name": zone}]},
               "conditions": {"ready": ready, "serving": true, "terminating": !ready}})
    };
    compiler.apply_slice(&slice(
        "web-1",
        "web",
        &json!([end("10.244.0.1", "node-1", "a", true), end("10.244.1.1", "node-2", "a", true),
                end("10.244.2.1", "node-3", "b", true), end("10.244.0.2", "node-1", "a", false),
                {"addresses": ["10.244.0.3"], "conditions": {"ready": false}}]),
    ));
    compiler.apply_slice(&slice("web-2", "web", &json!([end("10.244.0.1", "node-1", "a", false)])));
    let mut other_port = slice("web-3", "web", &pods(&["10.244.0.9"]));
    other_port.ports[0].name = "admin".into();
    compiler.apply_slice(&other_port);
    let report = compiler.explain("default", "web").unwrap();
    let choices: Vec<(String, Choice, Choice)> = report.ports[0]
        .endpoints
        .iter()
        .map(|e| (format!("{} {}", e.addr, e.slice), e.cluster, e.node_local))
        .collect();
    let expected = [
        ("10.244.0.1 web-1", Choice::Used, Choice::Used),
        ("10.244.0.1 web-2", Choice::Duplicate, Choice::Duplicate),
        ("10.244.0.2 web-1", Choice::Terminating, Choice::Terminating),
        ("10.244.0.3 web-1", Choice::NotReady, Choice::Remote),
        ("10.244.1.1 web-1", Choice::Used, Choice::Remote),
        ("10.244.2.1 web-1", Choice::OtherZone, Choice::Remote),
    ];
    assert_eq!(choices, expected.map(|(a, b, c)| (a.to_owned(), b, c)));
    assert_eq!(report.unused_slices[0].slice.as_ref(), "web-3");
    assert!(report.unused_slices[0].why.contains("\"admin\"/TCP"));
    let id = report.ports[0].id;
    assert_eq!(compiler.table().set(id, SetKind::Local).len(), 1);
    assert_eq!(compiler.table().set(id, SetKind::Cluster).len(), 2);
    assert!(compiler.explain("default", "nobody").is_none());
}

#[test]
fn hands_are_kept_off() {
    let mut compiler = Compiler::new(view());
    let labelled = Service::parse(&json!({
        "metadata": {"namespace": "default", "name": "other", "labels": {"service.kubernetes.io/service-proxy-name": "mine"}},
        "spec": {"clusterIP": "172.30.0.1", "ports": [{"port": 80}]},
    }))
    .unwrap();
    for (name, service, why) in [
        ("other", labelled, NotHandled::OtherProxy("mine".to_owned())),
        ("headless", service("headless", "None", &json!({})), NotHandled::Headless),
        ("name", service("name", "", &json!({"type": "ExternalName"})), NotHandled::ExternalName),
        ("new", service("new", "", &json!({})), NotHandled::NoClusterIp),
    ] {
        compiler.apply_service(&service);
        assert_eq!(compiler.handles("default", name), Err(why.clone()));
        assert_eq!(compiler.explain("default", name).unwrap().not_handled, Some(why));
    }
    assert_eq!(compiler.handles("default", "nobody"), Err(NotHandled::Unknown));
    assert!(compiler.table().is_empty());
}

#[test]
fn load_balancers_are_told_where_to_send() {
    let mut compiler = Compiler::new(view());
    let spec = |policy: &str, class: &Value| {
        json!({"type": "LoadBalancer", "externalTrafficPolicy": policy, "loadBalancerClass": class, "healthCheckNodePort": 30_009,
               "ingress": [{"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}], "externalIPs": ["198.51.100.9"]})
    };
    compiler.apply_service(&service("web", "172.30.0.1", &spec("Local", &Value::Null)));
    let elsewhere = json!([{"addresses": ["10.244.1.1"], "nodeName": "node-2"}]);
    compiler.apply_slice(&slice("web-1", "web", &elsewhere));
    let told = |compiler: &Compiler| {
        let all = compiler.external_addresses("default", "web");
        all.iter().map(|a| (a.addr.to_string(), a.local_only, a.serves, a.serves_here)).collect::<Vec<_>>()
    };
    assert_eq!(told(&compiler)[0], ("192.0.2.1".to_owned(), true, true, false));
    assert_eq!(told(&compiler).len(), 2);
    assert_eq!(compiler.health_check("default", "web").unwrap().local_ready, 0);
    compiler.apply_slice(&slice("web-2", "web", &pods(&["10.244.0.1"])));
    assert_eq!(told(&compiler)[0], ("192.0.2.1".to_owned(), true, true, true));
    assert_eq!(compiler.health_checks()[0].local_ready, 1);
    let changes =
        compiler.apply_service(&service("web", "172.30.0.1", &spec("Cluster", &json!("example.org/lb"))));
    assert_eq!(changes.services.len(), 1);
    assert!(compiler.health_checks().is_empty(), "only Local needs one");
    let all = compiler.all_external_addresses();
    assert_eq!(all[0].class.as_deref(), Some("example.org/lb"));
    // It answers nevertheless: who balances the load is one thing, who proxies is another.
    assert!(compiler.table().frontends.contains_key(&at("192.0.2.1", 80)));
}

#[test]
fn addresses_of_our_pools_are_whole() {
    let mut with_pool = view();
    with_pool.load_balancer_pools = vec!["192.0.2.0/24".parse().unwrap()];
    let mut compiler = Compiler::new(with_pool);
    let spec = json!({"type": "LoadBalancer", "ingress": [{"ip": "192.0.2.1"}, {"ip": "198.51.100.1"}]});
    compiler.apply_service(&service("a", "172.30.0.1", &spec));
    compiler.apply_service(&service(
        "b",
        "172.30.0.2",
        &json!({"type": "LoadBalancer", "ingress": [{"ip": "192.0.2.1"}], "ports": [{"port": 443}]}),
    ));
    assert!(compiler.findings().is_empty(), "an address can be shared, a port of it not");
    let vips: Vec<String> = compiler.table().vips.iter().map(ToString::to_string).collect();
    assert_eq!(vips, ["172.30.0.1", "172.30.0.2", "192.0.2.1"]);
    compiler.remove_service("default", "a");
    assert!(compiler.table().vips.contains(&ip("192.0.2.1")), "b has it still");
    compiler.remove_service("default", "b");
    assert!(compiler.table().is_empty());
}

#[test]
fn ten_thousand_endpoints_in_slices_of_a_thousand() {
    let mut compiler = Compiler::new(view());
    compiler.apply_service(&service("web", "172.30.0.1", &json!({})));
    let address = |i: usize| format!("10.244.{}.{}", i / 200, i % 200 + 1);
    for n in [0, 1, 1000, 10_000] {
        let slices: Vec<EndpointSlice> = (0..10)
            .map(|s| {
                let addresses: Vec<String> = (s * n / 10..(s + 1) * n / 10).map(address).collect();
                slice(
                    &format!("web-{s}"),
                    "web",
                    &pods(&addresses.iter().map(String::as_str).collect::<Vec<_>>()),
                )
            })
            .collect();
        compiler.load([], &slices);
        assert_eq!(destinations(&compiler, "172.30.0.1", 80).len(), n);
        assert!(compiler.table().violations().is_empty());
        let flow = Flow { src: ip("10.244.9.9"), dst: ip("172.30.0.1"), port: 80, protocol: Protocol::Tcp };
        let verdict = if n == 0 { Verdict::Reject } else { Verdict::Accept };
        assert_eq!(decide(compiler.table(), compiler.view(), &flow).verdict, verdict);
    }
}
