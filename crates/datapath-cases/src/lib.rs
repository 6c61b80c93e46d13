//! One table of cases for the datapath, run in every host that the decisions have: hash maps, the kernel's
//! test runs, and real devices.
//!
//! A case is a packet at a hook of a small fixed cluster ([`world`]) and what must happen to it. The hosts
//! share the cases and nothing else.

pub mod cases;
pub mod frames;
pub mod host;
pub mod sequences;
pub mod services;
pub mod world;

pub use cases::{At, Case, Expect, all};
pub use host::{HostEnv, HostTables, PacketBytes};
