//! From a URL path to what it names.

use percent_encoding::percent_decode_str;
use std::sync::Arc;

use crate::error::ApiError;
use crate::events;
use crate::kinds::{GroupResource, KindInfo, ResourceKey};
use crate::store::Store;

/// A place in the API.
#[derive(Debug)]
pub(super) enum Route {
    /// `/healthz`, `/livez`, `/readyz` and their checks.
    Health,
    /// `/version`.
    Version,
    /// `/`: all paths.
    Root,
    /// `/api`: versions of the core group.
    CoreVersions,
    /// `/apis`: all groups.
    Groups,
    /// `/apis/{group}`.
    Group(String),
    /// `/api/v1` or `/apis/{group}/{version}`.
    Resources {
        /// API group, empty for core.
        group: String,
        /// Version within the group.
        version: String,
    },
    /// `/openapi/v2`.
    OpenApiV2,
    /// `/openapi/v3`: where its documents are.
    OpenApiV3Index,
    /// `/openapi/v3/api/v1` or `/openapi/v3/apis/{group}/{version}`.
    OpenApiV3 {
        /// API group, empty for core.
        group: String,
        /// Version within the group.
        version: String,
    },
    /// Asks what the caller may do.
    AccessReview,
    /// A resource, an object or a subresource.
    Resource(Target),
}

/// A resource, an object of it, or a subresource of that.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) kind: Arc<KindInfo>,
    /// The version that the client speaks.
    pub(super) version: String,
    /// Whether the client speaks events.k8s.io/v1.
    pub(super) new_events: bool,
    /// `None`: all namespaces, or a cluster-scoped resource.
    pub(super) namespace: Option<String>,
    pub(super) name: Option<String>,
    pub(super) subresource: Option<String>,
}

impl Target {
    pub(super) fn resource(&self) -> GroupResource {
        self.kind.group_resource()
    }

    /// The object's key.
    ///
    /// # Errors
    /// 405 if the path names no object.
    pub(super) fn key(&self) -> Result<ResourceKey, ApiError> {
        let name = self.name.clone().ok_or_else(ApiError::method_not_allowed)?;
        let namespace = self.namespace.clone().unwrap_or_default();
        Ok(ResourceKey { resource: self.resource(), namespace, name })
    }

    /// `apiVersion` as the client expects it.
    pub(super) fn api_version(&self) -> String {
        if self.new_events {
            format!("{}/{}", events::GROUP, self.version)
        } else {
            self.kind.api_version(&self.version)
        }
    }
}

impl Route {
    pub(super) fn parse(store: &Store, path: &str) -> Result<Self, ApiError> {
        let decoded: Vec<String> = path
            .split('/')
            .filter(|segment| !segment.is_empty())
            .map(|segment| percent_decode_str(segment).decode_utf8().map(std::borrow::Cow::into_owned))
            .collect::<Result<_, _>>()
            .map_err(|_| ApiError::bad_request("the path is not UTF-8"))?;
        let segments: Vec<&str> = decoded.iter().map(String::as_str).collect();
        match segments[..] {
            [] => Ok(Self::Root),
            ["healthz" | "livez" | "readyz", ..] => Ok(Self::Health),
            ["version"] => Ok(Self::Version),
            ["openapi", "v2"] => Ok(Self::OpenApiV2),
            ["openapi", "v3"] => Ok(Self::OpenApiV3Index),
            ["openapi", "v3", "api", version] => {
                Ok(Self::OpenApiV3 { group: String::new(), version: version.to_owned() })
            }
            ["openapi", "v3", "apis", group, version] => {
                Ok(Self::OpenApiV3 { group: group.to_owned(), version: version.to_owned() })
            }
            [
                "apis",
                "authorization.k8s.io",
                "v1",
                "selfsubjectaccessreviews" | "selfsubjectrulesreviews",
            ] => Ok(Self::AccessReview),
            ["api"] => Ok(Self::CoreVersions),
            ["apis"] => Ok(Self::Groups),
            ["apis", group] => Ok(Self::Group(group.to_owned())),
            ["api", version] => Ok(Self::Resources { group: String::new(), version: version.to_owned() }),
            ["apis", group, version] => {
                Ok(Self::Resources { group: group.to_owned(), version: version.to_owned() })
            }
            ["api", version, ref rest @ ..] => target(store, "", version, rest).map(Self::Resource),
            ["apis", group, version, ref rest @ ..] => {
                target(store, group, version, rest).map(Self::Resource)
            }
            _ => Err(ApiError::no_such_resource()),
        }
    }

    pub(super) fn is_public(&self) -> bool {
        matches!(self, Self::Health | Self::Version)
    }
}

fn target(store: &Store, group: &str, version: &str, rest: &[&str]) -> Result<Target, ApiError> {
    let (namespace, rest) = match rest {
        // A namespace's own subresources look like a resource inside it.
        ["namespaces", namespace, rest @ ..]
            if !rest.is_empty() && !matches!(rest, ["status" | "finalize"]) =>
        {
            (Some((*namespace).to_owned()), rest)
        }
        _ => (None, rest),
    };
    let [plural, rest @ ..] = rest else { return Err(ApiError::no_such_resource()) };
    let new_events = (group, *plural) == (events::GROUP, "events");
    let resource = GroupResource::new(if new_events { "" } else { group }, *plural);
    let kind = store
        .kind(&resource)
        .filter(|kind| kind.versions.iter().any(|served| served == version))
        .ok_or_else(ApiError::no_such_resource)?;
    let (name, subresource) = match rest {
        [] => (None, None),
        [name] => (Some(*name), None),
        [name, subresource @ ..] => (Some(*name), Some(subresource.join("/"))),
    };
    // A namespaced object needs its namespace in the path, a cluster-scoped one must not have one.
    if kind.namespaced == namespace.is_none() && (name.is_some() || namespace.is_some()) {
        return Err(ApiError::no_such_resource());
    }
    Ok(Target {
        kind,
        version: version.to_owned(),
        new_events,
        namespace,
        name: name.map(str::to_owned),
        subresource,
    })
}
