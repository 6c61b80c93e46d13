//! Who is at one end of a flow, and what a service is called. Shared by the directory of names and by the records that
//! outlive it; how much memory all of them take together is known at any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use podway_model::Labels;

/// What an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pod with an address of its own.
    Pod,
    /// A node of the cluster.
    Node,
}

/// Who is at one end of a flow.
#[derive(Debug)]
pub struct Identity {
    /// What it is.
    pub kind: Kind,
    /// Namespace of a pod.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Labels of a pod.
    pub labels: Labels,
    /// Node of a pod, as far as known.
    pub node: String,
    weight: Weight,
}

impl Identity {
    /// An identity whose memory counts into `total` for as long as anything refers to it.
    #[must_use]
    pub fn new(
        total: &Total,
        kind: Kind,
        (namespace, name): (&str, &str),
        labels: Labels,
        node: &str,
    ) -> Arc<Self> {
        let label_bytes: usize = labels.iter().map(|(k, v)| k.len() + v.len() + LABEL).sum();
        let bytes = size_of::<Self>() + namespace.len() + name.len() + node.len() + label_bytes;
        Arc::new(Self {
            kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels,
            node: node.to_owned(),
            weight: total.add(bytes),
        })
    }

    /// Memory that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weight.bytes
    }
}

/// Bytes of a label beyond its text.
const LABEL: usize = 64;

/// What a service's port is called.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceName {
    /// Namespace of the Service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Name of the port; may be empty.
    pub port: String,
}

/// Bytes of all identities that live.
#[derive(Clone, Debug, Default)]
pub struct Total(Arc<AtomicUsize>);

impl Total {
    fn add(&self, bytes: usize) -> Weight {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Weight { bytes, total: self.clone() }
    }

    /// The sum.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Weight {
    bytes: usize,
    total: Total,
}

impl Drop for Weight {
    fn drop(&mut self) {
        self.total.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
