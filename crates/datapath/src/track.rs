//! Connection tracking: one entry per flow, found from both directions by one key; and where the flow's packets go,
//! so that an established flow costs one look-up.

use core::sync::atomic::{Ordering, compiler_fence};

use podway_abi::{Addr, CtEntry, CtKey, CtRoute, Direction, Hook, ct_flags, way};

use crate::{
    Env, Packet, Scratch, Tables,
    packet::{flags, proto, tcp},
    same_addr, same_mac,
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

/// What the table says of a packet's flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Its route holds for the packet, which has been recorded.
    Route,
    /// The flow is known, and the packet's way has to be looked up.
    Flow,
    /// Nothing.
    Nothing,
}

/// What became of a packet of a flow whose route had to be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// It was recorded with its flow.
    Known,
    /// It opened the flow again, which was over.
    Anew,
    /// There is no such flow.
    Nothing,
}

/// The entry that a flow's first packet makes.
#[inline(always)]
pub fn open(observation: &Observation, route: &CtRoute, out: &mut CtEntry) {
    out.created_ns = observation.now_ns;
    out.last_seen_ns = observation.now_ns;
    out.packets = [1, 0];
    out.bytes = [observation.bytes, 0];
    let mut bits = 0;
    if observation.from_b {
        bits |= ct_flags::OPENED_BY_B;
    }
    if observation.is_tcp {
        if is_syn(observation) {
            bits |= ct_flags::SYN;
        }
        bits |= tcp_ends(observation.tcp_flags, Direction::Original);
    }
    out.flags = bits;
    out.idle_limit_s = idle_limit(bits, observation.is_tcp);
    // What the flow before this one had found in the other direction is not this one's.
    out.from_a.generation = 0;
    out.from_b.generation = 0;
    learn(out, observation, route);
}

/// Applies one packet to its flow, with the route that was looked up for it. A new SYN on a closed or idle flow opens
/// it again; says whether it did.
#[inline(always)]
pub fn observe(entry: &mut CtEntry, observation: &Observation, route: &CtRoute) -> Observed {
    if starts_over(entry, observation) {
        open(observation, route, entry);
        Observed::Anew
    } else {
        record(entry, observation);
        learn(entry, observation, route);
        Observed::Known
    }
}

/// Applies one packet to its flow if the flow's route holds for a packet that came in as `route` says, and completes
/// `route` with where it goes. Otherwise changes nothing: who sent the packet is not known then.
#[inline(always)]
pub fn follow(entry: &mut CtEntry, observation: &Observation, route: &mut CtRoute) -> bool {
    let known = if observation.from_b { &entry.from_b } else { &entry.from_a };
    if !holds(known, route) || starts_over(entry, observation) {
        return false;
    }
    let way = known.way;
    match way & !way::BACK {
        way::POD => route.target = known.target,
        way::TUNNEL => route.node = known.node,
        _ => {}
    }
    // Another CPU may have written it meanwhile: see `learn`.
    compiler_fence(Ordering::SeqCst);
    if known.generation != route.generation {
        return false;
    }
    route.way = way;
    record(entry, observation);
    true
}

/// Whether a route that was found earlier is still right, and for a packet that came in like this one.
#[inline(always)]
fn holds(known: &CtRoute, arrival: &CtRoute) -> bool {
    // No table is older than generation 1, so that an empty route never holds.
    if known.generation != arrival.generation || known.generation == 0 {
        return false;
    }
    if known.hook != arrival.hook || known.ingress != arrival.ingress {
        return false;
    }
    if arrival.hook == Hook::FromPod as u8 {
        return same_mac(&known.from_mac, &arrival.from_mac);
    }
    arrival.hook != Hook::FromTunnel as u8 || same_addr(&known.node, &arrival.node)
}

/// Keeps the route that was looked up for a packet. A packet whose way was not looked up has none.
///
/// Another CPU may be following the entry: it must not take half of one route and half of another for a route. So the
/// entry has none while it is written, and who reads it looks at the generation before and after.
#[inline(always)]
fn learn(entry: &mut CtEntry, observation: &Observation, route: &CtRoute) {
    if route.way == way::NONE {
        return;
    }
    let known = if observation.from_b { &mut entry.from_b } else { &mut entry.from_a };
    known.generation = 0;
    compiler_fence(Ordering::SeqCst);
    known.ingress = route.ingress;
    known.node = route.node;
    known.target = route.target;
    known.from_mac = route.from_mac;
    known.hook = route.hook;
    known.way = route.way;
    compiler_fence(Ordering::SeqCst);
    known.generation = route.generation;
}

