//! Events of the programs: reading them, how much of them there is, what was lost.

use std::{os::fd::AsFd as _, path::Path, time::Duration};

use aya::maps::{Array, Map, MapData, PerCpuArray, RingBuf};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use podway_abi::{
    ABI_VERSION, Reason,
    events::{EVENT_WINDOW_SHIFT, Event, EventBucket, EventConfig, bucket},
};

use crate::{Datapath, Error, Result, lock, take};

/// How much is told. A limit of 0 tells nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventLimits {
    /// Flows that begin, for each second and CPU; as many that end.
    pub flows_per_second: u32,
    /// Dropped packets, for each second, CPU and reason. Of one flow at most one a second is told in any case.
    pub drops_per_second: u32,
}

impl EventLimits {
    /// What an agent asks for: more flows than a core can open, and enough drops to see who is concerned.
    pub const DEFAULT: Self = Self { flows_per_second: 100_000, drops_per_second: 1_000 };
    /// Nothing.
    pub const NONE: Self = Self { flows_per_second: 0, drops_per_second: 0 };
}

/// Events of one kind so far, over all CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventCounts {
    /// `start`, `end` or `drop`.
    pub kind: &'static str,
    /// Of drops: the reason.
    pub reason: Option<Reason>,
    /// Told.
    pub told: u64,
    /// Not told because of the limits, or because the same flow's drop had been told within a second.
    pub limited: u64,
    /// Lost because the reader was too slow, or not there, and the ring buffer full.
    pub lost: u64,
}

/// The reading end of the ring buffer. There is one: what it has read nobody else reads.
pub struct EventReader {
    ring: RingBuf<MapData>,
}

/// The tables around the ring buffer: how much is told, and what became of it.
pub struct EventTables {
    config: Array<MapData, EventConfig>,
    counts: PerCpuArray<MapData, EventBucket>,
}

/// The ring buffer and its tables.
pub(crate) struct Events {
    /// Until somebody takes it.
    ring: Option<RingBuf<MapData>>,
    tables: EventTables,
}

impl Events {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        let ring: Map = take(ebpf, "EVENTS")?;
        let tables = EventTables {
            config: Array::try_from(take(ebpf, "EVENT_CONFIG")?)?,
            counts: PerCpuArray::try_from(take(ebpf, "EVENT_COUNTS")?)?,
        };
        Ok(Self { ring: Some(RingBuf::try_from(ring)?), tables })
    }
}

impl EventTables {
    /// Those of a datapath that another process has loaded, by the directory of its pins.
    ///
    /// # Errors
    /// When they are not there.
    pub fn open(pin_dir: &Path) -> Result<Self> {
        let dir = pin_dir.join(format!("maps-v{ABI_VERSION}"));
        let map = |name: &'static str| MapData::from_pin(dir.join(name)).map_err(|e| Error::map(name, e));
        Ok(Self {
            config: Array::try_from(Map::Array(map("EVENT_CONFIG")?))?,
            counts: PerCpuArray::try_from(Map::PerCpuArray(map("EVENT_COUNTS")?))?,
        })
    }

    /// Sets how much is told from now on.
    ///
    /// # Errors
    /// When the kernel refuses the map update.
    pub fn set_limits(&mut self, limits: EventLimits) -> Result<()> {
        let config = EventConfig {
            flows_per_window: per_window(limits.flows_per_second),
            drops_per_window: per_window(limits.drops_per_second),
        };
        self.config.set(0, config, 0).map_err(|e| Error::map("EVENT_CONFIG", e))
    }

    /// What became of events, by kind and for drops by reason; kinds without any are left out.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn counts(&self) -> Result<Vec<EventCounts>> {
        let reasons = Reason::ALL.iter().filter(|r| r.is_drop()).map(|r| (*r as u32, "drop", Some(*r)));
        let mut all = Vec::new();
        for (index, kind, reason) in
            [(bucket::START, "start", None), (bucket::END, "end", None)].into_iter().chain(reasons)
        {
            let cpus = self.counts.get(&index, 0).map_err(|e| Error::map("EVENT_COUNTS", e))?;
            let sum = |of: fn(&EventBucket) -> u64| cpus.iter().map(of).sum();
            let counts = EventCounts {
                kind,
                reason,
                told: sum(|c| c.told),
                limited: sum(|c| c.limited),
                lost: sum(|c| c.lost),
            };
            if counts.told | counts.limited | counts.lost != 0 {
                all.push(counts);
            }
        }
        Ok(all)
    }
}

impl Datapath {
    /// The reading end of the events, for the first who asks. What an earlier process did not read is still there.
    #[must_use]
    pub fn take_events(&self) -> Option<EventReader> {
        lock(&self.events).ring.take().map(|ring| EventReader { ring })
    }

    /// Sets how much is told from now on, for whatever process; a new datapath tells nothing.
    ///
    /// # Errors
    /// When the kernel refuses the map update.
    pub fn set_event_limits(&self, limits: EventLimits) -> Result<()> {
        lock(&self.events).tables.set_limits(limits)
    }

    /// See [`EventTables::counts`].
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn event_counts(&self) -> Result<Vec<EventCounts>> {
        lock(&self.events).tables.counts()
    }
}

/// At least one, where any are wanted.
fn per_window(per_second: u32) -> u32 {
    let part = (u64::from(per_second) << EVENT_WINDOW_SHIFT).div_ceil(1_000_000_000);
    u32::try_from(part).unwrap_or(u32::MAX)
}

impl EventReader {
    /// Waits until the programs have told more than a few events, or `timeout` is over: whoever wants to see an event
    /// soon waits for a short time only.
    ///
    /// # Errors
    /// When the kernel does not let this process wait.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(Error::load("waiting for events", e)),
        }
    }

    /// Hands over the events that are there, oldest first, at most `most`; says how many there were.
    pub fn read(&mut self, most: usize, mut each: impl FnMut(&Event)) -> usize {
        let mut read = 0;
        while read < most {
            let Some(item) = self.ring.next() else { break };
            if let Some(event) = from_bytes(&item) {
                each(&event);
                read += 1;
            }
        }
        read
    }
}

/// An event as the programs wrote it; nothing when it is not one.
#[expect(unsafe_code, reason = "field by field would cost more than the event")]
fn from_bytes(bytes: &[u8]) -> Option<Event> {
    if bytes.len() < size_of::<Event>() {
        return None;
    }
    // SAFETY: the bytes are there, and `Event` consists of integers without padding: any bytes are one. Needed because
    // the standard library has no safe way from bytes to such a type.
    Some(unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}
