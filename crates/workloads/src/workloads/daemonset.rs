//! DaemonSets: one pod on every node that its template fits.

use std::collections::BTreeMap;
use std::rc::Rc;

use serde_json::{Value, json};

use super::pods::{self, Name, Status};
use super::revisions::{self, POD_REVISION, Revisions};
use crate::placement::{Effect, NodeInfo, NodeRules};
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::world::{Kind, Object, Pod};

const COMPONENT: &str = "daemonset-controller";

struct Spec {
    rolling: bool,
    max_unavailable: i64,
    max_surge: i64,
    min_ready: i64,
}

impl Spec {
    fn parse(set: &Object<'_>, desired: i64) -> Result<Self, Malformed> {
        let value = set.value;
        let rolling = match read::string(value, "spec.updateStrategy.type")?.unwrap_or("RollingUpdate") {
            "RollingUpdate" => true,
            "OnDelete" => false,
            other => {
                let cause = format!("{other:?} is not one of RollingUpdate, OnDelete");
                return Err(Malformed::new("spec.updateStrategy.type", cause));
            }
        };
        let bound = |name: &str| {
            read::count_or_percent(value, &format!("spec.updateStrategy.rollingUpdate.{name}"), desired, true)
        };
        let max_surge = bound("maxSurge")?.unwrap_or(0);
        let max_unavailable = bound("maxUnavailable")?.unwrap_or(i64::from(max_surge == 0));
        // Both zero is refused by the API; the roll would never begin.
        let max_unavailable = if max_surge == 0 { max_unavailable.max(1) } else { max_unavailable };
        Ok(Self { rolling, max_unavailable, max_surge, min_ready: pods::min_ready_seconds(set)? })
    }
}

/// Which node a daemon's pod is for: where it is bound, or where its affinity sends it.
fn target<'a>(pod: &Pod<'a>) -> Option<&'a str> {
    let terms = "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
    pod.node.or_else(|| {
        let term = read::at(pod.object.value, terms)?.get(0)?;
        term.pointer("/matchFields/0/values/0")?.as_str()
    })
}

pub(super) fn reconcile<'a>(planner: &mut Planner<'_, 'a>, set: &Object<'a>) -> Result<(), Malformed> {
    let selector = pods::selector(set)?;
    let template = pods::template(set, Some(&selector))?;
    if set.uid.is_empty() {
        return Err(Malformed::new("metadata.uid", "absent, so that pods cannot refer to their owner"));
    }
    let mut pod_spec = template["spec"].clone();
    tolerate(&mut pod_spec);
    let rules = NodeRules::parse(&pod_spec).map_err(|error| error.within("spec.template.spec"))?;
    let nodes = Rc::clone(&planner.nodes);
    let fits: BTreeMap<&str, Fit> =
        nodes.iter().map(|node| (node.object.name, Fit::of(&rules, node))).collect();
    let desired = i64::try_from(fits.values().filter(|fit| fit.run).count()).unwrap_or(i64::MAX);
    let spec = Spec::parse(set, desired)?;

    let claimed = pods::claim(planner, Kind::DaemonSet, set, &selector, |pod| target(pod).is_some());
    let revisions = Revisions::of(planner, Kind::DaemonSet, set, template);
    let world = planner.world;
    let mut on_node: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for &i in &claimed {
        if let Some(node) = target(&world.pods[i]) {
            on_node.entry(node).or_default().push(i);
        }
    }

    let daemons = Daemons { set, template, pod_spec: &pod_spec, revisions: &revisions, spec: &spec };
    for (&node, &fit) in &fits {
        daemons.place(planner, node, fit, on_node.get(node).map_or(&[], Vec::as_slice));
    }
    if spec.rolling {
        daemons.roll(planner, &fits, &on_node, desired);
    }
    daemons.status(planner, &fits, &on_node, desired);
    revisions.clean_up(planner, set, &claimed, &[])
}

