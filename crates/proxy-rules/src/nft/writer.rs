//! The writer itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    io,
    net::IpAddr,
    time::Instant,
};

use podway_services::table::{Family, FrontendKey, NodeView, ServiceId, TableChange};

use super::{
    kernel::{ElementKey, Found, Kernel, Op, Ops, Rejected, Value},
    layout::{COMMENT, Chain, Set, SetDefinition, TABLE, fixed_chains},
    model::{
        FAMILIES, FoundSlots, Plans, Record, address_element, describe, found_slots, hairpin_element,
        node_elements, slots_of,
    },
};
use crate::{
    AUDIT_LINES, AuditReport, Error, Feature, Refused, Report, Result, ServiceCounters, ServiceTable,
    Unsupported, Writer, conntrack, object_name,
};

const NAME: &str = "nftables";

/// How often one write leaves out services that the kernel refuses before it gives up.
const ISOLATIONS: usize = 32;
/// How often a comparison is begun again because somebody else changed rules meanwhile.
const RACES: usize = 8;

/// Programs a table as nftables maps.
pub struct NftWriter {
    kernel: Option<Kernel>,
    table: ServiceTable,
    view: NodeView,
    /// Frontends by service.
    keys: HashMap<ServiceId, BTreeSet<FrontendKey>>,
    /// What the kernel has.
    records: HashMap<ServiceId, Record>,
    plans: Plans,
    /// How many records have a backend on this node at an address.
    locals: HashMap<IpAddr, usize>,
    /// Services of which the kernel may have anything.
    refused: BTreeSet<ServiceId>,
    /// The generation of the kernel's rules after our last write, if nobody else wrote since we looked.
    generation: Option<u32>,
    synced: bool,
}

/// What reading back found to be different.
#[derive(Default)]
struct Difference {
    missing: Vec<String>,
    foreign: Vec<String>,
}

impl Default for NftWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl NftWriter {
    /// A writer that has not looked at the kernel yet.
    pub fn new() -> Self {
        Self {
            kernel: None,
            table: ServiceTable::default(),
            view: NodeView::default(),
            keys: HashMap::new(),
            records: HashMap::new(),
            plans: Plans::default(),
            locals: HashMap::new(),
            refused: BTreeSet::new(),
            generation: None,
            synced: false,
        }
    }

    fn kernel(&mut self) -> Result<&mut Kernel> {
        if self.kernel.is_none() {
            self.kernel = Some(Kernel::open().map_err(io_error("opening"))?);
        }
        Ok(self.kernel.as_mut().expect("it was opened above"))
    }

    /// Takes changes into the copy of the table, and says which services and addresses they concern.
    fn take(&mut self, changes: &[TableChange]) -> (BTreeSet<ServiceId>, BTreeSet<IpAddr>) {
        let (mut services, mut vips) = (BTreeSet::new(), BTreeSet::new());
        for change in changes {
            match change {
                TableChange::Service(id, _) | TableChange::ServiceGone(id) => {
                    services.insert(*id);
                }
                TableChange::Set(id, _) => {
                    services.insert(id.service);
                }
                TableChange::Frontend(key, frontend) => {
                    services.insert(frontend.service);
                    services.extend(self.forget_key(key));
                    self.keys.entry(frontend.service).or_default().insert(*key);
                }
                TableChange::FrontendGone(key) => services.extend(self.forget_key(key)),
                TableChange::Vip(addr) | TableChange::VipGone(addr) => {
                    vips.insert(*addr);
                }
            }
            self.table.apply(change);
        }
        (services, vips)
    }

    fn forget_key(&mut self, key: &FrontendKey) -> Option<ServiceId> {
        let service = self.table.frontends.get(key)?.service;
        if let Some(keys) = self.keys.get_mut(&service) {
            keys.remove(key);
            if keys.is_empty() {
                self.keys.remove(&service);
            }
        }
        Some(service)
    }

    /// The record that a service needs.
    fn wanted(&self, id: ServiceId) -> Option<Record> {
        let slots = self.records.get(&id).map_or([&[][..]; 2], Record::slots);
        Record::of(&self.table, id, self.keys.get(&id)?, slots)
    }

