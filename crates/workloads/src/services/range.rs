//! Ranges that addresses and ports are handed out from.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

/// The API server's allocator handles no more addresses of one range than this.
const MAX_SIZE: u64 = 1 << 20;

/// A service CIDR. Offset 0 is the network's address, which nobody gets.
#[derive(Debug)]
pub(super) struct AddressRange {
    pub(super) cidr: IpNet,
    /// Offsets from 1 up to and without this are addresses that may be used.
    end: u64,
    /// Index of the service that has the address.
    used: HashMap<IpAddr, usize>,
    /// Addresses that are given only to who has reserved them.
    reserved: Vec<IpAddr>,
}

impl AddressRange {
    pub(super) fn new(cidr: IpNet, reserved: impl Iterator<Item = u32>) -> Self {
        let cidr = cidr.trunc();
        let host_bits = u32::from(cidr.max_prefix_len() - cidr.prefix_len());
        let size = 1_u64.checked_shl(host_bits).filter(|_| host_bits < 64).unwrap_or(MAX_SIZE).min(MAX_SIZE);
        // The last IPv4 address of a network is its broadcast address.
        let end = if cidr.network().is_ipv4() { size.saturating_sub(1) } else { size };
        let mut range = Self { cidr, end, used: HashMap::new(), reserved: Vec::new() };
        range.reserved = reserved.filter_map(|offset| range.at(u64::from(offset))).collect();
        range
    }

    /// Note that a service has the address. The service that had it before, if that is another one.
    pub(super) fn occupy(&mut self, address: IpAddr, service: usize) -> Result<(), usize> {
        let owner = *self.used.entry(address).or_insert(service);
        if owner == service { Ok(()) } else { Err(owner) }
    }

    /// A free address: the search starts at `hash`, in the part of the range that explicit requests are asked to leave
    /// alone (KEP-3070), and goes to the rest when that is full.
    pub(super) fn allocate(&mut self, service: usize, hash: u64) -> Option<IpAddr> {
        let first_dynamic = 1 + self.static_band();
        let found =
            self.search(first_dynamic..self.end, hash).or_else(|| self.search(1..first_dynamic, hash))?;
        self.used.insert(found, service);
        Some(found)
    }

    /// Take this reserved address, if nobody has it.
    pub(super) fn take_reserved(&mut self, service: usize, offset: u32) -> Option<IpAddr> {
        let address = self.at(u64::from(offset))?;
        self.occupy(address, service).ok().map(|()| address)
    }

    fn search(&self, offsets: std::ops::Range<u64>, hash: u64) -> Option<IpAddr> {
        let count = offsets.end.checked_sub(offsets.start).filter(|count| *count > 0)?;
        (0..count)
            .map(|i| offsets.start + (hash % count + i) % count)
            .filter_map(|offset| self.at(offset))
            .find(|address| !self.used.contains_key(address) && !self.reserved.contains(address))
    }

    fn static_band(&self) -> u64 {
        (self.end / 16).clamp(16, 256).min(self.end.saturating_sub(1))
    }

    fn at(&self, offset: u64) -> Option<IpAddr> {
        if !(1..self.end).contains(&offset) {
            return None;
        }
        Some(match self.cidr.network() {
            IpAddr::V4(base) => Ipv4Addr::from_bits(base.to_bits() + u32::try_from(offset).ok()?).into(),
            IpAddr::V6(base) => Ipv6Addr::from_bits(base.to_bits() + u128::from(offset)).into(),
        })
    }

    pub(super) fn used(&self) -> usize {
        self.used.len()
    }
}

/// Node ports. One number is one service's, whatever the protocol.
#[derive(Debug)]
pub(super) struct PortRange {
    pub(super) ports: RangeInclusive<u16>,
    used: HashMap<u16, usize>,
}

impl PortRange {
    pub(super) fn new(ports: RangeInclusive<u16>) -> Self {
        Self { ports, used: HashMap::new() }
    }

    /// Note that a service has the port. The service that had it before, if that is another one.
    pub(super) fn occupy(&mut self, port: u16, service: usize) -> Result<(), usize> {
        let owner = *self.used.entry(port).or_insert(service);
        if owner == service { Ok(()) } else { Err(owner) }
    }

    /// A free port, searched from `hash`, beyond the part that explicit requests use (KEP-3668) as long as there is one.
    pub(super) fn allocate(&mut self, service: usize, hash: u64) -> Option<u16> {
        let (first, last) = (u64::from(*self.ports.start()), u64::from(*self.ports.end()));
        let size = (last + 1).checked_sub(first).filter(|size| *size > 0)?;
        let band = (size / 32).clamp(16, 128).min(size - 1);
        let search = |start: u64, count: u64| {
            (0..count)
                .map(|i| start + (hash % count + i) % count)
                .filter_map(|port| u16::try_from(port).ok())
                .find(|port| !self.used.contains_key(port))
        };
        let found = search(first + band, size - band).or_else(|| search(first, band.max(1)))?;
        self.used.insert(found, service);
        Some(found)
    }

    pub(super) fn used(&self) -> usize {
        self.used.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_range_is_used_up_to_the_last_address_and_no_further() {
        let mut range = AddressRange::new("10.0.0.0/29".parse().unwrap(), [1, 99].into_iter());
        let mut given: Vec<_> = (0..10).map_while(|i| range.allocate(i, i as u64 * 7)).collect();
        given.sort();
        // .0 is the network, .1 reserved, .7 broadcast.
        let expected: Vec<IpAddr> = (2..7).map(|i| IpAddr::from([10, 0, 0, i])).collect();
        assert_eq!(given, expected);
        assert_eq!(range.take_reserved(50, 1), Some(IpAddr::from([10, 0, 0, 1])));
        assert_eq!(range.take_reserved(51, 1), None);
    }

    #[test]
    fn automatic_addresses_leave_the_static_band_alone() {
        let mut range = AddressRange::new("10.96.0.0/16".parse().unwrap(), std::iter::empty());
        for i in 0..300 {
            let IpAddr::V4(address) = range.allocate(i, i as u64).unwrap() else { panic!("family") };
            assert!(address > Ipv4Addr::new(10, 96, 1, 0), "{address}");
        }
        let mut range = AddressRange::new("fd00::/64".parse().unwrap(), std::iter::empty());
        assert!(range.allocate(0, u64::MAX).unwrap() < "fd00::10:0".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn node_ports_run_out_in_the_end() {
        let mut range = PortRange::new(30000..=30019);
        let given: std::collections::BTreeSet<_> = (0..30).map_while(|i| range.allocate(i, 5)).collect();
        assert_eq!(given.len(), 20);
        assert_eq!(PortRange::new(30000..=30000).allocate(0, 9), Some(30000));
        let mut range = PortRange::new(30000..=32767);
        assert!(range.allocate(0, 0).unwrap() >= 30086);
        assert_eq!(range.occupy(31000, 1), Ok(()));
        assert_eq!(range.occupy(31000, 2), Err(1));
    }
}
