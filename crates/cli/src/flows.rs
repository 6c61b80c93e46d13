//! `podway flows`: what moves and what is dropped, as the agents of this machine tell it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, Write as _};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use podway_agent::Instance;
use podway_agent::flows::socket::{self, AskError};
use podway_flows::{Answer, Filter, FilterSpec, Query, Summary, flow, render};
use podway_lab::spec::LabName;
use podway_lab::state::{self, StateDir};

use crate::{FAILED, OK, USAGE, output};

/// Flows that are shown when nobody says how many.
const LAST: usize = 20;
/// Flows of several nodes are held back for this long, so that they come in the order of their times.
const REORDER: Duration = Duration::from_millis(250);
/// Pause before it is tried again to reach an agent that has ended.
const AGAIN: Duration = Duration::from_millis(300);
/// Flows that wait to be put in order; more are shown as they come.
const WAITING: usize = 65_536;
/// Widest a column of the table grows while more is to come.
const LIVE_WIDTHS: [usize; 7] = [23, 8, 9, 5, 8, 32, 32];

#[derive(Debug, Args)]
pub(crate) struct Flows {
    /// Go on with what happens
    #[arg(short, long)]
    follow: bool,
    /// So many of the newest that fit [default: 20; with --follow 0, with --since all]
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// All that are remembered
    #[arg(long, conflicts_with = "last")]
    all: bool,
    /// Nothing older: a time such as 30s, 5m or 2h ago, or 2026-11-23T10:00:00Z
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<i64>,
    /// Only what was forwarded or dropped
    #[arg(long, value_name = "VERDICT")]
    verdict: Vec<String>,
    /// Only flows that start or end, or drop for drops
    #[arg(long = "event", value_name = "EVENT")]
    event: Vec<String>,
    /// Pod at either end, all whose names begin so; without a namespace that of default
    #[arg(long, value_name = "[NAMESPACE/]POD")]
    pod: Vec<String>,
    /// Pod that opened the flow
    #[arg(long, value_name = "[NAMESPACE/]POD")]
    from_pod: Vec<String>,
    /// Pod to which it was opened
    #[arg(long, value_name = "[NAMESPACE/]POD")]
    to_pod: Vec<String>,
    /// Namespace of a pod at either end, or of the service
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Vec<String>,
    /// Labels of a pod at either end: app=web,tier!=db
    #[arg(short, long, value_name = "SELECTOR")]
    label: Vec<String>,
    /// Service that was asked
    #[arg(long, value_name = "[NAMESPACE/]SERVICE")]
    service: Vec<String>,
    /// Port at either end, or of the service
    #[arg(long, value_name = "PORT")]
    port: Vec<String>,
    /// tcp, udp, sctp, icmp, icmpv4, icmpv6, arp or a number
    #[arg(long, value_name = "PROTOCOL")]
    protocol: Vec<String>,
    /// Address or range at either end, or of the service
    #[arg(long, value_name = "ADDRESS|CIDR")]
    ip: Vec<String>,
    /// Reason, such as spoofed_address
    #[arg(long, value_name = "REASON")]
    reason: Vec<String>,
    /// Which agent of this machine: node, or LAB/NODE [default: all nodes of the lab when one is named or is the only
    /// one, else node]
    #[arg(long, env = "PODWAY_INSTANCE", value_parser = Instance::parse, conflicts_with_all = ["lab", "node"])]
    instance: Option<Instance>,
    /// Name of a lab on this machine
    #[arg(long, env = "PODWAY_LAB")]
    lab: Option<LabName>,
    /// Node of the lab; may be given several times [default: all]
    #[arg(long, value_name = "NODE")]
    node: Vec<String>,
    /// How to print: a line for each, JSON for each line, or columns
    #[arg(short, long, value_enum, default_value = "compact")]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Compact,
    Json,
    Table,
}

