use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::Config;
use crate::testing::{Cluster, config_dual};

fn web(cluster: &mut Cluster, replicas: u64, ports: &Value) {
    cluster.apply(json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "web"}, "spec": {"replicas": replicas,
        "selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "ports": ports}]}}}}));
}

fn service(spec: &Value) -> Value {
    let mut service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "labels": {"team": "a"}},
        "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}});
    for (key, value) in spec.as_object().unwrap() {
        service["spec"][key] = value.clone();
    }
    service
}

fn slices(cluster: &Cluster) -> Vec<&Value> {
    cluster.all("EndpointSlice")
}

fn endpoints(cluster: &Cluster) -> Vec<&Value> {
    slices(cluster)
        .into_iter()
        .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
        .collect()
}

fn http() -> Value {
    json!([{"name": "http", "containerPort": 8080}])
}

#[test]
fn a_service_without_pods_has_one_empty_slice_which_is_then_filled() {
    let mut cluster = Cluster::with_nodes(Config::default(), 2);
    cluster.apply(service(&json!({})));
    cluster.settle();
    assert_eq!(slices(&cluster).len(), 1);
    let empty = slices(&cluster)[0].clone();
    assert_eq!((&empty["endpoints"], &empty["ports"]), (&Value::Null, &Value::Null));
    assert_eq!(
        empty["metadata"]["labels"],
        json!({"team": "a", "kubernetes.io/service-name": "web",
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"})
    );
    web(&mut cluster, 2, &http());
    cluster.run();
    let slice = slices(&cluster)[0];
    assert_eq!(slice["metadata"]["name"], empty["metadata"]["name"], "the same slice");
    assert_eq!(slice["ports"], json!([{"name": "http", "protocol": "TCP", "port": 8080}]));
    assert_eq!(endpoints(&cluster).len(), 2);
    assert_eq!(
        cluster.find("Endpoints", "default", "web").unwrap()["subsets"][0]["addresses"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    web(&mut cluster, 0, &http());
    cluster.run();
    assert_eq!(slices(&cluster).len(), 1);
    assert!(endpoints(&cluster).is_empty());
    cluster.delete("Service", "default", "web");
    cluster.settle();
    assert!(slices(&cluster).is_empty() && cluster.all("Endpoints").is_empty());
}

#[test]
fn conditions_follow_readiness_and_termination() {
    for (publish, unready, leaving) in [(false, false, false), (true, true, true)] {
        let mut cluster = Cluster::with_nodes(Config::default(), 1);
        cluster.apply(service(&json!({"publishNotReadyAddresses": publish})));
        web(&mut cluster, 1, &http());
        cluster.run();
        let name = cluster.pods("web-")[0]["metadata"]["name"].as_str().unwrap().to_owned();
        cluster.set_ready("default", &name, false);
        cluster.settle();
        let conditions = |cluster: &Cluster| endpoints(cluster)[0]["conditions"].clone();
        assert_eq!(conditions(&cluster), json!({"ready": unready, "serving": false, "terminating": false}));
        let subset = cluster.find("Endpoints", "default", "web").unwrap()["subsets"][0].clone();
        assert_eq!(subset.get("notReadyAddresses").is_none(), publish);
        cluster.set_ready("default", &name, true);
        cluster.settle();
        cluster.delete("Pod", "default", &name);
        cluster.settle();
        let of_leaving =
            endpoints(&cluster).into_iter().find(|e| e["targetRef"]["name"] == name.as_str()).unwrap();
        assert_eq!(of_leaving["conditions"], json!({"ready": leaving, "serving": true, "terminating": true}));
        let subsets = &cluster.find("Endpoints", "default", "web").unwrap()["subsets"];
        assert_eq!(subsets.to_string().contains(&name), publish);
    }
}

#[test]
fn named_ports_that_differ_between_pods_make_slices_of_their_own() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply(service(&json!({"ports": [{"name": "http", "port": 80, "targetPort": "http", "appProtocol": "kubernetes.io/h2c"},
        {"name": "metrics", "port": 9090}]})));
    for (name, port) in [("old", Some(80)), ("new", Some(8080)), ("none", None)] {
        let ports: Vec<Value> =
            port.map(|p| json!({"name": "http", "containerPort": p})).into_iter().collect();
        cluster.apply(
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "ports": ports}]}}),
        );
    }
    cluster.run();
    let found: BTreeSet<(String, String)> = slices(&cluster)
        .into_iter()
        .map(|slice| (slice["endpoints"][0]["targetRef"]["name"].to_string(), slice["ports"].to_string()))
        .collect();
    let metrics = r#"{"name":"metrics","port":9090,"protocol":"TCP"}"#;
    let http = |port| {
        format!(
            r#"[{{"appProtocol":"kubernetes.io/h2c","name":"http","port":{port},"protocol":"TCP"}},{metrics}]"#
        )
    };
    let expected = [("\"old\"", http(80)), ("\"new\"", http(8080)), ("\"none\"", format!("[{metrics}]"))];
    assert_eq!(found, expected.map(|(a, b)| (a.to_owned(), b)).into());
    // A sidecar's port counts, a finished init container's does not.
    for (policy, expected) in [(json!("Always"), true), (Value::Null, false)] {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "side", "labels": {"app": "side"}},
            "spec": {"containers": [{"name": "c"}], "initContainers": [{"name": "i", "restartPolicy": policy,
                "ports": [{"name": "http", "containerPort": 7000}]}]}});
        cluster.delete("Pod", "default", "side");
        cluster.run();
        cluster.apply(pod);
        let mut of_sidecar = service(&json!({"selector": {"app": "side"}}));
        of_sidecar["metadata"]["name"] = "side".into();
        cluster.apply(of_sidecar);
        cluster.run();
        assert_eq!(slices(&cluster).iter().any(|s| s["ports"][0]["port"] == 7000), expected);
    }
}

