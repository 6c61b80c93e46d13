//! `podway bench net`: what pods get out of the network, between two nodes and on one.

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;

use crate::cluster::Cluster;
use crate::machine::Machine;
use crate::network::{self, CLIENT, Cores, FAR, Network, PEER_TOOLS, Path, Peer, SAME};
use crate::pairs::interleave;
use crate::programs::{self, ProgramCost};
use crate::report::{Comparison, Goal, Report, Skipped, Times};
use crate::stats::median;
use crate::stop::Stop;
use crate::traffic::{Kind, Outcome};
use crate::{check_pairs, new_report};

/// Name of the lab.
const LAB: &str = "bench_net";
/// Longest single measurement: a bench has to end.
pub const MAX_TIME: Duration = Duration::from_secs(10);
/// Rounds of which a program's cost is the least.
const COST_ROUNDS: usize = 7;
/// Core of the client, and of a server that shares it.
const CORE: usize = 0;

/// How to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Pairs of each comparison.
    pub pairs: usize,
    /// Time of each measurement.
    pub time: Duration,
    /// Services whose rules the peer has to pass.
    pub services: u16,
    /// Recorded report to compare the programs' cost with.
    pub baseline: Option<PathBuf>,
    /// Only the comparisons with this in their name.
    pub only: Option<String>,
}

impl Options {
    fn wants(&self, what: &str) -> bool {
        self.only.as_deref().is_none_or(|only| what.contains(only))
    }
}

/// One line of the comparison.
struct Case {
    what: &'static str,
    path: Path,
    kind: Kind,
    /// Whether the server has a core of its own.
    apart: bool,
    /// What is aimed at against the bare peer, and against the one with rules.
    goals: (f64, f64),
}

const CASES: [Case; 8] = [
    Case {
        what: "two nodes, stream, one core",
        path: Path::TwoNodes,
        kind: Kind::Stream,
        apart: false,
        goals: (0.97, 0.97),
    },
    Case {
        what: "two nodes, stream, two cores",
        path: Path::TwoNodes,
        kind: Kind::Stream,
        apart: true,
        goals: (0.97, 0.97),
    },
    Case {
        what: "two nodes, requests, one core",
        path: Path::TwoNodes,
        kind: Kind::Requests,
        apart: false,
        goals: (1.0, 1.1),
    },
    Case {
        what: "two nodes, requests, two cores",
        path: Path::TwoNodes,
        kind: Kind::Requests,
        apart: true,
        goals: (1.0, 1.1),
    },
    Case {
        what: "same node, stream, one core",
        path: Path::SameNode,
        kind: Kind::Stream,
        apart: false,
        goals: (1.0, 1.1),
    },
    Case {
        what: "same node, stream, two cores",
        path: Path::SameNode,
        kind: Kind::Stream,
        apart: true,
        goals: (1.0, 1.1),
    },
    Case {
        what: "same node, requests, one core",
        path: Path::SameNode,
        kind: Kind::Requests,
        apart: false,
        goals: (1.0, 1.1),
    },
    Case {
        what: "same node, requests, two cores",
        path: Path::SameNode,
        kind: Kind::Requests,
        apart: true,
        goals: (1.0, 1.1),
    },
];

/// Runs the bench. `say` is told what happens. The strings are what has become worse since the baseline.
///
/// # Errors
/// When an option is bad, a part cannot be made, or it is interrupted. Everything that was made is removed.
pub fn run(
    options: &Options,
    stop: &Stop,
    mut say: impl FnMut(&str),
) -> anyhow::Result<(Report, Vec<String>)> {
    check_pairs(options.pairs)?;
    if options.time < Duration::from_millis(100) || options.time > MAX_TIME {
        bail!("--milliseconds: {} is not 100 to {}", options.time.as_millis(), MAX_TIME.as_millis());
    }
    if options.services > crate::rules::MAX_SERVICES {
        bail!("--services: {} is more than {}", options.services, crate::rules::MAX_SERVICES);
    }
    if let Some(only) = options.only.as_deref().filter(|_| !CASES.iter().any(|c| options.wants(c.what))) {
        let names: Vec<&str> = CASES.iter().map(|c| c.what).collect();
        bail!("--only: no comparison has {only:?} in its name; there are {}", names.join("; "));
    }
    // Before minutes of measuring, not after.
    let baseline = options.baseline.as_deref().map(programs::baseline).transpose()?;
    let machine = Machine::of_now();
    let mut report = new_report("net", machine);
    report.options = json!({
        "pairs": options.pairs,
        "milliseconds": u64::try_from(options.time.as_millis())?,
        "services": options.services,
        "only": options.only,
    });

    say("making a lab of two nodes");
    let pods = [(CLIENT, "node-1"), (SAME, "node-1"), (FAR, "node-2")];
    let cluster = Cluster::up(LAB, 2, &pods, stop)?;
    let ours = Network::of_cluster(&cluster)?;
    for peer in peers(options, &mut report.skipped, stop)? {
        compare(options, &ours, &peer, &mut report, stop, &mut say)?;
    }
    say("what our programs cost");
    report.programs = costs(&cluster, &ours, options, stop)?;
    drop(ours);
    cluster.down()?;
    let worse = baseline.map_or_else(Vec::new, |b| programs::regressions(&b, &report.programs));
    Ok((report, worse))
}

