//! The tables other than connection tracking.

use crate::{Addr, assert_layout};

/// A link-layer address.
pub type Mac = [u8; 6];

/// Most pod addresses on one node (a dual-stack pod has two).
pub const MAX_ENDPOINTS: u32 = 8_192;
/// Most addresses with an entry of their own in the peer table.
pub const MAX_PEERS: u32 = 262_144;
/// Most prefixes in the peer table.
pub const MAX_PREFIXES: u32 = 65_536;
/// Most flows that are tracked at the same time; beyond it the least recently seen are forgotten.
pub const MAX_CONNTRACK: u32 = 262_144;

/// Values of [`NodeConfig::mode`].
pub mod mode {
    /// Not configured: pods' packets are dropped, the node's own pass.
    pub const UNSET: u32 = 0;
    /// Other nodes' pods are reached through the VXLAN device.
    pub const OVERLAY: u32 = 1;
    /// Other nodes' pods are reached by the node's routes.
    pub const DIRECT: u32 = 2;
}

/// Bits of [`NodeConfig::flags`].
pub mod node_flags {
    /// Services are translated by the node's stack (nftables, iptables, IPVS): it has to see both directions of what
    /// pods exchange, so there are no short cuts past it.
    pub const STACK_TRANSLATES: u32 = 1 << 8;
    /// The tunnel's outer header is IPv6.
    pub const UNDERLAY_V6: u32 = 1 << 0;
}

/// What the node's programs need to know about the node.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct NodeConfig {
    /// See [`mode`].
    pub mode: u32,
    /// See [`node_flags`].
    pub flags: u32,
    /// Interface index of the device that carries the underlay.
    pub uplink_ifindex: u32,
    /// Interface index of the VXLAN device; 0 in direct mode.
    pub tunnel_ifindex: u32,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port of the tunnel, host byte order; 0 in direct mode.
    pub tunnel_port: u32,
    /// This node's end of its tunnels; [`Addr::UNSPECIFIED`] in direct mode.
    pub underlay: Addr,
}
assert_layout!(NodeConfig, 40);

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flags {
    /// What goes to the pod waits in the queue of the host side of its veth (a bandwidth limit): no short cut past it.
    pub const QUEUED: u32 = 1 << 0;
}

/// A pod on this node, found by its address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Endpoint {
    /// Interface index of the host side of the pod's veth.
    pub ifindex: u32,
    /// The agent's number for the pod.
    pub id: u32,
    /// Link-layer address of the pod's side.
    pub pod_mac: Mac,
    /// Link-layer address of the host's side.
    pub host_mac: Mac,
    /// See [`endpoint_flags`].
    pub flags: u32,
}
assert_layout!(Endpoint, 24);

impl Endpoint {
    /// No pod.
    pub const NONE: Self = Self { ifindex: 0, id: 0, pod_mac: [0; 6], host_mac: [0; 6], flags: 0 };
}

/// What a pod may send as, found by the interface index of the host side of its veth.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Source {
    /// The pod's IPv4 address, or [`Addr::UNSPECIFIED`] when it has none.
    pub v4: Addr,
    /// The pod's IPv6 address, or [`Addr::UNSPECIFIED`] when it has none.
    pub v6: Addr,
    /// The agent's number for the pod.
    pub id: u32,
    /// Link-layer address of the pod's side.
    pub pod_mac: Mac,
    /// Always 0.
    pub pad: [u8; 2],
}
assert_layout!(Source, 44);

/// Bits of [`Peer::flags`].
pub mod peer_flags {
    /// The address is a node's own, not a pod's.
    pub const NODE: u32 = 1 << 0;
    /// It is on this node.
    pub const LOCAL: u32 = 1 << 1;
}

/// Where an address or prefix of the cluster is.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Peer {
    /// Underlay address of the node that has it.
    pub node: Addr,
    /// See [`peer_flags`].
    pub flags: u32,
}
assert_layout!(Peer, 20);

/// Packets and bytes that ended with one reason at one hook.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counter {
    /// Packets as the hook saw them: one GSO super-packet counts once.
    pub packets: u64,
    /// Bytes from the network layer up.
    pub bytes: u64,
}
assert_layout!(Counter, 16);
