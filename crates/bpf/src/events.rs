//! Tells user space of flows that begin and end and of packets that are dropped, through one ring buffer.
//!
//! Nothing here runs for the packets of a flow that is under way. What runs is bounded: each kind of event, and each
//! reason for a drop, has a limit for each CPU and window, and a flow whose drop was told of is told of again after a
//! second at the earliest. What is not told is counted. A reader that is not there, or is slow, costs nobody but
//! itself: a full ring buffer refuses at once.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::{bpf_get_socket_cookie, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::map,
    maps::{Array, PerCpuArray, RingBuf},
};
use podway_abi::{
    Addr, CtEntry, CtKey, CtRoute, Hook, Reason, ct_flags,
    events::{
        EVENT_BUCKETS, EVENT_MEMORY, EVENT_REPEAT_NS, EVENT_RING_BYTES, EVENT_WAKE_BYTES, EVENT_WINDOW_SHIFT,
        Event, EventBucket, EventConfig, EventKind, Remembered, bucket, event_flags,
    },
    services::SocketKey,
    way,
};
use podway_datapath::{Scratch, track};

use crate::{maps, service_maps};

#[map]
static EVENTS: RingBuf = RingBuf::pinned(EVENT_RING_BYTES, 0);

#[map]
static EVENT_CONFIG: Array<EventConfig> = Array::pinned(1, 0);

#[map]
static EVENT_COUNTS: PerCpuArray<EventBucket> = PerCpuArray::pinned(EVENT_BUCKETS, 0);

#[map]
static EVENT_TOLD: PerCpuArray<Remembered> = PerCpuArray::with_max_entries(EVENT_MEMORY, 0);

/// Room beyond the mark at which the reader is woken: once it is passed, the reader is on its way.
const WAKE_ROOM: u64 = 16 * size_of::<Event>() as u64;

/// Bit beside the numbers of hook and reason.
const DROPPED: u32 = 1 << 16;

/// What became of a packet, as one word.
#[inline(always)]
pub const fn what(hook: Hook, reason: Reason, dropped: bool) -> u32 {
    hook as u32 | (reason as u32) << 8 | if dropped { DROPPED } else { 0 }
}

/// Tells of a packet that opened a flow, or that is dropped or refused.
#[inline(never)]
pub fn tell(skb: *mut __sk_buff, scratch: &Scratch, what: u32) {
    // SAFETY: the context of a running program is valid.
    let ifindex = unsafe { (*skb).ifindex };
    let cookie = match what as u8 {
        // SAFETY: as above.
        hook if hook == Hook::FromPod as u8 => unsafe { bpf_get_socket_cookie(skb.cast()) },
        // The sender is not on this side of the link any more.
        _ => 0,
    };
    packet(scratch, what, ifindex, cookie);
}

/// `cookie` is that of the sender's socket, or 0: by it is found out which service the sender asked for.
#[inline(always)]
fn packet(scratch: &Scratch, what: u32, ifindex: u32, cookie: u64) {
    let (hook, reason, is_drop) = (what as u8, (what >> 8) as u8, what & DROPPED != 0);
    let Some(config) = EVENT_CONFIG.get(0) else { return };
    let (limit, number) = if is_drop {
        (config.drops_per_window, reason as u32)
    } else {
        (config.flows_per_window, bucket::START)
    };
    let Some(counts) = counts(number) else { return };
    if limit == 0 {
        return;
    }
    let packet = &scratch.packet;
    // SAFETY: no preconditions.
    let tick = unsafe { bpf_ktime_get_coarse_ns() };
    let (mut packets, mut bytes) = (1, packet.l3_len as u64);
    let mut told = None;
    if is_drop {
        let hash = hash(scratch, what, ifindex);
        let Some(slot) = EVENT_TOLD.get_ptr_mut(hash as u32 & (EVENT_MEMORY - 1)) else { return };
        // SAFETY: a slot of this CPU, and programs of these hooks do not nest. Needed to change it in place.
        let slot = unsafe { &mut *slot };
        if slot.hash == hash {
            if tick.wrapping_sub(slot.told_ns) < EVENT_REPEAT_NS {
                slot.packets = slot.packets.wrapping_add(1);
                slot.bytes = slot.bytes.wrapping_add(bytes);
                counts.limited = counts.limited.wrapping_add(1);
                return;
            }
            packets += slot.packets;
            bytes += slot.bytes;
        }
        told = Some((slot, hash));
    }
    if !admits(counts, tick, limit) {
        return;
    }
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        counts.lost = counts.lost.wrapping_add(1);
        return;
    };
    counts.told = counts.told.wrapping_add(1);
    if let Some((slot, hash)) = told {
        *slot = Remembered { hash, told_ns: tick, packets: 0, bytes: 0 };
    }
    let event = entry.as_mut_ptr();
    // SAFETY: memory of the ring buffer that is this program's alone until it is submitted; only written, every field
    // of it. Needed because the stack has no room for an event.
    unsafe {
        (*event).time_ns = bpf_ktime_get_ns();
        (*event).created_ns = tick;
        (*event).packets = [packets, 0];
        (*event).bytes = [bytes, 0];
        (*event).node = scratch.route.node;
        (*event).ifindex = ifindex;
        (*event).src_mac = packet.src_mac;
        (*event).proto = packet.proto;
        (*event).kind = if is_drop { EventKind::Drop } else { EventKind::Start } as u8;
        (*event).hook = hook;
        (*event).reason = reason;
        (*event).tcp_flags = packet.tcp_flags;
        (*event).pad = [0; 8];
        let flags = ends(event, scratch, cookie);
        (*event).flags = if is_parsed(scratch, reason) { flags | event_flags::PARSED } else { 0 };
    }
    entry.submit(wake());
}

