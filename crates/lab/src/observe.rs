//! What a lab looks like right now: nodes, pods, and why some are not ready. Read through the API, and link MTUs
//! from the kernel.

use std::collections::BTreeMap;
use std::net::IpAddr;

use podway_link::{Netlink, Netns};
use serde::Serialize;
use serde_json::Value;

use crate::client::Client;
use crate::nodes::POWER_ANNOTATION;
use crate::spec::LabName;
use crate::topology::UPLINK;

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// Name.
    pub name: String,
    /// Zone.
    pub zone: String,
    /// Addresses on the underlay.
    pub addresses: Vec<IpAddr>,
    /// Prefixes of its pods.
    pub pod_cidrs: Vec<String>,
    /// Whether its agent is ready.
    pub ready: bool,
    /// Whether somebody has stopped it.
    pub stopped: bool,
    /// Why not.
    pub message: String,
    /// MTU of its link to the fabric in bytes, from the kernel.
    pub uplink_mtu: Option<u32>,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Node; empty while it has none.
    pub node: String,
    /// Whether it shares the node's network.
    pub host_network: bool,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// `status.phase`.
    pub phase: String,
    /// Ready, or ended successfully.
    pub ready: bool,
    /// Why not.
    pub reason: String,
    /// It is being deleted.
    pub ending: bool,
    /// No waiting will help: it has no node to go to, or fails again and again.
    pub stuck: bool,
    /// Restarts of all containers.
    pub restarts: u64,
    /// MTU of its link in bytes, from the kernel.
    pub mtu: Option<u32>,
    /// TCP ports that stand-ins of the pod listen on.
    pub tcp_ports: Vec<u16>,
}

/// A workload that has not all of its pods yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unsettled {
    /// `Deployment shop/web`.
    pub name: String,
    /// What it waits for.
    pub reason: String,
    /// Its controller cannot read it.
    pub stuck: bool,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Observation {
    /// Nodes in order.
    pub nodes: Vec<NodeStatus>,
    /// Pods by namespace and name.
    pub pods: Vec<PodStatus>,
    /// Workloads that are not complete.
    pub unsettled: Vec<Unsettled>,
    /// Objects with a field that nobody can make sense of, with the field and the cause.
    pub malformed: Vec<String>,
}

impl Observation {
    /// Whether nodes, pods and workloads are all as they should be.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.unsettled.is_empty()
            && self.malformed.is_empty()
            && self.nodes.iter().all(|n| n.ready)
            && self.pods.iter().all(|p| p.ready)
    }

    /// Whether everything that is not ready is so for good.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        !self.is_settled()
            && self.nodes.iter().all(|n| n.ready)
            && self.pods.iter().all(|p| p.ready || p.stuck)
            // A workload that waits for a pod that is stuck is stuck as well.
            && (self.pods.iter().any(|p| p.stuck) || self.unsettled.iter().all(|u| u.stuck))
    }

    /// Pods that are ready, and all pods.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.pods.iter().filter(|p| p.ready).count(), self.pods.len())
    }
}

/// Looks at the lab.
///
/// # Errors
/// When the API server cannot be reached.
pub async fn observe(client: &mut Client, lab: &LabName) -> anyhow::Result<Observation> {
    let mut nodes: Vec<NodeStatus> = items(&client.read("/api/v1/nodes").await?).map(node).collect();
    // node-2 before node-10.
    nodes.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
    let complaints = complaints(&client.read("/api/v1/events?fieldSelector=type%3DWarning").await?);
    let mut pods: Vec<PodStatus> = items(&client.read("/api/v1/pods").await?).map(pod).collect();
    for pod in pods.iter_mut().filter(|p| !p.ready) {
        explain(pod, &nodes, complaints.get(&("Pod".into(), pod.namespace.clone(), pod.name.clone())));
    }
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    let mut unsettled = Vec::new();
    for (path, kind) in [
        ("/apis/apps/v1/deployments", "Deployment"),
        ("/apis/apps/v1/statefulsets", "StatefulSet"),
        ("/apis/apps/v1/daemonsets", "DaemonSet"),
        ("/apis/apps/v1/replicasets", "ReplicaSet"),
        ("/api/v1/replicationcontrollers", "ReplicationController"),
        ("/apis/batch/v1/jobs", "Job"),
    ] {
        let list = client.read(path).await?;
        unsettled.extend(items(&list).filter_map(|object| {
            let waits = waits_for(kind, object)?;
            let (namespace, name) = (meta(object, "namespace"), meta(object, "name"));
            let complaint = complaints.get(&(kind.into(), namespace.into(), name.into()));
            let stuck = complaint.is_some_and(|c| c.malformed);
            let reason = complaint.filter(|c| c.malformed).map_or(waits, |c| c.message.clone());
            Some(Unsettled { name: format!("{kind} {namespace}/{name}"), reason, stuck })
        }));
    }
    let malformed = complaints
        .iter()
        .filter(|((kind, ..), c)| c.malformed && !SHOWN_ELSEWHERE.contains(&kind.as_str()))
        .map(|((kind, namespace, name), c)| format!("{kind} {namespace}/{name}: {}", c.message))
        .collect();
    let mut out = Observation { nodes, pods, unsettled, malformed };
    read_mtus(lab, &mut out);
    Ok(out)
}

