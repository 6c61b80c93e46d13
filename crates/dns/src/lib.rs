//! Cluster DNS.
//!
//! Pure: no I/O, no clock, no threads.

pub mod name;
pub mod wire;
