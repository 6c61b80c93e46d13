//! A pod's `status` from what its task knows. Pure.

use std::net::IpAddr;

use jiff::Timestamp;
use podway_workloads::rfc3339;
use serde_json::{Value, json};

use super::container::{Exit, Progress, State};
use crate::readiness::SWITCHED_OFF;

/// One container of the view.
#[derive(Debug, Clone)]
pub(super) struct ContainerView {
    pub(super) name: String,
    pub(super) image: String,
    pub(super) id: String,
    /// From `initContainers`.
    pub(super) init: bool,
    /// An init container that goes on running.
    pub(super) sidecar: bool,
    pub(super) progress: Progress,
}

impl ContainerView {
    fn runs(&self) -> bool {
        !self.init || self.sidecar
    }

    fn is_ready(&self) -> bool {
        matches!(self.progress.state, State::Running { ready: true, .. })
    }
}

/// What the status is made of.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) started: Timestamp,
    pub(super) host_addresses: Vec<IpAddr>,
    pub(super) addresses: Vec<IpAddr>,
    /// The sandbox is there.
    pub(super) attached: bool,
    /// All processes have been ended.
    pub(super) stopped: bool,
    pub(super) containers: Vec<ContainerView>,
    /// What is in the way of the whole pod.
    pub(super) message: Option<String>,
    /// Somebody has switched the pod's readiness off.
    pub(super) switched_off: bool,
}

impl View {
    pub(super) fn new(host_addresses: &[IpAddr], started: Timestamp) -> Self {
        Self {
            started,
            host_addresses: host_addresses.to_vec(),
            addresses: Vec::new(),
            attached: false,
            stopped: false,
            containers: Vec::new(),
            message: None,
            switched_off: false,
        }
    }

    fn is_ready(&self, container: &ContainerView) -> bool {
        container.is_ready() && !self.stopped && !self.switched_off
    }

    fn main(&self) -> impl Iterator<Item = &ContainerView> {
        self.containers.iter().filter(|c| !c.init)
    }

    /// Whether every container has ended for good. Sidecars end with the others.
    pub(super) fn is_finished(&self) -> bool {
        self.main().count() > 0 && self.main().all(|c| matches!(c.progress.state, State::Terminated(_)))
    }

    fn phase(&self) -> &'static str {
        let ended = |c: &ContainerView| matches!(&c.progress.state, State::Terminated(_));
        let failed = |c: &ContainerView| matches!(&c.progress.state, State::Terminated(e) if e.code != 0);
        if self.is_finished() {
            return if self.main().any(failed) { "Failed" } else { "Succeeded" };
        }
        let begun = |c: &ContainerView| {
            ended(c) || matches!(c.progress.state, State::Running { .. }) || c.progress.last.is_some()
        };
        if self.attached && self.main().count() > 0 && self.main().all(begun) { "Running" } else { "Pending" }
    }
}

/// Writes the view into the pod's status. Conditions of others stay; times change only when their condition does.
pub(super) fn write(pod: &mut Value, view: &View, now: Timestamp) {
    let gates: Vec<String> = pod["spec"]["readinessGates"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|g| g["conditionType"].as_str().map(str::to_owned))
        .collect();
    if !pod["status"].is_object() {
        pod["status"] = json!({});
    }
    let status = &mut pod["status"];
    let phase = view.phase();
    status["phase"] = phase.into();
    status["startTime"] = rfc3339(view.started).into();
    addresses(status, "hostIP", "hostIPs", &view.host_addresses);
    if !view.addresses.is_empty() {
        addresses(status, "podIP", "podIPs", &view.addresses);
    }
    let list = |init: bool| -> Vec<Value> {
        view.containers.iter().filter(|c| c.init == init).map(|c| container_status(c, view)).collect()
    };
    status["containerStatuses"] = list(false).into();
    let init = list(true);
    if !init.is_empty() {
        status["initContainerStatuses"] = init.into();
    }

    let unready: Vec<&str> =
        view.containers.iter().filter(|c| c.runs() && !view.is_ready(c)).map(|c| c.name.as_str()).collect();
    let (containers_ready, reason, message) = match (phase, unready.is_empty() && view.main().count() > 0) {
        ("Succeeded", _) => (false, "PodCompleted", String::new()),
        ("Failed", _) => (false, "PodFailed", String::new()),
        (_, true) => (true, "", String::new()),
        (_, false) => {
            let switched_off = view.switched_off.then(|| SWITCHED_OFF.to_owned());
            let cause = view
                .message
                .clone()
                .or(switched_off)
                .unwrap_or_else(|| format!("containers with unready status: [{}]", unready.join(" ")));
            (false, "ContainersNotReady", cause)
        }
    };
    let mut conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let missing_gate = gates
        .iter()
        .find(|gate| !conditions.iter().any(|c| c["type"] == gate.as_str() && c["status"] == "True"));
    let ready = match missing_gate {
        Some(gate) if containers_ready => {
            (false, "ReadinessGatesNotReady", format!("condition {gate:?} of a readiness gate is not True"))
        }
        _ => (containers_ready, reason, message.clone()),
    };
    let attached = (view.attached && !view.stopped, "", view.message.clone().unwrap_or_default());
    for (type_, (holds, reason, message)) in [
        ("PodReadyToStartContainers", attached),
        ("Initialized", (view.attached, "", String::new())),
        ("Ready", ready),
        ("ContainersReady", (containers_ready, reason, message)),
        ("PodScheduled", (true, "", String::new())),
    ] {
        set_condition(&mut conditions, type_, holds, reason, &message, now);
    }
    status["conditions"] = conditions.into();
}

