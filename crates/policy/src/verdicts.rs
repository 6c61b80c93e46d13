//! Entries by set, direction and class, of which there are as many as sets times classes: what many classes have in
//! common in a set is kept once.

use std::{
    collections::{HashMap, hash_map},
    sync::Arc,
};

use podway_model::policy::Direction;

use crate::table::{ClassId, Entry, SetId};

/// Where entries belong.
pub type VerdictKey = (SetId, Direction, ClassId);

/// The entries of all classes in all sets.
#[derive(Clone, Debug, Default)]
pub struct Verdicts {
    of: HashMap<(SetId, Direction), Rows>,
    rows: usize,
    entries: usize,
}

/// The classes of one set and direction that have entries of their own.
#[derive(Clone, Debug, Default)]
struct Rows {
    /// Number of the list of each class, sorted by class.
    of: Vec<(ClassId, u32)>,
    /// Lists, and how many classes have them; `None` is free.
    lists: Vec<Option<(Arc<[Entry]>, u32)>>,
    ids: HashMap<Arc<[Entry]>, u32>,
}

impl Verdicts {
    /// Replaces the entries of a class, or removes them.
    pub fn set(&mut self, (set, direction, class): VerdictKey, entries: Option<Arc<[Entry]>>) {
        let mut of = match self.of.entry((set, direction)) {
            hash_map::Entry::Occupied(of) => of,
            hash_map::Entry::Vacant(of) if entries.is_some() => of.insert_entry(Rows::default()),
            hash_map::Entry::Vacant(_) => return,
        };
        let rows = of.get_mut();
        let new = entries.map(|list| {
            self.entries += list.len();
            rows.acquire(list)
        });
        // Classes come in their order when a set is new.
        let place = match rows.of.last() {
            Some((last, _)) if *last < class => Err(rows.of.len()),
            _ => rows.of.binary_search_by_key(&class, |(class, _)| *class),
        };
        let old = match (place, new) {
            (Ok(i), Some(new)) => Some(std::mem::replace(&mut rows.of[i].1, new)),
            (Ok(i), None) => Some(rows.of.remove(i).1),
            (Err(i), Some(new)) => {
                rows.of.insert(i, (class, new));
                self.rows += 1;
                None
            }
            (Err(_), None) => None,
        };
        if new.is_none() && old.is_some() {
            self.rows -= 1;
        }
        if let Some(old) = old {
            self.entries -= rows.release(old);
        }
        if rows.of.is_empty() {
            of.remove();
        }
    }

    /// The entries of a class.
    pub fn get(&self, key: &VerdictKey) -> Option<&Arc<[Entry]>> {
        let (rows, list) = self.find(key)?;
        rows.lists[list as usize].as_ref().map(|(list, _)| list)
    }

    /// Whether a class has entries of its own.
    pub fn contains_key(&self, key: &VerdictKey) -> bool {
        self.find(key).is_some()
    }

    /// All entries, each set's classes in order.
    pub fn iter(&self) -> impl Iterator<Item = (VerdictKey, &Arc<[Entry]>)> {
        self.of.iter().flat_map(|((set, direction), rows)| {
            rows.of.iter().filter_map(|(class, list)| {
                Some(((*set, *direction, *class), &rows.lists[*list as usize].as_ref()?.0))
            })
        })
    }

    /// How many classes have entries, summed over sets and directions.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// How many entries there are: what a map of the kernel has to hold.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Classes that have entries in a set.
    pub(crate) fn classes(&self, set: SetId, direction: Direction) -> impl Iterator<Item = ClassId> {
        self.of.get(&(set, direction)).into_iter().flat_map(|rows| rows.of.iter().map(|(class, _)| *class))
    }

    /// A number that classes with the same entries in this set have in common.
    pub(crate) fn list(&self, key: &VerdictKey) -> Option<u32> {
        self.find(key).map(|(_, list)| list)
    }

    fn find(&self, (set, direction, class): &VerdictKey) -> Option<(&Rows, u32)> {
        let rows = self.of.get(&(*set, *direction))?;
        let i = rows.of.binary_search_by_key(class, |(class, _)| *class).ok()?;
        Some((rows, rows.of[i].1))
    }
}

impl Rows {
    fn acquire(&mut self, list: Arc<[Entry]>) -> u32 {
        if let Some(id) = self.ids.get(&list) {
            if let Some((_, users)) = &mut self.lists[*id as usize] {
                *users += 1;
            }
            return *id;
        }
        let free = if self.ids.len() < self.lists.len() {
            self.lists.iter().position(Option::is_none)
        } else {
            None
        };
        let at = free.unwrap_or(self.lists.len());
        let id = u32::try_from(at).expect("memory ends before 2^32 lists do");
        self.ids.insert(Arc::clone(&list), id);
        match free {
            Some(at) => self.lists[at] = Some((list, 1)),
            None => self.lists.push(Some((list, 1))),
        }
        id
    }

    /// Gives a list back; how many entries it has.
    fn release(&mut self, id: u32) -> usize {
        let Some((list, users)) = &mut self.lists[id as usize] else { return 0 };
        let len = list.len();
        *users -= 1;
        if *users == 0 {
            self.ids.remove(list);
            self.lists[id as usize] = None;
        }
        len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Verdict;

    #[test]
    fn lists_are_shared_counted_and_forgotten() {
        let list = |ports: &[u16]| -> Arc<[Entry]> {
            ports
                .iter()
                .map(|port| Entry { protocol: 6, port: *port, bits: 16, verdict: Verdict::default() })
                .collect()
        };
        let key = |class| (SetId(1), Direction::Ingress, ClassId(class));
        let mut verdicts = Verdicts::default();
        for (class, ports) in [(3, &[80][..]), (1, &[80]), (2, &[80, 81]), (3, &[81]), (3, &[81])] {
            verdicts.set(key(class), Some(list(ports)));
        }
        assert_eq!((verdicts.len(), verdicts.entries()), (3, 4));
        assert_eq!(
            verdicts.classes(SetId(1), Direction::Ingress).collect::<Vec<_>>(),
            [1, 2, 3].map(ClassId)
        );
        assert_eq!(verdicts.get(&key(3)), Some(&list(&[81])));
        assert_ne!(verdicts.list(&key(1)), verdicts.list(&key(2)));
        verdicts.set(key(2), None);
        verdicts.set(key(2), None);
        verdicts.set(key(2), Some(list(&[81])));
        assert_eq!(verdicts.list(&key(2)), verdicts.list(&key(3)));
        assert_eq!((verdicts.len(), verdicts.entries(), verdicts.iter().count()), (3, 3, 3));
        (1..4).for_each(|class| verdicts.set(key(class), None));
        assert!(verdicts.is_empty() && verdicts.of.is_empty() && verdicts.entries() == 0);
    }
}
