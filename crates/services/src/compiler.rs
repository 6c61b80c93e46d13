//! The incremental compiler: one object in, what changes in the table out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map},
    net::IpAddr,
    sync::Arc,
};

use podway_model::{EndpointSlice, Service, endpoint_slice::AddressType};

use crate::{
    claims::{Claim, Claims, Key, Owner},
    findings::Finding,
    ids::Ids,
    lower::{self, Context, HostPort, Lowered, NotHandled, UnitKey, handled},
    ranges::Ranges,
    select::Slices,
    service_table::{Batch, ServiceTable},
    table::{
        Backend, Family, Frontend, FrontendKey, NodeView, ServiceId, ServiceMeta, SetId, SetKind, TableChange,
    },
};

/// What one step leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Steps of the table, in the order in which they must be taken.
    pub table: Vec<TableChange>,
    /// What is newly wrong with objects.
    pub found: Vec<Finding>,
    /// What was wrong and is no more.
    pub cleared: Vec<Finding>,
    /// Namespace and name of the Services that were looked at again: their health checks and external addresses may
    /// differ ([`Compiler::health_check`], [`Compiler::external_addresses`]).
    pub services: Vec<(Arc<str>, Arc<str>)>,
}

impl Changes {
    /// Whether nothing happened.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty() && self.found.is_empty() && self.cleared.is_empty() && self.services.is_empty()
    }
}

/// What the compiler has done since it was made: the measure for "work in proportion to the change".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Objects compiled.
    pub compiled: u64,
    /// Endpoints looked at, once per port.
    pub endpoints: u64,
    /// Frontends set or released.
    pub frontends: u64,
}

/// One number, and the frontends that its owner asks for.
#[derive(Debug)]
struct UnitState {
    id: ServiceId,
    keys: Vec<FrontendKey>,
}

/// What an object came to when it was compiled last.
#[derive(Debug, Default)]
struct Compiled {
    units: BTreeMap<UnitKey, UnitState>,
    vips: BTreeSet<IpAddr>,
    findings: Vec<Finding>,
    off_range: BTreeSet<IpAddr>,
    local_ready: usize,
}

/// A Service and its slices, either of which may come first.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    pub(crate) service: Option<Service>,
    pub(crate) slices: Slices,
    compiled: Compiled,
}

impl Entry {
    pub(crate) fn local_ready(&self) -> usize {
        self.compiled.local_ready
    }

    /// What is wrong with the Service and its slices by themselves.
    pub(crate) fn findings(&self) -> &[Finding] {
        &self.compiled.findings
    }

    /// The number of a port in one family.
    pub(crate) fn id(&self, key: &UnitKey) -> Option<ServiceId> {
        self.compiled.units.get(key).map(|unit| unit.id)
    }

    /// The frontends that a port asks for in one family.
    pub(crate) fn keys(&self, key: &UnitKey) -> &[FrontendKey] {
        self.compiled.units.get(key).map_or(&[], |unit| &unit.keys)
    }
}

#[derive(Debug)]
struct HostEntry {
    port: HostPort,
    compiled: Compiled,
}

/// Services, EndpointSlices and host ports compiled to one [`ServiceTable`], object by object.
///
/// The order of objects does not matter: whatever it was, the table is the one that all of them come to, up to the
/// numbers of services.
#[derive(Debug, Default)]
pub struct Compiler {
    view: NodeView,
    pods: Ranges,
    pools: Ranges,
    pub(crate) services: HashMap<Key, Entry>,
    /// Which Service a slice is of, by the slice's namespace and name.
    slices: HashMap<Key, Key>,
    host_ports: HashMap<(Key, usize), HostEntry>,
    pub(crate) claims: Claims,
    vips: HashMap<IpAddr, u32>,
    /// Addresses of all nodes, how many nodes have each, and of which node they are.
    node_addresses: HashMap<IpAddr, u32>,
    nodes: HashMap<String, Vec<IpAddr>>,
    /// Endpoints outside of the ranges of pods, and which Services have them.
    off_range: HashMap<IpAddr, BTreeSet<Key>>,
    ids: Ids,
    table: ServiceTable,
    work: Work,
}

/// What a step changes, before it is compared with the table.
#[derive(Default)]
struct Step {
    batch: Batch,
    found: BTreeSet<Finding>,
    cleared: BTreeSet<Finding>,
    services: Vec<(Arc<str>, Arc<str>)>,
}

