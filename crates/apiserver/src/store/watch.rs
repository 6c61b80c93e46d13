//! Watchers: readers of a collection's window at their own pace.
//!
//! A watcher holds a position, not a queue. A slow one costs writers nothing and memory nothing; when the window has
//! moved past its position, its next read says 410 and ends.

use serde_json::{Value, json};
use std::sync::Arc;
use std::vec;
use tokio::sync::watch as signal;

use super::Store;
use super::options::{ListOptions, WatchEvent, WatchOptions};
use super::state::Change;
use crate::error::ApiError;
use crate::json;
use crate::kinds::GroupResource;

/// Events handed out per read of the window: bounds the time under the store's read lock.
const BATCH: usize = 256;

/// A running watch of one resource; see [`Store::watch`].
#[derive(Debug)]
pub struct Watcher {
    store: Arc<Store>,
    resource: GroupResource,
    namespace: Option<String>,
    options: WatchOptions,
    /// Objects to report first, if the watch starts with the state.
    initial: Option<vec::IntoIter<Arc<Value>>>,
    position: u64,
    tip: signal::Receiver<u64>,
}

impl Watcher {
    pub(super) fn start(
        store: &Arc<Store>,
        resource: &GroupResource,
        namespace: Option<&str>,
        options: WatchOptions,
    ) -> Result<Self, ApiError> {
        let state = store.read_state();
        let collection = state.known(resource)?;
        let tip = collection.tip.subscribe();
        let from = options.from.unwrap_or(0);
        if from > state.revision() {
            return Err(ApiError::version_too_large(from, state.revision()));
        }
        let (initial, position) = if from == 0 || options.send_initial_events {
            let list = ListOptions {
                labels: options.labels.clone(),
                fields: options.fields.clone(),
                ..ListOptions::default()
            };
            let list = state.list(resource, namespace, &list)?;
            (Some(list.items.into_iter()), list.revision)
        } else {
            let _unread = collection.changes_after(from)?;
            (None, from)
        };
        Ok(Self {
            store: Arc::clone(store),
            resource: resource.clone(),
            namespace: namespace.map(str::to_owned),
            options,
            initial,
            position,
            tip,
        })
    }

    /// The next events, at least one; waits for them. `None`: the resource itself was removed. Cancelling the future
    /// loses nothing.
    ///
    /// # Errors
    /// 410 if this watcher fell behind the window: list again and start a new watch.
    pub async fn next(&mut self) -> Option<Result<Vec<WatchEvent>, ApiError>> {
        loop {
            // Seen before the window is read, so that a change in between wakes the wait below up.
            self.tip.borrow_and_update();
            match self.ready() {
                None => return None,
                Some(Ok(events)) if events.is_empty() => {}
                some => return some,
            }
            if self.tip.changed().await.is_err() {
                return None;
            }
        }
    }

    /// The events that are there already, possibly none, without waiting. `None`: the resource itself was removed.
    ///
    /// # Errors
    /// As [`Watcher::next`].
    pub fn ready(&mut self) -> Option<Result<Vec<WatchEvent>, ApiError>> {
        if let Some(initial) = &mut self.initial {
            let events: Vec<_> = initial.by_ref().take(BATCH).map(WatchEvent::Added).collect();
            if !events.is_empty() {
                return Some(Ok(events));
            }
            self.initial = None;
            if self.options.send_initial_events {
                let revision = self.position;
                return Some(Ok(vec![WatchEvent::Bookmark { revision, initial_events_end: true }]));
            }
        }
        let state = self.store.read_state();
        let collection = state.collection(&self.resource)?;
        let mut changes = match collection.changes_after(self.position) {
            Ok(changes) => changes,
            Err(error) => return Some(Err(error)),
        };
        let mut events = Vec::new();
        let mut position = self.position;
        while events.len() < BATCH {
            let Some(change) = changes.next() else {
                position = state.revision();
                break;
            };
            position = change.revision;
            events.extend(self.event(change));
        }
        self.position = position;
        Some(Ok(events))
    }

    /// The resource version up to which everything has been handed out; `None` while the initial objects are not yet.
    pub fn position(&self) -> Option<u64> {
        self.initial.is_none().then_some(self.position)
    }

    fn selects(&self, object: &Value) -> bool {
        self.namespace.as_deref().is_none_or(|namespace| namespace == json::namespace(object))
            && self.options.labels.matches(object)
            && self.options.fields.matches(object)
    }

    /// How a change looks through the selectors.
    fn event(&self, change: &Change) -> Option<WatchEvent> {
        let before = change.previous.as_ref().filter(|previous| self.selects(previous));
        let after = (!change.deleted && self.selects(&change.object)).then_some(&change.object);
        match (before, after) {
            (None, None) => None,
            (None, Some(object)) => Some(WatchEvent::Added(Arc::clone(object))),
            (Some(_), Some(object)) => Some(WatchEvent::Modified(Arc::clone(object))),
            (Some(_), None) if change.deleted => Some(WatchEvent::Deleted(Arc::clone(&change.object))),
            (Some(previous), None) => {
                // It left the selection: the watcher knows the old state, at the version of the change.
                let mut last = Value::clone(previous);
                json::metadata(&mut last)
                    .insert("resourceVersion".to_owned(), json!(change.revision.to_string()));
                Some(WatchEvent::Deleted(Arc::new(last)))
            }
        }
    }
}
