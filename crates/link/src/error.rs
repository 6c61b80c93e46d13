//! The error of every operation of this crate: what was tried, on what, and what the kernel said.

use std::io;

use nix::errno::Errno;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on the kernel's network configuration did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused a netlink request.
    #[error("{operation} {object}: {errno}{}", detail.as_ref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Kernel {
        /// What was tried, e.g. `create veth`.
        operation: &'static str,
        /// On what, e.g. `link pw0123456789ab`.
        object: String,
        /// The kernel's error number.
        errno: Errno,
        /// The kernel's own words (NETLINK_EXT_ACK), when it had any.
        detail: Option<String>,
    },
    /// A system call or a file operation failed.
    #[error("{operation} {object}: {source}")]
    Io {
        /// What was tried, e.g. `open network namespace`.
        operation: &'static str,
        /// On what, e.g. a path.
        object: String,
        /// The cause.
        source: io::Error,
    },
    /// The answer of the kernel could not be understood.
    #[error("{operation} {object}: unexpected answer from the kernel: {cause}")]
    Answer {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What was wrong with the answer.
        cause: String,
    },
    /// The caller asked for something that cannot be.
    #[error("{operation} {object}: {cause}")]
    Invalid {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// Which field is wrong, why, and what would be right.
        cause: String,
    },
}

impl Error {
    pub(crate) fn io(
        operation: &'static str,
        object: impl Into<String>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Io { operation, object: object.into(), source: source.into() }
    }

    pub(crate) fn invalid(
        operation: &'static str,
        object: impl Into<String>,
        cause: impl Into<String>,
    ) -> Self {
        Self::Invalid { operation, object: object.into(), cause: cause.into() }
    }

    pub(crate) fn answer(
        operation: &'static str,
        object: impl Into<String>,
        cause: impl Into<String>,
    ) -> Self {
        Self::Answer { operation, object: object.into(), cause: cause.into() }
    }

    /// The error number of the kernel, where there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Kernel { errno, .. } => Some(*errno),
            Self::Io { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Answer { .. } | Self::Invalid { .. } => None,
        }
    }

    /// True when the object that was named is not there (any more).
    pub fn is_not_found(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO | Errno::ESRCH))
            || matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// True when an object of that name is already there.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EEXIST)
            || matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
    }

    /// True when the process lacks a capability (`CAP_NET_ADMIN`, `CAP_SYS_ADMIN`).
    pub fn is_permission(&self) -> bool {
        matches!(self.errno(), Some(Errno::EPERM | Errno::EACCES))
    }
}
