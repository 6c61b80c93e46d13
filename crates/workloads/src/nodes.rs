//! podCIDRs of nodes, as the node IPAM controller gives them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde_json::json;

use crate::config::Config;
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::world::Object;

const COMPONENT: &str = "cidrAllocator";

/// Give every node without podCIDRs the lowest free subnet of each cluster CIDR.
pub(crate) fn reconcile(planner: &mut Planner<'_, '_>) {
    let mut pools: Vec<Pool> =
        planner.config.cluster_cidrs.iter().map(|c| Pool::new(*c, planner.config)).collect();
    let mut without = Vec::new();
    for node in &planner.world.nodes {
        match pod_cidrs(node) {
            Ok(cidrs) if cidrs.is_empty() => without.push(node),
            Ok(cidrs) => cidrs.iter().for_each(|cidr| pools.iter_mut().for_each(|pool| pool.occupy(cidr))),
            Err(error) => planner.malformed(node, &error),
        }
    }
    if pools.is_empty() {
        return;
    }
    for pool in &mut pools {
        pool.used.sort_unstable();
        pool.used.dedup();
    }
    for node in without.into_iter().filter(|node| !node.deleting) {
        let subnets: Vec<Option<IpNet>> = pools.iter().map(Pool::lowest_free).collect();
        if let Some(i) = subnets.iter().position(Option::is_none) {
            let pool = &pools[i];
            let message = format!(
                "no free /{} subnet is left in cluster CIDR {}: {} nodes have one; enlarge the cluster CIDR or remove a node",
                pool.prefix,
                pool.cidr,
                pool.used.len()
            );
            planner.warning(node, COMPONENT, "CIDRNotAvailable", message);
            continue;
        }
        let subnets: Vec<IpNet> = subnets.into_iter().flatten().collect();
        for (pool, subnet) in pools.iter_mut().zip(&subnets) {
            pool.occupy(subnet);
            pool.used.sort_unstable();
        }
        let mut value = node.value.clone();
        let spec = read::object_mut(&mut value, "spec");
        spec["podCIDR"] = json!(subnets[0].to_string());
        spec["podCIDRs"] = subnets.iter().map(ToString::to_string).collect();
        planner.update(value);
    }
}

fn pod_cidrs(node: &Object<'_>) -> Result<Vec<IpNet>, Malformed> {
    let parse = |text: &str, field: &str| {
        text.parse().map_err(|error| {
            Malformed::new(field, format!("{text:?} is not an address range such as 10.244.1.0/24: {error}"))
        })
    };
    let listed = read::list(node.value, "spec.podCIDRs")?;
    if listed.is_empty() {
        let single = read::string(node.value, "spec.podCIDR")?.filter(|cidr| !cidr.is_empty());
        return single.map(|cidr| parse(cidr, "spec.podCIDR")).into_iter().collect();
    }
    let mut cidrs = Vec::with_capacity(listed.len());
    for (i, cidr) in listed.iter().enumerate() {
        let field = format!("spec.podCIDRs[{i}]");
        let text = cidr.as_str().ok_or_else(|| Malformed::new(&field, "expected a string"))?;
        cidrs.push(parse(text, &field)?);
    }
    Ok(cidrs)
}

/// One cluster CIDR, cut into subnets.
struct Pool {
    cidr: IpNet,
    prefix: u8,
    first: u32,
    /// Number of subnets; a cluster CIDR that is smaller than one subnet has none.
    count: u32,
    used: Vec<u32>,
}

/// As many subnets as the node IPAM controller allows per cluster CIDR (16 bits of index).
const MAX_SUBNETS: u32 = 1 << 16;

impl Pool {
    fn new(cidr: IpNet, config: &Config) -> Self {
        let prefix = match cidr {
            IpNet::V4(_) => config.node_prefix_v4,
            IpNet::V6(_) => config.node_prefix_v6,
        };
        let count = match prefix.checked_sub(cidr.prefix_len()) {
            Some(bits @ 0..16) if prefix <= cidr.max_prefix_len() => 1 << bits,
            Some(_) if prefix <= cidr.max_prefix_len() => MAX_SUBNETS,
            _ => 0,
        };
        // A cluster CIDR with a single subnet has none to skip.
        let first = if count > 1 { config.first_node_subnet } else { 0 };
        Self { cidr: cidr.trunc(), prefix, first, count, used: Vec::new() }
    }

