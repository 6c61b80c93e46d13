//! The tables of services: from an address and port to one of the backends behind it.
//!
//! A frontend names a service by number. A service has two sets of backends and, when it is hashed consistently, a
//! Maglev table; each of these is a region of an array, named by one [`SetWord`] of eight bytes, so that a set changes
//! by one store. The arrays are mapped into the writer's memory.

use crate::{Addr, CtKey, assert_layout};

/// Most frontends: an address and port, or a node port.
pub const MAX_FRONTENDS: u32 = 262_144;
/// Most addresses that belong to services or serve node ports.
pub const MAX_SERVICE_ADDRESSES: u32 = 131_072;
/// Most services: one port of one family of one Service each.
pub const MAX_SERVICES: u32 = 131_072;
/// Slots of all sets together; two share an element of the array.
pub const MAX_SLOTS: u32 = 1 << 20;
/// Entries of all Maglev tables together; two share an element of the array.
pub const MAX_MAGLEV: u32 = 1 << 22;
/// Most backends; each belongs to one service.
pub const MAX_BACKENDS: u32 = 1 << 19;
/// Most clients whose backend is remembered; the least recently seen are forgotten.
pub const MAX_AFFINITY: u32 = 65_536;
/// Most source ranges of all services together.
pub const MAX_SOURCE_RANGES: u32 = 65_536;
/// Most sockets and senders whose original destination is remembered.
pub const MAX_SOCKETS: u32 = 131_072;
/// Most translations of packets, two for each flow; the least recently seen are forgotten.
pub const MAX_TRANSLATIONS: u32 = 262_144;
/// Most fragmented datagrams whose ports are remembered; the least recently seen are forgotten.
pub const MAX_FRAGMENTS: u32 = 8_192;
/// Most ranges of cluster IPs.
pub const MAX_SERVICE_RANGES: usize = 4;

/// Where a frontend is looked for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct FrontendKey {
    /// Its address; for a node port the unspecified address of the family.
    pub addr: Addr,
    /// Its port, host byte order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// See [`scope`].
    pub scope: u8,
}
assert_layout!(FrontendKey, 20);

/// Values of [`FrontendKey::scope`].
pub mod scope {
    /// One address.
    pub const ADDRESS: u8 = 0;
    /// Every address of the node that serves node ports.
    pub const NODE: u8 = 1;
}

/// The unspecified IPv4 address, which stands for "every address" in [`FrontendKey`]; that of IPv6 is
/// [`Addr::UNSPECIFIED`].
pub const ANY_V4: Addr = Addr::from_v4_word(0);

/// What answers at an address and port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Frontend {
    /// Number of the service.
    pub service: u32,
    /// Routes of the three origins in the lowest nine bits (see [`route`]), then [`frontend_flags`].
    pub flags: u32,
    /// Seconds for which a client keeps its backend; 0 without session affinity.
    pub affinity_s: u32,
}
assert_layout!(Frontend, 12);

/// Bits of [`Frontend::flags`] beyond the routes.
pub mod frontend_flags {
    /// Only senders in the service's source ranges are served.
    pub const SOURCE_RANGES: u32 = 1 << 9;
    /// First bit of why the frontend exists, three bits: the order of the service table's kinds.
    pub const KIND_SHIFT: u32 = 12;
}

/// A sender, in the order of the routes.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A pod of the cluster.
    Pod = 0,
    /// This node itself.
    Node = 1,
    /// Anyone else.
    External = 2,
}

/// The route of one origin: three bits of [`Frontend::flags`], from bit `3 × origin` on.
pub mod route {
    /// Two bits: where to.
    pub const TARGET: u32 = 0b011;
    /// To the cluster-wide set.
    pub const CLUSTER: u32 = 0;
    /// To the set of this node.
    pub const LOCAL: u32 = 1;
    /// Nowhere; the sender is told.
    pub const REJECT: u32 = 2;
    /// Nowhere, in silence.
    pub const DROP: u32 = 3;
    /// The node's address replaces the source.
    pub const MASQUERADE: u32 = 0b100;
}

