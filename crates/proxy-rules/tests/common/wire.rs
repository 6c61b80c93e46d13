//! A node with one wire, on the other end of which is the test: crafted packets in, and what becomes of them out.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    process::Command,
    thread,
    time::Duration,
};

use podway_link::{
    Netns,
    tap::{FRAME_MAX, Tap},
};
use podway_proxy_rules::{ServiceTable, Writer};
use podway_services::{
    Flow, Verdict,
    table::{NodeView, Protocol, TableChange},
};

const NODE: [u8; 6] = [2, 0, 0, 0, 0, 1];
const FAR: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// What became of a packet, over a number of tries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Where it went, translated.
    pub destinations: BTreeSet<(IpAddr, u16)>,
    /// Whether its source was another one then.
    pub masquerade: bool,
    pub verdict: Verdict,
    /// It went where it was sent.
    pub untouched: bool,
}

pub struct Wire {
    name: String,
    namespace: Netns,
    tap: Tap,
    next_port: u16,
}

impl Wire {
    pub fn new(name: &str, view: &NodeView) -> Self {
        let name = format!("pwt-{name}");
        let _ = Netns::delete_named(&name);
        let namespace = Netns::create_named(&name).unwrap();
        let tap = namespace.run(|| Tap::create("wire")).unwrap().unwrap();
        let wire = Self { name, namespace, tap, next_port: 10_000 };
        wire.shell(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 \
             net.ipv4.conf.default.rp_filter=0 net.ipv4.conf.wire.rp_filter=0 net.ipv4.icmp_ratelimit=0 \
             net.ipv6.icmp.ratelimit=0 net.netfilter.nf_conntrack_checksum=0 net.ipv4.conf.all.send_redirects=0 \
             net.ipv4.conf.wire.send_redirects=0 net.ipv6.conf.wire.accept_dad=0
             ip link set wire address 02:00:00:00:00:01 up
             ip addr add 169.254.9.1/30 dev wire; ip addr add fd00:9::1/64 dev wire nodad
             ip neigh add 169.254.9.2 lladdr 02:00:00:00:00:02 dev wire nud permanent
             ip neigh add fd00:9::2 lladdr 02:00:00:00:00:02 dev wire nud permanent
             ip route add default via 169.254.9.2; ip -6 route add default via fd00:9::2
             nft -f - <<X
             table inet pwt {
                counter arrived {}
                counter refused {}
                chain input {
                    type filter hook input priority 300;
                    tcp flags & rst != 0 counter name refused drop
                    icmp type destination-unreachable counter name refused drop
                    icmpv6 type destination-unreachable counter name refused drop
                    meta l4proto { tcp, udp, sctp } counter name arrived drop
                }
             }
X",
        );
        for addr in view.addresses.iter().filter(|a| !a.is_loopback()) {
            let flags = if addr.is_ipv6() { " nodad" } else { "" };
            wire.shell(&format!("ip addr add {addr} dev lo{flags}"));
        }
        wire
    }

    /// Puts a table there.
    pub fn program(
        &self,
        writer: &mut dyn Writer,
        table: &ServiceTable,
        view: &NodeView,
    ) -> Result<(), String> {
        let report = self.namespace.run(|| writer.sync(table, view)).unwrap().map_err(|e| e.to_string())?;
        assert_eq!(report.refused, []);
        Ok(())
    }

    /// Changes it.
    pub fn apply(&self, writer: &mut dyn Writer, changes: &[TableChange]) {
        let report = self.namespace.run(|| writer.apply(changes)).unwrap().unwrap();
        assert_eq!(report.refused, []);
    }

    /// Sends the first packet of a flow, a number of times from other ports.
    pub fn send(&mut self, flow: &Flow, view: &NodeView, tries: usize) -> Fate {
        let mut fate = Fate {
            destinations: BTreeSet::new(),
            masquerade: false,
            verdict: Verdict::Drop,
            untouched: false,
        };
        self.receive(&mut Vec::new());
        self.counters();
        let (mut frames, mut refused) = (Vec::new(), 0);
        for _ in 0..tries {
            self.next_port = if self.next_port > 60_000 { 10_000 } else { self.next_port + 1 };
            let packet = craft(flow, self.next_port);
            if view.addresses.contains(&flow.src) || flow.src.is_loopback() {
                let to = SocketAddr::new(flow.dst, 0);
                self.namespace
                    .run(|| {
                        let domain = socket2::Domain::for_address(to);
                        let raw = socket2::Socket::new(domain, socket2::Type::RAW, Some(255.into())).unwrap();
                        // A packet that is rejected or dropped on its way out is an error for who sends it.
                        let _ = raw.send_to(&packet, &to.into());
                    })
                    .unwrap();
            } else {
                let mut frame = [NODE, FAR].concat();
                frame.extend_from_slice(if flow.dst.is_ipv4() { &[8, 0] } else { &[0x86, 0xdd] });
                frame.extend_from_slice(&packet);
                self.tap.send(&frame).unwrap();
            }
        }
        self.receive(&mut frames);
        let mut untouched = 0;
        for frame in &frames {
            match parse(frame) {
                Some(Seen::Refusal) => refused += 1,
                Some(Seen::Packet { src, dst, port })
                    if (dst, port) == (flow.dst, flow.port) && src == flow.src =>
                {
                    untouched += 1;
                }
                Some(Seen::Packet { src, dst, port }) => {
                    fate.destinations.insert((dst, port));
                    fate.masquerade |= src != flow.src;
                    fate.verdict = Verdict::Accept;
                }
                None => {}
            }
        }
        let (arrived, refused_here) = self.counters();
        refused += refused_here;
        untouched += arrived;
        if untouched > 0 {
            assert!(
                fate.destinations.is_empty() && refused == 0,
                "{flow:?}: {fate:?}, {untouched} arrived, {refused} refused"
            );
            fate.untouched = true;
            fate.verdict = Verdict::Accept;
        } else if refused > 0 {
            assert!(fate.destinations.is_empty(), "{flow:?}: {fate:?} and {refused} refused");
            fate.verdict = Verdict::Reject;
        }
        fate
    }

