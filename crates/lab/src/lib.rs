//! Whole clusters in network namespaces on one machine.

pub mod apply;
pub mod cgroup;
pub mod check;
pub mod client;
pub mod down;
pub mod etc;
mod events;
pub mod exec;
pub mod manifest;
pub mod observe;
pub mod pod_exec;
mod runner;
pub mod spec;
pub mod standin;
pub mod state;
pub mod supervisor;
pub mod topology;
pub mod up;
