//! Where a packet goes, per hook.

use podway_abi::{Addr, NodeConfig, Reason, endpoint_flags, mode, peer_flags};

use crate::{
    Action, Bytes, Env, Scratch, Tables, Verdict, guard,
    packet::{self, Kind, flags},
    track,
};

/// What a pod sends. Fail-closed: a pod without an entry sends nothing.
#[inline(always)]
pub fn from_pod(bytes: &impl Bytes, tables: &impl Tables, env: &impl Env, scratch: &mut Scratch) -> Action {
    let Some(config) = configured(tables) else { return Action::drop(Reason::NotConfigured) };
    if env.is_tagged() {
        return Action::drop(Reason::Tagged);
    }
    if let Err(reason) = packet::parse(bytes, &mut scratch.packet) {
        return Action::drop(reason);
    }
    let Some(source) = tables.source(env.ifindex()) else { return Action::drop(Reason::UnknownPod) };
    if let Err(reason) = guard::pod(&scratch.packet, &source) {
        return Action::drop(reason);
    }
    if is_for_the_link(scratch) {
        return Action::pass(Reason::LinkControl);
    }
    track::track(tables, env, scratch);

    if let Some(endpoint) = tables.endpoint(&scratch.packet.dst) {
        scratch.target = endpoint;
        return deliver(scratch);
    }
    match tables.peer(&scratch.packet.dst) {
        Some(peer) if peer.flags & peer_flags::LOCAL == 0 => remote(&config, &peer.node, peer.flags, scratch),
        // The node itself; an address of its pod range that no pod has; or beyond the cluster.
        _ => Action::pass(Reason::ToStack),
    }
}

/// What the node's stack sends to a pod: its own traffic, and what it forwards from beyond the cluster; and what
/// another hook has sent into the queue of the pod's link, which is decided already.
#[inline(always)]
pub fn to_pod(bytes: &impl Bytes, tables: &impl Tables, env: &impl Env, scratch: &mut Scratch) -> Action {
    if tables.source(env.ifindex()).is_none() {
        return Action::drop(Reason::UnknownPod);
    }
    if env.is_decided() {
        return Action::pass(Reason::Delivered);
    }
    if let Err(reason) = packet::parse(bytes, &mut scratch.packet) {
        return Action::drop(reason);
    }
    if is_for_the_link(scratch) {
        return Action::pass(Reason::LinkControl);
    }
    track::track(tables, env, scratch);
    Action::pass(Reason::Delivered)
}

/// What arrives on the underlay. Everything that is not for a pod belongs to the node and passes.
#[inline(always)]
pub fn from_uplink(
    bytes: &impl Bytes,
    tables: &impl Tables,
    env: &impl Env,
    scratch: &mut Scratch,
) -> Action {
    let Some(config) = configured(tables) else { return Action::pass(Reason::ToStack) };
    if packet::parse(bytes, &mut scratch.packet).is_err() || matches!(scratch.packet.kind, Kind::Arp) {
        return Action::pass(Reason::ToStack);
    }
    let source = tables.peer(&scratch.packet.src);
    if let Err(reason) = guard::uplink(&scratch.packet, &config, source.as_ref()) {
        return Action::drop(reason);
    }
    // From beyond the cluster: through the node's stack, so that its address translation sees both
    // directions and a pod's answer leaves with the address it was asked at.
    if source.is_none() {
        return Action::pass(Reason::ToStack);
    }
    let Some(endpoint) = tables.endpoint(&scratch.packet.dst) else { return Action::pass(Reason::ToStack) };
    scratch.target = endpoint;
    track::track(tables, env, scratch);
    deliver(scratch)
}

