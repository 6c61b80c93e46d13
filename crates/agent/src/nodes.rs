//! What the set of nodes means for this one: pure, no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use podway_bpf_host::{Peer, PeerFlags};
use podway_model::{Node, Nodes};
use serde::{Deserialize, Serialize};

use crate::config::NetworkMode;

/// This node, as far as its own network needs it. Remembered in the run directory, so that an agent that
/// starts while the API server is away can go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnNode {
    /// Name of the Node object.
    pub name: String,
    /// Its UID, for events.
    pub uid: String,
    /// Its InternalIPs, in the order of the object.
    pub internal_ips: Vec<IpAddr>,
    /// The address that other nodes send to.
    pub underlay: IpAddr,
    /// Its podCIDRs, without refused ones.
    pub pod_cidrs: Vec<IpNet>,
}

/// A route to another node's pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedRoute {
    /// The podCIDR.
    pub dst: IpNet,
    /// The next hop (direct mode); through the tunnel device when none.
    pub via: Option<IpAddr>,
    /// Source address of this node's own connections to those pods.
    pub src: Option<IpAddr>,
}

/// Everything that this node programs because of the nodes of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// This node.
    pub own: OwnNode,
    /// Where every pod and node address is.
    pub peers: BTreeMap<IpNet, Peer>,
    /// Routes of this node's own stack.
    pub routes: Vec<WantedRoute>,
    /// Other nodes by underlay address: the paths to prove.
    pub paths: BTreeMap<IpAddr, String>,
    /// What is inside of the cluster: podCIDRs and node addresses, merged to as few prefixes as possible.
    pub inside: Vec<IpNet>,
    /// Nodes that cannot be reached, with the reason.
    pub unreachable: BTreeMap<String, String>,
}

/// Why there is no view.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoView {
    /// The API server has no such Node.
    #[error("there is no Node {0:?}; check --node-name, or wait until the node is registered")]
    NoNode(String),
    /// The Node has no usable address.
    #[error("Node {name:?} has no InternalIP{family}; set it in status.addresses (kubelet --node-ip)")]
    NoAddress {
        /// Name of the node.
        name: String,
        /// The family that was asked for.
        family: &'static str,
    },
}

/// Derives the view of one node.
///
/// # Errors
/// This node is not there, or has no address of the underlay's family.
pub fn view(
    nodes: &Nodes,
    own_name: &str,
    mode: NetworkMode,
    underlay_v6: Option<bool>,
) -> Result<View, NoView> {
    let own = nodes.node(own_name).ok_or_else(|| NoView::NoNode(own_name.to_owned()))?;
    let underlay = match underlay_v6 {
        None => own.internal_ips.first().copied(),
        Some(v6) => own.internal_ip(v6),
    };
    let underlay = underlay.ok_or_else(|| NoView::NoAddress {
        name: own_name.to_owned(),
        family: match underlay_v6 {
            None => "",
            Some(false) => " of IPv4",
            Some(true) => " of IPv6",
        },
    })?;
    let mut view = View {
        own: OwnNode {
            name: own_name.to_owned(),
            uid: own.uid.clone(),
            internal_ips: own.internal_ips.clone(),
            underlay,
            pod_cidrs: nodes.pod_cidrs(own_name),
        },
        peers: BTreeMap::new(),
        routes: Vec::new(),
        paths: BTreeMap::new(),
        inside: Vec::new(),
        unreachable: BTreeMap::new(),
    };
    let mut inside = BTreeSet::new();
    for node in nodes.iter() {
        // Nothing of the cluster is ever masqueraded, whether it can be reached now or not.
        inside.extend(nodes.pod_cidrs(&node.name));
        inside.extend(node.internal_ips.iter().copied().map(IpNet::from));
        view.add(nodes, node, own, mode);
    }
    view.inside = IpNet::aggregate(&inside.into_iter().collect());
    Ok(view)
}

