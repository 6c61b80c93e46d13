//! The scale subresource (autoscaling/v1 Scale). Pure.

use serde_json::{Value, json};

use crate::error::{ApiError, Cause};
use crate::json;
use crate::kinds::{KindInfo, ScalePaths};

/// The kind of the subresource itself.
pub(super) fn kind() -> KindInfo {
    KindInfo::new("autoscaling", "v1", "Scale", "scales", true)
}

/// An object's scale.
pub(super) fn of(paths: &ScalePaths, object: &Value) -> Value {
    let count = |path| json::at_path(object, path).and_then(Value::as_i64).unwrap_or(0);
    let mut metadata = serde_json::Map::new();
    for key in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object["metadata"].get(key) {
            metadata.insert(key.to_owned(), value.clone());
        }
    }
    let mut scale = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": {"replicas": count(&paths.spec_replicas)}, "status": {"replicas": count(&paths.status_replicas)},
    });
    if let Some(selector) = paths.selector.as_ref().and_then(|path| json::at_path(object, path)) {
        scale["status"]["selector"] = json!(selector_text(selector));
    }
    scale
}

/// The object with the replicas that a Scale asks for.
///
/// # Errors
/// 422 if the Scale has no whole number of replicas, or a negative one.
pub(super) fn apply(paths: &ScalePaths, object: &Value, scale: &Value) -> Result<Value, ApiError> {
    let replicas = json::at(scale, &["spec", "replicas"]).cloned().unwrap_or(json!(0));
    if !replicas.as_i64().is_some_and(|count| (0..=i64::from(i32::MAX)).contains(&count)) {
        let cause = Cause::invalid("spec.replicas", &replicas, "must be greater than or equal to 0");
        return Err(ApiError::invalid(&kind(), json::name(object), vec![cause]));
    }
    let mut changed = object.clone();
    json::set_path(&mut changed, &paths.spec_replicas, replicas);
    // Optimistic locking, if the client asks for it.
    let metadata = json::metadata(&mut changed);
    match scale["metadata"].get("resourceVersion").filter(|version| !version.is_null() && *version != "") {
        Some(version) => metadata.insert("resourceVersion".to_owned(), version.clone()),
        None => metadata.remove("resourceVersion"),
    };
    Ok(changed)
}

/// A label selector (or a plain map of labels) in its text form.
pub(super) fn selector_text(selector: &Value) -> String {
    if let Some(text) = selector.as_str() {
        return text.to_owned();
    }
    crate::table::label_selector_text(selector)
}
