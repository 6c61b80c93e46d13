//! Deployments: one ReplicaSet per revision of the template, and the roll from old to new.

use serde_json::{Value, json};

use super::pods::{self, Counts, Status, add_seconds};
use crate::defaults;
use crate::names::template_hash;
use crate::op::rfc3339;
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::world::{Kind, Object};

const COMPONENT: &str = "deployment-controller";
const HASH: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAX: &str = "deployment.kubernetes.io/max-replicas";

/// A ReplicaSet of the Deployment, with its pods counted.
struct Set<'a> {
    object: Object<'a>,
    /// `spec.replicas`, as it will be after this plan.
    wanted: i64,
    /// `spec.replicas` in the snapshot.
    current: i64,
    counts: Counts,
    /// It has pods that are still there, terminating ones included.
    has_pods: bool,
}

/// What the spec says.
struct Spec {
    replicas: i64,
    paused: bool,
    recreate: bool,
    max_surge: i64,
    max_unavailable: i64,
    min_ready: i64,
    history: i64,
    deadline: Option<i64>,
}

impl Spec {
    fn parse(deployment: &Object<'_>) -> Result<Self, Malformed> {
        let value = deployment.value;
        let replicas = read::count(value, "spec.replicas")?.unwrap_or(1);
        let recreate = match read::string(value, "spec.strategy.type")?.unwrap_or("RollingUpdate") {
            "RollingUpdate" => false,
            "Recreate" => true,
            other => {
                let cause = format!("{other:?} is not one of RollingUpdate, Recreate");
                return Err(Malformed::new("spec.strategy.type", cause));
            }
        };
        let bound = |name: &str, up: bool| {
            let path = format!("spec.strategy.rollingUpdate.{name}");
            let default = json!({ "default": "25%" });
            match read::count_or_percent(value, &path, replicas, up)? {
                Some(bound) => Ok(bound),
                None => {
                    read::count_or_percent(&default, "default", replicas, up).map(Option::unwrap_or_default)
                }
            }
        };
        let max_surge = bound("maxSurge", true)?;
        let mut max_unavailable = bound("maxUnavailable", false)?.min(replicas);
        if max_surge == 0 && max_unavailable == 0 {
            // Rounded down to nothing on both sides: the roll would never begin.
            max_unavailable = 1;
        }
        Ok(Self {
            replicas,
            paused: read::boolean(value, "spec.paused")?.unwrap_or(false),
            recreate,
            max_surge: if recreate { 0 } else { max_surge },
            max_unavailable: if recreate { 0 } else { max_unavailable },
            min_ready: pods::min_ready_seconds(deployment)?,
            history: read::count(value, "spec.revisionHistoryLimit")?.unwrap_or(10),
            deadline: read::count(value, "spec.progressDeadlineSeconds")?
                .filter(|d| *d < i64::from(i32::MAX)),
        })
    }
}

pub(super) fn reconcile<'a>(planner: &mut Planner<'_, 'a>, deployment: &Object<'a>) -> Result<(), Malformed> {
    let selector = pods::selector(deployment)?;
    let template = pods::template(deployment, Some(&selector))?;
    let spec = Spec::parse(deployment)?;
    if deployment.uid.is_empty() {
        return Err(Malformed::new(
            "metadata.uid",
            "absent, so that ReplicaSets cannot refer to their owner",
        ));
    }
    let hash = template_hash(template);
    adopt(planner, deployment, &selector);
    let mut sets = owned_sets(planner, deployment, &spec)?;
    let newest = sets.iter().position(|set| read::label(set.object.labels, HASH) == Some(&hash));
    let revision = next_revision(&sets, newest);

    match newest {
        Some(newest) => roll(&mut sets, newest, &spec),
        None if spec.paused => scale_newest(&mut sets, &spec),
        None => {
            // The old ones give way from the next round on, when the new one is there to be counted.
            let total: i64 = sets.iter().map(|set| set.current).sum();
            let replicas = if spec.recreate {
                sets.iter_mut().for_each(|set| set.wanted = 0);
                (!sets.iter().any(|set| set.has_pods)).then_some(spec.replicas)
            } else {
                Some((spec.replicas + spec.max_surge - total).clamp(0, spec.replicas))
            };
            if let Some(replicas) = replicas {
                create_set(planner, deployment, template, &hash, replicas, revision, &spec);
            }
        }
    }
    write_scales(planner, deployment, &sets, newest, revision, &spec);
    if let Some(newest) = newest {
        annotate_revision(planner, deployment, revision);
        if sets[newest].counts.available >= spec.replicas {
            clean_up(planner, &sets, newest, &spec);
        }
    }
    status(planner, deployment, &sets, newest, &spec);
    Ok(())
}

