//! Answering for load balancer addresses on the node network: the uplink has them, the kernel answers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podway_link::announce::announce;
use podway_link::{Link, Netlink};
use tracing::{info, warn};

use super::board::Board;
use crate::events::Reporter;
use crate::status::Status;

/// For how long the kernel goes on without the agent. An agent that is replaced is back long before.
const VALID: Duration = Duration::from_secs(20);
/// Between two renewals.
const RENEW: Duration = Duration::from_secs(5);
/// Between two looks.
const TURN: Duration = Duration::from_millis(200);
/// After how long a new address is announced again: the first announcement may be lost.
const AGAIN: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(2), Duration::from_secs(5)];
/// Between two announcements of what stays: for neighbours whose memory somebody else has changed.
const REFRESH: Duration = Duration::from_secs(60);

/// The announcer of one node.
#[derive(Debug)]
pub(crate) struct Announcer {
    node: String,
    board: Arc<Board>,
    status: Arc<Status>,
    reporter: Arc<Reporter>,
    /// Addresses in place, with the link, when they came, and how often they were announced since.
    placed: BTreeMap<IpAddr, Placed>,
    wanted: BTreeSet<IpAddr>,
    renewed: Option<Instant>,
    refused: BTreeMap<IpAddr, String>,
}

#[derive(Debug)]
struct Placed {
    link: u32,
    since: Instant,
    announced: usize,
    last: Instant,
}

impl Announcer {
    /// An announcer that has not looked yet.
    #[must_use]
    pub(crate) fn new(node: &str, board: Arc<Board>, status: Arc<Status>, reporter: Arc<Reporter>) -> Self {
        Self {
            node: node.to_owned(),
            board,
            status,
            reporter,
            placed: BTreeMap::new(),
            wanted: BTreeSet::new(),
            renewed: None,
            refused: BTreeMap::new(),
        }
    }

    /// Works in the network namespace of the calling thread until told to stop. What is in place stays there for its
    /// time: the next agent takes over.
    pub(crate) fn run(mut self, stopping: &AtomicBool) {
        let mut complained = false;
        while !stopping.load(Ordering::SeqCst) {
            match self.turn() {
                Ok(()) => complained = false,
                Err(error) => {
                    if !complained {
                        warn!(%error, "load balancer addresses cannot be put in order");
                        complained = true;
                    }
                    // What was placed is looked at anew.
                    self.renewed = None;
                }
            }
            std::thread::sleep(TURN);
        }
    }

    fn turn(&mut self) -> podway_link::Result<()> {
        let known = self.board.announced_by(&self.node);
        let due = self.renewed.is_none_or(|at| at.elapsed() >= RENEW);
        let changed = known.as_ref().is_some_and(|k| *k != self.wanted);
        if due || changed {
            self.put_in_order(known)?;
        }
        self.repeat()
    }

    fn put_in_order(&mut self, known: Option<BTreeSet<IpAddr>>) -> podway_link::Result<()> {
        let Some(uplink) = self.status.snapshot().local.map(|l| l.uplink.index) else { return Ok(()) };
        let mut netlink = Netlink::open()?;
        let held = netlink.held_everywhere()?;
        let complete = known.is_some();
        // Before the Services are known, what an earlier agent had stays.
        let wanted = known
            .unwrap_or_else(|| held.iter().filter(|(link, _)| *link == uplink).map(|(_, a)| *a).collect());
        if wanted.is_empty() && held.is_empty() {
            self.wanted = wanted;
            self.placed.clear();
            self.refused.clear();
            self.renewed = Some(Instant::now());
            return Ok(());
        }
        for (link, address) in &held {
            if complete && (*link != uplink || !wanted.contains(address)) {
                netlink.delete_address(*link, IpNet::from(*address))?;
                info!(%address, "another node answers for this load balancer address, or none");
            }
        }
        let link = netlink.link_by_index(uplink)?;
        for address in &wanted {
            self.place(&mut netlink, link.as_ref(), *address);
        }
        self.placed.retain(|address, _| wanted.contains(address));
        self.refused.retain(|address, _| wanted.contains(address));
        self.wanted = wanted;
        self.renewed = Some(Instant::now());
        Ok(())
    }

    fn place(&mut self, netlink: &mut Netlink, link: Option<&Link>, address: IpAddr) {
        let Some(link) = link else { return };
        let result = netlink.hold_address(link.index, address, VALID).and_then(|new| {
            let ours = new || netlink.held_addresses(link.index)?.contains(&address);
            Ok((new, ours))
        });
        let why = match result {
            Ok((new, true)) => {
                self.refused.remove(&address);
                let now = Instant::now();
                if new {
                    info!(%address, device = link.name, "this node answers for a load balancer address");
                    if let Err(error) = announce(link.index, link.mac, address) {
                        warn!(%error, "not announced");
                    }
                }
                // What an earlier agent placed is known to the neighbours.
                let announced = if new { 0 } else { AGAIN.len() };
                let placed = Placed { link: link.index, since: now, announced, last: now };
                if new || self.placed.get(&address).is_none_or(|p| p.link != link.index) {
                    self.placed.insert(address, placed);
                }
                return;
            }
            Ok((_, false)) => format!("{} has this address already, not from Podway", link.name),
            Err(error) => error.to_string(),
        };
        if self.refused.get(&address) != Some(&why) {
            let message = format!("load balancer address {address} cannot be answered for: {why}");
            self.reporter.warning("LoadBalancerAddressRefused", &address.to_string(), &message);
            self.refused.insert(address, why);
        }
    }

    /// Announces anew what is due.
    fn repeat(&mut self) -> podway_link::Result<()> {
        let due = |p: &Placed| {
            let early = AGAIN.get(p.announced).is_some_and(|after| p.since.elapsed() >= *after);
            early || p.last.elapsed() >= REFRESH
        };
        if !self.placed.values().any(due) {
            return Ok(());
        }
        let mut netlink = Netlink::open()?;
        for (address, placed) in self.placed.iter_mut().filter(|(_, p)| due(p)) {
            placed.announced += 1;
            placed.last = Instant::now();
            if let Some(link) = netlink.link_by_index(placed.link)? {
                announce(link.index, link.mac, *address)?;
            }
        }
        Ok(())
    }
}
