//! From addresses to names, as they are now and as they were a while ago.
//!
//! A flow may end long after the pod that opened it, and its address may be another pod's by then. So addresses that
//! change hands are remembered for a while, and a name is asked for with the time that is meant.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use podway_abi::Addr;
use podway_model::{NodePeer, Pod, Protocol, Service};

use crate::identity::{Identity, Kind, ServiceName, Total};

/// Most earlier holders of addresses that are remembered.
const PAST: usize = 8_192;
/// Pods that may be known at a time: as many addresses as the datapath has places for.
const PODS: usize = 262_144;

/// Nanoseconds of the Unix clock.
pub type UnixNanos = i64;

type PodKey = (String, String);
type ServiceKey = (Addr, u16, u8);

/// The directory.
#[derive(Debug, Default)]
pub struct Names {
    total: Total,
    /// Bytes of the identities of pods, nodes and earlier holders; one that is several of these counts as often.
    held: usize,
    pods: HashMap<PodKey, Known>,
    by_address: HashMap<Addr, Arc<Identity>>,
    past: HashMap<Addr, Vec<Past>>,
    past_order: VecDeque<Addr>,
    /// Pods attached to this node, by address: true whatever the API server says.
    attached: BTreeMap<IpAddr, String>,
    nodes: HashMap<String, (Arc<Identity>, Vec<Addr>)>,
    services: HashMap<PodKey, Vec<ServiceKey>>,
    by_service: HashMap<ServiceKey, Arc<ServiceName>>,
}

#[derive(Debug)]
struct Known {
    identity: Arc<Identity>,
    addresses: Vec<Addr>,
    /// The API server has told of it; else this node alone knows it.
    is_told: bool,
}

#[derive(Debug)]
struct Past {
    identity: Arc<Identity>,
    until: UnixNanos,
}

impl Names {
    /// A directory without names.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces all pods that the API server knows.
    pub fn set_pods(&mut self, pods: Vec<Pod>, now: UnixNanos) {
        let mut gone: Vec<PodKey> =
            self.pods.iter().filter(|(_, known)| known.is_told).map(|(key, _)| key.clone()).collect();
        let stay: std::collections::HashSet<(&str, &str)> =
            pods.iter().map(|p| (p.namespace.as_str(), p.name.as_str())).collect();
        gone.retain(|(namespace, name)| !stay.contains(&(namespace.as_str(), name.as_str())));
        for (namespace, name) in gone {
            self.remove_pod(&namespace, &name, now);
        }
        for pod in pods {
            self.set_pod(pod, now);
        }
    }

    /// A pod is new or has changed.
    pub fn set_pod(&mut self, pod: Pod, now: UnixNanos) {
        if pod.finished || pod.host_network {
            // Its addresses are no longer its own, or never were.
            self.remove_pod(&pod.namespace, &pod.name, now);
            return;
        }
        let key = (pod.namespace, pod.name);
        let known = self.pods.get(&key);
        if known.is_none() && self.pods.len() >= PODS {
            return;
        }
        let label = format!("{}/{}", key.0, key.1);
        let mut addresses: Vec<Addr> = pod
            .addresses
            .iter()
            .filter(|a| self.attached.get(a).is_none_or(|holder| *holder == label))
            .map(|a| Addr::from(*a))
            .collect();
        for (address, holder) in &self.attached {
            if *holder == label && !addresses.contains(&Addr::from(*address)) {
                addresses.push(Addr::from(*address));
            }
        }
        let identity = match known {
            Some(k) if k.identity.labels == pod.labels && k.identity.node == pod.node => {
                Arc::clone(&k.identity)
            }
            _ => Identity::new(&self.total, Kind::Pod, (&key.0, &key.1), pod.labels, &pod.node),
        };
        let before = known.map(|k| k.addresses.clone()).unwrap_or_default();
        for address in before.iter().filter(|a| !addresses.contains(a)) {
            self.leave(address, &key, now);
        }
        for address in &addresses {
            self.take(*address, &identity, now);
        }
        self.held += identity.bytes();
        let before = self.pods.insert(key, Known { identity, addresses, is_told: true });
        self.held -= before.map_or(0, |k| k.identity.bytes());
    }

    /// A pod is gone.
    pub fn remove_pod(&mut self, namespace: &str, name: &str, now: UnixNanos) {
        let key = (namespace.to_owned(), name.to_owned());
        let Some(known) = self.pods.remove(&key) else { return };
        self.held -= known.identity.bytes();
        for address in &known.addresses {
            self.leave(address, &key, now);
        }
    }

