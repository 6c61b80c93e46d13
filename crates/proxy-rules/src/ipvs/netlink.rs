//! IPVS over generic netlink (`linux/ip_vs.h`): virtual servers, real servers and their statistics.
//!
//! One request at a time, each acknowledged before the call returns. Works in the network namespace in which the
//! socket was opened.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};
use nix::errno::Errno;
use podway_services::table::{Family, Protocol};

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;

const CONTROLLER: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE: u16 = 0x3fff;

const CMD_NEW_SERVICE: u8 = 1;
const CMD_SET_SERVICE: u8 = 2;
const CMD_DEL_SERVICE: u8 = 3;
const CMD_GET_SERVICE: u8 = 4;
const CMD_NEW_DEST: u8 = 5;
const CMD_SET_DEST: u8 = 6;
const CMD_DEL_DEST: u8 = 7;
const CMD_GET_DEST: u8 = 8;
const ATTR_SERVICE: u16 = 1;
const ATTR_DEST: u16 = 2;

/// Flag of a virtual server: a client keeps its real server.
const FLAG_PERSISTENT: u32 = 0x1;
/// Flags that belong to the scheduler; for `sh` and `mh` the first means "fall back to another real server when the
/// chosen one takes none", the second "hash the port, too".
const FLAG_SCHED_1: u32 = 0x8;
const FLAG_SCHED_2: u32 = 0x10;
/// Those that this module decides on. The kernel has others for its own use.
const FLAGS_KNOWN: u32 = FLAG_PERSISTENT | FLAG_SCHED_1 | FLAG_SCHED_2;

/// How often an interrupted dump is taken again.
const DUMP_ATTEMPTS: usize = 16;

/// What a virtual server answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum ServerKey {
    /// Packets to an address, port and protocol.
    Address(IpAddr, u16, Protocol),
    /// Packets that carry a mark.
    Mark(u32, Family),
}

impl std::fmt::Display for ServerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ServerKey::Address(addr, port, protocol) => {
                write!(f, "{} {protocol}", std::net::SocketAddr::new(*addr, *port))
            }
            ServerKey::Mark(mark, Family::V4) => write!(f, "mark {mark:#x} (IPv4)"),
            ServerKey::Mark(mark, Family::V6) => write!(f, "mark {mark:#x} (IPv6)"),
        }
    }
}

/// How a virtual server chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerSpec {
    pub(crate) scheduler: String,
    /// Persistence in seconds.
    pub(crate) persistent_s: Option<u32>,
    /// `sh` and `mh`: take another real server when the chosen one takes none.
    pub(crate) fallback: bool,
    /// `sh` and `mh`: hash the client's port, too.
    pub(crate) hash_port: bool,
}

/// A virtual server as the kernel has it.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) key: ServerKey,
    pub(crate) spec: ServerSpec,
    /// Connections since it was made.
    pub(crate) connections: u64,
}

/// A real server as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Real {
    pub(crate) addr: IpAddr,
    pub(crate) port: u16,
    pub(crate) weight: u32,
    /// Whether it is reached by translating the address (IPVS calls it masquerading).
    pub(crate) translated: bool,
    /// Connections that are open or closing.
    pub(crate) connections: u32,
}

