//! Create, update and patch: from what a client sent to what is stored.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::sync::Arc;

use super::options::{StoreConfig, Subresource, WriteOptions};
use super::state::State;
use crate::autoscaling;
use crate::crd;
use crate::error::{ApiError, Cause};
use crate::events;
use crate::json;
use crate::kinds::{GroupResource, KindInfo, ResourceKey};
use crate::patch::Patch;
use crate::validate;

/// Tries to find a free name for `generateName` before giving up.
const NAME_ATTEMPTS: usize = 8;
/// Without vowels and look-alikes, as Kubernetes' own generated names.
const NAME_ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

impl State {
    pub(super) fn create(
        &mut self,
        config: &StoreConfig,
        resource: &GroupResource,
        namespace: &str,
        mut object: Value,
        options: WriteOptions,
        now: Timestamp,
    ) -> Result<Arc<Value>, ApiError> {
        let kind = Arc::clone(&self.known(resource)?.kind);
        set_type(&kind, &mut object, None)?;
        set_namespace(&kind, namespace, &mut object)?;
        if !json::get_str(&object, &["metadata", "resourceVersion"]).is_empty() {
            return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
        }
        if kind.status && !kind.status_on_create {
            json::fields(&mut object).remove("status");
        }
        let metadata = json::metadata(&mut object);
        for owned_by_server in
            ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields"]
        {
            metadata.remove(owned_by_server);
        }
        metadata.insert("uid".to_owned(), json!(uuid::Uuid::new_v4().to_string()));
        metadata.insert("creationTimestamp".to_owned(), json!(json::timestamp_text(now)));
        match kind.generation {
            true => metadata.insert("generation".to_owned(), json!(1)),
            false => metadata.remove("generation"),
        };
        self.set_name(&kind, namespace, &mut object);
        self.prepare(config, &kind, None, &mut object, now)?;

        let key = ResourceKey {
            resource: resource.clone(),
            namespace: namespace.to_owned(),
            name: json::name(&object).to_owned(),
        };
        if kind.namespaced {
            let home = ResourceKey::new("", "namespaces", "", namespace);
            if json::is_terminating(self.get(&home)?) {
                return Err(ApiError::namespace_terminating(&kind, &key.name, namespace));
            }
        }
        if self.find(&key).is_some() {
            return Err(ApiError::already_exists(&kind, &key.name));
        }
        if self.object_count() >= config.max_objects {
            return Err(ApiError::unavailable(format!(
                "the store holds {} objects, which is its limit: delete some first",
                config.max_objects
            )));
        }
        if options.dry_run {
            return Ok(Arc::new(object));
        }
        let created = self.commit(&key, object);
        if kind.is("", "Event") {
            self.event_order.push_back(key.clone());
            self.expire_events(config.max_events, now);
        }
        self.settle(&kind, &key, &created, true, now);
        Ok(created)
    }

    pub(super) fn update(
        &mut self,
        config: &StoreConfig,
        key: &ResourceKey,
        mut object: Value,
        part: Subresource,
        options: WriteOptions,
        now: Timestamp,
    ) -> Result<Arc<Value>, ApiError> {
        let current = Arc::clone(self.get(key)?);
        let kind = Arc::clone(&self.known(&key.resource)?.kind);
        set_type(&kind, &mut object, Some(&current))?;
        set_namespace(&kind, &key.namespace, &mut object)?;
        check_identity(&kind, key, &current, &object)?;

        let mut next = match part {
            Subresource::Status if !kind.status => return Err(ApiError::no_such_resource()),
            Subresource::Status => {
                let mut next = Value::clone(&current);
                json::copy_field(&object, &mut next, "status");
                next
            }
            Subresource::Main => {
                if kind.status {
                    json::copy_field(&current, &mut object, "status");
                }
                let (from, to) = (&current["metadata"], json::metadata(&mut object));
                for kept in [
                    "name",
                    "generateName",
                    "uid",
                    "creationTimestamp",
                    "deletionTimestamp",
                    "deletionGracePeriodSeconds",
                    "generation",
                ] {
                    match from.get(kept) {
                        Some(value) => to.insert(kept.to_owned(), value.clone()),
                        None => to.remove(kept),
                    };
                }
                to.remove("managedFields");
                object
            }
        };
        self.prepare(config, &kind, Some(&current), &mut next, now)?;
        if kind.generation && part == Subresource::Main && !same_desired_state(&kind, &current, &next) {
            let generation = json::get_int(&current, &["metadata", "generation"]).unwrap_or(0);
            json::metadata(&mut next).insert("generation".to_owned(), json!(generation.saturating_add(1)));
        }
        let version = current["metadata"]["resourceVersion"].clone();
        json::metadata(&mut next).insert("resourceVersion".to_owned(), version);
        if next == *current {
            return Ok(current);
        }
        if options.dry_run {
            return Ok(Arc::new(next));
        }
        let owners_changed = next["metadata"]["ownerReferences"] != current["metadata"]["ownerReferences"];
        let updated = self.commit(key, next);
        self.settle(&kind, key, &updated, owners_changed, now);
        Ok(updated)
    }

