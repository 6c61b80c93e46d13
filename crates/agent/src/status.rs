//! How the agent is doing, as one value that metrics and health read.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use podway_link::probe::{Counts, Verdict};

use crate::attach::lock;
use crate::network::Local;

/// The control loop counts as stuck after this long without a turn.
pub const STUCK_AFTER: Duration = Duration::from_secs(90);

/// State of one concern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// As it should be.
    pub ok: bool,
    /// What is wrong, or what is in place.
    pub text: String,
}

/// A proven (or not) path to another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Name of the other node.
    pub node: String,
    /// What is known about it.
    pub verdict: Verdict,
    /// What became of the probes.
    pub probes: Counts,
    /// Smoothed time from a probe to its answer.
    pub rtt: Option<Duration>,
}

/// Everything that is shown.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// By concern.
    pub conditions: BTreeMap<&'static str, Condition>,
    /// What is in place on this node.
    pub local: Option<Local>,
    /// Nodes of the cluster.
    pub nodes: usize,
    /// Entries for pods and nodes in the datapath.
    pub peers: usize,
    /// Objects, or parts of them, that are refused now.
    pub rejected: usize,
    /// The API server answers.
    pub api_connected: bool,
    /// By underlay address of the other node.
    pub paths: BTreeMap<IpAddr, Path>,
    /// The last turn of the control loop.
    pub turned: Instant,
}

/// The shared value.
#[derive(Debug)]
pub struct Status(Mutex<Snapshot>);

impl Status {
    /// Nothing is known yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Mutex::new(Snapshot {
            conditions: BTreeMap::new(),
            local: None,
            nodes: 0,
            peers: 0,
            rejected: 0,
            api_connected: false,
            paths: BTreeMap::new(),
            turned: Instant::now(),
        }))
    }

    /// Sets a condition; says whether it changed.
    pub fn set(&self, concern: &'static str, ok: bool, text: impl Into<String>) -> bool {
        let condition = Condition { ok, text: text.into() };
        let mut inner = lock(&self.0);
        inner.conditions.insert(concern, condition.clone()).is_none_or(|before| before != condition)
    }

    /// Changes the value.
    pub fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        change(&mut lock(&self.0));
    }

    /// The value now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        lock(&self.0).clone()
    }
}

impl Default for Status {
    fn default() -> Self {
        Self::new()
    }
}

impl Snapshot {
    /// Whether the control loop goes on.
    #[must_use]
    pub fn alive(&self) -> bool {
        self.turned.elapsed() < STUCK_AFTER
    }
}
