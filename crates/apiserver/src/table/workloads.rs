//! Rows of the kinds that make pods.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::Cells;
use super::format::{
    NONE, UNKNOWN, UNSET, age, count, duration, joined, labels_text, scalar_or, selector_cell, since, text_or,
};
use crate::json::{at, get_array, get_int, get_str, is_terminating, parse_time};
use crate::kinds::KindInfo;

pub(super) fn printer(kind: &KindInfo) -> Option<(&'static str, Cells)> {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "ReplicationController") | ("apps", "ReplicaSet") => {
            Some(("#Desired|#Current|#Ready|Age|*Containers|*Images|*Selector", replica_set as Cells))
        }
        ("apps", "Deployment") => {
            Some(("Ready|#Up-to-date|#Available|Age|*Containers|*Images|*Selector", deployment))
        }
        ("apps", "StatefulSet") => Some(("Ready|Age|*Containers|*Images", stateful_set)),
        ("apps", "DaemonSet") => Some((
            "#Desired|#Current|#Ready|#Up-to-date|#Available|Node Selector|Age|*Containers|*Images|*Selector",
            daemon_set,
        )),
        ("apps", "ControllerRevision") => Some(("Controller|#Revision|Age", controller_revision)),
        ("batch", "Job") => Some(("Status|Completions|Duration|Age|*Containers|*Images|*Selector", job)),
        ("batch", "CronJob") => Some((
            "Schedule|Timezone|Suspend|#Active|Last Schedule|Age|*Containers|*Images|*Selector",
            cron_job,
        )),
        ("autoscaling", "HorizontalPodAutoscaler") => {
            Some(("Reference|Targets|MinPods|#MaxPods|#Replicas|Age", autoscaler))
        }
        ("policy", "PodDisruptionBudget") => {
            Some(("Min Available|Max Unavailable|#Allowed Disruptions|Age", disruption_budget))
        }
        ("", "PodTemplate") => Some(("Containers|Images|Pod Labels", pod_template)),
        _ => None,
    }
}

fn containers(template: Option<&Value>) -> [Value; 2] {
    let containers =
        template.map(|template| get_array(template, &["spec", "containers"])).unwrap_or_default();
    [joined(containers, "name"), joined(containers, "image")]
}

/// Wanted replicas: one if not set.
fn wanted(object: &Value) -> i64 {
    get_int(object, &["spec", "replicas"]).unwrap_or(1)
}

fn replica_set(set: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(at(set, &["spec", "template"]));
    vec![
        json!(wanted(set)),
        count(set, &["status", "replicas"]),
        count(set, &["status", "readyReplicas"]),
        age(set, now),
        names,
        images,
        selector_cell(at(set, &["spec", "selector"])),
    ]
}

fn ready_of_wanted(object: &Value) -> Value {
    json!(format!("{}/{}", count(object, &["status", "readyReplicas"]), wanted(object)))
}

fn deployment(deployment: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(at(deployment, &["spec", "template"]));
    vec![
        ready_of_wanted(deployment),
        count(deployment, &["status", "updatedReplicas"]),
        count(deployment, &["status", "availableReplicas"]),
        age(deployment, now),
        names,
        images,
        selector_cell(at(deployment, &["spec", "selector"])),
    ]
}

fn stateful_set(set: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(at(set, &["spec", "template"]));
    vec![ready_of_wanted(set), age(set, now), names, images]
}

fn daemon_set(set: &Value, now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(at(set, &["spec", "template"]));
    let status = |field| count(set, &["status", field]);
    vec![
        status("desiredNumberScheduled"),
        status("currentNumberScheduled"),
        status("numberReady"),
        status("updatedNumberScheduled"),
        status("numberAvailable"),
        json!(labels_text(at(set, &["spec", "template", "spec", "nodeSelector"]))),
        age(set, now),
        names,
        images,
        selector_cell(at(set, &["spec", "selector"])),
    ]
}

fn controller_revision(revision: &Value, now: Timestamp) -> Vec<Value> {
    let owner = get_array(revision, &["metadata", "ownerReferences"])
        .iter()
        .find(|owner| owner["controller"] == true);
    let controller = owner.map_or_else(
        || NONE.to_owned(),
        |owner| {
            let kind = get_str(owner, &["kind"]).to_lowercase();
            let group = get_str(owner, &["apiVersion"]).split_once('/').map_or("", |(group, _)| group);
            let dot = if group.is_empty() { "" } else { "." };
            format!("{kind}{dot}{group}/{}", get_str(owner, &["name"]))
        },
    );
    vec![json!(controller), count(revision, &["revision"]), age(revision, now)]
}