    /// Writes what changed for some services and addresses.
    fn write(
        &mut self,
        services: &BTreeSet<ServiceId>,
        vips: &BTreeSet<IpAddr>,
        report: &mut Report,
    ) -> Result<()> {
        let (mut structure, mut removals, mut additions) = (Ops::new(), Ops::new(), Ops::new());
        let mut staged = Vec::new();
        // What nothing names any more once the rest is written.
        let (mut idle_chains, mut idle_sets) = (Vec::new(), Vec::new());
        for &id in services {
            let new = self.wanted(id);
            let old = self.records.get(&id);
            if new.as_ref() == old {
                continue;
            }
            if let Some(new) = &new {
                let family = new.family();
                let known = |name: &String| old.and_then(|r| r.chains.get(name));
                for (name, set) in new.sets().filter(|(name, _)| known(name).is_none()) {
                    tracing::trace!(name, "a set of clients");
                    structure.push((Some(id), Op::Set(family, set)));
                }
                for chain in new.chains.values() {
                    match known(&chain.name) {
                        None => structure.push((Some(id), Op::Chain(family, chain.clone()))),
                        Some(old) if old != chain => {
                            structure.push((Some(id), Op::Rules(family, chain.clone())));
                        }
                        Some(_) => {}
                    }
                }
                for plan in new.frontends.values() {
                    self.plans.acquire(plan, id, &mut structure);
                }
            }
            if let Some(old) = old {
                let kept = |name: &String| new.as_ref().is_some_and(|r| r.chains.contains_key(name));
                let family = old.family();
                idle_chains.extend(old.chains.keys().filter(|n| !kept(n)).map(|n| (family, n.clone())));
                idle_sets.extend(old.sets().filter(|(n, _)| !kept(n)).map(|(n, _)| (family, n)));
            }
            let had = old.map(Record::elements).unwrap_or_default();
            let has = new.as_ref().map(Record::elements).unwrap_or_default();
            for (key, value) in &had {
                if has.get(key) != Some(value) {
                    removals.push((Some(id), Op::Remove(key.clone())));
                }
            }
            for (key, value) in has {
                if had.get(&key) != Some(&value) {
                    additions.push((Some(id), Op::Add(key, value)));
                }
            }
            staged.push((id, new));
        }
        structure.sort_by_key(|(_, op)| structure_order(op));
        let mut hairpins: BTreeMap<IpAddr, isize> = BTreeMap::new();
        for (id, new) in &staged {
            for addr in self.records.get(id).iter().flat_map(|r| &r.locals) {
                *hairpins.entry(*addr).or_default() -= 1;
            }
            for addr in new.iter().flat_map(|r| &r.locals) {
                *hairpins.entry(*addr).or_default() += 1;
            }
        }
        for (addr, change) in &hairpins {
            let before = self.locals.get(addr).copied().unwrap_or(0);
            match (before, before.saturating_add_signed(*change)) {
                (0, 1..) => additions.push((None, Op::Add(hairpin_element(*addr), Value::None))),
                (1.., 0) => removals.push((None, Op::Remove(hairpin_element(*addr)))),
                _ => {}
            }
        }
        for addr in vips {
            let element = address_element(Set::Vips, *addr);
            if self.table.vips.contains(addr) {
                additions.push((None, Op::Add(element, Value::None)));
            } else {
                removals.push((None, Op::Remove(element)));
            }
        }
        let counts = (structure.len() + additions.len(), removals.len());
        let mut ops = structure;
        ops.append(&mut removals);
        ops.append(&mut additions);
        if !ops.is_empty() {
            let generation = self.generation;
            let kernel = self.kernel()?;
            let mut outcome = kernel.commit(&ops, generation).map_err(io_error("writing"))?;
            let mut undisturbed = generation;
            if matches!(outcome, Err(Rejected::Changed)) {
                // Somebody wrote rules, most likely of their own: the next audit looks.
                undisturbed = None;
                outcome = kernel.commit(&ops, None).map_err(io_error("writing"))?;
            }
            if let Err(rejected) = outcome {
                tracing::debug!(?rejected, "the kernel's rules are not as they were left: comparing");
                return self.compare(report).map(|_| ());
            }
            self.generation = undisturbed.map(next_generation);
        }
        report.written += counts.0;
        report.removed += counts.1;
        for (addr, change) in hairpins {
            let users = self.locals.entry(addr).or_default();
            *users = users.saturating_add_signed(change);
            if *users == 0 {
                self.locals.remove(&addr);
            }
        }
        for (id, new) in staged {
            let old = match new {
                Some(new) => self.records.insert(id, new),
                None => self.records.remove(&id),
            };
            for plan in old.iter().flat_map(|r| r.frontends.values()) {
                self.plans.release(plan);
            }
        }
        idle_chains.extend(self.plans.sweep());
        let ops = removal_of(idle_chains, idle_sets);
        if !ops.is_empty() {
            report.removed += ops.iter().filter(|(_, op)| is_removal(op)).count();
            let generation = self.generation.take();
            let outcome = self.kernel()?.commit(&ops, generation).map_err(io_error("writing"))?;
            if outcome.is_err() {
                return self.compare(report).map(|_| ());
            }
            self.generation = generation.map(next_generation);
        }
        Ok(())
    }