impl Frontend {
    /// The three bits of one origin's route, see [`route`].
    #[inline(always)]
    pub const fn route(&self, origin: Origin) -> u32 {
        (self.flags >> (3 * origin as u32)) & 0b111
    }
}

/// Bits of an address's entry in the table of service addresses.
pub mod address_flags {
    /// It belongs to services alone: ports without a frontend are rejected.
    pub const VIP: u32 = 1 << 0;
    /// It is this node's and serves node ports.
    pub const NODE_PORTS: u32 = 1 << 1;
    /// It is this node's.
    pub const OWN: u32 = 1 << 2;
}

/// A region of an array of slots, as one word that is stored at once: the first slot in the lower half, the number of
/// slots in the upper half. A set without slots is 0.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SetWord(pub u64);
assert_layout!(SetWord, 8);

impl SetWord {
    /// A region.
    #[inline(always)]
    pub const fn new(base: u32, count: u32) -> Self {
        Self(base as u64 | (count as u64) << 32)
    }

    /// First slot.
    #[inline(always)]
    pub const fn base(self) -> u32 {
        self.0 as u32
    }

    /// Number of slots.
    #[inline(always)]
    pub const fn count(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Where the three regions of a service lie in the table of sets: `service * SETS_PER_SERVICE + kind`.
pub mod set_kind {
    /// Words for each service.
    pub const PER_SERVICE: u32 = 4;
    /// The cluster-wide set.
    pub const CLUSTER: u32 = 0;
    /// The set of this node.
    pub const LOCAL: u32 = 1;
    /// The Maglev table over the cluster-wide set (a region of the Maglev array).
    pub const MAGLEV: u32 = 2;
}

/// Two slots of an array, each the number of a backend: the even one in the lower half.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SlotPair(pub u64);
assert_layout!(SlotPair, 8);

impl SlotPair {
    /// The slot with this index, of the pair at half of it.
    #[inline(always)]
    pub const fn of(self, index: u32) -> u32 {
        if index & 1 == 0 { self.0 as u32 } else { (self.0 >> 32) as u32 }
    }
}

/// [`Backend::service`] of a number that no backend has: services are counted from 1, and a table starts as zeros.
pub const NO_SERVICE: u32 = 0;

/// One endpoint of one service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Backend {
    /// Its address.
    pub addr: Addr,
    /// The service that it belongs to, or [`NO_SERVICE`]. Whoever comes by a slot compares it: a set that changed
    /// meanwhile cannot lead to another service.
    pub service: u32,
    /// Raised each time the number is given up: who remembers a backend by number and incarnation knows that it has
    /// gone.
    pub incarnation: u32,
    /// Its port, host byte order.
    pub port: u16,
    /// See [`backend_flags`].
    pub flags: u16,
    /// IP protocol number.
    pub proto: u32,
}
assert_layout!(Backend, 32);

/// Bits of [`Backend::flags`].
pub mod backend_flags {
    /// On this node.
    pub const LOCAL: u16 = 1 << 0;
    /// About to end, serving because nothing else does.
    pub const TERMINATING: u16 = 1 << 1;
    /// In the cluster-wide set; the bit above it stands for the set of this node. A client keeps a backend for as long
    /// as it is in the set that the client's packets go to.
    pub const IN_CLUSTER: u16 = 1 << 2;
}

/// A client of a service with session affinity, or a socket that sends datagrams without being connected.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct AffinityKey {
    /// The client's address, or a number that stands for it: see [`client`].
    pub client: Addr,
    /// The service.
    pub service: u32,
}
assert_layout!(AffinityKey, 20);

/// Clients that are known by a number of 64 bits instead of an address, made unlike any address on the wire: the
/// third word tells them apart, and the first two of a v4-mapped or an IPv6 address never come with it.
pub mod client {
    use crate::Addr;

