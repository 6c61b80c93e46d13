//! Services, EndpointSlices and Nodes compiled to one [`table`], from which every writer programs its mechanism.
//!
//! Pure: no I/O, no clock, no kernel types. Everything that has precedence (traffic policies, topology, readiness
//! and its fall-backs, which object owns an address) is decided here, so that a writer only translates.

pub mod table;
