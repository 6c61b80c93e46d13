//! Binds pods to nodes.
//!
//! Hard rules as kube-scheduler's: node name and selectors, taints, host ports, pod affinity and anti-affinity,
//! topology spread, the node's number of pods. CPU and memory requests do not count: stand-ins use next to nothing, and
//! a cluster's worth of requests would not fit on the machine that a lab runs on. Of the nodes that remain, the pod goes
//! to the most preferred one, then to where there are fewest of its siblings (node, then zone), then to the emptiest.

mod peers;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use serde_json::{Value, json};

use crate::op::rfc3339;
use crate::placement::{Effect, NodeInfo, NodeRules};
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::world::Pod;

use peers::{PeerRules, Placed, Term};

const COMPONENT: &str = "default-scheduler";
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";
const REGION: &str = "topology.kubernetes.io/region";

/// Bind what waits for a node, and say why where that is not possible.
pub(crate) fn reconcile(planner: &mut Planner<'_, '_>) {
    let world = planner.world;
    let mut waiting = Vec::new();
    for (i, pod) in world.pods.iter().enumerate() {
        if !pod.active() || planner.touched.contains(&i) {
            continue;
        }
        match pod.node {
            None => waiting.push(i),
            // The binding and its condition are two writes, as with the real one.
            Some(node) if world.node(node).is_some() => scheduled(planner, pod, true, None),
            Some(_) => {}
        }
    }
    if waiting.is_empty() {
        return;
    }
    // First come, first served.
    waiting.sort_by_key(|&i| (priority(&world.pods[i]), world.pods[i].object.created));
    let mut state = State::new(planner);
    for i in waiting {
        let pod = world.pods[i];
        match Wishes::parse(&pod) {
            Ok(Some(wishes)) => place(planner, &mut state, i, &wishes),
            Ok(None) => {}
            Err(error) => planner.malformed(&pod.object, &error.within("spec")),
        }
    }
}

/// Higher priorities first, so the negative.
fn priority(pod: &Pod<'_>) -> i64 {
    -read::number(pod.object.value, "spec.priority").unwrap_or(0)
}

/// A port on the node that a pod takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct HostPort<'a> {
    protocol: &'a str,
    /// None: all addresses.
    address: Option<IpAddr>,
    port: u16,
}

impl HostPort<'_> {
    fn conflicts(&self, other: &Self) -> bool {
        self.port == other.port
            && self.protocol == other.protocol
            && (self.address.is_none() || other.address.is_none() || self.address == other.address)
    }
}

fn host_ports<'a>(spec: &'a Value) -> Result<Vec<HostPort<'a>>, Malformed> {
    let on_host = read::boolean(spec, "hostNetwork")?.unwrap_or(false);
    let mut ports = Vec::new();
    for (c, container) in read::list(spec, "containers")?.iter().enumerate() {
        for (p, port) in read::list(container, "ports")
            .map_err(|e| e.within(&format!("containers[{c}]")))?
            .iter()
            .enumerate()
        {
            let inside = |error: Malformed| error.within(&format!("containers[{c}].ports[{p}]"));
            let mut number = read::port(port, "hostPort").map_err(inside)?;
            if number.is_none() && on_host {
                number = read::port(port, "containerPort").map_err(inside)?;
            }
            let Some(number) = number else { continue };
            let address = read::string(port, "hostIP").map_err(inside)?.and_then(|text| text.parse().ok());
            let protocol = read::string(port, "protocol").map_err(inside)?.unwrap_or("TCP");
            let address = address.filter(|address: &IpAddr| !address.is_unspecified());
            ports.push(HostPort { protocol, address, port: number });
        }
    }
    Ok(ports)
}

/// What a pod asks for.
struct Wishes<'a> {
    node: NodeRules<'a>,
    ports: Vec<HostPort<'a>>,
    peers: PeerRules<'a>,
}

impl<'a> Wishes<'a> {
    /// Nothing when the pod is not ours to schedule (another scheduler's, or held by a gate).
    fn parse(pod: &Pod<'a>) -> Result<Option<Self>, Malformed> {
        let Some(spec) = pod.object.value.get("spec") else {
            return Err(Malformed::new("", "required, but absent"));
        };
        let scheduler = read::string(spec, "schedulerName")?.unwrap_or("default-scheduler");
        if scheduler != "default-scheduler" || !read::list(spec, "schedulingGates")?.is_empty() {
            return Ok(None);
        }
        if read::list(spec, "containers")?.is_empty() {
            return Err(Malformed::new("containers", "at least one container is needed"));
        }
        let peers = PeerRules::parse(pod, spec)?;
        Ok(Some(Self { node: NodeRules::parse(spec)?, ports: host_ports(spec)?, peers }))
    }
}

