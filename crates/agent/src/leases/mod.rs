//! Which pod interface holds which address, remembered across crashes.
//!
//! - [`pool`]: the allocator, a pure state machine: addresses from the node's podCIDRs, least recently used
//!   first, a freed one rests [`pool::REST_MS`] before it is given out again.
//! - [`journal`]: the append-only file behind it.
//! - [`Leases`]: both together, as the rest of the agent uses them.
//!
//! What is attached is the kernel's to know; the file remembers what the kernel cannot: which addresses rest
//! and for which pod an address was leased. So the file may be lost, torn or impossible to write (a full
//! disk), and attaching goes on; see [`crate::adoption`] for how the two are brought together at a start.
//!
//! May touch one file in the run directory. Never the kernel's network configuration.

pub mod journal;
pub mod pool;

use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use tracing::{info, warn};

use crate::ids::AttachmentId;
use journal::{Journal, Record};
use pool::{Exhausted, Lease, Owner, Pool, Usage};

/// The pool and its journal.
#[derive(Debug)]
pub struct Leases {
    pool: Pool,
    journal: Journal,
}

impl Leases {
    /// Reads the journal, as far as it can be read, and takes it on from there.
    ///
    /// `boot` identifies the boot of the machine: addresses that were leased in an earlier one are free, because
    /// no link outlives the kernel. `now` is milliseconds since boot.
    #[must_use]
    pub fn open(path: &Path, boot: &str, now: u64) -> Self {
        let (journal, found) = Journal::open(path, boot);
        let mut pool = Pool::new();
        for record in found.records {
            pool.replay(record, now);
        }
        match found.damage {
            None => {}
            Some(journal::Damage::Missing) => {
                info!(path = %path.display(), "no address journal: starting one from what is attached");
                pool.distrust(false, now);
            }
            Some(journal::Damage::OtherBoot) => {
                info!(path = %path.display(), "the address journal is of an earlier boot: starting afresh");
            }
            Some(damage) => {
                warn!(path = %path.display(), %damage,
                    "the address journal is incomplete: rebuilding it from what is attached");
                pool.distrust(true, now);
            }
        }
        let mut leases = Self { pool, journal };
        leases.journal.compact(leases.pool.records());
        leases
    }

    /// Sets the prefixes that addresses come from. Leases from other prefixes stay until they are released.
    pub fn set_ranges(&mut self, cidrs: &[IpNet]) {
        self.pool.set_ranges(cidrs);
    }

    /// Leases one address of each family that the node has podCIDRs of. An attachment that has a lease gets the
    /// same addresses again.
    ///
    /// # Errors
    /// No address of a family is free; the error has the counts of each podCIDR.
    pub fn allocate(&mut self, id: &AttachmentId, owner: &Owner, now: u64) -> Result<Lease, Exhausted> {
        let lease = self.pool.allocate(id, owner, now)?;
        self.write(&Record::from(&lease));
        Ok(lease)
    }

    /// Ends a lease; its addresses start to rest. Returns it, or `None` when there was none.
    pub fn release(&mut self, id: &AttachmentId, now: u64) -> Option<Lease> {
        let lease = self.pool.release(id, now)?;
        self.write(&Record::Free { id: id.clone(), addresses: lease.addresses.clone(), at: now });
        Some(lease)
    }

    /// Takes over what the kernel shows as attached. Returns whether the journal did not know it.
    ///
    /// # Errors
    /// Another attachment holds one of the addresses.
    pub fn adopt(&mut self, lease: &Lease) -> Result<bool, pool::Conflict> {
        let new = self.pool.adopt(lease)?;
        if new {
            self.write(&Record::from(lease));
        }
        Ok(new)
    }

    /// Writes what a failure (a full disk, for example) kept out of the file. Called now and then.
    pub fn retry_journal(&mut self) {
        if self.journal.is_behind() {
            self.journal.compact(self.pool.records());
        }
    }

    fn write(&mut self, record: &Record) {
        self.journal.append(record);
        if self.journal.wants_compaction() || self.journal.may_retry() {
            self.journal.compact(self.pool.records());
        }
    }

    /// The lease of an attachment.
    #[must_use]
    pub fn lease(&self, id: &AttachmentId) -> Option<&Lease> {
        self.pool.lease(id)
    }

    /// All leases.
    pub fn iter(&self) -> impl Iterator<Item = &Lease> {
        self.pool.leases()
    }

    /// Which attachment holds an address.
    #[must_use]
    pub fn holder(&self, address: IpAddr) -> Option<&AttachmentId> {
        self.pool.holder(address)
    }

    /// How full each podCIDR is.
    #[must_use]
    pub fn usage(&self, now: u64) -> Vec<Usage> {
        self.pool.usage(now)
    }

    /// Whether the file lacks something that memory has.
    #[must_use]
    pub fn journal_is_behind(&self) -> bool {
        self.journal.is_behind()
    }
}

#[cfg(test)]
mod tests;
