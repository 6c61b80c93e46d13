//! ControllerRevisions: the templates that StatefulSets and DaemonSets have had.

use serde_json::{Value, json};

use super::pods;
use crate::names::template_hash;
use crate::planner::Planner;
use crate::read::{self, Labels, Malformed};
use crate::world::{Kind, Object};

/// Label of pods: which revision they are of. A DaemonSet's has the hash, a StatefulSet's the revision's name.
pub(super) const POD_REVISION: &str = "controller-revision-hash";
const HASH: &str = "controller.kubernetes.io/hash";

/// The revisions of one owner.
pub(super) struct Revisions<'a> {
    /// Hash of the template in the spec.
    pub(super) hash: String,
    /// Name of its revision.
    pub(super) name: String,
    stored: Vec<Object<'a>>,
}

impl<'a> Revisions<'a> {
    /// Find the owner's revisions; create that of the template in its spec when it is new, or number it anew when the
    /// owner came back to it.
    pub(super) fn of(
        planner: &mut Planner<'_, 'a>,
        kind: Kind,
        owner: &Object<'a>,
        template: &Value,
    ) -> Self {
        let world = planner.world;
        let hash = template_hash(template);
        let name = format!("{}-{hash}", owner.name);
        let mut stored: Vec<_> =
            world.owned(Kind::ControllerRevision, owner.uid).filter(|revision| !revision.deleting).collect();
        stored.sort_by_key(number);
        let highest = stored.last().map_or(0, number);
        match stored.iter().find(|revision| revision.name == name) {
            Some(revision) if number(revision) < highest => {
                let mut value = revision.value.clone();
                value["revision"] = (highest + 1).into();
                planner.update(value);
            }
            Some(_) => {}
            // Somebody else's object under this name keeps us from remembering the revision, not from running pods.
            None if world.named(Kind::ControllerRevision, owner.namespace, &name).is_some() => {}
            None => {
                let labels = read::at(owner.value, "spec.selector.matchLabels").cloned();
                let mut data = template.clone();
                data["$patch"] = "replace".into();
                let mut revision = json!({
                    "apiVersion": "apps/v1",
                    "kind": "ControllerRevision",
                    "metadata": {
                        "name": name,
                        "namespace": owner.namespace,
                        "labels": labels.unwrap_or_else(|| json!({})),
                        "ownerReferences": [pods::owner_reference(kind, owner)],
                    },
                    "data": { "spec": { "template": data } },
                    "revision": highest + 1,
                });
                pods::set_label(&mut revision, HASH, &hash);
                planner.create(revision);
            }
        }
        Self { hash, name, stored }
    }

    /// Forget the oldest revisions that no pod is of, beyond `spec.revisionHistoryLimit`.
    pub(super) fn clean_up(
        &self,
        planner: &mut Planner<'_, 'a>,
        owner: &Object<'a>,
        pods: &[usize],
        keep: &[&str],
    ) -> Result<(), Malformed> {
        let limit = read::count(owner.value, "spec.revisionHistoryLimit")?.unwrap_or(10);
        let world = planner.world;
        let in_use = |revision: &Object<'_>| {
            let of_pod = |&i: &usize| {
                let label = read::label(world.pods[i].object.labels, POD_REVISION);
                label == Some(revision.name) || label.is_some() && label == read::label(revision.labels, HASH)
            };
            revision.name == self.name || keep.contains(&revision.name) || pods.iter().any(of_pod)
        };
        let old: Vec<_> = self.stored.iter().filter(|revision| !in_use(revision)).collect();
        let excess = old.len().saturating_sub(usize::try_from(limit).unwrap_or(usize::MAX));
        for revision in &old[..excess] {
            planner.delete(Kind::ControllerRevision, revision);
        }
        Ok(())
    }

    /// The template of a stored revision.
    pub(super) fn template(&self, name: &str) -> Option<Value> {
        let revision = self.stored.iter().find(|revision| revision.name == name)?;
        let mut template = read::at(revision.value, "data.spec.template")?.clone();
        template.as_object_mut()?.remove("$patch");
        Some(template)
    }
}

fn number(revision: &Object<'_>) -> i64 {
    read::number(revision.value, "revision").unwrap_or(0)
}

/// The revision that a pod says it is of.
pub(super) fn of_pod(labels: Labels<'_>) -> &str {
    read::label(labels, POD_REVISION).unwrap_or_default()
}
