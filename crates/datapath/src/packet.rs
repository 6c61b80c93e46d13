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
    // The Ethernet header and two bytes of what follows, which every packet has.
    let [_, w1, w2, w3] = bytes.load::<4>(0).ok_or(Reason::Malformed)?;
    let [_, _, m0, m1] = w1.to_ne_bytes();
    let [m2, m3, m4, m5] = w2.to_ne_bytes();
    out.src_mac = [m0, m1, m2, m3, m4, m5];
    out.l3_len = bytes.len().saturating_sub(ETH_LEN as u32);
    // What a kind of packet may leave unset; the rest is written for every packet.
    out.src_port = 0;
    out.dst_port = 0;
    out.tcp_flags = 0;
    out.flags = 0;
    match (u32::from_be(w3) >> 16) as u16 {
        ethertype::IPV4 => parse_v4(bytes, out),
        ethertype::IPV6 => parse_v6(bytes, out),
        ethertype::ARP => parse_arp(bytes, out),
        _ => Err(Reason::UnsupportedProtocol),
    }
}

#[inline(always)]
fn parse_v4(bytes: &impl Bytes, out: &mut Packet) -> Result<(), Reason> {
    let [w0, w1, w2, src, dst] = bytes.load::<5>(ETH_LEN).ok_or(Reason::Malformed)?;
    let first = w0.to_ne_bytes()[0];
    let header_len = (first & 0x0f) as u16 * 4;
    // The header's own length is within the total length, and that within what arrived (which may be padded).
    // Linux' "BIG TCP" writes 0 where a segmentation super-packet is too long for the field.
    let total_len = u32::from_be(w0) & 0xffff;
    let is_big = total_len == 0 && out.l3_len > 0xffff;
    let fits = total_len >= header_len as u32 && total_len <= out.l3_len;
    if first >> 4 != 4 || header_len < 20 || !(fits || is_big) {
        return Err(Reason::Malformed);
    }
    out.kind = Kind::V4;
    out.src = Addr::from_v4_word(src);
    out.dst = Addr::from_v4_word(dst);
    let [ttl, protocol, _, _] = w2.to_ne_bytes();
    out.ttl = ttl;
    out.proto = protocol;
    out.l4_offset = ETH_LEN as u16 + header_len;
    let fragment = u32::from_be(w1) as u16;
    if fragment & 0x1fff != 0 {
        out.flags |= flags::FRAGMENT | flags::LATER_FRAGMENT;
        return Ok(());
    }
    if fragment & 0x2000 != 0 {
        out.flags |= flags::FRAGMENT;
    }
    if header_len == 20 {
        parse_l4::<_, { ETH_LEN + 20 }>(bytes, out)
    } else {
        parse_l4::<_, FAR>(bytes, out)
    }
}

#[inline(never)]
fn parse_v6(bytes: &impl Bytes, out: &mut Packet) -> Result<(), Reason> {
    let [w0, w1] = bytes.load::<2>(ETH_LEN).ok_or(Reason::Malformed)?;
    // A payload longer than what arrived; zero stands for a jumbogram or a segmentation offload (RFC 2675).
    let payload_len = u32::from_be(w1) >> 16;
    if w0.to_ne_bytes()[0] >> 4 != 6 || payload_len + 40 > out.l3_len {
        return Err(Reason::Malformed);
    }
    out.kind = Kind::V6;
    out.src = Addr::from_v6_words(bytes.load::<4>(ETH_LEN + 8).ok_or(Reason::Malformed)?);
    out.dst = Addr::from_v6_words(bytes.load::<4>(ETH_LEN + 24).ok_or(Reason::Malformed)?);
    if out.src.is_v4() || out.dst.is_v4() {
        return Err(Reason::MappedAddress);
    }
    let [_, _, next, hop_limit] = w1.to_ne_bytes();
    out.ttl = hop_limit;
    if is_extension(next) {
        return parse_extensions(bytes, next, out);
    }
    out.proto = next;
    out.l4_offset = ETH_LEN as u16 + 40;
    parse_l4::<_, { ETH_LEN + 40 }>(bytes, out)
}

/// Whether a "next header" is an extension header that is walked: hop-by-hop, routing, fragment, authentication,
/// destination options.
#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(next, 0 | 43 | 44 | 51 | 60)
}

