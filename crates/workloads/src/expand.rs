//! The pods that workloads would have, for those who have manifests and no cluster to run them in.
//!
//! The controllers themselves make them, so that they have the labels that controllers add: `pod-template-hash`,
//! `apps.kubernetes.io/pod-index`, `batch.kubernetes.io/job-name` and so on. Time stands still and every node fits.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{Config, Event, EventType, Op, World, defaults, reconcile, rfc3339};

/// Pods of one workload that its controller does not tell apart are all alike: two stand for any number.
const ALIKE: u64 = 2;
/// Most pods of a StatefulSet, which have names and labels of their own.
pub const MAX_ORDINALS: u64 = 100;
/// Deployment, ReplicaSet, pods, nodes, statuses: the controllers rest after half of these.
const MAX_ROUNDS: usize = 20;

/// A workload by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Workload {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// Such as `Deployment`.
    pub kind: String,
}

/// What [`expand`] has made.
#[derive(Debug, Default)]
pub struct Expansion {
    /// Pods, each with the workload of the manifests that it comes from. They have no address.
    pub pods: Vec<(Workload, Value)>,
    /// Workloads that have no pods because a field is wrong, with field and cause.
    pub refused: Vec<(Workload, String)>,
    /// StatefulSets with more pods than [`MAX_ORDINALS`], of which only those are there.
    pub cut: Vec<Workload>,
}

/// Makes the pods of Deployments, ReplicaSets, ReplicationControllers, StatefulSets, DaemonSets, Jobs and CronJobs
/// (those of one run). Other objects are ignored. Objects without a namespace are in `default`.
///
/// Of pods that are alike there are at most two; a DaemonSet has two as well. What is suspended or scaled to nothing has
/// none.
pub fn expand<'a>(objects: impl IntoIterator<Item = &'a Value>) -> Expansion {
    let mut store = Store::default();
    let mut out = Expansion::default();
    for i in 1..=ALIKE {
        let name = format!("node-{i}");
        let labels = json!({"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"});
        store
            .create(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    }
    for object in objects {
        let Some((workload, value)) = prepare(object) else { continue };
        if workload.kind == "StatefulSet" && object.pointer("/spec/replicas").is_some_and(is_too_many) {
            out.cut.push(workload.clone());
        }
        let key = store.create(value);
        store.origins.insert(key, workload);
    }
    let mut refused = BTreeMap::new();
    for _ in 0..MAX_ROUNDS {
        let ops =
            reconcile(&World::new(Timestamp::UNIX_EPOCH, store.objects.values()), &Config::default()).ops;
        let mut has_changed = false;
        for op in ops {
            match op {
                Op::Create(value) => {
                    store.create(value);
                    has_changed = true;
                }
                Op::Update(value) | Op::UpdateStatus(value) => has_changed |= store.write(value),
                // Without an end there is nothing to delete.
                Op::Delete(_) => {}
                Op::Event(Event {
                    involved,
                    type_: EventType::Warning,
                    reason: "InvalidObject",
                    message,
                    ..
                }) => {
                    let key = (involved.kind, involved.namespace, involved.name);
                    refused.insert(key, message);
                }
                Op::Event(_) => {}
            }
        }
        if !has_changed {
            break;
        }
    }
    for (key, message) in refused {
        out.refused.extend(store.origin(&key).map(|workload| (workload.clone(), message)));
    }
    let pods = store.objects.iter().filter(|((kind, ..), _)| kind == "Pod");
    let made: Vec<(Workload, Value)> =
        pods.filter_map(|(key, pod)| Some((store.origin(key)?.clone(), pod.clone()))).collect();
    out.pods = made;
    out
}

fn is_too_many(count: &Value) -> bool {
    count.as_u64().is_some_and(|count| count > MAX_ORDINALS)
}

/// The workload as the controllers get it: for a CronJob the Job of one run, with few replicas, on any node.
fn prepare(object: &Value) -> Option<(Workload, Value)> {
    let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("/apiVersion"), text("/kind"));
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    let is_workload = match kind {
        "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" => group == "apps",
        "ReplicationController" => group.is_empty(),
        "Job" | "CronJob" => group == "batch",
        _ => false,
    };
    if !is_workload {
        return None;
    }
    let namespace = Some(text("/metadata/namespace")).filter(|n| !n.is_empty()).unwrap_or("default");
    let workload = Workload {
        namespace: namespace.to_owned(),
        name: text("/metadata/name").to_owned(),
        kind: kind.to_owned(),
    };
    let mut value = if kind == "CronJob" {
        // Whatever the template holds, also what is no object, is the Job's to refuse.
        let template = |field: &str| object.pointer(&format!("/spec/jobTemplate/{field}")).cloned();
        let mut metadata = json!({"name": workload.name});
        for field in ["labels", "annotations"] {
            if let Some(value) = template(&format!("metadata/{field}")) {
                metadata[field] = value;
            }
        }
        let mut spec = template("spec").unwrap_or_default();
        if let Some(spec) = spec.as_object_mut()
            && object.pointer("/spec/suspend") == Some(&Value::Bool(true))
        {
            spec.insert("suspend".into(), true.into());
        }
        json!({"apiVersion": api_version, "kind": "Job", "metadata": metadata, "spec": spec})
    } else {
        object.clone()
    };
    if !value["metadata"].is_object() {
        return None;
    }
    value["metadata"]["namespace"] = namespace.into();
    let cap = |value: &mut Value, path: &str, most: u64| {
        if let Some(count) = value.pointer_mut(path)
            && count.as_u64().is_some_and(|count| count > most)
        {
            *count = most.into();
        }
    };
    match kind {
        "StatefulSet" => {
            cap(&mut value, "/spec/replicas", MAX_ORDINALS);
            // Nobody starts them, so none may wait for the one before.
            if let Some(spec) = value.get_mut("spec").and_then(Value::as_object_mut)
                && spec.get("podManagementPolicy").is_none_or(|policy| policy == "OrderedReady")
            {
                spec.insert("podManagementPolicy".into(), "Parallel".into());
            }
        }
        "DaemonSet" => {
            if let Some(spec) = value.pointer_mut("/spec/template/spec").and_then(Value::as_object_mut) {
                spec.remove("nodeSelector");
                spec.remove("affinity");
            }
        }
        "Job" | "CronJob" => {
            cap(&mut value, "/spec/parallelism", ALIKE);
            cap(&mut value, "/spec/completions", ALIKE);
        }
        _ => cap(&mut value, "/spec/replicas", ALIKE),
    }
    Some((workload, value))
}

