//! Against what a real API server and its controllers wrote: the same input gives the same defaults and slices.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::testing::Cluster;
use crate::{Config, Op, World, defaults, reconcile};

fn read(path: &str) -> Option<String> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/cases");
    let root = std::env::var_os("PODWAY_CASES").map_or(default, PathBuf::from);
    let path = root.join("kube-api").join(path);
    let text = std::fs::read_to_string(&path).ok();
    if text.is_none() {
        println!("skipped: no recording at {}; set PODWAY_CASES", path.display());
    }
    text
}

/// A recorded list's items, with the type that lists leave out of their items.
fn recorded(name: &str, api_version: &str, kind: &str) -> Option<Vec<Value>> {
    let mut list: Value = serde_json::from_str(&read(&format!("lists/{name}.json"))?).unwrap();
    let Value::Array(mut items) = list["items"].take() else { panic!("{name} has no items") };
    for item in &mut items {
        item["apiVersion"] = api_version.into();
        item["kind"] = kind.into();
    }
    Some(items)
}

/// The last state of each slice that the watch saw: the controller was still busy when the list was taken.
fn watched_slices() -> Option<Vec<Value>> {
    let mut slices: BTreeMap<String, Value> = BTreeMap::new();
    for line in read("watch/endpointslices.jsonl")?.lines() {
        let mut event: Value = serde_json::from_str(line).unwrap();
        let object = event["object"].take();
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        match event["type"].as_str().unwrap() {
            "ADDED" | "MODIFIED" => drop(slices.insert(name, object)),
            "DELETED" => drop(slices.remove(&name)),
            _ => {}
        }
    }
    Some(slices.into_values().collect())
}

/// What the user had applied.
fn applied(object: &Value) -> Option<Value> {
    let text = object["metadata"]["annotations"]
        .get("kubectl.kubernetes.io/last-applied-configuration")?
        .as_str()?;
    Some(serde_json::from_str(text).unwrap())
}

/// Without what depends on the cluster.
fn without_addresses(mut spec: Value) -> Value {
    let map = spec.as_object_mut().unwrap();
    for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        map.remove(key);
    }
    if let Some(Value::Array(ports)) = map.get_mut("ports") {
        ports.iter_mut().for_each(|port| drop(port.as_object_mut().unwrap().remove("nodePort")));
    }
    spec
}

#[test]
fn defaults_are_the_api_servers() {
    let Some(deployments) = recorded("deployments", "apps/v1", "Deployment") else { return };
    let mut compared = 0;
    for real in &deployments {
        let Some(mut ours) = applied(real) else { continue };
        defaults::apply("Deployment", &mut ours);
        // Scaled afterwards.
        ours["spec"]["replicas"] = real["spec"]["replicas"].clone();
        assert_eq!(ours["spec"], real["spec"], "{}", real["metadata"]["name"]);
        compared += 1;
    }
    assert!(compared > 10);
    for real in recorded("services", "v1", "Service").unwrap() {
        let Some(mut ours) = applied(&real) else { continue };
        defaults::apply("Service", &mut ours);
        assert_eq!(without_addresses(ours["spec"].take()), without_addresses(real["spec"].clone()));
        assert_eq!(ours["status"], real["status"]);
    }
    for real in recorded("networkpolicies", "networking.k8s.io/v1", "NetworkPolicy").unwrap() {
        let Some(mut ours) = applied(&real) else { continue };
        defaults::apply("NetworkPolicy", &mut ours);
        assert_eq!(ours["spec"], real["spec"], "{}", real["metadata"]["name"]);
    }
    for mut real in recorded("namespaces", "v1", "Namespace").unwrap() {
        let before = real.clone();
        defaults::apply("Namespace", &mut real);
        assert_eq!(real, before);
    }
}

