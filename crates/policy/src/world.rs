//! Pods, namespaces and nodes as they are now, and who has which address.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use podway_model::{Labels, Namespace, NodePeer, Pod};

use crate::{ids::Slab, index::Index, table::SetId};

#[derive(Debug)]
pub(crate) struct PodState {
    pub(crate) pod: Pod,
    pub(crate) set: SetId,
}

#[derive(Debug, Default)]
pub(crate) struct NamespaceState {
    pub(crate) labels: Labels,
    /// Atoms of pods of selected namespaces that this is one of.
    pub(crate) selected: Index,
    pub(crate) pods: BTreeMap<String, u32>,
    pub(crate) policies: BTreeMap<String, u32>,
    /// The same, by the pods that they select.
    pub(crate) selecting: Index,
    pub(crate) is_known: bool,
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Pod(u32),
    Node(String),
}

#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) pods: Slab<PodState>,
    pub(crate) namespaces: HashMap<String, NamespaceState>,
    pub(crate) nodes: HashMap<String, NodePeer>,
    /// Who claims each address; the last one has it.
    owners: HashMap<IpAddr, Vec<Owner>>,
}

impl World {
    pub(crate) fn namespace(&mut self, name: &str) -> &mut NamespaceState {
        if !self.namespaces.contains_key(name) {
            let labels = Namespace::new(name, Labels::new()).labels;
            self.namespaces.insert(name.to_owned(), NamespaceState { labels, ..NamespaceState::default() });
        }
        self.namespaces.get_mut(name).expect("inserted when it was not there")
    }

    /// Forgets a namespace that nothing is in and nobody has made.
    pub(crate) fn tidy(&mut self, name: &str) {
        if self
            .namespaces
            .get(name)
            .is_some_and(|n| !n.is_known && n.pods.is_empty() && n.policies.is_empty())
        {
            self.namespaces.remove(name);
        }
    }

    pub(crate) fn pod_id(&self, namespace: &str, name: &str) -> Option<u32> {
        self.namespaces.get(namespace)?.pods.get(name).copied()
    }

    pub(crate) fn claim(&mut self, addr: IpAddr, owner: Owner) {
        self.owners.entry(addr).or_default().push(owner);
    }

    pub(crate) fn release(&mut self, addr: IpAddr, owner: &Owner) {
        if let Some(owners) = self.owners.get_mut(&addr) {
            if let Some(i) = owners.iter().position(|o| o == owner) {
                owners.remove(i);
            }
            if owners.is_empty() {
                self.owners.remove(&addr);
            }
        }
    }

    pub(crate) fn owner(&self, addr: IpAddr) -> Option<&Owner> {
        self.owners.get(&addr)?.last()
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.owners.keys().copied()
    }
}

/// The addresses by which a pod is a peer of its own: none on its node's network, none when it has ended.
pub(crate) fn own_addresses(pod: &Pod) -> &[IpAddr] {
    if pod.host_network || pod.finished { &[] } else { &pod.addresses }
}
