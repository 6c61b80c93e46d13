//! Nodes that come, go, and lose power while the lab runs, as their Node objects say: a new one is wired and gets an
//! agent, a deleted one is drained and taken down, and an annotation switches one off and on.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use podway_apiserver::{
    ApiError, DeleteOptions, GroupResource, ResourceKey, Store, WatchEvent, WatchOptions, get_str,
};
use podway_link::Netns;
use podway_workloads::EventType;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::agents;
use crate::cgroup::Cgroup;
use crate::nodes::{NETNS_ANNOTATION, POWER_ANNOTATION};
use crate::runner::{NodeContext, NodeTable, Power};
use crate::spec::LabSpec;
use crate::state::write_file;
use crate::{events, faults, topology};

/// How long pods of a node that is removed may take to end by themselves.
const DRAIN: Duration = Duration::from_secs(60);
/// How long killed processes may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at what has to go.
const LOOK: Duration = Duration::from_millis(50);
/// Between two looks at what delays packets.
const LINKS_LOOK: Duration = Duration::from_secs(1);
/// Who the events are from.
const COMPONENT: &str = "podway-lab";

/// What it takes to run nodes.
pub(super) struct Nodes {
    pub(super) spec: LabSpec,
    pub(super) store: Arc<Store>,
    pub(super) cgroup: Cgroup,
    pub(super) table: Arc<NodeTable>,
    /// How agents reach the API server.
    pub(super) kubeconfig: String,
}

impl Nodes {
    /// Prepares a node that is wired: its place for processes, its files.
    pub(super) fn prepare(&self, plan: crate::spec::NodePlan) -> anyhow::Result<Arc<NodeContext>> {
        let node = NodeContext::new(&self.spec.name, plan, &self.cgroup);
        for part in ["agent", "cni", "exec"] {
            node.cgroup.child(part).create()?;
        }
        write_file(&self.spec.name.node_dir(&node.plan.name).join("kubeconfig"), self.kubeconfig.as_bytes())?;
        Ok(Arc::new(node))
    }

