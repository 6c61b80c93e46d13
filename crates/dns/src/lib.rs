//! Cluster DNS: messages, and the zone that Services, EndpointSlices, pods and namespaces make.
//!
//! Pure: no I/O, no clock, no threads. [`wire::read`] takes a packet, [`zone::Zone::answer`] writes what it can say
//! into a [`wire::Reply`].

pub mod name;
pub mod wire;
pub mod zone;