    pub(super) fn patch(
        &mut self,
        config: &StoreConfig,
        key: &ResourceKey,
        patch: &Patch,
        part: Subresource,
        options: WriteOptions,
        now: Timestamp,
    ) -> Result<Arc<Value>, ApiError> {
        let kind = Arc::clone(&self.known(&key.resource)?.kind);
        let current = match (self.find(key), patch) {
            (Some(current), _) => Arc::clone(current),
            (None, Patch::Apply(object)) if part == Subresource::Main => {
                let mut object = object.clone();
                set_type(&kind, &mut object, None)?;
                let name = json::name(&object);
                if !name.is_empty() && name != key.name {
                    return Err(name_mismatch(name, &key.name));
                }
                json::metadata(&mut object).insert("name".to_owned(), json!(key.name));
                return self.create(config, &key.resource, &key.namespace, object, options, now);
            }
            (None, _) => return Err(ApiError::not_found(&kind, &key.name)),
        };
        let mut patched = patch.apply_to(&kind, &current)?;
        // An applied configuration may be written for any version that is served.
        if matches!(patch, Patch::Apply(_)) {
            set_type(&kind, &mut patched, Some(&current))?;
        }
        self.update(config, key, patched, part, options, now)
    }

    /// What a write leads to: registered kinds, finished deletions, dependents of owners that are gone already.
    fn settle(
        &mut self,
        kind: &KindInfo,
        key: &ResourceKey,
        object: &Value,
        owners_changed: bool,
        now: Timestamp,
    ) {
        if kind.is("apiextensions.k8s.io", "CustomResourceDefinition")
            && let Ok(custom) = crd::kind_of_definition(object)
        {
            self.add_kind(Arc::new(custom));
        }
        if owners_changed {
            self.delete_if_abandoned(key, object);
        }
        self.finish_if_released(key);
        self.drain(now);
    }

    fn set_name(&self, kind: &KindInfo, namespace: &str, object: &mut Value) {
        if !json::name(object).is_empty() {
            return;
        }
        let prefix = json::get_str(object, &["metadata", "generateName"]).to_owned();
        if prefix.is_empty() {
            return;
        }
        // Names are at most 63 bytes for many kinds; five are for the suffix.
        let prefix: String = prefix.chars().take(58).collect();
        let mut name = String::new();
        for _ in 0..NAME_ATTEMPTS {
            let random = uuid::Uuid::new_v4();
            let suffix = random.as_bytes().iter().take(5).map(|byte| {
                // 27 letters do not divide 256: the bias does not matter for a name.
                char::from(NAME_ALPHABET[usize::from(*byte) % NAME_ALPHABET.len()])
            });
            name = prefix.chars().chain(suffix).collect();
            let key = ResourceKey {
                resource: kind.group_resource(),
                namespace: namespace.to_owned(),
                name: name.clone(),
            };
            if self.find(&key).is_none() {
                break;
            }
        }
        json::metadata(object).insert("name".to_owned(), json!(name));
    }

    /// Defaults and validation.
    fn prepare(
        &self,
        config: &StoreConfig,
        kind: &KindInfo,
        current: Option<&Value>,
        object: &mut Value,
        now: Timestamp,
    ) -> Result<(), ApiError> {
        if let Some(defaulter) = &config.defaulter {
            defaulter(kind, object);
        }
        let mut causes = validate::metadata_causes(kind, object);
        if kind.is("", "Namespace") {
            prepare_namespace(current, object);
        } else if kind.is("", "Pod") && current.is_none() {
            json::child(object, "status").entry("phase").or_insert_with(|| json!("Pending"));
        } else if kind.is("", "Service") && current.is_none() {
            json::child(object, "status").entry("loadBalancer").or_insert_with(|| json!({}));
        } else if kind.is("", "Secret") {
            causes.extend(prepare_secret(object));
        } else if kind.is("apiextensions.k8s.io", "CustomResourceDefinition") {
            match crd::kind_of_definition(object) {
                Ok(custom) => {
                    let resource = custom.group_resource();
                    if self.collection(&resource).is_some_and(|known| !known.kind.custom) {
                        causes.push(Cause::forbidden(
                            "spec",
                            format_args!("{resource} is a built-in resource"),
                        ));
                    }
                    crd::establish(&custom, object, now);
                }
                Err(problems) => causes.extend(problems),
            }
        }
        if !causes.is_empty() {
            return Err(ApiError::invalid(kind, json::name(object), causes));
        }
        json::check_bounds(object)
    }
}

