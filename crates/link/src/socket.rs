//! The netlink request socket: send, wait for the acknowledgement, collect dumps.
//!
//! Rules kept here so that nothing above has to think of them: every request asks for an acknowledgement
//! and is over only when that came; answers to earlier requests (other sequence numbers) and messages that
//! did not come from the kernel are skipped; a dump that the kernel marks as interrupted by a change
//! (NLM_F_DUMP_INTR) or that overran the receive buffer (ENOBUFS) is taken again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::{Error, Result};

/// Receive buffer asked of the kernel: dumps come in parts of at most 32 KiB, so this is never the limit for
/// requests; for the multicast socket it is the length of the queue of changes.
const RECEIVE_QUEUE: usize = 4 << 20;
/// Largest single datagram taken at once; grown when the kernel says that one was larger.
const RECEIVE_BUFFER: usize = 64 << 10;
/// The kernel answers within the sending system call; a socket silent for this long is broken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an interrupted or overrun dump is taken again before the caller hears of it.
const DUMP_ATTEMPTS: usize = 16;

const NLMSG_HEADER: usize = 16;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// One rtnetlink socket with one request under way at a time.
#[derive(Debug)]
pub(crate) struct RequestSocket {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// Why one run over the answers ended without a result.
enum Failed {
    Again(Errno),
    Final(Error),
}

impl RequestSocket {
    pub(crate) fn open() -> Result<Self> {
        let wrap = |source: io::Error| Error::io("open", "netlink socket", source);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(wrap)?;
        socket.bind_auto().map_err(wrap)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(wrap)?;
        // The words of the kernel in place of a bare errno, and no copy of our own request behind them.
        socket.set_ext_ack(true).map_err(wrap)?;
        socket.set_cap_ack(true).map_err(wrap)?;
        // Without the strict check the kernel ignores filters in dump requests.
        socket.set_netlink_get_strict_chk(true).map_err(wrap)?;
        grow_receive_queue(&socket).map_err(wrap)?;
        let timeout = TimeVal::milliseconds(i64::try_from(ANSWER_TIMEOUT.as_millis()).unwrap_or(i64::MAX));
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).map_err(|e| wrap(e.into()))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Sends one request and waits for its acknowledgement. Returns the messages that came before it, each
    /// as type and payload.
    pub(crate) fn request(
        &mut self,
        operation: &'static str,
        object: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<(u16, Vec<u8>)>> {
        self.send(operation, object, message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        let mut answers = Vec::new();
        match self.collect(operation, object, |kind, payload| answers.push((kind, payload.to_vec()))) {
            Ok(()) => Ok(answers),
            Err(Failed::Final(error)) => Err(error),
            Err(Failed::Again(errno)) => {
                Err(Error::Kernel { operation, object: object.into(), errno, detail: None })
            }
        }
    }

    /// Takes a dump and decodes each message; what `decode` gives no value for is left out.
    pub(crate) fn dump<T>(
        &mut self,
        operation: &'static str,
        object: &str,
        message: &RouteNetlinkMessage,
        mut decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>> {
        let mut last = Errno::EINTR;
        for _ in 0..DUMP_ATTEMPTS {
            self.send(operation, object, message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            let mut found = Vec::new();
            match self.collect(operation, object, |kind, payload| found.extend(decode(kind, payload))) {
                Ok(()) => return Ok(found),
                Err(Failed::Final(error)) => return Err(error),
                Err(Failed::Again(errno)) => last = errno,
            }
        }
        Err(Error::Kernel {
            operation,
            object: object.into(),
            errno: last,
            detail: Some(format!("the table changed during each of {DUMP_ATTEMPTS} dumps; try again")),
        })
    }

    fn send(
        &mut self,
        operation: &'static str,
        object: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<()> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let mut header = NetlinkHeader::default();
        header.sequence_number = self.sequence;
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        loop {
            match self.socket.send(&bytes, 0) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(operation, object, e)),
            }
        }
    }

    /// Reads answers up to the acknowledgement (or end of the dump) of the request with the current
    /// sequence number.
    fn collect(
        &mut self,
        operation: &'static str,
        object: &str,
        mut take: impl FnMut(u16, &[u8]),
    ) -> Result<(), Failed> {
        let mut interrupted = false;
        loop {
            let length = match receive(&self.socket, &mut self.buffer, 0) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let source = io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("no answer from the kernel within {} s", ANSWER_TIMEOUT.as_secs()),
                    );
                    return Err(Failed::Final(Error::io(operation, object, source)));
                }
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Err(Failed::Again(Errno::ENOBUFS));
                }
                Err(e) => return Err(Failed::Final(Error::io(operation, object, e))),
            };
            if length > self.buffer.len() {
                // Truncated: the rest of this datagram is gone. With more room the next attempt has it.
                self.buffer.reserve(length);
                return Err(Failed::Again(Errno::EMSGSIZE));
            }
            let buffer = std::mem::take(&mut self.buffer);
            let mut outcome = None;
            for message in messages(&buffer) {
                if message.sequence != self.sequence {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_NOOP => {}
                    NLMSG_OVERRUN => outcome = Some(Err(Failed::Again(Errno::ENOBUFS))),
                    NLMSG_ERROR | NLMSG_DONE => {
                        outcome = Some(acknowledgement(operation, object, &message, interrupted));
                    }
                    kind => take(kind, message.payload),
                }
                if outcome.is_some() {
                    break;
                }
            }
            self.buffer = buffer;
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }
}

