//! Links, addresses, routes, neighbours, sysctls, network namespaces and path-MTU probing on Linux.
//!
//! This crate is the only place that speaks rtnetlink. Everything in it is synchronous: a request is
//! answered by the kernel before the call returns, which is what the short CNI path wants, and the callers
//! that are asynchronous put it on a blocking thread.
//!
//! It may touch the kernel's network configuration and `/run/netns`. It knows nothing of Kubernetes.
//!
//! - [`Netlink`]: one rtnetlink socket; links, addresses, routes, neighbours.
//! - [`Netns`]: an open network namespace, named namespaces, running code inside one.
//! - [`monitor`]: changes as they happen.
//! - [`announce`]: telling the neighbours on a link where an address is now.
//! - [`tap`]: links whose other end is a process.
//! - [`conntrack`]: tracked flows of the node's stack.
//! - [`sysctl`], [`snmp`]: the `/proc` side.
//! - [`probe`]: proof of the path MTU between two nodes.

pub mod announce;
pub mod conntrack;
mod error;
pub mod monitor;
mod netlink;
mod netns;
pub mod probe;
pub mod snmp;
mod socket;
pub mod sysctl;
pub mod tap;

pub use error::{Error, Result};
pub use netlink::{
    Address, AddressFlags, FoundTbf, Link, Neighbour, Netlink, Route, RouteFilter, RouteTo, Tbf, VethSpec,
    VxlanSpec,
};
pub use netns::{NETNS_DIR, Netns};

/// Routing protocol number that marks a route as Podway's own (`ip route show proto 80`).
///
/// The number is not assigned to anybody in `rtnetlink.h` or in iproute2's `rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 80;
