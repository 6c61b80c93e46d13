//! Pods, namespaces and nodes as policy sees them: labels, addresses, named ports.

use std::net::IpAddr;

use serde_json::Value;

use crate::{
    Rejection,
    net::{Protocol, address},
    read::Object,
    selector::{Labels, labels},
};

/// A port of a container that has a name, by which policies may ask for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedPort {
    /// `name`.
    pub name: String,
    /// `protocol`, TCP when absent.
    pub protocol: Protocol,
    /// `containerPort`.
    pub port: u16,
}

/// What policy needs of a Pod object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `spec.nodeName`; empty while it has none.
    pub node: String,
    /// `spec.hostNetwork`: the pod has its node's addresses, no policy selects it, and only ranges of addresses and
    /// node peers match it.
    pub host_network: bool,
    /// `status.podIPs` (or `status.podIP`).
    pub addresses: Vec<IpAddr>,
    /// Ports with a name, of containers and of init containers that stay (`restartPolicy: Always`).
    pub ports: Vec<NamedPort>,
    /// Ports of containers without regard to names: what the pod says that it serves.
    pub served: Vec<(Protocol, u16)>,
    /// `status.phase` is `Succeeded` or `Failed`: its addresses are no longer its own.
    pub finished: bool,
}

impl Pod {
    /// Reads a Pod object.
    ///
    /// # Errors
    /// The first field that is malformed. A pod without addresses or a node yet is no error.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let object = Object::new("Pod", value);
        let (ports, served) = ports(&object, value)?;
        Ok(Self {
            name: object.name()?,
            namespace: object.namespace()?,
            labels: labels(&object, value)?,
            node: object.string("/spec/nodeName")?.unwrap_or_default().to_owned(),
            host_network: object
                .boolean("spec.hostNetwork", value.pointer("/spec/hostNetwork"))?
                .unwrap_or(false),
            addresses: addresses(&object)?,
            ports,
            served,
            finished: matches!(object.string("/status/phase")?, Some("Succeeded" | "Failed")),
        })
    }
}

fn addresses(object: &Object<'_>) -> Result<Vec<IpAddr>, Rejection> {
    let mut texts = Vec::new();
    for (i, entry) in object.array("/status/podIPs")?.iter().enumerate() {
        let field = format!("status.podIPs[{i}].ip");
        if let Some(ip) = entry.get("ip") {
            texts.push((object.text(&field, ip)?, field));
        }
    }
    if texts.is_empty() {
        texts.extend(object.string("/status/podIP")?.map(|ip| (ip, "status.podIP".to_owned())));
    }
    let parse = |(text, field): (&str, String)| {
        address(text).ok_or_else(|| object.reject(&field, &format!("{text:?} is not an IP address")))
    };
    texts.into_iter().filter(|(text, _)| !text.is_empty()).map(parse).collect()
}

type Ports = (Vec<NamedPort>, Vec<(Protocol, u16)>);

fn ports(object: &Object<'_>, value: &Value) -> Result<Ports, Rejection> {
    let (mut named, mut served) = (Vec::new(), Vec::new());
    for list in ["containers", "initContainers"] {
        let at = format!("spec.{list}");
        let containers = object.array_value(&at, value.pointer(&format!("/spec/{list}")))?;
        for (i, container) in containers.iter().enumerate() {
            if list == "initContainers" && container["restartPolicy"] != "Always" {
                continue;
            }
            let at = format!("{at}[{i}].ports");
            for (i, port) in object.array_value(&at, container.get("ports"))?.iter().enumerate() {
                let at = format!("{at}[{i}]");
                let protocol = object.protocol(&at, port)?;
                let field = format!("{at}.containerPort");
                let Some(number) = object.port_value(&field, port.get("containerPort"))? else {
                    return Err(object.reject(&field, "is missing"));
                };
                served.push((protocol, number));
                if let Some(name) = port.get("name").filter(|n| !n.is_null()) {
                    let name = object.text(&format!("{at}.name"), name)?;
                    named.push(NamedPort { name: name.to_owned(), protocol, port: number });
                }
            }
        }
    }
    named.retain(|p| !p.name.is_empty());
    named.sort();
    named.dedup();
    Ok((named, served))
}

