//! The one in the cluster that gives addresses: elected, plans, writes, tells.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podway_kube::events::{Severity, Subject};
use podway_kube::objects::{self, Part};
use podway_kube::{Client, Kind};
use podway_link::probe::Verdict;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::board::{Board, Snapshot};
use super::lease::Elector;
use super::plan::{Inputs, Problem, Write, plan};
use super::pool::Pool;
use super::service::LbService;
use crate::attach::lock;
use crate::events::Reporter;
use crate::status::Status;

/// Name of the Lease.
const LEASE: &str = "podway-load-balancer";
/// Between two looks, when nothing changes: nodes fall silent without a word.
const TURN: Duration = Duration::from_secs(1);
/// Changes that come within this time are planned together.
const GATHER: Duration = Duration::from_millis(50);
/// How often the pools are read.
const POOLS: Duration = Duration::from_secs(5);
/// Services that are written before the Lease is looked at again.
const BATCH: usize = 64;

/// How full a pool is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PoolUse {
    /// Name of the pool.
    pub(crate) name: String,
    /// Addresses in use.
    pub(crate) used: usize,
    /// Addresses that it has, of both families.
    pub(crate) size: u128,
}

/// The controller of one agent; it works while it leads.
#[derive(Debug)]
pub(crate) struct Controller {
    client: Client,
    board: Arc<Board>,
    elector: Elector,
    flags: Option<Pool>,
    status: Arc<Status>,
    reporter: Arc<Reporter>,
    pools: Option<Vec<Pool>>,
    pools_read: Option<Instant>,
    bad_pools: BTreeSet<String>,
    told: BTreeSet<(String, &'static str, String)>,
    usage: Arc<Mutex<Vec<PoolUse>>>,
}

impl Controller {
    /// A controller that has not looked yet. `cidrs` is the pool of the command line, `usage` is written while it leads.
    #[must_use]
    pub(crate) fn new(
        client: Client,
        (node, cidrs): (&str, &[IpNet]),
        board: Arc<Board>,
        status: Arc<Status>,
        reporter: Arc<Reporter>,
        usage: Arc<Mutex<Vec<PoolUse>>>,
    ) -> Self {
        Self {
            elector: Elector::new(client.clone(), LEASE, node),
            client,
            board,
            flags: Pool::of_flags(cidrs),
            status,
            reporter,
            pools: None,
            pools_read: None,
            bad_pools: BTreeSet::new(),
            told: BTreeSet::new(),
            usage,
        }
    }

