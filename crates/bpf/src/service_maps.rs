//! The tables of services, and the decisions' view of them.
//!
//! The arrays can be mapped into user space (`BPF_F_MMAPABLE`), where their writer changes them by single stores.

use core::arch::asm;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, lpm_trie::Key},
};
use podway_abi::{
    Addr, CtKey,
    services::{
        Affinity, AffinityKey, Backend, FragmentKey, FragmentPorts, Frontend, FrontendKey, MAX_AFFINITY,
        MAX_BACKENDS, MAX_FRAGMENTS, MAX_FRONTENDS, MAX_MAGLEV, MAX_SERVICE_ADDRESSES, MAX_SERVICE_RANGES,
        MAX_SERVICES, MAX_SLOTS, MAX_SOCKETS, MAX_SOURCE_RANGES, MAX_TRANSLATIONS, ServiceConfig,
        ServiceCounter, SetWord, SlotPair, SocketKey, SocketPeer, SourceRange, Translation, set_kind,
    },
};
use podway_datapath::{
    Scratch,
    service::{Choice, Query, ServiceHost},
};

use crate::maps::Maps;

#[map]
static SERVICE_CONFIG: Array<ServiceConfig> = Array::pinned(1, 0);

#[map]
static FRONTENDS: HashMap<FrontendKey, Frontend> = HashMap::pinned(MAX_FRONTENDS, BPF_F_NO_PREALLOC);

#[map]
static SERVICE_ADDRS: HashMap<Addr, u32> = HashMap::pinned(MAX_SERVICE_ADDRESSES, BPF_F_NO_PREALLOC);

#[map]
static SETS: Array<SetWord> = Array::pinned(MAX_SERVICES * set_kind::PER_SERVICE, BPF_F_MMAPABLE);

#[map]
static SLOTS: Array<SlotPair> = Array::pinned(MAX_SLOTS / 2, BPF_F_MMAPABLE);

#[map]
static MAGLEV: Array<SlotPair> = Array::pinned(MAX_MAGLEV / 2, BPF_F_MMAPABLE);

#[map]
static BACKENDS: Array<Backend> = Array::pinned(MAX_BACKENDS, BPF_F_MMAPABLE);

#[map]
static SERVICE_COUNTERS: Array<ServiceCounter> = Array::pinned(MAX_SERVICES, BPF_F_MMAPABLE);

#[map]
static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::pinned(MAX_AFFINITY, 0);

#[map]
static SOURCE_RANGES: LpmTrie<SourceRange, u32> = LpmTrie::pinned(MAX_SOURCE_RANGES, BPF_F_NO_PREALLOC);

#[map]
static SOCKETS: LruHashMap<SocketKey, SocketPeer> = LruHashMap::pinned(MAX_SOCKETS, 0);

#[map]
static TRANSLATIONS: LruHashMap<CtKey, Translation> = LruHashMap::pinned(MAX_TRANSLATIONS, 0);

/// Not 0 once the node itself was a backend of somebody beyond it.
#[map]
static NODE_SERVES: Array<u32> = Array::pinned(1, 0);

#[map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts> = LruHashMap::pinned(MAX_FRAGMENTS, 0);

