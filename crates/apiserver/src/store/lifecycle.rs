//! The end of objects: grace periods, finalizers, dependents, namespaces, expired events.
//!
//! One deletion leads to others; they go through a queue of work ([`State::drain`]), never through recursion, so that
//! no chain of owners can exhaust the stack.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use std::sync::Arc;

use super::options::{DeleteOptions, DeleteOutcome, Propagation};
use super::state::State;
use crate::crd;
use crate::error::ApiError;
use crate::json;
use crate::kinds::ResourceKey;

/// Holds an owner until its dependents are gone.
const FOREGROUND_FINALIZER: &str = "foregroundDeletion";
/// Grace period of a pod that does not set its own, as in Kubernetes.
const DEFAULT_GRACE_SECONDS: u64 = 30;
/// Longest grace period: what a timestamp can take; about 30 years.
const MAX_GRACE_SECONDS: u64 = 1_000_000_000;
/// How long events are kept, as in a real API server.
const EVENT_LIFE: SignedDuration = SignedDuration::from_hours(1);

/// A deletion, or part of one, that follows from another change.
#[derive(Debug)]
pub(super) enum PendingDelete {
    /// Its owner or its namespace goes away.
    Start { key: ResourceKey, propagation: Propagation },
    /// A dependent is gone: perhaps the owner need not wait any longer.
    Release(ResourceKey),
    /// Its kind is gone: nothing can hold it.
    Force(ResourceKey),
}

impl State {
    pub(super) fn delete(
        &mut self,
        key: &ResourceKey,
        options: &DeleteOptions,
        now: Timestamp,
    ) -> Result<DeleteOutcome, ApiError> {
        let current = Arc::clone(self.get(key)?);
        let kind = &self.known(&key.resource)?.kind;
        for (what, wanted, found) in [
            ("UID", &options.precondition.uid, json::uid(&current)),
            (
                "ResourceVersion",
                &options.precondition.resource_version,
                json::get_str(&current, &["metadata", "resourceVersion"]),
            ),
        ] {
            if let Some(wanted) = wanted.as_deref().filter(|wanted| *wanted != found) {
                let why = format_args!(
                    "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}"
                );
                return Err(ApiError::conflict(kind, &key.name, why));
            }
        }
        if kind.is("", "Namespace") && matches!(key.name.as_str(), "default" | "kube-system" | "kube-public")
        {
            return Err(ApiError::forbidden(kind, &key.name, "this namespace may not be deleted"));
        }
        if options.dry_run {
            return Ok(DeleteOutcome::Removed(current));
        }
        let outcome = self.start_delete(key, options.grace_period_seconds, options.propagation, now);
        self.drain(now);
        Ok(match outcome {
            Some(DeleteOutcome::Terminating(last)) => match self.find(key) {
                Some(object) => DeleteOutcome::Terminating(Arc::clone(object)),
                None => DeleteOutcome::Removed(last),
            },
            Some(removed) => removed,
            None => DeleteOutcome::Removed(current),
        })
    }

    /// Removes an object or marks it as terminating. `None`: there is no such object.
    fn start_delete(
        &mut self,
        key: &ResourceKey,
        grace: Option<u64>,
        propagation: Propagation,
        now: Timestamp,
    ) -> Option<DeleteOutcome> {
        let current = Arc::clone(self.find(key)?);
        let kind = Arc::clone(&self.collection(&key.resource)?.kind);
        if kind.is("", "Namespace") {
            return Some(DeleteOutcome::Terminating(self.start_namespace_delete(key, &current, now)));
        }
        let mut next = Value::clone(&current);
        let uid = json::uid(&current).to_owned();
        match propagation {
            Propagation::Background => {}
            Propagation::Orphan => {
                for dependent in self.dependents_of(&uid) {
                    self.disown(&dependent, &uid);
                }
            }
            // Once is enough: where owners form a ring, asking again would never end.
            Propagation::Foreground if has_finalizer(&current, FOREGROUND_FINALIZER) => {}
            Propagation::Foreground => {
                if self.is_held_by_dependents(&uid) {
                    let list = json::metadata(&mut next).entry("finalizers").or_insert_with(|| json!([]));
                    if let Some(list) = list.as_array_mut() {
                        list.push(json!(FOREGROUND_FINALIZER));
                    }
                }
                for key in self.dependents_of(&uid) {
                    self.pending.push_back(PendingDelete::Start { key, propagation });
                }
            }
        }
        let grace = if kind.is("", "Pod") { pod_grace(&current, grace) } else { 0 };
        if grace == 0 && json::finalizers(&next).is_empty() {
            return self.remove(key).map(DeleteOutcome::Removed);
        }
        let running = json::get_int(&current, &["metadata", "deletionGracePeriodSeconds"]);
        let was_terminating = json::is_terminating(&current);
        let shorter = running.is_none_or(|running| i64::try_from(grace).is_ok_and(|grace| grace < running));
        if !was_terminating || shorter {
            let seconds = i64::try_from(grace.min(MAX_GRACE_SECONDS)).unwrap_or(0);
            let end = now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(now);
            let generation = json::get_int(&current, &["metadata", "generation"]);
            let metadata = json::metadata(&mut next);
            metadata.insert("deletionTimestamp".to_owned(), json!(json::timestamp_text(end)));
            metadata.insert("deletionGracePeriodSeconds".to_owned(), json!(grace));
            if let (false, Some(generation)) = (was_terminating, generation) {
                metadata.insert("generation".to_owned(), json!(generation.saturating_add(1)));
            }
        }
        let state = if next == *current { current } else { self.commit(key, next) };
        Some(DeleteOutcome::Terminating(state))
    }

