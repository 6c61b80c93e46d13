//! Whether an address is in any of many ranges.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::table::Family;

/// Ranges merged and sorted, so that a look-up is a binary search.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<IpNet>);

impl Ranges {
    pub(crate) fn new(ranges: &[IpNet]) -> Self {
        let mut merged = IpNet::aggregate(&ranges.to_vec());
        merged.sort_by_key(IpNet::network);
        Self(merged)
    }

    pub(crate) fn contains(&self, addr: &IpAddr) -> bool {
        let after = self.0.partition_point(|range| range.network() <= *addr);
        after.checked_sub(1).is_some_and(|i| self.0[i].contains(addr))
    }

    /// Whether there is any range of a family.
    pub(crate) fn has(&self, family: Family) -> bool {
        self.0.iter().any(|range| Family::of_net(range) == family)
    }

    /// Whether everything in `other` is in here.
    pub(crate) fn covers(&self, other: &Ranges) -> bool {
        other.0.iter().all(|range| self.0.iter().any(|mine| mine.contains(range)))
    }
}
