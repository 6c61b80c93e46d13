//! The IPVS writer.
//!
//! A frontend is a virtual server of the kernel, a backend one of its real servers, reached by translation. What IPVS
//! cannot say (refuse, drop, whose source is replaced, who may send) is in an nftables table beside it; services'
//! addresses are on a dummy device, so that the kernel gives their packets to IPVS.
//!
//! A real server that goes takes no new connections and is deleted when the last connection is over, or after
//! [`DRAIN`]; datagrams are not waited for. Session affinity is IPVS's persistence: it ends after its timeout, but not
//! before the kernel has forgotten the client's last connection (two minutes after its end). Which virtual servers are ours is recorded in the nftables table before they are made, so that others'
//! are never touched and ours are adopted after a restart.

mod device;
mod netlink;
mod plan;
mod rules;
mod scheduler;
mod state;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use podway_link::Netlink;
use podway_services::ServiceTable;
use podway_services::table::{NodeView, Protocol, ServiceId, TableChange};

use crate::conntrack;
use crate::{
    AuditReport, Error, Feature, Refused, Report, Result, ServiceCounters, Unsupported, Writer, object_name,
};

pub use device::Sysctl;
pub(crate) use netlink::{Ipvs, ServerKey};
use plan::{Desired, Element, Touched, VIPS, Wanted};
pub(crate) use rules::own_servers;
pub use scheduler::{Scheduler, UnknownScheduler};
use state::{State, lines};

/// How long open connections keep a real server that takes no new ones.
pub const DRAIN: Duration = Duration::from_secs(15 * 60);
/// How often, at most, open connections are counted between audits.
const DRAIN_LOOK: Duration = Duration::from_secs(5);
/// Weight of a real server that takes connections.
const WEIGHT: u32 = 1;

/// Programs IPVS of the current network namespace.
pub struct IpvsWriter {
    scheduler: Scheduler,
    desired: Desired,
    /// What the kernel holds as far as is known.
    written: State,
    /// The rules as nft printed them after they were written.
    rules: Vec<String>,
    kernel: Option<Kernel>,
    /// Real servers that let their connections end, since when.
    draining: BTreeMap<(ServerKey, IpAddr, u16), Instant>,
    drained: Instant,
    sysctls: Vec<Sysctl>,
    /// Records of virtual servers that are gone; they go with the next change of the rules.
    stale: BTreeSet<Element>,
    /// Something went wrong half-way: what is in the kernel has to be read again.
    dirty: bool,
}

/// Open sockets, and the device.
struct Kernel {
    ipvs: Ipvs,
    netlink: Netlink,
    device: u32,
}

impl IpvsWriter {
    /// A writer with a scheduler for all services.
    #[must_use]
    pub fn new(scheduler: Scheduler) -> Self {
        Self {
            scheduler,
            desired: Desired::default(),
            written: State::default(),
            rules: Vec::new(),
            kernel: None,
            draining: BTreeMap::new(),
            drained: Instant::now(),
            sysctls: Vec::new(),
            stale: BTreeSet::new(),
            dirty: true,
        }
    }

    /// Kernel parameters that the last [`Writer::sync`] changed. [`Writer::remove`] leaves them: others may rely on
    /// them by then.
    #[must_use]
    pub fn sysctls(&self) -> &[Sysctl] {
        &self.sysctls
    }

    /// How many real servers only let their connections end.
    #[must_use]
    pub fn draining(&self) -> usize {
        self.draining.len()
    }

    fn open(&mut self) -> Result<()> {
        if self.kernel.is_some() {
            return Ok(());
        }
        let ipvs = Ipvs::open().map_err(|error| Error::Kernel {
            what: "IPVS",
            cause: error.to_string(),
            advice: "load the module ip_vs (modprobe ip_vs), or choose another --service-mode",
        })?;
        let mut netlink = Netlink::open().map_err(|e| device::io("open", "netlink socket".into(), e))?;
        let device = device::ensure(&mut netlink)?;
        self.kernel = Some(Kernel { ipvs, netlink, device });
        Ok(())
    }

