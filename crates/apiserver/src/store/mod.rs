//! The store: objects by resource, namespace and name, and everything that happens to them.
//!
//! All methods are synchronous and return at once: nothing here waits for I/O or for a watcher. Objects are shared
//! (`Arc`), never changed in place; a write makes a new value. [`state`] is the data under the lock, [`lifecycle`]
//! deletion and what follows from it, [`watch`] the readers of the change window, [`write`] create, update and patch.

mod lifecycle;
mod options;
mod read;
mod state;
mod watch;
mod write;

use jiff::Timestamp;
use serde_json::{Value, json};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::watch as signal;

pub use options::{
    Defaulter, DeleteOptions, DeleteOutcome, List, ListOptions, Precondition, Propagation, Snapshot,
    StoreConfig, Subresource, VersionMatch, WatchEvent, WatchOptions, WriteOptions,
};
pub use watch::Watcher;

use crate::error::ApiError;
use crate::json;
use crate::kinds::{self, GroupResource, KindInfo, ResourceKey};
use crate::patch::Patch;
use state::State;

/// Namespaces that a cluster is born with and that cannot be deleted (the last one can).
const INITIAL_NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// The objects of one cluster, in memory.
#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    state: RwLock<State>,
    tip: signal::Sender<u64>,
}

impl Store {
    /// An empty cluster: the built-in kinds and the namespaces `default`, `kube-system`, `kube-public` and
    /// `kube-node-lease`.
    pub fn new(config: StoreConfig) -> Self {
        let mut state = State::new(config.watch_window.max(1), config.watch_window_bytes);
        for kind in kinds::built_in() {
            state.add_kind(kind);
        }
        let store = Self { config, state: RwLock::new(state), tip: signal::Sender::new(0) };
        for name in INITIAL_NAMESPACES {
            let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            store.create(namespace, WriteOptions::default()).expect("a valid namespace in an empty store");
        }
        store
    }

    /// Adds a kind, or replaces the definition of a custom one; its objects stay.
    ///
    /// # Errors
    /// 422 if the kind would replace a built-in one.
    pub fn register_kind(&self, kind: KindInfo) -> Result<(), ApiError> {
        let resource = kind.group_resource();
        let mut state = self.write_state();
        if state.collection(&resource).is_some_and(|known| !known.kind.custom) {
            let cause =
                crate::error::Cause::forbidden("spec", format_args!("{resource} is a built-in resource"));
            return Err(ApiError::invalid(&kind, &resource.to_string(), vec![cause]));
        }
        state.add_kind(Arc::new(kind));
        Ok(())
    }

    /// Creates an object; resource and namespace are taken from its `apiVersion`, `kind` and `metadata.namespace`
    /// (an empty namespace means `default`).
    ///
    /// # Errors
    /// 404 for an unknown kind or namespace, 409 if it exists, 422 if it is malformed, 400 if it is no object at all.
    pub fn create(&self, object: Value, options: WriteOptions) -> Result<Arc<Value>, ApiError> {
        let key = self.key_of(&object)?;
        self.create_in(&key.resource, &key.namespace, object, options)
    }

    /// Creates an object in a resource and namespace (empty for cluster scope) given by the caller.
    ///
    /// # Errors
    /// As [`Store::create`]; 400 if the object says otherwise.
    pub fn create_in(
        &self,
        resource: &GroupResource,
        namespace: &str,
        object: Value,
        options: WriteOptions,
    ) -> Result<Arc<Value>, ApiError> {
        let mut state = self.write_state();
        let created = state.create(&self.config, resource, namespace, object, options, Timestamp::now())?;
        self.announce(&state);
        Ok(created)
    }

    /// Replaces an object. If `metadata.resourceVersion` is set, it must be the current one. What does not change
    /// anything writes nothing.
    ///
    /// # Errors
    /// 404 if it does not exist, 409 if it changed meanwhile, 400 and 422 if it is malformed.
    pub fn update(
        &self,
        key: &ResourceKey,
        object: Value,
        part: Subresource,
        options: WriteOptions,
    ) -> Result<Arc<Value>, ApiError> {
        let mut state = self.write_state();
        let updated = state.update(&self.config, key, object, part, options, Timestamp::now())?;
        self.announce(&state);
        Ok(updated)
    }

    /// Replaces the status of an object, found by the object's own kind, namespace and name.
    ///
    /// # Errors
    /// As [`Store::update`].
    pub fn update_status(&self, object: Value) -> Result<Arc<Value>, ApiError> {
        let key = self.key_of(&object)?;
        self.update(&key, object, Subresource::Status, WriteOptions::default())
    }

    /// Changes an object by a patch.
    ///
    /// # Errors
    /// As [`Store::update`] and [`Patch::apply_to`].
    pub fn patch(
        &self,
        key: &ResourceKey,
        patch: &Patch,
        part: Subresource,
        options: WriteOptions,
    ) -> Result<Arc<Value>, ApiError> {
        let mut state = self.write_state();
        let patched = state.patch(&self.config, key, patch, part, options, Timestamp::now())?;
        self.announce(&state);
        Ok(patched)
    }

    /// Reads an object, lets `change` edit a copy, and writes that, in one step: no conflict is possible.
    ///
    /// # Errors
    /// As [`Store::update`], and what `change` returns.
    pub fn modify(
        &self,
        key: &ResourceKey,
        part: Subresource,
        change: impl FnOnce(&mut Value) -> Result<(), ApiError>,
    ) -> Result<Arc<Value>, ApiError> {
        let mut state = self.write_state();
        let mut object = Value::clone(state.get(key)?);
        change(&mut object)?;
        let updated =
            state.update(&self.config, key, object, part, WriteOptions::default(), Timestamp::now())?;
        self.announce(&state);
        Ok(updated)
    }

