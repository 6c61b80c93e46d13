//! One container: a stand-in, or the command that an annotation names, kept running as `restartPolicy` says.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::probe::{Probes, Verdict};
use super::{NodeContext, Power};
use crate::cgroup::Cgroup;
use crate::standin::{self, Identity, Port, Protocol, Report};

/// Annotation that names a host command to run instead of the stand-in of a container.
const COMMAND_ANNOTATION: &str = "lab.podway.dev/command.";
/// Longest report of a stand-in, in bytes.
const REPORT_LIMIT: u64 = 64 << 10;
/// A stand-in that has not reported by then is taken for hung.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// First wait before a restart; it doubles up to [`BACKOFF_MAX`] and starts over after [`BACKOFF_RESET`]. The
/// kubelet begins at 10 s, which is long for a lab.
const BACKOFF: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
const BACKOFF_RESET: Duration = Duration::from_secs(120);
/// A log that is longer than this is started anew with the next process.
const LOG_LIMIT: u64 = 8 << 20;
/// Connections that one stand-in serves at a time.
const STANDIN_CONNECTIONS: usize = 256;
/// How long a stand-in goes on accepting after SIGTERM, at most.
const DRAIN_ACCEPT: Duration = Duration::from_millis(1500);

/// `restartPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

impl RestartPolicy {
    pub(super) fn of(text: &str) -> Self {
        match text {
            "OnFailure" => Self::OnFailure,
            "Never" => Self::Never,
            _ => Self::Always,
        }
    }

    fn restarts(self, exit: &Exit) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => exit.code != 0,
            Self::Never => false,
        }
    }
}

/// What a container is to run.
#[derive(Debug, Clone)]
pub(super) struct ContainerSpec {
    pub(super) name: String,
    pub(super) image: String,
    pub(super) ports: Vec<Port>,
    /// Host command in place of the stand-in.
    pub(super) command: Option<String>,
    pub(super) env: Vec<(String, String)>,
    pub(super) restart: RestartPolicy,
    pub(super) probes: Probes,
    /// What in the manifest makes the container impossible to start.
    pub(super) broken: Option<String>,
}

impl ContainerSpec {
    /// Reads one entry of `spec.containers` or `spec.initContainers`.
    pub(super) fn of(pod: &Value, container: &Value, restart: RestartPolicy) -> Self {
        let name = container["name"].as_str().unwrap_or_default().to_owned();
        let mut broken = None;
        let mut ports = Vec::new();
        for (index, entry) in container["ports"].as_array().into_iter().flatten().enumerate() {
            let number =
                entry["containerPort"].as_u64().and_then(|p| u16::try_from(p).ok()).filter(|p| *p > 0);
            let protocol = match entry["protocol"].as_str().unwrap_or("TCP") {
                "TCP" => Some(Protocol::Tcp),
                "UDP" => Some(Protocol::Udp),
                "SCTP" => Some(Protocol::Sctp),
                _ => None,
            };
            match (number, protocol) {
                (Some(port), Some(protocol)) => {
                    // A port listed twice (for two names) is one socket.
                    let port =
                        Port { port, protocol, name: entry["name"].as_str().unwrap_or_default().to_owned() };
                    if !ports.iter().any(|p: &Port| (p.port, p.protocol) == (port.port, port.protocol)) {
                        ports.push(port);
                    }
                }
                (None, _) => {
                    broken = Some(format!(
                        "ports[{index}].containerPort: {} is not 1 to 65535",
                        entry["containerPort"]
                    ));
                }
                (_, None) => {
                    broken = Some(format!(
                        "ports[{index}].protocol: {} is not TCP, UDP or SCTP",
                        entry["protocol"]
                    ));
                }
            }
        }
        let command = pod["metadata"]["annotations"][format!("{COMMAND_ANNOTATION}{name}")].as_str();
        if container["ports"].as_array().is_none_or(Vec::is_empty) {
            // Kubernetes wants no ports to be declared; then the probes are what says where the program listens.
            let tcp = |port| Port { port, protocol: Protocol::Tcp, name: String::new() };
            ports.extend(Probes::ports(container).into_iter().map(tcp));
        }
        let env = container["env"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|e| Some((e["name"].as_str()?.to_owned(), e["value"].as_str()?.to_owned())))
            .filter(|(name, value)| !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'))
            .collect();
        Self {
            image: container["image"].as_str().unwrap_or_default().to_owned(),
            probes: Probes::of(container, &ports, command.is_none()),
            ports,
            command: command.map(str::to_owned),
            env,
            restart,
            broken,
            name,
        }
    }
}

/// Where a container runs.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) cgroup: Cgroup,
    pub(super) netns: PathBuf,
    /// The node; probes come from there.
    pub(super) on: Arc<NodeContext>,
    pub(super) hostname: String,
    /// Folder with `hosts`, `resolv.conf`, logs and stand-in configurations.
    pub(super) dir: PathBuf,
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) node: String,
    pub(super) addresses: Vec<IpAddr>,
    /// `terminationGracePeriodSeconds`.
    pub(super) grace: Duration,
    pub(super) api_service: Option<IpAddr>,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exit {
    pub(super) code: i32,
    pub(super) signal: Option<i32>,
    pub(super) message: String,
    pub(super) started: Timestamp,
    pub(super) finished: Timestamp,
}

