//! The reachability matrix: every pod and node to every other, by ICMP echo and by TCP, and whether the target
//! sees the sender's own address.
//!
//! Nothing is started inside the pods. A socket belongs to the namespace that it was made in, so this process
//! makes its sockets in the pods' namespaces and uses them from here. Pods that have no stand-in to ask get a
//! listener of this kind for the time of the check.

mod asking;
mod echo;
mod render;
mod services;
mod tcp;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use podway_link::Netns;
use serde::Serialize;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::client::Client;
use crate::observe::{NodeStatus, Observation, PodStatus};
use crate::spec::{LabName, ServiceMode};
use crate::standin::{self, Identity, Phase, Protocol, Shared};
use crate::state::StateDir;

pub use asking::{Heard, Question, Way, ask};
pub use render::render;
pub use services::ServicePath;

/// Sockets that are open for sources at the same time; pods' listeners come on top.
const SOCKETS: usize = 1600;
/// Most sources at a time: more would make the answers late for reasons of this machine only.
const SOURCES: usize = 16;
/// Connections that one listener of the check serves at a time.
const CONNECTIONS: usize = 64;
/// File descriptors that the check asks the kernel for.
const DESCRIPTORS: u64 = 8192;

/// A pod or a node in the matrix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// `namespace/pod`, or the node's name.
    pub name: String,
    /// Whether it is a node.
    pub is_node: bool,
    /// Where it is.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// TCP port that answers: the stand-in's, or the check's own.
    pub port: u16,
    /// Who has to answer on that port.
    #[serde(skip)]
    answers_as: (String, String),
    #[serde(skip)]
    netns: String,
}

/// One try.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "result")]
pub enum Outcome {
    /// Answered.
    Ok {
        /// Round trip (ICMP), or connection and answer (TCP), in microseconds.
        micros: u64,
    },
    /// Answered, but the target saw another sender.
    WrongSource {
        /// What it saw.
        seen: IpAddr,
    },
    /// Not answered, or by somebody else.
    Failed {
        /// Why.
        cause: String,
    },
}

impl Outcome {
    /// Whether all was as it should be.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        matches!(self, Self::Ok { .. })
    }
}

/// One cell of the matrix, for one address of the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cell {
    /// Index of the source.
    pub from: usize,
    /// Index of the target.
    pub to: usize,
    /// The target's address.
    pub address: IpAddr,
    /// ICMP echo.
    pub icmp: Outcome,
    /// TCP.
    pub tcp: Outcome,
}

impl Cell {
    /// Whether both tries were as they should be.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.icmp.is_ok() && self.tcp.is_ok()
    }
}

/// The whole matrix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Rows and columns.
    pub endpoints: Vec<Endpoint>,
    /// Cells by source, then target.
    pub cells: Vec<Cell>,
    /// Services: from every pod to their cluster IPs, from outside to their node ports and load balancers.
    pub services: Vec<ServicePath>,
    /// Pods and nodes that should be in the matrix but are not, with the reason.
    pub left_out: Vec<String>,
    /// Pods that are being deleted: nobody expects them to answer.
    pub ending: Vec<String>,
    /// How long it took, in milliseconds.
    pub millis: u64,
}

impl Report {
    /// Whether every pod was there, and every cell and every way to a Service was as it should be.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.left_out.is_empty()
            && self.cells.iter().all(Cell::is_ok)
            && self.services.iter().all(|s| s.outcome.is_ok())
    }
}

/// Runs the check on the lab as observed.
///
/// # Errors
/// When a namespace cannot be entered or a socket cannot be made, which says nothing about the network.
pub async fn check(lab: &LabName, client: &mut Client, observation: &Observation) -> anyhow::Result<Report> {
    let begun = Instant::now();
    raise_descriptor_limit();
    let (ending, pods): (Vec<_>, Vec<_>) = observation.pods.iter().partition(|p| p.ending);
    let ending = ending.iter().map(|p| format!("{}/{}", p.namespace, p.name)).collect();
    let (all, mut left_out) = endpoints(lab, &pods, &observation.nodes);
    let (mut endpoints, closed) = enterable(all);
    left_out.extend(closed);
    // Ends the listeners when it goes out of scope.
    let (_open, phase) = watch::channel(Phase::Open);
    listen(&mut endpoints, &phase)?;
    let endpoints = Arc::new(endpoints);
    let at_once = (SOCKETS / endpoints.len().max(1)).clamp(1, SOURCES);
    let turns = Arc::new(Semaphore::new(at_once));
    let mut sources = JoinSet::new();
    for from in 0..endpoints.len() {
        let (endpoints, turns) = (endpoints.clone(), turns.clone());
        sources.spawn(async move {
            let _turn = turns.acquire_owned().await.context("the check ends")?;
            row(from, &endpoints).await
        });
    }
    let mut cells = Vec::new();
    while let Some(done) = sources.join_next().await {
        cells.extend(done.context("a source of the check failed")??);
    }
    cells.sort_by_key(|c| (c.from, c.to, c.address));
    let services = services_part(lab, client, observation, &endpoints, &turns).await?;
    let endpoints = Arc::unwrap_or_clone(endpoints);
    let millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(Report { endpoints, cells, services, left_out, ending, millis })
}

