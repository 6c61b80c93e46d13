//! The cluster of the cases: this node with two pods, another node with pods, and a third one; and what can change.

use std::net::IpAddr;

use podway_abi::{Addr, Endpoint, Mac, NodeConfig, Peer, Source, mode, peer_flags};

use crate::host::HostTables;

/// Own addresses of this node.
pub const NODE: [&str; 2] = ["172.18.1.1", "fd00:172:18::1:1"];
/// Underlay addresses of the other node.
pub const OTHER_NODE: [&str; 2] = ["172.18.1.2", "fd00:172:18::1:2"];
/// Underlay addresses of a third node, which has no pods at first.
pub const THIRD_NODE: [&str; 2] = ["172.18.1.3", "fd00:172:18::1:3"];
/// Pod ranges of this node.
pub const OWN_RANGES: [(&str, u8); 2] = [("10.244.1.0", 24), ("fd00:10:244:1::", 64)];
/// Pod ranges of the other node.
pub const OTHER_RANGES: [(&str, u8); 2] = [("10.244.2.0", 24), ("fd00:10:244:2::", 64)];
/// The cluster's VXLAN network identifier.
pub const VNI: u32 = 1;
/// The cluster's VXLAN port.
pub const TUNNEL_PORT: u16 = 8472;
/// First pod of this node.
pub const POD_1: [&str; 2] = ["10.244.1.2", "fd00:10:244:1::2"];
/// Second pod of this node.
pub const POD_2: [&str; 2] = ["10.244.1.3", "fd00:10:244:1::3"];
/// A pod of the other node.
pub const OTHER_POD: [&str; 2] = ["10.244.2.2", "fd00:10:244:2::2"];
/// An address beyond the cluster.
pub const OUTSIDE: [&str; 2] = ["198.51.100.7", "2001:db8::7"];

/// Link-layer address of the first pod's side of its link.
pub const POD_1_MAC: Mac = [0x02, 0, 0, 0, 1, 1];
/// Link-layer address of the host's side of the first pod's link.
pub const HOST_1_MAC: Mac = [0x02, 0, 0, 0, 1, 0xfe];
/// Link-layer address of the second pod's side of its link.
pub const POD_2_MAC: Mac = [0x02, 0, 0, 0, 2, 1];
/// Link-layer address of the host's side of the second pod's link.
pub const HOST_2_MAC: Mac = [0x02, 0, 0, 0, 2, 0xfe];

/// Link-layer address of the side of a pod that comes in place of another.
pub const POD_3_MAC: Mac = [0x02, 0, 0, 0, 3, 1];
/// Link-layer address of the host's side of its link.
pub const HOST_3_MAC: Mac = [0x02, 0, 0, 0, 3, 0xfe];

/// A change of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The first pod goes.
    Pod1Goes,
    /// The second pod goes.
    Pod2Goes,
    /// The second pod goes, and its addresses are on the other node from then on.
    Pod2Moves,
    /// The second pod goes, and a third one gets its addresses.
    Pod2IsReplaced,
    /// The other node's pod ranges are the third node's from then on.
    OtherRangesMove,
    /// The mode is the other one from then on.
    ModeChanges,
}

/// Interface indices, which differ between the hosts of the cases.
#[derive(Clone, Copy, Debug)]
pub struct Interfaces {
    /// Host side of the first pod's link.
    pub pod_1: u32,
    /// Host side of the second pod's link.
    pub pod_2: u32,
    /// Host side of the third pod's link, once there is one.
    pub pod_3: u32,
    /// Underlay device.
    pub uplink: u32,
    /// Tunnel device.
    pub tunnel: u32,
}

/// An address of the world.
///
/// # Panics
/// On text that is no address: the cases are wrong then.
pub fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<IpAddr>().expect("the cases hold valid addresses"))
}

