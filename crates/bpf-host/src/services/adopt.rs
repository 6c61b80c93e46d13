//! What an agent before this one left in the tables, and making them equal to a new table without a gap.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map::Entry},
    net::IpAddr,
};

use ipnet::IpNet;
use podway_abi::{
    Addr,
    services::{
        FrontendKey, MAX_BACKENDS, MAX_SERVICES, NO_SERVICE, SetWord, SourceRange, address_flags, set_kind,
    },
};
use podway_services::table::{ServiceId, TableChange};

use super::{ApplyReport, Held, ServiceWriter, frontends, sets::word_index};
use crate::{Error, Result};

impl ServiceWriter {
    /// Reads the tables. What contradicts itself (an agent that died in the middle of a change) is given up: a set that
    /// overlaps another one, a backend that no set holds.
    pub(super) fn adopt(&mut self) -> Result<()> {
        for entry in self.frontends.iter() {
            let (key, value) = entry.map_err(|e| Error::map("FRONTENDS", e))?;
            self.known_frontends.insert(key, value);
            self.services.entry(value.service).or_default().frontends += 1;
        }
        for entry in self.addresses.iter() {
            let (addr, bits) = entry.map_err(|e| Error::map("SERVICE_ADDRS", e))?;
            self.known_addresses.insert(addr, bits);
            if bits & address_flags::VIP != 0 {
                self.vips.insert(IpAddr::from(addr));
            }
        }
        for entry in self.ranges.iter() {
            let (key, _) = entry.map_err(|e| Error::map("SOURCE_RANGES", e))?;
            let SourceRange { service, addr } = key.data();
            let len = key.prefix_len().saturating_sub(if addr.is_v4() { 32 + 96 } else { 32 });
            // The kernel holds nothing longer than its keys, so the prefix is one.
            if let Ok(range) = IpNet::new(IpAddr::from(addr), u8::try_from(len).unwrap_or(128)) {
                self.services.entry(service).or_default().written_ranges.insert(range);
                self.known_ranges += 1;
            }
        }
        self.adopt_sets();
        self.adopt_backends();
        let highest = self.services.keys().copied().max().unwrap_or(0);
        self.next_number = highest.saturating_add(1).clamp(1, MAX_SERVICES);
        for number in 1..self.next_number {
            if !self.services.contains_key(&number) {
                self.free_numbers.push_back(number);
            }
        }
        Ok(())
    }

    fn adopt_sets(&mut self) {
        for index in 0..self.sets.len() {
            let word = SetWord(self.sets.load(index));
            if word.count() == 0 {
                continue;
            }
            let number = u32::try_from(index).unwrap_or(0) / set_kind::PER_SERVICE;
            let kind = index % set_kind::PER_SERVICE as usize;
            let regions = if kind == set_kind::MAGLEV as usize {
                &mut self.maglev_regions
            } else {
                &mut self.slot_regions
            };
            let region =
                if kind > set_kind::MAGLEV as usize { None } else { regions.take(word.base(), word.count()) };
            if region.is_none() {
                self.sets.store(index, 0);
                continue;
            }
            let service = self.services.entry(number).or_default();
            match service.sets.get_mut(kind) {
                Some(slot) => *slot = region,
                None => service.maglev = region,
            }
        }
    }

    fn adopt_backends(&mut self) {
        let mut used: HashMap<u32, (u32, u8)> = HashMap::new();
        for (number, service) in &self.services {
            for (kind, region) in service.sets.iter().enumerate() {
                let Some(region) = region else { continue };
                let count = SetWord(self.sets.load(word_index(*number, kind))).count();
                for slot in region.base..region.base + count {
                    let id = self.slots.load_half(slot as usize);
                    used.entry(id).or_insert((*number, 0)).1 |= 1 << kind;
                }
            }
        }
        let mut highest = 0;
        let mut stale = Vec::new();
        for id in 1..MAX_BACKENDS {
            let backend = self.backend(id);
            if backend.service != NO_SERVICE || backend.incarnation != 0 {
                highest = id;
            }
            if backend.service == NO_SERVICE {
                continue;
            }
            match used.get(&id) {
                Some((number, uses)) if *number == backend.service => {
                    let held = Held { id, uses: *uses, flags: backend.flags };
                    self.used_backends += 1;
                    self.services
                        .entry(*number)
                        .or_default()
                        .backends
                        .insert((backend.addr, backend.port), held);
                }
                _ => stale.push(id),
            }
        }
        self.next_backend = (highest + 1).min(MAX_BACKENDS);
        self.used_backends += u32::try_from(stale.len()).unwrap_or(0);
        let live: HashSet<u32> =
            self.services.values().flat_map(|s| s.backends.values().map(|h| h.id)).collect();
        let stale: BTreeSet<u32> = stale.into_iter().collect();
        for id in 1..self.next_backend {
            if stale.contains(&id) {
                self.free_backend(id);
            } else if !live.contains(&id) {
                self.free_backends.push_back(id);
            }
        }
        self.room = false;
    }