    /// The pods that are attached to this node, as `namespace/name` by address: known before the API server tells their
    /// addresses, and still known when it does not answer.
    pub fn set_attached(&mut self, attached: BTreeMap<IpAddr, String>, now: UnixNanos) {
        if attached == self.attached {
            return;
        }
        let before = std::mem::replace(&mut self.attached, attached);
        for (address, pod) in before {
            if self.attached.get(&address) == Some(&pod) {
                continue;
            }
            let Some((namespace, name)) = pod.split_once('/') else { continue };
            let key = (namespace.to_owned(), name.to_owned());
            if self.pods.get(&key).is_some_and(|k| !k.is_told) {
                self.remove_pod(namespace, name, now);
            }
        }
        let new: Vec<(Addr, PodKey)> = self
            .attached
            .iter()
            .filter_map(|(address, pod)| {
                let (namespace, name) = pod.split_once('/')?;
                Some((Addr::from(*address), (namespace.to_owned(), name.to_owned())))
            })
            .collect();
        for (address, key) in new {
            let total = self.total.clone();
            let held = &mut self.held;
            let known = self.pods.entry(key.clone()).or_insert_with(|| {
                let identity = Identity::new(&total, Kind::Pod, (&key.0, &key.1), BTreeMap::new(), "");
                *held += identity.bytes();
                Known { identity, addresses: Vec::new(), is_told: false }
            });
            if !known.addresses.contains(&address) {
                known.addresses.push(address);
            }
            let identity = Arc::clone(&known.identity);
            self.take(address, &identity, now);
        }
    }

    /// Replaces all nodes.
    pub fn set_nodes(&mut self, nodes: Vec<NodePeer>) {
        let known: Vec<String> = self.nodes.keys().cloned().collect();
        for name in known {
            self.remove_node(&name);
        }
        for node in nodes {
            self.set_node(node);
        }
    }

    /// A node is new or has changed.
    pub fn set_node(&mut self, node: NodePeer) {
        let addresses: Vec<Addr> = node.addresses.iter().map(|a| Addr::from(*a)).collect();
        if self.nodes.get(&node.name).is_some_and(|(_, known)| *known == addresses) {
            return;
        }
        self.remove_node(&node.name);
        let identity = Identity::new(&self.total, Kind::Node, ("", &node.name), BTreeMap::new(), &node.name);
        for address in &addresses {
            self.by_address.insert(*address, Arc::clone(&identity));
        }
        self.held += identity.bytes();
        self.nodes.insert(node.name, (identity, addresses));
    }

    /// A node is gone.
    pub fn remove_node(&mut self, name: &str) {
        let Some((identity, addresses)) = self.nodes.remove(name) else { return };
        self.held -= identity.bytes();
        for address in addresses {
            if self.by_address.get(&address).is_some_and(|i| i.kind == Kind::Node && i.name == name) {
                self.by_address.remove(&address);
            }
        }
    }