pub(crate) fn run(args: Flows) -> anyhow::Result<u8> {
    let instances = instances(&args)?;
    let last = match (args.last, args.all, args.follow, args.since) {
        (Some(n), ..) => Some(n),
        (None, true, ..) | (None, _, _, Some(_)) => None,
        (None, false, true, None) => Some(0),
        (None, false, false, None) => Some(LAST),
    };
    let filter = FilterSpec {
        verdict: args.verdict,
        event: args.event,
        pod: args.pod,
        from_pod: args.from_pod,
        to_pod: args.to_pod,
        namespace: args.namespace,
        label: args.label,
        service: args.service,
        port: args.port,
        protocol: args.protocol,
        ip: args.ip,
        reason: args.reason,
    };
    if let Err(error) = Filter::parse(&filter) {
        output::error(&format!("podway: {error}"));
        return Ok(USAGE);
    }
    let query = Query { filter, last, since: args.since, follow: args.follow };
    let mut shown = Shown { format: args.output, header: false, follow: args.follow };
    let asked = Asked::ask(&instances, &query);
    show(&asked, instances.len(), &query, &mut shown)
}

/// The agents that are meant.
fn instances(args: &Flows) -> anyhow::Result<Vec<Instance>> {
    if let Some(instance) = &args.instance {
        return Ok(vec![instance.clone()]);
    }
    let own = Instance::parse(Instance::DEFAULT)?;
    let lab = match &args.lab {
        Some(lab) => lab.clone(),
        None => match state::list()?.as_slice() {
            _ if args.node.is_empty() && own.run_dir().join(socket::SOCKET).exists() => return Ok(vec![own]),
            [one] => one.clone(),
            [] if args.node.is_empty() => return Ok(vec![own]),
            [] => bail!("there is no lab on this machine; make one with podway lab up"),
            several => {
                let names: Vec<&str> = several.iter().map(LabName::as_str).collect();
                bail!("there are several labs ({}); name one with --lab", names.join(", "))
            }
        },
    };
    if StateDir::of(&lab).lab()?.is_none() {
        bail!("there is no lab {lab}; podway lab list shows those of this machine");
    }
    let known = nodes(&lab)?;
    for node in &args.node {
        if !known.contains(node) {
            bail!("--node {node}: lab {lab} has no such node with an agent; there are {}", known.join(", "));
        }
    }
    let chosen = if args.node.is_empty() { known } else { args.node.clone() };
    if chosen.is_empty() {
        bail!("no node of lab {lab} has an agent that tells flows; see podway lab status");
    }
    chosen.iter().map(|node| Instance::parse(&format!("{lab}/{node}")).map_err(Into::into)).collect()
}

/// Nodes of a lab whose agents have told, or tell, flows.
pub(crate) fn nodes(lab: &LabName) -> anyhow::Result<Vec<String>> {
    let any = Instance::parse(&format!("{lab}/any"))?.run_dir();
    let dir = any.parent().context("an instance's directory is within another")?;
    let mut nodes: Vec<String> = std::fs::read_dir(dir)
        .with_context(|| format!("read {}", dir.display()))?
        .flatten()
        .filter(|entry| entry.path().join(socket::SOCKET).exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    nodes.sort();
    Ok(nodes)
}

/// A time ago, or a time; as nanoseconds of the Unix clock.
fn since(text: &str) -> Result<i64, String> {
    let bad = || format!("{text:?} is no time; write 30s, 5m, 2h, or 2026-11-23T10:00:00Z");
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return i64::try_from(time.as_nanosecond()).map_err(|_| bad());
    }
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        _ => return Err(bad()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| bad())?;
    let ago = number.checked_mul(unit).map(Duration::from_secs).ok_or_else(bad)?;
    let then = SystemTime::now().checked_sub(ago).ok_or_else(bad)?;
    Ok(unix_ns(then))
}

