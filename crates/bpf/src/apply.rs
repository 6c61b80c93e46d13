//! Applies a decision with the kernel's helpers.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, TC_ACT_OK, TC_ACT_SHOT, bpf_tunnel_key},
    helpers::generated::{
        bpf_csum_update, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_set_tunnel_key,
    },
    programs::TcContext,
};
use podway_abi::{Endpoint, Hook, Mac, NodeConfig, Reason};
use podway_datapath::{
    Action, Scratch, Tables, Verdict, decide,
    packet::{ETH_LEN, Kind},
    track,
};

use crate::{
    encap, events,
    maps::{self, Maps},
    reject::reject,
    rewrite::rewrite,
    service_maps,
    skb::{SkbBytes, SkbEnv, is_underlay_v6, linear},
};

/// Mark of a packet that a hook decided about and sent to another device of ours: to the tunnel device with its key
/// set, where the mark is taken off again, or into the queue of a pod's link, where it goes with the change of the
/// namespace. The upper half is "PW".
pub const MARK_DECIDED: u32 = 0x5057_0001;

/// `PACKET_HOST` of `linux/if_packet.h`: the frame is for this machine.
const PACKET_HOST: u32 = 0;

/// TTL of the outer header; the inner packet keeps its own.
pub const OUTER_TTL: u8 = 64;

/// Decides and applies; the result is a `TC_ACT_*` code.
#[inline(always)]
pub fn run(ctx: &TcContext, hook: Hook) -> i32 {
    let Some(scratch) = maps::scratch() else { return TC_ACT_SHOT };
    let env = SkbEnv { ctx, hook };
    let mut action = decide(&SkbBytes(ctx), &Maps, &env, scratch);
    if scratch.new_flow && !matches!(action.verdict, Verdict::Drop) {
        maps::insert_flow(&scratch.ct_key, &scratch.ct_entry);
    }
    let bytes = ctx.len().saturating_sub(14);
    // A plain packet has none of these.
    if scratch.rewrite | scratch.new_fragment | scratch.choice.remember {
        if !matches!(action.verdict, Verdict::Drop) {
            service_maps::settle(scratch);
        }
        let goes_on = !matches!(action.verdict, Verdict::Drop | Verdict::Reject);
        if scratch.rewrite && goes_on {
            service_maps::count_packet(scratch.choice.service, bytes);
        }
        if scratch.rewrite && goes_on && rewrite(ctx, scratch).is_none() {
            action = Action::drop(Reason::RewriteFailed);
        }
    }
    let code = match action.verdict {
        Verdict::Pass => Some(pass(ctx, hook)),
        Verdict::Drop => {
            tell_drop(ctx, scratch, hook, action.reason);
            Some(TC_ACT_SHOT)
        }
        Verdict::ToPod => to_pod(ctx, hook, scratch, false),
        Verdict::ToPodQueue => to_pod(ctx, hook, scratch, true),
        Verdict::ToTunnel => to_tunnel(ctx, hook, scratch, true),
        Verdict::SetTunnel => to_tunnel(ctx, hook, scratch, false),
        Verdict::ToUplink => to_uplink(),
        Verdict::Reject => {
            tell_drop(ctx, scratch, hook, action.reason);
            service_maps::count_connection(scratch.choice.service, false);
            Some(reject(ctx, hook, scratch).unwrap_or(TC_ACT_SHOT))
        }
    };
    if code.is_none() {
        action.reason = Reason::RewriteFailed;
        tell_drop(ctx, scratch, hook, action.reason);
    }
    maps::count(hook, action.reason, bytes);
    let code = code.unwrap_or(TC_ACT_SHOT);
    if scratch.new_flow | scratch.reopened {
        events::tell(ctx.skb.skb, scratch, events::what(hook, action.reason, false));
    } else if track::may_end(&scratch.packet) {
        events::closing(scratch);
    }
    code
}

/// Tells of a packet that goes no further; whatever it would have opened is not told of. Where the decision is carried
/// out, because at the end of the program it would cost stack.
#[inline(always)]
fn tell_drop(ctx: &TcContext, scratch: &mut Scratch, hook: Hook, reason: Reason) {
    scratch.new_flow = false;
    scratch.reopened = false;
    events::tell(ctx.skb.skb, scratch, events::what(hook, reason, true));
}

/// On to the stack, or to the device that the packet is bound for.
#[inline(always)]
fn pass(ctx: &TcContext, hook: Hook) -> i32 {
    match hook {
        // The sender wrote its own tunnel device's address; for the stack the frame must be for this host.
        Hook::FromTunnel => {
            let _ = ctx.change_type(PACKET_HOST);
        }
        // The outer packet must not carry the mark into the routing of the node.
        Hook::ToTunnel => ctx.set_mark(0),
        _ => {}
    }
    TC_ACT_OK
}

