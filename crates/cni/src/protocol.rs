//! The conversation between plugin and agent: one request and one response over a unix stream socket.
//!
//! A frame is a length of four bytes, big-endian, and that much JSON. The open network namespace of the
//! container travels with the request as a file descriptor (SCM_RIGHTS, unix(7)), because the agent may not see
//! the path that the runtime gave to the plugin. Only root and the agent's own user are served.
//!
//! Plugin and agent are the same binary, but during an upgrade the old one may talk to the new one: a
//! request of another protocol version is answered with "try again", which a runtime does.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::Attachment;
use crate::environment::Args;
use crate::error::{CniError, code};
use crate::result::AddResult;
use crate::runtime_config::RuntimeConfig;

/// Version of this protocol.
pub const PROTOCOL_VERSION: u32 = 2;
/// Largest frame, in bytes.
pub const FRAME_MAX: usize = 1 << 20;
/// How long either side waits for the other to send or take a frame that it has begun.
pub const TRANSFER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the plugin waits for the agent to finish an operation.
pub const OPERATION_TIMEOUT: Duration = Duration::from_secs(60);

/// A request of the plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u32,
    /// What to do.
    pub command: Command,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// Attach; comes with the namespace.
    Add(AddRequest),
    /// Detach.
    Del(DelRequest),
    /// Verify; comes with the namespace.
    Check(CheckRequest),
    /// Detach what is not listed.
    Gc(GcRequest),
    /// Say whether ADD would be served.
    Status,
}

/// Attach a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddRequest {
    /// CNI_CONTAINERID, checked.
    pub container_id: String,
    /// CNI_IFNAME, checked.
    pub ifname: String,
    /// CNI_NETNS as the runtime wrote it, for the result's `sandbox` and for logs; the namespace itself
    /// comes as a file descriptor.
    pub netns_path: String,
    /// CNI_ARGS: which pod it is.
    pub args: Args,
    /// Name of the network. GC is about one network.
    pub network: String,
    /// `runtimeConfig`, checked.
    #[serde(default)]
    pub runtime: RuntimeConfig,
}

/// Detach a container. It must succeed when there is nothing to detach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DelRequest {
    /// CNI_CONTAINERID, checked.
    pub container_id: String,
    /// CNI_IFNAME, checked.
    pub ifname: String,
    /// CNI_NETNS; may be empty, and the namespace may be gone.
    pub netns_path: String,
    /// CNI_ARGS.
    pub args: Args,
    /// Name of the network.
    pub network: String,
}

/// Verify a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckRequest {
    /// CNI_CONTAINERID, checked.
    pub container_id: String,
    /// CNI_IFNAME, checked.
    pub ifname: String,
    /// CNI_NETNS as the runtime wrote it.
    pub netns_path: String,
    /// CNI_ARGS.
    pub args: Args,
    /// Name of the network.
    pub network: String,
    /// The addresses that ADD gave to this interface, as the runtime remembers them.
    pub addresses: Vec<IpNet>,
}

/// Detach every container of the network that is not listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcRequest {
    /// Name of the network.
    pub network: String,
    /// What the runtime still knows.
    pub valid_attachments: Vec<Attachment>,
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Response {
    /// Done. ADD has a result, the others have not.
    Ok(Option<AddResult>),
    /// Not done.
    Err(CniError),
}

/// The agent's side of the operations.
pub trait Handler {
    /// Attaches the container whose namespace is given.
    ///
    /// # Errors
    /// The error that the runtime is told; code 11 makes it try again.
    fn add(&self, request: AddRequest, netns: OwnedFd) -> Result<AddResult, CniError>;

    /// Detaches a container. Nothing there to detach is success.
    ///
    /// # Errors
    /// The error that the runtime is told.
    fn del(&self, request: DelRequest) -> Result<(), CniError>;

    /// Verifies that a container is attached as it was.
    ///
    /// # Errors
    /// What is different now.
    fn check(&self, request: CheckRequest, netns: OwnedFd) -> Result<(), CniError>;

    /// Detaches what the runtime does not know any more.
    ///
    /// # Errors
    /// The first failure, after trying all.
    fn gc(&self, request: GcRequest) -> Result<(), CniError>;

    /// Says whether an ADD would be served.
    ///
    /// # Errors
    /// Code 50, or 51 when running containers are affected, too.
    fn status(&self) -> Result<(), CniError>;
}

/// Serves one connection: reads the request, calls the handler, writes the response. A request that cannot
/// be read is answered with an error as far as possible.
///
/// # Errors
/// When the connection broke. After a successful [`Handler::add`] that means that the plugin was killed: the
/// attachment stays until the runtime's DEL or GC.
pub fn serve_connection(mut stream: UnixStream, handler: &impl Handler) -> io::Result<()> {
    stream.set_read_timeout(Some(TRANSFER_TIMEOUT))?;
    stream.set_write_timeout(Some(TRANSFER_TIMEOUT))?;
    let response = match receive_request(&mut stream) {
        Ok((request, netns)) => handle(request, netns, handler),
        // Nobody is there to read an answer.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(e),
        Err(e) => {
            let code = if e.kind() == io::ErrorKind::InvalidData { code::DECODE } else { code::IO };
            Response::Err(CniError::new(code, "the agent cannot read the request").details(e.to_string()))
        }
    };
    write_frame(&mut stream, &response, None)
}