fn job(job: &Value, now: Timestamp) -> Vec<Value> {
    let holds = |type_: &str| {
        get_array(job, &["status", "conditions"]).iter().any(|c| c["type"] == type_ && c["status"] == "True")
    };
    let status = ["Complete", "Failed", "Suspended", "FailureTarget", "SuccessCriteriaMet"]
        .into_iter()
        .find(|type_| holds(type_))
        .unwrap_or(if is_terminating(job) { "Terminating" } else { "Running" });
    let succeeded = count(job, &["status", "succeeded"]);
    let parallelism = get_int(job, &["spec", "parallelism"]).unwrap_or(0);
    let completions = match get_int(job, &["spec", "completions"]) {
        Some(completions) => format!("{succeeded}/{completions}"),
        None if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        None => format!("{succeeded}/1"),
    };
    let took = parse_time(get_str(job, &["status", "startTime"])).map_or_else(String::new, |start| {
        let end = parse_time(get_str(job, &["status", "completionTime"])).unwrap_or(now);
        duration(end.duration_since(start).as_secs())
    });
    let [names, images] = containers(at(job, &["spec", "template"]));
    vec![
        json!(status),
        json!(completions),
        json!(took),
        age(job, now),
        names,
        images,
        selector_cell(at(job, &["spec", "selector"])),
    ]
}

fn cron_job(job: &Value, now: Timestamp) -> Vec<Value> {
    let suspend = match at(job, &["spec", "suspend"]).and_then(Value::as_bool) {
        Some(true) => "True",
        Some(false) => "False",
        None => UNSET,
    };
    let last = match get_str(job, &["status", "lastScheduleTime"]) {
        "" => NONE.to_owned(),
        time => since(time, now),
    };
    let [names, images] = containers(at(job, &["spec", "jobTemplate", "spec", "template"]));
    vec![
        text_or(job, &["spec", "schedule"], ""),
        text_or(job, &["spec", "timeZone"], NONE),
        json!(suspend),
        json!(get_array(job, &["status", "active"]).len()),
        json!(last),
        age(job, now),
        names,
        images,
        selector_cell(at(job, &["spec", "jobTemplate", "spec", "selector"])),
    ]
}

fn metric_text(metric: &Value, current: Option<&Value>) -> String {
    let type_ = get_str(metric, &["type"]);
    let field = match type_ {
        "Resource" => "resource",
        "ContainerResource" => "containerResource",
        "Pods" => "pods",
        "Object" => "object",
        _ => "external",
    };
    let wanted = &metric[field]["target"];
    let now = current.map_or(&Value::Null, |current| &current[field]["current"]);
    let percent = |value: &Value| value.as_i64().map(|value| format!("{value}%"));
    let quantity = |value: &Value| value.as_str().map(str::to_owned);
    let (now, wanted) = if wanted["averageUtilization"].is_i64() {
        (percent(&now["averageUtilization"]), percent(&wanted["averageUtilization"]))
    } else if wanted["averageValue"].is_string() {
        (quantity(&now["averageValue"]), quantity(&wanted["averageValue"]))
    } else {
        (quantity(&now["value"]), quantity(&wanted["value"]))
    };
    let unknown = || UNKNOWN.to_owned();
    let values = format!("{}/{}", now.unwrap_or_else(unknown), wanted.unwrap_or_else(unknown));
    match type_ {
        "Resource" | "ContainerResource" => format!("{}: {values}", get_str(&metric[field], &["name"])),
        _ => values,
    }
}

fn autoscaler(autoscaler: &Value, now: Timestamp) -> Vec<Value> {
    let current = get_array(autoscaler, &["status", "currentMetrics"]);
    let metrics: Vec<String> = get_array(autoscaler, &["spec", "metrics"])
        .iter()
        .enumerate()
        .map(|(index, metric)| metric_text(metric, current.get(index)))
        .collect();
    let target = &["spec", "scaleTargetRef"];
    let reference = at(autoscaler, target).cloned().unwrap_or(Value::Null);
    vec![
        json!(format!("{}/{}", get_str(&reference, &["kind"]), get_str(&reference, &["name"]))),
        json!(if metrics.is_empty() { NONE.to_owned() } else { metrics.join(", ") }),
        json!(scalar_or(at(autoscaler, &["spec", "minReplicas"]), UNSET)),
        count(autoscaler, &["spec", "maxReplicas"]),
        count(autoscaler, &["status", "currentReplicas"]),
        age(autoscaler, now),
    ]
}

fn disruption_budget(budget: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        json!(scalar_or(at(budget, &["spec", "minAvailable"]), "N/A")),
        json!(scalar_or(at(budget, &["spec", "maxUnavailable"]), "N/A")),
        count(budget, &["status", "disruptionsAllowed"]),
        age(budget, now),
    ]
}

fn pod_template(template: &Value, _now: Timestamp) -> Vec<Value> {
    let [names, images] = containers(at(template, &["template"]));
    vec![names, images, json!(labels_text(at(template, &["template", "metadata", "labels"])))]
}