#[test]
fn slices_are_limited_and_few_change() {
    let mut cluster = Cluster::with_nodes(Config { endpoints_per_slice: 10, ..Config::default() }, 2);
    cluster.apply(service(&json!({})));
    web(&mut cluster, 25, &http());
    cluster.run();
    let sizes = |cluster: &Cluster| -> Vec<usize> {
        let mut sizes: Vec<_> =
            slices(cluster).iter().map(|s| s["endpoints"].as_array().unwrap().len()).collect();
        sizes.sort_unstable();
        sizes
    };
    assert_eq!(sizes(&cluster), [5, 10, 10]);
    let versions = |cluster: &Cluster| -> Vec<Value> {
        slices(cluster).iter().map(|s| s["metadata"]["resourceVersion"].clone()).collect()
    };
    let before = versions(&cluster);
    let name = cluster.pods("web-")[7]["metadata"]["name"].as_str().unwrap().to_owned();
    cluster.set_ready("default", &name, false);
    cluster.settle();
    let after = versions(&cluster);
    assert_eq!(before.iter().zip(&after).filter(|(a, b)| a != b).count(), 1, "one pod, one slice");
    web(&mut cluster, 3, &http());
    cluster.run();
    assert_eq!(endpoints(&cluster).len(), 3);
    web(&mut cluster, 31, &http());
    cluster.run();
    assert!(sizes(&cluster).iter().all(|size| *size <= 10));
    let ips: BTreeSet<String> = endpoints(&cluster).iter().map(|e| e["addresses"][0].to_string()).collect();
    assert_eq!(ips.len(), 31);
}

#[test]
fn dual_stack_services_have_slices_of_both_families() {
    let mut cluster = Cluster::with_nodes(config_dual(), 1);
    cluster.apply(service(&json!({"ipFamilyPolicy": "PreferDualStack"})));
    web(&mut cluster, 1, &http());
    cluster.run();
    let families: Vec<_> = slices(&cluster).iter().map(|s| s["addressType"].clone()).collect();
    assert_eq!(families.len(), 2);
    assert!(families.contains(&json!("IPv4")) && families.contains(&json!("IPv6")));
    cluster.apply(service(&json!({"ipFamilyPolicy": "SingleStack"})));
    cluster.settle();
    assert_eq!(slices(&cluster).len(), 1);
}

#[test]
fn headless_services_name_their_pods() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply(service(&json!({"clusterIP": "None", "ports": null})));
    cluster.apply(json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "web"}, "spec": {"replicas": 2,
        "serviceName": "web", "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c"}]}}}}));
    cluster.run();
    let slice = slices(&cluster)[0];
    assert_eq!(slice["metadata"]["labels"]["service.kubernetes.io/headless"], "");
    let mut names: Vec<_> = endpoints(&cluster).iter().map(|e| e["hostname"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["web-0", "web-1"]);
    let subset = &cluster.find("Endpoints", "default", "web").unwrap()["subsets"][0];
    assert_eq!(subset["addresses"][0]["hostname"], "web-0");
    assert!(subset.get("ports").is_none());
}

#[test]
fn hints_follow_traffic_distribution() {
    for (distribution, expected) in [
        (Value::Null, None),
        (json!("PreferClose"), Some(json!({"forZones": [{"name": "zone-1"}]}))),
        (json!("PreferSameZone"), Some(json!({"forZones": [{"name": "zone-1"}]}))),
        (
            json!("PreferSameNode"),
            Some(json!({"forZones": [{"name": "zone-1"}], "forNodes": [{"name": "node-1"}]})),
        ),
        (json!("Unknown"), None),
    ] {
        let mut cluster = Cluster::with_nodes(Config::default(), 1);
        cluster.apply(service(&json!({"trafficDistribution": distribution})));
        web(&mut cluster, 1, &http());
        cluster.run();
        assert_eq!(endpoints(&cluster)[0].get("hints"), expected.as_ref(), "{distribution}");
        let name = cluster.pods("web-")[0]["metadata"]["name"].as_str().unwrap().to_owned();
        cluster.set_ready("default", &name, false);
        cluster.settle();
        assert_eq!(endpoints(&cluster)[0].get("hints"), None, "not ready");
    }
}

