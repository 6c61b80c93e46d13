//! ReplicaSet and ReplicationController: a number of interchangeable pods.

use serde_json::Value;

use super::pods::{self, Name, Status};
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::selector::Selector;
use crate::world::{Kind, Object};

pub(super) fn reconcile_set<'a>(planner: &mut Planner<'_, 'a>, set: &Object<'a>) -> Result<(), Malformed> {
    let selector = pods::selector(set)?;
    reconcile(planner, Kind::ReplicaSet, set, &selector)
}

pub(super) fn reconcile_controller<'a>(
    planner: &mut Planner<'_, 'a>,
    rc: &Object<'a>,
) -> Result<(), Malformed> {
    let mut labels = read::labels(rc.value, "spec.selector")?;
    if labels.is_none_or(serde_json::Map::is_empty) {
        labels = read::labels(rc.value, "spec.template.metadata.labels")?;
    }
    let selector = Selector::from_map(labels);
    if selector.is_empty() {
        return Err(Malformed::new("spec.selector", "required, but absent, and the template has no labels"));
    }
    reconcile(planner, Kind::ReplicationController, rc, &selector)
}

fn reconcile<'a>(
    planner: &mut Planner<'_, 'a>,
    kind: Kind,
    owner: &Object<'a>,
    selector: &Selector<'a>,
) -> Result<(), Malformed> {
    let component = match kind {
        Kind::ReplicaSet => "replicaset-controller",
        _ => "replication-controller",
    };
    let template = pods::template(owner, Some(selector))?;
    let replicas = read::count(owner.value, "spec.replicas")?.unwrap_or(1);
    let min_ready = pods::min_ready_seconds(owner)?;
    if owner.uid.is_empty() {
        return Err(Malformed::new("metadata.uid", "absent, so that pods cannot refer to their owner"));
    }
    let claimed = pods::claim(planner, kind, owner, selector, |_| true);
    let world = planner.world;
    let active: Vec<usize> = claimed.iter().copied().filter(|&i| world.pods[i].active()).collect();
    let have = i64::try_from(active.len()).unwrap_or(i64::MAX);
    for _ in have..replicas {
        let base = Name::Generated(format!("{}-", owner.name));
        let name = pods::create_pod(planner, kind, owner, template, base, |_| {});
        planner.normal(owner, component, "SuccessfulCreate", format!("Created pod: {name}"));
    }
    if have > replicas {
        let related = related(planner, kind, owner, &claimed);
        let count = usize::try_from(have - replicas).unwrap_or(usize::MAX);
        for i in pods::victims(planner, &active, &related, count) {
            planner.delete_pod(i);
            let name = world.pods[i].object.name;
            planner.normal(owner, component, "SuccessfulDelete", format!("Deleted pod: {name}"));
        }
    }
    let status = status(planner, kind, owner, template, &claimed, min_ready);
    planner.status(owner, status);
    Ok(())
}

/// Pods of all ReplicaSets of the same Deployment: scaling down during a rollout prefers nodes that hold several.
fn related(planner: &Planner<'_, '_>, kind: Kind, owner: &Object<'_>, own: &[usize]) -> Vec<usize> {
    match owner.controller {
        Some(deployment) if kind == Kind::ReplicaSet => {
            let world = planner.world;
            let sets = world.owned(Kind::ReplicaSet, deployment);
            sets.flat_map(|set| world.pods_of(set.uid)).copied().collect()
        }
        _ => own.to_vec(),
    }
}

fn status(
    planner: &mut Planner<'_, '_>,
    kind: Kind,
    owner: &Object<'_>,
    template: &Value,
    claimed: &[usize],
    min_ready: i64,
) -> Value {
    let counts = pods::count(planner, claimed, min_ready);
    let labels = Selector::from_map(template.pointer("/metadata/labels").and_then(Value::as_object));
    let world = planner.world;
    let fully_labeled = claimed
        .iter()
        .map(|&i| &world.pods[i])
        .filter(|pod| pod.active() && labels.matches(pod.object.labels))
        .count();
    let status = Status::default()
        .always("replicas", counts.active)
        .nonzero("fullyLabeledReplicas", i64::try_from(fully_labeled).unwrap_or(i64::MAX))
        .nonzero("readyReplicas", counts.ready)
        .nonzero("availableReplicas", counts.available)
        .nonzero("observedGeneration", pods::generation(owner));
    // ReplicationControllers do not report terminating replicas.
    if kind == Kind::ReplicaSet { status.always("terminatingReplicas", counts.terminating) } else { status }
        .build()
}