    /// Reads what the kernel holds of ours: what is recorded, and at the places where something of ours should be.
    fn read_kernel(&mut self) -> Result<Vec<String>> {
        let desired = &self.desired;
        let kernel = self.kernel.as_mut().ok_or(Error::NotSynced("ipvs"))?;
        let listed = rules::list()?.unwrap_or_default();
        let own: BTreeSet<ServerKey> = listed.elements.iter().filter_map(rules::recorded).collect();
        let mut state = State {
            elements: listed.elements,
            addresses: device::addresses(&mut kernel.netlink, kernel.device)?,
            ..State::default()
        };
        let known: BTreeSet<ServerKey> = own.iter().chain(desired.server_keys()).copied().collect();
        let servers = kernel.ipvs.servers_with(known.iter().copied());
        for server in servers.map_err(|e| failed("list", "virtual servers".into(), e))? {
            if known.contains(&server.key) {
                let reals = kernel.ipvs.reals(&server.key);
                let reals = reals.map_err(|e| failed("list real servers of", server.key.to_string(), e))?;
                state.add_server(server, &reals);
            }
        }
        self.written = state;
        self.rules = listed.rules;
        Ok(listed.strange)
    }

    /// Makes the kernel what it should be in everything, whatever it is.
    fn reconcile(&mut self, report: &mut Report) -> Result<()> {
        self.dirty = true;
        self.open()?;
        rules::write_rules()?;
        self.read_kernel()?;
        self.stale.clear();
        let touched = self.everything();
        self.execute(touched, report)?;
        let stale = std::mem::take(&mut self.stale);
        self.change(&stale, BTreeSet::new(), report)?;
        self.dirty = false;
        Ok(())
    }

    /// What should be and what is.
    fn everything(&self) -> Touched {
        let mut touched = self.desired.all();
        touched.elements.extend(self.written.elements.iter().filter(|e| !plan::is_record(e)).cloned());
        touched.elements.extend(self.written.addresses.iter().map(|addr| plan::vip_element(*addr)));
        touched.servers.extend(self.written.servers.keys().copied());
        touched.servers.extend(self.written.elements.iter().filter_map(rules::recorded));
        touched
    }

    /// Brings what was touched from what is written to what should be. New servers come before the rules that lead to
    /// them; rules that refuse come before the servers behind them go.
    fn execute(&mut self, touched: Touched, report: &mut Report) -> Result<()> {
        let began = Instant::now();
        let (gone, kept): (Vec<ServerKey>, Vec<ServerKey>) =
            touched.servers.iter().partition(|key| self.desired.server(key).is_none());
        let (wanted, unwanted): (Vec<Element>, Vec<Element>) =
            touched.elements.into_iter().partition(|element| self.desired.has(element));
        let addresses = |elements: &[Element]| -> Vec<IpAddr> {
            elements.iter().filter(|e| e.set == VIPS).filter_map(|e| e.key.parse().ok()).collect()
        };
        let (come, go) = (addresses(&wanted), addresses(&unwanted));
        let served = |key: &&ServerKey| self.desired.server(key).is_some_and(|w| w.set.is_some());
        let new: Vec<&ServerKey> = kept
            .iter()
            .filter(served)
            .filter(|key| !self.written.elements.contains(&plan::record(key)))
            .collect();
        // Where nothing arrives before its address is there, all rules can be written at once.
        let at_once = new.iter().all(|key| match key {
            ServerKey::Address(addr, ..) => come.contains(addr) && !self.written.addresses.contains(addr),
            ServerKey::Mark(..) => false,
        });
        let mut add: BTreeSet<Element> = new.into_iter().map(plan::record).collect();
        for key in &kept {
            self.stale.remove(&plan::record(key));
        }
        let mut remove = std::mem::take(&mut self.stale);
        if !at_once {
            self.change(&std::mem::take(&mut remove), std::mem::take(&mut add), report)?;
            for key in &kept {
                self.write_server(key, report)?;
            }
        }
        add.extend(wanted.into_iter().filter(|e| !self.written.elements.contains(e)));
        remove.extend(unwanted.into_iter().filter(|e| self.written.elements.contains(e)));
        self.change(&remove, add, report)?;
        if at_once {
            for key in &kept {
                self.write_server(key, report)?;
            }
        }
        let kernel = self.kernel.as_mut().ok_or(Error::NotSynced("ipvs"))?;
        // What is refused at an address is known before the address is there.
        for addr in come {
            if self.written.addresses.insert(addr) {
                report.written += usize::from(device::add(&mut kernel.netlink, kernel.device, addr)?);
            }
        }
        for addr in go {
            if self.written.addresses.remove(&addr) {
                report.removed += usize::from(device::delete(&mut kernel.netlink, kernel.device, addr)?);
            }
        }
        for key in gone {
            self.write_server(&key, report)?;
        }
        self.forget(&touched.servers);
        report.took += began.elapsed();
        Ok(())
    }

