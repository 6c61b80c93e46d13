//! `podway lab …`.

mod history;
mod nodes;
mod objects;
mod workloads;

use anyhow::{Context as _, bail};
use podway_lab::check;
use podway_lab::client::Client;
use podway_lab::down;
use podway_lab::exec;
use podway_lab::faults::{self, Fault};
use podway_lab::observe::{Observation, observe};
use podway_lab::paths::{self, PathStatus};
use podway_lab::spec::LabName;
use podway_lab::state::{self, StateDir};
use podway_lab::up::{self, Made, Waited};
use serde::Serialize;
use serde_json::json;

use crate::args::{
    Down, Exec, Format, Kubeconfig, Lab, Link, Node, NodeExec, OutputFormat, Outside, OutsideExec, Shell,
    Show, Up, Which,
};
use crate::output::{self, Progress, table};
use crate::{FAILED, OK};

pub(crate) fn run(command: Lab) -> anyhow::Result<u8> {
    match command {
        Lab::Up(args) => up(&args),
        Lab::Apply(args) => objects::apply(&args),
        Lab::Delete(args) => objects::delete(&args),
        Lab::Status(args) => status(&args),
        Lab::List(args) => list(&args),
        Lab::Events(args) => history::events(args),
        Lab::Logs(args) => history::logs(&args),
        Lab::Exec(args) => pod_exec(args),
        Lab::Shell(args) => shell(&args),
        Lab::Roll(args) => workloads::roll(&args),
        Lab::Ready(args) => workloads::ready(&args),
        Lab::Node(Node::Exec(args)) => node_exec(args),
        Lab::Node(Node::Add(args)) => nodes::add(&args),
        Lab::Node(Node::Remove(args)) => nodes::remove(&args),
        Lab::Node(Node::Stop(args)) => nodes::power(&args, false),
        Lab::Node(Node::Start(args)) => nodes::power(&args, true),
        Lab::Link(args) => link(args),
        Lab::Outside(Outside::Exec(args)) => outside_exec(args),
        Lab::Kubeconfig(args) => kubeconfig(&args),
        Lab::Check(args) => check(&args),
        Lab::Down(args) => down(&args),
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")
}

/// The lab that is meant: the one named, else the only one.
fn pick(which: &Which) -> anyhow::Result<LabName> {
    if let Some(name) = &which.name {
        return Ok(name.clone());
    }
    only(&state::list()?)
}

fn only(labs: &[LabName]) -> anyhow::Result<LabName> {
    match labs {
        [one] => Ok(one.clone()),
        [] => bail!("there is no lab on this machine; make one with: podway lab up FILE|DIR"),
        more => {
            let names: Vec<&str> = more.iter().map(LabName::as_str).collect();
            bail!("there are several labs ({}); say which", names.join(", "))
        }
    }
}

fn up(args: &Up) -> anyhow::Result<u8> {
    let spec = args.spec();
    spec.validate()?;
    let mut progress = Progress::new();
    let loaded = up::load(&args.manifests)?;
    for note in &loaded.notes {
        progress.say(&format!("note: {note}"));
    }
    let made = up::ensure(&spec, |text| progress.say(&text))?;
    progress.say(&match made {
        Made::New => format!("lab {}: {} nodes are wired", spec.name, spec.nodes),
        Made::Running => format!("lab {} runs already; its objects are updated", spec.name),
    });
    runtime()?.block_on(async {
        let mut client = Client::of_lab(&spec.name)?;
        let late = up::wait_nodes(&mut client, &spec).await?;
        for node in &late {
            progress.say(&format!("note: pods are placed without {}: {}", node.name, node.message));
        }
        let applied = up::fill(&mut client, &loaded).await?;
        for note in &applied.notes {
            progress.say(&format!("note: {note}"));
        }
        for problem in loaded.problems.iter().chain(&applied.problems) {
            progress.say(&format!("left out: {problem}"));
        }
        progress.say(&format!("{} objects created, {} updated", applied.created, applied.replaced));
        let whole = loaded.problems.is_empty() && applied.problems.is_empty();
        if args.no_wait {
            // A node that somebody has stopped is as it should be; one whose agent does not come up is not.
            let nodes = late.iter().all(|node| node.stopped);
            return Ok(if whole && nodes { OK } else { FAILED });
        }
        let waited = up::wait(&mut client, &spec, args.timeout, |seen| {
            progress.update(&summary(seen), || waiting_for(seen));
        })
        .await?;
        progress.end();
        let (seen, settled) = match &waited {
            Waited::Settled(seen) => (seen, true),
            Waited::Stuck(seen) | Waited::TimedOut(seen) => (seen, false),
        };
        let faults = faults::list(&spec.name)?;
        output::print(&describe(seen, &faults, &paths::notable(&spec.name, &seen.nodes, &faults)));
        if !settled {
            let why = match waited {
                Waited::TimedOut(_) => format!("not everything is ready after {} s", args.timeout.as_secs()),
                _ => "some of it cannot become ready".into(),
            };
            let lines = waiting_for(seen);
            if progress.has_shown(&lines) {
                progress.say(&format!("{why}, as listed above"));
            } else {
                progress.say(&format!("{why}:"));
                for line in lines {
                    progress.say(&format!("  {line}"));
                }
            }
        }
        output::print(&next_steps(&spec.name));
        Ok(if settled && whole { OK } else { FAILED })
    })
}

fn summary(seen: &Observation) -> String {
    let (ready, all) = seen.counts();
    let nodes = seen.nodes.iter().filter(|n| n.ready).count();
    let rest = if seen.unsettled.is_empty() {
        String::new()
    } else {
        format!(", {} workloads incomplete", seen.unsettled.len())
    };
    format!("nodes {nodes}/{} ready, pods {ready}/{all} ready{rest}", seen.nodes.len())
}

fn waiting_for(seen: &Observation) -> Vec<String> {
    let nodes = seen.nodes.iter().filter(|n| !n.ready).map(|n| format!("node {}: {}", n.name, n.message));
    let pods = seen
        .pods
        .iter()
        .filter(|p| !p.ready)
        .map(|p| format!("pod {}/{}: {}", p.namespace, p.name, p.reason));
    let workloads = seen.unsettled.iter().map(|u| format!("{}: {}", u.name, u.reason));
    nodes.chain(pods).chain(workloads).chain(seen.malformed.iter().cloned()).collect()
}

fn describe(seen: &Observation, faults: &[Fault], paths: &[PathStatus]) -> String {
    let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
    let mtu = |m: Option<u32>| m.map_or_else(|| "-".to_owned(), |m| m.to_string());
    let join = |list: &[std::net::IpAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let mut nodes =
        vec![row(&["NODE", "READY", "ZONE", "ADDRESS", "PODS", "POD CIDR", "UPLINK MTU", "POD MTU"])];
    for node in &seen.nodes {
        let own: Vec<_> = seen.pods.iter().filter(|p| p.node == node.name).collect();
        let mut mtus: Vec<u32> = own.iter().filter_map(|p| p.mtu).collect();
        mtus.sort_unstable();
        mtus.dedup();
        let pod_mtu = mtus.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        nodes.push(vec![
            node.name.clone(),
            match (node.stopped, node.ready) {
                (true, _) => "stopped",
                (false, true) => "yes",
                (false, false) => "no",
            }
            .into(),
            node.zone.clone(),
            join(&node.addresses),
            own.len().to_string(),
            node.pod_cidrs.join(" "),
            mtu(node.uplink_mtu),
            if pod_mtu.is_empty() { "-".into() } else { pod_mtu },
        ]);
    }
    let mut pods = vec![row(&["NAMESPACE", "POD", "READY", "STATUS", "RESTARTS", "ADDRESS", "NODE"])];
    for pod in &seen.pods {
        pods.push(vec![
            pod.namespace.clone(),
            pod.name.clone(),
            if pod.ready { "yes" } else { "no" }.into(),
            pod.phase.clone(),
            pod.restarts.to_string(),
            join(&pod.addresses),
            if pod.node.is_empty() { "-".into() } else { pod.node.clone() },
        ]);
    }
    let mut links = vec![row(&["LINK", "FAULT"])];
    links.extend(faults.iter().map(|f| vec![format!("{} {}", f.a, f.b), f.describe()]));
    let mut ways = vec![row(&["PATH", "AS ITS AGENT SEES IT"])];
    ways.extend(paths.iter().map(|p| vec![format!("{} -> {}", p.from, p.to), p.describe()]));
    // Nothing to tell is nothing to show.
    let rest =
        [links, ways].iter().filter(|t| t.len() > 1).map(|t| format!("\n{}", table(t))).collect::<String>();
    format!("\n{}\n{}{rest}", table(&nodes), table(&pods))
}

fn next_steps(lab: &LabName) -> String {
    let name = if lab.as_str() == "lab" { String::new() } else { format!(" --name {lab}") };
    let rows = [
        (format!("podway lab check{name}"), "reachability of everything by everything"),
        (format!("podway lab exec{name} NAMESPACE/POD -- COMMAND"), "a command inside a pod"),
        (
            format!("sudo kubectl --kubeconfig \"$(sudo podway lab kubeconfig{name} --path)\" get pods -A"),
            "the objects",
        ),
        (format!("podway lab down {lab}"), "remove it"),
    ];
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|(a, b)| vec![format!("  {a}"), b.to_owned()]).collect();
    format!("\nGo on with:\n{}", table(&rows))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status<'a> {
    name: &'a LabName,
    settled: bool,
    #[serde(flatten)]
    seen: &'a Observation,
    faults: &'a [Fault],
    paths: &'a [PathStatus],
}

fn status(args: &Show) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let seen = look(&lab)?;
    let settled = seen.is_settled();
    let faults = faults::list(&lab)?;
    let paths = paths::notable(&lab, &seen.nodes, &faults);
    match args.format.output {
        OutputFormat::Json => {
            output::json(&Status { name: &lab, settled, seen: &seen, faults: &faults, paths: &paths })?;
        }
        OutputFormat::Text => {
            let text = describe(&seen, &faults, &paths);
            output::print(&format!("lab {lab}: {}\n{text}", summary(&seen)));
            for line in waiting_for(&seen) {
                output::print(&format!("  {line}\n"));
            }
        }
    }
    Ok(if settled { OK } else { FAILED })
}

