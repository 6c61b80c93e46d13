//! `podway bench flows`: what it costs to tell flows, and whether what is not told is counted.
//!
//! A pod opens flows at a steady rate, datagrams from and to ever other ports, towards a pod of the same node. Measured
//! are the processor time of the node's agent and that of its kernel programs, with flows told and without, in turns.
//! Then the agent is stopped for a moment, so that nobody reads.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podway_bpf_host::{EventLimits, EventTables};
use podway_link::Netns;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cluster::{Cluster, NAMESPACE};
use crate::machine::Machine;
use crate::network::{CLIENT, SAME, own_part};
use crate::pairs::interleave;
use crate::place::start;
use crate::programs::Counting;
use crate::report::{Bound, Difference, Report};
use crate::stop::Stop;
use crate::{check_pairs, new_report};

/// Name of the lab.
const LAB: &str = "bench_flows";
const NODE: &str = "node-1";
/// Flows a second for which the goal holds.
const RATE: u32 = 100_000;
/// Highest rate that may be asked for.
pub const MAX_RATE: u32 = 1_000_000;
/// Longest single measurement.
pub const MAX_TIME: Duration = Duration::from_secs(10);
/// Share of one core that telling [`RATE`] flows a second may cost, in percent.
const GOAL: f64 = 10.0;
/// No limit that the bench reaches.
const ALL: EventLimits = EventLimits { flows_per_second: 10_000_000, drops_per_second: 1_000 };
/// How long the agent has for what is left in the ring buffer.
const DRAIN: Duration = Duration::from_millis(300);
/// Ports that a socket sends to.
const PORTS: u16 = 50_000;
/// Time that the sender may take beyond its own.
const SLACK: Duration = Duration::from_secs(20);

/// How to measure.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Pairs of the comparison.
    pub pairs: usize,
    /// Time of each measurement.
    pub time: Duration,
    /// Flows a second.
    pub rate: u32,
}

/// What the sender did.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Burst {
    /// Flows that it opened.
    pub flows: u64,
    /// In so many seconds.
    pub seconds: f64,
}

