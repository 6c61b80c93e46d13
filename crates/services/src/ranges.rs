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
        self.at(addr).is_some_and(|range| range.contains(addr))
    }

    /// The only range that an address could be in: the last that begins at or before it.
    fn at(&self, addr: &IpAddr) -> Option<&IpNet> {
        let after = self.0.partition_point(|range| range.network() <= *addr);
        after.checked_sub(1).map(|i| &self.0[i])
    }

    /// Whether there is any range of a family.
    pub(crate) fn has(&self, family: Family) -> bool {
        self.0.iter().any(|range| Family::of_net(range) == family)
    }

    /// Whether everything in `other` is in here.
    pub(crate) fn covers(&self, other: &Ranges) -> bool {
        other.0.iter().all(|range| self.at(&range.network()).is_some_and(|mine| mine.contains(range)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(texts: &[&str]) -> Ranges {
        Ranges::new(&texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<_>>())
    }

    #[test]
    fn look_ups_find_the_range_between_others() {
        let known = ranges(&[
            "10.2.0.0/16",
            "10.0.0.0/24",
            "10.0.1.0/24",
            "fd00::/64",
            "192.168.0.0/16",
            "192.168.7.0/24",
        ]);
        for (addr, expected) in [
            ("9.255.255.255", false),
            ("10.0.0.0", true),
            ("10.0.1.255", true),
            ("10.0.2.0", false),
            ("10.2.255.255", true),
            ("192.168.200.1", true),
            ("255.255.255.255", false),
            ("::", false),
            ("fd00::1", true),
            ("fd00:0:0:1::", false),
        ] {
            assert_eq!(known.contains(&addr.parse().unwrap()), expected, "{addr}");
        }
        assert!(known.has(Family::V6) && !ranges(&["10.0.0.0/8"]).has(Family::V6));
        assert!(known.covers(&ranges(&["10.0.0.0/23", "192.168.7.0/25"])));
        assert!(!known.covers(&ranges(&["10.0.0.0/22"])));
        assert!(known.covers(&ranges(&[])) && !ranges(&[]).covers(&known));
    }
}
