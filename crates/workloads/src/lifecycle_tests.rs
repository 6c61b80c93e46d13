//! Whole clusters through their life in memory: real projects' manifests, random clusters, broken objects.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::testing::{Cluster, config_dual};
use crate::{Config, Op, World, reconcile};

fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// Everything that must hold in a cluster at rest.
fn check(cluster: &mut Cluster) {
    assert_eq!(cluster.step(), 0, "a second reconcile has something to do");
    for kind in ["Deployment", "ReplicaSet", "ReplicationController", "StatefulSet", "DaemonSet"] {
        for workload in cluster.all(kind) {
            check_workload(cluster, workload);
        }
    }
    for pod in cluster.all("Pod") {
        let name = text(pod, "/metadata/name");
        assert_ne!(text(pod, "/spec/nodeName"), "", "{name} is not bound: {:?}", cluster.events(name));
        let conditions = pod["status"]["conditions"].as_array().unwrap();
        assert!(conditions.iter().any(|c| c["type"] == "PodScheduled" && c["status"] == "True"), "{name}");
    }
    let mut addresses = BTreeSet::new();
    let mut node_ports = BTreeSet::new();
    for service in cluster.all("Service") {
        check_service(cluster, service, &mut addresses, &mut node_ports);
    }
}

fn check_workload(cluster: &Cluster, workload: &Value) {
    let (kind, name) = (text(workload, "/kind"), text(workload, "/metadata/name"));
    let uid = &workload["metadata"]["uid"];
    let owners: Vec<&Value> = if kind == "Deployment" {
        let sets = cluster.all("ReplicaSet").into_iter();
        sets.filter(|set| set["metadata"]["ownerReferences"][0]["uid"] == *uid)
            .map(|s| &s["metadata"]["uid"])
            .collect()
    } else {
        vec![uid]
    };
    let pods: Vec<&Value> = cluster
        .all("Pod")
        .into_iter()
        .filter(|pod| owners.contains(&&pod["metadata"]["ownerReferences"][0]["uid"]))
        .collect();
    let wanted = match kind {
        "DaemonSet" => workload["status"]["desiredNumberScheduled"].as_u64(),
        _ => workload["spec"]["replicas"].as_u64(),
    };
    assert_eq!(Some(pods.len() as u64), wanted, "pods of {kind} {name}: {:?}", cluster.events(name));
    let ready = if kind == "DaemonSet" { "numberReady" } else { "readyReplicas" };
    assert_eq!(
        workload["status"][ready].as_u64().unwrap_or(0),
        pods.len() as u64,
        "{kind} {name}: {workload}"
    );
    assert_eq!(workload["status"]["observedGeneration"], workload["metadata"]["generation"], "{kind} {name}");
    if kind == "Deployment" {
        assert_eq!(workload["status"]["updatedReplicas"].as_u64().unwrap_or(0), pods.len() as u64, "{name}");
        let conditions = workload["status"]["conditions"].as_array().unwrap();
        assert!(conditions.iter().any(|c| c["reason"] == "NewReplicaSetAvailable"), "{name}: {conditions:?}");
    }
}

