//! Reading fields of a JSON object with errors that name them.

use serde_json::Value;

use crate::Rejection;

/// One object under inspection: makes [`Rejection`]s with its identity.
pub(crate) struct Object<'a> {
    kind: &'static str,
    value: &'a Value,
}

impl<'a> Object<'a> {
    pub(crate) fn new(kind: &'static str, value: &'a Value) -> Self {
        Self { kind, value }
    }

    /// `metadata.name`, which every object must have.
    pub(crate) fn name(&self) -> Result<String, Rejection> {
        match self.value.pointer("/metadata/name").and_then(Value::as_str) {
            Some(name) if !name.is_empty() => Ok(name.to_owned()),
            _ => Err(self.reject("metadata.name", "is missing; every object needs a name")),
        }
    }

    /// An optional string at a JSON pointer.
    pub(crate) fn string(&self, pointer: &str) -> Result<Option<&'a str>, Rejection> {
        match self.value.pointer(pointer) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => {
                Err(self.reject(&dotted(pointer), &format!("is {}, not a string", type_name(other))))
            }
        }
    }

    /// An optional array at a JSON pointer; empty when absent.
    pub(crate) fn array(&self, pointer: &str) -> Result<&'a [Value], Rejection> {
        match self.value.pointer(pointer) {
            None | Some(Value::Null) => Ok(&[]),
            Some(Value::Array(items)) => Ok(items),
            Some(other) => {
                Err(self.reject(&dotted(pointer), &format!("is {}, not a list", type_name(other))))
            }
        }
    }

    pub(crate) fn reject(&self, field: &str, cause: &str) -> Rejection {
        let text = |pointer: &str| {
            self.value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let name = text("/metadata/name");
        Rejection {
            kind: self.kind.to_owned(),
            namespace: text("/metadata/namespace"),
            name: if name.is_empty() { "?".to_owned() } else { name },
            field: field.to_owned(),
            cause: cause.to_owned(),
        }
    }
}

fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
