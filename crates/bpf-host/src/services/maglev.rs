//! Maglev tables in the kernel, for services that clients beyond the cluster reach: any node gives a connection to the
//! same backend.

use std::net::IpAddr;

use podway_abi::services::{SetWord, backend_flags, set_kind};
use podway_services::{maglev, table::Backend};

use super::{ApplyReport, ServiceWriter, sets::word_index};

impl ServiceWriter {
    /// Makes the service's table that of its cluster-wide set, or removes it when nobody beyond the cluster reaches the
    /// service. Without room there is none: connections are then given to any backend.
    pub(super) fn update_maglev(&mut self, number: u32, report: &mut ApplyReport) {
        let at = word_index(number, set_kind::MAGLEV as usize);
        let external =
            self.services.get(&number).and_then(|s| s.meta.as_ref()).is_some_and(|meta| meta.external);
        let (ids, backends) = if external { self.cluster_set(number) } else { (Vec::new(), Vec::new()) };
        if backends.is_empty() {
            self.clear_maglev(number, at, report);
            return;
        }
        let size = maglev::size_for(backends.len());
        let entries = maglev::table(&backends, size);
        let old = SetWord(self.sets.load(at));
        let Some(service) = self.services.get_mut(&number) else { return };
        // Of the same size: entries change one by one, each leads to a backend of the old or the new set.
        let (region, fresh) = match service.maglev {
            Some(region) if old.count() == size => (region, false),
            _ => match self.maglev_regions.allocate(size) {
                Some(region) => (region, true),
                None => {
                    tracing::warn!(
                        size,
                        "no room for a table of consistent hashing; any backend is chosen instead"
                    );
                    self.clear_maglev(number, at, report);
                    return;
                }
            },
        };
        for (slot, index) in (region.base as usize..).zip(entries) {
            let id = ids.get(index as usize).copied().unwrap_or_default();
            if fresh || self.maglev.load_half(slot) != id {
                self.maglev.store_half(slot, id);
                report.written += 1;
            }
        }
        if fresh {
            self.sets.store(at, SetWord::new(region.base, size).0);
            report.written += 1;
            if let Some(service) = self.services.get_mut(&number)
                && let Some(old) = service.maglev.replace(region)
            {
                self.maglev_regions.release(old);
            }
        }
    }

    fn clear_maglev(&mut self, number: u32, at: usize, report: &mut ApplyReport) {
        let Some(region) = self.services.get_mut(&number).and_then(|s| s.maglev.take()) else { return };
        self.sets.store(at, 0);
        self.maglev_regions.release(region);
        report.written += 1;
    }

    /// Numbers and entries of the cluster-wide set, as the kernel has it.
    fn cluster_set(&self, number: u32) -> (Vec<u32>, Vec<Backend>) {
        let word = SetWord(self.sets.load(word_index(number, set_kind::CLUSTER as usize)));
        (0..word.count())
            .map(|i| {
                let id = self.slots.load_half((word.base() + i) as usize);
                let entry = self.backend(id);
                let backend = Backend {
                    addr: IpAddr::from(entry.addr),
                    port: entry.port,
                    local: entry.flags & backend_flags::LOCAL != 0,
                    terminating: entry.flags & backend_flags::TERMINATING != 0,
                };
                (id, backend)
            })
            .unzip()
    }
}
