//! Schemas of custom kinds, from their CustomResourceDefinitions. Pure.

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

use super::schema::{Dialect, group_version_kind, open};
use crate::json::{get_array, get_str};
use crate::kinds::KindInfo;

const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

/// `openAPIV3Schema` by group, version and kind.
#[derive(Debug, Default)]
pub(crate) struct CustomSchemas(BTreeMap<(String, String, String), Value>);

impl CustomSchemas {
    /// From CustomResourceDefinition objects.
    pub(crate) fn of<'a>(definitions: impl Iterator<Item = &'a Value>) -> Self {
        let mut schemas = BTreeMap::new();
        for definition in definitions {
            let text = |path: &[&str]| get_str(definition, path).to_owned();
            let (group, kind) = (text(&["spec", "group"]), text(&["spec", "names", "kind"]));
            for version in get_array(definition, &["spec", "versions"]) {
                let schema = &version["schema"]["openAPIV3Schema"];
                if schema.is_object() {
                    let name = get_str(version, &["name"]).to_owned();
                    schemas.insert((group.clone(), name, kind.clone()), schema.clone());
                }
            }
        }
        Self(schemas)
    }

    /// The published schema of a kind; an open one if none was given.
    pub(super) fn definition(&self, kind: &KindInfo, version: &str, dialect: Dialect) -> Value {
        let given = self.0.get(&(kind.group.clone(), version.to_owned(), kind.kind.clone()));
        let mut out = match (given, dialect) {
            (None, _) => open(),
            (Some(schema), Dialect::V3) => schema.clone(),
            (Some(schema), Dialect::V2) => reduced(schema),
        };
        if let Some(properties) = out.get_mut("properties").and_then(Value::as_object_mut) {
            properties.insert("apiVersion".to_owned(), json!({"type": "string"}));
            properties.insert("kind".to_owned(), json!({"type": "string"}));
            properties.insert("metadata".to_owned(), dialect.reference_with(OBJECT_META, Map::new()));
        }
        out["x-kubernetes-group-version-kind"] =
            json!([group_version_kind(&kind.group, version, &kind.kind)]);
        out
    }
}

/// Name of a custom kind's schema: the group's labels backwards, version and kind.
pub(super) fn full_name(kind: &KindInfo, version: &str) -> String {
    let labels: Vec<&str> = kind.group.rsplit('.').collect();
    format!("{}.{version}.{}", labels.join("."), kind.kind)
}

/// What OpenAPI v2 can say of a v3 schema. Clients that read v2 know no alternatives; a value that may be of several
/// types stays without a type, and an object with unknown fields without properties.
fn reduced(schema: &Value) -> Value {
    let Some(fields) = schema.as_object() else { return json!({}) };
    let is_set = |key: &str| fields.get(key) == Some(&Value::Bool(true));
    let mut out = Map::new();
    if let Some(description) = fields.get("description").filter(|text| text.is_string()) {
        out.insert("description".to_owned(), description.clone());
    }
    if is_set("nullable") || is_set("x-kubernetes-int-or-string") {
        return Value::Object(out);
    }
    let type_ = get_str(schema, &["type"]);
    if is_set("x-kubernetes-preserve-unknown-fields") || type_.is_empty() {
        if type_ == "object" {
            out.insert("type".to_owned(), json!(type_));
        }
        return Value::Object(out);
    }
    out.insert("type".to_owned(), json!(type_));
    for kept in ["format", "required"] {
        if let Some(value) = fields.get(kept) {
            out.insert(kept.to_owned(), value.clone());
        }
    }
    for nested in ["items", "additionalProperties"] {
        if let Some(value) = fields.get(nested).filter(|value| value.is_object()) {
            out.insert(nested.to_owned(), reduced(value));
        }
    }
    if let Some(properties) = fields.get("properties").and_then(Value::as_object) {
        let properties: Map<String, Value> =
            properties.iter().map(|(name, schema)| (name.clone(), reduced(schema))).collect();
        out.insert("properties".to_owned(), Value::Object(properties));
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_v2_cannot_say_is_left_open() {
        let schema = json!({"type": "object", "required": ["spec"], "oneOf": [{}], "properties": {"spec": {
        "type": "object", "description": "d", "properties": {
            "size": {"type": "integer", "format": "int32", "minimum": 1, "default": 3},
            "port": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
            "maybe": {"type": "string", "nullable": true},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true,
                     "properties": {"a": {"type": "string"}}},
            "map": {"type": "object", "additionalProperties": {"type": "string", "pattern": "x"}},
            "list": {"type": "array", "items": {"type": "object"}}
        }}}});
        assert_eq!(
            reduced(&schema),
            json!({"type": "object", "required": ["spec"], "properties": {"spec": {
            "type": "object", "description": "d", "properties": {
                "size": {"type": "integer", "format": "int32"}, "port": {}, "maybe": {}, "free": {"type": "object"},
                "map": {"type": "object", "additionalProperties": {"type": "string"}},
                "list": {"type": "array", "items": {"type": "object"}}
            }}}})
        );
    }
}
