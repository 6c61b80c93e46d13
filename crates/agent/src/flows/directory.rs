//! The directory of names, kept current from the API server and from what is attached here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use podway_flows::Names;
use podway_flows::identity::Total;
use podway_kube::watch::{self, Change};
use podway_kube::{Client, Kind};
use podway_model::{NodePeer, Pod, Rejection, Service};
use serde_json::Value;
use tracing::debug;

use crate::attach::lock;
use crate::clock;

/// Changes of pods that may wait.
const BUFFER: usize = 256;

/// The names, shared between those who tell them and the reader of events.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    names: Mutex<Names>,
    /// Kinds whose objects are not known yet.
    missing: Mutex<BTreeSet<&'static str>>,
    complete: Condvar,
}

impl Directory {
    /// A directory that is complete once it knows pods and nodes, and services if there are to be any.
    pub(super) fn new(services: bool) -> Self {
        let mut missing = BTreeSet::from(["pods", "nodes"]);
        if services {
            missing.insert("services");
        }
        Self { missing: Mutex::new(missing), ..Self::default() }
    }

    /// Waits until everything is known, for so long at most: what happened before an agent started shall have names.
    pub(super) fn wait(&self, limit: Duration) {
        let missing = lock(&self.missing);
        drop(self.complete.wait_timeout_while(missing, limit, |missing| !missing.is_empty()));
    }

    fn knows(&self, kind: &'static str) {
        let mut missing = lock(&self.missing);
        if missing.remove(kind) && missing.is_empty() {
            self.complete.notify_all();
        }
    }

    pub(crate) fn names(&self) -> MutexGuard<'_, Names> {
        lock(&self.names)
    }

    /// Bytes of all identities, by themselves.
    pub(crate) fn total(&self) -> Total {
        self.names().total().clone()
    }

    /// Bytes of identities that the directory itself holds.
    pub(crate) fn known_bytes(&self) -> usize {
        self.names().held_bytes()
    }

    /// What is attached to this node.
    pub(crate) fn attached(&self, pods: BTreeMap<IpAddr, String>) {
        self.names().set_attached(pods, clock::unix_ns());
    }

    fn pods(&self, change: Change<PodItem>) {
        let now = clock::unix_ns();
        match change {
            Change::Synced(all) => {
                let pods = all.into_iter().filter_map(PodItem::pod).collect();
                self.names().set_pods(pods, now);
                self.knows("pods");
            }
            Change::Applied(item) => {
                if let Some(pod) = item.pod() {
                    self.names().set_pod(pod, now);
                }
            }
            Change::Deleted(item) => self.names().remove_pod(&item.namespace, &item.name, now),
            Change::Interrupted(_) | Change::Resumed => {}
        }
    }

    /// Nodes changed.
    pub(crate) fn nodes(&self, change: &Change) {
        let read = |value: &Value| match NodePeer::parse(value) {
            Ok(node) => Some(node),
            Err(error) => {
                debug!(%error, "a node without a name among flows");
                None
            }
        };
        match change {
            Change::Synced(all) => {
                let nodes = all.iter().filter_map(read).collect();
                self.names().set_nodes(nodes);
                self.knows("nodes");
            }
            Change::Applied(value) => {
                if let Some(node) = read(value) {
                    self.names().set_node(node);
                }
            }
            Change::Deleted(value) => {
                if let Some(name) = value.pointer("/metadata/name").and_then(Value::as_str) {
                    self.names().remove_node(name);
                }
            }
            Change::Interrupted(_) | Change::Resumed => {}
        }
    }

    /// All services there are.
    pub(crate) fn services<'a>(&self, all: impl Iterator<Item = &'a Service>) {
        self.names().set_services(all);
        self.knows("services");
    }

    /// One is new or has changed.
    pub(crate) fn service(&self, service: &Service) {
        self.names().set_service(service);
    }

    /// One is gone.
    pub(crate) fn service_gone(&self, namespace: &str, name: &str) {
        self.names().remove_service(namespace, name);
    }
}

/// A Pod as it came.
struct PodItem {
    namespace: String,
    name: String,
    parsed: Result<Box<Pod>, Rejection>,
}

impl PodItem {
    fn read(value: &Value) -> Self {
        let text =
            |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        Self {
            namespace: text("/metadata/namespace"),
            name: text("/metadata/name"),
            parsed: Pod::parse(value).map(Box::new),
        }
    }

    fn pod(self) -> Option<Pod> {
        match self.parsed {
            Ok(pod) => Some(*pod),
            Err(error) => {
                debug!(%error, "a pod without a name among flows");
                None
            }
        }
    }
}

/// Keeps pods current. Must be called inside a runtime.
pub(super) fn watch_pods(client: &Client, directory: &Arc<Directory>) {
    let mut changes = watch::start_parsed(client, Kind::POD, BUFFER, |value| PodItem::read(&value));
    let directory = Arc::clone(directory);
    tokio::spawn(async move {
        while let Some(change) = changes.recv().await {
            directory.pods(change);
        }
    });
}
