//! What the lock protects: collections of objects with their windows of changes, and the indexes between them.
//!
//! [`State::commit`] is the only place where an object changes.

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use tokio::sync::watch as signal;

use super::lifecycle::PendingDelete;
use crate::error::ApiError;
use crate::events;
use crate::json;
use crate::kinds::{GroupResource, KindInfo, ResourceKey};

/// Namespace and name of an object within its collection.
pub(super) type ObjectName = (String, String);

/// One change in a collection's window.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) previous: Option<Arc<Value>>,
    /// The new state; for a deletion the last state, with the deletion's resource version.
    pub(super) object: Arc<Value>,
    pub(super) deleted: bool,
    /// Memory of `object`, roughly; `previous` is an earlier change's.
    pub(super) bytes: usize,
}

/// All objects of one resource.
#[derive(Debug)]
pub(super) struct Collection {
    pub(super) kind: Arc<KindInfo>,
    pub(super) objects: BTreeMap<ObjectName, Arc<Value>>,
    pub(super) window: VecDeque<Change>,
    /// Memory of the window, roughly.
    window_bytes: usize,
    /// Revision of the newest change that fell out of the window; 0 if none did.
    pub(super) forgotten: u64,
    /// Wakes watchers up. Dropped with the collection.
    pub(super) tip: signal::Sender<u64>,
}

#[derive(Debug)]
pub(super) struct State {
    revision: u64,
    window_limit: usize,
    /// Limit for the memory of all windows, and what they take.
    window_bytes_limit: usize,
    window_bytes: usize,
    /// Resources in discovery order.
    order: Vec<GroupResource>,
    collections: HashMap<GroupResource, Collection>,
    object_count: usize,
    by_uid: HashMap<String, ResourceKey>,
    dependents: HashMap<String, BTreeSet<ResourceKey>>,
    pub(super) terminating_namespaces: BTreeSet<String>,
    /// Deletions that follow from others and are still to be done.
    pub(super) pending: VecDeque<PendingDelete>,
    /// Events in the order of their creation.
    pub(super) event_order: VecDeque<ResourceKey>,
}

impl State {
    pub(super) fn new(window_limit: usize, window_bytes_limit: usize) -> Self {
        Self {
            revision: 0,
            window_limit,
            window_bytes_limit,
            window_bytes: 0,
            order: Vec::new(),
            collections: HashMap::new(),
            object_count: 0,
            by_uid: HashMap::new(),
            dependents: HashMap::new(),
            terminating_namespaces: BTreeSet::new(),
            pending: VecDeque::new(),
            event_order: VecDeque::new(),
        }
    }

    pub(super) fn add_kind(&mut self, kind: Arc<KindInfo>) {
        let resource = kind.group_resource();
        if let Some(collection) = self.collections.get_mut(&resource) {
            collection.kind = kind;
            return;
        }
        self.order.push(resource.clone());
        let collection = Collection {
            kind,
            objects: BTreeMap::new(),
            window: VecDeque::new(),
            window_bytes: 0,
            // A resource that appears later knows nothing of the time before.
            forgotten: self.revision,
            tip: signal::Sender::new(self.revision),
        };
        self.collections.insert(resource, collection);
    }

    /// Forgets a resource; its objects must be gone. Its watchers end.
    pub(super) fn remove_kind(&mut self, resource: &GroupResource) {
        self.order.retain(|known| known != resource);
        if let Some(gone) = self.collections.remove(resource) {
            self.window_bytes -= gone.window_bytes;
        }
    }

    /// Stores an object's new state under the next resource version and returns it.
    pub(super) fn commit(&mut self, key: &ResourceKey, mut object: Value) -> Arc<Value> {
        self.revision += 1;
        let revision = self.revision;
        json::metadata(&mut object).insert("resourceVersion".to_owned(), json!(revision.to_string()));
        let object = Arc::new(object);
        let Some(collection) = self.collections.get_mut(&key.resource) else { return object };
        let name = (key.namespace.clone(), key.name.clone());
        let previous = collection.objects.insert(name, Arc::clone(&object));
        if previous.is_none() {
            self.object_count += 1;
        }
        let change = Change {
            revision,
            previous: previous.clone(),
            object: Arc::clone(&object),
            deleted: false,
            bytes: json::footprint(&object),
        };
        self.record(&key.resource, change);
        if let Some(previous) = previous {
            self.unindex(key, &previous);
        }
        self.index(key, &object);
        object
    }

    /// Takes an object out and returns its last state. What follows from that is [`State::remove`]'s business.
    pub(super) fn commit_removal(&mut self, key: &ResourceKey) -> Option<Arc<Value>> {
        let collection = self.collections.get_mut(&key.resource)?;
        let previous = collection.objects.remove(&(key.namespace.clone(), key.name.clone()))?;
        self.object_count -= 1;
        self.revision += 1;
        let mut last = Value::clone(&previous);
        json::metadata(&mut last).insert("resourceVersion".to_owned(), json!(self.revision.to_string()));
        let last = Arc::new(last);
        let change = Change {
            revision: self.revision,
            previous: Some(Arc::clone(&previous)),
            object: Arc::clone(&last),
            deleted: true,
            bytes: json::footprint(&last),
        };
        self.record(&key.resource, change);
        self.unindex(key, &previous);
        Some(last)
    }

