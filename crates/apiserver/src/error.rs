//! Refusals, as values: each is what a Kubernetes API server would answer with a `Status` object.

use serde_json::{Value, json};
use std::fmt::Display;

use crate::kinds::KindInfo;

/// One violated field of a rejected object (`StatusCause` of the Kubernetes API).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Machine-readable reason, such as `FieldValueInvalid`.
    pub reason: &'static str,
    /// What is wrong with the value, without the field's path.
    pub message: String,
    /// Path of the field inside the object, such as `metadata.name`.
    pub field: String,
}

impl Cause {
    /// A value that breaks a rule.
    pub fn invalid(field: impl Into<String>, value: &Value, rule: impl Display) -> Self {
        Self {
            reason: "FieldValueInvalid",
            message: format!("Invalid value: {value}: {rule}"),
            field: field.into(),
        }
    }

    /// A value that is missing.
    pub fn required(field: impl Into<String>, what: impl Display) -> Self {
        Self { reason: "FieldValueRequired", message: format!("Required value: {what}"), field: field.into() }
    }

    /// A value that may not be there, or may not change.
    pub fn forbidden(field: impl Into<String>, why: impl Display) -> Self {
        Self { reason: "FieldValueForbidden", message: format!("Forbidden: {why}"), field: field.into() }
    }
}

/// Why the API refused a request; [`ApiError::to_status`] is its wire form.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// `reason` of the Status object, such as `NotFound`.
    pub reason: &'static str,
    /// Human-readable message.
    pub message: String,
    details: Option<Box<Details>>,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Details {
    name: String,
    group: String,
    kind: String,
    causes: Vec<Cause>,
    retry_after_seconds: u32,
}

