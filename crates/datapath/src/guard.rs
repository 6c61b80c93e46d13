//! Who sent this: a packet is believed only as far as the place where it came in can vouch for it.

use podway_abi::{Addr, NodeConfig, Peer, Reason, Source, mode, peer_flags};

use crate::{
    Packet, Tables, TunnelKey,
    packet::{Kind, flags},
    same_addr, same_mac,
};

/// A pod may send as itself only. Duplicate address detection (source `::`), link-local neighbour
/// discovery and multicast listener reports pass, because a pod cannot come up without them.
#[inline(always)]
pub fn pod(packet: &Packet, source: &Source) -> Result<(), Reason> {
    if !same_mac(&packet.src_mac, &source.pod_mac) {
        return Err(Reason::SpoofedMac);
    }
    let own = match packet.kind {
        Kind::V4 => !same_addr(&source.v4, &Addr::UNSPECIFIED) && same_addr(&packet.src, &source.v4),
        // A probe (RFC 5227) has no sender address yet.
        Kind::Arp => {
            !same_addr(&source.v4, &Addr::UNSPECIFIED)
                && (same_addr(&packet.src, &source.v4) || packet.src.v4_word() == 0)
        }
        Kind::V6 => {
            let unspecified = same_addr(&packet.src, &Addr::UNSPECIFIED);
            (!unspecified && same_addr(&packet.src, &source.v6))
                || (packet.has(flags::LINK_CONTROL) && (unspecified || packet.src.is_v6_link_local()))
        }
    };
    if own { Ok(()) } else { Err(Reason::SpoofedAddress) }
}

/// A packet from the underlay may not claim to come from this node, and in overlay mode from no pod at all:
/// pods' traffic comes out of the tunnel.
#[inline(always)]
pub fn uplink(packet: &Packet, config: &NodeConfig, source: Option<&Peer>) -> Result<(), Reason> {
    let Some(peer) = source else { return Ok(()) };
    if peer.flags & peer_flags::LOCAL != 0 {
        return Err(Reason::OwnSource);
    }
    let from_pod = peer.flags & peer_flags::NODE == 0;
    if config.mode == mode::OVERLAY && from_pod && !matches!(packet.kind, Kind::Arp) {
        return Err(Reason::UntunneledPodSource);
    }
    Ok(())
}

/// Tunnel traffic must come from a node of the cluster, and carry only what that node has: the [`peer_flags`] of the
/// source.
#[inline(always)]
pub fn tunnel(packet: &Packet, key: &TunnelKey, tables: &impl Tables) -> Result<u32, Reason> {
    match tables.peer(&key.source) {
        Some(node) if node.flags & peer_flags::NODE != 0 => {}
        _ => return Err(Reason::UnknownTunnelPeer),
    }
    match tables.peer(&packet.src) {
        Some(peer) if peer.flags & peer_flags::LOCAL != 0 => Err(Reason::OwnSource),
        Some(peer) if same_addr(&peer.node, &key.source) => Ok(peer.flags),
        _ => Err(Reason::TunnelSourceMismatch),
    }
}