impl Step {
    fn findings(&mut self, before: Vec<Finding>, after: &[Finding]) {
        for finding in after.iter().filter(|f| !before.contains(f)) {
            if !self.cleared.remove(finding) {
                self.found.insert(finding.clone());
            }
        }
        for finding in before.into_iter().filter(|f| !after.contains(f)) {
            if !self.found.remove(&finding) {
                self.cleared.insert(finding);
            }
        }
    }
}

impl Compiler {
    /// An empty cluster as a node sees it.
    pub fn new(view: NodeView) -> Self {
        let (pods, pools) = (Ranges::new(&view.pod_cidrs), Ranges::new(&view.load_balancer_pools));
        Self { view, pods, pools, ..Self::default() }
    }

    /// Makes services that were in a table before a restart keep their numbers, when they come. To be called before
    /// any object is applied; when all are there, call [`Compiler::release_adopted`].
    pub fn adopt(&mut self, before: &ServiceTable) {
        self.ids.adopt(&before.services.iter().map(|(id, meta)| (*id, meta)).collect::<Vec<_>>());
    }

    /// Gives up the numbers of services that did not come back.
    pub fn release_adopted(&mut self) {
        self.ids.release_adopted();
    }

    /// Applies many objects at once, as after a list: each Service is compiled once.
    pub fn load<'a>(
        &mut self,
        services: impl IntoIterator<Item = &'a Service>,
        slices: impl IntoIterator<Item = &'a EndpointSlice>,
    ) -> Changes {
        let mut touched = BTreeSet::new();
        for service in services {
            touched.extend(self.store_service(service));
        }
        for slice in slices {
            touched.extend(self.store_slice(slice));
        }
        self.recompile(touched)
    }

    /// Adds or replaces a Service.
    pub fn apply_service(&mut self, service: &Service) -> Changes {
        let touched = self.store_service(service);
        self.recompile(touched)
    }

    /// Removes a Service. Its slices stay, for it may come back.
    pub fn remove_service(&mut self, namespace: &str, name: &str) -> Changes {
        let key = Key::new(namespace, name);
        let known = self.services.get_mut(&key).and_then(|entry| entry.service.take()).is_some();
        self.recompile(known.then_some(key))
    }

    /// Adds or replaces an EndpointSlice.
    pub fn apply_slice(&mut self, slice: &EndpointSlice) -> Changes {
        let touched = self.store_slice(slice);
        self.recompile(touched)
    }

    /// Removes an EndpointSlice.
    pub fn remove_slice(&mut self, namespace: &str, name: &str) -> Changes {
        let touched = self.drop_slice(&Key::new(namespace, name));
        self.recompile(touched)
    }

    /// Adds or replaces a host port of a pod on this node: the one of this index.
    pub fn set_host_port(&mut self, namespace: &str, pod: &str, index: usize, port: &HostPort) -> Changes {
        let key = (Key::new(namespace, pod), index);
        match self.host_ports.entry(key.clone()) {
            hash_map::Entry::Occupied(entry) if entry.get().port == *port => return Changes::default(),
            hash_map::Entry::Occupied(mut entry) => entry.get_mut().port = port.clone(),
            hash_map::Entry::Vacant(entry) => {
                entry.insert(HostEntry { port: port.clone(), compiled: Compiled::default() });
            }
        }
        let mut step = Step::default();
        self.compile_host_port(key, &mut step);
        self.finish(step)
    }

    /// Removes a host port.
    pub fn remove_host_port(&mut self, namespace: &str, pod: &str, index: usize) -> Changes {
        let key = (Key::new(namespace, pod), index);
        let Some(entry) = self.host_ports.remove(&key) else { return Changes::default() };
        let mut step = Step::default();
        self.replace(&Owner::HostPort(key.0, index), "", entry.compiled, Lowered::default(), &mut step);
        self.finish(step)
    }

    /// Changes what is known of the node itself. Everything that depends on it is compiled again.
    pub fn set_view(&mut self, view: NodeView) -> Changes {
        let (pods, pools) = (Ranges::new(&view.pod_cidrs), Ranges::new(&view.load_balancer_pools));
        let old = std::mem::replace(&mut self.view, view);
        let old_pods = std::mem::replace(&mut self.pods, pods);
        let old_pools = std::mem::replace(&mut self.pools, pools);
        let new = &self.view;
        let same_families = Family::ALL.iter().all(|f| old_pods.has(*f) == self.pods.has(*f));
        let same = old.name == new.name
            && old.zone == new.zone
            && old.addresses == new.addresses
            && old.masquerade_all == new.masquerade_all
            && old_pools == self.pools
            && same_families;
        let touched: BTreeSet<Key> = if !same || !self.pods.covers(&old_pods) {
            self.services.keys().cloned().collect()
        } else if self.pods == old_pods {
            BTreeSet::new()
        } else {
            // More ranges: only endpoints that were in none can be concerned.
            self.off_range.values().flatten().cloned().collect()
        };
        self.recompile(touched)
    }

    /// Sets the addresses of a node of the cluster (of this one, too): endpoints there are pods in the node's own
    /// network, and not strays.
    pub fn set_node(&mut self, name: &str, addresses: &[IpAddr]) -> Changes {
        if self.nodes.get(name).is_some_and(|known| known == addresses) {
            return Changes::default();
        }
        let mut touched = self.forget_node(name);
        for addr in addresses {
            let count = self.node_addresses.entry(*addr).or_insert(0);
            *count += 1;
            touched.extend(self.off_range.get(addr).into_iter().flatten().cloned());
        }
        self.nodes.insert(name.to_owned(), addresses.to_vec());
        self.recompile(touched)
    }

    /// Removes a node.
    pub fn remove_node(&mut self, name: &str) -> Changes {
        let touched = self.forget_node(name);
        self.recompile(touched)
    }

    /// The table as it is now.
    pub fn table(&self) -> &ServiceTable {
        &self.table
    }

    /// What is known of the node.
    pub fn view(&self) -> &NodeView {
        &self.view
    }

    /// What has been done so far.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Everything that is wrong at the moment, sorted.
    pub fn findings(&self) -> Vec<Finding> {
        let services = self.services.values().flat_map(|entry| &entry.compiled.findings);
        let host_ports = self.host_ports.values().flat_map(|entry| &entry.compiled.findings);
        let mut all: Vec<Finding> = services.chain(host_ports).cloned().collect();
        all.extend(self.claims.all_conflicts());
        all.sort();
        all.dedup();
        all
    }

    /// How many Services and EndpointSlices are known, whether handled or not.
    pub fn objects(&self) -> (usize, usize) {
        (self.services.values().filter(|entry| entry.service.is_some()).count(), self.slices.len())
    }

    /// Whether a Service is handled.
    ///
    /// # Errors
    /// Why it is not.
    pub fn handles(&self, namespace: &str, name: &str) -> Result<(), NotHandled> {
        let entry = self.services.get(&Key::new(namespace, name));
        handled(entry.and_then(|entry| entry.service.as_ref())).map(|_| ())
    }

    /// Keeps a Service; returns its key unless nothing is different.
    fn store_service(&mut self, service: &Service) -> Option<Key> {
        let key = Key::new(&service.namespace, &service.name);
        let entry = self.services.entry(key.clone()).or_default();
        if entry.service.as_ref() == Some(service) {
            return None;
        }
        entry.service = Some(service.clone());
        Some(key)
    }

    /// Keeps a slice; returns the Services that have gained or lost by it.
    fn store_slice(&mut self, slice: &EndpointSlice) -> Vec<Key> {
        let key = Key::new(&slice.namespace, &slice.name);
        let owner = slice.service.as_ref().map(|name| Key::new(&slice.namespace, name));
        let mut touched = Vec::new();
        if self.slices.get(&key) != owner.as_ref() {
            touched.extend(self.drop_slice(&key));
        }
        let Some(owner) = owner else { return touched };
        let slices = &mut self.services.entry(owner.clone()).or_default().slices;
        if slices.get(&key.name) == Some(slice) {
            return touched;
        }
        let old = slices.insert(Arc::clone(&key.name), slice.clone());
        self.slices.insert(key, owner.clone());
        // Names instead of addresses are nothing to compile.
        if old.is_some_and(|old| old.address_type != AddressType::Fqdn)
            || slice.address_type != AddressType::Fqdn
        {
            touched.push(owner);
        }
        touched
    }

    fn drop_slice(&mut self, key: &Key) -> Option<Key> {
        let owner = self.slices.remove(key)?;
        self.services.get_mut(&owner)?.slices.remove(&key.name);
        Some(owner)
    }

    /// Returns the Services with endpoints at addresses that no node has any more.
    fn forget_node(&mut self, name: &str) -> BTreeSet<Key> {
        let mut touched = BTreeSet::new();
        for addr in self.nodes.remove(name).unwrap_or_default() {
            if let hash_map::Entry::Occupied(mut count) = self.node_addresses.entry(addr) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
            touched.extend(self.off_range.get(&addr).into_iter().flatten().cloned());
        }
        touched
    }

    fn recompile(&mut self, touched: impl IntoIterator<Item = Key>) -> Changes {
        let mut step = Step::default();
        for key in touched {
            self.compile_service(&key, &mut step);
        }
        self.finish(step)
    }

    fn compile_service(&mut self, key: &Key, step: &mut Step) {
        let Some(entry) = self.services.get_mut(key) else { return };
        let old = std::mem::take(&mut entry.compiled);
        let context = Context { view: &self.view, pods: &self.pods, pools: &self.pools };
        let service = handled(entry.service.as_ref());
        let mut lowered = match service {
            Ok(service) => lower::service(&context, service, (&key.namespace, &key.name), &entry.slices),
            Err(_) => Lowered::default(),
        };
        let refused = entry.service.iter().flat_map(|service| &service.refused);
        let refused = refused.chain(entry.slices.values().flat_map(|slice| &slice.refused));
        lowered.findings.extend(refused.map(Finding::from));
        let created = entry.service.as_ref().map(|service| service.created.clone()).unwrap_or_default();
        let is_empty = entry.service.is_none() && entry.slices.is_empty();
        self.strays(key, &mut lowered);
        let compiled = self.replace(&Owner::Service(key.clone()), &created, old, lowered, step);
        step.services.push((Arc::clone(&key.namespace), Arc::clone(&key.name)));
        if is_empty {
            self.services.remove(key);
        } else if let Some(entry) = self.services.get_mut(key) {
            entry.compiled = compiled;
        }
    }

    fn compile_host_port(&mut self, (key, index): (Key, usize), step: &mut Step) {
        let Some(entry) = self.host_ports.get_mut(&(key.clone(), index)) else { return };
        let old = std::mem::take(&mut entry.compiled);
        let created = entry.port.created.clone();
        let lowered = lower::host_port(&entry.port, (&key.namespace, &key.name), index);
        let owner = Owner::HostPort(key, index);
        let compiled = self.replace(&owner, &created, old, lowered, step);
        let Owner::HostPort(key, index) = owner else { return };
        if let Some(entry) = self.host_ports.get_mut(&(key, index)) {
            entry.compiled = compiled;
        }
    }

    /// Adds a finding for each slice with endpoints that are neither in a range of pods nor on a node. The API server
    /// may be anywhere: its own Service is none.
    fn strays(&self, key: &Key, lowered: &mut Lowered) {
        if (&*key.namespace, &*key.name) == ("default", "kubernetes") {
            return;
        }
        let mut by_slice: BTreeMap<&Arc<str>, (usize, IpAddr, usize)> = BTreeMap::new();
        for (addr, slice, index) in &lowered.off_range {
            if !self.node_addresses.contains_key(addr) && !self.view.addresses.contains(addr) {
                by_slice.entry(slice).or_insert((*index, *addr, 0)).2 += 1;
            }
        }
        let findings: Vec<Finding> = by_slice
            .into_iter()
            .map(|(slice, (index, addr, count))| {
                let others = if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() };
                let cause = format!(
                    "{addr}{others} is in no pod range and on no node; it is used as it is, for whoever made the \
                     slice may mean something outside of the cluster"
                );
                Finding::slice(&key.namespace, slice, &format!("endpoints[{index}].addresses[0]"), cause)
            })
            .collect();
        lowered.findings.extend(findings);
    }

    /// Puts what an object comes to now in the place of what it came to before.
    fn replace(
        &mut self,
        owner: &Owner,
        created: &str,
        mut old: Compiled,
        mut lowered: Lowered,
        step: &mut Step,
    ) -> Compiled {
        self.work.compiled += 1;
        self.work.endpoints += lowered.examined;
        let created: Arc<str> = created.into();
        let mut new = Compiled { local_ready: lowered.local_ready, ..Compiled::default() };
        let mut own: BTreeMap<FrontendKey, String> = BTreeMap::new();
        let mut released: BTreeSet<FrontendKey> =
            old.units.values().flat_map(|unit| unit.keys.iter().copied()).collect();
        let mut before = Vec::new();
        for unit in lowered.units {
            let id = match old.units.remove(&unit.key) {
                Some(state) => state.id,
                None => self.ids.allocate(&unit.meta),
            };
            self.set_meta(id, unit.meta, step);
            self.set_backends(SetId { service: id, kind: SetKind::Cluster }, unit.cluster, step);
            self.set_backends(SetId { service: id, kind: SetKind::Local }, unit.local, step);
            let mut keys = Vec::with_capacity(unit.wanted.len());
            for wanted in unit.wanted {
                let key = wanted.key;
                // An address may be asked for twice by one object; a load balancer's comes before an external IP.
                if let Some(first) = own.get(&key) {
                    if matches!(wanted.kind, crate::table::FrontendKind::NodePort) {
                        lowered.findings.push(own_conflict(owner, &wanted.field, first));
                    }
                    continue;
                }
                before.extend(self.claims.conflicts(&key));
                released.remove(&key);
                own.insert(key, wanted.field.clone());
                keys.push(key);
                let frontend = Frontend {
                    service: id,
                    kind: wanted.kind,
                    routes: wanted.routes,
                    affinity_s: wanted.affinity_s,
                    source_ranges: wanted.source_ranges,
                };
                let (created, owner) = (Arc::clone(&created), owner.clone());
                self.claims.set(key, Claim { created, owner, field: wanted.field.into(), frontend });
            }
            new.units.insert(unit.key, UnitState { id, keys });
        }
        for key in &released {
            before.extend(self.claims.conflicts(key));
            self.claims.release(*key, owner);
        }
        let mut after = Vec::new();
        for key in own.keys().chain(&released) {
            self.work.frontends += 1;
            after.extend(self.claims.conflicts(key));
            step.batch.frontends.insert(*key, self.claims.winner(key).map(|claim| claim.frontend.clone()));
        }
        for state in old.units.into_values() {
            for kind in [SetKind::Cluster, SetKind::Local] {
                step.batch.sets.insert(SetId { service: state.id, kind }, None);
            }
            step.batch.services.insert(state.id, None);
            self.ids.free(state.id);
        }
        self.set_vips(&old.vips, &lowered.vips, step);
        new.vips = lowered.vips;
        if let Owner::Service(key) = owner {
            new.off_range = lowered.off_range.iter().map(|(addr, ..)| *addr).collect();
            self.index_off_range(key, &old.off_range, &new.off_range);
        }
        step.findings(before, &after);
        lowered.findings.sort();
        lowered.findings.dedup();
        step.findings(old.findings, &lowered.findings);
        new.findings = lowered.findings;
        new
    }

    fn set_meta(&self, id: ServiceId, meta: ServiceMeta, step: &mut Step) {
        if self.table.services.get(&id) != Some(&meta) || step.batch.services.contains_key(&id) {
            step.batch.services.insert(id, Some(meta));
        }
    }

    fn set_backends(&self, id: SetId, backends: Vec<Backend>, step: &mut Step) {
        let known = self.table.sets.get(&id).map_or(&[] as &[Backend], |set| set);
        if *known != *backends || step.batch.sets.contains_key(&id) {
            step.batch.sets.insert(id, (!backends.is_empty()).then(|| backends.into()));
        }
    }

    fn set_vips(&mut self, old: &BTreeSet<IpAddr>, new: &BTreeSet<IpAddr>, step: &mut Step) {
        for addr in new.difference(old) {
            *self.vips.entry(*addr).or_insert(0) += 1;
            step.batch.vips.insert(*addr, true);
        }
        for addr in old.difference(new) {
            if let hash_map::Entry::Occupied(mut count) = self.vips.entry(*addr) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                    step.batch.vips.insert(*addr, false);
                }
            }
        }
    }

    fn index_off_range(&mut self, key: &Key, old: &BTreeSet<IpAddr>, new: &BTreeSet<IpAddr>) {
        for addr in new.difference(old) {
            self.off_range.entry(*addr).or_default().insert(key.clone());
        }
        for addr in old.difference(new) {
            if let hash_map::Entry::Occupied(mut keys) = self.off_range.entry(*addr) {
                keys.get_mut().remove(key);
                if keys.get().is_empty() {
                    keys.remove();
                }
            }
        }
    }

    fn finish(&mut self, step: Step) -> Changes {
        let table = step.batch.changes(&self.table);
        table.iter().for_each(|change| self.table.apply(change));
        Changes {
            table,
            found: step.found.into_iter().collect(),
            cleared: step.cleared.into_iter().collect(),
            services: step.services,
        }
    }
}

fn own_conflict(owner: &Owner, field: &str, first: &str) -> Finding {
    let key = owner.key();
    Finding {
        kind: "Service".to_owned(),
        namespace: key.namespace.to_string(),
        name: key.name.to_string(),
        field: field.to_owned(),
        cause: format!("is the same as {first}, which is used; give each port its own"),
    }
}