    /// Changes elements of the rules, in one transaction.
    fn change(
        &mut self,
        remove: &BTreeSet<Element>,
        add: BTreeSet<Element>,
        report: &mut Report,
    ) -> Result<()> {
        rules::change(remove, &add)?;
        report.removed += remove.len();
        report.written += add.len();
        for element in remove {
            self.written.elements.remove(element);
        }
        self.written.elements.extend(add);
        Ok(())
    }

    /// Marks the records of servers that are gone as stale.
    fn forget(&mut self, servers: &BTreeSet<ServerKey>) {
        let gone = servers.iter().filter(|key| !self.written.servers.contains_key(key));
        self.stale.extend(gone.map(plan::record).filter(|record| self.written.elements.contains(record)));
    }

    /// Makes one virtual server what it should be. What the kernel refuses is reported by the service's name.
    fn write_server(&mut self, key: &ServerKey, report: &mut Report) -> Result<()> {
        let wanted = self.desired.server(key).cloned();
        let result = match &wanted {
            Some(wanted) if wanted.set.is_some() => self.serve(key, wanted, report),
            _ => self.let_end(key, report),
        };
        let Err(error) = result else { return Ok(()) };
        match (error.raw_os_error().map(Errno::from_raw), wanted) {
            _ if error.kind() == io::ErrorKind::Unsupported => Err(Error::Kernel {
                what: "IPVS scheduler of that name",
                cause: self.scheduler.name().to_owned(),
                advice: "load its module (modprobe ip_vs_<name>), or choose another --ipvs-scheduler",
            }),
            (Some(Errno::EPERM) | None, _) | (_, None) => {
                Err(failed("write virtual server", key.to_string(), error))
            }
            (Some(_), Some(wanted)) => {
                let object =
                    self.desired.table.services.get(&wanted.service).map_or_else(String::new, object_name);
                let cause = format!("virtual server {key}: {error}");
                report.refused.push(Refused { service: wanted.service, object, cause });
                Ok(())
            }
        }
    }

    fn serve(&mut self, key: &ServerKey, wanted: &Wanted, report: &mut Report) -> io::Result<()> {
        let Some(kernel) = self.kernel.as_mut() else { return Ok(()) };
        let spec = plan::spec(&self.scheduler, wanted.affinity_s);
        let server = match self.written.servers.get_mut(key) {
            Some(server) => {
                if server.spec != spec {
                    kernel.ipvs.set_server(key, &spec).map_err(no_scheduler)?;
                    server.spec = spec;
                    report.written += 1;
                }
                server
            }
            None => {
                kernel.ipvs.add_server(key, &spec).map_err(no_scheduler)?;
                report.written += 1;
                self.written.new_server(*key, spec)
            }
        };
        let backends = self.desired.backends(wanted);
        for backend in backends.iter() {
            let end = (backend.addr, backend.port);
            match server.reals.get(&end) {
                Some(&WEIGHT) => continue,
                Some(_) => kernel.ipvs.set_real(key, end.0, end.1, WEIGHT)?,
                None => kernel.ipvs.add_real(key, end.0, end.1, WEIGHT)?,
            }
            server.reals.insert(end, WEIGHT);
            self.draining.remove(&(*key, end.0, end.1));
            report.written += 1;
        }
        let ends: BTreeSet<(IpAddr, u16)> = backends.iter().map(|b| (b.addr, b.port)).collect();
        let leaving = server.reals.keys().any(|end| !ends.contains(end));
        if leaving { self.drain(key, &ends, report) } else { Ok(()) }
    }

    /// Lets the connections of a server end that nobody is sent to any more, and deletes it then.
    fn let_end(&mut self, key: &ServerKey, report: &mut Report) -> io::Result<()> {
        if !self.written.servers.contains_key(key) {
            return Ok(());
        }
        // At an address of the node the port may be somebody else's from now on: a virtual server would take its
        // connections.
        let at_once = match key {
            ServerKey::Address(addr, ..) => {
                self.desired.server(key).is_none() && self.desired.view.addresses.contains(addr)
            }
            ServerKey::Mark(..) => false,
        };
        if !at_once {
            self.drain(key, &BTreeSet::new(), report)?;
        }
        let Some(kernel) = self.kernel.as_mut() else { return Ok(()) };
        if at_once || self.written.servers.get(key).is_some_and(|s| s.reals.is_empty()) {
            self.draining.retain(|(of, ..), _| of != key);
            report.removed += usize::from(kernel.ipvs.delete_server(key)?);
            self.written.servers.remove(key);
        }
        Ok(())
    }

