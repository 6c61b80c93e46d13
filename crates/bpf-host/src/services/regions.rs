//! Regions of an array: a buddy allocator (Knowlton, 1965) whose state is user space's alone.
//!
//! A region can be handed out again at once: whoever reads it through a set that has just moved away finds slots of
//! another service there, sees that, and looks again.

use std::collections::BTreeSet;

/// A region: its first slot and its size, a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) base: u32,
    pub(super) capacity: u32,
}

/// The free parts of an array whose size is a power of two.
#[derive(Debug)]
pub(super) struct Regions {
    /// By order: regions of 2^order slots.
    free: Vec<BTreeSet<u32>>,
    used: u32,
}

impl Regions {
    /// All of an array is free. `size` is a power of two.
    pub(super) fn new(size: u32) -> Self {
        let order = size.ilog2() as usize;
        let mut free = vec![BTreeSet::new(); order + 1];
        free[order].insert(0);
        Self { free, used: 0 }
    }

    /// A region for at least `count` slots, or nothing when there is no room.
    pub(super) fn allocate(&mut self, count: u32) -> Option<Region> {
        let capacity = count.max(1).checked_next_power_of_two()?;
        let order = capacity.ilog2() as usize;
        let from = (order..self.free.len()).find(|o| !self.free[*o].is_empty())?;
        let base = self.free[from].pop_first()?;
        for half in (order..from).rev() {
            self.free[half].insert(base + (1 << half));
        }
        self.used += capacity;
        Some(Region { base, capacity })
    }

    /// Takes a region that is in use already: one that an agent before this one handed out. `None` when it is not
    /// free, or no region at all.
    pub(super) fn take(&mut self, base: u32, count: u32) -> Option<Region> {
        let capacity = count.max(1).checked_next_power_of_two()?;
        let order = capacity.ilog2() as usize;
        if !base.is_multiple_of(capacity) {
            return None;
        }
        let from = (order..self.free.len()).find(|o| self.free[*o].contains(&(base & !((1 << *o) - 1))))?;
        self.free[from].remove(&(base & !((1 << from) - 1)));
        for half in (order..from).rev() {
            // Of the two halves the one without the region stays free.
            self.free[half].insert((base & !((1 << half) - 1)) ^ (1 << half));
        }
        self.used += capacity;
        Some(Region { base, capacity })
    }

    /// Gives a region back.
    pub(super) fn release(&mut self, region: Region) {
        self.used -= region.capacity;
        let mut order = region.capacity.ilog2() as usize;
        let mut base = region.base;
        while order + 1 < self.free.len() && self.free[order].remove(&(base ^ (1 << order))) {
            base &= !(1 << order);
            order += 1;
        }
        self.free[order].insert(base);
    }

    /// Slots in regions that are handed out.
    pub(super) const fn used(&self) -> u32 {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_never_overlap_and_merge_again() {
        let mut regions = Regions::new(64);
        let mut held: Vec<Region> = Vec::new();
        // A fixed sequence that fragments: sizes 1 to 7, every third one given back.
        for step in 0..200u32 {
            if step % 3 == 2 && !held.is_empty() {
                let region = held.swap_remove((step as usize * 7) % held.len());
                regions.release(region);
            } else if let Some(region) = regions.allocate(step % 7 + 1) {
                assert_eq!(region.base % region.capacity, 0);
                assert!(region.capacity > step % 7);
                for other in &held {
                    let apart = region.base + region.capacity <= other.base
                        || other.base + other.capacity <= region.base;
                    assert!(apart, "{region:?} {other:?}");
                }
                held.push(region);
            }
            assert_eq!(regions.used(), held.iter().map(|r| r.capacity).sum::<u32>());
        }
        for region in held.drain(..) {
            regions.release(region);
        }
        assert_eq!(regions.allocate(64).unwrap(), Region { base: 0, capacity: 64 });
        assert!(regions.allocate(1).is_none());
    }

    #[test]
    fn what_is_in_use_is_taken_and_not_handed_out() {
        let mut regions = Regions::new(32);
        assert_eq!(regions.take(12, 3).unwrap(), Region { base: 12, capacity: 4 });
        assert!(regions.take(12, 3).is_none(), "taken twice");
        assert!(regions.take(8, 8).is_none(), "overlaps");
        assert!(regions.take(6, 4).is_none(), "lies across a boundary");
        assert!(regions.take(64, 1).is_none(), "beyond the end");
        let mut bases: Vec<u32> = std::iter::from_fn(|| regions.allocate(4)).map(|r| r.base).collect();
        bases.sort_unstable();
        assert_eq!(bases, [0, 4, 8, 16, 20, 24, 28]);
    }
}