/// A node, with what this plan puts on it.
struct Host<'a> {
    pods: usize,
    ports: Vec<HostPort<'a>>,
}

/// The nodes' load, kept up to date while pods are being placed.
struct State<'w, 'a> {
    nodes: Rc<Vec<NodeInfo<'a>>>,
    hosts: Vec<Host<'a>>,
    /// Pods with a node, for affinity: pod and node index.
    placed: Vec<Placed>,
    /// Placed pods that keep others away.
    repelling: Vec<(usize, usize, Vec<Term<'a>>)>,
    /// Pods of one controller on a node, and in a zone.
    siblings: HashMap<(&'a str, usize), usize>,
    zone_siblings: HashMap<(&'a str, &'a str), usize>,
    world: &'w crate::World<'a>,
}

impl<'w, 'a> State<'w, 'a> {
    fn new(planner: &Planner<'w, 'a>) -> Self {
        let nodes = Rc::clone(&planner.nodes);
        let by_name: HashMap<&str, usize> =
            nodes.iter().enumerate().map(|(i, n)| (n.object.name, i)).collect();
        let mut state = Self {
            hosts: nodes.iter().map(|_| Host { pods: 0, ports: Vec::new() }).collect(),
            nodes: Rc::clone(&nodes),
            placed: Vec::new(),
            repelling: Vec::new(),
            siblings: HashMap::new(),
            zone_siblings: HashMap::new(),
            world: planner.world,
        };
        for (i, pod) in planner.world.pods.iter().enumerate() {
            // A terminating pod holds its place until it is gone.
            let Some(&node) = pod.node.and_then(|name| by_name.get(name)) else { continue };
            if pod.finished() {
                continue;
            }
            let spec = pod.object.value.get("spec").unwrap_or(&Value::Null);
            // What is malformed about a pod that runs already does not matter to others.
            let ports = host_ports(spec).unwrap_or_default();
            let repels = if spec.pointer("/affinity/podAntiAffinity").is_some() {
                PeerRules::parse(pod, spec).map(|rules| rules.repel).unwrap_or_default()
            } else {
                Vec::new()
            };
            state.put(i, node, ports, repels);
        }
        state
    }

    fn put(&mut self, pod: usize, node: usize, ports: Vec<HostPort<'a>>, repels: Vec<Term<'a>>) {
        let host = &mut self.hosts[node];
        host.pods += 1;
        host.ports.extend(ports);
        self.placed.push(Placed { pod, node });
        if !repels.is_empty() {
            self.repelling.push((pod, node, repels));
        }
        let object = self.world.pods[pod].object;
        if let Some(controller) = object.controller.filter(|_| !object.deleting) {
            *self.siblings.entry((controller, node)).or_default() += 1;
            if let Some(zone) = self.nodes[node].label(ZONE) {
                *self.zone_siblings.entry((controller, zone)).or_default() += 1;
            }
        }
    }

    /// Why the pod cannot be on this node, apart from its peers.
    fn refusal(&self, wishes: &Wishes<'_>, node: usize) -> Option<String> {
        let info = &self.nodes[node];
        if info.object.deleting {
            return Some("node(s) were being deleted".into());
        }
        if let Some(taint) = wishes.node.untolerated(info, &[Effect::NoSchedule, Effect::NoExecute]) {
            let unschedulable = taint.key == "node.kubernetes.io/unschedulable";
            return Some(match taint.value {
                _ if unschedulable => "node(s) were unschedulable".into(),
                "" => format!("node(s) had untolerated taint {{{}}}", taint.key),
                value => format!("node(s) had untolerated taint {{{}: {value}}}", taint.key),
            });
        }
        if !wishes.node.select(&info.object) {
            return Some("node(s) didn't match Pod's node affinity/selector".into());
        }
        let host = &self.hosts[node];
        if wishes.ports.iter().any(|port| host.ports.iter().any(|taken| taken.conflicts(port))) {
            return Some("node(s) didn't have free ports for the requested pod ports".into());
        }
        info.max_pods.is_some_and(|max| host.pods >= max).then(|| "Too many pods".into())
    }

    /// Lower is better.
    fn score(
        &self,
        pod: &Pod<'_>,
        wishes: &Wishes<'_>,
        liking: i64,
        node: usize,
    ) -> (i64, usize, usize, usize, usize) {
        let info = &self.nodes[node];
        let controller = pod.object.controller.unwrap_or_default();
        let siblings = self.siblings.get(&(controller, node)).copied().unwrap_or(0);
        let zone = info.label(ZONE).unwrap_or_default();
        let in_zone = self.zone_siblings.get(&(controller, zone)).copied().unwrap_or(0);
        (-(wishes.node.preference(info) + liking), siblings, in_zone, self.hosts[node].pods, node)
    }
}

fn place<'a>(planner: &mut Planner<'_, 'a>, state: &mut State<'_, 'a>, i: usize, wishes: &Wishes<'a>) {
    let pod = planner.world.pods[i];
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let peers = peers::Check::new(state, i, &wishes.peers);
    let mut best = None;
    for node in 0..state.nodes.len() {
        let refusal =
            state.refusal(wishes, node).or_else(|| peers.refusal(&state.nodes[node]).map(str::to_owned));
        if let Some(reason) = refusal {
            *reasons.entry(reason).or_default() += 1;
            continue;
        }
        let score = state.score(&pod, wishes, peers.liking(&state.nodes[node]), node);
        if best.is_none_or(|(lowest, _)| score < lowest) {
            best = Some((score, node));
        }
    }
    let Some((_, node)) = best else {
        let message = unschedulable(state.nodes.len(), &reasons);
        scheduled(planner, &pod, false, Some(&message));
        planner.warning(&pod.object, COMPONENT, "FailedScheduling", message);
        return;
    };
    state.put(i, node, wishes.ports.clone(), wishes.peers.repel.clone());
    bind(planner, &pod, &state.nodes[node]);
}

/// `0/3 nodes are available: 1 node(s) …, 2 node(s) ….`
fn unschedulable(nodes: usize, reasons: &BTreeMap<String, usize>) -> String {
    if nodes == 0 {
        return "no nodes available to schedule pods".into();
    }
    let mut parts: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    parts.sort();
    format!("0/{nodes} nodes are available: {}.", parts.join(", "))
}

fn bind(planner: &mut Planner<'_, '_>, pod: &Pod<'_>, node: &NodeInfo<'_>) {
    let mut value = pod.object.value.clone();
    value["spec"]["nodeName"] = node.object.name.into();
    // Where it runs, for whoever looks at the pod alone (the PodTopologyLabels admission plugin does the same).
    for key in [ZONE, REGION] {
        if let Some(place) = node.label(key)
            && read::label(pod.object.labels, key).is_none()
        {
            read::object_mut(&mut value["metadata"], "labels")[key] = place.into();
        }
    }
    planner.update(value);
    let message =
        format!("Successfully assigned {}/{} to {}", pod.object.namespace, pod.object.name, node.object.name);
    planner.normal(&pod.object, COMPONENT, "Scheduled", message);
}

/// Write condition `PodScheduled` unless the pod has it so.
fn scheduled(planner: &mut Planner<'_, '_>, pod: &Pod<'_>, is: bool, message: Option<&str>) {
    let old = read::condition(pod.object.value, "PodScheduled");
    let status = if is { "True" } else { "False" };
    let same_status = old.and_then(|c| read::text(c, "status")) == Some(status);
    if same_status && old.and_then(|c| read::text(c, "message")) == message {
        return;
    }
    let now = rfc3339(planner.world.now);
    let since = old.filter(|_| same_status).and_then(|c| read::text(c, "lastTransitionTime")).unwrap_or(&now);
    let mut condition = json!({ "type": "PodScheduled", "status": status, "lastProbeTime": null, "lastTransitionTime": since });
    if let Some(message) = message {
        condition["reason"] = "Unschedulable".into();
        condition["message"] = message.into();
    }
    let mut status = match pod.object.value.get("status") {
        Some(status) if status.is_object() => status.clone(),
        _ => json!({ "phase": "Pending" }),
    };
    match status["conditions"].as_array_mut() {
        Some(conditions) => {
            conditions.retain(|c| read::text(c, "type") != Some("PodScheduled"));
            conditions.push(condition);
        }
        None => status["conditions"] = json!([condition]),
    }
    planner.status(&pod.object, status);
}

#[cfg(test)]
mod tests;