    /// Real servers that are not among these take no new connections, and go when they have none, or have had some
    /// for too long. Datagrams have no end to wait for.
    fn drain(
        &mut self,
        key: &ServerKey,
        stay: &BTreeSet<(IpAddr, u16)>,
        report: &mut Report,
    ) -> io::Result<()> {
        let Some(kernel) = self.kernel.as_mut() else { return Ok(()) };
        let Some(server) = self.written.servers.get_mut(key) else { return Ok(()) };
        let waits = self.desired.protocol(key) != Some(Protocol::Udp);
        let open: HashMap<(IpAddr, u16), u32> = if waits {
            kernel.ipvs.reals(key)?.iter().map(|r| ((r.addr, r.port), r.connections)).collect()
        } else {
            HashMap::new()
        };
        let leaving: Vec<((IpAddr, u16), u32)> =
            server.reals.iter().filter(|(end, _)| !stay.contains(end)).map(|(end, w)| (*end, *w)).collect();
        for (end, weight) in leaving {
            let at = (*key, end.0, end.1);
            let since = *self.draining.entry(at).or_insert_with(Instant::now);
            if open.get(&end).is_some_and(|n| *n > 0) && since.elapsed() < DRAIN {
                if weight > 0 {
                    kernel.ipvs.set_real(key, end.0, end.1, 0)?;
                    server.reals.insert(end, 0);
                    report.written += 1;
                }
                continue;
            }
            report.removed += usize::from(kernel.ipvs.delete_real(key, end.0, end.1)?);
            server.reals.remove(&end);
            self.draining.remove(&at);
        }
        Ok(())
    }

    /// Deletes UDP flows that these services made stale: IPVS keeps a flow's endpoint for as long as connection
    /// tracking knows the flow, and drops a datagram before it chooses another.
    fn clean_flows(&self, services: impl IntoIterator<Item = ServiceId>, report: &mut Report) {
        let families = conntrack::families_of(&self.desired.table, services);
        match conntrack::clean(&self.desired.table, &self.desired.view, &families) {
            Ok(flows) => report.flows_deleted += flows,
            // The servers are right all the same; flows that go on wrongly lose a datagram, or end by themselves.
            Err(error) => tracing::warn!(%error, "stale UDP flows could not be deleted"),
        }
    }

    /// Looks whether connections have ended of the servers that wait for it.
    fn look_at_draining(&mut self, report: &mut Report) -> Result<()> {
        self.drained = Instant::now();
        let servers: BTreeSet<ServerKey> = self.draining.keys().map(|(key, ..)| *key).collect();
        for key in &servers {
            self.write_server(key, report)?;
        }
        self.forget(&servers);
        Ok(())
    }
}

/// The kernel says "no such file" when it has no scheduler of that name.
fn no_scheduler(error: io::Error) -> io::Error {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => io::ErrorKind::Unsupported.into(),
        _ => error,
    }
}

/// The services that changes are about.
fn services(changes: &[TableChange]) -> impl Iterator<Item = ServiceId> {
    changes.iter().filter_map(|change| match change {
        TableChange::Set(id, _) => Some(id.service),
        TableChange::Frontend(_, frontend) => Some(frontend.service),
        _ => None,
    })
}

fn failed(operation: &'static str, object: String, source: io::Error) -> Error {
    Error::Io { operation, object, source }
}

