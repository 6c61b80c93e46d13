//! What people do to the nodes of a running lab: more of them, fewer, without power, and with it again.
//!
//! All of it is said to the API server; the supervisor acts on what the Node objects say.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use http::Method;
use podway_link::Netns;
use serde_json::{Value, json};

use crate::client::Client;
use crate::exec;
use crate::spec::{LabName, MAX_NODES};
use crate::state::StateDir;
use crate::supervisor;

/// Annotation on a Node: the network namespace that is the node.
pub(crate) const NETNS_ANNOTATION: &str = "lab.podway.dev/netns";
/// Annotation on a Node: `off` when the node is stopped.
pub(crate) const POWER_ANNOTATION: &str = "lab.podway.dev/power";

/// How long a node may take to come, to go, or to change its power.
const LIMIT: Duration = Duration::from_secs(75);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// Adds a node with the next free number, and waits until its agent is ready. Returns its name.
///
/// # Errors
/// When the lab is full or the node does not come up in time.
pub async fn add(client: &mut Client, lab: &LabName, zone: Option<&str>) -> anyhow::Result<String> {
    let spec = StateDir::of(lab).lab()?.with_context(|| format!("there is no lab {lab}"))?.spec;
    let list = client.read("/api/v1/nodes").await?;
    let taken: Vec<u16> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|n| n["metadata"]["name"].as_str()?.strip_prefix("node-")?.parse().ok())
        .collect();
    let Some(index) = next_index(&taken) else { bail!("lab {lab} has {MAX_NODES} nodes, which is the most") };
    let mut plan = spec.node_plan(index);
    if let Some(zone) = zone {
        zone.clone_into(&mut plan.zone);
    }
    let object = supervisor::node_object(&spec, &plan);
    client.call(Method::POST, "/api/v1/nodes", Some(&object)).await?.ok()?;
    wait(client, &plan.name, "not ready", is_ready).await?;
    Ok(plan.name)
}

/// After the highest one; the lowest free one when there is none after it.
fn next_index(taken: &[u16]) -> Option<u16> {
    let after = taken.iter().max().map_or(1, |max| max.saturating_add(1));
    std::iter::once(after).chain(1..=MAX_NODES).find(|i| (1..=MAX_NODES).contains(i) && !taken.contains(i))
}

/// Removes a node: its pods are deleted and have their termination grace, then everything of it goes.
///
/// # Errors
/// When there is no such node, or it is not gone in time.
pub async fn remove(client: &mut Client, lab: &LabName, node: &str) -> anyhow::Result<()> {
    exec::check_node(lab, node)?;
    client.call(Method::DELETE, &path(node), None).await?.ok()?;
    let end = Instant::now() + LIMIT;
    while Netns::list_named(&lab.node_netns(node))?.contains(&lab.node_netns(node)) {
        if Instant::now() >= end {
            bail!("{node} is not gone after {} s; podway lab logs says why", LIMIT.as_secs());
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Takes the power from a node, or gives it back, and waits until that is so.
///
/// # Errors
/// When there is no such node, or it does not follow in time.
pub async fn power(client: &mut Client, lab: &LabName, node: &str, on: bool) -> anyhow::Result<()> {
    exec::check_node(lab, node)?;
    let value = if on { Value::Null } else { "off".into() };
    client.merge(&path(node), &json!({"metadata": {"annotations": {POWER_ANNOTATION: value}}})).await?;
    if on {
        wait(client, node, "not ready", is_ready).await
    } else {
        wait(client, node, "not stopped", |node| ready(node).is_some_and(|c| c["reason"] == "NodeStopped"))
            .await
    }
}

fn path(node: &str) -> String {
    format!("/api/v1/nodes/{node}")
}

fn ready(node: &Value) -> Option<&Value> {
    node["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == "Ready")
}

fn is_ready(node: &Value) -> bool {
    ready(node).is_some_and(|c| c["status"] == "True")
}

async fn wait(
    client: &mut Client,
    node: &str,
    otherwise: &str,
    holds: impl Fn(&Value) -> bool,
) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let object = client.read(&path(node)).await?;
        if holds(&object) {
            return Ok(());
        }
        if Instant::now() >= end {
            let cause =
                ready(&object).and_then(|c| c["message"].as_str()).unwrap_or("nothing is known of it");
            bail!(
                "{node} is {otherwise} after {} s: {cause}; podway lab logs {node} says more",
                LIMIT.as_secs()
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_used_again_only_when_there_are_no_others() {
        let all: Vec<u16> = (1..=MAX_NODES).collect();
        for (taken, want) in [
            (vec![], Some(1)),
            (vec![1, 2, 3], Some(4)),
            (vec![3], Some(4)),
            (vec![MAX_NODES, 1], Some(2)),
            (all, None),
        ] {
            assert_eq!(next_index(&taken), want);
        }
    }
}
