//! Jobs: pods that are started until enough of them have succeeded.
//!
//! What has finished is counted from the pods that are still there, so a finished pod that somebody deletes is run
//! again; a Job that is complete stays complete.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::pods::{self, Name, Status, add_seconds};
use crate::op::rfc3339;
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::world::{Kind, Object, Phase};

const COMPONENT: &str = "job-controller";
const INDEX: &str = "batch.kubernetes.io/job-completion-index";

struct Spec {
    parallelism: i64,
    /// None: a work queue, complete when one pod has succeeded and none is running.
    completions: Option<i64>,
    backoff_limit: i64,
    indexed: bool,
    suspended: bool,
    deadline: Option<i64>,
    ttl: Option<i64>,
}

impl Spec {
    fn parse(job: &Object<'_>) -> Result<Self, Malformed> {
        let value = job.value;
        let parallelism = read::count(value, "spec.parallelism")?;
        let completions = match read::count(value, "spec.completions")? {
            None if parallelism.is_none() => Some(1),
            found => found,
        };
        let indexed = match read::string(value, "spec.completionMode")?.unwrap_or("NonIndexed") {
            "NonIndexed" => false,
            "Indexed" => true,
            other => {
                let cause = format!("{other:?} is not one of NonIndexed, Indexed");
                return Err(Malformed::new("spec.completionMode", cause));
            }
        };
        if indexed && completions.is_none() {
            return Err(Malformed::new("spec.completions", "required when completionMode is Indexed"));
        }
        Ok(Self {
            parallelism: parallelism.unwrap_or(1),
            completions,
            backoff_limit: read::count(value, "spec.backoffLimit")?.unwrap_or(6),
            indexed,
            suspended: read::boolean(value, "spec.suspend")?.unwrap_or(false),
            deadline: read::count(value, "spec.activeDeadlineSeconds")?,
            ttl: read::count(value, "spec.ttlSecondsAfterFinished")?,
        })
    }
}

/// How a Job ended.
struct End {
    type_: &'static str,
    reason: &'static str,
    message: String,
}

pub(super) fn reconcile<'a>(planner: &mut Planner<'_, 'a>, job: &Object<'a>) -> Result<(), Malformed> {
    let template = pods::template(job, None)?;
    let spec = Spec::parse(job)?;
    if job.uid.is_empty() {
        return Err(Malformed::new("metadata.uid", "absent, so that pods cannot refer to their owner"));
    }
    let is_true =
        |type_| read::condition(job.value, type_).and_then(|c| read::text(c, "status")) == Some("True");
    let world = planner.world;
    let owned = world.pods_of(job.uid);
    if is_true("Complete") || is_true("Failed") {
        // Late pods of a finished Job, and the Job itself after its time.
        owned.iter().filter(|&&i| world.pods[i].active()).for_each(|&i| planner.delete_pod(i));
        expire(planner, job, &spec);
        return Ok(());
    }
    let active: Vec<usize> = owned.iter().copied().filter(|&i| world.pods[i].active()).collect();
    let ready = active.iter().filter(|&&i| world.pods[i].ready).count();
    let failed = owned.iter().filter(|&&i| world.pods[i].phase == Phase::Failed).count();
    let succeeded: Vec<usize> =
        owned.iter().copied().filter(|&i| world.pods[i].phase == Phase::Succeeded).collect();
    let done_indexes: BTreeSet<i64> = succeeded.iter().filter_map(|&i| index_of(world, i)).collect();
    let done = number(if spec.indexed { done_indexes.len() } else { succeeded.len() });
    let failed = number(failed);
    let running = number(active.len());

    let start = read::text(job.value, "status.startTime").filter(|_| !spec.suspended);
    let expires = start.and_then(|s| s.parse().ok()).zip(spec.deadline).and_then(|(s, d)| add_seconds(s, d));
    if let Some(at) = expires {
        planner.recheck_at(at);
    }
    let end = end(&spec, done, failed, running, expires.is_some_and(|at| at <= world.now));
    let mut kept = running;
    if end.is_some() || spec.suspended {
        active.iter().for_each(|&i| planner.delete_pod(i));
        kept = 0;
    } else {
        // A work queue that has produced a success starts no more pods, but lets the running ones finish.
        let left = match spec.completions {
            Some(completions) => (completions - done).max(0),
            None if done > 0 => running,
            None => spec.parallelism,
        };
        let wanted = left.min(spec.parallelism);
        let mut free = (0..).filter(|index| {
            !done_indexes.contains(index) && !active.iter().any(|&i| index_of(world, i) == Some(*index))
        });
        let indexes: Vec<Option<i64>> =
            (running..wanted).map(|_| free.next().filter(|_| spec.indexed)).collect();
        for index in indexes {
            create(planner, job, template, index);
        }
        if running > wanted {
            let count = usize::try_from(running - wanted).unwrap_or(usize::MAX);
            for i in pods::victims(planner, &active, &active, count) {
                planner.delete_pod(i);
                kept -= 1;
            }
        }
    }
    let status =
        status(planner, job, &spec, end.as_ref(), [kept, number(ready), done, failed], &done_indexes);
    planner.status(job, status);
    if let Some(end) = end {
        match end.type_ {
            "Complete" => planner.normal(job, COMPONENT, "Completed", "Job completed".into()),
            _ => planner.warning(job, COMPONENT, end.reason, end.message),
        }
    }
    Ok(())
}

