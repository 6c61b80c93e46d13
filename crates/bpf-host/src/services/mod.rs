//! The kernel's tables of services: written change by change, found again after a restart.
//!
//! What is known of the tables is kept here, so that a change costs what it changes. A service has a number of its own
//! in the kernel, which survives restarts; [`ServiceWriter::sync`] finds by the frontends which service of a new table
//! is which number.
//!
//! Order of every change: backends, then slots, then the set's word, then the frontend; what is no longer used is given
//! up last. A reader in between gets what the old or the new state allows.

mod adopt;
mod backends;
mod destroy;
mod frontends;
mod maglev;
mod mapped;
mod node;
mod regions;
mod report;
mod sets;
mod sockets;
mod trace;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::IpAddr,
    path::Path,
    sync::Arc,
};

use aya::maps::{Array, HashMap as BpfMap, LpmTrie, Map, MapData};
use ipnet::IpNet;
use podway_abi::{
    ABI_VERSION, Addr,
    services::{
        Frontend, FrontendKey, MAX_BACKENDS, MAX_MAGLEV, MAX_SERVICES, MAX_SLOTS, ServiceConfig, SocketKey,
        SocketPeer, SourceRange, set_kind,
    },
};
use podway_services::table::{self, ServiceId, ServiceMeta, SetId, TableChange};

pub use report::{ApplyReport, KernelFrontend, Refused, ServiceCounts};

use crate::{Datapath, Error, Result, generation::Generation};
use mapped::MappedArray;
use regions::{Region, Regions};

/// Writes the kernel's tables of services.
pub struct ServiceWriter {
    config: Array<MapData, ServiceConfig>,
    generation: Generation,
    frontends: BpfMap<MapData, FrontendKey, Frontend>,
    addresses: BpfMap<MapData, Addr, u32>,
    ranges: LpmTrie<MapData, SourceRange, u32>,
    sockets: BpfMap<MapData, SocketKey, SocketPeer>,
    sets: MappedArray,
    slots: MappedArray,
    maglev: MappedArray,
    backends: MappedArray,
    counters: MappedArray,

    known_frontends: HashMap<FrontendKey, Frontend>,
    /// Every address in the kernel with its bits.
    known_addresses: HashMap<Addr, u32>,
    known_ranges: usize,
    /// Addresses that belong to services alone.
    vips: BTreeSet<IpAddr>,
    /// The node's own, with their bits.
    node_addresses: BTreeMap<IpAddr, u32>,
    /// By the kernel's number.
    services: HashMap<u32, Service>,
    numbers: HashMap<ServiceId, u32>,
    free_numbers: VecDeque<u32>,
    next_number: u32,
    slot_regions: Regions,
    maglev_regions: Regions,
    free_backends: VecDeque<u32>,
    next_backend: u32,
    used_backends: u32,
    /// Changes for which there was no room, tried again when something was given up.
    refused: BTreeMap<Key, TableChange>,
    /// Whether something was given up since they were tried last.
    room: bool,
    /// Whether a whole table is being applied.
    syncing: bool,
    /// Whether something answers elsewhere than before: plain flows then have to ask again.
    moved: bool,
}

/// What a change is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Service(ServiceId),
    Set(SetId),
    Frontend(table::FrontendKey),
    Vip(IpAddr),
}

/// What is known of one service in the kernel.
#[derive(Default)]
struct Service {
    /// Nothing for a service that an agent before this one wrote and that nobody has claimed yet.
    id: Option<ServiceId>,
    meta: Option<ServiceMeta>,
    /// By [`table::SetKind`].
    sets: [Option<Region>; 2],
    maglev: Option<Region>,
    backends: HashMap<(Addr, u16), Held>,
    /// How many frontends lead to it.
    frontends: u32,
    /// Source ranges by frontend.
    ranges: HashMap<FrontendKey, Arc<[IpNet]>>,
    /// Source ranges in the kernel.
    written_ranges: BTreeSet<IpNet>,
}

