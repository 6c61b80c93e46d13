//! A small Kubernetes-compatible API server that keeps its objects in memory.
//!
//! It is for labs and tests: clients such as kubectl, controllers and Podway's own agents talk to it as they
//! would to a real API server, and everything is forgotten when the process ends. Production state lives in real
//! Kubernetes. There is no admission control, RBAC, field ownership, conversion between the versions of
//! custom kinds, or aggregation.
//!
//! - [`Store`] holds objects as JSON values by resource, namespace and name, counts one resource version, remembers
//!   a bounded window of changes per resource for watches, and does the life cycle of objects: finalizers, graceful
//!   deletion of pods, removal of dependents, namespaces that empty themselves.
//! - [`serve`] speaks HTTP/1.1 for it: get, list, watch, create, update, patch, delete, status, scale, discovery,
//!   the schema (OpenAPI v2 and v3) and the tables that `kubectl get` prints.
//!
//! Both are two doors to the same thing: what is written through one is seen at once through the other.

mod autoscaling;
mod crd;
mod error;
mod events;
mod http;
mod json;
mod kinds;
mod openapi;
mod patch;
mod selector;
mod store;
mod table;
mod validate;

pub use error::{ApiError, Cause};
pub use http::{BearerToken, serve};
pub use json::{get_str, timestamp_text};
pub use kinds::{GroupResource, KindInfo, PrinterColumn, ResourceKey, ScalePaths};
pub use patch::Patch;
pub use selector::{FieldSelector, LabelSelector};
pub use store::{
    Defaulter, DeleteOptions, DeleteOutcome, List, ListOptions, Precondition, Propagation, Snapshot, Store,
    StoreConfig, Subresource, VersionMatch, WatchEvent, WatchOptions, Watcher, WriteOptions,
};
