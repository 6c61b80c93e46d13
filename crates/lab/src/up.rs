//! Making a lab and waiting for it.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::apply::{Applied, apply};
use crate::cgroup::Cgroup;
use crate::client::Client;
use crate::down;
use crate::manifest::{self, Loaded};
use crate::observe::{NodeStatus, Observation, observe};
use crate::spec::{BadOption, LabSpec};
use crate::state::{LabFile, Lock, StateDir, new_token};
use crate::supervisor::READY;
use crate::topology;

/// How long the supervisor may take to come up.
const SUPERVISOR_TIMEOUT: Duration = Duration::from_secs(20);
/// How long agents may take before pods are placed without them.
const NODES_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two looks at a lab that is coming up.
const LOOK: Duration = Duration::from_millis(150);
/// A lab in which nothing but stuck pods is left, unchanged for this long, does not get better.
const STUCK_FOR: Duration = Duration::from_secs(8);
/// Lines of a log that an error shows.
const LOG_LINES: usize = 15;

/// How a lab came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// Made now.
    New,
    /// It ran already, with the same options.
    Running,
}

/// Reads the manifests.
///
/// # Errors
/// When a path cannot be read, or nothing in them can be used; a [`BadOption`] when there is nothing in them.
pub fn load(paths: &[PathBuf]) -> anyhow::Result<Loaded> {
    let loaded = manifest::load(paths)?;
    if loaded.objects.is_empty() && !loaded.problems.is_empty() {
        let all: Vec<String> = loaded.problems.iter().map(ToString::to_string).collect();
        bail!("no usable object in the manifests:\n{}", all.join("\n"));
    }
    if loaded.objects.is_empty() && !paths.is_empty() {
        let why =
            if loaded.notes.is_empty() { String::new() } else { format!(" ({})", loaded.notes.join("; ")) };
        let cause = format!("no Kubernetes object in it{why}; give manifest files or folders of manifests");
        return Err(BadOption { option: "FILE|DIR", cause }.into());
    }
    Ok(loaded)
}

/// Makes sure that the lab runs: wires it and starts its supervisor, unless it runs already. What an interrupted
/// run left is removed first. `say` is told what happens.
///
/// # Errors
/// When an option is bad, the lab runs with other options, or a part cannot be made. Then nothing stays behind.
pub fn ensure(spec: &LabSpec, mut say: impl FnMut(String)) -> anyhow::Result<Made> {
    spec.validate()?;
    if !nix::unistd::geteuid().is_root() {
        bail!("a lab makes network namespaces and loads BPF programs, which needs root; run it with sudo");
    }
    let _lock = Lock::acquire()?;
    let state = StateDir::of(&spec.name);
    // A damaged description is what an interrupted run leaves, too.
    let known = state.lab().unwrap_or_default();
    let alive = state.supervisor().unwrap_or_default().is_some_and(|s| s.is_alive());
    if let (Some(known), true) = (&known, alive) {
        if known.spec == *spec {
            return Ok(Made::Running);
        }
        bail!(
            "lab {0} runs already, with other options ({1}); remove it with podway lab down {0}, or make another one \
             with --name",
            spec.name,
            differences(&known.spec, spec)?
        );
    }
    let old = down::remove(&spec.name)?;
    if !old.removed.is_empty() {
        say(format!("removed what an interrupted run of lab {} left: {}", spec.name, old.removed.join(", ")));
    }
    if !old.left.is_empty() {
        bail!("lab {} left things that cannot be removed:\n{}", spec.name, old.left.join("\n"));
    }
    let made = make(spec, &state);
    if let Err(error) = made {
        let left = down::remove(&spec.name)?.left;
        let left =
            if left.is_empty() { String::new() } else { format!("\nstill there: {}", left.join("\n")) };
        bail!("{error:#}{left}");
    }
    Ok(Made::New)
}

fn make(spec: &LabSpec, state: &StateDir) -> anyhow::Result<()> {
    Cgroup::of_lab(&spec.name)?.create()?;
    state.create()?;
    state.write_lab(&LabFile { spec: spec.clone(), token: new_token()? })?;
    topology::create(spec).context("wire the nodes")?;
    start_supervisor(spec, state)
}

fn differences(known: &LabSpec, wanted: &LabSpec) -> anyhow::Result<String> {
    let (known, wanted) = (serde_json::to_value(known)?, serde_json::to_value(wanted)?);
    let fields = known.as_object().into_iter().flatten();
    let list: Vec<String> = fields
        .filter(|(name, value)| wanted[*name] != **value)
        .map(|(name, value)| format!("{}: {value}, not {}", option(name), wanted[name]))
        .collect();
    Ok(list.join("; "))
}

