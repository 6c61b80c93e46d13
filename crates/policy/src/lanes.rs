//! Verdicts as functions of protocol and port, and the fewest entries that say the same.

use podway_model::Protocol;

use crate::table::{Entry, Verdict};

/// The protocols with ports, in the order of the lanes.
pub(crate) const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
/// Lanes: one for each protocol with ports, and one for all the others.
pub(crate) const LANES: usize = PROTOCOLS.len() + 1;
/// The lane of protocols without ports.
pub(crate) const OTHER: usize = PROTOCOLS.len();

/// The lane of a protocol.
pub(crate) fn lane_of(protocol: Protocol) -> usize {
    match protocol {
        Protocol::Tcp => 0,
        Protocol::Udp => 1,
        Protocol::Sctp => 2,
    }
}

/// Constant from each port to the next one that is listed; the first is port 0.
type Lane = Vec<(u16, Verdict)>;

/// A verdict for every protocol and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lanes {
    ports: [Lane; 3],
    other: Verdict,
}

impl Lanes {
    pub(crate) fn constant(verdict: Verdict) -> Self {
        Self { ports: std::array::from_fn(|_| vec![(0, verdict)]), other: verdict }
    }

    /// From ranges that cover everything once, in any order.
    pub(crate) fn from_ranges(mut ranges: [Vec<(u16, u16, Verdict)>; LANES]) -> Self {
        let other = ranges[OTHER].first().map_or_else(Verdict::default, |(_, _, verdict)| *verdict);
        let ports = std::array::from_fn(|lane| {
            let ranges = &mut ranges[lane];
            ranges.sort_unstable_by_key(|(first, ..)| *first);
            let mut lane: Lane = Vec::with_capacity(ranges.len());
            for (first, _, verdict) in ranges {
                if lane.last().is_none_or(|(_, last)| last != verdict) {
                    lane.push((*first, *verdict));
                }
            }
            lane
        });
        Self { ports, other }
    }

    /// A protocol's verdicts, each from its first port to the next one.
    pub(crate) fn lane(&self, lane: usize) -> &[(u16, Verdict)] {
        &self.ports[lane]
    }

    /// The verdict for a port.
    pub(crate) fn at(&self, lane: usize, port: u16) -> Verdict {
        verdict_at(&self.ports[lane], port)
    }

    /// The verdict for protocols without ports.
    pub(crate) fn other(&self) -> Verdict {
        self.other
    }

    /// The fewest entries, of those that this knows to make, which make this of `base`: what holds where there is no
    /// entry.
    pub(crate) fn encode(&self, base: &Lanes) -> Vec<Entry> {
        let with_root = {
            let root = Entry { protocol: 0, port: 0, bits: 0, verdict: self.other };
            let mut entries = vec![root];
            let below = vec![(0, self.other)];
            for (lane, protocol) in self.ports.iter().zip(PROTOCOLS) {
                encode_lane(protocol, lane, &below, &mut entries);
            }
            entries
        };
        if self.other != base.other {
            return with_root;
        }
        let mut without = Vec::new();
        for ((lane, below), protocol) in self.ports.iter().zip(&base.ports).zip(PROTOCOLS) {
            encode_lane(protocol, lane, below, &mut without);
        }
        if without.len() <= with_root.len() { without } else { with_root }
    }
}

fn verdict_at(lane: &[(u16, Verdict)], port: u16) -> Verdict {
    // The first entry is that of port 0.
    lane[lane.partition_point(|(first, _)| *first <= port) - 1].1
}

/// Ranges in which `lane` differs from `base`.
fn differences(lane: &Lane, base: &Lane) -> Vec<(u16, u16, Verdict)> {
    let mut starts: Vec<u16> = lane.iter().chain(base).map(|(first, _)| *first).collect();
    starts.sort_unstable();
    starts.dedup();
    let mut ranges: Vec<(u16, u16, Verdict)> = Vec::new();
    for (i, first) in starts.iter().enumerate() {
        let last = starts.get(i + 1).map_or(u16::MAX, |next| next - 1);
        let verdict = verdict_at(lane, *first);
        if verdict == verdict_at(base, *first) {
            continue;
        }
        match ranges.last_mut() {
            Some((_, end, same)) if *same == verdict && *end + 1 == *first => *end = last,
            _ => ranges.push((*first, last, verdict)),
        }
    }
    ranges
}

