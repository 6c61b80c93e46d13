//! Numbers of services: dense, and not used again at once.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use crate::table::{Family, Protocol, SERVICE_ID_REST, ServiceId, ServiceMeta};

/// What a number stands for, across restarts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Name {
    namespace: Arc<str>,
    name: Arc<str>,
    port: Arc<str>,
    protocol: Protocol,
    family: Family,
}

impl From<&ServiceMeta> for Name {
    fn from(meta: &ServiceMeta) -> Self {
        Self {
            namespace: Arc::clone(&meta.namespace),
            name: Arc::clone(&meta.name),
            port: Arc::clone(&meta.port_name),
            protocol: meta.protocol,
            family: meta.family,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Ids {
    /// The lowest number never used.
    next: u32,
    /// Freed numbers, with how many allocations there had been by then.
    freed: VecDeque<(ServiceId, u64)>,
    allocations: u64,
    /// Numbers from before a restart, kept for whom they belonged to.
    adopted: HashMap<Name, ServiceId>,
}

impl Ids {
    /// Keeps a number for whom it belonged to. Must come before the first allocation.
    pub(crate) fn adopt(&mut self, known: &[(ServiceId, &ServiceMeta)]) {
        let mut taken: Vec<bool> = Vec::new();
        for (id, meta) in known {
            let index = id.0 as usize;
            if taken.len() <= index {
                taken.resize(index + 1, false);
            }
            if !taken[index] && !self.adopted.contains_key(&Name::from(*meta)) {
                taken[index] = true;
                self.adopted.insert(Name::from(*meta), *id);
            }
        }
        self.next = taken.len() as u32;
        let gaps = taken.iter().enumerate().filter(|(_, taken)| !**taken);
        self.freed.extend(gaps.map(|(i, _)| (ServiceId(i as u32), 0)));
    }

    /// Frees the adopted numbers that nobody came for.
    pub(crate) fn release_adopted(&mut self) {
        let mut left: Vec<ServiceId> = self.adopted.drain().map(|(_, id)| id).collect();
        left.sort();
        left.into_iter().for_each(|id| self.free(id));
    }

    pub(crate) fn allocate(&mut self, meta: &ServiceMeta) -> ServiceId {
        self.allocations += 1;
        if let Some(id) = self.adopted.remove(&Name::from(meta)) {
            return id;
        }
        let rested = self.freed.front().is_some_and(|(_, at)| self.allocations - at > SERVICE_ID_REST as u64);
        match rested.then(|| self.freed.pop_front()).flatten() {
            Some((id, _)) => id,
            None => {
                self.next += 1;
                ServiceId(self.next - 1)
            }
        }
    }

    pub(crate) fn free(&mut self, id: ServiceId) {
        self.freed.push_back((id, self.allocations));
    }
}
