//! The snapshot that a reconcile looks at, and its indexes: built once, linear in the number of objects.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use serde_json::Value;

use crate::op::{Event, EventType, Involved};
use crate::read::{self, Labels, Malformed};

/// Kinds that some controller reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Deployment,
    ReplicaSet,
    ReplicationController,
    StatefulSet,
    DaemonSet,
    ControllerRevision,
    Job,
    Service,
    Endpoints,
    EndpointSlice,
    Namespace,
    Event,
}

const KINDS: usize = 12;

impl Kind {
    fn of(group: &str, kind: &str) -> Option<Self> {
        Some(match (group, kind) {
            ("apps", "Deployment") => Self::Deployment,
            ("apps", "ReplicaSet") => Self::ReplicaSet,
            ("", "ReplicationController") => Self::ReplicationController,
            ("apps", "StatefulSet") => Self::StatefulSet,
            ("apps", "DaemonSet") => Self::DaemonSet,
            ("apps", "ControllerRevision") => Self::ControllerRevision,
            ("batch", "Job") => Self::Job,
            ("", "Service") => Self::Service,
            ("", "Endpoints") => Self::Endpoints,
            ("discovery.k8s.io", "EndpointSlice") => Self::EndpointSlice,
            ("", "Namespace") => Self::Namespace,
            // One event is served under both groups; a store may keep it under either.
            ("" | "events.k8s.io", "Event") => Self::Event,
            _ => return None,
        })
    }

    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Self::Deployment
            | Self::ReplicaSet
            | Self::StatefulSet
            | Self::DaemonSet
            | Self::ControllerRevision => "apps/v1",
            Self::ReplicationController | Self::Service | Self::Endpoints | Self::Namespace | Self::Event => {
                "v1"
            }
            Self::Job => "batch/v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::ReplicaSet => "ReplicaSet",
            Self::ReplicationController => "ReplicationController",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
            Self::ControllerRevision => "ControllerRevision",
            Self::Job => "Job",
            Self::Service => "Service",
            Self::Endpoints => "Endpoints",
            Self::EndpointSlice => "EndpointSlice",
            Self::Namespace => "Namespace",
            Self::Event => "Event",
        }
    }
}

/// What every object has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Object<'a> {
    pub(crate) value: &'a Value,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) uid: &'a str,
    pub(crate) labels: Labels<'a>,
    /// uid of the controlling owner.
    pub(crate) controller: Option<&'a str>,
    /// RFC 3339 in UTC: compares as text.
    pub(crate) created: &'a str,
    /// `metadata.deletionTimestamp` is set.
    pub(crate) deleting: bool,
}

impl<'a> Object<'a> {
    fn parse(value: &'a Value) -> Result<Self, Malformed> {
        // Looked up once: every object of every snapshot comes through here.
        let metadata = value.get("metadata").unwrap_or(&Value::Null);
        Self::parse_metadata(value, metadata).map_err(|error| error.within("metadata"))
    }

    fn parse_metadata(value: &'a Value, metadata: &'a Value) -> Result<Self, Malformed> {
        let name = read::string(metadata, "name")?
            .filter(|name| !name.is_empty())
            .ok_or_else(|| Malformed::new("name", "required, but absent or empty"))?;
        let mut controller = None;
        for owner in read::list(metadata, "ownerReferences")? {
            if read::is_true(owner, "controller") {
                controller = read::string(owner, "uid")?;
            }
        }
        Ok(Self {
            value,
            namespace: read::string(metadata, "namespace")?.unwrap_or_default(),
            name,
            uid: read::string(metadata, "uid")?.unwrap_or_default(),
            labels: read::labels(metadata, "labels")?,
            controller,
            created: read::text(metadata, "creationTimestamp").unwrap_or_default(),
            deleting: read::at(metadata, "deletionTimestamp").is_some(),
        })
    }
}

/// `status.phase` of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
    Unknown,
}

/// A pod, as controllers see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pod<'a> {
    pub(crate) object: Object<'a>,
    /// `spec.nodeName`.
    pub(crate) node: Option<&'a str>,
    pub(crate) phase: Phase,
    /// Condition `Ready` is `True`.
    pub(crate) ready: bool,
}

impl<'a> Pod<'a> {
    fn parse(value: &'a Value) -> Result<Self, Malformed> {
        let object = Object::parse(value)?;
        let phase = match read::text(value, "status.phase") {
            Some("Running") => Phase::Running,
            Some("Succeeded") => Phase::Succeeded,
            Some("Failed") => Phase::Failed,
            Some("Unknown") => Phase::Unknown,
            _ => Phase::Pending,
        };
        Ok(Self {
            object,
            node: read::string(value, "spec.nodeName")?.filter(|name| !name.is_empty()),
            phase,
            ready: read::condition(value, "Ready").and_then(|c| read::text(c, "status")) == Some("True"),
        })
    }