/// What policy needs of a Namespace object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`, with `kubernetes.io/metadata.name` as the API server sets it.
    pub labels: Labels,
}

/// The label that every namespace has, with its name.
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

impl Namespace {
    /// A namespace with these labels and the one that every namespace has.
    pub fn new(name: &str, mut labels: Labels) -> Self {
        labels.insert(NAMESPACE_NAME_LABEL.to_owned(), name.to_owned());
        Self { name: name.to_owned(), labels }
    }

    /// Reads a Namespace object.
    ///
    /// # Errors
    /// The first field that is malformed.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let object = Object::new("Namespace", value);
        Ok(Self::new(&object.name()?, labels(&object, value)?))
    }
}

/// What policy needs of a Node object: all of its addresses, and its labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePeer {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: Labels,
    /// The IP addresses in `status.addresses`, of whatever type.
    pub addresses: Vec<IpAddr>,
}

impl NodePeer {
    /// Reads a Node object. Host names among the addresses are passed over.
    ///
    /// # Errors
    /// The first field that is malformed.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let object = Object::new("Node", value);
        let mut addresses = Vec::new();
        for (i, entry) in object.array("/status/addresses")?.iter().enumerate() {
            if !matches!(entry["type"].as_str(), Some("InternalIP" | "ExternalIP")) {
                continue;
            }
            let field = format!("status.addresses[{i}].address");
            let text = object.text(&field, &entry["address"])?;
            let parsed = address(text)
                .ok_or_else(|| object.reject(&field, &format!("{text:?} is not an IP address")))?;
            addresses.push(parsed);
        }
        Ok(Self { name: object.name()?, labels: labels(&object, value)?, addresses })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_have_addresses_and_named_ports() {
        let pod = Pod::parse(&json!({
            "metadata": {"name": "a", "namespace": "x", "labels": {"app": "web"}},
            "spec": {"nodeName": "n1", "containers": [{"ports": [
                {"containerPort": 80, "name": "http"}, {"containerPort": 53, "protocol": "UDP"}]}],
                "initContainers": [
                    {"ports": [{"containerPort": 1, "name": "gone"}]},
                    {"restartPolicy": "Always", "ports": [{"containerPort": 9, "name": "side"}]}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}
        }))
        .unwrap();
        let names: Vec<&str> = pod.ports.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["http", "side"]);
        assert_eq!(pod.served, [(Protocol::Tcp, 80), (Protocol::Udp, 53), (Protocol::Tcp, 9)]);
        assert_eq!(pod.addresses.len(), 2);
        assert!(!pod.finished && !pod.host_network);
    }

    #[test]
    fn what_is_malformed_is_named() {
        for (spec, status, field) in [
            (json!({"hostNetwork": 1}), json!({}), "spec.hostNetwork"),
            (json!({"containers": {}}), json!({}), "spec.containers"),
            (
                json!({"containers": [{"ports": [{"containerPort": 70000}]}]}),
                json!({}),
                "spec.containers[0].ports[0].containerPort",
            ),
            (json!({}), json!({"podIPs": [{"ip": "x"}]}), "status.podIPs[0].ip"),
        ] {
            let value = json!({"metadata": {"name": "a", "namespace": "x"}, "spec": spec, "status": status});
            assert_eq!(Pod::parse(&value).unwrap_err().field, field);
        }
        let node = json!({"metadata": {"name": "n"}, "status": {"addresses": [
            {"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "10.0.0.300"}]}});
        assert_eq!(NodePeer::parse(&node).unwrap_err().field, "status.addresses[1].address");
        let namespace = Namespace::parse(&json!({"metadata": {"name": "x"}})).unwrap();
        assert_eq!(namespace.labels[NAMESPACE_NAME_LABEL], "x");
    }
}
