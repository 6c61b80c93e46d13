//! Changes of links, addresses and routes as they happen.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ipnet::IpNet;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netlink::{decode_address, decode_link, decode_routes};
use crate::socket::{grow_receive_queue, messages, receive};
use crate::{Error, Netns, Result};

/// Most changes that one call of [`Monitor::next`] returns.
const BATCH: usize = 1024;

/// One change. It says that something happened to the object, not what the object is now: several changes
/// may have followed already. Read the object where its state matters.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// A link is new, different or gone.
    Link {
        /// Interface index.
        index: u32,
        /// Interface name.
        name: String,
        /// MTU in bytes.
        mtu: u32,
        /// Gone.
        removed: bool,
    },
    /// An address is new, different or gone.
    Address {
        /// Interface index.
        index: u32,
        /// The address.
        addr: IpAddr,
        /// Gone.
        removed: bool,
    },
    /// A unicast route of the main table is new, different or gone.
    Route {
        /// Destination.
        dst: IpNet,
        /// Index of the outgoing link.
        dev: u32,
        /// Who made it (`rtm_protocol`).
        protocol: u8,
        /// Gone.
        removed: bool,
    },
    /// Changes came faster than they were read and some are lost: read everything anew.
    Overrun,
}

/// A subscription to the changes of one namespace.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Subscribes in the namespace of the calling thread. Changes from now on are queued by the kernel, so
    /// whoever reads the state after this misses nothing.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket.
    pub fn open() -> Result<Self> {
        let wrap = |source: io::Error| Error::io("open", "netlink multicast socket", source);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(wrap)?;
        socket.bind_auto().map_err(wrap)?;
        socket.set_non_blocking(true).map_err(wrap)?;
        grow_receive_queue(&socket).map_err(wrap)?;
        for group in [
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV4_ROUTE,
            libc::RTNLGRP_IPV6_ROUTE,
        ] {
            socket.add_membership(group).map_err(wrap)?;
        }
        Ok(Self { socket, buffer: Vec::new() })
    }

    /// Subscribes in another namespace.
    ///
    /// # Errors
    /// As [`Self::open`]; when the namespace cannot be entered.
    pub fn open_in(namespace: &Netns) -> Result<Self> {
        namespace.run(Self::open)?
    }

    /// Waits for changes, at most `timeout` (for ever when none), and returns those that are there, at
    /// most about a thousand. Empty when the time is over or a signal came.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Vec<Change>> {
        const OPERATION: &str = "wait for";
        let wrap = |e: io::Error| Error::io(OPERATION, "changes of links, addresses and routes", e);
        let timeout =
            timeout.map_or(PollTimeout::NONE, |t| PollTimeout::try_from(t).unwrap_or(PollTimeout::MAX));
        match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(Errno::EINTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(errno) => return Err(wrap(errno.into())),
        }
        let mut changes = Vec::new();
        while changes.len() < BATCH {
            match receive(&self.socket, &mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(length) => {
                    if length > self.buffer.len() {
                        overrun(&mut changes);
                        self.buffer.reserve(length);
                    }
                    for message in messages(&self.buffer) {
                        decode(message.kind, message.payload, &mut changes);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // The kernel reports the overrun once and goes on with what is still queued.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => overrun(&mut changes),
                Err(e) => return Err(wrap(e)),
            }
        }
        Ok(changes)
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn overrun(changes: &mut Vec<Change>) {
    if !changes.contains(&Change::Overrun) {
        changes.push(Change::Overrun);
    }
}

fn decode(kind: u16, payload: &[u8], changes: &mut Vec<Change>) {
    match kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            // A bridge reports the leaving of a port as RTM_DELLINK of family AF_BRIDGE: the link is still there.
            if payload.first().is_some_and(|family| i32::from(*family) != libc::AF_UNSPEC) {
                return;
            }
            changes.extend(decode_link(payload).map(|link| Change::Link {
                index: link.index,
                name: link.name,
                mtu: link.mtu,
                removed: kind == libc::RTM_DELLINK,
            }));
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => {
            changes.extend(decode_address(payload).map(|address| Change::Address {
                index: address.index,
                addr: address.addr,
                removed: kind == libc::RTM_DELADDR,
            }));
        }
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
            changes.extend(decode_routes(payload).into_iter().map(|route| Change::Route {
                dst: route.dst,
                dev: route.dev,
                protocol: route.protocol,
                removed: kind == libc::RTM_DELROUTE,
            }));
        }
        _ => {}
    }
}
