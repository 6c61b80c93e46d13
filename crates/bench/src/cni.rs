//! `podway bench cni`: how long a pod's attachment takes, one at a time and fifty at once.
//!
//! The peer is the plugin chain that small clusters use: bridge with host-local addresses, then portmap. Both sides
//! are called as a container runtime calls plugins, in the node's namespace, and attach namespaces that exist
//! already. What is timed is from the start of the first plugin to the end of the last. Nothing is pinned to cores:
//! our work is done by an agent with threads of its own, the peer's by the plugin's processes.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use ipnet::IpNet;
use podway_link::{NETNS_DIR, Netns, sysctl};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::machine::Machine;
use crate::namespaces::Group;
use crate::pairs::{Pairs, interleave};
use crate::place::start;
use crate::report::{Comparison, Goal, Report, Skipped, Times};
use crate::stats::quantile;
use crate::stop::Stop;
use crate::{check_pairs, new_report};

/// Name of the lab.
const LAB: &str = "bench_cni";
/// Its only node.
const NODE: &str = "node-1";
/// Pods' prefix of that node: enough for every ADD of a bench while freed addresses
/// rest. It is outside of the one that a lab gives to its first node.
const POD_CIDR: &str = "10.244.128.0/18";
/// A plugin that has not ended by then failed.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the agent may take to use another prefix, and the time between two looks.
const PREFIX_TIMEOUT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(200);
/// Where Debian's package puts the peer's plugins, and where everybody else does.
const PLUGIN_DIRS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
/// Pods that are attached at once.
pub const MAX_CONCURRENT: usize = 200;
/// Most operations of one measurement.
pub const MAX_OPERATIONS: usize = 500;

/// How to measure.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Pairs of each comparison.
    pub pairs: usize,
    /// ADDs and DELs, one after the other, of which one value is the median.
    pub operations: usize,
    /// ADDs at once.
    pub concurrent: usize,
}

/// One side: a node's namespace, pods' namespaces, and the plugins to call one after the other.
struct Side {
    name: String,
    node: Netns,
    pods: Vec<PathBuf>,
    plugins: Vec<(PathBuf, Value)>,
    serial: RefCell<u64>,
    /// Milliseconds of every operation: ADD, DEL.
    times: RefCell<(Vec<f64>, Vec<f64>)>,
    _group: Group,
}

/// Runs the bench. `say` is told what happens.
///
/// # Errors
/// When an option is bad, a part cannot be made, or it is interrupted. Everything that was made is removed.
pub fn run(options: Options, stop: &Stop, mut say: impl FnMut(&str)) -> anyhow::Result<Report> {
    check_pairs(options.pairs)?;
    for (option, value, max) in [
        ("--operations", options.operations, MAX_OPERATIONS),
        ("--concurrent", options.concurrent, MAX_CONCURRENT),
    ] {
        if !(1..=max).contains(&value) {
            bail!("{option}: {value} is not 1 to {max}");
        }
    }
    let mut report = new_report("cni", Machine::of_now());
    report.options = json!({
        "pairs": options.pairs,
        "operations": options.operations,
        "concurrent": options.concurrent,
    });
    let Some(dir) = PLUGIN_DIRS.into_iter().map(Path::new).find(|d| has_plugins(d)) else {
        report.skipped.push(Skipped {
            what: "everything".into(),
            why: "no bridge, host-local and portmap plugins; install containernetworking-plugins".into(),
        });
        return Ok(report);
    };

    say("making a lab of one node");
    let cluster = Cluster::up(LAB, 1, &[], stop)?;
    let files = tempfile::tempdir().context("make a folder for the plugins' files")?;
    let ours = ours(&cluster, files.path(), options.concurrent)?;
    cluster.widen(NODE, POD_CIDR)?;
    ours.wait_for(POD_CIDR.parse().context("the node's prefix")?, stop)?;
    let peer = bridge(dir, files.path(), options.concurrent)?;

    say("ADD and DEL, one at a time");
    // Both times come from the same operations.
    let dels = RefCell::new((Vec::new(), Vec::new()));
    let one = |side: &Side, dels: &RefCell<(Vec<f64>, Vec<f64>)>, mine: bool| {
        let (add, del) = side.one_by_one(options.operations, stop)?;
        let mut dels = dels.borrow_mut();
        if mine {
            dels.0.push(del);
        } else {
            dels.1.push(del);
        }
        Ok(add)
    };
    let adds = interleave(options.pairs, stop, || one(&ours, &dels, true), || one(&peer, &dels, false))?;
    let (mut own, mut theirs) = dels.into_inner();
    // The first of each was the one that is thrown away.
    own.remove(0);
    theirs.remove(0);
    let p50 = |what| format!("{what} p50 of {}", options.operations);
    add(&mut report, &p50("ADD"), &peer.name, adds)?;
    add(&mut report, &p50("DEL"), &peer.name, Pairs { ours: own, peer: theirs })?;
    report.times.extend(ours.times(options.operations));
    report.times.extend(peer.times(options.operations));

    let what = format!("{} ADDs at once", options.concurrent);
    say(&what);
    let bursts = interleave(
        options.pairs,
        stop,
        || ours.all_at_once(options.concurrent, stop),
        || peer.all_at_once(options.concurrent, stop),
    )?;
    add(&mut report, &what, &peer.name, bursts)?;
    drop((ours, peer));
    cluster.down()?;
    Ok(report)
}

