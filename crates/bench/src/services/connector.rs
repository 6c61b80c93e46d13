//! The client: opens connections to services and straight to endpoints, in turns, and times each `connect()`.

use std::io::{self, BufRead as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::population::{Population, service_address};
use crate::stats::quantile;
use crate::traffic::PORT;

/// What to do: one line of JSON each.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Task {
    /// Services to choose from.
    pub services: u32,
    /// Endpoints of each.
    pub endpoints: u32,
    /// Connections to open, of each kind.
    pub count: u32,
    /// Whether to services.
    pub to_services: bool,
    /// Whether straight to endpoints.
    pub to_endpoints: bool,
    /// What the choice begins with.
    pub seed: u64,
}

/// Times of `connect()`, microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Delays {
    /// Median.
    pub p50_us: f64,
    /// 99 of 100 are not longer.
    pub p99_us: f64,
}

/// What came of it: one line of JSON each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Connections to services.
    pub services: Delays,
    /// Connections straight to endpoints.
    pub endpoints: Delays,
}

/// What the client says when it is ready.
pub const READY: &str = "ready";
/// Longest wait for a connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// Does what standard input says until it closes.
///
/// # Errors
/// When a connection cannot be opened, with its destination.
pub fn run() -> anyhow::Result<()> {
    say(READY)?;
    for line in io::stdin().lock().lines() {
        let task: Task = serde_json::from_str(&line.context("read a task")?).context("understand a task")?;
        say(&serde_json::to_string(&perform(&task)?)?)?;
    }
    Ok(())
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).context("answer")
}

fn perform(task: &Task) -> anyhow::Result<Answer> {
    if task.services == 0 || task.endpoints == 0 {
        bail!("a task without services or endpoints");
    }
    let population = Population { services: task.services, endpoints: task.endpoints };
    let mut random = Random(task.seed | 1);
    let (mut services, mut endpoints) = (Vec::new(), Vec::new());
    for round in 0..task.count {
        let index = random.below(task.services);
        let service = service_address(index);
        let endpoint = population.endpoint_address(index, task.endpoints - 1, 0);
        // Each kind comes first in every other round.
        for turn in [round % 2 == 0, round % 2 == 1] {
            if turn && task.to_services {
                services.push(connect(service)?);
            } else if !turn && task.to_endpoints {
                endpoints.push(connect(endpoint)?);
            }
        }
    }
    let delays = |times: &[f64]| Delays {
        p50_us: quantile(times, 0.5).unwrap_or_default(),
        p99_us: quantile(times, 0.99).unwrap_or_default(),
    };
    Ok(Answer { services: delays(&services), endpoints: delays(&endpoints) })
}

/// Time of `connect()` alone. The connection ends by a reset, so that thousands of them leave no waiting socket.
fn connect(address: Ipv4Addr) -> anyhow::Result<f64> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).context("make a socket")?;
    socket.set_linger(Some(Duration::ZERO)).context("prepare a socket")?;
    // Also the limit of connect (socket(7)).
    socket.set_write_timeout(Some(PATIENCE)).context("prepare a socket")?;
    let address = SocketAddr::V4(SocketAddrV4::new(address, PORT)).into();
    let begun = Instant::now();
    let result = socket.connect(&address);
    let time = begun.elapsed();
    result.with_context(|| format!("connect to {:?}", address.as_socket()))?;
    Ok(time.as_secs_f64() * 1e6)
}

/// Xorshift (Marsaglia, 2003): the choice of services has to be spread, not secret.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(((self.0 >> 32) * u64::from(limit)) >> 32).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_spread_over_all() {
        let mut random = Random(7);
        let mut seen = [0_u32; 10];
        for _ in 0..10_000 {
            seen[random.below(10) as usize] += 1;
        }
        assert!(seen.iter().all(|n| (800..1200).contains(n)), "{seen:?}");
    }
}
