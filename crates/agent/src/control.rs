//! The control loop: Nodes and kernel changes in, tables, routes, MTU and rules out.
//!
//! One plain thread, level-triggered: whatever woke it, it brings everything to what should be there. Start order
//! is its most important property:
//! 1. What an earlier agent put into the kernel stays, and goes on working.
//! 2. With a remembered Node, everything that concerns this node alone is put in order, and pods can be
//!    attached; the API server may be away.
//! 3. Peers, routes and masquerading are touched only when all Nodes are known, in one step each that writes
//!    the difference. A list that comes again replaces the set without anything disappearing in between.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use podway_bpf_host::{Datapath, Mode, NodeConfig};
use podway_kube::watch::Change;
use podway_link::snmp;
use podway_model::{Node, NodeChange, Nodes, Rejection};
use serde_json::Value;
use tracing::{debug, error, info, warn};

use crate::attach::{Attacher, Readiness, lock};
use crate::config::{AgentConfig, NetworkMode};
use crate::events::Reporter;
use crate::masquerade::{Masquerade, Rules};
use crate::metrics::Metrics;
use crate::monitor::Interest;
use crate::mtu_proof::{MtuProof, Wanted};
use crate::network::{Local, Network};
use crate::nft::NftError;
use crate::nodes::{self, OwnNode, View};
use crate::remembered;
use crate::repair::Repair;
use crate::status::Status;

/// Messages that may wait for the loop.
pub const QUEUE: usize = 256;
/// Everything is looked at again at least this often.
const TURN: Duration = Duration::from_secs(10);
/// Changes that come within this time are taken together.
const GATHER: Duration = Duration::from_millis(50);
/// How often the node's side of the pods and the pins are looked at, when nothing happens.
const WATCH: Duration = Duration::from_secs(3);
/// And how often at most: attaching and detaching pods changes links and routes all the time.
const WATCH_BUSY: Duration = Duration::from_secs(1);
/// How often the more costly half of it is looked at.
const WATCH_THOROUGH: Duration = Duration::from_secs(10);
/// Repairs of one look that are told one by one.
const TOLD_REPAIRS: usize = 8;
/// How often attachments are compared with the kernel.
const AUDIT_PODS: Duration = Duration::from_secs(30);
/// How often masquerade rules and host ports are compared with the kernel. With the time until somebody looks at
/// the clock, they are right again within 10 s.
const AUDIT_RULES: Duration = Duration::from_secs(6);
/// How often an MTU that hurts is reported anew.
const REPEAT_WARNING: Duration = Duration::from_secs(60);

/// What wakes the loop.
#[derive(Debug)]
pub enum Message {
    /// Nodes, or the way to them, changed.
    Nodes(Change),
    /// Links, addresses or routes that matter changed.
    Kernel,
    /// The link of a pod went away.
    PodLinkGone,
    /// The node's side of a pod changed: by ourselves as a rule.
    PodNetwork,
    /// Where the API server is.
    ApiServer(Vec<IpAddr>),
    /// The agent ends.
    Stop,
}

/// What the loop works on.
pub struct Parts {
    /// The kernel's tables and programs.
    pub datapath: Arc<Datapath>,
    /// Pods.
    pub attacher: Arc<Attacher>,
    /// What is shown.
    pub status: Arc<Status>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Events.
    pub reporter: Arc<Reporter>,
    /// Paths.
    pub proof: MtuProof,
    /// Links whose changes matter.
    pub interest: Arc<Mutex<Interest>>,
    /// Ends the agent, with the reason: for damage that only a new start puts right.
    pub end: tokio::sync::mpsc::Sender<String>,
}