/// Whether what [`Scratch::packet`] says is this packet's.
#[inline(always)]
fn is_parsed(scratch: &Scratch, reason: u8) -> bool {
    scratch.packet.l3_len != 0
        && reason != Reason::Malformed as u8
        && reason != Reason::MappedAddress as u8
        && reason != Reason::UnsupportedProtocol as u8
}

/// Writes who talks to whom, and says by flags how that came about.
///
/// # Safety
/// `event` can be written.
#[inline(always)]
unsafe fn ends(event: *mut Event, scratch: &Scratch, cookie: u64) -> u8 {
    let (packet, was) = (&scratch.packet, &scratch.was);
    let mut flags = 0;
    // SAFETY: the caller's promise.
    unsafe {
        (*event).src = packet.src;
        (*event).dst = packet.dst;
        (*event).src_port = packet.src_port;
        (*event).dst_port = packet.dst_port;
        (*event).asked = Addr::UNSPECIFIED;
        (*event).client = Addr::UNSPECIFIED;
        (*event).asked_port = 0;
        (*event).client_port = 0;
        if scratch.rewrite && !scratch.rewrite_inner && scratch.route.way & way::BACK == 0 {
            (*event).asked = was.dst;
            (*event).asked_port = was.dst_port;
            flags |= event_flags::SERVICE;
            if differ(&was.src, &packet.src) {
                (*event).client = was.src;
                (*event).client_port = was.src_port;
                flags |= event_flags::MASQUERADED;
            }
        } else if cookie != 0 {
            let key = SocketKey { cookie, addr: packet.dst, port: packet.dst_port, pad: [0; 6] };
            if let Some(peer) = service_maps::socket_peer(&key) {
                (*event).asked = peer.addr;
                (*event).asked_port = peer.port;
                flags |= event_flags::SERVICE;
            }
        }
    }
    flags
}

/// The packet may have been the one that ended its flow. Looked up once more, so that no other packet bears the cost of
/// the question.
#[inline(never)]
pub fn closing(scratch: &Scratch) {
    if let Some(entry) = maps::flow(&scratch.ct_key)
        && track::is_closed(entry.flags)
    {
        ended(&scratch.ct_key, entry, &scratch.route, scratch.packet.tcp_flags);
    }
}

