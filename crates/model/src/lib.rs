//! The cluster as values: Kubernetes objects parsed into types that hold only what is valid.
//!
//! Objects come in as JSON, one by one, so that a malformed one costs itself and nothing else: it becomes a
//! [`Rejection`] that names object, field and cause. No I/O, no clocks, no kernel.

pub mod cluster_policy;
pub mod endpoint_slice;
mod net;
pub mod network_policy;
pub mod node;
pub mod nodes;
pub mod pod;
pub mod policy;
mod read;
pub mod selector;
pub mod service;

/// CustomResourceDefinition of `LoadBalancerPool` (podway.dev/v1alpha1), as JSON.
pub const LOAD_BALANCER_POOL_DEFINITION: &str = include_str!("load_balancer_pool.json");

pub use cluster_policy::ClusterNetworkPolicy;
pub use endpoint_slice::EndpointSlice;
pub use net::{Family, Protocol};
pub use network_policy::NetworkPolicy;
pub use node::Node;
pub use nodes::{NodeChange, Nodes};
pub use pod::{Namespace, NodePeer, Pod};
pub use selector::{Labels, Selector};
pub use service::Service;

/// Why an object, or a part of it, is not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {}: {field}: {cause}", self.object())]
pub struct Rejection {
    /// Kind of the object, such as `Node`.
    pub kind: String,
    /// Its namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its name, or `?` when it has none.
    pub name: String,
    /// Path of the field at fault, such as `spec.podCIDRs[1]`.
    pub field: String,
    /// What is wrong and what would be right.
    pub cause: String,
}

impl Rejection {
    /// `namespace/name`, or the name alone.
    pub fn object(&self) -> String {
        if self.namespace.is_empty() {
            self.name.clone()
        } else {
            format!("{}/{}", self.namespace, self.name)
        }
    }
}