impl View {
    fn add(&mut self, nodes: &Nodes, node: &Node, own: &Node, mode: NetworkMode) {
        let local = node.name == self.own.name;
        let Some(address) = node.internal_ip(self.own.underlay.is_ipv6()) else {
            let family = if self.own.underlay.is_ipv6() { "IPv6" } else { "IPv4" };
            let why = format!("it has no {family} InternalIP, and the nodes reach one another by {family}");
            self.unreachable.insert(node.name.clone(), why);
            return;
        };
        // Two Node objects with one address: the first by name is served, as with any other conflict it is
        // better to serve one than none.
        if let Some(other) = self.paths.get(&address).filter(|_| !local) {
            let why = format!("its address {address} is that of node {other:?}, too");
            self.unreachable.insert(node.name.clone(), why);
            return;
        }
        if !local && self.own.internal_ips.contains(&address) {
            let why = format!("its address {address} is this node's own, too");
            self.unreachable.insert(node.name.clone(), why);
            return;
        }
        let flags = |is_node| PeerFlags { is_node, local };
        for ip in &node.internal_ips {
            self.peers.entry(IpNet::from(*ip)).or_insert(Peer { node: address, flags: flags(true) });
        }
        for cidr in nodes.pod_cidrs(&node.name) {
            if holds_v4(&cidr) {
                let why = format!(
                    "its podCIDR {cidr} holds ::ffff:0:0/96, which stands for IPv4 (RFC 4291 2.5.5.2)"
                );
                self.unreachable.insert(node.name.clone(), why);
                continue;
            }
            self.peers.insert(cidr, Peer { node: address, flags: flags(false) });
            if local {
                continue;
            }
            let v6 = matches!(cidr, IpNet::V6(_));
            let src = own.internal_ip(v6);
            match mode {
                NetworkMode::Vxlan { .. } => self.routes.push(WantedRoute { dst: cidr, via: None, src }),
                NetworkMode::Direct => match node.internal_ip(v6) {
                    Some(via) => self.routes.push(WantedRoute { dst: cidr, via: Some(via), src }),
                    None => {
                        let why =
                            format!("its podCIDR {cidr} has no InternalIP of the same family to route to");
                        self.unreachable.insert(node.name.clone(), why);
                    }
                },
            }
        }
        if !local {
            self.paths.insert(address, node.name.clone());
        }
    }
}

