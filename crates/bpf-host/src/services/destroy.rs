//! Connected datagram sockets whose backend has gone: they are closed, so that their application connects anew
//! instead of sending into nothing for ever.
//!
//! By `sock_diag` (`SOCK_DESTROY`, Linux 4.5): a dump of the connected datagram sockets of a network namespace, then
//! one request for each that the socket hooks gave a backend that is no longer there.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};
use podway_abi::{
    Addr,
    services::{NO_SERVICE, SocketKey},
};

use super::ServiceWriter;
use crate::{Error, Result};

// `linux/netlink.h`, `linux/sock_diag.h`, `linux/inet_diag.h`.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const IPPROTO_UDP: u8 = 17;
const TCP_ESTABLISHED: u32 = 1;
const HEADER: usize = 16;
/// `struct inet_diag_sockid`.
const SOCKID: usize = 48;
/// `struct inet_diag_req_v2`: its first eight bytes, then the socket.
const REQUEST: usize = 8 + SOCKID;
/// Most sockets that are closed in one call.
const MAX_DESTROYED: usize = 65_536;

/// A connected socket of a dump.
struct Connected {
    family: u8,
    id: [u8; SOCKID],
}

impl ServiceWriter {
    /// Closes the connected datagram sockets of the calling thread's network namespace that were given a backend which
    /// has left its service since; they get `ECONNABORTED`. Sockets that were connected to the same address without a
    /// service stay. Returns how many.
    ///
    /// # Errors
    /// When the kernel does not list or close sockets (it is built without `CONFIG_INET_DIAG_DESTROY`).
    pub fn destroy_stale_sockets(&self) -> Result<usize> {
        let failed = |e: io::Error| {
            Error::io("close the stale datagram sockets of", "the network namespace".as_ref(), e)
        };
        let netlink = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
        .map_err(|e| failed(e.into()))?;
        let mut destroyed = 0;
        for family in [nix::libc::AF_INET, nix::libc::AF_INET6] {
            let family = u8::try_from(family).unwrap_or_default();
            for connected in dump(&netlink, family).map_err(failed)? {
                if destroyed < MAX_DESTROYED && self.is_stale(&connected)? {
                    destroyed += usize::from(destroy(&netlink, &connected).map_err(failed)?);
                }
            }
        }
        Ok(destroyed)
    }

    fn is_stale(&self, connected: &Connected) -> Result<bool> {
        let key = connected.key();
        let peer = match self.sockets.get(&key, 0) {
            Ok(peer) => peer,
            Err(aya::maps::MapError::KeyNotFound) => return Ok(false),
            Err(e) => return Err(Error::map("SOCKETS", e)),
        };
        let backend = self.backend(peer.backend);
        Ok(backend.service == NO_SERVICE || backend.incarnation != peer.incarnation)
    }
}

impl Connected {
    /// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
    fn key(&self) -> SocketKey {
        let word = |at: usize| {
            let bytes = self.id.get(at..at + 4).and_then(|b| b.try_into().ok()).unwrap_or_default();
            u32::from_ne_bytes(bytes)
        };
        let addr = if i32::from(self.family) == nix::libc::AF_INET {
            Addr::from_v4_word(word(20))
        } else {
            Addr::from_v6_words([word(20), word(24), word(28), word(32)])
        };
        let cookie = u64::from(word(40)) | u64::from(word(44)) << 32;
        SocketKey { cookie, addr, port: u16::from_be_bytes([self.id[2], self.id[3]]), pad: [0; 6] }
    }
}

fn request(kind: u16, flags: u16, family: u8, states: u32, id: &[u8; SOCKID]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + REQUEST);
    out.extend(u32::try_from(HEADER + REQUEST).unwrap_or_default().to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    out.extend([0; 8]);
    out.extend([family, IPPROTO_UDP, 0, 0]);
    out.extend(states.to_ne_bytes());
    out.extend(id);
    out
}

fn dump(netlink: &OwnedFd, family: u8) -> io::Result<Vec<Connected>> {
    let ask = request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, 1 << TCP_ESTABLISHED, &[0; SOCKID]);
    send(netlink.as_raw_fd(), &ask, MsgFlags::empty())?;
    let mut found = Vec::new();
    let mut buffer = vec![0; 65_536];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some((kind, body, next)) = message(rest) {
            match kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return errno(body).map(|()| found),
                // `struct inet_diag_msg`: four bytes, then the socket.
                SOCK_DIAG_BY_FAMILY => {
                    if let Some(id) = body.get(4..4 + SOCKID).and_then(|b| b.try_into().ok()) {
                        found.push(Connected { family: body[0], id });
                    }
                }
                _ => {}
            }
            rest = next;
        }
    }
}

/// Whether the socket was there and has been closed.
fn destroy(netlink: &OwnedFd, connected: &Connected) -> io::Result<bool> {
    let ask = request(SOCK_DESTROY, NLM_F_ACK, connected.family, u32::MAX, &connected.id);
    send(netlink.as_raw_fd(), &ask, MsgFlags::empty())?;
    let mut buffer = [0; 1024];
    let length = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    let Some((NLMSG_ERROR, body, _)) = message(buffer.get(..length).unwrap_or_default()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    };
    match errno(body) {
        Ok(()) => Ok(true),
        // Closed by its owner meanwhile.
        Err(e) if e.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The first message: its kind, its body, and what follows.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER..length)?;
    let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, next))
}

/// `struct nlmsgerr` begins with a negative error, 0 for an acknowledgement.
fn errno(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}
