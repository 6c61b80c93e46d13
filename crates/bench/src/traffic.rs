//! The traffic itself: one server, and a client for one stream or for requests one after the other.
//!
//! Both run as processes of their own in the namespaces of pods. Connections are TCP with the congestion control that
//! most clusters run (cubic), asked for on the socket because a namespace may not be allowed to change its default.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use crate::stats::quantile;

/// Port of the server.
pub const PORT: u16 = 5201;
/// Bytes of a request and of its response.
pub const MESSAGE: usize = 8;
/// What the server says when it listens.
pub const LISTENING: &str = "listening";
/// Bytes that are written and read at once.
const BLOCK: usize = 128 * 1024;
/// Time at the beginning of requests and responses that is not counted: the connection settles.
const WARM_UP: Duration = Duration::from_millis(100);
/// Longest silence.
const SILENCE: Duration = Duration::from_secs(5);
/// Most requests whose time is kept.
const SAMPLES_MAX: usize = 4_000_000;

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// As many bytes as fit, one way.
    Stream,
    /// A request of [`MESSAGE`] bytes, its response, the next request, over one connection.
    Requests,
}

/// What a client measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// Of a stream.
    Stream {
        /// Gigabits per second, of payload, as the receiver counted them.
        gbit_per_second: f64,
    },
    /// Of requests.
    Requests {
        /// Requests per second.
        per_second: f64,
        /// Time of a request, microseconds: the median.
        p50_us: f64,
        /// The same, of which 99 of 100 are not longer.
        p99_us: f64,
    },
}

impl Kind {
    const fn code(self) -> u8 {
        match self {
            Self::Stream => b's',
            Self::Requests => b'r',
        }
    }
}

/// Serves until standard input closes, one connection at a time.
///
/// # Errors
/// When the port is taken.
pub fn serve() -> anyhow::Result<()> {
    // The bench holds the other end: this ends with it, however it ends.
    std::thread::spawn(|| {
        let mut buffer = [0; 64];
        while io::stdin().read(&mut buffer).is_ok_and(|n| n > 0) {}
        std::process::exit(0);
    });
    let listener =
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).with_context(|| format!("port {PORT}"))?;
    let mut stdout = io::stdout();
    writeln!(stdout, "{LISTENING}").and_then(|()| stdout.flush()).context("say so")?;
    // A client that was ended in the middle is no concern of the next.
    for mut connection in listener.incoming().flatten() {
        let _ = answer(&mut connection);
    }
    Ok(())
}

fn answer(connection: &mut TcpStream) -> io::Result<()> {
    prepare(connection)?;
    let mut kind = [0];
    connection.read_exact(&mut kind)?;
    if kind[0] == Kind::Requests.code() {
        let mut message = [0; MESSAGE];
        loop {
            connection.read_exact(&mut message)?;
            connection.write_all(&message)?;
        }
    }
    let mut block = vec![0; BLOCK];
    let begun = Instant::now();
    let mut bytes = 0_u64;
    loop {
        match connection.read(&mut block)? {
            0 => break,
            n => bytes += n as u64,
        }
    }
    let nanoseconds = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    connection.write_all(&bytes.to_be_bytes())?;
    connection.write_all(&nanoseconds.to_be_bytes())
}

/// Measures for a time.
///
/// # Errors
/// When the server does not answer.
pub fn measure(kind: Kind, server: IpAddr, time: Duration) -> anyhow::Result<Outcome> {
    let address = SocketAddr::new(server, PORT);
    let mut connection =
        TcpStream::connect_timeout(&address, SILENCE).with_context(|| format!("connect to {address}"))?;
    let outcome =
        prepare(&connection).and_then(|()| connection.write_all(&[kind.code()])).and_then(|()| match kind {
            Kind::Stream => stream(&mut connection, time),
            Kind::Requests => requests(&mut connection, time),
        });
    outcome.with_context(|| format!("traffic with {address}"))
}

fn prepare(connection: &TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(SILENCE))?;
    connection.set_write_timeout(Some(SILENCE))?;
    match SockRef::from(connection).set_tcp_congestion(b"cubic") {
        // A kernel without it: both sides of a comparison then have the same other one.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.kind() == io::ErrorKind::PermissionDenied => {
            Ok(())
        }
        other => other,
    }
}

fn stream(connection: &mut TcpStream, time: Duration) -> io::Result<Outcome> {
    let block = vec![0x55; BLOCK];
    let end = Instant::now() + time;
    while Instant::now() < end {
        connection.write_all(&block)?;
    }
    connection.shutdown(Shutdown::Write)?;
    let (mut bytes, mut nanoseconds) = ([0; 8], [0; 8]);
    connection.read_exact(&mut bytes)?;
    connection.read_exact(&mut nanoseconds)?;
    let seconds = Duration::from_nanos(u64::from_be_bytes(nanoseconds)).as_secs_f64();
    let gigabits = bits(u64::from_be_bytes(bytes)) / 1e9;
    Ok(Outcome::Stream { gbit_per_second: gigabits / seconds.max(f64::MIN_POSITIVE) })
}

/// Exact far beyond what a bench can send.
#[expect(clippy::cast_precision_loss, reason = "2^53 bytes are 9 petabytes")]
fn bits(bytes: u64) -> f64 {
    bytes as f64 * 8.0
}

fn requests(connection: &mut TcpStream, time: Duration) -> io::Result<Outcome> {
    exchange(connection, WARM_UP, &mut Vec::new())?;
    let mut times = Vec::with_capacity(100_000);
    let begun = Instant::now();
    let count = exchange(connection, time, &mut times)?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Outcome::Requests {
        per_second: f64::from(count) / seconds,
        p50_us: quantile(&times, 0.5).unwrap_or_default(),
        p99_us: quantile(&times, 0.99).unwrap_or_default(),
    })
}

/// Returns the number of requests, and puts the time of each into `times`, in microseconds.
fn exchange(connection: &mut TcpStream, time: Duration, times: &mut Vec<f64>) -> io::Result<u32> {
    let mut message = *b"podway!\n";
    let mut count = 0;
    let mut last = Instant::now();
    let end = last + time;
    while last < end {
        connection.write_all(&message)?;
        connection.read_exact(&mut message)?;
        let now = Instant::now();
        if times.len() < SAMPLES_MAX {
            times.push((now - last).as_secs_f64() * 1e6);
        }
        last = now;
        count += 1;
    }
    Ok(count)
}
