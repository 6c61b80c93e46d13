//! Writers that put a [`ServiceTable`] into the kernel by means other than eBPF, and readers of what other service
//! proxies left there.
//!
//! Every writer works in the network namespace of the thread that calls it, touches nothing that is not marked as
//! Podway's own, and keeps in memory what it wrote, so that a change costs the change. None of them decides
//! anything: precedence, topology and readiness are settled in the table.
//!
//! - [`nft`]: nftables over netlink.
//! - [`iptables`]: `iptables-restore` and `ip6tables-restore`, of the legacy and the nf_tables kind.
//! - [`conntrack`]: stale UDP flows, for every writer that translates by connection tracking.

pub mod conntrack;
pub mod foreign;
pub mod iptables;
pub mod ipvs;
mod netlink;
pub mod nft;
mod writer;

pub use podway_services::ServiceTable;
pub use writer::{
    AUDIT_LINES, AuditReport, Error, Feature, Refused, Report, Result, ServiceCounters, Unsupported, Writer,
    object_name,
};

/// The mark bit that means "the node's address replaces the source of this packet" between the hook that chooses the
/// backend and the one that rewrites the source. It is cleared there.
pub const MASQUERADE_MARK: u32 = 0x0080_0000;
