//! The cluster's zone, compiled object by object: what a change costs follows from the Service it is about, not from
//! the cluster. Answers about addresses are kept as they go onto the wire.
//!
//! Records are those of the Kubernetes DNS-based service discovery specification 1.1.0, with the pod records, SRV
//! records of bare Service names and names of all endpoints that clusters are used to.

mod answer;
mod compile;
mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use foldhash::HashMap;
use podway_model::{Namespace, Service};

pub use answer::Found;
use node::{Compact, ServiceNode};

use crate::name::Name;

/// Names like `1-2-3-4.ns.pod.<zone>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodNames {
    /// There are none.
    Disabled,
    /// Whatever address is in the name, if the namespace exists.
    Insecure,
    /// Addresses of pods of that namespace only.
    #[default]
    Verified,
}

/// What a zone is about.
#[derive(Clone, Debug)]
pub struct ZoneConfig {
    /// Domains of the cluster. Reverse look-ups name the first.
    pub zones: Vec<Name>,
    /// Time to live of records, in seconds.
    pub ttl: u32,
    /// Names of pods.
    pub pods: PodNames,
    /// The only namespaces that have names; `None` means all.
    pub exposed: Option<BTreeSet<String>>,
    /// Addresses of `ns.dns.<zone>`.
    pub name_servers: Vec<IpAddr>,
    /// Serial number to start from; it is raised with every change.
    pub serial: u32,
}

impl Default for ZoneConfig {
    fn default() -> Self {
        let cluster = Name::parse("cluster.local").unwrap_or_else(|_| Name::root());
        Self {
            zones: vec![cluster],
            ttl: 5,
            pods: PodNames::default(),
            exposed: None,
            name_servers: Vec::new(),
            serial: 1,
        }
    }
}

/// Namespace and name of an object.
type ObjectName = (Box<str>, Box<str>);
/// Labels `service.namespace` as on the wire, without a root.
type ServiceKey = Box<[u8]>;

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Owner {
    /// Endpoints are named only when no Service has the address as its own.
    endpoint: bool,
    /// Labels in front of `svc.<zone>`.
    labels: Box<[u8]>,
}

/// What makes a namespace exist.
#[derive(Clone, Copy, Debug, Default)]
struct Presence {
    object: bool,
    services: usize,
}

/// The zone.
#[derive(Debug)]
pub struct Zone {
    config: ZoneConfig,
    serial: u32,
    synced: bool,
    objects: BTreeMap<ObjectName, Service>,
    slices: HashMap<ObjectName, Compact>,
    slices_of: HashMap<ServiceKey, BTreeSet<ObjectName>>,
    namespaces: HashMap<Box<[u8]>, Presence>,
    services: HashMap<ServiceKey, ServiceNode>,
    owners: HashMap<IpAddr, Vec<Owner>>,
    pods: HashMap<ObjectName, Vec<IpAddr>>,
    /// Labels of namespaces by address of a pod.
    pods_at: HashMap<IpAddr, Vec<Box<[u8]>>>,
}

impl Zone {
    /// An empty zone that is not synchronised: it answers SERVFAIL.
    pub fn new(config: ZoneConfig) -> Self {
        Self {
            serial: config.serial,
            config,
            synced: false,
            objects: BTreeMap::new(),
            slices: HashMap::default(),
            slices_of: HashMap::default(),
            namespaces: HashMap::default(),
            services: HashMap::default(),
            owners: HashMap::default(),
            pods: HashMap::default(),
            pods_at: HashMap::default(),
        }
    }

    /// All lists have been read: from now on what is not there does not exist.
    pub fn synced(&mut self) {
        self.synced = true;
    }

    /// A namespace is there.
    pub fn apply_namespace(&mut self, namespace: &Namespace) {
        self.presence(&namespace.name).object = true;
        self.changed();
    }

    /// A namespace is gone. While Services are left in it, it still exists.
    pub fn remove_namespace(&mut self, name: &str) {
        self.presence(name).object = false;
        self.forget_if_absent(name);
        self.changed();
    }

    /// Serial number of the zone.
    pub fn serial(&self) -> u32 {
        self.serial
    }

    fn changed(&mut self) {
        self.serial = self.serial.wrapping_add(1);
    }

    fn presence(&mut self, namespace: &str) -> &mut Presence {
        self.namespaces.entry(node::label(namespace)).or_default()
    }

    fn forget_if_absent(&mut self, namespace: &str) {
        let presence = *self.presence(namespace);
        if !presence.object && presence.services == 0 {
            self.namespaces.remove(&node::label(namespace));
        }
    }

    /// Whether names of a namespace may be told; `label` is its lower-case name.
    fn is_exposed(&self, label: &[u8]) -> bool {
        let Some(exposed) = &self.config.exposed else { return true };
        std::str::from_utf8(label).is_ok_and(|name| exposed.contains(name))
    }
}
