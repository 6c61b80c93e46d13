//! One connection pool to one API server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Error;

/// Where the address of the API server and the credentials come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A kubeconfig file; its current context is used.
    Kubeconfig(PathBuf),
    /// The service account of the pod that this process runs in.
    InCluster,
}

/// How long a TCP (and TLS) handshake with the API server may take. Short, because an agent with a dead
/// server has other servers behind the same name or a remembered state to serve from.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a response may stay silent. Longer than a watch lasts ([`crate::watch::WATCH_TIMEOUT`]), so it only
/// ends connections whose other side is gone.
const READ_TIMEOUT: Duration = Duration::from_secs(crate::watch::WATCH_TIMEOUT as u64 + 15);

/// How long the answer to [`Client::ping`] may take.
const PING_TIMEOUT: Duration = Duration::from_secs(4);

/// A client of one API server. Cheap to clone; all clones share the connections.
#[derive(Clone)]
pub struct Client {
    inner: kube::Client,
    server: String,
}

impl Client {
    /// Reads the credentials and builds a client. Does not speak to the server yet, so that an agent can start
    /// while the server is away.
    ///
    /// # Errors
    /// The kubeconfig or the service account cannot be read, or holds a certificate that is not one.
    pub async fn new(credentials: &Credentials) -> Result<Self, Error> {
        match credentials {
            Credentials::Kubeconfig(path) => Self::in_context(Some(path), None).await,
            Credentials::InCluster => {
                let config = kube::Config::incluster()
                    .map_err(|source| Error::InCluster { source: Box::new(source) })?;
                Self::with(config)
            }
        }
    }

    /// For people's commands: a context of a kubeconfig by name, or its current one. Without a path those files that
    /// `$KUBECONFIG` lists, else `~/.kube/config`.
    ///
    /// # Errors
    /// The files cannot be read, have no such context, or hold a certificate that is not one.
    pub async fn in_context(path: Option<&Path>, context: Option<&str>) -> Result<Self, Error> {
        let wrap = |source| Error::Kubeconfig {
            path: path.unwrap_or(Path::new("of $KUBECONFIG or ~/.kube/config")).to_owned(),
            source: Box::new(source),
        };
        let read = |path| match path {
            Some(path) => kube::config::Kubeconfig::read_from(path),
            None => kube::config::Kubeconfig::read(),
        };
        let file = read(path).map_err(wrap)?;
        let options =
            kube::config::KubeConfigOptions { context: context.map(str::to_owned), ..Default::default() };
        Self::with(kube::Config::from_custom_kubeconfig(file, &options).await.map_err(wrap)?)
    }

    fn with(mut config: kube::Config) -> Result<Self, Error> {
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        // Retries belong to the callers here: they know what may be repeated and what to tell meanwhile.
        config.default_retry = false;
        let server = config.cluster_url.to_string();
        let inner = kube::Client::try_from(config)
            .map_err(|source| Error::Client { server: server.clone(), source: Box::new(source) })?;
        Ok(Self { inner, server })
    }

    /// The server's address, for messages.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Host and port of the server: what a resolver takes.
    #[must_use]
    pub fn host(&self) -> Option<(String, u16)> {
        let uri: http::Uri = self.server.parse().ok()?;
        // Addresses of IPv6 are in brackets there (RFC 3986 section 3.2.2).
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']').to_owned();
        let default = if uri.scheme_str() == Some("http") { 80 } else { 443 };
        Some((host, uri.port_u16().unwrap_or(default)))
    }

    /// Asks the server for its version: the cheapest question that every authenticated client may ask.
    ///
    /// # Errors
    /// The server cannot be reached, refuses, or says nothing for four seconds.
    pub async fn ping(&self) -> Result<(), Error> {
        let request = http::Request::get("/version")
            .body(Vec::new())
            .expect("a constant path without headers makes a valid request");
        match tokio::time::timeout(PING_TIMEOUT, self.inner.request_text(request)).await {
            Err(_) => Err(Error::Silent { seconds: PING_TIMEOUT.as_secs() }),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(source)) => Err(Error::Request { what: "get /version".into(), source: Box::new(source) }),
        }
    }

    pub(crate) fn inner(&self) -> &kube::Client {
        &self.inner
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("server", &self.server).finish_non_exhaustive()
    }
}
