//! The thread that reads the ring buffer.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use podway_abi::Hook;
use podway_abi::events::{Event, EventKind};
use podway_bpf_host::EventReader;
use podway_flows::{Entry, Record};
use tracing::warn;

use super::{Flows, LOOK, attached, lost, wall_clock};
use crate::attach::Attacher;
use crate::clock;

/// Events that are read and joined before readers get at them.
const BATCH: usize = 1024;
/// How long the first events wait for names. The ring buffer has room for as long.
const NAMES: Duration = Duration::from_secs(3);
/// How often it is looked whether events were lost.
const COUNT: Duration = Duration::from_secs(1);

/// Reads until the agent ends. What is in the buffer then is the next agent's.
pub(super) fn run(flows: &Flows, mut events: EventReader, attacher: &Attacher) {
    flows.directory.wait(NAMES);
    let mut batch: Vec<Event> = Vec::with_capacity(BATCH);
    // What was lost before this agent came, nobody here has to be told.
    let mut known_lost = lost(&flows.datapath).unwrap_or(0);
    let mut counted = Instant::now();
    while !flows.stopping.load(Ordering::SeqCst) {
        batch.clear();
        if events.read(BATCH, |event| batch.push(*event)) > 0 {
            join(flows, attacher, &batch);
        }
        if counted.elapsed() >= COUNT {
            counted = Instant::now();
            let now = lost(&flows.datapath).unwrap_or(known_lost);
            if now > known_lost {
                flows.append(vec![Entry::Lost(clock::unix_ns(), now - known_lost)]);
            }
            known_lost = now;
        }
        if batch.len() < BATCH
            && let Err(error) = events.wait(LOOK)
        {
            warn!(%error, "cannot wait for events");
            std::thread::sleep(LOOK);
        }
    }
}

fn join(flows: &Flows, attacher: &Attacher, batch: &[Event]) {
    let (pods, links) = attached(attacher);
    flows.directory.attached(pods);
    let clock = wall_clock();
    let from_pod = |e: &Event| e.kind == EventKind::Drop as u8 && e.hook == Hook::FromPod as u8;
    let names = flows.directory.names();
    let now = clock::unix_ns();
    let entries = batch
        .iter()
        .map(|event| {
            let sender = if from_pod(event) { links.get(&event.ifindex) } else { None };
            let sender = sender.and_then(|address| names.at(&(*address).into(), now));
            Entry::Record(Record::join(event, clock, &names, sender))
        })
        .collect();
    drop(names);
    flows.append(entries);
}