    /// A network namespace by its cookie: a pod, at the socket hooks.
    #[inline(always)]
    pub const fn namespace(cookie: u64) -> Addr {
        Addr { words: [0, 0x5057_6e73, cookie as u32, (cookie >> 32) as u32] }
    }

    /// A socket by its cookie.
    #[inline(always)]
    pub const fn socket(cookie: u64) -> Addr {
        Addr { words: [0, 0x5057_736b, cookie as u32, (cookie >> 32) as u32] }
    }
}

/// The backend that a client had.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Affinity {
    /// When it was last used, nanoseconds of `CLOCK_MONOTONIC`.
    pub last_seen_ns: u64,
    /// Number of the backend.
    pub backend: u32,
    /// Its incarnation.
    pub incarnation: u32,
}
assert_layout!(Affinity, 16);

/// A source range of a service, in a table of prefixes: 32 bits of service, then the prefix.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SourceRange {
    /// The service.
    pub service: u32,
    /// The range's address.
    pub addr: Addr,
}
assert_layout!(SourceRange, 20);

/// A socket and the backend that it talks to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct SocketKey {
    /// The socket's cookie.
    pub cookie: u64,
    /// The backend's address.
    pub addr: Addr,
    /// The backend's port, host byte order.
    pub port: u16,
    /// Always 0.
    pub pad: [u8; 6],
}
assert_layout!(SocketKey, 32);

/// What the socket asked for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SocketPeer {
    /// The address that it asked for.
    pub addr: Addr,
    /// Number of the backend that it got.
    pub backend: u32,
    /// Its incarnation then.
    pub incarnation: u32,
    /// The port that it asked for, host byte order.
    pub port: u16,
    /// Always 0.
    pub pad: [u8; 2],
}
assert_layout!(SocketPeer, 28);

/// What is counted for each service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ServiceCounter {
    /// Connections and, for datagrams, exchanges that were given a backend.
    pub connections: u64,
    /// Those that were refused or dropped because there was none.
    pub refused: u64,
    /// Packets that were translated towards a backend one by one.
    pub packets: u64,
    /// Their bytes from the network layer up.
    pub bytes: u64,
}
assert_layout!(ServiceCounter, 32);

/// Into what the packets of one direction of a flow are translated, found by the flow's key before it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Translation {
    /// When it was made, nanoseconds of `CLOCK_MONOTONIC`.
    pub created_ns: u64,
    /// Source address afterwards.
    pub src: Addr,
    /// Destination address afterwards.
    pub dst: Addr,
    /// Source port afterwards, host byte order.
    pub src_port: u16,
    /// Destination port afterwards, host byte order.
    pub dst_port: u16,
    /// See [`translation_flags`].
    pub flags: u32,
    /// Number of the backend.
    pub backend: u32,
    /// Its incarnation when it was chosen.
    pub incarnation: u32,
}
assert_layout!(Translation, 56);

/// Bits of [`Translation::flags`].
pub mod translation_flags {
    /// It is for packets from end `b` of the key (else from `a`).
    pub const FROM_B: u32 = 1 << 0;
    /// Towards the backend (else back).
    pub const FORWARD: u32 = 1 << 1;
}

/// A translation with the key that it is found by.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct KeyedTranslation {
    /// The flow before the translation.
    pub key: CtKey,
    /// The translation.
    pub value: Translation,
}
assert_layout!(KeyedTranslation, 96);

impl KeyedTranslation {
    /// None.
    pub const NONE: Self = Self {
        key: CtKey {
            a: Addr::UNSPECIFIED,
            b: Addr::UNSPECIFIED,
            a_port: 0,
            b_port: 0,
            proto: 0,
            pad: [0; 3],
        },
        value: Translation {
            created_ns: 0,
            src: Addr::UNSPECIFIED,
            dst: Addr::UNSPECIFIED,
            src_port: 0,
            dst_port: 0,
            flags: 0,
            backend: 0,
            incarnation: 0,
        },
    };
}

