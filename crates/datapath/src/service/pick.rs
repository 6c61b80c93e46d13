//! One backend of a set: the one that the client had, the one that its hash gives, or any.

use podway_abi::{
    Addr,
    services::{Affinity, AffinityKey, Backend, Frontend, Origin, backend_flags, set_kind},
};

use super::{Query, STICKY_S, ServiceHost};

/// The chosen backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Its address.
    pub addr: Addr,
    /// The service; `u32::MAX` when none answers.
    pub service: u32,
    /// Its number.
    pub backend: u32,
    /// Its incarnation.
    pub incarnation: u32,
    /// Its port, host byte order.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
    /// Whether the node's address has to replace the source.
    pub masquerade: bool,
    /// Whether the host has to write [`Choice::affinity`].
    pub remember: bool,
    /// When the choice was made, nanoseconds of `CLOCK_MONOTONIC`; known when it is to be remembered.
    pub now_ns: u64,
}

impl Choice {
    /// Nothing chosen.
    pub const NONE: Self = Self {
        addr: Addr::UNSPECIFIED,
        service: u32::MAX,
        backend: 0,
        incarnation: 0,
        port: 0,
        local: false,
        masquerade: false,
        remember: false,
        now_ns: 0,
    };

    /// What to remember of the client when [`Choice::remember`] is set.
    #[inline(always)]
    pub const fn affinity(&self, query: &Query) -> (AffinityKey, Affinity) {
        (
            AffinityKey { client: query.client, service: self.service },
            Affinity { last_seen_ns: self.now_ns, backend: self.backend, incarnation: self.incarnation },
        )
    }

    #[inline(always)]
    fn take(&mut self, id: u32, backend: &Backend) {
        self.addr = backend.addr;
        self.port = backend.port;
        self.local = backend.flags & backend_flags::LOCAL != 0;
        self.backend = id;
        self.incarnation = backend.incarnation;
    }
}

/// A second try meets a set that has changed between two look-ups; a third one does not happen: a program runs for
/// microseconds, and between two changes of a set lie system calls.
const TRIES: u32 = 2;

/// How old a remembered choice may become before it is written again: one write a second at most for a client that
/// asks often.
const REFRESH_NS: u64 = 1_000_000_000;

/// Chooses; `false` when the set is empty.
#[inline(always)]
pub(super) fn pick(
    host: &impl ServiceHost,
    query: &Query,
    frontend: &Frontend,
    kind: u32,
    choice: &mut Choice,
) -> bool {
    let remembers = frontend.affinity_s != 0 || query.sticky;
    if !remembers {
        return fresh(host, query, frontend, kind, choice);
    }
    let key = AffinityKey { client: query.client, service: frontend.service };
    let now = host.now_ns();
    choice.now_ns = now;
    let limit_s = if frontend.affinity_s != 0 { frontend.affinity_s } else { STICKY_S };
    if let Some(had) = host.affinity(&key) {
        let age = now.saturating_sub(had.last_seen_ns);
        if age <= limit_s as u64 * 1_000_000_000 && kept(host, &had, frontend.service, kind, choice) {
            choice.remember = age > REFRESH_NS;
            return true;
        }
    }
    if !fresh(host, query, frontend, kind, choice) {
        return false;
    }
    choice.remember = true;
    true
}

/// The backend that the client had, unless it is gone or does not count for this set.
#[inline(always)]
fn kept(host: &impl ServiceHost, had: &Affinity, service: u32, kind: u32, choice: &mut Choice) -> bool {
    let Some(backend) = host.backend(had.backend) else { return false };
    let same = backend.service == service && backend.incarnation == had.incarnation;
    let counts = backend.flags & (backend_flags::IN_CLUSTER << kind) != 0;
    if same && counts {
        choice.take(had.backend, &backend);
    }
    same && counts
}

#[inline(never)]
fn fresh(
    host: &impl ServiceHost,
    query: &Query,
    frontend: &Frontend,
    kind: u32,
    choice: &mut Choice,
) -> bool {
    let service = frontend.service;
    let sets = service.wrapping_mul(set_kind::PER_SERVICE);
    let consistent = matches!(query.origin, Origin::External) && kind == set_kind::CLUSTER;
    let mut tries = 0;
    while tries < TRIES {
        tries += 1;
        let mut found = None;
        if consistent
            && let Some(word) = host.set(sets.wrapping_add(set_kind::MAGLEV))
            && word.count() != 0
        {
            let slot = word.base().wrapping_add(maglev_hash(query, frontend.affinity_s != 0) % word.count());
            found = host.maglev(slot >> 1).map(|pair| pair.of(slot));
        }
        if found.is_none() {
            let Some(word) = host.set(sets.wrapping_add(kind)) else { return false };
            if word.count() == 0 {
                return false;
            }
            // Scaled instead of divided (Lemire, "Fast random integer generation in an interval", 2018).
            let index = ((host.random() as u64 * word.count() as u64) >> 32) as u32;
            let slot = word.base().wrapping_add(index);
            found = host.slots(slot >> 1).map(|pair| pair.of(slot));
        }
        let Some(id) = found else { return false };
        if let Some(backend) = host.backend(id)
            && backend.service == service
        {
            choice.take(id, &backend);
            return true;
        }
    }
    false
}

/// Hash of a connection for the Maglev table: the same on every node, so that whichever node gets the packet chooses
/// the same backend; of the client alone when it is to keep its backend.
#[inline(always)]
pub fn maglev_hash(query: &Query, client_only: bool) -> u32 {
    let [s0, s1, s2, s3] = query.src.words;
    let mut hash = mix(mix(mix(mix(0x9e37_79b9, s0), s1), s2), s3);
    if !client_only {
        let [d0, d1, d2, d3] = query.dst.words;
        hash = mix(mix(mix(mix(hash, d0), d1), d2), d3);
        hash = mix(hash, (query.src_port as u32) << 16 | query.dst_port as u32);
        hash = mix(hash, query.proto as u32);
    }
    // The finaliser of MurmurHash3: every bit of the input reaches every bit of the result.
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

/// One round of MurmurHash3 (32 bits).
#[inline(always)]
const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}
