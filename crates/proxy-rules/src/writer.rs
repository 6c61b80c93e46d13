//! What a writer is.

use std::{fmt, io, time::Duration};

use podway_services::table::{NodeView, ServiceId, ServiceMeta, TableChange};

use crate::ServiceTable;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a writer could not do its work. What the kernel refuses for single services is no such error: it is in
/// [`Report::refused`], and the other services are written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program that the writer drives is not there.
    #[error("cannot run {program}: {source}; install {package}, or choose another --service-mode")]
    Missing {
        /// The program.
        program: String,
        /// The Debian package that has it.
        package: &'static str,
        /// Why it did not start.
        source: io::Error,
    },
    /// The kernel has no such mechanism.
    #[error("this kernel has no {what} ({cause}); {advice}")]
    Kernel {
        /// What is missing.
        what: &'static str,
        /// What the kernel said.
        cause: String,
        /// What to do.
        advice: &'static str,
    },
    /// The node's configuration asks for what this mechanism cannot do.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The mechanism refused the whole of what was written; the state before it holds.
    #[error("{mechanism} refused {object}: {cause}")]
    Refused {
        /// The mechanism.
        mechanism: &'static str,
        /// What was being written.
        object: String,
        /// What it said.
        cause: String,
    },
    /// Talking to the kernel failed.
    #[error("{operation} of {object}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        object: String,
        /// Why it failed.
        source: io::Error,
    },
    /// [`Writer::apply`] or [`Writer::audit`] before the first [`Writer::sync`].
    #[error("the {0} writer was not given a whole table yet")]
    NotSynced(&'static str),
}

/// What not every mechanism can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Feature {
    /// Consistent hashing, so that every node chooses the same backend for a client.
    Maglev,
    /// Translation at the socket, once per connection.
    SocketTranslation,
    /// Answers that go from the backend's node to the client directly.
    DirectServerReturn,
    /// `sessionAffinity: ClientIP`.
    Affinity,
    /// `spec.loadBalancerSourceRanges`.
    SourceRanges,
    /// SCTP.
    Sctp,
    /// An immediate answer at ports of a service address that no service has.
    UndefinedPorts,
    /// Node ports at the loopback address.
    LoopbackNodePorts,
    /// Pods that reach themselves through their own Service.
    Hairpin,
    /// Counters of every service.
    Counters,
}

impl Feature {
    /// Every feature.
    pub const ALL: [Feature; 10] = [
        Feature::Maglev,
        Feature::SocketTranslation,
        Feature::DirectServerReturn,
        Feature::Affinity,
        Feature::SourceRanges,
        Feature::Sctp,
        Feature::UndefinedPorts,
        Feature::LoopbackNodePorts,
        Feature::Hairpin,
        Feature::Counters,
    ];
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Feature::Maglev => "consistent (Maglev) hashing",
            Feature::SocketTranslation => "translation at the socket",
            Feature::DirectServerReturn => "direct server return",
            Feature::Affinity => "session affinity",
            Feature::SourceRanges => "load balancer source ranges",
            Feature::Sctp => "SCTP",
            Feature::UndefinedPorts => "reject at undefined ports of service addresses",
            Feature::LoopbackNodePorts => "node ports at loopback addresses",
            Feature::Hairpin => "pods that reach themselves",
            Feature::Counters => "counters of every service",
        })
    }
}

/// A mechanism cannot do something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{mechanism} cannot do {feature}: {why}")]
pub struct Unsupported {
    /// [`Writer::name`].
    pub mechanism: &'static str,
    /// What it cannot do.
    pub feature: Feature,
    /// Why, and what to do instead.
    pub why: &'static str,
}

/// What one write did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Elements, rules or kernel objects added or changed.
    pub written: usize,
    /// Elements, rules or kernel objects deleted.
    pub removed: usize,
    /// Services that are as they were before, because the kernel refused what was to be written for them. They are
    /// tried again at the next [`Writer::sync`], [`Writer::audit`] or change of the service.
    pub refused: Vec<Refused>,
    /// Stale UDP flows that were deleted.
    pub flows_deleted: usize,
    /// How long the kernel and the programs that talk to it took.
    pub took: Duration,
}

/// One service that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Its number.
    pub service: ServiceId,
    /// Its name for messages, see [`object_name`].
    pub object: String,
    /// What the kernel said, and what to do.
    pub cause: String,
}

/// What an audit found. By the time it is returned everything in it is repaired, except for what is in
/// `report.refused`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Of ours, was not there. At most [`AUDIT_LINES`] lines, the last of which says how many more there were.
    pub missing: Vec<String>,
    /// Was in our place, and not from us; the same limit.
    pub foreign: Vec<String>,
    /// What was written to repair it.
    pub report: Report,
}

/// How many lines of one kind an [`AuditReport`] has at most.
pub const AUDIT_LINES: usize = 50;

impl AuditReport {
    /// Whether everything was as it should be.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.foreign.is_empty()
    }
}

/// Counters of one service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceCounters {
    /// Which service.
    pub service: ServiceId,
    /// Connections (flows) that were given a backend.
    pub connections: u64,
}

/// One mechanism that serves a [`ServiceTable`].
///
/// A writer holds a copy of the table. The order of calls: [`Writer::sync`] once, then any of them. It works in the
/// network namespace of the calling thread, which must be the same each time.
pub trait Writer: Send {
    /// The name as in `--service-mode`.
    fn name(&self) -> &'static str;

    /// Whether the mechanism can do something.
    ///
    /// # Errors
    /// It cannot; the error names mechanism, feature and reason.
    fn supports(&self, feature: Feature) -> Result<(), Unsupported>;

    /// Makes the kernel hold exactly this table: after a start (what is there is adopted and only the difference is
    /// written), and when the node's addresses or ranges changed. No packet sees a state in between.
    ///
    /// # Errors
    /// The mechanism is missing or refuses everything; what was there holds.
    fn sync(&mut self, full: &ServiceTable, view: &NodeView) -> Result<Report>;

    /// Writes changes; the work is in proportion to them.
    ///
    /// # Errors
    /// As [`Writer::sync`]. The changes are in the writer's copy of the table all the same: the next audit writes
    /// them.
    fn apply(&mut self, changes: &[TableChange]) -> Result<Report>;

    /// Looks whether the kernel still holds what was written, and repairs it.
    ///
    /// # Errors
    /// As [`Writer::sync`].
    fn audit(&mut self) -> Result<AuditReport>;

    /// Removes everything of ours and says what that was. Nothing to remove is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    fn remove(&mut self) -> Result<Vec<String>>;

    /// Counters of the services, of a mechanism that supports [`Feature::Counters`].
    ///
    /// # Errors
    /// The mechanism does not count by service, or reading failed.
    fn counters(&mut self) -> Result<Vec<ServiceCounters>>;
}

/// A service as messages name it: `namespace/name:port`, with the protocol.
pub fn object_name(meta: &ServiceMeta) -> String {
    let colon = if meta.port_name.is_empty() { "" } else { ":" };
    format!("{}/{}{colon}{} ({})", meta.namespace, meta.name, meta.port_name, meta.protocol)
}
