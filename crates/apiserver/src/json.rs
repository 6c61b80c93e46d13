//! Reading and editing objects as JSON: metadata, paths, timestamps. Pure; a wrong type reads as absent.

use jiff::Timestamp;
use serde_json::{Map, Value};
use std::io;

use crate::error::ApiError;

/// Largest object in bytes of JSON, as a real API server's storage has it.
const OBJECT_LIMIT: usize = 1_572_864;
/// Deepest nesting of an object. What is parsed cannot be deeper; patch after patch could make it so, until walking it
/// exhausts a stack.
const DEPTH_LIMIT: usize = 128;

/// The string at a path of keys, "" where there is none.
pub fn get_str<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    at(value, path).and_then(Value::as_str).unwrap_or_default()
}

/// An instant as Kubernetes writes it (RFC 3339, UTC, whole seconds).
pub fn timestamp_text(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

pub(crate) fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, key| value.get(key)).filter(|value| !value.is_null())
}

/// As [`at`], for paths that are not known at compile time.
pub(crate) fn at_path<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, key| value.get(key)).filter(|value| !value.is_null())
}

pub(crate) fn get_int(value: &Value, path: &[&str]) -> Option<i64> {
    at(value, path).and_then(Value::as_i64)
}

pub(crate) fn get_array<'a>(value: &'a Value, path: &[&str]) -> &'a [Value] {
    at(value, path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

pub(crate) fn name(object: &Value) -> &str {
    get_str(object, &["metadata", "name"])
}

pub(crate) fn namespace(object: &Value) -> &str {
    get_str(object, &["metadata", "namespace"])
}

pub(crate) fn uid(object: &Value) -> &str {
    get_str(object, &["metadata", "uid"])
}

pub(crate) fn is_terminating(object: &Value) -> bool {
    at(object, &["metadata", "deletionTimestamp"]).is_some()
}

pub(crate) fn finalizers(object: &Value) -> &[Value] {
    get_array(object, &["metadata", "finalizers"])
}

pub(crate) fn owner_uids(object: &Value) -> impl Iterator<Item = &str> {
    get_array(object, &["metadata", "ownerReferences"]).iter().map(|owner| get_str(owner, &["uid"]))
}

pub(crate) fn parse_time(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}

/// The object's fields; whatever else was there becomes an empty object first.
pub(crate) fn fields(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("just made an object")
}

/// The fields of a child object, created where missing.
pub(crate) fn child<'a>(value: &'a mut Value, key: &str) -> &'a mut Map<String, Value> {
    fields(fields(value).entry(key).or_insert(Value::Null))
}

pub(crate) fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    child(object, "metadata")
}

/// Sets the value at a path, creating objects on the way.
pub(crate) fn set_path(value: &mut Value, path: &[String], new: Value) {
    let mut here = value;
    for key in path {
        here = fields(here).entry(key.as_str()).or_insert(Value::Null);
    }
    *here = new;
}

/// Copies a top-level field from one object to another, or removes it where the source has none.
pub(crate) fn copy_field(from: &Value, to: &mut Value, key: &str) {
    let to = fields(to);
    match from.get(key) {
        Some(value) => to.insert(key.to_owned(), value.clone()),
        None => to.remove(key),
    };
}

/// Bytes of an object's JSON, without building it.
fn encoded_len(object: &Value) -> usize {
    struct Count(usize);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    // Counting cannot fail, and neither can a Value's keys.
    let _ = serde_json::to_writer(&mut count, object);
    count.0
}

/// Memory that a value takes, roughly: an object's fields lie in tree nodes of room for eleven, mostly half full, and
/// every text is an allocation of its own. That is several times the length of its JSON.
pub(crate) fn footprint(value: &Value) -> usize {
    const NODE: usize = 11 * (size_of::<String>() + size_of::<Value>()) + 16;
    let allocation = |len: usize| (len + 8).max(24).next_multiple_of(16);
    size_of::<Value>()
        + match value {
            Value::String(text) => allocation(text.len()),
            Value::Array(items) => allocation(0) + items.iter().map(footprint).sum::<usize>(),
            Value::Object(fields) => {
                let contents: usize = fields
                    .iter()
                    .map(|(key, value)| allocation(key.len()) + footprint(value) - size_of::<Value>())
                    .sum();
                fields.len().div_ceil(6) * NODE + contents
            }
            _ => 0,
        }
}

fn is_deeper_than(value: &Value, limit: usize) -> bool {
    let Some(left) = limit.checked_sub(1) else { return true };
    match value {
        Value::Array(items) => items.iter().any(|item| is_deeper_than(item, left)),
        Value::Object(fields) => fields.values().any(|field| is_deeper_than(field, left)),
        _ => false,
    }
}

/// Refuses an object that is too large or nested too deeply to be kept.
///
/// # Errors
/// 413 or 400.
pub(crate) fn check_bounds(object: &Value) -> Result<(), ApiError> {
    if is_deeper_than(object, DEPTH_LIMIT) {
        return Err(ApiError::bad_request(format!(
            "the object is nested more than {DEPTH_LIMIT} levels deep"
        )));
    }
    if encoded_len(object) > OBJECT_LIMIT {
        return Err(ApiError::too_large(OBJECT_LIMIT));
    }
    Ok(())
}
