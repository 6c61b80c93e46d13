//! A cluster in memory for tests: a store that behaves like the API server as far as controllers can tell, and nodes
//! whose pods start and stop when told.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::{Config, Deletion, Op, World, defaults, reconcile, rfc3339};

/// Kind, namespace, name.
type Key = (String, String, String);

pub(crate) struct Cluster {
    pub(crate) objects: BTreeMap<Key, Value>,
    pub(crate) config: Config,
    pub(crate) now: Timestamp,
    serial: u64,
    next_address: u32,
    pub(crate) rounds: usize,
}

pub(crate) fn config_dual() -> Config {
    let cidrs = |texts: [&str; 2]| texts.map(|text| text.parse().unwrap()).to_vec();
    Config {
        cluster_cidrs: cidrs(["10.244.0.0/16", "fd00:10:244::/48"]),
        service_cidrs: cidrs(["10.96.0.0/16", "fd00:10:96::/112"]),
        ..Config::default()
    }
}

fn key(value: &Value) -> Key {
    let text = |path| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    (text("/kind"), text("/metadata/namespace"), text("/metadata/name"))
}

impl Cluster {
    pub(crate) fn new(config: Config) -> Self {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        Self { objects: BTreeMap::new(), config, now, serial: 0, next_address: 1, rounds: 0 }
    }

    /// With `nodes` ready nodes in two zones.
    pub(crate) fn with_nodes(config: Config, nodes: usize) -> Self {
        let mut cluster = Self::new(config);
        for i in 1..=nodes {
            cluster.add_node(i);
        }
        cluster
    }

