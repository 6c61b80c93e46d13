//! The address allocator: a pure state machine. Time is an argument (milliseconds since boot), I/O is elsewhere.
//!
//! An address is in one of four states: *leased*; *resting* (freed less than [`REST_MS`] ago, so that no other
//! node still takes it for the pod that had it); *freed* (rested, and reused in the order of freeing); *fresh*
//! (never used, as far as is known). Fresh addresses are given out before freed ones, in the order of the prefix
//! and starting after the highest one that is known to have been used: least recently used first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use podway_cni::RuntimeConfig;
use serde::{Deserialize, Serialize};

use super::journal::Record;
use crate::ids::AttachmentId;

/// How long a freed address rests.
pub const REST_MS: u64 = 30_000;

/// Addresses used of one podCIDR. Bounds the memory for freed addresses (an IPv6 /64 would have no end); no
/// node runs that many pods.
pub const USABLE_MAX: u64 = 16_384;

/// Addresses that an attachment holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Who holds them.
    pub id: AttachmentId,
    /// At most one of each family, in the order of the podCIDRs.
    pub addresses: Vec<IpAddr>,
    /// For what.
    pub owner: Owner,
    /// When it began.
    pub at: u64,
}

/// What the runtime said about an attachment beyond its name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// `namespace/name` of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Name of the CNI network: what a GC is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Host ports and limits.
    #[serde(default, skip_serializing_if = "RuntimeConfig::is_empty")]
    pub runtime: RuntimeConfig,
}

/// Another attachment holds an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("address {address} of {claimant} is held by {holder}")]
pub struct Conflict {
    /// The address in question.
    pub address: IpAddr,
    /// Who wants it.
    pub claimant: AttachmentId,
    /// Who has it.
    pub holder: AttachmentId,
}

/// How full a podCIDR is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// The podCIDR.
    pub cidr: IpNet,
    /// Addresses that can be leased.
    pub usable: u64,
    /// Addresses that are leased.
    pub leased: u64,
    /// Addresses that were freed less than [`REST_MS`] ago.
    pub resting: u64,
}

/// No address of a family is free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exhausted {
    /// Each podCIDR of that family; empty when the node has no podCIDR at all.
    pub usage: Vec<Usage>,
    /// Milliseconds until the next address has rested, when one is resting.
    pub retry_in: Option<u64>,
}

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.usage.is_empty() {
            return f.write_str("this node has no podCIDR to take addresses from");
        }
        f.write_str("no free pod address:")?;
        for (i, u) in self.usage.iter().enumerate() {
            let comma = if i == 0 { "" } else { ";" };
            write!(f, "{comma} {}: {} of {} in use, {} resting", u.cidr, u.leased, u.usable, u.resting)?;
        }
        match self.retry_in {
            Some(ms) => write!(f, "; the next one is free in {} s", ms.div_ceil(1000)),
            None => f.write_str("; delete pods or give the node a larger podCIDR"),
        }
    }
}

impl std::error::Error for Exhausted {}

#[derive(Debug, Clone)]
struct Range {
    cidr: IpNet,
    /// First usable address as a number.
    first: u128,
    usable: u64,
    /// Offset where the search for a fresh address goes on.
    next: u64,
    /// While the history is distrusted, fresh addresses below this offset may have been freed a moment ago.
    trusted_from: u64,
}

/// All addresses of a node.
#[derive(Debug, Default)]
pub struct Pool {
    ranges: Vec<Range>,
    leases: BTreeMap<AttachmentId, Lease>,
    holders: HashMap<IpAddr, AttachmentId>,
    /// Freed addresses by time of freeing; the number keeps those of one moment in order.
    freed: BTreeSet<(u64, u64, IpAddr)>,
    freed_at: HashMap<IpAddr, (u64, u64)>,
    sequence: u64,
    /// Set when the history is incomplete: until then, fresh addresses are taken well ahead of the highest
    /// known one only. Addresses are given out in order, so the ones that were freed a moment ago and of which
    /// nothing is known any more are behind it or right after it.
    distrust_until: u64,
    /// How often something of the history was lost. Each time another part of the range is used, so that what
    /// was given out after the last loss and is lost now does not come again at once.
    losses: u32,
}

