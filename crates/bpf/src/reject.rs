//! Tells a sender at once that nobody serves there: ICMP "port unreachable" (RFC 792, RFC 4443 section 3.1), which also
//! ends a TCP connection that is being opened. The packet itself becomes the message.

use aya_ebpf::{
    EbpfContext,
    bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    helpers::generated::{
        bpf_csum_diff, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
    macros::map,
    maps::PerCpuArray,
    programs::TcContext,
};
use podway_abi::Hook;
use podway_datapath::{
    Scratch,
    packet::{ETH_LEN, Kind, flags, proto},
};

use crate::apply::MARK_DECIDED;

/// The message's headers and what it quotes, in words: at most an IPv6 header, the ICMP header, an IPv6 header and a TCP
/// header.
#[repr(C)]
struct Message {
    eth: [u32; 4],
    ip: [u32; 10],
    icmp: [u32; 2],
    quoted: [u32; 16],
}

#[map]
static MESSAGE: PerCpuArray<Message> = PerCpuArray::with_max_entries(1, 0);

const ETH: u32 = ETH_LEN as u32;
const ICMP_LEN: u32 = 8;
const HOPS: u32 = 64;

/// Turns the packet round; `None` when it cannot be: a fragment, a header with options, or a packet out of a tunnel,
/// whose sender this hook cannot reach.
#[inline(never)]
pub fn reject(ctx: &TcContext, hook: Hook, scratch: &Scratch) -> Option<i32> {
    if !matches!(hook, Hook::FromPod | Hook::FromUplink) || scratch.packet.has(flags::FRAGMENT) {
        return None;
    }
    let slot = MESSAGE.get_ptr_mut(0)?;
    // SAFETY: the slot belongs to this CPU, and programs of these hooks do not nest. Needed because the stack has no
    // room for it.
    let message = unsafe { &mut *slot };
    let is_v4 = matches!(scratch.packet.kind, Kind::V4);
    let ip_len = if is_v4 { 20 } else { 40 };
    if scratch.packet.l4_offset as u32 != ETH + ip_len {
        return None;
    }
    let quoted = ip_len + if scratch.packet.proto == proto::TCP { 20 } else { 8 };
    let skb = ctx.skb.skb;
    // SAFETY: both buffers are larger than what is asked for, which the verifier checks.
    let read = unsafe {
        bpf_skb_load_bytes(skb.cast(), 0, (&raw mut message.eth).cast(), ETH) == 0
            && bpf_skb_load_bytes(skb.cast(), ETH, (&raw mut message.quoted).cast(), quoted) == 0
    };
    if !read {
        return None;
    }
    // SAFETY: `quoted` is at most the buffer's length and a multiple of four.
    let sum =
        unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, message.quoted.as_mut_ptr(), quoted, 0) } as u32;
    if is_v4 {
        headers_v4(message, scratch, quoted, sum)
    } else {
        headers_v6(message, scratch, quoted, sum)
    }
    turn(&mut message.eth);
    let added = ip_len + ICMP_LEN;
    // SAFETY: no preconditions; the kernel checks the lengths, and the verifier the buffers.
    let written = unsafe {
        bpf_skb_change_tail(skb, ETH + quoted, 0) == 0
            && bpf_skb_adjust_room(skb, added as i32, BPF_ADJ_ROOM_MAC, 0) == 0
            && bpf_skb_store_bytes(skb, 0, (&raw const message.eth).cast(), ETH, 0) == 0
            && bpf_skb_store_bytes(skb, ETH, (&raw const message.ip).cast(), ip_len, 0) == 0
            && bpf_skb_store_bytes(skb, ETH + ip_len, (&raw const message.icmp).cast(), ICMP_LEN, 0) == 0
    };
    if !written {
        return None;
    }
    if matches!(hook, Hook::FromPod) {
        ctx.set_mark(MARK_DECIDED);
    }
    // SAFETY: the context of a running program is valid; the kernel checks the interface.
    Some(unsafe { bpf_redirect((*ctx.as_ptr().cast::<aya_ebpf::bindings::__sk_buff>()).ifindex, 0) } as i32)
}

/// Swaps the link-layer addresses, which begin the first four words.
#[inline(always)]
fn turn(eth: &mut [u32; 4]) {
    let [w0, w1, w2, w3] = *eth;
    let [d0, d1, d2, d3] = w0.to_ne_bytes();
    let [d4, d5, s0, s1] = w1.to_ne_bytes();
    let [s2, s3, s4, s5] = w2.to_ne_bytes();
    *eth = [
        u32::from_ne_bytes([s0, s1, s2, s3]),
        u32::from_ne_bytes([s4, s5, d0, d1]),
        u32::from_ne_bytes([d2, d3, d4, d5]),
        w3,
    ];
}

#[inline(always)]
fn headers_v4(message: &mut Message, scratch: &Scratch, quoted: u32, sum: u32) {
    // Type 3 code 3.
    message.icmp = [0x0303_0000_u32.to_be(), 0];
    let checksum = fold(add(sum, message.icmp[0]));
    message.icmp[0] |= (checksum as u32).to_be_half();
    let (src, dst) = (scratch.packet.dst.v4_word(), scratch.packet.src.v4_word());
    let total = 20 + ICMP_LEN + quoted;
    // No identification: not to be fragmented.
    let words = [
        (0x4500_0000 | total).to_be(),
        0x0000_4000_u32.to_be(),
        (HOPS << 24 | (proto::ICMP as u32) << 16).to_be(),
        src,
        dst,
    ];
    let [w0, w1, w2, w3, w4] = words;
    let checksum = fold(add(add(add(add(w0, w1), w2), w3), w4));
    message.ip = [w0, w1, w2 | (checksum as u32).to_be_half(), w3, w4, 0, 0, 0, 0, 0];
}

#[inline(always)]
fn headers_v6(message: &mut Message, scratch: &Scratch, quoted: u32, sum: u32) {
    let len = ICMP_LEN + quoted;
    let [s0, s1, s2, s3] = scratch.packet.dst.words;
    let [d0, d1, d2, d3] = scratch.packet.src.words;
    // Type 1 code 4.
    message.icmp = [0x0104_0000_u32.to_be(), 0];
    // The pseudo header (RFC 8200 section 8.1).
    let ends = add(add(add(s0, s1), add(s2, s3)), add(add(d0, d1), add(d2, d3)));
    let pseudo = add(ends, add(len.to_be(), (proto::ICMPV6 as u32).to_be()));
    let checksum = fold(add(add(sum, message.icmp[0]), pseudo));
    message.icmp[0] |= (checksum as u32).to_be_half();
    message.ip = [
        0x6000_0000_u32.to_be(),
        (len << 16 | (proto::ICMPV6 as u32) << 8 | HOPS).to_be(),
        s0,
        s1,
        s2,
        s3,
        d0,
        d1,
        d2,
        d3,
    ];
}

trait LowHalf {
    fn to_be_half(self) -> u32;
}

impl LowHalf for u32 {
    /// A sum of words in memory order, as the last two of four bytes.
    #[inline(always)]
    fn to_be_half(self) -> u32 {
        let [a, b, _, _] = self.to_le_bytes();
        u32::from_ne_bytes([0, 0, a, b])
    }
}

/// One's complement addition (RFC 1071).
#[inline(always)]
const fn add(a: u32, b: u32) -> u32 {
    let sum = a.wrapping_add(b);
    sum.wrapping_add((sum < b) as u32)
}

#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}
