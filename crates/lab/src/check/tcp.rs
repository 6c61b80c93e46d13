//! One TCP connection of the check: who answers, and which sender address that one saw.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use super::{Outcome, PATIENCE, micros};
use crate::standin::Answer;

/// A stand-in's answer is about 600 bytes.
const ANSWER_LIMIT: u64 = 16 << 10;
const REQUEST: &[u8] = b"GET /podway-check HTTP/1.1\r\nHost: check\r\nConnection: close\r\n\r\n";

/// One socket per target, made in the calling thread's namespace.
pub(super) fn sockets(targets: &[IpAddr]) -> io::Result<Vec<Socket>> {
    targets
        .iter()
        .map(|target| {
            let domain = if target.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
            let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })
        .collect()
}

/// What to connect to, and what to expect.
pub(super) struct Call {
    pub(super) socket: Socket,
    pub(super) target: SocketAddr,
    /// Namespace and name of whom the answer has to come from.
    pub(super) answers_as: (String, String),
    /// Addresses of the sender; one of them has to be seen.
    pub(super) sources: Vec<IpAddr>,
}

impl Call {
    pub(super) async fn run(self) -> Outcome {
        let Self { socket, target, answers_as, sources } = self;
        let begun = Instant::now();
        let failed = |cause: String| Outcome::Failed { cause: format!("port {}: {cause}", target.port()) };
        let text = match tokio::time::timeout(PATIENCE, exchange(socket, target)).await {
            Err(_) => return failed(format!("no answer in {} ms", PATIENCE.as_millis())),
            Ok(Err(e)) => return failed(e.to_string()),
            Ok(Ok(text)) => text,
        };
        judge(&text, &answers_as, &sources, micros(begun)).unwrap_or_else(failed)
    }
}

pub(super) async fn exchange(socket: Socket, target: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpSocket::from_std_stream(socket.into()).connect(target).await?;
    stream.write_all(REQUEST).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_LIMIT).read_to_end(&mut answer).await?;
    Ok(answer)
}

fn judge(
    text: &[u8],
    (namespace, pod): &(String, String),
    sources: &[IpAddr],
    micros: u64,
) -> Result<Outcome, String> {
    let start = text.windows(4).position(|w| w == b"\r\n\r\n").map_or(0, |at| at + 4);
    let answer: Answer = serde_json::from_slice(&text[start..])
        .map_err(|_| format!("the answer is not a stand-in's ({} bytes)", text.len()))?;
    let who = &answer.identity;
    if (&who.namespace, &who.pod) != (namespace, pod) {
        return Err(format!("answered by {}/{} instead", who.namespace, who.pod));
    }
    if !sources.contains(&answer.peer_address) {
        return Ok(Outcome::WrongSource { seen: answer.peer_address });
    }
    Ok(Outcome::Ok { micros })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_by_who_and_whom_they_saw() {
        let own: IpAddr = "10.244.1.2".parse().expect("address");
        let body = |pod: &str, peer: &str| {
            format!(
                "HTTP/1.1 200 OK\r\na: b\r\n\r\n{{\"pod\":\"{pod}\",\"namespace\":\"x\",\"node\":\"n\",\"container\":\"c\",\
                 \"addresses\":[],\"address\":\"10.244.2.2\",\"port\":80,\"protocol\":\"TCP\",\"peerAddress\":\"{peer}\",\
                 \"peerPort\":1}}\n"
            )
        };
        let who = ("x".to_owned(), "web".to_owned());
        let run = |text: &str| judge(text.as_bytes(), &who, &[own], 7);
        assert_eq!(run(&body("web", "10.244.1.2")), Ok(Outcome::Ok { micros: 7 }));
        let seen = "172.18.1.1".parse().expect("address");
        assert_eq!(run(&body("web", "172.18.1.1")), Ok(Outcome::WrongSource { seen }));
        assert!(run(&body("db", "10.244.1.2")).expect_err("other pod").contains("x/db"));
        assert!(run("hello").is_err() && run("").is_err());
    }
}
