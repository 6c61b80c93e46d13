//! Reading fields of JSON objects: absent is fine, the wrong type is an error that names field and cause.

use serde_json::{Map, Value};

/// Why an object cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {cause}")]
pub struct Malformed {
    /// Path of the field, such as `spec.replicas`.
    pub field: String,
    /// What is wrong with it, and what would be right.
    pub cause: String,
}

impl Malformed {
    pub(crate) fn new(field: impl Into<String>, cause: impl Into<String>) -> Self {
        Self { field: field.into(), cause: cause.into() }
    }

    /// The same error, seen from an enclosing object.
    pub(crate) fn within(mut self, prefix: &str) -> Self {
        // Without a field it is the enclosing object itself that is wrong.
        self.field =
            if self.field.is_empty() { prefix.to_owned() } else { format!("{prefix}.{}", self.field) };
        self
    }

    fn expected(path: &str, what: &str, found: &Value) -> Self {
        let shown = found.to_string();
        let shown = crate::names::truncated(&shown, 80);
        Self::new(path, format!("expected {what}, found {shown}"))
    }
}

/// String-to-string map of labels, annotations or a selector.
pub(crate) type Labels<'a> = Option<&'a Map<String, Value>>;

/// The value at a dotted path; null counts as absent. Keys that contain dots cannot be reached this way.
pub(crate) fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let mut here = value;
    for key in path.split('.') {
        here = here.get(key)?;
    }
    (!here.is_null()).then_some(here)
}

/// A string, or nothing when absent or of another type: for fields that the store guarantees.
pub(crate) fn text<'a>(value: &'a Value, path: &str) -> Option<&'a str> {
    at(value, path).and_then(Value::as_str)
}

/// A number that is only reported, such as `status.observedGeneration`.
pub(crate) fn number(value: &Value, path: &str) -> Option<i64> {
    at(value, path).and_then(Value::as_i64)
}

/// True only when the field is the boolean `true`.
pub(crate) fn is_true(value: &Value, path: &str) -> bool {
    at(value, path).and_then(Value::as_bool).unwrap_or(false)
}

pub(crate) fn string<'a>(value: &'a Value, path: &str) -> Result<Option<&'a str>, Malformed> {
    match at(value, path) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(Malformed::expected(path, "a string", other)),
    }
}

pub(crate) fn boolean(value: &Value, path: &str) -> Result<Option<bool>, Malformed> {
    match at(value, path) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(Malformed::expected(path, "true or false", other)),
    }
}

/// A count: zero or more, within the API's int32.
pub(crate) fn count(value: &Value, path: &str) -> Result<Option<i64>, Malformed> {
    match at(value, path) {
        None => Ok(None),
        Some(found) => match found.as_i64() {
            Some(number) if (0..=i64::from(i32::MAX)).contains(&number) => Ok(Some(number)),
            _ => Err(Malformed::expected(path, "an integer from 0 to 2147483647", found)),
        },
    }
}

/// A port number from 1 to 65535.
pub(crate) fn port(value: &Value, path: &str) -> Result<Option<u16>, Malformed> {
    match at(value, path) {
        None => Ok(None),
        Some(found) => match found.as_u64().and_then(|number| u16::try_from(number).ok()) {
            Some(number) if number > 0 => Ok(Some(number)),
            _ => Err(Malformed::expected(path, "a port from 1 to 65535", found)),
        },
    }
}

/// A list; absent is empty.
pub(crate) fn list<'a>(value: &'a Value, path: &str) -> Result<&'a [Value], Malformed> {
    match at(value, path) {
        None => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(Malformed::expected(path, "a list", other)),
    }
}

pub(crate) fn map<'a>(value: &'a Value, path: &str) -> Result<Option<&'a Map<String, Value>>, Malformed> {
    match at(value, path) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(other) => Err(Malformed::expected(path, "an object", other)),
    }
}

/// A map of strings to strings (labels, a selector, a nodeSelector).
pub(crate) fn labels<'a>(value: &'a Value, path: &str) -> Result<Labels<'a>, Malformed> {
    let Some(map) = map(value, path)? else { return Ok(None) };
    match map.iter().find(|(_, value)| !value.is_string()) {
        None => Ok(Some(map)),
        Some((key, found)) => Err(Malformed::expected(&format!("{path}[{key}]"), "a string", found)),
    }
}

/// An `IntOrString` count: a number, or a percentage of `total`, rounded up or down.
pub(crate) fn count_or_percent(
    value: &Value,
    path: &str,
    total: i64,
    round_up: bool,
) -> Result<Option<i64>, Malformed> {
    let Some(found) = at(value, path) else { return Ok(None) };
    let wrong = || Malformed::expected(path, "an integer or a percentage such as \"25%\"", found);
    match found {
        Value::Number(_) => count(value, path),
        Value::String(text) => {
            let percent: i64 = text.strip_suffix('%').and_then(|n| n.parse().ok()).ok_or_else(wrong)?;
            if !(0..=1_000_000).contains(&percent) {
                return Err(wrong());
            }
            let product = percent * total;
            Ok(Some(if round_up { (product + 99) / 100 } else { product / 100 }))
        }
        _ => Err(wrong()),
    }
}

/// The value of label `key`.
pub(crate) fn label<'a>(labels: Labels<'a>, key: &str) -> Option<&'a str> {
    labels?.get(key)?.as_str()
}

/// The object at `key` of an object in the making; created, or put in the place of something else, when there is none.
///
/// # Panics
/// When `value` itself is neither an object nor null.
pub(crate) fn object_mut<'v>(value: &'v mut Value, key: &str) -> &'v mut Value {
    let entry = &mut value[key];
    if !entry.is_object() {
        *entry = Value::Object(Map::new());
    }
    entry
}

/// A condition of `status.conditions` by type.
pub(crate) fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    at(object, "status.conditions")?.as_array()?.iter().find(|c| text(c, "type") == Some(type_))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn wrong_types_name_field_and_cause() {
        let object =
            json!({"spec": {"replicas": "three", "paused": 1, "ports": {}, "n": -1, "sel": {"a": 1}}});
        let replicas = count(&object, "spec.replicas").unwrap_err().to_string();
        assert_eq!(replicas, "spec.replicas: expected an integer from 0 to 2147483647, found \"three\"");
        assert!(boolean(&object, "spec.paused").is_err());
        assert!(list(&object, "spec.ports").is_err());
        assert!(count(&object, "spec.n").is_err());
        assert_eq!(labels(&object, "spec.sel").unwrap_err().field, "spec.sel[a]");
        assert_eq!(count(&object, "spec.absent"), Ok(None));
        for (field, whole) in [("", "spec: required"), ("containers", "spec.containers: required")] {
            assert_eq!(Malformed::new(field, "required").within("spec").to_string(), whole);
        }
    }

    #[test]
    fn percentages_round_as_asked() {
        let spec = json!({"a": "25%", "b": 2, "c": "25", "d": "-1%"});
        assert_eq!(count_or_percent(&spec, "a", 10, true), Ok(Some(3)));
        assert_eq!(count_or_percent(&spec, "a", 10, false), Ok(Some(2)));
        assert_eq!(count_or_percent(&spec, "b", 10, false), Ok(Some(2)));
        assert!(count_or_percent(&spec, "c", 10, false).is_err());
        assert!(count_or_percent(&spec, "d", 10, false).is_err());
    }
}