#[test]
fn auto_hints_share_endpoints_out_by_processors() {
    let mut cluster = Cluster::new(Config::default());
    for (i, (zone, cpu)) in [("a", json!("2")), ("b", json!("1500m")), ("b", json!(0.5))].iter().enumerate() {
        cluster.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{i}"),
            "labels": {"topology.kubernetes.io/zone": zone}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"cpu": cpu}}}));
    }
    let mut wanted = service(&json!({"trafficDistribution": "PreferSameNode"}));
    wanted["metadata"]["annotations"] = json!({"service.kubernetes.io/topology-mode": "Auto"});
    cluster.apply(wanted);
    web(&mut cluster, 6, &http());
    cluster.run();
    let by_zone = |cluster: &Cluster| {
        let mut zones = std::collections::BTreeMap::new();
        for endpoint in endpoints(cluster) {
            let zone = endpoint.pointer("/hints/forZones/0/name").and_then(Value::as_str).unwrap_or("none");
            assert!(endpoint.pointer("/hints/forNodes").is_none());
            *zones.entry(zone.to_owned()).or_insert(0) += 1;
        }
        zones.into_iter().collect::<Vec<_>>()
    };
    // Both zones have two processors, wherever the pods are.
    assert_eq!(by_zone(&cluster), [("a".to_owned(), 3), ("b".to_owned(), 3)]);
    // A node without a zone: nobody knows what would be overloaded.
    cluster.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-9"},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"cpu": "1"}}}));
    cluster.settle();
    assert_eq!(by_zone(&cluster), [("none".to_owned(), 6)]);
    let warned = |cluster: &Cluster| {
        cluster.events("web").iter().any(|event| event.starts_with("Insufficient Node information"))
    };
    assert!(warned(&cluster));
    cluster.delete("Node", "", "node-9");
    cluster.settle();
    assert_eq!(by_zone(&cluster), [("a".to_owned(), 3), ("b".to_owned(), 3)]);
    assert!(!warned(&cluster), "the warning outlives its cause");
}

#[test]
fn endpoints_that_people_write_are_mirrored() {
    let mut cluster = Cluster::new(Config::default());
    cluster.apply_yaml(
        "
{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {ports: [{port: 5432}]}}
---
{apiVersion: v1, kind: Endpoints, metadata: {name: db, labels: {team: a}}, subsets: [
  {addresses: [{ip: 192.0.2.1}, {ip: '2001:db8::1'}], notReadyAddresses: [{ip: 192.0.2.2}], ports: [{port: 5432}]}]}
",
    );
    cluster.settle();
    let slices = cluster.all("EndpointSlice");
    assert_eq!(slices.len(), 2);
    let service = cluster.find("Service", "default", "db").unwrap();
    assert_eq!(service["spec"]["ports"], json!([{"port": 5432, "protocol": "TCP", "targetPort": 5432}]));
    let v4 = slices.iter().find(|s| s["addressType"] == "IPv4").unwrap();
    assert_eq!(v4["metadata"]["ownerReferences"][0]["kind"], "Endpoints");
    assert_eq!(v4["metadata"]["labels"]["kubernetes.io/service-name"], "db");
    assert_eq!(
        v4["endpoints"],
        json!([{"addresses": ["192.0.2.1"], "conditions": {"ready": true}}, {"addresses": ["192.0.2.2"], "conditions": {"ready": false}}])
    );
    cluster.apply_yaml("{apiVersion: v1, kind: Endpoints, metadata: {name: db}, subsets: [{addresses: [{ip: 192.0.2.9}], ports: [{port: 1}]}]}");
    cluster.settle();
    assert_eq!(endpoints(&cluster).len(), 1);
    assert_eq!(endpoints(&cluster)[0]["addresses"][0], "192.0.2.9");
    cluster.apply_yaml(
        "{apiVersion: v1, kind: Endpoints, metadata: {name: db}, subsets: [{addresses: [{ip: nine}]}]}",
    );
    cluster.settle();
    assert!(cluster.events("db")[0].starts_with("subsets[0].addresses[0].ip: \"nine\" is not an IP address"));
    cluster.delete("Endpoints", "default", "db");
    cluster.settle();
    assert!(cluster.all("EndpointSlice").is_empty());
}
