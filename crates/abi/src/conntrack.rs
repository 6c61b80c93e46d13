//! The connection table's key and value.

use crate::{Addr, Endpoint, Mac, assert_layout};

/// A flow, the same key for both directions: of the two ends, `a` is the one with the smaller
/// (address, port), compared as the words lie in memory.
///
/// One key for both directions makes a reply find its flow with the one look-up that a first packet needs.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct CtKey {
    /// The smaller end's address.
    pub a: Addr,
    /// The larger end's address.
    pub b: Addr,
    /// The smaller end's port, host byte order; the identifier of an ICMP echo.
    pub a_port: u16,
    /// The larger end's port, host byte order; the identifier of an ICMP echo.
    pub b_port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Always 0; fills the key to whole words.
    pub pad: [u8; 3],
}
assert_layout!(CtKey, 40);

/// Which way a packet goes relative to its flow's first packet.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// As the packet that opened the flow.
    Original = 0,
    /// Against it.
    Reply = 1,
}

/// State of one flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CtEntry {
    /// When the first packet was seen, nanoseconds of `CLOCK_MONOTONIC`.
    pub created_ns: u64,
    /// When the last packet was seen, nanoseconds of `CLOCK_MONOTONIC`.
    pub last_seen_ns: u64,
    /// Packets per [`Direction`].
    pub packets: [u64; 2],
    /// Bytes of the network layer and above per [`Direction`].
    pub bytes: [u64; 2],
    /// See [`ct_flags`].
    pub flags: u32,
    /// Seconds without a packet after which the flow is over.
    pub idle_limit_s: u32,
    /// Where packets from end `a` of the key go.
    pub from_a: CtRoute,
    /// Where packets from end `b` of the key go.
    pub from_b: CtRoute,
}
assert_layout!(CtEntry, 168);

impl CtEntry {
    /// No flow.
    pub const NONE: Self = Self {
        created_ns: 0,
        last_seen_ns: 0,
        packets: [0; 2],
        bytes: [0; 2],
        flags: 0,
        idle_limit_s: 0,
        from_a: CtRoute::NONE,
        from_b: CtRoute::NONE,
    };
}

/// Where the packets of one direction of a flow go, and what was checked about them: what the look-ups for one
/// packet found, so that the packets behind it need none.
///
/// It holds for packets that come in the same way, for as long as the tables are those of [`CtRoute::generation`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CtRoute {
    /// Generation of the tables that it was found in; 0 when nothing was found yet.
    pub generation: u32,
    /// Interface that the packets come in on.
    pub ingress: u32,
    /// Out of the tunnel: the node that the packets come from. With [`way::TUNNEL`]: the node that they go to.
    pub node: Addr,
    /// With [`way::POD`]: the pod that they go to.
    pub target: Endpoint,
    /// From a pod: the link-layer address that the packets carry.
    pub from_mac: Mac,
    /// Number of the [`crate::Hook`] that they come to.
    pub hook: u8,
    /// See [`way`].
    pub way: u8,
}
assert_layout!(CtRoute, 56);

impl CtRoute {
    /// Nothing found.
    pub const NONE: Self = Self {
        generation: 0,
        ingress: 0,
        node: Addr::UNSPECIFIED,
        target: Endpoint::NONE,
        from_mac: [0; 6],
        hook: 0,
        way: way::NONE,
    };
}

/// Values of [`CtRoute::way`].
pub mod way {
    /// Nowhere yet.
    pub const NONE: u8 = 0;
    /// Into a pod of this node.
    pub const POD: u8 = 1;
    /// Through the tunnel.
    pub const TUNNEL: u8 = 2;
    /// On the underlay device, by the node's routes.
    pub const UPLINK: u8 = 3;
    /// To the node's stack.
    pub const STACK: u8 = 4;
    /// Bit beside the others: the packets are answers of a translated flow, and are translated back.
    pub const BACK: u8 = 0x80;
}

/// Bits of [`CtEntry::flags`].
pub mod ct_flags {
    /// The flow's first packet came from end `b` of the key (else from `a`).
    pub const OPENED_BY_B: u32 = 1 << 0;
    /// A packet in the reply direction was seen.
    pub const REPLIED: u32 = 1 << 1;
    /// TCP: the flow was seen from its SYN (else it was picked up in mid-stream).
    pub const SYN: u32 = 1 << 2;
    /// TCP: the side that opened the flow sent FIN.
    pub const FIN_ORIGINAL: u32 = 1 << 3;
    /// TCP: the other side sent FIN.
    pub const FIN_REPLY: u32 = 1 << 4;
    /// TCP: a RST was seen.
    pub const RST: u32 = 1 << 5;
    /// User space was told that the flow has ended.
    pub const END_TOLD: u32 = 1 << 6;
}