/// Daemons stay on nodes in trouble, and go where others may not yet.
fn tolerate(spec: &mut Value) {
    let on_host = spec.get("hostNetwork") == Some(&Value::Bool(true));
    let mut tolerations = match &spec["tolerations"] {
        Value::Array(tolerations) => tolerations.clone(),
        Value::Null => Vec::new(),
        // Of a wrong type: the parse that follows reports it.
        _ => return,
    };
    for (key, effect) in [
        ("not-ready", "NoExecute"),
        ("unreachable", "NoExecute"),
        ("disk-pressure", "NoSchedule"),
        ("memory-pressure", "NoSchedule"),
        ("pid-pressure", "NoSchedule"),
        ("unschedulable", "NoSchedule"),
        ("network-unavailable", "NoSchedule"),
    ] {
        let toleration =
            json!({ "key": format!("node.kubernetes.io/{key}"), "operator": "Exists", "effect": effect });
        if (key != "network-unavailable" || on_host) && !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
    spec["tolerations"] = tolerations.into();
}

/// Whether daemons belong on a node.
#[derive(Debug, Clone, Copy)]
struct Fit {
    run: bool,
    /// A pod that is there may stay, although none would be started now.
    stay: bool,
}

impl Fit {
    fn of(rules: &NodeRules<'_>, node: &NodeInfo<'_>) -> Self {
        let selected = rules.select(&node.object);
        let stay = selected && rules.untolerated(node, &[Effect::NoExecute]).is_none();
        let run = stay && rules.untolerated(node, &[Effect::NoSchedule]).is_none() && !node.object.deleting;
        Self { run, stay }
    }
}

struct Daemons<'r, 'a> {
    set: &'r Object<'a>,
    template: &'a Value,
    /// The template's spec with the daemons' tolerations.
    pod_spec: &'r Value,
    revisions: &'r Revisions<'a>,
    spec: &'r Spec,
}

impl Daemons<'_, '_> {
    fn is_new(&self, pod: &Pod<'_>) -> bool {
        revisions::of_pod(pod.object.labels) == self.revisions.hash
    }

    /// See to it that the node has its daemon, or has none.
    fn place(&self, planner: &mut Planner<'_, '_>, node: &str, fit: Fit, pods: &[usize]) {
        let world = planner.world;
        for &i in pods.iter().filter(|&&i| world.pods[i].finished()) {
            self.delete(planner, i);
        }
        let active: Vec<usize> = pods.iter().copied().filter(|&i| world.pods[i].active()).collect();
        let terminating = pods.iter().any(|&i| world.pods[i].object.deleting && !world.pods[i].finished());
        if active.is_empty() {
            // The old daemon's ports are free when it is gone.
            if fit.run && !terminating {
                self.create(planner, node);
            }
        } else if !fit.stay {
            active.into_iter().for_each(|i| self.delete(planner, i));
        } else if self.spec.max_surge == 0 || !self.spec.rolling {
            // Twins: the oldest stays.
            let key = |&i: &usize| (world.pods[i].object.created, world.pods[i].object.name);
            let oldest = active.iter().min_by_key(|i| key(i)).copied();
            active.into_iter().filter(|i| Some(*i) != oldest).for_each(|i| self.delete(planner, i));
        }
    }

    /// Replace outdated daemons within `maxUnavailable`, or next to new ones within `maxSurge`.
    fn roll(
        &self,
        planner: &mut Planner<'_, '_>,
        fits: &BTreeMap<&str, Fit>,
        on_node: &BTreeMap<&str, Vec<usize>>,
        desired: i64,
    ) {
        let world = planner.world;
        let (mut unavailable, mut surging) = (0, 0);
        let (mut broken, mut outdated) = (Vec::new(), Vec::new());
        for (node, fit) in fits.iter().filter(|(_, fit)| fit.run) {
            debug_assert!(fit.stay, "a daemon that runs may stay");
            let pods = on_node.get(node).map_or(&[][..], Vec::as_slice);
            let pick = |new: bool| {
                pods.iter().copied().find(|&i| world.pods[i].active() && self.is_new(&world.pods[i]) == new)
            };
            let (old, new) = (pick(false), pick(true));
            let up = |planner: &mut Planner<'_, '_>, i: Option<usize>| {
                i.is_some_and(|i| pods::available(planner, &world.pods[i], self.spec.min_ready))
            };
            let (old_up, new_up) = (up(planner, old), up(planner, new));
            if !old_up && !new_up {
                unavailable += 1;
            }
            match (old, new) {
                // The new one has taken over, or there is nothing to take over from.
                (Some(old), Some(_)) if new_up || !old_up => self.delete(planner, old),
                (Some(_), Some(_)) => surging += 1,
                (Some(old), None) if !old_up => broken.push((*node, old)),
                (Some(old), None) => outdated.push((*node, old)),
                _ => {}
            }
        }
        if self.spec.max_surge > 0 {
            // A new daemon starts beside the old one.
            let room = usize::try_from((self.spec.max_surge - surging).max(0)).unwrap_or(usize::MAX);
            for (node, old) in broken {
                self.delete(planner, old);
                self.create(planner, node);
            }
            for (node, _) in outdated.into_iter().take(room) {
                self.create(planner, node);
            }
            return;
        }
        // One that does not work is no loss.
        for (_, old) in broken {
            self.delete(planner, old);
        }
        let room =
            usize::try_from((self.spec.max_unavailable.min(desired) - unavailable).max(0)).unwrap_or(0);
        for (_, old) in outdated.into_iter().take(room) {
            self.delete(planner, old);
        }
    }

    fn create(&self, planner: &mut Planner<'_, '_>, node: &str) {
        let set = self.set;
        let base = Name::Generated(format!("{}-", set.name));
        let generation = read::label(
            set.value.pointer("/metadata/annotations").and_then(Value::as_object),
            "deprecated.daemonset.template.generation",
        )
        .unwrap_or("1");
        let name = pods::create_pod(planner, Kind::DaemonSet, set, self.template, base, |pod| {
            pods::set_label(pod, POD_REVISION, &self.revisions.hash);
            pods::set_label(pod, "pod-template-generation", generation);
            pod["spec"] = self.pod_spec.clone();
            pin(&mut pod["spec"], node);
        });
        planner.normal(set, COMPONENT, "SuccessfulCreate", format!("Created pod: {name}"));
    }

    fn delete(&self, planner: &mut Planner<'_, '_>, i: usize) {
        let object = planner.world.pods[i].object;
        if !object.deleting && !planner.touched.contains(&i) {
            planner.delete_pod(i);
            planner.normal(self.set, COMPONENT, "SuccessfulDelete", format!("Deleted pod: {}", object.name));
        }
    }

    fn status(
        &self,
        planner: &mut Planner<'_, '_>,
        fits: &BTreeMap<&str, Fit>,
        on_node: &BTreeMap<&str, Vec<usize>>,
        desired: i64,
    ) {
        let world = planner.world;
        let (mut current, mut misplaced, mut ready, mut available, mut updated) = (0, 0, 0, 0, 0);
        for (node, pods) in on_node {
            let active: Vec<_> = pods.iter().map(|&i| world.pods[i]).filter(Pod::active).collect();
            if active.is_empty() {
                continue;
            }
            if !fits.get(node).is_some_and(|fit| fit.run) {
                misplaced += i64::from(fits.contains_key(node));
                continue;
            }
            current += 1;
            updated += i64::from(active.iter().any(|pod| self.is_new(pod)));
            if active.iter().any(|pod| pod.ready) {
                ready += 1;
            }
            if active.iter().any(|pod| pods::available(planner, pod, self.spec.min_ready)) {
                available += 1;
            }
        }
        let status = Status::default()
            .always("currentNumberScheduled", current)
            .always("numberMisscheduled", misplaced)
            .always("desiredNumberScheduled", desired)
            .always("numberReady", ready)
            .nonzero("observedGeneration", pods::generation(self.set))
            .nonzero("updatedNumberScheduled", updated)
            .nonzero("numberAvailable", available)
            .nonzero("numberUnavailable", desired - available)
            .build();
        planner.status(self.set, status);
    }
}

/// Make the scheduler put the pod on this node: every required term also asks for its name.
fn pin(spec: &mut Value, node: &str) {
    let by_name = json!([{ "key": "metadata.name", "operator": "In", "values": [node] }]);
    let affinity = read::object_mut(read::object_mut(spec, "affinity"), "nodeAffinity");
    let required = read::object_mut(affinity, "requiredDuringSchedulingIgnoredDuringExecution");
    match required["nodeSelectorTerms"].as_array_mut() {
        Some(terms) if !terms.is_empty() => {
            terms.iter_mut().for_each(|term| term["matchFields"] = by_name.clone());
        }
        _ => required["nodeSelectorTerms"] = json!([{ "matchFields": by_name }]),
    }
}
