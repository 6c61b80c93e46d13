//! Errors: what was attempted, on what, and what the kernel said.

use std::{error::Error as StdError, io, path::Path};

use aya::maps::MapError;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on the datapath failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The binary was built without the kernel object.
    #[error("this build of podway holds no kernel object; build it with `make build`")]
    NoKernelObject,
    /// The embedded object lacks something that this code expects.
    #[error(
        "the kernel object has no {what} {name}: object and binary are of different versions; rebuild both"
    )]
    Missing {
        /// Map or program.
        what: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// The kernel refused a program or map at load.
    #[error("cannot load {what} into the kernel: {source}")]
    Load {
        /// Program or object.
        what: String,
        /// The loader's error, with the verifier's log when there is one.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A program could not be attached or detached.
    #[error("cannot {operation} {hook} on interface {interface}: {source}")]
    Attach {
        /// Attach or detach.
        operation: &'static str,
        /// Program.
        hook: &'static str,
        /// Interface name or index.
        interface: String,
        /// The loader's error.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A map could not be read or written.
    #[error("map {map}: {source}{}", full_hint(source))]
    Map {
        /// Name of the map.
        map: &'static str,
        /// The kernel's answer.
        source: Box<MapError>,
    },
    /// An endpoint that cannot be programmed.
    #[error("endpoint on interface {ifindex} {cause}")]
    BadEndpoint {
        /// Interface index of the host side.
        ifindex: u32,
        /// What is wrong.
        cause: String,
    },
    /// A peer prefix that cannot be programmed.
    #[error("peer prefix {prefix} {cause}")]
    BadPeer {
        /// The prefix.
        prefix: String,
        /// What is wrong.
        cause: &'static str,
    },
    /// File operations.
    #[error("cannot {operation} {path}: {source}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn load(what: &str, source: impl StdError + Send + Sync + 'static) -> Self {
        Self::Load { what: what.to_owned(), source: Box::new(source) }
    }

    pub(crate) fn map(map: &'static str, source: MapError) -> Self {
        Self::Map { map, source: Box::new(source) }
    }

    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.display().to_string(), source }
    }
}

impl From<MapError> for Error {
    fn from(source: MapError) -> Self {
        Self::load("a map", source)
    }
}

/// E2BIG is the kernel's word for a full hash map, ENOSPC for a full trie.
fn full_hint(error: &MapError) -> &'static str {
    let MapError::SyscallError(call) = error else { return "" };
    match call.io_error.raw_os_error() {
        Some(e) if e == nix::libc::E2BIG || e == nix::libc::ENOSPC => " (the table is full)",
        _ => "",
    }
}
