//! Proof of the path MTU between nodes: don't-fragment UDP probes that the other node acknowledges.
//!
//! The classic way, waiting for ICMP "fragmentation needed" (RFC 1191, RFC 8201), fails wherever a firewall
//! drops ICMP. This one needs only the probes themselves (packetization layer path MTU discovery for
//! datagrams, RFC 8899): a packet of the full size that is acknowledged proves the path; one that stays
//! unanswered *while a small one is answered* shows a narrower path, and a search finds its size.
//! When small ones are not answered either, the peer is unreachable and nothing is said about the path.
//!
//! - [`wire`]: the packets.
//! - [`path`]: the state machine of one path. No sockets, no clock: it is told the time and what arrived.
//! - [`Responder`], [`Prober`]: the sockets. Each proves its own direction; two nodes prove both.

pub mod path;
mod prober;
mod responder;
pub mod wire;

pub use path::{Counts, PathConfig, PathProbe, Verdict};
pub use prober::{PEERS_MAX, Prober, ProberConfig, Report};
pub use responder::Responder;

/// UDP port of the responder.
pub const DEFAULT_PORT: u16 = 9949;

use std::time::{Duration, Instant};

/// A bound on packets per second. It may be overdrawn by one burst, which is then waited for.
#[derive(Debug)]
pub(crate) struct Rate {
    per_second: f64,
    burst: f64,
    tokens: f64,
    at: Instant,
}

impl Rate {
    pub(crate) fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let burst = f64::from(burst.max(1));
        Self { per_second: f64::from(per_second.max(1)), burst, tokens: burst, at: now }
    }

    /// True when a packet may be sent now.
    pub(crate) fn allows(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * self.per_second).min(self.burst);
        self.at = now;
        self.tokens >= 1.0
    }

    pub(crate) fn spend(&mut self, packets: usize) {
        self.tokens -= packets as f64;
    }

    /// How long until [`Self::allows`] is true again.
    pub(crate) fn wait(&self) -> Duration {
        Duration::from_secs_f64(((1.0 - self.tokens).max(0.0) / self.per_second).min(60.0))
    }
}
