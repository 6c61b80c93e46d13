//! What can go wrong on the way to the API server, with what to look at next.

use std::path::PathBuf;

/// A failure to reach or to understand the API server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig file cannot be read or is not one.
    #[error("kubeconfig {}: {source}; check --kubeconfig", path.display())]
    Kubeconfig {
        /// The file that was asked for.
        path: PathBuf,
        /// Why it was refused.
        source: Box<kube::config::KubeconfigError>,
    },
    /// The process does not look as if it ran in a pod with a service account.
    #[error("in-cluster credentials: {source}; run with a service account or pass --kubeconfig")]
    InCluster {
        /// Which part is missing.
        source: Box<kube::config::InClusterError>,
    },
    /// The HTTP client could not be built from the credentials (a bad certificate, for example).
    #[error("API client for {server}: {source}")]
    Client {
        /// Address of the API server.
        server: String,
        /// Why the client could not be built.
        source: Box<kube::Error>,
    },
    /// A request failed.
    #[error("{what}: {source}")]
    Request {
        /// Verb and object, for example `list nodes`.
        what: String,
        /// What the client or the server said.
        source: Box<kube::Error>,
    },
    /// The server said nothing in time.
    #[error("the API server has not answered for {seconds} s; check the way to it, and whether it runs")]
    Silent {
        /// How long it was waited for.
        seconds: u64,
    },
    /// Names that make no path.
    #[error("{0:?} is no path of an object")]
    Path(String),
}

impl Error {
    /// The HTTP status that the server answered with, when it answered.
    #[must_use]
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Request { source, .. } => match &**source {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            _ => None,
        }
    }
}
