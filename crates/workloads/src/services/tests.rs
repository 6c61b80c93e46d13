use serde_json::{Value, json};

use crate::Config;
use crate::testing::{Cluster, config_dual};

fn service(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

fn spec(cluster: &Cluster, name: &str) -> Value {
    cluster.find("Service", "default", name).unwrap()["spec"].clone()
}

#[test]
fn families_follow_policy_and_cluster() {
    let v6 = || Config { service_cidrs: vec!["fd00:10:96::/112".parse().unwrap()], ..Config::default() };
    let dual = json!(["IPv4", "IPv6"]);
    for (config, request, policy, families) in [
        (Config::default(), json!({}), "SingleStack", json!(["IPv4"])),
        (v6(), json!({}), "SingleStack", json!(["IPv6"])),
        (config_dual(), json!({}), "SingleStack", json!(["IPv4"])),
        (config_dual(), json!({"ipFamilies": ["IPv6"]}), "SingleStack", json!(["IPv6"])),
        (config_dual(), json!({"ipFamilies": ["IPv6", "IPv4"]}), "RequireDualStack", json!(["IPv6", "IPv4"])),
        (config_dual(), json!({"ipFamilyPolicy": "PreferDualStack"}), "PreferDualStack", dual.clone()),
        (Config::default(), json!({"ipFamilyPolicy": "PreferDualStack"}), "PreferDualStack", json!(["IPv4"])),
        (
            config_dual(),
            json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}),
            "RequireDualStack",
            json!(["IPv6", "IPv4"]),
        ),
        (
            config_dual(),
            json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6", "IPv4"]}),
            "SingleStack",
            json!(["IPv6"]),
        ),
        (config_dual(), json!({"clusterIP": "fd00:10:96::9"}), "SingleStack", json!(["IPv6"])),
        (config_dual(), json!({"clusterIP": "None", "selector": {"a": "b"}}), "SingleStack", json!(["IPv4"])),
        (Config::default(), json!({"clusterIP": "None"}), "RequireDualStack", dual),
    ] {
        let mut cluster = Cluster::new(config);
        let mut request = request;
        request["ports"] = json!([{"port": 80}]);
        cluster.apply(service("s", &request));
        cluster.settle();
        let spec = spec(&cluster, "s");
        assert_eq!(spec["ipFamilyPolicy"], policy, "{request}");
        assert_eq!(spec["ipFamilies"], families, "{request}");
        let addresses = spec["clusterIPs"].as_array().unwrap();
        assert_eq!(spec["clusterIP"], addresses[0]);
        if spec["clusterIP"] != "None" {
            assert_eq!(addresses.len(), families.as_array().unwrap().len());
        }
        if let Some(asked) = request.get("clusterIP") {
            assert_eq!(spec["clusterIP"], *asked);
        }
    }
}

#[test]
fn impossible_requests_are_refused_with_a_reason() {
    for (config, request, message) in [
        (
            Config::default(),
            json!({"ipFamilyPolicy": "RequireDualStack"}),
            "spec.ipFamilyPolicy: this cluster is not configured for dual-stack",
        ),
        (
            Config::default(),
            json!({"ipFamilies": ["IPv6"]}),
            "spec.ipFamilies[0]: IPv6 is not configured on this cluster",
        ),
        (
            Config::default(),
            json!({"clusterIP": "192.0.2.1"}),
            "spec.clusterIPs: 192.0.2.1 is not in the cluster's service range (10.96.0.0/16)",
        ),
        (
            Config::default(),
            json!({"clusterIP": "10.96.0.77"}),
            "spec.clusterIPs: 10.96.0.77 is already allocated to Service default/first",
        ),
        (
            Config::default(),
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]}),
            "spec.ports: nodePort 80 is not in the valid range",
        ),
        (
            Config::default(),
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 31000}]}),
            "spec.ports: nodePort 31000 is already allocated to Service default/first",
        ),
        (
            config_dual(),
            json!({"clusterIP": "10.96.3.3", "ipFamilies": ["IPv6"]}),
            "spec.clusterIPs[0]: 10.96.3.3 is not IPv6",
        ),
        (Config::default(), json!({"clusterIP": "ten"}), "spec.clusterIP: \"ten\" is not an IP address"),
        (Config::default(), json!({"type": "Magic"}), "spec.type: \"Magic\" is not one of"),
        (
            Config::default(),
            json!({"type": "NodePort", "clusterIP": "None"}),
            "spec.clusterIP: may not be None",
        ),
    ] {
        let mut cluster = Cluster::new(config);
        cluster.apply(service("first", &json!({"type": "NodePort", "clusterIP": "10.96.0.77", "ports": [{"port": 1, "nodePort": 31000}]}),
        ));
        cluster.settle();
        cluster.now += jiff::SignedDuration::from_secs(1);
        cluster.apply(service("second", &request));
        cluster.settle();
        let events = cluster.events("second");
        assert!(events.len() == 1 && events[0].starts_with(message), "{request}: {events:?}");
        assert!(spec(&cluster, "second").get("ipFamilies").is_none_or(|f| *f == request["ipFamilies"]));
        assert!(cluster.events("first").is_empty());
        // Corrected, nobody complains any more.
        cluster.delete("Service", "default", "second");
        cluster.apply(service("second", &json!({})));
        cluster.settle();
        assert!(cluster.events("second").is_empty(), "{request}: {:?}", cluster.events("second"));
    }
}

