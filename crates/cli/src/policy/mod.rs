//! `podway policy`: what network policies come to, worked out from objects alone.

mod cluster;
mod learn;
mod picture;
mod source;
mod verify;

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use podway_model::Protocol;
use podway_policy::{Explanation, Piece, Reachability, Side, explain};
use serde_json::{Value, json};

use crate::args::{Format, OutputFormat};
use crate::output::{self, table};
use crate::{FAILED, OK, USAGE};
use cluster::{Addresses, Cluster, Group, Rows};
pub(crate) use learn::Learn;
use picture::Extent;
use source::Live;
pub(crate) use verify::Verify;

/// Pairs that the text output lists; JSON has all.
const ROWS: usize = 200;
/// Workloads that a picture shows.
const PICTURE: usize = 200;

#[derive(Debug, Subcommand)]
pub(crate) enum Policy {
    /// Work out who can talk to whom, and by which rules
    ///
    /// From manifests alone, where workloads stand for their pods, or from the objects of a running lab or cluster.
    /// Exits with 1 when an object is refused.
    Check(Check),
    /// Say whether a connection is allowed, by which rules at both ends, and what came closest to allowing it
    ///
    /// Exits with 0 when it is allowed, with 1 when it is denied, with 2 on errors.
    Explain(Explain),
    /// Show what changed manifests would open and close
    ///
    /// Compares two manifests, or what is in a running lab or cluster with what it would be with the manifest's policies
    /// and namespaces in place of its own. Exits with 0 when nothing would change, with 1 when something would, with 2 on errors.
    Diff(Diff),
    /// Send real probes between a lab's pods, and hold what arrives against what policies say
    ///
    /// For each pair of pods something that is allowed and something that is not. Exits with 0 when nothing contradicts,
    /// with 1 when something does, with 2 on errors.
    Verify(Verify),
    /// Propose policies that allow what was seen and nothing else
    ///
    /// Prints NetworkPolicies as YAML; on standard error, what was seen and would be denied all the same, and what they
    /// allow beyond what was seen. Look at flows long enough to have seen all that has to work.
    Learn(Learn),
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Manifest files and folders
    #[arg(value_name = "FILE|DIR", required_unless_present_any = ["lab", "kubeconfig", "context"],
        conflicts_with_all = ["lab", "kubeconfig", "context"])]
    manifests: Vec<PathBuf>,
    #[command(flatten)]
    live: Live,
    /// List pairs, too, between which everything is allowed
    #[arg(long)]
    all: bool,
    /// Write the matrix as a picture (SVG)
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// Workload or pod (namespace/name), or an address
    source: String,
    /// Workload or pod (namespace/name), or an address
    target: String,
    /// Port with protocol: 80, 53/UDP, 5000/SCTP; or icmp
    #[arg(value_parser = parse_port)]
    port: Port,
    /// Manifest files and folders
    #[arg(short, long = "filename", num_args = 1.., value_name = "FILE|DIR",
        required_unless_present_any = ["lab", "kubeconfig", "context"],
        conflicts_with_all = ["lab", "kubeconfig", "context"])]
    filenames: Vec<PathBuf>,
    #[command(flatten)]
    live: Live,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// Manifest file or folder as it is, then as it would be; with --lab or --kubeconfig only the latter
    #[arg(required = true, num_args = 1..=2, value_name = "FILE|DIR")]
    manifests: Vec<PathBuf>,
    #[command(flatten)]
    live: Live,
    #[command(flatten)]
    format: Format,
}

/// IP protocol number, and port.
#[derive(Debug, Clone, Copy)]
struct Port(u8, u16);

fn parse_port(text: &str) -> Result<Port, String> {
    if text.eq_ignore_ascii_case("icmp") {
        return Ok(Port(1, 0));
    }
    let (port, protocol) = text.split_once('/').unwrap_or((text, "TCP"));
    let protocol = Protocol::from_name(&protocol.to_uppercase())
        .ok_or_else(|| format!("{protocol:?} is none of TCP, UDP, SCTP"))?;
    match port.parse() {
        Ok(port @ 1..) => Ok(Port(protocol.number(), port)),
        _ => Err(format!("{port:?} is not a port (1 to 65535)")),
    }
}

