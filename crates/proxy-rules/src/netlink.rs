//! Messages of nfnetlink: building, parsing, and one socket for them.
//!
//! Numbers in attributes are in network byte order, as nfnetlink has them, except where a name says otherwise.

use std::{io, os::fd::AsRawFd as _, time::Duration};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::{
    errno::Errno,
    libc,
    sys::{
        socket::{setsockopt, sockopt},
        time::{TimeVal, TimeValLike as _},
    },
};

pub(crate) const NLM_F_REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub(crate) const NLM_F_DUMP: u16 = libc::NLM_F_DUMP as u16;
pub(crate) const NLM_F_CREATE: u16 = libc::NLM_F_CREATE as u16;
pub(crate) const NLM_F_APPEND: u16 = libc::NLM_F_APPEND as u16;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

const HEADER: usize = 16;
const NFGENMSG: usize = 4;
/// The kernel fills at most this much in one answer.
const RECEIVE: usize = 256 << 10;
const RECEIVE_QUEUE: usize = 8 << 20;
/// How often a dump that a change interrupted is taken again.
const DUMP_ATTEMPTS: usize = 16;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Several messages one behind the other.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    pub(crate) bytes: Vec<u8>,
    start: usize,
}

impl Messages {
    /// Begins a message; the one before it is complete.
    pub(crate) fn begin(&mut self, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) {
        self.start = self.bytes.len();
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        self.seal();
    }

    /// Writes the length of the message under way.
    pub(crate) fn seal(&mut self) {
        let length = u32::try_from(self.bytes.len() - self.start).unwrap_or(u32::MAX);
        self.bytes[self.start..self.start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// An attribute.
    pub(crate) fn attr(&mut self, kind: u16, value: &[u8]) {
        put_attr(&mut self.bytes, kind, value);
        self.seal();
    }

    /// A NUL-terminated string.
    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        put_text(&mut self.bytes, kind, value);
        self.seal();
    }

    /// A number.
    pub(crate) fn number(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_be_bytes());
    }

    /// An attribute that holds attributes.
    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        put_nested(&mut self.bytes, kind, fill);
        self.seal();
    }
}