impl Writer for IpvsWriter {
    fn name(&self) -> &'static str {
        "ipvs"
    }

    fn supports(&self, feature: Feature) -> Result<(), Unsupported> {
        let why = match feature {
            Feature::Affinity
            | Feature::SourceRanges
            | Feature::Sctp
            | Feature::UndefinedPorts
            | Feature::Hairpin
            | Feature::Counters => return Ok(()),
            Feature::Maglev if self.scheduler == Scheduler::MAGLEV => return Ok(()),
            Feature::Maglev => "the scheduler hashes otherwise; choose --ipvs-scheduler mh",
            Feature::SocketTranslation => "it translates packets; choose --service-mode ebpf",
            Feature::DirectServerReturn => {
                "endpoints would have to hold the service's address themselves; choose --service-mode ebpf"
            }
            Feature::LoopbackNodePorts => {
                "the kernel does not translate packets from 127.0.0.0/8 or ::1 to other machines; use an address of \
                 the node"
            }
        };
        Err(Unsupported { mechanism: "ipvs", feature, why })
    }

    fn sync(&mut self, full: &ServiceTable, view: &NodeView) -> Result<Report> {
        if view.node_port_addresses.iter().any(IpAddr::is_loopback) {
            self.supports(Feature::LoopbackNodePorts)?;
        }
        let mut report = Report::default();
        self.desired = Desired::new(full, view);
        self.open()?;
        if let Some(kernel) = self.kernel.as_mut() {
            self.sysctls = device::set_parameters(&mut kernel.netlink, &view.addresses)?;
        }
        for sysctl in &self.sysctls {
            tracing::info!(
                path = sysctl.path,
                was = sysctl.was,
                now = sysctl.now,
                "kernel parameter changed for IPVS"
            );
        }
        self.reconcile(&mut report)?;
        self.clean_flows(self.desired.table.services.keys().copied(), &mut report);
        Ok(report)
    }

    fn apply(&mut self, changes: &[TableChange]) -> Result<Report> {
        if self.kernel.is_none() {
            return Err(Error::NotSynced("ipvs"));
        }
        let mut report = Report::default();
        let touched = self.desired.apply(changes);
        if self.dirty {
            self.reconcile(&mut report)?;
            self.clean_flows(self.desired.table.services.keys().copied(), &mut report);
            return Ok(report);
        }
        self.dirty = true;
        self.execute(touched, &mut report)?;
        self.clean_flows(services(changes), &mut report);
        if !self.draining.is_empty() && self.drained.elapsed() > DRAIN_LOOK {
            self.look_at_draining(&mut report)?;
        }
        self.dirty = false;
        Ok(report)
    }

    fn audit(&mut self) -> Result<AuditReport> {
        if self.kernel.is_none() {
            return Err(Error::NotSynced("ipvs"));
        }
        let mut audit = AuditReport::default();
        let expected = std::mem::take(&mut self.written);
        let rules = std::mem::take(&mut self.rules);
        self.dirty = true;
        // The device may have been deleted, and its number with it.
        if let Some(kernel) = self.kernel.as_mut() {
            let device = device::ensure(&mut kernel.netlink)?;
            if std::mem::replace(&mut kernel.device, device) != device {
                audit.missing.push(format!("device {}", device::DEVICE));
            }
        }
        let strange = self.read_kernel()?;
        if self.rules != rules {
            audit.missing.push(format!("rules of the nftables table inet {}", rules::TABLE));
        }
        let (missing, foreign) = state::compare(&expected, &self.written);
        audit.missing = lines(audit.missing.into_iter().chain(missing));
        audit.foreign = lines(strange.into_iter().chain(foreign));
        self.reconcile(&mut audit.report)?;
        self.look_at_draining(&mut audit.report)?;
        Ok(audit)
    }

    fn remove(&mut self) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        let own = rules::own_servers();
        if !own.is_empty() && crate::foreign::detect::ipvs_is_loaded() {
            let mut ipvs = Ipvs::open().map_err(|e| failed("open", "IPVS".into(), e))?;
            for key in own {
                if ipvs
                    .delete_server(&key)
                    .map_err(|e| failed("delete virtual server", key.to_string(), e))?
                {
                    removed.push(format!("IPVS virtual server {key}"));
                }
            }
            removed.sort();
        }
        if rules::delete()? {
            removed.push(format!("nftables table inet {}", rules::TABLE));
        }
        let mut netlink = Netlink::open().map_err(|e| device::io("open", "netlink socket".into(), e))?;
        let found = netlink.link_by_name(device::DEVICE);
        if let Some(link) = found.map_err(|e| device::io("find", device::DEVICE.into(), e))? {
            netlink.delete_link(link.index).map_err(|e| device::io("delete", device::DEVICE.into(), e))?;
            removed.push(format!("device {}", device::DEVICE));
        }
        self.kernel = None;
        self.written = State::default();
        self.stale.clear();
        self.draining.clear();
        self.dirty = true;
        Ok(removed)
    }

    fn counters(&mut self) -> Result<Vec<ServiceCounters>> {
        let desired = &self.desired;
        let kernel = self.kernel.as_mut().ok_or(Error::NotSynced("ipvs"))?;
        let mut by_service: BTreeMap<ServiceId, u64> = BTreeMap::new();
        let servers = kernel.ipvs.servers_with(desired.server_keys().copied());
        for server in servers.map_err(|e| failed("list", "virtual servers".into(), e))? {
            if let Some(wanted) = desired.server(&server.key) {
                *by_service.entry(wanted.service).or_default() += server.connections;
            }
        }
        Ok(by_service
            .into_iter()
            .map(|(service, connections)| ServiceCounters { service, connections })
            .collect())
    }
}