/// What comes out of the tunnel: for a pod here, or for the node itself.
#[inline(always)]
pub fn from_tunnel(
    bytes: &impl Bytes,
    tables: &impl Tables,
    env: &impl Env,
    scratch: &mut Scratch,
) -> Action {
    let Some(config) = configured(tables) else { return Action::drop(Reason::NotConfigured) };
    let Some(key) = env.tunnel_key() else { return Action::drop(Reason::NoTunnelKey) };
    if let Err(reason) = packet::parse(bytes, &mut scratch.packet) {
        return Action::drop(reason);
    }
    // The tunnel carries IP only: link-layer control has no business beyond its link.
    if matches!(scratch.packet.kind, Kind::Arp) || scratch.packet.has(flags::LINK_CONTROL) {
        return Action::drop(Reason::NotForThisNode);
    }
    if let Err(reason) = guard::tunnel(&scratch.packet, &key, &config, tables) {
        return Action::drop(reason);
    }
    if let Some(endpoint) = tables.endpoint(&scratch.packet.dst) {
        scratch.target = endpoint;
        track::track(tables, env, scratch);
        return deliver(scratch);
    }
    match tables.peer(&scratch.packet.dst) {
        Some(peer) if peer.flags & peer_flags::LOCAL != 0 => Action::pass(Reason::ToStack),
        _ => Action::drop(Reason::NotForThisNode),
    }
}

/// What leaves through the tunnel device: the host's own traffic gets its other end here.
#[inline(always)]
pub fn to_tunnel(bytes: &impl Bytes, tables: &impl Tables, env: &impl Env, scratch: &mut Scratch) -> Action {
    if env.is_decided() {
        return Action::pass(Reason::Encapsulated);
    }
    if let Err(reason) = packet::parse(bytes, &mut scratch.packet) {
        return Action::drop(reason);
    }
    match tables.peer(&scratch.packet.dst) {
        Some(peer) if peer.flags & peer_flags::LOCAL == 0 => {
            scratch.tunnel = peer.node;
            Action { verdict: Verdict::SetTunnel, reason: Reason::Encapsulated }
        }
        _ => Action::drop(Reason::NoPeer),
    }
}

#[inline(always)]
fn configured(tables: &impl Tables) -> Option<NodeConfig> {
    tables.config().filter(|config| config.mode != mode::UNSET)
}

/// ARP, neighbour and listener discovery, and link-local or multicast destinations stay on the pod's link.
#[inline(always)]
fn is_for_the_link(scratch: &Scratch) -> bool {
    let packet = &scratch.packet;
    match packet.kind {
        Kind::Arp => true,
        Kind::V4 => packet.dst.is_v4_multicast_or_broadcast(),
        Kind::V6 => {
            packet.has(flags::LINK_CONTROL) || packet.dst.is_v6_link_local() || packet.dst.is_v6_multicast()
        }
    }
}

/// Into a pod on this node; the node is a router on the way, so a packet at the end of its life goes to the
/// stack, which answers with an ICMP error.
#[inline(always)]
fn deliver(scratch: &mut Scratch) -> Action {
    if scratch.packet.ttl <= 1 {
        scratch.new_flow = false;
        return Action::pass(Reason::HopLimit);
    }
    let queued = scratch.target.flags & endpoint_flags::QUEUED != 0;
    let verdict = if queued { Verdict::ToPodQueue } else { Verdict::ToPod };
    Action { verdict, reason: Reason::Delivered }
}

/// To another node. In direct mode a node's own addresses are reached by the node's routes as well.
#[inline(always)]
fn remote(config: &NodeConfig, node: &Addr, peer_bits: u32, scratch: &mut Scratch) -> Action {
    if config.mode == mode::OVERLAY {
        scratch.tunnel = *node;
        return Action { verdict: Verdict::ToTunnel, reason: Reason::Encapsulated };
    }
    // Through the stack: a node's addresses may be on a network that the pods' uplink does not reach.
    if peer_bits & peer_flags::NODE != 0 {
        return Action::pass(Reason::ToStack);
    }
    Action { verdict: Verdict::ToUplink, reason: Reason::Routed }
}