fn add(report: &mut Report, what: &str, peer: &str, pairs: Pairs) -> anyhow::Result<()> {
    let comparison = Comparison::new(what, "ms", peer, pairs, Goal::AtMost(0.5));
    report.comparisons.push(comparison.context("too few pairs for an interval")?);
    Ok(())
}

fn has_plugins(dir: &Path) -> bool {
    ["bridge", "host-local", "portmap"].iter().all(|plugin| dir.join(plugin).is_file())
}

fn pods(group: &Group, count: usize) -> anyhow::Result<Vec<PathBuf>> {
    (0..count)
        .map(|i| {
            group.create(&format!("pod{i}"))?;
            Ok(Path::new(NETNS_DIR).join(group.name(&format!("pod{i}"))))
        })
        .collect()
}

fn ours(cluster: &Cluster, files: &Path, count: usize) -> anyhow::Result<Side> {
    let plugin = files.join("podway-cni");
    symlink(std::env::current_exe().context("find the podway binary")?, &plugin)
        .context("name it podway-cni")?;
    let config = json!({
        "cniVersion": "1.1.0",
        "name": "podway",
        "type": "podway-cni",
        "socket": cluster.agent_socket(NODE),
    });
    let group = Group::new("cni-podway")?;
    Ok(Side {
        name: "podway".into(),
        node: Netns::open_named(&cluster.name.node_netns(NODE))?,
        pods: pods(&group, count)?,
        plugins: vec![(plugin, config)],
        serial: RefCell::default(),
        times: RefCell::default(),
        _group: group,
    })
}

