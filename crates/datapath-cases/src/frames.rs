//! Frames for the cases, written by a library that shares no code with the parser under test.

use std::net::IpAddr;

use etherparse::PacketBuilder;
use podway_abi::Mac;

/// Payload of every frame that carries one.
pub const PAYLOAD: &[u8] = b"podway";
/// TTL of every IP frame, unless a case says otherwise.
pub const TTL: u8 = 64;

/// What the network layer carries.
#[derive(Clone, Copy, Debug)]
pub enum L4 {
    /// UDP from and to these ports.
    Udp(u16, u16),
    /// TCP from and to these ports; a SYN.
    Syn(u16, u16),
    /// ICMP or ICMPv6 echo request with this identifier.
    Echo(u16),
    /// Nothing: an unknown protocol (253, for experiments: RFC 3692).
    Unknown,
}

/// An IP frame.
///
/// # Panics
/// When the addresses are of different families or no addresses: the case is wrong then.
pub fn ip(macs: (Mac, Mac), src: &str, dst: &str, ttl: u8, l4: L4) -> Vec<u8> {
    let eth = PacketBuilder::ethernet2(macs.0, macs.1);
    let parse = |t: &str| t.parse::<IpAddr>().expect("the cases hold valid addresses");
    let (step, v6) = match (parse(src), parse(dst)) {
        (IpAddr::V4(s), IpAddr::V4(d)) => (eth.ipv4(s.octets(), d.octets(), ttl), false),
        (IpAddr::V6(s), IpAddr::V6(d)) => (eth.ipv6(s.octets(), d.octets(), ttl), true),
        _ => panic!("{src} and {dst} are of different families"),
    };
    let mut out = Vec::new();
    let written = match l4 {
        L4::Udp(s, d) => step.udp(s, d).write(&mut out, PAYLOAD),
        L4::Syn(s, d) => step.tcp(s, d, 1, 1000).syn().write(&mut out, PAYLOAD),
        L4::Echo(id) if v6 => step.icmpv6_echo_request(id, 1).write(&mut out, PAYLOAD),
        L4::Echo(id) => step.icmpv4_echo_request(id, 1).write(&mut out, PAYLOAD),
        L4::Unknown => step.write(&mut out, 253.into(), PAYLOAD),
    };
    written.expect("a frame fits into memory");
    out
}

/// An ARP request (RFC 826).
pub fn arp(macs: (Mac, Mac), sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(macs.1);
    out.extend(macs.0);
    out.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    out.extend(macs.0);
    out.extend(sender);
    out.extend([0; 6]);
    out.extend(target);
    out
}

/// A neighbour solicitation (RFC 4861 section 4.3) without options, checksum left zero.
///
/// # Panics
/// On text that is no IPv6 address.
pub fn neighbour_solicitation(macs: (Mac, Mac), src: &str, dst: &str) -> Vec<u8> {
    let mut out = ip(macs, src, dst, 255, L4::Echo(0));
    let l4 = 14 + 40;
    out.truncate(l4);
    out.extend([135, 0, 0, 0, 0, 0, 0, 0]);
    out.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    out[14 + 5] = 24;
    out
}

/// The second fragment of an IPv4 packet: offset 185 × 8 bytes, no transport header of its own.
pub fn later_fragment(macs: (Mac, Mac), src: &str, dst: &str) -> Vec<u8> {
    let mut out = ip(macs, src, dst, TTL, L4::Unknown);
    out[14 + 9] = 17;
    out[14 + 6..14 + 8].copy_from_slice(&185u16.to_be_bytes());
    write_ipv4_checksum(&mut out);
    out
}

/// Writes the header checksum of the IPv4 header behind the Ethernet header anew (RFC 1071).
pub fn write_ipv4_checksum(frame: &mut [u8]) {
    frame[14 + 10..14 + 12].fill(0);
    let sum = ipv4_checksum(frame);
    frame[14 + 10..14 + 12].copy_from_slice(&sum.to_be_bytes());
}

/// One's complement of the one's complement sum over the IPv4 header behind the Ethernet header; 0 when the
/// header with its checksum is right.
pub fn ipv4_checksum(frame: &[u8]) -> u16 {
    let len = usize::from(frame[14] & 0x0f) * 4;
    let mut sum: u32 =
        frame[14..14 + len].chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
