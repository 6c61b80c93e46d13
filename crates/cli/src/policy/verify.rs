//! `podway policy verify`: what policies say, held against packets that are really sent.

use std::net::IpAddr;

use anyhow::{Context as _, bail};
use clap::Args;
use podway_lab::check::{Heard, Question, Way, ask};
use podway_lab::spec::LabName;
use podway_model::Protocol;
use podway_policy::{Piece, Reachability, explain};
use serde_json::json;

use super::cluster::{self, Addresses, Cluster, Group, Rows};
use super::source::{self, Live};
use super::{Port, ROWS, by, full_name, parse_port, tell};
use crate::args::{Format, OutputFormat};
use crate::output::{self, table};
use crate::{FAILED, OK};

/// Pause before what contradicts is asked again: an agent may be at programming what has just changed.
const PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The lab in whose pods the probes are sent
    #[arg(long, value_name = "NAME", required = true)]
    lab: LabName,
    /// Only from this pod (namespace/name)
    #[arg(long, value_name = "POD")]
    from: Option<String>,
    /// Only to this pod (namespace/name)
    #[arg(long, value_name = "POD")]
    to: Option<String>,
    /// Only this port: 80, 53/UDP or icmp; else for each pair one that is allowed and one that is not, of TCP and UDP,
    /// and an echo
    #[arg(long, value_parser = parse_port)]
    port: Option<Port>,
    /// Most probes; of more, a sample of as many allowed ones as denied ones is sent
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    limit: u32,
    #[command(flatten)]
    format: Format,
}

/// One probe, with what policies say about it.
struct Probe<'a> {
    source: &'a Group,
    target: &'a Group,
    from: IpAddr,
    to: IpAddr,
    way: Way,
    allowed: bool,
}

impl Probe<'_> {
    fn protocol_and_port(&self) -> (u8, u16) {
        match self.way {
            Way::Tcp(port) => (Protocol::Tcp.number(), port),
            Way::Udp(port) => (Protocol::Udp.number(), port),
            Way::Icmp if self.to.is_ipv4() => (1, 0),
            Way::Icmp => (58, 0),
        }
    }

    fn port(&self) -> String {
        let family = if self.to.is_ipv4() { "" } else { " (IPv6)" };
        match self.way {
            Way::Tcp(port) => format!("TCP {port}{family}"),
            Way::Udp(port) => format!("UDP {port}{family}"),
            Way::Icmp => format!("echo{family}"),
        }
    }

    fn why(&self, cluster: &Cluster) -> String {
        let (protocol, port) = self.protocol_and_port();
        let why = by(&explain(&cluster.compiler, self.from, self.to, protocol, port));
        if why.is_empty() { "no policy".to_owned() } else { why }
    }

    fn agrees(&self, heard: &Heard) -> bool {
        match heard {
            Heard::Arrived => self.allowed,
            Heard::Silence => !self.allowed,
            Heard::Failed { .. } => false,
        }
    }
}

