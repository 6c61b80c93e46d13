//! The side that sends probes: many paths over one socket for each address family.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};

use super::path::{Counts, PathConfig, PathProbe, Verdict};
use super::wire::{Kind, Packet};
use super::{DEFAULT_PORT, Rate};
use crate::{Error, Result};

/// Most peers watched.
pub const PEERS_MAX: usize = 16_384;
/// Answers taken from one socket before probes are sent again.
const BATCH: usize = 256;
/// ICMP destination unreachable, port unreachable (RFC 792), and the same of ICMPv6 (RFC 4443 section 3.1).
const NOBODY_LISTENS: [(u8, u8, u8); 2] = [(libc::SO_EE_ORIGIN_ICMP, 3, 3), (libc::SO_EE_ORIGIN_ICMP6, 1, 4)];

/// How to probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProberConfig {
    /// UDP port of the responders.
    pub port: u16,
    /// How each path is watched.
    pub path: PathConfig,
    /// Most probes per second, of all paths together. With more peers than this allows, each is looked at
    /// less often.
    pub packets_per_second: u32,
}

impl Default for ProberConfig {
    fn default() -> Self {
        Self { port: DEFAULT_PORT, path: PathConfig::default(), packets_per_second: 1000 }
    }
}

/// A verdict that changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The node at the other end.
    pub peer: IpAddr,
    /// What was known before.
    pub before: Verdict,
    /// What is known now.
    pub now: Verdict,
    /// Why the last probe to the peer could not even be sent, if so: EMSGSIZE means that the node's own link
    /// is narrower than expected.
    pub send_error: Option<Errno>,
}

#[derive(Debug)]
struct Peer {
    path: PathProbe,
    /// The path's place in the schedule.
    wakeup: Instant,
    send_error: Option<Errno>,
}

/// Watches the paths to a set of peers.
#[derive(Debug)]
pub struct Prober {
    config: ProberConfig,
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
    peers: BTreeMap<IpAddr, Peer>,
    schedule: BTreeSet<(Instant, IpAddr)>,
    rate: Rate,
    buffer: Vec<u8>,
    seeds: RandomState,
    seed: u64,
}

/// Sends with don't-fragment set and whatever path MTU the kernel has learned ignored.
#[derive(Clone, Copy, Debug)]
struct MtuDiscover4;
nix::setsockopt_impl!(
    MtuDiscover4,
    libc::IPPROTO_IP,
    libc::IP_MTU_DISCOVER,
    i32,
    sockopt::SetStruct<'_, i32>
);

/// The same for IPv6, where routers never fragment but the sender would.
#[derive(Clone, Copy, Debug)]
struct MtuDiscover6;
nix::setsockopt_impl!(
    MtuDiscover6,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU_DISCOVER,
    i32,
    sockopt::SetStruct<'_, i32>
);

impl Prober {
    /// Probes from these addresses (the node's own, at most one of each family).
    ///
    /// # Errors
    /// When an address is not the node's.
    pub fn bind(addresses: &[IpAddr], config: ProberConfig) -> Result<Self> {
        let now = Instant::now();
        let mut prober = Self {
            config,
            v4: None,
            v6: None,
            peers: BTreeMap::new(),
            schedule: BTreeSet::new(),
            rate: Rate::new(config.packets_per_second, (config.packets_per_second / 4).max(32), now),
            buffer: Vec::new(),
            seeds: RandomState::new(),
            seed: 0,
        };
        for address in addresses {
            let wrap = |e: io::Error| Error::io("open path MTU probe socket on", address.to_string(), e);
            let socket = UdpSocket::bind(SocketAddr::new(*address, 0)).map_err(wrap)?;
            socket.set_nonblocking(true).map_err(wrap)?;
            if address.is_ipv4() {
                setsockopt(&socket, MtuDiscover4, &libc::IP_PMTUDISC_PROBE).map_err(|e| wrap(e.into()))?;
                setsockopt(&socket, sockopt::Ipv4RecvErr, &true).map_err(|e| wrap(e.into()))?;
                prober.v4 = Some(socket);
            } else {
                setsockopt(&socket, MtuDiscover6, &libc::IPV6_PMTUDISC_PROBE).map_err(|e| wrap(e.into()))?;
                setsockopt(&socket, sockopt::Ipv6DontFrag, &true).map_err(|e| wrap(e.into()))?;
                setsockopt(&socket, sockopt::Ipv6RecvErr, &true).map_err(|e| wrap(e.into()))?;
                prober.v6 = Some(socket);
            }
        }
        Ok(prober)
    }