/// What a container is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    Waiting {
        reason: &'static str,
        message: String,
    },
    /// `passed` is false until the startup probe has succeeded.
    Running {
        started: Timestamp,
        passed: bool,
        ready: bool,
    },
    Terminated(Exit),
}

/// A container's state as the pod's status shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) state: State,
    pub(super) last: Option<Exit>,
    pub(super) restarts: u32,
    /// For people: SCTP ports that the kernel cannot serve.
    pub(super) warnings: Vec<String>,
    /// The newest complaint of a probe, and how many there were.
    pub(super) unhealthy: Option<(u64, String)>,
    /// Why a probe had the container restarted last, and how often one had.
    pub(super) killed: Option<(u64, String)>,
}

impl Default for Progress {
    fn default() -> Self {
        let state = State::Waiting { reason: "ContainerCreating", message: String::new() };
        Self { state, last: None, restarts: 0, warnings: Vec::new(), unhealthy: None, killed: None }
    }
}

/// When the pod ends: SIGTERM now, SIGKILL then.
pub(super) type Stop = watch::Receiver<Option<Instant>>;

/// Runs the container until it is stopped or has ended for good. Every change goes to `report`, with `index`.
pub(super) async fn run(
    index: usize,
    spec: ContainerSpec,
    place: Place,
    report: mpsc::Sender<(usize, Progress)>,
    mut stop: Stop,
) {
    let mut progress = Progress::default();
    let mut backoff = BACKOFF;
    loop {
        let started = Instant::now();
        let kills_before = progress.killed.as_ref().map_or(0, |(count, _)| *count);
        let exit = match &spec.broken {
            Some(message) => failed_to_start(message.clone()),
            None => once(index, &spec, &place, &report, &mut stop, &mut progress).await,
        };
        let kills = progress.killed.as_ref().map_or(0, |(count, _)| *count);
        // A container that its probes had ended starts again whatever its exit code, but for Never.
        let again = stop.borrow().is_none()
            && (spec.restart.restarts(&exit)
                || (kills > kills_before && spec.restart != RestartPolicy::Never));
        if !again {
            progress.state = State::Terminated(exit);
            let _ = report.send((index, progress)).await;
            return;
        }
        if place.on.power() != Power::On {
            let message = format!("{} is stopped", place.node);
            progress.state = State::Waiting { reason: "NodeStopped", message };
            progress.last = Some(exit.clone());
            let _ = report.send((index, progress.clone())).await;
            tokio::select! {
                () = place.on.on() => {}
                () = stopped(&mut stop) => {}
            }
            if place.on.power() == Power::Gone {
                stopped(&mut stop).await;
            }
            if stop.borrow().is_some() {
                progress.state = State::Terminated(exit);
                let _ = report.send((index, progress)).await;
                return;
            }
            progress.restarts += 1;
            continue;
        }
        if started.elapsed() > BACKOFF_RESET {
            backoff = BACKOFF;
        }
        let message = format!(
            "back-off {} s restarting failed container {}: {}",
            backoff.as_secs(),
            spec.name,
            exit.message
        );
        progress.state = State::Waiting { reason: "CrashLoopBackOff", message };
        progress.last = Some(exit);
        let _ = report.send((index, progress.clone())).await;
        tokio::select! {
            () = tokio::time::sleep(backoff) => {}
            _ = stop.changed() => {}
        }
        if stop.borrow().is_some() {
            // Nothing runs; the last process's end stays on record.
            if let Some(last) = progress.last.take() {
                progress.state = State::Terminated(last);
            }
            let _ = report.send((index, progress)).await;
            return;
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
        progress.restarts += 1;
    }
}

fn failed_to_start(message: String) -> Exit {
    let now = Timestamp::now();
    Exit { code: 128, signal: None, message, started: now, finished: now }
}

async fn once(
    index: usize,
    spec: &ContainerSpec,
    place: &Place,
    report: &mpsc::Sender<(usize, Progress)>,
    stop: &mut Stop,
    progress: &mut Progress,
) -> Exit {
    let begun = Timestamp::now();
    let mut child = match spawn(spec, place) {
        Ok(child) => child,
        Err(e) => return failed_to_start(format!("start: {e:#}")),
    };
    let mut message = String::new();
    let ready = if spec.command.is_some() {
        true
    } else {
        match first_report(&mut child).await {
            Ok(Report::Ready { unavailable }) => {
                progress.warnings = unavailable
                    .into_iter()
                    .map(|u| format!("{} port {}: {}", u.protocol, u.port, u.cause))
                    .collect();
                true
            }
            Ok(Report::Failed { message: cause }) => {
                message = cause;
                false
            }
            Err(cause) => {
                message = cause;
                let _ = child.start_kill();
                false
            }
        }
    };
    let (mut passed, mut good) = (spec.probes.starts_at_once(), spec.probes.is_ready_at_once());
    if ready {
        progress.state = State::Running { started: begun, passed, ready: good };
        let _ = report.send((index, progress.clone())).await;
    }
    let (mut probing, mut verdicts) = if ready {
        let (probing, verdicts) = spec.probes.run(place, environment(spec, place));
        (Some(probing), verdicts)
    } else {
        (None, mpsc::channel(1).1)
    };
    let status = loop {
        let verdict = tokio::select! {
            status = child.wait() => break status,
            () = stopped(stop) => {
                probing = None;
                break terminate(&mut child, stop).await;
            }
            () = place.on.off() => {
                "the node was stopped".clone_into(&mut message);
                // The whole node is being killed; this only makes sure.
                let _ = child.start_kill();
                break child.wait().await;
            }
            Some(verdict) = verdicts.recv() => verdict,
        };
        match verdict {
            Verdict::Started => passed = true,
            Verdict::Ready(now) => good = now,
            Verdict::Unhealthy(cause) => {
                let count = progress.unhealthy.take().map_or(0, |(count, _)| count);
                progress.unhealthy = Some((count + 1, cause));
            }
            Verdict::Kill { message: cause, grace } => {
                message.clone_from(&cause);
                let count = progress.killed.take().map_or(0, |(count, _)| count);
                progress.killed = Some((count + 1, cause));
                progress.state = State::Running { started: begun, passed, ready: false };
                let _ = report.send((index, progress.clone())).await;
                probing = None;
                break end_now(&mut child, stop, grace.unwrap_or(place.grace)).await;
            }
        }
        progress.state = State::Running { started: begun, passed, ready: good };
        let _ = report.send((index, progress.clone())).await;
    };
    drop(probing);
    match status {
        Ok(status) => exit_of(status, message, begun, &log_path(spec, place)),
        Err(e) => failed_to_start(format!("wait: {e}")),
    }
}

/// Returns when the pod is to end; the end of the pod's task means that as well.
async fn stopped(stop: &mut Stop) {
    let _ = stop.wait_for(Option::is_some).await;
}

fn ask_to_end(child: &Child) {
    if let Some(pid) = child.id() {
        // It may have ended this moment.
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
    }
}

/// Ends the container within its grace although its pod goes on; sooner when the pod ends meanwhile.
async fn end_now(child: &mut Child, stop: &mut Stop, grace: Duration) -> std::io::Result<ExitStatus> {
    ask_to_end(child);
    tokio::select! {
        status = child.wait() => status,
        () = stopped(stop) => terminate(child, stop).await,
        () = tokio::time::sleep(grace) => {
            child.start_kill()?;
            child.wait().await
        }
    }
}

async fn terminate(child: &mut Child, stop: &mut Stop) -> std::io::Result<ExitStatus> {
    ask_to_end(child);
    loop {
        let deadline = stop.borrow_and_update().unwrap_or_else(Instant::now);
        tokio::select! {
            status = child.wait() => return status,
            () = tokio::time::sleep_until(deadline) => {
                child.start_kill()?;
                return child.wait().await;
            }
            // The deadline can come closer, when the pod is removed by force.
            Ok(()) = stop.changed() => {}
        }
    }
}

fn exit_of(status: ExitStatus, mut message: String, started: Timestamp, log: &Path) -> Exit {
    let signal = status.signal();
    let code = status.code().unwrap_or_else(|| 128 + signal.unwrap_or(0));
    if message.is_empty() {
        message = match signal {
            Some(number) => format!("ended by signal {number}"),
            None if code == 0 => String::new(),
            None => format!("exit code {code}; its output is in {}", log.display()),
        };
    }
    Exit { code, signal, message, started, finished: Timestamp::now() }
}

/// The first line of a stand-in's standard output. It writes nothing after it, so nobody need read on.
async fn first_report(child: &mut Child) -> Result<Report, String> {
    let Some(stdout) = child.stdout.take() else { return Err("stand-in has no standard output".into()) };
    let mut line = String::new();
    let mut reader = BufReader::new(stdout.take(REPORT_LIMIT));
    match tokio::time::timeout(REPORT_TIMEOUT, reader.read_line(&mut line)).await {
        Err(_) => Err(format!("stand-in did not come up in {} s", REPORT_TIMEOUT.as_secs())),
        Ok(Err(e)) => Err(format!("stand-in: {e}")),
        Ok(Ok(0)) => Err("stand-in ended before it was up".into()),
        Ok(Ok(_)) => serde_json::from_str(&line).map_err(|e| format!("stand-in's report: {e}")),
    }
}

fn log_path(spec: &ContainerSpec, place: &Place) -> PathBuf {
    place.dir.join(format!("{}.log", spec.name))
}

fn open_log(path: &Path) -> std::io::Result<File> {
    let long = std::fs::metadata(path).is_ok_and(|m| m.len() > LOG_LIMIT);
    let mut options = OpenOptions::new();
    if long {
        options.write(true).truncate(true)
    } else {
        options.append(true)
    };
    options.create(true).open(path)
}

fn spawn(spec: &ContainerSpec, place: &Place) -> anyhow::Result<Child> {
    let log = open_log(&log_path(spec, place))?;
    let mut command = command_in(place);
    command.stdin(Stdio::null()).stderr(log.try_clone()?).current_dir("/").process_group(0);
    match &spec.command {
        Some(shell) => {
            command.arg("--").args(["/bin/sh", "-c", shell]);
            command.env_clear().envs(environment(spec, place)).stdout(log);
        }
        None => {
            let accept = DRAIN_ACCEPT.min(place.grace / 4);
            // Ends a little before the kill, so that the exit is its own.
            let finish = (place.grace - accept).saturating_sub(Duration::from_millis(500));
            let config = standin::Config {
                identity: Identity {
                    pod: place.pod.clone(),
                    namespace: place.namespace.clone(),
                    node: place.node.clone(),
                    container: spec.name.clone(),
                    addresses: place.addresses.clone(),
                },
                ports: spec.ports.clone(),
                max_connections: STANDIN_CONNECTIONS,
                drain_accept_ms: u64::try_from(accept.as_millis()).unwrap_or(u64::MAX),
                drain_finish_ms: u64::try_from(finish.as_millis()).unwrap_or(u64::MAX),
            };
            let file = place.dir.join(format!("{}.json", spec.name));
            crate::state::write_file(&file, &serde_json::to_vec(&config)?)?;
            command.args(["--arg0", "podway", "--", "/proc/self/exe", "internal", "stand-in"]).arg(file);
            command.env_clear().stdout(Stdio::piped());
        }
    }
    Ok(command.spawn()?)
}

/// A program in the pod's place; it follows after `--`.
pub(super) fn command_in(place: &Place) -> Command {
    let mut command = enter(Some(&place.cgroup), Some(&place.netns));
    command.arg("--hostname").arg(&place.hostname);
    command.arg("--hosts").arg(place.dir.join("hosts"));
    command.arg("--own-sysfs").arg("--resolv-conf").arg(place.dir.join("resolv.conf"));
    command
}

/// What a program started by an annotation finds in its environment.
fn environment(spec: &ContainerSpec, place: &Place) -> Vec<(String, OsString)> {
    let inherited = ["PATH", "HOME", "LANG", "TERM"]
        .into_iter()
        .filter_map(|k| Some((k.to_owned(), std::env::var_os(k)?)));
    let addresses: Vec<String> = place.addresses.iter().map(ToString::to_string).collect();
    let own = identity(&place.namespace, &place.pod, &place.node, &addresses);
    let api = place.api_service.into_iter().flat_map(|api| {
        [("KUBERNETES_SERVICE_HOST", api.to_string()), ("KUBERNETES_SERVICE_PORT", "443".to_owned())]
    });
    let api = api.map(|(k, v)| (k.to_owned(), v.into()));
    let hostname = [("HOSTNAME".to_owned(), place.hostname.clone().into())];
    // The manifest has the last word.
    let manifest = spec.env.iter().map(|(k, v)| (k.clone(), v.clone().into()));
    inherited.chain(hostname).chain(own).chain(api).chain(manifest).collect()
}

/// The same for a person's command in a running pod; the rest of the environment is the person's own.
pub(crate) fn environment_of(pod: &Value, container: &Value, node: &str) -> Vec<(String, OsString)> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let addresses: Vec<String> =
        pod["status"]["podIPs"].as_array().into_iter().flatten().map(|a| text(&a["ip"])).collect();
    let meta = &pod["metadata"];
    let own = identity(&text(&meta["namespace"]), &text(&meta["name"]), node, &addresses);
    let spec = ContainerSpec::of(pod, container, RestartPolicy::Never);
    own.into_iter().chain(spec.env.into_iter().map(|(k, v)| (k, v.into()))).collect()
}

