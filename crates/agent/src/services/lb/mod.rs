//! Addresses for Services of type LoadBalancer: given from pools, written to the Services' status, and answered for on
//! the node network by ARP and neighbour discovery.
//!
//! ```text
//!   Services, EndpointSlices, Nodes ─▶ board ─▶ controller (one in the cluster, by a Lease) ─▶ plan ─▶ Services
//!                                        └────▶ announcer (every node) ─▶ addresses of the uplink
//! ```
//!
//! - The plan is a pure function of what the API server has; there is no state beside it.
//! - Which node answers for an address is an annotation on the Service. The node gives its uplink the address, for a
//!   limited time that it renews: the kernel answers, also while the agent is being replaced, and stops when the agent
//!   is gone for good. The services' rules take the packets before the node's own sockets see them.
//! - While the API server is away, everybody goes on with what is known.

mod announcer;
mod board;
mod controller;
mod lease;
mod plan;
#[cfg(test)]
mod plan_tests;
mod pool;
mod service;

pub(crate) use announcer::Announcer;
pub(crate) use board::{Board, SliceNodes};
pub(crate) use controller::{Controller, PoolUse};
pub(crate) use pool::Pool;
pub(crate) use service::{LbService, ObjectName};
