//! A pod's network namespace and its attachment by the CNI plugin, run as a container runtime runs it.
//!
//! CNI specification 1.1.0: <https://www.cni.dev/docs/spec/>.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use podway_apiserver::get_str;
use podway_link::{NETNS_DIR, Netns};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use super::{NodeContext, Power, Runner};
use crate::topology::prefer_cubic;

/// A plugin that has not answered by then is killed. The kubelet's own limit for a sandbox is 4 minutes.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(60);
/// Interface name in the pod.
const INTERFACE: &str = "eth0";
/// CNI code "try again later".
const TRY_AGAIN: u64 = 11;

/// Why a sandbox could not be made or removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct SandboxError {
    pub(super) message: String,
    /// The plugin asks for another try: nothing is wrong with the pod.
    pub(super) try_again: bool,
}

impl SandboxError {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), try_again: false }
    }
}

/// A pod's place on its node.
#[derive(Debug, Clone)]
pub(super) struct Sandbox {
    /// As the runtime names it towards the plugin.
    pub(super) id: String,
    /// Network namespace: the pod's own, or the node's for `hostNetwork`.
    pub(super) netns: PathBuf,
    /// Name of the pod's own namespace.
    own: Option<String>,
    cni_args: String,
    /// What the runtime asks the plugin for by capability.
    runtime_config: Result<Value, SandboxError>,
}

impl Sandbox {
    pub(super) fn of(runner: &Runner, node: &NodeContext, pod: &Value) -> Self {
        let text = |path: &[&str]| get_str(pod, path).to_owned();
        let (namespace, name, uid) =
            (text(&["metadata", "namespace"]), text(&["metadata", "name"]), text(&["metadata", "uid"]));
        let id = format!("{}-{uid}", runner.lab);
        let host_network = pod["spec"]["hostNetwork"].as_bool() == Some(true);
        let own = (!host_network).then(|| runner.lab.pod_netns(&namespace, &name));
        Self {
            netns: own.as_ref().map_or_else(|| node.netns.clone(), |n| Path::new(NETNS_DIR).join(n)),
            own,
            cni_args: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
                 K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID={uid}"
            ),
            runtime_config: runtime_config(pod),
            id,
        }
    }

    /// Makes the namespace and attaches it. Returns the pod's addresses in the order of the plugin's result. May
    /// be called again after a failure.
    pub(super) async fn create(
        &self,
        runner: &Runner,
        node: &NodeContext,
    ) -> Result<Vec<IpAddr>, SandboxError> {
        let Some(name) = self.own.clone() else { return Ok(node.plan.addresses.clone()) };
        // The limit is shared by all pods and never closed.
        let _permit = runner.sandboxes.acquire().await.expect("the semaphore is never closed");
        blocking(move || match Netns::create_named(&name) {
            Ok(namespace) => prefer_cubic(&namespace),
            Err(e) if e.is_exists() => Ok(()),
            Err(e) => Err(e),
        })
        .await?;
        let result = self.plugin(runner, node, "ADD").await?;
        addresses(&result)
    }

    /// Detaches and removes the namespace. May be called again, and when nothing was made.
    pub(super) async fn remove(&self, runner: &Runner, node: &NodeContext) -> Result<(), SandboxError> {
        let Some(name) = self.own.clone() else { return Ok(()) };
        // There is no agent to ask on a node that is being removed, and nothing of it stays anyway.
        if node.power() != Power::Gone {
            self.plugin(runner, node, "DEL").await?;
        }
        blocking(move || Netns::delete_named(&name)).await
    }

    async fn plugin(
        &self,
        runner: &Runner,
        node: &NodeContext,
        command: &str,
    ) -> Result<Value, SandboxError> {
        let config = json!({
            "cniVersion": "1.1.0",
            "name": "podway",
            "type": "podway-cni",
            "socket": node.agent_socket,
            "runtimeConfig": if command == "ADD" { self.runtime_config.clone()? } else { Value::Null },
        });
        let fail = |what: &str, e: std::io::Error| SandboxError::new(format!("{what} CNI plugin: {e}"));
        // As a container runtime does it: in the node's namespace, with the call in the environment.
        let mut child = super::container::enter(Some(&node.cgroup.child("cni")), Some(&node.netns))
            .arg("--")
            .arg(&runner.cni_plugin)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.id)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", &self.cni_args)
            .env("CNI_PATH", runner.cni_plugin.parent().unwrap_or(Path::new("/")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| fail("start", e))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin that refuses its environment may end without reading; its own answer says more.
            let _ = stdin.write_all(config.to_string().as_bytes()).await;
        }
        let output = tokio::time::timeout(PLUGIN_TIMEOUT, child.wait_with_output())
            .await
            .map_err(|_| {
                SandboxError::new(format!("CNI {command}: no answer in {} s", PLUGIN_TIMEOUT.as_secs()))
            })?
            .map_err(|e| fail("wait for", e))?;
        if output.status.success() {
            if command != "ADD" {
                return Ok(Value::Null);
            }
            return serde_json::from_slice(&output.stdout)
                .map_err(|e| SandboxError::new(format!("CNI {command}: result is not JSON: {e}")));
        }
        Err(plugin_error(command, &output.stdout, &output.stderr, &output.status.to_string()))
    }
}

