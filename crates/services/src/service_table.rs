//! The table as a value: changes applied, two tables compared, its invariant checked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use crate::table::{
    Backend, Frontend, FrontendKey, Origin, ServiceId, ServiceMeta, SetId, SetKind, TableChange, Target,
};

/// Everything that a writer programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceTable {
    /// Where services answer.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Who answers: sorted by (address, port), never empty.
    pub sets: BTreeMap<SetId, Arc<[Backend]>>,
    /// The services behind the numbers.
    pub services: BTreeMap<ServiceId, ServiceMeta>,
    /// Addresses of services alone: other ports are rejected.
    pub vips: BTreeSet<IpAddr>,
}

impl ServiceTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// The changes that lead from one table to another. Every prefix of them keeps what [`TableChange`] promises.
    pub fn diff(old: &Self, new: &Self) -> Vec<TableChange> {
        let mut batch = Batch::default();
        for (id, meta) in &new.services {
            batch.services.insert(*id, Some(meta.clone()));
        }
        for id in old.services.keys().filter(|id| !new.services.contains_key(id)) {
            batch.services.insert(*id, None);
        }
        for (id, set) in &new.sets {
            batch.sets.insert(*id, Some(Arc::clone(set)));
        }
        for id in old.sets.keys().filter(|id| !new.sets.contains_key(id)) {
            batch.sets.insert(*id, None);
        }
        for (key, frontend) in &new.frontends {
            batch.frontends.insert(*key, Some(frontend.clone()));
        }
        for key in old.frontends.keys().filter(|key| !new.frontends.contains_key(key)) {
            batch.frontends.insert(*key, None);
        }
        batch.vips.extend(new.vips.iter().map(|vip| (*vip, true)));
        batch.vips.extend(old.vips.difference(&new.vips).map(|vip| (*vip, false)));
        batch.changes(old)
    }

    /// Takes one step.
    pub fn apply(&mut self, change: &TableChange) {
        match change {
            TableChange::Service(id, meta) => {
                self.services.insert(*id, meta.clone());
            }
            TableChange::ServiceGone(id) => {
                self.services.remove(id);
            }
            TableChange::Set(id, Some(backends)) => {
                self.sets.insert(*id, Arc::clone(backends));
            }
            TableChange::Set(id, None) => {
                self.sets.remove(id);
            }
            TableChange::Frontend(key, frontend) => {
                self.frontends.insert(*key, frontend.clone());
            }
            TableChange::FrontendGone(key) => {
                self.frontends.remove(key);
            }
            TableChange::Vip(addr) => {
                self.vips.insert(*addr);
            }
            TableChange::VipGone(addr) => {
                self.vips.remove(addr);
            }
        }
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.sets.is_empty() && self.services.is_empty() && self.vips.is_empty()
    }

    /// The backends of a set; empty when there is none.
    pub fn set(&self, service: ServiceId, kind: SetKind) -> &[Backend] {
        self.sets.get(&SetId { service, kind }).map_or(&[], |set| set)
    }

    /// What is wrong with the table by itself; empty for every table that [`TableChange`] allows.
    pub fn violations(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (key, frontend) in &self.frontends {
            if !self.services.contains_key(&frontend.service) {
                wrong.push(format!("{key:?} names {:?}, which does not exist", frontend.service));
            }
            for origin in Origin::ALL {
                if let Target::Set(kind) = frontend.route(origin).target
                    && self.set(frontend.service, kind).is_empty()
                {
                    wrong.push(format!("{key:?} sends {origin:?} to an empty set {kind:?}"));
                }
            }
        }
        for (id, set) in &self.sets {
            if !self.services.contains_key(&id.service) {
                wrong.push(format!("{id:?} is of a service that does not exist"));
            }
            if set.is_empty() {
                wrong.push(format!("{id:?} is empty"));
            }
            if !set.is_sorted_by(|a, b| (a.addr, a.port) < (b.addr, b.port)) {
                wrong.push(format!("{id:?} is not sorted or has duplicates"));
            }
        }
        wrong
    }
}

/// What a step leads to, by key: `None` is gone.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) services: BTreeMap<ServiceId, Option<ServiceMeta>>,
    pub(crate) sets: BTreeMap<SetId, Option<Arc<[Backend]>>>,
    pub(crate) frontends: BTreeMap<FrontendKey, Option<Frontend>>,
    pub(crate) vips: BTreeMap<IpAddr, bool>,
}

impl Batch {
    /// The changes from `table`, in an order that keeps the invariant: what is pointed at comes before and goes
    /// after what points at it. What is there already is left out.
    pub(crate) fn changes(self, table: &ServiceTable) -> Vec<TableChange> {
        let mut changes = Vec::new();
        let mut last = Vec::new();
        for (id, meta) in self.services {
            match meta {
                Some(meta) if table.services.get(&id) == Some(&meta) => {}
                Some(meta) => changes.push(TableChange::Service(id, meta)),
                None if table.services.contains_key(&id) => last.push(TableChange::ServiceGone(id)),
                None => {}
            }
        }
        let mut sets_gone = Vec::new();
        for (id, set) in self.sets {
            match set {
                Some(set) if table.sets.get(&id) == Some(&set) => {}
                Some(set) => changes.push(TableChange::Set(id, Some(set))),
                None if table.sets.contains_key(&id) => sets_gone.push(TableChange::Set(id, None)),
                None => {}
            }
        }
        for (key, frontend) in self.frontends {
            match frontend {
                Some(frontend) if table.frontends.get(&key) == Some(&frontend) => {}
                Some(frontend) => changes.push(TableChange::Frontend(key, frontend)),
                None if table.frontends.contains_key(&key) => changes.push(TableChange::FrontendGone(key)),
                None => {}
            }
        }
        for (addr, used) in self.vips {
            match (used, table.vips.contains(&addr)) {
                (true, false) => changes.push(TableChange::Vip(addr)),
                (false, true) => changes.push(TableChange::VipGone(addr)),
                _ => {}
            }
        }
        changes.extend(sets_gone);
        changes.extend(last);
        changes
    }
}
