//! A node as the runner and the supervisor see it, and the table of all of them. Nodes come, go, and lose power.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use podway_link::NETNS_DIR;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::spec::{LabName, NodePlan};

/// Whether a node runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Power {
    On,
    /// Nothing runs on it, and its link is down.
    Off,
    /// It is being removed, and nobody will answer for it again.
    Gone,
}

/// A node.
#[derive(Debug)]
pub(crate) struct NodeContext {
    pub(crate) plan: NodePlan,
    pub(crate) cgroup: Cgroup,
    pub(crate) netns: PathBuf,
    pub(crate) agent_socket: PathBuf,
    power: watch::Sender<Power>,
}

impl NodeContext {
    pub(crate) fn new(lab: &LabName, plan: NodePlan, lab_cgroup: &Cgroup) -> Self {
        Self {
            netns: Path::new(NETNS_DIR).join(lab.node_netns(&plan.name)),
            agent_socket: lab.agents_dir().join(&plan.name).join("agent.sock"),
            cgroup: lab_cgroup.child(&plan.name),
            plan,
            power: watch::Sender::new(Power::On),
        }
    }

    pub(crate) fn switch(&self, power: Power) {
        self.power.send_replace(power);
    }

    pub(crate) fn power(&self) -> Power {
        *self.power.borrow()
    }

    /// Returns when the node has no power, at once when it has none now.
    pub(crate) async fn off(&self) {
        // The sender lives as long as the node.
        let _ = self.power.subscribe().wait_for(|p| *p != Power::On).await;
    }

    /// Returns when the node is being removed.
    pub(crate) async fn gone(&self) {
        let _ = self.power.subscribe().wait_for(|p| *p == Power::Gone).await;
    }

    /// Returns when the node has power or never will again.
    pub(crate) async fn on(&self) {
        let _ = self.power.subscribe().wait_for(|p| *p != Power::Off).await;
    }
}

/// All nodes by name.
#[derive(Debug)]
pub(crate) struct NodeTable {
    nodes: RwLock<HashMap<String, Arc<NodeContext>>>,
    added: watch::Sender<()>,
}

impl NodeTable {
    pub(crate) fn new() -> Self {
        Self { nodes: RwLock::default(), added: watch::Sender::new(()) }
    }

    pub(crate) fn insert(&self, node: Arc<NodeContext>) {
        let name = node.plan.name.clone();
        self.nodes.write().unwrap_or_else(PoisonError::into_inner).insert(name, node);
        self.added.send_replace(());
    }

    pub(crate) fn remove(&self, name: &str) {
        self.nodes.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    pub(crate) fn node(&self, name: &str) -> Option<Arc<NodeContext>> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Tells when a node has come.
    pub(crate) fn arrivals(&self) -> watch::Receiver<()> {
        self.added.subscribe()
    }
}
