//! The packet as the decisions see it.
//!
//! Parsing reads at most: Ethernet, one IPv4 header with options or one IPv6 header with a bounded number of
//! extension headers (RFC 8200 section 4), and the first bytes of TCP, UDP, SCTP or ICMP.

use podway_abi::{Addr, Mac, Reason};

use crate::Bytes;

/// Bytes of an Ethernet header without tags.
pub const ETH_LEN: usize = 14;
/// Most IPv6 extension headers that are walked; a packet with more is malformed to us. Linux' own default
/// limit is 8 options per header; chains longer than this do not occur between pods.
pub const MAX_EXTENSIONS: usize = 4;

/// EtherTypes (IEEE 802 numbers), host byte order.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// IP protocol numbers.
pub mod proto {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// TCP flag bits (RFC 9293 section 3.1).
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 1 << 0;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 1 << 1;
    /// Reset the connection.
    pub const RST: u8 = 1 << 2;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 1 << 4;
}

/// What a packet is, before ports and addresses.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// ARP.
    Arp,
}

/// Bits of [`Packet::flags`].
pub mod flags {
    /// Ports (or the echo identifier) were read: the packet belongs to a flow.
    pub const PORTS: u8 = 1 << 0;
    /// A fragment other than the first: it has no ports of its own.
    pub const LATER_FRAGMENT: u8 = 1 << 1;
    /// Part of a fragmented packet, the first fragment included.
    pub const FRAGMENT: u8 = 1 << 2;
    /// ICMP error message: it carries the head of another packet.
    pub const ICMP_ERROR: u8 = 1 << 3;
    /// Neighbour or multicast listener discovery (RFC 4861, RFC 2710, RFC 3810).
    pub const LINK_CONTROL: u8 = 1 << 4;
}

/// The fields of a packet that decisions use; addresses of an ARP packet are its sender's and target's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Bytes from the network layer up.
    pub l3_len: u32,
    /// Source port in host byte order; the identifier of an ICMP echo.
    pub src_port: u16,
    /// Destination port in host byte order; the identifier of an ICMP echo.
    pub dst_port: u16,
    /// Where the transport header starts, from the Ethernet header on.
    pub l4_offset: u16,
    /// IP protocol number.
    pub proto: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TCP flags, see [`tcp`].
    pub tcp_flags: u8,
    /// See [`flags`].
    pub flags: u8,
    /// Link-layer source.
    pub src_mac: Mac,
    /// What it is.
    pub kind: Kind,
}

impl Packet {
    /// A packet with nothing in it.
    pub const EMPTY: Self = Self {
        src: Addr::UNSPECIFIED,
        dst: Addr::UNSPECIFIED,
        l3_len: 0,
        src_port: 0,
        dst_port: 0,
        l4_offset: 0,
        proto: 0,
        ttl: 0,
        tcp_flags: 0,
        flags: 0,
        src_mac: [0; 6],
        kind: Kind::V4,
    };

    /// Whether all bits of `mask` are set in [`Packet::flags`].
    #[inline(always)]
    pub const fn has(&self, mask: u8) -> bool {
        self.flags & mask == mask
    }
}

/// Reads a packet into `out`.
///
/// # Errors
/// [`Reason::Malformed`] for a cut or contradictory header, [`Reason::MappedAddress`] for a v4-mapped
/// address in an IPv6 header, [`Reason::UnsupportedProtocol`] for anything but IPv4, IPv6 and ARP.
#[inline(always)]
pub fn parse(bytes: &impl Bytes, out: &mut Packet) -> Result<(), Reason> {
    *out = Packet::EMPTY;
    let eth: [u8; ETH_LEN] = bytes.load(0).ok_or(Reason::Malformed)?;
    out.src_mac = [eth[6], eth[7], eth[8], eth[9], eth[10], eth[11]];
    out.l3_len = bytes.len().saturating_sub(ETH_LEN as u32);
    match u16::from_be_bytes([eth[12], eth[13]]) {
        ethertype::IPV4 => parse_v4(bytes, out),
        ethertype::IPV6 => parse_v6(bytes, out),
        ethertype::ARP => parse_arp(bytes, out),
        _ => Err(Reason::UnsupportedProtocol),
    }
}

/// A word in the order in which it lies in memory.
#[inline(always)]
const fn word(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_ne_bytes([a, b, c, d])
}

#[inline(always)]
fn parse_v4(bytes: &impl Bytes, out: &mut Packet) -> Result<(), Reason> {
    let h: [u8; 20] = bytes.load(ETH_LEN).ok_or(Reason::Malformed)?;
    let header_len = (h[0] & 0x0f) as u16 * 4;
    if h[0] >> 4 != 4 || header_len < 20 {
        return Err(Reason::Malformed);
    }
    out.kind = Kind::V4;
    out.src = Addr::from_v4_word(word(h[12], h[13], h[14], h[15]));
    out.dst = Addr::from_v4_word(word(h[16], h[17], h[18], h[19]));
    out.proto = h[9];
    out.ttl = h[8];
    out.l4_offset = ETH_LEN as u16 + header_len;
    let fragment = u16::from_be_bytes([h[6], h[7]]);
    if fragment & 0x1fff != 0 {
        out.flags |= flags::FRAGMENT | flags::LATER_FRAGMENT;
        return Ok(());
    }
    if fragment & 0x2000 != 0 {
        out.flags |= flags::FRAGMENT;
    }
    parse_l4(bytes, out)
}