    fn start_namespace_delete(
        &mut self,
        key: &ResourceKey,
        current: &Arc<Value>,
        now: Timestamp,
    ) -> Arc<Value> {
        if json::is_terminating(current) {
            return Arc::clone(current);
        }
        let mut next = Value::clone(current);
        json::metadata(&mut next).insert("deletionTimestamp".to_owned(), json!(json::timestamp_text(now)));
        json::child(&mut next, "status").insert("phase".to_owned(), json!("Terminating"));
        let terminating = self.commit(key, next);
        let contents: Vec<ResourceKey> = self.contents_of(&key.name).collect();
        self.pending.extend(
            contents
                .into_iter()
                .map(|key| PendingDelete::Start { key, propagation: Propagation::Background }),
        );
        self.terminating_namespaces.insert(key.name.clone());
        terminating
    }

    /// Takes an object out and queues what follows for its dependents, owners and kind.
    fn remove(&mut self, key: &ResourceKey) -> Option<Arc<Value>> {
        let kind = Arc::clone(&self.collection(&key.resource)?.kind);
        let last = self.commit_removal(key)?;
        let uid = json::uid(&last);
        for dependent in self.dependents_of(uid) {
            let has_other_owner = self
                .find(&dependent)
                .is_some_and(|object| json::owner_uids(object).any(|owner| self.key_of_uid(owner).is_some()));
            if has_other_owner {
                self.disown(&dependent, uid);
            } else {
                self.pending
                    .push_back(PendingDelete::Start { key: dependent, propagation: Propagation::Background });
            }
        }
        for owner in json::owner_uids(&last) {
            if let Some(owner) = self.key_of_uid(owner).cloned() {
                self.pending.push_back(PendingDelete::Release(owner));
            }
        }
        if kind.is("", "Namespace") {
            self.terminating_namespaces.remove(&key.name);
        }
        if kind.is("apiextensions.k8s.io", "CustomResourceDefinition")
            && let Ok(custom) = crd::kind_of_definition(&last)
        {
            let resource = custom.group_resource();
            let objects = self.collection(&resource).map(|collection| collection.objects.keys().cloned());
            let keys: Vec<_> = objects
                .into_iter()
                .flatten()
                .map(|(namespace, name)| ResourceKey { resource: resource.clone(), namespace, name })
                .collect();
            if keys.is_empty() {
                self.remove_kind(&resource);
            }
            for key in keys {
                self.pending.push_back(PendingDelete::Force(key));
            }
        }
        Some(last)
    }

    /// Does the queued work, until nothing follows any more.
    pub(super) fn drain(&mut self, now: Timestamp) {
        loop {
            while let Some(work) = self.pending.pop_front() {
                match work {
                    PendingDelete::Start { key, propagation } => {
                        self.start_delete(&key, None, propagation, now);
                    }
                    PendingDelete::Release(key) => self.release_owner(&key),
                    PendingDelete::Force(key) => {
                        self.remove(&key);
                        self.remove_kind_if_undefined(&key);
                    }
                }
            }
            let finished: Vec<String> = self
                .terminating_namespaces
                .iter()
                .filter(|namespace| self.contents_of(namespace).next().is_none())
                .cloned()
                .collect();
            let mut removed = false;
            for name in finished {
                let key = ResourceKey::new("", "namespaces", "", name);
                if self.find(&key).is_some_and(|namespace| json::finalizers(namespace).is_empty()) {
                    removed |= self.remove(&key).is_some();
                }
            }
            if !removed && self.pending.is_empty() {
                return;
            }
        }
    }