impl Pool {
    /// An empty pool without ranges.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// See [`super::Leases::set_ranges`].
    pub fn set_ranges(&mut self, cidrs: &[IpNet]) {
        let mut ranges = Vec::with_capacity(cidrs.len());
        for cidr in cidrs {
            let cidr = cidr.trunc();
            if let Some(known) = self.ranges.iter().find(|r| r.cidr == cidr) {
                ranges.push(known.clone());
                continue;
            }
            let mut range = Range::new(cidr);
            let used = self.holders.keys().chain(self.freed_at.keys());
            range.next = used.filter_map(|a| range.offset(*a)).max().map_or(0, |highest| highest + 1);
            range.trusted_from = range.margin(self.losses);
            ranges.push(range);
        }
        self.ranges = ranges;
        // Addresses of a prefix that the node no longer has are of no more interest; nor is their order.
        let gone: Vec<IpAddr> = self
            .freed_at
            .keys()
            .copied()
            .filter(|a| !self.ranges.is_empty() && !self.ranges.iter().any(|r| r.offset(*a).is_some()))
            .collect();
        for address in gone {
            self.forget_freed(address);
        }
    }

    /// See [`super::Leases::allocate`].
    ///
    /// # Errors
    /// See there.
    pub fn allocate(&mut self, id: &AttachmentId, owner: &Owner, now: u64) -> Result<Lease, Exhausted> {
        if let Some(lease) = self.leases.get(id) {
            return Ok(lease.clone());
        }
        if self.ranges.is_empty() {
            return Err(Exhausted { usage: Vec::new(), retry_in: None });
        }
        let mut addresses: Vec<IpAddr> = Vec::with_capacity(2);
        let mut families: Vec<bool> = Vec::with_capacity(2);
        for range in &self.ranges {
            let v4 = matches!(range.cidr, IpNet::V4(_));
            if !families.contains(&v4) {
                families.push(v4);
            }
        }
        for v4 in families {
            let address = self.find(v4, now).ok_or_else(|| self.exhausted(v4, now))?;
            addresses.push(address);
        }
        for address in &addresses {
            self.forget_freed(*address);
            self.holders.insert(*address, id.clone());
            for range in &mut self.ranges {
                if let Some(offset) = range.offset(*address) {
                    range.next = offset + 1;
                }
            }
        }
        let lease = Lease { id: id.clone(), addresses, owner: owner.clone(), at: now };
        self.leases.insert(id.clone(), lease.clone());
        Ok(lease)
    }

    /// See [`super::Leases::release`].
    pub fn release(&mut self, id: &AttachmentId, now: u64) -> Option<Lease> {
        let lease = self.leases.remove(id)?;
        for address in &lease.addresses {
            self.holders.remove(address);
            self.free(*address, now);
        }
        Some(lease)
    }

    /// See [`super::Leases::adopt`].
    ///
    /// # Errors
    /// See there.
    pub fn adopt(&mut self, lease: &Lease) -> Result<bool, Conflict> {
        for address in &lease.addresses {
            if let Some(holder) = self.holders.get(address)
                && *holder != lease.id
            {
                return Err(Conflict {
                    address: *address,
                    claimant: lease.id.clone(),
                    holder: holder.clone(),
                });
            }
        }
        if let Some(known) = self.leases.get(&lease.id) {
            if known.addresses == lease.addresses {
                return Ok(false);
            }
            // The kernel is right about what is attached; what the file thought of is free after a rest.
            let before = known.addresses.clone();
            for address in before.into_iter().filter(|a| !lease.addresses.contains(a)) {
                self.holders.remove(&address);
                self.free(address, lease.at);
            }
        }
        for address in &lease.addresses {
            self.forget_freed(*address);
            self.holders.insert(*address, lease.id.clone());
            for range in &mut self.ranges {
                if let Some(offset) = range.offset(*address) {
                    range.next = range.next.max(offset + 1);
                    range.trusted_from = range.trusted_from.max(range.margin(self.losses));
                }
            }
        }
        self.leases.insert(lease.id.clone(), lease.clone());
        Ok(true)
    }

