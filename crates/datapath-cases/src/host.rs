//! The decisions' host in user space: hash maps for tables, a slice for the packet.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
};

use podway_abi::{
    Addr, CtEntry, CtKey, CtRoute, Endpoint, Hook, NodeConfig, Peer, Source,
    services::{
        Affinity, AffinityKey, Backend, FragmentKey, FragmentPorts, Frontend, FrontendKey, SetWord, SlotPair,
        SourceRange, Translation,
    },
};
use podway_datapath::{
    Bytes, Env, Found, Observation, Observed, Scratch, Tables, TunnelKey, service::ServiceHost, track,
};

use crate::services::HostServices;

/// Tables in hash maps.
#[derive(Clone, Debug)]
pub struct HostTables {
    /// The node's configuration.
    pub config: NodeConfig,
    /// Pods by address.
    pub endpoints: HashMap<Addr, Endpoint>,
    /// Pods by interface.
    pub sources: HashMap<u32, Source>,
    /// Prefixes over the 16 bytes, in no order.
    pub peers: Vec<(Addr, u32, Peer)>,
    /// Number of the tables' state: raised after a change of any of them.
    pub generation: u32,
    /// Flows.
    pub conntrack: RefCell<HashMap<CtKey, CtEntry>>,
    /// Services.
    pub services: HostServices,
    /// Look-ups in the tables of pods and peers so far.
    pub look_ups: Cell<usize>,
}

impl HostTables {
    /// Empty tables under a configuration.
    pub fn new(config: NodeConfig) -> Self {
        Self {
            config,
            endpoints: HashMap::new(),
            sources: HashMap::new(),
            peers: Vec::new(),
            generation: 1,
            conntrack: RefCell::default(),
            services: HostServices::default(),
            look_ups: Cell::default(),
        }
    }

    /// Applies what a decision wants written.
    pub fn apply(&self, scratch: &Scratch) {
        if scratch.new_flow {
            self.conntrack.borrow_mut().insert(scratch.ct_key, scratch.ct_entry);
        }
        self.services.apply(scratch);
    }
}

impl Tables for HostTables {
    fn config(&self) -> Option<NodeConfig> {
        Some(self.config)
    }

    fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
        self.look_ups.set(self.look_ups.get() + 1);
        self.endpoints.get(addr).copied()
    }

    fn source(&self, ifindex: u32) -> Option<Source> {
        self.look_ups.set(self.look_ups.get() + 1);
        self.sources.get(&ifindex).copied()
    }

    fn peer(&self, addr: &Addr) -> Option<Peer> {
        self.look_ups.set(self.look_ups.get() + 1);
        let bits = u128::from_be_bytes(addr.octets());
        self.peers
            .iter()
            .filter(|(prefix, len, _)| {
                let shift = 128 - len;
                shift == 128 || u128::from_be_bytes(prefix.octets()) >> shift == bits >> shift
            })
            .max_by_key(|(_, len, _)| *len)
            .map(|(_, _, peer)| *peer)
    }

    fn generation(&self) -> u32 {
        self.generation
    }

    fn follow(&self, key: &CtKey, observation: &Observation, route: &mut CtRoute) -> Found {
        let mut flows = self.conntrack.borrow_mut();
        let Some(entry) = flows.get_mut(key) else { return Found::Nothing };
        if track::follow(entry, observation, route) { Found::Route } else { Found::Flow }
    }

    fn observe(&self, key: &CtKey, observation: &Observation, route: &CtRoute) -> Observed {
        let mut flows = self.conntrack.borrow_mut();
        flows.get_mut(key).map_or(Observed::Nothing, |entry| track::observe(entry, observation, route))
    }
}

impl ServiceHost for HostTables {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        ServiceHost::frontend(&self.services, key)
    }

    fn address(&self, addr: &Addr) -> u32 {
        ServiceHost::address(&self.services, addr)
    }

    fn in_service_range(&self, addr: &Addr) -> bool {
        ServiceHost::in_service_range(&self.services, addr)
    }

    fn set(&self, index: u32) -> Option<SetWord> {
        ServiceHost::set(&self.services, index)
    }

    fn slots(&self, pair: u32) -> Option<SlotPair> {
        ServiceHost::slots(&self.services, pair)
    }

    fn maglev(&self, pair: u32) -> Option<SlotPair> {
        ServiceHost::maglev(&self.services, pair)
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        ServiceHost::backend(&self.services, id)
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        ServiceHost::affinity(&self.services, key)
    }

    fn in_source_ranges(&self, key: &SourceRange) -> bool {
        ServiceHost::in_source_ranges(&self.services, key)
    }

    fn translation(&self, key: &CtKey) -> Option<Translation> {
        ServiceHost::translation(&self.services, key)
    }

    fn claim(&self, key: &CtKey, translation: &Translation) -> bool {
        ServiceHost::claim(&self.services, key, translation)
    }

    fn masquerade(&self, v4: bool) -> Addr {
        ServiceHost::masquerade(&self.services, v4)
    }

    fn node_serves(&self) -> bool {
        ServiceHost::node_serves(&self.services)
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        ServiceHost::fragment(&self.services, key)
    }

    fn random(&self) -> u32 {
        ServiceHost::random(&self.services)
    }

    fn now_ns(&self) -> u64 {
        ServiceHost::now_ns(&self.services)
    }
}

/// A packet in a slice.
pub struct PacketBytes<'a>(pub &'a [u8]);

impl Bytes for PacketBytes<'_> {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let bytes = self.0.get(offset..)?.get(..N * 4)?;
        let mut words = [0; N];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_ne_bytes(*chunk);
        }
        Some(words)
    }

    fn len(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }
}

/// A hook with given surroundings.
#[derive(Clone, Copy, Debug)]
pub struct HostEnv {
    /// The hook.
    pub hook: Hook,
    /// Interface it is attached to.
    pub ifindex: u32,
    /// The clock.
    pub now_ns: u64,
    /// Whether the frame carries a VLAN tag.
    pub tagged: bool,
    /// Outer header of a decapsulated packet.
    pub tunnel_key: Option<TunnelKey>,
    /// Whether another hook decided before.
    pub decided: bool,
}

impl Env for HostEnv {
    fn hook(&self) -> Hook {
        self.hook
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn now_ns(&self) -> u64 {
        self.now_ns
    }

    fn is_tagged(&self) -> bool {
        self.tagged
    }

    fn tunnel_key(&self, _config: &NodeConfig) -> Option<TunnelKey> {
        self.tunnel_key
    }

    fn is_decided(&self) -> bool {
        self.decided
    }
}
