//! The nodes of the cluster, with ranges that overlap refused by name.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use crate::{Node, Rejection};

/// A change of the set of nodes, as the API server reports it.
#[derive(Clone, Debug)]
pub enum NodeChange {
    /// Added or modified.
    Set(Node),
    /// Gone, by name.
    Removed(String),
}

/// All nodes, and which of their ranges are in use.
///
/// Of two nodes whose ranges overlap the older one keeps its range (then the one that sorts first by name),
/// whatever the order in which they were heard of. The other one's range is refused until the conflict ends.
/// Reserved ranges ([`Nodes::set_reserved`]) go before all of them, whatever the age.
#[derive(Clone, Debug, Default)]
pub struct Nodes {
    nodes: BTreeMap<String, Node>,
    refused: BTreeMap<String, Vec<Rejection>>,
    reserved: Vec<(IpNet, String)>,
}

impl Nodes {
    /// No nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies one change and returns the refusals that are new with it.
    ///
    /// Work is proportional to the number of nodes, which compares a handful of prefixes each.
    pub fn apply(&mut self, change: NodeChange) -> Vec<Rejection> {
        match change {
            NodeChange::Set(node) => {
                self.nodes.insert(node.name.clone(), node);
            }
            NodeChange::Removed(name) => {
                self.nodes.remove(&name);
            }
        }
        self.refresh()
    }

    /// Replaces the whole set (after a new list) and returns the refusals that are new.
    pub fn replace(&mut self, nodes: Vec<Node>) -> Vec<Rejection> {
        self.nodes = nodes.into_iter().map(|node| (node.name.clone(), node)).collect();
        self.refresh()
    }

    /// Sets what no node may have as a range, each with what it is ("the underlay 172.18.0.0/16 (eth0)"), and
    /// returns the refusals that are new. A range is refused when it overlaps one of these, either way.
    pub fn set_reserved(&mut self, reserved: Vec<(IpNet, String)>) -> Vec<Rejection> {
        if self.reserved == reserved {
            return Vec::new();
        }
        self.reserved = reserved;
        self.refresh()
    }