/// Group-qualified plural as error messages name it: `services`, `deployments.apps`.
fn qualified(plural: &str, group: &str) -> String {
    if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") }
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None }
    }

    fn about(code: u16, reason: &'static str, kind: &KindInfo, name: &str, message: String) -> Self {
        let details = Details {
            name: name.to_owned(),
            group: kind.group.clone(),
            kind: kind.plural.clone(),
            ..Details::default()
        };
        Self { details: Some(Box::new(details)), ..Self::new(code, reason, message) }
    }

    /// 400: the request itself is malformed.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401: no token, or a wrong one.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403: the request is understood and not allowed.
    pub fn forbidden(kind: &KindInfo, name: &str, why: impl Display) -> Self {
        let what = qualified(&kind.plural, &kind.group);
        Self::about(403, "Forbidden", kind, name, format!("{what} \"{name}\" is forbidden: {why}"))
    }

    /// 403 for new content of a namespace that is going away.
    pub(crate) fn namespace_terminating(kind: &KindInfo, name: &str, namespace: &str) -> Self {
        let mut error = Self::forbidden(
            kind,
            name,
            format_args!(
                "unable to create new content in namespace {namespace} because it is being terminated"
            ),
        );
        if let Some(details) = &mut error.details {
            details.causes.push(Cause {
                reason: "NamespaceTerminating",
                message: format!("namespace {namespace} is being terminated"),
                field: "metadata.namespace".to_owned(),
            });
        }
        error
    }

    /// 404: no object of that name.
    pub fn not_found(kind: &KindInfo, name: &str) -> Self {
        let what = qualified(&kind.plural, &kind.group);
        Self::about(404, "NotFound", kind, name, format!("{what} \"{name}\" not found"))
    }

    /// 404: no such path, kind or subresource.
    pub fn no_such_resource() -> Self {
        Self {
            details: Some(Box::default()),
            ..Self::new(404, "NotFound", "the server could not find the requested resource")
        }
    }

    /// 404 of the Rust interface: a kind that was never registered.
    pub fn unknown_kind(what: impl Display) -> Self {
        Self::new(
            404,
            "NotFound",
            format!("no kind {what} is registered: create its CustomResourceDefinition first"),
        )
    }

    /// 405: the resource exists and does not do that.
    pub fn method_not_allowed() -> Self {
        Self {
            details: Some(Box::default()),
            ..Self::new(
                405,
                "MethodNotAllowed",
                "the server does not allow this method on the requested resource",
            )
        }
    }

    /// 406: the client reads nothing that this server writes.
    pub fn not_acceptable(message: impl Into<String>) -> Self {
        Self::new(406, "NotAcceptable", message)
    }

    /// 409: an object of that name is there already.
    pub fn already_exists(kind: &KindInfo, name: &str) -> Self {
        let what = qualified(&kind.plural, &kind.group);
        Self::about(409, "AlreadyExists", kind, name, format!("{what} \"{name}\" already exists"))
    }

    /// 409: the object changed since the caller read it.
    pub fn conflict(kind: &KindInfo, name: &str, why: impl Display) -> Self {
        let what = qualified(&kind.plural, &kind.group);
        let message = format!("Operation cannot be fulfilled on {what} \"{name}\": {why}");
        Self::about(409, "Conflict", kind, name, message)
    }

    pub(crate) fn modified(kind: &KindInfo, name: &str) -> Self {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(kind, name, why)
    }

    /// 410: the resource version is older than what the server still remembers.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 413: the object or the request body is too large.
    pub fn too_large(limit_bytes: usize) -> Self {
        Self::new(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit_bytes} bytes"),
        )
    }

    /// 415: a body or patch type that the server cannot read.
    pub fn unsupported_media_type(message: impl Into<String>) -> Self {
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 422: the object breaks the listed rules.
    pub fn invalid(kind: &KindInfo, name: &str, causes: Vec<Cause>) -> Self {
        let mut texts: Vec<String> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        let list = if texts.len() == 1 {
            texts.pop().unwrap_or_default()
        } else {
            format!("[{}]", texts.join(", "))
        };
        let what = qualified(&kind.kind, &kind.group);
        let details = Details {
            name: name.to_owned(),
            group: kind.group.clone(),
            kind: kind.kind.clone(),
            causes,
            retry_after_seconds: 0,
        };
        Self {
            details: Some(Box::new(details)),
            ..Self::new(422, "Invalid", format!("{what} \"{name}\" is invalid: {list}"))
        }
    }

    /// 501: a part of Kubernetes that an API server without kubelets cannot do.
    pub fn not_implemented(message: impl Into<String>) -> Self {
        Self::new(501, "NotImplemented", message)
    }

    /// 503: a limit of this server is reached.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    /// 504: the caller asks for a resource version that does not exist yet.
    pub fn version_too_large(asked: u64, current: u64) -> Self {
        let details = Details {
            causes: vec![Cause {
                reason: "ResourceVersionTooLarge",
                message: "Too large resource version".to_owned(),
                field: String::new(),
            }],
            retry_after_seconds: 1,
            ..Details::default()
        };
        Self {
            details: Some(Box::new(details)),
            ..Self::new(
                504,
                "Timeout",
                format!("Timeout: Too large resource version: {asked}, current: {current}"),
            )
        }
    }

    /// No such object or kind.
    pub fn is_not_found(&self) -> bool {
        self.reason == "NotFound"
    }

    /// The object changed since it was read, or a precondition does not hold.
    pub fn is_conflict(&self) -> bool {
        self.reason == "Conflict"
    }

    /// An object of that name is there already.
    pub fn is_already_exists(&self) -> bool {
        self.reason == "AlreadyExists"
    }

    /// The watch or list must start again from a fresh list.
    pub fn is_expired(&self) -> bool {
        self.reason == "Expired"
    }

    /// The `Status` object (meta/v1) that tells a client of this refusal.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if let Some(details) = &self.details {
            status["details"] = details.to_json();
        }
        status
    }
}

impl Details {
    fn to_json(&self) -> Value {
        let mut out = serde_json::Map::new();
        for (key, value) in [("name", &self.name), ("group", &self.group), ("kind", &self.kind)] {
            if !value.is_empty() {
                out.insert(key.to_owned(), json!(value));
            }
        }
        if !self.causes.is_empty() {
            let causes = self.causes.iter().map(|cause| {
                let mut entry = json!({ "reason": cause.reason, "message": cause.message });
                if !cause.field.is_empty() {
                    entry["field"] = json!(cause.field);
                }
                entry
            });
            out.insert("causes".to_owned(), causes.collect());
        }
        if self.retry_after_seconds > 0 {
            out.insert("retryAfterSeconds".to_owned(), json!(self.retry_after_seconds));
        }
        Value::Object(out)
    }
}
