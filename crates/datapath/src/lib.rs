//! What happens to a packet: the decisions, and nothing else.
//!
//! The same code runs in the kernel over BPF maps, in tests over hash maps, and over the pinned maps of a
//! node for a trace. It is generic over where the tables live ([`Tables`]), where the packet's bytes are
//! ([`Bytes`]) and what the hook knows besides ([`Env`]); it never writes any of them. What has to be
//! written comes out as [`Scratch`] and a small [`Action`], and the host applies it.
//!
//! Stages, in order: parse ([`packet`]), the sender's identity ([`guard`]), connection tracking ([`track`]),
//! forwarding ([`forward`]). Service translation goes between identity and tracking, policy between
//! tracking and forwarding: each is a function over [`Scratch`] that may end the decision with a reason.
//!
//! An established flow costs one look-up: its entry holds where its packets go ([`track::follow`]), for as long as the
//! tables are the ones in which that was found.
//!
//! Rules that keep the kernel's verifier content: no slice index that can panic, no loop without a bound,
//! look-ups copy out, no `u128`, no formatting, leaves inlined.
#![no_std]

pub mod forward;
pub mod guard;
pub mod packet;
pub mod service;
pub mod track;

use podway_abi::{
    Addr, CtEntry, CtKey, CtRoute, Endpoint, Hook, Mac, NodeConfig, Peer, Reason, Source, services,
};

pub use packet::Packet;
pub use track::{Found, Observation, Observed};

/// The bytes of one packet, from its Ethernet header on.
pub trait Bytes {
    /// `N` words of 32 bits at `offset` as they lie in memory, or nothing when the packet is shorter.
    ///
    /// Words, because that is what headers are made of. The offset is known when compiled, so that the kernel's
    /// verifier can follow it.
    fn load<const N: usize>(&self, offset: usize) -> Option<[u32; N]>;

    /// The same at an offset that the packet itself gives.
    fn load_far<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        self.load(offset)
    }

    /// Length of the whole packet with its Ethernet header.
    fn len(&self) -> u32;

    /// Whether there is no byte at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where the decisions find the state of node and cluster. Every look-up returns a copy.
pub trait Tables: service::ServiceHost {
    /// The node's own configuration.
    fn config(&self) -> Option<NodeConfig>;
    /// The pod on this node that has this address.
    fn endpoint(&self, addr: &Addr) -> Option<Endpoint>;
    /// What the pod behind this interface may send as.
    fn source(&self, ifindex: u32) -> Option<Source>;
    /// Where in the cluster an address is: its own entry, else the longest prefix that holds it.
    fn peer(&self, addr: &Addr) -> Option<Peer>;
    /// Number of the tables' present state, which every change of endpoints, peers or configuration raises after it
    /// was made. What was found under an earlier number has to be looked up again; 0 never holds.
    fn generation(&self) -> u32;
    /// Looks a flow up and, where this host keeps state, applies [`track::follow`] to it in place.
    ///
    /// Done in one step because the kernel pays for each look-up of a 40-byte key; a host that must not change
    /// anything applies it to a copy.
    fn follow(&self, key: &CtKey, observation: &Observation, route: &mut CtRoute) -> Found;
    /// Looks a flow up and applies [`track::observe`] to it in the same way.
    fn observe(&self, key: &CtKey, observation: &Observation, route: &CtRoute) -> Observed;
}

/// What a hook knows besides the packet.
pub trait Env {
    /// The hook that runs.
    fn hook(&self) -> Hook;
    /// Interface that the hook is attached to.
    fn ifindex(&self) -> u32;
    /// Now, in nanoseconds of `CLOCK_MONOTONIC`.
    fn now_ns(&self) -> u64;
    /// Whether the frame carries a VLAN tag, which the kernel keeps beside the packet's bytes.
    fn is_tagged(&self) -> bool;
    /// Where a decapsulated packet came from.
    fn tunnel_key(&self, config: &NodeConfig) -> Option<TunnelKey>;
    /// Whether an earlier hook of this node already decided about this packet: it chose the tunnel's other end, or
    /// delivered it to the pod by way of its queue; on its way out of the node, whether it came in somewhere.
    fn is_decided(&self) -> bool;
}

/// Outer header of a decapsulated packet, as far as it matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunnelKey {
    /// Outer source address.
    pub source: Addr,
    /// VXLAN network identifier.
    pub vni: u32,
}

/// What to do with the packet.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Leave it to the node's stack, or let it go on to the device it is bound for.
    Pass,
    /// Discard it.
    Drop,
    /// Put it into a pod of this node: [`CtRoute::target`].
    ToPod,
    /// The same, by way of the queue on the pod's link.
    ToPodQueue,
    /// Hand it to the tunnel device with [`CtRoute::node`] as the other end.
    ToTunnel,
    /// Set [`CtRoute::node`] as the other end and let it go on (the hook is on the tunnel device itself).
    SetTunnel,
    /// Send it on the underlay device to the next hop of the node's route.
    ToUplink,
    /// Tell its sender that nobody answers there, and discard it.
    Reject,
}

/// A decision: verdict and reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Action {
    /// What to do.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
}

impl Action {
    /// Discards the packet.
    #[inline(always)]
    pub const fn drop(reason: Reason) -> Self {
        Self { verdict: Verdict::Drop, reason }
    }

    /// Leaves the packet to the node's stack.
    #[inline(always)]
    pub const fn pass(reason: Reason) -> Self {
        Self { verdict: Verdict::Pass, reason }
    }
}

/// Ends of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Tuple {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
}