fn encode_lane(protocol: Protocol, lane: &Lane, base: &Lane, entries: &mut Vec<Entry>) {
    let protocol = protocol.number();
    let prefixes = |base: &Lane| {
        let mut entries = Vec::new();
        for (first, last, verdict) in differences(lane, base) {
            for (port, bits) in prefixes(first, last) {
                entries.push(Entry { protocol, port, bits, verdict });
            }
        }
        entries
    };
    let plain = prefixes(base);
    if plain.len() <= 1 {
        entries.extend(plain);
        return;
    }
    // One entry for the whole protocol, and exceptions: fewer when most of it differs from what is below.
    let length = |i: usize| lane.get(i + 1).map_or(1 << 16, |next| u32::from(next.0)) - u32::from(lane[i].0);
    let widest = (0..lane.len()).max_by_key(|i| length(*i)).map_or_else(Verdict::default, |i| lane[i].1);
    let exceptions = prefixes(&vec![(0, widest)]);
    if exceptions.len() + 1 < plain.len() {
        entries.push(Entry { protocol, port: 0, bits: 0, verdict: widest });
        entries.extend(exceptions);
    } else {
        entries.extend(plain);
    }
}

/// A range of ports as prefixes: at most 30.
fn prefixes(first: u16, last: u16) -> Vec<(u16, u8)> {
    let (mut at, end) = (u32::from(first), u32::from(last) + 1);
    let mut out = Vec::new();
    while at < end {
        let mut size = if at == 0 { 1 << 16 } else { 1 << at.trailing_zeros() };
        while at + size > end {
            size >>= 1;
        }
        let bits = 16 - u8::try_from(size.trailing_zeros()).unwrap_or(16);
        out.push((u16::try_from(at).unwrap_or(u16::MAX), bits));
        at += size;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{RuleId, longest};

    fn verdict(allow: bool, rule: u32) -> Verdict {
        Verdict { allow, audit: false, rule: RuleId(rule) }
    }

    #[test]
    fn ranges_become_few_prefixes() {
        assert_eq!(prefixes(0, 65535), [(0, 0)]);
        assert_eq!(prefixes(80, 80), [(80, 16)]);
        assert_eq!(prefixes(65535, 65535), [(65535, 16)]);
        assert_eq!(prefixes(80, 83), [(80, 14)]);
        assert_eq!(prefixes(1, 65534).len(), 30);
    }

    #[test]
    fn entries_say_what_the_lanes_say() {
        let (yes, no) = (verdict(true, 1), verdict(false, 2));
        let full = |v| vec![(0, 65535, v)];
        let cases = [
            // One port open in a closed base; everything but one port; a different verdict for other protocols.
            ([vec![(0, 79, no), (80, 80, yes), (81, 65535, no)], full(no), full(no), vec![(0, 0, no)]], 1),
            ([vec![(0, 79, yes), (80, 80, no), (81, 65535, yes)], full(no), full(no), vec![(0, 0, no)]], 2),
            ([full(yes), full(yes), full(yes), vec![(0, 0, yes)]], 1),
            ([full(no), full(no), full(no), vec![(0, 0, no)]], 0),
            ([full(yes), full(yes), full(no), vec![(0, 0, yes)]], 2),
        ];
        let base = Lanes::constant(no);
        for (ranges, count) in cases {
            let lanes = Lanes::from_ranges(ranges.clone());
            let entries = lanes.encode(&base);
            assert_eq!(entries.len(), count, "{ranges:?} {entries:?}");
            for (lane, protocol) in [(0, 6), (1, 17), (2, 132), (3, 1)] {
                for port in [0, 79, 80, 81, 65535] {
                    let port = if lane == OTHER { 0 } else { port };
                    let expected = ranges[lane].iter().find(|(a, b, _)| *a <= port && port <= *b).unwrap().2;
                    let found = longest(&entries, protocol, port).unwrap_or(no);
                    assert_eq!(found, expected, "{protocol} {port}");
                }
            }
        }
    }
}