    /// Succeeded or failed: it will never run again.
    pub(crate) fn finished(&self) -> bool {
        matches!(self.phase, Phase::Succeeded | Phase::Failed)
    }

    /// Neither finished nor on its way out.
    pub(crate) fn active(&self) -> bool {
        !self.finished() && !self.object.deleting
    }

    /// Since when it has been ready; nothing when it is not, or when its condition has no time.
    pub(crate) fn ready_since(&self) -> Option<Timestamp> {
        let condition = read::condition(self.object.value, "Ready").filter(|_| self.ready)?;
        read::text(condition, "lastTransitionTime")?.parse().ok()
    }
}

/// A consistent snapshot of the cluster's objects at one moment, indexed for [`crate::reconcile`].
///
/// Kinds that no controller reads are accepted and ignored, so a caller may pass everything it has. An object that
/// cannot be read at all (no name, labels that are not strings) is left out and reported by an event.
#[derive(Debug)]
pub struct World<'a> {
    pub(crate) now: Timestamp,
    pub(crate) nodes: Vec<Object<'a>>,
    pub(crate) pods: Vec<Pod<'a>>,
    kinds: [Vec<Object<'a>>; KINDS],
    pub(crate) unreadable: Vec<Event>,
    node_by_name: HashMap<&'a str, usize>,
    pods_by_controller: HashMap<&'a str, Vec<usize>>,
    orphan_pods: HashMap<&'a str, Vec<usize>>,
    pods_by_label: HashMap<(&'a str, &'a str, &'a str), Vec<usize>>,
    pod_by_name: HashMap<(&'a str, &'a str), usize>,
    owned: HashMap<(Kind, &'a str), Vec<usize>>,
    orphans: HashMap<(Kind, &'a str), Vec<usize>>,
    by_name: HashMap<(Kind, &'a str, &'a str), usize>,
    events: HashSet<(&'a str, &'a str)>,
}

impl<'a> World<'a> {
    /// Index the objects as of `now`. Each must carry its `apiVersion` and `kind`. Their order does not matter.
    pub fn new(now: Timestamp, objects: impl IntoIterator<Item = &'a Value>) -> Self {
        let mut world = Self {
            now,
            nodes: Vec::new(),
            pods: Vec::new(),
            kinds: Default::default(),
            unreadable: Vec::new(),
            node_by_name: HashMap::new(),
            pods_by_controller: HashMap::new(),
            orphan_pods: HashMap::new(),
            pods_by_label: HashMap::new(),
            pod_by_name: HashMap::new(),
            owned: HashMap::new(),
            orphans: HashMap::new(),
            by_name: HashMap::new(),
            events: HashSet::new(),
        };
        for object in objects {
            world.insert(object);
        }
        world.sort();
        world.index();
        world
    }

    fn insert(&mut self, value: &'a Value) {
        let api_version = read::text(value, "apiVersion").unwrap_or_default();
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        let result = match (group, read::text(value, "kind").unwrap_or_default()) {
            ("", "Pod") => Pod::parse(value).map(|pod| self.pods.push(pod)),
            ("", "Node") => Object::parse(value).map(|node| self.nodes.push(node)),
            (group, kind) => match Kind::of(group, kind) {
                Some(kind) => Object::parse(value).map(|object| self.kinds[kind as usize].push(object)),
                None => Ok(()),
            },
        };
        if let Err(error) = result {
            self.unreadable.push(invalid(value, &error));
        }
    }

    /// A fixed order makes every decision independent of the caller's map order.
    fn sort(&mut self) {
        let key = |object: &Object<'a>| (object.namespace, object.name);
        for objects in &mut self.kinds {
            objects.sort_unstable_by_key(key);
        }
        self.pods.sort_unstable_by_key(|pod| key(&pod.object));
        // node-2 before node-10, nodes that came first before later ones.
        self.nodes.sort_unstable_by_key(|node| (node.created, node.name.len(), node.name));
    }

    fn index(&mut self) {
        for (i, node) in self.nodes.iter().enumerate() {
            self.node_by_name.insert(node.name, i);
        }
        for (i, pod) in self.pods.iter().enumerate() {
            let object = &pod.object;
            match object.controller {
                Some(uid) => self.pods_by_controller.entry(uid).or_default().push(i),
                None => self.orphan_pods.entry(object.namespace).or_default().push(i),
            }
            for (key, value) in object.labels.into_iter().flatten() {
                if let Some(value) = value.as_str() {
                    self.pods_by_label.entry((object.namespace, key, value)).or_default().push(i);
                }
            }
            self.pod_by_name.insert((object.namespace, object.name), i);
        }
        for kind in [
            Kind::Deployment,
            Kind::ReplicaSet,
            Kind::StatefulSet,
            Kind::DaemonSet,
            Kind::ControllerRevision,
            Kind::Service,
            Kind::Endpoints,
            Kind::EndpointSlice,
            Kind::Namespace,
        ] {
            for (i, object) in self.kinds[kind as usize].iter().enumerate() {
                match object.controller {
                    Some(uid) => self.owned.entry((kind, uid)).or_default().push(i),
                    None => self.orphans.entry((kind, object.namespace)).or_default().push(i),
                }
                self.by_name.insert((kind, object.namespace, object.name), i);
            }
        }
        self.events = self.kinds[Kind::Event as usize].iter().map(|e| (e.namespace, e.name)).collect();
    }

    /// Every object of a kind, by namespace and name.
    pub(crate) fn all(&self, kind: Kind) -> &[Object<'a>] {
        &self.kinds[kind as usize]
    }

    pub(crate) fn named<'s>(&'s self, kind: Kind, namespace: &'s str, name: &'s str) -> Option<Object<'a>> {
        self.by_name.get(&(kind, namespace, name)).map(|i| self.kinds[kind as usize][*i])
    }

    /// Objects of a kind that the object with this uid controls.
    pub(crate) fn owned<'s>(
        &'s self,
        kind: Kind,
        uid: &'s str,
    ) -> impl Iterator<Item = Object<'a>> + use<'s, 'a> {
        let indexes = self.owned.get(&(kind, uid)).filter(|_| !uid.is_empty());
        indexes.into_iter().flatten().map(move |i| self.kinds[kind as usize][*i])
    }

    /// Objects of a kind in a namespace that nobody controls.
    pub(crate) fn orphans<'s>(
        &'s self,
        kind: Kind,
        namespace: &'s str,
    ) -> impl Iterator<Item = Object<'a>> + use<'s, 'a> {
        self.orphans.get(&(kind, namespace)).into_iter().flatten().map(move |i| self.kinds[kind as usize][*i])
    }

    /// Indexes of the pods that the object with this uid controls.
    pub(crate) fn pods_of(&self, uid: &str) -> &[usize] {
        self.pods_by_controller.get(uid).filter(|_| !uid.is_empty()).map_or(&[], Vec::as_slice)
    }

    /// Indexes of the pods in a namespace that nobody controls.
    pub(crate) fn orphan_pods(&self, namespace: &str) -> &[usize] {
        self.orphan_pods.get(namespace).map_or(&[], Vec::as_slice)
    }

    /// Indexes of the pods in a namespace with this label.
    pub(crate) fn pods_with<'s>(&'s self, namespace: &'s str, key: &'s str, value: &'s str) -> &'s [usize] {
        self.pods_by_label.get(&(namespace, key, value)).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn pod_named<'s>(&'s self, namespace: &'s str, name: &'s str) -> Option<&'s Pod<'a>> {
        self.pod_by_name.get(&(namespace, name)).map(|i| &self.pods[*i])
    }

    pub(crate) fn node(&self, name: &str) -> Option<&Object<'a>> {
        self.node_by_name.get(name).map(|i| &self.nodes[*i])
    }

    /// Whether this event is in the snapshot already.
    pub(crate) fn has_event(&self, event: &Event) -> bool {
        self.events.contains(&(event.namespace(), event.name().as_str()))
    }
}

/// Who says that an object cannot be used.
pub(crate) const INVALID_COMPONENT: &str = "podway-workloads";

/// The event that reports an object which a controller cannot use.
pub(crate) fn invalid(value: &Value, error: &Malformed) -> Event {
    Event {
        involved: involved(value),
        type_: EventType::Warning,
        reason: "InvalidObject",
        message: format!("{error}; correct the field and apply the object again"),
        component: INVALID_COMPONENT,
    }
}

pub(crate) fn involved(value: &Value) -> Involved {
    let text = |path| read::text(value, path).unwrap_or_default().to_owned();
    Involved {
        api_version: text("apiVersion"),
        kind: text("kind"),
        namespace: text("metadata.namespace"),
        name: text("metadata.name"),
        uid: text("metadata.uid"),
    }
}
