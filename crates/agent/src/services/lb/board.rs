//! What is known of Services, endpoints and nodes, as far as load balancer addresses need it: written by the watches,
//! read by the controller and the announcer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use podway_kube::watch::Change;
use serde_json::Value;
use tokio::sync::Notify;

use super::service::{LbService, ObjectName};
use crate::attach::lock;

/// Label that keeps a node from answering for load balancer addresses (well-known labels of Kubernetes).
const EXCLUDE_LABEL: &str = "/metadata/labels/node.kubernetes.io~1exclude-from-external-load-balancers";

/// Nodes, and whether an endpoint there is ready (rather than just serving while it ends).
type Nodes = Vec<(Arc<str>, bool)>;

/// Where the endpoints of an EndpointSlice are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SliceNodes {
    /// Namespace and name of the slice.
    pub(crate) name: ObjectName,
    /// Name of the Service; empty when it has none.
    pub(crate) service: String,
    /// Where.
    pub(crate) nodes: Nodes,
}

impl SliceNodes {
    /// Reads a slice. What is malformed counts as absent; the compiler of services tells about it.
    #[must_use]
    pub(crate) fn read(value: &Value) -> Self {
        let text =
            |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut nodes: BTreeMap<&str, bool> = BTreeMap::new();
        let endpoints = value.get("endpoints").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        for endpoint in endpoints {
            let Some(node) = endpoint.get("nodeName").and_then(Value::as_str) else { continue };
            let condition =
                |name: &str| endpoint.pointer(&format!("/conditions/{name}")).and_then(Value::as_bool);
            // Absent counts as true (API documentation of EndpointConditions).
            let ready = condition("ready").unwrap_or(true);
            if ready || condition("serving").unwrap_or(ready) {
                *nodes.entry(node).or_default() |= ready;
            }
        }
        Self {
            name: (text("/metadata/namespace"), text("/metadata/name")),
            service: text("/metadata/labels/kubernetes.io~1service-name"),
            nodes: nodes.into_iter().map(|(n, r)| (Arc::from(n), r)).collect(),
        }
    }
}

/// What a node can do for addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It may be given addresses.
    Ready,
    /// It keeps those that it has: its kubelet says that something is wrong, often only that no agent is there, and
    /// to move an address breaks connections.
    NotReady,
    /// It answers for none.
    Out,
}

/// Name of a node, and what it can do for addresses.
#[must_use]
pub(crate) fn read_node(value: &Value) -> Option<(String, Standing)> {
    let name = value.pointer("/metadata/name")?.as_str()?.to_owned();
    let conditions =
        value.pointer("/status/conditions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let ready = conditions.iter().find(|c| c["type"] == "Ready").and_then(|c| c["status"].as_str());
    let leaves =
        value.pointer(EXCLUDE_LABEL).is_some() || value.pointer("/metadata/deletionTimestamp").is_some();
    let standing = match ready {
        _ if leaves => Standing::Out,
        None | Some("True") => Standing::Ready,
        Some("False") => Standing::NotReady,
        // Nobody has heard of its kubelet for a while.
        Some(_) => Standing::Out,
    };
    Some((name, standing))
}

/// The shared value.
#[derive(Debug, Default)]
pub(crate) struct Board {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    services: BTreeMap<ObjectName, LbService>,
    /// Nodes by Service, then by slice.
    slices: BTreeMap<ObjectName, BTreeMap<String, Nodes>>,
    /// Service by slice.
    service_of: BTreeMap<ObjectName, ObjectName>,
    nodes: BTreeMap<String, Standing>,
    synced: [bool; 3],
    /// Versions that were written from here and have not come back yet.
    written: BTreeMap<ObjectName, u64>,
}

/// What the controller works on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    /// Services that have, had or want an address.
    pub(crate) services: BTreeMap<ObjectName, LbService>,
    /// Nodes that are ready and may answer for addresses.
    pub(crate) nodes: BTreeSet<String>,
    /// Nodes that may go on answering for what they have.
    pub(crate) keepers: BTreeSet<String>,
    /// All nodes.
    pub(crate) all_nodes: usize,
    /// For Services with `externalTrafficPolicy: Local`: nodes with an endpoint that serves.
    pub(crate) local_nodes: BTreeMap<ObjectName, BTreeSet<String>>,
}

