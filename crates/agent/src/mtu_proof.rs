//! The proof that packets of full size reach every other node: answers to their probes, and probes to them.
//!
//! The mechanism is [`podway_link::probe`]; here it gets its threads, learns whom to watch, and its verdicts
//! become events and metrics. Two threads, in the network namespace of the caller of [`MtuProof::start`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use podway_link::probe::{Counts, Prober, ProberConfig, Report, Responder, Verdict};
use tracing::{debug, info, warn};

use crate::attach::lock;
use crate::events::Reporter;
use crate::status::{Path, Status};

/// Longest time until a change of what is wanted, or the end, is noticed.
const TURN: Duration = Duration::from_millis(500);
/// Pause after a socket could not be opened.
const RETRY: Duration = Duration::from_secs(2);

/// What is to be proven.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The address that other nodes send to.
    pub own: Option<IpAddr>,
    /// Name of this node.
    pub own_name: String,
    /// Size of the packets that must arrive, in bytes, as they are between the nodes.
    pub size: u16,
    /// How much of it is encapsulation.
    pub overhead: u16,
    /// Other nodes by address.
    pub peers: BTreeMap<IpAddr, String>,
}

/// The running threads.
#[derive(Debug)]
pub struct MtuProof {
    wanted: Arc<Mutex<Wanted>>,
    stopping: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl MtuProof {
    /// Starts with nothing to prove.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(port: u16, status: Arc<Status>, reporter: Arc<Reporter>) -> io::Result<Self> {
        let wanted = Arc::new(Mutex::new(Wanted::default()));
        let stopping = Arc::new(AtomicBool::new(false));
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(body)
        };
        let (w, s) = (Arc::clone(&wanted), Arc::clone(&stopping));
        let responder = spawn("podway-mtu-ack", Box::new(move || respond(port, &w, &s)))?;
        let mut judge = Judge { status, reporter, narrow: BTreeSet::new() };
        let (w, s) = (Arc::clone(&wanted), Arc::clone(&stopping));
        let prober = spawn("podway-mtu", Box::new(move || probe(port, &w, &s, &mut judge)))?;
        Ok(Self { wanted, stopping, threads: vec![responder, prober] })
    }

    /// Sets what is to be proven.
    pub fn set(&self, wanted: Wanted) {
        *lock(&self.wanted) = wanted;
    }

    /// Ends the threads.
    pub fn stop(mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                warn!("a thread of the path MTU proof panicked");
            }
        }
    }
}

fn respond(port: u16, wanted: &Mutex<Wanted>, stopping: &AtomicBool) {
    let mut open: Option<(IpAddr, Responder)> = None;
    let mut complained = false;
    while !stopping.load(Ordering::SeqCst) {
        let own = lock(wanted).own;
        let Some(own) = own else {
            open = None;
            std::thread::sleep(TURN);
            continue;
        };
        if open.as_ref().is_none_or(|(address, _)| *address != own) {
            open = match Responder::bind(&[own], port) {
                Ok(responder) => {
                    complained = false;
                    Some((own, responder))
                }
                Err(error) => {
                    if !complained {
                        warn!(%error, port, "cannot answer path MTU probes; other nodes see this one as silent");
                        complained = true;
                    }
                    pause(stopping);
                    None
                }
            };
        }
        let Some((_, responder)) = &mut open else { continue };
        if let Err(error) = responder.serve(TURN) {
            debug!(%error, "answering path MTU probes");
            open = None;
            pause(stopping);
        }
    }
}

fn probe(port: u16, wanted: &Mutex<Wanted>, stopping: &AtomicBool, judge: &mut Judge) {
    let mut open: Option<(IpAddr, Prober)> = None;
    let mut applied = Wanted::default();
    let mut complained = false;
    while !stopping.load(Ordering::SeqCst) {
        let now = lock(wanted).clone();
        let Some(own) = now.own else {
            open = None;
            std::thread::sleep(TURN);
            continue;
        };
        if open.as_ref().is_none_or(|(address, _)| *address != own) {
            let config = ProberConfig { port, ..ProberConfig::default() };
            match Prober::bind(&[own], config) {
                Ok(prober) => {
                    complained = false;
                    applied = Wanted::default();
                    open = Some((own, prober));
                }
                Err(error) => {
                    if !complained {
                        warn!(%error, "cannot probe the paths to other nodes");
                        complained = true;
                    }
                    open = None;
                    pause(stopping);
                    continue;
                }
            }
        }
        let Some((_, prober)) = &mut open else { continue };
        if applied != now {
            let peers = now.peers.keys().map(|address| (*address, now.size)).collect();
            if let Err(error) = prober.set_peers(&peers) {
                warn!(%error, "cannot watch the paths to all nodes");
            }
            judge.forget_others(&now);
            applied = now;
        }
        match prober.run(TURN) {
            Ok(reports) => {
                for report in reports {
                    judge.judge(&applied, &report);
                }
                judge.count(prober);
            }
            Err(error) => {
                debug!(%error, "probing paths");
                open = None;
                pause(stopping);
            }
        }
    }
}

