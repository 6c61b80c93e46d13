//! `podway bench policy`: what compiling network policies costs, in time and memory, against bounds.
//!
//! Clusters of 100 namespaces with pods of ten applications each; policies select one application and allow others in
//! and out by label, by namespace, by named port and by range. Or one namespace, in which every pod is an application of
//! its own. Every run is a process of its own, which says how much
//! memory it has come to need on top of the objects themselves.

use std::fmt::Write as _;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use podway_model::{Labels, Namespace, NetworkPolicy, Pod};
use podway_policy::{Change, Compiler, Update};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::new_report;
use crate::report::{Bound, Report, Times};
use crate::stats::quantile;
use crate::stop::Stop;

const NAMESPACES: usize = 100;
const APPLICATIONS: usize = 10;
const NODES: usize = 101;
/// Label changes that one run makes.
const CHANGES: usize = 4000;
/// Most runs of each row.
pub const MAX_RUNS: usize = 50;

/// How to measure.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Runs of each row; the worst one counts.
    pub runs: usize,
}

/// One cluster to compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Pods.
    pub pods: usize,
    /// NetworkPolicies.
    pub policies: usize,
    /// As the agent of one node in 101 sees it; else as the whole cluster's.
    pub node: bool,
    /// How pods and policies are spread.
    pub shape: Shape,
}

/// How pods and policies are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Over many namespaces with few applications each.
    Namespaces,
    /// Over one namespace, each pod being an application of its own.
    OneNamespace,
    /// As the first, but all policies select one pod.
    OnePod,
}

impl Shape {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Namespaces, Self::OneNamespace, Self::OnePod];

    /// As the command line has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::OneNamespace => "one-namespace",
            Self::OnePod => "one-pod",
        }
    }

    /// Namespace and application of a pod.
    fn place(self, i: usize) -> (usize, usize) {
        match self {
            Self::OneNamespace => (0, i),
            _ => (i % NAMESPACES, i / NAMESPACES % APPLICATIONS),
        }
    }
}

/// What one process has measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Run {
    /// From nothing to all tables, in seconds.
    pub compile_seconds: f64,
    /// Most memory on the way, on top of the objects, in MB.
    pub peak_mb: f64,
    /// Entries for a kernel's map.
    pub entries: usize,
    /// Sets times classes with entries of their own.
    pub lists: usize,
    /// Each label change, in milliseconds.
    pub change_ms: Vec<f64>,
    /// Most changes of the tables that one label change came to.
    pub most_changes: usize,
    /// Classes after all label changes minus those before.
    pub class_growth: usize,
}

/// Runs the bench. `say` is told what happens.
///
/// # Errors
/// When an option is bad, a process fails, or it is interrupted.
pub fn run(options: Options, stop: &Stop, mut say: impl FnMut(&str)) -> anyhow::Result<Report> {
    if !(1..=MAX_RUNS).contains(&options.runs) {
        bail!("--runs: {} is not 1 to {MAX_RUNS}", options.runs);
    }
    let mut report = new_report("policy", Machine::of_now());
    report.options = json!({"runs": options.runs});
    let cluster = |pods, policies| Size { pods, policies, node: false, shape: Shape::Namespaces };
    let one_node = |pods, policies| Size { node: true, ..cluster(pods, policies) };
    for (size, name, compile_goal, memory_goal) in [
        (cluster(10_000, 10_000), "10,000 policies, 10,000 pods", Some(2.0), Some(100.0)),
        (one_node(10_000, 10_000), "10,000 policies, 10,000 pods, one node's view", Some(2.0), Some(100.0)),
        (cluster(10_000, 1_000), "1,000 policies, 10,000 pods", None, None),
        (one_node(10_000, 1_000), "1,000 policies, 10,000 pods, one node's view", None, None),
        (
            Size { shape: Shape::OneNamespace, ..one_node(10_000, 10_000) },
            "10,000 policies, 10,000 pods, all different, in one namespace, one node's view",
            Some(2.0),
            Some(100.0),
        ),
        (
            // Rules for a whole namespace have an entry for each of its applications in each set.
            Size { shape: Shape::OneNamespace, ..cluster(2_000, 2_000) },
            "2,000 policies, 2,000 pods, all different, in one namespace",
            None,
            None,
        ),
        (
            Size { shape: Shape::OnePod, ..cluster(1_000, 1_000) },
            "1,000 policies on one pod of 1,000",
            None,
            None,
        ),
    ] {
        let mut runs = Vec::new();
        for i in 1..=options.runs {
            stop.check()?;
            say(&format!("{name}: run {i} of {}", options.runs));
            runs.push(apart(size)?);
        }
        let mut add = |what: &str, unit: &str, value: &dyn Fn(&Run) -> f64, goal| {
            let values: Vec<f64> = runs.iter().map(value).collect();
            report.bounds.extend(Bound::worst(&format!("{name}: {what}"), unit, &values, goal));
        };
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
        let count = |n: usize| n as f64;
        add("compiled from nothing", "s", &|r| r.compile_seconds, compile_goal);
        add("memory on top of the objects", "MB", &|r| r.peak_mb, memory_goal);
        add("entries", "", &|r| count(r.entries), None);
        add("a label change, p99", "ms", &|r| quantile(&r.change_ms, 0.99).unwrap_or(0.0), Some(5.0));
        // 100 changes a second take this share of one core.
        let share =
            |r: &Run| r.change_ms.iter().sum::<f64>() / count(r.change_ms.len().max(1)) / 10.0 * 100.0;
        add("100 label changes a second", "% of a core", &share, Some(5.0));
        add("growth of classes over all changes", "classes", &|r| count(r.class_growth), Some(0.0));
        let all: Vec<f64> = runs.iter().flat_map(|r| r.change_ms.iter().copied()).collect();
        if let (Some(p50), Some(p99)) = (quantile(&all, 0.5), quantile(&all, 0.99)) {
            let (what, who, unit) = (format!("label change: {name}"), "podway".to_owned(), "ms".to_owned());
            report.times.push(Times { what, who, unit, p50, p99, count: all.len() });
        }
    }
    stop.check()?;
    say("podway policy check");
    let mut checks = Vec::new();
    for _ in 0..options.runs {
        stop.check()?;
        checks.push(check(1_000, 500)?);
    }
    let what = "podway policy check of 1,000 pods and 500 policies, manifests read included";
    report.bounds.extend(Bound::worst(what, "s", &checks, Some(1.0)));
    Ok(report)
}

