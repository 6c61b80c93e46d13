//! A lab for a test, through the command line only.

use std::{
    fs,
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The binary under test: the release build when the runner names it.
pub(crate) fn podway() -> PathBuf {
    std::env::var_os("PODWAY_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_podway")), PathBuf::from)
}

/// Whether the test can run; says why not.
pub(crate) fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

/// A lab that goes when the test ends, however it ends.
pub(crate) struct Lab {
    pub(crate) name: &'static str,
}

impl Lab {
    /// Brings a lab up after removing what an earlier run left, and waits until every pod is ready.
    pub(crate) fn up(name: &'static str, manifests: &[&Path], options: &[&str]) -> Self {
        let lab = Self { name };
        lab.down();
        let mut args = vec!["lab", "up"];
        let paths: Vec<&str> = manifests.iter().map(|p| p.to_str().unwrap()).collect();
        args.extend(&paths);
        args.extend(["--name", name]);
        args.extend(options);
        let output = run(&args);
        assert!(output.status.success(), "lab up failed:\n{}", text(&output));
        lab
    }

    /// A lab of the given YAML.
    pub(crate) fn of(name: &'static str, yaml: &str, options: &[&str]) -> Self {
        let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
        file.write_all(yaml.as_bytes()).unwrap();
        Self::up(name, &[file.path()], options)
    }

    /// Removes the lab.
    pub(crate) fn down(&self) -> Output {
        run(&["lab", "down", "--name", self.name])
    }

