use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UdpSocket};

use super::*;

fn free_port(protocol: Protocol) -> u16 {
    let any = (Ipv4Addr::UNSPECIFIED, 0);
    match protocol {
        Protocol::Udp => std::net::UdpSocket::bind(any).expect("bind").local_addr(),
        _ => std::net::TcpListener::bind(any).expect("bind").local_addr(),
    }
    .expect("address")
    .port()
}

fn config(ports: &[(u16, Protocol)]) -> Config {
    Config {
        identity: Identity {
            pod: "web-0".into(),
            namespace: "shop".into(),
            node: "node-1".into(),
            container: "web".into(),
            addresses: vec![Ipv4Addr::LOCALHOST.into()],
        },
        ports: ports
            .iter()
            .map(|(port, protocol)| Port { port: *port, protocol: *protocol, name: String::new() })
            .collect(),
        max_connections: 4,
        drain_accept_ms: 300,
        drain_finish_ms: 2000,
    }
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

async fn read_response(stream: &mut BufReader<TcpStream>) -> (Vec<String>, Answer) {
    let (mut head, mut length) = (Vec::new(), 0);
    loop {
        let mut line = String::new();
        assert!(stream.read_line(&mut line).await.expect("head") > 0, "closed in the head: {head:?}");
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(n) = line.strip_prefix("content-length: ") {
            length = n.parse().expect("length");
        }
        head.push(line);
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.expect("body");
    (head, serde_json::from_slice(&body).expect("JSON"))
}

#[tokio::test]
async fn http_is_answered_with_who_and_where_and_the_connection_is_kept() {
    let port = free_port(Protocol::Tcp);
    let _server = Server::open(config(&[(port, Protocol::Tcp)])).expect("open");
    let stream = TcpStream::connect(loopback(port)).await.expect("connect");
    let own = stream.local_addr().expect("address");
    let mut stream = BufReader::new(stream);
    for (request, method, path, host) in [
        (
            "GET /a?b=1 HTTP/1.1\r\nHost: x.example\r\nX-Two: 1\r\nX-Two: 2\r\n\r\n",
            "GET",
            "/a?b=1",
            "x.example",
        ),
        ("POST /p HTTP/1.1\r\nHost: y\r\nX-Two: 1, 2\r\nContent-Length: 3\r\n\r\nabc", "POST", "/p", "y"),
    ] {
        stream.write_all(request.as_bytes()).await.expect("send");
        let (head, answer) = read_response(&mut stream).await;
        assert!(head[0].starts_with("http/1.1 200"), "{head:?}");
        let http = answer.http.expect("http part");
        assert_eq!((http.method.as_str(), http.path.as_str(), http.host.as_str()), (method, path, host));
        assert_eq!(http.headers["x-two"], "1, 2");
        assert_eq!(
            (answer.identity.pod.as_str(), answer.port, answer.protocol),
            ("web-0", port, Protocol::Tcp)
        );
        assert_eq!((answer.peer_address, answer.peer_port), (own.ip(), own.port()));
    }
}

#[tokio::test]
async fn a_client_that_is_silent_or_speaks_something_else_gets_one_line() {
    let port = free_port(Protocol::Tcp);
    let _server = Server::open(config(&[(port, Protocol::Tcp)])).expect("open");
    for first in [&b""[..], b"\x16\x03\x01", b"hello\n", b"GE", b"GEX / HTTP/1.1\r\n\r\n"] {
        let begin = Instant::now();
        let mut stream = TcpStream::connect(loopback(port)).await.expect("connect");
        stream.write_all(first).await.expect("send");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("answer");
        let answer: Answer = serde_json::from_str(&text).expect("JSON");
        assert_eq!(answer.identity.namespace, "shop");
        assert_eq!(answer.http, None);
        assert_eq!(text.matches('\n').count(), 1);
        assert!(begin.elapsed() < Duration::from_secs(2), "{first:?} took {:?}", begin.elapsed());
    }
}

#[tokio::test]
async fn udp_is_answered_in_both_families() {
    let port = free_port(Protocol::Udp);
    let _server = Server::open(config(&[(port, Protocol::Udp)])).expect("open");
    for local in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(socket) = UdpSocket::bind(local).await else { continue };
        let own = socket.local_addr().expect("address");
        socket.send_to(b"?", SocketAddr::new(own.ip(), port)).await.expect("send");
        let mut buffer = [0; 2048];
        let n = tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut buffer))
            .await
            .expect("in time")
            .expect("answer");
        let answer: Answer = serde_json::from_slice(&buffer[..n]).expect("JSON");
        assert_eq!(
            (answer.peer_address, answer.peer_port, answer.protocol),
            (own.ip(), own.port(), Protocol::Udp)
        );
    }
}