pub(super) fn run(args: &Verify) -> anyhow::Result<u8> {
    let live = Live { lab: Some(args.lab.clone()), kubeconfig: None, context: None };
    let cluster = cluster::read(source::live(&live)?, &mut Addresses::default(), Rows::Pods);
    tell(&cluster);
    let ends = |only: Option<&String>| {
        let name = only.map(|text| full_name(text));
        let groups: Vec<&Group> =
            cluster.groups.iter().filter(|g| name.as_ref().is_none_or(|n| *n == g.name)).collect();
        match (&groups[..], &name) {
            ([], Some(name)) => bail!("there is no pod {name} with an address in lab {}", args.lab),
            _ => Ok(groups),
        }
    };
    let probes = sampled(
        probes(&cluster, &ends(args.from.as_ref())?, &ends(args.to.as_ref())?, args.port),
        args.limit,
    );
    if probes.is_empty() {
        bail!("there is no pair of pods to probe in lab {}", args.lab);
    }
    let questions: Vec<Question> = probes
        .iter()
        .map(|probe| {
            let (namespace, name) = probe.source.name.split_once('/').unwrap_or_default();
            Question { netns: args.lab.pod_netns(namespace, name), target: probe.to, way: probe.way }
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut heard = runtime.block_on(ask(&questions)).context("probe")?;
    let doubtful: Vec<usize> = (0..probes.len()).filter(|i| !probes[*i].agrees(&heard[*i])).collect();
    if !doubtful.is_empty() {
        std::thread::sleep(PAUSE);
        let again: Vec<Question> = doubtful.iter().map(|i| questions[*i].clone()).collect();
        for (i, answer) in doubtful.into_iter().zip(runtime.block_on(ask(&again)).context("probe again")?) {
            heard[i] = answer;
        }
    }
    report(args, &cluster, &probes, &heard)
}

/// Questions for every pair: one that is allowed and one that is not, of each protocol.
fn probes<'a>(
    cluster: &Cluster,
    sources: &[&'a Group],
    targets: &[&'a Group],
    only: Option<Port>,
) -> Vec<Probe<'a>> {
    let mut reach = Reachability::new(&cluster.compiler);
    let is_pod = |group: &Group| {
        group.addresses.iter().all(|addr| {
            // Pods on their node's network are the node; what it sends to its own pods no policy judges.
            cluster.compiler.pod_at(*addr).is_some()
        })
    };
    let mut probes = Vec::new();
    for source in sources.iter().copied().filter(|g| is_pod(g)) {
        for target in targets.iter().copied().filter(|g| is_pod(g) && g.name != source.name) {
            for (from, to) in
                source.addresses.iter().flat_map(|s| target.addresses.iter().map(move |t| (*s, *t)))
            {
                if from.is_ipv4() != to.is_ipv4() {
                    continue;
                }
                let pieces = reach.between(from, to);
                for (way, allowed) in ways(&pieces, &target.served, only) {
                    probes.push(Probe { source, target, from, to, way, allowed });
                }
            }
        }
    }
    probes
}

fn ways(pieces: &[Piece], served: &[(Protocol, u16)], only: Option<Port>) -> Vec<(Way, bool)> {
    let of = |protocol: Option<Protocol>| pieces.iter().filter(move |p| p.protocol == protocol);
    let mut ways = Vec::new();
    if let Some(Port(number, port)) = only {
        let protocol = [Protocol::Tcp, Protocol::Udp].into_iter().find(|p| p.number() == number);
        let piece = of(protocol).find(|p| protocol.is_none() || (p.first..=p.last).contains(&port));
        let way = match protocol {
            Some(Protocol::Tcp) => Way::Tcp(port),
            Some(_) => Way::Udp(port),
            None => Way::Icmp,
        };
        ways.extend(piece.map(|piece| (way, piece.allow())));
        return ways;
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for allowed in [true, false] {
            let mut fitting = of(Some(protocol)).filter(|p| p.allow() == allowed && p.last > 0).peekable();
            let Some(first) = fitting.peek().map(|p| p.first.max(1)) else { continue };
            let inside = |port: &u16| {
                of(Some(protocol)).any(|p| p.allow() == allowed && (p.first..=p.last).contains(port))
            };
            // One that the target serves, if there is one.
            let port = served.iter().filter(|(p, _)| *p == protocol).map(|(_, port)| *port).find(inside);
            let port = port.unwrap_or(first);
            ways.push((if protocol == Protocol::Tcp { Way::Tcp(port) } else { Way::Udp(port) }, allowed));
        }
    }
    ways.extend(of(None).map(|piece| (Way::Icmp, piece.allow())));
    ways
}

/// At most so many, of both kinds, spread over all.
fn sampled(probes: Vec<Probe<'_>>, limit: u32) -> Vec<Probe<'_>> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    if probes.len() <= limit {
        return probes;
    }
    let (allowed, denied): (Vec<_>, Vec<_>) = probes.into_iter().partition(|p| p.allowed);
    let of_denied = denied.len().min((limit / 2).max(limit.saturating_sub(allowed.len())));
    let mut out = Vec::new();
    for (list, most) in [(allowed, limit - of_denied), (denied, of_denied)] {
        let (count, most) = (list.len(), most.min(list.len()));
        let is_chosen = |i: usize| (i + 1) * most / count > i * most / count;
        out.extend(list.into_iter().enumerate().filter(|(i, _)| is_chosen(*i)).map(|(_, probe)| probe));
    }
    out
}

fn report(args: &Verify, cluster: &Cluster, probes: &[Probe<'_>], heard: &[Heard]) -> anyhow::Result<u8> {
    let all = || probes.iter().zip(heard);
    let wrong: Vec<(&Probe<'_>, &Heard)> = all().filter(|(p, h)| !p.agrees(h)).collect();
    let count = |allowed: bool| probes.iter().filter(|p| p.allowed == allowed).count();
    let kept = |allowed: bool| all().filter(|(p, h)| p.allowed == allowed && p.agrees(h)).count();
    let (allowed, denied) = (count(true), count(false));
    let says = |allowed: bool| if allowed { "allowed" } else { "denied" };
    let outcome = |heard: &Heard| match heard {
        Heard::Arrived => "arrived".to_owned(),
        Heard::Silence => "no answer".to_owned(),
        Heard::Failed { cause } => cause.clone(),
    };
    match args.format.output {
        OutputFormat::Json => {
            let probe = |(p, h): (&Probe<'_>, &Heard)| {
                json!({"source": p.source.name, "target": p.target.name, "from": p.from, "to": p.to,
                    "probe": p.port(), "policy": says(p.allowed), "heard": h, "agrees": p.agrees(h),
                    "by": p.why(cluster)})
            };
            output::json(&json!({"probes": all().map(probe).collect::<Vec<_>>(), "allowed": allowed,
                "denied": denied, "allowedArrived": kept(true), "deniedBlocked": kept(false),
                "contradictions": wrong.len()}))?;
        }
        OutputFormat::Text => {
            let row = |(p, h): (&Probe<'_>, &Heard)| {
                vec![
                    p.source.name.clone(),
                    p.target.name.clone(),
                    p.port(),
                    says(p.allowed).into(),
                    outcome(h),
                    p.why(cluster),
                ]
            };
            let heading = ["SOURCE", "TARGET", "PROBE", "POLICY", "HEARD", "BY"].map(str::to_owned).to_vec();
            if wrong.is_empty() {
                let example = |allowed: bool| all().find(|(p, _)| p.allowed == allowed).map(row);
                let mut rows = vec![heading];
                rows.extend([true, false].into_iter().filter_map(example));
                output::print(&table(&rows));
            } else {
                let mut rows = vec![heading];
                rows.extend(wrong.iter().take(ROWS).map(|(p, h)| row((p, h))));
                output::print(&table(&rows));
                if wrong.len() > ROWS {
                    output::print(&format!(
                        "and {} more that contradict; -o json lists all\n",
                        wrong.len() - ROWS
                    ));
                }
            }
            let mut text = format!(
                "{} probes: of {allowed} allowed ones {} arrived, of {denied} denied ones {} were blocked; {} contradict\n",
                probes.len(),
                kept(true),
                kept(false),
                wrong.len()
            );
            if denied == 0 {
                text += "no policy denies anything here, so nothing shows whether policies are enforced\n";
            } else if kept(false) == 0 {
                text += "nothing is enforced: everything that policies deny arrived\n";
            }
            output::print(&text);
        }
    }
    Ok(if wrong.is_empty() { OK } else { FAILED })
}

#[cfg(test)]
mod tests {
    use podway_policy::Verdict;

    use super::*;

    fn piece(protocol: Option<Protocol>, first: u16, last: u16, allow: bool) -> Piece {
        let verdict = Verdict { allow, ..Verdict::default() };
        Piece { protocol, first, last, egress: verdict, ingress: Verdict { allow: true, ..verdict } }
    }

    #[test]
    fn each_pair_is_asked_for_one_of_each() {
        let tcp = Some(Protocol::Tcp);
        let pieces = [
            piece(tcp, 0, 79, false),
            piece(tcp, 80, 80, true),
            piece(tcp, 81, 65535, false),
            piece(Some(Protocol::Udp), 0, 65535, false),
            piece(None, 0, 0, false),
        ];
        let served = [(Protocol::Tcp, 9090), (Protocol::Udp, 53)];
        assert_eq!(
            ways(&pieces, &served, None),
            [(Way::Tcp(80), true), (Way::Tcp(9090), false), (Way::Udp(53), false), (Way::Icmp, false)]
        );
        assert_eq!(ways(&pieces, &[], None)[1], (Way::Tcp(1), false));
        assert_eq!(ways(&pieces, &served, Some(Port(6, 80))), [(Way::Tcp(80), true)]);
        assert_eq!(ways(&pieces, &served, Some(Port(1, 0))), [(Way::Icmp, false)]);
    }

    #[test]
    fn a_sample_has_both_kinds() {
        let group = Group { name: "a/b".into(), addresses: Vec::new(), other: None, served: Vec::new() };
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        for (allowed, denied, limit, expected) in [
            (100, 3, 10, (7, 3)),
            (3, 100, 10, (3, 7)),
            (100, 100, 10, (5, 5)),
            (4, 4, 10, (4, 4)),
            (50, 0, 10, (10, 0)),
        ] {
            let probe = |i: usize| Probe {
                source: &group,
                target: &group,
                from: address,
                to: address,
                way: Way::Icmp,
                allowed: i < allowed,
            };
            let sample = sampled((0..allowed + denied).map(probe).collect(), limit);
            let found = sample.iter().filter(|p| p.allowed).count();
            assert_eq!((found, sample.len() - found), expected, "{allowed} {denied}");
        }
    }
}