    /// Reads everything back, and writes what is different from what the table wants.
    fn compare(&mut self, report: &mut Report) -> Result<Difference> {
        let mut replace = false;
        for _ in 0..RACES {
            let kernel = self.kernel()?;
            let generation = kernel.generation().map_err(io_error("reading"))?;
            let mut found = Vec::new();
            for family in FAMILIES {
                found.push((family, kernel.read(family).map_err(io_error("reading"))?));
            }
            if replace {
                found.iter_mut().for_each(|(_, found)| *found = None);
            }
            match self.compare_with(generation, found, report) {
                Ok(Some(difference)) => return Ok(difference),
                Ok(None) => {}
                // What somebody did to the table is more than can be mended.
                Err(Error::Refused { .. }) if !replace => replace = true,
                Err(error) => return Err(error),
            }
        }
        Err(Error::Refused {
            mechanism: NAME,
            object: format!("table {TABLE}"),
            cause: "other programs changed rules all the time; the next audit tries again".into(),
        })
    }

    fn compare_with(
        &mut self,
        generation: u32,
        found: Vec<(Family, Option<Found>)>,
        report: &mut Report,
    ) -> Result<Option<Difference>> {
        let mut difference = Difference::default();
        self.rebuild(&found);
        let mut wanted = self.wanted_elements();
        let mut ops = Ops::new();
        let mut had: HashMap<ElementKey, Value> = HashMap::new();
        let (mut stray_chains, mut stray_sets) = (Vec::new(), Vec::new());
        for (family, found) in found {
            let (chains, sets) = (self.wanted_chains(family), self.wanted_sets(family));
            let mut before = Found::default();
            match found.filter(|found| self.fits(found, family, &mut difference)) {
                Some(found) => before = found,
                None => {
                    difference.missing.push(format!("table {} {TABLE}", family_name(family)));
                    ops.push((None, Op::ReplaceTable(family)));
                }
            }
            for (name, (owner, set)) in sets.iter().filter(|(name, _)| !before.sets.contains_key(*name)) {
                tracing::trace!(name, "a set to be made");
                ops.push((*owner, Op::Set(family, set.clone())));
            }
            for (name, (owner, chain)) in &chains {
                let line = || format!("rules of chain {} {name}", family_name(family));
                match before.chains.get(name) {
                    None => {
                        difference.missing.push(line());
                        ops.push((*owner, Op::Chain(family, chain.clone())));
                    }
                    Some((_, rules)) if !rules.iter().eq(chain.rules.iter().map(|(comment, _)| comment)) => {
                        difference.missing.push(line());
                        ops.push((*owner, Op::Rules(family, chain.clone())));
                    }
                    Some(_) => {}
                }
            }
            let stray = |name: &&String| !chains.contains_key(*name);
            stray_chains.extend(before.chains.keys().filter(stray).map(|name| (family, name.clone())));
            let stray = |name: &&String| !sets.contains_key(*name);
            stray_sets.extend(before.sets.keys().filter(stray).map(|name| (family, name.clone())));
            had.extend(before.elements);
        }
        difference.foreign.extend(stray_chains.iter().map(|(_, name)| format!("chain {name}")));
        difference.foreign.extend(stray_sets.iter().map(|(_, name)| format!("set {name}")));
        ops.sort_by_key(|(_, op)| structure_order(op));
        let mut strays = removal_of(stray_chains, stray_sets);
        let mut removals = Ops::new();
        for (key, value) in &had {
            match wanted.get(key) {
                Some((_, want)) if want == value => {
                    wanted.remove(key);
                }
                other => {
                    difference.foreign.push(describe(key));
                    removals.push((other.and_then(|(owner, _)| *owner), Op::Remove(key.clone())));
                }
            }
        }
        removals.sort_by(|a, b| op_order(a).cmp(&op_order(b)));
        let mut additions: Ops =
            wanted.into_iter().map(|(key, (owner, value))| (owner, Op::Add(key, value))).collect();
        additions.sort_by(|a, b| op_order(a).cmp(&op_order(b)));
        difference.missing.extend(additions.iter().filter_map(|(_, op)| match op {
            Op::Add(key, _) => Some(describe(key)),
            _ => None,
        }));
        ops.append(&mut removals);
        ops.append(&mut additions);
        ops.append(&mut strays);
        self.refused.clear();
        if ops.is_empty() {
            self.generation = Some(generation);
            return Ok(Some(difference));
        }
        for _ in 0..ISOLATIONS {
            let outcome = self.kernel()?.commit(&ops, Some(generation)).map_err(io_error("writing"))?;
            match outcome {
                Ok(()) => {
                    self.generation = Some(next_generation(generation));
                    report.written += ops.iter().filter(|(_, op)| !is_removal(op)).count();
                    report.removed += ops.iter().filter(|(_, op)| is_removal(op)).count();
                    return Ok(Some(difference));
                }
                Err(Rejected::Changed) => return Ok(None),
                Err(Rejected::Steps(steps)) => {
                    let mut guilty = HashSet::new();
                    for (owner, what, failure) in &steps {
                        let Some(id) = owner else { continue };
                        if guilty.insert(*id) {
                            report.refused.push(Refused {
                                service: *id,
                                object: self.object(*id),
                                cause: format!("{what}: {}", failure.describe()),
                            });
                        }
                    }
                    if guilty.is_empty() {
                        let (_, what, failure) = &steps[0];
                        return Err(refusal(what, &failure.describe()));
                    }
                    // Its old elements stay as well as its new ones are left out; and so does whatever they may name.
                    ops.retain(|(owner, op)| match owner {
                        Some(id) => !guilty.contains(id),
                        None => !matches!(op, Op::RemoveChain(..) | Op::RemoveSet(..)),
                    });
                    self.refused.extend(guilty);
                }
            }
        }
        Err(refusal("services", "too many of them were refused one after the other"))
    }