/// The loop's state.
pub struct Control {
    config: AgentConfig,
    run_dir: PathBuf,
    parts: Parts,
    nodes: Nodes,
    /// Node objects that could not be read, by name.
    malformed: BTreeMap<String, Rejection>,
    /// Addresses of the API server, which no podCIDR may hold.
    api_addresses: Vec<IpAddr>,
    /// When the ranges that no podCIDR may overlap were worked out, and for which addresses of this node.
    reserved: Option<(Instant, Vec<IpAddr>)>,
    synced: bool,
    api_problem: Option<String>,
    own: Option<OwnNode>,
    remembered: Option<OwnNode>,
    network: Network,
    masquerade: Masquerade,
    masquerade_removed: bool,
    local: Option<Local>,
    programmed: Option<NodeConfig>,
    mtu_warning: Option<MtuWarning>,
    unreachable: BTreeMap<String, String>,
    failed_routes: BTreeMap<ipnet::IpNet, String>,
    audited_pods: Instant,
    audited_rules: Instant,
    turned: Instant,
    watched: Option<Instant>,
    watched_thoroughly: Option<Instant>,
    ending: bool,
}

struct MtuWarning {
    reason: &'static str,
    reported: Instant,
    /// Fragments made before the warning.
    fragments: u64,
    /// More have been made, and that was reported.
    harm: bool,
}

impl Control {
    /// A loop that has not turned yet. Belongs into the node's network namespace.
    ///
    /// # Errors
    /// The kernel gives no netlink socket.
    pub fn new(config: AgentConfig, parts: Parts) -> Result<Self, crate::network::NetworkError> {
        let run_dir = config.instance.run_dir();
        let remembered = remembered::load(&run_dir, &config.node_name);
        let network = Network::open(config.mode, config.pod_mtu)?;
        Ok(Self {
            run_dir,
            parts,
            nodes: Nodes::new(),
            malformed: BTreeMap::new(),
            api_addresses: Vec::new(),
            reserved: None,
            synced: false,
            api_problem: None,
            own: remembered.clone(),
            remembered,
            network,
            masquerade: Masquerade::default(),
            masquerade_removed: false,
            local: None,
            programmed: None,
            mtu_warning: None,
            unreachable: BTreeMap::new(),
            failed_routes: BTreeMap::new(),
            audited_pods: Instant::now(),
            audited_rules: Instant::now(),
            turned: Instant::now(),
            watched: None,
            watched_thoroughly: None,
            ending: false,
            config,
        })
    }

    /// Turns until it is told to stop, or nobody can tell it anything any more.
    pub fn run(mut self, messages: &Receiver<Message>) {
        self.turn();
        self.watch_over(WATCH_BUSY);
        // What happened since the last look at the node's side of the pods.
        let mut pods_changed = false;
        loop {
            let pause = if pods_changed { WATCH_BUSY } else { WATCH };
            let mut next = messages.recv_timeout(pause.min(TURN.saturating_sub(self.turned.elapsed())));
            let gathered = Instant::now() + GATHER;
            let mut changed = false;
            loop {
                match next {
                    Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => {
                        self.parts.proof.stop();
                        return;
                    }
                    Ok(Message::PodNetwork) => pods_changed = true,
                    Ok(Message::PodLinkGone) => self.audit_pods(),
                    Ok(Message::Nodes(change)) => {
                        self.take(change);
                        changed = true;
                    }
                    Ok(Message::Kernel) => {
                        self.reserved = None;
                        changed = true;
                    }
                    Ok(Message::ApiServer(addresses)) => {
                        self.api_addresses = addresses;
                        self.reserved = None;
                        changed = true;
                    }
                    Err(RecvTimeoutError::Timeout) => break,
                }
                next = messages.recv_timeout(gathered.saturating_duration_since(Instant::now()));
            }
            if changed || self.turned.elapsed() >= TURN {
                self.turn();
            }
            if self.watch_over(if pods_changed { WATCH_BUSY } else { WATCH }) {
                pods_changed = false;
            }
        }
    }

    /// Looks whether somebody else changed what is Podway's on this node, and puts it right, unless that was
    /// done less than `pause` ago.
    fn watch_over(&mut self, pause: Duration) -> bool {
        if self.watched.is_some_and(|at| at.elapsed() < pause) {
            return false;
        }
        self.watched = Some(Instant::now());
        self.watch_pins();
        if self.audited_rules.elapsed() >= AUDIT_RULES {
            self.audit_rules();
        }
        // Without knowing the node's own addresses, the routes to its pods are not known either.
        if self.local.is_none() {
            return true;
        }
        let thorough = self.watched_thoroughly.is_none_or(|at| at.elapsed() >= WATCH_THOROUGH);
        if thorough {
            self.watched_thoroughly = Some(Instant::now());
        }
        let begun = Instant::now();
        match self.parts.attacher.repair(thorough) {
            Ok(repairs) => {
                debug!(thorough, took = ?begun.elapsed(), pods = self.parts.attacher.len(), "looked at the pods' links");
                self.repaired(&repairs);
            }
            Err(error) => warn!(%error, "cannot compare the pods' links and routes with what they should be"),
        }
        true
    }