fn unix_ns(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// What comes from one of the agents.
enum Heard {
    /// A line.
    Line(Answer),
    /// There will be no more; and why, if that is not as it should be.
    End(Option<anyhow::Error>),
}

/// Questions under way.
struct Asked(mpsc::Receiver<Heard>);

impl Asked {
    /// Asks all at the same time, each by a thread of its own; they end with the process.
    fn ask(instances: &[Instance], query: &Query) -> Self {
        let (tell, told) = mpsc::sync_channel(4096);
        for instance in instances {
            let (tell, query, instance) = (tell.clone(), query.clone(), instance.clone());
            std::thread::spawn(move || listen(&instance, &query, &tell));
        }
        Self(told)
    }
}

/// Hands over what an agent says. Who follows does not care which agent it is: after one that ended comes another,
/// which has what its predecessor did not read.
fn listen(instance: &Instance, query: &Query, tell: &SyncSender<Heard>) {
    let mut query = query.clone();
    let (mut known, mut newest, mut reported) = (false, None, false);
    let error = loop {
        let asked = socket::ask(&instance.run_dir(), &query, |answer| {
            (known, reported) = (true, false);
            if let Answer::Flow(flow) = &answer {
                newest = Some(flow.time.clone());
            }
            tell.send(Heard::Line(answer)).is_ok()
        });
        match asked {
            Ok(()) => break None,
            Err(AskError::NoAgent(..) | AskError::Ended(..)) if query.follow && known => {
                if !reported {
                    output::error(&format!(
                        "podway: the agent of {instance} has ended; waiting for the next one"
                    ));
                    reported = true;
                }
                std::thread::sleep(AGAIN);
                let after = newest.as_deref().and_then(|time| time.parse::<jiff::Timestamp>().ok());
                let after = after.and_then(|time| i64::try_from(time.as_nanosecond()).ok());
                query.since = Some(after.map_or_else(|| unix_ns(SystemTime::now()), |time| time + 1));
                query.last = None;
            }
            Err(error) => {
                break Some(anyhow::Error::new(error).context(format!(
                    "flows of instance {instance} (another one: --instance, or --lab and --node)"
                )));
            }
        }
    };
    // Nobody listens any more when the process ends.
    let _ = tell.send(Heard::End(error));
}

/// A line with its time, to be put in order.
#[derive(PartialEq)]
struct Timed(String, Answer);

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

fn timed(answer: Answer) -> Option<Timed> {
    let time = match &answer {
        Answer::Flow(flow) => flow.time.clone(),
        Answer::Lost(loss) => loss.time.clone(),
        Answer::Error(_) | Answer::Done(_) => return None,
    };
    Some(Timed(time, answer))
}

/// Shows the past of all, in order, then what happens. Ends with a failure when an agent did not tell all.
fn show(asked: &Asked, agents: usize, query: &Query, shown: &mut Shown) -> anyhow::Result<u8> {
    let (mut past, mut live, mut summaries, mut failed) = (Vec::new(), BinaryHeap::new(), Vec::new(), 0);
    let mut ended = 0;
    // The past is complete when each has said so, or has failed.
    let mut pasts = 0;
    while pasts < agents {
        let Ok(heard) = asked.0.recv() else { break };
        match heard {
            Heard::Line(Answer::Done(summary)) => {
                pasts += 1;
                summaries.push(summary);
            }
            Heard::Line(answer) => past.extend(timed(answer)),
            Heard::End(error) => {
                ended += 1;
                if let Some(error) = error {
                    failed += 1;
                    pasts += 1;
                    output::error(&format!("podway: {}", output::told(&error)));
                }
            }
        }
    }
    past.sort();
    let flows = past.iter().filter(|t| matches!(t.1, Answer::Flow(_))).count();
    let mut surplus = query.last.filter(|_| !query.follow).map_or(0, |last| flows.saturating_sub(last));
    let mut lines = Vec::new();
    for Timed(_, answer) in past {
        if surplus > 0 && matches!(answer, Answer::Flow(_)) {
            surplus -= 1;
            continue;
        }
        lines.push(answer);
    }
    if shown.lines(&lines).is_err() {
        return Ok(OK);
    }
    for summary in &summaries {
        tell_loss(summary);
    }
    while query.follow && ended < agents {
        match asked.0.recv_timeout(REORDER / 4) {
            Ok(Heard::Line(answer)) => live.extend(timed(answer).map(Reverse)),
            Ok(Heard::End(error)) => {
                ended += 1;
                failed += 1;
                let error = error.map_or_else(|| "an agent has ended".to_owned(), |e| output::told(&e));
                output::error(&format!("podway: {error}"));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let hold = if agents > 1 { REORDER } else { Duration::ZERO };
        let due =
            flow::rfc3339(unix_ns(SystemTime::now().checked_sub(hold).unwrap_or(SystemTime::UNIX_EPOCH)));
        let mut lines = Vec::new();
        while live.peek().is_some_and(|Reverse(t)| agents == 1 || t.0 <= due || live.len() > WAITING) {
            lines.extend(live.pop().map(|Reverse(Timed(_, answer))| answer));
        }
        if !lines.is_empty() && shown.lines(&lines).is_err() {
            return Ok(OK);
        }
    }
    Ok(if failed > 0 { FAILED } else { OK })
}

fn tell_loss(summary: &Summary) {
    if summary.lost > 0 {
        output::error(&format!(
            "{}: {} of {} events were lost since the datapath was set up, because the agent read too slowly or not at all",
            summary.node,
            summary.lost,
            summary.lost + summary.told
        ));
    }
}

/// How lines look, and what has been printed.
struct Shown {
    format: Format,
    header: bool,
    follow: bool,
}

impl Shown {
    /// Prints; an error says that nobody reads any more.
    fn lines(&mut self, answers: &[Answer]) -> io::Result<()> {
        let mut text = String::new();
        let mut rows = Vec::new();
        for answer in answers {
            match (self.format, answer) {
                (Format::Json, answer) => {
                    text.push_str(&serde_json::to_string(answer).map_err(io::Error::other)?);
                    text.push('\n');
                }
                (_, Answer::Lost(loss)) => output::error(&render::loss(loss)),
                (Format::Compact, Answer::Flow(flow)) => {
                    text.push_str(&render::compact(flow));
                    text.push('\n');
                }
                (Format::Table, Answer::Flow(flow)) => rows.push(render::row(flow)),
                (_, Answer::Error(_) | Answer::Done(_)) => {}
            }
        }
        if self.format == Format::Table && (!rows.is_empty() || !self.header) {
            if !self.header {
                rows.insert(0, render::HEADER.map(str::to_owned).to_vec());
                self.header = true;
            }
            if self.follow {
                // What comes later is not known: columns have a width of their own.
                for row in &mut rows {
                    for (cell, width) in row.iter_mut().zip(LIVE_WIDTHS) {
                        *cell = format!("{cell:width$}");
                    }
                }
            }
            text.push_str(&output::table(&rows));
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_ago_or_absolute() {
        let now = unix_ns(SystemTime::now());
        let ago = |text: &str| (now - since(text).unwrap()) / 1_000_000_000;
        for (text, seconds) in [("30s", 30), ("5m", 300), ("2h", 7200)] {
            assert!((seconds - 1..=seconds + 1).contains(&ago(text)), "{text}");
        }
        assert_eq!(since("2026-11-23T10:00:00Z"), Ok(1_795_428_000_000_000_000));
        for bad in ["", "5", "m", "-5m", "5d", "yesterday", "99999999999999999999h", "é"] {
            assert!(since(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lines_are_put_in_the_order_of_their_times() {
        let lost = |time: &str| {
            timed(Answer::Lost(podway_flows::Loss {
                time: time.into(),
                node: "n".into(),
                events: 1,
                cause: flow::LossCause::RingBufferFull,
            }))
        };
        let mut heap: BinaryHeap<Reverse<Timed>> = ["2026-01-01T00:00:02Z", "2026-01-01T00:00:01Z"]
            .into_iter()
            .filter_map(lost)
            .map(Reverse)
            .collect();
        assert_eq!(heap.pop().unwrap().0.0, "2026-01-01T00:00:01Z");
        assert!(timed(Answer::Error("x".into())).is_none());
    }
}
