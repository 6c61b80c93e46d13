//! Content types: what a client wants to read, and what it sends.

use http::{HeaderMap, header};
use serde_json::Value;

use super::body;
use crate::error::ApiError;
use crate::patch::Patch;

/// How much of each object a table's rows bring along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IncludeObject {
    None,
    Metadata,
    Object,
}

/// The form of objects in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// As they are.
    Object,
    /// Rows of a meta.k8s.io/v1 Table.
    Table(IncludeObject),
    /// meta.k8s.io/v1 PartialObjectMetadata.
    Metadata,
}

/// The first form in `Accept` that this server speaks.
pub(super) fn wanted(headers: &HeaderMap, include: Option<&str>) -> Result<Form, ApiError> {
    let accepts: Vec<&str> =
        headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let all = accepts.join(",");
    if all.trim().is_empty() {
        return Ok(Form::Object);
    }
    for range in all.split(',') {
        let mut parts = range.split(';').map(str::trim);
        if !matches!(parts.next(), Some("application/json" | "application/*" | "*/*")) {
            continue;
        }
        let (mut form, mut group, mut version) = ("", "", "");
        for part in parts {
            match part.split_once('=') {
                Some(("as", value)) => form = value,
                Some(("g", value)) => group = value,
                Some(("v", value)) => version = value,
                _ => {}
            }
        }
        match (form, group, version) {
            ("", _, _) => return Ok(Form::Object),
            ("Table", "meta.k8s.io", "v1") => return Ok(Form::Table(include_object(include)?)),
            ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1") => {
                return Ok(Form::Metadata);
            }
            _ => {}
        }
    }
    Err(ApiError::not_acceptable("only the following media types are accepted: application/json"))
}

fn include_object(text: Option<&str>) -> Result<IncludeObject, ApiError> {
    match text {
        None | Some("Metadata") => Ok(IncludeObject::Metadata),
        Some("None") => Ok(IncludeObject::None),
        Some("Object") => Ok(IncludeObject::Object),
        Some(other) => Err(ApiError::bad_request(format!(
            "invalid includeObject {other:?}: it must be \"None\", \"Metadata\" or \"Object\""
        ))),
    }
}

/// The patch in a request's body, by its content type.
pub(super) fn patch(headers: &HeaderMap, bytes: &[u8]) -> Result<Patch, ApiError> {
    let make: fn(Value) -> Patch = match body::content_type(headers) {
        "application/json-patch+json" => Patch::Json,
        "application/merge-patch+json" => Patch::Merge,
        "application/strategic-merge-patch+json" => Patch::Strategic,
        "application/apply-patch+yaml" => Patch::Apply,
        other => {
            return Err(ApiError::unsupported_media_type(format!(
                "the body of the request was in an unknown format ({other:?}) - accepted media types include: \
                 application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml, \
                 application/strategic-merge-patch+json"
            )));
        }
    };
    Ok(make(body::parse(bytes)?))
}
