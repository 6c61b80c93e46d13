//! Tracked UDP flows of the node's own stack (ctnetlink): those to a port are found and forgotten.
//!
//! A flow keeps the translation that it began with for as long as datagrams come. When what a port leads to changes,
//! flows that began before have to be forgotten, so that the next datagram is looked at anew.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::socket::{Attributes, ip, messages, receive};
use crate::{Error, Result};

const CT_GET: u16 = ((libc::NFNL_SUBSYS_CTNETLINK as u16) << 8) | 1;
const CT_DELETE: u16 = ((libc::NFNL_SUBSYS_CTNETLINK as u16) << 8) | 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLA_F_NESTED: u16 = 1 << 15;
/// `struct nfgenmsg`.
const NFGENMSG: usize = 4;

// enum ctattr_type and the enums nested in it (linux/netfilter/nfnetlink_conntrack.h).
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const IP_V6_SRC: u16 = 3;
const IP_V6_DST: u16 = 4;
const PROTO_NUM: u16 = 1;
const PROTO_DST_PORT: u16 = 3;
const FILTER_ORIG_FLAGS: u16 = 1;
/// Compare protocol and destination port (`CTA_FILTER_F_CTA_PROTO_*` of net/netfilter/nf_conntrack_netlink.c).
const FILTER_PROTO_AND_DST_PORT: u32 = (1 << 3) | (1 << 5);

/// The kernel answers within the sending system call.
const ANSWER_TIMEOUT_MS: i64 = 10_000;
/// How often a dump that overran is taken again.
const ATTEMPTS: usize = 8;

/// A flow, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpFlow {
    /// Where the client sends it.
    pub destination: IpAddr,
    /// Who answers: another than the destination when that is translated.
    pub answers: IpAddr,
}

/// Forgets the flows to a UDP port, of one family, that are stale. Works in the network namespace of the calling
/// thread. Returns how many there were.
///
/// # Errors
/// The kernel has no connection tracking, or the process may not.
pub fn forget_udp(ipv6: bool, port: u16, stale: impl Fn(&UdpFlow) -> bool) -> Result<usize> {
    let wrap = |operation: &'static str| {
        move |e: io::Error| Error::io(operation, format!("tracked flows to UDP port {port}"), e)
    };
    let mut socket = open().map_err(wrap("open a socket for"))?;
    let family = u8::try_from(if ipv6 { libc::AF_INET6 } else { libc::AF_INET }).unwrap_or(0);
    let found = list(&mut socket, family, port).map_err(wrap("list"))?;
    let mut forgotten = 0;
    for (flow, key) in found {
        if stale(&flow) && delete(&mut socket, family, &key).map_err(wrap("forget"))? {
            forgotten += 1;
        }
    }
    Ok(forgotten)
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    crate::socket::grow_receive_queue(&socket)?;
    let timeout = TimeVal::milliseconds(ANSWER_TIMEOUT_MS);
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
    Ok(socket)
}

/// Flows with the attributes by which the kernel finds them again.
fn list(socket: &mut Socket, family: u8, port: u16) -> io::Result<Vec<(UdpFlow, Vec<u8>)>> {
    let mut proto = Vec::new();
    attribute(&mut proto, PROTO_NUM, &[libc::IPPROTO_UDP as u8]);
    attribute(&mut proto, PROTO_DST_PORT, &port.to_be_bytes());
    let mut tuple = Vec::new();
    attribute(&mut tuple, TUPLE_PROTO | NLA_F_NESTED, &proto);
    let mut filter = Vec::new();
    attribute(&mut filter, FILTER_ORIG_FLAGS, &FILTER_PROTO_AND_DST_PORT.to_ne_bytes());
    let mut attributes = Vec::new();
    attribute(&mut attributes, TUPLE_ORIG | NLA_F_NESTED, &tuple);
    attribute(&mut attributes, FILTER | NLA_F_NESTED, &filter);
    let mut outcome = Ok(Vec::new());
    for _ in 0..ATTEMPTS {
        let mut found = Vec::new();
        outcome = exchange(socket, CT_GET, NLM_F_REQUEST | NLM_F_DUMP, family, &attributes, |payload| {
            found.extend(payload.get(NFGENMSG..).and_then(|a| decode(a, port)));
        })
        .map(|()| found);
        match &outcome {
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => *socket = open()?,
            _ => break,
        }
    }
    outcome
}

/// Returns false when the flow has gone by itself.
fn delete(socket: &mut Socket, family: u8, key: &[u8]) -> io::Result<bool> {
    match exchange(socket, CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, family, key, |_| {}) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

fn exchange(
    socket: &mut Socket,
    kind: u16,
    flags: u16,
    family: u8,
    attributes: &[u8],
    mut take: impl FnMut(&[u8]),
) -> io::Result<()> {
    // One request at a time and a fresh socket after an overrun: any number will do.
    const SEQUENCE: u32 = 1;
    let length = 16 + NFGENMSG + attributes.len();
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&SEQUENCE.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(&[family, 0, 0, 0]);
    message.extend_from_slice(attributes);
    socket.send(&message, 0)?;
    let mut buffer = Vec::new();
    loop {
        let length = receive(socket, &mut buffer, 0)?;
        if length > buffer.len() {
            return Err(io::Error::other(format!("an answer of {length} bytes was cut off")));
        }
        for message in messages(&buffer) {
            match i32::from(message.kind) {
                libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                    let code = message.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                _ => take(message.payload),
            }
        }
    }
}

fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn decode(attributes: &[u8], port: u16) -> Option<(UdpFlow, Vec<u8>)> {
    let (mut original, mut reply) = (None, None);
    let mut key = Vec::new();
    for (kind, value) in Attributes(attributes) {
        match kind {
            TUPLE_ORIG => {
                original = Some(tuple(value)?);
                attribute(&mut key, kind | NLA_F_NESTED, value);
            }
            TUPLE_REPLY => reply = Some(tuple(value)?),
            // A flow that came in the place of this one keeps its own.
            ID | ZONE => attribute(&mut key, kind, value),
            _ => {}
        }
    }
    let (_, destination, protocol, to) = original?;
    // A kernel that does not know the filter shows all of them.
    if i32::from(protocol) != libc::IPPROTO_UDP || to != port {
        return None;
    }
    Some((UdpFlow { destination, answers: reply?.0 }, key))
}

/// Source, destination, protocol and destination port.
fn tuple(value: &[u8]) -> Option<(IpAddr, IpAddr, u8, u16)> {
    let unspecified =
        |v6| if v6 { Ipv6Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv4Addr::UNSPECIFIED) };
    let (mut source, mut destination) = (unspecified(false), unspecified(false));
    let (mut protocol, mut port) = (0, 0);
    for (kind, value) in Attributes(value) {
        for (inner, value) in Attributes(value) {
            match (kind, inner) {
                (TUPLE_IP, IP_V4_SRC | IP_V6_SRC) => source = ip(value)?,
                (TUPLE_IP, IP_V4_DST | IP_V6_DST) => destination = ip(value)?,
                (TUPLE_PROTO, PROTO_NUM) => protocol = *value.first()?,
                (TUPLE_PROTO, PROTO_DST_PORT) => port = u16::from_be_bytes(*value.first_chunk()?),
                _ => {}
            }
        }
    }
    Some((source, destination, protocol, port))
}
