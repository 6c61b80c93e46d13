//! Whole clusters in network namespaces on one machine, made from unchanged manifests.
//!
//! ```text
//!   manifest ─▶ apply ──HTTP──▶ ┌ supervisor, one process per lab ──────────────────────────────┐
//!   observe, check ◀──HTTP───── │ API server (podway-apiserver)                                 │
//!                               │   ▲ controllers (podway-workloads, pure)                      │
//!                               │   ▲ agents: one process per node ─▶ the node's Ready condition │
//!                               │   ▲ runner: a pod is a namespace, the CNI plugin, stand-ins   │
//!                               └───────────────────────────────────────────────────────────────┘
//!   topology: a fabric namespace with a bridge; a namespace per node with one link to it
//! ```
//!
//! - [`spec`]: options, and every name, path and address that follows from them.
//! - [`manifest`], [`apply`]: documents to objects, objects into the lab.
//! - [`topology`], [`cgroup`], [`state`]: the wire, the processes' places, the files.
//! - [`supervisor`] and its runner: the process that is the lab.
//! - [`standin`], [`pod_exec`], [`etc`]: what runs in pods, how it gets there, which files it sees.
//! - [`observe`], [`paths`], [`history`], [`logs`], [`check`], [`exec`](mod@exec): looking at a lab and working in it.
//! - [`roll`], [`readiness`], [`nodes`], [`faults`] with [`delay`]: what people do to running workloads,
//!   nodes and links.
//! - [`up`], [`down`](mod@down): making it and removing it without a trace.
//!
//! A lab has no leg on the machine's network. Everything of it is found by the lab's name alone, so that it can
//! be removed after any crash.

pub mod apply;
pub mod cgroup;
pub mod check;
pub mod client;
pub mod delay;
pub mod down;
pub mod etc;
mod events;
pub mod exec;
pub mod faults;
pub mod history;
pub mod logs;
pub mod manifest;
pub mod nodes;
pub mod observe;
pub mod paths;
pub mod pod_exec;
pub mod readiness;
pub mod roll;
mod runner;
pub mod spec;
pub mod standin;
pub mod state;
pub mod supervisor;
pub mod topology;
pub mod up;
