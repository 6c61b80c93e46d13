//! Single questions: does a packet of this kind get from here to there? Whoever asks knows what the answer should be.
//!
//! Whether a program of the target answers does not matter: a refusal by the target's own kernel (a reset of TCP, port
//! unreachable of UDP) has got there as well. Silence has not, as far as one can tell.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use podway_link::Netns;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{Outcome, SOCKETS, SOURCES, echo, raise_descriptor_limit};

/// How long an answer may take: a first try that is lost is repeated by the kernel (TCP, RFC 6298) after a second.
const PATIENCE: Duration = Duration::from_millis(1600);
/// When a datagram that is not answered is sent again.
const AGAIN: [Duration; 3] = [Duration::ZERO, Duration::from_millis(200), Duration::from_millis(700)];
/// Datagrams hold this, so that they can be told from others in a capture.
const PAYLOAD: &[u8] = b"podway policy verify\n";

/// How to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Way {
    /// A connection.
    Tcp(u16),
    /// A datagram.
    Udp(u16),
    /// An echo request.
    Icmp,
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Name of the network namespace to ask in.
    pub netns: String,
    /// Whom.
    pub target: IpAddr,
    /// How.
    pub way: Way,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "result")]
pub enum Heard {
    /// It got there and something came back.
    Arrived,
    /// Nothing came back.
    Silence,
    /// It was not even sent, or something on the way refused it.
    Failed {
        /// Why.
        cause: String,
    },
}

/// Asks all questions, many at a time; the answers are in their order.
///
/// # Errors
/// When a socket cannot be made, which says nothing about the network.
pub async fn ask(questions: &[Question]) -> anyhow::Result<Vec<Heard>> {
    raise_descriptor_limit();
    let mut by_source: BTreeMap<&str, Vec<(usize, Question)>> = BTreeMap::new();
    for (i, question) in questions.iter().enumerate() {
        by_source.entry(&question.netns).or_default().push((i, question.clone()));
    }
    let turns = Arc::new(Semaphore::new(SOURCES));
    let mut sources = JoinSet::new();
    for (netns, questions) in by_source {
        // Sockets are bounded over all sources that ask at the same time.
        for part in questions.chunks(SOCKETS / SOURCES) {
            let (netns, part, turns) = (netns.to_owned(), part.to_vec(), turns.clone());
            sources.spawn(async move {
                let _turn = turns.acquire_owned().await.context("the asking ends")?;
                // A pod may have gone since the question was thought of.
                if let Err(error) = Netns::open_named(&netns) {
                    let cause = format!("cannot be entered: {error}");
                    return Ok(part
                        .into_iter()
                        .map(|(i, _)| (i, Heard::Failed { cause: cause.clone() }))
                        .collect());
                }
                from(&netns, part).await.with_context(|| format!("ask in {netns}"))
            });
        }
    }
    let mut heard = vec![Heard::Silence; questions.len()];
    while let Some(done) = sources.join_next().await {
        for (i, answer) in done.context("a source of the questions failed")?? {
            heard[i] = answer;
        }
    }
    Ok(heard)
}

enum Sender {
    Tcp(TcpSocket),
    Udp(UdpSocket),
}

async fn from(netns: &str, questions: Vec<(usize, Question)>) -> anyhow::Result<Vec<(usize, Heard)>> {
    let (echoes, others): (Vec<_>, Vec<_>) = questions.into_iter().partition(|(_, q)| q.way == Way::Icmp);
    let targets: Vec<IpAddr> = echoes.iter().map(|(_, q)| q.target).collect();
    let wanted: Vec<Question> = others.iter().map(|(_, q)| q.clone()).collect();
    let name = netns.to_owned();
    // Sockets belong to the namespace of the thread that makes them.
    let (pinger, sockets) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let namespace = Netns::open_named(&name)?;
        let made = namespace.run(|| -> io::Result<_> {
            Ok((echo::Pinger::open(&targets)?, wanted.iter().map(socket).collect::<io::Result<Vec<_>>>()?))
        })?;
        made.context("make sockets")
    })
    .await??;
    let mut asking = JoinSet::new();
    for ((i, question), socket) in others.into_iter().zip(sockets) {
        let sender = match question.way {
            Way::Udp(_) => Sender::Udp(UdpSocket::from_std(socket.into())?),
            _ => Sender::Tcp(TcpSocket::from_std_stream(socket.into())),
        };
        asking.spawn(async move { (i, one(sender, &question).await) });
    }
    let mut heard = Vec::new();
    for ((i, _), outcome) in echoes.into_iter().zip(pinger.run().await?) {
        heard.push((i, if matches!(outcome, Outcome::Ok { .. }) { Heard::Arrived } else { Heard::Silence }));
    }
    while let Some(done) = asking.join_next().await {
        heard.push(done.context("a question failed")?);
    }
    Ok(heard)
}

fn socket(question: &Question) -> io::Result<Socket> {
    let domain = if question.target.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let (kind, protocol) = match question.way {
        Way::Udp(_) => (Type::DGRAM, Protocol::UDP),
        _ => (Type::STREAM, Protocol::TCP),
    };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

async fn one(sender: Sender, question: &Question) -> Heard {
    let result = match (sender, question.way) {
        (Sender::Tcp(socket), Way::Tcp(port)) => {
            let connecting = socket.connect(SocketAddr::new(question.target, port));
            tokio::time::timeout(PATIENCE, connecting).await.map(|result| result.map(drop))
        }
        (Sender::Udp(socket), Way::Udp(port)) => {
            tokio::time::timeout(PATIENCE, datagram(&socket, SocketAddr::new(question.target, port))).await
        }
        // Echoes have a way of their own.
        _ => return Heard::Failed { cause: "no socket for this protocol".into() },
    };
    match result {
        Err(_) => Heard::Silence,
        Ok(Ok(())) => Heard::Arrived,
        Ok(Err(error)) => judge(&error),
    }
}

async fn datagram(socket: &UdpSocket, target: SocketAddr) -> io::Result<()> {
    socket.connect(target).await?;
    let mut buffer = [0; 64];
    let mut before = Duration::ZERO;
    for at in AGAIN {
        if let Ok(answer) = tokio::time::timeout(at - before, socket.recv(&mut buffer)).await {
            return answer.map(drop);
        }
        before = at;
        socket.send(PAYLOAD).await?;
    }
    socket.recv(&mut buffer).await.map(drop)
}

fn judge(error: &io::Error) -> Heard {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Heard::Arrived,
        io::ErrorKind::TimedOut => Heard::Silence,
        _ => Heard::Failed { cause: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_arrived_and_an_unreachable_host_has_not() {
        for (kind, expected) in [
            (io::ErrorKind::ConnectionRefused, Heard::Arrived),
            (io::ErrorKind::ConnectionReset, Heard::Arrived),
            (io::ErrorKind::TimedOut, Heard::Silence),
        ] {
            assert_eq!(judge(&io::Error::from(kind)), expected);
        }
        assert!(matches!(judge(&io::Error::from(io::ErrorKind::HostUnreachable)), Heard::Failed { .. }));
    }
}
