//! Tunnel headers written at the pod's hook.
//!
//! The tunnel device does the same, but a packet of a pod then takes the node's whole output path besides, with its
//! firewall hooks and a route looked up without any cache: about a sixth of a request's way. What is not the usual
//! case (an outer header of IPv6, a next hop that is no IPv4 neighbour, a packet that is too long for the route, or one
//! that segmentation offload has yet to cut up) is left to the device, which knows all of it.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_ADJ_ROOM_ENCAP_L2_SHIFT, BPF_F_ADJ_ROOM_ENCAP_L2_ETH, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
        BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_SHOT,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_fib_lookup as FibLookup, bpf_redir_neigh,
    },
    helpers::generated::{
        bpf_fib_lookup, bpf_get_hash_recalc, bpf_get_prandom_u32, bpf_redirect_neigh, bpf_skb_adjust_room,
    },
    programs::TcContext,
};
use podway_abi::{Addr, NodeConfig};
use podway_datapath::packet::{ETH_LEN, ethertype, proto};

use crate::{
    apply::OUTER_TTL,
    skb::{is_underlay_v6, linear, load_word, store_word},
};

/// Bytes of an IPv4 header without options (RFC 791), a UDP header (RFC 768) and a VXLAN header (RFC 7348).
const IPV4_LEN: usize = 20;
const UDP_LEN: usize = 8;
const VXLAN_LEN: usize = 8;
/// What is put between the Ethernet header and the packet: the outer headers, and the inner Ethernet header.
const ROOM: usize = IPV4_LEN + UDP_LEN + VXLAN_LEN + ETH_LEN;

/// `AF_INET` of `linux/socket.h`.
const AF_INET: u8 = 2;
/// VXLAN's flag "there is a network identifier", in its first word (RFC 7348 section 5).
const VXLAN_HAS_VNI: u32 = 0x0800_0000;
/// Source ports are those that RFC 7348 section 5 recommends: 49152 and up, 14 bits of them.
const FIRST_SOURCE_PORT: u32 = 49_152;
const SOURCE_PORT_BITS: u32 = 0x3fff;

/// Wraps a packet of a pod for another node and sends it to the next hop. Nothing when the tunnel device has to do it;
/// the packet is as it was then.
#[inline(always)]
pub fn send(ctx: &TcContext, config: &NodeConfig, node: &Addr) -> Option<i32> {
    let skb = ctx.skb.skb;
    // SAFETY: the context pointer of a running program is valid. Needed: aya has no accessor.
    let bundle = unsafe { (*skb).gso_size } != 0;
    // Of what segmentation offload has yet to cut up, the tunnel device holds each segment to the route's MTU. Wrapped
    // here it would also lose its number of segments, which the limits of a link count.
    if bundle || is_underlay_v6(config) {
        return None;
    }
    let hop = next_hop(ctx, config, node)?;
    // SAFETY: no preconditions. The sum over the ends of the inner flow, so that each flow stays on one path.
    let hash = unsafe { bpf_get_hash_recalc(skb) };
    let flags = (BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2_ETH)
        as u64
        | (ETH_LEN as u64) << BPF_ADJ_ROOM_ENCAP_L2_SHIFT;
    // SAFETY: no preconditions; on an error the packet is unchanged (a kind of segmentation that cannot be wrapped, or
    // a packet that is wrapped already).
    if unsafe { bpf_skb_adjust_room(skb, ROOM as i32, BPF_ADJ_ROOM_MAC, flags) } != 0 {
        return None;
    }
    // From here on there is no way back.
    let Some(start) = linear(ctx, ETH_LEN + ROOM) else { return Some(TC_ACT_SHOT) };
    // SAFETY: `start` is followed by that many bytes of linear, writable buffer, which the verifier checks again;
    // nothing in between moves them.
    unsafe { write_headers(start, ctx.len() - ETH_LEN as u32, hash, config, node) };
    let mut to = hop.neighbour();
    // SAFETY: `to` is as large as the size given says. The helper finds the neighbour's link-layer address, and asks
    // for it when it is not known.
    Some(unsafe { bpf_redirect_neigh(hop.ifindex, &mut to, size_of::<bpf_redir_neigh>() as i32, 0) } as i32)
}

/// Where the node's routes send a packet.
struct Hop {
    ifindex: u32,
    /// Network byte order.
    address: u32,
}