impl ServiceHost for Maps {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        // SAFETY: elements are freed after a grace period (no preallocation), and copied at once.
        unsafe { FRONTENDS.get(key) }.copied()
    }

    #[inline(always)]
    fn address(&self, addr: &Addr) -> u32 {
        // SAFETY: as in `frontend`.
        unsafe { SERVICE_ADDRS.get(addr) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn in_service_range(&self, addr: &Addr) -> bool {
        let Some(config) = SERVICE_CONFIG.get(0) else { return false };
        let mut i = 0;
        while i < MAX_SERVICE_RANGES {
            if i as u32 >= config.range_count {
                return false;
            }
            let Some(range) = config.ranges.get(i) else { return false };
            if is_within(addr, &range.addr, &range.mask) {
                return true;
            }
            i += 1;
        }
        false
    }

    #[inline(always)]
    fn set(&self, index: u32) -> Option<SetWord> {
        SETS.get(index).copied()
    }

    #[inline(always)]
    fn slots(&self, pair: u32) -> Option<SlotPair> {
        SLOTS.get(pair).copied()
    }

    #[inline(always)]
    fn maglev(&self, pair: u32) -> Option<SlotPair> {
        MAGLEV.get(pair).copied()
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<Backend> {
        BACKENDS.get(id).copied()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: the element may be given to another client meanwhile (LRU): a choice is then made anew, or kept
        // for a client that never made it, which breaks no rule. Copied at once.
        unsafe { AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn in_source_ranges(&self, key: &SourceRange) -> bool {
        SOURCE_RANGES.get(Key::new(160, *key)).is_some()
    }

    #[inline(always)]
    fn translation(&self, key: &CtKey) -> Option<Translation> {
        // SAFETY: the element may be given to another flow meanwhile (LRU), whose ends the packet would get once; its
        // receiver knows no such connection. Copied at once.
        unsafe { TRANSLATIONS.get(key) }.copied()
    }

    #[inline(always)]
    fn claim(&self, key: &CtKey, translation: &Translation) -> bool {
        TRANSLATIONS.insert(key, translation, BPF_NOEXIST as u64).is_ok()
    }

    #[inline(always)]
    fn masquerade(&self, v4: bool) -> Addr {
        match SERVICE_CONFIG.get(0) {
            Some(config) if v4 => config.masquerade_v4,
            Some(config) => config.masquerade_v6,
            None => Addr::UNSPECIFIED,
        }
    }

    #[inline(always)]
    fn node_serves(&self) -> bool {
        NODE_SERVES.get(0).is_some_and(|serves| *serves != 0)
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: as in `translation`.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: no preconditions.
        unsafe { bpf_ktime_get_ns() }
    }
}

#[inline(always)]
fn is_within(addr: &Addr, range: &Addr, mask: &Addr) -> bool {
    let [a0, a1, a2, a3] = addr.words;
    let [r0, r1, r2, r3] = range.words;
    let [m0, m1, m2, m3] = mask.words;
    (((a0 ^ r0) & m0) | ((a1 ^ r1) & m1) | ((a2 ^ r2) & m2) | ((a3 ^ r3) & m3)) == 0
}

/// Cookie of the node's network namespace.
#[inline(always)]
pub fn node_netns() -> u64 {
    SERVICE_CONFIG.get(0).map_or(0, |config| config.node_netns)
}

/// Writes down what a choice wants remembered.
#[inline(always)]
pub fn remember(query: &Query, choice: &Choice) {
    if choice.remember {
        let (key, affinity) = choice.affinity(query);
        // An error means that another CPU holds the bucket: the client's next connection is remembered.
        let _ = AFFINITY.insert(&key, &affinity, 0);
    }
}

/// Writes down what a decision about a packet wants written.
#[inline(always)]
pub fn settle(scratch: &Scratch) {
    // Errors mean that another CPU holds the bucket: the flow's next packet makes up for it.
    if scratch.new_translation {
        let _ = TRANSLATIONS.insert(&scratch.back.key, &scratch.back.value, 0);
        let _ = TRANSLATIONS.insert(&scratch.forward.key, &scratch.forward.value, 0);
        count_connection(scratch.choice.service, true);
        if scratch.node_serves {
            let _ = NODE_SERVES.set(0, 1, 0);
        }
    }
    if scratch.new_fragment {
        let _ = FRAGMENTS.insert(&scratch.fragment, &scratch.fragment_ports, 0);
    }
    remember(&scratch.query, &scratch.choice);
}

/// Counts a connection that got a backend, or one that got none.
#[inline(always)]
pub fn count_connection(service: u32, served: bool) {
    if let Some(slot) = SERVICE_COUNTERS.get_ptr_mut(service) {
        // SAFETY: an element of an array lives as long as the map. Needed to name the field without a reference,
        // because other CPUs add to it.
        let field = unsafe { if served { &raw mut (*slot).connections } else { &raw mut (*slot).refused } };
        add(field, 1);
    }
}

/// Counts a packet towards one of a service's backends.
#[inline(always)]
pub fn count_packet(service: u32, bytes: u32) {
    if let Some(slot) = SERVICE_COUNTERS.get_ptr_mut(service) {
        // SAFETY: as in `count_connection`.
        let (packets, sum) = unsafe { (&raw mut (*slot).packets, &raw mut (*slot).bytes) };
        add(packets, 1);
        add(sum, bytes as u64);
    }
}

/// Adds to a counter that all CPUs share. As an instruction, because the target has no atomic types.
#[inline(always)]
fn add(counter: *mut u64, value: u64) {
    // SAFETY: the callers pass a 64-bit word of a map's value on its natural boundary; the verifier checks it.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) value, options(nostack)) }
}

/// What a socket asked for, when it talks to this backend because of a service.
#[inline(always)]
pub fn socket_peer(key: &SocketKey) -> Option<SocketPeer> {
    // SAFETY: the element may be given to another socket meanwhile (LRU), which takes that many sockets in the
    // microseconds until it is copied; the application would be told another service's address once.
    unsafe { SOCKETS.get(key) }.copied()
}

/// Remembers what a socket asked for.
#[inline(always)]
pub fn remember_socket(key: &SocketKey, peer: &SocketPeer) {
    // An error means that another CPU holds the bucket: the application is then told the backend's address.
    let _ = SOCKETS.insert(key, peer, 0);
}