pub(crate) fn run(command: Policy) -> anyhow::Result<u8> {
    // Denied and different are answers, with a code of their own; so errors have another.
    let or_error = |result: anyhow::Result<u8>| {
        result.or_else(|error| {
            output::error(&format!("podway: {error:#}"));
            Ok(USAGE)
        })
    };
    match command {
        Policy::Check(args) => check(&args),
        Policy::Explain(args) => or_error(explain_one(&args)),
        Policy::Diff(args) => or_error(diff(&args)),
        Policy::Verify(args) => or_error(verify::run(&args)),
        Policy::Learn(args) => or_error(learn::run(&args)),
    }
}

fn tell(cluster: &Cluster) {
    cluster.problems.iter().for_each(|p| output::error(&format!("refused: {p}")));
    cluster.notes.iter().for_each(|n| output::error(&format!("note: {n}")));
}

/// A protocol, and ranges of its ports.
type Part = (Option<Protocol>, Vec<(u16, u16)>);

/// What is allowed, in words: `everything`, `nothing`, or protocols with ports.
fn allowed(pieces: &[Piece]) -> (Extent, String) {
    if pieces.iter().all(Piece::allow) {
        return (Extent::Everything, "everything".to_owned());
    }
    let mut parts: Vec<Part> = Vec::new();
    for piece in pieces.iter().filter(|p| p.allow()) {
        match parts.last_mut() {
            Some((protocol, ranges)) if *protocol == piece.protocol => match ranges.last_mut() {
                Some((_, last)) if *last + 1 == piece.first => *last = piece.last,
                _ => ranges.push((piece.first, piece.last)),
            },
            _ => parts.push((piece.protocol, vec![(piece.first, piece.last)])),
        }
    }
    if parts.is_empty() {
        return (Extent::Nothing, "nothing".to_owned());
    }
    let range = |(first, last): &(u16, u16)| match (first, last) {
        (0, &u16::MAX) => "any".to_owned(),
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    };
    let part = |(protocol, ranges): &Part| match protocol {
        None => "other protocols".to_owned(),
        Some(protocol) => format!("{protocol} {}", ranges.iter().map(range).collect::<Vec<_>>().join(",")),
    };
    (Extent::Something, parts.iter().map(part).collect::<Vec<_>>().join("; "))
}

/// What there is to judge.
fn cluster_of(manifests: &[PathBuf], live: &Live) -> anyhow::Result<Cluster> {
    let objects = if live.is_given() { source::live(live)? } else { source::manifests(manifests)? };
    Ok(cluster::read(objects, &mut Addresses::default(), Rows::Workloads))
}

/// The reason for a pair: of the ports that are allowed, else of a port that the target serves.
fn reason(cluster: &Cluster, target: &Group, pair: (IpAddr, IpAddr), pieces: &[Piece]) -> Explanation {
    let open = pieces.iter().find(|p| p.allow());
    let (protocol, port) = match open {
        Some(piece) => (piece.protocol.map_or(1, Protocol::number), piece.first),
        None => target.served.first().map_or((6, 80), |(protocol, port)| (protocol.number(), *port)),
    };
    explain(&cluster.compiler, pair.0, pair.1, protocol, port)
}

fn side_json(side: &Side) -> Value {
    let names = |list: &[podway_policy::PolicyRef]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    json!({
        "allowed": side.verdict.allow,
        "audit": side.verdict.audit,
        "rule": side.rule.as_ref().map(|rule| json!({
            "policy": rule.policy.to_string(), "kind": rule.policy.kind, "namespace": &*rule.policy.namespace,
            "name": &*rule.policy.name, "direction": rule.direction.field(), "index": rule.index,
            "field": format!("spec.{}[{}]", rule.direction, rule.index), "ruleName": rule.name})),
        "isolating": names(&side.isolating),
        "selecting": names(&side.selecting),
        "reason": side.to_string(),
        "nearest": side.nearest.as_ref().map(ToString::to_string),
    })
}