/// Kinds whose malformed objects are in the lists of pods and workloads.
const SHOWN_ELSEWHERE: [&str; 7] =
    ["Pod", "Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job"];

/// Reasons of events about objects that are wrong themselves: their own fields, or what they ask for is not to be had.
/// An API server would have refused them.
const REFUSALS: [&str; 9] = [
    "InvalidObject",
    "ClusterIPAlreadyAllocated",
    "ClusterIPOutOfRange",
    "ClusterIPsExhausted",
    "FamilyMismatch",
    "FamilyNotConfigured",
    "NodePortOutOfRange",
    "NodePortsExhausted",
    "PortAlreadyAllocated",
];

/// The newest warning about an object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Complaint {
    at: String,
    message: String,
    /// The object itself is wrong.
    malformed: bool,
    /// A probe failed.
    unhealthy: bool,
}

/// By kind, namespace and name.
fn complaints(events: &Value) -> BTreeMap<(String, String, String), Complaint> {
    let mut out = BTreeMap::<_, Complaint>::new();
    for event in items(events) {
        let about = |field: &str| event["involvedObject"][field].as_str().unwrap_or_default().to_owned();
        let new = Complaint {
            at: event["lastTimestamp"].as_str().unwrap_or_default().to_owned(),
            message: event["message"].as_str().unwrap_or_default().to_owned(),
            malformed: event["reason"].as_str().is_some_and(|reason| REFUSALS.contains(&reason)),
            unhealthy: event["reason"] == "Unhealthy",
        };
        let slot =
            out.entry((about("kind"), about("namespace"), about("name"))).or_insert_with(|| new.clone());
        // Times of this form sort as text.
        if new.at > slot.at {
            *slot = new;
        }
    }
    out
}

/// What the pod's own status does not say.
fn explain(pod: &mut PodStatus, nodes: &[NodeStatus], complaint: Option<&Complaint>) {
    if !pod.node.is_empty() && !nodes.iter().any(|n| n.name == pod.node) {
        pod.reason = format!("spec.nodeName: there is no node {}", pod.node);
        pod.stuck = true;
    } else if let Some(complaint) = complaint.filter(|c| c.malformed) {
        pod.reason.clone_from(&complaint.message);
        pod.stuck = true;
    } else if let Some(complaint) = complaint.filter(|c| c.unhealthy && pod.phase == "Running") {
        pod.reason.clone_from(&complaint.message);
    }
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn meta<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == type_)
}