/// Whether a prefix holds the v4-mapped addresses, which the tables use for IPv4.
fn holds_v4(cidr: &IpNet) -> bool {
    let mapped = std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
    matches!(cidr, IpNet::V6(net) if net.contains(&mapped))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VXLAN: NetworkMode = NetworkMode::Vxlan { port: 8472, vni: 1 };

    fn node(name: &str, ips: &[&str], cidrs: &[&str]) -> Node {
        Node {
            name: name.into(),
            uid: format!("uid-{name}"),
            created: "2026-01-01T00:00:00Z".into(),
            internal_ips: ips.iter().map(|t| t.parse().unwrap()).collect(),
            pod_cidrs: cidrs.iter().map(|t| t.parse().unwrap()).collect(),
            labels: BTreeMap::new(),
        }
    }

    fn nodes(list: &[Node]) -> Nodes {
        let mut nodes = Nodes::new();
        nodes.replace(list.to_vec());
        nodes
    }

    fn shown(view: &View) -> Vec<String> {
        view.peers
            .iter()
            .map(|(net, p)| {
                let kind = if p.flags.is_node { "node" } else { "pods" };
                let place = if p.flags.local { " local" } else { "" };
                format!("{net} {kind} at {}{place}", p.node)
            })
            .collect()
    }

    #[test]
    fn dual_stack_overlay() {
        let set = nodes(&[
            node("n1", &["172.18.1.1", "fd00:172:18::1"], &["10.244.1.0/24", "fd00:10:244:1::/64"]),
            node("n2", &["172.18.1.2", "fd00:172:18::2"], &["10.244.2.0/24", "fd00:10:244:2::/64"]),
        ]);
        let view = view(&set, "n1", VXLAN, None).unwrap();
        assert_eq!(
            shown(&view),
            [
                "10.244.1.0/24 pods at 172.18.1.1 local",
                "10.244.2.0/24 pods at 172.18.1.2",
                "172.18.1.1/32 node at 172.18.1.1 local",
                "172.18.1.2/32 node at 172.18.1.2",
                "fd00:10:244:1::/64 pods at 172.18.1.1 local",
                "fd00:10:244:2::/64 pods at 172.18.1.2",
                "fd00:172:18::1/128 node at 172.18.1.1 local",
                "fd00:172:18::2/128 node at 172.18.1.2",
            ]
        );
        let routes: Vec<String> =
            view.routes.iter().map(|r| format!("{} via {:?} src {}", r.dst, r.via, r.src.unwrap())).collect();
        assert_eq!(
            routes,
            ["10.244.2.0/24 via None src 172.18.1.1", "fd00:10:244:2::/64 via None src fd00:172:18::1"]
        );
        assert_eq!(view.paths.into_values().collect::<Vec<_>>(), ["n2"]);
        assert!(view.inside.contains(&"10.244.1.0/24".parse().unwrap()));
        assert!(view.unreachable.is_empty());
    }

    #[test]
    fn direct_mode_routes_to_the_node_of_the_same_family() {
        let set = nodes(&[
            node("n1", &["172.18.1.1"], &["10.244.1.0/24"]),
            node("n2", &["172.18.1.2"], &["10.244.2.0/24", "fd00:10:244:2::/64"]),
        ]);
        let view = view(&set, "n1", NetworkMode::Direct, None).unwrap();
        assert_eq!(view.routes.len(), 1);
        assert_eq!(view.routes[0].via, Some("172.18.1.2".parse().unwrap()));
        assert!(view.unreachable["n2"].contains("fd00:10:244:2::/64"), "{:?}", view.unreachable);
    }

    #[test]
    fn the_underlay_family_is_that_of_the_first_address_unless_told() {
        let set = nodes(&[
            node("n1", &["fd00::1", "172.18.1.1"], &["10.244.1.0/24"]),
            node("n2", &["172.18.1.2", "fd00::2"], &["10.244.2.0/24"]),
            node("n3", &["172.18.1.3"], &["10.244.3.0/24"]),
        ]);
        let own = view(&set, "n1", VXLAN, None).unwrap();
        assert_eq!(own.own.underlay.to_string(), "fd00::1");
        assert_eq!(own.paths.keys().map(ToString::to_string).collect::<Vec<_>>(), ["fd00::2"]);
        assert!(own.unreachable["n3"].contains("no IPv6 InternalIP"), "{:?}", own.unreachable);
        // Still inside of the cluster: never masqueraded.
        assert!(own.inside.iter().any(|n| n.contains(&"10.244.3.9".parse::<IpAddr>().unwrap())));
        let told = view(&set, "n1", VXLAN, Some(false)).unwrap();
        assert_eq!(told.paths.len(), 2);
        assert!(matches!(view(&set, "n3", VXLAN, Some(true)), Err(NoView::NoAddress { .. })));
        assert!(matches!(view(&set, "n9", VXLAN, None), Err(NoView::NoNode(_))));
    }

    #[test]
    fn conflicts_cost_the_conflicting_node() {
        let mut old = node("n0", &["172.18.1.9"], &["10.244.1.0/24"]);
        old.created = "2025-01-01T00:00:00Z".into();
        let set = nodes(&[
            old,
            node("n1", &["172.18.1.1"], &["10.244.1.0/24"]),
            node("n2", &["172.18.1.2"], &["10.244.2.0/24"]),
            node("n3", &["172.18.1.2"], &["10.244.3.0/24"]),
            node("n4", &["172.18.1.1"], &["10.244.4.0/24"]),
        ]);
        let view = view(&set, "n1", VXLAN, None).unwrap();
        assert!(view.own.pod_cidrs.is_empty());
        assert!(view.unreachable["n3"].contains("n2"), "{:?}", view.unreachable);
        assert!(view.unreachable["n4"].contains("this node's own"), "{:?}", view.unreachable);
        assert_eq!(view.paths.len(), 2);
    }
}