/// Appends an attribute, padded.
pub(crate) fn put_attr(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("attributes are built in pieces far below 64 KiB");
    to.extend_from_slice(&length.to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// Appends a NUL-terminated string.
pub(crate) fn put_text(to: &mut Vec<u8>, kind: u16, value: &str) {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    put_attr(to, kind, &bytes);
}

/// Appends a number.
pub(crate) fn put_number(to: &mut Vec<u8>, kind: u16, value: u32) {
    put_attr(to, kind, &value.to_be_bytes());
}

/// Appends an attribute that holds attributes.
pub(crate) fn put_nested(to: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = to.len();
    to.extend_from_slice(&[0; 4]);
    fill(to);
    let length = u16::try_from(to.len() - start).expect("nests are built in pieces far below 64 KiB");
    to[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    to[start + 2..start + 4].copy_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
}

/// The attributes in a buffer: kind without flags, and value.
pub(crate) fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & NLA_TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of a kind.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

/// A number in an attribute.
pub(crate) fn find_number(bytes: &[u8], kind: u16) -> Option<u32> {
    find(bytes, kind)?.first_chunk().map(|b| u32::from_be_bytes(*b))
}

/// A string in an attribute, without its NUL.
pub(crate) fn find_text(bytes: &[u8], kind: u16) -> Option<String> {
    let value = find(bytes, kind)?;
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    Some(String::from_utf8_lossy(&value[..end]).into_owned())
}

/// The kernel's answer to one message of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Sequence number of the message that it refuses.
    pub(crate) sequence: u32,
    /// Why.
    pub(crate) errno: Errno,
    /// In the kernel's words, when it had any.
    pub(crate) text: Option<String>,
}

impl Failure {
    /// One line.
    pub(crate) fn describe(&self) -> String {
        match &self.text {
            Some(text) => format!("{text} ({})", self.errno.desc()),
            None => self.errno.desc().into(),
        }
    }
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        io::Error::new(io::Error::from(failure.errno).kind(), failure.describe())
    }
}

/// One nfnetlink socket, in the network namespace of the thread that opens it.
#[derive(Debug)]
pub(crate) struct NfSocket {
    socket: Socket,
    buffer: Vec<u8>,
    sequence: u32,
    send_queue: usize,
}

impl NfSocket {
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_QUEUE)
            .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_QUEUE))?;
        let timeout = TimeVal::milliseconds(i64::try_from(ANSWER_TIMEOUT.as_millis()).unwrap_or(i64::MAX));
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        Ok(Self { socket, buffer: vec![0; RECEIVE], sequence: 1, send_queue: 0 })
    }

    /// A run of sequence numbers that no other request has.
    pub(crate) fn take_sequences(&mut self, count: u32) -> u32 {
        if self.sequence > u32::MAX - count - 1 {
            self.sequence = 1;
        }
        let first = self.sequence;
        self.sequence += count;
        first
    }

    /// Sends messages of which none asks for an acknowledgement, and returns what the kernel refused. It has worked
    /// off everything when `send` returns.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<Vec<Failure>> {
        self.write(bytes)?;
        let mut failures = Vec::new();
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(length) => {
                    for message in messages(&self.buffer[..length]) {
                        if let Some(failure) = message.failure() {
                            failures.push(failure);
                        }
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(failures),
                // More refusals than the queue holds; those that were read will do.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends one request and takes the messages of the answer (without header and nfgenmsg). `None` from the kernel's
    /// "no such file": what was asked for is not there.
    pub(crate) fn dump(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        attributes: &[u8],
        mut take: impl FnMut(u8, &[u8]),
    ) -> io::Result<Option<()>> {
        for _ in 0..DUMP_ATTEMPTS {
            let sequence = self.take_sequences(1);
            let mut request = Messages::default();
            request.begin(kind, NLM_F_REQUEST | flags, sequence, family, 0);
            request.bytes.extend_from_slice(attributes);
            request.seal();
            match self.dump_once(&request.bytes, sequence, flags & NLM_F_DUMP != 0)? {
                Answer::Whole(parts) => {
                    for (family, part) in &parts {
                        take(*family, part);
                    }
                    return Ok(Some(()));
                }
                Answer::Interrupted => {}
                Answer::Refused(f) if f.errno == Errno::ENOENT => return Ok(None),
                Answer::Refused(f) => return Err(f.into()),
            }
        }
        Err(io::Error::other(format!("changed during each of {DUMP_ATTEMPTS} dumps; try again")))
    }

    fn dump_once(&mut self, request: &[u8], sequence: u32, many: bool) -> io::Result<Answer> {
        self.write(request)?;
        let mut parts = Vec::new();
        let mut interrupted = false;
        loop {
            let length = match self.receive(0) {
                Ok(length) => length,
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                    interrupted = true;
                    continue;
                }
                Err(e) => return Err(e),
            };
            for message in messages(&self.buffer[..length]) {
                if message.sequence != sequence {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return Ok(match message.failure() {
                            Some(f) if f.errno == Errno::EINTR => Answer::Interrupted,
                            Some(f) => Answer::Refused(f),
                            None if interrupted => Answer::Interrupted,
                            None => Answer::Whole(parts),
                        });
                    }
                    NLMSG_OVERRUN => interrupted = true,
                    _ if message.body.len() >= NFGENMSG => {
                        parts.push((message.body[0], message.body[NFGENMSG..].to_vec()));
                        if !many {
                            return Ok(Answer::Whole(parts));
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let wanted = bytes.len() + (64 << 10);
        if wanted > self.send_queue {
            // A batch has to go out in one piece.
            setsockopt(&self.socket, sockopt::SndBufForce, &wanted)
                .or_else(|_| setsockopt(&self.socket, sockopt::SndBuf, &wanted))?;
            self.send_queue = wanted;
        }
        let sent = self.socket.send(bytes, 0)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&mut self, flags: libc::c_int) -> io::Result<usize> {
        loop {
            match nix::sys::socket::recv(
                self.socket.as_raw_fd(),
                &mut self.buffer,
                nix::sys::socket::MsgFlags::from_bits_truncate(flags),
            ) {
                Ok(length) => return Ok(length),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if flags & libc::MSG_DONTWAIT == 0 => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("the kernel did not answer for {ANSWER_TIMEOUT:?}"),
                    ));
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

enum Answer {
    Whole(Vec<(u8, Vec<u8>)>),
    Interrupted,
    Refused(Failure),
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Message<'_> {
    /// What an error message, or the end of a dump, says; `None` when it says success.
    fn failure(&self) -> Option<Failure> {
        if self.kind != NLMSG_ERROR && self.kind != NLMSG_DONE {
            return None;
        }
        let code = self.body.first_chunk().map_or(0, |b| i32::from_ne_bytes(*b));
        if code >= 0 {
            return None;
        }
        let text = (self.flags & NLM_F_ACK_TLVS != 0).then(|| {
            // With the capped kind only the header of the refused message stands before the attributes.
            let skip = if self.kind == NLMSG_DONE {
                4
            } else if self.flags & NLM_F_CAPPED != 0 {
                4 + HEADER
            } else {
                let length = self.body.get(4..8).and_then(|b| b.first_chunk());
                4 + length.map_or(HEADER, |b| u32::from_ne_bytes(*b) as usize)
            };
            find_text(self.body.get(skip..).unwrap_or_default(), NLMSGERR_ATTR_MSG)
        });
        Some(Failure { sequence: self.sequence, errno: Errno::from_raw(-code), text: text.flatten() })
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let header = bytes.get(..HEADER)?;
        let message = Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            body: bytes.get(HEADER..length)?,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}
