//! What all workload controllers do with pods: make them from a template, claim them, count them, choose victims.

use std::cmp::Ordering;
use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use crate::defaults;
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::selector::Selector;
use crate::world::{Kind, Object, Phase, Pod};

/// The reference of a controlled object to its controller.
pub(crate) fn owner_reference(kind: Kind, owner: &Object<'_>) -> Value {
    json!({
        "apiVersion": kind.api_version(),
        "kind": kind.name(),
        "name": owner.name,
        "uid": owner.uid,
        "controller": true,
        "blockOwnerDeletion": true,
    })
}

/// The template at `spec.template`, with the checks that the API server makes: it has containers and, when there is a
/// selector, labels that it selects.
pub(crate) fn template<'a>(
    owner: &Object<'a>,
    selector: Option<&Selector<'_>>,
) -> Result<&'a Value, Malformed> {
    let template = read::at(owner.value, "spec.template")
        .ok_or_else(|| Malformed::new("spec.template", "required, but absent"))?;
    let inside = |error: Malformed| error.within("spec.template");
    read::map(template, "metadata").map_err(inside)?;
    let labels = read::labels(template, "metadata.labels").map_err(inside)?;
    read::labels(template, "metadata.annotations").map_err(inside)?;
    if read::list(template, "spec.containers").map_err(inside)?.is_empty() {
        return Err(Malformed::new("spec.template.spec.containers", "at least one container is needed"));
    }
    if selector.is_some_and(|selector| !selector.matches(labels)) {
        let cause = "does not match spec.template.metadata.labels, so the pods would not be found again";
        return Err(Malformed::new("spec.selector", cause));
    }
    Ok(template)
}

/// `spec.selector` as a LabelSelector, which must be there and select something specific.
pub(crate) fn selector<'a>(owner: &Object<'a>) -> Result<Selector<'a>, Malformed> {
    Selector::parse(owner.value, "spec.selector")?
        .filter(|selector| !selector.is_empty())
        .ok_or_else(|| Malformed::new("spec.selector", "required, but absent or empty"))
}

/// How the pod is called.
pub(crate) enum Name {
    /// Five characters after the prefix.
    Generated(String),
    /// Exactly this.
    Fixed(String),
}

/// A pod from a template, complete with the API server's defaults. `adjust` makes the controller's own changes first.
/// Returns the pod's name.
pub(crate) fn create_pod(
    planner: &mut Planner<'_, '_>,
    kind: Kind,
    owner: &Object<'_>,
    template: &Value,
    name: Name,
    adjust: impl FnOnce(&mut Value),
) -> String {
    let mut metadata = Map::new();
    let name = match name {
        Name::Fixed(name) => name,
        Name::Generated(base) => {
            let world = planner.world;
            metadata.insert("generateName".into(), base.clone().into());
            planner.free_name("Pod", owner.namespace, &base, |name| {
                world.pod_named(owner.namespace, name).is_some()
            })
        }
    };
    metadata.insert("name".into(), name.clone().into());
    metadata.insert("namespace".into(), owner.namespace.into());
    for key in ["labels", "annotations", "finalizers"] {
        if let Some(value) = template.pointer(&format!("/metadata/{key}")).filter(|value| !value.is_null()) {
            metadata.insert(key.into(), value.clone());
        }
    }
    metadata.insert("ownerReferences".into(), json!([owner_reference(kind, owner)]));
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": template.get("spec").cloned().unwrap_or_default(),
    });
    adjust(&mut pod);
    defaults::apply("Pod", &mut pod);
    planner.create(pod);
    name
}

/// Set a label of an object in the making.
pub(crate) fn set_label(object: &mut Value, key: &str, value: &str) {
    read::object_mut(read::object_mut(object, "metadata"), "labels")[key] = value.into();
}

/// The pods of a controller, by index: those it owns and still selects, and orphans that it selects, which it adopts.
/// Those it owns but no longer selects are released.
pub(crate) fn claim(
    planner: &mut Planner<'_, '_>,
    kind: Kind,
    owner: &Object<'_>,
    selector: &Selector<'_>,
    may_adopt: impl Fn(&Pod<'_>) -> bool,
) -> Vec<usize> {
    let world = planner.world;
    let mut claimed = Vec::new();
    for &i in world.pods_of(owner.uid) {
        let pod = &world.pods[i];
        if selector.matches(pod.object.labels) || pod.object.deleting {
            claimed.push(i);
        } else if planner.touched.insert(i) {
            let mut value = pod.object.value.clone();
            if let Some(Value::Array(owners)) = value.pointer_mut("/metadata/ownerReferences") {
                owners.retain(|reference| read::text(reference, "uid") != Some(owner.uid));
            }
            planner.update(value);
        }
    }
    if owner.uid.is_empty() {
        return claimed;
    }
    for &i in world.orphan_pods(owner.namespace) {
        let pod = &world.pods[i];
        if pod.active() && selector.matches(pod.object.labels) && may_adopt(pod) && planner.touched.insert(i)
        {
            let mut value = pod.object.value.clone();
            let reference = owner_reference(kind, owner);
            match value.pointer_mut("/metadata/ownerReferences") {
                Some(Value::Array(owners)) => owners.push(reference),
                _ => value["metadata"]["ownerReferences"] = json!([reference]),
            }
            planner.update(value);
            claimed.push(i);
        }
    }
    claimed
}

/// Whether a pod has been ready for `min_ready` seconds; when it only needs time, the plan is to be made again then.
pub(crate) fn available(planner: &mut Planner<'_, '_>, pod: &Pod<'_>, min_ready: i64) -> bool {
    if !pod.ready {
        return false;
    }
    if min_ready == 0 {
        return true;
    }
    let Some(until) = pod.ready_since().and_then(|since| add_seconds(since, min_ready)) else { return false };
    planner.recheck_at(until);
    until <= planner.world.now
}

/// `time` + `seconds`, unless that is beyond the calendar.
pub(crate) fn add_seconds(time: Timestamp, seconds: i64) -> Option<Timestamp> {
    time.checked_add(SignedDuration::from_secs(seconds)).ok()
}

/// Numbers that statuses are made of. Finished pods do not count, terminating ones only as such.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) active: i64,
    pub(crate) ready: i64,
    pub(crate) available: i64,
    pub(crate) terminating: i64,
}

