//! The mechanisms that serve a table, behind one face.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use podway_bpf_host::{ApplyReport, Datapath, MapFill, ServiceWriter};
use podway_link::{Netlink, Netns};
use podway_proxy_rules::{Report, Writer};
use podway_services::ServiceTable;
use podway_services::table::{NodeView, Protocol, ServiceId, SetId, TableChange};
use tracing::{debug, info, warn};

/// Between two searches for datagram sockets whose backend has gone: it looks at every process of the node.
const SOCKETS_EVERY: Duration = Duration::from_millis(500);

/// Why a mechanism did not do what it was told. What was there before is in force.
#[derive(Debug, thiserror::Error)]
pub(super) enum KernelError {
    /// Programs and tables of eBPF.
    #[error(transparent)]
    Ebpf(#[from] podway_bpf_host::Error),
    /// Rules of other mechanisms.
    #[error(transparent)]
    Rules(#[from] podway_proxy_rules::Error),
    /// There is nothing to attach socket programs to.
    #[error(
        "no unified hierarchy of control groups is mounted; mount one (mount -t cgroup2 none DIR) and give --cgroup DIR"
    )]
    NoCgroup,
}

/// What one write did.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) written: usize,
    pub(super) removed: usize,
    /// Services that are not as they should be, and why.
    pub(super) refused: Vec<Refused>,
}

/// A service that the mechanism refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Refused {
    /// Namespace and name, when known.
    pub(super) service: Option<(String, String)>,
    pub(super) cause: String,
}

/// What is counted for one service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) connections: u64,
    pub(super) refused: u64,
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

/// One mechanism. Works in the network namespace of the thread that calls it.
pub(super) trait Kernel: Send {
    /// As `--service-mode` spells it.
    fn name(&self) -> &'static str;

    /// Makes the kernel hold exactly this table.
    fn sync(&mut self, table: &ServiceTable, view: &NodeView) -> Result<Outcome, KernelError>;

    /// Writes changes of the table, which has them already.
    fn apply(&mut self, table: &ServiceTable, changes: &[TableChange]) -> Result<Outcome, KernelError>;

    /// Looks whether somebody else changed what is there, puts it right, and says what it was.
    fn audit(&mut self, table: &ServiceTable, view: &NodeView)
    -> Result<(Vec<String>, Outcome), KernelError>;

    /// What is to be done between changes.
    fn idle(&mut self) {}

    /// Removes everything of it.
    fn remove(&mut self) -> Result<Vec<String>, KernelError>;

    /// Counters by service.
    fn counters(&mut self) -> Vec<(ServiceId, Counts)>;

    /// Tables that can become full.
    fn fill(&self) -> Vec<MapFill> {
        Vec::new()
    }
}

/// Programs and tables of eBPF.
pub(super) struct Ebpf {
    datapath: Arc<Datapath>,
    cgroup: PathBuf,
    writer: ServiceWriter,
    /// Datagram sockets may be connected to a backend that has gone.
    stale_sockets: bool,
    searched: Option<Instant>,
    cannot_search: bool,
}

impl Ebpf {
    /// Opens the tables; what is in them is adopted.
    ///
    /// # Errors
    /// A table is missing.
    pub(super) fn open(datapath: Arc<Datapath>, cgroup: Option<&Path>) -> Result<Self, KernelError> {
        let cgroup = cgroup.map(Path::to_owned).or_else(unified_hierarchy).ok_or(KernelError::NoCgroup)?;
        let writer = datapath.services()?;
        Ok(Self { datapath, cgroup, writer, stale_sockets: false, searched: None, cannot_search: false })
    }

    /// Closes datagram sockets of this node and its pods whose backend has gone.
    fn search_sockets(&mut self) {
        if !self.stale_sockets || self.searched.is_some_and(|at| at.elapsed() < SOCKETS_EVERY) {
            return;
        }
        self.stale_sockets = false;
        self.searched = Some(Instant::now());
        let begun = Instant::now();
        let mut closed = 0;
        match self.writer.destroy_stale_sockets() {
            Ok(count) => closed += count,
            Err(error) if self.cannot_search => debug!(%error, "stale sockets"),
            Err(error) => {
                warn!(%error, "datagram sockets of backends that are gone stay connected to them");
                self.cannot_search = true;
                return;
            }
        }
        let pods = Netlink::open().and_then(|mut netlink| netlink.peer_namespaces());
        match pods {
            Ok(pods) => {
                for pod in pods.values() {
                    closed += self.search_in(pod);
                }
            }
            Err(error) => debug!(%error, "the pods' namespaces cannot be listed"),
        }
        if closed > 0 {
            info!(closed, took = ?begun.elapsed(), "closed datagram sockets whose backend is gone");
        }
    }

    fn search_in(&self, pod: &Netns) -> usize {
        match pod.run(|| self.writer.destroy_stale_sockets()) {
            Ok(Ok(count)) => count,
            Ok(Err(error)) => {
                debug!(%error, "stale sockets of a pod");
                0
            }
            Err(error) => {
                debug!(%error, "a pod's namespace cannot be entered");
                0
            }
        }
    }
}

