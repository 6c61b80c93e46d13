//! Requests for resources and objects: which verb it is, and what it answers.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use serde_json::{Value, json};
use std::sync::Arc;

use super::media::{self, Form};
use super::query::{Query, propagation};
use super::route::Target;
use super::view::Presenter;
use super::{ResponseBody, body, bytes_response, json_response, scale, stream};
use crate::autoscaling;
use crate::error::ApiError;
use crate::events;
use crate::json;
use crate::kinds::ResourceKey;
use crate::patch::Patch;
use crate::store::{DeleteOptions, DeleteOutcome, Store, Subresource};

/// What a server-side apply tells its client (RFC 9111's predecessor, RFC 7234 section 5.5: code 299, no agent).
const APPLY_WARNING: &str = "299 - \"this API server of a lab merges what is applied and keeps no field ownership: \
                             fields that are no longer applied stay, and there are no conflicts\"";

/// How often a patch of an object that is converted is tried again because somebody else was faster.
const PATCH_ATTEMPTS: usize = 5;

pub(super) async fn answer(
    store: &Arc<Store>,
    target: Target,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, ApiError> {
    let (parts, incoming) = request.into_parts();
    let query = Query::parse(parts.uri.query());
    let bytes = match parts.method {
        Method::GET | Method::HEAD => Bytes::new(),
        _ => body::read(incoming).await?,
    };
    let call = Call { store, target, query, headers: parts.headers, bytes };
    match call.target.subresource.as_deref() {
        None => match (parts.method, call.target.name.is_some()) {
            (Method::GET | Method::HEAD, true) if !call.query.flag("watch") => call.get(),
            (Method::GET | Method::HEAD, _) if call.query.flag("watch") => call.watch(),
            (Method::GET | Method::HEAD, false) => call.list(),
            (Method::POST, false) => call.create(),
            (Method::PUT, true) => call.update(Subresource::Main),
            (Method::PATCH, true) => call.patch(Subresource::Main),
            (Method::DELETE, true) => call.delete(),
            (Method::DELETE, false) if !call.target.kind.is("", "Namespace") => call.delete_collection(),
            _ => Err(ApiError::method_not_allowed()),
        },
        Some("status") if call.target.kind.status => match parts.method {
            Method::GET | Method::HEAD => call.get(),
            Method::PUT => call.update(Subresource::Status),
            Method::PATCH => call.patch(Subresource::Status),
            _ => Err(ApiError::method_not_allowed()),
        },
        Some("scale") if call.target.kind.scale.is_some() => call.scale(&parts.method),
        Some(other) => Err(unsupported(&call.target, other)),
    }
}

/// Why a subresource is not served: what needs a kubelet or another server says so, the rest does not exist.
fn unsupported(target: &Target, subresource: &str) -> ApiError {
    let first = subresource.split('/').next().unwrap_or_default();
    let kind =
        if target.kind.group.is_empty() && !target.kind.custom { target.kind.kind.as_str() } else { "" };
    let why = match (kind, first) {
        ("Pod", "log") => {
            "this API server of a lab keeps objects only and reaches into no container: use `podway lab logs \
             NAMESPACE/POD -c CONTAINER` instead"
        }
        ("Pod", "exec" | "attach" | "portforward") => {
            "this API server of a lab keeps objects only and reaches into no container: use `podway lab exec \
             NAMESPACE/POD -- COMMAND` instead"
        }
        ("Pod" | "Service" | "Node", "proxy") => {
            "this API server of a lab keeps objects only and connects to no pod, service or node: use `podway lab \
             exec NAMESPACE/POD -- COMMAND` instead"
        }
        ("Pod", "eviction") => {
            "this API server of a lab does not evict: delete the pod instead, disruption budgets are not looked at"
        }
        ("Pod", "binding") => "this API server of a lab does not bind: set spec.nodeName of the pod instead",
        ("Pod", "ephemeralcontainers" | "resize") => {
            "this API server of a lab does not change the containers of a pod that exists: delete it and create it anew"
        }
        ("ServiceAccount", "token") => {
            "this API server of a lab makes no tokens: it knows one, in the kubeconfig"
        }
        _ => return ApiError::no_such_resource(),
    };
    ApiError::not_implemented(why)
}

struct Call<'a> {
    store: &'a Arc<Store>,
    target: Target,
    query: Query,
    headers: HeaderMap,
    bytes: Bytes,
}

