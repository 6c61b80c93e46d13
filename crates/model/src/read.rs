//! Reading fields of a JSON object with errors that name them.

use serde_json::Value;

use crate::{Rejection, net::Protocol};

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

    /// `metadata.namespace`, which objects of a namespace must have.
    pub(crate) fn namespace(&self) -> Result<String, Rejection> {
        match self.string("/metadata/namespace")? {
            Some(namespace) if !namespace.is_empty() => Ok(namespace.to_owned()),
            _ => Err(self.reject("metadata.namespace", "is missing; the object belongs to a namespace")),
        }
    }

    /// One of `metadata.labels`.
    pub(crate) fn label(&self, key: &str) -> Result<Option<&'a str>, Rejection> {
        let labels = match self.value.pointer("/metadata/labels") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(labels)) => labels,
            Some(other) => {
                return Err(
                    self.reject("metadata.labels", &format!("is {}, not an object", type_name(other)))
                );
            }
        };
        labels.get(key).map(|value| self.text(&format!("metadata.labels[{key}]"), value)).transpose()
    }

    /// A value that must be a string.
    pub(crate) fn text(&self, field: &str, value: &'a Value) -> Result<&'a str, Rejection> {
        value.as_str().ok_or_else(|| self.reject(field, &format!("is {}, not a string", type_name(value))))
    }

    /// A value that must be a boolean, if there is one.
    pub(crate) fn boolean(&self, field: &str, value: Option<&Value>) -> Result<Option<bool>, Rejection> {
        match value {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.reject(field, &format!("is {}, not a boolean", type_name(other)))),
        }
    }

    /// A value that must be a list, if there is one.
    pub(crate) fn array_value(
        &self,
        field: &str,
        value: Option<&'a Value>,
    ) -> Result<&'a [Value], Rejection> {
        match value {
            None | Some(Value::Null) => Ok(&[]),
            Some(Value::Array(items)) => Ok(items),
            Some(other) => Err(self.reject(field, &format!("is {}, not a list", type_name(other)))),
        }
    }

    /// An optional whole number at a JSON pointer.
    pub(crate) fn number(&self, pointer: &str) -> Result<Option<i64>, Rejection> {
        match self.value.pointer(pointer) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| {
                self.reject(&dotted(pointer), &format!("is {}, not a whole number", type_name(value)))
            }),
        }
    }

    /// An optional port at a JSON pointer; 0 is none.
    pub(crate) fn port(&self, pointer: &str) -> Result<Option<u16>, Rejection> {
        self.port_value(&dotted(pointer), self.value.pointer(pointer))
    }

    /// A port, if there is one; 0 is none.
    pub(crate) fn port_value(&self, field: &str, value: Option<&Value>) -> Result<Option<u16>, Rejection> {
        match value {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_i64().map(u16::try_from) {
                Some(Ok(0)) => Ok(None),
                Some(Ok(port)) => Ok(Some(port)),
                _ => Err(self.reject(field, &format!("{value} is not a port (1 to 65535)"))),
            },
        }
    }

    /// `protocol` of a port, TCP when absent.
    pub(crate) fn protocol(&self, at: &str, port: &'a Value) -> Result<Protocol, Rejection> {
        let field = format!("{at}.protocol");
        match port.get("protocol") {
            None | Some(Value::Null) => Ok(Protocol::Tcp),
            Some(value) => match self.text(&field, value)? {
                "" => Ok(Protocol::Tcp),
                name => Protocol::from_name(name)
                    .ok_or_else(|| self.reject(&field, &format!("{name:?} is none of TCP, UDP, SCTP"))),
            },
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
