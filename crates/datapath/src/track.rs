//! Connection tracking: one entry per flow, found from both directions by one key.

use podway_abi::{Addr, CtEntry, CtKey, Direction, ct_flags};

use crate::{
    Env, Packet, Scratch, Tables,
    packet::{flags, proto, tcp},
};

/// Idle limits in seconds. TCP after RFC 5382 (an established connection at least 2 h 4 min), UDP after
/// RFC 4787 REQ-5 (at least 2 min once answered).
pub mod idle {
    /// TCP with both directions seen.
    pub const TCP_ESTABLISHED: u32 = 7_500;
    /// TCP that has not been answered.
    pub const TCP_OPENING: u32 = 60;
    /// TCP after RST or FIN of both sides.
    pub const TCP_CLOSED: u32 = 10;
    /// TCP after FIN of one side.
    pub const TCP_HALF_CLOSED: u32 = 300;
    /// Other protocols that were answered.
    pub const ANSWERED: u32 = 180;
    /// Other protocols that were not.
    pub const UNANSWERED: u32 = 30;
}

/// One packet, as its flow sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub now_ns: u64,
    /// Bytes from the network layer up.
    pub bytes: u64,
    /// Whether the packet comes from end `b` of the key.
    pub from_b: bool,
    /// TCP flags; 0 for other protocols.
    pub tcp_flags: u8,
    /// Whether the protocol is TCP.
    pub is_tcp: bool,
}

/// Key of the packet's flow and whether the packet comes from its end `b`.
#[inline(always)]
pub fn key(packet: &Packet, out: &mut CtKey) -> bool {
    let from_b = after(&packet.src, packet.src_port, &packet.dst, packet.dst_port);
    if from_b {
        out.a = packet.dst;
        out.b = packet.src;
        out.a_port = packet.dst_port;
        out.b_port = packet.src_port;
    } else {
        out.a = packet.src;
        out.b = packet.dst;
        out.a_port = packet.src_port;
        out.b_port = packet.dst_port;
    }
    out.proto = packet.proto;
    out.pad = [0; 3];
    from_b
}

/// Whether end `x` comes after end `y` in the order of [`CtKey`].
#[inline(always)]
fn after(x: &Addr, x_port: u16, y: &Addr, y_port: u16) -> bool {
    let [x0, x1, x2, x3] = x.words;
    let [y0, y1, y2, y3] = y.words;
    if x0 != y0 {
        return x0 > y0;
    }
    if x1 != y1 {
        return x1 > y1;
    }
    if x2 != y2 {
        return x2 > y2;
    }
    if x3 != y3 {
        return x3 > y3;
    }
    x_port > y_port
}

/// The entry that a flow's first packet makes.
#[inline(always)]
pub fn open(observation: &Observation, out: &mut CtEntry) {
    out.created_ns = observation.now_ns;
    out.last_seen_ns = observation.now_ns;
    out.packets = [1, 0];
    out.bytes = [observation.bytes, 0];
    let mut bits = 0;
    if observation.from_b {
        bits |= ct_flags::OPENED_BY_B;
    }
    if observation.is_tcp {
        if observation.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN {
            bits |= ct_flags::SYN;
        }
        bits |= tcp_ends(observation.tcp_flags, Direction::Original);
    }
    out.flags = bits;
    out.idle_limit_s = idle_limit(bits, observation.is_tcp);
}

/// Applies one packet to its flow. A new SYN on a closed or idle flow opens it again.
#[inline(always)]
pub fn observe(entry: &mut CtEntry, observation: &Observation) {
    let is_syn = observation.is_tcp && observation.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    if is_over(entry, observation.now_ns) || (is_syn && is_closed(entry.flags)) {
        open(observation, entry);
        return;
    }
    let opened_by_b = entry.flags & ct_flags::OPENED_BY_B != 0;
    let direction = if opened_by_b == observation.from_b { Direction::Original } else { Direction::Reply };
    match direction {
        Direction::Original => {
            entry.packets[0] = entry.packets[0].wrapping_add(1);
            entry.bytes[0] = entry.bytes[0].wrapping_add(observation.bytes);
        }
        Direction::Reply => {
            entry.packets[1] = entry.packets[1].wrapping_add(1);
            entry.bytes[1] = entry.bytes[1].wrapping_add(observation.bytes);
            entry.flags |= ct_flags::REPLIED;
        }
    }
    if observation.is_tcp {
        entry.flags |= tcp_ends(observation.tcp_flags, direction);
    }
    entry.idle_limit_s = idle_limit(entry.flags, observation.is_tcp);
    entry.last_seen_ns = observation.now_ns;
}

/// Whether the flow's idle limit has passed.
#[inline(always)]
pub fn is_over(entry: &CtEntry, now_ns: u64) -> bool {
    now_ns.saturating_sub(entry.last_seen_ns) > entry.idle_limit_s as u64 * 1_000_000_000
}

/// Whether a TCP flow has ended in both directions.
#[inline(always)]
pub const fn is_closed(bits: u32) -> bool {
    let both = ct_flags::FIN_ORIGINAL | ct_flags::FIN_REPLY;
    bits & ct_flags::RST != 0 || bits & both == both
}

#[inline(always)]
const fn tcp_ends(tcp_flags: u8, direction: Direction) -> u32 {
    let mut bits = 0;
    if tcp_flags & tcp::RST != 0 {
        bits |= ct_flags::RST;
    }
    if tcp_flags & tcp::FIN != 0 {
        bits |= match direction {
            Direction::Original => ct_flags::FIN_ORIGINAL,
            Direction::Reply => ct_flags::FIN_REPLY,
        };
    }
    bits
}

#[inline(always)]
const fn idle_limit(bits: u32, is_tcp: bool) -> u32 {
    let replied = bits & ct_flags::REPLIED != 0;
    if !is_tcp {
        return if replied { idle::ANSWERED } else { idle::UNANSWERED };
    }
    if is_closed(bits) {
        idle::TCP_CLOSED
    } else if bits & (ct_flags::FIN_ORIGINAL | ct_flags::FIN_REPLY) != 0 {
        idle::TCP_HALF_CLOSED
    } else if replied {
        idle::TCP_ESTABLISHED
    } else {
        idle::TCP_OPENING
    }
}

/// Records the packet with its flow, or prepares a new flow in `scratch`.
///
/// Later fragments and ICMP errors have no ports of their own and are not recorded.
#[inline(never)]
pub fn track(tables: &impl Tables, env: &impl Env, scratch: &mut Scratch) {
    if !scratch.packet.has(flags::PORTS) {
        return;
    }
    let from_b = key(&scratch.packet, &mut scratch.ct_key);
    let observation = Observation {
        now_ns: env.now_ns(),
        bytes: scratch.packet.l3_len as u64,
        from_b,
        tcp_flags: scratch.packet.tcp_flags,
        is_tcp: scratch.packet.proto == proto::TCP,
    };
    if tables.observe(&scratch.ct_key, &observation).is_none() {
        open(&observation, &mut scratch.ct_entry);
        scratch.new_flow = true;
    }
}