fn node(object: &Value) -> NodeStatus {
    let ready = condition(object, "Ready");
    NodeStatus {
        name: meta(object, "name").to_owned(),
        zone: object["metadata"]["labels"]["topology.kubernetes.io/zone"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        addresses: object["status"]["addresses"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|a| a["type"] == "InternalIP")
            .filter_map(|a| a["address"].as_str()?.parse().ok())
            .collect(),
        pod_cidrs: object["spec"]["podCIDRs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|c| c.as_str().map(str::to_owned))
            .collect(),
        ready: ready.is_some_and(|c| c["status"] == "True"),
        stopped: object["metadata"]["annotations"][POWER_ANNOTATION] == "off",
        message: ready.and_then(|c| c["message"].as_str()).unwrap_or("no Ready condition").to_owned(),
        uplink_mtu: None,
    }
}

fn pod(object: &Value) -> PodStatus {
    let status = &object["status"];
    let phase = status["phase"].as_str().unwrap_or("Pending").to_owned();
    let ending = !object["metadata"]["deletionTimestamp"].is_null();
    let ready =
        phase == "Succeeded" || condition(object, "Ready").is_some_and(|c| c["status"] == "True") && !ending;
    let (reason, stuck) = if ready { (String::new(), false) } else { why_not(object, ending) };
    let containers = || {
        let list = |field: &str| object["spec"][field].as_array().into_iter().flatten();
        list("containers").chain(list("initContainers").filter(|c| c["restartPolicy"] == "Always"))
    };
    let tcp_ports = containers()
        .filter(|c| {
            let key = format!("lab.podway.dev/command.{}", c["name"].as_str().unwrap_or_default());
            object["metadata"]["annotations"][key].is_null()
        })
        .flat_map(|c| c["ports"].as_array().into_iter().flatten())
        .filter(|p| p["protocol"].as_str().unwrap_or("TCP") == "TCP")
        .filter_map(|p| u16::try_from(p["containerPort"].as_u64()?).ok())
        .collect();
    PodStatus {
        namespace: meta(object, "namespace").to_owned(),
        name: meta(object, "name").to_owned(),
        node: object["spec"]["nodeName"].as_str().unwrap_or_default().to_owned(),
        host_network: object["spec"]["hostNetwork"].as_bool() == Some(true),
        addresses: status["podIPs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|a| a["ip"].as_str()?.parse().ok())
            .collect(),
        restarts: status["containerStatuses"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|c| c["restartCount"].as_u64())
            .sum(),
        phase,
        ready,
        reason,
        ending,
        stuck,
        mtu: None,
        tcp_ports,
    }
}

fn why_not(pod: &Value, ending: bool) -> (String, bool) {
    if ending {
        return ("is being deleted".into(), false);
    }
    if pod["status"]["phase"] == "Failed" {
        return ("failed: a container ended with an error and is not to be restarted".into(), true);
    }
    if pod["spec"]["nodeName"].as_str().is_none_or(str::is_empty) {
        return match condition(pod, "PodScheduled") {
            Some(c) if c["status"] == "False" => {
                (format!("has no node: {}", c["message"].as_str().unwrap_or("no reason given")), true)
            }
            _ => ("waits for a node".into(), false),
        };
    }
    let statuses = ["initContainerStatuses", "containerStatuses"];
    let containers = statuses.iter().flat_map(|f| pod["status"][*f].as_array().into_iter().flatten());
    for container in containers {
        let waiting = &container["state"]["waiting"];
        let name = container["name"].as_str().unwrap_or_default();
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        if waiting["reason"] == "CrashLoopBackOff" {
            let cause = text(&container["lastState"]["terminated"]["message"]);
            return (format!("container {name} fails again and again: {cause}"), true);
        }
        if waiting["message"].is_string() {
            return (format!("container {name}: {}", text(&waiting["message"])), false);
        }
    }
    let ready = condition(pod, "Ready").and_then(|c| c["message"].as_str());
    let broken = pod["spec"]["containers"].as_array().is_none_or(Vec::is_empty);
    (ready.unwrap_or("waits for its node to start it").to_owned(), broken)
}

fn waits_for(kind: &str, object: &Value) -> Option<String> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let number = |v: &Value| v.as_u64().unwrap_or(0);
    // Owned ones are part of what their owner waits for.
    let owned = object["metadata"]["ownerReferences"].as_array().is_some_and(|o| !o.is_empty());
    if owned {
        return None;
    }
    if kind != "Job" && number(&status["observedGeneration"]) < number(&object["metadata"]["generation"]) {
        return Some("not seen by its controller yet".into());
    }
    let (want, have) = match kind {
        "DaemonSet" => (number(&status["desiredNumberScheduled"]), number(&status["numberReady"])),
        "Job" => {
            let done = ["active", "succeeded", "failed"].iter().map(|f| number(&status[*f])).sum::<u64>();
            let idle = spec["suspend"] == true || spec["parallelism"].as_u64() == Some(0);
            (u64::from(!idle), done.min(1))
        }
        _ => (spec["replicas"].as_u64().unwrap_or(1), number(&status["readyReplicas"])),
    };
    (have < want).then(|| format!("{have} of {want} pods are ready"))
}

fn read_mtus(lab: &LabName, out: &mut Observation) {
    let mtu = |netns: &str| -> Option<u32> {
        let namespace = Netns::open_named(netns).ok()?;
        Some(Netlink::open_in(&namespace).ok()?.link_by_name(UPLINK).ok()??.mtu)
    };
    for node in &mut out.nodes {
        node.uplink_mtu = mtu(&lab.node_netns(&node.name));
    }
    for pod in &mut out.pods {
        if !pod.host_network && !pod.addresses.is_empty() {
            pod.mtu = mtu(&lab.pod_netns(&pod.namespace, &pod.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_that_are_not_ready_say_why() {
        for (object, part, stuck) in [
            (json!({}), "waits for a node", false),
            (
                json!({"status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}]}}),
                "has no node: 0/3 nodes",
                true,
            ),
            (
                json!({"spec": {"nodeName": "n"}, "status": {"containerStatuses": [{"name": "a", "state":
                    {"waiting": {"reason": "CrashLoopBackOff", "message": "m"}}, "lastState": {"terminated": {"message": "taken"}}}]}}),
                "container a fails again and again: taken",
                true,
            ),
            (
                json!({"spec": {"nodeName": "n", "containers": [{}]}, "status": {"conditions":
                    [{"type": "Ready", "status": "False", "message": "CNI ADD: agent away"}]}}),
                "agent away",
                false,
            ),
            (json!({"spec": {"nodeName": "n"}, "status": {"phase": "Failed"}}), "failed", true),
            (json!({"metadata": {"deletionTimestamp": "x"}}), "deleted", false),
        ] {
            let pod = pod(&object);
            assert!(!pod.ready && pod.reason.contains(part), "{}", pod.reason);
            assert_eq!(pod.stuck, stuck, "{}", pod.reason);
        }
        let done = pod(&json!({"spec": {"nodeName": "n"}, "status": {"phase": "Succeeded"}}));
        assert!(done.ready);
    }

    #[test]
    fn malformed_objects_and_missing_nodes_explain_a_pod() {
        let events = json!({"items": [
            {"involvedObject": {"kind": "Pod", "namespace": "x", "name": "a"}, "reason": "BackOff", "message": "old",
             "lastTimestamp": "2026-01-01T00:00:00Z"},
            {"involvedObject": {"kind": "Pod", "namespace": "x", "name": "a"}, "reason": "InvalidObject",
             "message": "spec.containers: empty", "lastTimestamp": "2026-01-01T00:00:01Z"},
            {"involvedObject": {"kind": "Service", "namespace": "x", "name": "s"}, "reason": "NodePortOutOfRange"},
            {"involvedObject": {"kind": "Pod", "namespace": "x", "name": "slow"}, "reason": "Unhealthy"},
        ]});
        let complaints = complaints(&events);
        assert!(!complaints[&("Pod".into(), "x".into(), "slow".into())].malformed);
        assert!(complaints[&("Service".into(), "x".into(), "s".into())].malformed);
        let complaint = complaints.get(&("Pod".into(), "x".into(), "a".into()));
        let mut bad = pod(&json!({"metadata": {"name": "a", "namespace": "x"}}));
        explain(&mut bad, &[], complaint);
        assert!(bad.stuck && bad.reason == "spec.containers: empty", "{}", bad.reason);
        let mut lost = pod(&json!({"spec": {"nodeName": "node-9"}}));
        explain(&mut lost, &[], None);
        assert!(lost.stuck && lost.reason.contains("node-9"), "{}", lost.reason);
        let seen = Observation { nodes: vec![], pods: vec![bad], unsettled: vec![], malformed: vec![] };
        assert!(seen.is_stuck() && !seen.is_settled());
    }

    #[test]
    fn workloads_wait_for_their_pods() {
        for (kind, object, want) in [
            ("Deployment", json!({"spec": {"replicas": 2}, "status": {"readyReplicas": 1}}), Some("1 of 2")),
            ("Deployment", json!({"spec": {"replicas": 0}, "status": {}}), None),
            (
                "Deployment",
                json!({"metadata": {"generation": 2}, "status": {"observedGeneration": 1}}),
                Some("not seen"),
            ),
            ("DaemonSet", json!({"status": {"desiredNumberScheduled": 3, "numberReady": 3}}), None),
            ("ReplicaSet", json!({"metadata": {"ownerReferences": [{}]}, "spec": {"replicas": 9}}), None),
            ("Job", json!({"status": {}}), Some("0 of 1")),
            ("Job", json!({"spec": {"suspend": true}, "status": {}}), None),
            ("Job", json!({"status": {"active": 1}}), None),
        ] {
            let got = waits_for(kind, &object);
            assert_eq!(got.is_some(), want.is_some(), "{kind} {object}: {got:?}");
            assert!(got.unwrap_or_default().contains(want.unwrap_or_default()));
        }
    }
}