    /// Works until told to stop, then gives the Lease back.
    pub(crate) async fn run(mut self, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                _ = stop.changed() => break,
                () = self.board.changed() => {}
                () = tokio::time::sleep(TURN) => {}
            }
            tokio::time::sleep(GATHER).await;
            self.turn().await;
        }
        self.elector.release().await;
    }

    async fn turn(&mut self) {
        // A cluster without such Services has nobody who leads.
        if !self.board.has_work() {
            self.elector.release().await;
            self.rest();
            return;
        }
        if !self.elector.turn(self.board.node_count()).await {
            self.rest();
            return;
        }
        self.read_pools().await;
        let (Some(pools), Some(snapshot)) = (&self.pools, self.board.snapshot()) else { return };
        let silent = self.silent(&snapshot);
        let alive = |nodes: &BTreeSet<String>| nodes.difference(&silent).cloned().collect::<BTreeSet<_>>();
        let (nodes, keepers) = (alive(&snapshot.nodes), alive(&snapshot.keepers));
        let made = plan(&Inputs {
            services: &snapshot.services,
            pools,
            nodes: &nodes,
            keepers: &keepers,
            local_nodes: &snapshot.local_nodes,
        });
        *lock(&self.usage) = pools
            .iter()
            .map(|p| PoolUse {
                name: p.name.clone(),
                used: made.used.get(&p.name).copied().unwrap_or(0),
                size: p.size(false).saturating_add(p.size(true)),
            })
            .collect();
        self.tell(&made.problems);
        for batch in made.writes.chunks(BATCH) {
            if !self.elector.leads() {
                return;
            }
            for write in batch {
                self.write(write).await;
            }
        }
    }

    /// Another one may lead now and see other things.
    fn rest(&mut self) {
        self.pools = None;
        self.pools_read = None;
        self.told.clear();
        lock(&self.usage).clear();
    }

    async fn read_pools(&mut self) {
        if self.pools_read.is_some_and(|at| at.elapsed() < POOLS) {
            return;
        }
        let found = match objects::list(&self.client, Kind::LOAD_BALANCER_POOL).await {
            Ok(found) => found,
            // The definition is not installed: only the command line has pools.
            Err(error) if error.code() == Some(404) => Vec::new(),
            Err(error) => {
                debug!(%error, "the pools cannot be read; those that are known stay in force");
                return;
            }
        };
        self.pools_read = Some(Instant::now());
        let mut pools: Vec<Pool> = self.flags.clone().into_iter().collect();
        let mut bad = BTreeSet::new();
        for value in &found {
            match Pool::read(value) {
                Ok(pool) => pools.push(pool),
                Err(why) => {
                    if !self.bad_pools.contains(&why) {
                        self.tell_pool(value, &why);
                    }
                    bad.insert(why);
                }
            }
        }
        // A pool that was good and is malformed now takes nobody's address away: what it was stays in force.
        for why in &bad {
            let known = self
                .pools
                .iter()
                .flatten()
                .find(|p| why.starts_with(&format!("LoadBalancerPool {}: ", p.name)));
            pools.extend(known.cloned());
        }
        self.bad_pools = bad;
        pools.sort_by(|a, b| a.name.cmp(&b.name));
        self.pools = Some(pools);
    }

    fn tell_pool(&self, value: &serde_json::Value, why: &str) {
        let text =
            |pointer: &str| value.pointer(pointer).and_then(serde_json::Value::as_str).unwrap_or_default();
        let kind = Kind::LOAD_BALANCER_POOL;
        let subject = Subject {
            api_version: format!("{}/{}", kind.group, kind.version),
            kind: kind.kind.to_owned(),
            namespace: None,
            name: text("/metadata/name").to_owned(),
            uid: text("/metadata/uid").to_owned(),
        };
        self.reporter.about(subject, Severity::Warning, "LoadBalancerPoolInvalid", "", why);
    }

    /// Nodes that do not answer at all; a node without an agent does, and its kernel goes on serving. When nobody
    /// answers, it is this node that is cut off.
    fn silent(&self, snapshot: &Snapshot) -> BTreeSet<String> {
        let silent: BTreeSet<String> = self
            .status
            .snapshot()
            .paths
            .into_values()
            .filter(|p| matches!(p.verdict, Verdict::Unreachable))
            .map(|p| p.node)
            .collect();
        let others = snapshot.all_nodes.saturating_sub(1);
        if others > 1 && silent.len() >= others { BTreeSet::new() } else { silent }
    }

    /// Tells what is wrong once, and again when it was right in between.
    fn tell(&mut self, problems: &[Problem]) {
        let mut now = BTreeSet::new();
        for problem in problems {
            let (namespace, name) = &problem.name;
            let key = (format!("{namespace}/{name}"), problem.reason, problem.message.clone());
            if !self.told.contains(&key) {
                let subject = Subject::namespaced("Service", namespace, name, &problem.uid);
                self.reporter.about(subject, Severity::Warning, problem.reason, "", &problem.message);
            }
            now.insert(key);
        }
        self.told = now;
    }

    async fn write(&self, write: &Write) {
        let (namespace, name) = (write.name.0.as_str(), write.name.1.as_str());
        for (part, patch) in [(Part::Main, &write.object), (Part::Status, &write.status)] {
            let Some(patch) = patch else { continue };
            match objects::merge(&self.client, Kind::SERVICE, (namespace, name), part, patch).await {
                Ok(value) => self.board.wrote(&write.name, LbService::read(&value)),
                Err(error) if error.code() == Some(404) => {
                    debug!(namespace, name, "the Service is gone");
                    return;
                }
                Err(error) => {
                    warn!(namespace, name, %error, "a Service's load balancer address is not written, trying again");
                    return;
                }
            }
        }
        if let Some((reason, message)) = &write.event {
            info!(namespace, name, message, "load balancer address");
            let subject = Subject::namespaced("Service", namespace, name, &write.uid);
            self.reporter.about(subject, Severity::Normal, reason, message, message);
        }
    }
}
