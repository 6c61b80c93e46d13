//! The writer itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
    net::IpAddr,
    time::Instant,
};

use podway_services::{
    ServiceTable,
    table::{Family, FrontendAddr, FrontendKey, NodeView, ServiceId, TableChange},
};

use super::{
    program::{Chains, Kind, restore, save},
    render::{PREFIX, REJECT, Rendered, Renderer, Table, host, mark, protocol_name},
    tree::{Leaf, block, branches, depth},
};
use crate::{
    AUDIT_LINES, AuditReport, Error, Feature, Refused, Report, Result, ServiceCounters, Unsupported, Writer,
    conntrack,
    nft::{generation, generation_after},
    object_name,
};

const NAME: &str = "iptables";
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Programs a table as iptables rules.
pub struct IptablesWriter {
    kind: Kind,
    table: ServiceTable,
    view: NodeView,
    sides: [Side; 2],
    /// Frontends by service.
    keys: HashMap<ServiceId, BTreeSet<FrontendKey>>,
    /// Of the nf_tables kind: the generation of the kernel's rules after our last write, if nobody else wrote since we
    /// looked.
    generation: Option<u32>,
    /// Services that the kernel refused; their rules are those of before.
    refused: BTreeSet<ServiceId>,
    synced: bool,
}

/// The rules of one family.
struct Side {
    family: Family,
    frontends: HashMap<FrontendKey, Rendered>,
    /// By table: levels of the tree, and who is in which leaf.
    depths: [u8; 2],
    leaves: [BTreeMap<Leaf, Members>; 2],
    /// How many entries the leaves of addresses have.
    entries: [usize; 2],
    /// Chains of the nat table that frontends have, and how many do.
    chains: HashMap<String, (Vec<String>, usize)>,
    /// By table: what the kernel has.
    written: [Chains; 2],
    /// By table: chains that may differ from it.
    touched: [BTreeSet<String>; 2],
    /// By table: whether leaves came or went.
    regrown: [bool; 2],
}

#[derive(Default)]
struct Members {
    frontends: BTreeSet<FrontendKey>,
    vips: BTreeSet<IpAddr>,
}

impl Members {
    fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.vips.is_empty()
    }
}

/// Frontends with the rules that they had.
type Before = Vec<(FrontendKey, Option<Rendered>)>;

impl Side {
    fn new(family: Family) -> Self {
        Self {
            family,
            frontends: HashMap::new(),
            depths: [1; 2],
            leaves: Default::default(),
            entries: [0; 2],
            chains: HashMap::new(),
            written: Default::default(),
            touched: Default::default(),
            regrown: [true; 2],
        }
    }

    /// Gives a frontend rules, or none; returns those that it had.
    fn place(&mut self, key: &FrontendKey, rendered: Option<Rendered>) -> Option<Rendered> {
        let old = self.frontends.remove(key);
        if old != rendered {
            for table in Table::ALL {
                let t = table as usize;
                let had = old.as_ref().is_some_and(|r| !r.leaf[t].is_empty());
                let has = rendered.as_ref().is_some_and(|r| !r.leaf[t].is_empty());
                if had || has {
                    let leaf = self.leaf_of(table, key);
                    self.member(table, leaf, has && !had, had && !has, |m, add| {
                        if add { m.frontends.insert(*key) } else { m.frontends.remove(key) }
                    });
                }
            }
            for name in old.iter().flat_map(|r| r.chains.keys()) {
                if let Some((_, users)) = self.chains.get_mut(name) {
                    *users -= 1;
                    if *users == 0 {
                        self.chains.remove(name);
                    }
                }
                self.touched[Table::Nat as usize].insert(name.clone());
            }
            for (name, rules) in rendered.iter().flat_map(|r| &r.chains) {
                let entry = self.chains.entry(name.clone()).or_default();
                entry.0.clone_from(rules);
                entry.1 += 1;
                self.touched[Table::Nat as usize].insert(name.clone());
            }
        }
        if let Some(rendered) = rendered {
            self.frontends.insert(*key, rendered);
        }
        old
    }