    /// Sets whom to watch: each peer's address with the size of IP packets, in bytes, that the path should
    /// carry. What is known about peers that stay is kept; a peer of a family without a local address is
    /// not watched.
    ///
    /// # Errors
    /// When there are more than [`PEERS_MAX`]; nothing is changed then.
    pub fn set_peers(&mut self, peers: &BTreeMap<IpAddr, u16>) -> Result<()> {
        if peers.len() > PEERS_MAX {
            let cause = format!("{} peers; at most {PEERS_MAX} can be watched", peers.len());
            return Err(Error::invalid("watch", "path MTU", cause));
        }
        let now = Instant::now();
        let schedule = &mut self.schedule;
        self.peers.retain(|address, peer| {
            let stays = peers.contains_key(address);
            if !stays {
                schedule.remove(&(peer.wakeup, *address));
            }
            stays
        });
        for (address, expected) in peers {
            if self.socket(*address).is_none() {
                continue;
            }
            if let Some(peer) = self.peers.get_mut(address) {
                peer.path.set_expected(*expected, now);
            } else {
                let path = PathProbe::new(*expected, self.config.path, self.seed(), now);
                self.peers.insert(*address, Peer { path, wakeup: now, send_error: None });
            }
            self.reschedule(*address);
        }
        Ok(())
    }

