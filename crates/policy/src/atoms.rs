//! Atoms: what a rule can ask of a peer, each kept once however many rules ask it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use podway_model::{
    Labels, Selector,
    pod::NamedPort,
    policy::{IpBlock, Namespaces},
};

use crate::{ids::Slab, index::Index, table::ClassId, table::SetId};

/// Number of an atom.
pub(crate) type AtomId = u32;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum AtomKey {
    /// Is it a pod with these labels in such a namespace?
    Pods(Namespaces, Selector),
    /// Is it an address of a node with these labels?
    Nodes(Selector),
    /// Is its address one of these?
    Block(IpBlock),
    /// Is it a pod that has this port under this name?
    Port(NamedPort),
}

#[derive(Debug)]
pub(crate) struct Atom {
    pub(crate) key: Arc<AtomKey>,
    refs: usize,
    /// Classes that have it.
    pub(crate) classes: BTreeSet<ClassId>,
    /// Sets whose rules ask it.
    pub(crate) sets: BTreeSet<SetId>,
}

/// All atoms in use, and where to look for those that an object may answer.
#[derive(Debug, Default)]
pub(crate) struct Atoms {
    slab: Slab<Atom>,
    ids: HashMap<Arc<AtomKey>, AtomId>,
    /// Of pods of one namespace, by its name.
    of_namespace: HashMap<String, Index>,
    /// Of pods of selected namespaces, by the namespaces.
    of_selected: Index,
    of_nodes: BTreeSet<AtomId>,
    pub(crate) blocks: BTreeSet<AtomId>,
    /// Names of ports that rules ask for, how often, and the atoms of what pods have under them.
    names: HashMap<String, (usize, BTreeSet<AtomId>)>,
}

impl Atoms {
    /// Takes a reference; the second is whether the atom is new.
    pub(crate) fn acquire(&mut self, key: AtomKey) -> (AtomId, bool) {
        if let Some(id) = self.ids.get(&key) {
            self.slab[*id].refs += 1;
            return (*id, false);
        }
        let key = Arc::new(key);
        let (classes, sets) = (BTreeSet::new(), BTreeSet::new());
        let id = self.slab.insert(Atom { key: Arc::clone(&key), refs: 1, classes, sets });
        match &*key {
            AtomKey::Pods(Namespaces::Named(name), pods) => {
                self.of_namespace.entry(name.clone()).or_default().insert(pods, id);
            }
            AtomKey::Pods(Namespaces::Selected(namespaces), _) => self.of_selected.insert(namespaces, id),
            AtomKey::Nodes(_) => {
                self.of_nodes.insert(id);
            }
            AtomKey::Block(_) => {
                self.blocks.insert(id);
            }
            AtomKey::Port(_) => {}
        }
        self.ids.insert(key, id);
        (id, true)
    }

    /// Gives a reference back; whether it was the last one. The atom stays until [`Atoms::remove`].
    pub(crate) fn release(&mut self, id: AtomId) -> bool {
        let atom = &mut self.slab[id];
        atom.refs -= 1;
        atom.refs == 0
    }

    pub(crate) fn remove(&mut self, id: AtomId) {
        let Some(atom) = self.slab.remove(id) else { return };
        self.ids.remove(&atom.key);
        match &*atom.key {
            AtomKey::Pods(Namespaces::Named(name), pods) => {
                if let Some(index) = self.of_namespace.get_mut(name) {
                    index.remove(pods, id);
                    if index.is_empty() {
                        self.of_namespace.remove(name);
                    }
                }
            }
            AtomKey::Pods(Namespaces::Selected(namespaces), _) => self.of_selected.remove(namespaces, id),
            AtomKey::Nodes(_) => {
                self.of_nodes.remove(&id);
            }
            AtomKey::Block(_) => {
                self.blocks.remove(&id);
            }
            AtomKey::Port(port) => {
                if let Some((_, atoms)) = self.names.get_mut(&port.name) {
                    atoms.remove(&id);
                }
            }
        }
    }

    /// Takes a reference to the name of a port; whether it is new.
    pub(crate) fn acquire_name(&mut self, name: &str) -> bool {
        let (refs, _) = self.names.entry(name.to_owned()).or_default();
        *refs += 1;
        *refs == 1
    }

    /// Gives a reference to a name back; the atoms that nobody asks for any more.
    pub(crate) fn release_name(&mut self, name: &str) -> BTreeSet<AtomId> {
        let Some((refs, _)) = self.names.get_mut(name) else { return BTreeSet::new() };
        *refs -= 1;
        if *refs > 0 {
            return BTreeSet::new();
        }
        self.names.remove(name).map(|(_, atoms)| atoms).unwrap_or_default()
    }

    /// The atom of a pod's port, when somebody asks for the name.
    pub(crate) fn port(&mut self, port: &NamedPort) -> Option<AtomId> {
        self.names.get(&port.name)?;
        let key = AtomKey::Port(port.clone());
        if let Some(id) = self.ids.get(&key) {
            return Some(*id);
        }
        let (id, _) = self.acquire(key);
        self.names.entry(port.name.clone()).or_default().1.insert(id);
        Some(id)
    }

    /// The atoms of ports under a name.
    pub(crate) fn named(&self, name: &str) -> impl Iterator<Item = AtomId> {
        self.names.get(name).into_iter().flat_map(|(_, atoms)| atoms.iter().copied())
    }

    /// Atoms of selected namespaces that a namespace with these labels is one of, by the pods that they ask for.
    pub(crate) fn of_namespace_labels(&self, labels: &Labels) -> Index {
        let mut found = Index::default();
        for id in self.of_selected.candidates(labels) {
            if let AtomKey::Pods(Namespaces::Selected(namespaces), pods) = &*self.slab[id].key
                && namespaces.matches(labels)
            {
                found.insert(pods, id);
            }
        }
        found
    }

    /// Atoms that match a pod; `selected` are those that its namespace is one of.
    pub(crate) fn of_pod(&self, namespace: &str, selected: &Index, labels: &Labels, out: &mut Vec<AtomId>) {
        let own = self.of_namespace.get(namespace).into_iter().flat_map(|index| index.candidates(labels));
        for id in own.chain(selected.candidates(labels)) {
            if let AtomKey::Pods(_, pods) = &*self.slab[id].key
                && pods.matches(labels)
            {
                out.push(id);
            }
        }
    }

    /// Atoms that match a node.
    pub(crate) fn of_node(&self, labels: &Labels, out: &mut Vec<AtomId>) {
        let matches = |id: &AtomId| matches!(&*self.slab[*id].key, AtomKey::Nodes(s) if s.matches(labels));
        out.extend(self.of_nodes.iter().copied().filter(matches));
    }

    pub(crate) fn key(&self, id: AtomId) -> &Arc<AtomKey> {
        &self.slab[id].key
    }

    pub(crate) fn get(&self, id: AtomId) -> Option<&Atom> {
        self.slab.get(id)
    }

    pub(crate) fn get_mut(&mut self, id: AtomId) -> Option<&mut Atom> {
        self.slab.get_mut(id)
    }

    pub(crate) fn len(&self) -> usize {
        self.slab.len()
    }
}
