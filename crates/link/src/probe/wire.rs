//! The packets: a header of 16 bytes, for probes followed by zeros up to the size that is probed.
//!
//! | bytes | content |
//! |---|---|
//! | 0..4 | `PWMP` |
//! | 4 | version, 1 |
//! | 5 | 1 probe, 2 acknowledgement |
//! | 6..8 | size of the probe as an IP packet, big-endian |
//! | 8..16 | nonce of the probe, which the acknowledgement repeats |

use std::net::IpAddr;

const MAGIC: [u8; 4] = *b"PWMP";
const VERSION: u8 = 1;
const PROBE: u8 = 1;
const ACKNOWLEDGEMENT: u8 = 2;

/// Bytes of the header.
pub const HEADER: usize = 16;

/// What a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Asks for an acknowledgement.
    Probe,
    /// The probe with this nonce arrived whole.
    Acknowledgement,
}

/// The header of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// What it is.
    pub kind: Kind,
    /// Size of the probe as an IP packet, IP and UDP header included.
    pub size: u16,
    /// Which probe it is.
    pub nonce: u64,
}

/// IP and UDP header, in bytes, of a packet to this address (no options, no extension headers).
pub fn overhead(address: IpAddr) -> u16 {
    if address.is_ipv4() { 20 + 8 } else { 40 + 8 }
}

impl Packet {
    /// Reads a packet that came from `from`. None when it is not ours, or when a probe is not as long as it
    /// says it was when it was sent.
    pub fn decode(datagram: &[u8], from: IpAddr) -> Option<Self> {
        let (header, _) = datagram.split_first_chunk::<HEADER>()?;
        let [m0, m1, m2, m3, version, kind, s0, s1, nonce @ ..] = *header;
        if [m0, m1, m2, m3] != MAGIC || version != VERSION {
            return None;
        }
        let size = u16::from_be_bytes([s0, s1]);
        let kind = match kind {
            PROBE if datagram.len() + usize::from(overhead(from)) == usize::from(size) => Kind::Probe,
            ACKNOWLEDGEMENT if datagram.len() == HEADER => Kind::Acknowledgement,
            _ => return None,
        };
        Some(Self { kind, size, nonce: u64::from_be_bytes(nonce) })
    }

    /// Writes the packet as it goes to `to` into `buffer`, replacing what is in it.
    pub fn encode(&self, to: IpAddr, buffer: &mut Vec<u8>) {
        buffer.clear();
        buffer.extend_from_slice(&MAGIC);
        buffer.extend_from_slice(&[VERSION, if self.kind == Kind::Probe { PROBE } else { ACKNOWLEDGEMENT }]);
        buffer.extend_from_slice(&self.size.to_be_bytes());
        buffer.extend_from_slice(&self.nonce.to_be_bytes());
        if self.kind == Kind::Probe {
            buffer.resize(usize::from(self.size.saturating_sub(overhead(to))).max(HEADER), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_survive_the_wire_and_have_the_size_they_say() {
        for (to, udp) in [("192.0.2.1", 1472), ("2001:db8::1", 1452)] {
            let to: IpAddr = to.parse().unwrap();
            let mut buffer = Vec::new();
            let probe = Packet { kind: Kind::Probe, size: 1500, nonce: 0x0102_0304_0506_0708 };
            probe.encode(to, &mut buffer);
            assert_eq!(buffer.len(), udp);
            assert_eq!(Packet::decode(&buffer, to), Some(probe));
            let ack = Packet { kind: Kind::Acknowledgement, ..probe };
            ack.encode(to, &mut buffer);
            assert_eq!(buffer.len(), HEADER);
            assert_eq!(Packet::decode(&buffer, to), Some(ack));
        }
    }

    #[test]
    fn what_is_not_ours_is_not_taken() {
        let from: IpAddr = "192.0.2.1".parse().unwrap();
        let mut good = Vec::new();
        Packet { kind: Kind::Probe, size: 128, nonce: 7 }.encode(from, &mut good);
        let change = |at: usize, to: u8| {
            let mut bad = good.clone();
            bad[at] = to;
            bad
        };
        let cases: [(&str, Vec<u8>); 7] = [
            ("empty", vec![]),
            ("short", good[..15].to_vec()),
            ("other magic", change(0, b'X')),
            ("other version", change(4, 2)),
            ("unknown kind", change(5, 3)),
            ("acknowledgement with a tail (would be reflected)", change(5, ACKNOWLEDGEMENT)),
            ("probe that lost its tail", good[..99].to_vec()),
        ];
        for (name, bad) in cases {
            assert_eq!(Packet::decode(&bad, from), None, "{name}");
        }
        assert_eq!(Packet::decode(&good, "2001:db8::1".parse().unwrap()), None, "size of the other family");
    }
}
