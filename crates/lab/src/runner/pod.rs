//! The life of one pod: sandbox, files, containers, status; then stop, detach, finalise.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use podway_apiserver::{DeleteOptions, Precondition, ResourceKey, Subresource, get_str};
use podway_workloads::EventType;
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::container::{self, ContainerSpec, Place, Progress, RestartPolicy};
use super::sandbox::Sandbox;
use super::status::{self, ContainerView, View};
use super::{NodeContext, PodState, Runner};
use crate::{etc, events, readiness};

/// Who the events are from.
const COMPONENT: &str = "podway-lab";
/// Wait before the next try of a sandbox: first and longest, when the plugin says "try again" and otherwise.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
const AFTER_ERROR: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Seconds between SIGTERM and SIGKILL when the pod does not say.
const DEFAULT_GRACE: u64 = 30;
/// How long killed processes of a pod may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// Progress reports that may wait.
const REPORTS: usize = 64;

/// Runs the pod until it is gone from the store or has ended for good.
pub(super) async fn run(runner: Arc<Runner>, node: Arc<NodeContext>, updates: watch::Receiver<PodState>) {
    let Some(pod) = updates.borrow().clone() else { return };
    let task = Task::new(runner, node, &pod, updates);
    task.live(&pod).await;
}

struct Task {
    runner: Arc<Runner>,
    node: Arc<NodeContext>,
    updates: watch::Receiver<PodState>,
    key: ResourceKey,
    uid: String,
    sandbox: Sandbox,
    dir: PathBuf,
    view: View,
}

/// Why a wait ended.
#[derive(PartialEq, Eq)]
enum Woken {
    Ending,
    Other,
}

impl Task {
    fn new(
        runner: Arc<Runner>,
        node: Arc<NodeContext>,
        pod: &Value,
        updates: watch::Receiver<PodState>,
    ) -> Self {
        let (namespace, name) =
            (get_str(pod, &["metadata", "namespace"]), get_str(pod, &["metadata", "name"]));
        Self {
            key: ResourceKey::new("", "pods", namespace, name),
            uid: get_str(pod, &["metadata", "uid"]).to_owned(),
            sandbox: Sandbox::of(&runner, &node, pod),
            dir: runner.lab.pod_dir(namespace, name),
            view: View::new(&node.plan.addresses, Timestamp::now()),
            runner,
            node,
            updates,
        }
    }

    async fn live(mut self, pod: &Arc<Value>) {
        let mut attached = false;
        let ended_before = matches!(get_str(pod, &["status", "phase"]), "Succeeded" | "Failed");
        if !self.is_ending() && !ended_before {
            attached = true;
            if let Some(addresses) = self.attach(pod).await {
                self.view.addresses = addresses;
                if self.contain(pod).await {
                    // Ended for good by itself: the address goes back, the object stays for people to read.
                    self.clean(pod).await;
                    return;
                }
            }
        }
        if attached {
            self.clean(pod).await;
        }
        self.finalise();
    }

    /// Makes the sandbox, however long it takes. `None` when the pod is to end first.
    async fn attach(&mut self, pod: &Value) -> Option<Vec<IpAddr>> {
        let mut wait = Duration::ZERO;
        loop {
            match self.sandbox.create(&self.runner, &self.node).await {
                Ok(addresses) => return Some(order(addresses, self.runner.family.has_v4())),
                Err(error) => {
                    let (first, longest) = if error.try_again { TRY_AGAIN } else { AFTER_ERROR };
                    wait = (wait * 2).clamp(first, longest);
                    self.view.message = Some(error.message.clone());
                    self.publish();
                    if !error.try_again {
                        let text = format!("Failed to create pod sandbox: {error}");
                        self.event(pod, EventType::Warning, "FailedCreatePodSandBox", text);
                    }
                    tracing::warn!(pod = %self.key, %error, "sandbox");
                    if self.sleep(wait).await == Woken::Ending {
                        return None;
                    }
                }
            }
            if self.is_ending() {
                return None;
            }
        }
    }