    /// Replaces all services.
    pub fn set_services<'a>(&mut self, services: impl Iterator<Item = &'a Service>) {
        self.services.clear();
        self.by_service.clear();
        for service in services {
            self.set_service(service);
        }
    }

    /// A service is new or has changed.
    pub fn set_service(&mut self, service: &Service) {
        self.remove_service(&service.namespace, &service.name);
        let ingress = service.ingress.iter().map(|i| i.ip);
        let addresses: Vec<IpAddr> =
            service.cluster_ips.iter().chain(&service.external_ips).copied().chain(ingress).collect();
        let mut keys = Vec::new();
        // A cluster IP is one Service's alone: also where it has no such port.
        let whole = ServiceName {
            namespace: service.namespace.clone(),
            name: service.name.clone(),
            port: String::new(),
        };
        let whole = Arc::new(whole);
        for address in &service.cluster_ips {
            let key = (Addr::from(*address), ANY, ANY_PROTOCOL);
            self.by_service.insert(key, Arc::clone(&whole));
            keys.push(key);
        }
        for port in &service.ports {
            let name = Arc::new(ServiceName {
                namespace: service.namespace.clone(),
                name: service.name.clone(),
                port: port.name.clone(),
            });
            let proto = number(port.protocol);
            let mut places: Vec<ServiceKey> =
                addresses.iter().map(|a| (Addr::from(*a), port.port, proto)).collect();
            if let Some(node_port) = port.node_port {
                places.push((ANY_NODE, node_port, proto));
            }
            for key in places {
                // An external address may be claimed twice; it is the first one's.
                if let std::collections::hash_map::Entry::Vacant(place) = self.by_service.entry(key) {
                    place.insert(Arc::clone(&name));
                    keys.push(key);
                }
            }
        }
        self.services.insert((service.namespace.clone(), service.name.clone()), keys);
    }

    /// A service is gone.
    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        let keys = self.services.remove(&(namespace.to_owned(), name.to_owned())).unwrap_or_default();
        for key in keys {
            self.by_service.remove(&key);
        }
    }

    /// An address goes to somebody; whoever had it is remembered.
    fn take(&mut self, address: Addr, identity: &Arc<Identity>, now: UnixNanos) {
        let before = self.by_address.insert(address, Arc::clone(identity));
        if let Some(before) = before
            && (before.name != identity.name || before.namespace != identity.namespace)
        {
            self.remember(address, before, now);
        }
    }

    /// Somebody gives an address up, unless it is another's already.
    fn leave(&mut self, address: &Addr, (namespace, name): &PodKey, now: UnixNanos) {
        let theirs = |i: &Arc<Identity>| i.kind == Kind::Pod && i.namespace == *namespace && i.name == *name;
        if self.by_address.get(address).is_some_and(theirs)
            && let Some(identity) = self.by_address.remove(address)
        {
            self.remember(*address, identity, now);
        }
    }

    fn remember(&mut self, address: Addr, identity: Arc<Identity>, until: UnixNanos) {
        self.held += identity.bytes();
        self.past.entry(address).or_default().push(Past { identity, until });
        self.past_order.push_back(address);
        while self.past_order.len() > PAST {
            let Some(oldest) = self.past_order.pop_front() else { return };
            if let Some(list) = self.past.get_mut(&oldest) {
                if !list.is_empty() {
                    self.held -= list.remove(0).identity.bytes();
                }
                if list.is_empty() {
                    self.past.remove(&oldest);
                }
            }
        }
    }

    /// Whose an address was at a time. Nothing for addresses beyond the cluster.
    #[must_use]
    pub fn at(&self, address: &Addr, time: UnixNanos) -> Option<&Arc<Identity>> {
        if !self.past.is_empty()
            && let Some(list) = self.past.get(address)
            && let Some(past) = list.iter().find(|p| time < p.until)
        {
            return Some(&past.identity);
        }
        // A flow that outlived its pod, whose address nobody has taken yet.
        self.by_address.get(address)
    }

    /// The service that answers at an address and port.
    #[must_use]
    pub fn service(&self, address: &Addr, port: u16, proto: u8) -> Option<&Arc<ServiceName>> {
        self.by_service.get(&(*address, port, proto)).or_else(|| {
            let node = self.by_address.get(address).is_some_and(|i| i.kind == Kind::Node);
            let key = if node { (ANY_NODE, port, proto) } else { (*address, ANY, ANY_PROTOCOL) };
            self.by_service.get(&key)
        })
    }

    /// Pods, nodes and services that are known.
    #[must_use]
    pub fn count(&self) -> (usize, usize, usize) {
        (self.pods.len(), self.nodes.len(), self.services.len())
    }

    /// Bytes of identities that the directory itself holds.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held
    }

    /// Bytes of identities, including those that only records hold.
    #[must_use]
    pub fn total(&self) -> &Total {
        &self.total
    }
}

/// Stands for every address of a node.
const ANY_NODE: Addr = Addr::UNSPECIFIED;
/// Stand for every port and protocol of an address: neither is ever used on the wire.
const ANY: u16 = 0;
const ANY_PROTOCOL: u8 = 255;

/// IP protocol number.
fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// An address as the programs write it.
#[must_use]
pub fn ip(address: &Addr) -> IpAddr {
    IpAddr::from(*address)
}

/// Whether it is `0.0.0.0` or `::`.
#[must_use]
pub fn is_unspecified(address: &Addr) -> bool {
    match ip(address) {
        IpAddr::V4(a) => a == Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(a) => a == Ipv6Addr::UNSPECIFIED,
    }
}

#[cfg(test)]
mod tests {
    use podway_model::Labels;
    use serde_json::json;

    use super::*;

