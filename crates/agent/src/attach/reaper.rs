//! Deletes the links of detached pods behind the answers to their DELs.
//!
//! The kernel takes some 20 ms to delete a link, and nothing else on the node can change a link in the meantime: an
//! ADD would wait. So deletions wait a moment for one another, and a batch goes as one. Most runtimes delete the
//! pod's namespace within that moment, and then there is nothing left to do.
//!
//! The queue is bounded; when it is full, the DEL deletes its link itself. What is queued when the agent dies is
//! found again by the alias that says so.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use podway_link::{Link, Netlink};
use tracing::{debug, warn};

use super::{AttachError, lock};
use crate::crash;
use crate::ids::AttachmentId;
use crate::network::pod_link;

/// Links that may wait.
const QUEUE: usize = 1024;
/// Attempts to delete a batch.
const ATTEMPTS: u32 = 3;
/// How long a deletion waits for others.
const GATHER: Duration = Duration::from_millis(100);
/// Links that are deleted at once: it takes longer, the more they are.
const BATCH: usize = 64;
/// Group of links that are deleted at once. Any number that nobody else would choose.
const GROUP: u32 = 0x7077_6465;
/// Pause between attempts.
const PAUSE: Duration = Duration::from_millis(200);

struct Dead {
    ifindex: u32,
    id: AttachmentId,
}

/// Handle of the deleting thread, which ends with it.
pub struct Reaper {
    queue: Mutex<SyncSender<Dead>>,
    waiting: Arc<AtomicUsize>,
}

impl Reaper {
    /// Starts the thread, in the network namespace of the caller.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start() -> std::io::Result<Self> {
        let (queue, dead) = mpsc::sync_channel::<Dead>(QUEUE);
        let waiting = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&waiting);
        std::thread::Builder::new().name("podway-reaper".into()).stack_size(256 << 10).spawn(move || {
            while let Ok(first) = dead.recv() {
                let mut batch = vec![first];
                let end = Instant::now() + GATHER;
                while batch.len() < BATCH
                    && let Ok(next) = dead.recv_timeout(end.saturating_duration_since(Instant::now()))
                {
                    batch.push(next);
                }
                delete(&batch);
                counter.fetch_sub(batch.len(), Ordering::SeqCst);
            }
        })?;
        Ok(Self { queue: Mutex::new(queue), waiting })
    }

    /// Queues a link for deletion.
    pub fn reap(&self, ifindex: u32, id: AttachmentId) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let sent = lock(&self.queue).try_send(Dead { ifindex, id });
        if let Err(TrySendError::Full(dead) | TrySendError::Disconnected(dead)) = sent {
            delete(std::slice::from_ref(&dead));
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Links that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Waits until none waits, at most for `timeout`.
    pub fn drain(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while self.waiting() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn delete(batch: &[Dead]) {
    for attempt in 1..=ATTEMPTS {
        match delete_once(batch) {
            Ok(()) => return,
            Err(error) if attempt == ATTEMPTS => {
                let names: Vec<String> = batch.iter().map(|d| d.id.to_string()).collect();
                warn!(attachments = ?names, %error,
                    "cannot delete links of detached pods; the next start of the agent tries again");
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

fn delete_once(batch: &[Dead]) -> Result<(), AttachError> {
    let mut netlink = Netlink::open()?;
    // An index may be another link's by now, if the pod's namespace went away first.
    let still = |link: &Link, dead: &Dead| {
        link.index == dead.ifindex && pod_link(link).is_some_and(|(id, _)| id == dead.id)
    };
    let mut doomed = Vec::with_capacity(batch.len());
    for dead in batch {
        doomed.extend(netlink.link_by_index(dead.ifindex)?.filter(|link| still(link, dead)));
    }
    if let [first, _, ..] = doomed.as_slice() {
        debug!(links = doomed.len(), first = first.name, "deleting the links of detached pods");
        if delete_together(&mut netlink, &doomed)? {
            crash::point("del.deleted");
            return Ok(());
        }
    }
    for link in &doomed {
        netlink.delete_link(link.index)?;
    }
    crash::point("del.deleted");
    Ok(())
}

/// Returns false when somebody else's link is in the group, which must not go with it.
fn delete_together(netlink: &mut Netlink, doomed: &[Link]) -> Result<bool, AttachError> {
    for link in doomed {
        match netlink.set_group(link.index, GROUP) {
            Err(e) if !e.is_not_found() => return Err(e.into()),
            _ => {}
        }
    }
    let foreign = |link: &Link| link.group == GROUP && !doomed.iter().any(|d| d.index == link.index);
    if netlink.links()?.iter().any(foreign) {
        return Ok(false);
    }
    netlink.delete_group(GROUP)?;
    Ok(true)
}