fn receive_request(stream: &mut UnixStream) -> io::Result<(Request, Option<OwnedFd>)> {
    let peer = sockopt::socket_peercred(&*stream)?.uid;
    if !peer.is_root() && peer != rustix::process::geteuid() {
        let cause = format!("user {} is not root", peer.as_raw());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, cause));
    }
    read_frame(stream)
}

fn handle(request: Request, netns: Option<OwnedFd>, handler: &impl Handler) -> Response {
    if request.version != PROTOCOL_VERSION {
        let msg = format!(
            "the plugin speaks version {} of the agent's protocol, the agent speaks {PROTOCOL_VERSION}",
            request.version
        );
        let details = "plugin and agent are of different releases, as for a moment during an upgrade; if it stays, reinstall the plugin";
        return Response::Err(CniError::try_again(msg).details(details));
    }
    let no_netns = || CniError::new(code::IO, "the request came without the network namespace");
    let done = match request.command {
        Command::Add(add) => netns.ok_or_else(no_netns).and_then(|netns| handler.add(add, netns)).map(Some),
        Command::Check(check) => {
            netns.ok_or_else(no_netns).and_then(|netns| handler.check(check, netns)).map(|()| None)
        }
        Command::Del(del) => handler.del(del).map(|()| None),
        Command::Gc(gc) => handler.gc(gc).map(|()| None),
        Command::Status => handler.status().map(|()| None),
    };
    done.map_or_else(Response::Err, Response::Ok)
}

/// Why the plugin has no answer of the agent.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nothing listens on the socket: the agent does not run (yet).
    #[error("the agent does not listen on {path}: {source}")]
    Absent {
        /// The socket.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The socket may not be used.
    #[error("cannot connect to the agent's socket {path}: {source}")]
    Refused {
        /// The socket.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The agent went away, or took too long: whether it did what was asked is not known.
    #[error("the agent gave no answer: {0}")]
    Interrupted(io::Error),
    /// The answer made no sense.
    #[error("the agent's answer cannot be read: {0}")]
    Garbled(io::Error),
}

/// The plugin's side: sends a request to the agent's socket, with the namespace when there is one, and waits
/// for the response.
///
/// # Errors
/// See [`CallError`].
pub fn call(socket: &Path, command: Command, netns: Option<BorrowedFd<'_>>) -> Result<Response, CallError> {
    let path = || socket.display().to_string();
    let mut stream = connect(socket).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock => {
            CallError::Absent { path: path(), source }
        }
        _ => CallError::Refused { path: path(), source },
    })?;
    let request = Request { version: PROTOCOL_VERSION, command };
    stream
        .set_write_timeout(Some(TRANSFER_TIMEOUT))
        .and_then(|()| stream.set_read_timeout(Some(OPERATION_TIMEOUT)))
        .and_then(|()| write_frame(&mut stream, &request, netns))
        .map_err(CallError::Interrupted)?;
    match read_frame(&mut stream) {
        Ok((response, _)) => Ok(response),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => Err(CallError::Garbled(e)),
        Err(e) => Err(CallError::Interrupted(e)),
    }
}

/// Connects within [`TRANSFER_TIMEOUT`]: an agent that hangs with its queue of connections full must not hang
/// the plugin.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(TRANSFER_TIMEOUT))?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address))?;
    Ok(UnixStream::from(socket))
}

impl Command {
    /// `ADD`, `DEL`, `CHECK`, `GC` or `STATUS`, for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Add(_) => "ADD",
            Self::Del(_) => "DEL",
            Self::Check(_) => "CHECK",
            Self::Gc(_) => "GC",
            Self::Status => "STATUS",
        }
    }
}

fn write_frame(
    stream: &mut UnixStream,
    value: &impl Serialize,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, value)?;
    let length = frame.len() - 4;
    if length > FRAME_MAX {
        let cause = format!("frame of {length} bytes is larger than {FRAME_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, cause));
    }
    let prefix = u32::try_from(length).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    frame[..4].copy_from_slice(&prefix.to_be_bytes());
    let mut sent = 0;
    if let Some(fd) = fd {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for the file descriptor"));
        }
        sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&*stream, &[IoSlice::new(&frame)], &mut ancillary, SendFlags::NOSIGNAL)
        })?;
    }
    stream.write_all(&frame[sent..])
}

fn read_frame<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<(T, Option<OwnedFd>)> {
    let mut prefix = [0; 4];
    let mut filled = 0;
    let mut received = None;
    // The descriptor comes with the first byte of the frame.
    while filled < prefix.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut room = [IoSliceMut::new(&mut prefix[filled..])];
        let message = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(stream.as_fd(), &mut room, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                // More than one was not asked for; they are closed here.
                received = fds.into_iter().next().or(received);
            }
        }
        if message.bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"));
        }
        filled += message.bytes;
    }
    let length = u32::from_be_bytes(prefix) as usize;
    if length > FRAME_MAX {
        let cause = format!("frame of {length} bytes announced, at most {FRAME_MAX} are taken");
        return Err(io::Error::new(io::ErrorKind::InvalidData, cause));
    }
    // Read as it comes: the announced length alone must not cost memory.
    let mut body = Vec::new();
    (&mut *stream).take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed within a frame"));
    }
    let value = serde_json::from_slice(&body).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok((value, received))
}