    fn pod(name: &str, address: &str, labels: &[(&str, &str)]) -> Pod {
        Pod {
            namespace: "x".into(),
            name: name.into(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Labels>(),
            addresses: if address.is_empty() { vec![] } else { vec![address.parse().unwrap()] },
            ..Pod::default()
        }
    }

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().unwrap())
    }

    fn name(names: &Names, address: &str, at: UnixNanos) -> String {
        names.at(&addr(address), at).map_or("-".into(), |i| format!("{} {}", i.name, i.labels.len()))
    }

    #[test]
    fn an_address_has_the_name_of_the_time_that_is_meant() {
        let mut names = Names::new();
        names.set_pod(pod("a", "10.0.0.1", &[("app", "a")]), 100);
        assert_eq!(name(&names, "10.0.0.1", 150), "a 1");
        names.remove_pod("x", "a", 200);
        assert_eq!(name(&names, "10.0.0.1", 250), "-");
        names.set_pod(pod("b", "10.0.0.1", &[]), 300);
        assert_eq!([name(&names, "10.0.0.1", 150), name(&names, "10.0.0.1", 310)], ["a 1", "b 0"]);
        // A new list without b, with another holder of the address.
        names.set_pods(vec![pod("c", "10.0.0.1", &[])], 400);
        assert_eq!([399, 400].map(|t| name(&names, "10.0.0.1", t)), ["b 0", "c 0"]);
        names.set_pod(Pod { finished: true, ..pod("c", "10.0.0.1", &[]) }, 500);
        assert_eq!(name(&names, "10.0.0.1", 500), "-");
        assert_eq!(names.count().0, 0);
    }

    #[test]
    fn what_is_attached_here_is_known_first_and_believed() {
        let mut names = Names::new();
        // The API server knows the pod, but not its address yet.
        names.set_pod(pod("a", "", &[("app", "a")]), 1);
        let attached = |list: &[(&str, &str)]| -> BTreeMap<IpAddr, String> {
            list.iter().map(|(a, p)| (a.parse().unwrap(), (*p).to_owned())).collect()
        };
        names.set_attached(attached(&[("10.0.0.1", "x/a"), ("10.0.0.2", "x/static")]), 2);
        assert_eq!(["10.0.0.1", "10.0.0.2"].map(|a| name(&names, a, 3)), ["a 1", "static 0"]);
        // An old pod of which the API server still says that it has the address.
        names.set_pod(pod("old", "10.0.0.1", &[]), 3);
        assert_eq!(name(&names, "10.0.0.1", 4), "a 1");
        names.set_pod(pod("static", "", &[("app", "s")]), 4);
        assert_eq!(name(&names, "10.0.0.2", 5), "static 1");
        // Gone from the node, and from the API server.
        names.set_attached(attached(&[]), 6);
        names.remove_pod("x", "a", 7);
        names.remove_pod("x", "static", 7);
        assert_eq!(["10.0.0.1", "10.0.0.2"].map(|a| name(&names, a, 8)), ["-", "-"]);
        // Known from the node alone: gone with it.
        names.set_attached(attached(&[("10.0.0.9", "x/only")]), 9);
        names.set_attached(attached(&[]), 10);
        assert_eq!(names.count().0, 1, "old is left");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_memory_is_known() {
        let mut names = Names::new();
        for i in 0..u32::try_from(PAST).unwrap() + 500 {
            let address = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + i % 64)).to_string();
            names.set_pod(pod(&format!("p{i}"), &address, &[]), i64::from(i));
            names.remove_pod("x", &format!("p{i}"), i64::from(i) + 1);
        }
        assert_eq!(names.past_order.len(), PAST);
        assert_eq!(names.held_bytes(), names.total.bytes());
        assert_eq!(names.past.values().map(Vec::len).sum::<usize>(), PAST);
        assert!(names.total.bytes() > PAST * size_of::<Identity>());
        let total = names.total.clone();
        drop(names);
        assert_eq!(total.bytes(), 0);
    }

    #[test]
    fn services_are_found_by_address_and_port_and_node_port() {
        let mut names = Names::new();
        names.set_nodes(vec![NodePeer {
            name: "n1".into(),
            addresses: vec!["172.18.1.1".parse().unwrap()],
            ..NodePeer::default()
        }]);
        let service = Service::parse(&json!({
            "metadata": {"name": "web", "namespace": "x"},
            "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "externalIPs": ["192.0.2.1"],
                "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}
        }))
        .unwrap();
        names.set_service(&service);
        let found = |names: &Names, a: &str, port| names.service(&addr(a), port, 6).map(|s| s.port.clone());
        for (address, port, is) in [
            ("10.96.0.1", 80, true),
            ("10.96.0.1", 81, true),
            ("10.96.0.2", 80, false),
            ("192.0.2.1", 80, true),
            ("192.0.2.1", 81, false),
            ("172.18.1.1", 30080, true),
            ("172.18.1.1", 30081, false),
        ] {
            assert_eq!(found(&names, address, port).is_some(), is, "{address}:{port}");
        }
        assert_eq!(found(&names, "10.96.0.1", 80).as_deref(), Some("http"));
        assert_eq!(found(&names, "10.96.0.1", 81).as_deref(), Some(""));
        assert!(names.service(&addr("192.0.2.1"), 80, 17).is_none());
        names.remove_service("x", "web");
        assert_eq!(found(&names, "10.96.0.1", 80), None);
        names.remove_node("n1");
        assert!(names.at(&addr("172.18.1.1"), 1).is_none());
    }
}