/// ReplicaSets that nobody controls and that the selector matches (left by a deletion that orphans) become ours.
fn adopt(planner: &mut Planner<'_, '_>, deployment: &Object<'_>, selector: &crate::selector::Selector<'_>) {
    let world = planner.world;
    for orphan in world.orphans(Kind::ReplicaSet, deployment.namespace) {
        if !orphan.deleting && selector.matches(orphan.labels) {
            let mut value = orphan.value.clone();
            value["metadata"]["ownerReferences"] =
                json!([pods::owner_reference(Kind::Deployment, deployment)]);
            planner.update(value);
        }
    }
}

fn owned_sets<'a>(
    planner: &mut Planner<'_, 'a>,
    deployment: &Object<'a>,
    spec: &Spec,
) -> Result<Vec<Set<'a>>, Malformed> {
    let world = planner.world;
    let mut sets = Vec::new();
    for object in world.owned(Kind::ReplicaSet, deployment.uid).filter(|set| !set.deleting) {
        let spec_error = |error: Malformed| {
            Malformed::new(format!("ReplicaSet {}: {}", object.name, error.field), error.cause)
        };
        if read::map(object.value, "spec").map_err(spec_error)?.is_none() {
            return Err(spec_error(Malformed::new("spec", "required, but absent")));
        }
        let current = read::count(object.value, "spec.replicas").map_err(spec_error)?;
        let current = current.unwrap_or(1);
        let pods = world.pods_of(object.uid);
        let has_pods = pods.iter().any(|&i| !world.pods[i].finished());
        let counts = pods::count(planner, pods, spec.min_ready);
        sets.push(Set { object, wanted: current, current, counts, has_pods });
    }
    sets.sort_by_key(|set| (set.object.created, set.object.name));
    Ok(sets)
}

fn annotation(object: &Object<'_>, key: &str) -> Option<i64> {
    read::label(object.value.pointer("/metadata/annotations").and_then(Value::as_object), key)?.parse().ok()
}

