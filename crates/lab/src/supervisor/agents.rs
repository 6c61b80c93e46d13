//! Node agents: one process per node, started again when it ends, and the node's `Ready` condition from its health.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;
use podway_apiserver::{ResourceKey, Store, Subresource};
use podway_link::Netns;
use podway_workloads::{EventType, rfc3339};
use serde_json::json;
use tokio::process::Child;

use crate::events;
use crate::runner::container::enter;
use crate::runner::status::set_condition;
use crate::runner::{NodeContext, Power};
use crate::spec::{AGENT_HEALTH_PORT, LabSpec};

/// First wait before an agent is started again; doubles up to the longest.
const BACKOFF: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// An agent that ran this long gets the first wait again.
const STABLE: Duration = Duration::from_secs(30);
/// Between two looks at an agent's health: until it is ready, and afterwards.
const LOOK_STARTING: Duration = Duration::from_millis(100);
const LOOK_READY: Duration = Duration::from_secs(1);
/// How long an agent may take to say how it is.
const HEALTH_TIMEOUT: Duration = Duration::from_millis(800);
/// Reason of a condition.
const NOT_READY: &str = "AgentNotReady";
/// An answer longer than this is cut.
const HEALTH_LIMIT: u64 = 4096;

/// Keeps the agent of a node running.
pub(super) async fn keep(spec: LabSpec, node: Arc<NodeContext>, store: Arc<Store>) {
    let mut backoff = BACKOFF;
    loop {
        if node.power() != Power::On {
            publish(&store, &node, Err(("NodeStopped", &stopped(&node))));
            node.on().await;
            if node.power() == Power::Gone {
                return;
            }
            backoff = BACKOFF;
        }
        let begun = Instant::now();
        let cause = match start(&spec, &node) {
            Ok(mut child) => watch(&mut child, &node, &store).await,
            Err(e) => format!("{e:#}"),
        };
        if node.power() != Power::On {
            continue;
        }
        let log = spec.name.node_dir(&node.plan.name).join("agent.log");
        let message = format!("the agent ended: {cause}; its log is {}", log.display());
        tracing::warn!(node = node.plan.name, message);
        publish(&store, &node, Err((NOT_READY, &message)));
        if let Ok(object) = store.get(&key(&node)) {
            events::record(&store, &object, "podway-lab", EventType::Warning, "AgentEnded", message);
        }
        if begun.elapsed() > STABLE {
            backoff = BACKOFF;
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

fn start(spec: &LabSpec, node: &NodeContext) -> anyhow::Result<Child> {
    let dir = spec.name.node_dir(&node.plan.name);
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("agent.log"))
        .with_context(|| format!("open {}", dir.join("agent.log").display()))?;
    let mut command = enter(Some(&node.cgroup.child("agent")), Some(&node.netns));
    command
        .args(["--arg0", "podway", "--", "/proc/self/exe", "agent"])
        .args(["--node-name", &node.plan.name])
        .arg("--kubeconfig")
        .arg(dir.join("kubeconfig"))
        .args(["--instance", &format!("{}/{}", spec.name, node.plan.name)])
        .args(["--mode", spec.mode.as_str()])
        .args(["--vxlan-port", &spec.vxlan_port.to_string()])
        .args(["--vxlan-vni", &spec.vxlan_vni.to_string()])
        .args(["--log-format", "text"]);
    // Sockets of this node's processes, and of no others on this machine.
    command.args(["--service-mode", spec.service_mode.as_str()]).arg("--cgroup").arg(node.cgroup.path());
    if spec.masquerade_all {
        command.arg("--masquerade-all");
    }
    if let Some(scheduler) = &spec.ipvs_scheduler {
        command.args(["--ipvs-scheduler", scheduler]);
    }
    for range in spec.service_cidrs() {
        command.args(["--service-cidr", &range.to_string()]);
    }
    if let Some(mtu) = spec.pod_mtu {
        command.args(["--pod-mtu", &mtu.to_string()]);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/").process_group(0);
    command.spawn().context("start the agent")
}

/// Follows the agent's health until it ends. Returns how it ended.
async fn watch(child: &mut Child, node: &Arc<NodeContext>, store: &Store) -> String {
    let mut ready = false;
    loop {
        let pause = if ready { LOOK_READY } else { LOOK_STARTING };
        tokio::select! {
            status = child.wait() => return match status {
                Ok(status) => status.to_string(),
                Err(e) => format!("wait: {e}"),
            },
            () = node.off() => {
                // The whole node is being killed; this only makes sure.
                let _ = child.start_kill();
                let _ = child.wait().await;
                return "the node was stopped".into();
            }
            () = tokio::time::sleep(pause) => {}
        }
        let place = node.clone();
        let health =
            tokio::task::spawn_blocking(move || health(&place)).await.unwrap_or_else(|e| Err(e.to_string()));
        ready = health.is_ok();
        if node.power() == Power::On {
            publish(store, node, health.as_ref().map(drop).map_err(|cause| (NOT_READY, cause.as_str())));
        }
    }
}

/// Asks the agent's `/readyz` from within its namespace.
fn health(node: &NodeContext) -> Result<(), String> {
    let ask = || -> io::Result<String> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, AGENT_HEALTH_PORT));
        let mut stream = TcpStream::connect_timeout(&address, HEALTH_TIMEOUT)?;
        stream.set_read_timeout(Some(HEALTH_TIMEOUT))?;
        stream.set_write_timeout(Some(HEALTH_TIMEOUT))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(HEALTH_LIMIT).read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = Netns::open(&node.netns)
        .and_then(|namespace| namespace.run(ask))
        .map_err(|e| e.to_string())?
        .map_err(|e| format!("health at port {AGENT_HEALTH_PORT}: {e}"))?;
    judge(&answer)
}

fn judge(answer: &str) -> Result<(), String> {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let code = head.split(' ').nth(1).unwrap_or_default();
    if code == "200" {
        return Ok(());
    }
    let body: String = body.trim().chars().take(500).collect();
    Err(format!("not ready ({code}): {body}"))
}

fn key(node: &NodeContext) -> ResourceKey {
    ResourceKey::new("", "nodes", "", &*node.plan.name)
}

fn stopped(node: &NodeContext) -> String {
    format!("the node is stopped; podway lab node start {} starts it", node.plan.name)
}

/// Writes the node's `Ready` condition: that it is, or reason and message.
fn publish(store: &Store, node: &NodeContext, health: Result<(), (&str, &str)>) {
    let now = Timestamp::now();
    let (holds, reason, message) = match health {
        Ok(()) => (true, "AgentReady", "the agent is ready"),
        Err((reason, cause)) => (false, reason, cause),
    };
    let current = store.get(&key(node)).ok();
    let known = current
        .as_ref()
        .and_then(|n| n["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == "Ready"));
    let status = if holds { "True" } else { "False" };
    // A heartbeat alone is no news; writing it every second would only wake every watcher.
    if known.is_some_and(|c| c["status"] == status && c["reason"] == reason && c["message"] == message) {
        return;
    }
    let written = store.modify(&key(node), Subresource::Status, |object| {
        let mut conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        set_condition(&mut conditions, "Ready", holds, reason, message, now);
        if let Some(ready) = conditions.iter_mut().find(|c| c["type"] == "Ready") {
            ready["lastHeartbeatTime"] = json!(rfc3339(now));
        }
        object["status"]["conditions"] = conditions.into();
        Ok(())
    });
    if let Err(error) = written {
        tracing::warn!(node = node.plan.name, %error, "node status not written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_answers_are_judged_by_their_code() {
        assert_eq!(judge("HTTP/1.1 200 OK\r\n\r\nok"), Ok(()));
        for (answer, part) in [
            ("HTTP/1.1 503 Service Unavailable\r\nA: b\r\n\r\nno API server\n", "(503): no API server"),
            ("", "not ready ()"),
        ] {
            assert!(judge(answer).expect_err("not ready").contains(part), "{answer}");
        }
    }
}