/// Source, target, the addresses by which they are judged, and what holds between them.
type Pair<'a> = (&'a Group, &'a Group, (IpAddr, IpAddr), std::sync::Arc<[Piece]>);

fn check(args: &Check) -> anyhow::Result<u8> {
    let cluster = cluster_of(&args.manifests, &args.live)?;
    tell(&cluster);
    let mut reach = Reachability::new(&cluster.compiler);
    let (mut pairs, mut counts): (Vec<Pair<'_>>, _) = (Vec::new(), [0_usize; 3]);
    for source in &cluster.groups {
        for target in &cluster.groups {
            let Some(addresses) = source.to(target) else { continue };
            let pieces = reach.between(addresses.0, addresses.1);
            let extent = extent(&pieces);
            counts[extent as usize] += 1;
            if args.all || extent != Extent::Everything {
                pairs.push((source, target, addresses, pieces));
            }
        }
    }
    if let Some(path) = &args.save {
        save(path, &cluster, &mut reach)?;
    }
    match args.format.output {
        OutputFormat::Json => {
            let pair = |(source, target, addresses, pieces): &Pair<'_>| {
                let why = reason(&cluster, target, *addresses, pieces);
                json!({"source": source.name, "target": target.name, "allowed": allowed(pieces).1,
                    "egress": side_json(&why.egress), "ingress": side_json(&why.ingress)})
            };
            let rest = json!({"everything": counts[0], "something": counts[1], "nothing": counts[2],
                "refused": cluster.problems, "notes": cluster.notes});
            output::json_with_list("pairs", pairs.iter().map(pair), &rest)?;
        }
        OutputFormat::Text => {
            let mut rows = vec![["SOURCE", "TARGET", "ALLOWED", "BY"].map(str::to_owned).to_vec()];
            for (source, target, addresses, pieces) in pairs.iter().take(ROWS) {
                let why = reason(&cluster, target, *addresses, pieces);
                rows.push(vec![source.name.clone(), target.name.clone(), allowed(pieces).1, by(&why)]);
            }
            if rows.len() > 1 {
                output::print(&table(&rows));
            }
            let more = pairs.len().saturating_sub(ROWS);
            let more = if more > 0 { format!(" ({more} more pairs are in -o json)") } else { String::new() };
            output::print(&format!(
                "{} workloads and pods, {} policies: of {} pairs, {} may do everything, {} something, {} nothing{more}\n",
                cluster.groups.len(),
                cluster.compiler.size().policies,
                counts.iter().sum::<usize>(),
                counts[0],
                counts[1],
                counts[2]
            ));
        }
    }
    Ok(if cluster.problems.is_empty() { OK } else { FAILED })
}

fn extent(pieces: &[Piece]) -> Extent {
    let open = pieces.iter().filter(|p| p.allow()).count();
    if open == pieces.len() {
        Extent::Everything
    } else if open > 0 {
        Extent::Something
    } else {
        Extent::Nothing
    }
}

/// Who decided, in few words.
fn by(why: &Explanation) -> String {
    let short = |side: &Side| {
        if side.exempt.is_some() || side.selecting.is_empty() || why.allow != side.verdict.allow {
            return None;
        }
        Some(match &side.rule {
            Some(rule) => rule.to_string(),
            None if side.verdict.allow => return None,
            None => {
                let names: Vec<String> = side.isolating.iter().map(ToString::to_string).collect();
                format!("{} default of {}", side.direction, names.join(", "))
            }
        })
    };
    [&why.egress, &why.ingress].into_iter().filter_map(short).collect::<Vec<_>>().join("; ")
}

