//! Loads, pins, replaces and reads the kernel programs and maps of one node.
//!
//! Everything that has to outlive the agent is pinned: maps under `<pin dir>/maps-v<ABI>`, the links of the
//! attached programs under `<pin dir>/links`. A restart opens what is there, loads the programs it was built
//! with and swaps them into the links one by one; no packet is without a program in between.
//!
//! Knows nothing of Kubernetes.

mod attach;
mod bpffs;
mod error;
mod events;
mod flows;
mod generation;
mod object;
mod peers;
mod report;
mod services;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray},
    programs::SchedClassifier,
};
use podway_abi::{ABI_VERSION, Addr, Counter as AbiCounter, Hook, Mac, Source};

pub use attach::AttachMethod;
pub use error::{Error, Result};
pub use events::{EventCounts, EventLimits, EventReader, EventTables};
pub use flows::{Flow, SweepReport};
pub use object::is_built_in;
pub use peers::{Peer, PeerFlags, SyncReport};
pub use podway_abi::services::MAX_SERVICE_RANGES;
pub use report::{Counter, MapFill, ProgramReport, TestRun};
pub use services::{ApplyReport, KernelFrontend, Refused, ServiceCounts, ServiceWriter};

/// How the node reaches other nodes' pods, and by which devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Overlay or direct.
    pub mode: Mode,
    /// Interface index of the device that carries the underlay.
    pub uplink_ifindex: u32,
    /// Services are translated by the node's stack, which has to see both directions of what pods exchange: no short
    /// cuts past it.
    pub stack_translates: bool,
}

/// How other nodes' pods are reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Through a VXLAN device.
    Overlay {
        /// Interface index of the VXLAN device.
        tunnel_ifindex: u32,
        /// VXLAN network identifier, 24 bits.
        vni: u32,
        /// UDP port of the tunnel.
        port: u16,
        /// This node's end of its tunnels, which says the outer header's family.
        underlay: IpAddr,
    },
    /// By the node's routes.
    Direct,
}

/// A pod on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The agent's number for it.
    pub id: u32,
    /// Interface index of the host side of its veth.
    pub ifindex: u32,
    /// Link-layer address of the pod's side.
    pub pod_mac: Mac,
    /// Link-layer address of the host's side.
    pub host_mac: Mac,
    /// Its addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// Whether what goes to it has to pass the queue on its link: the queue limits its bandwidth.
    pub queued: bool,
}

/// The programs and maps of one node.
///
/// All methods take `&self` and may be called from any thread.
pub struct Datapath {
    pin_dir: PathBuf,
    method: AttachMethod,
    ebpf: Mutex<Ebpf>,
    // A lock for each group of tables: a sweep of a large connection table must not hold up a pod.
    config: Mutex<Array<MapData, podway_abi::NodeConfig>>,
    pods: Mutex<Pods>,
    peers: Mutex<peers::Peers>,
    flows: Mutex<flows::Flows>,
    events: Mutex<events::Events>,
    generation: generation::Generation,
    counters: PerCpuArray<MapData, AbiCounter>,
    /// The kernel's number of the configuration map.
    config_id: u32,
}

/// The tables of this node's pods.
struct Pods {
    endpoints: HashMap<MapData, Addr, podway_abi::Endpoint>,
    sources: HashMap<MapData, u32, Source>,
}

impl Datapath {
    /// Opens the datapath under `pin_dir` (on bpffs, which is mounted when it is not): adopts the maps that
    /// are pinned there, creates those that are missing, and loads the programs. Attaches nothing.
    ///
    /// # Errors
    /// [`Error::NoKernelObject`] in a build without the kernel object; [`Error::Load`] with the verifier's
    /// log when the kernel refuses a program; I/O errors with the path.
    pub fn load(pin_dir: &Path) -> Result<Self> {
        Self::load_with(pin_dir, AttachMethod::of_this_kernel())
    }