/// The flow is over. `END_TOLD` is set when that was told; if not, the sweep of the table tells it.
#[inline(never)]
pub fn ended(key: &CtKey, entry: &mut CtEntry, route: &CtRoute, tcp_flags: u8) {
    if entry.flags & ct_flags::END_TOLD != 0 {
        return;
    }
    let Some(config) = EVENT_CONFIG.get(0) else { return };
    let Some(counts) = counts(bucket::END) else { return };
    // SAFETY: no preconditions.
    let tick = unsafe { bpf_ktime_get_coarse_ns() };
    if config.flows_per_window == 0 || !admits(counts, tick, config.flows_per_window) {
        return;
    }
    let Some(mut room) = EVENTS.reserve::<Event>(0) else {
        counts.lost = counts.lost.wrapping_add(1);
        return;
    };
    counts.told = counts.told.wrapping_add(1);
    entry.flags |= ct_flags::END_TOLD;
    let event = room.as_mut_ptr();
    let by_b = entry.flags & ct_flags::OPENED_BY_B != 0;
    let mut flags = event_flags::PARSED;
    if entry.flags & ct_flags::REPLIED != 0 {
        flags |= event_flags::REPLIED;
    }
    if entry.flags & ct_flags::RST != 0 {
        flags |= event_flags::RESET;
    }
    if !track::is_closed(entry.flags) {
        flags |= event_flags::EXPIRED;
    }
    // SAFETY: as in `packet`.
    unsafe {
        (*event).time_ns = bpf_ktime_get_ns();
        (*event).created_ns = entry.created_ns;
        (*event).packets = entry.packets;
        (*event).bytes = entry.bytes;
        (*event).src = if by_b { key.b } else { key.a };
        (*event).dst = if by_b { key.a } else { key.b };
        (*event).src_port = if by_b { key.b_port } else { key.a_port };
        (*event).dst_port = if by_b { key.a_port } else { key.b_port };
        (*event).asked = Addr::UNSPECIFIED;
        (*event).client = Addr::UNSPECIFIED;
        (*event).node = Addr::UNSPECIFIED;
        (*event).asked_port = 0;
        (*event).client_port = 0;
        (*event).ifindex = route.ingress;
        (*event).src_mac = [0; 6];
        (*event).proto = key.proto;
        (*event).kind = EventKind::End as u8;
        (*event).hook = route.hook;
        (*event).reason = 0;
        (*event).tcp_flags = tcp_flags;
        (*event).flags = flags;
        (*event).pad = [0; 8];
    }
    room.submit(wake());
}

#[inline(always)]
fn counts(number: u32) -> Option<&'static mut EventBucket> {
    let slot = EVENT_COUNTS.get_ptr_mut(number)?;
    // SAFETY: a slot of this CPU, see `packet`. Needed to change it in place.
    Some(unsafe { &mut *slot })
}

/// Whether one more event fits into this window.
#[inline(always)]
fn admits(counts: &mut EventBucket, now: u64, limit: u32) -> bool {
    let window = now >> EVENT_WINDOW_SHIFT;
    if counts.window != window {
        counts.window = window;
        counts.in_window = 0;
    }
    if counts.in_window >= limit as u64 {
        counts.limited = counts.limited.wrapping_add(1);
        return false;
    }
    counts.in_window += 1;
    true
}

/// The reader looks of its own accord, many times a second, and is woken only when the buffer fills faster than that:
/// a wake-up for each event would cost more than the event.
#[inline(always)]
fn wake() -> u64 {
    let waiting = EVENTS.query(BPF_RB_AVAIL_DATA as u64);
    let due = waiting.wrapping_sub(EVENT_WAKE_BYTES) < WAKE_ROOM;
    if due { BPF_RB_FORCE_WAKEUP as u64 } else { BPF_RB_NO_WAKEUP as u64 }
}

/// Of a packet's ends, and where and why it was dropped. The sender's port does not count: somebody who tries again
/// does so from another.
#[inline(always)]
fn hash(scratch: &Scratch, what: u32, ifindex: u32) -> u64 {
    let packet = &scratch.packet;
    if packet.l3_len == 0 {
        return mix(mix(0, what), ifindex);
    }
    let [s0, s1, s2, s3] = packet.src.words;
    let [d0, d1, d2, d3] = packet.dst.words;
    let ports = (packet.dst_port as u32) << 16 | packet.proto as u32;
    let hash = mix(mix(mix(mix(mix(0, what), s0), s1), s2), s3);
    mix(mix(mix(mix(mix(mix(hash, d0), d1), d2), d3), ports), ifindex)
}

#[inline(always)]
const fn mix(hash: u64, word: u32) -> u64 {
    let mixed = (hash ^ word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

#[inline(always)]
fn differ(a: &Addr, b: &Addr) -> bool {
    let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.words, b.words);
    (a0 ^ b0) | (a1 ^ b1) | (a2 ^ b2) | (a3 ^ b3) != 0
}