fn check_service(
    cluster: &Cluster,
    service: &Value,
    addresses: &mut BTreeSet<String>,
    node_ports: &mut BTreeSet<(u64, String)>,
) {
    let (namespace, name) = (text(service, "/metadata/namespace"), text(service, "/metadata/name"));
    if text(service, "/spec/type") == "ExternalName" {
        assert!(service["spec"].get("clusterIP").is_none());
        return;
    }
    let families =
        service["spec"]["ipFamilies"].as_array().unwrap_or_else(|| panic!("{name}: no families: {service}"));
    let ips = service["spec"]["clusterIPs"].as_array().unwrap();
    assert_eq!(service["spec"]["clusterIP"], ips[0]);
    if ips[0] != "None" {
        assert_eq!(ips.len(), families.len(), "{name}");
        for (ip, family) in ips.iter().zip(families) {
            let ip = ip.as_str().unwrap();
            assert_eq!(ip.contains(':'), family == "IPv6", "{name}");
            assert!(addresses.insert(ip.to_owned()), "{ip} is given twice");
        }
    }
    for port in service["spec"]["ports"].as_array().into_iter().flatten() {
        match port.get("nodePort").and_then(Value::as_u64) {
            Some(number) => {
                assert!((30000..=32767).contains(&number));
                assert!(
                    node_ports.insert((number, text(port, "/protocol").to_owned())),
                    "{number} is given twice"
                );
            }
            None => assert_eq!(text(service, "/spec/type"), "ClusterIP", "{name} lacks a node port"),
        }
    }
    let Some(selector) = service["spec"]["selector"].as_object() else { return };
    let slices: Vec<&Value> = cluster
        .all("EndpointSlice")
        .into_iter()
        .filter(|s| text(s, "/metadata/ownerReferences/0/uid") == text(service, "/metadata/uid"))
        .collect();
    for family in families {
        let expected: BTreeSet<String> = cluster
            .all("Pod")
            .into_iter()
            .filter(|pod| text(pod, "/metadata/namespace") == namespace)
            .filter(|pod| {
                selector.iter().all(|(key, value)| pod["metadata"]["labels"].get(key) == Some(value))
            })
            .flat_map(|pod| pod["status"]["podIPs"].as_array().into_iter().flatten())
            .map(|ip| text(ip, "/ip").to_owned())
            .filter(|ip| ip.contains(':') == (family == "IPv6"))
            .collect();
        let of_family: Vec<_> = slices.iter().filter(|slice| slice["addressType"] == *family).collect();
        assert!(!of_family.is_empty(), "{name}: not even an empty slice");
        let mut found = BTreeSet::new();
        for slice in of_family {
            for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
                assert!(
                    found.insert(text(endpoint, "/addresses/0").to_owned()),
                    "{name}: endpoint is there twice"
                );
                assert_eq!(
                    endpoint["conditions"],
                    json!({"ready": true, "serving": true, "terminating": false})
                );
                assert_ne!(text(endpoint, "/zone"), "");
            }
        }
        assert_eq!(found, expected, "endpoints of {namespace}/{name}");
        if families.first() == Some(family) && !expected.is_empty() {
            let endpoints = cluster.find("Endpoints", namespace, name).unwrap();
            let legacy: usize = endpoints["subsets"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|subset| subset["addresses"].as_array().map_or(0, Vec::len))
                .sum();
            // A pod that has none of the ports is an endpoint without ports in slices, and nothing in Endpoints.
            let with_ports: usize = slices
                .iter()
                .filter(|slice| slice["addressType"] == *family)
                .filter(|slice| slice["ports"].as_array().is_some_and(|ports| !ports.is_empty()))
                .map(|slice| slice["endpoints"].as_array().map_or(0, Vec::len))
                .sum();
            assert_eq!(legacy, with_ports, "Endpoints of {name}");
        }
    }
}

/// The folder with one folder of manifests per project, or nothing where it is not there.
fn projects() -> Vec<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/manifests");
    let root = std::env::var_os("PODWAY_MANIFESTS").map_or(default, PathBuf::from);
    let Ok(entries) = std::fs::read_dir(&root) else {
        println!("skipped: no manifests in {}; set PODWAY_MANIFESTS", root.display());
        return Vec::new();
    };
    let mut folders: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

fn yaml_files(folder: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            yaml_files(&path, files);
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            files.push(path);
        }
    }
}

fn documents(folder: &Path) -> Vec<Value> {
    let mut files = Vec::new();
    yaml_files(folder, &mut files);
    let mut documents = Vec::new();
    for file in files {
        let yaml = std::fs::read_to_string(&file).unwrap();
        let parsed: Vec<Value> =
            serde_saphyr::from_multiple(&yaml).unwrap_or_else(|e| panic!("{file:?}: {e}"));
        documents.extend(parsed.into_iter().filter(|document| !text(document, "/metadata/name").is_empty()));
    }
    documents
}