impl Board {
    /// Services changed.
    pub(crate) fn services(&self, change: &Change<(ObjectName, Option<LbService>)>) {
        let mut inner = lock(&self.inner);
        match change {
            Change::Synced(all) => {
                inner.services = all.iter().filter_map(|(n, s)| Some((n.clone(), s.clone()?))).collect();
                inner.written.clear();
                inner.synced[0] = true;
            }
            Change::Applied((name, service)) => inner.put(name, service.clone()),
            Change::Deleted((name, _)) => {
                inner.services.remove(name);
                inner.written.remove(name);
            }
            Change::Interrupted(_) | Change::Resumed => return,
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// A Service was written from here: this is what it is now, whatever the watch still tells of before.
    pub(crate) fn wrote(&self, name: &ObjectName, service: Option<LbService>) {
        let mut inner = lock(&self.inner);
        if let Some(version) = service.as_ref().and_then(|s| s.version) {
            inner.written.insert(name.clone(), version);
        }
        inner.set(name, service);
    }

    /// Slices changed.
    pub(crate) fn slices(&self, change: &Change<SliceNodes>) {
        let mut inner = lock(&self.inner);
        match change {
            Change::Synced(all) => {
                inner.slices.clear();
                inner.service_of.clear();
                for slice in all {
                    inner.put_slice(slice);
                }
                inner.synced[1] = true;
            }
            Change::Applied(slice) => inner.put_slice(slice),
            Change::Deleted(slice) => inner.drop_slice(&slice.name),
            Change::Interrupted(_) | Change::Resumed => return,
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Nodes changed.
    pub(crate) fn nodes(&self, change: &Change) {
        let mut inner = lock(&self.inner);
        let before = inner.nodes.clone();
        match change {
            Change::Synced(all) => {
                inner.nodes = all.iter().filter_map(read_node).collect();
                inner.synced[2] = true;
            }
            Change::Applied(node) => inner.nodes.extend(read_node(node)),
            Change::Deleted(node) => {
                if let Some((name, _)) = read_node(node) {
                    inner.nodes.remove(&name);
                }
            }
            Change::Interrupted(_) | Change::Resumed => return,
        }
        // Heartbeats change nothing here.
        let same = before == inner.nodes;
        drop(inner);
        if !same {
            self.changed.notify_one();
        }
    }

    /// Ends when something has changed since the last call.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Everything; `None` until all lists have been read.
    #[must_use]
    pub(crate) fn snapshot(&self) -> Option<Snapshot> {
        let inner = lock(&self.inner);
        if inner.synced != [true; 3] {
            return None;
        }
        let local_nodes = inner
            .services
            .iter()
            .filter(|(_, s)| s.wanted && s.local)
            .map(|(name, _)| (name.clone(), inner.serving(name)))
            .collect();
        Some(Snapshot {
            services: inner.services.clone(),
            nodes: inner.with(&[Standing::Ready]),
            keepers: inner.with(&[Standing::Ready, Standing::NotReady]),
            all_nodes: inner.nodes.len(),
            local_nodes,
        })
    }

    /// Whether a Service wants an address, or has one of a pool.
    #[must_use]
    pub(crate) fn has_work(&self) -> bool {
        !lock(&self.inner).services.is_empty()
    }

    /// Number of nodes.
    #[must_use]
    pub(crate) fn node_count(&self) -> usize {
        lock(&self.inner).nodes.len()
    }

    /// Addresses that a node answers for; `None` until the Services are known.
    #[must_use]
    pub(crate) fn announced_by(&self, node: &str) -> Option<BTreeSet<IpAddr>> {
        let inner = lock(&self.inner);
        let ours = |s: &&LbService| s.pool.is_some() && s.announced_by.as_deref() == Some(node);
        inner.synced[0]
            .then(|| inner.services.values().filter(ours).flat_map(|s| s.ingress.clone()).collect())
    }
}

impl Inner {
    fn with(&self, standings: &[Standing]) -> BTreeSet<String> {
        self.nodes.iter().filter(|(_, s)| standings.contains(s)).map(|(n, _)| n.clone()).collect()
    }

    fn put(&mut self, name: &ObjectName, service: Option<LbService>) {
        let version = service.as_ref().and_then(|s| s.version);
        if let (Some(written), Some(version)) = (self.written.get(name), version) {
            if version < *written {
                return;
            }
            self.written.remove(name);
        }
        self.set(name, service);
    }

    fn set(&mut self, name: &ObjectName, service: Option<LbService>) {
        match service {
            Some(service) => self.services.insert(name.clone(), service),
            None => self.services.remove(name),
        };
    }

    fn put_slice(&mut self, slice: &SliceNodes) {
        self.drop_slice(&slice.name);
        if slice.service.is_empty() {
            return;
        }
        let service = (slice.name.0.clone(), slice.service.clone());
        self.slices.entry(service.clone()).or_default().insert(slice.name.1.clone(), slice.nodes.clone());
        self.service_of.insert(slice.name.clone(), service);
    }

    fn drop_slice(&mut self, name: &ObjectName) {
        let Some(service) = self.service_of.remove(name) else { return };
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.remove(&name.1);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
    }

    /// Nodes with a ready endpoint; when there is none anywhere, those with one that serves while it ends.
    fn serving(&self, service: &ObjectName) -> BTreeSet<String> {
        let all = || self.slices.get(service).into_iter().flat_map(BTreeMap::values).flatten();
        let any_ready = all().any(|(_, ready)| *ready);
        all().filter(|(_, ready)| *ready || !any_ready).map(|(node, _)| node.to_string()).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::services::lb::service::{ANNOUNCED_BY, POOL};

    fn service(version: &str, ip: &str) -> (ObjectName, Option<LbService>) {
        let value = json!({"metadata": {"namespace": "x", "name": "a", "resourceVersion": version,
                                        "annotations": {POOL: "p", ANNOUNCED_BY: "n1"}},
            "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local"},
            "status": {"loadBalancer": {"ingress": [{"ip": ip}]}}});
        (("x".into(), "a".into()), LbService::read(&value))
    }

    fn slice(name: &str, endpoints: &Value) -> SliceNodes {
        SliceNodes::read(&json!({"metadata": {"namespace": "x", "name": name,
            "labels": {"kubernetes.io/service-name": "a"}}, "endpoints": endpoints}))
    }

    #[test]
    fn nothing_is_told_before_everything_is_known() {
        let board = Board::default();
        assert_eq!(board.announced_by("n1"), None);
        board.services(&Change::Synced(vec![service("1", "192.0.2.1")]));
        assert_eq!(board.announced_by("n1").unwrap(), BTreeSet::from(["192.0.2.1".parse().unwrap()]));
        assert!(board.announced_by("n2").unwrap().is_empty());
        board.slices(&Change::Synced(vec![]));
        assert!(board.snapshot().is_none());
        board.nodes(&Change::Synced(vec![json!({"metadata": {"name": "n1"}})]));
        assert_eq!(board.snapshot().unwrap().nodes.len(), 1);
    }

    #[test]
    fn what_was_written_here_is_not_undone_by_what_was_before() {
        let board = Board::default();
        board.services(&Change::Synced(vec![service("1", "192.0.2.1")]));
        let (name, written) = service("7", "192.0.2.7");
        board.wrote(&name, written);
        board.services(&Change::Applied(service("5", "192.0.2.5")));
        assert!(board.announced_by("n1").unwrap().contains(&"192.0.2.7".parse().unwrap()));
        board.services(&Change::Applied(service("9", "192.0.2.9")));
        assert!(board.announced_by("n1").unwrap().contains(&"192.0.2.9".parse().unwrap()));
    }

    #[test]
    fn local_nodes_are_those_that_serve() {
        let board = Board::default();
        board.services(&Change::Synced(vec![service("1", "192.0.2.1")]));
        board.nodes(&Change::Synced(vec![]));
        board.slices(&Change::Synced(vec![
            slice("one", &json!([{"nodeName": "n1"}, {"nodeName": "n2", "conditions": {"ready": false}}])),
            slice("two", &json!([{"nodeName": "n3", "conditions": {"ready": false, "serving": true}}])),
        ]));
        let local = || {
            let all = board.snapshot().unwrap().local_nodes;
            all[&("x".to_owned(), "a".to_owned())].iter().cloned().collect::<Vec<_>>()
        };
        assert_eq!(local(), ["n1"]);
        board.slices(&Change::Deleted(slice("one", &json!([]))));
        assert_eq!(local(), ["n3"]);
        board.slices(&Change::Applied(slice("two", &json!([]))));
        assert!(local().is_empty());
    }

    #[test]
    fn nodes_that_cannot_answer() {
        for (node, standing) in [
            (json!({"metadata": {"name": "n"}}), Standing::Ready),
            (
                json!({"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
                Standing::NotReady,
            ),
            (
                json!({"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}),
                Standing::Out,
            ),
            (
                json!({"metadata": {"name": "n",
                    "labels": {"node.kubernetes.io/exclude-from-external-load-balancers": ""}}}),
                Standing::Out,
            ),
        ] {
            assert_eq!(read_node(&node), Some(("n".to_owned(), standing)), "{node}");
        }
    }
}
