//! Frontends, the addresses they are at, and source ranges.

use std::{collections::BTreeSet, net::IpAddr};

use aya::maps::{MapError, lpm_trie::Key as Prefix};
use ipnet::IpNet;
use nix::libc;
use podway_abi::{
    Addr,
    services::{
        ANY_V4, Frontend, FrontendKey, Origin, SourceRange, address_flags, frontend_flags, route, scope,
    },
};
use podway_services::table::{self, Family, FrontendAddr, Route, SetKind, Target};

use super::{ApplyReport, Failure, ServiceWriter, Step};
use crate::{Error, Result, ignore_missing};

/// A frontend's key as the kernel has it.
pub(super) fn key(key: &table::FrontendKey) -> FrontendKey {
    let (addr, scope) = match key.addr {
        FrontendAddr::Ip(addr) => (Addr::from(addr), scope::ADDRESS),
        FrontendAddr::Node(Family::V4) => (ANY_V4, scope::NODE),
        FrontendAddr::Node(Family::V6) => (Addr::UNSPECIFIED, scope::NODE),
    };
    FrontendKey { addr, port: key.port, proto: key.protocol.number(), scope }
}

fn value(number: u32, frontend: &table::Frontend) -> Frontend {
    let mut flags = (frontend.kind as u32) << frontend_flags::KIND_SHIFT;
    let origins = [
        (table::Origin::Pod, Origin::Pod),
        (table::Origin::Node, Origin::Node),
        (table::Origin::External, Origin::External),
    ];
    for (from, to) in origins {
        flags |= route_bits(frontend.route(from)) << (3 * to as u32);
    }
    if frontend.source_ranges.is_some() {
        flags |= frontend_flags::SOURCE_RANGES;
    }
    Frontend { service: number, flags, affinity_s: frontend.affinity_s.unwrap_or(0) }
}

const fn route_bits(of: Route) -> u32 {
    let target = match of.target {
        Target::Set(SetKind::Cluster) => route::CLUSTER,
        Target::Set(SetKind::Local) => route::LOCAL,
        Target::Reject => route::REJECT,
        Target::Drop => route::DROP,
    };
    if of.masquerade { target | route::MASQUERADE } else { target }
}

fn range_key(number: u32, range: &IpNet) -> Prefix<SourceRange> {
    let addr = Addr::from(range.network());
    Prefix::new(32 + addr.prefix_len(range.prefix_len()), SourceRange { service: number, addr })
}

/// E2BIG is the kernel's word for a full hash map, ENOSPC for a full trie.
fn full_or(error: MapError, map: &'static str, what: &'static str) -> Failure {
    match &error {
        MapError::SyscallError(call)
            if matches!(call.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM)) =>
        {
            Failure::Full(what)
        }
        _ => Failure::Error(Error::map(map, error)),
    }
}

impl ServiceWriter {
    pub(super) fn set_frontend(
        &mut self,
        key: &table::FrontendKey,
        frontend: &table::Frontend,
        report: &mut ApplyReport,
    ) -> Step {
        let number = self.number(frontend.service)?;
        let key = self::key(key);
        let value = value(number, frontend);
        // Ranges before the frontend that asks for them, and those that go after it.
        if let Some(service) = self.services.get_mut(&number) {
            match &frontend.source_ranges {
                Some(ranges) => service.ranges.insert(key, ranges.clone()),
                None => service.ranges.remove(&key),
            };
        }
        self.add_ranges(number, report)?;
        let old = self.known_frontends.get(&key).copied();
        if old != Some(value) {
            self.frontends.insert(key, value, 0).map_err(|e| full_or(e, "FRONTENDS", "frontends"))?;
            self.known_frontends.insert(key, value);
            self.moved = true;
            report.written += 1;
            if old.map(|f| f.service) != Some(number) {
                self.count_frontend(number, 1);
                if let Some(old) = old {
                    self.leave_frontend(old.service, &key, report)?;
                }
            }
        }
        Ok(self.remove_stale_ranges(number, report)?)
    }

