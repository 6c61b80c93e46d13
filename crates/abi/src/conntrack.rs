//! The connection table's key and value.

use crate::{Addr, assert_layout};

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
}
assert_layout!(CtEntry, 56);

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
}
