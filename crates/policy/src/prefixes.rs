//! Longest-prefix look-up, and which blocks of addresses hold each prefix.

use std::{collections::HashMap, net::IpAddr};

use ipnet::IpNet;
use podway_model::policy::IpBlock;

use crate::table::ipv4_boundary;

/// Values by prefix. Families are apart.
#[derive(Clone, Debug)]
pub struct PrefixMap<T> {
    values: HashMap<IpNet, T>,
    /// How many prefixes have each length: IPv4, IPv6.
    lengths: [Vec<(u8, usize)>; 2],
}

impl<T> Default for PrefixMap<T> {
    fn default() -> Self {
        Self { values: HashMap::new(), lengths: [Vec::new(), Vec::new()] }
    }
}

impl<T> PrefixMap<T> {
    /// Sets the value of a prefix, or removes it.
    pub fn set(&mut self, prefix: IpNet, value: Option<T>) {
        let lengths = &mut self.lengths[usize::from(matches!(prefix, IpNet::V6(_)))];
        let length = prefix.prefix_len();
        // The longest first.
        let place = lengths.binary_search_by(|(known, _)| length.cmp(known));
        match value {
            Some(value) => {
                if self.values.insert(prefix, value).is_none() {
                    match place {
                        Ok(i) => lengths[i].1 += 1,
                        Err(i) => lengths.insert(i, (length, 1)),
                    }
                }
            }
            None => {
                if let (Some(_), Ok(i)) = (self.values.remove(&prefix), place) {
                    lengths[i].1 -= 1;
                    if lengths[i].1 == 0 {
                        lengths.remove(i);
                    }
                }
            }
        }
    }

    /// The value of a prefix itself.
    pub fn get(&self, prefix: &IpNet) -> Option<&T> {
        self.values.get(prefix)
    }

    /// The value of the longest prefix that holds an address.
    pub fn longest(&self, addr: IpAddr) -> Option<&T> {
        self.lengths[usize::from(addr.is_ipv6())]
            .iter()
            .find_map(|(length, _)| self.values.get(&IpNet::new(addr, *length).ok()?.trunc()))
    }

    /// All prefixes with their values, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&IpNet, &T)> {
        self.values.iter()
    }

    /// How many prefixes there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

/// Every prefix at which the answer to "which blocks hold this address?" changes, with the answer: the blocks' numbers,
/// sorted.
pub(crate) fn boundaries<'a>(blocks: impl Iterator<Item = (u32, &'a IpBlock)>) -> Vec<(IpNet, Vec<u32>)> {
    #[derive(Default)]
    struct Here {
        enter: Vec<u32>,
        leave: Vec<u32>,
    }
    let mut places: HashMap<IpNet, Here> = HashMap::new();
    let mut has_v6 = false;
    for (id, block) in blocks {
        has_v6 |= matches!(block.cidr, IpNet::V6(_));
        places.entry(block.cidr).or_default().enter.push(id);
        for except in &block.except {
            places.entry(*except).or_default().leave.push(id);
        }
    }
    if has_v6 {
        places.entry(ipv4_boundary()).or_default();
    }
    let mut sorted: Vec<(IpNet, Here)> = places.into_iter().collect();
    // What holds comes right before what it holds.
    sorted.sort_unstable_by_key(|(net, _)| (net.addr(), net.prefix_len()));
    let mut out: Vec<(IpNet, Vec<u32>)> = Vec::with_capacity(sorted.len());
    let mut above: Vec<usize> = Vec::new();
    for (net, here) in sorted {
        while above.last().is_some_and(|i| !out[*i].0.contains(&net)) {
            above.pop();
        }
        let mut ids = above.last().map_or_else(Vec::new, |i| out[*i].1.clone());
        ids.extend(&here.enter);
        ids.retain(|id| !here.leave.contains(id));
        ids.sort_unstable();
        above.push(out.len());
        out.push((net, ids));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cidr: &str, except: &[&str]) -> IpBlock {
        IpBlock { cidr: cidr.parse().unwrap(), except: except.iter().map(|e| e.parse().unwrap()).collect() }
    }

    #[test]
    fn blocks_with_exceptions_nest() {
        let blocks = [
            block("0.0.0.0/0", &["10.0.0.0/8"]),
            block("10.1.0.0/16", &["10.1.2.0/24", "10.1.2.3/32"]),
            block("10.1.2.3/32", &[]),
            block("::/0", &["fd00::/8"]),
        ];
        let mut map = PrefixMap::default();
        for (net, ids) in boundaries((0..).zip(&blocks)) {
            map.set(net, Some(ids));
        }
        for (addr, expected) in [
            ("8.8.8.8", vec![0]),
            ("10.9.9.9", vec![]),
            ("10.1.9.9", vec![1]),
            ("10.1.2.9", vec![]),
            ("10.1.2.3", vec![2]),
            ("2001:db8::1", vec![3]),
            ("fd00::1", vec![]),
        ] {
            assert_eq!(map.longest(addr.parse().unwrap()), Some(&expected), "{addr}");
        }
        map.set("10.1.2.3/32".parse().unwrap(), None);
        assert_eq!(map.longest("10.1.2.3".parse().unwrap()), Some(&vec![]));
    }

    #[test]
    fn ipv6_prefixes_bring_the_boundary_of_ipv4() {
        let found = boundaries([(7, &block("::/0", &[]))].into_iter());
        assert_eq!(found, [("0.0.0.0/0".parse().unwrap(), vec![]), ("::/0".parse().unwrap(), vec![7])]);
        assert!(boundaries([(7, &block("10.0.0.0/8", &[]))].into_iter()).len() == 1);
    }
}
