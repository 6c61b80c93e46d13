//! The four ways to patch an object. Pure.
//!
//! - JSON patch: RFC 6902. Merge patch: RFC 7396.
//! - Strategic merge patch: as Kubernetes' types define it, with lists merged by the keys in [`merge_rule`] and the
//!   directives `$patch`, `$retainKeys`, `$deleteFromPrimitiveList` and `$setElementOrder`.
//! - Apply: fields are merged as by a strategic merge patch. There is no field ownership, so a field that an applier
//!   stops sending stays.

use serde_json::{Map, Value, json};

use crate::error::{ApiError, Cause};
use crate::json::check_bounds;
use crate::kinds::KindInfo;

/// Nesting of a patch beyond which it is refused (serde_json stops parsing at 128).
const DEPTH_LIMIT: usize = 128;

/// Operations of one JSON patch, as a real API server limits them.
const OPERATIONS_LIMIT: usize = 10_000;

/// A change to an object, by its HTTP content type.
#[derive(Debug, Clone, PartialEq)]
pub enum Patch {
    /// `application/json-patch+json`: a list of operations.
    Json(Value),
    /// `application/merge-patch+json`.
    Merge(Value),
    /// `application/strategic-merge-patch+json`; not for custom kinds.
    Strategic(Value),
    /// `application/apply-patch+yaml` (sent as JSON): the object is created if it does not exist.
    Apply(Value),
}

impl Patch {
    /// The patched object.
    ///
    /// # Errors
    /// 400 for a malformed patch, 415 for a strategic merge patch of a custom kind, 422 for a JSON patch whose paths
    /// or tests do not fit the object.
    pub fn apply_to(&self, kind: &KindInfo, object: &Value) -> Result<Value, ApiError> {
        let mut patched = object.clone();
        match self {
            Self::Json(operations) => {
                let operations: json_patch::Patch = serde_json::from_value(operations.clone())
                    .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
                if operations.0.len() > OPERATIONS_LIMIT {
                    return Err(ApiError::bad_request(format!(
                        "the JSON patch has {} operations: the limit is {OPERATIONS_LIMIT}",
                        operations.0.len()
                    )));
                }
                for operation in &operations.0 {
                    json_patch::patch(&mut patched, std::slice::from_ref(operation)).map_err(|error| {
                        let name = crate::json::name(object);
                        ApiError::invalid(kind, name, vec![Cause::invalid("patch", &json!(operation), error)])
                    })?;
                    // A few copies of copies would fill the memory, or the stack of whoever walks the object.
                    check_bounds(&patched)?;
                }
            }
            Self::Merge(patch) => {
                require_object(patch)?;
                json_patch::merge(&mut patched, patch);
            }
            Self::Strategic(_) if kind.custom => {
                return Err(ApiError::unsupported_media_type(
                    "the body of the request was in an unknown format - accepted media types include: \
                     application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
                ));
            }
            Self::Apply(patch) if kind.custom => {
                require_object(patch)?;
                json_patch::merge(&mut patched, patch);
            }
            Self::Strategic(patch) | Self::Apply(patch) => {
                let patch = require_object(patch)?;
                let mut context = Context { kind: &kind.kind, path: Vec::new() };
                let fields = patched
                    .as_object_mut()
                    .ok_or_else(|| ApiError::bad_request("the stored object is not a JSON object"))?;
                context.merge_object(fields, patch)?;
            }
        }
        if !patched.is_object() {
            return Err(ApiError::bad_request("the patch does not leave a JSON object"));
        }
        Ok(patched)
    }
}

fn require_object(patch: &Value) -> Result<&Map<String, Value>, ApiError> {
    patch
        .as_object()
        .ok_or_else(|| ApiError::bad_request("error decoding patch: the patch must be a JSON object"))
}

