//! Classes: peers that the same atoms match share a number, and keep it while nothing tells them apart.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use crate::{
    atoms::{AtomId, Atoms},
    ids::Slab,
    table::{ClassId, PeerKey},
};

#[derive(Debug, Default)]
pub(crate) struct Class {
    /// Atoms that match, sorted.
    pub(crate) key: Arc<[AtomId]>,
    pub(crate) members: HashSet<PeerKey>,
}

/// All classes, and which peer is in which. A peer that no selector of pods or nodes matches is in none of its own: the
/// prefixes say its class.
#[derive(Debug)]
pub(crate) struct Classes {
    slab: Slab<Class>,
    ids: HashMap<Arc<[AtomId]>, ClassId>,
    pub(crate) of: HashMap<PeerKey, ClassId>,
}

impl Default for Classes {
    fn default() -> Self {
        let mut slab = Slab::default();
        // The class of what nothing matches always has number 0.
        let none = ClassId(slab.insert(Class::default()));
        Self { slab, ids: HashMap::from([(Arc::default(), none)]), of: HashMap::new() }
    }
}

impl Classes {
    /// The class of a key; the second is whether it is new.
    pub(crate) fn find_or_create(&mut self, key: &[AtomId], atoms: &mut Atoms) -> (ClassId, bool) {
        if let Some(id) = self.ids.get(key) {
            return (*id, false);
        }
        let key: Arc<[AtomId]> = key.into();
        let id = ClassId(self.slab.insert(Class { key: Arc::clone(&key), ..Class::default() }));
        index(atoms, &key, |classes| classes.insert(id));
        self.ids.insert(key, id);
        (id, true)
    }

    pub(crate) fn find(&self, key: &[AtomId]) -> Option<ClassId> {
        self.ids.get(key).copied()
    }

    /// Puts a peer into a class; returns the class that it has left, if any.
    pub(crate) fn assign(&mut self, peer: PeerKey, class: Option<ClassId>) -> Option<ClassId> {
        let old = match class {
            Some(class) => {
                self.slab[class.0].members.insert(peer);
                self.of.insert(peer, class)
            }
            None => self.of.remove(&peer),
        };
        if let Some(old) = old.filter(|old| Some(*old) != class) {
            self.slab[old.0].members.remove(&peer);
        }
        old
    }

    /// Changes what a class is, under its number.
    pub(crate) fn rekey(&mut self, id: ClassId, key: &[AtomId], atoms: &mut Atoms) {
        let key: Arc<[AtomId]> = key.into();
        let class = &mut self.slab[id.0];
        let old = std::mem::replace(&mut class.key, Arc::clone(&key));
        self.ids.remove(&old);
        index(atoms, &old, |classes| classes.remove(&id));
        index(atoms, &key, |classes| classes.insert(id));
        self.ids.insert(key, id);
    }

    /// Removes a class without members; returns what it was.
    pub(crate) fn remove(&mut self, id: ClassId, atoms: &mut Atoms) -> Option<Class> {
        if id == ClassId::NONE || !self.slab.get(id.0)?.members.is_empty() {
            return None;
        }
        let class = self.slab.remove(id.0)?;
        self.ids.remove(&class.key);
        index(atoms, &class.key, |classes| classes.remove(&id));
        Some(class)
    }

    pub(crate) fn get(&self, id: ClassId) -> Option<&Class> {
        self.slab.get(id.0)
    }

    pub(crate) fn len(&self) -> usize {
        self.slab.len()
    }

    /// All numbers are below this.
    pub(crate) fn bound(&self) -> usize {
        self.slab.bound()
    }
}

impl std::ops::Index<ClassId> for Classes {
    type Output = Class;

    fn index(&self, id: ClassId) -> &Class {
        &self.slab[id.0]
    }
}

fn index(atoms: &mut Atoms, key: &[AtomId], mut change: impl FnMut(&mut BTreeSet<ClassId>) -> bool) {
    for atom in key {
        if let Some(atom) = atoms.get_mut(*atom) {
            change(&mut atom.classes);
        }
    }
}
