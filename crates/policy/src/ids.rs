//! Numbers for things that come and go: the lowest free one is next, so that tables stay dense.

use std::collections::BTreeSet;

/// Values by number.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    slots: Vec<Option<T>>,
    free: BTreeSet<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: BTreeSet::new() }
    }
}

impl<T> Slab<T> {
    /// Keeps a value under the lowest free number.
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        if let Some(id) = self.free.pop_first() {
            self.slots[id as usize] = Some(value);
            return id;
        }
        self.slots.push(Some(value));
        u32::try_from(self.slots.len() - 1).expect("memory ends before 2^32 values do")
    }

    pub(crate) fn remove(&mut self, id: u32) -> Option<T> {
        let value = self.slots.get_mut(id as usize)?.take();
        if value.is_some() {
            self.free.insert(id);
        }
        value
    }

    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.slots.get_mut(id as usize)?.as_mut()
    }

    pub(crate) fn get(&self, id: u32) -> Option<&T> {
        self.slots.get(id as usize)?.as_ref()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let number = |i: usize| u32::try_from(i).unwrap_or(u32::MAX);
        self.slots.iter().enumerate().filter_map(move |(i, slot)| Some((number(i), slot.as_ref()?)))
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// All numbers are below this.
    pub(crate) fn bound(&self) -> usize {
        self.slots.len()
    }
}

impl<T> std::ops::Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, id: u32) -> &T {
        self.get(id).expect("numbers are only kept by those who hold a reference to what they stand for")
    }
}

impl<T> std::ops::IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, id: u32) -> &mut T {
        self.get_mut(id).expect("numbers are only kept by those who hold a reference to what they stand for")
    }
}
