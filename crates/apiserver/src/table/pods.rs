//! Rows of pods, nodes, namespaces and events.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::Cells;
use super::format::{NONE, UNKNOWN, age, count, duration, since, text_or};
use crate::json::{at, get_array, get_int, get_str, is_terminating, parse_time};
use crate::kinds::KindInfo;

pub(super) fn printer(kind: &KindInfo) -> Option<(&'static str, Cells)> {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => {
            Some(("Ready|Status|Restarts|Age|*IP|*Node|*Nominated Node|*Readiness Gates", pod as Cells))
        }
        ("", "Node") => Some((
            "Status|Roles|Age|Version|*Internal-IP|*External-IP|*OS-Image|*Kernel-Version|*Container-Runtime",
            node,
        )),
        ("", "Namespace") => Some(("Status|Age", namespace)),
        _ => None,
    }
}

/// What the containers of a pod add up to.
struct Summary {
    status: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: Option<Timestamp>,
}

fn pod(pod: &Value, now: Timestamp) -> Vec<Value> {
    let summary = summarize(pod);
    let restarts = match summary.last_restart {
        Some(at) if summary.restarts != 0 => {
            format!("{} ({} ago)", summary.restarts, duration(now.duration_since(at).as_secs()))
        }
        _ => summary.restarts.to_string(),
    };
    let gates = get_array(pod, &["spec", "readinessGates"]);
    let passed =
        gates.iter().filter(|gate| condition(pod, get_str(gate, &["conditionType"])) == "True").count();
    let gates = if gates.is_empty() { NONE.to_owned() } else { format!("{passed}/{}", gates.len()) };
    let ip = get_array(pod, &["status", "podIPs"]).first().map_or("", |ip| get_str(ip, &["ip"]));
    let ip = if ip.is_empty() { text_or(pod, &["status", "podIP"], NONE) } else { json!(ip) };
    vec![
        json!(format!("{}/{}", summary.ready, summary.total)),
        json!(summary.status),
        json!(restarts),
        age(pod, now),
        ip,
        text_or(pod, &["spec", "nodeName"], NONE),
        text_or(pod, &["status", "nominatedNodeName"], NONE),
        json!(gates),
    ]
}

fn condition<'a>(object: &'a Value, type_: &str) -> &'a str {
    get_array(object, &["status", "conditions"])
        .iter()
        .find(|condition| condition["type"] == type_)
        .map_or("", |condition| get_str(condition, &["status"]))
}

fn exit_text(terminated: &Value) -> String {
    match get_int(terminated, &["signal"]) {
        Some(signal) if signal != 0 => format!("Signal:{signal}"),
        _ => format!("ExitCode:{}", get_int(terminated, &["exitCode"]).unwrap_or(0)),
    }
}

impl Summary {
    fn count_restarts(&mut self, container: &Value) {
        self.restarts = self.restarts.saturating_add(get_int(container, &["restartCount"]).unwrap_or(0));
        let finished = parse_time(get_str(container, &["lastState", "terminated", "finishedAt"]));
        self.last_restart = self.last_restart.max(finished);
    }

    /// Init containers, in order, up to the first that has not done its part. True if there is one.
    fn add_init_containers(&mut self, pod: &Value, sidecar_restarts: &mut i64) -> bool {
        let declared = get_array(pod, &["spec", "initContainers"]);
        let is_sidecar = |name: &str| {
            declared
                .iter()
                .any(|container| container["name"] == name && container["restartPolicy"] == "Always")
        };
        self.total += declared.iter().filter(|container| container["restartPolicy"] == "Always").count();
        for (index, container) in get_array(pod, &["status", "initContainerStatuses"]).iter().enumerate() {
            self.count_restarts(container);
            let sidecar = is_sidecar(get_str(container, &["name"]));
            if sidecar {
                *sidecar_restarts =
                    sidecar_restarts.saturating_add(get_int(container, &["restartCount"]).unwrap_or(0));
            }
            let waiting = get_str(container, &["state", "waiting", "reason"]);
            match at(container, &["state", "terminated"]) {
                Some(terminated) if get_int(terminated, &["exitCode"]) == Some(0) => continue,
                _ if sidecar && container["started"] == true => {
                    self.ready += usize::from(container["ready"] == true);
                    continue;
                }
                Some(terminated) => {
                    self.status = match get_str(terminated, &["reason"]) {
                        "" => format!("Init:{}", exit_text(terminated)),
                        reason => format!("Init:{reason}"),
                    };
                }
                None if !waiting.is_empty() && waiting != "PodInitializing" => {
                    self.status = format!("Init:{waiting}");
                }
                None => self.status = format!("Init:{index}/{}", declared.len()),
            }
            return true;
        }
        false
    }