impl Call<'_> {
    fn form(&self) -> Result<Form, ApiError> {
        media::wanted(&self.headers, self.query.text("includeObject"))
    }

    fn presenter(&self) -> Result<Presenter, ApiError> {
        Ok(Presenter::new(&self.target, self.form()?))
    }

    fn get(&self) -> Result<Response<ResponseBody>, ApiError> {
        let presenter = self.presenter()?;
        let object = self.store.get(&self.target.key()?)?;
        Ok(bytes_response(StatusCode::OK, presenter.object(&object)))
    }

    fn list(&self) -> Result<Response<ResponseBody>, ApiError> {
        let presenter = self.presenter()?;
        let options = self.query.list(&self.target)?;
        let list = self.store.list(&self.target.resource(), self.target.namespace.as_deref(), &options)?;
        Ok(bytes_response(StatusCode::OK, presenter.list(&list)))
    }

    fn watch(&self) -> Result<Response<ResponseBody>, ApiError> {
        let presenter = self.presenter()?;
        let options = self.query.watch(&self.target)?;
        let timeout = self.query.timeout()?;
        match self.store.watch(&self.target.resource(), self.target.namespace.as_deref(), options) {
            Ok(watcher) => {
                let bookmarks = self.query.flag("allowWatchBookmarks");
                Ok(stream::response(watcher, presenter, bookmarks, timeout))
            }
            Err(error) if error.is_expired() => Ok(stream::failed(&error)),
            Err(error) => Err(error),
        }
    }

    fn create(&self) -> Result<Response<ResponseBody>, ApiError> {
        if self.target.kind.namespaced && self.target.namespace.is_none() {
            return Err(ApiError::method_not_allowed());
        }
        let presenter = self.presenter()?;
        let object = body::object(&self.headers, &self.bytes)?;
        let namespace = self.target.namespace.as_deref().unwrap_or_default();
        let created =
            self.store.create_in(&self.target.resource(), namespace, object, self.query.write()?)?;
        Ok(bytes_response(StatusCode::CREATED, presenter.object(&created)))
    }

    fn update(&self, part: Subresource) -> Result<Response<ResponseBody>, ApiError> {
        let presenter = self.presenter()?;
        let object = body::object(&self.headers, &self.bytes)?;
        let updated = self.store.update(&self.target.key()?, object, part, self.query.write()?)?;
        Ok(bytes_response(StatusCode::OK, presenter.object(&updated)))
    }

    fn patch(&self, part: Subresource) -> Result<Response<ResponseBody>, ApiError> {
        let presenter = self.presenter()?;
        let mut patch = media::patch(&self.headers, &self.bytes)?;
        if self.target.new_events {
            if let Patch::Merge(change) | Patch::Strategic(change) | Patch::Apply(change) = &mut patch {
                events::to_core(json::fields(change));
                json::fields(change).remove("apiVersion");
            } else {
                return Err(ApiError::unsupported_media_type(
                    "JSON patches of events are supported in the core group only: use a merge patch, or /api/v1",
                ));
            }
        }
        let key = self.target.key()?;
        let exists = self.store.get(&key).is_ok();
        let patched = self.patched(&key, &patch, part)?;
        let status = if exists { StatusCode::OK } else { StatusCode::CREATED };
        let mut response = bytes_response(status, presenter.object(&patched));
        if matches!(patch, Patch::Apply(_)) {
            response.headers_mut().insert(header::WARNING, HeaderValue::from_static(APPLY_WARNING));
        }
        Ok(response)
    }

    /// Patches an object in the shape that the client knows.
    fn patched(&self, key: &ResourceKey, patch: &Patch, part: Subresource) -> Result<Arc<Value>, ApiError> {
        let options = self.query.write()?;
        let mut attempts = PATCH_ATTEMPTS;
        while autoscaling::is_older(&self.target.kind, &self.target.version) {
            let Ok(current) = self.store.get(key) else { break };
            let mut object = autoscaling::to_older(&current);
            json::fields(&mut object).insert("apiVersion".to_owned(), json!(self.target.api_version()));
            let object = patch.apply_to(&self.target.kind, &object)?;
            attempts -= 1;
            match self.store.update(key, object, part, options) {
                Err(error) if error.is_conflict() && attempts > 0 => {}
                done => return done,
            }
        }
        self.store.patch(key, patch, part, options)
    }

    fn delete(&self) -> Result<Response<ResponseBody>, ApiError> {
        let presenter = self.presenter()?;
        let outcome = self.store.delete(&self.target.key()?, &self.delete_options()?)?;
        Ok(match outcome {
            DeleteOutcome::Terminating(object) => bytes_response(StatusCode::OK, presenter.object(&object)),
            DeleteOutcome::Removed(object) if self.returns_deleted() => {
                bytes_response(StatusCode::OK, presenter.object(&object))
            }
            DeleteOutcome::Removed(object) => {
                let mut details = json!({
                    "name": json::name(&object), "kind": self.target.kind.plural, "uid": json::uid(&object),
                });
                if !self.target.kind.group.is_empty() {
                    details["group"] = json!(self.target.kind.group);
                }
                json_response(
                    StatusCode::OK,
                    &json!({
                        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
                    }),
                )
            }
        })
    }

    /// The core kinds whose deletion answers with the object instead of a Status.
    fn returns_deleted(&self) -> bool {
        let kind = &self.target.kind;
        kind.group.is_empty()
            && !kind.custom
            && matches!(
                kind.kind.as_str(),
                "Pod"
                    | "Service"
                    | "ServiceAccount"
                    | "PersistentVolume"
                    | "PersistentVolumeClaim"
                    | "PodTemplate"
                    | "ResourceQuota"
            )
    }

    fn delete_collection(&self) -> Result<Response<ResponseBody>, ApiError> {
        if self.target.kind.namespaced && self.target.namespace.is_none() {
            return Err(ApiError::method_not_allowed());
        }
        let presenter = self.presenter()?;
        let (list, options) = (self.query.list(&self.target)?, self.delete_options()?);
        let deleted = self.store.delete_collection(
            &self.target.resource(),
            self.target.namespace.as_deref(),
            &list,
            &options,
        )?;
        Ok(bytes_response(StatusCode::OK, presenter.list(&deleted)))
    }

    /// From the query, and from a DeleteOptions object in the body, which wins.
    fn delete_options(&self) -> Result<DeleteOptions, ApiError> {
        let mut options = self.query.delete()?;
        if self.bytes.is_empty() {
            return Ok(options);
        }
        let given = body::object(&self.headers, &self.bytes)?;
        if let Some(seconds) = json::at(&given, &["gracePeriodSeconds"]) {
            let seconds = seconds.as_u64().ok_or_else(|| {
                ApiError::bad_request(format!(
                    "invalid gracePeriodSeconds {seconds}: not a whole number of seconds"
                ))
            })?;
            options.grace_period_seconds = Some(seconds);
        }
        if let Some(policy) = json::at(&given, &["propagationPolicy"]) {
            options.propagation = propagation(Some(policy.as_str().unwrap_or_default()))?;
        } else if given["orphanDependents"] == true {
            options.propagation = propagation(Some("Orphan"))?;
        }
        let text = |key| match json::get_str(&given, &["preconditions", key]) {
            "" => None,
            text => Some(text.to_owned()),
        };
        options.precondition.uid = text("uid");
        options.precondition.resource_version = text("resourceVersion");
        options.dry_run |= json::get_array(&given, &["dryRun"]).iter().any(|stage| stage == "All");
        Ok(options)
    }

    fn scale(&self, method: &Method) -> Result<Response<ResponseBody>, ApiError> {
        let key = self.target.key()?;
        let paths = self.target.kind.scale.as_ref().ok_or_else(ApiError::no_such_resource)?;
        let current = self.store.get(&key)?;
        let wanted: Value = match *method {
            Method::GET | Method::HEAD => {
                return Ok(json_response(StatusCode::OK, &scale::of(paths, &current)));
            }
            Method::PUT => body::object(&self.headers, &self.bytes)?,
            Method::PATCH => {
                let patch = media::patch(&self.headers, &self.bytes)?;
                patch.apply_to(&scale::kind(), &scale::of(paths, &current))?
            }
            _ => return Err(ApiError::method_not_allowed()),
        };
        let changed = scale::apply(paths, &current, &wanted)?;
        let updated = self.store.update(&key, changed, Subresource::Main, self.query.write()?)?;
        Ok(json_response(StatusCode::OK, &scale::of(paths, &updated)))
    }
}
