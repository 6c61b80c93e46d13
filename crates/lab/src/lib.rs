//! Whole clusters in network namespaces on one machine.

pub mod cgroup;
pub mod etc;
pub mod manifest;
pub mod pod_exec;
pub mod spec;
pub mod standin;