#[inline(always)]
fn parse_v6(bytes: &impl Bytes, out: &mut Packet) -> Result<(), Reason> {
    let h: [u8; 40] = bytes.load(ETH_LEN).ok_or(Reason::Malformed)?;
    if h[0] >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    out.kind = Kind::V6;
    out.ttl = h[7];
    out.src = Addr::from_v6_words([
        word(h[8], h[9], h[10], h[11]),
        word(h[12], h[13], h[14], h[15]),
        word(h[16], h[17], h[18], h[19]),
        word(h[20], h[21], h[22], h[23]),
    ]);
    out.dst = Addr::from_v6_words([
        word(h[24], h[25], h[26], h[27]),
        word(h[28], h[29], h[30], h[31]),
        word(h[32], h[33], h[34], h[35]),
        word(h[36], h[37], h[38], h[39]),
    ]);
    if out.src.is_v4() || out.dst.is_v4() {
        return Err(Reason::MappedAddress);
    }
    let mut next = h[6];
    let mut offset = ETH_LEN as u16 + 40;
    let mut walked = 0;
    while walked < MAX_EXTENSIONS {
        match next {
            // Hop-by-hop, routing, destination options: {next, length in 8 bytes beyond the first 8}.
            0 | 43 | 60 => {
                let ext: [u8; 2] = bytes.load(offset as usize).ok_or(Reason::Malformed)?;
                next = ext[0];
                offset += (ext[1] as u16 + 1) * 8;
            }
            // Fragment header (RFC 8200 section 4.5): 8 bytes, offset in the upper 13 bits of the second word.
            44 => {
                let ext: [u8; 4] = bytes.load(offset as usize).ok_or(Reason::Malformed)?;
                next = ext[0];
                offset += 8;
                out.flags |= flags::FRAGMENT;
                if u16::from_be_bytes([ext[2], ext[3]]) & 0xfff8 != 0 {
                    out.flags |= flags::LATER_FRAGMENT;
                    break;
                }
            }
            // Authentication header (RFC 4302 section 2.2): length in 4 bytes beyond the first 8.
            51 => {
                let ext: [u8; 2] = bytes.load(offset as usize).ok_or(Reason::Malformed)?;
                next = ext[0];
                offset += (ext[1] as u16 + 2) * 4;
            }
            _ => break,
        }
        walked += 1;
    }
    out.proto = next;
    out.l4_offset = offset;
    if out.has(flags::LATER_FRAGMENT) {
        return Ok(());
    }
    if matches!(next, 0 | 43 | 44 | 51 | 60) {
        return Err(Reason::Malformed);
    }
    parse_l4(bytes, out)
}

/// Ports, TCP flags, ICMP kinds. A transport that is not known has no ports and is forwarded untracked.
#[inline(always)]
fn parse_l4(bytes: &impl Bytes, out: &mut Packet) -> Result<(), Reason> {
    let offset = out.l4_offset as usize;
    match out.proto {
        proto::TCP => {
            let h: [u8; 14] = bytes.load(offset).ok_or(Reason::Malformed)?;
            ports(out, [h[0], h[1], h[2], h[3]]);
            out.tcp_flags = h[13];
        }
        proto::UDP | proto::SCTP => {
            let h: [u8; 4] = bytes.load(offset).ok_or(Reason::Malformed)?;
            ports(out, h);
        }
        proto::ICMP if matches!(out.kind, Kind::V4) => {
            let h: [u8; 8] = bytes.load(offset).ok_or(Reason::Malformed)?;
            match h[0] {
                // Echo reply and echo: the identifier stands for both ports.
                0 | 8 => ports(out, [h[4], h[5], h[4], h[5]]),
                // Unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792).
                3 | 4 | 5 | 11 | 12 => out.flags |= flags::ICMP_ERROR,
                _ => {}
            }
        }
        proto::ICMPV6 if matches!(out.kind, Kind::V6) => {
            let h: [u8; 8] = bytes.load(offset).ok_or(Reason::Malformed)?;
            match h[0] {
                128 | 129 => ports(out, [h[4], h[5], h[4], h[5]]),
                // Error messages are those below 128 (RFC 4443 section 2.1).
                0..=127 => out.flags |= flags::ICMP_ERROR,
                // MLD query, report, done; router and neighbour discovery, redirect; MLDv2 report.
                130..=137 | 143 => out.flags |= flags::LINK_CONTROL,
                _ => {}
            }
        }
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn ports(out: &mut Packet, p: [u8; 4]) {
    out.src_port = u16::from_be_bytes([p[0], p[1]]);
    out.dst_port = u16::from_be_bytes([p[2], p[3]]);
    out.flags |= flags::PORTS;
}

/// ARP for IPv4 over Ethernet (RFC 826): the sender's and the target's protocol addresses.
#[inline(always)]
fn parse_arp(bytes: &impl Bytes, out: &mut Packet) -> Result<(), Reason> {
    let h: [u8; 28] = bytes.load(ETH_LEN).ok_or(Reason::Malformed)?;
    if h[0] != 0 || h[1] != 1 || h[2] != 8 || h[3] != 0 || h[4] != 6 || h[5] != 4 {
        return Err(Reason::Malformed);
    }
    out.kind = Kind::Arp;
    out.src = Addr::from_v4_word(word(h[14], h[15], h[16], h[17]));
    out.dst = Addr::from_v4_word(word(h[24], h[25], h[26], h[27]));
    Ok(())
}