fn identity(namespace: &str, pod: &str, node: &str, addresses: &[String]) -> Vec<(String, OsString)> {
    let first = addresses.first().cloned().unwrap_or_default();
    [
        ("POD_NAMESPACE", namespace.to_owned()),
        ("POD_NAME", pod.to_owned()),
        ("NODE_NAME", node.to_owned()),
        ("POD_IP", first),
        ("POD_IPS", addresses.join(",")),
    ]
    .map(|(k, v)| (k.to_owned(), v.into()))
    .to_vec()
}

/// `podway internal pod-exec` with its first options. `/proc/self/exe` is this very program even after its file
/// was replaced.
pub(crate) fn enter(cgroup: Option<&Cgroup>, netns: Option<&Path>) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("podway").args(["internal", "pod-exec"]);
    if let Some(cgroup) = cgroup {
        command.arg("--cgroup").arg(cgroup.path());
    }
    if let Some(netns) = netns {
        command.arg("--netns").arg(netns);
    }
    command
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn containers_are_read_with_their_ports_command_and_faults() {
        let pod = json!({"metadata": {"annotations": {"lab.podway.dev/command.b": "sleep 1"}}});
        let read = |c: Value| ContainerSpec::of(&pod, &c, RestartPolicy::Always);
        let a = read(json!({"name": "a", "ports": [
            {"containerPort": 80}, {"containerPort": 80, "name": "again"}, {"containerPort": 53, "protocol": "UDP"},
            {"containerPort": 9, "protocol": "SCTP"}], "env": [{"name": "X", "value": "1"}, {"name": "Y"}, {"name": "A=B", "value": ""}]}));
        let ports: Vec<_> = a.ports.iter().map(|p| (p.port, p.protocol)).collect();
        assert_eq!(ports, [(80, Protocol::Tcp), (53, Protocol::Udp), (9, Protocol::Sctp)]);
        assert_eq!((a.command, a.broken, a.env), (None, None, vec![("X".into(), "1".into())]));
        assert_eq!(read(json!({"name": "b"})).command.as_deref(), Some("sleep 1"));
        for (port, part) in [
            (json!({"containerPort": 0}), "containerPort"),
            (json!({"containerPort": 70000}), "70000"),
            (json!({"containerPort": "http"}), "http"),
            (json!({}), "containerPort"),
            (json!({"containerPort": 1, "protocol": "QUIC"}), "QUIC"),
        ] {
            let broken = read(json!({"name": "c", "ports": [port]})).broken.expect("broken");
            assert!(broken.contains(part), "{broken}");
        }
    }

    #[test]
    fn restart_policies() {
        let exit = |code| Exit { code, ..failed_to_start(String::new()) };
        for (policy, code, again) in [
            ("Always", 0, true),
            ("", 0, true),
            ("OnFailure", 0, false),
            ("OnFailure", 1, true),
            ("Never", 1, false),
        ] {
            assert_eq!(RestartPolicy::of(policy).restarts(&exit(code)), again, "{policy} {code}");
        }
    }
}
