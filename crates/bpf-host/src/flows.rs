//! The connection table: listing it, and removing what is over.

use std::{net::IpAddr, time::Duration};

use aya::maps::{HashMap, Map, MapData, MapError};
use nix::time::{ClockId, clock_gettime};
use podway_abi::{
    Addr, CtEntry, CtKey, ct_flags,
    events::{Event, EventKind, event_flags},
    services::{Translation, translation_flags},
};
use podway_datapath::{Packet, track};

use crate::{Datapath, Error, Result, ignore_missing, lock};

/// A tracked flow, seen from the end that opened it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// IP protocol number.
    pub protocol: u8,
    /// The end that opened the flow.
    pub source: (IpAddr, u16),
    /// The other end; for ICMP echo both ports are the identifier.
    pub destination: (IpAddr, u16),
    /// Packets from the opening end, and back.
    pub packets: [u64; 2],
    /// Bytes from the network layer up, from the opening end, and back.
    pub bytes: [u64; 2],
    /// State in one word: `opening`, `established`, `half-closed`, `closed`, `unanswered`, `answered`.
    pub state: &'static str,
    /// Since the first packet.
    pub age: Duration,
    /// Since the last packet.
    pub idle: Duration,
    /// Time without packets that is left before it is forgotten.
    pub expires_in: Duration,
}

/// What a sweep of the connection table found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Flows that stay.
    pub live: usize,
    /// Flows that were over and have been removed.
    pub removed: usize,
    /// Translations that were removed with them: a flow to a service has two.
    pub translations: usize,
}

/// The connection table.
pub(crate) struct Flows {
    table: HashMap<MapData, CtKey, CtEntry>,
    translations: HashMap<MapData, CtKey, Translation>,
    /// What the last sweep found.
    swept: Option<SweepReport>,
}

impl Flows {
    pub(crate) fn new(table: Map, translations: Map) -> Result<Self> {
        Ok(Self {
            table: HashMap::try_from(table)?,
            translations: HashMap::try_from(translations)?,
            swept: None,
        })
    }

    /// Removes the translations of a flow that is over, and with them gives its masqueraded port back; says how many
    /// they were.
    fn forget_translations(&mut self, key: &CtKey, entry: &CtEntry) -> Result<usize> {
        let Some(back) = self.translation(key)? else { return Ok(0) };
        let is_later = back.created_ns > entry.last_seen_ns.saturating_add(SLACK_NS);
        if back.flags & translation_flags::FORWARD != 0 || is_later {
            return Ok(0);
        }
        ignore_missing(self.translations.remove(key), "TRANSLATIONS")?;
        let asked = key_of(back.dst, back.dst_port, back.src, back.src_port, key.proto);
        // The client's next datagrams may go to another backend by now.
        let leads_here = self.translation(&asked)?.is_some_and(|f| {
            f.flags & translation_flags::FORWARD != 0
                && key_of(f.src, f.src_port, f.dst, f.dst_port, key.proto) == *key
        });
        if !leads_here {
            return Ok(1);
        }
        ignore_missing(self.translations.remove(&asked), "TRANSLATIONS")?;
        Ok(2)
    }

    fn translation(&self, key: &CtKey) -> Result<Option<Translation>> {
        match self.translations.get(key, 0) {
            Ok(translation) => Ok(Some(translation)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(e) => Err(Error::map("TRANSLATIONS", e)),
        }
    }

    /// Flows in the table as of the last sweep; counted when there was none.
    pub(crate) fn count(&self) -> usize {
        self.swept.map_or_else(|| self.table.keys().count(), |s| s.live)
    }
}

impl Datapath {
    /// All tracked flows, in no order.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn conntrack(&self) -> Result<Vec<Flow>> {
        let now = monotonic_ns();
        let tracked = lock(&self.flows);
        let mut flows = Vec::new();
        for entry in tracked.table.iter() {
            let (key, value) = entry.map_err(|e| Error::map("CONNTRACK", e))?;
            flows.push(describe(&key, &value, now));
        }
        Ok(flows)
    }

    /// Removes the flows whose idle limit has passed, and hands over an event for each whose end was not told yet.
    ///
    /// # Errors
    /// When the table cannot be read or written.
    pub fn sweep_conntrack(&self, ended: impl FnMut(&Event)) -> Result<SweepReport> {
        self.sweep_conntrack_at(Duration::ZERO, ended)
    }