    /// Records as the table wants them, with the slots that the kernel has, so that little has to be written.
    fn rebuild(&mut self, found: &[(Family, Option<Found>)]) {
        let mut slots = FoundSlots::new();
        for found in found.iter().filter_map(|(_, found)| found.as_ref()) {
            slots.extend(found_slots(found));
        }
        self.plans = Plans::default();
        self.locals = HashMap::new();
        self.records = HashMap::new();
        for (&id, keys) in &self.keys {
            let old = slots_of(&slots, keys);
            let Some(record) = Record::of(&self.table, id, keys, [&old[0], &old[1]]) else { continue };
            for plan in record.frontends.values() {
                self.plans.acquire(plan, id, &mut Ops::new());
            }
            for addr in &record.locals {
                *self.locals.entry(*addr).or_default() += 1;
            }
            self.records.insert(id, record);
        }
    }

    /// Every chain that a family should have, by name, with the service that it is for.
    fn wanted_chains(&self, family: Family) -> BTreeMap<String, (Option<ServiceId>, Chain)> {
        let mut chains: BTreeMap<String, (Option<ServiceId>, Chain)> =
            fixed_chains(family).into_iter().map(|c| (c.name.clone(), (None, c))).collect();
        for (plan, owner) in self.plans.all().filter(|(plan, _)| plan.family == family) {
            chains.extend(plan.chains().into_iter().map(|c| (c.name.clone(), (owner, c))));
        }
        for (id, record) in self.records.iter().filter(|(_, r)| r.family() == family) {
            chains.extend(record.chains.iter().map(|(name, c)| (name.clone(), (Some(*id), c.clone()))));
        }
        chains
    }

    /// The same for sets.
    fn wanted_sets(&self, family: Family) -> BTreeMap<String, (Option<ServiceId>, SetDefinition)> {
        let fixed = Set::ALL.map(|set| set.definition(family));
        let mut sets: BTreeMap<String, (Option<ServiceId>, SetDefinition)> =
            fixed.into_iter().map(|set| (set.name.clone(), (None, set))).collect();
        for (id, record) in self.records.iter().filter(|(_, r)| r.family() == family) {
            sets.extend(record.sets().map(|(name, set)| (name, (Some(*id), set))));
        }
        sets
    }

