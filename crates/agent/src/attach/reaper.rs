//! Deletes the links of detached pods, one after the other, behind the answers to their DELs.
//!
//! The queue is bounded; when it is full, the DEL deletes its link itself. What is queued when the agent dies is
//! found again by the alias that says so.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use podway_link::Netlink;
use tracing::warn;

use super::{AttachError, lock};
use crate::crash;
use crate::ids::AttachmentId;
use crate::network::pod_link;

/// Links that may wait.
const QUEUE: usize = 1024;
/// Attempts to delete one link.
const ATTEMPTS: u32 = 3;
/// Pause between them.
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
            for one in dead {
                delete(&one);
                counter.fetch_sub(1, Ordering::SeqCst);
            }
        })?;
        Ok(Self { queue: Mutex::new(queue), waiting })
    }

    /// Queues a link for deletion.
    pub fn reap(&self, ifindex: u32, id: AttachmentId) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let sent = lock(&self.queue).try_send(Dead { ifindex, id });
        if let Err(TrySendError::Full(dead) | TrySendError::Disconnected(dead)) = sent {
            delete(&dead);
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

fn delete(dead: &Dead) {
    for attempt in 1..=ATTEMPTS {
        match delete_once(dead) {
            Ok(()) => return,
            Err(error) if attempt == ATTEMPTS => {
                warn!(attachment = %dead.id, ifindex = dead.ifindex, %error,
                    "cannot delete the link of a detached pod; the next start of the agent tries again");
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

fn delete_once(dead: &Dead) -> Result<(), AttachError> {
    let mut netlink = Netlink::open()?;
    // The index may be another link's by now, if the pod's namespace went away first.
    if let Some(link) = netlink.link_by_index(dead.ifindex)?
        && pod_link(&link).is_some_and(|(id, _)| id == dead.id)
    {
        netlink.delete_link(link.index)?;
    }
    crash::point("del.deleted");
    Ok(())
}