#[test]
fn reserved_addresses_wait_for_their_services() {
    let mut cluster = Cluster::new(config_dual());
    let named = |namespace: &str, name: &str| {
        let mut service =
            service(name, &json!({"ports": [{"port": 53}], "ipFamilyPolicy": "PreferDualStack"}));
        service["metadata"]["namespace"] = namespace.into();
        service
    };
    cluster.apply(named("default", "kubernetes"));
    cluster.apply(named("kube-system", "kube-dns"));
    cluster.apply(named("default", "kube-dns"));
    cluster.settle();
    assert_eq!(spec(&cluster, "kubernetes")["clusterIPs"], json!(["10.96.0.1", "fd00:10:96::1"]));
    let dns = cluster.find("Service", "kube-system", "kube-dns").unwrap();
    assert_eq!(dns["spec"]["clusterIPs"], json!(["10.96.0.10", "fd00:10:96::a"]));
    assert_ne!(spec(&cluster, "kube-dns")["clusterIP"], "10.96.0.10");
}

#[test]
fn node_ports_come_and_go_with_the_type() {
    let mut cluster = Cluster::new(Config::default());
    let ports = json!([{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53}, {"name": "web", "port": 80}]);
    cluster.apply(service("s", &json!({"type": "NodePort", "ports": ports})));
    cluster.settle();
    let node_port = |cluster: &Cluster, i: usize| spec(cluster, "s")["ports"][i].get("nodePort").cloned();
    let dns = node_port(&cluster, 0).unwrap();
    assert_eq!(node_port(&cluster, 1), Some(dns.clone()), "one number for both protocols");
    assert_ne!(node_port(&cluster, 2), Some(dns));

    cluster.apply(service("s", &json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"})));
    cluster.settle();
    let health = spec(&cluster, "s")["healthCheckNodePort"].as_u64().unwrap();
    assert!((30000..=32767).contains(&health) && Some(json!(health)) != node_port(&cluster, 2));

    let address = spec(&cluster, "s")["clusterIP"].clone();
    cluster.apply(service(
        "s",
        &json!({"type": "ClusterIP", "externalTrafficPolicy": null, "allocateLoadBalancerNodePorts": null}),
    ));
    cluster.settle();
    assert_eq!(node_port(&cluster, 0), None);
    assert!(spec(&cluster, "s").get("healthCheckNodePort").is_none());
    assert_eq!(spec(&cluster, "s")["clusterIP"], address);

    cluster.apply(service("s", &json!({"type": "ExternalName", "externalName": "x.example"})));
    cluster.settle();
    for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        assert!(spec(&cluster, "s").get(key).is_none(), "{key}");
    }
    cluster.apply(service(
        "lb",
        &json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]}),
    ));
    cluster.settle();
    assert!(spec(&cluster, "lb")["ports"][0].get("nodePort").is_none());
}

#[test]
fn a_full_range_is_reported_with_its_count() {
    let config = Config { service_cidrs: vec!["10.96.0.0/29".parse().unwrap()], ..Config::default() };
    let mut cluster = Cluster::new(config);
    for i in 0..6 {
        cluster.apply(service(&format!("s{i}"), &json!({"ports": [{"port": 80}]})));
    }
    cluster.settle();
    let without: Vec<_> = cluster
        .all("Service")
        .into_iter()
        .filter(|s| s["spec"].get("clusterIP").is_none())
        .cloned()
        .collect();
    assert_eq!(without.len(), 1, "five addresses besides the reserved one");
    let events = cluster.events(without[0]["metadata"]["name"].as_str().unwrap());
    assert!(events[0].starts_with("range 10.96.0.0/29 is full: 5 addresses are in use"), "{events:?}");
}

#[test]
fn addresses_follow_the_name_not_the_order() {
    let addresses = |order: [&str; 3]| {
        let mut cluster = Cluster::new(Config::default());
        for name in order {
            cluster.apply(service(name, &json!({"ports": [{"port": 80}]})));
        }
        cluster.settle();
        ["a", "b", "c"].map(|name| spec(&cluster, name)["clusterIP"].clone())
    };
    assert_eq!(addresses(["a", "b", "c"]), addresses(["c", "a", "b"]));
}
