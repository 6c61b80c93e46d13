//! Whole clusters in network namespaces on one machine.

pub mod manifest;
pub mod standin;
