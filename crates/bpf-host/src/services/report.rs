//! What the tables of services say of themselves.

use std::net::IpAddr;

use podway_abi::services::{
    Backend, MAX_AFFINITY, MAX_BACKENDS, MAX_FRONTENDS, MAX_MAGLEV, MAX_SERVICE_ADDRESSES, MAX_SERVICES,
    MAX_SLOTS, MAX_SOCKETS, MAX_SOURCE_RANGES, ServiceCounter, SetWord,
};
use podway_services::table::{ServiceId, ServiceMeta, SetKind};

use super::{Key, ServiceWriter, sets::word_index};
use crate::MapFill;

/// 64-bit words of a counter.
pub(super) const COUNTER_WORDS: usize = size_of::<ServiceCounter>() / 8;

/// What applying changes came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Entries written: slots, words, frontends, addresses, ranges.
    pub written: usize,
    /// Entries removed.
    pub removed: usize,
    /// Backends that left their service: sockets may have to be told, see
    /// [`ServiceWriter::destroy_stale_sockets`].
    pub backends_gone: usize,
    /// Everything that has found no room so far, of earlier calls too.
    pub refused: Vec<Refused>,
}

/// A change for which there is no room in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The service, when it is known.
    pub service: Option<ServiceMeta>,
    /// What was refused, for people.
    pub what: String,
}

/// What is counted for one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCounts {
    /// Its number in the table of services.
    pub id: ServiceId,
    /// Which it is.
    pub meta: ServiceMeta,
    /// Connections that got a backend.
    pub connections: u64,
    /// Connections that were refused because there was none.
    pub refused: u64,
    /// Packets that were translated one by one.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A frontend as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFrontend {
    /// Its address; nothing for a node port.
    pub addr: Option<IpAddr>,
    /// Its port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// The kernel's number of the service.
    pub service: u32,
    /// Backends of the cluster-wide set and of this node's.
    pub backends: [Vec<(IpAddr, u16)>; 2],
}

impl ServiceWriter {
    pub(super) fn reset_counter(&self, number: u32) {
        for i in 0..COUNTER_WORDS {
            self.counters.store(number as usize * COUNTER_WORDS + i, 0);
        }
    }

    /// What is counted for each service, in no order.
    pub fn counters(&self) -> Vec<ServiceCounts> {
        let count = |number: u32, i: usize| self.counters.load(number as usize * COUNTER_WORDS + i);
        self.services
            .iter()
            .filter_map(|(number, service)| {
                Some(ServiceCounts {
                    id: service.id?,
                    meta: service.meta.clone()?,
                    connections: count(*number, 0),
                    refused: count(*number, 1),
                    packets: count(*number, 2),
                    bytes: count(*number, 3),
                })
            })
            .collect()
    }

    /// Fill of the tables that can become full. The tables of clients and sockets forget the least recently seen
    /// instead, and are counted by walking them.
    pub fn fill(&self) -> Vec<MapFill> {
        let fill = |name, entries: usize, max: u32| MapFill {
            name,
            entries: u64::try_from(entries).unwrap_or(u64::MAX),
            max_entries: max.into(),
        };
        vec![
            fill("frontends", self.known_frontends.len(), MAX_FRONTENDS),
            fill("service_addresses", self.known_addresses.len(), MAX_SERVICE_ADDRESSES),
            fill("services", self.services.len(), MAX_SERVICES),
            fill("service_slots", self.slot_regions.used() as usize, MAX_SLOTS),
            fill("service_maglev", self.maglev_regions.used() as usize, MAX_MAGLEV),
            fill("service_backends", self.used_backends as usize, MAX_BACKENDS),
            fill("service_source_ranges", self.known_ranges, MAX_SOURCE_RANGES),
        ]
    }

    /// The limits of the tables that forget instead of becoming full: name and entries.
    pub const fn bounded_tables() -> [(&'static str, u32); 2] {
        [("service_affinity", MAX_AFFINITY), ("service_sockets", MAX_SOCKETS)]
    }

    /// What is in the kernel, read from the tables themselves.
    pub fn dump(&self) -> Vec<KernelFrontend> {
        let mut all: Vec<KernelFrontend> = self
            .known_frontends
            .iter()
            .map(|(key, frontend)| KernelFrontend {
                addr: (key.scope == podway_abi::services::scope::ADDRESS).then(|| IpAddr::from(key.addr)),
                port: key.port,
                protocol: key.proto,
                service: frontend.service,
                backends: [SetKind::Cluster, SetKind::Local]
                    .map(|kind| self.set_members(frontend.service, kind)),
            })
            .collect();
        all.sort_by_key(|f| (f.addr, f.port, f.protocol, f.service));
        all
    }

    fn set_members(&self, number: u32, kind: SetKind) -> Vec<(IpAddr, u16)> {
        let word = SetWord(self.sets.load(word_index(number, kind as usize)));
        let mut members: Vec<(IpAddr, u16)> = (0..word.count())
            .map(|i| self.slots.load_half((word.base() + i) as usize))
            .map(|id| self.backend(id))
            .filter(|b: &Backend| b.service == number)
            .map(|b| (IpAddr::from(b.addr), b.port))
            .collect();
        members.sort_unstable();
        members
    }

    pub(super) fn refusals(&self) -> Vec<Refused> {
        self.refused.keys().map(|key| self.refusal(*key)).collect()
    }

    fn refusal(&self, key: Key) -> Refused {
        let meta = |id: ServiceId| {
            let known = self.numbers.get(&id).and_then(|n| self.services.get(n)).and_then(|s| s.meta.clone());
            known.or_else(|| match self.refused.get(&Key::Service(id)) {
                Some(podway_services::table::TableChange::Service(_, meta)) => Some(meta.clone()),
                _ => None,
            })
        };
        match key {
            Key::Service(id) => {
                Refused { service: meta(id), what: "the service: no number is free".to_owned() }
            }
            Key::Set(set) => Refused { service: meta(set.service), what: "new endpoints".to_owned() },
            Key::Frontend(key) => {
                let service = match self.refused.get(&Key::Frontend(key)) {
                    Some(podway_services::table::TableChange::Frontend(_, f)) => meta(f.service),
                    _ => None,
                };
                let addr = match key.addr {
                    podway_services::table::FrontendAddr::Ip(addr) => addr.to_string(),
                    podway_services::table::FrontendAddr::Node(_) => "node port".to_owned(),
                };
                Refused { service, what: format!("{addr} port {}/{}", key.port, key.protocol) }
            }
            Key::Vip(addr) => {
                Refused { service: None, what: format!("address {addr}: unused ports are not rejected") }
            }
        }
    }
}
