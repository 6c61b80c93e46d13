//! The CNI plugin and its conversation with the agent.
//!
//! A container runtime starts the plugin for each operation (CNI specification 1.1.0, and down to 0.3.1). It
//! checks what the runtime says, opens the container's network namespace, hands all of it to the agent over a
//! unix socket and prints the agent's answer in the version the runtime asked for. It holds no state and
//! decides nothing: addresses, links and the datapath belong to the agent.
//!
//! The plugin runs once for each pod that starts or stops, so this crate stays small: no async runtime, no
//! command-line parser, no netlink.
//!
//! - [`plugin`]: the program.
//! - [`config`], [`runtime_config`], [`environment`]: what the runtime says, checked.
//! - [`result`](mod@result), [`error`]: what the runtime is told, for each version.
//! - [`protocol`]: the agent's socket, both sides.

pub mod config;
pub mod environment;
pub mod error;
pub mod plugin;
pub mod protocol;
pub mod result;
pub mod runtime_config;
pub mod version;

pub use config::NetConf;
pub use environment::Args;
pub use error::{CniError, code};
pub use result::{AddResult, Dns, Interface, IpConfig, Route};
pub use runtime_config::{Bandwidth, Limit, PortMapping, Protocol, RuntimeConfig};
pub use version::Version;
