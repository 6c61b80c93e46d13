//! Which leaf a frontend is in.

use std::{collections::BTreeSet, fmt::Write as _, net::IpAddr};

use podway_services::table::Family;

/// Ports of one block of node ports.
const BLOCK: u16 = 64;

/// With so many entries or fewer a tree has one level of sixteen; the next number is for two.
const GROW: [usize; 2] = [64, 16_384];
const MOST: u8 = 3;

/// Levels of a tree with so many entries that has some already: it shrinks late, since each change of it rewrites
/// all leaves.
pub(super) fn depth(now: u8, entries: usize) -> u8 {
    let fitting = |scale: usize| {
        let levels = GROW.iter().filter(|limit| entries > **limit / scale).count();
        u8::try_from(levels).map_or(MOST, |levels| levels + 1)
    };
    now.clamp(fitting(1), fitting(4))
}

/// A leaf: its place in the tree of addresses, or its block of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Leaf {
    /// The low nibbles of the address, lowest first, and how many.
    Address(u16, u8),
    /// The first port.
    Ports(u16),
}

impl Leaf {
    pub(super) fn of_address(addr: &IpAddr, depth: u8) -> Self {
        let low = match addr {
            IpAddr::V4(addr) => u32::from(*addr) & 0xfff,
            IpAddr::V6(addr) => u128::from(*addr) as u32 & 0xfff,
        };
        let low = low & ((1 << (4 * u32::from(depth))) - 1);
        Leaf::Address(u16::try_from(low).unwrap_or(0), depth)
    }

    pub(super) const fn of_port(port: u16) -> Self {
        Leaf::Ports(port / BLOCK * BLOCK)
    }

    /// The chain's name after `PODWAY-` and the table's letter.
    pub(super) fn name(self) -> String {
        match self {
            Leaf::Address(low, depth) => address_name(low, depth),
            Leaf::Ports(first) => format!("PORTS-{first}"),
        }
    }
}

fn address_name(low: u16, depth: u8) -> String {
    let mut name = "IP-".to_owned();
    for level in 0..depth {
        let _ = write!(name, "{:x}", low >> (4 * level) & 0xf);
    }
    name
}

/// The chains above the leaves: name, and the rules (match and the rest of the target's name).
pub(super) fn branches(leaves: &BTreeSet<Leaf>, family: Family) -> Vec<(String, Vec<(String, String)>)> {
    let mut nodes = std::collections::BTreeMap::<String, BTreeSet<(String, String)>>::new();
    for leaf in leaves {
        let Leaf::Address(low, depth) = *leaf else { continue };
        for level in 0..depth {
            let parent = if level == 0 { String::new() } else { address_name(low, level) };
            let shift = 4 * u32::from(level);
            let (value, mask) = (u32::from(low) & (0xf << shift), 0xf_u32 << shift);
            let condition = match family {
                Family::V4 => {
                    format!("-d {}/{}", std::net::Ipv4Addr::from(value), std::net::Ipv4Addr::from(mask))
                }
                Family::V6 => format!(
                    "-d {}/{}",
                    std::net::Ipv6Addr::from(u128::from(value)),
                    std::net::Ipv6Addr::from(u128::from(mask))
                ),
            };
            nodes.entry(parent).or_default().insert((condition, address_name(low, level + 1)));
        }
    }
    nodes.into_iter().map(|(name, rules)| (name, rules.into_iter().collect())).collect()
}

/// The ports of a block, as iptables writes a range.
pub(super) fn block(first: u16) -> String {
    format!("{first}:{}", first.saturating_add(BLOCK - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_grow_early_and_shrink_late() {
        for (now, entries, then) in [
            (1, 0, 1),
            (1, 64, 1),
            (1, 65, 2),
            (2, 64, 2),
            (2, 17, 2),
            (2, 16, 1),
            (2, 16_385, 3),
            (3, 5000, 3),
            (3, 4000, 2),
        ] {
            assert_eq!(depth(now, entries), then, "{now} levels, {entries} entries");
        }
    }

    #[test]
    fn leaves_by_low_bits() {
        let leaves: BTreeSet<Leaf> = ["10.96.0.18", "10.97.3.18", "10.96.0.2"]
            .iter()
            .map(|a| Leaf::of_address(&a.parse().unwrap(), 2))
            .collect();
        assert_eq!(leaves.iter().map(|l| l.name()).collect::<Vec<_>>(), ["IP-20", "IP-21"]);
        let branches = branches(&leaves, Family::V4);
        assert_eq!(branches[0], (String::new(), vec![("-d 0.0.0.2/0.0.0.15".into(), "IP-2".into())]));
        assert_eq!(branches[1].1.len(), 2);
        assert_eq!(branches[1].1[1], ("-d 0.0.0.16/0.0.0.240".into(), "IP-21".into()));
    }
}
