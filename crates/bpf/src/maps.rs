//! The maps, and the decisions' view of them.
//!
//! Names are part of the pin paths; user space finds the maps by them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
};
use podway_abi::{
    Addr, Counter, CtEntry, CtKey, CtRoute, Endpoint, Hook, MAX_CONNTRACK, MAX_ENDPOINTS, MAX_PEERS,
    MAX_PREFIXES, NodeConfig, Peer, REASON_SLOTS, Reason, Source, counter_index,
};
use podway_datapath::{Found, Observation, Observed, Scratch, Tables, track};

use crate::events;

#[map]
static CONFIG: Array<NodeConfig> = Array::pinned(1, 0);

#[map]
static GENERATION: Array<u32> = Array::pinned(1, 0);

#[map]
static ENDPOINTS: HashMap<Addr, Endpoint> = HashMap::pinned(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

#[map]
static SOURCES: HashMap<u32, Source> = HashMap::pinned(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

#[map]
static PEERS: HashMap<Addr, Peer> = HashMap::pinned(MAX_PEERS, BPF_F_NO_PREALLOC);

#[map]
static PREFIXES: LpmTrie<Addr, Peer> = LpmTrie::pinned(MAX_PREFIXES, BPF_F_NO_PREALLOC);

#[map]
static CONNTRACK: LruHashMap<CtKey, CtEntry> = LruHashMap::pinned(MAX_CONNTRACK, 0);

#[map]
static COUNTERS: PerCpuArray<Counter> = PerCpuArray::pinned(Hook::ALL.len() as u32 * REASON_SLOTS, 0);

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// The workspace of this CPU.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    let slot = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: the slot belongs to this CPU, programs of this object run with bottom halves off and never
    // nest in one another (redirects take effect after the program's end), so there is one reference.
    // Needed because the stack has no room for it.
    Some(unsafe { &mut *slot })
}

/// Counts one packet under its reason.
#[inline(always)]
pub fn count(hook: Hook, reason: Reason, bytes: u32) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter_index(hook, reason)) {
        // SAFETY: a per-CPU slot, see `scratch`. Needed to add in place.
        let counter = unsafe { &mut *slot };
        counter.packets = counter.packets.wrapping_add(1);
        counter.bytes = counter.bytes.wrapping_add(bytes as u64);
    }
}

/// Adds a flow; when the table is full the least recently seen one gives way.
#[inline(always)]
pub fn insert_flow(key: &CtKey, entry: &CtEntry) {
    // An error means that another CPU holds the bucket: the flow's next packet inserts it.
    let _ = CONNTRACK.insert(key, entry, 0);
}

/// The maps as [`Tables`].
pub struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Option<NodeConfig> {
        CONFIG.get(0).copied()
    }

    #[inline(always)]
    fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
        // SAFETY: elements are freed after a grace period (no preallocation), and copied at once.
        unsafe { ENDPOINTS.get(addr) }.copied()
    }

    #[inline(always)]
    fn source(&self, ifindex: u32) -> Option<Source> {
        // SAFETY: as in `endpoint`.
        unsafe { SOURCES.get(ifindex) }.copied()
    }

    #[inline(always)]
    fn peer(&self, addr: &Addr) -> Option<Peer> {
        // SAFETY: as in `endpoint`.
        if let Some(peer) = unsafe { PEERS.get(addr) } {
            return Some(*peer);
        }
        PREFIXES.get(Key::new(128, *addr)).copied()
    }

    #[inline(always)]
    fn generation(&self) -> u32 {
        GENERATION.get(0).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn follow(&self, key: &CtKey, observation: &Observation, route: &mut CtRoute) -> Found {
        let Some(entry) = flow(key) else { return Found::Nothing };
        if track::follow(entry, observation, route) { Found::Route } else { Found::Flow }
    }

    #[inline(always)]
    fn observe(&self, key: &CtKey, observation: &Observation, route: &CtRoute) -> Observed {
        let Some(entry) = flow(key) else { return Observed::Nothing };
        // What it was is told before it becomes another flow.
        if track::starts_over(entry, observation) {
            events::ended(key, entry, route, 0);
        }
        track::observe(entry, observation, route)
    }
}

/// The flow's entry, to be changed in place.
#[inline(always)]
pub fn flow(key: &CtKey) -> Option<&'static mut CtEntry> {
    let slot = CONNTRACK.get_ptr_mut(key)?;
    // Another CPU may write the same flow at the same time: counters may then miss a packet, and a route is not taken
    // while it is written (`track::learn`). Or the LRU gives the slot to another flow in this moment: this one packet
    // may then be taken for one of that flow, if it came in by the same link from the same sender.
    //
    // SAFETY: the entry lives until the end of the program at least (RCU), and no reference is kept longer. Needed to
    // update without a second look-up.
    Some(unsafe { &mut *slot })
}
