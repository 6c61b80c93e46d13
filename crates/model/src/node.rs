//! A Node: its addresses and the address ranges of its pods.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde_json::Value;

use crate::{
    Rejection,
    read::{Object, type_name},
};

/// Label that holds a node's zone (well-known labels of Kubernetes).
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// What the pod network needs of a Node object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`; empty when the object has none.
    pub uid: String,
    /// `metadata.creationTimestamp` as written (RFC 3339, so it sorts as text).
    pub created: String,
    /// Addresses of type `InternalIP` in the order given, the first of each family being the node's own.
    pub internal_ips: Vec<IpAddr>,
    /// `spec.podCIDRs`, or `spec.podCIDR` alone; empty while none is assigned.
    pub pod_cidrs: Vec<IpNet>,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
}

impl Node {
    /// Reads a Node object.
    ///
    /// # Errors
    /// The first field that is malformed. A node without addresses or ranges yet is not an error.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let object = Object::new("Node", value);
        let name = object.name()?;
        let uid = object.string("/metadata/uid")?.unwrap_or_default().to_owned();
        let created = object.string("/metadata/creationTimestamp")?.unwrap_or_default().to_owned();
        Ok(Self {
            name,
            uid,
            created,
            internal_ips: internal_ips(&object)?,
            pod_cidrs: pod_cidrs(&object)?,
            labels: labels(&object, value)?,
        })
    }

    /// The node's own address of the family of `like`.
    pub fn internal_ip(&self, v6: bool) -> Option<IpAddr> {
        self.internal_ips.iter().copied().find(|ip| ip.is_ipv6() == v6)
    }

    /// The node's zone, when it is labelled with one.
    pub fn zone(&self) -> Option<&str> {
        self.labels.get(ZONE_LABEL).map(String::as_str)
    }
}

fn internal_ips(object: &Object<'_>) -> Result<Vec<IpAddr>, Rejection> {
    let mut ips = Vec::new();
    for (i, entry) in object.array("/status/addresses")?.iter().enumerate() {
        if entry.get("type").and_then(Value::as_str) != Some("InternalIP") {
            continue;
        }
        let field = format!("status.addresses[{i}].address");
        let text = entry.get("address").and_then(Value::as_str).unwrap_or_default();
        let ip: IpAddr =
            text.parse().map_err(|_| object.reject(&field, &format!("{text:?} is not an IP address")))?;
        if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || is_mapped(&ip) {
            return Err(object.reject(&field, &format!("{ip} cannot be the address of a node")));
        }
        ips.push(ip);
    }
    Ok(ips)
}

fn pod_cidrs(object: &Object<'_>) -> Result<Vec<IpNet>, Rejection> {
    let listed = object.array("/spec/podCIDRs")?;
    let mut texts = Vec::new();
    for (i, entry) in listed.iter().enumerate() {
        let field = format!("spec.podCIDRs[{i}]");
        let text = entry
            .as_str()
            .ok_or_else(|| object.reject(&field, &format!("is {}, not a string", type_name(entry))))?;
        texts.push((field, text));
    }
    if texts.is_empty()
        && let Some(text) = object.string("/spec/podCIDR")?
        && !text.is_empty()
    {
        texts.push(("spec.podCIDR".to_owned(), text));
    }
    let mut cidrs: Vec<IpNet> = Vec::new();
    for (field, text) in texts {
        let cidr: IpNet = text
            .parse()
            .map_err(|_| object.reject(&field, &format!("{text:?} is not a CIDR such as 10.244.1.0/24")))?;
        if cidr.trunc() != cidr {
            return Err(
                object.reject(&field, &format!("{cidr} has host bits set; the range is {}", cidr.trunc()))
            );
        }
        let shortest = if matches!(cidr, IpNet::V4(_)) { 8 } else { 32 };
        let longest = cidr.max_prefix_len() - 2;
        if cidr.prefix_len() < shortest || cidr.prefix_len() > longest {
            let cause = format!("{cidr}: a node's range is between /{shortest} and /{longest}");
            return Err(object.reject(&field, &cause));
        }
        if is_mapped(&cidr.addr()) || cidr.addr().is_multicast() || cidr.addr().is_loopback() {
            return Err(object.reject(&field, &format!("{cidr} cannot hold pod addresses")));
        }
        if let Some(same) = cidrs.iter().find(|c| c.max_prefix_len() == cidr.max_prefix_len()) {
            let cause =
                format!("{cidr} is the second range of its family after {same}; one of each is possible");
            return Err(object.reject(&field, &cause));
        }
        cidrs.push(cidr);
    }
    Ok(cidrs)
}