    /// Probes for at most `timeout`; returns earlier when a verdict changed. To be called in a loop.
    ///
    /// # Errors
    /// When a socket is broken.
    pub fn run(&mut self, timeout: Duration) -> Result<Vec<Report>> {
        let ends = Instant::now() + timeout;
        loop {
            self.receive();
            let mut reports = Vec::new();
            let limited = self.send_due(&mut reports);
            let now = Instant::now();
            if !reports.is_empty() || now >= ends {
                return Ok(reports);
            }
            let due = self.schedule.first().map_or(ends, |(at, _)| *at);
            let due = if limited { due.max(now + self.rate.wait()) } else { due };
            // Whole milliseconds, rounded up: a wait cut to zero would spin.
            let wait = due.min(ends).saturating_duration_since(now) + Duration::from_micros(999);
            let mut fds: Vec<PollFd<'_>> = [&self.v4, &self.v6]
                .into_iter()
                .flatten()
                .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
                .collect();
            match poll(&mut fds, PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::io("wait for", "path MTU acknowledgements", errno)),
            }
        }
    }

    /// What is known about each peer.
    pub fn verdicts(&self) -> impl Iterator<Item = (IpAddr, Verdict)> {
        self.peers.iter().map(|(address, peer)| (*address, peer.path.verdict()))
    }

    /// Smoothed time from probe to acknowledgement of a peer.
    pub fn rtt(&self, peer: IpAddr) -> Option<Duration> {
        self.peers.get(&peer)?.path.rtt()
    }

    /// What became of the probes to a peer.
    pub fn counts(&self, peer: IpAddr) -> Option<Counts> {
        Some(self.peers.get(&peer)?.path.counts())
    }

    fn receive(&mut self) {
        let mut buffer = [0; 64];
        for ipv6 in [false, true] {
            self.receive_refusals(ipv6);
            for _ in 0..BATCH {
                let Some(socket) = (if ipv6 { &self.v6 } else { &self.v4 }) else { break };
                let (length, from) = match socket.recv_from(&mut buffer) {
                    Ok(received) => received,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    // An ICMP error about an earlier probe; the probe counts as lost anyway.
                    Err(_) => continue,
                };
                let Some(packet) = Packet::decode(&buffer[..length], from.ip()) else { continue };
                if packet.kind != Kind::Acknowledgement || from.port() != self.config.port {
                    continue;
                }
                if let Some(peer) = self.peers.get_mut(&from.ip()) {
                    peer.path.on_ack(packet.nonce, packet.size, Instant::now());
                    self.reschedule(from.ip());
                }
            }
        }
    }

    /// Takes the errors that came back for earlier probes. Those that are still in the queue would make sending fail.
    fn receive_refusals(&mut self, ipv6: bool) {
        let mut payload = [0; 64];
        for _ in 0..BATCH {
            let Some(socket) = (if ipv6 { &self.v6 } else { &self.v4 }) else { break };
            let mut parts = [IoSliceMut::new(&mut payload)];
            let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
            let received = recvmsg::<SockaddrStorage>(
                socket.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT,
            );
            let Ok(messages) = received.and_then(|r| Ok(r.cmsgs()?.collect::<Vec<_>>())) else { break };
            for message in messages {
                let (error, from) = match message {
                    ControlMessageOwned::Ipv4RecvErr(error, from) => {
                        (error, from.map(|f| IpAddr::from(Ipv4Addr::from(u32::from_be(f.sin_addr.s_addr)))))
                    }
                    ControlMessageOwned::Ipv6RecvErr(error, from) => {
                        (error, from.map(|f| IpAddr::from(Ipv6Addr::from(f.sin6_addr.s6_addr))))
                    }
                    _ => continue,
                };
                if !NOBODY_LISTENS.contains(&(error.ee_origin, error.ee_type, error.ee_code)) {
                    continue;
                }
                // By the address that sent the error: on the way nobody else knows who listens on the peer.
                if let Some(peer) = from.and_then(|from| self.peers.get_mut(&from)) {
                    peer.path.on_refusal(Instant::now());
                }
            }
        }
    }

    /// Sends what is due. Returns whether the rate cut it short.
    fn send_due(&mut self, reports: &mut Vec<Report>) -> bool {
        loop {
            let now = Instant::now();
            let address = match self.schedule.first() {
                Some((at, address)) if *at <= now => *address,
                _ => return false,
            };
            if !self.rate.allows(now) {
                return true;
            }
            let Some(peer) = self.peers.get_mut(&address) else {
                self.schedule.pop_first();
                continue;
            };
            let before = peer.path.verdict();
            let probes = peer.path.poll(now);
            let verdict = peer.path.verdict();
            if verdict != before {
                reports.push(Report { peer: address, before, now: verdict, send_error: peer.send_error });
            }
            self.rate.spend(probes.len());
            let socket = if address.is_ipv4() { &self.v4 } else { &self.v6 };
            for probe in probes {
                let packet = Packet { kind: Kind::Probe, size: probe.size, nonce: probe.nonce };
                packet.encode(address, &mut self.buffer);
                let to = SocketAddr::new(address, self.config.port);
                let sent = socket.as_ref().map(|socket| match socket.send_to(&self.buffer, to) {
                    // The error of an earlier probe that came a moment ago; telling it has taken it away.
                    Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                        socket.send_to(&self.buffer, to)
                    }
                    sent => sent,
                });
                // A probe that cannot leave is lost like any other; the reason is kept for the report. Sizes
                // come in rising order, so it is that of the largest.
                peer.send_error = match sent {
                    Some(Err(e)) => e.raw_os_error().map(Errno::from_raw),
                    _ => None,
                };
            }
            self.reschedule(address);
        }
    }

    fn reschedule(&mut self, address: IpAddr) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        self.schedule.remove(&(peer.wakeup, address));
        peer.wakeup = peer.path.wakeup();
        self.schedule.insert((peer.wakeup, address));
    }

    fn socket(&self, address: IpAddr) -> Option<&UdpSocket> {
        if address.is_ipv4() { self.v4.as_ref() } else { self.v6.as_ref() }
    }

    /// The standard library seeds its hash maps from the kernel's random numbers; this takes some of that.
    fn seed(&mut self) -> u64 {
        self.seed += 1;
        let mut hasher = self.seeds.build_hasher();
        hasher.write_u64(self.seed);
        hasher.finish()
    }
}