    /// As [`Datapath::load`], with the way of attaching given instead of found out: tests run the one for
    /// older kernels on a newer one.
    ///
    /// # Errors
    /// As [`Datapath::load`].
    pub fn load_with(pin_dir: &Path, method: AttachMethod) -> Result<Self> {
        let object = object::bytes()?;
        bpffs::ensure_mounted(pin_dir)?;
        let map_dir = pin_dir.join(format!("maps-v{ABI_VERSION}"));
        for dir in [&map_dir, &pin_dir.join("links")] {
            std::fs::create_dir_all(dir).map_err(|source| Error::io("create the directory", dir, source))?;
        }
        let mut ebpf = EbpfLoader::new()
            .default_map_pin_directory(&map_dir)
            .load(object)
            .map_err(|source| Error::load("the kernel object", source))?;
        for hook in Hook::ALL {
            program(&mut ebpf, hook)?.load().map_err(|source| Error::load(hook.name(), source))?;
        }
        let pods = Pods {
            endpoints: HashMap::try_from(take(&mut ebpf, "ENDPOINTS")?)?,
            sources: HashMap::try_from(take(&mut ebpf, "SOURCES")?)?,
        };
        let config = take(&mut ebpf, "CONFIG")?;
        let config_id = match &config {
            Map::Array(data) => data.info().map_err(|e| Error::map("CONFIG", e))?.id(),
            _ => return Err(Error::Missing { what: "array", name: "CONFIG" }),
        };
        let generation = generation::Generation::new(take(&mut ebpf, "GENERATION")?)?;
        // What an agent before this one wrote last, it may not have lived to announce.
        generation.raise()?;
        Ok(Self {
            pin_dir: pin_dir.to_owned(),
            generation,
            method,
            config_id,
            config: Mutex::new(Array::try_from(config)?),
            pods: Mutex::new(pods),
            peers: Mutex::new(peers::Peers::new(take(&mut ebpf, "PEERS")?, take(&mut ebpf, "PREFIXES")?)?),
            flows: Mutex::new(flows::Flows::new(
                take(&mut ebpf, "CONNTRACK")?,
                take(&mut ebpf, "TRANSLATIONS")?,
            )?),
            events: Mutex::new(events::Events::new(&mut ebpf)?),
            counters: PerCpuArray::try_from(take(&mut ebpf, "COUNTERS")?)?,
            ebpf: Mutex::new(ebpf),
        })
    }

    /// Removes every program, link and map pinned under `pin_dir` and returns what was removed. Traffic of
    /// pods that are still attached is no longer handled afterwards.
    ///
    /// # Errors
    /// The first path that cannot be removed; what comes after it is still attempted.
    pub fn remove_all(pin_dir: &Path) -> Result<Vec<String>> {
        bpffs::remove_tree(pin_dir)
    }

    /// Takes this datapath's filters off a device of the node without loading anything: for what the removal of
    /// pins does not reach on kernels without TCX.
    pub fn remove_filters(ifindex: u32) {
        attach::remove_filters(ifindex);
    }

    /// Writes the node's configuration.
    ///
    /// # Errors
    /// When the kernel refuses the map update.
    pub fn set_config(&self, config: &NodeConfig) -> Result<()> {
        let mut abi = podway_abi::NodeConfig { uplink_ifindex: config.uplink_ifindex, ..Default::default() };
        match config.mode {
            Mode::Overlay { tunnel_ifindex, vni, port, underlay } => {
                abi.mode = podway_abi::mode::OVERLAY;
                abi.tunnel_ifindex = tunnel_ifindex;
                abi.vni = vni;
                abi.tunnel_port = port.into();
                abi.underlay = Addr::from(underlay);
                if underlay.is_ipv6() {
                    abi.flags |= podway_abi::node_flags::UNDERLAY_V6;
                }
            }
            Mode::Direct => abi.mode = podway_abi::mode::DIRECT,
        }
        if config.stack_translates {
            abi.flags |= podway_abi::node_flags::STACK_TRANSLATES;
        }
        self.generation.after(|| lock(&self.config).set(0, abi, 0).map_err(|e| Error::map("CONFIG", e)))
    }

    /// Makes a pod known: from now on its packets are accepted and packets for it delivered.
    ///
    /// # Errors
    /// [`Error::BadEndpoint`] for two addresses of one family or none at all; [`Error::Map`] when a table is
    /// full.
    pub fn set_endpoint(&self, endpoint: &Endpoint) -> Result<()> {
        let source = source_of(endpoint)?;
        self.generation.after(|| lock(&self.pods).set(endpoint, source))
    }

    /// Forgets the pod behind an interface; an unknown one is not an error.
    ///
    /// # Errors
    /// When the kernel refuses the map update.
    pub fn remove_endpoint(&self, ifindex: u32) -> Result<()> {
        self.generation.after(|| lock(&self.pods).remove(ifindex))
    }

