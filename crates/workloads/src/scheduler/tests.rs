use serde_json::{Value, json};

use crate::Config;
use crate::testing::Cluster;

fn pod(name: &str, spec: &Value) -> Value {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [{"name": "c", "image": "x:1"}]}});
    for (key, value) in spec.as_object().unwrap() {
        pod["spec"][key] = value.clone();
    }
    pod
}

fn node_of<'c>(cluster: &'c Cluster, name: &str) -> Option<&'c str> {
    cluster.find("Pod", "default", name)?["spec"].get("nodeName")?.as_str()
}

/// Three nodes: node-1 and node-3 in zone-1, node-2 in zone-0 with a taint.
fn cluster() -> Cluster {
    let mut cluster = Cluster::with_nodes(Config::default(), 3);
    let mut node = cluster.find("Node", "", "node-2").unwrap().clone();
    node["spec"]["taints"] = json!([{"key": "dedicated", "value": "db", "effect": "NoSchedule"}]);
    node["metadata"]["labels"]["cores"] = "64".into();
    cluster.apply(node);
    cluster
}

#[test]
fn where_pods_go() {
    let tolerant = json!([{"key": "dedicated", "operator": "Equal", "value": "db", "effect": "NoSchedule"}]);
    let required = |term: Value| json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}});
    let on = |key: &str, operator: &str, values: Value| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
    for (spec, expected) in [
        (json!({}), Some("node-1")),
        (json!({"nodeSelector": {"kubernetes.io/hostname": "node-3"}}), Some("node-3")),
        (json!({"nodeSelector": {"kubernetes.io/hostname": "node-2"}}), None),
        (
            json!({"nodeSelector": {"kubernetes.io/hostname": "node-2"}, "tolerations": tolerant}),
            Some("node-2"),
        ),
        (
            json!({"nodeSelector": {"kubernetes.io/hostname": "node-2"}, "tolerations": [{"operator": "Exists"}]}),
            Some("node-2"),
        ),
        (json!({"nodeSelector": {"disk": "ssd"}}), None),
        (
            json!({"affinity": required(on("cores", "Gt", json!(["32"]))), "tolerations": tolerant}),
            Some("node-2"),
        ),
        (
            json!({"affinity": required(on("topology.kubernetes.io/zone", "NotIn", json!(["zone-0"])))}),
            Some("node-1"),
        ),
        (
            json!({"affinity": required(json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-3"]}]}))}),
            Some("node-3"),
        ),
        (
            json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 10, "preference": on("kubernetes.io/hostname", "In", json!(["node-3"]))}]}}}),
            Some("node-3"),
        ),
        (json!({"schedulerName": "other"}), None),
        (json!({"schedulingGates": [{"name": "wait"}]}), None),
    ] {
        let mut cluster = cluster();
        cluster.apply(pod("p", &spec));
        cluster.settle();
        assert_eq!(node_of(&cluster, "p"), expected, "{spec}");
    }
}

#[test]
fn the_reason_is_on_the_pod() {
    let mut cluster = cluster();
    cluster.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "cordoned"}, "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    cluster.apply(pod("p", &json!({"nodeSelector": {"disk": "ssd"}})));
    cluster.settle();
    let pod = cluster.find("Pod", "default", "p").unwrap();
    let message = "0/4 nodes are available: 1 node(s) had untolerated taint {dedicated: db}, 1 node(s) were unschedulable, \
        2 node(s) didn't match Pod's node affinity/selector.";
    let condition = &pod["status"]["conditions"][0];
    assert_eq!(condition["type"], "PodScheduled");
    assert_eq!(condition["status"], "False");
    assert_eq!(condition["reason"], "Unschedulable");
    assert_eq!(condition["message"], message);
    assert_eq!(cluster.events("p"), [message]);
    // It binds as soon as a node fits, and the condition turns.
    let mut node = cluster.find("Node", "", "node-3").unwrap().clone();
    node["metadata"]["labels"]["disk"] = "ssd".into();
    cluster.apply(node);
    cluster.settle();
    let pod = cluster.find("Pod", "default", "p").unwrap();
    assert_eq!(pod["spec"]["nodeName"], "node-3");
    assert_eq!(pod["status"]["conditions"][0]["status"], "True");
    assert_eq!(pod["metadata"]["labels"]["topology.kubernetes.io/zone"], "zone-1");

    let mut empty = Cluster::new(Config::default());
    empty.apply(super::tests::pod("p", &json!({})));
    empty.settle();
    assert_eq!(empty.events("p"), ["no nodes available to schedule pods"]);
}

