//! This node as the service table sees it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use podway_model::Nodes;
use podway_services::table::NodeView;

use super::config::ServicesConfig;

/// What the view is made of.
pub(super) struct Sources<'a> {
    pub(super) node: &'a str,
    pub(super) nodes: &'a Nodes,
    /// Addresses of this machine, but for those that it holds for load balancers.
    pub(super) local: &'a [IpAddr],
    /// Ranges of load balancer addresses that are given out here.
    pub(super) pools: &'a [IpNet],
    pub(super) config: &'a ServicesConfig,
}

/// Makes the view; `None` while the Node is not known.
pub(super) fn view(from: &Sources<'_>) -> Option<NodeView> {
    let own = from.nodes.node(from.node)?;
    // The first of each family replaces masqueraded sources.
    let mut addresses: Vec<IpAddr> = own.internal_ips.clone();
    for address in from.local.iter().filter(|a| !never_served(a)) {
        if !addresses.contains(address) {
            addresses.push(*address);
        }
    }
    let chosen = &from.config.node_port_addresses;
    let node_port_addresses = if chosen.is_empty() {
        addresses.clone()
    } else {
        let all: BTreeSet<IpAddr> = addresses.iter().chain(from.local).copied().collect();
        all.into_iter().filter(|a| chosen.iter().any(|c| c.contains(a))).collect()
    };
    let pods: Vec<IpNet> = from.nodes.iter().flat_map(|n| from.nodes.pod_cidrs(&n.name)).collect();
    Some(NodeView {
        name: own.name.clone(),
        zone: own.zone().map(str::to_owned),
        addresses,
        node_port_addresses,
        pod_cidrs: IpNet::aggregate(&pods),
        service_cidrs: from.config.service_cidrs.clone(),
        load_balancer_pools: from.pools.to_vec(),
        masquerade_all: from.config.masquerade_all,
    })
}

/// Addresses that mean something else on every link or machine.
fn never_served(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_loopback() || a.is_link_local(),
        IpAddr::V6(a) => a.is_loopback() || a.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use podway_model::Node;

    use super::*;

    fn ips(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|t| t.parse().unwrap()).collect()
    }

    fn nodes() -> Nodes {
        let node = |name: &str, ip: &[&str], cidr: &str| Node {
            name: name.into(),
            uid: String::new(),
            created: String::new(),
            internal_ips: ips(ip),
            pod_cidrs: vec![cidr.parse().unwrap()],
            labels: [("topology.kubernetes.io/zone".to_owned(), "z1".to_owned())].into(),
        };
        let mut nodes = Nodes::new();
        nodes.replace(vec![
            node("n1", &["192.0.2.1"], "10.244.0.0/24"),
            node("n2", &["192.0.2.2"], "10.244.1.0/24"),
        ]);
        nodes
    }

    #[test]
    fn the_view_has_the_nodes_own_address_first_and_no_others_links() {
        let (nodes, config) = (nodes(), ServicesConfig::default());
        let local = ips(&["127.0.0.1", "169.254.1.1", "198.51.100.9", "192.0.2.1", "fe80::1", "2001:db8::1"]);
        let sources = Sources { node: "n1", nodes: &nodes, local: &local, pools: &[], config: &config };
        let made = view(&sources).unwrap();
        assert_eq!(made.addresses, ips(&["192.0.2.1", "198.51.100.9", "2001:db8::1"]));
        assert_eq!(made.node_port_addresses, made.addresses);
        assert_eq!(made.zone.as_deref(), Some("z1"));
        assert_eq!(made.pod_cidrs, ["10.244.0.0/23".parse::<IpNet>().unwrap()]);
        assert!(view(&Sources { node: "n9", ..sources }).is_none());
    }

    #[test]
    fn node_ports_answer_where_they_are_told_to() {
        let nodes = nodes();
        let local = ips(&["127.0.0.1", "198.51.100.9", "192.0.2.1"]);
        for (cidrs, want) in [
            (&["127.0.0.0/8", "192.0.2.0/24"][..], &["127.0.0.1", "192.0.2.1"][..]),
            (&["203.0.113.0/24"][..], &[][..]),
        ] {
            let config = ServicesConfig {
                node_port_addresses: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
                ..ServicesConfig::default()
            };
            let sources = Sources { node: "n1", nodes: &nodes, local: &local, pools: &[], config: &config };
            assert_eq!(view(&sources).unwrap().node_port_addresses, ips(want));
        }
    }
}