fn index_of(world: &crate::World<'_>, i: usize) -> Option<i64> {
    let annotations = world.pods[i].object.value.pointer("/metadata/annotations").and_then(Value::as_object);
    read::label(annotations, INDEX)?.parse().ok()
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn end(spec: &Spec, done: i64, failed: i64, running: i64, expired: bool) -> Option<End> {
    let complete = match spec.completions {
        Some(completions) => done >= completions,
        None => done > 0 && running == 0,
    };
    if complete {
        let message = "Reached expected number of succeeded pods".to_owned();
        Some(End { type_: "Complete", reason: "CompletionsReached", message })
    } else if failed > spec.backoff_limit {
        let message = "Job has reached the specified backoff limit".to_owned();
        Some(End { type_: "Failed", reason: "BackoffLimitExceeded", message })
    } else if expired {
        let message = "Job was active longer than specified deadline".to_owned();
        Some(End { type_: "Failed", reason: "DeadlineExceeded", message })
    } else {
        None
    }
}

fn create(planner: &mut Planner<'_, '_>, job: &Object<'_>, template: &Value, index: Option<i64>) {
    let base = index.map_or_else(|| format!("{}-", job.name), |index| format!("{}-{index}-", job.name));
    let name = pods::create_pod(planner, Kind::Job, job, template, Name::Generated(base), |pod| {
        for (key, value) in [("controller-uid", job.uid), ("job-name", job.name)] {
            pods::set_label(pod, key, value);
            pods::set_label(pod, &format!("batch.kubernetes.io/{key}"), value);
        }
        if let Some(index) = index {
            pods::set_label(pod, INDEX, &index.to_string());
            read::object_mut(&mut pod["metadata"], "annotations")[INDEX] = index.to_string().into();
            pod["spec"]["hostname"] = format!("{}-{index}", job.name).into();
        }
    });
    planner.normal(job, COMPONENT, "SuccessfulCreate", format!("Created pod: {name}"));
}

/// Delete a finished Job after `ttlSecondsAfterFinished`.
fn expire(planner: &mut Planner<'_, '_>, job: &Object<'_>, spec: &Spec) {
    let finished = ["Complete", "Failed"]
        .iter()
        .find_map(|type_| read::text(read::condition(job.value, type_)?, "lastTransitionTime")?.parse().ok());
    let Some(at) = finished.zip(spec.ttl).and_then(|(finished, ttl)| add_seconds(finished, ttl)) else {
        return;
    };
    if at <= planner.world.now {
        planner.delete(Kind::Job, job);
    } else {
        planner.recheck_at(at);
    }
}

fn status(
    planner: &Planner<'_, '_>,
    job: &Object<'_>,
    spec: &Spec,
    end: Option<&End>,
    [active, ready, succeeded, failed]: [i64; 4],
    done_indexes: &BTreeSet<i64>,
) -> Value {
    let now = rfc3339(planner.world.now);
    let mut conditions =
        read::at(job.value, "status.conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut condition = |type_: &str, status: &str, reason: &str, message: &str| {
        let same =
            |c: &Value| read::text(c, "type") == Some(type_) && read::text(c, "status") == Some(status);
        if conditions.iter().any(same) {
            return;
        }
        conditions.retain(|c| read::text(c, "type") != Some(type_));
        conditions.push(json!({
            "type": type_, "status": status, "lastProbeTime": now, "lastTransitionTime": now,
            "reason": reason, "message": message,
        }));
    };
    let was_suspended = read::condition(job.value, "Suspended").is_some();
    if spec.suspended {
        condition("Suspended", "True", "JobSuspended", "Job suspended");
    } else if was_suspended {
        condition("Suspended", "False", "JobResumed", "Job resumed");
    }
    if let Some(End { type_, reason, message }) = end {
        let first = if *type_ == "Complete" { "SuccessCriteriaMet" } else { "FailureTarget" };
        condition(first, "True", reason, message);
        condition(type_, "True", reason, message);
    }
    let started = read::text(job.value, "status.startTime").map_or_else(|| now.clone(), str::to_owned);
    let mut status = Status::default()
        .nonzero("active", active)
        .always("ready", ready.min(active))
        .always("terminating", 0)
        .nonzero("succeeded", succeeded)
        .nonzero("failed", failed)
        .nonempty("completedIndexes", ranges(done_indexes).into())
        .always("uncountedTerminatedPods", json!({}))
        .nonempty("conditions", conditions.into());
    if !spec.suspended {
        status = status.always("startTime", started);
    }
    if end.is_some_and(|end| end.type_ == "Complete") {
        status = status.always("completionTime", now);
    }
    status.build()
}

/// `1,3-5,7`.
fn ranges(indexes: &BTreeSet<i64>) -> String {
    let mut parts: Vec<(i64, i64)> = Vec::new();
    for &index in indexes {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == index => *last = index,
            _ => parts.push((index, index)),
        }
    }
    let text = |&(first, last): &(i64, i64)| match last - first {
        0 => first.to_string(),
        1 => format!("{first},{last}"),
        _ => format!("{first}-{last}"),
    };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}
