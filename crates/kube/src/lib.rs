//! The way to a Kubernetes API server: objects in as raw JSON, events out.
//!
//! This room knows how to reach a server, how to keep a list of objects current ([`watch`]), how to read and
//! write single objects ([`objects`]) and how to write Kubernetes Events ([`events`]). It takes no decision about what the objects mean: an object leaves here as a
//! [`serde_json::Value`], and whoever parses it answers for its own malformed objects. One object that no
//! schema would accept therefore costs nobody else anything.
//!
//! May use the network and tokio. Never touches the kernel's network configuration, files other than the
//! credentials it is pointed at, or any cluster state of its own.

mod client;
mod error;
pub mod events;
pub mod objects;
mod raw;
#[cfg(test)]
mod testserver;
pub mod watch;

pub use client::{Client, Credentials};
pub use error::Error;
pub use raw::Kind;