#[test]
fn real_projects_live_scale_roll_and_die() {
    for folder in projects() {
        let project = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut cluster = Cluster::with_nodes(config_dual(), 3);
        for document in documents(&folder) {
            cluster.apply(document);
        }
        cluster.run();
        let pods = cluster.all("Pod").len();
        println!(
            "{project}: {pods} pods, {} services, at rest after {} rounds",
            cluster.all("Service").len(),
            cluster.rounds
        );
        assert!(pods > 0, "{project}");
        let warnings: Vec<_> = cluster
            .all("Event")
            .into_iter()
            .filter(|e| e["type"] == "Warning" && e["reason"] != "FailedScheduling")
            .map(|e| e["message"].clone())
            .collect();
        assert_eq!(warnings, Vec::<Value>::new(), "{project}");
        check(&mut cluster);

        // The same manifests again make the same cluster.
        let mut again = Cluster::with_nodes(config_dual(), 3);
        documents(&folder).into_iter().for_each(|document| again.apply(document));
        again.run();
        assert_eq!(cluster.objects, again.objects, "{project} does not repeat");

        scale_and_roll(&mut cluster);
        check(&mut cluster);

        // A node goes, another comes: its pods are somebody's to delete, and come back elsewhere.
        let lost: Vec<_> =
            cluster.all("Pod").into_iter().filter(|p| p["spec"]["nodeName"] == "node-3").cloned().collect();
        cluster.delete("Node", "", "node-3");
        cluster.add_node(4);
        for pod in lost {
            cluster.delete("Pod", text(&pod, "/metadata/namespace"), text(&pod, "/metadata/name"));
        }
        cluster.run();
        check(&mut cluster);

        let workloads: Vec<_> =
            ["Deployment", "StatefulSet", "DaemonSet", "ReplicationController", "Service"]
                .iter()
                .flat_map(|kind| cluster.all(kind))
                .map(|w| {
                    (
                        text(w, "/kind").to_owned(),
                        text(w, "/metadata/namespace").to_owned(),
                        text(w, "/metadata/name").to_owned(),
                    )
                })
                .collect();
        for (kind, namespace, name) in workloads {
            cluster.delete(&kind, &namespace, &name);
        }
        cluster.run();
        for kind in ["Pod", "ReplicaSet", "ControllerRevision", "EndpointSlice", "Endpoints"] {
            assert_eq!(cluster.all(kind), Vec::<&Value>::new(), "{project}: {kind} left");
        }
    }
}

fn scale_and_roll(cluster: &mut Cluster) {
    for kind in ["Deployment", "StatefulSet"] {
        let workloads: Vec<Value> = cluster.all(kind).into_iter().cloned().collect();
        for mut workload in workloads {
            // Anti-affinity in these manifests allows one per node.
            let replicas = workload["spec"]["replicas"].as_u64().unwrap();
            workload["spec"]["replicas"] = (if replicas == 1 { 2 } else { replicas - 1 }).into();
            workload["spec"]["template"]["metadata"]["annotations"] = json!({"rolled": "yes"});
            // Nodes are as many as replicas here, so a surge would wait for ever.
            if kind == "Deployment" {
                workload["spec"]["strategy"] =
                    json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}});
            }
            cluster.apply(workload);
        }
    }
    cluster.run();
    for pod in cluster.all("Pod") {
        let owner = text(pod, "/metadata/ownerReferences/0/kind");
        if owner == "ReplicaSet" || owner == "StatefulSet" {
            assert_eq!(text(pod, "/metadata/annotations/rolled"), "yes", "{}", text(pod, "/metadata/name"));
        }
    }
}

#[test]
fn single_stack_clusters_refuse_dual_stack_services_by_name_and_run_the_rest() {
    let Some(folder) = projects().into_iter().find(|folder| folder.ends_with("bookinfo")) else { return };
    let mut cluster = Cluster::with_nodes(Config::default(), 3);
    documents(&folder).into_iter().for_each(|document| cluster.apply(document));
    cluster.run();
    let refused: Vec<_> = cluster
        .all("Service")
        .into_iter()
        .filter(|s| s["spec"].get("clusterIPs").is_none())
        .cloned()
        .collect();
    assert!(!refused.is_empty());
    for service in refused {
        let events = cluster.events(text(&service, "/metadata/name"));
        assert!(events.iter().any(|e| e.contains("not configured")), "{events:?}");
        cluster.delete("Service", text(&service, "/metadata/namespace"), text(&service, "/metadata/name"));
    }
    cluster.run();
    check(&mut cluster);
}

/// A step in a random cluster's life.
#[derive(Debug, Clone, Copy)]
enum Act {
    Deploy { name: u8, replicas: u8, version: u8, recreate: bool, surge: u8 },
    Stateful { name: u8, replicas: u8, version: u8, parallel: bool },
    Daemon { name: u8, version: u8, zone: bool },
    Job { name: u8, completions: u8 },
    Service { name: u8, headless: bool, family: u8, type_: u8 },
    Node { number: u8 },
    RemoveNode { number: u8 },
    Delete { kind: u8, name: u8 },
    KillPod { which: u8 },
    Unready { which: u8 },
    Finish { which: u8, failed: bool },
    Relabel { which: u8 },
    Step,
    Kubelets,
}