/// Kind, namespace, name.
type Key = (String, String, String);

/// As much of an API server as controllers need.
#[derive(Default)]
struct Store {
    objects: BTreeMap<Key, Value>,
    origins: HashMap<Key, Workload>,
    writes: u64,
}

fn key(value: &Value) -> Key {
    let text = |path: &str| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    (text("/kind"), text("/metadata/namespace"), text("/metadata/name"))
}

impl Store {
    fn create(&mut self, mut value: Value) -> Key {
        let key = key(&value);
        defaults::apply(&key.0, &mut value);
        self.writes += 1;
        let metadata = &mut value["metadata"];
        metadata["uid"] = format!("{}/{}/{}", key.0, key.1, key.2).into();
        metadata["creationTimestamp"] = rfc3339(Timestamp::UNIX_EPOCH).into();
        metadata["generation"] = 1.into();
        metadata["resourceVersion"] = self.writes.to_string().into();
        let owner = metadata.pointer("/ownerReferences/0").map(|owner| {
            let text = |field: &str| owner[field].as_str().unwrap_or_default().to_owned();
            (text("kind"), key.1.clone(), text("name"))
        });
        if let Some(origin) = owner.and_then(|owner| self.origins.get(&owner)).cloned() {
            self.origins.insert(key.clone(), origin);
        }
        self.objects.insert(key.clone(), value);
        key
    }

    /// Whether it was another's version of the object, and is not any more.
    fn write(&mut self, mut value: Value) -> bool {
        let Some(old) = self.objects.get_mut(&key(&value)) else { return false };
        if old["metadata"]["resourceVersion"] != value["metadata"]["resourceVersion"] {
            return false;
        }
        self.writes += 1;
        value["metadata"]["resourceVersion"] = self.writes.to_string().into();
        *old = value;
        true
    }

