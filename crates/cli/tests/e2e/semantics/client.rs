//! A process in a place of the lab that connects and sends datagrams as it is told, line by line.
//!
//! It is this very test program, called again by `podway lab exec` and the like: so it is in the pod's namespace and
//! in its control group, holds sockets open for as long as a test wants, and needs no program of the machine.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Set in the process that is the client.
const ROLE: &str = "PODWAY_TEST_CLIENT";
/// Before each answer, since the test harness prints lines of its own.
const MARK: &str = "answer ";
/// Longest wait for a connection, in milliseconds: less than what a lost SYN needs to be sent again.
pub(super) const CONNECT_MS: u64 = 600;
/// Longest wait for a datagram.
const DATAGRAM: Duration = Duration::from_millis(400);
/// Longest wait for what is sent on an open connection, which may be lost and sent again.
const STREAM: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(super) enum Kind {
    Tcp,
    /// Addresses are given with each datagram.
    Udp,
    /// The socket is connected.
    ConnectedUdp,
}

#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// The address that goes to another one.
    Source { to: SocketAddr },
    /// So many sockets, one exchange on each.
    Try { kind: Kind, to: SocketAddr, times: usize, size: usize, connect_ms: u64 },
    /// A socket that stays; the answer is that of a first exchange.
    Open { id: u32, kind: Kind, to: SocketAddr },
    /// One more exchange on it.
    Ask { id: u32, to: SocketAddr },
    /// What an HTTP server says to `GET /`, head and body.
    Get { to: SocketAddr },
}

/// What came of an exchange.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Outcome {
    /// A stand-in answered.
    Served {
        pod: String,
        node: String,
        port: u16,
        saw: IpAddr,
    },
    /// An error at once: reset, or port unreachable.
    Refused,
    /// Nothing came back.
    Silence,
    /// The socket was closed from outside.
    Aborted,
    Other(String),
}

/// The end of the line that the test holds.
pub(super) struct Client {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    next: u32,
}

impl Client {
    /// Starts it with a command that runs a program in the place.
    pub(super) fn start(program: &std::ffi::OsStr, arguments: &[String]) -> Self {
        let mut child = Command::new(program)
            .args(arguments)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "semantics::client::stands_where_it_was_started", "--nocapture"])
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, orders, answers: BufReader::new(answers), next: 0 }
    }

    /// The address that this client has on the way to another.
    pub(super) fn source(&mut self, to: IpAddr) -> IpAddr {
        serde_json::from_value(self.tell(&Order::Source { to: SocketAddr::new(to, 9) })).unwrap()
    }

    pub(super) fn tries(&mut self, kind: Kind, to: SocketAddr, times: usize) -> Vec<Outcome> {
        self.patient_tries(kind, to, times, 1, CONNECT_MS)
    }

    /// The same with datagrams of a size, and another wait for connections.
    pub(super) fn patient_tries(
        &mut self,
        kind: Kind,
        to: SocketAddr,
        times: usize,
        size: usize,
        connect_ms: u64,
    ) -> Vec<Outcome> {
        serde_json::from_value(self.tell(&Order::Try { kind, to, times, size, connect_ms })).unwrap()
    }

    /// Opens a socket that stays; its number, and what came of the first exchange.
    pub(super) fn open(&mut self, kind: Kind, to: SocketAddr) -> (u32, Outcome) {
        self.next += 1;
        let answer = self.tell(&Order::Open { id: self.next, kind, to });
        (self.next, serde_json::from_value(answer).unwrap())
    }

    pub(super) fn ask(&mut self, id: u32, to: SocketAddr) -> Outcome {
        serde_json::from_value(self.tell(&Order::Ask { id, to })).unwrap()
    }

    /// What an HTTP server says, head and body; empty when it says nothing.
    pub(super) fn get(&mut self, to: SocketAddr) -> String {
        serde_json::from_value(self.tell(&Order::Get { to })).unwrap()
    }

    fn tell(&mut self, order: &Order) -> Value {
        writeln!(self.orders, "{}", serde_json::to_string(order).unwrap()).unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "the client ended");
            if let Some(at) = line.find(MARK) {
                return serde_json::from_str(&line[at + MARK.len()..]).unwrap();
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The client's own end: does what it is told until nobody tells it any more. No test where it was not started so.
#[test]
fn stands_where_it_was_started() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let mut sockets = BTreeMap::new();
    for line in io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line.unwrap()).unwrap() {
            Order::Source { to } => serde_json::to_value(source(to).unwrap()),
            Order::Try { kind, to, times, size, connect_ms } => {
                let one = |_| {
                    let socket = Socket::open(kind, to, Duration::from_millis(connect_ms));
                    outcome(socket.and_then(|mut socket| socket.exchange(to, size, true)))
                };
                serde_json::to_value((0..times).map(one).collect::<Vec<_>>())
            }
            Order::Open { id, kind, to } => {
                serde_json::to_value(match Socket::open(kind, to, Duration::from_millis(CONNECT_MS)) {
                    Ok(mut socket) => {
                        let first = outcome(socket.exchange(to, 1, false));
                        sockets.insert(id, socket);
                        first
                    }
                    Err(error) => outcome(Err(error)),
                })
            }
            Order::Get { to } => serde_json::to_value(get(to).unwrap_or_default()),
            Order::Ask { id, to } => serde_json::to_value(match sockets.get_mut(&id) {
                Some(socket) => outcome(socket.exchange(to, 1, false)),
                None => Outcome::Other("it was never open".to_owned()),
            }),
        };
        println!("{MARK}{}", answer.unwrap());
    }
}

