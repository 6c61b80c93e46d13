//! The kernel's protocol counters (`/proc/net/snmp`, `/proc/net/snmp6`; RFC 4293 names).
//!
//! They belong to the network namespace of the calling *thread*; use [`crate::Netns::run`] for another's.

use std::collections::BTreeMap;
use std::{fs, io};

use crate::{Error, Result};

/// All counters of one moment. IPv4 ones are named `Ip.FragCreates`, `Udp.InErrors`, …; IPv6 ones as the
/// kernel has them, `Ip6FragCreates`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// Reads both files. A kernel without IPv6 has only the first.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn read() -> Result<Self> {
        // /proc/net is the namespace of the process's first thread, not of the calling one.
        let v4 = "/proc/thread-self/net/snmp";
        let v6 = "/proc/thread-self/net/snmp6";
        let mut counters = Self::parse(&fs::read_to_string(v4).map_err(|e| Error::io("read", v4, e))?);
        match fs::read_to_string(v6) {
            Ok(text) => counters.0.extend(Self::parse6(&text).0),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("read", v6, e)),
        }
        Ok(counters)
    }

    /// Lines in pairs: `Ip: Forwarding DefaultTTL …` then `Ip: 1 64 …`.
    fn parse(text: &str) -> Self {
        let mut counters = BTreeMap::new();
        let mut names: Option<(&str, &str)> = None;
        for (group, rest) in text.lines().filter_map(|line| line.split_once(':')) {
            match names.take() {
                Some((previous, header)) if previous == group => {
                    for (name, value) in header.split_whitespace().zip(rest.split_whitespace()) {
                        // A few values are signed (MaxConn -1) and no counters.
                        if let Ok(value) = value.parse() {
                            counters.insert(format!("{group}.{name}"), value);
                        }
                    }
                }
                _ => names = Some((group, rest)),
            }
        }
        Self(counters)
    }

    /// One `name value` per line.
    fn parse6(text: &str) -> Self {
        let pair = |line: &str| {
            let (name, value) = line.split_once(char::is_whitespace)?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        };
        Self(text.lines().filter_map(pair).collect())
    }

    /// One counter, or 0 when the kernel does not have it.
    pub fn value(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Fragments made from packets that were too large for the next link, IPv4 and IPv6 together.
    pub fn fragments_created(&self) -> u64 {
        self.value("Ip.FragCreates") + self.value("Ip6FragCreates")
    }

    /// Packets that were fragmented, IPv4 and IPv6 together.
    pub fn packets_fragmented(&self) -> u64 {
        self.value("Ip.FragOKs") + self.value("Ip6FragOKs")
    }

    /// Packets dropped because they were too large and may not be fragmented, IPv4 and IPv6 together.
    pub fn fragmentations_failed(&self) -> u64 {
        self.value("Ip.FragFails") + self.value("Ip6FragFails")
    }

    /// Every counter by name, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_the_pairs_of_snmp_and_skips_what_is_no_counter() {
        let counters = Counters::parse(
            "Ip: Forwarding FragOKs FragFails FragCreates\nIp: 1 2 3 710000\nTcp: MaxConn ActiveOpens\nTcp: -1 7\n",
        );
        assert_eq!(counters.value("Ip.FragCreates"), 710_000);
        assert_eq!(counters.value("Tcp.ActiveOpens"), 7);
        assert_eq!(counters.value("Tcp.MaxConn"), 0);
        assert_eq!((counters.packets_fragmented(), counters.fragmentations_failed()), (2, 3));
    }

    #[test]
    fn a_header_without_values_and_garbage_cost_only_themselves() {
        let counters = Counters::parse("Ip: FragOKs\nTcp: ActiveOpens\nTcp: 4\n\u{0}\nIp:\n");
        assert_eq!(counters.iter().collect::<Vec<_>>(), [("Tcp.ActiveOpens", 4)]);
    }

    #[test]
    fn reads_this_kernel() {
        let counters = Counters::read().unwrap();
        assert!(counters.iter().any(|(name, _)| name == "Ip.FragCreates"));
    }
}