    fn place_vip(&mut self, addr: &IpAddr, present: bool) {
        let leaf = Leaf::of_address(addr, self.depths[Table::Filter as usize]);
        let had = self.leaves[Table::Filter as usize].get(&leaf).is_some_and(|m| m.vips.contains(addr));
        self.member(Table::Filter, leaf, present && !had, had && !present, |m, add| {
            if add { m.vips.insert(*addr) } else { m.vips.remove(addr) }
        });
    }

    fn member(
        &mut self,
        table: Table,
        leaf: Leaf,
        add: bool,
        remove: bool,
        change: impl FnOnce(&mut Members, bool) -> bool,
    ) {
        let t = table as usize;
        self.touched[t].insert(leaf_chain(table, leaf));
        if !add && !remove {
            return;
        }
        let members = self.leaves[t].entry(leaf).or_default();
        self.regrown[t] |= members.is_empty();
        change(members, add);
        if matches!(leaf, Leaf::Address(..)) {
            self.entries[t] = if add { self.entries[t] + 1 } else { self.entries[t].saturating_sub(1) };
        }
        if members.is_empty() {
            self.leaves[t].remove(&leaf);
            self.regrown[t] = true;
        }
        // Blocks of ports are looked for by protocol.
        self.regrown[t] |= matches!(leaf, Leaf::Ports(_));
    }

    fn leaf_of(&self, table: Table, key: &FrontendKey) -> Leaf {
        match key.addr {
            FrontendAddr::Ip(addr) => Leaf::of_address(&addr, self.depths[table as usize]),
            FrontendAddr::Node(_) => Leaf::of_port(key.port),
        }
    }

    /// Lets the trees fit what they hold.
    fn grow(&mut self) {
        for table in Table::ALL {
            let t = table as usize;
            let fitting = depth(self.depths[t], self.entries[t]);
            if fitting == self.depths[t] {
                continue;
            }
            self.depths[t] = fitting;
            self.regrown[t] = true;
            for (leaf, members) in std::mem::take(&mut self.leaves[t]) {
                self.touched[t].insert(leaf_chain(table, leaf));
                for key in members.frontends {
                    let leaf = self.leaf_of(table, &key);
                    self.touched[t].insert(leaf_chain(table, leaf));
                    self.leaves[t].entry(leaf).or_default().frontends.insert(key);
                }
                for addr in members.vips {
                    let leaf = Leaf::of_address(&addr, fitting);
                    self.touched[t].insert(leaf_chain(table, leaf));
                    self.leaves[t].entry(leaf).or_default().vips.insert(addr);
                }
            }
        }
    }