/// Host ports and bandwidth, as a kubelet and its runtime make them of a pod.
fn runtime_config(pod: &Value) -> Result<Value, SandboxError> {
    let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
    let ports = containers.filter_map(|c| c["ports"].as_array()).flatten();
    let mappings: Vec<Value> = ports
        .filter(|port| port["hostPort"].as_u64().is_some_and(|n| n != 0))
        .map(|port| {
            let mut mapping = json!({"hostPort": port["hostPort"], "containerPort": port["containerPort"]});
            for field in ["protocol", "hostIP"] {
                if !port[field].is_null() {
                    mapping[field] = port[field].clone();
                }
            }
            mapping
        })
        .collect();
    let mut config = json!({});
    if !mappings.is_empty() {
        config["portMappings"] = mappings.into();
    }
    for direction in ["ingress", "egress"] {
        let name = format!("kubernetes.io/{direction}-bandwidth");
        let Some(text) = pod["metadata"]["annotations"][&name].as_str() else { continue };
        let rate = bits(text).ok_or_else(|| {
            SandboxError::new(format!(
                "annotation {name} is {text:?}; it must be a whole number of bits a second, such as 10M"
            ))
        })?;
        config["bandwidth"][format!("{direction}Rate")] = rate.into();
        // What containerd writes: an annotation has no burst.
        config["bandwidth"][format!("{direction}Burst")] = u32::MAX.into();
    }
    Ok(config)
}

/// A Kubernetes quantity that is whole, with a suffix from `k` to `P` or `Ki` to `Pi`.
fn bits(quantity: &str) -> Option<u64> {
    let end = quantity.find(|c: char| !c.is_ascii_digit()).unwrap_or(quantity.len());
    let (number, suffix) = quantity.split_at(end);
    let factor = match suffix {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

async fn blocking(f: impl FnOnce() -> podway_link::Result<()> + Send + 'static) -> Result<(), SandboxError> {
    match tokio::task::spawn_blocking(f).await {
        Ok(result) => result.map_err(|e| SandboxError::new(e.to_string())),
        Err(e) => Err(SandboxError::new(format!("network namespace: {e}"))),
    }
}

fn addresses(result: &Value) -> Result<Vec<IpAddr>, SandboxError> {
    let list: Vec<IpAddr> = result["ips"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
        .collect();
    if list.is_empty() {
        return Err(SandboxError::new(format!("CNI ADD: the result has no address: {result}")));
    }
    Ok(list)
}

fn plugin_error(command: &str, stdout: &[u8], stderr: &[u8], status: &str) -> SandboxError {
    let stderr = String::from_utf8_lossy(stderr);
    let stderr = stderr.trim();
    let Ok(error) = serde_json::from_slice::<Value>(stdout) else {
        return SandboxError::new(format!("CNI {command}: {status}: {stderr}"));
    };
    let code = error["code"].as_u64().unwrap_or(0);
    let mut message = format!("CNI {command}: {} (code {code})", get_str(&error, &["msg"]));
    let details = get_str(&error, &["details"]);
    if !details.is_empty() {
        message.push_str(": ");
        message.push_str(details);
    }
    SandboxError { message, try_again: code == TRY_AGAIN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_ports_and_limits_are_asked_for() {
        let pod = json!({
            "metadata": {"annotations": {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "2Ki"}},
            "spec": {"containers": [
                {"ports": [{"containerPort": 80, "hostPort": 8080, "protocol": "TCP"}, {"containerPort": 81}]},
                {"ports": [{"containerPort": 53, "hostPort": 53, "protocol": "UDP", "hostIP": "127.0.0.1"}]},
                {},
            ]},
        });
        let want = json!({
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "TCP"},
                {"hostPort": 53, "containerPort": 53, "protocol": "UDP", "hostIP": "127.0.0.1"},
            ],
            "bandwidth": {
                "ingressRate": 10_000_000, "ingressBurst": u32::MAX, "egressRate": 2048, "egressBurst": u32::MAX,
            },
        });
        assert_eq!(runtime_config(&pod), Ok(want));
        let soon = json!({"metadata": {"annotations": {"kubernetes.io/egress-bandwidth": "soon"}}});
        let error = runtime_config(&soon).unwrap_err();
        assert!(error.message.contains("egress-bandwidth is \"soon\""), "{error}");
        assert_eq!(runtime_config(&json!({"spec": {"containers": [{"name": "c"}]}})), Ok(json!({})));
        for (text, want) in [
            ("1k", Some(1000)),
            ("2Mi", Some(2 << 20)),
            ("7", Some(7)),
            ("1.5M", None),
            ("", None),
            ("99999P", None),
        ] {
            assert_eq!(bits(text), want, "{text}");
        }
    }

    #[test]
    fn results_and_errors_of_plugins_are_understood() {
        let v = json!({"ips": [{"address": "10.244.1.2/32"}, {"address": "fd00::2/128"}, {"address": 5}]});
        assert_eq!(addresses(&v).map(|a| a.len()), Ok(2));
        assert!(addresses(&json!({})).is_err());
        for (stdout, stderr, part, again) in [
            (
                r#"{"code": 11, "msg": "agent away", "details": "no socket"}"#,
                "",
                "agent away (code 11): no socket",
                true,
            ),
            (r#"{"code": 7, "msg": "bad"}"#, "", "bad (code 7)", false),
            ("", "exec failed", "exit status: 1: exec failed", false),
        ] {
            let e = plugin_error("ADD", stdout.as_bytes(), stderr.as_bytes(), "exit status: 1");
            assert!(e.message.contains(part), "{e}");
            assert_eq!(e.try_again, again);
        }
    }
}
