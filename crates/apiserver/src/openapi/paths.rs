//! Paths and operations: where kinds are served, and which parameters their writes understand. Pure.

use serde_json::{Map, Value, json};

use super::schema::{Dialect, group_version_kind};
use crate::kinds::KindInfo;

/// The paths of a kind in one version.
pub(super) fn of(kind: &KindInfo, version: &str, dialect: Dialect) -> Vec<(String, Value)> {
    let base = if kind.group.is_empty() {
        format!("/api/{version}")
    } else {
        format!("/apis/{}/{version}", kind.group)
    };
    let gvk = group_version_kind(&kind.group, version, &kind.kind);
    let operation = |action: &str, writes: bool| {
        let mut parameters = Vec::new();
        if writes {
            parameters.push(parameter("dryRun", "query", "string", dialect));
        }
        if action == "patch" {
            parameters.push(parameter("fieldManager", "query", "string", dialect));
            parameters.push(parameter("force", "query", "boolean", dialect));
        }
        let mut out = json!({
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk,
        });
        if !parameters.is_empty() {
            out["parameters"] = json!(parameters);
        }
        out
    };
    let in_path = |names: &[&str]| -> Vec<Value> {
        names.iter().map(|name| parameter(name, "path", "string", dialect)).collect()
    };
    let collection = |names: &[&str]| {
        let mut out = json!({
            "get": operation("list", false), "post": operation("post", true),
            "delete": operation("deletecollection", true),
        });
        if !names.is_empty() {
            out["parameters"] = json!(in_path(names));
        }
        out
    };
    let item = |names: &[&str]| {
        json!({
            "get": operation("get", false), "put": operation("put", true), "patch": operation("patch", true),
            "delete": operation("delete", true), "parameters": in_path(names),
        })
    };
    let plural = &kind.plural;
    if kind.namespaced {
        let home = format!("{base}/namespaces/{{namespace}}/{plural}");
        vec![
            (format!("{base}/{plural}"), json!({"get": operation("list", false)})),
            (home.clone(), collection(&["namespace"])),
            (format!("{home}/{{name}}"), item(&["name", "namespace"])),
        ]
    } else {
        vec![
            (format!("{base}/{plural}"), collection(&[])),
            (format!("{base}/{plural}/{{name}}"), item(&["name"])),
        ]
    }
}

fn parameter(name: &str, place: &str, type_: &str, dialect: Dialect) -> Value {
    let mut out = Map::new();
    out.insert("name".to_owned(), json!(name));
    out.insert("in".to_owned(), json!(place));
    if place == "path" {
        out.insert("required".to_owned(), json!(true));
    }
    match dialect {
        Dialect::V2 => out.insert("type".to_owned(), json!(type_)),
        Dialect::V3 => out.insert("schema".to_owned(), json!({"type": type_})),
    };
    Value::Object(out)
}
