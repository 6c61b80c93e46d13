//! The published schema: OpenAPI v2 as JSON and protobuf, and OpenAPI v3 by group and version.
//!
//! kubectl reads it to check manifests before it sends them, to explain fields, and to know how lists are merged. Kinds
//! of the [`table`] are published with their fields; other built-in kinds are open, so that no right object is refused;
//! custom kinds are published as their definitions say. Everything here is pure.

mod custom;
mod gnostic;
mod paths;
mod schema;
pub(crate) mod table;

use serde_json::{Map, Value, json};
use std::sync::Arc;

pub(crate) use custom::CustomSchemas;
use schema::Dialect;

use crate::kinds::KindInfo;

/// What documents are made of: the kinds served, and the schemas of custom ones.
pub(crate) struct Source<'a> {
    pub(crate) kinds: &'a [Arc<KindInfo>],
    pub(crate) custom: &'a CustomSchemas,
}

impl Source<'_> {
    /// The whole API as an OpenAPI v2 document.
    pub(crate) fn v2(&self) -> Value {
        let (definitions, paths) = self.contents(Dialect::V2, |_, _| true);
        json!({
            "swagger": "2.0", "info": info(), "paths": paths, "definitions": definitions,
        })
    }

    /// The same in the protobuf form of gnostic's `openapiv2` package.
    pub(crate) fn v2_protobuf(&self) -> Vec<u8> {
        gnostic::document(&self.v2())
    }

    /// Where the OpenAPI v3 documents are.
    pub(crate) fn v3_index(&self) -> Value {
        let mut documents = Map::new();
        for kind in self.kinds {
            for version in &kind.versions {
                let path = document_path(&kind.group, version);
                let url = format!("/openapi/v3/{path}");
                documents.entry(path).or_insert_with(|| json!({"serverRelativeURL": url}));
            }
        }
        json!({"paths": documents})
    }

    /// The OpenAPI v3 document of a group (empty for core) and version; `None` if that is not served.
    pub(crate) fn v3(&self, group: &str, version: &str) -> Option<Value> {
        let wanted = |kind: &KindInfo, served: &str| kind.group == group && served == version;
        let (definitions, paths) = self.contents(Dialect::V3, wanted);
        (!paths.is_empty()).then(|| {
            let schemas = reachable(definitions, &document_path(group, version));
            json!({"openapi": "3.0.0", "info": info(), "paths": paths, "components": {"schemas": schemas}})
        })
    }

    /// Definitions and paths of the kinds and versions wanted; those of the table are all there.
    fn contents(
        &self,
        dialect: Dialect,
        wanted: impl Fn(&KindInfo, &str) -> bool,
    ) -> (Map<String, Value>, Map<String, Value>) {
        let table = table::table();
        let mut definitions = schema::definitions(table, dialect);
        let mut paths = Map::new();
        for kind in self.kinds {
            for version in kind.versions.iter().filter(|version| wanted(kind, version)) {
                paths.extend(paths::of(kind, version, dialect));
                if kind.custom || table.kind(&kind.group, version, &kind.kind).is_none() {
                    let schema = self.custom.definition(kind, version, dialect);
                    definitions.insert(custom::full_name(kind, version), schema);
                }
            }
        }
        (definitions, paths)
    }
}

fn info() -> Value {
    json!({"title": "Podway's API server for labs", "version": env!("CARGO_PKG_VERSION")})
}

/// `api/v1` or `apis/{group}/{version}`.
fn document_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// The schemas of a document's own kinds, and those that they refer to.
fn reachable(mut all: Map<String, Value>, document: &str) -> Map<String, Value> {
    let mut waiting: Vec<String> = all
        .iter()
        .filter(|(_, schema)| {
            let gvk = &schema["x-kubernetes-group-version-kind"][0];
            let text = |key: &str| gvk[key].as_str().unwrap_or_default().to_owned();
            gvk.is_object() && document_path(&text("group"), &text("version")) == document
        })
        .map(|(name, _)| name.clone())
        .collect();
    let mut out = Map::new();
    while let Some(name) = waiting.pop() {
        if let Some(schema) = all.remove(&name) {
            references(&schema, &mut waiting);
            out.insert(name, schema);
        }
    }
    out
}

fn references(schema: &Value, names: &mut Vec<String>) {
    match schema {
        Value::Array(items) => items.iter().for_each(|item| references(item, names)),
        Value::Object(fields) => {
            let name = fields.get("$ref").and_then(Value::as_str).and_then(|text| text.rsplit('/').next());
            names.extend(name.map(str::to_owned));
            fields.values().for_each(|field| references(field, names));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