fn addresses(status: &mut Value, one: &str, all: &str, list: &[IpAddr]) {
    if let Some(first) = list.first() {
        status[one] = first.to_string().into();
    }
    status[all] = list.iter().map(|a| json!({"ip": a})).collect::<Vec<_>>().into();
}

/// Sets a condition; `lastTransitionTime` moves only with the status.
pub(crate) fn set_condition(
    conditions: &mut Vec<Value>,
    type_: &str,
    holds: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let status = if holds { "True" } else { "False" };
    let mut condition = json!({"type": type_, "status": status, "lastTransitionTime": rfc3339(now)});
    if !reason.is_empty() {
        condition["reason"] = reason.into();
    }
    if !message.is_empty() {
        condition["message"] = message.into();
    }
    match conditions.iter_mut().find(|c| c["type"] == type_) {
        Some(known) => {
            if known["status"] == status && known["lastTransitionTime"].is_string() {
                condition["lastTransitionTime"] = known["lastTransitionTime"].clone();
            }
            *known = condition;
        }
        None => conditions.push(condition),
    }
}

fn container_status(container: &ContainerView, view: &View) -> Value {
    let progress = &container.progress;
    let (state, ready, started) = if container.runs() {
        let running = matches!(progress.state, State::Running { passed: true, .. });
        (state_value(&progress.state, container), view.is_ready(container), running)
    } else {
        let at = rfc3339(view.started);
        let done = json!({"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": at, "finishedAt": at,
                                         "containerID": container.id}});
        (done, true, false)
    };
    let mut out = json!({
        "name": container.name,
        "image": container.image,
        "imageID": "",
        "containerID": container.id,
        "ready": ready,
        "started": started,
        "restartCount": progress.restarts,
        "state": state,
        "lastState": {},
    });
    if let Some(last) = &progress.last {
        out["lastState"] = json!({"terminated": terminated(last, container)});
    }
    out
}

fn state_value(state: &State, container: &ContainerView) -> Value {
    match state {
        State::Waiting { reason, message } if message.is_empty() => json!({"waiting": {"reason": reason}}),
        State::Waiting { reason, message } => json!({"waiting": {"reason": reason, "message": message}}),
        State::Running { started, .. } => json!({"running": {"startedAt": rfc3339(*started)}}),
        State::Terminated(exit) => json!({"terminated": terminated(exit, container)}),
    }
}