/// The newest set's revision: above all others, and unchanged when it is that already.
fn next_revision(sets: &[Set<'_>], newest: Option<usize>) -> i64 {
    let others = sets.iter().enumerate().filter(|(i, _)| Some(*i) != newest);
    let highest_old = others.filter_map(|(_, set)| annotation(&set.object, REVISION)).max().unwrap_or(0);
    let own = newest.and_then(|newest| annotation(&sets[newest].object, REVISION)).unwrap_or(0);
    if own > highest_old { own } else { highest_old + 1 }
}

/// Decide every set's replicas for the step from here.
fn roll(sets: &mut [Set<'_>], newest: usize, spec: &Spec) {
    let old_total: i64 = sets.iter().enumerate().filter(|(i, _)| *i != newest).map(|(_, s)| s.current).sum();
    if spec.paused {
        scale_newest(sets, spec);
        return;
    }
    if spec.recreate {
        let old_pods = sets.iter().enumerate().any(|(i, set)| i != newest && set.has_pods);
        for (i, set) in sets.iter_mut().enumerate() {
            if i != newest {
                set.wanted = 0;
            } else if !old_pods && old_total == 0 {
                set.wanted = spec.replicas;
            }
        }
        return;
    }
    let new = &mut sets[newest];
    if new.current >= spec.replicas {
        new.wanted = spec.replicas;
    } else {
        let room = (spec.replicas + spec.max_surge - old_total - new.current).max(0);
        new.wanted = new.current + room.min(spec.replicas - new.current);
    }
    let new_unavailable = (new.current - new.counts.available).max(0);
    let total = old_total + new.current;
    let min_available = spec.replicas - spec.max_unavailable;
    // Unhealthy old pods serve nobody: they go first, as long as the total allows.
    let mut may_go = (total - min_available - new_unavailable).max(0);
    for (i, set) in sets.iter_mut().enumerate() {
        if i != newest && may_go > 0 {
            let unhealthy = (set.current - set.counts.available).max(0).min(may_go);
            set.wanted = set.current - unhealthy;
            may_go -= unhealthy;
        }
    }
    // Then available ones, down to what has to stay available.
    let available: i64 = sets.iter().map(|set| set.counts.available).sum();
    let mut spare = (available - min_available).min(may_go).max(0);
    for (i, set) in sets.iter_mut().enumerate() {
        if i != newest {
            let go = set.wanted.min(spare);
            set.wanted -= go;
            spare -= go;
        }
    }
}

/// A paused Deployment scales, but does not roll: its newest set with replicas takes the difference.
fn scale_newest(sets: &mut [Set<'_>], spec: &Spec) {
    let total: i64 = sets.iter().map(|set| set.current).sum();
    let Some(active) = sets.iter().rposition(|set| set.current > 0).or(sets.len().checked_sub(1)) else {
        return;
    };
    let rest = total - sets[active].current;
    let room = spec.replicas + if rest > 0 { spec.max_surge } else { 0 };
    // Within the surge nothing has to change; outside of it, back to the wanted number.
    if total > room || total < spec.replicas {
        sets[active].wanted = (spec.replicas - rest).max(0);
    }
}

fn create_set(
    planner: &mut Planner<'_, '_>,
    deployment: &Object<'_>,
    template: &Value,
    hash: &str,
    replicas: i64,
    revision: i64,
    spec: &Spec,
) {
    let name = format!("{}-{hash}", deployment.name);
    if let Some(other) = planner.world.named(Kind::ReplicaSet, deployment.namespace, &name) {
        // Adopted in this plan, or on its way out: the next round sees more clearly.
        if other.controller.is_some() && !other.deleting {
            let message =
                format!("ReplicaSet {name:?} exists and belongs to somebody else; delete or rename it");
            planner.warning(deployment, COMPONENT, "ReplicaSetCreateError", message);
        }
        return;
    }
    let mut template = template.clone();
    pods::set_label(&mut template, HASH, hash);
    let mut selector = deployment.value["spec"]["selector"].clone();
    read::object_mut(&mut selector, "matchLabels")[HASH] = hash.into();
    let mut set = json!({
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": name,
            "namespace": deployment.namespace,
            "labels": template["metadata"]["labels"],
            "annotations": {
                DESIRED: spec.replicas.to_string(),
                MAX: (spec.replicas + spec.max_surge).to_string(),
                REVISION: revision.to_string(),
            },
            "ownerReferences": [pods::owner_reference(Kind::Deployment, deployment)],
        },
        "spec": { "replicas": replicas, "selector": selector, "template": template },
    });
    if spec.min_ready > 0 {
        set["spec"]["minReadySeconds"] = spec.min_ready.into();
    }
    defaults::apply("ReplicaSet", &mut set);
    planner.create(set);
    let message = format!("Scaled up replica set {name} from 0 to {replicas}");
    planner.normal(deployment, COMPONENT, "ScalingReplicaSet", message);
}

/// Write replicas, annotations and minReadySeconds of the sets where they differ.
fn write_scales(
    planner: &mut Planner<'_, '_>,
    deployment: &Object<'_>,
    sets: &[Set<'_>],
    newest: Option<usize>,
    revision: i64,
    spec: &Spec,
) {
    for (i, set) in sets.iter().enumerate() {
        let is_newest = newest == Some(i);
        let mut annotations = Vec::new();
        if is_newest || set.wanted > 0 {
            annotations.push((DESIRED, spec.replicas));
            annotations.push((MAX, spec.replicas + spec.max_surge));
        }
        if is_newest {
            annotations.push((REVISION, revision));
        }
        annotations.retain(|(key, value)| annotation(&set.object, key) != Some(*value));
        let min_ready = read::number(set.object.value, "spec.minReadySeconds").unwrap_or(0);
        let min_ready_differs = is_newest && min_ready != spec.min_ready;
        if set.wanted == set.current && annotations.is_empty() && !min_ready_differs {
            continue;
        }
        let mut value = set.object.value.clone();
        value["spec"]["replicas"] = set.wanted.into();
        if min_ready_differs {
            value["spec"]["minReadySeconds"] = spec.min_ready.into();
        }
        let target = read::object_mut(&mut value["metadata"], "annotations");
        for (key, number) in annotations {
            target[key] = number.to_string().into();
        }
        planner.update(value);
        if set.wanted != set.current {
            let direction = if set.wanted > set.current { "up" } else { "down" };
            let (name, from, to) = (set.object.name, set.current, set.wanted);
            let message = format!("Scaled {direction} replica set {name} from {from} to {to}");
            planner.normal(deployment, COMPONENT, "ScalingReplicaSet", message);
        }
    }
}

/// Old sets beyond the history limit go, the lowest revisions first.
fn clean_up(planner: &mut Planner<'_, '_>, sets: &[Set<'_>], newest: usize, spec: &Spec) {
    let mut old: Vec<&Set<'_>> = sets
        .iter()
        .enumerate()
        .filter(|(i, set)| *i != newest && set.current == 0 && set.wanted == 0 && !set.has_pods)
        .map(|(_, set)| set)
        .collect();
    old.sort_by_key(|set| annotation(&set.object, REVISION).unwrap_or(0));
    let keep = usize::try_from(spec.history).unwrap_or(usize::MAX);
    for set in old.iter().take(old.len().saturating_sub(keep)) {
        planner.delete(Kind::ReplicaSet, &set.object);
    }
}

fn annotate_revision(planner: &mut Planner<'_, '_>, deployment: &Object<'_>, revision: i64) {
    if annotation(deployment, REVISION) != Some(revision) {
        let mut value = deployment.value.clone();
        read::object_mut(&mut value["metadata"], "annotations")[REVISION] = revision.to_string().into();
        planner.update(value);
    }
}

fn status(
    planner: &mut Planner<'_, '_>,
    deployment: &Object<'_>,
    sets: &[Set<'_>],
    newest: Option<usize>,
    spec: &Spec,
) {
    let sum = |f: fn(&Counts) -> i64| sets.iter().map(|set| f(&set.counts)).sum::<i64>();
    let (replicas, available) = (sum(|c| c.active), sum(|c| c.available));
    let updated = newest.map_or(0, |newest| sets[newest].counts.active);
    let wanted: i64 = sets.iter().map(|set| set.wanted).sum();
    let generation = pods::generation(deployment);
    let new_name = newest.map(|newest| sets[newest].object.name);
    let conditions = conditions(planner, deployment, spec, [replicas, updated, available], new_name);
    let status = Status::default()
        .nonzero("observedGeneration", generation)
        .nonzero("replicas", replicas)
        .nonzero("updatedReplicas", updated)
        .nonzero("readyReplicas", sum(|c| c.ready))
        .nonzero("availableReplicas", available)
        .nonzero("unavailableReplicas", (wanted - available).max(0))
        .always("terminatingReplicas", sum(|c| c.terminating))
        .nonempty("conditions", conditions)
        .build();
    planner.status(deployment, status);
}

/// `Available` and `Progressing`.
fn conditions(
    planner: &mut Planner<'_, '_>,
    deployment: &Object<'_>,
    spec: &Spec,
    [replicas, updated, available]: [i64; 3],
    new_set: Option<&str>,
) -> Value {
    let now = rfc3339(planner.world.now);
    let old = |type_: &str| read::condition(deployment.value, type_);
    let enough = available >= spec.replicas - spec.max_unavailable;
    let (status, reason, message) = if enough {
        ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    } else {
        ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    };
    let mut conditions = vec![condition(old("Available"), "Available", status, reason, message, false, &now)];

    if let Some(deadline) = spec.deadline {
        let complete = updated == spec.replicas && replicas == spec.replicas && available == spec.replicas;
        let before = old("Progressing");
        let progressed =
            [("replicas", replicas), ("updatedReplicas", updated), ("availableReplicas", available)]
                .iter()
                .any(|(key, count)| {
                    read::at(deployment.value, "status")
                        .and_then(|s| s.get(key))
                        .and_then(Value::as_i64)
                        .unwrap_or(0)
                        != *count
                });
        let was = before.and_then(|condition| read::text(condition, "reason"));
        let since = before.and_then(|c| read::text(c, "lastUpdateTime")?.parse().ok());
        let expires = since.and_then(|since| add_seconds(since, deadline));
        let set = new_set.unwrap_or(deployment.name);
        let quoted = |verb: &str| format!("ReplicaSet \"{set}\" {verb}.");
        let progressing = if complete && new_set.is_some() {
            let message = quoted("has successfully progressed");
            condition(before, "Progressing", "True", "NewReplicaSetAvailable", &message, false, &now)
        } else if was == Some("NewReplicaSetAvailable") && new_set.is_some() && updated == replicas {
            // Rolled out before; that a pod is away now is no rollout, and no deadline runs.
            before.cloned().unwrap_or_default()
        } else if spec.paused {
            condition(
                before,
                "Progressing",
                "Unknown",
                "DeploymentPaused",
                "Deployment is paused",
                false,
                &now,
            )
        } else if was == Some("ProgressDeadlineExceeded") && !progressed {
            before.cloned().unwrap_or_default()
        } else if !progressed
            && was != Some("NewReplicaSetAvailable")
            && expires.is_some_and(|at| at <= planner.world.now)
        {
            let message = quoted("has timed out progressing");
            condition(before, "Progressing", "False", "ProgressDeadlineExceeded", &message, false, &now)
        } else {
            let message = quoted("is progressing");
            condition(before, "Progressing", "True", "ReplicaSetUpdated", &message, progressed, &now)
        };
        if matches!(read::text(&progressing, "reason"), Some("ReplicaSetUpdated"))
            && let Some(at) = read::text(&progressing, "lastUpdateTime")
                .and_then(|t| t.parse().ok())
                .and_then(|since| add_seconds(since, deadline))
        {
            planner.recheck_at(at);
        }
        conditions.push(progressing);
    }
    conditions.into()
}

/// A condition, with the times of `old` where it has not changed. `touch` moves `lastUpdateTime` all the same.
fn condition(
    old: Option<&Value>,
    type_: &str,
    status: &str,
    reason: &str,
    message: &str,
    touch: bool,
    now: &str,
) -> Value {
    let same = |key: &str, value: &str| old.and_then(|old| read::text(old, key)) == Some(value);
    let kept = |key: &str| old.and_then(|old| read::text(old, key)).unwrap_or(now).to_owned();
    let unchanged = !touch && same("status", status) && same("reason", reason) && same("message", message);
    json!({
        "type": type_,
        "status": status,
        "lastUpdateTime": if unchanged { kept("lastUpdateTime") } else { now.to_owned() },
        "lastTransitionTime": if same("status", status) { kept("lastTransitionTime") } else { now.to_owned() },
        "reason": reason,
        "message": message,
    })
}

#[cfg(test)]
#[path = "deployment_tests.rs"]
mod tests;
