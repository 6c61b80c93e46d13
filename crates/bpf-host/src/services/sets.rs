//! Sets of backends: regions of slots, changed in place where they fit.

use std::collections::HashSet;

use podway_abi::{
    Addr,
    services::{SetWord, backend_flags, set_kind},
};
use podway_services::table::{Backend, SetId, SetKind};

use super::{ApplyReport, Failure, Held, ServiceWriter, Step, backends};

/// A set in a region more than this much larger than it needs moves to a smaller one.
const SHRINK_FACTOR: u32 = 8;

impl ServiceWriter {
    /// Makes a set hold exactly these backends. Without room for all it holds those of them that it held before.
    pub(super) fn set_backends(&mut self, id: SetId, wanted: &[Backend], report: &mut ApplyReport) -> Step {
        let number = match self.number(id.service) {
            Ok(number) => number,
            // A set that is no longer used, of a service that never got room.
            Err(Failure::NoService) if wanted.is_empty() => return Ok(()),
            Err(failure) => return Err(failure),
        };
        let kind = id.kind as usize;
        let mut ids = Vec::with_capacity(wanted.len());
        let mut added = Vec::new();
        let mut full = None;
        for backend in wanted {
            let key = (Addr::from(backend.addr), backend.port);
            match self.hold(number, kind, backend) {
                Some((backend_id, fresh)) => {
                    ids.push(backend_id);
                    if fresh {
                        added.push(key);
                    }
                }
                None => {
                    full = Some("backends");
                    break;
                }
            }
        }
        if full.is_none() && self.write_slots(number, kind, &ids, report).is_none() {
            full = Some("slots");
        }
        if let Some(table) = full {
            self.fall_back(number, kind, wanted, &added, report);
            return Err(Failure::Full(table));
        }
        if id.kind == SetKind::Cluster {
            self.update_maglev(number, report);
        }
        self.drop_unused(number, kind, wanted, report);
        Ok(())
    }

    /// The number of a backend of this service, marked as used by a set; whether the set did not use it before.
    fn hold(&mut self, number: u32, kind: usize, backend: &Backend) -> Option<(u32, bool)> {
        let addr = Addr::from(backend.addr);
        let flags = backends::flags(backend);
        let bit = 1 << kind;
        let service = self.services.get_mut(&number)?;
        let proto = service.meta.as_ref().map_or(0, |m| m.protocol.number());
        if let Some(held) = service.backends.get_mut(&(addr, backend.port)) {
            let fresh = held.uses & bit == 0;
            held.uses |= bit;
            let (id, flags) = (held.id, flags | in_sets(held.uses));
            if held.flags != flags {
                held.flags = flags;
                self.set_backend_flags(id, backend.port, flags);
            }
            return Some((id, fresh));
        }
        let flags = flags | in_sets(bit);
        let id = self.new_backend(number, addr, backend.port, proto, flags)?;
        let held = Held { id, uses: bit, flags };
        self.services.get_mut(&number)?.backends.insert((addr, backend.port), held);
        Some((id, true))
    }

    /// Puts the numbers into the set's region, or into a new one, and then stores the set's word. `None` when there is
    /// no room; nothing has changed then.
    fn write_slots(&mut self, number: u32, kind: usize, ids: &[u32], report: &mut ApplyReport) -> Option<()> {
        let at = word_index(number, kind);
        let old = SetWord(self.sets.load(at));
        let region = self.services.get(&number)?.sets[kind];
        let count = u32::try_from(ids.len()).ok()?;
        if ids.is_empty() {
            self.sets.store(at, 0);
            if let Some(region) = region {
                self.slot_regions.release(region);
                self.services.get_mut(&number)?.sets[kind] = None;
                self.room = true;
                report.written += 1;
            }
            return Some(());
        }
        let fits =
            region.filter(|r| count <= r.capacity && r.capacity <= count.next_power_of_two() * SHRINK_FACTOR);
        if let Some(region) = fits {
            self.change_in_place(at, old, region.base, ids, report);
            return Some(());
        }
        let new = self.slot_regions.allocate(count)?;
        for (slot, id) in (new.base as usize..).zip(ids) {
            self.slots.store_half(slot, *id);
        }
        self.sets.store(at, SetWord::new(new.base, count).0);
        report.written += ids.len() + 1;
        self.services.get_mut(&number)?.sets[kind] = Some(new);
        if let Some(region) = region {
            self.slot_regions.release(region);
            self.room = true;
        }
        Some(())
    }