    /// Every element that should be there, with the service that it is for.
    fn wanted_elements(&self) -> HashMap<ElementKey, (Option<ServiceId>, Value)> {
        let mut elements = HashMap::new();
        for (id, record) in &self.records {
            elements.extend(record.elements().into_iter().map(|(k, v)| (k, (Some(*id), v))));
        }
        elements.extend(node_elements(&self.view).into_iter().map(|(k, v)| (k, (None, v))));
        elements.extend(self.locals.keys().map(|a| (hairpin_element(*a), (None, Value::None))));
        elements
            .extend(self.table.vips.iter().map(|a| (address_element(Set::Vips, *a), (None, Value::None))));
        elements
    }

    /// Whether a table can be put right without being replaced: it is of this version, and what cannot be changed
    /// later is as it should be.
    fn fits(&self, found: &Found, family: Family, difference: &mut Difference) -> bool {
        let name = family_name(family);
        let mut lines = Vec::new();
        if found.comment != COMMENT {
            lines.push(format!("table {name} {TABLE} of this version"));
        }
        for (set, (owner, definition)) in self.wanted_sets(family) {
            match found.sets.get(&set) {
                Some(shape) if *shape == definition.shape() => {}
                None if owner.is_some() => {}
                _ => lines.push(format!("set {name} {set}")),
            }
        }
        for (chain, (hook, _)) in &found.chains {
            let want = fixed_chains(family).into_iter().find(|c| c.name == *chain).and_then(|c| c.hook);
            if *hook != want.map(|h| (h.kind.to_owned(), h.number, h.priority)) {
                lines.push(format!("hook of chain {name} {chain}"));
            }
        }
        let fits = lines.is_empty();
        difference.missing.extend(lines);
        fits
    }

    fn object(&self, id: ServiceId) -> String {
        self.table.services.get(&id).map_or_else(|| format!("service number {}", id.0), object_name)
    }

    /// Deletes UDP flows that these services made stale.
    fn clean_flows(&self, services: impl IntoIterator<Item = ServiceId>, report: &mut Report) {
        let families = conntrack::families_of(&self.table, services);
        match conntrack::clean(&self.table, &self.view, &families) {
            Ok(flows) => report.flows_deleted += flows,
            // The rules are right all the same; flows that go on wrongly end when their clients pause.
            Err(error) => tracing::warn!(%error, "stale UDP flows could not be deleted"),
        }
    }
}