#[tokio::test]
async fn a_taken_port_is_named_and_sctp_is_served_or_reported() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let port = free_port(protocol);
        let _first = Server::open(config(&[(port, protocol)])).expect("open");
        let message = Server::open(config(&[(port, protocol)])).err().expect("taken");
        assert!(message.contains(&port.to_string()) && message.contains("taken"), "{message}");
    }
    let port = free_port(Protocol::Tcp);
    let server = Server::open(config(&[(port, Protocol::Sctp), (port, Protocol::Tcp)])).expect("open");
    let kernel_has_it =
        Socket::new(Domain::IPV6, Type::STREAM, Some(SocketProtocol::from(IPPROTO_SCTP))).is_ok();
    assert_eq!(server.unavailable.is_empty(), kernel_has_it, "{:?}", server.unavailable);
    assert!(TcpStream::connect(loopback(port)).await.is_ok(), "the other port is served all the same");
}

#[tokio::test]
async fn draining_accepts_for_a_moment_says_close_and_finishes_what_is_open() {
    let port = free_port(Protocol::Tcp);
    let config = config(&[(port, Protocol::Tcp)]);
    let (accept, finish) =
        (Duration::from_millis(config.drain_accept_ms), Duration::from_millis(config.drain_finish_ms));
    let server = Server::open(config).expect("open");
    // One request is half sent when the drain begins, one connection is idle.
    let mut slow = BufReader::new(TcpStream::connect(loopback(port)).await.expect("connect"));
    slow.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab").await.expect("send");
    let mut idle = BufReader::new(TcpStream::connect(loopback(port)).await.expect("connect"));
    idle.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("send");
    let (head, _) = read_response(&mut idle).await;
    assert!(!head.contains(&"connection: close".to_owned()), "{head:?}");

    let begin = Instant::now();
    let drain = tokio::spawn(server.drain(accept, finish));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut new = BufReader::new(TcpStream::connect(loopback(port)).await.expect("still accepted"));
    new.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("send");
    let (head, _) = read_response(&mut new).await;
    assert!(head.contains(&"connection: close".to_owned()), "{head:?}");

    tokio::time::sleep(accept + Duration::from_millis(100)).await;
    assert!(TcpStream::connect(loopback(port)).await.is_err(), "no longer accepted");
    assert_eq!(idle.read(&mut [0; 1]).await.expect("closed in order"), 0);
    assert!(!drain.is_finished(), "waits for the open request");
    slow.write_all(b"cd").await.expect("send the rest");
    let (head, answer) = read_response(&mut slow).await;
    assert!(head[0].contains("200") && answer.http.is_some(), "{head:?}");
    drop(slow);
    tokio::time::timeout(finish, drain).await.expect("drained").expect("no panic");
    assert!(begin.elapsed() < accept + finish, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn connections_above_the_limit_wait_their_turn() {
    let port = free_port(Protocol::Tcp);
    let config = config(&[(port, Protocol::Tcp)]);
    let limit = config.max_connections;
    let _server = Server::open(config).expect("open");
    let mut held = Vec::new();
    for _ in 0..limit {
        let mut stream = BufReader::new(TcpStream::connect(loopback(port)).await.expect("connect"));
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("send");
        read_response(&mut stream).await;
        held.push(stream);
    }
    let mut waiting = BufReader::new(TcpStream::connect(loopback(port)).await.expect("the backlog takes it"));
    waiting.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("send");
    let early = tokio::time::timeout(Duration::from_millis(200), waiting.fill_buf()).await;
    assert!(early.is_err(), "answered above the limit");
    held.pop();
    let (head, _) =
        tokio::time::timeout(Duration::from_secs(2), read_response(&mut waiting)).await.expect("its turn");
    assert!(head[0].contains("200"), "{head:?}");
}