    /// Note that a node has `range`, which may be of another size than this pool's subnets.
    fn occupy(&mut self, range: &IpNet) {
        if self.count == 0 || !(self.cidr.contains(range) || range.contains(&self.cidr)) {
            return;
        }
        let first = self.index_of(range.network());
        let last = self.index_of(range.broadcast());
        self.used.extend(first..=last.min(self.count - 1));
    }

    fn index_of(&self, address: IpAddr) -> u32 {
        let distance = bits(address).saturating_sub(bits(self.cidr.network()));
        let shift = u32::from(self.cidr.max_prefix_len() - self.prefix);
        let index = distance.checked_shr(shift).unwrap_or(0);
        u32::try_from(index).unwrap_or(u32::MAX)
    }

    /// `used` is sorted.
    fn lowest_free(&self) -> Option<IpNet> {
        let index = (self.first..self.count).find(|index| self.used.binary_search(index).is_err())?;
        let shift = u32::from(self.cidr.max_prefix_len() - self.prefix);
        let offset = u128::from(index).checked_shl(shift).unwrap_or(0);
        let address = match self.cidr.network() {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(base.to_bits() | offset as u32)),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(base.to_bits() | offset)),
        };
        IpNet::new(address, self.prefix).ok()
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::testing::{Cluster, config_dual};

    fn cidrs(cluster: &Cluster, node: &str) -> Value {
        cluster.find("Node", "", node).unwrap()["spec"]["podCIDRs"].clone()
    }

    #[test]
    fn nodes_get_the_lowest_free_subnets_in_creation_order() {
        let mut cluster = Cluster::new(config_dual());
        cluster.apply_yaml(
            "{apiVersion: v1, kind: Node, metadata: {name: fixed}, spec: {podCIDRs: [10.244.2.0/23]}}",
        );
        for name in ["node-1", "node-2", "node-10"] {
            cluster.apply_yaml(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}"));
        }
        cluster.settle();
        assert_eq!(cidrs(&cluster, "node-1"), json!(["10.244.1.0/24", "fd00:10:244:1::/64"]));
        assert_eq!(cidrs(&cluster, "node-2"), json!(["10.244.4.0/24", "fd00:10:244:2::/64"]));
        assert_eq!(cidrs(&cluster, "node-10"), json!(["10.244.5.0/24", "fd00:10:244:3::/64"]));
        assert_eq!(cluster.find("Node", "", "node-1").unwrap()["spec"]["podCIDR"], "10.244.1.0/24");
        assert_eq!(cidrs(&cluster, "fixed"), json!(["10.244.2.0/23"]));
    }

    #[test]
    fn an_exhausted_pool_is_reported_with_its_count() {
        let config = Config {
            cluster_cidrs: vec!["10.0.0.0/23".parse().unwrap()],
            first_node_subnet: 0,
            ..Config::default()
        };
        let mut cluster = Cluster::new(config);
        for i in 0..3 {
            cluster.apply_yaml(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: n{i}}}}}"));
        }
        cluster.settle();
        let events = cluster.events("n2");
        assert_eq!(events.len(), 1);
        assert!(events[0].contains("10.0.0.0/23: 2 nodes have one"), "{events:?}");
        assert!(cluster.find("Node", "", "n2").unwrap().pointer("/spec/podCIDR").is_none());
    }

    #[test]
    fn a_malformed_pod_cidr_is_reported_and_others_go_on() {
        let mut cluster = Cluster::new(Config::default());
        cluster.apply_yaml("{apiVersion: v1, kind: Node, metadata: {name: bad}, spec: {podCIDR: 10.244.1}}");
        cluster.apply_yaml("{apiVersion: v1, kind: Node, metadata: {name: good}}");
        cluster.settle();
        assert!(cluster.events("bad")[0].starts_with("spec.podCIDR: \"10.244.1\" is not an address range"));
        assert_eq!(cidrs(&cluster, "good"), json!(["10.244.1.0/24"]));
    }
}
