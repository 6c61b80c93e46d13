//! Words that Services and EndpointSlices share: protocols, families, addresses as old objects spell them.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

/// Transport protocol of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP, IP protocol 6.
    Tcp,
    /// UDP, IP protocol 17.
    Udp,
    /// SCTP, IP protocol 132.
    Sctp,
}

impl Protocol {
    /// The protocol of this name as the API writes it, such as `TCP`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "TCP" => Some(Protocol::Tcp),
            "UDP" => Some(Protocol::Udp),
            "SCTP" => Some(Protocol::Sctp),
            _ => None,
        }
    }

    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub const fn of(addr: &IpAddr) -> Self {
        if addr.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The family of a range.
    pub const fn of_net(net: &IpNet) -> Self {
        if matches!(net, IpNet::V4(_)) { Family::V4 } else { Family::V6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// An address as Kubernetes objects may spell it.
///
/// Objects stored before the API validated strictly may have leading zeros in IPv4 (decimal, not octal) and IPv4
/// addresses in IPv6 clothes; both become what they mean.
pub(crate) fn address(text: &str) -> Option<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(addr) => Some(addr.to_canonical()),
        Err(_) => legacy_ipv4(text).map(IpAddr::V4),
    }
}

fn legacy_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || part.len() > 16 || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        *octet = part
            .trim_start_matches('0')
            .parse()
            .or_else(|e| {
                // Nothing but zeros.
                if part.bytes().all(|b| b == b'0') { Ok(0) } else { Err(e) }
            })
            .ok()?;
    }
    parts.next().is_none().then_some(octets.into())
}

/// A range as Kubernetes objects may spell it: white space around it, leading zeros, host bits set.
pub(crate) fn range(text: &str) -> Option<IpNet> {
    let (addr, prefix) = text.trim().split_once('/')?;
    let addr = addr.parse().ok().or_else(|| legacy_ipv4(addr).map(IpAddr::V4))?;
    if prefix.is_empty() || !prefix.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits = prefix.trim_start_matches('0');
    let prefix: u8 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    Some(IpNet::new(addr, prefix).ok()?.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_spellings_mean_what_they_meant() {
        for (text, expected) in [
            ("172.30.0.041", Some("172.30.0.41")),
            ("10.180.00.001", Some("10.180.0.1")),
            ("::ffff:1.2.3.4", Some("1.2.3.4")),
            ("2001:db8:0:0::1", Some("2001:db8::1")),
            ("1.2.3", None),
            ("1.2.3.4.5", None),
            ("1.2.3.256", None),
            ("1.2.3.-4", None),
            (" 1.2.3.4", None),
            ("", None),
        ] {
            assert_eq!(address(text), expected.map(|e| e.parse().unwrap()), "{text}");
        }
        for (text, expected) in [
            ("203.0.113.000/025", Some("203.0.113.0/25")),
            (" 10.1.2.0/28", Some("10.1.2.0/28")),
            ("10.1.2.7/28\t", Some("10.1.2.0/28")),
            ("0.0.0.0/00", Some("0.0.0.0/0")),
            ("::/0", Some("::/0")),
            ("10.0.0.0/33", None),
            ("10.0.0.0", None),
            ("10.0.0.0/+8", None),
        ] {
            assert_eq!(range(text), expected.map(|e| e.parse().unwrap()), "{text}");
        }
    }
}