/// Whether the packet is the first of another flow with the same ends.
#[inline(always)]
pub fn starts_over(entry: &CtEntry, observation: &Observation) -> bool {
    is_over(entry, observation.now_ns) || (is_syn(observation) && is_closed(entry.flags))
}

#[inline(always)]
fn is_syn(observation: &Observation) -> bool {
    observation.is_tcp && observation.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN
}

/// Counts a packet, and writes what it changes beyond that: for most packets nothing.
#[inline(always)]
fn record(entry: &mut CtEntry, observation: &Observation) {
    let opened_by_b = entry.flags & ct_flags::OPENED_BY_B != 0;
    let mut bits = entry.flags;
    let direction = if opened_by_b == observation.from_b {
        entry.packets[0] = entry.packets[0].wrapping_add(1);
        entry.bytes[0] = entry.bytes[0].wrapping_add(observation.bytes);
        Direction::Original
    } else {
        entry.packets[1] = entry.packets[1].wrapping_add(1);
        entry.bytes[1] = entry.bytes[1].wrapping_add(observation.bytes);
        bits |= ct_flags::REPLIED;
        Direction::Reply
    };
    if observation.is_tcp {
        bits |= tcp_ends(observation.tcp_flags, direction);
    }
    if bits != entry.flags {
        entry.flags = bits;
        entry.idle_limit_s = idle_limit(bits, observation.is_tcp);
    }
    if entry.last_seen_ns != observation.now_ns {
        entry.last_seen_ns = observation.now_ns;
    }
}

/// Whether the flow's idle limit has passed.
#[inline(always)]
pub fn is_over(entry: &CtEntry, now_ns: u64) -> bool {
    now_ns.saturating_sub(entry.last_seen_ns) > entry.idle_limit_s as u64 * 1_000_000_000
}

/// Whether the packet may be the one that ends its flow.
#[inline(always)]
pub const fn may_end(packet: &Packet) -> bool {
    packet.l3_len != 0 && packet.tcp_flags & (tcp::FIN | tcp::RST) != 0 && packet.has(flags::PORTS)
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

/// Begins the packet's way: how it came in, which its route has to fit, and its flow's key.
///
/// The generation is read before any table is: what is then found is at least as new as it says.
#[inline(always)]
pub fn arrive(tables: &impl Tables, env: &impl Env, scratch: &mut Scratch) -> Observation {
    scratch.route.generation = tables.generation();
    scratch.route.ingress = env.ifindex();
    scratch.route.hook = env.hook() as u8;
    scratch.route.way = way::NONE;
    scratch.route.from_mac = scratch.packet.src_mac;
    let from_b = key(&scratch.packet, &mut scratch.ct_key);
    Observation {
        now_ns: env.now_ns(),
        bytes: scratch.packet.l3_len as u64,
        from_b,
        tcp_flags: scratch.packet.tcp_flags,
        is_tcp: scratch.packet.proto == proto::TCP,
    }
}

/// Looks the packet's flow up. Later fragments and ICMP errors have no ports of their own, and so no flow.
#[inline(always)]
pub fn find(tables: &impl Tables, observation: &Observation, scratch: &mut Scratch) -> Found {
    if !scratch.packet.has(flags::PORTS) {
        return Found::Nothing;
    }
    tables.follow(&scratch.ct_key, observation, &mut scratch.route)
}

/// Records the packet, and the route that was looked up for it, with its flow; or prepares a new flow in `scratch`.
#[inline(always)]
pub fn track(tables: &impl Tables, observation: &Observation, found: Found, scratch: &mut Scratch) {
    if !scratch.packet.has(flags::PORTS) {
        return;
    }
    // Between the two look-ups the table may have lost the flow.
    if found == Found::Flow {
        let observed = tables.observe(&scratch.ct_key, observation, &scratch.route);
        if observed != Observed::Nothing {
            scratch.reopened = observed == Observed::Anew;
            return;
        }
    }
    open(observation, &scratch.route, &mut scratch.ct_entry);
    scratch.new_flow = true;
}