/// Checks the object's type against the resource's and sets it to the stored version.
fn set_type(kind: &KindInfo, object: &mut Value, current: Option<&Value>) -> Result<(), ApiError> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the body of the request is not a JSON object"));
    }
    if object.get("metadata").is_some_and(|metadata| !metadata.is_object() && !metadata.is_null()) {
        let cause = Cause::invalid("metadata", &object["metadata"], "must be an object");
        return Err(ApiError::invalid(kind, "", vec![cause]));
    }
    let found = json::get_str(object, &["kind"]);
    if !found.is_empty() && found != kind.kind {
        return Err(ApiError::bad_request(format!(
            "the kind in the data ({found}) does not match the expected kind ({})",
            kind.kind
        )));
    }
    let found = json::get_str(object, &["apiVersion"]);
    if kind.is("", "Event") && found.strip_prefix(events::GROUP) == Some("/v1") {
        let fields = json::fields(object);
        events::to_core(fields);
        fields.insert("apiVersion".to_owned(), json!("v1"));
    }
    let found = json::get_str(object, &["apiVersion"]);
    if !found.is_empty() && !kind.versions.iter().any(|version| kind.api_version(version) == found) {
        let expected = kind.api_version(kind.storage_version());
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({found}) does not match the expected API version ({expected})"
        )));
    }
    autoscaling::to_stored(kind, object, current);
    let fields = json::fields(object);
    fields.insert("kind".to_owned(), json!(kind.kind));
    fields.insert("apiVersion".to_owned(), json!(kind.api_version(kind.storage_version())));
    Ok(())
}

fn set_namespace(kind: &KindInfo, namespace: &str, object: &mut Value) -> Result<(), ApiError> {
    if !kind.namespaced {
        json::metadata(object).remove("namespace");
        return Ok(());
    }
    if namespace.is_empty() {
        return Err(ApiError::bad_request("an empty namespace may not be set during creation"));
    }
    let found = json::namespace(object);
    if !found.is_empty() && found != namespace {
        return Err(ApiError::bad_request(format!(
            "the namespace of the provided object ({found}) does not match the namespace sent on the request \
             ({namespace})"
        )));
    }
    json::metadata(object).insert("namespace".to_owned(), json!(namespace));
    Ok(())
}

fn name_mismatch(found: &str, expected: &str) -> ApiError {
    ApiError::bad_request(format!(
        "the name of the object ({found}) does not match the name on the URL ({expected})"
    ))
}

fn check_identity(
    kind: &KindInfo,
    key: &ResourceKey,
    current: &Value,
    object: &Value,
) -> Result<(), ApiError> {
    let name = json::name(object);
    if !name.is_empty() && name != key.name {
        return Err(name_mismatch(name, &key.name));
    }
    let uid = json::uid(object);
    if !uid.is_empty() && uid != json::uid(current) {
        let why = format_args!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            json::uid(current)
        );
        return Err(ApiError::conflict(kind, &key.name, why));
    }
    let version = json::get_str(object, &["metadata", "resourceVersion"]);
    if !version.is_empty() && version != json::get_str(current, &["metadata", "resourceVersion"]) {
        return Err(ApiError::modified(kind, &key.name));
    }
    Ok(())
}

/// Whether two states want the same: everything but metadata, and but status where that has its own subresource.
fn same_desired_state(kind: &KindInfo, a: &Value, b: &Value) -> bool {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return false };
    let counts = |key: &str| key != "metadata" && !(kind.status && key == "status");
    a.keys().chain(b.keys()).filter(|key| counts(key)).all(|key| a.get(key) == b.get(key))
}

fn prepare_namespace(current: Option<&Value>, object: &mut Value) {
    let name = json::name(object).to_owned();
    let labels = json::fields(json::metadata(object).entry("labels").or_insert(Value::Null));
    labels.insert("kubernetes.io/metadata.name".to_owned(), json!(name));
    if current.is_none() {
        json::child(object, "spec").insert("finalizers".to_owned(), json!(["kubernetes"]));
        json::child(object, "status").insert("phase".to_owned(), json!("Active"));
    }
}

/// `stringData` is only a way to write `data`.
fn prepare_secret(object: &mut Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let fields = json::fields(object);
    if let Some(Value::Object(plain)) = fields.remove("stringData") {
        let data = json::fields(fields.entry("data").or_insert(Value::Null));
        for (key, value) in plain {
            match value.as_str() {
                Some(text) => {
                    data.insert(key, json!(STANDARD.encode(text)));
                }
                None => causes.push(Cause::invalid(format!("stringData.{key}"), &value, "must be a string")),
            }
        }
    }
    fields.entry("type").or_insert_with(|| json!("Opaque"));
    causes
}