fn source(to: SocketAddr) -> io::Result<IpAddr> {
    let socket = UdpSocket::bind(any(to))?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

fn get(to: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(CONNECT_MS))?;
    stream.set_read_timeout(Some(STREAM))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn any(to: SocketAddr) -> SocketAddr {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    any.parse().unwrap()
}

enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
    ConnectedUdp(UdpSocket),
}

impl Socket {
    fn open(kind: Kind, to: SocketAddr, connect: Duration) -> io::Result<Self> {
        if kind == Kind::Tcp {
            let stream = TcpStream::connect_timeout(&to, connect)?;
            stream.set_read_timeout(Some(STREAM))?;
            return Ok(Self::Tcp(stream));
        }
        let socket = UdpSocket::bind(any(to))?;
        socket.set_read_timeout(Some(DATAGRAM))?;
        if kind == Kind::Udp {
            return Ok(Self::Udp(socket));
        }
        socket.connect(to)?;
        Ok(Self::ConnectedUdp(socket))
    }

    /// Asks and waits for the answer, the `last` one on this socket.
    fn exchange(&mut self, to: SocketAddr, size: usize, last: bool) -> io::Result<Vec<u8>> {
        let mut answer = vec![0; 4096];
        let length = match self {
            Self::Tcp(stream) => {
                let close = if last { "Connection: close\r\n" } else { "" };
                stream.write_all(format!("GET / HTTP/1.1\r\nHost: test\r\n{close}\r\n").as_bytes())?;
                return http(stream);
            }
            Self::Udp(socket) => {
                // An answer that came too late for an earlier exchange is none to this one.
                drain(socket);
                socket.send_to(&vec![b'x'; size], to)?;
                let (length, from) = socket.recv_from(&mut answer)?;
                if from != to {
                    return Err(io::Error::other(format!("answered by {from}")));
                }
                length
            }
            Self::ConnectedUdp(socket) => {
                socket.send(&vec![b'x'; size])?;
                socket.recv(&mut answer)?
            }
        };
        answer.truncate(length);
        Ok(answer)
    }
}

fn drain(socket: &UdpSocket) {
    let _ = socket.set_nonblocking(true);
    while socket.recv(&mut [0; 16]).is_ok() {}
    let _ = socket.set_nonblocking(false);
}

/// One answer of a stand-in: head, and a line of JSON.
fn http(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut got = Vec::new();
    let begun = Instant::now();
    loop {
        if let Some(at) = got.windows(4).position(|w| w == b"\r\n\r\n")
            && got.ends_with(b"\n")
            && got.len() > at + 4
        {
            return Ok(got.split_off(at + 4));
        }
        let mut buffer = [0; 4096];
        let length = stream.read(&mut buffer)?;
        if length == 0 || begun.elapsed() > STREAM {
            return Err(io::Error::other(format!("closed after {} bytes", got.len())));
        }
        got.extend_from_slice(&buffer[..length]);
    }
}

fn outcome(result: io::Result<Vec<u8>>) -> Outcome {
    match result {
        Ok(text) => match serde_json::from_slice::<Value>(&text) {
            Ok(answer) => Outcome::Served {
                pod: answer["pod"].as_str().unwrap_or_default().to_owned(),
                node: answer["node"].as_str().unwrap_or_default().to_owned(),
                port: answer["port"].as_u64().unwrap_or_default() as u16,
                saw: answer["peerAddress"].as_str().unwrap_or_default().parse().unwrap(),
            },
            Err(error) => Outcome::Other(format!("{error}: {}", String::from_utf8_lossy(&text))),
        },
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused => Outcome::Refused,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Silence,
            // To who reads, and to who sends on a socket that was connected and is not any more.
            ErrorKind::ConnectionAborted => Outcome::Aborted,
            _ if error.raw_os_error() == Some(nix::libc::EDESTADDRREQ) => Outcome::Aborted,
            _ => Outcome::Other(error.to_string()),
        },
    }
}