impl Hop {
    #[inline(always)]
    fn neighbour(&self) -> bpf_redir_neigh {
        // SAFETY: all fields are integers or unions of integers.
        let mut neighbour: bpf_redir_neigh = unsafe { core::mem::zeroed() };
        neighbour.nh_family = AF_INET as u32;
        neighbour.__bindgen_anon_1.ipv4_nh = self.address;
        neighbour
    }
}

/// The next hop by the node's routes, with all that they can say: several paths, rules by source, a path's own MTU.
#[inline(always)]
fn next_hop(ctx: &TcContext, config: &NodeConfig, node: &Addr) -> Option<Hop> {
    // SAFETY: all fields are integers or unions of integers.
    let mut route: FibLookup = unsafe { core::mem::zeroed() };
    route.family = AF_INET;
    route.l4_protocol = proto::UDP;
    route.dport = (config.tunnel_port as u16).to_be();
    route.__bindgen_anon_3.ipv4_src = config.underlay.v4_word();
    route.__bindgen_anon_4.ipv4_dst = node.v4_word();
    // SAFETY: the context pointer of a running program is valid. Needed: aya has no accessors.
    route.ifindex = unsafe { (*ctx.skb.skb).ifindex };
    route.__bindgen_anon_1.tot_len = (ctx.len() + (ROOM - ETH_LEN) as u32) as u16;
    // SAFETY: `route` is as large as the size given says.
    let result = unsafe { bpf_fib_lookup(ctx.as_ptr(), &mut route, size_of::<FibLookup>() as i32, 0) } as u32;
    let found = result == BPF_FIB_LKUP_RET_SUCCESS || result == BPF_FIB_LKUP_RET_NO_NEIGH;
    if !found || route.family != AF_INET {
        return None;
    }
    // SAFETY: the helper leaves the next hop's address where the destination's was.
    Some(Hop { ifindex: route.ifindex, address: unsafe { route.__bindgen_anon_4.ipv4_dst } })
}

/// Writes the headers; `len` is the length of the whole from the outer IPv4 header on.
///
/// # Safety
/// `start` points to [`ETH_LEN`] and [`ROOM`] bytes of the packet that can be written.
#[inline(always)]
unsafe fn write_headers(start: *mut u8, len: u32, hash: u32, config: &NodeConfig, node: &Addr) {
    // A packet that segmentation offload will cut up is longer than the field can say; the kernel writes it anew for
    // each segment.
    let len = len & 0xffff;
    // SAFETY: no preconditions. Routers on the way may fragment, so that packets need identifiers.
    let id = unsafe { bpf_get_prandom_u32() };
    let (src, dst) = (config.underlay.v4_word(), node.v4_word());
    let version_and_len = (0x4500_0000 | len).to_be();
    let id_and_fragment = (id << 16).to_be();
    let ttl_and_protocol = ((OUTER_TTL as u32) << 24 | (proto::UDP as u32) << 16).to_be();
    // RFC 1071: a sum over words as they lie in memory is right in any byte order.
    let sum = half(version_and_len) + half(id_and_fragment) + half(ttl_and_protocol) + half(src) + half(dst);
    let sum = half(half(sum));
    let checksum = u32::from_ne_bytes({
        let [a, b] = (!(sum as u16)).to_ne_bytes();
        [0, 0, a, b]
    });
    let source_port = FIRST_SOURCE_PORT | ((hash ^ hash >> 16) & SOURCE_PORT_BITS);
    let words = [
        version_and_len,
        id_and_fragment,
        ttl_and_protocol | checksum,
        src,
        dst,
        (source_port << 16 | config.tunnel_port).to_be(),
        // No checksum: the inner packet has its own (RFC 7348 section 4.1).
        (len.wrapping_sub(IPV4_LEN as u32) << 16).to_be(),
        VXLAN_HAS_VNI.to_be(),
        (config.vni << 8).to_be(),
    ];
    // SAFETY: within what the caller vouches for.
    unsafe {
        for (i, word) in words.into_iter().enumerate() {
            store_word(start.add(ETH_LEN + i * 4), word);
        }
        // The pod's Ethernet header as the inner one; the outer one's addresses are the neighbour's, written later.
        let inner = start.add(ROOM);
        for at in [0, 4, 8] {
            store_word(inner.add(at), load_word(start.add(at)));
        }
        let kind = start.add(12).cast::<u16>();
        inner.add(12).cast::<u16>().write_unaligned(kind.read_unaligned());
        kind.write_unaligned(ethertype::IPV4.to_be());
    }
}

/// The sum of a word's halves.
#[inline(always)]
const fn half(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}
