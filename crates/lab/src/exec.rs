//! Commands of people inside pods and nodes.

use std::ffi::OsString;
use std::path::Path;

use anyhow::bail;
use podway_link::{NETNS_DIR, Netns};
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::client::Client;
use crate::etc;
use crate::pod_exec::PodExec;
use crate::runner::container::environment_of;
use crate::spec::{LabName, pod_file};
use crate::state::StateDir;

/// A command in a pod, with the environment of a container (the first one, when none is named).
///
/// # Errors
/// When the lab, pod or container is not there, or the pod has no network yet.
pub async fn in_pod(
    client: &mut Client,
    lab: &LabName,
    namespace: &str,
    pod: &str,
    container: Option<&str>,
    command: Vec<OsString>,
) -> anyhow::Result<PodExec> {
    let (object, chosen) = find(client, namespace, pod, container).await?;
    let node = object["spec"]["nodeName"].as_str().unwrap_or_default();
    let dir = lab.pod_dir(namespace, pod);
    if node.is_empty() || !dir.join("hosts").exists() {
        bail!("pod {namespace}/{pod} does not run yet; podway lab status says why");
    }
    let netns = if object["spec"]["hostNetwork"].as_bool() == Some(true) {
        lab.node_netns(node)
    } else {
        lab.pod_netns(namespace, pod)
    };
    Ok(PodExec {
        cgroup: Some(Cgroup::of_lab(lab)?.child(node).child(&pod_file(namespace, pod))),
        netns: Some(Path::new(NETNS_DIR).join(netns)),
        hostname: Some(etc::hostname(&object, node)),
        hosts: Some(dir.join("hosts")),
        resolv_conf: Some(dir.join("resolv.conf")),
        own_sysfs: true,
        arg0: None,
        env: environment_of(&object, &chosen, node),
        command,
    })
}

/// A command of the client beyond the nodes, which has a route to the nodes' addresses alone. Files are the
/// machine's own.
///
/// # Errors
/// When the lab is not there.
pub fn outside(lab: &LabName, command: Vec<OsString>) -> anyhow::Result<PodExec> {
    if StateDir::of(lab).lab()?.is_none() {
        bail!("there is no lab {lab}; podway lab list shows those that are")
    }
    let cgroup = Cgroup::of_lab(lab)?.child("outside");
    cgroup.create()?;
    Ok(PodExec {
        cgroup: Some(cgroup),
        netns: Some(Path::new(NETNS_DIR).join(lab.outside_netns())),
        hostname: Some("outside".into()),
        command,
        ..PodExec::default()
    })
}

/// The shell that people get: bash where the machine has it.
#[must_use]
pub fn shell() -> Vec<OsString> {
    let bash = Path::new("/bin/bash");
    vec![if bash.exists() { bash.into() } else { "/bin/sh".into() }]
}

/// A command in a node's network namespace. Files are the machine's own.
///
/// # Errors
/// When the lab or the node is not there.
pub fn in_node(lab: &LabName, node: &str, command: Vec<OsString>) -> anyhow::Result<PodExec> {
    check_node(lab, node)?;
    Ok(PodExec {
        cgroup: Some(Cgroup::of_lab(lab)?.child(node).child("exec")),
        netns: Some(Path::new(NETNS_DIR).join(lab.node_netns(node))),
        hostname: Some(node.to_owned()),
        env: vec![
            ("NODE_NAME".into(), node.into()),
            // Which agent `podway cleanup` and `podway conntrack` are about.
            ("PODWAY_INSTANCE".into(), format!("{lab}/{node}").into()),
        ],
        command,
        ..PodExec::default()
    })
}

/// A pod, and one of its containers: the first one, when none is named.
pub(crate) async fn find(
    client: &mut Client,
    namespace: &str,
    pod: &str,
    container: Option<&str>,
) -> anyhow::Result<(Value, Value)> {
    let is_name =
        |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    if !is_name(namespace) || !is_name(pod) {
        bail!("{namespace}/{pod} is no pod's name; podway lab status lists them");
    }
    let object = client.read(&format!("/api/v1/namespaces/{namespace}/pods/{pod}")).await?;
    let containers: Vec<&Value> = ["containers", "initContainers"]
        .iter()
        .flat_map(|f| object["spec"][*f].as_array().into_iter().flatten())
        .collect();
    let chosen = match container {
        None => containers.first(),
        Some(name) => containers.iter().find(|c| c["name"] == name),
    };
    match chosen {
        Some(chosen) => {
            let chosen = (*chosen).clone();
            Ok((object, chosen))
        }
        None => {
            let names: Vec<&str> = containers.iter().filter_map(|c| c["name"].as_str()).collect();
            bail!(
                "pod {namespace}/{pod} has no container {}; it has: {}",
                container.unwrap_or("at all"),
                names.join(", ")
            )
        }
    }
}

/// Whether the lab has this node.
#[must_use]
pub fn is_node(lab: &LabName, node: &str) -> bool {
    nodes(lab).is_ok_and(|nodes| nodes.iter().any(|n| n == node))
}

/// Refuses a node that the lab does not have.
pub(crate) fn check_node(lab: &LabName, node: &str) -> anyhow::Result<()> {
    if StateDir::of(lab).lab()?.is_none() {
        bail!("there is no lab {lab}; podway lab list shows those that are")
    }
    let names = nodes(lab)?;
    if !names.iter().any(|n| n == node) {
        bail!("lab {lab} has no node {node}; it has: {}", names.join(", "));
    }
    Ok(())
}

/// The lab's nodes, by their namespaces: they are there even when nobody runs the lab any more.
pub(crate) fn nodes(lab: &LabName) -> anyhow::Result<Vec<String>> {
    let prefix = lab.netns_prefix();
    let all = Netns::list_named(&lab.node_netns("node-"))?;
    let mut names: Vec<String> =
        all.iter().filter_map(|n| n.strip_prefix(&prefix).map(str::to_owned)).collect();
    names.sort_by_key(|n| (n.len(), n.clone()));
    Ok(names)
}
