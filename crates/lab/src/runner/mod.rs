//! The kubelet's part: pods that are bound to a node become namespaces with processes in them.
//!
//! Every pod has one task that owns everything of it: namespace, CNI attachment, containers, status. The
//! dispatcher here only hands the pod's newest state to that task.

pub(crate) mod container;
mod node;
mod pod;
mod probe;
mod sandbox;
pub(crate) mod status;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use podway_apiserver::{GroupResource, Store, WatchEvent, WatchOptions, get_str};
use serde_json::Value;
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::task::JoinSet;

use crate::etc::ResolvConf;
use crate::spec::{LabName, LabSpec};
pub(crate) use node::{NodeContext, NodeTable, Power};

/// Sandboxes that are made at the same time. More would only fight for the kernel's rtnl lock.
const PARALLEL_SANDBOXES: usize = 8;

/// What all pods' tasks share.
pub(crate) struct Runner {
    pub(crate) lab: LabName,
    pub(crate) store: Arc<Store>,
    pub(crate) nodes: Arc<NodeTable>,
    /// The CNI plugin, by the name that makes the binary behave as one.
    pub(crate) cni_plugin: PathBuf,
    pub(crate) cluster_dns: Vec<IpAddr>,
    pub(crate) node_resolver: ResolvConf,
    pub(crate) api_service: Option<IpAddr>,
    pub(crate) family: crate::spec::Family,
    sandboxes: Semaphore,
}

impl Runner {
    pub(crate) fn new(spec: &LabSpec, store: Arc<Store>, nodes: Arc<NodeTable>, cni_plugin: PathBuf) -> Self {
        Self {
            lab: spec.name.clone(),
            store,
            nodes,
            cni_plugin,
            cluster_dns: spec.dns_addresses(),
            // The world outside of the cluster is the fabric, so the nodes' upstream resolver is there.
            node_resolver: ResolvConf {
                nameservers: spec.fabric_addresses().iter().map(ToString::to_string).collect(),
                ..ResolvConf::default()
            },
            api_service: spec.api_service_addresses().first().copied(),
            family: spec.family,
            sandboxes: Semaphore::new(PARALLEL_SANDBOXES),
        }
    }

    /// Runs the pods of all nodes until the store's pods resource goes away, which it never does.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut dispatcher =
            Dispatcher { runner: self, pods: HashMap::new(), names: HashMap::new(), tasks: JoinSet::new() };
        loop {
            if let Err(error) = dispatcher.watch().await {
                tracing::warn!(%error, "watch of pods starts again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Newest state of a pod; `None` when the object is gone.
pub(crate) type PodState = Option<Arc<Value>>;

struct Dispatcher {
    runner: Arc<Runner>,
    /// By uid.
    pods: HashMap<String, watch::Sender<PodState>>,
    /// By namespace and name: a pod that reuses a name waits until its predecessor's files are gone.
    names: HashMap<(String, String), Arc<Mutex<()>>>,
    tasks: JoinSet<String>,
}

impl Dispatcher {
    async fn watch(&mut self) -> Result<(), podway_apiserver::ApiError> {
        let pods = GroupResource::new("", "pods");
        let mut watcher = self.runner.store.watch(
            &pods,
            None,
            WatchOptions { send_initial_events: true, ..WatchOptions::default() },
        )?;
        // What vanished while nobody watched is not in the initial events.
        let mut unseen: Option<Vec<String>> = Some(self.pods.keys().cloned().collect());
        let mut arrivals = self.runner.nodes.arrivals();
        loop {
            let events = tokio::select! {
                events = watcher.next() => match events {
                    Some(events) => events?,
                    None => return Ok(()),
                },
                // Pods may have been bound to a node before it was wired: all of them are looked at once more.
                Ok(()) = arrivals.changed() => return Ok(()),
                Some(done) = self.tasks.join_next() => {
                    self.forget(done);
                    continue;
                }
            };
            for event in events {
                match event {
                    WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                        if let Some(unseen) = &mut unseen {
                            unseen.retain(|uid| uid != get_str(&pod, &["metadata", "uid"]));
                        }
                        self.update(pod);
                    }
                    WatchEvent::Deleted(pod) => self.gone(get_str(&pod, &["metadata", "uid"])),
                    WatchEvent::Bookmark { .. } => {
                        for uid in unseen.take().into_iter().flatten() {
                            self.gone(&uid);
                        }
                    }
                }
            }
        }
    }

    fn update(&mut self, pod: Arc<Value>) {
        let uid = get_str(&pod, &["metadata", "uid"]).to_owned();
        if let Some(known) = self.pods.get(&uid) {
            known.send_replace(Some(pod));
            return;
        }
        let Some(node) = self.runner.nodes.node(get_str(&pod, &["spec", "nodeName"])) else { return };
        // A pod that has ended is never started again.
        if matches!(get_str(&pod, &["status", "phase"]), "Succeeded" | "Failed")
            && pod["metadata"]["deletionTimestamp"].is_null()
        {
            return;
        }
        let name = (
            get_str(&pod, &["metadata", "namespace"]).to_owned(),
            get_str(&pod, &["metadata", "name"]).to_owned(),
        );
        let turn = self.names.entry(name).or_default().clone();
        let (sender, receiver) = watch::channel(Some(pod));
        self.pods.insert(uid.clone(), sender);
        let runner = self.runner.clone();
        self.tasks.spawn(async move {
            let _turn = turn.lock_owned().await;
            pod::run(runner, node, receiver).await;
            uid
        });
    }

    fn gone(&mut self, uid: &str) {
        if let Some(known) = self.pods.get(uid) {
            known.send_replace(None);
        }
    }

    fn forget(&mut self, done: Result<String, tokio::task::JoinError>) {
        match done {
            Ok(uid) => {
                // A deletion may have come while the task was on its way out; then the pod still has to be finalised.
                let last = self.pods.remove(&uid).and_then(|sender| sender.borrow().clone());
                if let Some(pod) = last
                    && !pod["metadata"]["deletionTimestamp"].is_null()
                    && self
                        .runner
                        .store
                        .key_of(&pod)
                        .and_then(|key| self.runner.store.get(&key))
                        .is_ok_and(|now| get_str(&now, &["metadata", "uid"]) == uid)
                {
                    self.update(pod);
                }
            }
            Err(error) => tracing::error!(%error, "a pod's task failed"),
        }
        self.names.retain(|_, turn| Arc::strong_count(turn) > 1);
    }
}