    /// Runs the containers. Returns true when they ended by themselves and stay so, false when the pod is to end.
    async fn contain(&mut self, pod: &Arc<Value>) -> bool {
        self.view.message = None;
        if let Err(error) = self.write_files(pod) {
            self.view.message = Some(format!("{error:#}"));
            self.event(pod, EventType::Warning, "FailedMount", format!("{error:#}"));
        }
        let specs = self.specs(pod);
        if !specs.iter().any(|(_, view)| !view.init) {
            let cause = "spec.containers: empty or not a list; a pod needs at least one container";
            self.view.message = Some(cause.into());
            self.event(pod, EventType::Warning, "InvalidPod", cause.into());
        }
        self.view.attached = true;
        let place = self.place(pod);
        let (stop, stopped) = watch::channel(None);
        let (report, mut reports) = mpsc::channel(REPORTS);
        let mut tasks = JoinSet::new();
        self.view.containers = Vec::new();
        for (index, (spec, view)) in specs.into_iter().enumerate() {
            self.view.containers.push(view);
            if let Some(spec) = spec {
                tasks.spawn(container::run(index, spec, place.clone(), report.clone(), stopped.clone()));
            }
        }
        drop((report, stopped));
        self.heed_switch();
        self.publish();
        let ended = loop {
            tokio::select! {
                Some((index, progress)) = reports.recv() => {
                    self.take(pod, index, progress);
                    self.publish();
                    if self.view.is_finished() {
                        break true;
                    }
                }
                changed = self.updates.changed() => {
                    if changed.is_err() || self.is_ending() {
                        break false;
                    }
                    if self.heed_switch() {
                        self.publish();
                        if self.view.switched_off {
                            let message = format!("Readiness probe failed: {}", readiness::SWITCHED_OFF);
                            self.event(pod, EventType::Warning, "Unhealthy", message);
                        }
                    }
                }
            }
        };
        let grace = self.grace(pod);
        stop.send_replace(Some(Instant::now() + grace));
        loop {
            tokio::select! {
                Some((index, progress)) = reports.recv() => self.take(pod, index, progress),
                done = tasks.join_next() => if done.is_none() { break },
                Ok(()) = self.updates.changed() => {
                    if self.updates.borrow().is_none() {
                        // Removed by force: nobody waits for it any more.
                        stop.send_replace(Some(Instant::now()));
                    }
                }
            }
        }
        while let Ok((index, progress)) = reports.try_recv() {
            self.take(pod, index, progress);
        }
        self.view.stopped = true;
        self.publish();
        ended
    }

    /// Reads the switch of `podway lab ready`. Returns whether somebody has moved it.
    fn heed_switch(&mut self) -> bool {
        let off = self.updates.borrow().as_deref().is_some_and(readiness::is_off);
        std::mem::replace(&mut self.view.switched_off, off) != off
    }

    fn take(&mut self, pod: &Value, index: usize, progress: Progress) {
        let Some(view) = self.view.containers.get_mut(index) else { return };
        let name = view.name.clone();
        let news: Vec<String> =
            progress.warnings.iter().filter(|w| !view.progress.warnings.contains(w)).cloned().collect();
        let failed = match (&progress.last, &view.progress.last) {
            (Some(now), before) if before.as_ref() != Some(now) && now.code != 0 => Some(now.message.clone()),
            _ => None,
        };
        let unhealthy = newer(progress.unhealthy.as_ref(), view.progress.unhealthy.as_ref());
        let killed = newer(progress.killed.as_ref(), view.progress.killed.as_ref());
        view.progress = progress;
        if let Some(message) = unhealthy {
            self.event(pod, EventType::Warning, "Unhealthy", format!("container {name}: {message}"));
        }
        if let Some(message) = killed {
            let message = format!("container {name}: {message}, it is restarted");
            self.event(pod, EventType::Normal, "Killing", message);
        }
        for warning in news {
            self.event(pod, EventType::Warning, "PortNotServed", format!("container {name}: {warning}"));
        }
        if let Some(message) = failed {
            self.event(pod, EventType::Warning, "BackOff", format!("container {name} failed: {message}"));
        }
    }

    /// Takes everything of the pod off the node, as often as it takes.
    async fn clean(&mut self, pod: &Value) {
        let cgroup = self.cgroup();
        let emptied = tokio::task::spawn_blocking(move || {
            let empty = cgroup.kill_and_wait(KILL_PATIENCE)?;
            if empty { cgroup.remove() } else { Err(std::io::Error::other("processes survive SIGKILL")) }
        })
        .await;
        if let Ok(Err(error)) = emptied {
            self.event(pod, EventType::Warning, "FailedKillPod", error.to_string());
        }
        let mut wait = Duration::ZERO;
        while let Err(error) = self.sandbox.remove(&self.runner, &self.node).await {
            let (first, longest) = if error.try_again { TRY_AGAIN } else { AFTER_ERROR };
            wait = (wait * 2).clamp(first, longest);
            let text = format!("Failed to remove pod sandbox: {error}");
            self.event(pod, EventType::Warning, "FailedKillPod", text);
            tracing::warn!(pod = %self.key, %error, "sandbox removal");
            let _ = tokio::time::timeout(wait, self.node.gone()).await;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(pod = %self.key, %error, dir = %self.dir.display(), "pod's files stay");
        }
    }

    fn finalise(&self) {
        let options = DeleteOptions {
            precondition: Precondition { uid: Some(self.uid.clone()), resource_version: None },
            ..DeleteOptions::now()
        };
        match self.runner.store.delete(&self.key, &options) {
            Ok(_) => {}
            // Removed by force, and maybe made again under the same name.
            Err(error) if error.is_not_found() || error.is_conflict() => {}
            Err(error) => tracing::warn!(pod = %self.key, %error, "pod not finalised"),
        }
    }

