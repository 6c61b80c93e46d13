//! Makes a packet what the decision says: addresses and ports, and every checksum that covers them.
//!
//! Checksums are changed by the difference, so that they stay right (or wrong) as they came, also where a device has
//! yet to complete them.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::generated::{
        bpf_csum_diff, bpf_csum_update, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use podway_datapath::{
    Packet, Scratch, Tuple,
    packet::{ETH_LEN, Kind, flags, proto},
    service::ICMP_LEN,
};

/// Where an IPv4 header has its checksum and its addresses, and an IPv6 header its addresses.
const V4_CHECKSUM: u32 = 10;
const V4_ADDRESSES: u32 = 12;
const V6_ADDRESSES: u32 = 8;
const V4_LEN: u32 = 20;
const V6_LEN: u32 = 40;
const IP: u32 = ETH_LEN as u32;

/// Rewrites the packet; `None` when the kernel refuses.
#[inline(never)]
pub fn rewrite(ctx: &TcContext, scratch: &mut Scratch) -> Option<()> {
    let skb = ctx.skb.skb;
    let l4 = scratch.packet.l4_offset as u32;
    let is_v4 = matches!(scratch.packet.kind, Kind::V4);
    let difference = difference(&scratch.was.src.words, &scratch.packet.src.words);
    if scratch.rewrite_inner {
        let checksum = l4 + 2;
        addresses(skb, is_v4, IP, &scratch.packet)?;
        if is_v4 {
            l3(skb, IP + V4_CHECKSUM, difference)?;
        } else {
            pseudo(skb, checksum, difference, 0)?;
        }
        return inner(skb, is_v4, l4, scratch);
    }
    if is_v4 {
        l3(skb, IP + V4_CHECKSUM, difference)?;
    }
    if !scratch.packet.has(flags::LATER_FRAGMENT) {
        let (from, to) = (ports(scratch.was.src_port, scratch.was.dst_port), ports_of(&scratch.packet));
        let (checksum, zero) = match scratch.packet.proto {
            proto::TCP => (l4 + 16, 0),
            // 0 stands for no checksum (RFC 768), and stays.
            proto::UDP => (l4 + 6, BPF_F_MARK_MANGLED_0 as u64),
            // SCTP's does not cover addresses, and its ports do not change.
            _ => (0, 0),
        };
        if checksum != 0 {
            if is_v4 {
                // SAFETY: no preconditions; the kernel checks the offset.
                let done = unsafe {
                    bpf_l4_csum_replace(skb, checksum, 0, difference as u64, BPF_F_PSEUDO_HDR as u64 | zero)
                };
                if done != 0 {
                    return None;
                }
            } else {
                pseudo(skb, checksum, difference, zero)?;
            }
            // SAFETY: as above.
            if unsafe { bpf_l4_csum_replace(skb, checksum, from as u64, to as u64, 4 | zero) } != 0 {
                return None;
            }
        }
        store(skb, l4, &to, 4)?;
    }
    addresses(skb, is_v4, IP, &scratch.packet)
}

/// The packet inside an ICMP error. Its own transport checksum stays what it was: nobody looks at it, and most of what
/// it covers is not there.
#[inline(always)]
fn inner(skb: *mut __sk_buff, is_v4: bool, l4: u32, scratch: &Scratch) -> Option<()> {
    let checksum = l4 + 2;
    let at = l4 + ICMP_LEN as u32;
    let (was, now): (&Packet, &Tuple) = (&scratch.inner, &scratch.inner_now);
    let difference = difference(&was.src.words, &now.src.words);
    let (from, to) = (ports(was.src_port, was.dst_port), ports(now.src_port, now.dst_port));
    if is_v4 {
        // The header's own checksum makes up for its addresses within the message's.
        l3(skb, at + V4_CHECKSUM, difference)?;
        let words = [now.src.v4_word(), now.dst.v4_word()];
        store(skb, at + V4_ADDRESSES, &words, 8)?;
    } else {
        // SAFETY: no preconditions; the kernel checks the offset.
        if unsafe { bpf_l4_csum_replace(skb, checksum, 0, difference as u64, 0) } != 0 {
            return None;
        }
        store(skb, at + V6_ADDRESSES, &now.src, 32)?;
    }
    // SAFETY: as above.
    if unsafe { bpf_l4_csum_replace(skb, checksum, from as u64, to as u64, 4) } != 0 {
        return None;
    }
    store(skb, at + if is_v4 { V4_LEN } else { V6_LEN }, &to, 4)
}

/// Source and destination at once.
#[inline(always)]
fn addresses(skb: *mut __sk_buff, is_v4: bool, ip: u32, packet: &Packet) -> Option<()> {
    if is_v4 {
        let words = [packet.src.v4_word(), packet.dst.v4_word()];
        store(skb, ip + V4_ADDRESSES, &words, 8)
    } else {
        // The destination follows the source in the workspace as it does in the header.
        store(skb, ip + V6_ADDRESSES, &packet.src, 32)
    }
}

/// Difference of the sums over two pairs of addresses, source and destination being beside one another. The common
/// part of IPv4 addresses adds nothing.
#[inline(always)]
fn difference(from: &[u32; 4], to: &[u32; 4]) -> u32 {
    // SAFETY: both are the first of two addresses of 16 bytes in the workspace; the verifier checks the length.
    unsafe { bpf_csum_diff(from.as_ptr().cast_mut(), 32, to.as_ptr().cast_mut(), 32, 0) as u32 }
}

#[inline(always)]
fn l3(skb: *mut __sk_buff, at: u32, difference: u32) -> Option<()> {
    // SAFETY: no preconditions; the kernel checks the offset.
    (unsafe { bpf_l3_csum_replace(skb, at, 0, difference as u64, 0) } == 0).then_some(())
}

/// The part of a checksum that covers IPv6 addresses.
#[inline(always)]
fn pseudo(skb: *mut __sk_buff, at: u32, difference: u32, zero: u64) -> Option<()> {
    // SAFETY: no preconditions; the kernel checks the offset.
    if unsafe { bpf_l4_csum_replace(skb, at, 0, difference as u64, BPF_F_PSEUDO_HDR as u64 | zero) } != 0 {
        return None;
    }
    // What a device summed over the whole packet does not change when address and checksum do, but the helper takes the
    // difference off as if this were IPv4, where a third sum changes (fixed by a flag in Linux 6.16).
    // SAFETY: no preconditions. Refused where no device summed, which is well.
    unsafe { bpf_csum_update(skb, difference) };
    Some(())
}

#[inline(always)]
fn ports_of(packet: &Packet) -> u32 {
    ports(packet.src_port, packet.dst_port)
}

/// Both ports as they lie in a header.
#[inline(always)]
const fn ports(src: u16, dst: u16) -> u32 {
    ((src as u32) << 16 | dst as u32).to_be()
}

#[inline(always)]
fn store<T>(skb: *mut __sk_buff, at: u32, from: &T, len: u32) -> Option<()> {
    // SAFETY: the callers give as many bytes as follow `from` in the stack or the workspace, which the verifier checks.
    (unsafe { bpf_skb_store_bytes(skb, at, (&raw const *from).cast(), len, 0) } == 0).then_some(())
}