#[test]
fn pods_look_like_the_real_controllers() {
    let Some(deployments) = recorded("deployments", "apps/v1", "Deployment") else { return };
    let mut cluster = Cluster::new(Config::default());
    for deployment in deployments.iter().filter_map(applied) {
        cluster.apply(deployment);
    }
    cluster.settle();
    let mut compared = 0;
    for mut real in recorded("pods", "v1", "Pod").unwrap() {
        let Some(app) = real["metadata"]["labels"]["app"].as_str().map(str::to_owned) else { continue };
        let pending =
            real["spec"].get("nodeName").is_none() && real["metadata"].get("deletionTimestamp").is_none();
        if !pending || real["metadata"].get("generateName").is_none() {
            continue;
        }
        let ours = cluster.pods(&format!("{app}-"))[0];
        // The token volume is the ServiceAccount admission plugin's; nothing mounts it here.
        let spec = real["spec"].as_object_mut().unwrap();
        spec.retain(|key, _| key != "volumes");
        for container in spec["containers"].as_array_mut().unwrap() {
            container.as_object_mut().unwrap().remove("volumeMounts");
        }
        let mut our_spec = ours["spec"].clone();
        our_spec.as_object_mut().unwrap().remove("volumes");
        our_spec["containers"].as_array_mut().unwrap().iter_mut().for_each(|container| {
            container.as_object_mut().unwrap().remove("volumeMounts");
        });
        assert_eq!(our_spec, real["spec"], "{app}");
        assert_eq!(ours["status"]["qosClass"], real["status"]["qosClass"]);
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let metadata = &real["metadata"];
        assert_eq!(keys(&ours["metadata"]["labels"]), keys(&metadata["labels"]));
        let (our_owner, owner) = (&ours["metadata"]["ownerReferences"][0], &metadata["ownerReferences"][0]);
        assert_eq!(keys(our_owner), keys(owner));
        for key in ["apiVersion", "kind", "controller", "blockOwnerDeletion"] {
            assert_eq!(our_owner[key], owner[key]);
        }
        let name_length = |pod: &Value| pod["metadata"]["name"].as_str().unwrap().split('-').count();
        assert_eq!(name_length(ours), name_length(&real));
        compared += 1;
    }
    assert!(compared > 0, "no pending pod in the recording");
}

#[test]
fn recorded_endpoint_slices_are_what_we_would_write() {
    let Some(mut objects) = watched_slices() else { return };
    let slices = objects.len();
    for (name, api_version, kind) in [
        ("pods", "v1", "Pod"),
        ("services", "v1", "Service"),
        ("nodes", "v1", "Node"),
        ("namespaces", "v1", "Namespace"),
    ] {
        objects.extend(recorded(name, api_version, kind).unwrap());
    }
    let touching = |objects: &[Value]| {
        let plan =
            reconcile(&World::new("2026-11-23T02:20:00Z".parse().unwrap(), objects), &Config::default());
        let is_slice = |op: &Op| match op {
            Op::Create(object) | Op::Update(object) => object["kind"] == "EndpointSlice",
            Op::Delete(deletion) => deletion.kind == "EndpointSlice",
            _ => false,
        };
        plan.ops.into_iter().filter(is_slice).collect::<Vec<_>>()
    };
    assert!(slices > 10);
    assert_eq!(touching(&objects), Vec::new());
    // And it does look: a pod that is no longer ready changes its slices.
    let ready = objects
        .iter_mut()
        .find(|o| o["kind"] == "Pod" && o.pointer("/status/conditions/0/status") == Some(&json!("True")));
    ready.unwrap()["status"]["conditions"][0]["status"] = "False".into();
    assert!(!touching(&objects).is_empty());
}

#[test]
fn recorded_services_need_nothing() {
    let Some(services) = recorded("services", "v1", "Service") else { return };
    let plan = reconcile(&World::new(jiff::Timestamp::UNIX_EPOCH, &services), &Config::default());
    let on_service = |op: &&Op| matches!(op, Op::Update(object) if object["kind"] == "Service");
    assert_eq!(plan.ops.iter().filter(on_service).collect::<Vec<_>>(), Vec::<&Op>::new());
    assert!(!plan.ops.iter().any(|op| matches!(op, Op::Event(_))), "{:?}", plan.ops);
}