/// Into the pod: link-layer addresses, one hop less, and straight to the other side of its veth; or, `queued`, out
/// of this side, whose queue limits the pod's bandwidth.
#[inline(always)]
fn to_pod(ctx: &TcContext, hook: Hook, scratch: &Scratch, queued: bool) -> Option<i32> {
    let target = &scratch.route.target;
    rewrite_headers(ctx, scratch.packet.kind, target)?;
    if !matches!(hook, Hook::FromPod) {
        ctx.change_type(PACKET_HOST).ok()?;
    }
    if queued {
        ctx.set_mark(MARK_DECIDED);
        // SAFETY: no preconditions; the kernel checks the interface.
        return Some(unsafe { bpf_redirect(target.ifindex, 0) } as i32);
    }
    // SAFETY: as above.
    Some(unsafe { bpf_redirect_peer(target.ifindex, 0) } as i32)
}

/// Sets the tunnel key and, when `redirect`, hands the packet to the tunnel device. A pod's packet is as a rule wrapped
/// here and now instead, and sent.
#[inline(always)]
fn to_tunnel(ctx: &TcContext, hook: Hook, scratch: &Scratch, redirect: bool) -> Option<i32> {
    let config: NodeConfig = Maps.config()?;
    if redirect
        && matches!(hook, Hook::FromPod)
        && let Some(code) = encap::send(ctx, &config, &scratch.route.node)
    {
        return Some(code);
    }
    // SAFETY: all fields are integers or unions of integers.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = config.vni;
    key.tunnel_ttl = OUTER_TTL;
    let mut flags = BPF_F_ZERO_CSUM_TX as u64;
    if is_underlay_v6(&config) {
        key.__bindgen_anon_1.remote_ipv6 = scratch.route.node.words;
        flags |= BPF_F_TUNINFO_IPV6 as u64;
    } else {
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be(scratch.route.node.v4_word());
    }
    // SAFETY: `key` is as large as the size given says.
    let result = unsafe {
        bpf_skb_set_tunnel_key(ctx.as_ptr().cast(), &mut key, size_of::<bpf_tunnel_key>() as u32, flags)
    };
    if result != 0 {
        return None;
    }
    if !redirect {
        return Some(TC_ACT_OK);
    }
    ctx.set_mark(MARK_DECIDED);
    // SAFETY: no preconditions; the kernel checks the interface.
    Some(unsafe { bpf_redirect(config.tunnel_ifindex, 0) } as i32)
}

/// Out of the underlay device to the next hop that the node's routes give.
#[inline(always)]
fn to_uplink() -> Option<i32> {
    let config = Maps.config()?;
    // SAFETY: without parameters the helper looks the route up itself.
    Some(unsafe { bpf_redirect_neigh(config.uplink_ifindex, core::ptr::null_mut(), 0, 0) } as i32)
}

/// The link-layer addresses of the pod's link, one hop less, and the IPv4 header's checksum to match.
#[inline(always)]
fn rewrite_headers(ctx: &TcContext, kind: Kind, target: &Endpoint) -> Option<()> {
    let len = match kind {
        Kind::V4 => ETH_LEN + 20,
        Kind::V6 => ETH_LEN + 40,
        Kind::Arp => return None,
    };
    let start = match linear(ctx, len) {
        Some(start) => start,
        None => {
            ctx.pull_data(len as u32).ok()?;
            linear(ctx, len)?
        }
    };
    // SAFETY: `start` is followed by `len` bytes of linear, writable buffer, which the verifier checks again; nothing
    // in between moves them. Needed because every helper that stores costs more than what it writes.
    unsafe {
        core::ptr::copy_nonoverlapping(&target.pod_mac, start.cast::<Mac>(), 1);
        core::ptr::copy_nonoverlapping(&target.host_mac, start.add(6).cast::<Mac>(), 1);
        match kind {
            Kind::V4 => {
                *start.add(ETH_LEN + 8) = (*start.add(ETH_LEN + 8)).wrapping_sub(1);
                // RFC 1624: the word of TTL and protocol is less by 0x0100, so the complement's sum is more by that.
                let at = start.add(ETH_LEN + 10).cast::<u16>();
                let sum = u16::from_be(at.read_unaligned()) as u32 + 0x0100;
                at.write_unaligned(((sum + (sum >= 0xffff) as u32) as u16).to_be());
            }
            _ => {
                let hops = *start.add(ETH_LEN + 7);
                *start.add(ETH_LEN + 7) = hops.wrapping_sub(1);
                // IPv6 has no checksum of its own that would make up for the change within what a device summed.
                let less = !(u16::from_ne_bytes([0, 1]) as u32);
                bpf_csum_update(ctx.skb.skb, less);
            }
        }
    }
    Some(())
}