#[test]
fn host_ports_do_not_share_a_node() {
    let with_port = |protocol: &str, ip: &str| json!({"containers": [{"name": "c", "ports": [{"containerPort": 53, "hostPort": 53, "protocol": protocol, "hostIP": ip}]}]});
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply(pod("a", &with_port("UDP", "")));
    cluster.apply(pod("tcp", &with_port("TCP", "127.0.0.1")));
    cluster.settle();
    cluster.apply(pod("other-ip", &with_port("TCP", "192.0.2.1")));
    cluster.apply(pod("same", &with_port("UDP", "192.0.2.1")));
    cluster.apply(pod(
        "host",
        &json!({"hostNetwork": true, "containers": [{"name": "c", "ports": [{"containerPort": 53}]}]}),
    ));
    cluster.settle();
    assert_eq!(node_of(&cluster, "tcp"), Some("node-1"));
    assert_eq!(node_of(&cluster, "other-ip"), Some("node-1"));
    for name in ["same", "host"] {
        assert_eq!(node_of(&cluster, name), None);
        assert!(cluster.events(name)[0].contains("free ports"), "{name}");
    }
    cluster.delete("Pod", "default", "a");
    cluster.settle();
    assert_eq!(node_of(&cluster, "same"), Some("node-1"));
}

#[test]
fn siblings_spread_over_nodes_and_zones() {
    let mut cluster = Cluster::with_nodes(Config::default(), 4);
    for name in ["a", "b"] {
        cluster.apply(json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": name}, "spec": {"replicas": 2,
            "selector": {"matchLabels": {"app": name}}, "template": {"metadata": {"labels": {"app": name}},
            "spec": {"containers": [{"name": "c"}]}}}}));
    }
    cluster.run();
    let nodes = |prefix: &str| -> Vec<String> {
        cluster.pods(prefix).iter().map(|p| p["spec"]["nodeName"].as_str().unwrap().to_owned()).collect()
    };
    let zone = |node: &str| node.trim_start_matches("node-").parse::<u32>().unwrap() % 2;
    for prefix in ["a-", "b-"] {
        let nodes = nodes(prefix);
        assert_ne!(zone(&nodes[0]), zone(&nodes[1]), "{nodes:?}");
    }
    let mut all = [nodes("a-"), nodes("b-")].concat();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 4, "every node has one");
}

#[test]
fn affinity_and_anti_affinity() {
    let term =
        |app: &str, key: &str| json!([{"labelSelector": {"matchLabels": {"app": app}}, "topologyKey": key}]);
    let hostname = "kubernetes.io/hostname";
    let mut cluster = Cluster::with_nodes(Config::default(), 3);
    cluster.apply(pod("db", &json!({"nodeSelector": {hostname: "node-2"}})));
    cluster.settle();
    let required = "requiredDuringSchedulingIgnoredDuringExecution";
    cluster.apply(pod("near", &json!({"affinity": {"podAffinity": {required: term("db", hostname)}}})));
    cluster.apply(pod(
        "far",
        &json!({"affinity": {"podAntiAffinity": {required: term("db", "topology.kubernetes.io/zone")}}}),
    ));
    cluster.apply(pod("alone", &json!({"affinity": {"podAffinity": {required: term("nobody", hostname)}}})));
    // The first of its kind may go anywhere.
    cluster
        .apply(pod("founder", &json!({"affinity": {"podAffinity": {required: term("founder", hostname)}}})));
    cluster.settle();
    assert_eq!(node_of(&cluster, "near"), Some("node-2"));
    assert!(matches!(node_of(&cluster, "far"), Some("node-1" | "node-3")));
    assert_eq!(node_of(&cluster, "alone"), None);
    assert_eq!(
        cluster.events("alone"),
        ["0/3 nodes are available: 3 node(s) didn't match pod affinity rules."]
    );
    assert!(node_of(&cluster, "founder").is_some());

    // What keeps others away keeps away later ones, too.
    cluster.apply(pod("hermit", &json!({"nodeSelector": {hostname: "node-1"},
        "affinity": {"podAntiAffinity": {required: [{"labelSelector": {}, "topologyKey": hostname, "namespaceSelector": {}}]}}})));
    cluster.settle();
    if let Some(node) = node_of(&cluster, "hermit") {
        let node = node.to_owned();
        cluster.apply(pod("visitor", &json!({"nodeSelector": {hostname: node}})));
        cluster.settle();
        assert_eq!(node_of(&cluster, "visitor"), None);
        assert!(cluster.events("visitor")[0].contains("existing pods anti-affinity"));
    } else {
        assert!(cluster.events("hermit")[0].contains("didn't match pod anti-affinity rules"));
    }
}