fn pause(stopping: &AtomicBool) {
    let until = Instant::now() + RETRY;
    while Instant::now() < until && !stopping.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Makes metrics and events of verdicts.
struct Judge {
    status: Arc<Status>,
    reporter: Arc<Reporter>,
    /// Peers of which a narrow path was reported, until it heals.
    narrow: BTreeSet<IpAddr>,
}

impl Judge {
    fn judge(&mut self, wanted: &Wanted, report: &Report) {
        let Some(node) = wanted.peers.get(&report.peer) else { return };
        self.status.update(|s| {
            let path = s.paths.entry(report.peer).or_insert_with(|| Path {
                node: String::new(),
                verdict: Verdict::Unknown,
                probes: Counts::default(),
                rtt: None,
            });
            path.node.clone_from(node);
            path.verdict = report.now;
        });
        let pair = format!("{} -> {node} ({})", wanted.own_name, report.peer);
        match report.now {
            Verdict::Narrow { expected, found } => {
                self.narrow.insert(report.peer);
                let message = narrow_text(&pair, expected, found, wanted.overhead);
                self.reporter.warning("PathMTUNarrow", node, &message);
            }
            Verdict::Proven { mtu } => {
                if self.narrow.remove(&report.peer) {
                    let message = format!("{pair}: packets of {mtu} bytes arrive again");
                    self.reporter.normal("PathMTUHealed", node, &message);
                } else if matches!(report.before, Verdict::Unreachable | Verdict::Refused) {
                    info!(path = pair, mtu, "the node answers path probes again");
                } else {
                    debug!(path = pair, mtu, "path MTU proven");
                }
            }
            Verdict::Unreachable => {
                warn!(path = pair, send_error = ?report.send_error,
                    "the node does not answer path probes: it is down, starting, or UDP is filtered");
            }
            Verdict::Refused => warn!(path = pair, "the node is up, but no agent answers path probes there"),
            _ => {}
        }
    }

    /// Takes over what became of the probes.
    fn count(&self, prober: &Prober) {
        self.status.update(|s| {
            for (peer, path) in &mut s.paths {
                path.probes = prober.counts(*peer).unwrap_or(path.probes);
                path.rtt = prober.rtt(*peer);
            }
        });
    }

    fn forget_others(&mut self, wanted: &Wanted) {
        self.narrow.retain(|peer| wanted.peers.contains_key(peer));
        self.status.update(|s| s.paths.retain(|peer, _| wanted.peers.contains_key(peer)));
    }
}

fn narrow_text(pair: &str, expected: u16, found: u16, overhead: u16) -> String {
    let pods = found.saturating_sub(overhead);
    format!(
        "{pair}: the path carries packets of at most {found} bytes, expected {expected}. Pod packets larger than \
         {pods} bytes are lost without a trace on this path. Raise the MTU of the links between the nodes to \
         {expected}, or lower that of the nodes' interfaces to {found}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge() -> (Judge, Arc<Status>) {
        let status = Arc::new(Status::new());
        let judge = Judge {
            status: Arc::clone(&status),
            reporter: Arc::new(Reporter::new("n1")),
            narrow: BTreeSet::new(),
        };
        (judge, status)
    }

    #[test]
    fn a_narrow_path_is_remembered_until_it_heals() {
        let (mut judge, status) = judge();
        let peer: IpAddr = "172.18.1.2".parse().unwrap();
        let mut wanted = Wanted { own_name: "n1".into(), overhead: 50, ..Wanted::default() };
        wanted.peers.insert(peer, "n2".into());
        let narrow = Verdict::Narrow { expected: 1500, found: 1400 };
        let steps = [
            (Verdict::Unknown, narrow, true),
            (narrow, Verdict::Unreachable, true),
            (Verdict::Unreachable, Verdict::Proven { mtu: 1500 }, false),
        ];
        for (before, now, remembered) in steps {
            judge.judge(&wanted, &Report { peer, before, now, send_error: None });
            assert_eq!(judge.narrow.contains(&peer), remembered, "{now:?}");
            assert_eq!(status.snapshot().paths[&peer].verdict, now);
        }
        judge.forget_others(&Wanted::default());
        assert!(status.snapshot().paths.is_empty());
    }

    #[test]
    fn the_event_names_pair_expected_and_found() {
        let text = narrow_text("n1 -> n2 (172.18.1.2)", 1500, 1400, 50);
        for part in ["n1 -> n2 (172.18.1.2)", "at most 1400", "expected 1500", "larger than 1350"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