/// Where the unified hierarchy of control groups is mounted.
fn unified_hierarchy() -> Option<PathBuf> {
    // proc_pid_mountinfo(5): the mount point is the fifth field, the type follows a lone dash.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        (tail.split(' ').next() == Some("cgroup2")).then_some(())?;
        head.split(' ').nth(4).map(PathBuf::from)
    })
}

impl From<ApplyReport> for Outcome {
    fn from(report: ApplyReport) -> Self {
        let refused = report.refused.into_iter().map(|r| Refused {
            service: r.service.map(|m| (m.namespace.to_string(), m.name.to_string())),
            cause: format!("{}: a table of services in the kernel is full", r.what),
        });
        Self { written: report.written, removed: report.removed, refused: refused.collect() }
    }
}

impl Kernel for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn sync(&mut self, table: &ServiceTable, view: &NodeView) -> Result<Outcome, KernelError> {
        let node = self.writer.set_node(view)?;
        let full = ServiceTable::diff(&ServiceTable::new(), table);
        let mut outcome = Outcome::from(self.writer.sync(&full)?);
        outcome.written += node.written;
        outcome.removed += node.removed;
        // With the tables as they should be: the hooks read them from the first packet on.
        if !self.datapath.sockets_are_attached(&self.cgroup) {
            self.datapath.attach_sockets(&self.cgroup)?;
        }
        self.stale_sockets = true;
        Ok(outcome)
    }

    fn apply(&mut self, table: &ServiceTable, changes: &[TableChange]) -> Result<Outcome, KernelError> {
        let report = self.writer.apply(changes)?;
        let datagrams = |id: &ServiceId| table.services.get(id).is_none_or(|m| m.protocol == Protocol::Udp);
        if report.backends_gone > 0
            && changes.iter().any(|c| match c {
                TableChange::Set(SetId { service, .. }, _) | TableChange::ServiceGone(service) => {
                    datagrams(service)
                }
                _ => false,
            })
        {
            self.stale_sockets = true;
        }
        Ok(report.into())
    }

    fn audit(&mut self, _: &ServiceTable, _: &NodeView) -> Result<(Vec<String>, Outcome), KernelError> {
        let mut found = Vec::new();
        if !self.datapath.sockets_are_attached(&self.cgroup) {
            found.push(format!("the socket programs of {}", self.cgroup.display()));
            self.datapath.attach_sockets(&self.cgroup)?;
        }
        Ok((found, Outcome::default()))
    }

    fn idle(&mut self) {
        self.search_sockets();
    }

    fn remove(&mut self) -> Result<Vec<String>, KernelError> {
        let mut removed = Vec::new();
        if self.datapath.sockets_are_attached(&self.cgroup) {
            removed.push("socket programs".to_owned());
        }
        self.datapath.detach_sockets()?;
        let report = self.writer.sync(&[])?;
        if report.removed > 0 {
            removed.push(format!("{} entries of the tables of services", report.removed));
        }
        Ok(removed)
    }

    fn counters(&mut self) -> Vec<(ServiceId, Counts)> {
        let all = self.writer.counters().into_iter();
        all.map(|c| {
            let counts =
                Counts { connections: c.connections, refused: c.refused, packets: c.packets, bytes: c.bytes };
            (c.id, counts)
        })
        .collect()
    }

    fn fill(&self) -> Vec<MapFill> {
        self.writer.fill()
    }
}

/// Rules of nftables, iptables or IPVS.
pub(super) struct Rules(Box<dyn Writer>);

impl Rules {
    pub(super) fn new(writer: impl Writer + 'static) -> Self {
        Self(Box::new(writer))
    }
}

fn outcome(report: Report, table: &ServiceTable) -> Outcome {
    let refused = report.refused.into_iter().map(|r| Refused {
        service: table.services.get(&r.service).map(|m| (m.namespace.to_string(), m.name.to_string())),
        cause: format!("{}: {}", r.object, r.cause),
    });
    Outcome { written: report.written, removed: report.removed, refused: refused.collect() }
}

impl Kernel for Rules {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn sync(&mut self, table: &ServiceTable, view: &NodeView) -> Result<Outcome, KernelError> {
        Ok(outcome(self.0.sync(table, view)?, table))
    }

    fn apply(&mut self, table: &ServiceTable, changes: &[TableChange]) -> Result<Outcome, KernelError> {
        Ok(outcome(self.0.apply(changes)?, table))
    }

    fn audit(&mut self, table: &ServiceTable, _: &NodeView) -> Result<(Vec<String>, Outcome), KernelError> {
        let found = self.0.audit()?;
        let missing = found.missing.into_iter().map(|line| format!("missing: {line}"));
        let foreign = found.foreign.into_iter().map(|line| format!("not from us: {line}"));
        Ok((missing.chain(foreign).collect(), outcome(found.report, table)))
    }

    fn remove(&mut self) -> Result<Vec<String>, KernelError> {
        Ok(self.0.remove()?)
    }

    fn counters(&mut self) -> Vec<(ServiceId, Counts)> {
        // A mechanism that does not count has no counters to show.
        let all = self.0.counters().unwrap_or_default().into_iter();
        all.map(|c| (c.service, Counts { connections: c.connections, ..Counts::default() })).collect()
    }
}
