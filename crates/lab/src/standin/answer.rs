//! What a stand-in says.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::Protocol;

/// Who answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Pod name; the node's name for a responder on a node.
    pub pod: String,
    /// Pod namespace; empty for a node.
    pub namespace: String,
    /// Node.
    pub node: String,
    /// Container.
    pub container: String,
    /// Addresses of the pod.
    pub addresses: Vec<IpAddr>,
}

/// One answer. The field names are what users of the lab script against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Who answers.
    #[serde(flatten)]
    pub identity: Identity,
    /// Local address that the peer reached.
    pub address: IpAddr,
    /// Local port.
    pub port: u16,
    /// Transport.
    pub protocol: Protocol,
    /// The peer's address as it arrived: the sender's own, unless something translated it.
    pub peer_address: IpAddr,
    /// The peer's port as it arrived.
    pub peer_port: u16,
    /// The request, when it was HTTP.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub http: Option<HttpRequest>,
}

/// The request as it arrived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpRequest {
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// `Host`.
    pub host: String,
    /// Headers with their names in lower case; several of one name joined by `, ` (RFC 9110 section 5.3).
    pub headers: BTreeMap<String, String>,
}

impl Answer {
    pub(super) fn new(identity: &Identity, protocol: Protocol, local: SocketAddr, peer: SocketAddr) -> Self {
        let (local, peer) = (super::plain(local), super::plain(peer));
        Self {
            identity: identity.clone(),
            address: local.ip(),
            port: local.port(),
            protocol,
            peer_address: peer.ip(),
            peer_port: peer.port(),
            http: None,
        }
    }

    /// One line of JSON with its line feed.
    pub(super) fn line(&self) -> Vec<u8> {
        // A map of text to text and addresses always has a JSON form; an empty line would tell otherwise.
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }
}