    /// The chains that lead to the leaves, and those that are always there.
    fn trunk(&self, table: Table, renderer: &Renderer<'_>) -> Chains {
        let (t, view) = (table as usize, renderer.view);
        let letter = table.letter();
        let mut chains = Chains::new();
        let leaves: BTreeSet<Leaf> = self.leaves[t].keys().copied().collect();
        let mut root = Vec::new();
        for (name, rules) in branches(&leaves, self.family) {
            let jump = if name.is_empty() { "-j" } else { "-g" };
            let rules = rules
                .into_iter()
                .map(|(condition, to)| format!("{condition} {jump} {PREFIX}{letter}-{to}"))
                .collect();
            if name.is_empty() {
                root = rules;
            } else {
                chains.insert(format!("{PREFIX}{letter}-{name}"), rules);
            }
        }
        let ports: Vec<String> = self.leaves[t]
            .iter()
            .filter_map(|(leaf, members)| match leaf {
                Leaf::Ports(first) => Some((*leaf, *first, members)),
                Leaf::Address(..) => None,
            })
            .flat_map(|(leaf, first, members)| {
                let protocols: BTreeSet<&str> =
                    members.frontends.iter().map(|key| protocol_name(key.protocol)).collect();
                protocols.into_iter().map(move |p| {
                    format!("-p {p} -m {p} --dport {} -j {}", block(first), leaf_chain(table, leaf))
                })
            })
            .collect();
        if !ports.is_empty() {
            let chain = format!("{PREFIX}{letter}-NODEPORTS");
            let mine = view.node_port_addresses.iter().filter(|a| Family::of(a) == self.family);
            root.extend(mine.map(|addr| format!("-d {} -j {chain}", host(addr))));
            chains.insert(chain, ports);
        }
        match table {
            Table::Nat => {
                let services = format!("{PREFIX}SERVICES");
                let set = format!("-j MARK --set-xmark {}", mark(true));
                let clear = format!("-j MARK --set-xmark {}", mark(false));
                let jump = format!("-j {services}");
                // Most services masquerade for others than pods, so that is marked before the walk.
                let mut arriving = vec![set.clone()];
                if !view.masquerade_all {
                    arriving.extend(renderer.pod_cidrs(self.family).map(|net| format!("-s {net} {clear}")));
                }
                arriving.extend([jump.clone(), clear.clone()]);
                let mut sent = vec![jump];
                if view.masquerade_all {
                    sent.insert(0, set);
                    sent.push(clear.clone());
                }
                chains.insert(services, root);
                chains.insert(format!("{PREFIX}PREROUTING"), arriving);
                chains.insert(format!("{PREFIX}OUTPUT"), sent);
                chains.insert(
                    format!("{PREFIX}POSTROUTING"),
                    vec![format!("-m mark --mark {} -j {PREFIX}MASQUERADE", mark(true))],
                );
                chains.insert(
                    format!("{PREFIX}MASQUERADE"),
                    vec![clear, "-j MASQUERADE --random-fully".into()],
                );
            }
            Table::Filter => {
                let ranges = view.service_cidrs.iter().filter(|net| Family::of(&net.addr()) == self.family);
                root.extend(ranges.map(|net| format!("-d {} -j DROP", net.trunc())));
                chains.insert(format!("{PREFIX}FILTER"), root);
                let unreachable = match self.family {
                    Family::V4 => "icmp-port-unreachable",
                    Family::V6 => "icmp6-port-unreachable",
                };
                chains.insert(
                    REJECT.into(),
                    vec![
                        "-p tcp -j REJECT --reject-with tcp-reset".into(),
                        format!("-j REJECT --reject-with {unreachable}"),
                    ],
                );
                // Answers that are not translated back would make the client reset the connection.
                let invalid = |net| format!("-s {net} -m conntrack --ctstate INVALID -j DROP");
                chains.insert(
                    format!("{PREFIX}FORWARD"),
                    renderer.pod_cidrs(self.family).map(invalid).collect(),
                );
            }
        }
        chains
    }

    /// What a chain is to hold; `None` when it is to go.
    fn wanted(&self, table: Table, name: &str) -> Option<Vec<String>> {
        let t = table as usize;
        if table == Table::Nat
            && let Some((rules, _)) = self.chains.get(name)
        {
            return Some(rules.clone());
        }
        let leaf = leaf_from(table, name, self.depths[t])?;
        let members = self.leaves[t].get(&leaf)?;
        let mut rules: Vec<String> = members
            .frontends
            .iter()
            .filter_map(|key| self.frontends.get(key))
            .flat_map(|rendered| rendered.leaf[t].iter().cloned())
            .collect();
        rules.extend(members.vips.iter().map(|addr| format!("-d {} -g {REJECT}", host(addr))));
        Some(rules)
    }

    /// Everything that a table should hold.
    fn everything(&self, table: Table, renderer: &Renderer<'_>) -> Chains {
        let mut all = self.trunk(table, renderer);
        for leaf in self.leaves[table as usize].keys() {
            let name = leaf_chain(table, *leaf);
            all.extend(self.wanted(table, &name).map(|rules| (name, rules)));
        }
        if table == Table::Nat {
            all.extend(self.chains.iter().map(|(name, (rules, _))| (name.clone(), rules.clone())));
        }
        all
    }