fn look(lab: &LabName) -> anyhow::Result<Observation> {
    runtime()?.block_on(async { observe(&mut Client::of_lab(lab)?, lab).await })
}

fn list(args: &Format) -> anyhow::Result<u8> {
    let mut rows = vec![["LAB", "STATE", "NODES", "MODE", "FAMILY"].map(str::to_owned).to_vec()];
    let mut labs = Vec::new();
    for name in state::list()? {
        let dir = StateDir::of(&name);
        let alive = dir.supervisor().ok().flatten().is_some_and(|s| s.is_alive());
        let state = if alive { "running" } else { "dead" };
        let spec = dir.lab().ok().flatten().map(|l| l.spec);
        let mut row = vec![name.to_string(), state.to_owned()];
        if let Some(spec) = &spec {
            let family = serde_json::to_value(spec.family)?;
            row.extend([
                spec.nodes.to_string(),
                spec.mode.as_str().to_owned(),
                family.as_str().unwrap_or_default().to_owned(),
            ]);
        }
        rows.push(row);
        labs.push(json!({"name": name, "state": state, "spec": spec}));
    }
    match args.output {
        OutputFormat::Json => output::json(&labs)?,
        OutputFormat::Text => output::print(&table(&rows)),
    }
    Ok(OK)
}