impl AsFd for RequestSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What NLMSG_ERROR or NLMSG_DONE says about the request.
fn acknowledgement(
    operation: &'static str,
    object: &str,
    message: &Message<'_>,
    interrupted: bool,
) -> Result<(), Failed> {
    let code = message.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    if code == 0 {
        return if interrupted { Err(Failed::Again(Errno::EINTR)) } else { Ok(()) };
    }
    let errno = Errno::from_raw(code.saturating_neg());
    // A dump that is given up by the kernel half way because the table changed under it.
    if message.kind == NLMSG_DONE && errno == Errno::EINTR {
        return Err(Failed::Again(errno));
    }
    let detail = extended_acknowledgement(message);
    Err(Failed::Final(Error::Kernel { operation, object: object.into(), errno, detail }))
}

/// The text of the extended acknowledgement (NLMSGERR_ATTR_MSG), if there is one.
fn extended_acknowledgement(message: &Message<'_>) -> Option<String> {
    if message.flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let rest = message.payload.get(4..)?;
    let attributes = if message.kind == NLMSG_DONE {
        rest
    } else {
        // Behind the code is the header of our request, and its payload too unless it was capped.
        let request = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let skip = if message.flags & NLM_F_CAPPED != 0 { NLMSG_HEADER } else { request.next_multiple_of(4) };
        rest.get(skip..)?
    };
    Attributes(attributes).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG).map(|(_, text)| string(text))
}

/// Asks for a long receive queue: past `rmem_max` when privileged, up to it when not.
pub(crate) fn grow_receive_queue(socket: &Socket) -> io::Result<()> {
    if setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_QUEUE).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &RECEIVE_QUEUE)?;
    }
    Ok(())
}

/// Receives one datagram from the kernel into `buffer` (emptied first). Returns its real length, which is
/// larger than `buffer.len()` when it was truncated.
pub(crate) fn receive(socket: &Socket, buffer: &mut Vec<u8>, flags: libc::c_int) -> io::Result<usize> {
    loop {
        buffer.clear();
        buffer.reserve(RECEIVE_BUFFER);
        match socket.recv_from(buffer, flags | libc::MSG_TRUNC) {
            // Only port 0 is the kernel; any process could send to our port otherwise.
            Ok((length, from)) if from.port_number() == 0 => return Ok(length),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// One netlink message inside a datagram.
#[derive(Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of one datagram; ends at the first that is malformed.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = NetlinkBuffer::new_checked(datagram).ok()?;
        let length = header.length() as usize;
        let message = Message {
            kind: header.message_type(),
            flags: header.flags(),
            sequence: header.sequence_number(),
            payload: datagram.get(NLMSG_HEADER..length)?,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes of a message: number (without the nested and byte-order bits) and value. Ends at the
/// first that is malformed, so that a message of a newer kernel costs at most its own tail.
#[derive(Debug, Clone)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(*self.0.first_chunk()?));
        let kind = u16::from_ne_bytes(*self.0.get(2..)?.first_chunk()?) & netlink_packet_core::NLA_TYPE_MASK;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// A NUL-terminated string of the kernel.
pub(crate) fn string(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// A 32-bit number in the machine's byte order.
pub(crate) fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|v| u32::from_ne_bytes(*v))
}

/// An address of 4 or 16 bytes.
pub(crate) fn ip(value: &[u8]) -> Option<std::net::IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(value).ok().map(Into::into),
        _ => None,
    }
}