    /// A subcommand of `podway lab` with this lab's name.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        let mut all = vec!["lab"];
        let (verb, rest) = args.split_first().unwrap();
        all.push(verb);
        // `node exec` and `outside exec` are verbs of two words.
        let rest = match rest.split_first() {
            Some((second, rest)) if matches!(*verb, "node" | "outside") => {
                all.push(second);
                rest
            }
            _ => rest,
        };
        all.extend(["--name", self.name]);
        all.extend(rest);
        run(&all)
    }

    /// A command in a pod; its output must be a success.
    pub(crate) fn exec(&self, pod: &str, command: &[&str]) -> String {
        let output = self.try_exec(pod, command);
        assert!(output.status.success(), "{command:?} in {pod}:\n{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A command in a pod.
    pub(crate) fn try_exec(&self, pod: &str, command: &[&str]) -> Output {
        let mut args = vec!["exec", pod, "--"];
        args.extend(command);
        self.run(&args)
    }

    /// A command in a node's namespace; its output must be a success.
    pub(crate) fn on_node(&self, node: &str, command: &[&str]) -> String {
        let mut args = vec!["node", "exec", node, "--"];
        args.extend(command);
        let output = self.run(&args);
        assert!(output.status.success(), "{command:?} on {node}:\n{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A command in a node's namespace, left running.
    pub(crate) fn start_in_pod(&self, pod: &str, command: &[&str]) -> std::process::Child {
        let mut args = vec!["lab", "exec", "--name", self.name, pod, "--"];
        args.extend(command);
        Command::new(podway()).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// `kubectl get` as JSON.
    pub(crate) fn get(&self, args: &[&str]) -> Value {
        let output = self.kubectl(&[args, &["-o", "json"]].concat());
        assert!(output.status.success(), "kubectl get {args:?}:\n{}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// `kubectl get` with other arguments.
    pub(crate) fn kubectl(&self, args: &[&str]) -> Output {
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        let config = self.run(&["kubeconfig"]);
        assert!(config.status.success(), "{}", text(&config));
        fs::write(kubeconfig.path(), &config.stdout).unwrap();
        Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(kubeconfig.path())
            .arg("get")
            .args(args)
            .output()
            .unwrap()
    }

    /// First address of a pod.
    pub(crate) fn pod_ip(&self, pod: &str) -> IpAddr {
        let pod = self.get(&["pod", pod]);
        pod["status"]["podIP"].as_str().unwrap().parse().unwrap()
    }

    /// A value of a node's metrics whose line starts with `prefix`, summed over its labels; not a number, so
    /// equal to nothing, when there is no such line.
    pub(crate) fn metric(&self, node: &str, prefix: &str) -> f64 {
        let metrics = self.on_node(node, &["curl", "-sf", "http://127.0.0.1:9950/metrics"]);
        let lines = metrics.lines().filter(|l| l.starts_with(prefix));
        let values: Vec<f64> = lines.filter_map(|l| l.rsplit(' ').next()?.parse().ok()).collect();
        if values.is_empty() { f64::NAN } else { values.iter().sum() }
    }

    /// A counter of `/proc/net/snmp` of a node, such as `Ip` `FragCreates`.
    pub(crate) fn snmp(&self, node: &str, protocol: &str, counter: &str) -> u64 {
        let snmp = self.on_node(node, &["cat", "/proc/net/snmp"]);
        let lines: Vec<Vec<&str>> = snmp
            .lines()
            .filter(|l| l.starts_with(&format!("{protocol}:")))
            .map(|l| l.split_whitespace().collect())
            .collect();
        let column = lines[0].iter().position(|c| *c == counter).unwrap();
        lines[1][column].parse().unwrap()
    }

    /// Messages of the events with this reason.
    pub(crate) fn events(&self, reason: &str) -> Vec<String> {
        let events = self.get(&["events", "-A"]);
        let items = events["items"].as_array().unwrap();
        let of_reason = items.iter().filter(|e| e["reason"] == reason);
        of_reason
            .map(|e| e["message"].as_str().or(e["note"].as_str()).unwrap_or_default().to_owned())
            .collect()
    }

    /// Process id of a node's agent.
    pub(crate) fn agent_pid(&self, node: &str) -> i32 {
        self.try_agent_pid(node).unwrap_or_else(|| panic!("no agent on {node}"))
    }

    /// The same, while there may be none.
    pub(crate) fn try_agent_pid(&self, node: &str) -> Option<i32> {
        let procs = cgroup_root().join(format!("podway/{}/{node}/agent/cgroup.procs", self.name));
        let pids = fs::read_to_string(&procs).unwrap_or_else(|e| panic!("{}: {e}", procs.display()));
        pids.lines().next().map(|pid| pid.parse().unwrap())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let output = self.down();
        if !std::thread::panicking() {
            assert!(output.status.success(), "lab down failed:\n{}", text(&output));
        }
    }
}

/// Runs the binary.
pub(crate) fn run(args: &[&str]) -> Output {
    Command::new(podway()).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Both outputs of a command, for messages.
pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Waits until something holds.
pub(crate) fn wait_for(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
    start.elapsed()
}

/// Where the unified control group hierarchy is mounted.
pub(crate) fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2")).unwrap();
    PathBuf::from(mount.split(' ').nth(1).unwrap())
}

/// Everything on this machine that carries a lab's name.
pub(crate) fn traces(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut look = |dir: &Path, prefix: &str| {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                found.push(entry.path().display().to_string());
            }
        }
    };
    look(Path::new("/run/netns"), &format!("podway-{name}-"));
    look(Path::new("/sys/fs/bpf/podway"), name);
    look(Path::new("/run/podway"), name);
    look(Path::new("/run/podway/labs"), name);
    look(&cgroup_root().join("podway"), name);
    found
}

/// Two pods on two nodes; the second one serves iperf3 as well.
pub(crate) const PAIR: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: pair}}
spec:
  nodeName: node-1
  containers: [{name: main, image: pair, ports: [{containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata:
  name: b
  labels: {app: pair}
  annotations: {lab.podway.dev/command.iperf: "exec iperf3 --server --interval 0"}
spec:
  nodeName: node-2
  containers:
  - {name: main, image: pair, ports: [{containerPort: 8080}]}
  - {name: iperf, image: iperf}
"#;
