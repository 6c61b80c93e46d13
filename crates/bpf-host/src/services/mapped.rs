//! Arrays of the kernel mapped into this process: changed by single stores, without a system call each.

#![expect(unsafe_code, reason = "memory that the kernel programs read at the same time")]

use std::{
    num::NonZeroUsize,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use aya::maps::{Map, MapData};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::{Error, Result};

/// An array map (`BPF_F_MMAPABLE`) as words.
pub(super) struct MappedArray {
    base: NonNull<u64>,
    /// Words of 64 bits.
    words: usize,
    /// Keeps the map.
    _map: MapData,
}

// SAFETY: the memory is shared with the kernel anyway; all access is by atomic operations. Needed because the
// compiler takes a pointer for something that belongs to one thread.
unsafe impl Send for MappedArray {}
// SAFETY: as above.
unsafe impl Sync for MappedArray {}

impl MappedArray {
    /// Maps `entries` elements of `words_each` words.
    pub(super) fn new(map: Map, name: &'static str, entries: u32, words_each: usize) -> Result<Self> {
        let Map::Array(data) = map else { return Err(Error::Missing { what: "array", name }) };
        let words = entries as usize * words_each;
        let length = NonZeroUsize::new(words * 8).ok_or(Error::Missing { what: "array", name })?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice. The kernel refuses a length beyond the
        // map's, so every word below `words` is there. Needed because there is no other way to map memory.
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, data.fd(), 0) }
            .map_err(|e| Error::load(&format!("map {name} (into memory)"), e))?;
        Ok(Self { base: base.cast(), words, _map: data })
    }

    /// Number of words.
    pub(super) const fn len(&self) -> usize {
        self.words
    }

    /// One word; beyond the end it is 0.
    pub(super) fn load(&self, index: usize) -> u64 {
        self.word(index).map_or(0, |w| w.load(Ordering::Acquire))
    }

    /// Stores one word; whoever sees it sees everything that was stored before.
    pub(super) fn store(&self, index: usize, value: u64) {
        if let Some(word) = self.word(index) {
            word.store(value, Ordering::Release);
        }
    }

    /// Half a word: index counts halves, the lower one first.
    pub(super) fn load_half(&self, index: usize) -> u32 {
        self.half(index).map_or(0, |w| w.load(Ordering::Acquire))
    }

    /// Stores half a word.
    pub(super) fn store_half(&self, index: usize, value: u32) {
        if let Some(half) = self.half(index) {
            half.store(value, Ordering::Release);
        }
    }

    fn word(&self, index: usize) -> Option<&AtomicU64> {
        if index >= self.words {
            return None;
        }
        // SAFETY: within the mapping, which lives as long as `self`, and on its boundary because the mapping starts
        // at a page. Shared with the kernel, hence atomic.
        Some(unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(index)) })
    }

    fn half(&self, index: usize) -> Option<&AtomicU32> {
        if index / 2 >= self.words {
            return None;
        }
        // SAFETY: as in `word`. The kernel's view of the lower half of a word is the first one on the little-endian
        // machines that the kernel object is built for.
        Some(unsafe { AtomicU32::from_ptr(self.base.as_ptr().cast::<u32>().add(index)) })
    }
}

impl Drop for MappedArray {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length and nothing borrows from it any more.
        let _ = unsafe { munmap(self.base.cast(), self.words * 8) };
    }
}