/// Nothing in a lab whose agents do not serve Services.
async fn services_part(
    lab: &LabName,
    client: &mut Client,
    observation: &Observation,
    endpoints: &[Endpoint],
    turns: &Arc<Semaphore>,
) -> anyhow::Result<Vec<ServicePath>> {
    let Some(file) = StateDir::of(lab).lab()? else { return Ok(Vec::new()) };
    if file.spec.service_mode == ServiceMode::None {
        return Ok(Vec::new());
    }
    let targets = Arc::new(services::targets(client, &observation.nodes).await?);
    let outside = file.spec.outside_addresses().into_iter().map(|(client, _)| client).collect();
    // Sockets of this process belong to no node's processes, whose own are translated before there is a packet: what a
    // node reaches cannot be told from here.
    let pods = endpoints.iter().filter(|e| !e.is_node && e.netns != lab.node_netns(&e.node));
    let mut sources: Vec<services::Source> = pods.map(services::Source::of).collect();
    sources.push(services::Source::outside(lab, outside));
    let mut asking = JoinSet::new();
    for (index, source) in sources.into_iter().enumerate() {
        let (targets, turns) = (targets.clone(), turns.clone());
        asking.spawn(async move {
            let _turn = turns.acquire_owned().await.context("the check ends")?;
            anyhow::Ok((index, services::ask(&source, &targets).await?))
        });
    }
    let mut by_source = BTreeMap::new();
    while let Some(done) = asking.join_next().await {
        let (index, paths) = done.context("a source of the check failed")??;
        by_source.insert(index, paths);
    }
    Ok(by_source.into_values().flatten().collect())
}

fn endpoints(lab: &LabName, pods: &[&PodStatus], nodes: &[NodeStatus]) -> (Vec<Endpoint>, Vec<String>) {
    let mut out = Vec::new();
    let mut left_out = Vec::new();
    for pod in pods {
        let name = format!("{}/{}", pod.namespace, pod.name);
        // What has ended has no address any more.
        if matches!(&*pod.phase, "Succeeded" | "Failed") {
            continue;
        }
        if !pod.ready || pod.addresses.is_empty() {
            left_out.push(format!("{name}: not ready: {}", pod.reason));
            continue;
        }
        out.push(Endpoint {
            name,
            is_node: false,
            node: pod.node.clone(),
            addresses: pod.addresses.clone(),
            port: pod.tcp_ports.first().copied().unwrap_or(0),
            answers_as: (pod.namespace.clone(), pod.name.clone()),
            netns: if pod.host_network {
                lab.node_netns(&pod.node)
            } else {
                lab.pod_netns(&pod.namespace, &pod.name)
            },
        });
    }
    for node in nodes {
        if node.stopped {
            left_out.push(format!("{}: stopped", node.name));
            continue;
        }
        out.push(Endpoint {
            name: node.name.clone(),
            is_node: true,
            node: node.name.clone(),
            addresses: node.addresses.clone(),
            port: 0,
            answers_as: (String::new(), node.name.clone()),
            netns: lab.node_netns(&node.name),
        });
    }
    (out, left_out)
}

/// Sorts out those whose namespace cannot be entered: a Node that somebody has written but nobody has made, a pod that
/// has just gone.
fn enterable(endpoints: Vec<Endpoint>) -> (Vec<Endpoint>, Vec<String>) {
    let mut left_out = Vec::new();
    let mut open = Vec::new();
    for endpoint in endpoints {
        match Netns::open_named(&endpoint.netns) {
            Ok(_) => open.push(endpoint),
            Err(error) => left_out.push(format!("{}: cannot be entered: {error}", endpoint.name)),
        }
    }
    (open, left_out)
}

