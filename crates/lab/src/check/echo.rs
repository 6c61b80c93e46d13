//! ICMP echo (RFC 792) and ICMPv6 echo (RFC 4443 section 4) from one namespace to many targets, through one raw
//! socket per family.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

use super::{Outcome, PATIENCE, micros};

/// When requests that are not answered yet are sent again.
const AGAIN: [Duration; 3] = [Duration::ZERO, Duration::from_millis(300), Duration::from_millis(1000)];
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
/// A whole number of words, so that the checksum needs no padding.
const PAYLOAD: &[u8; 16] = b"podway lab check";

/// Targets and the sockets to reach them.
pub(super) struct Pinger {
    targets: Vec<IpAddr>,
    /// Raw sockets. The standard library's datagram type sends and receives on them just the same.
    v4: Option<std::net::UdpSocket>,
    v6: Option<std::net::UdpSocket>,
    id: u16,
}

impl Pinger {
    /// Makes the sockets in the calling thread's namespace.
    pub(super) fn open(targets: &[IpAddr]) -> io::Result<Self> {
        let socket = |v4: bool, domain, protocol| -> io::Result<Option<std::net::UdpSocket>> {
            if !targets.iter().any(|a| a.is_ipv4() == v4) {
                return Ok(None);
            }
            let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
            socket.set_nonblocking(true)?;
            Ok(Some(OwnedFd::from(socket).into()))
        };
        // Other programs ping as well; theirs have other identifiers.
        let [_, _, high, low] = std::process::id().to_be_bytes();
        Ok(Self {
            v4: socket(true, Domain::IPV4, Protocol::ICMPV4)?,
            v6: socket(false, Domain::IPV6, Protocol::ICMPV6)?,
            targets: targets.to_vec(),
            id: u16::from_be_bytes([high, low]),
        })
    }

    /// Sends to all targets and waits for the answers, in the order of the targets.
    pub(super) async fn run(self) -> io::Result<Vec<Outcome>> {
        let v4 = self.v4.map(UdpSocket::from_std).transpose()?;
        let v6 = self.v6.map(UdpSocket::from_std).transpose()?;
        let mut out: Vec<Option<Outcome>> = vec![None; self.targets.len()];
        let begun = Instant::now();
        let mut sent = vec![begun; self.targets.len()];
        let mut tries = AGAIN.iter().peekable();
        while out.iter().any(Option::is_none) && begun.elapsed() < PATIENCE {
            if tries.next_if(|at| begun.elapsed() >= **at).is_some() {
                for (index, target) in self.targets.iter().enumerate().filter(|(i, _)| out[*i].is_none()) {
                    let Some(socket) = (if target.is_ipv4() { &v4 } else { &v6 }) else { continue };
                    let packet = request(target.is_ipv4(), self.id, index);
                    sent[index] = Instant::now();
                    // A target without a route fails at once; a later try may still succeed, so it is not final.
                    let _ = socket.send_to(&packet, SocketAddr::new(*target, 0)).await;
                }
            }
            let until = tries.peek().map_or(PATIENCE, |at| **at).saturating_sub(begun.elapsed());
            let (mut first, mut second) = ([0; 256], [0; 256]);
            let received = tokio::select! {
                received = receive(&v4, &mut first) => received.map(|(n, from)| (true, from, first[..n].to_vec())),
                received = receive(&v6, &mut second) => received.map(|(n, from)| (false, from, second[..n].to_vec())),
                () = tokio::time::sleep(until) => continue,
            };
            if let Some((v4, from, packet)) = received
                && let Some(index) = reply(v4, self.id, &packet)
                && self.targets.get(index) == Some(&from)
                && out[index].is_none()
            {
                out[index] = Some(Outcome::Ok { micros: micros(sent[index]) });
            }
        }
        let silent = || Outcome::Failed { cause: format!("no echo reply in {} ms", PATIENCE.as_millis()) };
        Ok(out.into_iter().map(|o| o.unwrap_or_else(silent)).collect())
    }
}

/// `None` is an error of an earlier send that the kernel reports late.
async fn receive(socket: &Option<UdpSocket>, buffer: &mut [u8]) -> Option<(usize, IpAddr)> {
    match socket {
        Some(socket) => socket.recv_from(buffer).await.ok().map(|(n, from)| (n, from.ip())),
        None => std::future::pending().await,
    }
}

fn request(v4: bool, id: u16, index: usize) -> Vec<u8> {
    let [.., high, low] = index.to_be_bytes();
    let [id_high, id_low] = id.to_be_bytes();
    let kind = if v4 { ECHO_REQUEST } else { ECHO_REQUEST_V6 };
    let mut packet = vec![kind, 0, 0, 0, id_high, id_low, high, low];
    packet.extend_from_slice(PAYLOAD);
    if v4 {
        // The kernel fills in the checksum of ICMPv6 only (RFC 3542 section 3.1).
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    packet
}

/// The index that a reply to one of our requests carries. IPv4 raw sockets deliver the IP header as well.
fn reply(v4: bool, id: u16, packet: &[u8]) -> Option<usize> {
    let message = if v4 {
        let header = usize::from(packet.first()? & 0x0f) * 4;
        packet.get(header..)?
    } else {
        packet
    };
    let kind = if v4 { ECHO_REPLY } else { ECHO_REPLY_V6 };
    let [k, 0, _, _, id_high, id_low, high, low, payload @ ..] = message else { return None };
    (*k == kind && u16::from_be_bytes([*id_high, *id_low]) == id && payload == PAYLOAD)
        .then(|| usize::from(u16::from_be_bytes([*high, *low])))
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
    let folded = sum as u16;
    !folded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_fit_each_other() {
        for v4 in [true, false] {
            let mut packet = request(v4, 0x1234, 300);
            assert_eq!(reply(v4, 0x1234, &packet), None, "a request is no reply");
            packet[0] = if v4 { ECHO_REPLY } else { ECHO_REPLY_V6 };
            if v4 {
                assert_eq!(checksum(&request(v4, 0x1234, 300)), 0);
                let mut with_header = vec![0x45; 1];
                with_header.resize(20, 0);
                with_header.extend(packet);
                packet = with_header;
            }
            assert_eq!(reply(v4, 0x1234, &packet), Some(300));
            assert_eq!(reply(v4, 0x1235, &packet), None);
            for cut in 0..packet.len() {
                assert_eq!(reply(v4, 0x1234, &packet[..cut]), None);
            }
        }
    }
}