    /// Follows the Node objects for as long as the lab runs. `agents` are those that run already, by node.
    pub(super) async fn keep(self: Arc<Self>, mut agents: Vec<(String, JoinHandle<()>)>) {
        loop {
            if let Err(error) = self.watch(&mut agents).await {
                tracing::warn!(%error, "watch of nodes starts again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Starts again what delays packets between nodes, whenever it has ended.
    pub(super) async fn keep_links(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LINKS_LOOK).await;
            let lab = self.spec.name.clone();
            let looked = tokio::task::spawn_blocking(move || faults::mend(&lab));
            match looked.await.unwrap_or_else(|e| Err(e.into())) {
                Ok(false) => {}
                Ok(true) => tracing::warn!("a process that delays packets had ended; it is started again"),
                Err(error) => tracing::error!(error = format!("{error:#}"), "links with a delay"),
            }
        }
    }

    /// Starts the agent of a node.
    pub(super) fn start_agent(&self, node: &Arc<NodeContext>) -> (String, JoinHandle<()>) {
        let work = agents::keep(self.spec.clone(), node.clone(), self.store.clone());
        (node.plan.name.clone(), tokio::spawn(work))
    }

    async fn watch(&self, agents: &mut Vec<(String, JoinHandle<()>)>) -> Result<(), ApiError> {
        let mut watcher = self.store.watch(
            &GroupResource::new("", "nodes"),
            None,
            WatchOptions { send_initial_events: true, ..WatchOptions::default() },
        )?;
        while let Some(events) = watcher.next().await {
            for event in events? {
                match event {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        let name = get_str(&object, &["metadata", "name"]);
                        match self.table.node(name) {
                            Some(node) => self.power(&node, &object).await,
                            None => agents.extend(self.bring_in(&object).await),
                        }
                    }
                    WatchEvent::Deleted(object) => {
                        let name = get_str(&object, &["metadata", "name"]);
                        if let Some(node) = self.table.node(name) {
                            let (own, rest) =
                                std::mem::take(agents).into_iter().partition(|(n, _)| n == name);
                            *agents = rest;
                            self.retire(&node, own).await;
                        }
                    }
                    WatchEvent::Bookmark { .. } => {}
                }
            }
        }
        Ok(())
    }

    /// Wires a node that somebody has asked for. A Node object that is none of the lab's own stays an object.
    async fn bring_in(&self, object: &Value) -> Option<(String, JoinHandle<()>)> {
        let name = get_str(object, &["metadata", "name"]);
        let plan = self.spec.plan_of(name)?;
        if object["metadata"]["annotations"][NETNS_ANNOTATION] != self.spec.name.node_netns(name) {
            return None;
        }
        let (spec, wire) = (self.spec.clone(), plan.clone());
        let made = tokio::task::spawn_blocking(move || topology::add_node(&spec, &wire)).await;
        let made = made.unwrap_or_else(|e| Err(e.into())).and_then(|()| self.prepare(plan));
        match made {
            Ok(node) => {
                let agent = self.start_agent(&node);
                self.table.insert(node);
                Some(agent)
            }
            Err(error) => {
                let message = format!("the node cannot be made: {error:#}");
                tracing::error!(node = name, message);
                events::record(&self.store, object, COMPONENT, EventType::Warning, "NodeNotMade", message);
                None
            }
        }
    }

    async fn power(&self, node: &Arc<NodeContext>, object: &Value) {
        let off = object["metadata"]["annotations"][POWER_ANNOTATION] == "off";
        let wanted = if off { Power::Off } else { Power::On };
        if node.power() == wanted {
            return;
        }
        let wire = |up: bool| {
            let (lab, name) = (self.spec.name.clone(), node.plan.name.clone());
            tokio::task::spawn_blocking(move || topology::set_port(&lab, &name, up))
        };
        let done = if off {
            // First the switch, so that nobody starts again what is killed now.
            node.switch(Power::Off);
            let wired = wire(false).await;
            let killed = self.kill(node).await;
            wired.unwrap_or_else(|e| Err(e.into())).and(killed.map(drop).map_err(Into::into))
        } else {
            let wired = wire(true).await.unwrap_or_else(|e| Err(e.into()));
            node.switch(Power::On);
            wired
        };
        let (reason, message) =
            if off { ("NodeStopped", "the node is stopped") } else { ("NodeStarted", "the node is started") };
        events::record(&self.store, object, COMPONENT, EventType::Normal, reason, message);
        if let Err(error) = done {
            tracing::warn!(node = node.plan.name, error = format!("{error:#}"), "power");
        }
    }

    async fn kill(&self, node: &NodeContext) -> io::Result<bool> {
        let cgroup = node.cgroup.clone();
        tokio::task::spawn_blocking(move || cgroup.kill_and_wait(KILL_PATIENCE))
            .await
            .unwrap_or_else(|e| Err(io::Error::other(e)))
    }

    /// Takes a node down: its pods, then its agent, then everything of it.
    async fn retire(&self, node: &Arc<NodeContext>, agents: Vec<(String, JoinHandle<()>)>) {
        let name = &node.plan.name;
        let end = Instant::now() + DRAIN;
        loop {
            let mine = self.pods_of(name);
            if mine.is_empty() {
                break;
            }
            // A node without power ends nothing in an orderly way.
            let force = node.power() != Power::On || Instant::now() >= end;
            for (key, deleting) in mine {
                if force {
                    node.switch(Power::Gone);
                }
                if force || !deleting {
                    let options = if force { DeleteOptions::now() } else { DeleteOptions::default() };
                    let _ = self.store.delete(&key, &options);
                }
            }
            tokio::time::sleep(LOOK).await;
        }
        node.switch(Power::Gone);
        for (_, agent) in agents {
            agent.abort();
        }
        let killed = self.kill(node).await;
        self.table.remove(name);
        let (lab, cgroup, node) = (self.spec.name.clone(), node.cgroup.clone(), name.clone());
        let removed = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
            for dir in [lab.pin_dir().join(&node), lab.agents_dir().join(&node), lab.node_dir(&node)] {
                remove_dir(&dir)?;
            }
            cgroup.remove()?;
            faults::forget(&lab, &node)?;
            topology::forget_node(&lab, &node)?;
            // Last, because those who wait for the removal look for it.
            Ok(Netns::delete_named(&lab.node_netns(&node))?)
        })
        .await;
        let removed = removed.unwrap_or_else(|e| Err(e.into()));
        if let Err(error) = killed.map_err(Into::into).and(removed) {
            tracing::error!(node = name, error = format!("{error:#}"), "node not removed");
        }
    }

    /// Pods that are bound to a node and have not ended, with whether they are being deleted.
    fn pods_of(&self, node: &str) -> Vec<(ResourceKey, bool)> {
        let snapshot = self.store.snapshot(&[GroupResource::new("", "pods")]);
        let own = snapshot.objects.iter().filter(|p| get_str(p, &["spec", "nodeName"]) == node);
        own.map(|pod| {
            let (namespace, name) =
                (get_str(pod, &["metadata", "namespace"]), get_str(pod, &["metadata", "name"]));
            let key = ResourceKey::new("", "pods", namespace, name);
            (key, !pod["metadata"]["deletionTimestamp"].is_null())
        })
        .collect()
    }
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