    /// The same as if it were `later` already.
    ///
    /// # Errors
    /// As [`Datapath::sweep_conntrack`].
    pub fn sweep_conntrack_at(&self, later: Duration, mut ended: impl FnMut(&Event)) -> Result<SweepReport> {
        let now = monotonic_ns().saturating_add(u64::try_from(later.as_nanos()).unwrap_or(u64::MAX));
        let mut tracked = lock(&self.flows);
        let mut over = Vec::new();
        let mut report = SweepReport::default();
        for entry in tracked.table.iter() {
            let (key, value) = entry.map_err(|e| Error::map("CONNTRACK", e))?;
            if track::is_over(&value, now) {
                over.push((key, value));
            } else {
                report.live += 1;
            }
        }
        for (key, value) in over {
            ignore_missing(tracked.table.remove(&key), "CONNTRACK")?;
            report.removed += 1;
            report.translations += tracked.forget_translations(&key, &value)?;
            if value.flags & ct_flags::END_TOLD == 0 {
                ended(&end_of(&key, &value, now));
            }
        }
        tracked.swept = Some(report);
        Ok(report)
    }
}

/// A flow's entry is stamped to the tick, its translations are to the nanosecond.
const SLACK_NS: u64 = 1_000_000_000;

/// Key of the flow that a packet with these ends belongs to.
fn key_of(src: Addr, src_port: u16, dst: Addr, dst_port: u16, proto: u8) -> CtKey {
    let mut key = CtKey::default();
    track::key(&Packet { src, dst, src_port, dst_port, proto, ..Packet::EMPTY }, &mut key);
    key
}

/// The clock that the programs stamp with.
fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|t| u64::try_from(Duration::from(t).as_nanos()).ok())
        .unwrap_or_default()
}

/// What the programs would have told had the flow ended by a packet.
fn end_of(key: &CtKey, entry: &CtEntry, now: u64) -> Event {
    let (a, b) = ((key.a, key.a_port), (key.b, key.b_port));
    let (src, dst) = if entry.flags & ct_flags::OPENED_BY_B != 0 { (b, a) } else { (a, b) };
    let mut flags = event_flags::PARSED;
    for (bit, flag) in [(ct_flags::REPLIED, event_flags::REPLIED), (ct_flags::RST, event_flags::RESET)] {
        if entry.flags & bit != 0 {
            flags |= flag;
        }
    }
    if !track::is_closed(entry.flags) {
        flags |= event_flags::EXPIRED;
    }
    // The interface that the opening end's packets came in on.
    let route = if entry.flags & ct_flags::OPENED_BY_B != 0 { &entry.from_b } else { &entry.from_a };
    Event {
        time_ns: now,
        created_ns: entry.created_ns,
        packets: entry.packets,
        bytes: entry.bytes,
        src: src.0,
        dst: dst.0,
        src_port: src.1,
        dst_port: dst.1,
        ifindex: route.ingress,
        proto: key.proto,
        kind: EventKind::End as u8,
        hook: route.hook,
        flags,
        ..Event::default()
    }
}

fn describe(key: &CtKey, entry: &CtEntry, now: u64) -> Flow {
    let a = (IpAddr::from(key.a), key.a_port);
    let b = (IpAddr::from(key.b), key.b_port);
    let (source, destination) = if entry.flags & ct_flags::OPENED_BY_B != 0 { (b, a) } else { (a, b) };
    let idle = Duration::from_nanos(now.saturating_sub(entry.last_seen_ns));
    Flow {
        protocol: key.proto,
        source,
        destination,
        packets: entry.packets,
        bytes: entry.bytes,
        state: state(key.proto, entry.flags),
        age: Duration::from_nanos(now.saturating_sub(entry.created_ns)),
        idle,
        expires_in: Duration::from_secs(entry.idle_limit_s.into()).saturating_sub(idle),
    }
}

fn state(proto: u8, flags: u32) -> &'static str {
    let replied = flags & ct_flags::REPLIED != 0;
    if proto != podway_datapath::packet::proto::TCP {
        return if replied { "answered" } else { "unanswered" };
    }
    if track::is_closed(flags) {
        "closed"
    } else if flags & (ct_flags::FIN_ORIGINAL | ct_flags::FIN_REPLY) != 0 {
        "half-closed"
    } else if replied {
        "established"
    } else {
        "opening"
    }
}
