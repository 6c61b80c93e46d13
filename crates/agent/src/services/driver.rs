//! The thread that compiles objects and drives the mechanism.
//!
//! 1. What an earlier agent put into the kernel stays, and serves, until all lists have been read.
//! 2. Then the kernel is made equal to the table in one step that writes the difference; and only when that
//!    succeeded, what other mechanisms left is removed.
//! 3. From then on changes are written as they come; those that wait together are written together. A write that
//!    fails is followed by making the kernel equal to the table again, later and later.
//! 4. While the API server is away everything stays.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podway_kube::events::{Severity, Subject};
use podway_kube::watch::Change;
use podway_link::Netlink;
use podway_model::{Node, NodeChange, Nodes};
use podway_services::table::{Origin, ServiceId, TableChange, Target};
use podway_services::{Changes, Compiler, Finding};
use tracing::{debug, info, warn};

use super::config::ServicesConfig;
use super::feed::{Input, ServiceItem, SliceItem};
use super::health_checks::{Answer, HealthChecks};
use super::kernel::{Counts, Kernel, KernelError, Outcome, Refused};
use super::lb::ObjectName;
use super::mechanisms::{self, Mechanisms};
use super::metrics::{Current, PortCounts, ServiceMetrics};
use super::query::Question;
use super::report;
use super::view;
use crate::events::Reporter;
use crate::metrics::Metrics;
use crate::status::Status;

/// Inputs that may wait.
pub(super) const QUEUE: usize = 4096;
/// Inputs that are compiled before they are written.
const TOGETHER: usize = 4096;
/// Longest time without a look around.
const TURN: Duration = Duration::from_millis(250);
/// How often the kernel is compared with what should be there.
const AUDIT: Duration = Duration::from_secs(5);
/// How often the node's addresses are read.
const ADDRESSES: Duration = Duration::from_secs(5);
/// How often counters are read for the metrics.
const PUBLISH: Duration = Duration::from_secs(5);
/// How often other proxies are looked for.
const OTHERS: Duration = Duration::from_secs(600);
/// Pause after a failed write; doubles up to the longest.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Events about Services of one turn.
const EVENTS_MAX: usize = 32;
/// Lines of an audit that are told.
const LINES_MAX: usize = 8;

/// What the thread works with.
pub(super) struct Parts {
    pub(super) node: String,
    pub(super) config: ServicesConfig,
    pub(super) mechanisms: Mechanisms,
    pub(super) health_checks: HealthChecks,
    pub(super) status: Arc<Status>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) own_metrics: Arc<ServiceMetrics>,
    pub(super) reporter: Arc<Reporter>,
}

/// A change on its way to the kernel.
struct Waiting {
    received: Instant,
    trigger: Option<jiff::Timestamp>,
}

/// The thread's state.
pub(super) struct Driver {
    parts: Parts,
    compiler: Compiler,
    kernel: Option<Box<dyn Kernel>>,
    nodes: Nodes,
    pools: Option<Vec<IpNet>>,
    local: Vec<IpAddr>,
    local_read: Option<Instant>,
    /// UID by Service.
    services: BTreeMap<ObjectName, String>,
    slices: BTreeSet<ObjectName>,
    /// Services, slices, nodes.
    synced: [bool; 3],
    synced_at: Option<jiff::Timestamp>,
    has_view: bool,
    pending: Vec<TableChange>,
    waiting: Vec<Waiting>,
    /// Health-check node port by Service.
    checks: BTreeMap<ObjectName, (u16, Answer)>,
    checks_changed: bool,
    in_force: bool,
    /// The kernel may differ from the table by more than what is pending.
    dirty: bool,
    others_removed: bool,
    problem: Option<String>,
    retry: Duration,
    retry_at: Option<Instant>,
    refused: Vec<Refused>,
    counts: HashMap<ServiceId, Counts>,
    audited: Instant,
    others_looked: Option<Instant>,
    published: Option<Instant>,
}