/// The world's peers as (prefix address, prefix length of its family, peer).
pub fn peers() -> Vec<(Addr, u8, Peer)> {
    let here = addr(NODE[0]);
    let there = addr(OTHER_NODE[0]);
    let mut all = Vec::new();
    for family in 0..2 {
        let host = if family == 0 { 32 } else { 128 };
        all.push((
            addr(NODE[family]),
            host,
            Peer { node: here, flags: peer_flags::NODE | peer_flags::LOCAL },
        ));
        all.push((addr(OTHER_NODE[family]), host, Peer { node: there, flags: peer_flags::NODE }));
        let third = Peer { node: addr(THIRD_NODE[0]), flags: peer_flags::NODE };
        all.push((addr(THIRD_NODE[family]), host, third));
        let (own, own_len) = OWN_RANGES[family];
        all.push((addr(own), own_len, Peer { node: here, flags: peer_flags::LOCAL }));
        let (other, other_len) = OTHER_RANGES[family];
        all.push((addr(other), other_len, Peer { node: there, flags: 0 }));
    }
    all
}

/// The peers after a change.
pub fn peers_after(change: Change) -> Vec<(Addr, u8, Peer)> {
    let mut all = peers();
    match change {
        Change::Pod2Moves => {
            for (text, len) in [(POD_2[0], 32), (POD_2[1], 128)] {
                all.push((addr(text), len, Peer { node: addr(OTHER_NODE[0]), flags: 0 }));
            }
        }
        Change::OtherRangesMove => {
            for (prefix, _, peer) in &mut all {
                if OTHER_RANGES.iter().any(|(range, _)| *prefix == addr(range)) {
                    peer.node = addr(THIRD_NODE[0]);
                }
            }
        }
        Change::Pod1Goes | Change::Pod2Goes | Change::Pod2IsReplaced | Change::ModeChanges => {}
    }
    all
}

/// The node's configuration in one of the two modes.
pub fn config(overlay: bool, interfaces: &Interfaces) -> NodeConfig {
    NodeConfig {
        mode: if overlay { mode::OVERLAY } else { mode::DIRECT },
        uplink_ifindex: interfaces.uplink,
        tunnel_ifindex: if overlay { interfaces.tunnel } else { 0 },
        vni: VNI,
        flags: 0,
        tunnel_port: if overlay { TUNNEL_PORT.into() } else { 0 },
        underlay: if overlay { addr(NODE[0]) } else { Addr::UNSPECIFIED },
    }
}

/// The world in hash maps.
pub fn tables(overlay: bool, interfaces: &Interfaces) -> HostTables {
    let mut tables = HostTables::new(config(overlay, interfaces));
    let pods = [
        (interfaces.pod_1, 1, POD_1_MAC, HOST_1_MAC, POD_1),
        (interfaces.pod_2, 2, POD_2_MAC, HOST_2_MAC, POD_2),
    ];
    for pod in pods {
        add(&mut tables, pod);
    }
    set_peers(&mut tables, peers());
    tables
}

type Pod = (u32, u32, Mac, Mac, [&'static str; 2]);

fn add(tables: &mut HostTables, (ifindex, id, pod_mac, host_mac, addresses): Pod) {
    let source = Source { v4: addr(addresses[0]), v6: addr(addresses[1]), id, pod_mac, pad: [0; 2] };
    tables.sources.insert(ifindex, source);
    for text in addresses {
        tables.endpoints.insert(addr(text), Endpoint { ifindex, id, pod_mac, host_mac, flags: 0 });
    }
}

fn remove(tables: &mut HostTables, ifindex: u32) {
    tables.sources.remove(&ifindex);
    tables.endpoints.retain(|_, endpoint| endpoint.ifindex != ifindex);
}

fn set_peers(tables: &mut HostTables, peers: Vec<(Addr, u8, Peer)>) {
    tables.peers =
        peers.into_iter().map(|(prefix, len, peer)| (prefix, prefix.prefix_len(len), peer)).collect();
}

/// Makes a change to tables in hash maps, which are in overlay mode or not, without saying so to the flows.
pub fn change(tables: &mut HostTables, overlay: bool, interfaces: &Interfaces, change: Change) {
    match change {
        Change::Pod1Goes => remove(tables, interfaces.pod_1),
        Change::Pod2Goes | Change::Pod2Moves => {
            remove(tables, interfaces.pod_2);
            remove(tables, interfaces.pod_3);
        }
        Change::Pod2IsReplaced => {
            remove(tables, interfaces.pod_2);
            add(tables, (interfaces.pod_3, 3, POD_3_MAC, HOST_3_MAC, POD_2));
        }
        Change::OtherRangesMove => {}
        Change::ModeChanges => tables.config = config(!overlay, interfaces),
    }
    set_peers(tables, peers_after(change));
}