    fn receive(&self, frames: &mut Vec<Vec<u8>>) {
        let mut buffer = [0; FRAME_MAX];
        let mut quiet = 0;
        // What goes by way of the loopback device takes a moment.
        while quiet < 4 {
            match self.tap.receive(&mut buffer).unwrap() {
                Some(frame) => {
                    frames.push(frame.to_vec());
                    quiet = 0;
                }
                None => {
                    quiet += 1;
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    /// Reads and resets what came to the node itself: packets, refusals.
    fn counters(&self) -> (u64, u64) {
        let text = self.shell("nft reset counters table inet pwt");
        let of = |name: &str| {
            let rest = &text[text.find(&format!("counter {name}")).unwrap()..];
            let rest = &rest[rest.find("packets ").unwrap() + 8..];
            rest[..rest.find(' ').unwrap()].parse().unwrap()
        };
        (of("arrived"), of("refused"))
    }

    fn shell(&self, text: &str) -> String {
        let output =
            Command::new("ip").args(["netns", "exec", &self.name, "sh", "-ec", text]).output().unwrap();
        assert!(output.status.success(), "{text}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = Netns::delete_named(&self.name);
    }
}

enum Seen {
    Refusal,
    Packet { src: IpAddr, dst: IpAddr, port: u16 },
}

fn parse(frame: &[u8]) -> Option<Seen> {
    let packet = frame.get(14..)?;
    let (src, dst, protocol, rest): (IpAddr, IpAddr, u8, &[u8]) = match frame.get(12..14)? {
        [8, 0] => (
            (*packet.get(12..)?.first_chunk::<4>()?).into(),
            (*packet.get(16..)?.first_chunk::<4>()?).into(),
            *packet.get(9)?,
            packet.get(20..)?,
        ),
        [0x86, 0xdd] => (
            (*packet.get(8..)?.first_chunk::<16>()?).into(),
            (*packet.get(24..)?.first_chunk::<16>()?).into(),
            *packet.get(6)?,
            packet.get(40..)?,
        ),
        _ => return None,
    };
    match protocol {
        // Destination unreachable, port unreachable.
        1 => (rest.get(..2)? == [3, 3]).then_some(Seen::Refusal),
        58 => (rest.get(..2)? == [1, 4]).then_some(Seen::Refusal),
        6 if rest.get(13)? & 4 != 0 => Some(Seen::Refusal),
        6 | 17 | 132 => {
            Some(Seen::Packet { src, dst, port: u16::from_be_bytes([*rest.get(2)?, *rest.get(3)?]) })
        }
        _ => None,
    }
}

/// The first packet of a flow: a SYN, a datagram, an INIT.
fn craft(flow: &Flow, port: u16) -> Vec<u8> {
    let mut body = port.to_be_bytes().to_vec();
    body.extend_from_slice(&flow.port.to_be_bytes());
    let sum_at = match flow.protocol {
        Protocol::Tcp => {
            body.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
            Some(16)
        }
        Protocol::Udp => {
            body.extend_from_slice(&[0, 12, 0, 0, b'p', b'i', b'n', b'g']);
            Some(6)
        }
        Protocol::Sctp => {
            // No verification tag, a checksum that nobody looks at, and an INIT.
            body.extend_from_slice(&[0; 8]);
            body.extend_from_slice(&[1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
            None
        }
    };
    let length = u16::try_from(body.len()).unwrap();
    let protocol = flow.protocol.number();
    let mut pseudo = Vec::new();
    let mut packet = match (flow.src, flow.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header = vec![0x45, 0];
            header.extend_from_slice(&(20 + length).to_be_bytes());
            header.extend_from_slice(&[0, 1, 0, 0, 64, protocol, 0, 0]);
            header.extend_from_slice(&src.octets());
            header.extend_from_slice(&dst.octets());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            pseudo.extend_from_slice(&header[12..20]);
            header
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend_from_slice(&length.to_be_bytes());
            header.extend_from_slice(&[protocol, 64]);
            header.extend_from_slice(&src.octets());
            header.extend_from_slice(&dst.octets());
            pseudo.extend_from_slice(&header[8..40]);
            header
        }
        other => panic!("families {other:?}"),
    };
    if let Some(at) = sum_at {
        pseudo.extend_from_slice(&[0, protocol]);
        pseudo.extend_from_slice(&length.to_be_bytes());
        pseudo.extend_from_slice(&body);
        let sum = checksum(&pseudo);
        body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    packet.extend_from_slice(&body);
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
