//! The side that acknowledges probes.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Rate;
use super::wire::{Kind, Packet};
use crate::{Error, Result};

/// Acknowledgements per second, of all peers together. An acknowledgement is smaller than any probe, so a
/// forged sender gains nothing.
const RATE: u32 = 4000;
const BURST: u32 = 1000;
/// Packets taken from one socket before the time is looked at again.
const BATCH: usize = 256;

/// Acknowledges probes that arrive whole at the node's addresses.
#[derive(Debug)]
pub struct Responder {
    sockets: Vec<UdpSocket>,
    rate: Rate,
    buffer: Vec<u8>,
    answer: Vec<u8>,
}

impl Responder {
    /// Listens on each address (the node's own, so that answers come from where probes go to).
    ///
    /// # Errors
    /// When an address is not the node's or the port is taken.
    pub fn bind(addresses: &[IpAddr], port: u16) -> Result<Self> {
        let mut sockets = Vec::new();
        for address in addresses {
            let address = SocketAddr::new(*address, port);
            let wrap = |e: io::Error| Error::io("listen for path MTU probes on", address.to_string(), e);
            let socket = UdpSocket::bind(address).map_err(wrap)?;
            socket.set_nonblocking(true).map_err(wrap)?;
            sockets.push(socket);
        }
        let rate = Rate::new(RATE, BURST, Instant::now());
        Ok(Self { sockets, rate, buffer: vec![0; 1 << 16], answer: Vec::new() })
    }

    /// Serves for at most `timeout`, then returns how many probes were acknowledged. To be called in a loop.
    ///
    /// # Errors
    /// When a socket is broken.
    pub fn serve(&mut self, timeout: Duration) -> Result<u64> {
        let wrap = |e: io::Error| Error::io("receive", "path MTU probes", e);
        let ends = Instant::now() + timeout;
        let mut served = 0;
        loop {
            for socket in &self.sockets {
                for _ in 0..BATCH {
                    let (length, from) = match socket.recv_from(&mut self.buffer) {
                        Ok(received) => received,
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                        // An ICMP error about an earlier answer says nothing about this socket.
                        Err(_) => continue,
                    };
                    let Some(probe) = Packet::decode(&self.buffer[..length], from.ip()) else { continue };
                    if probe.kind != Kind::Probe || !self.rate.allows(Instant::now()) {
                        continue;
                    }
                    self.rate.spend(1);
                    Packet { kind: Kind::Acknowledgement, ..probe }.encode(from.ip(), &mut self.answer);
                    // A full send queue or a vanished route: the prober asks again.
                    served += u64::from(socket.send_to(&self.answer, from).is_ok());
                }
            }
            let left = ends.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(served);
            }
            let mut fds: Vec<PollFd<'_>> =
                self.sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(wrap(errno.into())),
            }
        }
    }

    /// The addresses that it listens on.
    ///
    /// # Errors
    /// When a socket is broken.
    pub fn local_addresses(&self) -> Result<Vec<SocketAddr>> {
        let wrap = |e: io::Error| Error::io("look at", "path MTU responder", e);
        self.sockets.iter().map(|socket| socket.local_addr().map_err(wrap)).collect()
    }
}
