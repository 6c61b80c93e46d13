//! Fragments: only the first one carries ports; those of the others are remembered from it.

use podway_abi::services::{FragmentKey, FragmentPorts};

use super::ServiceHost;
use crate::{
    Bytes, Scratch,
    packet::{ETH_LEN, Kind, flags},
};

/// Gives a later fragment the ports of its first one, or prepares to remember those of a first one. A later fragment
/// that comes before its first one stays without ports.
#[inline(never)]
pub fn complete(bytes: &impl Bytes, host: &impl ServiceHost, scratch: &mut Scratch) {
    let id = match scratch.packet.kind {
        Kind::V4 => match bytes.load::<1>(ETH_LEN + 4) {
            Some([word]) => u32::from_be(word) >> 16,
            None => return,
        },
        // The fragment header is the last one before the transport header: its identification is its second word.
        Kind::V6 => match bytes.load_far::<1>((scratch.packet.l4_offset as usize).wrapping_sub(4)) {
            Some([word]) => word,
            None => return,
        },
        Kind::Arp => return,
    };
    scratch.fragment = FragmentKey {
        src: scratch.packet.src,
        dst: scratch.packet.dst,
        id,
        proto: scratch.packet.proto as u32,
    };
    if scratch.packet.has(flags::PORTS) {
        scratch.fragment_ports =
            FragmentPorts { src_port: scratch.packet.src_port, dst_port: scratch.packet.dst_port };
        scratch.new_fragment = true;
    } else if scratch.packet.has(flags::LATER_FRAGMENT)
        && let Some(ports) = host.fragment(&scratch.fragment)
    {
        scratch.packet.src_port = ports.src_port;
        scratch.packet.dst_port = ports.dst_port;
        scratch.packet.flags |= flags::PORTS;
    }
}