    /// Works the refusals out anew and returns those that were not there before.
    fn refresh(&mut self) -> Vec<Rejection> {
        let before = std::mem::replace(&mut self.refused, refusals(&self.nodes, &self.reserved));
        let is_new = |r: &&Rejection| before.get(&r.name).is_none_or(|old| !old.contains(r));
        self.refused.values().flatten().filter(is_new).cloned().collect()
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// All nodes in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The ranges of a node that are in use: those that are not refused.
    pub fn pod_cidrs(&self, name: &str) -> Vec<IpNet> {
        let Some(node) = self.nodes.get(name) else { return Vec::new() };
        let refused = self.refusals(name);
        node.pod_cidrs
            .iter()
            .enumerate()
            .filter(|(i, _)| !refused.iter().any(|r| r.field == cidr_field(*i)))
            .map(|(_, cidr)| *cidr)
            .collect()
    }

    /// Why ranges of a node are refused; empty when all are in use.
    pub fn refusals(&self, name: &str) -> &[Rejection] {
        self.refused.get(name).map_or(&[], Vec::as_slice)
    }

    /// Every refusal.
    pub fn all_refusals(&self) -> impl Iterator<Item = &Rejection> {
        self.refused.values().flatten()
    }
}

fn cidr_field(index: usize) -> String {
    format!("spec.podCIDRs[{index}]")
}

/// Refuses each range that overlaps a reserved one; then, from the oldest node to the youngest, each that overlaps
/// one already in use or holds a node's own address.
fn refusals(
    nodes: &BTreeMap<String, Node>,
    reserved: &[(IpNet, String)],
) -> BTreeMap<String, Vec<Rejection>> {
    let mut by_age: Vec<&Node> = nodes.values().collect();
    by_age.sort_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)));
    let mut addresses: Vec<(IpAddr, &str)> =
        by_age.iter().flat_map(|n| n.internal_ips.iter().map(|ip| (*ip, n.name.as_str()))).collect();
    addresses.sort();

    // Ranges in use by their first address. They never overlap one another, so a new range can only
    // conflict with its neighbours in this order.
    let mut used: BTreeMap<IpAddr, (IpNet, &str)> = BTreeMap::new();
    let mut refused: BTreeMap<String, Vec<Rejection>> = BTreeMap::new();
    for node in by_age {
        for (i, cidr) in node.pod_cidrs.iter().enumerate() {
            let first = cidr.network();
            let kept = || {
                reserved
                    .iter()
                    .find(|(range, _)| range.contains(cidr) || cidr.contains(range))
                    .map(|(_, what)| format!("{cidr} overlaps {what}; give the node another range"))
            };
            let neighbours = used
                .range(..=first)
                .next_back()
                .into_iter()
                .chain(used.range(first..).next())
                .map(|(_, v)| v);
            let overlap = neighbours
                .filter(|(other, _)| other.contains(cidr) || cidr.contains(other))
                .map(|(other, owner)| {
                    format!("{cidr} overlaps {other} of node {owner}, which is older; give one of them another range")
                })
                .next();
            let holds = || {
                let at = addresses.partition_point(|(ip, _)| *ip < first);
                addresses
                    .get(at)
                    .filter(|(ip, _)| cidr.contains(ip))
                    .map(|(ip, owner)| format!("{cidr} holds {ip}, the underlay address of node {owner}"))
            };
            match kept().or(overlap).or_else(holds) {
                Some(cause) => refused.entry(node.name.clone()).or_default().push(Rejection {
                    kind: "Node".to_owned(),
                    namespace: String::new(),
                    name: node.name.clone(),
                    field: cidr_field(i),
                    cause,
                }),
                None => {
                    used.insert(first, (*cidr, &node.name));
                }
            }
        }
    }
    refused
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn node(name: &str, created: &str, ips: &[&str], cidrs: &[&str]) -> Node {
        Node {
            name: name.to_owned(),
            uid: String::new(),
            created: created.to_owned(),
            internal_ips: ips.iter().map(|t| t.parse().unwrap()).collect(),
            pod_cidrs: cidrs.iter().map(|t| t.parse().unwrap()).collect(),
            labels: BTreeMap::new(),
        }
    }

    #[test]
    fn the_younger_of_two_overlapping_nodes_is_refused_by_name() {
        let mut nodes = Nodes::new();
        assert!(
            nodes.apply(NodeChange::Set(node("young", "2026-02-01", &[], &["10.244.1.0/25"]))).is_empty()
        );
        let new = nodes.apply(NodeChange::Set(node("old", "2026-01-01", &[], &["10.244.1.0/24"])));
        assert_eq!(new.len(), 1);
        assert_eq!(new[0].name, "young");
        assert!(new[0].cause.contains("10.244.1.0/24 of node old"), "{}", new[0].cause);
        assert!(nodes.pod_cidrs("young").is_empty());
        assert_eq!(nodes.pod_cidrs("old").len(), 1);
        // The same change again brings nothing new; the conflict's end frees the range.
        assert!(nodes.apply(NodeChange::Set(node("old", "2026-01-01", &[], &["10.244.1.0/24"]))).is_empty());
        nodes.apply(NodeChange::Removed("old".to_owned()));
        assert_eq!(nodes.pod_cidrs("young").len(), 1);
    }

    #[test]
    fn a_range_that_holds_a_nodes_address_is_refused() {
        let mut nodes = Nodes::new();
        nodes.apply(NodeChange::Set(node("a", "1", &["172.18.1.1"], &["10.244.1.0/24"])));
        let new =
            nodes.apply(NodeChange::Set(node("b", "2", &["172.18.1.2"], &["172.18.0.0/16", "fd00::/64"])));
        assert_eq!(new.len(), 1);
        assert!(new[0].cause.contains("172.18.1.1, the underlay address of node a"), "{}", new[0].cause);
        assert_eq!(nodes.pod_cidrs("b"), vec!["fd00::/64".parse::<IpNet>().unwrap()]);
    }

    #[test]
    fn reserved_ranges_go_before_the_oldest_node() {
        let reserve = |ranges: &[(&str, &str)]| {
            ranges.iter().map(|(range, what)| (range.parse().unwrap(), (*what).to_owned())).collect()
        };
        let underlay = ("172.18.0.0/16", "the underlay 172.18.0.0/16 (eth0)");
        // Podcidr, what it overlaps: inside, around, the very same, another family, not at all.
        let cases = [
            ("172.18.0.0/24", Some("172.18.0.0/24 overlaps the underlay 172.18.0.0/16 (eth0)")),
            ("172.0.0.0/8", Some("172.0.0.0/8 overlaps the underlay 172.18.0.0/16 (eth0)")),
            ("172.18.0.0/16", Some("172.18.0.0/16 overlaps the underlay 172.18.0.0/16 (eth0)")),
            ("10.0.7.0/24", Some("10.0.7.0/24 overlaps the API server 10.0.7.7")),
            ("fe80:0:1::/64", Some("overlaps link-local addresses")),
            ("172.19.0.0/24", None),
            ("fd00::/64", None),
        ];
        for (cidr, cause) in cases {
            let mut nodes = Nodes::new();
            nodes.apply(NodeChange::Set(node("oldest", "1", &[], &[cidr])));
            nodes.apply(NodeChange::Set(node("young", "2", &[], &["10.244.2.0/24"])));
            let new = nodes.set_reserved(reserve(&[
                underlay,
                ("10.0.7.7/32", "the API server 10.0.7.7"),
                ("fe80::/10", "link-local addresses fe80::/10"),
            ]));
            assert_eq!(new.len(), usize::from(cause.is_some()), "{cidr}: {new:?}");
            let Some(cause) = cause else { continue };
            assert_eq!((new[0].name.as_str(), new[0].field.as_str()), ("oldest", "spec.podCIDRs[0]"));
            assert!(new[0].cause.contains(cause), "{} lacks {cause}", new[0].cause);
            assert!(nodes.pod_cidrs("oldest").is_empty());
            assert_eq!(nodes.pod_cidrs("young").len(), 1);
            // The underlay moves away, and the range is in use.
            assert!(nodes.set_reserved(Vec::new()).is_empty());
            assert_eq!(nodes.pod_cidrs("oldest").len(), 1, "{cidr}");
        }
    }

    #[test]
    fn a_refused_range_stands_in_nobodys_way() {
        let mut nodes = Nodes::new();
        nodes.set_reserved(vec![("10.0.0.1/32".parse().unwrap(), "the default gateway 10.0.0.1".into())]);
        nodes.apply(NodeChange::Set(node("old", "1", &[], &["10.0.0.0/16"])));
        assert!(nodes.apply(NodeChange::Set(node("young", "2", &[], &["10.0.7.0/24"]))).is_empty());
        assert_eq!(nodes.pod_cidrs("young").len(), 1);
    }

    proptest! {
        /// Whatever the order of events, what is in use does not overlap, and the outcome is the same.
        #[test]
        fn ranges_in_use_never_overlap(specs in prop::collection::vec((0u8..4, 0u8..8, 24u8..28), 1..12), seed in 0usize..100) {
            let all: Vec<Node> = specs.iter().enumerate().map(|(i, (age, third, len))| {
                let cidr = IpNet::new(format!("10.1.{third}.{}", i * 16 % 256).parse().unwrap(), *len).unwrap().trunc();
                node(&format!("n{i}"), &age.to_string(), &[], &[&cidr.to_string()])
            }).collect();
            let mut one = Nodes::new();
            for n in &all { one.apply(NodeChange::Set(n.clone())); }
            let mut other = Nodes::new();
            for k in 0..all.len() { other.apply(NodeChange::Set(all[(k + seed) % all.len()].clone())); }
            let used: Vec<IpNet> = all.iter().flat_map(|n| one.pod_cidrs(&n.name)).collect();
            for (i, a) in used.iter().enumerate() {
                for b in &used[i + 1..] { prop_assert!(!a.contains(b) && !b.contains(a), "{a} {b}"); }
            }
            for n in &all { prop_assert_eq!(one.pod_cidrs(&n.name), other.pod_cidrs(&n.name)); }
        }
    }
}