fn bridge(dir: &Path, files: &Path, count: usize) -> anyhow::Result<Side> {
    let group = Group::new("cni-bridge")?;
    let node = group.create("node")?;
    node.run(|| sysctl::write("net/ipv4/ip_forward", "1"))??;
    let leases = files.join("leases");
    fs::create_dir(&leases).context("make a folder for host-local")?;
    let config = |kind: &str, more: Value| {
        let mut config = json!({ "cniVersion": "1.0.0", "name": "bench", "type": kind });
        if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
            config.extend(more);
        }
        (dir.join(kind), config)
    };
    let bridge = json!({
        "bridge": "cni0",
        "isGateway": true,
        "ipam": {
            "type": "host-local",
            "dataDir": leases,
            "ranges": [[{ "subnet": "10.244.0.0/16" }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    });
    Ok(Side {
        name: "bridge + host-local + portmap".into(),
        node,
        pods: pods(&group, count)?,
        plugins: vec![
            config("bridge", bridge),
            config("portmap", json!({ "capabilities": { "portMappings": true } })),
        ],
        serial: RefCell::default(),
        times: RefCell::default(),
        _group: group,
    })
}

/// A pod that is being attached: its namespace, its name towards the plugins, and what the last of them answered.
struct Pod {
    netns: PathBuf,
    id: String,
    result: Value,
}

impl Side {
    fn pod(&self, index: usize) -> Pod {
        let mut serial = self.serial.borrow_mut();
        *serial += 1;
        let netns = self.pods[index % self.pods.len()].clone();
        Pod { netns, id: format!("bench-{serial}"), result: Value::Null }
    }

    /// Attaches and detaches pods. Returns the medians in milliseconds: ADD, DEL.
    fn one_by_one(&self, count: usize, stop: &Stop) -> anyhow::Result<(f64, f64)> {
        let (mut adds, mut dels) = (Vec::new(), Vec::new());
        for index in 0..count {
            let mut pod = self.pod(index);
            adds.push(timed(|| self.add(&mut pod, stop))?);
            dels.push(timed(|| self.del(&pod, stop))?);
        }
        let p50 = |times: &[f64]| quantile(times, 0.5).context("no operations");
        let medians = (p50(&adds)?, p50(&dels)?);
        let mut times = self.times.borrow_mut();
        times.0.extend(adds);
        times.1.extend(dels);
        Ok(medians)
    }

    /// Attaches pods, all at the same time, and detaches them after that. Returns the milliseconds from the first
    /// start to the last end of the attachments.
    fn all_at_once(&self, count: usize, stop: &Stop) -> anyhow::Result<f64> {
        let mut pods: Vec<Pod> = (0..count).map(|i| self.pod(i)).collect();
        let (ready, plugins) =
            (Barrier::new(count + 1), Plugins { node: &self.node, plugins: &self.plugins });
        let time = std::thread::scope(|scope| {
            let threads: Vec<_> = pods
                .iter_mut()
                .map(|pod| {
                    scope.spawn(|| {
                        ready.wait();
                        plugins.add(pod, stop)
                    })
                })
                .collect();
            let begun = Instant::now();
            ready.wait();
            let mut outcome = Ok(());
            for thread in threads {
                let ended = thread.join().unwrap_or_else(|_| Err(anyhow!("a thread of the bench failed")));
                outcome = outcome.and(ended);
            }
            outcome.map(|()| begun.elapsed().as_secs_f64() * 1e3)
        });
        for pod in &pods {
            self.del(pod, stop)?;
        }
        time
    }

    fn add(&self, pod: &mut Pod, stop: &Stop) -> anyhow::Result<()> {
        Plugins { node: &self.node, plugins: &self.plugins }.add(pod, stop)
    }

    fn del(&self, pod: &Pod, stop: &Stop) -> anyhow::Result<()> {
        Plugins { node: &self.node, plugins: &self.plugins }.del(pod, stop)
    }

    /// Waits until pods get addresses of a prefix.
    fn wait_for(&self, prefix: IpNet, stop: &Stop) -> anyhow::Result<()> {
        let end = Instant::now() + PREFIX_TIMEOUT;
        loop {
            let mut pod = self.pod(0);
            self.add(&mut pod, stop)?;
            self.del(&pod, stop)?;
            let address = pod.result["ips"][0]["address"].as_str().unwrap_or_default();
            if address.parse::<IpNet>().is_ok_and(|a| prefix.contains(&a)) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!(
                    "the agent still gives {address} to pods, which is not of the node's new prefix {prefix}"
                );
            }
            stop.sleep(LOOK)?;
        }
    }

    /// Times of all operations but the first ones, which were thrown away.
    fn times(&self, thrown_away: usize) -> Vec<Times> {
        let times = self.times.borrow();
        [("ADD", &times.0), ("DEL", &times.1)]
            .into_iter()
            .filter_map(|(what, times)| {
                let times = times.get(thrown_away..)?;
                Some(Times {
                    what: what.into(),
                    who: self.name.clone(),
                    unit: "ms".into(),
                    p50: quantile(times, 0.5)?,
                    p99: quantile(times, 0.99)?,
                    count: times.len(),
                })
            })
            .collect()
    }
}

fn timed(operation: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let begun = Instant::now();
    operation()?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// The part of a side that threads share.
#[derive(Clone, Copy)]
struct Plugins<'a> {
    node: &'a Netns,
    plugins: &'a [(PathBuf, Value)],
}

impl Plugins<'_> {
    /// ADD through the chain, each plugin with the result of the one before.
    fn add(self, pod: &mut Pod, stop: &Stop) -> anyhow::Result<()> {
        for (plugin, config) in self.plugins {
            let answer = self.call("ADD", plugin, config, pod, stop)?;
            pod.result = serde_json::from_slice(&answer)
                .with_context(|| format!("ADD by {}: the result is not JSON", plugin.display()))?;
        }
        Ok(())
    }

    /// DEL through the chain, the last plugin first.
    fn del(self, pod: &Pod, stop: &Stop) -> anyhow::Result<()> {
        for (plugin, config) in self.plugins.iter().rev() {
            self.call("DEL", plugin, config, pod, stop)?;
        }
        Ok(())
    }

    fn call(
        self,
        operation: &str,
        plugin: &Path,
        config: &Value,
        pod: &Pod,
        stop: &Stop,
    ) -> anyhow::Result<Vec<u8>> {
        let mut config = config.clone();
        if !pod.result.is_null() {
            config["prevResult"] = pod.result.clone();
        }
        let mut command = Command::new(plugin);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", operation)
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", &pod.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME={}", pod.id))
            .env("CNI_PATH", plugin.parent().unwrap_or(Path::new("/")));
        let finished = start(self.node, None, command)?
            .finish(config.to_string().as_bytes(), PLUGIN_TIMEOUT, stop)
            .with_context(|| format!("{operation} by {}", plugin.display()))?;
        if !finished.status.success() {
            let said = String::from_utf8_lossy(&finished.stdout);
            bail!("{operation} by {}: {}: {}", plugin.display(), finished.status, said.trim());
        }
        Ok(finished.stdout)
    }
}
