//! Whole clusters in network namespaces on one machine.

pub mod cgroup;
pub mod down;
pub mod etc;
pub mod manifest;
pub mod pod_exec;
pub mod spec;
pub mod standin;
pub mod state;
pub mod topology;
