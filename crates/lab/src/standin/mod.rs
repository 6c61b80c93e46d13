//! The stand-in: what runs in place of a container's own program.
//!
//! It listens on every port that the container declares and answers with who and where it is, so that whoever
//! connects can tell which pod answered and which address that pod saw. On SIGTERM it behaves as a server that
//! is written well does: it goes on accepting for a moment, because endpoints take that long to leave the
//! load balancers, announces `Connection: close`, finishes what is open and exits with 0.
//!
//! Tens of these run on one machine: one thread, small buffers, a limit on connections.

mod answer;
mod tcp;
mod udp;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use tokio::sync::watch;

pub use answer::{Answer, HttpRequest, Identity};
pub(crate) use tcp::serve as serve_tcp;

/// `IPPROTO_SCTP`.
const IPPROTO_SCTP: i32 = 132;
/// Waiting connections per listener.
const BACKLOG: i32 = 128;

/// Transport of a container port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP (RFC 9260), where the kernel has it.
    Sctp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A port to listen on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// `containerPort`.
    pub port: u16,
    /// `protocol`.
    pub protocol: Protocol,
    /// `name`, empty when it has none.
    #[serde(default)]
    pub name: String,
}

/// What one stand-in is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    /// Who it says it is.
    pub identity: Identity,
    /// Where it listens.
    pub ports: Vec<Port>,
    /// Most open connections; further ones wait in the listener's backlog.
    pub max_connections: usize,
    /// How long it accepts new connections after SIGTERM, in milliseconds.
    pub drain_accept_ms: u64,
    /// How long it then waits for open requests, in milliseconds.
    pub drain_finish_ms: u64,
}

/// A port that could not be served although the stand-in runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unavailable {
    /// The port.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// Why.
    pub cause: String,
}

/// The one line of JSON that a stand-in writes to its standard output once it is up, or has failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// Every port is open, but for those that the kernel has no protocol for.
    Ready {
        /// Ports left out.
        unavailable: Vec<Unavailable>,
    },
    /// A port cannot be opened; the stand-in exits.
    Failed {
        /// Port and cause.
        message: String,
    },
}

/// Runs until SIGTERM. Returns the exit code of the process.
///
/// # Errors
/// When the runtime cannot be made or standard output is closed before the report.
pub fn run(config: Config) -> std::io::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let drain = Duration::from_millis(config.drain_accept_ms);
        let finish = Duration::from_millis(config.drain_finish_ms);
        let server = match Server::open(config) {
            Ok(server) => server,
            Err(message) => {
                report(&Report::Failed { message })?;
                return Ok(1);
            }
        };
        report(&Report::Ready { unavailable: server.unavailable.clone() })?;
        terminate.recv().await;
        server.drain(drain, finish).await;
        Ok(0)
    })
}

fn report(report: &Report) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}

/// How far a server is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(crate) enum Phase {
    /// Serving.
    Open,
    /// Serving, but every answer says `Connection: close`.
    Closing,
    /// Accepting nothing; open requests are finished.
    Closed,
}

/// What every listener and connection of one stand-in shares.
pub(crate) struct Shared {
    pub(crate) identity: Identity,
    pub(crate) connections: Arc<tokio::sync::Semaphore>,
    pub(crate) phase: watch::Receiver<Phase>,
}

struct Server {
    unavailable: Vec<Unavailable>,
    phase: watch::Sender<Phase>,
    connections: Arc<tokio::sync::Semaphore>,
    limit: usize,
}

impl Server {
    /// Opens every port and serves it in the background of the current runtime.
    fn open(config: Config) -> Result<Self, String> {
        let limit = config.max_connections.max(1);
        let connections = Arc::new(tokio::sync::Semaphore::new(limit));
        let (phase, receiver) = watch::channel(Phase::Open);
        let shared =
            Arc::new(Shared { identity: config.identity, connections: connections.clone(), phase: receiver });
        let mut unavailable = Vec::new();
        for port in &config.ports {
            let fail = |e: std::io::Error| match e.kind() {
                std::io::ErrorKind::AddrInUse => format!(
                    "{} port {} is taken by another container that shares this network namespace",
                    port.protocol, port.port
                ),
                _ => format!("{} port {}: {e}", port.protocol, port.port),
            };
            match listen(port.protocol, port.port) {
                Ok(Listener::Stream(socket)) => {
                    let listener = tokio::net::TcpListener::from_std(socket.into()).map_err(fail)?;
                    tokio::spawn(tcp::serve(listener, port.protocol, shared.clone()));
                }
                Ok(Listener::Datagram(socket)) => {
                    let socket = tokio::net::UdpSocket::from_std(socket.into()).map_err(fail)?;
                    tokio::spawn(udp::serve(socket, shared.clone()));
                }
                Err(e) if port.protocol == Protocol::Sctp && is_unsupported(&e) => {
                    unavailable.push(Unavailable {
                        port: port.port,
                        protocol: port.protocol,
                        cause: format!("this kernel has no SCTP ({e}); load the sctp module to have it"),
                    });
                }
                Err(e) => return Err(fail(e)),
            }
        }
        Ok(Self { unavailable, phase, connections, limit })
    }

    async fn drain(self, accept: Duration, finish: Duration) {
        // Nobody listens to the phase when there is no port; then there is nothing to drain either.
        let _ = self.phase.send(Phase::Closing);
        if self.phase.receiver_count() > 1 {
            tokio::time::sleep(accept).await;
        }
        let _ = self.phase.send(Phase::Closed);
        let all = u32::try_from(self.limit).unwrap_or(u32::MAX);
        let _ = tokio::time::timeout(finish, self.connections.acquire_many(all)).await;
    }
}

enum Listener {
    Stream(Socket),
    Datagram(Socket),
}

fn is_unsupported(e: &std::io::Error) -> bool {
    use nix::errno::Errno;
    [Errno::EPROTONOSUPPORT, Errno::ESOCKTNOSUPPORT, Errno::EAFNOSUPPORT]
        .iter()
        .any(|errno| e.raw_os_error() == Some(*errno as i32))
}

/// One socket for both families; IPv4 alone where the namespace has no IPv6.
fn listen(protocol: Protocol, port: u16) -> std::io::Result<Listener> {
    match open(protocol, SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)) {
        Err(e) if e.kind() == std::io::ErrorKind::AddrNotAvailable || is_unsupported(&e) => {
            open(protocol, SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))
        }
        other => other,
    }
}

fn open(protocol: Protocol, address: SocketAddr) -> std::io::Result<Listener> {
    let (kind, number) = match protocol {
        Protocol::Tcp => (Type::STREAM, SocketProtocol::TCP),
        Protocol::Udp => (Type::DGRAM, SocketProtocol::UDP),
        Protocol::Sctp => (Type::STREAM, SocketProtocol::from(IPPROTO_SCTP)),
    };
    let socket = Socket::new(Domain::for_address(address), kind, Some(number))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    if protocol != Protocol::Udp {
        // A restarted container must not wait for its predecessor's TIME_WAIT. On UDP the option would let two
        // containers take the same port.
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    if protocol == Protocol::Udp {
        return Ok(Listener::Datagram(socket));
    }
    socket.listen(BACKLOG)?;
    Ok(Listener::Stream(socket))
}

/// An address as people write it: IPv4 seen through a dual-stack socket is IPv4.
pub(crate) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests;
