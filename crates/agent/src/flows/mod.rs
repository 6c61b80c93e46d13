//! Flows on this node: what the programs tell, with names, for whoever asks.
//!
//! ```text
//!   programs ─▶ ring buffer ─▶ reader ─┬▶ history ◀─ socket ◀─ `podway flows`
//!   sweep of the connection table ─────┘     ▲
//!   API server ─▶ pods, nodes, services ─▶ directory of names
//!   attacher ─▶ pods of this node ─────────────┘
//! ```
//!
//! Nothing here is waited for by traffic or by those who attach pods: a reader that falls behind loses events, which
//! are counted.

pub mod socket;

mod directory;
pub(crate) mod metrics;
mod reader;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use podway_abi::events::Event;
use podway_bpf_host::{Datapath, EventCounts, EventLimits};
use podway_flows::record::Clock;
use podway_flows::{Entry, History, Limits, Record, Summary};
use podway_kube::Client;
use tracing::warn;

use crate::attach::{Attacher, lock};
use crate::clock;

pub(crate) use directory::Directory;

/// What is told and kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowsConfig {
    /// Flows are told at all.
    pub enabled: bool,
    /// Most events that are kept.
    pub history: usize,
}

impl FlowsConfig {
    /// Most events that a history may be asked to hold: about half a gigabyte.
    pub const HISTORY_MAX: usize = 2_000_000;
}

impl Default for FlowsConfig {
    fn default() -> Self {
        Self { enabled: true, history: Limits::DEFAULT.entries }
    }
}

/// The history, and who waits for more of it.
pub(crate) struct Flows {
    node: String,
    datapath: Arc<Datapath>,
    directory: Arc<Directory>,
    history: Mutex<History>,
    more: Condvar,
    /// Connections that are being answered.
    readers: AtomicUsize,
    /// Entries that readers came too late for.
    missed: AtomicU64,
    stopping: Arc<AtomicBool>,
}

impl std::fmt::Debug for Flows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flows").field("node", &self.node).finish_non_exhaustive()
    }
}

/// What flows need of the rest of the agent.
pub(crate) struct Surroundings<'a> {
    pub(crate) node: &'a str,
    pub(crate) run_dir: &'a Path,
    pub(crate) client: &'a Client,
    pub(crate) runtime: &'a tokio::runtime::Runtime,
    pub(crate) datapath: &'a Arc<Datapath>,
    pub(crate) attacher: &'a Arc<Attacher>,
    pub(crate) stopping: &'a Arc<AtomicBool>,
    /// Services are served here, and will be known.
    pub(crate) services: bool,
}

/// Numbers for metrics.
pub(crate) struct Figures {
    pub(crate) events: Vec<EventCounts>,
    pub(crate) entries: usize,
    pub(crate) max_entries: usize,
    pub(crate) bytes: usize,
    pub(crate) readers: usize,
    pub(crate) missed: u64,
    pub(crate) names: (usize, usize, usize),
}

impl Flows {
    /// Starts the reader, the socket and the watch of pods. With flows switched off it only tells the programs so.
    ///
    /// # Errors
    /// The programs cannot be told, or a thread or the socket cannot be made.
    pub(crate) fn start(
        config: FlowsConfig,
        with: &Surroundings<'_>,
    ) -> io::Result<Option<(Arc<Self>, JoinHandle<()>)>> {
        let limits = if config.enabled { EventLimits::DEFAULT } else { EventLimits::NONE };
        with.datapath.set_event_limits(limits).map_err(io::Error::other)?;
        if !config.enabled {
            return Ok(None);
        }
        let events =
            with.datapath.take_events().ok_or_else(|| io::Error::other("somebody reads them already"))?;
        let directory = Arc::new(Directory::new(with.services));
        let bytes = Limits::DEFAULT.bytes.max(config.history.saturating_mul(size_of::<Entry>() * 2));
        let limits = Limits { entries: config.history, bytes };
        let flows = Arc::new(Self {
            node: with.node.to_owned(),
            datapath: Arc::clone(with.datapath),
            history: Mutex::new(History::new(limits, directory.total())),
            directory,
            more: Condvar::new(),
            readers: AtomicUsize::new(0),
            missed: AtomicU64::new(0),
            stopping: Arc::clone(with.stopping),
        });
        let (reading, attacher) = (Arc::clone(&flows), Arc::clone(with.attacher));
        let thread = std::thread::Builder::new()
            .name("podway-flows".into())
            .stack_size(512 << 10)
            .spawn(move || reader::run(&reading, events, &attacher))?;
        socket::start(&with.run_dir.join(socket::SOCKET), &flows)?;
        let _guard = with.runtime.enter();
        directory::watch_pods(with.client, &flows.directory);
        Ok(Some((flows, thread)))
    }