    /// Makes the tables hold exactly what `full` builds from an empty table, for the start of an agent; after
    /// [`ServiceWriter::set_node`]. Only differences are written, and a frontend that stays is never without backends.
    /// Afterwards the numbers of services are those of `full`.
    ///
    /// # Errors
    /// As [`ServiceWriter::apply`].
    pub fn sync(&mut self, full: &[TableChange]) -> Result<ApplyReport> {
        let mut report = ApplyReport::default();
        self.refused.clear();
        let mut wanted_frontends: BTreeMap<Ordered, ServiceId> = BTreeMap::new();
        let mut wanted_vips = BTreeSet::new();
        let mut wanted_services = HashSet::new();
        for change in full {
            match change {
                TableChange::Frontend(key, frontend) => {
                    wanted_frontends.insert(Ordered::of(&frontends::key(key)), frontend.service);
                }
                TableChange::FrontendGone(key) => {
                    wanted_frontends.remove(&Ordered::of(&frontends::key(key)));
                }
                TableChange::Service(id, _) => {
                    wanted_services.insert(*id);
                }
                TableChange::Vip(addr) => {
                    wanted_vips.insert(*addr);
                }
                _ => {}
            }
        }
        // What is not wanted at all goes first, so that it cannot lead to what its service's number becomes.
        let gone: Vec<FrontendKey> = self
            .known_frontends
            .keys()
            .filter(|k| !wanted_frontends.contains_key(&Ordered::of(k)))
            .copied()
            .collect();
        for key in gone {
            self.remove_frontend(&key, &mut report)?;
        }
        self.claim(&wanted_frontends);
        self.syncing = true;
        let applied = self.apply(full);
        self.syncing = false;
        let mut applied = applied?;
        applied.removed += report.removed;
        let numbers: Vec<u32> = self.services.keys().copied().collect();
        for number in numbers {
            self.remove_stale_ranges(number, &mut applied)?;
        }
        let unwanted: Vec<IpAddr> = self.vips.difference(&wanted_vips).copied().collect();
        for addr in unwanted {
            self.apply_more(&[TableChange::VipGone(addr)], &mut applied)?;
        }
        // Addresses of the node as it was for the agent before.
        let orphaned: Vec<IpAddr> = self
            .known_addresses
            .keys()
            .map(|a| IpAddr::from(*a))
            .filter(|a| !self.vips.contains(a) && !self.node_addresses.contains_key(a))
            .collect();
        for addr in orphaned {
            self.apply_more(&[TableChange::VipGone(addr)], &mut applied)?;
        }
        let left: Vec<u32> = self
            .services
            .iter()
            .filter(|(_, s)| s.id.is_none_or(|id| !wanted_services.contains(&id)))
            .map(|(number, _)| *number)
            .collect();
        for number in left {
            if let Some(id) = self.services.get(&number).and_then(|s| s.id) {
                self.numbers.remove(&id);
            }
            self.clear_service(number, &mut applied)?;
        }
        if !self.refused.is_empty() {
            self.apply_more(&[], &mut applied)?;
        }
        Ok(applied)
    }

    fn apply_more(&mut self, changes: &[TableChange], report: &mut ApplyReport) -> Result<()> {
        let more = self.apply(changes)?;
        report.written += more.written;
        report.removed += more.removed;
        report.backends_gone += more.backends_gone;
        report.refused = more.refused;
        Ok(())
    }

    /// Finds which service of a new table is which number: the one that all frontends of the number belong to. A number
    /// whose frontends belong to several services now is claimed by none of them; it goes when they have left it.
    fn claim(&mut self, wanted: &BTreeMap<Ordered, ServiceId>) {
        let mut candidates: HashMap<u32, Option<ServiceId>> = HashMap::new();
        for (key, frontend) in &self.known_frontends {
            let Some(id) = wanted.get(&Ordered::of(key)) else { continue };
            candidates
                .entry(frontend.service)
                .and_modify(|claimed| {
                    if *claimed != Some(*id) {
                        *claimed = None;
                    }
                })
                .or_insert(Some(*id));
        }
        let mut candidates: Vec<(u32, ServiceId)> =
            candidates.into_iter().filter_map(|(number, id)| Some((number, id?))).collect();
        candidates.sort_unstable();
        let mut numbers = HashMap::new();
        let mut claimed = HashSet::new();
        for (number, id) in candidates {
            if let Entry::Vacant(free) = numbers.entry(id) {
                free.insert(number);
                claimed.insert(number);
            }
        }
        for (number, service) in &mut self.services {
            if !claimed.contains(number) {
                service.id = None;
            }
        }
        for (id, number) in &numbers {
            if let Some(service) = self.services.get_mut(number) {
                service.id = Some(*id);
            }
        }
        self.numbers = numbers;
    }
}

/// A frontend's key with an order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Ordered(Addr, u16, u8, u8);

impl Ordered {
    const fn of(key: &FrontendKey) -> Self {
        Self(key.addr, key.port, key.proto, key.scope)
    }
}
