//! A writer's copy of the table.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use podway_services::table::{Backend, Frontend, FrontendKey, ServiceId, ServiceMeta, SetId, TableChange};

/// The whole service table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceTable {
    /// By address, port and protocol.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Backend sets that are in use.
    pub sets: BTreeMap<SetId, Arc<[Backend]>>,
    /// Which object each number is.
    pub services: BTreeMap<ServiceId, ServiceMeta>,
    /// Addresses that belong to services alone.
    pub vips: BTreeSet<IpAddr>,
}

impl ServiceTable {
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
}