    /// What has to be written for what was touched.
    fn difference(&self, table: Table, renderer: &Renderer<'_>) -> Difference {
        let t = table as usize;
        let mut difference = Difference::default();
        let mut trunk = Chains::new();
        if self.regrown[t] {
            trunk = self.trunk(table, renderer);
        }
        for name in &self.touched[t] {
            if trunk.contains_key(name) {
                continue;
            }
            match self.wanted(table, name) {
                Some(rules) => difference.compare(&self.written[t], name.clone(), rules),
                None if self.written[t].contains_key(name) => difference.gone.push(name.clone()),
                None => {}
            }
        }
        if self.regrown[t] {
            let mut stale: Vec<String> = self.written[t]
                .keys()
                .filter(|name| is_trunk(table, name, self.depths[t]) && !trunk.contains_key(*name))
                .filter(|name| self.wanted(table, name).is_none() && !difference.gone.contains(*name))
                .cloned()
                .collect();
            difference.gone.append(&mut stale);
            for (name, rules) in trunk {
                difference.compare(&self.written[t], name, rules);
            }
        }
        difference
    }
}

/// Chains to be written anew, and to be removed.
#[derive(Debug, Default)]
struct Difference {
    changed: Chains,
    gone: Vec<String>,
}

impl Difference {
    fn compare(&mut self, written: &Chains, name: String, rules: Vec<String>) {
        if written.get(&name) != Some(&rules) {
            self.changed.insert(name, rules);
        }
    }

    fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.gone.is_empty()
    }

    /// The input of `iptables-restore` for it.
    fn input(&self, table: Table, hooks: &[String]) -> String {
        let mut text = format!("*{}\n", table.name());
        for name in self.changed.keys().chain(&self.gone) {
            let _ = writeln!(text, ":{name} - [0:0]");
        }
        for (name, rules) in &self.changed {
            for rule in rules {
                let _ = writeln!(text, "-A {name} {rule}");
            }
        }
        for hook in hooks {
            let _ = writeln!(text, "{hook}");
        }
        for name in &self.gone {
            let _ = writeln!(text, "-X {name}");
        }
        text.push_str("COMMIT\n");
        text
    }
}

fn leaf_chain(table: Table, leaf: Leaf) -> String {
    format!("{PREFIX}{}-{}", table.letter(), leaf.name())
}

fn leaf_from(table: Table, name: &str, depth: u8) -> Option<Leaf> {
    let rest = name.strip_prefix(PREFIX)?.strip_prefix(table.letter())?.strip_prefix('-')?;
    if let Some(first) = rest.strip_prefix("PORTS-") {
        return first.parse().ok().map(Leaf::Ports);
    }
    let nibbles = rest.strip_prefix("IP-")?;
    if nibbles.len() != usize::from(depth) {
        return None;
    }
    let mut low = 0;
    for (level, c) in nibbles.chars().enumerate() {
        low |= u16::try_from(c.to_digit(16)?).ok()? << (4 * level);
    }
    Some(Leaf::Address(low, depth))
}

/// Whether a name is one that the trunk may have.
fn is_trunk(table: Table, name: &str, depth: u8) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else { return false };
    match rest.strip_prefix(table.letter()).and_then(|r| r.strip_prefix('-')) {
        Some("NODEPORTS") => true,
        Some(rest) => rest.strip_prefix("IP-").is_some_and(|nibbles| nibbles.len() != usize::from(depth)),
        None => false,
    }
}

/// The rules of chains that are not ours: chain, and the rest as `iptables-save` prints it.
fn hooks(table: Table) -> Vec<(&'static str, String)> {
    let hook = |chain, condition: &str, to: &str| {
        (chain, format!("-m comment --comment \"podway: services\"{condition} -j {PREFIX}{to}"))
    };
    // What was translated is no longer for a service's address.
    let fresh = " -m conntrack --ctstate NEW -m conntrack ! --ctstate DNAT";
    match table {
        Table::Nat => vec![
            hook("PREROUTING", "", "PREROUTING"),
            hook("OUTPUT", "", "OUTPUT"),
            hook("POSTROUTING", "", "POSTROUTING"),
        ],
        Table::Filter => vec![
            hook("INPUT", fresh, "FILTER"),
            hook("FORWARD", fresh, "FILTER"),
            hook("FORWARD", "", "FORWARD"),
            hook("OUTPUT", fresh, "FILTER"),
        ],
    }
}