fn pod_exec(args: Exec) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let (namespace, pod) = pod_name(&args.pod);
    let program = runtime()?.block_on(async {
        let mut client = Client::of_lab(&lab)?;
        exec::in_pod(&mut client, &lab, namespace, pod, args.container.as_deref(), args.command).await
    })?;
    Err(program.exec())
}

/// A pod as people name it: without a namespace it is in `default`.
fn pod_name(text: &str) -> (&str, &str) {
    text.split_once('/').unwrap_or(("default", text))
}

fn shell(args: &Shell) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    if exec::is_node(&lab, &args.target) {
        return Err(exec::in_node(&lab, &args.target, exec::shell())?.exec());
    }
    let (namespace, pod) = pod_name(&args.target);
    let program = runtime()?.block_on(async {
        let mut client = Client::of_lab(&lab)?;
        exec::in_pod(&mut client, &lab, namespace, pod, args.container.as_deref(), exec::shell()).await
    })?;
    Err(program.exec())
}

fn node_exec(args: NodeExec) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    Err(exec::in_node(&lab, &args.node, args.command)?.exec())
}

fn link(args: Link) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let Ok([a, b]) = <[String; 2]>::try_from(args.nodes) else {
        bail!("a link has two ends; name two nodes")
    };
    let delay_micros = args.delay.filter(|micros| *micros > 0);
    faults::put(&lab, Fault { a, b, down: args.down, mtu: args.mtu, loss_ppm: args.loss, delay_micros })?;
    Ok(OK)
}

fn outside_exec(args: OutsideExec) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    Err(exec::outside(&lab, args.command)?.exec())
}

fn kubeconfig(args: &Kubeconfig) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    // Says what to do when the lab is not there or dead.
    Client::of_lab(&lab)?;
    let path = StateDir::of(&lab).kubeconfig();
    if args.path {
        output::print(&format!("{}\n", path.display()));
    } else {
        output::print(&std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?);
    }
    Ok(OK)
}

fn check(args: &Show) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let report = runtime()?.block_on(async {
        let mut client = Client::of_lab(&lab)?;
        let seen = observe(&mut client, &lab).await?;
        check::check(&lab, &mut client, &seen).await
    })?;
    match args.format.output {
        OutputFormat::Json => output::json(&report)?,
        OutputFormat::Text => output::print(&check::render(&report)),
    }
    Ok(if report.is_ok() { OK } else { FAILED })
}

fn down(args: &Down) -> anyhow::Result<u8> {
    let labs = match (args.lab.as_ref().or(args.name.as_ref()), args.all) {
        (Some(name), _) => vec![name.clone()],
        (None, true) => state::list()?,
        // Not read by clap: there it would contradict the name on the command line.
        (None, false) => match std::env::var("PODWAY_LAB") {
            Ok(name) => vec![name.parse().context("PODWAY_LAB")?],
            Err(_) => vec![only(&state::list()?)?],
        },
    };
    let mut code = OK;
    for lab in labs {
        let removal = down::down(&lab)?;
        if removal.removed.is_empty() && removal.left.is_empty() {
            output::print(&format!("lab {lab}: nothing was there\n"));
        }
        if !removal.removed.is_empty() {
            output::print(&format!("lab {lab}: removed {}\n", removal.removed.join(", ")));
        }
        for left in removal.left {
            output::error(&format!("lab {lab}: still there: {left}"));
            code = FAILED;
        }
    }
    Ok(code)
}
