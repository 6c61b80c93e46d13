//! At which of its addresses a node serves node ports.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::table::Family;

/// A choice of addresses by ranges. A family without any range is served at every address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePortAddresses {
    ranges: Vec<IpNet>,
}

impl NodePortAddresses {
    /// Addresses in these ranges.
    pub fn new(ranges: &[IpNet]) -> Self {
        Self { ranges: ranges.to_vec() }
    }

    /// Whether every address of a family is served.
    pub fn all(&self, family: Family) -> bool {
        let mut of_family = self.ranges.iter().filter(|range| Family::of_net(range) == family).peekable();
        of_family.peek().is_none() || of_family.any(|range| range.prefix_len() == 0)
    }

    /// Those of the node's addresses that are served: for [`crate::table::NodeView::node_port_addresses`].
    pub fn of(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let served =
            |ip: &&IpAddr| self.all(Family::of(ip)) || self.ranges.iter().any(|range| range.contains(*ip));
        addresses.iter().filter(served).copied().collect()
    }
}