/// Measures in a process of its own, so that nothing that was freed before hides what is needed.
fn apart(size: Size) -> anyhow::Result<Run> {
    let program = std::env::current_exe().context("find this program's file")?;
    let mut command = Command::new(program);
    command.args(["bench", "compile", &size.pods.to_string(), &size.policies.to_string(), size.shape.name()]);
    command.args(size.node.then_some("--node"));
    let output = command.stderr(Stdio::inherit()).output().context("start a process to compile in")?;
    if !output.status.success() {
        bail!("compiling {} policies for {} pods: {}", size.policies, size.pods, output.status);
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Compiles one cluster and changes labels, in this process.
///
/// # Errors
/// The objects cannot be read, which would be a mistake of this bench.
pub fn measure(size: Size) -> anyhow::Result<Run> {
    let mut updates: Vec<Update> = (0..NAMESPACES).map(namespace).collect();
    for i in 0..size.pods {
        updates.push(Update::Pod(Pod::parse(&pod(i, size.shape.place(i)))?));
    }
    for i in 0..size.policies {
        let value = if size.shape == Shape::OnePod { policy_for_one(i) } else { policy(i, size.shape) };
        updates.push(Update::NetworkPolicy(NetworkPolicy::parse(&value)?));
    }
    // The peak starts anew (proc(5), clear_refs); where that is not allowed, it is that of the whole process.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let before = memory("VmRSS")?;
    let begun = Instant::now();
    let mut compiler = if size.node { Compiler::for_node("node-1") } else { Compiler::for_cluster() };
    let changes: Vec<Change> = compiler.apply(updates);
    let compile_seconds = begun.elapsed().as_secs_f64();
    let peak_mb = (memory("VmHWM")? - before).max(0.0);
    drop(changes);
    let at_first = compiler.size();
    let lists = compiler.table().verdicts.len();
    let (mut change_ms, mut most_changes) = (Vec::with_capacity(CHANGES), 0);
    for round in 0..CHANGES / 2 {
        let i = round * 37 % size.pods;
        let (namespace, application) = size.shape.place(i);
        let (_, other) = size.shape.place(i + if size.shape == Shape::OneNamespace { 1 } else { NAMESPACES });
        // Out to another application with a label of its own that nobody asks for, and back.
        for (application, extra) in [(other, Some(round)), (application, None)] {
            let mut value = pod(i, (namespace, application));
            if let Some(extra) = extra {
                value["metadata"]["labels"]["build"] = extra.to_string().into();
            }
            let update = Update::Pod(Pod::parse(&value)?);
            let begun = Instant::now();
            let changes = compiler.apply([update]);
            change_ms.push(begun.elapsed().as_secs_f64() * 1e3);
            most_changes = most_changes.max(changes.len());
        }
    }
    let class_growth = compiler.size().classes.saturating_sub(at_first.classes);
    Ok(Run {
        compile_seconds,
        peak_mb,
        entries: at_first.entries,
        lists,
        change_ms,
        most_changes,
        class_growth,
    })
}

/// Seconds of `podway policy check` on manifests.
fn check(pods: usize, policies: usize) -> anyhow::Result<f64> {
    let dir = tempfile::tempdir().context("make a folder for manifests")?;
    let mut text = String::new();
    for i in 0..NAMESPACES {
        let labels = json!({"team": format!("team-{}", i % 7)});
        let value = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("ns-{i}"), "labels": labels}});
        let _ = writeln!(text, "---\n{value}");
    }
    let pods = (0..pods).map(|i| ("v1", "Pod", pod(i, Shape::Namespaces.place(i))));
    let policies =
        (0..policies).map(|i| ("networking.k8s.io/v1", "NetworkPolicy", policy(i, Shape::Namespaces)));
    for (api_version, kind, mut value) in pods.chain(policies) {
        value["apiVersion"] = api_version.into();
        value["kind"] = kind.into();
        let _ = writeln!(text, "---\n{value}");
    }
    let file = dir.path().join("cluster.yaml");
    fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    let program = std::env::current_exe().context("find this program's file")?;
    let begun = Instant::now();
    let output = Command::new(program).args(["policy", "check"]).arg(&file).output();
    let took: Duration = begun.elapsed();
    let output = output.context("start podway policy check")?;
    if !output.status.success() {
        bail!("podway policy check: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(took.as_secs_f64())
}

fn namespace(i: usize) -> Update {
    let labels: Labels = [("team".to_owned(), format!("team-{}", i % 7))].into();
    Update::Namespace(Namespace::new(&format!("ns-{i}"), labels))
}

fn pod(i: usize, (namespace, application): (usize, usize)) -> Value {
    let labels = json!({"app": format!("app-{application}"), "pod-template-hash": format!("{i:x}")});
    json!({
        "metadata": {"namespace": format!("ns-{namespace}"), "name": format!("pod-{i}"), "labels": labels},
        "spec": {"nodeName": format!("node-{}", i % NODES),
            "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"podIP": format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255)}})
}

fn policy(i: usize, shape: Shape) -> Value {
    let (namespace, application) = shape.place(i);
    let other = |by: usize| match shape {
        Shape::OneNamespace => format!("app-{}", application + by),
        _ => format!("app-{}", (application + by) % APPLICATIONS),
    };
    json!({"metadata": {"namespace": format!("ns-{namespace}"), "name": format!("policy-{i}")}, "spec": {
        "podSelector": {"matchLabels": {"app": format!("app-{application}")}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": other(1 + i % 3)}}}], "ports": [{"port": 8000 + i % 100}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"team": format!("team-{}", i % 7)}}}],
             "ports": [{"port": "http"}]}],
        "egress": [
            {"to": [{"podSelector": {"matchLabels": {"app": other(2)}}}]},
            {"to": [{"ipBlock": {"cidr": format!("192.168.{}.0/24", i % 50)}}], "ports": [{"port": 443}]},
            {"ports": [{"port": 53, "protocol": "UDP"}]}]}})
}

/// One of many policies that select pods of one application in one namespace, and let one application of another in.
fn policy_for_one(i: usize) -> Value {
    let from = json!({
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": format!("ns-{}", i % NAMESPACES)}},
        "podSelector": {"matchLabels": {"app": format!("app-{}", i / NAMESPACES % APPLICATIONS)}}});
    json!({"metadata": {"namespace": "ns-0", "name": format!("policy-{i}")}, "spec": {
        "podSelector": {"matchLabels": {"pod-template-hash": "0"}},
        "ingress": [{"from": [from], "ports": [{"port": 1000 + i % 200}]}]}})
}

/// A line of /proc/self/status in MB.
fn memory(line: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let found =
        status.lines().find_map(|l| l.strip_prefix(line)?.split_whitespace().nth(1)?.parse::<f64>().ok());
    Ok(found.with_context(|| format!("/proc/self/status has no {line}"))? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_churn_leaves_no_class_behind() {
        for (node, shape) in
            Shape::ALL.into_iter().map(|shape| (false, shape)).chain([(true, Shape::Namespaces)])
        {
            let run = measure(Size { pods: 500, policies: 200, node, shape }).expect("objects of this bench");
            assert_eq!(run.class_growth, 0);
            assert_eq!(run.change_ms.len(), CHANGES);
            assert!(run.entries >= run.lists && run.lists > 0);
        }
    }
}
