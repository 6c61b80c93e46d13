//! What another service proxy left, or is doing, in a network namespace.
//!
//! - [`iptables`], [`nft`], [`ipvs`]: readers of what `iptables-save`, `nft list ruleset` (text and JSON) and
//!   `ipvsadm -Sn` print, all into one [`ForeignRules`]. They are pure; bad lines are reported and skipped.
//! - [`detect`]: whether another proxy is at work in the current network namespace.
//! - [`cleanup`]: removal of what kube-proxy left, and of nothing else.
//!
//! Only `detect` and `cleanup` touch the machine: they run the tools of the mechanism in the calling thread's network
//! namespace, and `cleanup` alone changes anything.

pub mod cleanup;
pub mod detect;
pub mod iptables;
pub mod ipvs;
pub mod nft;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod tools;

use std::fmt;
use std::net::IpAddr;

pub use self::tools::ToolError;
use ipnet::IpNet;
use podway_services::table::{Family, Protocol};

/// How many malformed lines are kept; of those beyond it only the number is known.
pub const MAX_PROBLEMS: usize = 100;
/// How much of a malformed line is quoted, in characters.
const QUOTED: usize = 120;

/// Everything that was understood of one dump.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignRules {
    /// Service ports, in the order in which they were found.
    pub services: Vec<ForeignService>,
    /// Whether there is a rule that masquerades what the proxy marks.
    pub masquerades: bool,
    /// Lines that were not understood.
    pub problems: Vec<Problem>,
    /// How many more there were than [`MAX_PROBLEMS`].
    pub more_problems: usize,
}

/// One address, port and protocol at which the other proxy answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignService {
    /// The Service it was made from, when the rules name it.
    pub object: Option<ServicePortName>,
    /// Its address; `None` at a node port, which answers at every address of the node.
    pub address: Option<IpAddr>,
    /// Family of its packets.
    pub family: Family,
    /// Its port; 0 where the mechanism goes by a mark on the packet.
    pub port: u16,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// Why it exists.
    pub kind: ForeignKind,
    /// What becomes of a packet.
    pub action: Action,
    /// Where packets go, in the order of the rules, each once.
    pub endpoints: Vec<Endpoint>,
    /// Whose source address is replaced.
    pub masquerade: Masquerade,
    /// Session affinity by the client's address, and its timeout in seconds.
    pub affinity_s: Option<u32>,
    /// Who may send; empty when everybody may.
    pub source_ranges: Vec<IpNet>,
    /// Whether packets from outside go to endpoints on this node only.
    pub local_only: bool,
}

/// Name of a Service and of one of its ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePortName {
    /// Namespace of the Service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Name of the port; empty when it has none.
    pub port: String,
}

impl ServicePortName {
    /// Reads `namespace/name` or `namespace/name:port`, as kube-proxy writes it into comments.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (namespace, rest) = text.split_once('/')?;
        let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
        let plain = |part: &str| {
            part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
        };
        if namespace.is_empty() || name.is_empty() || ![namespace, name, port].into_iter().all(plain) {
            return None;
        }
        Some(Self { namespace: namespace.into(), name: name.into(), port: port.into() })
    }
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)?;
        if self.port.is_empty() { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

/// Why a foreign frontend exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ForeignKind {
    /// A cluster IP.
    ClusterIp,
    /// An external IP.
    ExternalIp,
    /// A load balancer's address.
    LoadBalancer,
    /// A node port.
    NodePort,
    /// An external IP or a load balancer's address: the rules do not tell which.
    External,
    /// The rules do not tell.
    Unknown,
}

/// What becomes of a packet to a foreign frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// It goes to one of the endpoints.
    Forward,
    /// The sender is told.
    Reject,
    /// It is discarded.
    Drop,
}

/// Whose source address a foreign proxy replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Masquerade {
    /// Nobody's, as far as the rules of the service say.
    No,
    /// That of senders that are no pods.
    OutsidePods,
    /// Everybody's.
    Always,
}

/// One endpoint of a foreign service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its port; 0 when the packet's own port stays.
    pub port: u16,
    /// Its weight, where the mechanism has one; 0 when it takes no new connections.
    pub weight: Option<u32>,
}

/// Something in a dump that was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line of the dump, from 1; of a JSON dump the number of the object in its list.
    pub line: usize,
    /// The beginning of that line.
    pub text: String,
    /// Why.
    pub cause: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}: {}", self.line, self.cause, self.text)
    }
}

impl ForeignRules {
    fn problem(&mut self, line: usize, text: &str, cause: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            let text = text.trim().chars().take(QUOTED).collect();
            self.problems.push(Problem { line, text, cause: cause.into() });
        } else {
            self.more_problems += 1;
        }
    }

    /// How many endpoints all services have together.
    #[must_use]
    pub fn endpoints(&self) -> usize {
        self.services.iter().map(|s| s.endpoints.len()).sum()
    }
}

/// Adds an endpoint unless it is there.
fn add_endpoint(endpoints: &mut Vec<Endpoint>, endpoint: Endpoint) {
    if !endpoints.contains(&endpoint) {
        endpoints.push(endpoint);
    }
}

/// Reads a protocol's name or number.
fn protocol(text: &str) -> Option<Protocol> {
    match text {
        "tcp" | "6" => Some(Protocol::Tcp),
        "udp" | "17" => Some(Protocol::Udp),
        "sctp" | "132" => Some(Protocol::Sctp),
        _ => None,
    }
}

/// Reads `address:port`, `[address]:port`, or an address alone with port 0.
fn address_and_port(text: &str) -> Option<(IpAddr, u16)> {
    if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse() {
        return Some((address, 0));
    }
    text.parse::<std::net::SocketAddr>().ok().map(|a| (a.ip(), a.port()))
}

/// Reads an address or a prefix.
fn prefix(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_kube_proxy_writes_them() {
        let read = |text| ServicePortName::parse(text).map(|n| n.to_string());
        assert_eq!(read("default/kubernetes:https").as_deref(), Some("default/kubernetes:https"));
        assert_eq!(read("ns/a.b-1").as_deref(), Some("ns/a.b-1"));
        for text in ["", "a", "/a", "a/", "kubernetes service portals", "A/b", "a/b c"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn addresses_are_read_with_and_without_port() {
        let read = |text| address_and_port(text).map(|(a, p)| format!("{a} {p}"));
        assert_eq!(read("10.0.0.1:80").as_deref(), Some("10.0.0.1 80"));
        assert_eq!(read("[fd00::1]:80").as_deref(), Some("fd00::1 80"));
        assert_eq!(read("[fd00::1]").as_deref(), Some("fd00::1 0"));
        assert_eq!(read("fd00::1").as_deref(), Some("fd00::1 0"));
        assert_eq!(read("10.0.0.1:65536"), None);
        assert_eq!(read("10.0.0.1:80-90"), None);
    }

    #[test]
    fn problems_are_limited_and_counted() {
        let mut rules = ForeignRules::default();
        for line in 0..MAX_PROBLEMS + 7 {
            rules.problem(line, &"ä".repeat(500), "no");
        }
        assert_eq!((rules.problems.len(), rules.more_problems), (MAX_PROBLEMS, 7));
        assert_eq!(rules.problems[0].text.chars().count(), QUOTED);
    }
}