fn act() -> impl Strategy<Value = Act> {
    let small = 0..3_u8;
    prop_oneof![
        3 => (small.clone(), 0..5_u8, 0..3_u8, any::<bool>(), 0..3_u8).prop_map(|(name, replicas, version, recreate, surge)| {
            Act::Deploy { name, replicas, version, recreate, surge }
        }),
        2 => (small.clone(), 0..4_u8, 0..3_u8, any::<bool>()).prop_map(|(name, replicas, version, parallel)| {
            Act::Stateful { name, replicas, version, parallel }
        }),
        1 => (small.clone(), 0..3_u8, any::<bool>()).prop_map(|(name, version, zone)| Act::Daemon { name, version, zone }),
        1 => (small.clone(), 0..4_u8).prop_map(|(name, completions)| Act::Job { name, completions }),
        2 => (small.clone(), any::<bool>(), 0..5_u8, 0..4_u8).prop_map(|(name, headless, family, type_)| {
            Act::Service { name, headless, family, type_ }
        }),
        1 => (1..6_u8).prop_map(|number| Act::Node { number }),
        1 => (1..6_u8).prop_map(|number| Act::RemoveNode { number }),
        1 => (0..4_u8, small.clone()).prop_map(|(kind, name)| Act::Delete { kind, name }),
        2 => any::<u8>().prop_map(|which| Act::KillPod { which }),
        1 => any::<u8>().prop_map(|which| Act::Unready { which }),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(which, failed)| Act::Finish { which, failed }),
        1 => any::<u8>().prop_map(|which| Act::Relabel { which }),
        4 => Just(Act::Step),
        4 => Just(Act::Kubelets),
    ]
}

fn template(app: &str, version: u8) -> Value {
    json!({"metadata": {"labels": {"app": app}}, "spec": {"containers": [
        {"name": "c", "image": format!("x:{version}"), "ports": [{"name": "http", "containerPort": 8000 + u16::from(version)}]}]}})
}