    fn add_containers(&mut self, pod: &Value) {
        let mut any_running = false;
        for container in get_array(pod, &["status", "containerStatuses"]).iter().rev() {
            self.count_restarts(container);
            let waiting = get_str(container, &["state", "waiting", "reason"]);
            match at(container, &["state", "terminated"]) {
                _ if !waiting.is_empty() => waiting.clone_into(&mut self.status),
                Some(terminated) => {
                    self.status = match get_str(terminated, &["reason"]) {
                        "" => exit_text(terminated),
                        reason => reason.to_owned(),
                    };
                }
                None if container["ready"] == true && at(container, &["state", "running"]).is_some() => {
                    any_running = true;
                    self.ready += 1;
                }
                None => {}
            }
        }
        if self.status == "Completed" && any_running {
            let ready = condition(pod, "Ready") == "True";
            (if ready { "Running" } else { "NotReady" }).clone_into(&mut self.status);
        }
    }
}

fn summarize(pod: &Value) -> Summary {
    let phase = get_str(pod, &["status", "phase"]);
    let reason = get_str(pod, &["status", "reason"]);
    let gated = get_array(pod, &["status", "conditions"])
        .iter()
        .any(|condition| condition["type"] == "PodScheduled" && condition["reason"] == "SchedulingGated");
    let status = match (gated, reason) {
        (true, _) => "SchedulingGated",
        (false, "") => phase,
        (false, reason) => reason,
    };
    let mut summary = Summary {
        status: status.to_owned(),
        ready: 0,
        total: get_array(pod, &["spec", "containers"]).len(),
        restarts: 0,
        last_restart: None,
    };
    let mut sidecar_restarts = 0;
    let initializing = summary.add_init_containers(pod, &mut sidecar_restarts);
    if !initializing || condition(pod, "Initialized") == "True" {
        summary.restarts = sidecar_restarts;
        summary.add_containers(pod);
    }
    if is_terminating(pod) {
        if reason == "NodeLost" {
            "Unknown".clone_into(&mut summary.status);
        } else if !matches!(phase, "Succeeded" | "Failed") {
            "Terminating".clone_into(&mut summary.status);
        }
    }
    summary
}

fn node(node: &Value, now: Timestamp) -> Vec<Value> {
    let ready = match condition(node, "Ready") {
        "True" => "Ready",
        "" => "Unknown",
        _ => "NotReady",
    };
    let status = if at(node, &["spec", "unschedulable"]) == Some(&json!(true)) {
        format!("{ready},SchedulingDisabled")
    } else {
        ready.to_owned()
    };
    let mut roles: Vec<&str> = Vec::new();
    if let Some(labels) = at(node, &["metadata", "labels"]).and_then(Value::as_object) {
        for (key, value) in labels {
            if let Some(role) = key.strip_prefix("node-role.kubernetes.io/").filter(|role| !role.is_empty()) {
                roles.push(role);
            } else if key == "kubernetes.io/role" {
                roles.extend(value.as_str());
            }
        }
    }
    roles.sort_unstable();
    roles.dedup();
    let address = |type_: &str| {
        get_array(node, &["status", "addresses"])
            .iter()
            .find(|address| address["type"] == type_)
            .map_or_else(|| json!(NONE), |address| text_or(address, &["address"], NONE))
    };
    let info = |field| text_or(node, &["status", "nodeInfo", field], UNKNOWN);
    vec![
        json!(status),
        json!(if roles.is_empty() { NONE.to_owned() } else { roles.join(",") }),
        age(node, now),
        text_or(node, &["status", "nodeInfo", "kubeletVersion"], ""),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

fn namespace(namespace: &Value, now: Timestamp) -> Vec<Value> {
    vec![text_or(namespace, &["status", "phase"], ""), age(namespace, now)]
}

/// Titles and cells of an Event.
pub(super) const EVENT_COLUMNS: &str =
    "Last Seen|Type|Reason|Object|*Subobject|*Source|Message|*First Seen|*Count|*Name";

pub(super) fn event(event: &Value, now: Timestamp) -> Vec<Value> {
    let time = |path: &[&str]| get_str(event, path);
    let event_time = time(&["eventTime"]);
    let first =
        [time(&["firstTimestamp"]), event_time].into_iter().find(|time| !time.is_empty()).unwrap_or_default();
    let last = [time(&["series", "lastObservedTime"]), time(&["lastTimestamp"]), first]
        .into_iter()
        .find(|time| !time.is_empty())
        .unwrap_or_default();
    let object = format!(
        "{}/{}",
        get_str(event, &["involvedObject", "kind"]).to_lowercase(),
        get_str(event, &["involvedObject", "name"])
    );
    let source = match (get_str(event, &["source", "component"]), get_str(event, &["source", "host"])) {
        ("", _) => get_str(event, &["reportingComponent"]).to_owned(),
        (component, "") => component.to_owned(),
        (component, host) => format!("{component}, {host}"),
    };
    let series = count(event, &["series", "count"]);
    let times = if series == json!(0) { count(event, &["count"]) } else { series };
    let times = if times == json!(0) { json!(1) } else { times };
    vec![
        json!(since(last, now)),
        text_or(event, &["type"], ""),
        text_or(event, &["reason"], ""),
        json!(object),
        text_or(event, &["involvedObject", "fieldPath"], ""),
        json!(source),
        json!(get_str(event, &["message"]).trim()),
        json!(since(first, now)),
        times,
        text_or(event, &["metadata", "name"], ""),
    ]
}
