//! StatefulSets: numbered pods that keep their names, started and stopped in order unless told otherwise.
//!
//! Claims of `volumeClaimTemplates` are named in the pods, but not created: storage is nobody's business here.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::pods::{self, Name, Status};
use super::revisions::{self, POD_REVISION, Revisions};
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::world::{Kind, Object, Phase, Pod};

const COMPONENT: &str = "statefulset-controller";

struct Spec<'a> {
    replicas: i64,
    start: i64,
    ordered: bool,
    rolling: bool,
    partition: i64,
    min_ready: i64,
    service: &'a str,
}

impl<'a> Spec<'a> {
    fn parse(set: &Object<'a>) -> Result<Self, Malformed> {
        let value = set.value;
        let choice = |path: &str, [yes, no]: [&str; 2]| match read::string(value, path)?.unwrap_or(yes) {
            found if found == yes => Ok(true),
            found if found == no => Ok(false),
            found => Err(Malformed::new(path, format!("{found:?} is not one of {yes}, {no}"))),
        };
        Ok(Self {
            replicas: read::count(value, "spec.replicas")?.unwrap_or(1),
            start: read::count(value, "spec.ordinals.start")?.unwrap_or(0),
            ordered: choice("spec.podManagementPolicy", ["OrderedReady", "Parallel"])?,
            rolling: choice("spec.updateStrategy.type", ["RollingUpdate", "OnDelete"])?,
            partition: read::count(value, "spec.updateStrategy.rollingUpdate.partition")?.unwrap_or(0),
            min_ready: pods::min_ready_seconds(set)?,
            service: read::string(value, "spec.serviceName")?.unwrap_or_default(),
        })
    }

    fn ordinals(&self) -> std::ops::Range<i64> {
        self.start..self.start.saturating_add(self.replicas)
    }
}

pub(super) fn reconcile<'a>(planner: &mut Planner<'_, 'a>, set: &Object<'a>) -> Result<(), Malformed> {
    let selector = pods::selector(set)?;
    let template = pods::template(set, Some(&selector))?;
    let spec = Spec::parse(set)?;
    if set.uid.is_empty() {
        return Err(Malformed::new("metadata.uid", "absent, so that pods cannot refer to their owner"));
    }
    let claims = claim_volumes(set)?;
    let is_member = |pod: &Pod<'_>| ordinal(set.name, pod.object.name).is_some();
    let claimed = pods::claim(planner, Kind::StatefulSet, set, &selector, is_member);
    let world = planner.world;
    let members: BTreeMap<i64, usize> =
        claimed.iter().filter_map(|&i| Some((ordinal(set.name, world.pods[i].object.name)?, i))).collect();

    let revisions = Revisions::of(planner, Kind::StatefulSet, set, template);
    let current = read::text(set.value, "status.currentRevision").unwrap_or(&revisions.name).to_owned();
    let plan =
        Rollout { set, spec: &spec, template, claims: &claims, revisions: &revisions, current: &current };
    if plan.scale_up(planner, &members) && plan.scale_down(planner, &members) && spec.rolling {
        plan.update(planner, &members);
    }
    plan.status(planner, &members);
    revisions.clean_up(planner, set, &claimed, &[&current])
}

/// `n` of a pod called `<set>-<n>`.
fn ordinal(set: &str, pod: &str) -> Option<i64> {
    let digits = pod.strip_prefix(set)?.strip_prefix('-')?;
    let canonical = digits == "0" || !digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
    if canonical { digits.parse().ok() } else { None }
}

/// Names of `spec.volumeClaimTemplates`.
fn claim_volumes<'a>(set: &Object<'a>) -> Result<Vec<&'a str>, Malformed> {
    let mut names = Vec::new();
    for (i, claim) in read::list(set.value, "spec.volumeClaimTemplates")?.iter().enumerate() {
        let inside = |error: Malformed| error.within(&format!("spec.volumeClaimTemplates[{i}]"));
        let name = read::string(claim, "metadata.name").map_err(inside)?;
        names.push(name.ok_or_else(|| inside(Malformed::new("metadata.name", "required, but absent")))?);
    }
    Ok(names)
}

struct Rollout<'r, 'a> {
    set: &'r Object<'a>,
    spec: &'r Spec<'a>,
    template: &'a Value,
    claims: &'r [&'a str],
    revisions: &'r Revisions<'a>,
    /// Name of the revision that the set is coming from; the update revision when no update is under way.
    current: &'r str,
}

impl Rollout<'_, '_> {
    /// Create what is missing, in order. False when the set has to wait before anything else may happen.
    fn scale_up(&self, planner: &mut Planner<'_, '_>, members: &BTreeMap<i64, usize>) -> bool {
        let world = planner.world;
        let mut complete = true;
        for ordinal in self.spec.ordinals() {
            let healthy = match members.get(&ordinal) {
                None => {
                    self.create(planner, ordinal);
                    false
                }
                Some(&i) if world.pods[i].finished() => {
                    planner.delete_pod(i);
                    false
                }
                Some(&i) => self.healthy(planner, &world.pods[i]),
            };
            complete &= healthy;
            if !healthy && self.spec.ordered {
                return false;
            }
        }
        // In parallel, what starts or ends does not hold up the rest.
        complete || !self.spec.ordered
    }