    /// Programs and maps whose pins are gone cannot be had back: what this process writes reaches no program. A
    /// new start makes everything anew.
    fn watch_pins(&mut self) {
        let Some(programmed) = self.programmed.as_ref().filter(|_| !self.ending) else { return };
        let tunnel = match programmed.mode {
            Mode::Overlay { tunnel_ifindex, .. } => Some(tunnel_ifindex),
            Mode::Direct => None,
        };
        match self.parts.datapath.intact(programmed.uplink_ifindex, tunnel) {
            Ok(true) => {}
            Ok(false) => {
                let pins = self.config.instance.pin_dir();
                let why = format!(
                    "somebody removed pinned programs or maps from {}: the programs in force are not the ones that \
                     this agent writes for",
                    pins.display()
                );
                error!(pins = %pins.display(), "{why}; the agent ends, a new start makes everything anew");
                self.parts.status.set("datapath", false, why.clone());
                self.parts.metrics.repaired("pins");
                // Taken at the latest when the agent ends for another reason.
                self.ending = self.parts.end.try_send(why).is_ok();
            }
            Err(error) => warn!(%error, "cannot look at the pinned programs and maps"),
        }
    }

    fn repaired(&self, repairs: &[Repair]) {
        for repair in repairs {
            self.parts.metrics.repaired(repair.what);
        }
        for repair in repairs.iter().take(TOLD_REPAIRS) {
            warn!(what = repair.what, "put right what somebody else changed: {}", repair.detail);
        }
        if let Some(more) = repairs.len().checked_sub(TOLD_REPAIRS).filter(|more| *more > 0) {
            warn!(more, "put right what somebody else changed");
        }
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::Synced(values) => {
                let mut list = Vec::with_capacity(values.len());
                self.malformed.clear();
                for value in &values {
                    match self.parse(value) {
                        Ok(node) => list.push(node),
                        // Its last good state is better than losing the node over a typing error.
                        Err(name) => list.extend(self.nodes.node(&name).cloned()),
                    }
                }
                let refused = self.nodes.replace(list);
                self.refused(&refused);
                if !self.synced {
                    info!(nodes = values.len(), "the Nodes are known");
                }
                self.synced = true;
                self.api_problem = None;
            }
            Change::Applied(value) => {
                if let Ok(node) = self.parse(&value) {
                    self.malformed.remove(&node.name);
                    let refused = self.nodes.apply(NodeChange::Set(node));
                    self.refused(&refused);
                }
            }
            Change::Deleted(value) => {
                if let Some(name) = value.pointer("/metadata/name").and_then(Value::as_str) {
                    self.malformed.remove(name);
                    self.nodes.apply(NodeChange::Removed(name.to_owned()));
                }
            }
            Change::Interrupted(why) => {
                if self.api_problem.is_none() {
                    warn!(why, "the API server is away; what is known stays in force");
                }
                self.api_problem = Some(why);
            }
            Change::Resumed => {
                info!("the API server answers again");
                self.api_problem = None;
            }
        }
    }

    /// Reads a Node object; the error is the name of the one that is refused.
    fn parse(&mut self, value: &Value) -> Result<Node, String> {
        Node::parse(value).map_err(|rejection| {
            let name = rejection.name.clone();
            if self.malformed.get(&name) != Some(&rejection) {
                self.unreadable(&rejection);
                self.malformed.insert(name.clone(), rejection);
            }
            name
        })
    }

    /// Ranges that are in another's way.
    fn refused(&self, rejections: &[Rejection]) {
        self.tell("PodCIDROverlap", rejections);
    }

    /// Fields that cannot be read.
    fn unreadable(&self, rejection: &Rejection) {
        let reason =
            if rejection.field.starts_with("spec.podCIDR") { "InvalidPodCIDR" } else { "InvalidNode" };
        self.tell(reason, std::slice::from_ref(rejection));
    }

    fn tell(&self, reason: &'static str, rejections: &[Rejection]) {
        self.parts.metrics.rejected(rejections.len());
        for rejection in rejections {
            // The node that is concerned tells it as an event; a thousand others need not.
            if rejection.name == self.config.node_name {
                self.parts.reporter.warning(reason, &rejection.field, &rejection.to_string());
            } else {
                warn!(%rejection, "refused");
            }
        }
    }

    /// Brings everything to what should be there.
    fn turn(&mut self) {
        self.turned = Instant::now();
        self.parts.status.update(|s| s.turned = Instant::now());
        self.reserve();
        let view = self.view();
        if let Some(own) = self.own.clone() {
            self.parts.reporter.set_uid(&own.uid);
            self.local_part(&own);
            self.parts.attacher.set_ranges(&own.pod_cidrs);
        }
        if let (Some(view), Some(local)) = (&view, self.local.clone()) {
            self.cluster_part(view, &local);
        }
        let repairs = self.network.take_repairs();
        self.repaired(&repairs);
        self.show(view.as_ref());
        if self.audited_pods.elapsed() >= AUDIT_PODS {
            self.audit_pods();
        }
        self.parts.status.update(|s| s.turned = Instant::now());
    }

    /// Works out which ranges no podCIDR may overlap. Before anything is made of the Nodes: one that did would
    /// take the API server, and with it the way to correct it, away from this node.
    fn reserve(&mut self) {
        let internal_ips = self
            .nodes
            .node(&self.config.node_name)
            .map(|n| n.internal_ips.as_slice())
            .or_else(|| self.own.as_ref().map(|o| o.internal_ips.as_slice()))
            .unwrap_or_default();
        if self.reserved.as_ref().is_some_and(|(at, ips)| at.elapsed() < TURN && ips == internal_ips) {
            return;
        }
        let internal_ips = internal_ips.to_vec();
        let mut reserved = match self.network.reserved(&internal_ips) {
            Ok(reserved) => reserved,
            Err(error) => {
                warn!(%error, "cannot look at this node's own addresses; the ranges reserved before stay so");
                return;
            }
        };
        reserved.extend(self.api_addresses.iter().map(|a| ((*a).into(), format!("the API server {a}"))));
        let refused = self.nodes.set_reserved(reserved);
        self.refused(&refused);
        self.reserved = Some((Instant::now(), internal_ips));
    }

    fn view(&mut self) -> Option<View> {
        if !self.synced {
            return None;
        }
        let config = &self.config;
        match nodes::view(&self.nodes, &config.node_name, config.mode, config.underlay_v6) {
            Ok(view) => {
                self.own = Some(view.own.clone());
                self.parts.status.set("node", true, format!("{} at {}", view.own.name, view.own.underlay));
                Some(view)
            }
            Err(why) => {
                if self.parts.status.set("node", false, why.to_string()) {
                    warn!(%why, "this node is not known; what is in force stays");
                }
                None
            }
        }
    }

    /// Everything that concerns this node alone.
    fn local_part(&mut self, own: &OwnNode) {
        let local = match self.network.ensure_local(own) {
            Ok(local) => local,
            Err(error) => {
                if self.parts.status.set("network", false, error.to_string()) {
                    warn!(%error, "the node's network cannot be put in order");
                }
                return;
            }
        };
        if let Err(error) = self.program(own, &local) {
            if self.parts.status.set("network", false, error.to_string()) {
                warn!(%error, "the datapath cannot be configured");
            }
            return;
        }
        let mtu = local.mtu.mtu;
        self.parts.attacher.set_mtu(mtu);
        match self.network.follow_mtu(mtu) {
            Ok((0, _)) => {}
            Ok((pods, _)) => info!(mtu, pods, "the pods have a new MTU"),
            Err(error) => warn!(%error, mtu, "cannot set the MTU of the pods"),
        }
        match self.parts.attacher.follow_node(local.addresses) {
            Ok(0) => {}
            Ok(routes) => info!(routes, "routes to the pods of this node"),
            Err(error) => warn!(%error, "cannot look at the routes to the pods of this node"),
        }
        self.warn_of_mtu(&local);
        let text = format!("pod MTU {mtu}, {} with MTU {}", local.uplink.name, local.uplink.mtu);
        if self.parts.status.set("network", true, text) {
            info!(
                mtu,
                uplink = local.uplink.name,
                uplink_mtu = local.uplink.mtu,
                "the node's network is in order"
            );
        }
        lock(&self.parts.interest).set([Some(local.uplink.index), local.tunnel].into_iter().flatten());
        self.local = Some(local);
    }

    fn program(&mut self, own: &OwnNode, local: &Local) -> Result<(), podway_bpf_host::Error> {
        let mode = match (self.config.mode, local.tunnel) {
            (NetworkMode::Vxlan { vni, port }, Some(tunnel_ifindex)) => {
                Mode::Overlay { tunnel_ifindex, vni, port, underlay: own.underlay }
            }
            _ => Mode::Direct,
        };
        let stack_translates = self.config.services.mode.is_translated_by_the_stack();
        let wanted = NodeConfig { mode, uplink_ifindex: local.uplink.index, stack_translates };
        if self.programmed.as_ref() == Some(&wanted) {
            return Ok(());
        }
        let datapath = &self.parts.datapath;
        // The configuration first: a program without one passes or drops everything.
        datapath.set_config(&wanted)?;
        if let Some(tunnel) = local.tunnel {
            datapath.attach_tunnel(tunnel)?;
        }
        datapath.attach_uplink(local.uplink.index)?;
        if let Some(before) = &self.programmed
            && before.uplink_ifindex != wanted.uplink_ifindex
        {
            info!(uplink = local.uplink.name, "the underlay has another device");
            datapath.detach_uplink(before.uplink_ifindex)?;
        }
        // The pins of a device outlive it.
        if let Some(NodeConfig { mode: Mode::Overlay { tunnel_ifindex, .. }, .. }) = self.programmed
            && Some(tunnel_ifindex) != local.tunnel
        {
            datapath.detach_tunnel(tunnel_ifindex)?;
        }
        self.programmed = Some(wanted);
        Ok(())
    }

    fn warn_of_mtu(&mut self, local: &Local) {
        let Some(warning) = &local.mtu.warning else {
            if let Some(before) = self.mtu_warning.take() {
                let message = format!("pod MTU {} fits {} again", local.mtu.mtu, local.uplink.name);
                debug!(reason = before.reason, "over");
                self.parts.reporter.normal("PodMTUFits", "", &message);
            }
            return;
        };
        let fragments = snmp::Counters::read().map_or(0, |c| c.fragments_created());
        let before = self.mtu_warning.as_ref().filter(|w| w.reason == warning.reason);
        let since = before.map_or(fragments, |w| w.fragments);
        let harm = fragments > since;
        // Anew every minute, and at once when it begins to cost packets.
        if before.is_some_and(|w| w.reported.elapsed() < REPEAT_WARNING && (w.harm || !harm)) {
            return;
        }
        let mut message = warning.message.clone();
        if harm {
            let _ = write!(message, "; {} IP fragments were made on this node since", fragments - since);
        }
        self.parts.reporter.warning(warning.reason, &local.uplink.name, &message);
        let reported = Instant::now();
        self.mtu_warning = Some(MtuWarning { reason: warning.reason, reported, fragments: since, harm });
    }

    /// Everything that concerns other nodes.
    fn cluster_part(&mut self, view: &View, local: &Local) {
        match self.parts.datapath.sync_peers(&view.peers) {
            Ok(report) => {
                if report.written + report.removed > 0 {
                    info!(written = report.written, removed = report.removed, "peers");
                }
                self.parts.status.set("peers", true, format!("{} ranges and addresses", view.peers.len()));
            }
            Err(error) => {
                if self.parts.status.set("peers", false, error.to_string()) {
                    warn!(%error, "not all peers are in the datapath");
                }
            }
        }
        match self.network.sync_routes(view, local) {
            Ok(report) => {
                if report.written + report.removed > 0 {
                    info!(written = report.written, removed = report.removed, "routes");
                }
                for (cidr, why) in &report.failed {
                    if self.failed_routes.get(cidr) != Some(why) {
                        warn!(%cidr, why, "no route to the pods of a node");
                    }
                }
                let ok = report.failed.is_empty();
                let text = match report.failed.iter().next() {
                    None => format!("{} routes", view.routes.len()),
                    Some((cidr, why)) => {
                        format!("{} missing, the first is {cidr}: {why}", report.failed.len())
                    }
                };
                self.parts.status.set("routes", ok, text);
                self.failed_routes = report.failed;
            }
            Err(error) => {
                if self.parts.status.set("routes", false, error.to_string()) {
                    warn!(%error, "routes cannot be put in order");
                }
            }
        }
        for (node, why) in &view.unreachable {
            if self.unreachable.get(node) != Some(why) {
                warn!(node, why, "a node is left out");
            }
        }
        self.unreachable = view.unreachable.clone();
        self.masquerade_part(view);
        if let Err(error) = self.parts.attacher.set_inside(&view.inside) {
            warn!(%error, "host ports do not know the cluster's addresses; trying again");
        }
        self.prove(view, local);
        if self.remembered.as_ref() != Some(&view.own) {
            match remembered::save(&self.run_dir, &view.own) {
                Ok(()) => self.remembered = Some(view.own.clone()),
                Err(error) => warn!(%error, "cannot remember this node for times without API server"),
            }
        }
    }

    fn masquerade_part(&mut self, view: &View) {
        let settings = &self.config.masquerade;
        let result = if settings.enabled {
            let not_to = view.inside.iter().chain(&settings.exclude).copied().collect();
            let tunnel_port = match self.config.mode {
                NetworkMode::Vxlan { port, .. } => Some(port),
                NetworkMode::Direct => None,
            };
            let rules = Rules { from: view.own.pod_cidrs.clone(), not_to, tunnel_port };
            self.masquerade.apply(&rules)
        } else if self.masquerade_removed {
            Ok(false)
        } else {
            // Without nft there can be no rules of ours either.
            match crate::masquerade::remove() {
                Err(NftError::Missing(_)) => Ok(false),
                other => other,
            }
        };
        match result {
            Ok(changed) => {
                if changed {
                    info!(enabled = settings.enabled, "masquerade rules written");
                }
                self.masquerade_removed = !settings.enabled;
                let text = if settings.enabled { "in force" } else { "switched off" };
                self.parts.status.set("masquerade", true, text);
            }
            Err(error) => {
                let hint = match &error {
                    NftError::Missing(_) => ", or switch masquerading off with --masquerade=false",
                    NftError::Refused(_) => "",
                };
                if self.parts.status.set("masquerade", false, format!("{error}{hint}")) {
                    warn!(%error, "pods reach nothing outside of the cluster that does not know their addresses");
                }
            }
        }
    }

    fn prove(&self, view: &View, local: &Local) {
        let small = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        self.parts.proof.set(Wanted {
            own: Some(view.own.underlay),
            own_name: view.own.name.clone(),
            size: small(local.mtu.on_the_wire),
            overhead: small(self.config.mode.overhead(view.own.underlay.is_ipv6())),
            peers: view.paths.clone(),
        });
    }

    /// Tells the world how things are.
    fn show(&mut self, view: Option<&View>) {
        let readiness = self.readiness();
        if self.parts.attacher.readiness() != readiness {
            match &readiness {
                Readiness::Ready => info!("pods can be attached"),
                Readiness::NotReady(why) => warn!(why, "pods cannot be attached"),
            }
            self.parts.attacher.set_ready(readiness);
        }
        let (ok, text) = match (&self.api_problem, self.synced) {
            (None, true) => (true, "connected".to_owned()),
            (None, false) => (false, "no answer yet".to_owned()),
            (Some(why), true) => (false, format!("away, what was known before stays in force ({why})")),
            (Some(why), false) => (false, format!("away since the start of the agent ({why})")),
        };
        let serving = !ok && !self.synced && self.own.is_some();
        let text = if serving {
            format!("{text}; pods are attached from what is remembered of this node")
        } else {
            text
        };
        self.parts.status.set("api", ok, text);
        // Nodes, not causes: one may have several.
        let rejections = || self.malformed.values().chain(self.nodes.all_refusals());
        let refused = rejections().map(|r| r.name.as_str()).collect::<BTreeSet<_>>().len();
        let first = rejections().next();
        let text = match first {
            None => format!("{} known", self.nodes.iter().count()),
            Some(first) => format!("{refused} refused, the first: {first}"),
        };
        if self.synced {
            self.parts.status.set(
                "nodes",
                refused == 0 && self.unreachable.is_empty(),
                left_out(text, &self.unreachable),
            );
        }
        let local = self.local.clone();
        self.parts.status.update(|s| {
            s.local = local;
            s.nodes = self.nodes.iter().count();
            s.peers = view.map_or(s.peers, |v| v.peers.len());
            s.rejected = refused;
            s.api_connected = ok;
        });
    }

    fn readiness(&self) -> Readiness {
        let Some(own) = &self.own else {
            let why = match (&self.api_problem, self.synced) {
                (None, true) if self.malformed.contains_key(&self.config.node_name) => {
                    format!("this node's object is refused: {}", self.malformed[&self.config.node_name])
                }
                (Some(problem), _) => format!("the API server is away and nothing is remembered: {problem}"),
                (None, false) => "waiting for the Nodes from the API server".to_owned(),
                (None, true) => format!(
                    "Node {:?} is not there, or has no usable InternalIP; see /readyz",
                    self.config.node_name
                ),
            };
            return Readiness::NotReady(why);
        };
        if own.pod_cidrs.is_empty() {
            // As it is now: a mistake that was corrected into another one is told as the latter.
            let malformed = self.malformed.get(&own.name);
            let why = match malformed.or_else(|| self.nodes.refusals(&own.name).first()) {
                Some(first) => format!("the podCIDR of this node is refused: {first}"),
                None => format!("Node {:?} has no podCIDR yet (spec.podCIDRs)", own.name),
            };
            return Readiness::NotReady(why);
        }
        if self.local.is_none() {
            let why = self.parts.status.snapshot().conditions.get("network").map(|c| c.text.clone());
            return Readiness::NotReady(
                why.unwrap_or_else(|| "the node's network is not in order".to_owned()),
            );
        }
        Readiness::Ready
    }

    fn audit_pods(&mut self) {
        self.audited_pods = Instant::now();
        match self.parts.attacher.audit() {
            Ok(0) => {}
            Ok(pods) => info!(pods, "pods whose link is gone left the datapath"),
            Err(error) => warn!(%error, "cannot compare the attachments with the kernel"),
        }
    }

    fn audit_rules(&mut self) {
        self.audited_rules = Instant::now();
        match self.masquerade.audit() {
            Ok(false) => {}
            Ok(true) => {
                self.parts.metrics.repaired("masquerade");
                warn!("somebody else changed the table inet podway; it is as it was");
            }
            Err(error) => warn!(%error, "cannot look at the masquerade rules"),
        }
        match self.parts.attacher.audit_ports() {
            Ok(false) => {}
            Ok(true) => {
                self.parts.metrics.repaired("host_ports");
                warn!("somebody else changed the table inet podway_ports; it is as it was");
            }
            Err(error) => warn!(%error, "cannot look at the host ports"),
        }
    }
}

fn left_out(text: String, unreachable: &BTreeMap<String, String>) -> String {
    match unreachable.iter().next() {
        None => text,
        Some((node, why)) => format!("{text}; {} left out, the first is {node}: {why}", unreachable.len()),
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let underlay: Option<IpAddr> = self.own.as_ref().map(|o| o.underlay);
        f.debug_struct("Control")
            .field("synced", &self.synced)
            .field("underlay", &underlay)
            .finish_non_exhaustive()
    }
}
