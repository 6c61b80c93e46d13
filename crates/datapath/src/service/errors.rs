//! ICMP errors about translated packets: the packet inside is what this node sent on, and the one who is to be told
//! knows it as it was before.

use podway_abi::services::translation_flags;

use super::ServiceHost;
use crate::{
    Bytes, Scratch, Tuple,
    packet::{Kind, flags, proto},
    same_addr, track,
};

/// Bytes of an ICMP header before the packet inside (RFC 792, RFC 4443).
pub const ICMP_LEN: usize = 8;

/// Translates an ICMP error and the packet inside; says whether it was about a translated flow. Packets inside with IP
/// options or extension headers are left alone.
#[inline(never)]
pub fn translate_error(bytes: &impl Bytes, host: &impl ServiceHost, scratch: &mut Scratch) -> bool {
    if !scratch.packet.has(flags::ICMP_ERROR) || !read_inner(bytes, scratch) {
        return false;
    }
    let from_b = track::key(&scratch.inner, &mut scratch.ct_key);
    // Into the workspace: a copy on the stack is one too many.
    match host.translation(&scratch.ct_key) {
        Some(translation) => scratch.back.value = translation,
        None => return false,
    }
    let translation = &scratch.back.value;
    // The translation of the packets that go the way of the error, so against the packet inside.
    if (translation.flags & translation_flags::FROM_B != 0) == from_b {
        return false;
    }
    let packet = &mut scratch.packet;
    scratch.was = Tuple { src: packet.src, dst: packet.dst, src_port: 0, dst_port: 0 };
    packet.dst = translation.dst;
    // From the other end itself: it is known by its address before the translation. Anyone else on the way is not.
    if same_addr(&packet.src, &scratch.inner.dst) {
        packet.src = translation.src;
    }
    scratch.inner_now = Tuple {
        src: translation.dst,
        dst: translation.src,
        src_port: translation.dst_port,
        dst_port: translation.src_port,
    };
    scratch.rewrite = true;
    scratch.rewrite_inner = true;
    true
}

#[inline(always)]
fn read_inner(bytes: &impl Bytes, scratch: &mut Scratch) -> bool {
    let at = scratch.packet.l4_offset as usize + ICMP_LEN;
    let ports_at = match scratch.packet.kind {
        Kind::V4 => {
            let Some([w0, w1, w2, src, dst]) = bytes.load_far::<5>(at) else { return false };
            // Version 4 without options, and not a later fragment.
            if w0.to_ne_bytes()[0] != 0x45 || u32::from_be(w1) & 0x1fff != 0 {
                return false;
            }
            scratch.inner.proto = w2.to_ne_bytes()[1];
            scratch.inner.src = podway_abi::Addr::from_v4_word(src);
            scratch.inner.dst = podway_abi::Addr::from_v4_word(dst);
            at + 20
        }
        Kind::V6 => {
            let Some([w0, w1]) = bytes.load_far::<2>(at) else { return false };
            if w0.to_ne_bytes()[0] >> 4 != 6 {
                return false;
            }
            scratch.inner.proto = w1.to_ne_bytes()[2];
            let (Some(src), Some(dst)) = (bytes.load_far::<4>(at + 8), bytes.load_far::<4>(at + 24)) else {
                return false;
            };
            scratch.inner.src = podway_abi::Addr::from_v6_words(src);
            scratch.inner.dst = podway_abi::Addr::from_v6_words(dst);
            at + 40
        }
        Kind::Arp => return false,
    };
    if !matches!(scratch.inner.proto, proto::TCP | proto::UDP | proto::SCTP) {
        return false;
    }
    let Some([ports]) = bytes.load_far::<1>(ports_at) else { return false };
    let [s0, s1, d0, d1] = ports.to_ne_bytes();
    scratch.inner.src_port = u16::from_be_bytes([s0, s1]);
    scratch.inner.dst_port = u16::from_be_bytes([d0, d1]);
    true
}