    pub(super) fn remove_frontend(&mut self, key: &FrontendKey, report: &mut ApplyReport) -> Result<()> {
        let Some(old) = self.known_frontends.get(key).copied() else { return Ok(()) };
        ignore_missing(self.frontends.remove(key), "FRONTENDS")?;
        self.known_frontends.remove(key);
        self.room = true;
        report.removed += 1;
        self.leave_frontend(old.service, key, report)
    }

    fn leave_frontend(&mut self, number: u32, key: &FrontendKey, report: &mut ApplyReport) -> Result<()> {
        self.count_frontend(number, -1);
        if let Some(service) = self.services.get_mut(&number) {
            service.ranges.remove(key);
        }
        self.remove_stale_ranges(number, report)
    }

    fn count_frontend(&mut self, number: u32, change: i32) {
        if let Some(service) = self.services.get_mut(&number) {
            service.frontends = service.frontends.saturating_add_signed(change);
        }
    }

    fn wanted_ranges(&self, number: u32) -> BTreeSet<IpNet> {
        let service = self.services.get(&number);
        service.into_iter().flat_map(|s| s.ranges.values()).flat_map(|r| r.iter().map(IpNet::trunc)).collect()
    }

    fn add_ranges(&mut self, number: u32, report: &mut ApplyReport) -> Step {
        for range in self.wanted_ranges(number) {
            let Some(service) = self.services.get_mut(&number) else { return Ok(()) };
            if service.written_ranges.contains(&range) {
                continue;
            }
            self.ranges
                .insert(&range_key(number, &range), 1, 0)
                .map_err(|e| full_or(e, "SOURCE_RANGES", "source ranges"))?;
            service.written_ranges.insert(range);
            self.known_ranges += 1;
            report.written += 1;
        }
        Ok(())
    }

    pub(super) fn remove_stale_ranges(&mut self, number: u32, report: &mut ApplyReport) -> Result<()> {
        // Until all frontends are known again, none is known to be stale.
        if self.syncing {
            return Ok(());
        }
        let wanted = self.wanted_ranges(number);
        let Some(service) = self.services.get_mut(&number) else { return Ok(()) };
        if service.written_ranges.is_subset(&wanted) {
            return Ok(());
        }
        let stale: Vec<IpNet> = service.written_ranges.difference(&wanted).copied().collect();
        for range in stale {
            ignore_missing(self.ranges.remove(&range_key(number, &range)), "SOURCE_RANGES")?;
            if let Some(service) = self.services.get_mut(&number) {
                service.written_ranges.remove(&range);
            }
            self.known_ranges = self.known_ranges.saturating_sub(1);
            self.room = true;
            report.removed += 1;
        }
        Ok(())
    }

    /// Writes what an address is to services now.
    pub(super) fn write_address(&mut self, ip: IpAddr, report: &mut ApplyReport) -> Step {
        let mut bits = self.node_addresses.get(&ip).copied().unwrap_or(0);
        // An address of the node is never wholly a service's: the node listens on it as well.
        if self.vips.contains(&ip) && bits & address_flags::OWN == 0 {
            bits |= address_flags::VIP;
        }
        let addr = Addr::from(ip);
        if bits == 0 {
            if self.known_addresses.remove(&addr).is_some() {
                ignore_missing(self.addresses.remove(&addr), "SERVICE_ADDRS").map_err(Failure::Error)?;
                self.room = true;
                report.removed += 1;
            }
        } else if self.known_addresses.get(&addr) != Some(&bits) {
            self.addresses
                .insert(addr, bits, 0)
                .map_err(|e| full_or(e, "SERVICE_ADDRS", "service addresses"))?;
            self.known_addresses.insert(addr, bits);
            self.moved = true;
            report.written += 1;
        }
        Ok(())
    }
}