/// The socket.
pub(crate) struct Ipvs {
    socket: Socket,
    family: u16,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Ipvs {
    /// Opens IPVS of the current network namespace. Where it is a module, this loads it.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_cap_ack(true)?;
        let mut ipvs = Self { socket, family: CONTROLLER, sequence: 0, buffer: Vec::with_capacity(64 << 10) };
        let mut name = Attributes::default();
        name.put(CTRL_ATTR_FAMILY_NAME, b"IPVS\0");
        let mut family = None;
        ipvs.request(CTRL_CMD_GETFAMILY, NLM_F_ACK, &name.0, |payload| {
            family = attributes(payload)
                .find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID)
                .and_then(|(_, v)| u16_of(v));
        })?;
        ipvs.family = family.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(ipvs)
    }

    pub(crate) fn add_server(&mut self, key: &ServerKey, spec: &ServerSpec) -> io::Result<()> {
        self.change(CMD_NEW_SERVICE, &service(key, Some(spec)))
    }

    pub(crate) fn set_server(&mut self, key: &ServerKey, spec: &ServerSpec) -> io::Result<()> {
        self.change(CMD_SET_SERVICE, &service(key, Some(spec)))
    }

    /// Deletes a virtual server with its real servers. Returns whether there was one.
    pub(crate) fn delete_server(&mut self, key: &ServerKey) -> io::Result<bool> {
        gone(self.change(CMD_DEL_SERVICE, &service(key, None)))
    }

    pub(crate) fn add_real(
        &mut self,
        key: &ServerKey,
        addr: IpAddr,
        port: u16,
        weight: u32,
    ) -> io::Result<()> {
        self.change(CMD_NEW_DEST, &dest(key, addr, port, Some(weight)))
    }

    pub(crate) fn set_real(
        &mut self,
        key: &ServerKey,
        addr: IpAddr,
        port: u16,
        weight: u32,
    ) -> io::Result<()> {
        self.change(CMD_SET_DEST, &dest(key, addr, port, Some(weight)))
    }

    /// Deletes a real server. Returns whether there was one.
    pub(crate) fn delete_real(&mut self, key: &ServerKey, addr: IpAddr, port: u16) -> io::Result<bool> {
        gone(self.change(CMD_DEL_DEST, &dest(key, addr, port, None)))
    }

    /// One virtual server, if there is one.
    pub(crate) fn server(&mut self, key: &ServerKey) -> io::Result<Option<Server>> {
        let mut found = None;
        let there = gone(self.request(CMD_GET_SERVICE, NLM_F_ACK, &service(key, None), |payload| {
            let nested = attributes(payload).find(|(kind, _)| *kind == ATTR_SERVICE);
            found = nested.and_then(|(_, nested)| server_of(nested));
        }))?;
        Ok(found.filter(|_| there))
    }

    /// Every virtual server of the namespace, and those of `known` that there are for certain: the kernel has one
    /// list for all namespaces and leaves some out of a dump while others change theirs.
    pub(crate) fn servers_with(
        &mut self,
        known: impl IntoIterator<Item = ServerKey>,
    ) -> io::Result<Vec<Server>> {
        let mut all = self.servers()?;
        let found: HashSet<ServerKey> = all.iter().map(|s| s.key).collect();
        for key in known.into_iter().filter(|key| !found.contains(key)) {
            all.extend(self.server(&key)?);
        }
        Ok(all)
    }

    /// Virtual servers of the namespace, whoever made them; see [`Self::servers_with`] for what may be missing.
    pub(crate) fn servers(&mut self) -> io::Result<Vec<Server>> {
        self.dump(CMD_GET_SERVICE, &[], |payload| {
            let nested = attributes(payload).find(|(kind, _)| *kind == ATTR_SERVICE)?.1;
            server_of(nested)
        })
    }

    /// The real servers of a virtual server.
    pub(crate) fn reals(&mut self, key: &ServerKey) -> io::Result<Vec<Real>> {
        let v6 = match key {
            ServerKey::Address(addr, ..) => addr.is_ipv6(),
            ServerKey::Mark(_, family) => *family == Family::V6,
        };
        self.dump(CMD_GET_DEST, &service(key, None), |payload| {
            let nested = attributes(payload).find(|(kind, _)| *kind == ATTR_DEST)?.1;
            real_of(nested, v6)
        })
    }

    fn change(&mut self, command: u8, attributes: &[u8]) -> io::Result<()> {
        self.request(command, NLM_F_ACK, attributes, |_| {})
    }

    fn dump<T>(
        &mut self,
        command: u8,
        attributes: &[u8],
        mut decode: impl FnMut(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut last = Errno::EINTR;
        for _ in 0..DUMP_ATTEMPTS {
            let mut found = Vec::new();
            match self.request(command, NLM_F_DUMP, attributes, |payload| found.extend(decode(payload))) {
                Ok(()) => return Ok(found),
                Err(e) => match e.raw_os_error().map(Errno::from_raw) {
                    Some(again @ (Errno::EINTR | Errno::ENOBUFS)) => last = again,
                    _ => return Err(e),
                },
            }
        }
        Err(last.into())
    }

    /// Sends one request and reads its answers to the end.
    fn request(
        &mut self,
        command: u8,
        flags: u16,
        attributes: &[u8],
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let length = HEADER + GENERIC_HEADER + attributes.len();
        let mut message = Vec::with_capacity(length);
        message.extend(u32::try_from(length).map_err(io::Error::other)?.to_ne_bytes());
        message.extend(self.family.to_ne_bytes());
        message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        // Command, version 1 (of the controller and of IPVS), two bytes of nothing.
        message.extend([command, 1, 0, 0]);
        message.extend(attributes);
        self.socket.send(&message, 0)?;
        let mut interrupted = false;
        loop {
            self.buffer.clear();
            let (length, from) = match self.socket.recv_from(&mut self.buffer, 0) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            // Only the kernel has port 0.
            if from.port_number() != 0 {
                continue;
            }
            let mut rest = self.buffer.get(..length).unwrap_or_default();
            while let Some(size) = rest.first_chunk().map(|l| u32::from_ne_bytes(*l) as usize) {
                let Some(message) = rest.get(..size).filter(|m| m.len() >= HEADER) else { break };
                let kind = u16::from_ne_bytes([message[4], message[5]]);
                let flags = u16::from_ne_bytes([message[6], message[7]]);
                let sequence = u32::from_ne_bytes([message[8], message[9], message[10], message[11]]);
                let payload = &message[HEADER..];
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
                if sequence != self.sequence {
                    continue;
                }
                interrupted |= flags & NLM_F_DUMP_INTR != 0;
                match kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        let code = payload.first_chunk().map_or(0, |c| i32::from_ne_bytes(*c));
                        return match code {
                            0 if interrupted => Err(Errno::EINTR.into()),
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                        };
                    }
                    _ => take(payload.get(GENERIC_HEADER..).unwrap_or_default()),
                }
            }
        }
    }
}