    async fn sleep(&mut self, time: Duration) -> Woken {
        let end = Instant::now() + time;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(end) => return Woken::Other,
                changed = self.updates.changed() => {
                    if changed.is_err() || self.is_ending() {
                        return Woken::Ending;
                    }
                }
            }
        }
    }

    fn is_ending(&self) -> bool {
        self.updates.borrow().as_ref().is_none_or(|pod| !pod["metadata"]["deletionTimestamp"].is_null())
    }

    fn grace(&self, pod: &Value) -> Duration {
        let seconds = match self.updates.borrow().as_ref() {
            None => 0,
            Some(now) => now["metadata"]["deletionGracePeriodSeconds"]
                .as_u64()
                .or_else(|| pod["spec"]["terminationGracePeriodSeconds"].as_u64())
                .unwrap_or(DEFAULT_GRACE),
        };
        Duration::from_secs(seconds)
    }

    fn cgroup(&self) -> crate::cgroup::Cgroup {
        self.node.cgroup.child(&crate::spec::pod_file(&self.key.namespace, &self.key.name))
    }

    fn place(&self, pod: &Value) -> Place {
        Place {
            cgroup: self.cgroup(),
            netns: self.sandbox.netns.clone(),
            on: self.node.clone(),
            hostname: etc::hostname(pod, &self.node.plan.name),
            dir: self.dir.clone(),
            namespace: self.key.namespace.clone(),
            pod: self.key.name.clone(),
            node: self.node.plan.name.clone(),
            addresses: self.view.addresses.clone(),
            grace: Duration::from_secs(
                pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(DEFAULT_GRACE),
            ),
            api_service: self.runner.api_service,
        }
    }

    fn write_files(&self, pod: &Value) -> anyhow::Result<()> {
        self.cgroup().create()?;
        let (resolver, warnings) =
            etc::resolv_conf(pod, &self.runner.cluster_dns, &self.runner.node_resolver);
        for warning in warnings {
            self.event(pod, EventType::Warning, "DNSConfigForming", warning);
        }
        let plan = &self.node.plan;
        let entries: Vec<(IpAddr, String)> =
            plan.addresses.iter().map(|address| (*address, plan.name.clone())).collect();
        let hosts = etc::hosts(pod, &self.view.addresses, &self.node.plan.name, &entries);
        // Programs of a pod need not run as root.
        crate::state::write_with_mode(&self.dir.join("resolv.conf"), resolver.render().as_bytes(), 0o644)?;
        crate::state::write_with_mode(&self.dir.join("hosts"), hosts.as_bytes(), 0o644)
    }

    /// What runs, and what only the status shows: plain init containers are taken for done.
    fn specs(&self, pod: &Value) -> Vec<(Option<ContainerSpec>, ContainerView)> {
        let policy = RestartPolicy::of(get_str(pod, &["spec", "restartPolicy"]));
        let list = |field: &str| pod["spec"][field].as_array().into_iter().flatten();
        let mut names = HashSet::new();
        let mut out = Vec::new();
        for (container, init) in
            list("initContainers").map(|c| (c, true)).chain(list("containers").map(|c| (c, false)))
        {
            let sidecar = init && get_str(container, &["restartPolicy"]) == "Always";
            let mut spec =
                ContainerSpec::of(pod, container, if sidecar { RestartPolicy::Always } else { policy });
            if !is_label(&spec.name) {
                spec.broken = Some(format!("name: {:?} is no DNS label", spec.name));
            } else if !names.insert(spec.name.clone()) {
                spec.broken = Some(format!("name: {:?} is used by another container of the pod", spec.name));
            }
            let view = ContainerView {
                name: spec.name.clone(),
                image: spec.image.clone(),
                id: format!("podway://{}-{}", self.uid, out.len()),
                init,
                sidecar,
                progress: Progress::default(),
            };
            out.push(((!init || sidecar).then_some(spec), view));
        }
        out
    }

    fn publish(&self) {
        let now = Timestamp::now();
        let written = self.runner.store.modify(&self.key, Subresource::Status, |pod| {
            // A successor under the same name is none of ours.
            if get_str(pod, &["metadata", "uid"]) == self.uid {
                status::write(pod, &self.view, now);
            }
            Ok(())
        });
        match written {
            Ok(_) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => tracing::warn!(pod = %self.key, %error, "status not written"),
        }
    }

    fn event(&self, pod: &Value, type_: EventType, reason: &'static str, message: String) {
        events::record(&self.runner.store, pod, COMPONENT, type_, reason, message);
    }
}

/// What is counted higher than before.
fn newer(now: Option<&(u64, String)>, before: Option<&(u64, String)>) -> Option<String> {
    let (count, message) = now?;
    (before.is_none_or(|(known, _)| known < count)).then(|| message.clone())
}

/// The cluster's first family first: `podIP` is the first of `podIPs`.
fn order(mut addresses: Vec<IpAddr>, v4_first: bool) -> Vec<IpAddr> {
    addresses.sort_by_key(|a| a.is_ipv4() != v4_first);
    addresses
}

/// RFC 1123 label, which container names are.
fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}