    /// Delete pods beyond the wanted ordinals, highest first. False while there are some.
    fn scale_down(&self, planner: &mut Planner<'_, '_>, members: &BTreeMap<i64, usize>) -> bool {
        let wanted = self.spec.ordinals();
        let mut none = true;
        for (_, &i) in members.iter().rev().filter(|(ordinal, _)| !wanted.contains(ordinal)) {
            none = false;
            self.delete(planner, i);
            if self.spec.ordered {
                return false;
            }
        }
        none || !self.spec.ordered
    }

    /// Replace outdated pods one at a time, highest ordinal first, down to the partition.
    fn update(&self, planner: &mut Planner<'_, '_>, members: &BTreeMap<i64, usize>) {
        let wanted = self.spec.ordinals();
        let from = wanted.start.saturating_add(self.spec.partition);
        for (_, &i) in members.iter().rev().filter(|(o, _)| wanted.contains(o) && **o >= from) {
            let pod = &planner.world.pods[i];
            if revisions::of_pod(pod.object.labels) != self.revisions.name && !pod.object.deleting {
                self.delete(planner, i);
                return;
            }
            if !self.healthy(planner, pod) {
                return;
            }
        }
    }

    fn healthy(&self, planner: &mut Planner<'_, '_>, pod: &Pod<'_>) -> bool {
        pod.phase == Phase::Running
            && !pod.object.deleting
            && pods::available(planner, pod, self.spec.min_ready)
    }

    fn create(&self, planner: &mut Planner<'_, '_>, ordinal: i64) {
        let (set, name) = (self.set, format!("{}-{ordinal}", self.set.name));
        if planner.world.pod_named(set.namespace, &name).is_some() {
            let message = format!("pod {name:?} exists and is not the set's; delete or rename it");
            planner.warning(set, COMPONENT, "FailedCreate", message);
            return;
        }
        let keeps_current =
            self.spec.rolling && ordinal < self.spec.start.saturating_add(self.spec.partition);
        let stored = (keeps_current && self.current != self.revisions.name)
            .then(|| self.revisions.template(self.current))
            .flatten();
        let (template, revision) = match &stored {
            Some(template) => (template, self.current),
            None => (self.template, self.revisions.name.as_str()),
        };
        pods::create_pod(planner, Kind::StatefulSet, set, template, Name::Fixed(name.clone()), |pod| {
            pods::set_label(pod, "statefulset.kubernetes.io/pod-name", &name);
            pods::set_label(pod, "apps.kubernetes.io/pod-index", &ordinal.to_string());
            pods::set_label(pod, POD_REVISION, revision);
            pod["metadata"]["generateName"] = format!("{}-", set.name).into();
            let spec = &mut pod["spec"];
            spec["hostname"] = name.as_str().into();
            if !self.spec.service.is_empty() {
                spec["subdomain"] = self.spec.service.into();
            }
            self.mount_claims(spec, &name);
        });
        planner.normal(
            set,
            COMPONENT,
            "SuccessfulCreate",
            format!("create Pod {name} in StatefulSet {} successful", set.name),
        );
    }

    /// A claim replaces a volume of the same name.
    fn mount_claims(&self, spec: &mut Value, pod: &str) {
        if self.claims.is_empty() {
            return;
        }
        let mut volumes = spec["volumes"].as_array().cloned().unwrap_or_default();
        volumes.retain(|volume| read::text(volume, "name").is_none_or(|name| !self.claims.contains(&name)));
        for claim in self.claims {
            let source = json!({ "claimName": format!("{claim}-{pod}") });
            volumes.push(json!({ "name": claim, "persistentVolumeClaim": source }));
        }
        spec["volumes"] = volumes.into();
    }

    fn delete(&self, planner: &mut Planner<'_, '_>, i: usize) {
        let object = planner.world.pods[i].object;
        if !object.deleting {
            planner.delete_pod(i);
            let message = format!("delete Pod {} in StatefulSet {} successful", object.name, self.set.name);
            planner.normal(self.set, COMPONENT, "SuccessfulDelete", message);
        }
    }

    fn status(&self, planner: &mut Planner<'_, '_>, members: &BTreeMap<i64, usize>) {
        let world = planner.world;
        let update = self.revisions.name.as_str();
        let all: Vec<usize> = members.values().copied().collect();
        let counts = pods::count(planner, &all, self.spec.min_ready);
        let of = |revision: &str| {
            let is = |&&i: &&usize| {
                let pod = &world.pods[i];
                pod.active() && revisions::of_pod(pod.object.labels) == revision
            };
            i64::try_from(all.iter().filter(is).count()).unwrap_or(i64::MAX)
        };
        let (mut current, updated) = (self.current, of(update));
        // The update is over when every wanted pod is of the new revision and ready.
        if updated == self.spec.replicas && counts.active == updated && counts.ready == updated {
            current = update;
        }
        let status = Status::default()
            .nonzero("observedGeneration", pods::generation(self.set))
            .always("replicas", counts.active)
            .nonzero("readyReplicas", counts.ready)
            .nonzero("currentReplicas", of(current))
            .nonzero("updatedReplicas", updated)
            .always("currentRevision", current)
            .always("updateRevision", update)
            .always("collisionCount", 0)
            .always("availableReplicas", counts.available)
            .build();
        planner.status(self.set, status);
    }
}