impl Driver {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            parts,
            compiler: Compiler::new(podway_services::table::NodeView::default()),
            kernel: None,
            nodes: Nodes::new(),
            pools: None,
            local: Vec::new(),
            local_read: None,
            services: BTreeMap::new(),
            slices: BTreeSet::new(),
            synced: [false; 3],
            synced_at: None,
            has_view: false,
            pending: Vec::new(),
            waiting: Vec::new(),
            checks: BTreeMap::new(),
            checks_changed: false,
            in_force: false,
            dirty: true,
            others_removed: false,
            problem: None,
            retry: BACKOFF,
            retry_at: None,
            refused: Vec::new(),
            counts: HashMap::new(),
            audited: Instant::now(),
            others_looked: None,
            published: None,
        }
    }

    /// Works until told to stop, or nobody can tell it anything any more. Nothing in the kernel is touched at the end.
    pub(super) fn run(mut self, inputs: &Receiver<Input>) {
        loop {
            let mut next = inputs.recv_timeout(TURN);
            let mut taken = 0;
            loop {
                match next {
                    Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                    Ok(input) => self.take(input),
                    Err(RecvTimeoutError::Timeout) => break,
                }
                taken += 1;
                if taken >= TOGETHER {
                    break;
                }
                next = inputs.try_recv().map_err(|_| RecvTimeoutError::Timeout);
            }
            self.turn();
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Services(change) => self.take_services(change),
            Input::Slices(change) => self.take_slices(change),
            Input::Nodes(change) => self.take_nodes(change),
            Input::Pools(pools) => {
                self.pools = Some(pools);
                self.refresh_view();
            }
            Input::Question(question) => self.answer(&question),
            // The loop ends before.
            Input::Stop => {}
        }
    }

    fn take_services(&mut self, change: Change<Box<ServiceItem>>) {
        match change {
            Change::Synced(all) => {
                let present: BTreeSet<ObjectName> = all.iter().map(|s| s.name.clone()).collect();
                let gone: Vec<ObjectName> =
                    self.services.keys().filter(|n| !present.contains(*n)).cloned().collect();
                for name in gone {
                    self.remove_service(&name, Instant::now());
                }
                let mut good = Vec::with_capacity(all.len());
                for item in all {
                    if let Some(service) = self.accept_service(*item) {
                        good.push(service);
                    }
                }
                let changes = self.compiler.load(good.iter().map(|s| &**s), []);
                self.compiled(changes);
                self.synced(0);
            }
            Change::Applied(item) => {
                let received = item.received;
                self.parts.own_metrics.changed("Service");
                if let Some(service) = self.accept_service(*item) {
                    let changes = self.compiler.apply_service(&service);
                    self.compiled_of(changes, received, None);
                }
            }
            Change::Deleted(item) => {
                self.parts.own_metrics.changed("Service");
                self.remove_service(&item.name, item.received);
            }
            Change::Interrupted(why) => debug!(why, "Services"),
            Change::Resumed => {}
        }
    }

    /// Remembers a Service; one that is malformed stays as it was before.
    fn accept_service(&mut self, item: ServiceItem) -> Option<Box<podway_model::Service>> {
        let ServiceItem { name, uid, parsed, .. } = item;
        match parsed {
            Ok(service) => {
                self.services.insert(name, uid);
                Some(service)
            }
            Err(rejection) => {
                self.parts.metrics.rejected(1);
                self.event(&name, &uid, "ServiceMalformed", &rejection.to_string());
                self.services.entry(name).or_insert(uid);
                None
            }
        }
    }

    fn remove_service(&mut self, name: &ObjectName, received: Instant) {
        self.services.remove(name);
        let changes = self.compiler.remove_service(&name.0, &name.1);
        self.compiled_of(changes, received, None);
    }

    fn take_slices(&mut self, change: Change<Box<SliceItem>>) {
        match change {
            Change::Synced(all) => {
                let present: BTreeSet<ObjectName> = all.iter().map(|s| s.name.clone()).collect();
                let gone: Vec<ObjectName> = self.slices.difference(&present).cloned().collect();
                for name in gone {
                    self.remove_slice(&name, Instant::now(), None);
                }
                let mut good = Vec::with_capacity(all.len());
                for item in all {
                    if let Some(slice) = self.accept_slice(*item) {
                        good.push(slice);
                    }
                }
                let changes = self.compiler.load([], good.iter().map(|s| &**s));
                self.compiled(changes);
                self.synced(1);
            }
            Change::Applied(item) => {
                self.parts.own_metrics.changed("EndpointSlice");
                let (received, trigger) = (item.received, item.trigger);
                if let Some(slice) = self.accept_slice(*item) {
                    let changes = self.compiler.apply_slice(&slice);
                    self.compiled_of(changes, received, trigger);
                }
            }
            Change::Deleted(item) => {
                self.parts.own_metrics.changed("EndpointSlice");
                self.remove_slice(&item.name, item.received, item.trigger);
            }
            Change::Interrupted(why) => debug!(why, "EndpointSlices"),
            Change::Resumed => {}
        }
    }

    fn accept_slice(&mut self, item: SliceItem) -> Option<Box<podway_model::EndpointSlice>> {
        match item.parsed {
            Ok(slice) => {
                self.slices.insert(item.name);
                Some(slice)
            }
            Err(rejection) => {
                self.parts.metrics.rejected(1);
                let subject = Subject {
                    api_version: "discovery.k8s.io/v1".into(),
                    ..Subject::namespaced("EndpointSlice", &item.name.0, &item.name.1, "")
                };
                let text = rejection.to_string();
                self.parts.reporter.about(subject, Severity::Warning, "EndpointSliceMalformed", "", &text);
                None
            }
        }
    }

    fn remove_slice(&mut self, name: &ObjectName, received: Instant, trigger: Option<jiff::Timestamp>) {
        self.slices.remove(name);
        let changes = self.compiler.remove_slice(&name.0, &name.1);
        self.compiled_of(changes, received, trigger);
    }

    /// Malformed Nodes are told by the control loop.
    fn take_nodes(&mut self, change: Change) {
        match change {
            Change::Synced(all) => {
                let parsed: Vec<Node> = all.iter().filter_map(|v| Node::parse(v).ok()).collect();
                let present: BTreeSet<&String> = parsed.iter().map(|n| &n.name).collect();
                let gone: Vec<String> =
                    self.nodes.iter().map(|n| n.name.clone()).filter(|n| !present.contains(n)).collect();
                for name in gone {
                    let changes = self.compiler.remove_node(&name);
                    self.compiled(changes);
                }
                for node in &parsed {
                    let changes = self.compiler.set_node(&node.name, &node.internal_ips);
                    self.compiled(changes);
                }
                self.nodes.replace(parsed);
                self.synced(2);
            }
            Change::Applied(value) => {
                let Ok(node) = Node::parse(&value) else { return };
                // Heartbeats come all the time.
                if self.nodes.node(&node.name) == Some(&node) {
                    return;
                }
                let changes = self.compiler.set_node(&node.name, &node.internal_ips);
                self.nodes.apply(NodeChange::Set(node));
                self.compiled(changes);
            }
            Change::Deleted(value) => {
                let Some(name) = value.pointer("/metadata/name").and_then(|n| n.as_str()) else { return };
                let changes = self.compiler.remove_node(name);
                self.nodes.apply(NodeChange::Removed(name.to_owned()));
                self.compiled(changes);
            }
            Change::Interrupted(_) | Change::Resumed => return,
        }
        self.refresh_view();
    }

    fn synced(&mut self, which: usize) {
        self.synced[which] = true;
        if self.synced == [true; 3] && self.synced_at.is_none() {
            self.synced_at = Some(jiff::Timestamp::now());
            info!(
                services = self.services.len(),
                slices = self.slices.len(),
                "all Services and EndpointSlices are known"
            );
        }
    }

    fn refresh_view(&mut self) {
        if self.local_read.is_none() {
            self.read_addresses();
        }
        let Some(pools) = &self.pools else { return };
        let made = view::view(&view::Sources {
            node: &self.parts.node,
            nodes: &self.nodes,
            local: &self.local,
            pools,
            config: &self.parts.config,
        });
        let Some(made) = made else { return };
        if self.has_view && made == *self.compiler.view() {
            return;
        }
        self.has_view = true;
        let changes = self.compiler.set_view(made);
        self.compiled(changes);
        // Not only the table follows from the node.
        self.dirty = true;
    }

    fn read_addresses(&mut self) {
        self.local_read = Some(Instant::now());
        let read = || -> podway_link::Result<Vec<IpAddr>> {
            let mut netlink = Netlink::open()?;
            let held = netlink.held_addresses(0)?;
            let mut all: Vec<IpAddr> =
                netlink.addresses()?.into_iter().map(|a| a.addr).filter(|a| !held.contains(a)).collect();
            all.sort_unstable();
            all.dedup();
            Ok(all)
        };
        match read() {
            Ok(local) => self.local = local,
            Err(error) => warn!(%error, "the node's addresses cannot be read; those that are known stay"),
        }
    }

    fn compiled_of(&mut self, changes: Changes, received: Instant, trigger: Option<jiff::Timestamp>) {
        if !changes.table.is_empty() && self.in_force {
            self.waiting.push(Waiting { received, trigger });
        }
        self.compiled(changes);
    }

    fn compiled(&mut self, changes: Changes) {
        // Before the first write, and after a failed one, the whole table is written.
        if self.in_force && !self.dirty {
            self.pending.extend(changes.table);
        }
        for (namespace, name) in &changes.services {
            self.refresh_check(namespace, name);
        }
        for finding in changes.found.iter().take(EVENTS_MAX) {
            self.finding(finding);
        }
        for finding in &changes.cleared {
            debug!(%finding, "no longer");
        }
    }

    fn refresh_check(&mut self, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        let now = self.compiler.health_check(namespace, name).map(|check| {
            let answer = Answer { namespace: key.0.clone(), name: key.1.clone(), local: check.local_ready };
            (check.port, answer)
        });
        let changed = match now {
            Some(now) => self.checks.insert(key, now.clone()) != Some(now),
            None => self.checks.remove(&key).is_some(),
        };
        self.checks_changed |= changed;
    }

    fn turn(&mut self) {
        if self.local_read.is_some_and(|at| at.elapsed() >= ADDRESSES) {
            self.read_addresses();
            self.refresh_view();
        }
        if self.synced == [true; 3] && self.has_view {
            self.write();
            self.follow_checks();
            if self.in_force && self.audited.elapsed() >= AUDIT {
                self.audit();
            }
        }
        if let Some(kernel) = &mut self.kernel {
            kernel.idle();
        }
        if self.in_force && self.others_looked.is_none_or(|at| at.elapsed() >= OTHERS) {
            self.look_for_others();
        }
        if self.published.is_none_or(|at| at.elapsed() >= PUBLISH) {
            self.publish();
        }
        self.show();
    }

    fn write(&mut self) {
        if self.retry_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        let whole = self.dirty || !self.in_force;
        if !whole && self.pending.is_empty() {
            return;
        }
        let begun = Instant::now();
        match self.write_to_kernel(whole) {
            Ok(outcome) => self.written(outcome, begun.elapsed(), whole),
            Err(error) => {
                self.parts.own_metrics.failed();
                let text = error.to_string();
                if self.problem.as_ref() != Some(&text) {
                    let message = format!("services are not as they should be: {text}");
                    self.parts.reporter.warning("ServicesNotProgrammed", "", &message);
                }
                self.problem = Some(text);
                self.dirty = true;
                self.pending.clear();
                self.retry_at = Some(Instant::now() + self.retry);
                self.retry = (self.retry * 2).min(BACKOFF_MAX);
            }
        }
    }

    fn write_to_kernel(&mut self, whole: bool) -> Result<Outcome, KernelError> {
        if self.kernel.is_none() {
            self.kernel = self.parts.mechanisms.chosen()?;
        }
        let Some(kernel) = &mut self.kernel else { return Ok(Outcome::default()) };
        if whole {
            kernel.sync(self.compiler.table(), self.compiler.view())
        } else {
            kernel.apply(self.compiler.table(), &self.pending)
        }
    }

    fn written(&mut self, outcome: Outcome, took: Duration, whole: bool) {
        self.parts.own_metrics.wrote(outcome.written, outcome.removed, took);
        if self.problem.take().is_some() {
            self.parts.reporter.normal("ServicesProgrammed", "", "services are as they should be again");
        }
        if whole {
            info!(
                mode = %self.parts.config.mode,
                written = outcome.written,
                removed = outcome.removed,
                took = ?took,
                "services are in force"
            );
        }
        let now = jiff::Timestamp::now();
        for change in self.waiting.drain(..) {
            // What happened before the agent knew of anything says nothing about its speed.
            let trigger = change.trigger.filter(|t| self.synced_at.is_some_and(|s| *t >= s));
            let since = trigger.and_then(|t| Duration::try_from(now.duration_since(t)).ok());
            self.parts.own_metrics.programmed(change.received.elapsed(), since);
        }
        self.pending.clear();
        self.dirty = false;
        self.retry = BACKOFF;
        self.retry_at = None;
        self.tell_refused(outcome.refused);
        if !self.in_force {
            self.in_force = true;
            self.audited = Instant::now();
            self.compiler.release_adopted();
        }
        if !self.others_removed {
            self.others_removed = true;
            for line in self.parts.mechanisms.remove_others() {
                info!(removed = line, "left by another mode of services");
            }
        }
    }

    fn tell_refused(&mut self, refused: Vec<Refused>) {
        let new: Vec<Refused> =
            refused.iter().filter(|r| !self.refused.contains(r)).take(EVENTS_MAX).cloned().collect();
        for Refused { service, cause } in new {
            match service {
                Some(name) => {
                    let uid = self.services.get(&name).cloned().unwrap_or_default();
                    self.event(
                        &name,
                        &uid,
                        "ServiceNotProgrammed",
                        &format!("on {}: {cause}", self.parts.node),
                    );
                }
                None => self.parts.reporter.warning("ServicesNotProgrammed", &cause, &cause),
            }
        }
        self.refused = refused;
    }

    fn follow_checks(&mut self) {
        self.parts.health_checks.set_healthy(self.problem.is_none());
        if std::mem::take(&mut self.checks_changed) {
            // Of two Services with one port the first by name has it; the API server gives every port once.
            let mut wanted = BTreeMap::new();
            for (port, answer) in self.checks.values() {
                wanted.entry(*port).or_insert_with(|| answer.clone());
            }
            self.parts.health_checks.set(&wanted);
        }
        for trouble in self.parts.health_checks.new_troubles() {
            let name = (trouble.answer.namespace, trouble.answer.name);
            let uid = self.services.get(&name).cloned().unwrap_or_default();
            let text = format!(
                "health-check node port {} cannot be served on {}: {}; free it, or choose another \
                 spec.healthCheckNodePort",
                trouble.port, self.parts.node, trouble.cause
            );
            self.event(&name, &uid, "HealthCheckPortTaken", &text);
        }
    }

    fn audit(&mut self) {
        self.audited = Instant::now();
        let Some(kernel) = &mut self.kernel else { return };
        match kernel.audit(self.compiler.table(), self.compiler.view()) {
            Ok((found, outcome)) => {
                if !found.is_empty() {
                    self.parts.metrics.repaired("services");
                    let more = found.len().saturating_sub(LINES_MAX);
                    let mut text = found.into_iter().take(LINES_MAX).collect::<Vec<_>>().join("; ");
                    if more > 0 {
                        text.push_str(&format!("; and {more} more"));
                    }
                    let message =
                        format!("somebody else changed what serves services, it was put right: {text}");
                    self.parts.reporter.warning("ServicesRepaired", "", &message);
                    self.tell_refused(outcome.refused);
                }
            }
            Err(error) => {
                warn!(%error, "the kernel cannot be compared with what services should be");
                self.dirty = true;
            }
        }
    }

    /// Whether other proxies are at work, on a thread of its own: reading tens of thousands of rules takes a while.
    fn look_for_others(&mut self) {
        self.others_looked = Some(Instant::now());
        let reporter = Arc::clone(&self.parts.reporter);
        let looking = std::thread::Builder::new()
            .name("podway-others".into())
            .spawn(move || mechanisms::tell_others(&reporter));
        if let Err(error) = looking {
            warn!(%error, "other service proxies are not looked for");
        }
    }

    fn finding(&self, finding: &Finding) {
        let name = (finding.namespace.clone(), finding.name.clone());
        let text = format!("{}: {}", finding.field, finding.cause);
        match finding.kind.as_str() {
            "Service" => {
                let uid = self.services.get(&name).cloned().unwrap_or_default();
                self.event(&name, &uid, "ServiceProblem", &text);
            }
            _ => warn!(%finding, "a part of a Service is not used"),
        }
    }

    fn event(&self, name: &ObjectName, uid: &str, reason: &'static str, text: &str) {
        let subject = Subject::namespaced("Service", &name.0, &name.1, uid);
        self.parts.reporter.about(subject, Severity::Warning, reason, text, text);
    }

    fn show(&self) {
        let waiting_for: Vec<&str> = ["Services", "EndpointSlices", "Nodes"]
            .into_iter()
            .zip(self.synced)
            .filter_map(|(what, done)| (!done).then_some(what))
            .collect();
        let (ok, text) = match (&self.problem, self.in_force) {
            (Some(why), true) => (false, format!("what was before is in force: {why}")),
            (Some(why), false) => (false, why.clone()),
            (None, true) => {
                let known = self.services.len();
                (true, format!("{known} known, served by {}", self.parts.config.mode))
            }
            (None, false) if !waiting_for.is_empty() => (
                false,
                format!(
                    "what was before is in force until the API server has told {}",
                    waiting_for.join(", ")
                ),
            ),
            (None, false) => (false, "what was before is in force until this node is known".to_owned()),
        };
        self.parts.status.set("services", ok, text);
    }

    fn publish(&mut self) {
        self.published = Some(Instant::now());
        let table = self.compiler.table();
        if let Some(kernel) = &mut self.kernel {
            self.counts = kernel.counters().into_iter().collect();
        }
        let mut without = [BTreeSet::new(), BTreeSet::new()];
        for frontend in table.frontends.values() {
            for (set, origin) in without.iter_mut().zip([Origin::Pod, Origin::External]) {
                if frontend.route(origin).target == Target::Drop
                    && let Some(meta) = table.services.get(&frontend.service)
                {
                    set.insert((&meta.namespace, &meta.name));
                }
            }
        }
        let ports = table
            .services
            .iter()
            .map(|(id, meta)| PortCounts {
                namespace: meta.namespace.to_string(),
                name: meta.name.to_string(),
                port: format!("{}/{}/{}", meta.port_name, meta.protocol, meta.family),
                counts: self.counts.get(id).copied().unwrap_or_default(),
            })
            .collect();
        let current = Current {
            mode: self.parts.config.mode.as_str(),
            in_force: self.in_force && self.problem.is_none(),
            objects: (self.services.len(), self.slices.len()),
            table: vec![
                ("frontends", table.frontends.len()),
                ("sets", table.sets.len()),
                ("services", table.services.len()),
                ("vips", table.vips.len()),
                ("backends", table.sets.values().map(|s| s.len()).sum()),
            ],
            fill: self.kernel.as_ref().map(|k| k.fill()).unwrap_or_default(),
            refused: self.refused.len(),
            findings: self.compiler.findings().len(),
            health_checks: self.parts.health_checks.len(),
            no_local: [("internal", without[0].len()), ("external", without[1].len())],
            ports,
        };
        self.parts.own_metrics.set_current(current);
    }

    fn answer(&mut self, question: &Question) {
        if let Some(kernel) = &mut self.kernel {
            self.counts = kernel.counters().into_iter().collect();
        }
        let sources = report::Sources {
            node: &self.parts.node,
            mode: self.kernel.as_ref().map_or(self.parts.config.mode.as_str(), |k| k.name()),
            in_force: self.in_force && self.problem.is_none(),
            problem: self.problem.as_deref(),
            compiler: &self.compiler,
            services: self.services.keys().collect(),
            refused: &self.refused,
            counts: &self.counts,
            fill: self.kernel.as_ref().map(|k| k.fill()).unwrap_or_default(),
        };
        let value = match &question.service {
            None => sources.list(),
            Some((namespace, name)) => sources.one(namespace, name),
        };
        // Who asked may have gone.
        question.answer.try_send(value).ok();
    }
}