impl IptablesWriter {
    /// A writer that has not looked at the kernel yet, for one of the two implementations; see [`Kind::in_use`].
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            table: ServiceTable::default(),
            view: NodeView::default(),
            sides: FAMILIES.map(Side::new),
            keys: HashMap::new(),
            generation: None,
            refused: BTreeSet::new(),
            synced: false,
        }
    }

    /// Which implementation it drives.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Renders frontends; returns what they were before.
    fn stage(&mut self, keys: &BTreeSet<FrontendKey>) -> Before {
        let renderer = Renderer { kind: self.kind, table: &self.table, view: &self.view };
        let mut before = Vec::new();
        for key in keys {
            let side = &mut self.sides[key.addr.family() as usize];
            let rendered = renderer.frontend(key);
            before.push((*key, side.place(key, rendered)));
        }
        before
    }

    fn unstage(&mut self, before: Before) {
        for (key, rendered) in before.into_iter().rev() {
            self.sides[key.addr.family() as usize].place(&key, rendered);
        }
    }

    /// Writes what was touched.
    fn commit(&mut self, report: &mut Report) -> Result<()> {
        let renderer = Renderer { kind: self.kind, table: &self.table, view: &self.view };
        for side in &mut self.sides {
            side.grow();
            for table in Table::ALL {
                let t = table as usize;
                let difference = side.difference(table, &renderer);
                if !difference.is_empty() {
                    let before = self.generation.take();
                    restore(self.kind, side.family, &difference.input(table, &[]))?;
                    self.generation = before.map(|g| generation_after(g, 1));
                    report.written +=
                        difference.changed.values().map(|rules| rules.len().max(1)).sum::<usize>();
                    report.removed += difference.gone.len();
                    for name in &difference.gone {
                        side.written[t].remove(name);
                    }
                    side.written[t].extend(difference.changed);
                }
                side.touched[t].clear();
                side.regrown[t] = false;
            }
        }
        Ok(())
    }

    /// Writes the rules of services, and finds out which of them the kernel refuses.
    fn write(
        &mut self,
        services: &BTreeMap<ServiceId, BTreeSet<FrontendKey>>,
        report: &mut Report,
    ) -> Result<()> {
        let keys: BTreeSet<FrontendKey> = services.values().flatten().copied().collect();
        let before = self.stage(&keys);
        let Err(error) = self.commit(report) else { return Ok(()) };
        if let Error::Missing { .. } = error {
            return Err(error);
        }
        // Somebody may have taken away what the input builds on.
        if self.reread(report, None).is_ok() {
            return Ok(());
        }
        self.unstage(before);
        self.reread(report, None)?;
        self.isolate(services, report)
    }

    fn isolate(
        &mut self,
        services: &BTreeMap<ServiceId, BTreeSet<FrontendKey>>,
        report: &mut Report,
    ) -> Result<()> {
        if services.is_empty() {
            return Ok(());
        }
        let keys: BTreeSet<FrontendKey> = services.values().flatten().copied().collect();
        let before = self.stage(&keys);
        let Err(error) = self.commit(report) else { return Ok(()) };
        self.unstage(before);
        if let Error::Missing { .. } = error {
            return Err(error);
        }
        if let (1, Some(id)) = (services.len(), services.keys().next()) {
            let object =
                self.table.services.get(id).map_or_else(|| format!("service number {}", id.0), object_name);
            report.refused.push(Refused { service: *id, object, cause: error.to_string() });
            self.refused.insert(*id);
            return Ok(());
        }
        let mut first = services.clone();
        let middle = services.keys().nth(services.len() / 2).copied().expect("there are two at least");
        let second = first.split_off(&middle);
        self.isolate(&first, report)?;
        self.isolate(&second, report)
    }

    /// Reads everything of ours back, and writes what is not as it should be. Says what that was.
    fn reread(&mut self, report: &mut Report, mut audit: Option<&mut AuditReport>) -> Result<()> {
        let renderer = Renderer { kind: self.kind, table: &self.table, view: &self.view };
        self.generation = None;
        let mut generation = match self.kind {
            Kind::Nft => generation().ok(),
            Kind::Legacy => None,
        };
        for side in &mut self.sides {
            side.grow();
            for table in Table::ALL {
                let t = table as usize;
                let saved = save(self.kind, side.family, table, PREFIX)?;
                let wanted = side.everything(table, &renderer);
                let mut difference = Difference::default();
                difference.gone.extend(saved.ours.keys().filter(|name| !wanted.contains_key(*name)).cloned());
                for (name, rules) in wanted {
                    difference.compare(&saved.ours, name, rules);
                }
                let hooks = hooks(table);
                let mut lines = Vec::new();
                // Inserted at the front one by one, so the last of them comes first.
                for (chain, rule) in hooks.iter().rev() {
                    let there = saved.hooks.iter().filter(|(c, r)| c == chain && r == rule).count();
                    if there == 0 {
                        lines.push(format!("-I {chain} 1 {rule}"));
                    }
                    lines.extend((1..there).map(|_| format!("-D {chain} {rule}")));
                }
                for (chain, rule) in &saved.hooks {
                    if !hooks.iter().any(|(c, r)| c == chain && r == rule) {
                        lines.push(format!("-D {chain} {rule}"));
                    }
                }
                if let Some(audit) = audit.as_deref_mut() {
                    describe(side.family, table, &saved.ours, &difference, &lines, audit);
                }
                if !difference.is_empty() || !lines.is_empty() {
                    restore(self.kind, side.family, &difference.input(table, &lines))?;
                    generation = generation.map(|g| generation_after(g, 1));
                    report.written += lines.len()
                        + difference.changed.values().map(|rules| rules.len().max(1)).sum::<usize>();
                    report.removed += difference.gone.len();
                }
                side.written[t] = saved.ours;
                for name in &difference.gone {
                    side.written[t].remove(name);
                }
                side.written[t].extend(difference.changed);
                side.touched[t].clear();
                side.regrown[t] = false;
            }
        }
        self.generation = generation;
        Ok(())
    }

    /// Every service with its frontends.
    fn all_services(&self) -> BTreeMap<ServiceId, BTreeSet<FrontendKey>> {
        self.keys.iter().map(|(id, keys)| (*id, keys.clone())).collect()
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

    fn clean_flows(&self, services: impl IntoIterator<Item = ServiceId>, report: &mut Report) {
        let families = conntrack::families_of(&self.table, services);
        match conntrack::clean(&self.table, &self.view, &families) {
            Ok(flows) => report.flows_deleted += flows,
            // The rules are right all the same; flows that go on wrongly end when their clients pause.
            Err(error) => tracing::warn!(%error, "stale UDP flows could not be deleted"),
        }
    }
}