/// Opens a listener for every endpoint that has no port of its own.
fn listen(endpoints: &mut [Endpoint], phase: &watch::Receiver<Phase>) -> anyhow::Result<()> {
    for endpoint in endpoints.iter_mut().filter(|e| e.port == 0) {
        let namespace = Netns::open_named(&endpoint.netns)?;
        let listener = namespace
            .run(|| {
                TcpListener::bind(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0))
                    .or_else(|_| TcpListener::bind("0.0.0.0:0"))
            })?
            .with_context(|| format!("listen in {}", endpoint.name))?;
        listener.set_nonblocking(true)?;
        endpoint.port = listener.local_addr()?.port();
        let shared = Shared {
            identity: Identity {
                namespace: endpoint.answers_as.0.clone(),
                pod: endpoint.answers_as.1.clone(),
                node: endpoint.node.clone(),
                container: String::new(),
                addresses: endpoint.addresses.clone(),
            },
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            phase: phase.clone(),
        };
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tokio::spawn(standin::serve_tcp(listener, Protocol::Tcp, Arc::new(shared)));
    }
    Ok(())
}

async fn row(from: usize, endpoints: &[Endpoint]) -> anyhow::Result<Vec<Cell>> {
    let source = &endpoints[from];
    let has = |v4: bool| source.addresses.iter().any(|a| a.is_ipv4() == v4);
    let targets: Vec<(usize, IpAddr)> = endpoints
        .iter()
        .enumerate()
        .filter(|(to, _)| *to != from)
        .flat_map(|(to, e)| e.addresses.iter().map(move |a| (to, *a)))
        .filter(|(_, address)| has(address.is_ipv4()))
        .collect();
    let addresses: Vec<IpAddr> = targets.iter().map(|(_, a)| *a).collect();
    let in_namespace = {
        let (netns, addresses) = (source.netns.clone(), addresses.clone());
        tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            let namespace = Netns::open_named(&netns)?;
            namespace
                .run(|| -> std::io::Result<_> {
                    Ok((echo::Pinger::open(&addresses)?, tcp::sockets(&addresses)?))
                })?
                .context("make sockets")
        })
        .await?
        .with_context(|| format!("sockets in {}", source.name))?
    };
    let (pinger, sockets) = in_namespace;
    let mut connections = JoinSet::new();
    for (index, ((to, address), socket)) in targets.iter().copied().zip(sockets).enumerate() {
        let target = &endpoints[to];
        let call = tcp::Call {
            socket,
            target: SocketAddr::new(address, target.port),
            answers_as: target.answers_as.clone(),
            sources: source.addresses.clone(),
        };
        connections.spawn(async move { (index, call.run().await) });
    }
    let echoes = pinger.run().await?;
    let mut answers = BTreeMap::new();
    while let Some(done) = connections.join_next().await {
        let (index, outcome) = done.context("a connection of the check failed")?;
        answers.insert(index, outcome);
    }
    let cells = targets.into_iter().zip(echoes).enumerate().filter_map(|(index, ((to, address), icmp))| {
        Some(Cell { from, to, address, icmp, tcp: answers.remove(&index)? })
    });
    Ok(cells.collect())
}

/// A large lab needs more descriptors than shells hand down. Without them the check fails and says so.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < DESCRIPTORS
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS.min(hard), hard);
    }
}

pub(crate) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// How long a target may take, retries included.
pub(crate) const PATIENCE: Duration = Duration::from_millis(2500);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_entered_is_named() {
        let endpoint = Endpoint {
            name: "strange".into(),
            is_node: true,
            node: "strange".into(),
            addresses: Vec::new(),
            port: 0,
            answers_as: (String::new(), "strange".into()),
            netns: "pwt-no-such-namespace".into(),
        };
        let (open, left_out) = enterable(vec![endpoint]);
        assert!(open.is_empty());
        assert!(left_out[0].starts_with("strange: cannot be entered: "), "{left_out:?}");
        let report = Report {
            endpoints: open,
            cells: Vec::new(),
            services: Vec::new(),
            left_out,
            ending: Vec::new(),
            millis: 0,
        };
        assert!(!report.is_ok());
    }
}