/// Not there is as good as deleted.
fn gone(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) => match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ESRCH | Errno::ENOENT) => Ok(false),
            _ => Err(e),
        },
    }
}

/// Attributes being written.
#[derive(Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn put(&mut self, kind: u16, value: &[u8]) {
        // The values here have a few bytes each.
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn nest(kind: u16, inner: &Self) -> Self {
        let mut outer = Self::default();
        outer.put(kind | NLA_F_NESTED, &inner.0);
        outer
    }
}

/// 16 bytes, of which IPv4 has the first four.
fn address(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V6(addr) => addr.octets(),
        IpAddr::V4(addr) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&addr.octets());
            bytes
        }
    }
}

fn af(v6: bool) -> u16 {
    // AF_INET6, AF_INET.
    if v6 { 10 } else { 2 }
}

fn service(key: &ServerKey, spec: Option<&ServerSpec>) -> Vec<u8> {
    let mut inner = Attributes::default();
    let v6 = match key {
        ServerKey::Address(addr, port, protocol) => {
            inner.put(1, &af(addr.is_ipv6()).to_ne_bytes());
            inner.put(2, &u16::from(protocol.number()).to_ne_bytes());
            inner.put(3, &address(*addr));
            inner.put(4, &port.to_be_bytes());
            addr.is_ipv6()
        }
        ServerKey::Mark(mark, family) => {
            let v6 = *family == Family::V6;
            inner.put(1, &af(v6).to_ne_bytes());
            inner.put(5, &mark.to_ne_bytes());
            v6
        }
    };
    if let Some(spec) = spec {
        inner.put(6, format!("{}\0", spec.scheduler).as_bytes());
        let mut flags = 0;
        for (on, flag) in [
            (spec.persistent_s.is_some(), FLAG_PERSISTENT),
            (spec.fallback, FLAG_SCHED_1),
            (spec.hash_port, FLAG_SCHED_2),
        ] {
            flags |= if on { flag } else { 0 };
        }
        inner.put(7, &[flags.to_ne_bytes(), FLAGS_KNOWN.to_ne_bytes()].concat());
        inner.put(8, &spec.persistent_s.unwrap_or(0).to_ne_bytes());
        // Every client by itself: a mask of IPv4, a prefix length of IPv6.
        let mask = if v6 { 128u32.to_ne_bytes() } else { u32::MAX.to_ne_bytes() };
        inner.put(9, &mask);
    }
    Attributes::nest(ATTR_SERVICE, &inner).0
}

fn dest(key: &ServerKey, addr: IpAddr, port: u16, weight: Option<u32>) -> Vec<u8> {
    let mut inner = Attributes::default();
    inner.put(1, &address(addr));
    inner.put(2, &port.to_be_bytes());
    inner.put(11, &af(addr.is_ipv6()).to_ne_bytes());
    if let Some(weight) = weight {
        // Method 0 is translation; no thresholds.
        inner.put(3, &0u32.to_ne_bytes());
        inner.put(4, &weight.to_ne_bytes());
        inner.put(5, &0u32.to_ne_bytes());
        inner.put(6, &0u32.to_ne_bytes());
    }
    let mut all = service(key, None);
    all.extend(Attributes::nest(ATTR_DEST, &inner).0);
    all
}

