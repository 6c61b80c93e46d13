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
    layout::{COMMENT, Chain, Set, TABLE, fixed_chains},
    model::{
        FAMILIES, FoundSlots, Plans, Record, address_element, describe, found_slots, frontend_key,
        hairpin_element, node_elements, plan_elements,
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
    numbers: Numbers,
    /// Services of which the kernel may have anything.
    refused: BTreeSet<ServiceId>,
    /// The generation of the kernel's rules after our last write, if nobody else wrote since we looked.
    generation: Option<u32>,
    synced: bool,
}

#[derive(Default)]
struct Numbers {
    next: u32,
    free: Vec<u32>,
}

impl Numbers {
    fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next
        })
    }
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
            numbers: Numbers::default(),
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
    fn wanted(&mut self, id: ServiceId) -> Option<Record> {
        let keys = self.keys.get(&id)?;
        let old = self.records.get(&id);
        let number = old.map(|r| r.number);
        let slots = old.map_or([&[][..]; 2], Record::slots);
        let mut record = Record::of(&self.table, id, keys, number.unwrap_or(0), slots)?;
        if number.is_none() {
            record.number = self.numbers.take();
        }
        Some(record)
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
        for &id in services {
            let new = self.wanted(id);
            let old = self.records.get(&id);
            if new.as_ref() == old {
                continue;
            }
            if let Some(new) = &new {
                for plan in new.frontends.values() {
                    self.plans.acquire(plan, &mut structure);
                }
            }
            let had = old.map(|r| r.elements(&self.plans)).unwrap_or_default();
            let has = new.as_ref().map(|r| r.elements(&self.plans)).unwrap_or_default();
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
                None => self.records.remove(&id).inspect(|old| self.numbers.free.push(old.number)),
            };
            for plan in old.iter().flat_map(|r| r.frontends.values()) {
                self.plans.release(plan);
            }
        }
        let ops = self.plans.sweep();
        if !ops.is_empty() {
            report.removed += ops.len();
            let outcome = self.kernel()?.commit(&ops, None).map_err(io_error("writing"))?;
            self.generation = None;
            if outcome.is_err() {
                return self.compare(report).map(|_| ());
            }
        }
        Ok(())
    }

    /// Reads everything back, and writes what is different from what the table wants.
    fn compare(&mut self, report: &mut Report) -> Result<Difference> {
        for _ in 0..RACES {
            let kernel = self.kernel()?;
            let generation = kernel.generation().map_err(io_error("reading"))?;
            let mut found = Vec::new();
            for family in FAMILIES {
                found.push((family, kernel.read(family).map_err(io_error("reading"))?));
            }
            if let Some(difference) = self.compare_with(generation, found, report)? {
                return Ok(difference);
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
        self.adopt(&found);
        // Records as the table wants them; plans that the kernel lacks come along.
        let mut new_plans = Ops::new();
        let ids: BTreeSet<ServiceId> = self.keys.keys().copied().collect();
        let mut records = HashMap::new();
        for &id in &ids {
            if let Some(record) = self.wanted(id) {
                for plan in record.frontends.values() {
                    self.plans.acquire(plan, &mut new_plans);
                }
                records.insert(id, record);
            }
        }
        self.locals = HashMap::new();
        for addr in records.values().flat_map(|r| &r.locals) {
            *self.locals.entry(*addr).or_default() += 1;
        }
        self.records = records;
        let mut wanted = self.wanted_elements();

        let mut ops = Ops::new();
        let mut had: HashMap<ElementKey, Value> = HashMap::new();
        let mut stray_chains = Ops::new();
        for (family, found) in found {
            let chains = self.wanted_chains(family);
            let whole = found.filter(|f| {
                let lines = structure_differences(f, family, &chains);
                let fits = lines.is_empty();
                difference.missing.extend(lines);
                fits
            });
            match whole {
                Some(found) => {
                    let mut stray: Vec<String> =
                        found.chains.keys().filter(|name| !chains.contains_key(*name)).cloned().collect();
                    stray.sort_by_key(|name| (name.contains("choose-"), name.clone()));
                    difference.foreign.extend(stray.iter().map(|name| format!("chain {name}")));
                    stray_chains.extend(stray.into_iter().map(|name| (None, Op::RemoveChain(family, name))));
                    let present: BTreeSet<&String> = found.chains.keys().collect();
                    for (name, chain) in &chains {
                        if !present.contains(name) {
                            ops.push((None, Op::Chain(family, chain.clone())));
                        }
                    }
                    had.extend(found.elements);
                }
                None => {
                    difference.missing.push(format!("table {} {TABLE}", family_name(family)));
                    ops.push((None, Op::ReplaceTable(family)));
                    for set in Set::ALL {
                        ops.push((None, Op::Set(family, set.definition(family))));
                    }
                    for chain in fixed_chains(family) {
                        ops.push((None, Op::Chain(family, chain)));
                    }
                    let names: Vec<String> = fixed_chains(family).into_iter().map(|c| c.name).collect();
                    // Actions first: the entries name them.
                    let mut rest: Vec<&Chain> =
                        chains.values().filter(|c| !names.contains(&c.name)).collect();
                    rest.sort_by_key(|c| (!c.name.contains("choose-"), c.name.clone()));
                    ops.extend(rest.into_iter().map(|c| (None, Op::Chain(family, c.clone()))));
                }
            }
        }
        // Chains that are to be added: actions before the entries that name them.
        ops.sort_by_key(|(_, op)| match op {
            Op::Chain(_, chain) if chain.name.contains("from-") => 1,
            _ => 0,
        });
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
        ops.append(&mut stray_chains);
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
                    // Its old elements stay as well as its new ones are left out.
                    ops.retain(|(owner, _)| owner.is_none_or(|id| !guilty.contains(&id)));
                    self.refused.extend(guilty);
                }
            }
        }
        Err(refusal("services", "too many of them were refused one after the other"))
    }

    /// Takes over numbers, slots and plans that the kernel has, so that little has to be written.
    fn adopt(&mut self, found: &[(Family, Option<Found>)]) {
        self.records.clear();
        self.plans = Plans::default();
        let mut numbers: HashMap<ElementKey, u32> = HashMap::new();
        let mut entries: HashMap<(Family, String, String), u32> = HashMap::new();
        let mut slots = FoundSlots::new();
        let mut highest = 0;
        for (family, found) in found.iter().filter_map(|(f, found)| found.as_ref().map(|x| (*f, x))) {
            slots.extend(found_slots(found));
            let mut arriving: HashMap<u32, &str> = HashMap::new();
            let mut sent: HashMap<u32, &str> = HashMap::new();
            for (key, value) in &found.elements {
                match (key.set, value) {
                    (Set::Frontends | Set::NodePorts, Value::Bytes(value)) => {
                        if let Some(number) = value.get(4..).and_then(|b| b.first_chunk()) {
                            let number = u32::from_ne_bytes(*number);
                            highest = highest.max(number);
                            numbers.insert(key.clone(), number);
                        }
                    }
                    (Set::Plans, Value::Chain(chain)) => {
                        arriving.insert(plan_number(key), chain);
                    }
                    (Set::OutputPlans, Value::Chain(chain)) => {
                        sent.insert(plan_number(key), chain);
                    }
                    _ => {}
                }
            }
            for (number, chain) in &arriving {
                self.plans.reserve(*number);
                if let Some(sent) = sent.get(number) {
                    entries.insert((family, (*chain).to_owned(), (*sent).to_owned()), *number);
                }
            }
        }
        highest = slots.keys().map(|(_, number)| *number).max().unwrap_or(0).max(highest);
        self.numbers = Numbers { next: highest, free: Vec::new() };

        let ids: BTreeSet<ServiceId> = self.keys.keys().copied().collect();
        let mut taken = HashSet::new();
        let mut plans_taken: HashSet<u32> = HashSet::new();
        for id in ids {
            let Some(keys) = self.keys.get(&id) else { continue };
            let number = keys.iter().find_map(|key| {
                let (set, bytes) = frontend_key(key);
                let element = ElementKey { family: key.addr.family(), set, key: bytes, end: None };
                numbers.get(&element).copied().filter(|n| !taken.contains(n))
            });
            let Some(number) = number else { continue };
            taken.insert(number);
            let of = |kind| slots.get(&(kind, number)).map_or(&[][..], Vec::as_slice);
            let old =
                [of(podway_services::table::SetKind::Cluster), of(podway_services::table::SetKind::Local)];
            if let Some(record) = Record::of(&self.table, id, keys, number, old) {
                for plan in record.frontends.values() {
                    let (arriving, sent) = plan.entries();
                    if let Some(number) = entries.get(&(plan.family, arriving, sent))
                        && plans_taken.insert(*number)
                    {
                        self.plans.adopt(plan, *number);
                    }
                }
                self.records.insert(id, record);
            }
        }
        let free: Vec<u32> = (1..=highest).filter(|n| !taken.contains(n)).collect();
        self.numbers.free = free;
    }

    /// Every chain that a family should have, by name.
    fn wanted_chains(&self, family: Family) -> BTreeMap<String, Chain> {
        let mut chains: BTreeMap<String, Chain> =
            fixed_chains(family).into_iter().map(|c| (c.name.clone(), c)).collect();
        for (plan, _) in self.plans.all().filter(|(plan, _)| plan.family == family) {
            chains.extend(plan.chains().into_iter().map(|c| (c.name.clone(), c)));
        }
        chains
    }

    /// Every element that should be there, with the service that it is for.
    fn wanted_elements(&self) -> HashMap<ElementKey, (Option<ServiceId>, Value)> {
        let mut elements = HashMap::new();
        for (id, record) in &self.records {
            elements.extend(record.elements(&self.plans).into_iter().map(|(k, v)| (k, (Some(*id), v))));
        }
        for (plan, number) in self.plans.all() {
            elements.extend(plan_elements(plan, number).map(|(k, v)| (k, (None, v))));
        }
        elements.extend(node_elements(&self.view).into_iter().map(|(k, v)| (k, (None, v))));
        elements.extend(self.locals.keys().map(|a| (hairpin_element(*a), (None, Value::None))));
        elements
            .extend(self.table.vips.iter().map(|a| (address_element(Set::Vips, *a), (None, Value::None))));
        elements
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
        let (services, vips) = self.take(changes);
        if services.iter().any(|id| self.refused.contains(id)) {
            self.compare(&mut report)?;
        } else {
            self.write(&services, &vips, &mut report)?;
        }
        self.clean_flows(services, &mut report);
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

/// What of the fixed parts and of the plans' chains is not as it should be. Chains that are not there at all and belong
/// to plans can be added, and are no such difference.
fn structure_differences(found: &Found, family: Family, chains: &BTreeMap<String, Chain>) -> Vec<String> {
    let mut lines = Vec::new();
    let name = family_name(family);
    if found.comment != COMMENT {
        lines.push(format!("table {name} {TABLE} of this version"));
    }
    for set in Set::ALL {
        let definition = set.definition(family);
        let shape =
            [definition.flags, definition.key_type, definition.key_len, definition.data_type.unwrap_or(0)];
        if found.sets.get(set.name()) != Some(&shape) {
            lines.push(format!("set {name} {}", set.name()));
        }
    }
    let fixed: HashSet<String> = fixed_chains(family).into_iter().map(|c| c.name).collect();
    for (chain_name, chain) in chains {
        let as_wanted = found.chains.get(chain_name).map(|(hook, rules)| {
            let want = chain.hook.map(|h| (h.kind.to_owned(), h.number, h.priority));
            *hook == want && rules.iter().eq(chain.rules.iter().map(|(comment, _)| comment))
        });
        if as_wanted == Some(false) || (as_wanted.is_none() && fixed.contains(chain_name)) {
            lines.push(format!("rules of chain {name} {chain_name}"));
        }
    }
    lines
}

fn plan_number(key: &ElementKey) -> u32 {
    key.key.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b))
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// The kernel never has generation 0.
const fn next_generation(generation: u32) -> u32 {
    match generation.wrapping_add(1) {
        0 => 1,
        next => next,
    }
}

const fn is_removal(op: &Op) -> bool {
    matches!(op, Op::Remove(_) | Op::RemoveChain(..) | Op::RemoveTable(_))
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