struct Opponent {
    peer: Peer,
    rules: bool,
}

fn peers(options: &Options, skipped: &mut Vec<Skipped>, stop: &Stop) -> anyhow::Result<Vec<Opponent>> {
    let mut skip = |what: &str, why: String| skipped.push(Skipped { what: what.into(), why });
    if let Some(tool) = PEER_TOOLS.into_iter().find(|tool| !network::on_path(tool)) {
        skip("bridge and kernel VXLAN", format!("there is no {tool}; install iproute2"));
        return Ok(vec![]);
    }
    let bare =
        Peer::up("bridge, kernel VXLAN", "bare", None, stop).context("set up bridge and kernel VXLAN")?;
    let mut peers = vec![Opponent { peer: bare, rules: false }];
    match network::rules_tool() {
        None => skip(
            "bridge and kernel VXLAN with rules",
            "there is no iptables-restore; install iptables".into(),
        ),
        Some(tool) => {
            let name = format!("the same, rules of {} services", options.services);
            let peer = Peer::up(&name, "rules", Some((tool, options.services)), stop)
                .with_context(|| format!("load the rules of {} services", options.services))?;
            peers.push(Opponent { peer, rules: true });
        }
    }
    Ok(peers)
}

fn compare(
    options: &Options,
    ours: &Network,
    opponent: &Opponent,
    report: &mut Report,
    stop: &Stop,
    say: &mut impl FnMut(&str),
) -> anyhow::Result<()> {
    let peer = &opponent.peer.network;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for case in CASES.iter().filter(|c| options.wants(c.what)) {
        let mut skip = |why: &str| {
            report
                .skipped
                .push(Skipped { what: format!("{} against {}", case.what, peer.name), why: why.into() });
        };
        if case.apart && cores < 2 {
            skip("this machine has one core; client and server need one each");
            continue;
        }
        if opponent.rules && case.path == Path::SameNode && !network::bridges_call_iptables() {
            skip("this kernel has no br_netfilter, so bridged packets pass no iptables rules");
            continue;
        }
        say(&format!("{} against {}", case.what, peer.name));
        let place = Cores { client: CORE, server: if case.apart { CORE + 1 } else { CORE } };
        let delays = RefCell::new((Vec::new(), Vec::new()));
        let once = |network: &Network, mine: bool| -> anyhow::Result<f64> {
            Ok(match network.measure(case.path, case.kind, place, options.time, stop)? {
                Outcome::Stream { gbit_per_second } => gbit_per_second,
                Outcome::Requests { per_second, p50_us, p99_us } => {
                    let mut delays = delays.borrow_mut();
                    let side = if mine { &mut delays.0 } else { &mut delays.1 };
                    side.push((p50_us, p99_us));
                    per_second
                }
            })
        };
        let pairs = interleave(options.pairs, stop, || once(ours, true), || once(peer, false))?;
        let unit = if case.kind == Kind::Stream { "Gbit/s" } else { "1/s" };
        let goal = Goal::AtLeast(if opponent.rules { case.goals.1 } else { case.goals.0 });
        let comparison = Comparison::new(case.what, unit, &peer.name, pairs, goal)
            .context("too few pairs for an interval")?;
        report.comparisons.push(comparison);
        let (own, theirs) = delays.into_inner();
        // Podway is in every comparison; its times are listed with the first.
        if !opponent.rules {
            report.times.extend(times(case.what, &ours.name, &own));
        }
        report.times.extend(times(case.what, &peer.name, &theirs));
    }
    Ok(())
}

/// Median over the measurements, of each measurement's median and 99th percentile.
fn times(what: &str, who: &str, delays: &[(f64, f64)]) -> Option<Times> {
    // The first measurement was thrown away.
    let (p50, p99): (Vec<f64>, Vec<f64>) = delays.iter().skip(1).copied().unzip();
    Some(Times {
        what: what.into(),
        who: who.into(),
        unit: "µs".into(),
        p50: median(&p50)?,
        p99: median(&p99)?,
        count: p50.len(),
    })
}

fn costs(
    cluster: &Cluster,
    ours: &Network,
    options: &Options,
    stop: &Stop,
) -> anyhow::Result<Vec<ProgramCost>> {
    let mut all = Vec::new();
    let together = Cores { client: CORE, server: CORE };
    for (name, path, kind) in [
        ("two nodes, requests", Path::TwoNodes, Kind::Requests),
        ("two nodes, stream", Path::TwoNodes, Kind::Stream),
        ("same node, requests", Path::SameNode, Kind::Requests),
    ] {
        all.extend(programs::measure(&cluster.pin_dirs(), name, COST_ROUNDS, || {
            ours.measure(path, kind, together, options.time, stop).map(drop)
        })?);
    }
    Ok(all)
}
