//! The services' tables in user space, filled by hand.

use std::{cell::RefCell, collections::HashMap};

use podway_abi::{
    Addr, CtKey,
    services::{
        Affinity, AffinityKey, Backend, FragmentKey, FragmentPorts, Frontend, FrontendKey, SetWord, SlotPair,
        SourceRange, Translation, backend_flags, set_kind,
    },
};
use podway_datapath::{Scratch, service::ServiceHost};

/// Tables of services in hash maps and vectors.
#[derive(Clone, Debug, Default)]
pub struct HostServices {
    /// What answers.
    pub frontends: HashMap<FrontendKey, Frontend>,
    /// Addresses with their bits.
    pub addresses: HashMap<Addr, u32>,
    /// Ranges of cluster IPs: first address and bits that count.
    pub ranges: Vec<(Addr, Addr)>,
    /// Words of sets.
    pub sets: HashMap<u32, SetWord>,
    /// Slots.
    pub slots: Vec<u32>,
    /// Entries of Maglev tables.
    pub maglev: Vec<u32>,
    /// Backends by number.
    pub backends: Vec<Backend>,
    /// Backends that clients had.
    pub affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    /// Source ranges: service, address over 16 bytes, prefix length over 128 bits.
    pub source_ranges: Vec<(u32, Addr, u32)>,
    /// Translations.
    pub translations: RefCell<HashMap<CtKey, Translation>>,
    /// Ports of fragmented datagrams.
    pub fragments: RefCell<HashMap<FragmentKey, FragmentPorts>>,
    /// What replaces a masqueraded source: IPv4, IPv6.
    pub masquerade: [Addr; 2],
    /// Whether the node itself was a backend of somebody beyond it.
    pub node_serves: std::cell::Cell<bool>,
    /// What comes for a random number, one after the other.
    pub random: RefCell<u32>,
}

impl HostServices {
    /// Gives a service a set of backends, in slots of its own.
    pub fn set(&mut self, service: u32, kind: u32, backends: &[Backend]) {
        let base = u32::try_from(self.slots.len()).expect("the cases have few slots");
        for backend in backends {
            let same = |b: &Backend| b.service == service && (b.addr, b.port) == (backend.addr, backend.port);
            let id = self.backends.iter().position(same).unwrap_or_else(|| {
                self.backends.push(Backend { service, ..*backend });
                self.backends.len() - 1
            });
            self.backends[id].flags |= backend_flags::IN_CLUSTER << kind;
            self.slots.push(u32::try_from(id).expect("the cases have few backends"));
        }
        let count = u32::try_from(backends.len()).expect("the cases have few backends");
        self.sets.insert(service * set_kind::PER_SERVICE + kind, SetWord::new(base, count));
    }

    /// Applies what a decision wants written.
    pub fn apply(&self, scratch: &Scratch) {
        if scratch.new_translation {
            let mut translations = self.translations.borrow_mut();
            translations.insert(scratch.forward.key, scratch.forward.value);
            translations.insert(scratch.back.key, scratch.back.value);
            self.node_serves.set(self.node_serves.get() || scratch.node_serves);
        }
        if scratch.choice.remember {
            let (key, value) = scratch.choice.affinity(&scratch.query);
            self.affinity.borrow_mut().insert(key, value);
        }
        if scratch.new_fragment {
            self.fragments.borrow_mut().insert(scratch.fragment, scratch.fragment_ports);
        }
    }
}

fn pair(all: &[u32], pair: u32) -> Option<SlotPair> {
    let at = pair as usize * 2;
    let low = *all.get(at)?;
    let high = all.get(at + 1).copied().unwrap_or(0);
    Some(SlotPair(u64::from(low) | u64::from(high) << 32))
}

impl ServiceHost for HostServices {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends.get(key).copied()
    }

    fn address(&self, addr: &Addr) -> u32 {
        self.addresses.get(addr).copied().unwrap_or(0)
    }

    fn in_service_range(&self, addr: &Addr) -> bool {
        let bits = |a: &Addr| u128::from_be_bytes(a.octets());
        self.ranges.iter().any(|(first, mask)| (bits(addr) ^ bits(first)) & bits(mask) == 0)
    }

    fn set(&self, index: u32) -> Option<SetWord> {
        Some(self.sets.get(&index).copied().unwrap_or_default())
    }

    fn slots(&self, index: u32) -> Option<SlotPair> {
        pair(&self.slots, index)
    }

    fn maglev(&self, index: u32) -> Option<SlotPair> {
        pair(&self.maglev, index)
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.backends.get(id as usize).copied()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinity.borrow().get(key).copied()
    }

    fn in_source_ranges(&self, key: &SourceRange) -> bool {
        let bits = |a: &Addr| u128::from_be_bytes(a.octets());
        self.source_ranges.iter().any(|(service, addr, len)| {
            let shift = 128 - len;
            *service == key.service && (shift == 128 || bits(addr) >> shift == bits(&key.addr) >> shift)
        })
    }

    fn translation(&self, key: &CtKey) -> Option<Translation> {
        self.translations.borrow().get(key).copied()
    }

    fn claim(&self, key: &CtKey, translation: &Translation) -> bool {
        let mut translations = self.translations.borrow_mut();
        let free = !translations.contains_key(key);
        if free {
            translations.insert(*key, *translation);
        }
        free
    }

    fn masquerade(&self, v4: bool) -> Addr {
        self.masquerade[usize::from(!v4)]
    }

    fn node_serves(&self) -> bool {
        self.node_serves.get()
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.fragments.borrow().get(key).copied()
    }

    /// A sequence over all 32 bits (Knuth's multiplier).
    fn random(&self) -> u32 {
        let mut state = self.random.borrow_mut();
        *state = state.wrapping_add(1);
        state.wrapping_mul(2_654_435_761)
    }

    fn now_ns(&self) -> u64 {
        1_000_000_000
    }
}