    /// Removes a terminating object that nothing holds any more.
    pub(super) fn finish_if_released(&mut self, key: &ResourceKey) {
        let Some(object) = self.find(key) else { return };
        let waits = json::get_int(object, &["metadata", "deletionGracePeriodSeconds"]).unwrap_or(0) > 0;
        let is_namespace = key.resource.group.is_empty() && key.resource.resource == "namespaces";
        if json::is_terminating(object) && json::finalizers(object).is_empty() && !waits && !is_namespace {
            self.remove(key);
        }
    }

    /// Deletes an object all of whose owners are gone (or never were): garbage from the start.
    pub(super) fn delete_if_abandoned(&mut self, key: &ResourceKey, object: &Value) {
        let mut owners = json::owner_uids(object).peekable();
        if owners.peek().is_some() && owners.all(|owner| self.key_of_uid(owner).is_none()) {
            self.pending
                .push_back(PendingDelete::Start { key: key.clone(), propagation: Propagation::Background });
        }
    }

    pub(super) fn expire_events(&mut self, limit: usize, now: Timestamp) {
        while let Some(oldest) = self.event_order.front() {
            let created = self
                .find(oldest)
                .and_then(|event| json::parse_time(json::get_str(event, &["metadata", "creationTimestamp"])));
            let expired = created.is_none_or(|created| now.duration_since(created) > EVENT_LIFE);
            if !expired && self.event_order.len() <= limit {
                return;
            }
            if let Some(key) = self.event_order.pop_front() {
                self.remove(&key);
            }
        }
    }

    fn release_owner(&mut self, key: &ResourceKey) {
        let Some(owner) = self.find(key) else { return };
        if !json::is_terminating(owner)
            || !has_finalizer(owner, FOREGROUND_FINALIZER)
            || self.is_held_by_dependents(json::uid(owner))
        {
            return;
        }
        let mut next = Value::clone(owner);
        if let Some(list) = json::metadata(&mut next).get_mut("finalizers").and_then(Value::as_array_mut) {
            list.retain(|finalizer| finalizer != FOREGROUND_FINALIZER);
        }
        self.commit(key, next);
        self.finish_if_released(key);
    }

    fn remove_kind_if_undefined(&mut self, key: &ResourceKey) {
        let definition = ResourceKey::new(
            "apiextensions.k8s.io",
            "customresourcedefinitions",
            "",
            format!("{}.{}", key.resource.resource, key.resource.group),
        );
        let is_empty = self.collection(&key.resource).is_some_and(|collection| collection.objects.is_empty());
        if is_empty && self.find(&definition).is_none() {
            self.remove_kind(&key.resource);
        }
    }

    /// Takes the reference to an owner out of an object.
    fn disown(&mut self, key: &ResourceKey, owner_uid: &str) {
        let Some(object) = self.find(key) else { return };
        let mut next = Value::clone(object);
        let metadata = json::metadata(&mut next);
        if let Some(owners) = metadata.get_mut("ownerReferences").and_then(Value::as_array_mut) {
            owners.retain(|owner| owner["uid"] != owner_uid);
            if owners.is_empty() {
                metadata.remove("ownerReferences");
            }
        }
        self.commit(key, next);
    }

    /// Whether dependents with `blockOwnerDeletion` are left.
    fn is_held_by_dependents(&self, uid: &str) -> bool {
        self.dependents_of(uid).iter().filter_map(|key| self.find(key)).any(|object| {
            json::get_array(object, &["metadata", "ownerReferences"])
                .iter()
                .any(|owner| owner["uid"] == uid && owner["blockOwnerDeletion"] == true)
        })
    }

    fn contents_of<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = ResourceKey> + 'a {
        self.collections().filter(|(_, collection)| collection.kind.namespaced).flat_map(
            move |(resource, collection)| {
                collection
                    .objects
                    .range((namespace.to_owned(), String::new())..)
                    .take_while(move |((inside, _), _)| inside == namespace)
                    .map(move |((namespace, name), _)| ResourceKey {
                        resource: resource.clone(),
                        namespace: namespace.clone(),
                        name: name.clone(),
                    })
            },
        )
    }
}

fn has_finalizer(object: &Value, finalizer: &str) -> bool {
    json::finalizers(object).iter().any(|found| found == finalizer)
}

/// Seconds that a pod gets; none if no node runs it, or it has ended.
fn pod_grace(pod: &Value, asked: Option<u64>) -> u64 {
    let phase = json::get_str(pod, &["status", "phase"]);
    if json::get_str(pod, &["spec", "nodeName"]).is_empty() || matches!(phase, "Succeeded" | "Failed") {
        return 0;
    }
    let own = json::at(pod, &["spec", "terminationGracePeriodSeconds"]).and_then(Value::as_u64);
    asked.or(own).unwrap_or(DEFAULT_GRACE_SECONDS).min(MAX_GRACE_SECONDS)
}