    /// Creates an object, or replaces what exists under its name (unconditionally, status apart). A resource version
    /// or uid in it, as exported objects have, is ignored.
    ///
    /// # Errors
    /// As [`Store::create`] and [`Store::update`].
    pub fn put(&self, mut object: Value) -> Result<Arc<Value>, ApiError> {
        let key = self.key_of(&object)?;
        let now = Timestamp::now();
        let mut state = self.write_state();
        let exists = state.get(&key).is_ok();
        for foreign in ["resourceVersion", "uid"] {
            json::metadata(&mut object).remove(foreign);
        }
        let written = if exists {
            state.update(&self.config, &key, object, Subresource::Main, WriteOptions::default(), now)?
        } else {
            state.create(&self.config, &key.resource, &key.namespace, object, WriteOptions::default(), now)?
        };
        self.announce(&state);
        Ok(written)
    }

    /// Deletes an object, or starts its deletion: a pod that runs on a node gets a deletionTimestamp and stays until
    /// its runner deletes it with [`DeleteOptions::now`]; anything with finalizers stays until they are removed.
    ///
    /// # Errors
    /// 404 if it does not exist, 409 if a precondition does not hold.
    pub fn delete(&self, key: &ResourceKey, options: &DeleteOptions) -> Result<DeleteOutcome, ApiError> {
        let mut state = self.write_state();
        let outcome = state.delete(key, options, Timestamp::now())?;
        self.announce(&state);
        Ok(outcome)
    }

    /// Deletes all objects of a resource that the list options select, and returns them.
    ///
    /// # Errors
    /// 404 for an unknown resource.
    pub fn delete_collection(
        &self,
        resource: &GroupResource,
        namespace: Option<&str>,
        list: &ListOptions,
        options: &DeleteOptions,
    ) -> Result<List, ApiError> {
        let mut state = self.write_state();
        let selected = state.list(resource, namespace, list)?;
        let now = Timestamp::now();
        for object in &selected.items {
            let key = ResourceKey {
                resource: resource.clone(),
                namespace: json::namespace(object).to_owned(),
                name: json::name(object).to_owned(),
            };
            match state.delete(&key, options, now) {
                // An owner among the selected took this one with it.
                Err(error) if error.is_not_found() => {}
                outcome => {
                    outcome?;
                }
            }
        }
        self.announce(&state);
        Ok(selected)
    }

    /// Reads one object.
    ///
    /// # Errors
    /// 404.
    pub fn get(&self, key: &ResourceKey) -> Result<Arc<Value>, ApiError> {
        self.read_state().get(key).cloned()
    }

    /// Reads the objects of a resource, in one namespace or all (`None`).
    ///
    /// # Errors
    /// 404 for an unknown resource, 400 for a bad continue token, 410 if the version asked for is forgotten, 504 if it
    /// does not exist yet.
    pub fn list(
        &self,
        resource: &GroupResource,
        namespace: Option<&str>,
        options: &ListOptions,
    ) -> Result<List, ApiError> {
        self.read_state().list(resource, namespace, options)
    }

    /// Reads several resources at the same resource version. Resources that are not registered are left out.
    pub fn snapshot(&self, resources: &[GroupResource]) -> Snapshot {
        let state = self.read_state();
        let collections = resources.iter().filter_map(|resource| state.collection(resource));
        Snapshot {
            revision: state.revision(),
            objects: collections.flat_map(|collection| collection.objects.values().cloned()).collect(),
        }
    }

    /// Starts to watch a resource, in one namespace or all (`None`). The watcher keeps no queue: it reads the window
    /// of changes at its own pace.
    ///
    /// # Errors
    /// 404 for an unknown resource, 410 if the version to start from is forgotten, 504 if it does not exist yet.
    pub fn watch(
        self: &Arc<Self>,
        resource: &GroupResource,
        namespace: Option<&str>,
        options: WatchOptions,
    ) -> Result<Watcher, ApiError> {
        Watcher::start(self, resource, namespace, options)
    }

    /// The newest resource version as a channel: wakes up when anything changes in the store.
    pub fn changes(&self) -> signal::Receiver<u64> {
        self.tip.subscribe()
    }

    /// The newest resource version.
    pub fn revision(&self) -> u64 {
        self.read_state().revision()
    }

    /// All kinds, in discovery order.
    pub fn kinds(&self) -> Vec<Arc<KindInfo>> {
        self.read_state().kinds()
    }

    /// The kind of a resource.
    pub fn kind(&self, resource: &GroupResource) -> Option<Arc<KindInfo>> {
        self.read_state().collection(resource).map(|collection| Arc::clone(&collection.kind))
    }

    /// The kind that an object's `apiVersion` and `kind` name.
    pub fn kind_of(&self, api_version: &str, kind: &str) -> Option<Arc<KindInfo>> {
        self.read_state().kind_of(api_version, kind)
    }

    /// Where an object belongs: an empty namespace of a namespaced kind becomes `default`, that of a cluster-scoped
    /// kind is dropped.
    ///
    /// # Errors
    /// 404 if its kind is not registered, 400 if it has no apiVersion or kind.
    pub fn key_of(&self, object: &Value) -> Result<ResourceKey, ApiError> {
        self.read_state().key_of(object)
    }

    fn read_state(&self) -> RwLockReadGuard<'_, State> {
        // A panic under the lock cannot leave half a change: every commit is one insertion.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self, state: &State) {
        self.tip.send_if_modified(|tip| std::mem::replace(tip, state.revision()) != state.revision());
    }
}