    pub(crate) fn add_node(&mut self, i: usize) {
        let name = format!("node-{i}");
        self.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
            "topology.kubernetes.io/zone": format!("zone-{}", i % 2)}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    }

    pub(crate) fn apply_yaml(&mut self, yaml: &str) {
        let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap();
        documents.into_iter().filter(|d| !d.is_null()).for_each(|d| self.apply(d));
    }

    /// Create, or replace the desired state and keep what the cluster added.
    pub(crate) fn apply(&mut self, mut value: Value) {
        let kind = key(&value).0;
        let cluster_scoped =
            matches!(kind.as_str(), "Node" | "Namespace" | "ClusterRole" | "ClusterRoleBinding");
        if !cluster_scoped && value.pointer("/metadata/namespace").is_none() {
            value["metadata"]["namespace"] = "default".into();
        }
        match self.objects.get(&key(&value)).cloned() {
            Some(mut existing) => {
                merge(&mut existing, &value);
                self.write(existing, false);
            }
            None => self.create(value),
        }
    }

    pub(crate) fn create(&mut self, mut value: Value) {
        let key = key(&value);
        assert!(!key.2.is_empty(), "no name: {value}");
        assert!(!self.objects.contains_key(&key), "exists: {key:?}");
        self.serial += 1;
        defaults::apply(&key.0, &mut value);
        value["metadata"]["uid"] = format!("uid-{}", self.serial).into();
        value["metadata"]["creationTimestamp"] = rfc3339(self.now).into();
        value["metadata"]["generation"] = 1.into();
        value["metadata"]["resourceVersion"] = self.serial.to_string().into();
        self.objects.insert(key, value);
    }

    fn write(&mut self, mut value: Value, is_status: bool) {
        let key = key(&value);
        let old = &self.objects[&key];
        if is_status {
            let status = value["status"].take();
            value = old.clone();
            value["status"] = status;
        } else if let Some(status) = old.get("status") {
            value["status"] = status.clone();
        }
        defaults::apply(&key.0, &mut value);
        if old.get("spec") != value.get("spec") {
            let generation = old["metadata"]["generation"].as_i64().unwrap_or(1);
            value["metadata"]["generation"] = (generation + 1).into();
        }
        self.serial += 1;
        value["metadata"]["resourceVersion"] = self.serial.to_string().into();
        self.objects.insert(key, value);
    }

    pub(crate) fn delete(&mut self, kind: &str, namespace: &str, name: &str) {
        let key = (kind.to_owned(), namespace.to_owned(), name.to_owned());
        let Some(object) = self.objects.get_mut(&key) else { return };
        let running = object.pointer("/spec/nodeName").is_some() && object.pointer("/status/podIP").is_some();
        if kind == "Pod" && running {
            object["metadata"]["deletionTimestamp"] = rfc3339(self.now).into();
            return;
        }
        self.remove(&key);
    }

    /// Remove, and with it what it owned (background garbage collection).
    fn remove(&mut self, key: &Key) {
        let Some(object) = self.objects.remove(key) else { return };
        let uid = &object["metadata"]["uid"];
        let owned: Vec<Key> = self
            .objects
            .iter()
            .filter(|(_, o)| o.pointer("/metadata/ownerReferences/0/uid") == Some(uid))
            .map(|(key, _)| key.clone())
            .collect();
        for (kind, namespace, name) in owned {
            self.delete(&kind, &namespace, &name);
        }
    }

    /// One reconcile, applied. How many operations there were.
    pub(crate) fn step(&mut self) -> usize {
        let plan = reconcile(&World::new(self.now, self.objects.values()), &self.config);
        let count = plan.ops.len();
        for op in plan.ops {
            match op {
                Op::Create(value) => self.create(value),
                Op::Update(value) => self.write_checked(value, false),
                Op::UpdateStatus(value) => self.write_checked(value, true),
                Op::Delete(Deletion { kind, namespace, name, uid, .. }) => {
                    let key = (kind.to_owned(), namespace.clone(), name.clone());
                    assert_eq!(self.objects[&key]["metadata"]["uid"], uid.as_str(), "uid of {key:?}");
                    self.delete(kind, &namespace, &name);
                }
                Op::Event(event) => self.create(event.to_object(self.now)),
            }
        }
        count
    }

    fn write_checked(&mut self, value: Value, is_status: bool) {
        let key = key(&value);
        let Some(old) = self.objects.get(&key) else { return };
        // Optimistic locking: a second write of one plan to one object loses, and is asked for again.
        if old["metadata"]["resourceVersion"] == value["metadata"]["resourceVersion"] {
            self.write(value, is_status);
        }
    }

    /// Reconcile until nothing is left to do, without pods starting.
    pub(crate) fn settle(&mut self) {
        for _ in 0..1000 {
            if self.step() == 0 {
                return;
            }
            self.rounds += 1;
        }
        let plan = reconcile(&World::new(self.now, self.objects.values()), &self.config);
        panic!("does not settle; still wants {:#?}", &plan.ops[..plan.ops.len().min(3)]);
    }

    /// Start bound pods, finish terminating ones. Whether anything changed.
    pub(crate) fn run_kubelets(&mut self) -> bool {
        let mut changed = false;
        let pods: Vec<Key> = self.objects.keys().filter(|key| key.0 == "Pod").cloned().collect();
        for key in pods {
            let pod = &self.objects[&key];
            if pod["metadata"].get("deletionTimestamp").is_some() {
                self.remove(&key);
                changed = true;
            } else if pod["spec"].get("nodeName").is_some() && pod.pointer("/status/podIP").is_none() {
                self.set_ready(&key.1, &key.2, true);
                changed = true;
            }
        }
        changed
    }

    pub(crate) fn set_ready(&mut self, namespace: &str, name: &str, ready: bool) {
        let mut pod = self.find("Pod", namespace, name).unwrap().clone();
        if pod.pointer("/status/podIP").is_none() {
            let (high, low) = (self.next_address / 250, self.next_address % 250 + 1);
            self.next_address += 1;
            let v4 = format!("10.244.{high}.{low}");
            pod["status"]["podIPs"] = if self.config.cluster_cidrs.len() > 1 {
                json!([{"ip": v4}, {"ip": format!("fd00:10:244::{:x}", self.next_address)}])
            } else {
                json!([{"ip": v4}])
            };
            pod["status"]["podIP"] = v4.into();
        }
        pod["status"]["phase"] = "Running".into();
        let mut conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.retain(|c| c["type"] != "Ready");
        let status = if ready { "True" } else { "False" };
        conditions.push(json!({"type": "Ready", "status": status, "lastTransitionTime": rfc3339(self.now)}));
        pod["status"]["conditions"] = conditions.into();
        self.write(pod, true);
    }

    pub(crate) fn set_phase(&mut self, namespace: &str, name: &str, phase: &str) {
        let mut pod = self.find("Pod", namespace, name).unwrap().clone();
        pod["status"]["phase"] = phase.into();
        pod["status"]["conditions"] = json!([]);
        self.write(pod, true);
    }

    /// Reconcile and let pods start and stop until the cluster is at rest.
    pub(crate) fn run(&mut self) {
        for _ in 0..1000 {
            self.settle();
            self.now += SignedDuration::from_secs(1);
            if !self.run_kubelets() {
                self.settle();
                return;
            }
        }
        panic!("never comes to rest");
    }

    pub(crate) fn find(&self, kind: &str, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(&(kind.to_owned(), namespace.to_owned(), name.to_owned()))
    }

    pub(crate) fn all(&self, kind: &str) -> Vec<&Value> {
        self.objects.iter().filter(|(key, _)| key.0 == kind).map(|(_, value)| value).collect()
    }

    /// Pods by name prefix, in `default`.
    pub(crate) fn pods(&self, prefix: &str) -> Vec<&Value> {
        let mut pods = self.all("Pod");
        pods.retain(|pod| pod["metadata"]["name"].as_str().unwrap().starts_with(prefix));
        pods
    }

    /// Messages of the warnings about an object.
    pub(crate) fn events(&self, name: &str) -> Vec<String> {
        let about = |e: &&Value| e["involvedObject"]["name"] == name && e["type"] == "Warning";
        self.all("Event")
            .into_iter()
            .filter(about)
            .map(|e| e["message"].as_str().unwrap().to_owned())
            .collect()
    }
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                if value.is_null() {
                    into.remove(key);
                } else {
                    merge(into.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
        }
        (into, from) => *into = from.clone(),
    }
}