fn perform(cluster: &mut Cluster, act: Act) {
    let pod = |cluster: &Cluster, which: u8| {
        let pods = cluster.all("Pod");
        let pod = pods.get(usize::from(which) % pods.len().max(1))?;
        Some((**pod).clone())
    };
    match act {
        Act::Deploy { name, replicas, version, recreate, surge } => {
            let app = format!("d{name}");
            let strategy = if recreate {
                json!({"type": "Recreate", "rollingUpdate": null})
            } else {
                json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": "34%"}})
            };
            cluster.apply(json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": app},
                "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": app}}, "strategy": strategy,
                    "revisionHistoryLimit": 1, "template": template(&app, version)}}));
        }
        Act::Stateful { name, replicas, version, parallel } => {
            let app = format!("s{name}");
            let policy = if parallel { "Parallel" } else { "OrderedReady" };
            cluster.apply(json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": app},
                "spec": {"replicas": replicas, "serviceName": app, "selector": {"matchLabels": {"app": app}},
                    "podManagementPolicy": policy, "template": template(&app, version)}}));
        }
        Act::Daemon { name, version, zone } => {
            let app = format!("ds{name}");
            let mut template = template(&app, version);
            template["spec"]["nodeSelector"] =
                if zone { json!({"topology.kubernetes.io/zone": "zone-1"}) } else { Value::Null };
            cluster.apply(json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": app},
                "spec": {"selector": {"matchLabels": {"app": app}}, "template": template}}));
        }
        Act::Job { name, completions } => {
            let app = format!("j{name}");
            let mut template = template(&app, 0);
            template["spec"]["restartPolicy"] = "Never".into();
            cluster.apply(json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": app},
                "spec": {"completions": completions, "parallelism": 2, "template": template}}));
        }
        Act::Service { name, headless, family, type_ } => {
            let name = format!("d{name}");
            let mut spec = json!({"selector": {"app": name}, "ports": [{"name": "web", "port": 80, "targetPort": "http"},
                {"name": "dns", "port": 53, "protocol": "UDP"}]});
            match family {
                0 => spec["ipFamilyPolicy"] = "PreferDualStack".into(),
                1 => spec["ipFamilies"] = json!(["IPv6"]),
                2 => spec["ipFamilyPolicy"] = "SingleStack".into(),
                _ => {}
            }
            if headless {
                spec["clusterIP"] = "None".into();
            } else {
                spec["type"] =
                    ["ClusterIP", "NodePort", "LoadBalancer", "ClusterIP"][usize::from(type_)].into();
            }
            cluster.delete("Service", "default", &name);
            cluster.apply(
                json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}),
            );
        }
        Act::Node { number } => cluster.add_node(number.into()),
        Act::RemoveNode { number } => {
            let name = format!("node-{number}");
            cluster.delete("Node", "", &name);
            let lost: Vec<_> = cluster
                .all("Pod")
                .into_iter()
                .filter(|p| p["spec"]["nodeName"] == name.as_str())
                .cloned()
                .collect();
            for pod in lost {
                cluster.delete("Pod", "default", text(&pod, "/metadata/name"));
            }
        }
        Act::Delete { kind, name } => {
            let (kind, prefix) =
                [("Deployment", "d"), ("StatefulSet", "s"), ("DaemonSet", "ds"), ("Service", "d")]
                    [usize::from(kind)];
            cluster.delete(kind, "default", &format!("{prefix}{name}"));
        }
        Act::KillPod { which } => {
            if let Some(pod) = pod(cluster, which) {
                cluster.delete("Pod", "default", text(&pod, "/metadata/name"));
            }
        }
        Act::Unready { which } => {
            if let Some(pod) = pod(cluster, which).filter(|pod| pod.pointer("/status/podIP").is_some()) {
                cluster.set_ready("default", text(&pod, "/metadata/name"), false);
            }
        }
        Act::Finish { which, failed } => {
            if let Some(pod) = pod(cluster, which).filter(|pod| pod.pointer("/status/podIP").is_some()) {
                let phase = if failed { "Failed" } else { "Succeeded" };
                cluster.set_phase("default", text(&pod, "/metadata/name"), phase);
            }
        }
        Act::Relabel { which } => {
            if let Some(mut pod) = pod(cluster, which) {
                pod["metadata"]["labels"]["app"] = "quarantined".into();
                cluster.apply(pod);
            }
        }
        Act::Step => {
            cluster.step();
        }
        Act::Kubelets => {
            cluster.run_kubelets();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Whatever happens to a cluster, it comes to rest, and then every workload has what it asks for.
    #[test]
    fn any_history_comes_to_rest(acts in proptest::collection::vec(act(), 1..40), dual in any::<bool>()) {
        let mut cluster = Cluster::with_nodes(if dual { config_dual() } else { Config::default() }, 2);
        for act in acts {
            perform(&mut cluster, act);
        }
        // What the history left broken is mended, so that there is something to come to.
        cluster.add_node(1);
        let pods: Vec<Value> = cluster.all("Pod").into_iter().cloned().collect();
        for pod in pods {
            let name = text(&pod, "/metadata/name");
            let by_job = text(&pod, "/metadata/ownerReferences/0/kind") == "Job";
            let running = pod.pointer("/status/podIP").is_some() && pod["metadata"].get("deletionTimestamp").is_none();
            if !by_job && running && text(&pod, "/status/phase") != "Running" {
                // Failed pods stay as they are; their controllers replace them.
                cluster.delete("Pod", "default", name);
            } else if running && text(&pod, "/status/phase") == "Running" {
                cluster.set_ready("default", name, true);
            }
        }
        for _ in 0..2 {
            cluster.run();
            // Quarantined pods have no controller and no place in the checks.
            let strays: Vec<_> = cluster.pods("").into_iter()
                .filter(|p| p["metadata"]["labels"]["app"] == "quarantined" || text(p, "/status/phase") != "Running")
                .map(|p| text(p, "/metadata/name").to_owned()).collect();
            for name in strays {
                cluster.delete("Pod", "default", &name);
            }
        }
        cluster.run();
        let refused: Vec<_> = cluster.all("Service").into_iter().filter(|s| s["spec"].get("clusterIPs").is_none())
            .map(|s| text(s, "/metadata/name").to_owned()).collect();
        for name in refused {
            prop_assert!(!dual);
            prop_assert!(!cluster.events(&name).is_empty());
            cluster.delete("Service", "default", &name);
        }
        cluster.settle();
        check(&mut cluster);
    }
}