impl Writer for IptablesWriter {
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
                "the counters of its rules begin anew with each change; use --service-mode ebpf"
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
        self.sides = FAMILIES.map(Side::new);
        self.refused.clear();
        self.keys.clear();
        for (key, frontend) in &full.frontends {
            self.keys.entry(frontend.service).or_default().insert(*key);
        }
        let services = self.all_services();
        let before = self.stage(&full.frontends.keys().copied().collect());
        for addr in &full.vips {
            self.sides[Family::of(addr) as usize].place_vip(addr, true);
        }
        if let Err(error) = self.reread(&mut report, None) {
            if let Error::Missing { .. } = error {
                return Err(error);
            }
            tracing::warn!(%error, "the rules were refused as a whole: trying services one by one");
            self.unstage(before);
            self.reread(&mut report, None)?;
            self.isolate(&services, &mut report)?;
        }
        self.synced = true;
        self.clean_flows(services.into_keys(), &mut report);
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
        let mut services = BTreeMap::<ServiceId, BTreeSet<FrontendKey>>::new();
        for change in changes {
            match change {
                TableChange::Service(id, _) | TableChange::ServiceGone(id) => {
                    services.entry(*id).or_default();
                }
                TableChange::Set(id, _) => {
                    services.entry(id.service).or_default();
                }
                TableChange::Frontend(key, frontend) => {
                    self.forget_key(key);
                    self.keys.entry(frontend.service).or_default().insert(*key);
                    services.entry(frontend.service).or_default().insert(*key);
                }
                TableChange::FrontendGone(key) => {
                    if let Some(service) = self.forget_key(key) {
                        services.entry(service).or_default().insert(*key);
                    }
                }
                TableChange::Vip(addr) | TableChange::VipGone(addr) => {
                    let present = matches!(change, TableChange::Vip(_));
                    self.sides[Family::of(addr) as usize].place_vip(addr, present);
                }
            }
            self.table.apply(change);
        }
        for (id, keys) in &mut services {
            keys.extend(self.keys.get(id).into_iter().flatten());
        }
        self.refused.retain(|id| !services.contains_key(id));
        self.write(&services, &mut report)?;
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
        let mut report = Report::default();
        if self.refused.is_empty() && self.generation.is_some() && generation().ok() == self.generation {
            return Ok(audit);
        }
        self.reread(&mut report, Some(&mut audit))?;
        let refused = std::mem::take(&mut self.refused);
        let again: BTreeMap<_, _> =
            self.all_services().into_iter().filter(|(id, _)| refused.contains(id)).collect();
        self.isolate(&again, &mut report)?;
        for lines in [&mut audit.missing, &mut audit.foreign] {
            if lines.len() > AUDIT_LINES {
                let more = lines.len() - (AUDIT_LINES - 1);
                lines.truncate(AUDIT_LINES - 1);
                lines.push(format!("and {more} more"));
            }
        }
        report.took = start.elapsed();
        audit.report = report;
        Ok(audit)
    }

    fn remove(&mut self) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for family in FAMILIES {
            for table in Table::ALL {
                let saved = save(self.kind, family, table, PREFIX)?;
                if saved.ours.is_empty() && saved.hooks.is_empty() {
                    continue;
                }
                let rules: usize = saved.ours.values().map(Vec::len).sum();
                removed.push(format!(
                    "{}: table {} of {}, {} chains {PREFIX}* with {rules} rules",
                    self.kind.name(),
                    table.name(),
                    family_name(family),
                    saved.ours.len()
                ));
                let lines: Vec<String> =
                    saved.hooks.iter().map(|(chain, rule)| format!("-D {chain} {rule}")).collect();
                let difference =
                    Difference { changed: Chains::new(), gone: saved.ours.into_keys().collect() };
                restore(self.kind, family, &difference.input(table, &lines))?;
            }
        }
        *self = Self::new(self.kind);
        Ok(removed)
    }

    fn counters(&mut self) -> Result<Vec<ServiceCounters>> {
        self.supports(Feature::Counters)?;
        Ok(Vec::new())
    }
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// Says what is to be repaired.
fn describe(
    family: Family,
    table: Table,
    found: &Chains,
    difference: &Difference,
    hooks: &[String],
    audit: &mut AuditReport,
) {
    let place = format!("{} {}", family_name(family), table.name());
    audit.foreign.extend(difference.gone.iter().map(|name| format!("{place}: chain {name}")));
    for (name, rules) in &difference.changed {
        let Some(found) = found.get(name) else {
            audit.missing.push(format!("{place}: chain {name}"));
            continue;
        };
        let before = audit.missing.len() + audit.foreign.len();
        for rule in rules.iter().filter(|rule| !found.contains(rule)) {
            audit.missing.push(format!("{place}: -A {name} {rule}"));
        }
        for rule in found.iter().filter(|rule| !rules.contains(rule)) {
            audit.foreign.push(format!("{place}: -A {name} {rule}"));
        }
        if audit.missing.len() + audit.foreign.len() == before {
            audit.foreign.push(format!("{place}: the order of the rules of {name}"));
        }
    }
    for hook in hooks {
        match hook.strip_prefix("-I ") {
            Some(rule) => audit.missing.push(format!("{place}: -A {}", rule.replacen(" 1 ", " ", 1))),
            None => audit.foreign.push(format!("{place}: {}", hook.replacen("-D", "-A", 1))),
        }
    }
}