impl Tuple {
    /// No ends.
    pub const NONE: Self = Self { src: Addr::UNSPECIFIED, dst: Addr::UNSPECIFIED, src_port: 0, dst_port: 0 };
}

/// Workspace of one decision and its effects, for the host to apply. One per CPU in the kernel, because
/// 512 bytes of stack serve a whole call chain.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Scratch {
    /// The parsed packet.
    pub packet: Packet,
    /// How the packet came in and where it goes.
    pub route: CtRoute,
    /// Key of the flow, when [`Scratch::new_flow`] is set.
    pub ct_key: CtKey,
    /// A flow to add to the connection table, when [`Scratch::new_flow`] is set.
    pub ct_entry: CtEntry,
    /// Whether the packet opens a flow: the host inserts it unless the packet is dropped.
    pub new_flow: bool,
    /// Whether the packet opened a flow again that was over and still in the table.
    pub reopened: bool,
    /// Whether the packet comes from end `b` of [`Scratch::ct_key`].
    pub from_b: bool,
    /// Whether the packet has to become what [`Scratch::packet`] says; it was [`Scratch::was`].
    pub rewrite: bool,
    /// Whether the packet is an ICMP error and the one inside has to become [`Scratch::inner_now`] as well.
    pub rewrite_inner: bool,
    /// Whether [`Scratch::forward`] and [`Scratch::back`] have to be written.
    pub new_translation: bool,
    /// Whether [`Scratch::fragment_ports`] have to be written under [`Scratch::fragment`].
    pub new_fragment: bool,
    /// Whether it has to be written down that the node itself is a backend of somebody beyond it
    /// ([`service::ServiceHost::node_serves`]); comes with a new translation.
    pub node_serves: bool,
    /// What the packet was when it came, when [`Scratch::rewrite`] is set.
    pub was: Tuple,
    /// The packet inside an ICMP error: its ends and its protocol.
    pub inner: Packet,
    /// What the packet inside an ICMP error has to become.
    pub inner_now: Tuple,
    /// What is asked of the services.
    pub query: service::Query,
    /// The backend that was chosen; its service is `u32::MAX` when none was asked.
    pub choice: service::Choice,
    /// Translation of the client's packets.
    pub forward: services::KeyedTranslation,
    /// Translation of the answers.
    pub back: services::KeyedTranslation,
    /// A fragmented datagram.
    pub fragment: services::FragmentKey,
    /// Its ports.
    pub fragment_ports: services::FragmentPorts,
}

impl Scratch {
    /// An empty workspace.
    pub const fn new() -> Self {
        Self {
            packet: Packet::EMPTY,
            route: CtRoute::NONE,
            ct_key: CtKey {
                a: Addr::UNSPECIFIED,
                b: Addr::UNSPECIFIED,
                a_port: 0,
                b_port: 0,
                proto: 0,
                pad: [0; 3],
            },
            ct_entry: CtEntry::NONE,
            new_flow: false,
            reopened: false,
            from_b: false,
            rewrite: false,
            rewrite_inner: false,
            new_translation: false,
            new_fragment: false,
            node_serves: false,
            was: Tuple::NONE,
            inner: Packet::EMPTY,
            inner_now: Tuple::NONE,
            query: service::Query::NONE,
            choice: service::Choice::NONE,
            forward: services::KeyedTranslation::NONE,
            back: services::KeyedTranslation::NONE,
            fragment: services::FragmentKey::NONE,
            fragment_ports: services::FragmentPorts { src_port: 0, dst_port: 0 },
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Decides what happens to a packet at a hook.
///
/// Writes only `scratch`; applying its effects is the caller's part.
#[inline(always)]
pub fn decide(bytes: &impl Bytes, tables: &impl Tables, env: &impl Env, scratch: &mut Scratch) -> Action {
    scratch.new_flow = false;
    scratch.reopened = false;
    // Until there is one that was read.
    scratch.packet.l3_len = 0;
    scratch.rewrite = false;
    scratch.rewrite_inner = false;
    scratch.new_translation = false;
    scratch.new_fragment = false;
    scratch.node_serves = false;
    scratch.choice.service = u32::MAX;
    scratch.choice.remember = false;
    match env.hook() {
        Hook::FromPod => forward::from_pod(bytes, tables, env, scratch),
        Hook::ToPod => forward::to_pod(bytes, tables, env, scratch),
        Hook::FromUplink => forward::from_uplink(bytes, tables, env, scratch),
        Hook::FromTunnel => forward::from_tunnel(bytes, tables, env, scratch),
        Hook::ToTunnel => forward::to_tunnel(bytes, tables, env, scratch),
        Hook::ToUplink => forward::to_uplink(bytes, tables, env, scratch),
    }
}

/// Whether two link-layer addresses are equal, without a call to `memcmp`, which the kernel has not.
#[inline(always)]
pub(crate) fn same_mac(a: &Mac, b: &Mac) -> bool {
    let [a0, a1, a2, a3, a4, a5] = *a;
    let [b0, b1, b2, b3, b4, b5] = *b;
    ((a0 ^ b0) | (a1 ^ b1) | (a2 ^ b2) | (a3 ^ b3) | (a4 ^ b4) | (a5 ^ b5)) == 0
}

/// Whether two addresses are equal, word by word, for the same reason.
#[inline(always)]
pub(crate) fn same_addr(a: &Addr, b: &Addr) -> bool {
    let [a0, a1, a2, a3] = a.words;
    let [b0, b1, b2, b3] = b.words;
    ((a0 ^ b0) | (a1 ^ b1) | (a2 ^ b2) | (a3 ^ b3)) == 0
}
