//! The one address type: 16 bytes, IPv4 as v4-mapped IPv6 (RFC 4291 section 2.5.5.2).

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::assert_layout;

/// An IPv4 or IPv6 address in 16 bytes, network byte order; IPv4 is `::ffff:a.b.c.d`.
///
/// Kept as four 32-bit words (each in network byte order, as loaded from a packet) because BPF compares and
/// copies words, and a 4-byte alignment lets it stand anywhere in a key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Addr {
    /// Words in network byte order: `words[0]` holds the first four octets as they are in memory.
    pub words: [u32; 4],
}
assert_layout!(Addr, 16);

/// The third word of a v4-mapped address, in network byte order.
const V4_MARK: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// `::`, the unspecified IPv6 address.
    pub const UNSPECIFIED: Self = Self { words: [0; 4] };

    /// From the four octets of an IPv4 header field, as a word in network byte order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self { words: [0, 0, V4_MARK, word] }
    }

    /// From the four words of an IPv6 header field, each in network byte order.
    #[inline(always)]
    pub const fn from_v6_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// Whether this is a v4-mapped address, so an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == V4_MARK
    }

    /// Whether this is an IPv6 link-local unicast address (`fe80::/10`, RFC 4291 section 2.5.6).
    #[inline(always)]
    pub const fn is_v6_link_local(&self) -> bool {
        u32::from_be(self.words[0]) & 0xffc0_0000 == 0xfe80_0000
    }

    /// Whether this is an IPv6 multicast address (`ff00::/8`).
    #[inline(always)]
    pub const fn is_v6_multicast(&self) -> bool {
        u32::from_be(self.words[0]) >> 24 == 0xff
    }

    /// Whether this is IPv4 multicast (`224.0.0.0/4`) or the limited broadcast address.
    #[inline(always)]
    pub const fn is_v4_multicast_or_broadcast(&self) -> bool {
        self.is_v4() && u32::from_be(self.words[3]) >> 28 >= 0xe
    }

    /// The IPv4 address as a word in network byte order; meaningful only when [`Addr::is_v4`].
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    /// The 16 octets.
    pub const fn octets(&self) -> [u8; 16] {
        let mut out = [0; 16];
        let mut i = 0;
        while i < 16 {
            out[i] = self.words[i / 4].to_ne_bytes()[i % 4];
            i += 1;
        }
        out
    }

    /// Length of `prefix` of this address's family as a length over the 16 bytes: an IPv4 /24 is a /120.
    pub const fn prefix_len(&self, prefix: u8) -> u32 {
        if self.is_v4() { prefix as u32 + 96 } else { prefix as u32 }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(ip.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        let o = ip.octets();
        let word = |i: usize| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
        Self::from_v6_words([word(0), word(4), word(8), word(12)])
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        if addr.is_v4() {
            IpAddr::V4(Ipv4Addr::from(addr.v4_word().to_ne_bytes()))
        } else {
            IpAddr::V6(Ipv6Addr::from(addr.octets()))
        }
    }
}

impl core::fmt::Debug for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

impl core::fmt::Display for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use super::*;

    #[test]
    fn addresses_survive_the_round_trip() {
        for text in ["10.244.1.5", "0.0.0.0", "255.255.255.255", "fd00:10:244::5", "::", "::1", "fe80::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Addr::from(ip)).to_string(), text);
        }
    }

    #[test]
    fn families_and_scopes_are_told_apart() {
        let addr = |t: &str| Addr::from(t.parse::<IpAddr>().unwrap());
        assert!(addr("0.0.0.0").is_v4() && !addr("::").is_v4());
        assert!(addr("fe80::1").is_v6_link_local() && !addr("fd00::1").is_v6_link_local());
        assert!(addr("ff02::1").is_v6_multicast() && !addr("fe80::1").is_v6_multicast());
        assert!(addr("224.0.0.1").is_v4_multicast_or_broadcast());
        assert!(addr("255.255.255.255").is_v4_multicast_or_broadcast());
        assert!(!addr("10.0.0.1").is_v4_multicast_or_broadcast());
        assert!(!addr("ff02::1").is_v4_multicast_or_broadcast());
    }

    #[test]
    fn an_ipv4_prefix_is_96_bits_longer() {
        assert_eq!(Addr::from(Ipv4Addr::new(10, 0, 0, 0)).prefix_len(24), 120);
        assert_eq!(Addr::from(Ipv6Addr::UNSPECIFIED).prefix_len(0), 0);
    }
}