/// Source ports of masqueraded flows begin here: below the kernel's own ephemeral ports and the usual node ports.
pub const MASQUERADE_FIRST_PORT: u16 = 10_240;
/// How many there are, a power of two.
pub const MASQUERADE_PORTS: u32 = 16_384;

/// A fragmented datagram (RFC 791 section 3.2, RFC 8200 section 4.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification, as it lies in the packet.
    pub id: u32,
    /// IP protocol number.
    pub proto: u32,
}
assert_layout!(FragmentKey, 40);

impl FragmentKey {
    /// None.
    pub const NONE: Self = Self { src: Addr::UNSPECIFIED, dst: Addr::UNSPECIFIED, id: 0, proto: 0 };
}

/// The ports of a fragmented datagram, which only its first fragment carries.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FragmentPorts {
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
}
assert_layout!(FragmentPorts, 4);

/// A range of addresses as address and mask.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Range {
    /// First address.
    pub addr: Addr,
    /// Bits that count.
    pub mask: Addr,
}
assert_layout!(Range, 32);

/// What the service programs need to know about the node.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ServiceConfig {
    /// Cookie of the node's network namespace: sockets in it are the node's own.
    pub node_netns: u64,
    /// The address that replaces a masqueraded IPv4 source, or [`Addr::UNSPECIFIED`].
    pub masquerade_v4: Addr,
    /// The address that replaces a masqueraded IPv6 source, or [`Addr::UNSPECIFIED`].
    pub masquerade_v6: Addr,
    /// Ranges of cluster IPs; what no service has in there is dropped. Unused ones have a mask of 0 and the address
    /// [`Addr::UNSPECIFIED`].
    pub ranges: [Range; MAX_SERVICE_RANGES],
    /// How many of them count.
    pub range_count: u32,
    /// Always 0.
    pub pad: u32,
}
assert_layout!(ServiceConfig, 176);

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya reads and writes map bytes as these types")]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($t:ty),*) => { $(
            // SAFETY: `repr(C)`, made of integers only, without padding (`assert_layout!`): every bit pattern is
            // a value and every byte is initialised. Needed because only this crate may implement it here.
            unsafe impl aya::Pod for $t {}
        )* };
    }
    pod!(
        FrontendKey,
        Frontend,
        SetWord,
        SlotPair,
        Backend,
        AffinityKey,
        Affinity,
        SourceRange,
        SocketKey,
        SocketPeer,
        ServiceCounter,
        ServiceConfig,
        Translation,
        FragmentKey,
        FragmentPorts
    );
}

#[cfg(test)]
mod tests {
    extern crate std;
    use core::net::{IpAddr, Ipv6Addr};

    use super::*;

    #[test]
    fn words_hold_what_they_are_made_of() {
        let word = SetWord::new(0xffff_fffe, 7);
        assert_eq!((word.base(), word.count()), (0xffff_fffe, 7));
        let pair = SlotPair(0x0000_0002_0000_0001);
        assert_eq!((pair.of(4), pair.of(5)), (1, 2));
    }

    #[test]
    fn routes_of_the_three_origins_do_not_overlap() {
        let frontend =
            Frontend { flags: 0b011_110_001 | frontend_flags::SOURCE_RANGES, ..Frontend::default() };
        assert_eq!(frontend.route(Origin::Pod), route::LOCAL);
        assert_eq!(frontend.route(Origin::Node), route::REJECT | route::MASQUERADE);
        assert_eq!(frontend.route(Origin::External), route::DROP);
    }

    #[test]
    fn a_client_by_number_is_no_address_on_the_wire() {
        for client in [client::namespace(u64::MAX), client::socket(0xffff)] {
            assert!(!client.is_v4());
            // 0000:0000/32 is reserved (RFC 4291 section 2.5.2 and 2.5.5): nobody sends from there.
            let IpAddr::V6(v6) = IpAddr::from(client) else { panic!("{client}") };
            assert_eq!(v6.segments()[..2], Ipv6Addr::UNSPECIFIED.segments()[..2]);
        }
    }
}
