//! What the server serves: groups, versions, resources. Clients such as kubectl read it first.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

use super::route::Route;
use crate::error::ApiError;
use crate::events;
use crate::kinds::KindInfo;
use crate::store::Store;

pub(super) fn answer(store: &Store, route: &Route, address: &str) -> Result<Value, ApiError> {
    let kinds = all_kinds(store);
    match route {
        Route::Root => Ok(root(&kinds)),
        Route::CoreVersions => Ok(json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}],
        })),
        Route::Groups => {
            let groups: Vec<Value> =
                groups(&kinds).into_iter().map(|(name, versions)| group(name, &versions)).collect();
            Ok(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        Route::Group(name) => {
            let (_, versions) = groups(&kinds)
                .into_iter()
                .find(|(found, _)| found == name)
                .ok_or_else(ApiError::no_such_resource)?;
            let mut body = group(name, &versions);
            body["kind"] = json!("APIGroup");
            body["apiVersion"] = json!("v1");
            Ok(body)
        }
        Route::Resources { group, version } => resources(&kinds, group, version),
        _ => Err(ApiError::no_such_resource()),
    }
}

pub(super) fn all_kinds(store: &Store) -> Vec<Arc<KindInfo>> {
    let mut kinds = store.kinds();
    let alias = kinds.iter().find(|kind| kind.is("", "Event")).map(|core| Arc::new(events::alias(core)));
    kinds.extend(alias);
    kinds
}

/// Named groups with their versions, preferred first; in the order of the kinds.
fn groups(kinds: &[Arc<KindInfo>]) -> Vec<(&str, Vec<&str>)> {
    let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
    for kind in kinds.iter().filter(|kind| !kind.group.is_empty()) {
        let index = groups.iter().position(|(name, _)| *name == kind.group).unwrap_or_else(|| {
            groups.push((&kind.group, Vec::new()));
            groups.len() - 1
        });
        for version in &kind.versions {
            if !groups[index].1.contains(&version.as_str()) {
                groups[index].1.push(version);
            }
        }
    }
    groups
}

fn group(name: &str, versions: &[&str]) -> Value {
    let entry = |version: &&str| json!({"groupVersion": format!("{name}/{version}"), "version": version});
    json!({
        "name": name, "versions": versions.iter().map(entry).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(entry),
    })
}

fn root(kinds: &[Arc<KindInfo>]) -> Value {
    let mut paths = vec!["/api".to_owned(), "/api/v1".to_owned(), "/apis".to_owned()];
    for (name, versions) in groups(kinds) {
        paths.push(format!("/apis/{name}"));
        paths.extend(versions.iter().map(|version| format!("/apis/{name}/{version}")));
    }
    paths.extend(
        ["/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz", "/version"].map(str::to_owned),
    );
    json!({"paths": paths})
}

fn resources(kinds: &[Arc<KindInfo>], group: &str, version: &str) -> Result<Value, ApiError> {
    let mut by_name = BTreeMap::new();
    let served = |kind: &&Arc<KindInfo>| kind.group == group && kind.versions.iter().any(|v| v == version);
    for kind in kinds.iter().filter(served) {
        let mut verbs =
            vec!["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
        if kind.is("", "Namespace") {
            verbs.retain(|verb| *verb != "deletecollection");
        }
        let mut entry = json!({
            "name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced, "kind": kind.kind,
            "verbs": verbs,
        });
        if !kind.short_names.is_empty() {
            entry["shortNames"] = json!(kind.short_names);
        }
        if !kind.categories.is_empty() {
            entry["categories"] = json!(kind.categories);
        }
        by_name.insert(kind.plural.clone(), entry);
        let subresource = |name: &str, of: &str| {
            json!({
                "name": format!("{}/{name}", kind.plural), "singularName": "", "namespaced": kind.namespaced,
                "kind": of, "verbs": ["get", "patch", "update"],
            })
        };
        if kind.status {
            by_name.insert(format!("{}/status", kind.plural), subresource("status", &kind.kind));
        }
        if kind.scale.is_some() {
            let mut scale = subresource("scale", "Scale");
            scale["group"] = json!("autoscaling");
            scale["version"] = json!("v1");
            by_name.insert(format!("{}/scale", kind.plural), scale);
        }
    }
    if by_name.is_empty() {
        return Err(ApiError::no_such_resource());
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Ok(json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version,
        "resources": by_name.into_values().collect::<Vec<_>>(),
    }))
}