/// How a list in a built-in kind is merged.
#[derive(Debug, PartialEq, Eq)]
enum Merge {
    /// Items are objects with the same identity when this key is equal.
    ByKey(&'static str),
    /// Items are scalars: a set.
    Set,
    /// The patch's list replaces the object's.
    Replace,
}

/// The merge strategy of a list field, from its name and the path to it (`patchMergeKey` of the API's Go types).
fn merge_rule(kind: &str, path: &[String], field: &str) -> Merge {
    let parent = path.last().map(String::as_str).unwrap_or_default();
    let in_container = matches!(parent, "containers" | "initContainers" | "ephemeralContainers");
    match field {
        // Without a merge key here, unlike in pods and elsewhere.
        "imagePullSecrets" if kind == "ServiceAccount" => Merge::Replace,
        "conditions"
            if matches!(
                kind,
                "CertificateSigningRequest" | "CustomResourceDefinition" | "ValidatingAdmissionPolicy"
            ) =>
        {
            Merge::Replace
        }
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "volumes"
        | "imagePullSecrets"
        | "webhooks"
        | "matchConditions"
        | "schedulingGates"
        | "resourceClaims"
        | "resourceClaimStatuses"
        | "allocatedResourcesStatus" => Merge::ByKey("name"),
        "variables" if kind == "ValidatingAdmissionPolicy" => Merge::ByKey("name"),
        "drivers" if kind == "CSINode" => Merge::ByKey("name"),
        "env" if in_container => Merge::ByKey("name"),
        "volumeMounts" => Merge::ByKey("mountPath"),
        "volumeDevices" => Merge::ByKey("devicePath"),
        "ports" if in_container => Merge::ByKey("containerPort"),
        "ports" if kind == "Service" && parent == "spec" => Merge::ByKey("port"),
        "hostAliases" => Merge::ByKey("ip"),
        "podIPs" | "hostIPs" => Merge::ByKey("ip"),
        "topologySpreadConstraints" => Merge::ByKey("topologyKey"),
        "conditions" if parent == "status" => Merge::ByKey("type"),
        "addresses" if kind == "Node" => Merge::ByKey("type"),
        "secrets" if kind == "ServiceAccount" => Merge::ByKey("name"),
        "ownerReferences" => Merge::ByKey("uid"),
        "finalizers" if parent == "metadata" => Merge::Set,
        "podCIDRs" if kind == "Node" => Merge::Set,
        _ => Merge::Replace,
    }
}

struct Context<'a> {
    kind: &'a str,
    path: Vec<String>,
}

