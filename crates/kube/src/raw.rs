//! Objects that decode whatever they hold.
//!
//! A typed list fails as a whole when one of its items has a string where the schema has a number. Here an item
//! is any JSON value, and the few fields that listing and watching need are taken from it leniently.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{ApiResource, DynamicResourceScope, Resource};
use serde::Deserialize;
use serde_json::Value;

/// A kind of object, as the API server's paths name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind {
    /// API group, empty for core.
    pub group: &'static str,
    /// Version in the group.
    pub version: &'static str,
    /// Kind in objects.
    pub kind: &'static str,
    /// Name in paths.
    pub plural: &'static str,
}

impl Kind {
    /// core/v1 Node.
    pub const NODE: Self = Self { group: "", version: "v1", kind: "Node", plural: "nodes" };
    /// core/v1 Pod.
    pub const POD: Self = Self { group: "", version: "v1", kind: "Pod", plural: "pods" };
    /// core/v1 Service.
    pub const SERVICE: Self = Self { group: "", version: "v1", kind: "Service", plural: "services" };
    /// discovery.k8s.io/v1 EndpointSlice.
    pub const ENDPOINT_SLICE: Self =
        Self { group: "discovery.k8s.io", version: "v1", kind: "EndpointSlice", plural: "endpointslices" };
    /// coordination.k8s.io/v1 Lease.
    pub const LEASE: Self =
        Self { group: "coordination.k8s.io", version: "v1", kind: "Lease", plural: "leases" };
    /// podway.dev/v1alpha1 LoadBalancerPool.
    pub const LOAD_BALANCER_POOL: Self = Self {
        group: "podway.dev",
        version: "v1alpha1",
        kind: "LoadBalancerPool",
        plural: "loadbalancerpools",
    };

    pub(crate) fn api_resource(self) -> ApiResource {
        let api_version = if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        };
        ApiResource {
            group: self.group.to_owned(),
            version: self.version.to_owned(),
            api_version,
            kind: self.kind.to_owned(),
            plural: self.plural.to_owned(),
        }
    }
}

/// One object as the server sent it.
#[derive(Debug, Clone)]
pub(crate) struct RawObject {
    meta: ObjectMeta,
    value: Value,
}

impl RawObject {
    pub(crate) fn into_value(self) -> Value {
        self.value
    }
}

impl<'de> Deserialize<'de> for RawObject {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        let text = |field: &str| value.pointer(field).and_then(Value::as_str).map(str::to_owned);
        let meta = ObjectMeta {
            name: text("/metadata/name"),
            namespace: text("/metadata/namespace"),
            uid: text("/metadata/uid"),
            resource_version: text("/metadata/resourceVersion"),
            ..ObjectMeta::default()
        };
        drop_bulk(&mut value);
        Ok(Self { meta, value })
    }
}

/// Drops what is large and never read: who last wrote which field, and a node's list of container images.
/// On a cluster of a thousand nodes this is the difference between a few and a few hundred MB.
fn drop_bulk(value: &mut Value) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    if let Some(status) = value.get_mut("status").and_then(Value::as_object_mut) {
        status.remove("images");
    }
}

impl Resource for RawObject {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(dt: &ApiResource) -> Cow<'_, str> {
        dt.kind.as_str().into()
    }

    fn group(dt: &ApiResource) -> Cow<'_, str> {
        dt.group.as_str().into()
    }

    fn version(dt: &ApiResource) -> Cow<'_, str> {
        dt.version.as_str().into()
    }

    fn api_version(dt: &ApiResource) -> Cow<'_, str> {
        dt.api_version.as_str().into()
    }

    fn plural(dt: &ApiResource) -> Cow<'_, str> {
        dt.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_json_object_decodes() {
        for (text, name) in [
            (r#"{"metadata":{"name":"a","resourceVersion":"7"}}"#, Some("a")),
            (r#"{"metadata":{"name":"b","labels":5,"creationTimestamp":"never"}}"#, Some("b")),
            (r#"{"metadata":"nonsense","spec":[1,2]}"#, None),
            (r#""not even an object""#, None),
        ] {
            let raw: RawObject = serde_json::from_str(text).expect(text);
            assert_eq!(raw.meta.name.as_deref(), name, "{text}");
            assert_eq!(raw.into_value(), serde_json::from_str::<Value>(text).unwrap());
        }
    }

    #[test]
    fn bulk_is_dropped() {
        let text =
            r#"{"metadata":{"name":"a","managedFields":[{"x":1}]},"status":{"images":[1,2],"addresses":[]}}"#;
        let raw: RawObject = serde_json::from_str(text).unwrap();
        let want = serde_json::json!({"metadata":{"name":"a"},"status":{"addresses":[]}});
        assert_eq!(raw.into_value(), want);
    }
}