/// One backend of a service.
#[derive(Clone, Copy)]
struct Held {
    id: u32,
    /// Bits of the sets that hold it.
    uses: u8,
    flags: u16,
}

/// Why a change was not written.
enum Failure {
    /// A table is full.
    Full(&'static str),
    /// The service has no number, because there was no room for it.
    NoService,
    /// The kernel refused for another reason.
    Error(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

type Step = std::result::Result<(), Failure>;

impl Datapath {
    /// Opens the tables of services and reads what is in them.
    ///
    /// # Errors
    /// When a pinned map is missing or cannot be read.
    pub fn services(&self) -> Result<ServiceWriter> {
        ServiceWriter::open(&self.pin_dir.join(format!("maps-v{ABI_VERSION}")))
    }
}

impl ServiceWriter {
    fn open(map_dir: &Path) -> Result<Self> {
        let pinned = |name: &'static str| {
            MapData::from_pin(map_dir.join(name)).map_err(|e| Error::map(name, e)).and_then(|data| {
                let map = Map::from_map_data(data).map_err(|e| Error::map(name, e))?;
                Ok(map)
            })
        };
        let array = |name, entries, words| MappedArray::new(pinned(name)?, name, entries, words);
        let mut writer = Self {
            config: Array::try_from(pinned("SERVICE_CONFIG")?)?,
            generation: Generation::new(pinned("GENERATION")?)?,
            frontends: BpfMap::try_from(pinned("FRONTENDS")?)?,
            addresses: BpfMap::try_from(pinned("SERVICE_ADDRS")?)?,
            ranges: LpmTrie::try_from(pinned("SOURCE_RANGES")?)?,
            sockets: BpfMap::try_from(pinned("SOCKETS")?)?,
            sets: array("SETS", MAX_SERVICES * set_kind::PER_SERVICE, 1)?,
            slots: array("SLOTS", MAX_SLOTS / 2, 1)?,
            maglev: array("MAGLEV", MAX_MAGLEV / 2, 1)?,
            backends: array("BACKENDS", MAX_BACKENDS, backends::WORDS)?,
            counters: array("SERVICE_COUNTERS", MAX_SERVICES, report::COUNTER_WORDS)?,
            known_frontends: HashMap::new(),
            known_addresses: HashMap::new(),
            known_ranges: 0,
            vips: BTreeSet::new(),
            node_addresses: BTreeMap::new(),
            services: HashMap::new(),
            numbers: HashMap::new(),
            free_numbers: VecDeque::new(),
            next_number: 1,
            slot_regions: Regions::new(MAX_SLOTS),
            maglev_regions: Regions::new(MAX_MAGLEV),
            free_backends: VecDeque::new(),
            next_backend: 1,
            used_backends: 0,
            refused: BTreeMap::new(),
            room: false,
            syncing: false,
            moved: false,
        };
        writer.adopt()?;
        Ok(writer)
    }

    /// Applies changes in their order. What finds no room is refused, named in the report, and tried again by later
    /// calls once there is room; everything else is written.
    ///
    /// # Errors
    /// When the kernel refuses a write for another reason than that a table is full; [`ServiceWriter::sync`] then finds
    /// out what is missing.
    pub fn apply(&mut self, changes: &[TableChange]) -> Result<ApplyReport> {
        let mut report = ApplyReport::default();
        for change in changes {
            self.refused.remove(&key_of(change));
            self.attempt(change, &mut report)?;
        }
        if self.room && !self.refused.is_empty() {
            for (_, change) in std::mem::take(&mut self.refused) {
                self.attempt(&change, &mut report)?;
            }
        }
        self.room = false;
        // Datagrams to what has become a service are plain flows until then.
        if std::mem::take(&mut self.moved) {
            self.generation.raise()?;
        }
        report.refused = self.refusals();
        Ok(report)
    }

    fn attempt(&mut self, change: &TableChange, report: &mut ApplyReport) -> Result<()> {
        match self.write(change, report) {
            Ok(()) => Ok(()),
            Err(Failure::Full(table)) => {
                tracing::debug!(table, change = ?key_of(change), "no room for a change of services");
                self.refused.insert(key_of(change), change.clone());
                Ok(())
            }
            Err(Failure::NoService) => {
                self.refused.insert(key_of(change), change.clone());
                Ok(())
            }
            Err(Failure::Error(error)) => Err(error),
        }
    }

    fn write(&mut self, change: &TableChange, report: &mut ApplyReport) -> Step {
        match change {
            TableChange::Service(id, meta) => self.set_service(*id, meta, report),
            TableChange::ServiceGone(id) => {
                self.remove_service(*id, report)?;
                Ok(())
            }
            TableChange::Set(id, backends) => {
                self.set_backends(*id, backends.as_deref().unwrap_or_default(), report)
            }
            TableChange::Frontend(key, frontend) => self.set_frontend(key, frontend, report),
            TableChange::FrontendGone(key) => Ok(self.remove_frontend(&frontends::key(key), report)?),
            TableChange::Vip(addr) => {
                self.vips.insert(*addr);
                self.write_address(*addr, report)
            }
            TableChange::VipGone(addr) => {
                self.vips.remove(addr);
                self.write_address(*addr, report)
            }
        }
    }

    /// Gives a service its number.
    fn set_service(&mut self, id: ServiceId, meta: &ServiceMeta, report: &mut ApplyReport) -> Step {
        let number = match self.numbers.get(&id) {
            Some(number) => *number,
            None => {
                let number = self.new_number().ok_or(Failure::Full("services"))?;
                self.numbers.insert(id, number);
                number
            }
        };
        let service = self.services.entry(number).or_default();
        service.id = Some(id);
        let was_external = service.meta.as_ref().is_some_and(|m| m.external);
        service.meta = Some(meta.clone());
        if was_external != meta.external || (!meta.external && service.maglev.is_some()) {
            self.update_maglev(number, report);
        }
        Ok(())
    }

    fn new_number(&mut self) -> Option<u32> {
        // Numbers rest as long as there are others.
        let number = if self.next_number < MAX_SERVICES {
            self.next_number += 1;
            self.next_number - 1
        } else {
            self.free_numbers.pop_front()?
        };
        self.reset_counter(number);
        Some(number)
    }

    fn remove_service(&mut self, id: ServiceId, report: &mut ApplyReport) -> Result<()> {
        let Some(number) = self.numbers.remove(&id) else { return Ok(()) };
        self.clear_service(number, report)
    }

    /// Gives up everything that a number has.
    fn clear_service(&mut self, number: u32, report: &mut ApplyReport) -> Result<()> {
        // Normally none is left: frontends go before their service. One without its service would lead to whoever gets
        // the number next.
        if self.services.get(&number).is_some_and(|s| s.frontends > 0) {
            let left: Vec<FrontendKey> =
                self.known_frontends.iter().filter(|(_, f)| f.service == number).map(|(k, _)| *k).collect();
            for key in left {
                self.remove_frontend(&key, report)?;
            }
        }
        self.clear_sets(number, report);
        self.services.remove(&number);
        self.free_numbers.push_back(number);
        self.room = true;
        Ok(())
    }

    fn number(&self, id: ServiceId) -> std::result::Result<u32, Failure> {
        self.numbers.get(&id).copied().ok_or(Failure::NoService)
    }
}

fn key_of(change: &TableChange) -> Key {
    match change {
        TableChange::Service(id, _) | TableChange::ServiceGone(id) => Key::Service(*id),
        TableChange::Set(id, _) => Key::Set(*id),
        TableChange::Frontend(key, _) | TableChange::FrontendGone(key) => Key::Frontend(*key),
        TableChange::Vip(addr) | TableChange::VipGone(addr) => Key::Vip(*addr),
    }
}
