//! The last records of a node, bounded by number and by bytes.
//!
//! Entries have consecutive numbers, by which a reader that follows knows where it is, and how many went by before it
//! came back.

use std::collections::VecDeque;

use crate::identity::Total;
use crate::names::UnixNanos;
use crate::record::Record;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries.
    pub entries: usize,
    /// Bytes, with what only the entries keep of names.
    pub bytes: usize,
}

impl Limits {
    /// About eight megabytes, or what three hundred new connections a second leave behind in a minute.
    pub const DEFAULT: Self = Self { entries: 32_768, bytes: 16 << 20 };
}

/// One entry.
#[derive(Clone, Debug)]
pub enum Entry {
    /// An event.
    Record(Record),
    /// Events were lost between kernel and agent, noticed at this time.
    Lost(UnixNanos, u64),
}

impl Entry {
    /// When.
    #[must_use]
    pub fn time(&self) -> UnixNanos {
        match self {
            Self::Record(record) => record.time,
            Self::Lost(time, _) => *time,
        }
    }
}

/// The entries.
#[derive(Debug)]
pub struct History {
    entries: VecDeque<Entry>,
    /// Number of the first of them.
    first: u64,
    limits: Limits,
    identities: Total,
}

impl History {
    /// An empty history. `identities` tells how much the names take that records refer to.
    #[must_use]
    pub fn new(limits: Limits, identities: Total) -> Self {
        Self { entries: VecDeque::new(), first: 0, limits, identities }
    }

    /// Adds an entry; the oldest ones give way.
    pub fn push(&mut self, entry: Entry) {
        if self.limits.entries == 0 {
            self.first += 1;
            return;
        }
        while self.entries.len() >= self.limits.entries {
            self.forget();
        }
        self.entries.push_back(entry);
    }

    /// Holds the history to its bytes, of which names that the directory holds anyway (`known`) are no part. Asked for
    /// after some entries, not after each.
    pub fn trim(&mut self, known: usize) {
        while !self.entries.is_empty() && self.bytes(known) > self.limits.bytes {
            self.forget();
        }
    }

    fn forget(&mut self) {
        if self.entries.pop_front().is_some() {
            self.first += 1;
        }
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn bytes(&self, known: usize) -> usize {
        self.entries.len() * size_of::<Entry>() + self.identities.bytes().saturating_sub(known)
    }

    /// How much is kept at most.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Number of the first entry that is there.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Number that the next entry will have.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Entries in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// At most `most` entries from number `from` on, with their numbers, and how many before them went by.
    pub fn read(&self, from: u64, most: usize) -> (u64, impl Iterator<Item = (u64, &Entry)>) {
        let missed = self.first.saturating_sub(from);
        let start = from.max(self.first);
        let skip = usize::try_from(start - self.first).unwrap_or(usize::MAX);
        let numbered = self.entries.iter().skip(skip).take(most).enumerate();
        (missed, numbered.map(move |(i, entry)| (start + i as u64, entry)))
    }

    /// The newest entries first, with their numbers.
    pub fn newest_first(&self) -> impl Iterator<Item = (u64, &Entry)> {
        let last = self.next();
        self.entries.iter().rev().enumerate().map(move |(i, entry)| (last - 1 - i as u64, entry))
    }
}

#[cfg(test)]
mod tests {
    use podway_model::Labels;

    use super::*;
    use crate::identity::{Identity, Kind};
    use crate::names::Names;
    use crate::record::Clock;

    fn lost(n: u64) -> Entry {
        Entry::Lost(i64::try_from(n).unwrap(), n)
    }

    fn numbers(history: &History, from: u64, most: usize) -> (u64, Vec<u64>) {
        let (missed, entries) = history.read(from, most);
        (missed, entries.map(|(n, _)| n).collect())
    }

    #[test]
    fn the_oldest_give_way_and_readers_know_what_they_missed() {
        let mut history = History::new(Limits { entries: 4, bytes: 1 << 20 }, Total::default());
        assert_eq!(numbers(&history, 0, 9), (0, vec![]));
        for n in 0..6 {
            history.push(lost(n));
        }
        assert_eq!((history.first(), history.next(), history.len()), (2, 6, 4));
        assert_eq!(numbers(&history, 0, 9), (2, vec![2, 3, 4, 5]));
        assert_eq!(numbers(&history, 3, 2), (0, vec![3, 4]));
        assert_eq!(numbers(&history, 6, 9), (0, vec![]));
        let newest: Vec<u64> = history.newest_first().map(|(n, _)| n).collect();
        assert_eq!(newest, [5, 4, 3, 2]);
        let mut none = History::new(Limits { entries: 0, bytes: 0 }, Total::default());
        none.push(lost(1));
        assert_eq!((none.len(), none.next()), (0, 1));
    }

    #[test]
    fn names_that_only_records_hold_count() {
        let total = Total::default();
        let names = Names::new();
        let mut history = History::new(Limits { entries: 1_000, bytes: 40_000 }, total.clone());
        for i in 0..100 {
            let labels: Labels = [("l".to_owned(), "v".repeat(1_000))].into();
            let pod = Identity::new(&total, Kind::Pod, ("x", &i.to_string()), labels, "");
            let event = podway_abi::events::Event { kind: 3, ..Default::default() };
            history.push(Entry::Record(Record::join(&event, Clock { offset: 0 }, &names, Some(&pod))));
            drop(pod);
            history.trim(0);
            assert!(history.bytes(0) <= 40_000);
        }
        assert!((10..40).contains(&history.len()), "{}", history.len());
        drop(history);
        assert_eq!(total.bytes(), 0);
    }
}
