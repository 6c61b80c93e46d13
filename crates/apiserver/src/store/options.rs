//! What callers of the store may ask for, as values.

use serde_json::Value;
use std::fmt;
use std::sync::Arc;

use crate::kinds::KindInfo;
use crate::selector::{FieldSelector, LabelSelector};

/// Fills in what a new or changed object leaves open, before validation, as a real API server's defaulting does.
pub type Defaulter = Arc<dyn Fn(&KindInfo, &mut Value) + Send + Sync>;

/// Limits and hooks of a [`crate::Store`].
#[derive(Clone)]
pub struct StoreConfig {
    /// Changes remembered per resource. A watcher that falls further behind gets 410 and must list again.
    pub watch_window: usize,
    /// Memory in bytes, roughly, that the remembered changes of all resources may take together; beyond it, the
    /// resource that takes the most forgets its oldest.
    pub watch_window_bytes: usize,
    /// Objects of all kinds together; creating more is refused with 503.
    pub max_objects: usize,
    /// Events (core/v1) kept; the oldest go first.
    pub max_events: usize,
    /// Defaults for created and updated objects, if any.
    pub defaulter: Option<Defaulter>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            watch_window: 2048,
            watch_window_bytes: 32 * 1024 * 1024,
            max_objects: 200_000,
            max_events: 5_000,
            defaulter: None,
        }
    }
}

impl fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreConfig")
            .field("watch_window", &self.watch_window)
            .field("watch_window_bytes", &self.watch_window_bytes)
            .field("max_objects", &self.max_objects)
            .field("max_events", &self.max_events)
            .field("defaulter", &self.defaulter.is_some())
            .finish()
    }
}

/// Which part of an object a write is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subresource {
    /// The object itself; its status is left alone if the kind has a status subresource.
    Main,
    /// The status subresource: nothing but `status` is taken.
    Status,
}

/// How a create, update or patch is done. The default really writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Do everything but the write (`dryRun=All`).
    pub dry_run: bool,
}

/// What happens to the objects that name a deleted one as their owner.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Propagation {
    /// They are deleted after it.
    #[default]
    Background,
    /// They are deleted first; the owner waits for those with `blockOwnerDeletion`.
    Foreground,
    /// They stay and lose the reference.
    Orphan,
}

/// What must still hold for a delete to go ahead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Precondition {
    /// The object's uid.
    pub uid: Option<String>,
    /// The object's resource version.
    pub resource_version: Option<String>,
}

/// How an object is deleted. The default: its own grace period, dependents in the background.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// Seconds that a pod is given to end; `Some(0)` removes it at once. `None` is the pod's own setting.
    pub grace_period_seconds: Option<u64>,
    /// What happens to dependents.
    pub propagation: Propagation,
    /// What must still hold.
    pub precondition: Precondition,
    /// Do everything but the delete.
    pub dry_run: bool,
}

impl DeleteOptions {
    /// Without a grace period: how a pod's runner reports that the pod has ended.
    pub fn now() -> Self {
        Self { grace_period_seconds: Some(0), ..Self::default() }
    }
}

/// What a delete led to.
#[derive(Debug, Clone, PartialEq)]
pub enum DeleteOutcome {
    /// The object is gone; this is its last state.
    Removed(Arc<Value>),
    /// The object has a deletionTimestamp and waits for its grace period, finalizers or contents.
    Terminating(Arc<Value>),
}

/// How the resource version of a list is meant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VersionMatch {
    /// State at least as new as the version.
    #[default]
    NotOlderThan,
    /// State at exactly that version.
    Exact,
}

/// What a list returns. The default: everything, now.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// Labels that objects must have.
    pub labels: LabelSelector,
    /// Field values that objects must have.
    pub fields: FieldSelector,
    /// Largest number of objects in the answer; 0 is no limit.
    pub limit: usize,
    /// Where an earlier, limited list stopped ([`List::continue_token`]).
    pub continue_token: Option<String>,
    /// Resource version asked for.
    pub version: Option<u64>,
    /// How `version` is meant.
    pub version_match: VersionMatch,
}

/// One answer to a list.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct List {
    /// The state that the items show; a watch from here misses nothing.
    pub revision: u64,
    /// Objects by namespace and name.
    pub items: Vec<Arc<Value>>,
    /// How to go on, if the limit cut the list.
    pub continue_token: Option<String>,
    /// How many objects are left, if the limit cut the list and no selector was given.
    pub remaining: Option<usize>,
}

/// What a watch sees. The default: all objects as they are now, then every change.
#[derive(Debug, Clone, Default)]
pub struct WatchOptions {
    /// Labels that objects must have; an object that loses them is reported as deleted.
    pub labels: LabelSelector,
    /// Field values that objects must have, likewise.
    pub fields: FieldSelector,
    /// Report changes after this resource version only. `None` and 0 start with the objects as they are.
    pub from: Option<u64>,
    /// Start with the objects as they are, then a bookmark that says so, whatever `from` is.
    pub send_initial_events: bool,
}

/// One entry of a watch.
#[derive(Debug, Clone, PartialEq)]
pub enum WatchEvent {
    /// The object is new, or newly selected.
    Added(Arc<Value>),
    /// The object changed.
    Modified(Arc<Value>),
    /// The object is gone, or no longer selected; this is its last state.
    Deleted(Arc<Value>),
    /// Everything up to this resource version has been reported.
    Bookmark {
        /// Resource version to resume from.
        revision: u64,
        /// Marks the end of the initial objects.
        initial_events_end: bool,
    },
}

/// Several resources at one and the same resource version.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The state that all objects show.
    pub revision: u64,
    /// The objects, resource by resource in the order asked for, then by namespace and name.
    pub objects: Vec<Arc<Value>>,
}