    /// Applies a record of the journal. Times from the future (a clock that restarted) count as `now`.
    pub fn replay(&mut self, record: Record, now: u64) {
        match record {
            Record::Lease { id, addresses, owner, at } => {
                self.release(&id, at.min(now));
                // A later record wins: an earlier holder's release was lost.
                for address in &addresses {
                    if let Some(holder) = self.holders.get(address).cloned() {
                        self.release(&holder, at.min(now));
                    }
                    self.forget_freed(*address);
                    self.holders.insert(*address, id.clone());
                }
                self.leases.insert(id.clone(), Lease { id, addresses, owner, at: at.min(now) });
            }
            Record::Free { id, addresses, at } => {
                self.release(&id, at.min(now));
                for address in addresses {
                    if !self.holders.contains_key(&address) {
                        self.free(address, at.min(now));
                    }
                }
            }
            Record::Distrust { at, losses } => {
                self.distrust_until = at.min(now) + REST_MS;
                self.losses = losses;
            }
            Record::Rest { address, at } => {
                if !self.holders.contains_key(&address) {
                    self.free(address, at.min(now));
                }
            }
        }
    }

    /// Says that the history is incomplete: what looks free may have been freed a moment ago, and rests from
    /// now as far as that can be without refusing pods. `damaged` says that there was a history; without one,
    /// and with nothing attached, this is a new node with nothing to distrust.
    pub fn distrust(&mut self, damaged: bool, now: u64) {
        self.distrust_until = now + REST_MS;
        if damaged {
            self.losses = self.losses.saturating_add(1);
        }
        for (_, sequence, address) in std::mem::take(&mut self.freed) {
            self.freed.insert((now, sequence, address));
            self.freed_at.insert(address, (now, sequence));
        }
    }

    fn free(&mut self, address: IpAddr, at: u64) {
        self.forget_freed(address);
        self.sequence += 1;
        self.freed.insert((at, self.sequence, address));
        self.freed_at.insert(address, (at, self.sequence));
        // Freed addresses of prefixes that are not known (yet) are bounded as well.
        let limit = usize::try_from(USABLE_MAX).unwrap_or(usize::MAX) * self.ranges.len().max(2);
        while self.freed.len() > limit {
            if let Some((_, _, oldest)) = self.freed.pop_first() {
                self.freed_at.remove(&oldest);
            }
        }
    }

    fn forget_freed(&mut self, address: IpAddr) {
        if let Some((at, sequence)) = self.freed_at.remove(&address) {
            self.freed.remove(&(at, sequence, address));
        }
    }

    fn find(&self, v4: bool, now: u64) -> Option<IpAddr> {
        let ranges = || self.ranges.iter().filter(move |r| matches!(r.cidr, IpNet::V4(_)) == v4);
        if let Some(fresh) = ranges().find_map(|range| self.fresh(range, now)) {
            return Some(fresh);
        }
        self.freed
            .iter()
            .take_while(|(at, _, _)| at.saturating_add(REST_MS) <= now)
            .map(|(_, _, address)| *address)
            .find(|address| ranges().any(|r| r.offset(*address).is_some()))
    }

    fn fresh(&self, range: &Range, now: u64) -> Option<IpAddr> {
        let known = |a: &&IpAddr| range.offset(**a).is_some();
        let used = self.holders.keys().filter(known).count() + self.freed_at.keys().filter(known).count();
        if used as u64 >= range.usable {
            return None;
        }
        let is_fresh = |offset: &u64| {
            let address = range.address(*offset);
            !self.holders.contains_key(&address) && !self.freed_at.contains_key(&address)
        };
        let offset = if now < self.distrust_until {
            (range.next.max(range.trusted_from)..range.usable).find(is_fresh)?
        } else {
            let ahead = (range.next..range.usable).find(is_fresh);
            ahead.or_else(|| (0..range.next.min(range.usable)).find(is_fresh))?
        };
        Some(range.address(offset))
    }