    /// Where names come from.
    pub(crate) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// The sweep of the connection table found flows that are over.
    pub(crate) fn swept(&self, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        let clock = wall_clock();
        let names = self.directory.names();
        let entries = events.iter().map(|e| Entry::Record(Record::join(e, clock, &names, None))).collect();
        drop(names);
        self.append(entries);
    }

    fn append(&self, entries: Vec<Entry>) {
        if entries.is_empty() {
            return;
        }
        let known = self.directory.known_bytes();
        let mut history = lock(&self.history);
        for entry in entries {
            history.push(entry);
        }
        history.trim(known);
        drop(history);
        self.more.notify_all();
    }

    /// How complete the history is.
    fn summary(&self) -> Summary {
        let (kept, oldest) = {
            let history = lock(&self.history);
            let oldest = history.read(0, 1).1.next().map(|(_, entry)| entry.time());
            (history.len(), oldest.map(podway_flows::flow::rfc3339))
        };
        let mut summary = Summary { node: self.node.clone(), kept, oldest, ..Summary::default() };
        for counts in self.datapath.event_counts().unwrap_or_default() {
            summary.told += counts.told;
            summary.lost += counts.lost;
            summary.limited += counts.limited;
        }
        summary
    }

    /// For metrics; nothing when the kernel's tables cannot be read.
    pub(crate) fn figures(&self) -> Option<Figures> {
        let events = self.datapath.event_counts().ok()?;
        let (known, names) = (self.directory.known_bytes(), self.directory.names().count());
        let history = lock(&self.history);
        Some(Figures {
            events,
            entries: history.len(),
            max_entries: history.limits().entries,
            bytes: history.bytes(known),
            readers: self.readers.load(Ordering::Relaxed),
            missed: self.missed.load(Ordering::Relaxed),
            names,
        })
    }
}

/// Both clocks at this moment.
fn wall_clock() -> Clock {
    let monotonic = i64::try_from(clock::monotonic_ns()).unwrap_or(i64::MAX);
    Clock { offset: clock::unix_ns().saturating_sub(monotonic) }
}

/// Time between two looks at the ring buffer: what somebody who follows waits at most. Waking the reader for each event
/// would cost more than reading it.
const LOOK: Duration = Duration::from_millis(50);

/// The sum of what was lost, over kinds and reasons.
fn lost(datapath: &Datapath) -> Option<u64> {
    match datapath.event_counts() {
        Ok(all) => Some(all.iter().map(|c| c.lost).sum()),
        Err(error) => {
            warn!(%error, "cannot read how many events were lost");
            None
        }
    }
}

/// Pods of this node by address, and by the interface that leads to them.
fn attached(attacher: &Attacher) -> (BTreeMap<std::net::IpAddr, String>, BTreeMap<u32, std::net::IpAddr>) {
    let (mut pods, mut links) = (BTreeMap::new(), BTreeMap::new());
    attacher.each_attached(|attached| {
        let Some(pod) = &attached.owner.pod else { return };
        for address in &attached.addresses {
            pods.insert(*address, pod.clone());
        }
        if let Some(address) = attached.addresses.first() {
            links.insert(attached.ifindex, *address);
        }
    });
    (pods, links)
}
