//! What policies have in common: peers, ports, rules, the block of addresses.

use std::fmt;

use ipnet::IpNet;
use serde_json::Value;

use crate::{Rejection, net, net::Protocol, read::Object, selector::Selector};

/// Annotation of a policy that is judged and reported, but drops nothing.
pub const AUDIT_ANNOTATION: &str = "podway.dev/audit";

/// A direction as seen from the pods that a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Connections to them.
    Ingress,
    /// Connections from them.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Direction; 2] = [Direction::Ingress, Direction::Egress];

    /// As the fields of policies are called: `ingress`, `egress`.
    pub const fn field(self) -> &'static str {
        match self {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        }
    }

    /// What a rule's list of peers is called: `from`, `to`.
    pub const fn peers_field(self) -> &'static str {
        match self {
            Direction::Ingress => "from",
            Direction::Egress => "to",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.field())
    }
}

/// Which namespaces.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Namespaces {
    /// The one of this name: the policy's own.
    Named(String),
    /// Those with these labels.
    Selected(Selector),
}

/// A range of addresses without some ranges in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IpBlock {
    /// The range, without host bits.
    pub cidr: IpNet,
    /// Ranges in it that are left out.
    pub except: Vec<IpNet>,
}

/// Whom a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// Pods, but none on their node's own network.
    Pods {
        /// Of these namespaces.
        namespaces: Namespaces,
        /// With these labels.
        pods: Selector,
    },
    /// Addresses of nodes with these labels.
    Nodes(Selector),
    /// Addresses, whoever has them.
    Block(IpBlock),
}

/// Which traffic.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortMatch {
    /// Ports of a protocol, both ends included.
    Range(Protocol, u16, u16),
    /// What the connection's target calls so.
    Named {
        /// The name.
        name: String,
        /// The protocol; `None` is whichever the port has.
        protocol: Option<Protocol>,
    },
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Let it through. The only action of a NetworkPolicy.
    Accept,
    /// Drop it.
    Deny,
    /// Leave it to the next tier.
    Pass,
}

/// One rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `name`, which only cluster policies have.
    pub name: String,
    /// What it does.
    pub action: Action,
    /// Whom it is about; `None` is everybody, an empty list is nobody.
    pub peers: Option<Vec<Peer>>,
    /// Which traffic; `None` is all of it, of every protocol, an empty list is none.
    pub ports: Option<Vec<PortMatch>>,
    /// Fields of peers and ports that are not understood, for which the rule fails closed.
    pub not_understood: Vec<String>,
}

/// Whether a policy has [`AUDIT_ANNOTATION`].
pub(crate) fn audit(object: &Object<'_>, value: &Value) -> Result<bool, Rejection> {
    let field = format!("metadata.annotations[{AUDIT_ANNOTATION}]");
    let annotation =
        value.get("metadata").and_then(|m| m.get("annotations")).and_then(|a| a.get(AUDIT_ANNOTATION));
    match annotation.map(|a| object.text(&field, a)).transpose()? {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(object.reject(&field, &format!("{other:?} is neither \"true\" nor \"false\""))),
    }
}

/// A range of addresses, in any spelling that objects may have.
pub(crate) fn cidr(object: &Object<'_>, field: &str, value: Option<&Value>) -> Result<IpNet, Rejection> {
    let Some(value) = value else { return Err(object.reject(field, "is missing")) };
    let text = object.text(field, value)?;
    let Some(range) = net::range(text) else {
        return Err(object.reject(field, &format!("{text:?} is not a range of addresses such as 10.0.0.0/8")));
    };
    if let IpNet::V6(v6) = range
        && v6.prefix_len() >= 96
        && v6.addr().to_ipv4_mapped().is_some()
    {
        let cause = format!("{text} is a range of IPv4 addresses in IPv6 clothes; write it as IPv4");
        return Err(object.reject(field, &cause));
    }
    Ok(range)
}

/// A port number that must be there.
pub(crate) fn port_number(object: &Object<'_>, field: &str, value: Option<&Value>) -> Result<u16, Rejection> {
    object.port_value(field, value)?.ok_or_else(|| {
        let what = value.map_or_else(|| "is missing".to_owned(), |v| format!("{v} is not a port"));
        object.reject(field, &format!("{what} (1 to 65535)"))
    })
}

/// A port's name: at most 15 lower-case letters, digits and single `-` inside, one letter at least (RFC 6335).
pub(crate) fn check_port_name(object: &Object<'_>, field: &str, name: &str) -> Result<(), Rejection> {
    let ok = (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_lowercase())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--");
    if ok {
        return Ok(());
    }
    let cause = format!(
        "{name:?} cannot be the name of a port (at most 15 lower-case letters, digits and single '-' between them)"
    );
    Err(object.reject(field, &cause))
}

/// Selector in a field that must be there.
pub(crate) fn selector(
    object: &Object<'_>,
    at: &str,
    holder: &Value,
    name: &str,
) -> Result<Selector, Rejection> {
    match holder.get(name) {
        None | Some(Value::Null) => Ok(Selector::default()),
        Some(value) => Selector::parse(object, &format!("{at}.{name}"), value),
    }
}
