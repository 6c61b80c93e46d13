//! Watches the node's links, addresses and routes, and wakes the control loop when something that matters to it
//! changed. A pod that comes or goes makes a dozen changes that do not.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use podway_link::ROUTE_PROTOCOL;
use podway_link::monitor::{Change, Monitor};
use tracing::{debug, warn};

use crate::attach::lock;
use crate::config::{GATEWAY_V4, GATEWAY_V6, TUNNEL_DEVICE};
use crate::control::Message;

/// Longest time until the end is noticed.
const TURN: Duration = Duration::from_millis(1000);

/// The links whose changes matter.
#[derive(Debug, Default)]
pub struct Interest(BTreeSet<u32>);

impl Interest {
    /// Sets them.
    pub fn set(&mut self, links: impl Iterator<Item = u32>) {
        self.0 = links.collect();
    }

    fn message(&self, change: &Change) -> Option<Message> {
        match change {
            Change::Overrun => Some(Message::Kernel),
            Change::Link { name, removed: true, .. } if name.starts_with("pw") => Some(Message::PodLinkGone),
            Change::Link { index, name, .. } if self.0.contains(index) || name == TUNNEL_DEVICE => {
                Some(Message::Kernel)
            }
            Change::Link { name, .. } => name.starts_with("pw").then_some(Message::PodNetwork),
            Change::Address { addr, removed: true, .. } if *addr == IpAddr::V6(GATEWAY_V6) => {
                Some(Message::PodNetwork)
            }
            // On the loopback, which is none of ours.
            Change::Address { addr, removed: true, .. } if *addr == IpAddr::V4(GATEWAY_V4) => {
                Some(Message::Kernel)
            }
            Change::Address { index, .. } => self.0.contains(index).then_some(Message::Kernel),
            Change::Route { dev, protocol, removed: true, .. } => {
                let ours = *protocol == ROUTE_PROTOCOL;
                let message = if self.0.contains(dev) { Message::Kernel } else { Message::PodNetwork };
                ours.then_some(message)
            }
            _ => None,
        }
    }
}

/// Starts watching, in the network namespace of the caller. What changes from now on is not missed.
///
/// # Errors
/// The kernel gives no socket, or the thread cannot be started.
pub fn start(
    interest: Arc<Mutex<Interest>>,
    wake: SyncSender<Message>,
    stopping: Arc<AtomicBool>,
) -> io::Result<JoinHandle<()>> {
    let monitor = Monitor::open().map_err(io::Error::other)?;
    std::thread::Builder::new()
        .name("podway-monitor".into())
        .stack_size(256 << 10)
        .spawn(move || watch(monitor, &interest, &wake, &stopping))
}

fn watch(
    mut monitor: Monitor,
    interest: &Mutex<Interest>,
    wake: &SyncSender<Message>,
    stopping: &AtomicBool,
) {
    while !stopping.load(Ordering::SeqCst) {
        let changes = match monitor.next(Some(TURN)) {
            Ok(changes) => changes,
            Err(error) => {
                // The control loop looks at everything every few seconds anyway.
                warn!(%error, "changes of links cannot be watched; opening the socket anew");
                std::thread::sleep(TURN);
                match Monitor::open() {
                    Ok(fresh) => {
                        monitor = fresh;
                        vec![Change::Overrun]
                    }
                    Err(_) => continue,
                }
            }
        };
        let (mut kernel, mut pod_gone, mut pods) = (false, false, false);
        {
            let interest = lock(interest);
            for message in changes.iter().filter_map(|c| interest.message(c)) {
                kernel |= matches!(message, Message::Kernel);
                pod_gone |= matches!(message, Message::PodLinkGone);
                pods |= matches!(message, Message::PodNetwork);
            }
        }
        let messages = [
            kernel.then_some(Message::Kernel),
            pod_gone.then_some(Message::PodLinkGone),
            pods.then_some(Message::PodNetwork),
        ];
        for message in messages.into_iter().flatten() {
            match wake.try_send(message) {
                Ok(()) => {}
                // Whatever fills the queue wakes the loop, which looks at everything.
                Err(TrySendError::Full(_)) => debug!("the control loop has enough to do"),
                Err(TrySendError::Disconnected(_)) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_matters_wakes() {
        let mut interest = Interest::default();
        interest.set([2, 7].into_iter());
        let link = |index, name: &str, removed| Change::Link { index, name: name.into(), mtu: 1500, removed };
        let address = |index| Change::Address { index, addr: "10.0.0.1".parse().unwrap(), removed: false };
        let lost = |index, addr: &str| Change::Address { index, addr: addr.parse().unwrap(), removed: true };
        let route = |dev, protocol, removed| Change::Route {
            dst: "10.244.2.0/24".parse().unwrap(),
            dev,
            protocol,
            removed,
        };
        let cases = [
            (link(2, "eth0", false), "Kernel"),
            (link(9, "podway_vxlan", true), "Kernel"),
            (link(30, "pw0011", false), "PodNetwork"),
            (link(30, "pw0011", true), "PodLinkGone"),
            (link(31, "docker0", true), ""),
            (address(7), "Kernel"),
            (address(30), ""),
            (route(7, 80, true), "Kernel"),
            (route(7, 80, false), ""),
            (route(7, 4, true), ""),
            (route(30, 80, true), "PodNetwork"),
            (route(30, 80, false), ""),
            (lost(30, "fe80::1"), "PodNetwork"),
            (lost(1, "169.254.1.1"), "Kernel"),
            (lost(30, "fe80::2"), ""),
            (Change::Overrun, "Kernel"),
        ];
        for (change, want) in cases {
            let got = interest.message(&change).map_or(String::new(), |m| format!("{m:?}"));
            assert_eq!(got, want, "{change:?}");
        }
    }
}
