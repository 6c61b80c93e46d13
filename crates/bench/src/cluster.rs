//! A lab that a bench makes and removes: real agents, the real plugin, real pods.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use podway_lab::client::Client;
use podway_lab::down;
use podway_lab::manifest::{Loaded, Object, Origin};
use podway_lab::observe::Observation;
use podway_lab::spec::{Family, LabName, LabSpec, Mode, ServiceMode, UnderlayFamily};
use podway_lab::up::{self, Made, Waited};
use serde_json::{Value, json};

use crate::stop::Stop;

/// Longest wait for agents and pods.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the bench's pods are.
pub const NAMESPACE: &str = "default";

/// A lab that goes with this value.
#[derive(Debug)]
pub struct Cluster {
    /// Its name.
    pub name: LabName,
    /// What was seen when everything was ready.
    pub seen: Observation,
    nodes: Vec<String>,
}

/// The pods of a lab, by name and node.
pub type Pods<'a> = &'a [(&'a str, &'a str)];

impl Cluster {
    /// Makes a lab, with pods on given nodes, and waits until all of it is ready.
    ///
    /// # Errors
    /// When a lab of that name runs already, a part cannot be made, or it is interrupted. Nothing stays then.
    pub fn up(name: &str, nodes: u16, pods: Pods<'_>, stop: &Stop) -> anyhow::Result<Self> {
        let name: LabName = name.parse()?;
        let spec = LabSpec {
            name: name.clone(),
            nodes,
            zones: 1,
            mode: Mode::Vxlan,
            family: Family::Ipv4,
            underlay_family: UnderlayFamily::Ipv4,
            underlay_mtu: 1500,
            pod_mtu: None,
            vxlan_port: 8472,
            vxlan_vni: 1,
            service_mode: ServiceMode::Ebpf,
            masquerade_all: false,
            ipvs_scheduler: None,
            load_balancer_pool: Vec::new(),
        };
        if up::ensure(&spec, |_| {})? == Made::Running {
            bail!("lab {name} runs already; remove it with podway lab down {name}");
        }
        // From here on, whatever happens removes it.
        let nodes = spec.node_plans().into_iter().map(|n| n.name).collect();
        let seen = Observation { nodes: vec![], pods: vec![], unsettled: vec![], malformed: vec![] };
        let mut cluster = Self { name, seen, nodes };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the runtime")?;
        cluster.seen = runtime.block_on(async {
            tokio::select! {
                seen = fill(&spec, pods) => seen,
                () = stop.requested() => { stop.check()?; bail!("interrupted") }
            }
        })?;
        Ok(cluster)
    }

    /// Gives a node another prefix for its pods: those of a lab have 254 addresses, and a freed one rests for a while
    /// before it is used again.
    ///
    /// # Errors
    /// When the lab's API server refuses.
    pub fn widen(&self, node: &str, prefix: &str) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the runtime")?;
        let patch = json!({ "spec": { "podCIDR": prefix, "podCIDRs": [prefix] } });
        runtime.block_on(async {
            Client::of_lab(&self.name)?.merge(&format!("/api/v1/nodes/{node}"), &patch).await
        })?;
        Ok(())
    }

    /// Directories of the agents' pinned maps and links.
    #[must_use]
    pub fn pin_dirs(&self) -> Vec<PathBuf> {
        self.nodes.iter().map(|node| self.name.pin_dir().join(node)).collect()
    }

    /// The socket of a node's agent.
    #[must_use]
    pub fn agent_socket(&self, node: &str) -> PathBuf {
        self.name.agents_dir().join(node).join("agent.sock")
    }

    /// Removes the lab.
    ///
    /// # Errors
    /// With what is still there.
    pub fn down(self) -> anyhow::Result<()> {
        let removal = down::down(&self.name)?;
        if !removal.left.is_empty() {
            bail!("lab {} left things that cannot be removed:\n{}", self.name, removal.left.join("\n"));
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // After `down` there is nothing left to do; after an error the first error is the one to tell, and
        // `podway lab list` shows what stayed.
        let _ = down::down(&self.name);
    }
}

async fn fill(spec: &LabSpec, pods: Pods<'_>) -> anyhow::Result<Observation> {
    let mut client = Client::of_lab(&spec.name)?;
    if let Some(late) = up::wait_nodes(&mut client, spec).await?.first() {
        bail!("{} does not become ready: {}", late.name, late.message);
    }
    let objects =
        pods.iter().map(|(name, node)| Object { value: pod(name, node), origin: origin() }).collect();
    let applied = up::fill(&mut client, &Loaded { objects, ..Loaded::default() }).await?;
    if let Some(problem) = applied.problems.first() {
        bail!("the bench's pods: {problem}");
    }
    match up::wait(&mut client, spec, PATIENCE, |_| {}).await? {
        Waited::Settled(seen) => Ok(seen),
        Waited::Stuck(seen) | Waited::TimedOut(seen) => {
            let why: Vec<String> = seen.pods.iter().map(|p| format!("{}: {}", p.name, p.reason)).collect();
            bail!("the bench's pods do not become ready: {}", why.join("; "))
        }
    }
}

fn origin() -> Origin {
    Origin { file: Path::new("podway bench").to_owned(), document: 1 }
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": NAMESPACE },
        "spec": { "nodeName": node, "containers": [{ "name": "bench", "image": "bench" }] },
    })
}
