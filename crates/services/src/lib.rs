//! Services, EndpointSlices and Nodes compiled to one [`table`], from which every writer programs its mechanism.
//!
//! Pure: no I/O, no clock, no kernel types. Everything that has precedence (traffic policies, topology, readiness
//! and its fall-backs, which object owns an address) is decided here, so that a writer only translates.
//!
//! [`Compiler`] takes objects one by one and returns what changes; [`ServiceTable`] is what the changes add up to;
//! [`decide()`] says what the table means for a packet.

mod claims;
mod compiler;
mod decide;
mod findings;
mod ids;
mod lower;
pub mod maglev;
mod node_ports;
mod ranges;
mod report;
mod select;
mod service_table;
mod stale;
pub mod table;

pub use compiler::{Changes, Compiler, Work};
pub use decide::{Decision, Flow, Verdict, decide, frontend, origin};
pub use findings::Finding;
pub use lower::{HostPort, NotHandled};
pub use node_ports::NodePortAddresses;
pub use report::{
    EndpointReport, ExternalAddress, FrontendReport, HealthCheck, PortReport, ServiceReport, UnusedSlice,
};
pub use select::Choice;
pub use service_table::ServiceTable;
pub use stale::{TrackedFlow, is_stale};
pub use table::TableChange;
