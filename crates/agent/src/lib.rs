//! The node agent: one process per node that gives pods their network and keeps it right.
//!
//! It composes the other crates and has as little logic of its own as possible:
//!
//! ```text
//!   container runtime ─▶ CNI plugin ─▶ cni_server ─▶ attach ─▶ links, programs, tables of one pod
//!                                                      │
//!                                                    leases ─▶ journal
//!   API server ─▶ Nodes ─▶ control ─▶ nodes (pure) ─▶ peers ─▶ datapath
//!   kernel ─▶ monitor ───────┘  │                      routes, tunnel, MTU ─▶ network
//!                               │                      masquerade ─▶ nft
//!                               └─▶ mtu_proof ─▶ probes between nodes ─▶ events, metrics
//! ```
//!
//! Everything that it puts into the kernel is named as its own, found again after a restart ([`adoption`]),
//! repaired when it is not right, and removed by [`cleanup()`]. Its death changes nothing for traffic. Faults are
//! tested by dying at a given step, see [`crash`].
//!
//! An agent works in the network namespace of the thread that calls [`run()`]; several may run on one machine,
//! in namespaces of their own, under different [`Instance`]s.

pub mod adoption;
pub mod attach;
pub mod clock;
pub mod cni_server;
pub mod config;
pub mod control;
pub mod crash;
pub mod events;
pub mod flows;
pub mod host_ports;
pub mod http;
pub mod ids;
pub mod leases;
pub mod logging;
pub mod masquerade;
pub mod metrics;
pub mod monitor;
pub mod mtu;
pub mod mtu_proof;
pub mod network;
pub mod nft;
pub mod nodes;
pub mod remembered;
pub mod repair;
pub mod run_dir;
pub mod services;
pub mod status;

mod cleanup;
mod run;

pub use cleanup::{CleanupError, CleanupReport, cleanup};
pub use config::{AgentConfig, ConfigError, ListenAddress, Masquerade, NetworkMode};
pub use ids::{BadInstance, Instance};
pub use logging::LogFormat;
pub use podway_kube::Credentials;
pub use run::{AgentError, run};