    /// Replaces what has to go by what has to come; every slot leads to a backend of the old or the new set all along.
    fn change_in_place(&self, at: usize, old: SetWord, base: u32, ids: &[u32], report: &mut ApplyReport) {
        let base = base as usize;
        let mut slots: Vec<u32> = (0..old.count() as usize).map(|i| self.slots.load_half(base + i)).collect();
        let wanted: HashSet<u32> = ids.iter().copied().collect();
        let present: HashSet<u32> = slots.iter().copied().collect();
        let mut missing = ids.iter().copied().filter(|id| !present.contains(id));
        let mut i = 0;
        while i < slots.len() {
            if wanted.contains(&slots[i]) {
                i += 1;
                continue;
            }
            // The hole is filled by a new one, else by the last of those that stay.
            let filler = missing.next().or_else(|| {
                while slots.len() > i + 1 {
                    let last = slots.pop()?;
                    if wanted.contains(&last) {
                        return Some(last);
                    }
                }
                None
            });
            match filler {
                Some(id) => {
                    slots[i] = id;
                    self.slots.store_half(base + i, id);
                    report.written += 1;
                    i += 1;
                }
                None => {
                    slots.truncate(i);
                }
            }
        }
        for id in missing {
            self.slots.store_half(base + slots.len(), id);
            slots.push(id);
            report.written += 1;
        }
        let word = SetWord::new(u32::try_from(base).unwrap_or(0), u32::try_from(slots.len()).unwrap_or(0));
        if word != old {
            self.sets.store(at, word.0);
            report.written += 1;
        }
    }

    /// Gives up the backends that a set had and that are not wanted any more, unless the other set has them.
    fn drop_unused(&mut self, number: u32, kind: usize, wanted: &[Backend], report: &mut ApplyReport) {
        let Some(service) = self.services.get_mut(&number) else { return };
        let bit = 1u8 << kind;
        let used = service.backends.values().filter(|h| h.uses & bit != 0).count();
        if used == wanted.len() {
            return;
        }
        let keys: HashSet<(Addr, u16)> = wanted.iter().map(|b| (Addr::from(b.addr), b.port)).collect();
        let mut gone = Vec::new();
        let mut left = Vec::new();
        service.backends.retain(|key, held| {
            if held.uses & bit != 0 && !keys.contains(key) {
                held.uses &= !bit;
                held.flags &= !in_sets(bit);
                left.push((held.id, key.1, held.flags));
            }
            if held.uses == 0 {
                gone.push(held.id);
            }
            held.uses != 0
        });
        report.backends_gone += gone.len();
        for (id, port, flags) in left {
            self.set_backend_flags(id, port, flags);
        }
        for id in gone {
            self.free_backend(id);
        }
    }

    /// Without room: the set keeps those of its backends that are still wanted.
    fn fall_back(
        &mut self,
        number: u32,
        kind: usize,
        wanted: &[Backend],
        added: &[(Addr, u16)],
        report: &mut ApplyReport,
    ) {
        let bit = 1u8 << kind;
        let Some(service) = self.services.get_mut(&number) else { return };
        let mut left = Vec::new();
        for key in added {
            if let Some(held) = service.backends.get_mut(key) {
                held.uses &= !bit;
                held.flags &= !in_sets(bit);
                left.push((held.id, key.1, held.flags));
            }
        }
        let survivors: Vec<Backend> = wanted
            .iter()
            .filter(|b| {
                service.backends.get(&(Addr::from(b.addr), b.port)).is_some_and(|h| h.uses & bit != 0)
            })
            .cloned()
            .collect();
        let ids: Vec<u32> = survivors
            .iter()
            .filter_map(|b| service.backends.get(&(Addr::from(b.addr), b.port)).map(|h| h.id))
            .collect();
        for (id, port, flags) in left {
            self.set_backend_flags(id, port, flags);
        }
        let Some(service) = self.services.get(&number) else { return };
        // Fewer than before: they fit where they are. A region that is too large for them may stay.
        if let Some(region) = service.sets[kind]
            && !ids.is_empty()
        {
            let at = word_index(number, kind);
            self.change_in_place(at, SetWord(self.sets.load(at)), region.base, &ids, report);
        } else {
            let _ = self.write_slots(number, kind, &[], report);
        }
        if kind == SetKind::Cluster as usize {
            self.update_maglev(number, report);
        }
        self.drop_unused(number, kind, &survivors, report);
        // Those that were to be added and that no set uses.
        let Some(service) = self.services.get_mut(&number) else { return };
        let mut unused = Vec::new();
        service.backends.retain(|_, held| {
            if held.uses == 0 {
                unused.push(held.id);
            }
            held.uses != 0
        });
        for id in unused {
            self.free_backend(id);
        }
        // What was given up here is what could not be used: no reason to try again.
        self.room = false;
    }

    /// Empties the sets of a service and gives up its backends.
    pub(super) fn clear_sets(&mut self, number: u32, report: &mut ApplyReport) {
        for kind in [SetKind::Cluster, SetKind::Local] {
            let _ = self.write_slots(number, kind as usize, &[], report);
        }
        self.sets.store(word_index(number, set_kind::MAGLEV as usize), 0);
        let Some(service) = self.services.get_mut(&number) else { return };
        let region = service.maglev.take();
        let ids: Vec<u32> = service.backends.drain().map(|(_, held)| held.id).collect();
        if let Some(region) = region {
            self.maglev_regions.release(region);
        }
        report.backends_gone += ids.len();
        for id in ids {
            self.free_backend(id);
        }
    }
}

/// Where a set's word is.
pub(super) const fn word_index(number: u32, kind: usize) -> usize {
    number as usize * set_kind::PER_SERVICE as usize + kind
}

/// The flags that say which sets use a backend.
const fn in_sets(uses: u8) -> u16 {
    uses as u16 * backend_flags::IN_CLUSTER
}
