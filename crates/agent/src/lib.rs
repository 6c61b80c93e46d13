//! Placeholder.
pub mod ids;
pub mod leases;
mod adoption {}