    /// The pods that the datapath knows.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>> {
        let pods = lock(&self.pods);
        let mut host_sides = BTreeMap::new();
        for entry in pods.endpoints.iter() {
            let (_, endpoint) = entry.map_err(|e| Error::map("ENDPOINTS", e))?;
            host_sides.insert(endpoint.ifindex, (endpoint.host_mac, endpoint.flags));
        }
        let mut all = Vec::new();
        for entry in pods.sources.iter() {
            let (ifindex, source) = entry.map_err(|e| Error::map("SOURCES", e))?;
            let addresses = [source.v4, source.v6].into_iter().filter(|a| *a != Addr::UNSPECIFIED);
            let (host_mac, flags) = host_sides.get(&ifindex).copied().unwrap_or_default();
            all.push(Endpoint {
                id: source.id,
                ifindex,
                pod_mac: source.pod_mac,
                host_mac,
                addresses: addresses.map(IpAddr::from).collect(),
                queued: flags & podway_abi::endpoint_flags::QUEUED != 0,
            });
        }
        all.sort_by_key(|e| e.ifindex);
        Ok(all)
    }

    /// Whether the map pinned under the configuration's name is the one that this process writes. All maps are
    /// made, adopted and removed together, so one speaks for the rest.
    pub(crate) fn maps_are_pinned(&self) -> Result<bool> {
        let path = self.pin_dir.join(format!("maps-v{ABI_VERSION}")).join("CONFIG");
        if !path.exists() {
            return Ok(false);
        }
        let id = |info: aya::maps::MapInfo| info.id();
        let pinned = aya::maps::MapInfo::from_pin(&path).map(id).map_err(|e| Error::map("CONFIG", e))?;
        let ours = self.config_id;
        Ok(pinned == ours)
    }

    fn ebpf(&self) -> MutexGuard<'_, Ebpf> {
        lock(&self.ebpf)
    }
}

impl Pods {
    fn set(&mut self, endpoint: &Endpoint, source: Source) -> Result<()> {
        let stale = self.sources.get(&endpoint.ifindex, 0).ok();
        self.sources.insert(endpoint.ifindex, source, 0).map_err(|e| Error::map("SOURCES", e))?;
        let value = podway_abi::Endpoint {
            ifindex: endpoint.ifindex,
            id: endpoint.id,
            pod_mac: endpoint.pod_mac,
            host_mac: endpoint.host_mac,
            flags: if endpoint.queued { podway_abi::endpoint_flags::QUEUED } else { 0 },
        };
        for ip in &endpoint.addresses {
            self.endpoints.insert(Addr::from(*ip), value, 0).map_err(|e| Error::map("ENDPOINTS", e))?;
        }
        if let Some(old) = stale {
            for addr in [old.v4, old.v6] {
                if addr != source.v4 && addr != source.v6 {
                    self.forget_address(&addr, endpoint.ifindex)?;
                }
            }
        }
        Ok(())
    }

    fn remove(&mut self, ifindex: u32) -> Result<()> {
        let Ok(source) = self.sources.get(&ifindex, 0) else { return Ok(()) };
        for addr in [source.v4, source.v6] {
            self.forget_address(&addr, ifindex)?;
        }
        ignore_missing(self.sources.remove(&ifindex), "SOURCES")
    }

    /// Removes an address from the endpoint table if it still belongs to `ifindex`.
    fn forget_address(&mut self, addr: &Addr, ifindex: u32) -> Result<()> {
        if *addr == Addr::UNSPECIFIED {
            return Ok(());
        }
        match self.endpoints.get(addr, 0) {
            Ok(found) if found.ifindex == ifindex => ignore_missing(self.endpoints.remove(addr), "ENDPOINTS"),
            _ => Ok(()),
        }
    }
}

fn source_of(endpoint: &Endpoint) -> Result<Source> {
    let mut source = Source { id: endpoint.id, pod_mac: endpoint.pod_mac, ..Default::default() };
    for ip in &endpoint.addresses {
        let slot = if ip.is_ipv4() { &mut source.v4 } else { &mut source.v6 };
        if *slot != Addr::UNSPECIFIED {
            return Err(Error::BadEndpoint {
                ifindex: endpoint.ifindex,
                cause: format!(
                    "has {} and {ip}: at most one address of each family is possible",
                    IpAddr::from(*slot)
                ),
            });
        }
        *slot = Addr::from(*ip);
    }
    if endpoint.addresses.is_empty() {
        return Err(Error::BadEndpoint { ifindex: endpoint.ifindex, cause: "has no address".to_owned() });
    }
    Ok(source)
}

/// Takes a lock. A panic elsewhere cannot leave a table half-written: each update is one system call.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn ignore_missing(
    result: std::result::Result<(), aya::maps::MapError>,
    map: &'static str,
) -> Result<()> {
    match result {
        Ok(()) | Err(aya::maps::MapError::KeyNotFound) => Ok(()),
        Err(aya::maps::MapError::SyscallError(e)) if e.io_error.kind() == std::io::ErrorKind::NotFound => {
            Ok(())
        }
        Err(e) => Err(Error::map(map, e)),
    }
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map> {
    ebpf.take_map(name).ok_or(Error::Missing { what: "map", name })
}

fn program(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier> {
    ebpf.program_mut(hook.name())
        .ok_or(Error::Missing { what: "program", name: hook.name() })?
        .try_into()
        .map_err(|source| Error::load(hook.name(), source))
}
