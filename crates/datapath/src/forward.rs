//! Where a packet goes, per hook.

use podway_abi::{
    CtRoute, NodeConfig, Peer, Reason, endpoint_flags, mode, node_flags, peer_flags, services::Origin, way,
};

use crate::{
    Action, Bytes, Env, Scratch, Tables, Verdict, guard,
    packet::{self, Kind, flags, proto},
    same_addr,
    service::{self, Step},
    track::{self, Found, Observation},
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
    complete(bytes, tables, scratch);
    let mut observation = track::arrive(tables, env, scratch);
    // A route holds for one interface and link-layer address, and is in the entry of one source address: what the
    // guard below has found about them when the route was looked up, in the same tables.
    let mut found = track::find(tables, &observation, scratch);
    if follows(tables, &observation, &mut found, scratch) {
        return go(scratch);
    }
    let Some(source) = tables.source(env.ifindex()) else { return Action::drop(Reason::UnknownPod) };
    if let Err(reason) = guard::pod(&scratch.packet, &source) {
        return Action::drop(reason);
    }
    if is_for_the_link(scratch) {
        return Action::pass(Reason::LinkControl);
    }
    let step = match serve(bytes, tables, &mut observation, &mut found, scratch, Origin::Pod) {
        Ok(step) => step,
        Err(reason) => return refuse(reason),
    };
    if found != Found::Route {
        match step {
            Step::Plain | Step::Forward => route_from_pod(&config, tables, scratch),
            // The stack would take its own address, or a service's, from a pod for a forged one.
            Step::Masqueraded | Step::Back => route_onward(&config, tables, scratch, step),
        }
        track::track(tables, &observation, found, scratch);
    }
    go(scratch)
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
    complete(bytes, tables, scratch);
    let observation = track::arrive(tables, env, scratch);
    // The answer of a backend that is the node itself, or beyond the cluster.
    answer(bytes, tables, &observation, scratch);
    track::track(tables, &observation, Found::Flow, scratch);
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
    if is_tunnelled(&config, scratch) {
        return Action::pass(Reason::ToStack);
    }
    complete(bytes, tables, scratch);
    let mut observation = track::arrive(tables, env, scratch);
    // In overlay mode only nodes reach pods this way, which is rare beside what the node receives for itself.
    let mut found =
        if config.mode == mode::DIRECT { track::find(tables, &observation, scratch) } else { Found::Flow };
    if follows(tables, &observation, &mut found, scratch) {
        return go(scratch);
    }
    let source = tables.peer(&scratch.packet.src);
    if let Err(reason) = guard::uplink(&scratch.packet, &config, source.as_ref()) {
        return Action::drop(reason);
    }
    match serve(bytes, tables, &mut observation, &mut found, scratch, origin(source.map(|p| p.flags))) {
        Ok(Step::Plain) => {}
        Ok(step) => return go_onward(&config, tables, &observation, found, scratch, step),
        Err(reason) => return refuse(reason),
    }
    // From beyond the cluster: through the node's stack, so that its address translation sees both
    // directions and a pod's answer leaves with the address it was asked at.
    if source.is_none() {
        return Action::pass(Reason::ToStack);
    }
    let Some(endpoint) = tables.endpoint(&scratch.packet.dst) else { return Action::pass(Reason::ToStack) };
    scratch.route.target = endpoint;
    scratch.route.way = into_pod(&config);
    track::track(tables, &observation, found, scratch);
    go(scratch)
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
    let Some(key) = env.tunnel_key(&config) else { return Action::drop(Reason::NoTunnelKey) };
    if key.vni != config.vni {
        return Action::drop(Reason::WrongTunnelId);
    }
    if let Err(reason) = packet::parse(bytes, &mut scratch.packet) {
        return Action::drop(reason);
    }
    // The tunnel carries IP only: link-layer control has no business beyond its link.
    if matches!(scratch.packet.kind, Kind::Arp) || scratch.packet.has(flags::LINK_CONTROL) {
        return Action::drop(Reason::NotForThisNode);
    }
    complete(bytes, tables, scratch);
    let mut observation = track::arrive(tables, env, scratch);
    scratch.route.node = key.source;
    // A route holds for one sending node, which the guard below has found to be the source address's.
    let mut found = track::find(tables, &observation, scratch);
    if follows(tables, &observation, &mut found, scratch) {
        return go(scratch);
    }
    let source = match guard::tunnel(&scratch.packet, &key, tables) {
        Ok(source) => source,
        Err(reason) => return Action::drop(reason),
    };
    match serve(bytes, tables, &mut observation, &mut found, scratch, origin(Some(source))) {
        Ok(Step::Plain) => {}
        Ok(step) => return go_onward(&config, tables, &observation, found, scratch, step),
        Err(reason) => return refuse(reason),
    }
    if let Some(endpoint) = tables.endpoint(&scratch.packet.dst) {
        scratch.route.target = endpoint;
        scratch.route.way = into_pod(&config);
        track::track(tables, &observation, found, scratch);
        return go(scratch);
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
    // What the stack says to a link's neighbours (router solicitations, listener reports) is for no other node: the
    // device, which has none, discards a packet without a tunnel key.
    if is_for_the_link(scratch) {
        return Action::pass(Reason::LinkControl);
    }
    // The answer of a backend that is the node itself.
    complete(bytes, tables, scratch);
    let observation = track::arrive(tables, env, scratch);
    if answer(bytes, tables, &observation, scratch) {
        track::track(tables, &observation, Found::Flow, scratch);
    }
    match tables.peer(&scratch.packet.dst) {
        Some(peer) if peer.flags & peer_flags::LOCAL == 0 => {
            scratch.route.node = peer.node;
            Action { verdict: Verdict::SetTunnel, reason: Reason::Encapsulated }
        }
        _ => Action::drop(Reason::NoPeer),
    }
}

/// What leaves on the underlay device: answers of a backend that is the node itself are translated back. Nothing else
/// is touched, nor looked at while there is no such backend.
#[inline(always)]
pub fn to_uplink(bytes: &impl Bytes, tables: &impl Tables, env: &impl Env, scratch: &mut Scratch) -> Action {
    let sent = Action::pass(Reason::Routed);
    if env.is_decided() || !tables.node_serves() {
        return sent;
    }
    if packet::parse(bytes, &mut scratch.packet).is_err() || matches!(scratch.packet.kind, Kind::Arp) {
        return sent;
    }
    complete(bytes, tables, scratch);
    let observation = track::arrive(tables, env, scratch);
    if answer(bytes, tables, &observation, scratch) {
        track::track(tables, &observation, Found::Flow, scratch);
    }
    sent
}

/// Gives fragments their ports.
#[inline(always)]
fn complete(bytes: &impl Bytes, tables: &impl Tables, scratch: &mut Scratch) {
    if scratch.packet.has(flags::FRAGMENT) {
        service::complete(bytes, tables, scratch);
    }
}

/// Whether the packet goes by the route that its flow has, after translation back where the flow is a translated one.
#[inline(always)]
fn follows(
    tables: &impl Tables,
    observation: &Observation,
    found: &mut Found,
    scratch: &mut Scratch,
) -> bool {
    if *found != Found::Route {
        return false;
    }
    if scratch.route.way & way::BACK == 0 || service::translate_back(tables, scratch, observation.from_b) {
        return true;
    }
    // The translation was forgotten.
    *found = Found::Flow;
    scratch.route.way = way::NONE;
    false
}

/// Services: translates the packet when it is to, or from, one of them. A packet towards a backend continues as one of
/// the flow between node and backend, and its route may be known there.
#[inline(always)]
fn serve(
    bytes: &impl Bytes,
    tables: &impl Tables,
    observation: &mut Observation,
    found: &mut Found,
    scratch: &mut Scratch,
    origin: Origin,
) -> Result<Step, Reason> {
    if scratch.packet.has(flags::ICMP_ERROR) {
        let translated = service::translate_error(bytes, tables, scratch);
        return Ok(if translated { Step::Back } else { Step::Plain });
    }
    let known = *found != Found::Nothing;
    let step = service::translate(tables, scratch, observation.from_b, known, origin)?;
    if matches!(step, Step::Forward | Step::Masqueraded) {
        observation.from_b = scratch.from_b;
        *found = track::find(tables, observation, scratch);
    }
    Ok(step)
}

/// Translates what the node's stack sends: answers only, since its own sockets are translated before there is a packet.
/// Says whether it was one.
#[inline(always)]
fn answer(
    bytes: &impl Bytes,
    tables: &impl Tables,
    observation: &Observation,
    scratch: &mut Scratch,
) -> bool {
    if scratch.packet.has(flags::PORTS) {
        service::translate_back(tables, scratch, observation.from_b)
    } else {
        service::translate_error(bytes, tables, scratch)
    }
}

/// Who sent a packet that came from the network.
#[inline(always)]
fn origin(source: Option<u32>) -> Origin {
    match source {
        Some(bits) if bits & peer_flags::NODE == 0 => Origin::Pod,
        _ => Origin::External,
    }
}

#[inline(always)]
fn refuse(reason: Reason) -> Action {
    match reason {
        Reason::Rejected => Action { verdict: Verdict::Reject, reason },
        _ => Action::drop(reason),
    }
}

/// Where a translated packet from the network goes.
#[inline(always)]
fn go_onward(
    config: &NodeConfig,
    tables: &impl Tables,
    observation: &Observation,
    found: Found,
    scratch: &mut Scratch,
    step: Step,
) -> Action {
    if found != Found::Route || step == Step::Back {
        route_onward(config, tables, scratch, step);
        track::track(tables, observation, found, scratch);
    }
    go(scratch)
}

/// Looks up where a translated packet goes that the stack must not see: it would take the source for a forged one.
#[inline(always)]
fn route_onward(config: &NodeConfig, tables: &impl Tables, scratch: &mut Scratch, step: Step) {
    if let Some(endpoint) = tables.endpoint(&scratch.packet.dst) {
        scratch.route.target = endpoint;
        scratch.route.way = way::POD;
    } else {
        scratch.route.way = match tables.peer(&scratch.packet.dst) {
            Some(peer) if peer.flags & peer_flags::LOCAL != 0 => way::STACK,
            // What is between two nodes' own addresses, or a service's and a node's, is on the underlay both ways.
            Some(peer) if peer.flags & peer_flags::NODE != 0 && step != Step::Forward => way::UPLINK,
            Some(peer) if config.mode == mode::OVERLAY => {
                scratch.route.node = peer.node;
                way::TUNNEL
            }
            // Another node, or beyond the cluster.
            _ => way::UPLINK,
        };
    }
    if step == Step::Back {
        scratch.route.way |= way::BACK;
    }
}

#[inline(always)]
fn configured(tables: &impl Tables) -> Option<NodeConfig> {
    tables.config().filter(|config| config.mode != mode::UNSET)
}

/// Whether a packet on the underlay is this node's end of a tunnel: its outer source is judged at the tunnel device,
/// together with what is inside, and nothing but the tunnel device gets it. A forged source of this node fails there
/// as well, because only what belongs to the outer source may be inside, and what is this node's own is refused.
#[inline(always)]
fn is_tunnelled(config: &NodeConfig, scratch: &Scratch) -> bool {
    let packet = &scratch.packet;
    packet.proto == proto::UDP
        && packet.has(flags::PORTS)
        && packet.dst_port as u32 == config.tunnel_port
        && config.mode == mode::OVERLAY
        && same_addr(&packet.dst, &config.underlay)
}

/// ARP, neighbour and listener discovery, and link-local or multicast destinations stay on their link.
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

/// Looks up where a pod's packet goes.
#[inline(always)]
fn route_from_pod(config: &NodeConfig, tables: &impl Tables, scratch: &mut Scratch) {
    if let Some(endpoint) = tables.endpoint(&scratch.packet.dst) {
        scratch.route.target = endpoint;
        scratch.route.way = into_pod(config);
        return;
    }
    match tables.peer(&scratch.packet.dst) {
        Some(peer) if peer.flags & peer_flags::LOCAL == 0 => remote(config, &peer, &mut scratch.route),
        // The node itself; an address of its pod range that no pod has; or beyond the cluster.
        _ => scratch.route.way = way::STACK,
    }
}

/// Into a pod on this node: past the stack, unless that translates what pods exchange.
#[inline(always)]
fn into_pod(config: &NodeConfig) -> u8 {
    if config.flags & node_flags::STACK_TRANSLATES != 0 { way::STACK } else { way::POD }
}

/// To another node. In direct mode a node's own addresses are reached by the node's routes as well.
#[inline(always)]
fn remote(config: &NodeConfig, peer: &Peer, route: &mut CtRoute) {
    route.node = peer.node;
    let node = peer.flags & peer_flags::NODE != 0;
    route.way = if !node && config.flags & node_flags::STACK_TRANSLATES != 0 {
        way::STACK
    } else if config.mode == mode::OVERLAY {
        way::TUNNEL
    } else if node {
        // A node's addresses may be on a network that the pods' uplink does not reach.
        way::STACK
    } else {
        way::UPLINK
    };
}

/// The packet's way as an action.
#[inline(always)]
fn go(scratch: &mut Scratch) -> Action {
    match scratch.route.way & !way::BACK {
        way::POD => deliver(scratch),
        way::TUNNEL => Action { verdict: Verdict::ToTunnel, reason: Reason::Encapsulated },
        way::UPLINK => Action { verdict: Verdict::ToUplink, reason: Reason::Routed },
        _ => Action::pass(Reason::ToStack),
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
    let queued = scratch.route.target.flags & endpoint_flags::QUEUED != 0;
    let verdict = if queued { Verdict::ToPodQueue } else { Verdict::ToPod };
    Action { verdict, reason: Reason::Delivered }
}