impl Writer for NftWriter {
    fn name(&self) -> &'static str {
        NAME
    }

    fn supports(&self, feature: Feature) -> Result<(), Unsupported> {
        let why = match feature {
            Feature::Maglev => "it chooses backends at random; use --service-mode ebpf",
            Feature::SocketTranslation => "it sees packets only; use --service-mode ebpf",
            Feature::DirectServerReturn => {
                "answers come back through it to be translated; use --service-mode ebpf"
            }
            Feature::LoopbackNodePorts => {
                "packets from loopback addresses cannot leave the node; use another address of the node"
            }
            Feature::Counters => {
                "elements of its maps are shared by no rule that could count; use --service-mode ebpf"
            }
            Feature::Affinity
            | Feature::SourceRanges
            | Feature::Sctp
            | Feature::UndefinedPorts
            | Feature::Hairpin => return Ok(()),
        };
        Err(Unsupported { mechanism: NAME, feature, why })
    }

    fn sync(&mut self, full: &ServiceTable, view: &NodeView) -> Result<Report> {
        if view.node_port_addresses.iter().any(IpAddr::is_loopback) {
            self.supports(Feature::LoopbackNodePorts)?;
        }
        let start = Instant::now();
        let mut report = Report::default();
        self.table = full.clone();
        self.view = view.clone();
        self.keys.clear();
        for (key, frontend) in &full.frontends {
            self.keys.entry(frontend.service).or_default().insert(*key);
        }
        self.compare(&mut report)?;
        self.synced = true;
        self.clean_flows(self.keys.keys().copied(), &mut report);
        report.took = start.elapsed();
        Ok(report)
    }

    fn apply(&mut self, changes: &[TableChange]) -> Result<Report> {
        if !self.synced {
            return Err(Error::NotSynced(NAME));
        }
        let start = Instant::now();
        let mut report = Report::default();
        let risky = conntrack::risky(&self.table, changes);
        let (services, vips) = self.take(changes);
        if services.iter().any(|id| self.refused.contains(id)) {
            self.compare(&mut report)?;
        } else {
            self.write(&services, &vips, &mut report)?;
        }
        self.clean_flows(risky, &mut report);
        report.took = start.elapsed();
        Ok(report)
    }

    fn audit(&mut self) -> Result<AuditReport> {
        if !self.synced {
            return Err(Error::NotSynced(NAME));
        }
        let start = Instant::now();
        let mut audit = AuditReport::default();
        if self.refused.is_empty() && self.generation.is_some() {
            let now = self.kernel()?.generation().map_err(io_error("reading"))?;
            if self.generation == Some(now) {
                return Ok(audit);
            }
        }
        let refused = std::mem::take(&mut self.refused);
        let difference = self.compare(&mut audit.report)?;
        // What is written again for services that were refused is nobody's doing.
        if refused.is_empty() || audit.report.refused.is_empty() {
            audit.missing = limited(difference.missing);
            audit.foreign = limited(difference.foreign);
        }
        audit.report.took = start.elapsed();
        Ok(audit)
    }

    fn remove(&mut self) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        let mut ops = Ops::new();
        let kernel = self.kernel()?;
        for family in FAMILIES {
            if kernel.has_table(family).map_err(io_error("reading"))? {
                ops.push((None, Op::RemoveTable(family)));
                removed.push(format!("nftables table {} {TABLE}", family_name(family)));
            }
        }
        if !ops.is_empty()
            && let Err(rejected) = kernel.commit(&ops, None).map_err(io_error("removing"))?
        {
            return Err(refusal(&format!("removal of table {TABLE}"), &format!("{rejected:?}")));
        }
        *self = Self::new();
        Ok(removed)
    }

    fn counters(&mut self) -> Result<Vec<ServiceCounters>> {
        self.supports(Feature::Counters)?;
        Ok(Vec::new())
    }
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

const fn next_generation(generation: u32) -> u32 {
    super::generation_after(generation, 1)
}

const fn is_removal(op: &Op) -> bool {
    matches!(op, Op::Remove(_) | Op::RemoveChain(..) | Op::RemoveSet(..) | Op::RemoveTable(_))
}

/// Tables, then sets, then chains, each after those that it names.
fn structure_order(op: &Op) -> u8 {
    match op {
        Op::ReplaceTable(_) | Op::RemoveTable(_) => 0,
        Op::Set(..) => 1,
        Op::Chain(_, chain) | Op::Rules(_, chain) => 2 + Chain::rank(&chain.name),
        Op::Add(..) | Op::Remove(_) | Op::RemoveChain(..) | Op::RemoveSet(..) => u8::MAX,
    }
}

/// Rules go first, since they may name any of the chains, and sets last.
fn removal_of(chains: Vec<(Family, String)>, sets: Vec<(Family, String)>) -> Ops {
    let empty =
        |(family, name): &(Family, String)| (None, Op::Rules(*family, Chain::new(name.clone(), None)));
    let mut ops: Ops = chains.iter().map(empty).collect();
    ops.extend(chains.into_iter().map(|(family, name)| (None, Op::RemoveChain(family, name))));
    ops.extend(sets.into_iter().map(|(family, name)| (None, Op::RemoveSet(family, name))));
    ops
}

/// Steps of one service and set together, so that they make one message.
fn op_order((owner, op): &(Option<ServiceId>, Op)) -> (Option<ServiceId>, Option<&ElementKey>) {
    match op {
        Op::Add(key, _) | Op::Remove(key) => (*owner, Some(key)),
        _ => (*owner, None),
    }
}

fn limited(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > AUDIT_LINES {
        let more = lines.len() - (AUDIT_LINES - 1);
        lines.truncate(AUDIT_LINES - 1);
        lines.push(format!("and {more} more"));
    }
    lines
}

fn io_error(operation: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { operation, object: format!("nftables table {TABLE}"), source }
}

fn refusal(object: &str, cause: &str) -> Error {
    Error::Refused { mechanism: NAME, object: object.into(), cause: cause.into() }
}