    /// Remembers a change, and forgets the oldest ones that go beyond the limits.
    fn record(&mut self, resource: &GroupResource, change: Change) {
        let Some(collection) = self.collections.get_mut(resource) else { return };
        let revision = change.revision;
        self.window_bytes += change.bytes;
        collection.window_bytes += change.bytes;
        collection.window.push_back(change);
        while collection.window.len() > self.window_limit {
            self.window_bytes -= collection.forget_oldest();
        }
        collection.tip.send_replace(revision);
        // One change stays in every window: whoever has read up to it may go on.
        while self.window_bytes > self.window_bytes_limit {
            let largest = self.collections.values_mut().filter(|collection| collection.window.len() > 1);
            let Some(largest) = largest.max_by_key(|collection| collection.window_bytes) else { break };
            self.window_bytes -= largest.forget_oldest();
        }
    }

    fn index(&mut self, key: &ResourceKey, object: &Value) {
        let uid = json::uid(object);
        if !uid.is_empty() {
            self.by_uid.insert(uid.to_owned(), key.clone());
        }
        for owner in json::owner_uids(object) {
            self.dependents.entry(owner.to_owned()).or_default().insert(key.clone());
        }
    }

    fn unindex(&mut self, key: &ResourceKey, object: &Value) {
        self.by_uid.remove(json::uid(object));
        for owner in json::owner_uids(object) {
            if let Some(dependents) = self.dependents.get_mut(owner) {
                dependents.remove(key);
                if dependents.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn object_count(&self) -> usize {
        self.object_count
    }

    pub(super) fn kinds(&self) -> Vec<Arc<KindInfo>> {
        self.order
            .iter()
            .filter_map(|resource| self.collections.get(resource))
            .map(|collection| Arc::clone(&collection.kind))
            .collect()
    }

    pub(super) fn collections(&self) -> impl Iterator<Item = (&GroupResource, &Collection)> {
        self.order.iter().filter_map(|resource| Some((resource, self.collections.get(resource)?)))
    }

    pub(super) fn collection(&self, resource: &GroupResource) -> Option<&Collection> {
        self.collections.get(resource)
    }

    pub(super) fn known(&self, resource: &GroupResource) -> Result<&Collection, ApiError> {
        self.collection(resource).ok_or_else(|| ApiError::unknown_kind(resource))
    }

    pub(super) fn kind_of(&self, api_version: &str, kind: &str) -> Option<Arc<KindInfo>> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let group = if (group, kind) == (events::GROUP, "Event") { "" } else { group };
        let found = self.collections().map(|(_, collection)| &collection.kind).find(|known| {
            known.kind == kind && known.group == group && known.versions.iter().any(|known| known == version)
        });
        found.cloned()
    }

    pub(super) fn key_of(&self, object: &Value) -> Result<ResourceKey, ApiError> {
        let api_version = json::get_str(object, &["apiVersion"]);
        let kind_name = json::get_str(object, &["kind"]);
        if api_version.is_empty() || kind_name.is_empty() {
            return Err(ApiError::bad_request(format!(
                "object \"{}\" has no apiVersion or no kind: set both",
                json::name(object)
            )));
        }
        let kind = self
            .kind_of(api_version, kind_name)
            .ok_or_else(|| ApiError::unknown_kind(format_args!("{kind_name} of {api_version}")))?;
        let namespace = match (kind.namespaced, json::namespace(object)) {
            (false, _) => "",
            (true, "") => "default",
            (true, namespace) => namespace,
        };
        Ok(ResourceKey {
            resource: kind.group_resource(),
            namespace: namespace.to_owned(),
            name: json::name(object).to_owned(),
        })
    }

    pub(super) fn get(&self, key: &ResourceKey) -> Result<&Arc<Value>, ApiError> {
        let collection = self.known(&key.resource)?;
        let name = (key.namespace.clone(), key.name.clone());
        collection.objects.get(&name).ok_or_else(|| ApiError::not_found(&collection.kind, &key.name))
    }

    pub(super) fn find(&self, key: &ResourceKey) -> Option<&Arc<Value>> {
        self.collection(&key.resource)?.objects.get(&(key.namespace.clone(), key.name.clone()))
    }

    pub(super) fn key_of_uid(&self, uid: &str) -> Option<&ResourceKey> {
        self.by_uid.get(uid)
    }

    pub(super) fn dependents_of(&self, uid: &str) -> Vec<ResourceKey> {
        self.dependents.get(uid).map(|keys| keys.iter().cloned().collect()).unwrap_or_default()
    }
}

impl Collection {
    /// Drops the oldest change and returns its memory.
    fn forget_oldest(&mut self) -> usize {
        let Some(oldest) = self.window.pop_front() else { return 0 };
        self.forgotten = oldest.revision;
        self.window_bytes -= oldest.bytes;
        oldest.bytes
    }

    /// The changes after a revision, oldest first.
    ///
    /// # Errors
    /// 410 if some of them are forgotten.
    pub(super) fn changes_after(&self, revision: u64) -> Result<impl Iterator<Item = &Change>, ApiError> {
        if revision < self.forgotten {
            return Err(ApiError::expired(format!(
                "too old resource version: {revision} ({})",
                self.forgotten
            )));
        }
        let start = self.window.partition_point(|change| change.revision <= revision);
        Ok(self.window.range(start..))
    }
}