#[inline(always)]
fn parse_extensions(bytes: &impl Bytes, first: u8, out: &mut Packet) -> Result<(), Reason> {
    let mut next = first;
    let mut offset = ETH_LEN as u16 + 40;
    let mut walked = 0;
    while walked < MAX_EXTENSIONS {
        if !is_extension(next) {
            break;
        }
        let [word] = bytes.load_far::<1>(offset as usize).ok_or(Reason::Malformed)?;
        let [following, len, high, low] = word.to_ne_bytes();
        match next {
            // Fragment header (RFC 8200 section 4.5): 8 bytes, offset in the upper 13 bits of the second half.
            44 => {
                offset += 8;
                out.flags |= flags::FRAGMENT;
                if u16::from_be_bytes([high, low]) & 0xfff8 != 0 {
                    out.flags |= flags::LATER_FRAGMENT;
                    next = following;
                    break;
                }
            }
            // Authentication header (RFC 4302 section 2.2): length in 4 bytes beyond the first 8.
            51 => offset += (len as u16 + 2) * 4,
            // Hop-by-hop, routing, destination options: length in 8 bytes beyond the first 8.
            _ => offset += (len as u16 + 1) * 8,
        }
        next = following;
        walked += 1;
    }
    out.proto = next;
    out.l4_offset = offset;
    if out.has(flags::LATER_FRAGMENT) {
        return Ok(());
    }
    if is_extension(next) {
        return Err(Reason::Malformed);
    }
    parse_l4::<_, FAR>(bytes, out)
}

/// Stands for a transport header that is not where it usually is, but at [`Packet::l4_offset`].
const FAR: usize = 0;

/// Words of the transport header.
#[inline(always)]
fn load_l4<B: Bytes, const AT: usize, const N: usize>(bytes: &B, out: &Packet) -> Result<[u32; N], Reason> {
    let words = if AT == FAR { bytes.load_far(out.l4_offset as usize) } else { bytes.load(AT) };
    words.ok_or(Reason::Malformed)
}

/// Ports, TCP flags, ICMP kinds. A transport that is not known has no ports and is forwarded untracked.
#[inline(always)]
fn parse_l4<B: Bytes, const AT: usize>(bytes: &B, out: &mut Packet) -> Result<(), Reason> {
    match out.proto {
        proto::TCP => {
            let [w0, _, _, w3] = load_l4::<B, AT, 4>(bytes, out)?;
            ports(out, w0);
            out.tcp_flags = w3.to_ne_bytes()[1];
        }
        proto::UDP | proto::SCTP => {
            let [w0] = load_l4::<B, AT, 1>(bytes, out)?;
            ports(out, w0);
        }
        proto::ICMP if matches!(out.kind, Kind::V4) => {
            let [w0, w1] = load_l4::<B, AT, 2>(bytes, out)?;
            match w0.to_ne_bytes()[0] {
                // Echo reply and echo.
                0 | 8 => echo(out, w1),
                // Unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792).
                3 | 4 | 5 | 11 | 12 => out.flags |= flags::ICMP_ERROR,
                _ => {}
            }
        }
        proto::ICMPV6 if matches!(out.kind, Kind::V6) => {
            let [w0, w1] = load_l4::<B, AT, 2>(bytes, out)?;
            match w0.to_ne_bytes()[0] {
                128 | 129 => echo(out, w1),
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
fn ports(out: &mut Packet, word: u32) {
    let [s0, s1, d0, d1] = word.to_ne_bytes();
    out.src_port = u16::from_be_bytes([s0, s1]);
    out.dst_port = u16::from_be_bytes([d0, d1]);
    out.flags |= flags::PORTS;
}

/// The identifier of an echo stands for both ports.
#[inline(always)]
fn echo(out: &mut Packet, word: u32) {
    let [i0, i1, _, _] = word.to_ne_bytes();
    out.src_port = u16::from_be_bytes([i0, i1]);
    out.dst_port = out.src_port;
    out.flags |= flags::PORTS;
}

/// ARP for IPv4 over Ethernet (RFC 826): the sender's and the target's protocol addresses.
#[inline(never)]
fn parse_arp(bytes: &impl Bytes, out: &mut Packet) -> Result<(), Reason> {
    let [w0, w1, _, w3, w4, _, target] = bytes.load::<7>(ETH_LEN).ok_or(Reason::Malformed)?;
    // Ethernet (1), IPv4 (0x0800), address lengths 6 and 4.
    if u32::from_be(w0) != 0x0001_0800 || u32::from_be(w1) >> 16 != 0x0604 {
        return Err(Reason::Malformed);
    }
    let [_, _, s0, s1] = w3.to_ne_bytes();
    let [s2, s3, _, _] = w4.to_ne_bytes();
    out.kind = Kind::Arp;
    out.proto = 0;
    out.ttl = 0;
    out.l4_offset = 0;
    out.src = Addr::from_v4_word(u32::from_ne_bytes([s0, s1, s2, s3]));
    out.dst = Addr::from_v4_word(target);
    Ok(())
}