fn save(path: &PathBuf, cluster: &Cluster, reach: &mut Reachability<'_>) -> anyhow::Result<()> {
    let groups = &cluster.groups;
    if groups.len() > PICTURE {
        bail!("--save: {} workloads are too many for a picture, which shows {PICTURE}", groups.len());
    }
    let names: Vec<&str> = groups.iter().map(|g| g.name.as_str()).collect();
    let svg = picture::draw(&names, |row, column| {
        let (source, target) = groups[row].to(&groups[column])?;
        Some(allowed(&reach.between(source, target)))
    });
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn explain_one(args: &Explain) -> anyhow::Result<u8> {
    let cluster = cluster_of(&args.filenames, &args.live)?;
    tell(&cluster);
    let (source, target) = ends(&cluster, &args.source, &args.target)?;
    let Port(protocol, port) = args.port;
    let why = explain(&cluster.compiler, source, target, protocol, port);
    match args.format.output {
        OutputFormat::Json => output::json(&json!({
            "source": why.source.to_string(), "target": why.target.to_string(), "protocol": protocol, "port": port,
            "allowed": why.allow, "egress": side_json(&why.egress), "ingress": side_json(&why.ingress),
        }))?,
        OutputFormat::Text => {
            let mut out = format!("{}\n", if why.allow { "ALLOWED" } else { "DENIED" });
            for (side, who) in [(&why.egress, &why.source), (&why.ingress, &why.target)] {
                let _ = writeln!(out, "{} of {who}: {side}", side.direction);
                if let Some(nearest) = &side.nearest {
                    let _ = writeln!(out, "    {nearest}");
                }
            }
            output::print(&out);
        }
    }
    Ok(if why.allow { OK } else { FAILED })
}

/// The addresses of a question, of one family.
fn ends(cluster: &Cluster, source: &str, target: &str) -> anyhow::Result<(IpAddr, IpAddr)> {
    let (sources, targets) = (find(cluster, source)?, find(cluster, target)?);
    // Another pod of the workload, when it is asked about itself.
    let is_itself = source == target && source.parse::<IpAddr>().is_err();
    let pairs = sources.iter().flat_map(|s| targets.iter().map(move |t| (*s, *t)));
    let mut fitting: Vec<(IpAddr, IpAddr)> = pairs.filter(|(s, t)| s.is_ipv4() == t.is_ipv4()).collect();
    fitting.sort_by_key(|(s, t)| is_itself && s == t);
    fitting
        .first()
        .copied()
        .with_context(|| format!("{source} and {target} have no family of addresses in common"))
}

fn full_name(text: &str) -> String {
    if text.contains('/') { text.to_owned() } else { format!("default/{text}") }
}

/// The addresses of a workload's first two pods, of a pod, or an address.
fn find(cluster: &Cluster, text: &str) -> anyhow::Result<Vec<IpAddr>> {
    if let Ok(addr) = text.parse() {
        return Ok(vec![addr]);
    }
    let full = full_name(text);
    if let Some(group) = cluster.groups.iter().find(|group| group.name == full) {
        return Ok(group.addresses.iter().chain(group.other.iter().flatten()).copied().collect());
    }
    let own = [full.clone()];
    let pods = cluster.workloads.get(&full).map_or(&own[..], Vec::as_slice).iter().take(2);
    let pods = pods.filter_map(|pod| pod.split_once('/'));
    let found: Vec<IpAddr> = pods
        .filter_map(|(namespace, name)| cluster.compiler.pod(namespace, name))
        .flat_map(|pod| pod.addresses.iter().copied())
        .collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let of_name = |group: &&Group| group.name.starts_with(&format!("{full} ("));
    let mut names: Vec<&str> = cluster.groups.iter().filter(of_name).map(|g| g.name.as_str()).collect();
    if names.is_empty() {
        names = cluster.groups.iter().take(10).map(|g| g.name.as_str()).collect();
    }
    bail!("there is no workload or pod {full}; there are {}, …", names.join(", "))
}

fn diff(args: &Diff) -> anyhow::Result<u8> {
    let mut addresses = Addresses::default();
    let (old, new) = match (&args.manifests[..], args.live.is_given()) {
        ([old, new], false) => {
            (source::manifests(std::slice::from_ref(old))?, source::manifests(std::slice::from_ref(new))?)
        }
        ([new], true) => {
            let old = source::live(&args.live)?;
            let new = old.with(source::manifests(std::slice::from_ref(new))?);
            (old, new)
        }
        ([_], false) => {
            bail!("one manifest alone has no difference; name two, or --lab or --kubeconfig for the old")
        }
        _ => bail!("with --lab, --kubeconfig or --context name one manifest: what would be changed"),
    };
    let read = |objects, addresses: &mut Addresses| cluster::read(objects, addresses, Rows::Workloads);
    let (old, new) = (read(old, &mut addresses), read(new, &mut addresses));
    tell(&old);
    tell(&new);
    let (mut reach_old, mut reach_new) = (Reachability::new(&old.compiler), Reachability::new(&new.compiler));
    let mut rows = Vec::new();
    let by_name: HashMap<&str, &Group> =
        old.groups.iter().map(|group| (group.name.as_str(), group)).collect();
    let both = |group: &'_ &Group| by_name.contains_key(group.name.as_str());
    for source in new.groups.iter().filter(both) {
        let old_source = by_name[source.name.as_str()];
        for target in new.groups.iter().filter(both) {
            let old_target = by_name[target.name.as_str()];
            let (Some(before), Some(after)) = (old_source.to(old_target), source.to(target)) else {
                continue;
            };
            let was = reach_old.between(before.0, before.1);
            let is = reach_new.between(after.0, after.1);
            if covers(&is, &was) && covers(&was, &is) {
                continue;
            }
            let (was_text, is_text) = (allowed(&was).1, allowed(&is).1);
            let kind = match (covers(&is, &was), covers(&was, &is)) {
                (true, _) => "opens",
                (_, true) => "closes",
                _ => "changes",
            };
            rows.push((
                kind,
                &source.name,
                &target.name,
                was_text,
                is_text,
                by(&reason(&new, target, after, &is)),
            ));
        }
    }
    let names = |cluster: &Cluster| cluster.groups.iter().map(|g| g.name.clone()).collect::<BTreeSet<_>>();
    let (old_names, new_names) = (names(&old), names(&new));
    let added: Vec<&String> = new_names.difference(&old_names).collect();
    let removed: Vec<&String> = old_names.difference(&new_names).collect();
    match args.format.output {
        OutputFormat::Json => {
            let refused = [old.problems, new.problems].concat();
            let row = |(kind, source, target, was, is, by): &(
                &str,
                &String,
                &String,
                String,
                String,
                String,
            )| {
                json!({"change": kind, "source": source, "target": target, "was": was, "is": is, "by": by})
            };
            output::json(&json!({"changes": rows.iter().map(row).collect::<Vec<_>>(), "added": added,
                "removed": removed, "refused": refused}))?;
        }
        OutputFormat::Text => {
            let mut lines =
                vec![["CHANGE", "SOURCE", "TARGET", "WAS", "IS", "BY"].map(str::to_owned).to_vec()];
            for (kind, source, target, was, is, by) in rows.iter().take(ROWS) {
                lines.push(vec![
                    (*kind).to_owned(),
                    (*source).clone(),
                    (*target).clone(),
                    was.clone(),
                    is.clone(),
                    by.clone(),
                ]);
            }
            if rows.is_empty() {
                output::print("nothing opens and nothing closes between workloads that are in both\n");
            } else {
                output::print(&table(&lines));
            }
            if rows.len() > ROWS {
                output::print(&format!("and {} more pairs; -o json lists all\n", rows.len() - ROWS));
            }
            for (text, names) in
                [("only in the new manifests", &added), ("only in the old manifests", &removed)]
            {
                for name in names {
                    output::print(&format!("{text}: {name}\n"));
                }
            }
        }
    }
    let same = rows.is_empty() && added.is_empty() && removed.is_empty();
    Ok(if same { OK } else { FAILED })
}

/// Whether everything that `small` allows is allowed by `large`, too.
fn covers(large: &[Piece], small: &[Piece]) -> bool {
    small.iter().filter(|p| p.allow()).all(|piece| {
        large
            .iter()
            .filter(|p| p.protocol == piece.protocol && !p.allow())
            .all(|closed| closed.last < piece.first || piece.last < closed.first)
    })
}
