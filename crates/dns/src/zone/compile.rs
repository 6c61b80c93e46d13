//! Objects come in, the nodes that they are about are made anew.

use std::net::IpAddr;

use podway_model::{EndpointSlice, Pod, Service};

use super::node::{self, Compact, ServiceNode};
use super::{ObjectName, Owner, ServiceKey, Zone};

fn named(namespace: &str, name: &str) -> ObjectName {
    (namespace.into(), name.into())
}

impl Zone {
    /// A Service is there, or has changed.
    pub fn apply_service(&mut self, service: &Service) {
        let name = named(&service.namespace, &service.name);
        if self.objects.get(&name) == Some(service) {
            return;
        }
        if self.objects.insert(name, service.clone()).is_none() {
            self.presence(&service.namespace).services += 1;
        }
        self.rebuild(&service.namespace, &service.name);
    }

    /// A Service is gone.
    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        if self.objects.remove(&named(namespace, name)).is_some() {
            self.presence(namespace).services -= 1;
            self.forget_if_absent(namespace);
            self.rebuild(namespace, name);
        }
    }

    /// An EndpointSlice is there, or has changed, perhaps to another Service.
    pub fn apply_slice(&mut self, slice: &EndpointSlice) {
        let name = named(&slice.namespace, &slice.name);
        let compact = Compact::new(slice);
        if self.slices.get(&name) == compact.as_ref() {
            return;
        }
        self.remove_slice(&slice.namespace, &slice.name);
        let Some(compact) = compact else { return };
        let (namespace, service) = compact.service.clone();
        let Some(key) = node::key(&namespace, &service) else { return };
        self.slices_of.entry(key).or_default().insert(name.clone());
        self.slices.insert(name, compact);
        self.rebuild(&namespace, &service);
    }

    /// An EndpointSlice is gone.
    pub fn remove_slice(&mut self, namespace: &str, name: &str) {
        let object = named(namespace, name);
        let Some(Compact { service: (namespace, service), .. }) = self.slices.remove(&object) else { return };
        if let Some(key) = node::key(&namespace, &service)
            && let Some(slices) = self.slices_of.get_mut(&key)
        {
            slices.remove(&object);
            if slices.is_empty() {
                self.slices_of.remove(&key);
            }
        }
        self.rebuild(&namespace, &service);
    }

    /// A pod is there, or has changed. One that has finished, or has its node's addresses, has no name.
    pub fn apply_pod(&mut self, pod: &Pod) {
        let gone = pod.finished || pod.host_network;
        let addresses = if gone { Vec::new() } else { pod.addresses.clone() };
        let known = self.pods.get(&named(&pod.namespace, &pod.name));
        if known.map_or(&[][..], Vec::as_slice) == addresses {
            return;
        }
        self.remove_pod(&pod.namespace, &pod.name);
        if addresses.is_empty() {
            return;
        }
        for addr in &addresses {
            self.pods_at.entry(*addr).or_default().push(node::label(&pod.namespace));
        }
        self.pods.insert(named(&pod.namespace, &pod.name), addresses);
        self.changed();
    }

    /// A pod is gone.
    pub fn remove_pod(&mut self, namespace: &str, name: &str) {
        let Some(addresses) = self.pods.remove(&named(namespace, name)) else { return };
        let label = node::label(namespace);
        for addr in addresses {
            let Some(there) = self.pods_at.get_mut(&addr) else { continue };
            // One for each pod: another of the same namespace may have the address already.
            if let Some(at) = there.iter().position(|l| *l == label) {
                there.swap_remove(at);
            }
            if there.is_empty() {
                self.pods_at.remove(&addr);
            }
        }
        self.changed();
    }

    fn rebuild(&mut self, namespace: &str, name: &str) {
        let Some(key) = node::key(namespace, name) else { return };
        let node = self.objects.get(&named(namespace, name)).and_then(|service| {
            let names = self.slices_of.get(&key).into_iter().flatten();
            let slices = names.filter_map(|slice| self.slices.get(slice));
            ServiceNode::new(service, slices, self.config.ttl)
        });
        if self.services.get(&key) == node.as_ref() {
            return;
        }
        if let Some(old) = self.services.remove(&key) {
            for (addr, endpoint) in &old.reverse {
                self.disown(*addr, &owner(&key, endpoint.as_deref()));
            }
        }
        if let Some(node) = node {
            for (addr, endpoint) in &node.reverse {
                let owners = self.owners.entry(*addr).or_default();
                let owner = owner(&key, endpoint.as_deref());
                if let Err(at) = owners.binary_search(&owner) {
                    owners.insert(at, owner);
                }
            }
            self.services.insert(key, node);
        }
        self.changed();
    }

    fn disown(&mut self, addr: IpAddr, owner: &Owner) {
        let Some(owners) = self.owners.get_mut(&addr) else { return };
        owners.retain(|o| o != owner);
        if owners.is_empty() {
            self.owners.remove(&addr);
        }
    }
}

fn owner(key: &ServiceKey, endpoint: Option<&[u8]>) -> Owner {
    let mut labels = Vec::new();
    if let Some(label) = endpoint {
        labels.push(label.len() as u8);
        labels.extend(label);
    }
    labels.extend(&**key);
    Owner { endpoint: endpoint.is_some(), labels: labels.into() }
}