impl Context<'_> {
    fn malformed(&self, why: impl std::fmt::Display) -> ApiError {
        ApiError::bad_request(format!("error applying patch at {:?}: {why}", self.path.join(".")))
    }

    fn merge_object(
        &mut self,
        object: &mut Map<String, Value>,
        patch: &Map<String, Value>,
    ) -> Result<(), ApiError> {
        if self.path.len() > DEPTH_LIMIT {
            return Err(self.malformed("nested too deeply"));
        }
        match patch.get("$patch").and_then(Value::as_str) {
            None | Some("merge") => {}
            Some("replace") => {
                object.clear();
                object.extend(
                    patch.iter().filter(|(key, _)| *key != "$patch").map(|(k, v)| (k.clone(), v.clone())),
                );
                return Ok(());
            }
            Some("delete") => {
                object.clear();
                return Ok(());
            }
            Some(other) => return Err(self.malformed(format_args!("unknown $patch type {other:?}"))),
        }
        if let Some(retained) = patch.get("$retainKeys") {
            let retained = retained.as_array().ok_or_else(|| self.malformed("$retainKeys is not a list"))?;
            object.retain(|key, _| retained.iter().any(|kept| kept == key));
        }
        for (key, change) in patch {
            if key == "$patch" || key == "$retainKeys" || key.starts_with("$setElementOrder/") {
                continue;
            }
            if let Some(field) = key.strip_prefix("$deleteFromPrimitiveList/") {
                let gone =
                    change.as_array().ok_or_else(|| self.malformed(format_args!("{key} is not a list")))?;
                if let Some(list) = object.get_mut(field).and_then(Value::as_array_mut) {
                    list.retain(|item| !gone.contains(item));
                }
                continue;
            }
            self.merge_field(object, key, change)?;
        }
        for (key, order) in patch {
            if let Some(field) = key.strip_prefix("$setElementOrder/") {
                self.reorder(object, field, order)?;
            }
        }
        Ok(())
    }

    fn merge_field(
        &mut self,
        object: &mut Map<String, Value>,
        key: &str,
        change: &Value,
    ) -> Result<(), ApiError> {
        match change {
            Value::Null => {
                object.remove(key);
            }
            Value::Object(change) => {
                let child = object.entry(key).or_insert(Value::Null);
                self.path.push(key.to_owned());
                self.merge_object(crate::json::fields(child), change)?;
                self.path.pop();
            }
            Value::Array(change) => {
                let rule = merge_rule(self.kind, &self.path, key);
                let list = object.entry(key).or_insert(Value::Null);
                if !list.is_array() {
                    *list = json!([]);
                }
                let list = list.as_array_mut().expect("just made a list");
                match rule {
                    Merge::ByKey(merge_key) => {
                        self.path.push(key.to_owned());
                        self.merge_list(list, change, merge_key)?;
                        self.path.pop();
                    }
                    Merge::Set => {
                        for item in change {
                            if !list.contains(item) {
                                list.push(item.clone());
                            }
                        }
                    }
                    Merge::Replace => list.clone_from(change),
                }
            }
            scalar => {
                object.insert(key.to_owned(), scalar.clone());
            }
        }
        Ok(())
    }

    fn merge_list(
        &mut self,
        list: &mut Vec<Value>,
        changes: &[Value],
        merge_key: &'static str,
    ) -> Result<(), ApiError> {
        if changes.iter().any(|change| change["$patch"] == "replace") {
            let kept = changes.iter().filter(|change| change["$patch"] != "replace");
            *list = kept.cloned().collect();
            return Ok(());
        }
        for change in changes {
            let fields = change
                .as_object()
                .ok_or_else(|| self.malformed("the items of a merged list must be objects"))?;
            let identity = fields.get(merge_key).ok_or_else(|| {
                self.malformed(format_args!("an item does not contain its merge key {merge_key:?}"))
            })?;
            let found = list.iter().position(|item| item.get(merge_key) == Some(identity));
            if change["$patch"] == "delete" {
                list.retain(|item| item.get(merge_key) != Some(identity));
                continue;
            }
            let index = found.unwrap_or_else(|| {
                list.push(json!({}));
                list.len() - 1
            });
            self.merge_object(crate::json::fields(&mut list[index]), fields)?;
        }
        Ok(())
    }

    /// Sorts a merged list as the patch wants; items that it does not name keep their order behind those it does.
    fn reorder(&self, object: &mut Map<String, Value>, field: &str, order: &Value) -> Result<(), ApiError> {
        let order = order.as_array().ok_or_else(|| self.malformed("$setElementOrder is not a list"))?;
        let Some(list) = object.get_mut(field).and_then(Value::as_array_mut) else { return Ok(()) };
        let place = |item: &Value| match merge_rule(self.kind, &self.path, field) {
            Merge::ByKey(key) => order.iter().position(|wanted| wanted.get(key) == item.get(key)),
            _ => order.iter().position(|wanted| wanted == item),
        };
        list.sort_by_key(|item| place(item).unwrap_or(usize::MAX));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openapi::table::{Shape, Type, table};

    fn deployment() -> (KindInfo, Value) {
        let kind = KindInfo::new("apps", "v1", "Deployment", "deployments", true);
        let object = json!({
            "metadata": {"name": "web", "labels": {"a": "1", "b": "2"}, "finalizers": ["x", "y"]},
            "spec": {
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}},
                "template": {"spec": {
                    "containers": [
                        {"name": "web", "image": "web:1", "ports": [{"containerPort": 80, "name": "http"}],
                         "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "args": ["x", "y"]},
                        {"name": "sidecar", "image": "side:1"}
                    ],
                    "tolerations": [{"key": "a"}]
                }}
            }
        });
        (kind, object)
    }

    /// Compares the rules with what is published for every list that a patch of the kind can reach item by item.
    fn check_rules(kind: &str, known: &Type, path: &mut Vec<String>, checked: &mut usize) {
        for field in &known.fields {
            let (inner, item_by_item) = match &field.shape {
                Shape::List(item) => {
                    let published = match (field.merge.strategy, field.merge.key) {
                        (_, Some(key)) => Merge::ByKey(key),
                        (Some("merge"), None) => Merge::Set,
                        _ => Merge::Replace,
                    };
                    let rule = merge_rule(kind, path, field.name);
                    assert_eq!(rule, published, "{kind} {} {}", path.join("."), field.name);
                    *checked += 1;
                    (item.as_ref(), published != Merge::Replace)
                }
                other => (other, true),
            };
            if let (Shape::Type(index), true) = (inner, item_by_item) {
                path.push(field.name.to_owned());
                check_rules(kind, table().at(*index), path, checked);
                path.pop();
            }
        }
    }

    #[test]
    fn lists_are_merged_as_published() {
        let mut checked = 0;
        for known in table().types().iter().filter(|known| known.group_version.is_some()) {
            check_rules(known.kind, known, &mut Vec::new(), &mut checked);
        }
        assert!(checked > 500, "{checked}");
    }

    #[test]
    fn strategic_merge_follows_the_merge_keys() {
        let (kind, object) = deployment();
        let pod = |patch: Value| json!({"spec": {"template": {"spec": patch}}});
        for (what, patch, path, expected) in [
            (
                "a container by name",
                pod(json!({"containers": [{"name": "sidecar", "image": "side:2"}]})),
                "/spec/template/spec/containers/1",
                json!({"name": "sidecar", "image": "side:2"}),
            ),
            (
                "a new container goes last",
                pod(json!({"containers": [{"name": "third", "image": "t"}]})),
                "/spec/template/spec/containers/2",
                json!({"name": "third", "image": "t"}),
            ),
            (
                "a container is deleted",
                pod(json!({"containers": [{"name": "web", "$patch": "delete"}]})),
                "/spec/template/spec/containers",
                json!([{"name": "sidecar", "image": "side:1"}]),
            ),
            (
                "the list is replaced",
                pod(json!({"containers": [{"$patch": "replace"}, {"name": "only"}]})),
                "/spec/template/spec/containers",
                json!([{"name": "only"}]),
            ),
            (
                "environment and ports by their keys",
                pod(json!({"containers": [{"name": "web", "env": [{"name": "B", "value": "3"}],
                    "ports": [{"containerPort": 80, "protocol": "TCP"}, {"containerPort": 81}]}]})),
                "/spec/template/spec/containers/0",
                json!({"name": "web", "image": "web:1",
                    "ports": [{"containerPort": 80, "name": "http", "protocol": "TCP"}, {"containerPort": 81}],
                    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}], "args": ["x", "y"]}),
            ),
            (
                "plain lists are replaced",
                pod(json!({"tolerations": [{"key": "b"}]})),
                "/spec/template/spec/tolerations",
                json!([{"key": "b"}]),
            ),
            (
                "the order is set",
                pod(json!({"$setElementOrder/containers": [{"name": "sidecar"}, {"name": "web"}],
                    "containers": [{"name": "web", "image": "web:1"}]})),
                "/spec/template/spec/containers/0/name",
                json!("sidecar"),
            ),
            (
                "keys that are not retained go",
                json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
                "/spec/strategy",
                json!({"type": "Recreate"}),
            ),
            (
                "a set loses an item and gains one",
                json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["x"], "finalizers": ["z", "y"]}}),
                "/metadata/finalizers",
                json!(["y", "z"]),
            ),
            (
                "null removes",
                json!({"metadata": {"labels": {"a": null, "c": "3"}}}),
                "/metadata/labels",
                json!({"b": "2", "c": "3"}),
            ),
            (
                "an object is replaced",
                json!({"metadata": {"labels": {"$patch": "replace", "c": "3"}}}),
                "/metadata/labels",
                json!({"c": "3"}),
            ),
        ] {
            let patched = Patch::Strategic(patch).apply_to(&kind, &object).unwrap();
            assert_eq!(patched.pointer(path), Some(&expected), "{what}");
        }
    }

    #[test]
    fn service_ports_merge_by_port_and_policy_ports_do_not() {
        let ports = |kind: &str| {
            let kind = KindInfo::new("", "v1", kind, "x", true);
            let object = json!({"spec": {"ports": [{"port": 80, "name": "http"}]}});
            let patch = json!({"spec": {"ports": [{"port": 80, "targetPort": 8080}]}});
            Patch::Strategic(patch).apply_to(&kind, &object).unwrap()["spec"]["ports"].clone()
        };
        assert_eq!(ports("Service"), json!([{"port": 80, "name": "http", "targetPort": 8080}]));
        assert_eq!(ports("NetworkPolicy"), json!([{"port": 80, "targetPort": 8080}]));
    }

    #[test]
    fn json_and_merge_patches_follow_their_rfcs() {
        let (kind, object) = deployment();
        let patched = Patch::Json(json!([
            {"op": "test", "path": "/metadata/name", "value": "web"},
            {"op": "replace", "path": "/metadata/labels/a", "value": "9"},
            {"op": "remove", "path": "/metadata/labels/b"}
        ]));
        assert_eq!(patched.apply_to(&kind, &object).unwrap()["metadata"]["labels"], json!({"a": "9"}));
        let merged = Patch::Merge(json!({"metadata": {"finalizers": ["q"], "labels": {"a": null}}}));
        let merged = merged.apply_to(&kind, &object).unwrap();
        assert_eq!(merged["metadata"], json!({"name": "web", "labels": {"b": "2"}, "finalizers": ["q"]}));
    }

    #[test]
    fn bad_patches_are_refused() {
        let (kind, object) = deployment();
        let nest = json!({"op": "copy", "from": "", "path": "/spec/more"});
        let grow = json!({"op": "copy", "from": "/metadata", "path": "/metadata/labels/more"});
        let double = json!([{"op": "add", "path": "/list", "value": ["0123456789"]}, grow]);
        assert_eq!(Patch::Json(json!(vec![nest; 200])).apply_to(&kind, &object).unwrap_err().code, 400);
        assert!(Patch::Json(double).apply_to(&kind, &object).is_ok());
        let widen: Vec<Value> = (0..40)
            .map(|index| json!({"op": "copy", "from": "/spec", "path": format!("/spec/more{index}")}))
            .collect();
        assert_eq!(Patch::Json(json!(widen)).apply_to(&kind, &object).unwrap_err().code, 413);
        let remark = json!({"op": "test", "path": "/metadata/name", "value": "web"});
        assert_eq!(Patch::Json(json!(vec![remark; 10_001])).apply_to(&kind, &object).unwrap_err().code, 400);
        let custom = KindInfo { custom: true, ..kind.clone() };
        for (patch, kind, code) in [
            (Patch::Json(json!({"op": "add"})), &kind, 400),
            (Patch::Json(json!([{"op": "test", "path": "/metadata/name", "value": "x"}])), &kind, 422),
            (Patch::Json(json!([{"op": "remove", "path": "/no/such"}])), &kind, 422),
            (Patch::Json(json!([{"op": "replace", "path": "", "value": 1}])), &kind, 400),
            (Patch::Merge(json!([])), &kind, 400),
            (Patch::Strategic(json!("x")), &kind, 400),
            (Patch::Strategic(json!({})), &custom, 415),
            (Patch::Strategic(json!({"metadata": {"$patch": "explode"}})), &kind, 400),
            (
                Patch::Strategic(json!({"spec": {"template": {"spec": {"containers": [{"image": "x"}]}}}})),
                &kind,
                400,
            ),
            (Patch::Strategic(json!({"spec": {"template": {"spec": {"containers": ["x"]}}}})), &kind, 400),
        ] {
            assert_eq!(patch.apply_to(kind, &object).unwrap_err().code, code, "{patch:?}");
        }
    }
}