fn terminated(exit: &Exit, container: &ContainerView) -> Value {
    let mut out = json!({
        "exitCode": exit.code,
        "reason": if exit.code == 0 { "Completed" } else { "Error" },
        "startedAt": rfc3339(exit.started),
        "finishedAt": rfc3339(exit.finished),
        "containerID": container.id,
    });
    if let Some(signal) = exit.signal {
        out["signal"] = signal.into();
    }
    if !exit.message.is_empty() {
        out["message"] = exit.message.as_str().into();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).expect("in range")
    }

    fn exit(code: i32) -> Exit {
        Exit { code, signal: None, message: "why".into(), started: at(1), finished: at(2) }
    }

    fn view(states: &[(&str, bool, bool, State)]) -> View {
        let mut view = View::new(&["172.18.1.1".parse().expect("address")], at(0));
        view.attached = true;
        view.addresses = vec!["10.244.1.2".parse().expect("address"), "fd00::2".parse().expect("address")];
        view.containers = states
            .iter()
            .map(|(name, init, sidecar, state)| ContainerView {
                name: (*name).into(),
                image: "i".into(),
                id: "podway://x".into(),
                init: *init,
                sidecar: *sidecar,
                progress: Progress { state: state.clone(), ..Progress::default() },
            })
            .collect();
        view
    }

    fn condition<'a>(pod: &'a Value, type_: &str) -> &'a Value {
        pod["status"]["conditions"]
            .as_array()
            .and_then(|c| c.iter().find(|c| c["type"] == type_))
            .expect("there")
    }

    #[test]
    fn phase_and_readiness_follow_from_the_containers() {
        let running = State::Running { started: at(1), passed: true, ready: true };
        let waiting = State::Waiting { reason: "CrashLoopBackOff", message: "again".into() };
        let done = State::Terminated(exit(0));
        let failed = State::Terminated(exit(1));
        for (states, phase, ready) in [
            (vec![("a", false, false, running.clone())], "Running", "True"),
            (
                vec![("a", false, false, running.clone()), ("b", false, false, waiting.clone())],
                "Pending",
                "False",
            ),
            (vec![("a", false, false, done.clone())], "Succeeded", "False"),
            (vec![("a", false, false, done.clone()), ("b", false, false, failed)], "Failed", "False"),
            (
                vec![("i", true, false, waiting.clone()), ("a", false, false, running.clone())],
                "Running",
                "True",
            ),
            (vec![("s", true, true, waiting), ("a", false, false, running.clone())], "Running", "False"),
            (vec![("s", true, true, running.clone()), ("a", false, false, done)], "Succeeded", "False"),
            (vec![], "Pending", "False"),
        ] {
            let mut pod = json!({"metadata": {"name": "p"}});
            write(&mut pod, &view(&states), at(5));
            assert_eq!(pod["status"]["phase"], phase, "{states:?}");
            assert_eq!(condition(&pod, "Ready")["status"], ready, "{states:?}");
            assert_eq!(pod["status"]["podIP"], "10.244.1.2");
            assert_eq!(pod["status"]["podIPs"][1]["ip"], "fd00::2");
        }
    }

    #[test]
    fn conditions_keep_their_time_and_those_of_others_stay() {
        let mut pod = json!({"spec": {"readinessGates": [{"conditionType": "lb"}]},
                             "status": {"conditions": [{"type": "other", "status": "True"}]}});
        let view = view(&[("a", false, false, State::Running { started: at(1), passed: true, ready: true })]);
        write(&mut pod, &view, at(5));
        assert_eq!(condition(&pod, "Ready")["reason"], "ReadinessGatesNotReady");
        assert_eq!(condition(&pod, "other")["status"], "True");
        let before = condition(&pod, "ContainersReady").clone();
        write(&mut pod, &view, at(9));
        assert_eq!(condition(&pod, "ContainersReady"), &before);
        pod["status"]["conditions"]
            .as_array_mut()
            .expect("list")
            .push(json!({"type": "lb", "status": "True"}));
        write(&mut pod, &view, at(9));
        assert_eq!(condition(&pod, "Ready")["status"], "True");
        assert_eq!(condition(&pod, "Ready")["lastTransitionTime"], rfc3339(at(9)));
    }

    #[test]
    fn readiness_that_is_switched_off_says_so() {
        let mut view =
            view(&[("a", false, false, State::Running { started: at(1), passed: true, ready: true })]);
        view.switched_off = true;
        let mut pod = json!({});
        write(&mut pod, &view, at(5));
        for type_ in ["Ready", "ContainersReady"] {
            assert_eq!(condition(&pod, type_)["status"], "False");
            assert!(condition(&pod, type_)["message"].as_str().is_some_and(|m| m.contains("switched off")));
        }
        assert_eq!(pod["status"]["containerStatuses"][0]["ready"], false);
        assert_eq!(pod["status"]["phase"], "Running");
        view.switched_off = false;
        write(&mut pod, &view, at(6));
        assert_eq!(condition(&pod, "Ready")["status"], "True");
    }

    #[test]
    fn containers_tell_their_story() {
        let mut view =
            view(&[("a", false, false, State::Waiting { reason: "CrashLoopBackOff", message: "m".into() })]);
        view.containers[0].progress.last = Some(exit(1));
        view.containers[0].progress.restarts = 3;
        let mut pod = json!({});
        write(&mut pod, &view, at(5));
        let status = &pod["status"]["containerStatuses"][0];
        assert_eq!(status["restartCount"], 3);
        assert_eq!(status["state"]["waiting"]["message"], "m");
        assert_eq!(status["lastState"]["terminated"]["message"], "why");
        assert_eq!(pod["status"]["phase"], "Running", "a container that crashed has been started");
    }
}