/// A path into a JSON value, walked by these choices, where something is replaced.
fn damage(value: &mut Value, path: &[u8], with: &Value) {
    let Some((&step, rest)) = path.split_first() else {
        *value = with.clone();
        return;
    };
    match value {
        Value::Object(map) if !map.is_empty() => {
            let key = map.keys().nth(usize::from(step) % map.len()).unwrap().clone();
            damage(&mut map[&key], rest, with);
        }
        Value::Array(items) if !items.is_empty() => {
            let len = items.len();
            damage(&mut items[usize::from(step) % len], rest, with);
        }
        _ => *value = with.clone(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Objects with anything anywhere never panic, never loop, and leave their neighbours alone.
    #[test]
    fn damaged_objects_are_harmless(
        hits in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 1..7), 0..9_usize), 1..6)
    ) {
        let mut cluster = small_cluster();
        cluster.run();
        let junk = [json!(null), json!(true), json!(-1), json!(1e300), json!("x"), json!(""), json!([]), json!({}), json!([null, {"a": [1]}])];
        let mut objects: Vec<Value> = cluster.objects.values().filter(|o| o["kind"] != "Event").cloned().collect();
        for (which, path, with) in hits {
            let index = usize::from(which) % objects.len();
            damage(&mut objects[index], &path, &junk[with]);
        }
        let plan = reconcile(&World::new(cluster.now, &objects), &cluster.config);
        for op in &plan.ops {
            if let Op::Create(object) | Op::Update(object) | Op::UpdateStatus(object) = op {
                prop_assert!(object.pointer("/metadata/name").is_some_and(Value::is_string));
            }
        }
    }
}

fn small_cluster() -> Cluster {
    let mut cluster = Cluster::with_nodes(config_dual(), 2);
    perform(&mut cluster, Act::Deploy { name: 0, replicas: 2, version: 0, recreate: false, surge: 1 });
    perform(&mut cluster, Act::Stateful { name: 0, replicas: 2, version: 0, parallel: false });
    perform(&mut cluster, Act::Daemon { name: 0, version: 0, zone: true });
    perform(&mut cluster, Act::Job { name: 0, completions: 2 });
    perform(&mut cluster, Act::Service { name: 0, headless: false, family: 0, type_: 2 });
    perform(&mut cluster, Act::Service { name: 1, headless: true, family: 4, type_: 0 });
    cluster.apply_yaml(
        "
apiVersion: v1
kind: Pod
metadata: {name: picky, labels: {app: d0}}
spec:
  tolerations: [{key: a, operator: Exists}]
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/os, operator: In, values: [linux]}]}]
    podAntiAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
      - {topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: {app: nobody}}}
  topologySpreadConstraints:
  - {maxSkew: 1, topologyKey: topology.kubernetes.io/zone, labelSelector: {matchLabels: {app: picky}}}
  containers: [{name: c, ports: [{containerPort: 80, hostPort: 80}]}]
---
apiVersion: v1
kind: Service
metadata: {name: manual}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Endpoints
metadata: {name: manual}
subsets: [{addresses: [{ip: 192.0.2.1}], ports: [{port: 80}]}]
",
    );
    cluster
}

/// A cluster at rest with `deployments` Deployments of ten pods, each behind a Service.
fn large_cluster(deployments: usize) -> Cluster {
    let mut cluster = Cluster::with_nodes(Config::default(), 10);
    for i in 0..deployments {
        let name = format!("app-{i}");
        cluster.apply(json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
            "spec": {"replicas": 10, "selector": {"matchLabels": {"app": name}}, "template": template(&name, 0)}}));
        cluster.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": "http"}]}}));
    }
    cluster.run();
    cluster
}

#[test]
fn work_grows_with_the_cluster_not_with_its_square() {
    let fastest = |cluster: &Cluster| {
        let once = |_| {
            let start = std::time::Instant::now();
            let plan = reconcile(&World::new(cluster.now, cluster.objects.values()), &cluster.config);
            assert!(plan.ops.is_empty());
            start.elapsed()
        };
        (0..7).map(once).min().unwrap()
    };
    let (small, large) = (large_cluster(25), large_cluster(200));
    let (few, many) = (fastest(&small), fastest(&large));
    println!("{} objects: {few:?}; {} objects: {many:?}", small.objects.len(), large.objects.len());
    // Eight times the objects; a square would be 64 times the work.
    assert!(many < few * 24, "{few:?} for an eighth, {many:?} for all");
}