#[test]
fn topology_spread_holds() {
    let mut cluster = Cluster::with_nodes(Config::default(), 3);
    for i in 0..5 {
        let mut pod = pod(
            &format!("p{i}"),
            &json!({"topologySpreadConstraints": [{"maxSkew": 1,
            "topologyKey": "topology.kubernetes.io/zone", "labelSelector": {"matchLabels": {"group": "g"}}}]}),
        );
        pod["metadata"]["labels"]["group"] = "g".into();
        cluster.apply(pod);
    }
    cluster.settle();
    let in_zone_0 = (0..5).filter(|i| node_of(&cluster, &format!("p{i}")) == Some("node-2")).count();
    assert!((2..=3).contains(&in_zone_0), "{in_zone_0} of 5 in the zone with one node");
    // Without the small zone's node the skew would grow: the rest waits.
    let mut node = cluster.find("Node", "", "node-2").unwrap().clone();
    node["spec"]["unschedulable"] = true.into();
    cluster.apply(node);
    for i in 5..8 {
        let mut pod = pod(
            &format!("p{i}"),
            &json!({"topologySpreadConstraints": [{"maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule",
            "topologyKey": "topology.kubernetes.io/zone", "labelSelector": {"matchLabels": {"group": "g"}}}]}),
        );
        pod["metadata"]["labels"]["group"] = "g".into();
        cluster.apply(pod);
    }
    cluster.settle();
    assert_eq!(node_of(&cluster, "p7"), None);
    assert!(cluster.events("p7")[0].contains("topology spread constraints"), "{:?}", cluster.events("p7"));
}

#[test]
fn full_and_unready_nodes_take_no_more() {
    let mut cluster = Cluster::with_nodes(Config::default(), 4);
    let ready = |status: &str| json!([{"type": "Ready", "status": status}]);
    for (name, status) in [
        ("node-1", json!({"allocatable": {"pods": "1"}, "conditions": ready("True")})),
        ("node-2", json!({"conditions": ready("False")})),
        ("node-3", json!({"conditions": ready("Unknown")})),
        // Written by somebody, but no kubelet has ever answered for it.
        ("node-4", json!({})),
    ] {
        let mut node = cluster.find("Node", "", name).unwrap().clone();
        node["status"] = status;
        cluster.objects.insert(("Node".into(), String::new(), name.into()), node);
    }
    cluster.apply(pod("a", &json!({})));
    cluster.apply(pod("b", &json!({})));
    cluster.settle();
    assert_eq!(node_of(&cluster, "a"), Some("node-1"));
    assert_eq!(
        cluster.events("b"),
        [
            "0/4 nodes are available: 1 Too many pods, 1 node(s) had untolerated taint {node.kubernetes.io/unreachable}, \
             2 node(s) had untolerated taint {node.kubernetes.io/not-ready}."
        ]
    );
}

#[test]
fn higher_priority_goes_first_and_broken_pods_are_named() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    let mut node = cluster.find("Node", "", "node-1").unwrap().clone();
    node["status"]["allocatable"] = json!({"pods": 1});
    cluster.objects.insert(("Node".into(), String::new(), "node-1".into()), node);
    cluster.apply(pod("a", &json!({})));
    cluster.apply(pod("critical", &json!({"priorityClassName": "system-node-critical"})));
    cluster.apply(pod("broken", &json!({"tolerations": [{"key": "a", "effect": "Sometimes"}]})));
    cluster.apply(pod("lost", &json!({"nodeName": "nowhere"})));
    cluster.settle();
    assert_eq!(node_of(&cluster, "critical"), Some("node-1"));
    assert_eq!(node_of(&cluster, "a"), None);
    assert!(
        cluster.events("broken")[0].starts_with("spec.tolerations[0].effect: \"Sometimes\" is not one of")
    );
    assert!(cluster.find("Pod", "default", "lost").unwrap()["status"].get("conditions").is_none());
}