    fn exhausted(&self, v4: bool, now: u64) -> Exhausted {
        let usage: Vec<Usage> =
            self.usage(now).into_iter().filter(|u| matches!(u.cidr, IpNet::V4(_)) == v4).collect();
        let freed = self.freed.iter().find(|(_, _, a)| usage.iter().any(|u| u.cidr.contains(a)));
        let mut retry_in = freed.map(|(at, _, _)| (at + REST_MS).saturating_sub(now));
        if now < self.distrust_until && usage.iter().any(|u| u.leased + u.resting < u.usable) {
            let distrust = self.distrust_until - now;
            retry_in = Some(retry_in.map_or(distrust, |r| r.min(distrust)));
        }
        Exhausted { usage, retry_in }
    }

    /// The lease of an attachment.
    #[must_use]
    pub fn lease(&self, id: &AttachmentId) -> Option<&Lease> {
        self.leases.get(id)
    }

    /// All leases.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values()
    }

    /// Who holds an address.
    #[must_use]
    pub fn holder(&self, address: IpAddr) -> Option<&AttachmentId> {
        self.holders.get(&address)
    }

    /// How full each podCIDR is.
    #[must_use]
    pub fn usage(&self, now: u64) -> Vec<Usage> {
        let count = |range: &Range| {
            let leased = self.holders.keys().filter(|a| range.offset(**a).is_some()).count() as u64;
            let resting = self
                .freed
                .iter()
                .rev()
                .take_while(|(at, _, _)| at.saturating_add(REST_MS) > now)
                .filter(|(_, _, a)| range.offset(*a).is_some())
                .count() as u64;
            Usage { cidr: range.cidr, usable: range.usable, leased, resting }
        };
        self.ranges.iter().map(count).collect()
    }

    /// The records that rebuild this pool: what a compacted journal holds.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        let resting = self.freed.iter().map(|(at, _, address)| Record::Rest { address: *address, at: *at });
        // Only a restart within the rest needs to know; later it does no harm.
        let at = self.distrust_until.saturating_sub(REST_MS);
        let distrust = (self.losses > 0).then_some(Record::Distrust { at, losses: self.losses });
        distrust.into_iter().chain(resting).chain(self.leases.values().map(Record::from))
    }
}

impl Range {
    fn new(cidr: IpNet) -> Self {
        let (network, host_bits) = match cidr {
            IpNet::V4(net) => (u128::from(u32::from(net.network())), 32 - net.prefix_len()),
            IpNet::V6(net) => (u128::from(net.network()), 128 - net.prefix_len()),
        };
        let size = if host_bits >= 64 { u64::MAX } else { 1u64 << host_bits };
        let (skip_first, skip_last) = match cidr {
            // RFC 3021: a /31 has no network and broadcast address.
            IpNet::V4(_) if host_bits <= 1 => (0, 0),
            IpNet::V4(_) => (1, 1),
            IpNet::V6(_) if host_bits <= 1 => (0, 0),
            // RFC 4291 section 2.6.1: the first address is the subnet-router anycast address.
            IpNet::V6(_) => (1, 0),
        };
        let usable = (size - skip_first - skip_last).min(USABLE_MAX);
        Self { cidr, first: network + u128::from(skip_first), usable, next: 0, trusted_from: 0 }
    }

    /// One, two or three quarters of the range past the highest known address; the start of a range that was
    /// never used.
    fn margin(&self, losses: u32) -> u64 {
        if self.next == 0 && losses == 0 {
            return 0;
        }
        let quarters = u64::from(losses.saturating_sub(1) % 3 + 1);
        self.next + self.usable / 4 * quarters
    }

    fn address(&self, offset: u64) -> IpAddr {
        let number = self.first + u128::from(offset);
        match self.cidr {
            // The range lies in the prefix, so the number fits.
            IpNet::V4(_) => Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into(),
            IpNet::V6(_) => Ipv6Addr::from(number).into(),
        }
    }

    /// Offset of an address, if it is one of the usable ones.
    fn offset(&self, address: IpAddr) -> Option<u64> {
        let number = match (address, self.cidr) {
            (IpAddr::V4(a), IpNet::V4(_)) => u128::from(u32::from(a)),
            (IpAddr::V6(a), IpNet::V6(_)) => u128::from(a),
            _ => return None,
        };
        let offset = u64::try_from(number.checked_sub(self.first)?).ok()?;
        (offset < self.usable).then_some(offset)
    }
}