pub(crate) fn count(planner: &mut Planner<'_, '_>, pods: &[usize], min_ready: i64) -> Counts {
    let mut counts = Counts::default();
    for &i in pods {
        let pod = planner.world.pods[i];
        if pod.active() {
            counts.active += 1;
            counts.ready += i64::from(pod.ready);
            counts.available += i64::from(available(planner, &pod, min_ready));
        } else if pod.object.deleting && !pod.finished() {
            counts.terminating += 1;
        }
    }
    counts
}

/// The `count` pods of `pods` that can best be spared, in the ReplicaSet controller's order: not bound, not running, not
/// ready, cheaper to delete, on a node with more of the same (`related`), ready for less long, newer.
pub(crate) fn victims(
    planner: &Planner<'_, '_>,
    pods: &[usize],
    related: &[usize],
    count: usize,
) -> Vec<usize> {
    let world = planner.world;
    let mut per_node: HashMap<&str, usize> = HashMap::new();
    for &i in related {
        if let Some(node) = world.pods[i].node.filter(|_| world.pods[i].active()) {
            *per_node.entry(node).or_default() += 1;
        }
    }
    let phase_rank = |phase| match phase {
        Phase::Pending => 0,
        Phase::Unknown => 1,
        _ => 2,
    };
    let cost = |pod: &Pod<'_>| {
        let annotations = pod.object.value.pointer("/metadata/annotations").and_then(Value::as_object);
        read::label(annotations, "controller.kubernetes.io/pod-deletion-cost")
            .and_then(|c| c.parse::<i32>().ok())
    };
    let mut ranked = pods.to_vec();
    ranked.sort_by(|&a, &b| {
        let (a, b) = (&world.pods[a], &world.pods[b]);
        let doubled = |pod: &Pod<'_>| pod.node.and_then(|node| per_node.get(node)).copied().unwrap_or(0);
        let newer_first = |a: Option<Timestamp>, b: Option<Timestamp>| match (a, b) {
            (Some(a), Some(b)) => b.cmp(&a),
            _ => Ordering::Equal,
        };
        a.node
            .is_some()
            .cmp(&b.node.is_some())
            .then(phase_rank(a.phase).cmp(&phase_rank(b.phase)))
            .then(a.ready.cmp(&b.ready))
            .then(cost(a).unwrap_or(0).cmp(&cost(b).unwrap_or(0)))
            .then(doubled(b).cmp(&doubled(a)))
            .then(newer_first(a.ready_since(), b.ready_since()))
            .then(b.object.created.cmp(a.object.created))
            // Nothing tells them apart: the later name goes, so that a lab repeats.
            .then(b.object.name.cmp(a.object.name))
    });
    ranked.truncate(count);
    ranked
}

/// `spec.minReadySeconds`.
pub(crate) fn min_ready_seconds(owner: &Object<'_>) -> Result<i64, Malformed> {
    Ok(read::count(owner.value, "spec.minReadySeconds")?.unwrap_or(0))
}

/// `metadata.generation`, as statuses report it.
pub(crate) fn generation(owner: &Object<'_>) -> i64 {
    read::number(owner.value, "metadata.generation").unwrap_or(0)
}

/// A status under construction: zeroes are left out unless the API always shows them.
#[derive(Debug, Default)]
pub(crate) struct Status(Map<String, Value>);

impl Status {
    pub(crate) fn always(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.insert(key.into(), value.into());
        self
    }

    pub(crate) fn nonzero(self, key: &str, value: i64) -> Self {
        if value == 0 { self } else { self.always(key, value) }
    }

    pub(crate) fn nonempty(self, key: &str, value: Value) -> Self {
        match &value {
            Value::Array(items) if items.is_empty() => self,
            Value::String(text) if text.is_empty() => self,
            Value::Null => self,
            _ => self.always(key, value),
        }
    }

    pub(crate) fn build(self) -> Value {
        Value::Object(self.0)
    }
}