fn labels(object: &Object<'_>, value: &Value) -> Result<BTreeMap<String, String>, Rejection> {
    let Some(map) = value.pointer("/metadata/labels") else { return Ok(BTreeMap::new()) };
    let Some(map) = map.as_object() else {
        return if map.is_null() {
            Ok(BTreeMap::new())
        } else {
            Err(object.reject("metadata.labels", &format!("is {}, not an object", type_name(map))))
        };
    };
    map.iter()
        .map(|(key, v)| match v {
            Value::String(s) => Ok((key.clone(), s.clone())),
            other => Err(object.reject(
                &format!("metadata.labels[{key}]"),
                &format!("is {}, not a string", type_name(other)),
            )),
        })
        .collect()
}

/// Whether the address is an IPv4 address in IPv6 clothes, which no pod or node may have: the tables hold
/// IPv4 addresses that way.
fn is_mapped(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(spec: &Value, addresses: &Value) -> Value {
        json!({"metadata": {"name": "n1", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
               "spec": spec, "status": {"addresses": addresses}})
    }

    #[test]
    fn a_dual_stack_node_is_read() {
        let parsed = Node::parse(&node(
            &json!({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]}),
            &json!([{"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "172.18.1.1"},
                   {"type": "InternalIP", "address": "fd00::1"}]),
        ))
        .unwrap();
        assert_eq!(parsed.pod_cidrs.len(), 2);
        assert_eq!(parsed.internal_ip(true), Some("fd00::1".parse().unwrap()));
        assert_eq!(parsed.internal_ip(false), Some("172.18.1.1".parse().unwrap()));
    }

    #[test]
    fn what_is_malformed_is_named() {
        let cases: &[(Value, Value, &str, &str)] = &[
            (json!({"podCIDRs": ["10.244.1.0"]}), json!([]), "spec.podCIDRs[0]", "not a CIDR"),
            (json!({"podCIDRs": ["10.244.1.5/24"]}), json!([]), "spec.podCIDRs[0]", "host bits"),
            (json!({"podCIDRs": [7]}), json!([]), "spec.podCIDRs[0]", "a number"),
            (json!({"podCIDRs": "x"}), json!([]), "spec.podCIDRs", "not a list"),
            (json!({"podCIDR": "0.0.0.0/0"}), json!([]), "spec.podCIDR", "between /8 and /30"),
            (json!({"podCIDRs": ["::ffff:10.0.0.0/104"]}), json!([]), "spec.podCIDRs[0]", "cannot hold"),
            (
                json!({"podCIDRs": ["10.1.0.0/24", "10.2.0.0/24"]}),
                json!([]),
                "spec.podCIDRs[1]",
                "second range",
            ),
            (
                json!({}),
                json!([{"type": "InternalIP", "address": "no"}]),
                "status.addresses[0].address",
                "not an IP",
            ),
            (
                json!({}),
                json!([{"type": "InternalIP", "address": "127.0.0.1"}]),
                "status.addresses[0].address",
                "cannot",
            ),
            (json!({}), json!({"a": 1}), "status.addresses", "not a list"),
        ];
        for (spec, addresses, field, cause) in cases {
            let rejection = Node::parse(&node(spec, addresses)).unwrap_err();
            assert_eq!(&rejection.field, field, "{spec} {addresses}");
            assert!(rejection.cause.contains(cause), "{} lacks {cause}", rejection.cause);
            assert!(rejection.to_string().starts_with("Node n1: "), "{rejection}");
        }
        assert_eq!(Node::parse(&json!({"metadata": {}})).unwrap_err().field, "metadata.name");
        assert_eq!(Node::parse(&json!("text")).unwrap_err().name, "?");
    }
}