    /// The workload of the manifests that an object comes from.
    fn origin(&self, key: &Key) -> Option<&Workload> {
        self.origins.get(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(api_version: &str, kind: &str, spec: &Value) -> Value {
        let mut value =
            json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "w"}, "spec": spec});
        if kind == "Job" || kind == "CronJob" {
            return value;
        }
        value["spec"]["selector"] = json!({"matchLabels": {"app": "web"}});
        if kind == "ReplicationController" {
            value["spec"]["selector"] = json!({"app": "web"});
        }
        value
    }

    fn template() -> Value {
        json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}})
    }

    #[test]
    fn each_kind_has_its_pods_with_its_controllers_labels() {
        for (api_version, kind, spec, expected, label) in [
            (
                "apps/v1",
                "Deployment",
                json!({"replicas": 30, "template": template()}),
                2,
                "pod-template-hash",
            ),
            ("apps/v1", "Deployment", json!({"template": template()}), 1, "pod-template-hash"),
            ("apps/v1", "Deployment", json!({"replicas": 0, "template": template()}), 0, ""),
            ("extensions/v1beta1", "Deployment", json!({"template": template()}), 0, ""),
            ("apps/v1", "ReplicaSet", json!({"replicas": 5, "template": template()}), 2, "app"),
            ("v1", "ReplicationController", json!({"template": template()}), 1, "app"),
            (
                "apps/v1",
                "StatefulSet",
                json!({"replicas": 3, "serviceName": "s", "template": template()}),
                3,
                "apps.kubernetes.io/pod-index",
            ),
            ("apps/v1", "StatefulSet", json!({"replicas": 300, "template": template()}), 100, "app"),
            ("apps/v1", "DaemonSet", json!({"template": template()}), 2, "controller-revision-hash"),
            (
                "batch/v1",
                "Job",
                json!({"template": template(), "parallelism": 9, "completions": 9}),
                2,
                "job-name",
            ),
            ("batch/v1", "Job", json!({"template": template(), "suspend": true}), 0, ""),
            (
                "batch/v1",
                "CronJob",
                json!({"schedule": "* * * * *", "jobTemplate": {"spec": {"template": template()}}}),
                1,
                "batch.kubernetes.io/job-name",
            ),
        ] {
            let object = workload(api_version, kind, &spec);
            let made = expand([&object]);
            assert_eq!(made.pods.len(), expected, "{api_version} {kind} {spec} {:?}", made.refused);
            for (workload, pod) in &made.pods {
                assert_eq!((&*workload.kind, &*workload.name), (kind, "w"));
                assert_eq!(pod["metadata"]["namespace"], "default");
                assert!(pod["metadata"]["labels"].get(label).is_some(), "{kind} {label} {pod}");
            }
            assert_eq!(made.cut.len(), usize::from(expected == 100));
        }
    }

    #[test]
    fn nonsense_is_refused_or_ignored_and_never_a_panic() {
        let nonsense = [json!(null), json!(5), json!("x"), json!([]), json!([1]), json!({}), json!({"a": 1})];
        for kind in [
            "Deployment",
            "ReplicaSet",
            "StatefulSet",
            "DaemonSet",
            "ReplicationController",
            "Job",
            "CronJob",
        ] {
            let api_version = match kind {
                "ReplicationController" => "v1",
                "Job" | "CronJob" => "batch/v1",
                _ => "apps/v1",
            };
            for path in [
                "/metadata",
                "/metadata/labels",
                "/spec",
                "/spec/replicas",
                "/spec/parallelism",
                "/spec/selector",
                "/spec/template",
                "/spec/template/metadata",
                "/spec/template/metadata/labels",
                "/spec/template/spec",
                "/spec/template/spec/containers",
                "/spec/jobTemplate",
                "/spec/jobTemplate/metadata",
                "/spec/jobTemplate/metadata/labels",
                "/spec/jobTemplate/spec",
                "/spec/jobTemplate/spec/template",
            ] {
                for value in &nonsense {
                    let spec = json!({"replicas": 1, "parallelism": 1, "template": template(), "jobTemplate":
                        {"metadata": {"labels": {}}, "spec": {"template": template()}}});
                    let mut object = workload(api_version, kind, &spec);
                    object["metadata"]["labels"] = json!({});
                    if let Some(place) = object.pointer_mut(path) {
                        place.clone_from(value);
                    }
                    let made = expand([&object]);
                    assert!(made.pods.len() <= 5, "{kind} {path} {value}");
                }
            }
        }
    }

    #[test]
    fn a_daemon_set_for_special_nodes_has_pods() {
        let mut template = template();
        template["spec"]["nodeSelector"] = json!({"kubernetes.io/os": "windows"});
        assert_eq!(expand([&workload("apps/v1", "DaemonSet", &json!({"template": template}))]).pods.len(), 2);
    }

    #[test]
    fn what_is_wrong_is_named_and_the_rest_goes_on() {
        let mut other = template();
        other["metadata"]["labels"]["app"] = "db".into();
        let bad = workload("apps/v1", "Deployment", &json!({"template": other}));
        let mut good = workload("apps/v1", "ReplicaSet", &json!({"template": template()}));
        good["metadata"]["name"] = "good".into();
        let made = expand([&bad, &good]);
        assert_eq!(made.pods.len(), 1);
        let [(workload, message)] = &made.refused[..] else { panic!("{:?}", made.refused) };
        assert_eq!(workload.name, "w");
        assert!(message.starts_with("spec.selector: "), "{message}");
    }
}