/// Opens flows at a rate: the sender, in the pod.
///
/// # Errors
/// When it cannot send.
pub fn burst(server: IpAddr, rate: u32, time: Duration) -> anyhow::Result<Burst> {
    let any: SocketAddr = if server.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let (begun, mut sent) = (Instant::now(), 0_u64);
    let mut socket = UdpSocket::bind(any)?;
    while begun.elapsed() < time {
        let due = u64::try_from(begun.elapsed().as_micros())? * u64::from(rate) / 1_000_000;
        while sent < due {
            let port = u16::try_from(sent % u64::from(PORTS))?;
            if port == 0 {
                // Other ports on this side: none of the flows has been there before.
                socket = UdpSocket::bind(any)?;
            }
            match socket.send_to(b"flow", (server, port + 10_000)) {
                Ok(_) => {}
                // An answer to an earlier datagram: nobody listens there.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {}
                Err(e) => return Err(e).context("send a datagram"),
            }
            sent += 1;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(Burst { flows: sent, seconds: begun.elapsed().as_secs_f64() })
}

/// Runs the bench. `say` is told what happens.
///
/// # Errors
/// When an option is bad, a part cannot be made, or it is interrupted. Everything that was made is removed.
pub fn run(options: Options, stop: &Stop, mut say: impl FnMut(&str)) -> anyhow::Result<Report> {
    check_pairs(options.pairs)?;
    if options.time < Duration::from_millis(100) || options.time > MAX_TIME {
        bail!("--milliseconds: {} is not 100 to {}", options.time.as_millis(), MAX_TIME.as_millis());
    }
    if !(1_000..=MAX_RATE).contains(&options.rate) {
        bail!("--rate: {} is not 1000 to {MAX_RATE}", options.rate);
    }
    let mut report = new_report("flows", Machine::of_now());
    report.options = json!({
        "pairs": options.pairs,
        "milliseconds": u64::try_from(options.time.as_millis())?,
        "rate": options.rate,
    });
    say("making a lab of one node");
    let cluster = Cluster::up(LAB, 1, &[(CLIENT, NODE), (SAME, NODE)], stop)?;
    let node = Node::of(&cluster, options)?;
    say(&format!("{} flows a second, told and not told", options.rate));
    node.cost(stop, &mut report)?;
    say("with the agent stopped");
    node.loss(stop, &mut report)?;
    drop(node);
    cluster.down()?;
    Ok(report)
}

/// What is measured of the lab's node.
struct Node {
    client: Netns,
    server: IpAddr,
    agent: Pid,
    pins: PathBuf,
    options: Options,
}

impl Node {
    fn of(cluster: &Cluster, options: Options) -> anyhow::Result<Self> {
        let lock = cluster.name.agents_dir().join(NODE).join("agent.lock");
        let pid = fs::read_to_string(&lock).with_context(|| format!("read {}", lock.display()))?;
        let pid = pid.trim().parse().with_context(|| format!("{} holds no process", lock.display()))?;
        let server = cluster.seen.pods.iter().find(|p| p.name == SAME);
        let server = server.and_then(|p| p.addresses.first()).context("the server has no address")?;
        Ok(Self {
            client: Netns::open_named(&cluster.name.pod_netns(NAMESPACE, CLIENT))?,
            server: *server,
            agent: Pid::from_raw(pid),
            pins: cluster.name.pin_dir().join(NODE),
            options,
        })
    }

    fn tables(&self) -> anyhow::Result<EventTables> {
        Ok(EventTables::open(&self.pins)?)
    }

    /// Events of flows that begin: told, held back, lost.
    fn starts(&self) -> anyhow::Result<[u64; 3]> {
        let counts = self.tables()?.counts()?;
        let start = counts.iter().find(|c| c.kind == "start");
        Ok(start.map_or([0; 3], |c| [c.told, c.limited, c.lost]))
    }

    fn burst(&self, time: Duration, stop: &Stop) -> anyhow::Result<Burst> {
        let (server, rate) = (self.server.to_string(), self.options.rate.to_string());
        let milliseconds = time.as_millis().to_string();
        let sender = own_part(&["burst", &server, "--rate", &rate, "--milliseconds", &milliseconds]);
        let finished = start(&self.client, None, sender)?.finish(&[], time + SLACK, stop)?;
        stop.check()?;
        if !finished.status.success() {
            bail!("the sender ended with {}", finished.status);
        }
        serde_json::from_slice(&finished.stdout).context("understand the sender")
    }

    /// Processor time that the agent and the programs need, in percent of a core at [`RATE`] flows a second.
    fn share(&self, limits: EventLimits, counting: &Counting, stop: &Stop) -> anyhow::Result<(f64, f64)> {
        self.tables()?.set_limits(limits)?;
        let told = self.starts()?[0];
        let (agent, programs) = (cpu_ns(self.agent)?, counting.total()?);
        let burst = self.burst(self.options.time, stop)?;
        stop.sleep(DRAIN)?;
        let (agent, programs) =
            (cpu_ns(self.agent)?.saturating_sub(agent), counting.total()?.saturating_sub(programs));
        let told = self.starts()?[0].saturating_sub(told);
        if limits == ALL && told < burst.flows / 10 * 9 {
            bail!(
                "only {told} of {} flows were told: the machine is too busy, or too slow for --rate",
                burst.flows
            );
        }
        let share = |ns: u64| exact(ns) / exact(burst.flows) * f64::from(RATE) / 1e9 * 100.0;
        Ok((share(agent), share(programs)))
    }

    fn cost(&self, stop: &Stop, report: &mut Report) -> anyhow::Result<()> {
        let counting = Counting::start(&[&self.pins])?;
        let parts = std::cell::RefCell::new((Vec::new(), Vec::new()));
        let once = |limits: EventLimits| -> anyhow::Result<f64> {
            let (agent, programs) = self.share(limits, &counting, stop)?;
            if limits == ALL {
                parts.borrow_mut().0.push(agent);
                parts.borrow_mut().1.push(programs);
            }
            Ok(agent + programs)
        };
        let pairs = interleave(self.options.pairs, stop, || once(ALL), || once(EventLimits::NONE))?;
        report.differences.push(
            Difference::new(
                "flows told at 100,000 a second, agent and programs together",
                "% of a core",
                "podway",
                pairs,
                GOAL,
            )
            .context("too few pairs for an interval")?,
        );
        let (agent, programs) = parts.into_inner();
        for (what, values) in
            [("the agent's part, all it does", &agent), ("the programs' part, all they do", &programs)]
        {
            let median = crate::stats::median(values).context("nothing was measured")?;
            report.bounds.extend(Bound::worst(what, "% of a core, median", &[median], None));
        }
        Ok(())
    }

    /// With nobody who reads, what is told fills the ring buffer, and the rest is counted.
    fn loss(&self, stop: &Stop, report: &mut Report) -> anyhow::Result<()> {
        self.tables()?.set_limits(ALL)?;
        let before = self.starts()?;
        let stopped = Stopped::stop(self.agent)?;
        let burst = self.burst(Duration::from_secs(1), stop)?;
        drop(stopped);
        let after = self.starts()?;
        let [told, limited, lost] = [0, 1, 2].map(|i| after[i].saturating_sub(before[i]));
        let missing = burst.flows.saturating_sub(told + limited + lost);
        report.bounds.extend(Bound::worst(
            "agent stopped for a second: events that are neither told nor counted",
            "events",
            &[exact(missing)],
            Some(0.0),
        ));
        let what = format!("agent stopped for a second: lost and counted, of {}", burst.flows);
        report.bounds.extend(Bound::worst(&what, "events", &[exact(lost)], None));
        Ok(())
    }
}

/// A process that goes on when this value goes.
struct Stopped(Pid);

impl Stopped {
    fn stop(pid: Pid) -> anyhow::Result<Self> {
        kill(pid, Signal::SIGSTOP).context("stop the lab's agent")?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // One that has ended needs no more.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Nanoseconds that all threads of a process have run (proc(5): `schedstat`).
fn cpu_ns(pid: Pid) -> anyhow::Result<u64> {
    let tasks = Path::new("/proc").join(pid.to_string()).join("task");
    let mut sum = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("read {}", tasks.display()))? {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let run = text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
        sum += run.context("schedstat has no numbers; the kernel needs CONFIG_SCHED_INFO")?;
    }
    Ok(sum)
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds and packets of seconds are far below 2^53")]
fn exact(number: u64) -> f64 {
    number as f64
}

/// Prints what the sender did.
///
/// # Errors
/// When it cannot send, or nobody reads.
pub fn sender(server: IpAddr, rate: u32, time: Duration) -> anyhow::Result<()> {
    let burst = burst(server, rate, time)?;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, &burst)?;
    out.flush().context("tell the bench")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_has_its_rate_and_ports_of_its_own() {
        let socket =
            UdpSocket::bind("127.0.0.1:10001").or_else(|_| UdpSocket::bind("127.0.0.1:10002")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let burst = burst("127.0.0.1".parse().unwrap(), 1_000, Duration::from_millis(200)).unwrap();
        assert!((100..=210).contains(&burst.flows) && burst.seconds >= 0.2, "{burst:?}");
        let mut buffer = [0; 8];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 4);
    }

    #[test]
    fn processor_time_grows() {
        let own = Pid::this();
        let before = cpu_ns(own).unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(30) {
            std::hint::black_box(begun);
        }
        assert!(cpu_ns(own).unwrap() > before);
    }
}
