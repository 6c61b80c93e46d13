//! The decisions about services over the kernel's tables, from user space: they say what the kernel would choose, and
//! change nothing.

use std::sync::atomic::{AtomicU32, Ordering};

use aya::maps::lpm_trie::Key as Prefix;
use podway_abi::{
    Addr, CtKey,
    services::{
        Affinity, AffinityKey, Backend, FragmentKey, FragmentPorts, Frontend, FrontendKey, SetWord, SlotPair,
        SourceRange, Translation,
    },
};
use podway_datapath::service::ServiceHost;

use super::ServiceWriter;

/// What comes for random numbers: a sequence over all 32 bits, so that repeated questions find every backend.
static SEQUENCE: AtomicU32 = AtomicU32::new(0);

impl ServiceHost for ServiceWriter {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends.get(key, 0).ok()
    }

    fn address(&self, addr: &Addr) -> u32 {
        self.addresses.get(addr, 0).unwrap_or(0)
    }

    fn in_service_range(&self, addr: &Addr) -> bool {
        let Ok(config) = self.config.get(&0, 0) else { return false };
        let within = |range: &podway_abi::services::Range| {
            (0..4).all(|i| (addr.words[i] ^ range.addr.words[i]) & range.mask.words[i] == 0)
        };
        config.ranges.iter().take(config.range_count as usize).any(within)
    }

    fn set(&self, index: u32) -> Option<SetWord> {
        Some(SetWord(self.sets.load(index as usize)))
    }

    fn slots(&self, pair: u32) -> Option<SlotPair> {
        Some(SlotPair(self.slots.load(pair as usize)))
    }

    fn maglev(&self, pair: u32) -> Option<SlotPair> {
        Some(SlotPair(self.maglev.load(pair as usize)))
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        Some(ServiceWriter::backend(self, id))
    }

    /// A trace is a new client.
    fn affinity(&self, _key: &AffinityKey) -> Option<Affinity> {
        None
    }

    fn in_source_ranges(&self, key: &SourceRange) -> bool {
        self.ranges.get(&Prefix::new(160, *key), 0).is_ok()
    }

    /// And a new flow.
    fn translation(&self, _key: &CtKey) -> Option<Translation> {
        None
    }

    fn claim(&self, _key: &CtKey, _translation: &Translation) -> bool {
        true
    }

    fn masquerade(&self, v4: bool) -> Addr {
        let config = self.config.get(&0, 0).unwrap_or_default();
        if v4 { config.masquerade_v4 } else { config.masquerade_v6 }
    }

    fn node_serves(&self) -> bool {
        false
    }

    fn fragment(&self, _key: &FragmentKey) -> Option<FragmentPorts> {
        None
    }

    fn random(&self) -> u32 {
        SEQUENCE.fetch_add(1, Ordering::Relaxed).wrapping_mul(2_654_435_761)
    }

    fn now_ns(&self) -> u64 {
        0
    }
}