/// Attributes being read: number and value. Ends at the first that is malformed.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_of(rest)?);
        let kind = u16_of(rest.get(2..)?)? & NLA_TYPE;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn u16_of(value: &[u8]) -> Option<u16> {
    value.first_chunk().map(|v| u16::from_ne_bytes(*v))
}

fn u32_of(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|v| u32::from_ne_bytes(*v))
}

fn address_of(value: &[u8], v6: bool) -> Option<IpAddr> {
    if v6 {
        value.first_chunk::<16>().map(|v| (*v).into())
    } else {
        value.first_chunk::<4>().map(|v| (*v).into())
    }
}

fn server_of(nested: &[u8]) -> Option<Server> {
    let value = |wanted: u16| attributes(nested).find(|(kind, _)| *kind == wanted).map(|(_, v)| v);
    let v6 = u16_of(value(1)?)? == af(true);
    let key = match value(5).and_then(u32_of) {
        Some(mark) if mark != 0 => ServerKey::Mark(mark, if v6 { Family::V6 } else { Family::V4 }),
        _ => {
            let protocol = match u16_of(value(2)?)? {
                6 => Protocol::Tcp,
                17 => Protocol::Udp,
                132 => Protocol::Sctp,
                _ => return None,
            };
            let port = u16::from_be_bytes(*value(4)?.first_chunk()?);
            ServerKey::Address(address_of(value(3)?, v6)?, port, protocol)
        }
    };
    let flags = value(7).and_then(u32_of).unwrap_or(0);
    let timeout = value(8).and_then(u32_of).unwrap_or(0);
    let name = value(6).unwrap_or_default();
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    let statistics = value(12).unwrap_or_default();
    let connections = attributes(statistics)
        .find(|(kind, _)| *kind == 1)
        .and_then(|(_, v)| v.first_chunk().map(|v| u64::from_ne_bytes(*v)));
    Some(Server {
        key,
        spec: ServerSpec {
            scheduler: String::from_utf8_lossy(&name[..end]).into_owned(),
            persistent_s: (flags & FLAG_PERSISTENT != 0).then_some(timeout),
            fallback: flags & FLAG_SCHED_1 != 0,
            hash_port: flags & FLAG_SCHED_2 != 0,
        },
        connections: connections.unwrap_or(0),
    })
}

fn real_of(nested: &[u8], v6: bool) -> Option<Real> {
    let value = |wanted: u16| attributes(nested).find(|(kind, _)| *kind == wanted).map(|(_, v)| v);
    let number = |wanted| value(wanted).and_then(u32_of).unwrap_or(0);
    let v6 = value(11).and_then(u16_of).map_or(v6, |family| family == af(true));
    Some(Real {
        addr: address_of(value(1)?, v6)?,
        port: u16::from_be_bytes(*value(2)?.first_chunk()?),
        // The lowest three bits are the method; 0 is translation.
        translated: number(3) & 0x7 == 0,
        weight: number(4),
        connections: number(7).saturating_add(number(8)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let spec = ServerSpec {
            scheduler: "mh".into(),
            persistent_s: Some(10_800),
            fallback: true,
            hash_port: false,
        };
        for key in [
            ServerKey::Address("10.96.0.1".parse().unwrap(), 443, Protocol::Tcp),
            ServerKey::Address("fd00::1".parse().unwrap(), 53, Protocol::Udp),
            ServerKey::Mark(0x5000_0001, Family::V6),
        ] {
            let bytes = service(&key, Some(&spec));
            let (kind, nested) = attributes(&bytes).next().unwrap();
            assert_eq!(kind, ATTR_SERVICE);
            let server = server_of(nested).unwrap();
            assert_eq!((server.key, &server.spec), (key, &spec));
        }
        let key = ServerKey::Mark(1, Family::V4);
        let bytes = dest(&key, "10.0.0.2".parse().unwrap(), 8080, Some(3));
        let (kind, nested) = attributes(&bytes).nth(1).unwrap();
        assert_eq!(kind, ATTR_DEST);
        let real = real_of(nested, false).unwrap();
        assert_eq!((real.addr.to_string().as_str(), real.port, real.weight), ("10.0.0.2", 8080, 3));
        assert!(real.translated);
    }

    #[test]
    fn malformed_attributes_end_the_reading() {
        for bytes in [&[][..], &[1], &[0, 0, 0, 0], &[200, 0, 1, 0, 1], &[3, 0, 0, 0]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
        assert!(server_of(&[]).is_none() && real_of(&[8, 0, 1, 0, 1, 2, 3, 4], true).is_none());
    }
}