/// The option of a field: `--underlay-mtu` of `underlayMtu`.
fn option(field: &str) -> String {
    let mut out = String::from("--");
    for c in field.chars() {
        if c.is_ascii_uppercase() {
            out.push('-');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

fn start_supervisor(spec: &LabSpec, state: &StateDir) -> anyhow::Result<()> {
    let log = state.supervisor_log();
    let mut child = Command::new("/proc/self/exe")
        .arg0("podway")
        .args(["internal", "supervise", spec.name.as_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log).with_context(|| format!("create {}", log.display()))?)
        .current_dir("/")
        .spawn()
        .context("start the supervisor")?;
    if let Err(error) = wait_ready(&mut child) {
        let _ = child.kill();
        let _ = child.wait();
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        bail!("{error:#}; its log ends with:\n{tail}");
    }
    Ok(())
}

fn wait_ready(child: &mut Child) -> anyhow::Result<()> {
    let stdout = child.stdout.take().context("supervisor has no standard output")?;
    let (sender, receiver) = mpsc::channel();
    // The thread ends with the line or with the supervisor.
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = BufReader::new(stdout).read_line(&mut line);
        let _ = sender.send(line);
    });
    match receiver.recv_timeout(SUPERVISOR_TIMEOUT) {
        Ok(line) if line == READY => Ok(()),
        Ok(_) => bail!("the supervisor ended before the lab was up"),
        Err(_) => bail!("the supervisor did not come up in {} s", SUPERVISOR_TIMEOUT.as_secs()),
    }
}

/// Waits until every node's agent is ready, so that pods are spread over all of them. Returns the nodes that are
/// not when time is up.
///
/// # Errors
/// When the lab's API server cannot be reached.
pub async fn wait_nodes(client: &mut Client, spec: &LabSpec) -> anyhow::Result<Vec<NodeStatus>> {
    let end = Instant::now() + NODES_TIMEOUT;
    loop {
        let seen = observe(client, &spec.name).await?;
        let late: Vec<NodeStatus> = seen.nodes.into_iter().filter(|n| !n.ready).collect();
        if late.is_empty() || Instant::now() >= end {
            return Ok(late);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Writes the loaded objects into the lab.
///
/// # Errors
/// When the lab's API server cannot be reached.
pub async fn fill(client: &mut Client, loaded: &Loaded) -> anyhow::Result<Applied> {
    apply(client, &loaded.objects).await
}

/// How a wait ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Waited {
    /// Everything is as it should be.
    Settled(Observation),
    /// What is left will not get better by itself.
    Stuck(Observation),
    /// Time is up.
    TimedOut(Observation),
}

/// Waits until every node, workload and pod is ready. `watch` sees every look at the lab.
///
/// # Errors
/// When the lab's API server cannot be reached.
pub async fn wait(
    client: &mut Client,
    spec: &LabSpec,
    limit: Duration,
    mut watch: impl FnMut(&Observation),
) -> anyhow::Result<Waited> {
    let end = Instant::now() + limit;
    let mut last: Option<Observation> = None;
    let mut since = Instant::now();
    loop {
        let now = observe(client, &spec.name).await?;
        watch(&now);
        if now.is_settled() {
            return Ok(Waited::Settled(now));
        }
        let same = last
            .as_ref()
            .is_some_and(|last| last.counts() == now.counts() && last.is_stuck() == now.is_stuck());
        if !same {
            since = Instant::now();
        }
        if now.is_stuck() && since.elapsed() >= STUCK_FOR {
            return Ok(Waited::Stuck(now));
        }
        if Instant::now() >= end {
            return Ok(Waited::TimedOut(now));
        }
        last = Some(now);
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_options_are_named_as_people_give_them() {
        let known = serde_json::json!({
            "name": "lab", "nodes": 3, "zones": 2, "mode": "vxlan", "family": "ipv4", "underlayFamily": "ipv4",
            "underlayMtu": 1500, "podMtu": null, "vxlanPort": 8472, "vxlanVni": 1,
        });
        let known: LabSpec = serde_json::from_value(known).expect("options");
        let wanted = LabSpec { nodes: 4, underlay_mtu: 9000, ..known.clone() };
        let text = differences(&known, &wanted).expect("JSON");
        assert_eq!(text, "--nodes: 3, not 4; --underlay-mtu: 1500, not 9000");
    }

    #[test]
    fn nothing_to_load_is_a_mistake_of_the_command_line() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().to_owned();
        let error = load(std::slice::from_ref(&path)).expect_err("an empty folder");
        assert!(error.is::<BadOption>() && error.to_string().contains("no .yaml"), "{error:#}");
        std::fs::write(path.join("a.yaml"), "# nothing\n").expect("write");
        let error = load(std::slice::from_ref(&path)).expect_err("a comment alone");
        assert!(error.is::<BadOption>(), "{error:#}");
        assert!(load(&[]).expect("nothing was asked for").objects.is_empty());
        let missing = path.join("missing");
        let text = format!("{:#}", load(&[missing]).expect_err("no such file"));
        assert_eq!(text.matches("No such file").count(), 1, "{text}");
    }
}
