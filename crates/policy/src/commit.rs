//! From what has changed to the changes of the tables, in the order that [`crate::table`] describes.
//!
//! New selectors come before the moves that need them, and are neutral: they tell peers apart, and both halves have the
//! verdicts of the whole. Selectors that nobody uses any more go after the moves, and are neutral again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use podway_model::policy::{Direction, Namespaces};

use crate::{
    atoms::{AtomId, AtomKey},
    compiler::{Compiler, Dirty},
    prefixes::boundaries,
    rules::{Prepared, atom_key, named_of, ranges_of},
    sets::{Scratch, Set, SetKey},
    table::{Assigned, Change, ClassId, Entry, PeerKey, RuleId, SetId, at},
    world::{Owner, own_addresses},
};

/// A peer that goes from one class to another.
struct PeerMove {
    peer: PeerKey,
    old: ClassId,
    new: ClassId,
    /// Whether it has an entry of its own then.
    has_entry: bool,
}

/// What a commit collects.
#[derive(Default)]
struct Step {
    /// Names, sets, verdicts.
    prepare: Vec<Change>,
    /// Moves of peers that change no verdict.
    neutral: Vec<Change>,
    new_atoms: Vec<AtomId>,
    new_names: Vec<String>,
    new_sets: Vec<SetId>,
    new_classes: BTreeSet<ClassId>,
    /// Classes that peers have left.
    left: BTreeSet<ClassId>,
    peers: Vec<PeerMove>,
    dead_atoms: BTreeSet<AtomId>,
    dead_rules: Vec<RuleId>,
}

impl Compiler {
    pub(crate) fn commit(&mut self) -> Vec<Change> {
        self.touch_namespaces();
        let mut dirty = std::mem::take(&mut self.dirty);
        let mut step = Step::default();
        let old_sets = self.choose_sets(&mut dirty, &mut step);
        self.add_selectors(&mut dirty, &mut step);
        self.classify(&dirty, &mut step);
        self.compile(&mut step);
        let mut changes = std::mem::take(&mut step.prepare);
        // Nothing leads to these yet. What goes below has to know of them.
        changes.iter().for_each(|change| self.table.apply(change));
        let prepared = changes.len();
        let endpoints = self.endpoint_moves(&dirty);
        changes.append(&mut step.neutral);
        changes.extend(moves(&step.peers, &endpoints, !self.table.endpoints.is_empty()));
        let (mut after, mut last) = (Vec::new(), Vec::new());
        self.retire_sets(&old_sets, &mut step, &mut after);
        self.retire_selectors(&mut step, &mut after);
        self.retire_classes(&mut step, &mut last);
        last.extend(step.dead_rules.iter().map(|id| Change::Rule(*id, None)));
        for mut part in [after, last] {
            if !part.is_empty() {
                changes.push(Change::Grace);
                changes.append(&mut part);
            }
        }
        changes[prepared..].iter().for_each(|change| self.table.apply(change));
        changes
    }

    /// Gives each pod that was touched the set it should have; returns the sets that have lost a pod.
    fn choose_sets(&mut self, dirty: &mut Dirty, step: &mut Step) -> BTreeSet<SetId> {
        let mut lost = std::mem::take(&mut dirty.sets);
        for id in &dirty.pods {
            let Some(key) = self.set_key(*id) else { continue };
            let set = if key.policies.is_empty() {
                SetId::NONE
            } else if let Some(set) = self.sets.find(&key) {
                set
            } else {
                self.create_set(key, step)
            };
            let state = &mut self.world.pods[*id];
            dirty.endpoints.extend(own_addresses(&state.pod));
            let old = std::mem::replace(&mut state.set, set);
            if old == set {
                continue;
            }
            if let Some(set) = self.sets.get_mut(set) {
                set.users += 1;
            }
            if let Some(set) = self.sets.get_mut(old) {
                set.users -= 1;
                lost.insert(old);
            }
        }
        lost
    }

    fn set_key(&self, id: u32) -> Option<SetKey> {
        let pod = &self.world.pods.get(id)?.pod;
        if !self.is_endpoint(pod) {
            return Some(SetKey::default());
        }
        let namespace = self.world.namespaces.get(&pod.namespace)?;
        let own = namespace.selecting.candidates(&pod.labels);
        let [by_pods, by_namespaces] = &self.cluster_selecting;
        let cluster = by_pods.candidates(&pod.labels).chain(by_namespaces.candidates(&namespace.labels));
        let selects = |id: &u32| {
            let Some(policy) = self.policies.get(*id) else { return false };
            let in_namespace = match &policy.namespaces {
                Namespaces::Named(_) => true,
                Namespaces::Selected(selector) => selector.matches(&namespace.labels),
            };
            in_namespace && policy.pods.matches(&pod.labels)
        };
        let mut policies: Vec<u32> = own.chain(cluster).filter(selects).collect();
        policies.sort_by_key(|id| self.policies[*id].order());
        let mut ports = Vec::new();
        if !pod.ports.is_empty() {
            let names: BTreeSet<&str> =
                policies.iter().flat_map(|id| self.policies[*id].names(Direction::Ingress)).collect();
            ports.extend(pod.ports.iter().filter(|port| names.contains(port.name.as_str())).cloned());
        }
        Some(SetKey { policies, ports })
    }

    fn create_set(&mut self, key: SetKey, step: &mut Step) -> SetId {
        for id in &key.policies {
            self.policies[*id].sets += 1;
            if self.policies[*id].prepared.is_none() {
                let prepared = Direction::ALL.map(|direction| self.prepare(*id, direction, step));
                self.policies[*id].prepared = Some(prepared);
            }
        }
        let set = Set::new(key, &self.policies);
        let info = Arc::clone(&set.info);
        let id = self.sets.insert(set, &mut self.atoms);
        step.prepare.push(Change::Set(id, Some(info)));
        step.new_sets.push(id);
        id
    }

    /// Gives a policy's rules their numbers and their atoms.
    fn prepare(&mut self, id: u32, direction: Direction, step: &mut Step) -> Vec<Arc<Prepared>> {
        let policy = &self.policies[id];
        let mut prepared = Vec::with_capacity(policy.rules[at(direction)].len());
        for (index, rule) in policy.rules[at(direction)].iter().enumerate() {
            let named = named_of(rule);
            let mut peers = rule.peers.as_ref().map(|peers| {
                let acquire = |peer| {
                    let (atom, is_new) = self.atoms.acquire(atom_key(peer));
                    if is_new {
                        step.new_atoms.push(atom);
                    }
                    atom
                };
                peers.iter().map(acquire).collect::<Vec<_>>()
            });
            if let Some(peers) = &mut peers {
                peers.sort_unstable();
            }
            if direction == Direction::Egress {
                for (name, _) in &named {
                    if self.atoms.acquire_name(name) {
                        step.new_names.push(name.clone());
                    }
                }
            }
            let key = (policy.reference.clone(), direction, index);
            let (number, users) =
                self.rule_ids.entry(key).or_insert_with(|| (RuleId(self.rules.insert(())), 0));
            *users += 1;
            let reference = policy.rule_ref(direction, index);
            if self.table.rules.get(number).is_none_or(|known| **known != reference) {
                step.prepare.push(Change::Rule(*number, Some(Arc::new(reference))));
            }
            prepared.push(Arc::new(Prepared {
                id: *number,
                action: rule.action,
                audit: policy.audit,
                stage: policy.stage,
                index,
                peers,
                ranges: ranges_of(rule),
                named,
            }));
        }
        prepared
    }

    /// Tells peers apart by the atoms that are new.
    fn add_selectors(&mut self, dirty: &mut Dirty, step: &mut Step) {
        if step.new_atoms.is_empty() && step.new_names.is_empty() {
            return;
        }
        let selected: Vec<AtomId> = {
            let of_selected =
                |id: &AtomId| matches!(**self.atoms.key(*id), AtomKey::Pods(Namespaces::Selected(_), _));
            step.new_atoms.iter().copied().filter(of_selected).collect()
        };
        if !selected.is_empty() {
            for state in self.world.namespaces.values_mut() {
                let matches = |id: &&AtomId| match &**self.atoms.key(**id) {
                    AtomKey::Pods(Namespaces::Selected(selector), _) => selector.matches(&state.labels),
                    _ => false,
                };
                for id in selected.iter().filter(matches) {
                    if let AtomKey::Pods(_, pods) = &**self.atoms.key(*id) {
                        state.selected.insert(pods, *id);
                    }
                }
            }
        }
        let first = self.classes.of.is_empty();
        let prefixes = self.add_blocks(step);
        if first {
            // Nobody has a class yet: everything is looked at once, and nothing moves.
            dirty.addresses.extend(self.world.addresses());
        }
        let mut affected: BTreeSet<PeerKey> = prefixes.into_iter().map(PeerKey::Prefix).collect();
        if !first {
            let addresses = self.affected_addresses(step);
            affected.extend(addresses.difference(&dirty.addresses).map(|addr| PeerKey::Address(*addr)));
        }
        self.split(&affected, step);
    }

    /// Addresses that new atoms may match.
    fn affected_addresses(&self, step: &Step) -> BTreeSet<IpAddr> {
        let mut affected = BTreeSet::new();
        for atom in &step.new_atoms {
            match &**self.atoms.key(*atom) {
                AtomKey::Pods(namespaces, pods) => {
                    let states: Vec<_> = match namespaces {
                        Namespaces::Named(name) => self.world.namespaces.get(name).into_iter().collect(),
                        Namespaces::Selected(s) => {
                            self.world.namespaces.values().filter(|n| s.matches(&n.labels)).collect()
                        }
                    };
                    for id in states.into_iter().flat_map(|state| state.pods.values()) {
                        let pod = &self.world.pods[*id].pod;
                        if pods.matches(&pod.labels) {
                            affected.extend(own_addresses(pod));
                        }
                    }
                }
                AtomKey::Nodes(selector) => {
                    let nodes = self.world.nodes.values().filter(|n| selector.matches(&n.labels));
                    affected.extend(nodes.flat_map(|n| n.addresses.iter().copied()));
                }
                AtomKey::Block(block) => {
                    affected.extend(self.table.addresses.keys().filter(|addr| block.cidr.contains(*addr)));
                }
                AtomKey::Port(_) => {}
            }
        }
        if !step.new_names.is_empty() {
            let asked = |pod: &&podway_model::Pod| pod.ports.iter().any(|p| step.new_names.contains(&p.name));
            affected.extend(self.pods().filter(asked).flat_map(own_addresses));
        }
        affected
    }

    /// Brings the prefixes up to date with the blocks in use; returns those that are new or different.
    fn add_blocks(&mut self, step: &Step) -> Vec<IpNet> {
        let is_block = |id: &AtomId| matches!(**self.atoms.key(*id), AtomKey::Block(_));
        if !step.new_atoms.iter().any(is_block) {
            return Vec::new();
        }
        let mut changed = Vec::new();
        for (net, ids) in self.boundaries(&BTreeSet::new()) {
            if self.blocks.get(&net) != Some(&ids) {
                self.blocks.set(net, Some(ids));
                changed.push(net);
            }
        }
        changed
    }

    fn boundaries(&self, without: &BTreeSet<AtomId>) -> Vec<(IpNet, Vec<AtomId>)> {
        let blocks = self.atoms.blocks.difference(without);
        boundaries(blocks.filter_map(|id| match &**self.atoms.key(*id) {
            AtomKey::Block(block) => Some((*id, block)),
            _ => None,
        }))
    }

    /// What matches a peer: `None` when only prefixes say so.
    fn key_of(&mut self, peer: PeerKey) -> Option<Vec<AtomId>> {
        let addr = match peer {
            PeerKey::Prefix(net) => return self.blocks.get(&net).cloned(),
            PeerKey::Address(addr) => addr,
        };
        let mut key = Vec::new();
        match self.world.owner(addr)? {
            Owner::Pod(id) => {
                let pod = &self.world.pods.get(*id)?.pod;
                let namespace = self.world.namespaces.get(&pod.namespace)?;
                self.atoms.of_pod(&pod.namespace, &namespace.selected, &pod.labels, &mut key);
                for port in &pod.ports {
                    key.extend(self.atoms.port(port));
                }
            }
            Owner::Node(name) => self.atoms.of_node(&self.world.nodes.get(name)?.labels, &mut key),
        }
        if key.is_empty() {
            return None;
        }
        key.extend(self.blocks.longest(addr).into_iter().flatten());
        key.sort_unstable();
        key.dedup();
        Some(key)
    }

    /// Moves peers to the classes that tell them apart. A class of which every member goes the same way keeps its
    /// number instead.
    fn split(&mut self, affected: &BTreeSet<PeerKey>, step: &mut Step) {
        let mut groups: BTreeMap<(Option<ClassId>, Vec<AtomId>), Vec<PeerKey>> = BTreeMap::new();
        for peer in affected {
            if let Some(key) = self.key_of(*peer) {
                groups.entry((self.classes.of.get(peer).copied(), key)).or_default().push(*peer);
            }
        }
        for ((old, key), peers) in groups {
            if let Some(old) = old.filter(|old| *old != ClassId::NONE) {
                let Some(class) = self.classes.get(old) else { continue };
                if *class.key == key[..] {
                    continue;
                }
                if class.members.len() == peers.len() && self.classes.find(&key).is_none() {
                    self.classes.rekey(old, &key, &mut self.atoms);
                    continue;
                }
            }
            let (class, is_new) = self.classes.find_or_create(&key, &mut self.atoms);
            if is_new {
                step.new_classes.insert(class);
            }
            for peer in peers {
                let left = self.classes.assign(peer, Some(class));
                step.left.extend(left);
                if left != Some(class) {
                    step.neutral.push(Change::Peer(peer, Some(Assigned::settled(class))));
                }
            }
        }
    }

    /// Finds the classes of addresses whose owners have changed.
    fn classify(&mut self, dirty: &Dirty, step: &mut Step) {
        for addr in &dirty.addresses {
            let peer = PeerKey::Address(*addr);
            let class = self.key_of(peer).map(|key| {
                let (class, is_new) = self.classes.find_or_create(&key, &mut self.atoms);
                if is_new {
                    step.new_classes.insert(class);
                }
                class
            });
            let old = self.classes.assign(peer, class);
            step.left.extend(old);
            if old != class {
                let by_prefix = self.class_by_prefix(*addr);
                let (old, new) = (old.unwrap_or(by_prefix), class.unwrap_or(by_prefix));
                step.peers.push(PeerMove { peer, old, new, has_entry: class.is_some() });
            }
        }
    }

    fn class_by_prefix(&self, addr: IpAddr) -> ClassId {
        let atoms = self.blocks.longest(addr).map_or(&[][..], Vec::as_slice);
        self.classes.find(atoms).unwrap_or(ClassId::NONE)
    }

    /// Verdicts of new sets for all classes, and of all sets for new classes.
    fn compile(&mut self, step: &mut Step) {
        let Step { prepare, new_sets, new_classes, .. } = step;
        let new_sets: BTreeSet<SetId> = new_sets.iter().copied().collect();
        let mut wanted: BTreeMap<SetId, Option<Vec<ClassId>>> =
            new_sets.iter().map(|id| (*id, None)).collect();
        for class in &*new_classes {
            for set in self.sets_asking(&self.classes[*class].key).difference(&new_sets) {
                wanted.entry(*set).or_insert_with(|| Some(Vec::new())).get_or_insert_default().push(*class);
            }
        }
        let mut scratch = Scratch::default();
        for (id, only) in wanted {
            let Some(set) = self.sets.get(id) else { continue };
            for direction in Direction::ALL {
                let found = |class, entries: Arc<[Entry]>| {
                    if !entries.is_empty() {
                        prepare.push(Change::Verdicts(id, direction, class, Some(entries)));
                    }
                };
                let peers = (&self.atoms, &self.classes);
                set.compile(direction, only.as_deref(), peers, &mut scratch, found);
            }
        }
    }

    /// Sets that can tell a class with these atoms from class 0.
    fn sets_asking(&self, class: &[AtomId]) -> BTreeSet<SetId> {
        let mut found = BTreeSet::new();
        for atom in class.iter().filter_map(|atom| self.atoms.get(*atom)) {
            found.extend(&atom.sets);
            if let AtomKey::Port(port) = &*atom.key {
                found.extend(self.sets.by_name.get(&port.name).into_iter().flatten());
            }
        }
        found
    }

    fn endpoint_moves(&self, dirty: &Dirty) -> Vec<(IpAddr, SetId, SetId)> {
        let wanted = |addr: &IpAddr| match self.world.owner(*addr) {
            Some(Owner::Pod(id)) => self.world.pods.get(*id).map_or(SetId::NONE, |state| state.set),
            _ => SetId::NONE,
        };
        let old = |addr: &IpAddr| self.table.endpoints.get(addr).map_or(SetId::NONE, |set| set.new);
        let moves = dirty.endpoints.iter().map(|addr| (*addr, old(addr), wanted(addr)));
        moves.filter(|(_, old, new)| old != new).collect()
    }

    fn retire_sets(&mut self, lost: &BTreeSet<SetId>, step: &mut Step, after: &mut Vec<Change>) {
        let mut released: HashMap<u32, usize> = HashMap::new();
        for id in lost {
            if self.sets.get(*id).is_none_or(|set| set.users > 0) {
                continue;
            }
            let Some(set) = self.sets.remove(*id, &mut self.atoms) else { continue };
            after.push(Change::Set(*id, None));
            for direction in Direction::ALL {
                let classes = self.table.verdicts.classes(*id, direction);
                after.extend(classes.map(|class| Change::Verdicts(*id, direction, class, None)));
            }
            for policy in &set.key.policies {
                *released.entry(*policy).or_default() += 1;
            }
        }
        for (id, count) in released {
            self.policies[id].sets -= count;
            if self.policies[id].sets == 0 {
                self.retire_policy(id, step);
            }
        }
    }

    fn retire_policy(&mut self, id: u32, step: &mut Step) {
        let policy = &mut self.policies[id];
        let reference = policy.reference.clone();
        let prepared = policy.prepared.take();
        for (rules, direction) in prepared.into_iter().flatten().zip(Direction::ALL) {
            for rule in rules {
                for atom in rule.peers.iter().flatten() {
                    if self.atoms.release(*atom) {
                        step.dead_atoms.insert(*atom);
                    }
                }
                if direction == Direction::Egress {
                    for (name, _) in &rule.named {
                        step.dead_atoms.extend(self.atoms.release_name(name));
                    }
                }
                let key = (reference.clone(), direction, rule.index);
                if let Some((number, users)) = self.rule_ids.get_mut(&key) {
                    *users -= 1;
                    if *users == 0 {
                        let number = *number;
                        self.rule_ids.remove(&key);
                        self.rules.remove(number.0);
                        step.dead_rules.push(number);
                    }
                }
            }
        }
        if !self.is_current(id) {
            self.policies.remove(id);
        }
    }

    /// Joins classes that nothing tells apart any more.
    fn retire_selectors(&mut self, step: &mut Step, after: &mut Vec<Change>) {
        let dead = std::mem::take(&mut step.dead_atoms);
        if dead.is_empty() {
            return;
        }
        let is_block = |id: &AtomId| matches!(**self.atoms.key(*id), AtomKey::Block(_));
        if dead.iter().any(is_block) {
            let mut old: BTreeSet<IpNet> = self.blocks.iter().map(|(net, _)| *net).collect();
            for (net, ids) in self.boundaries(&dead) {
                old.remove(&net);
                self.blocks.set(net, Some(ids));
            }
            for net in old {
                self.blocks.set(net, None);
                let peer = PeerKey::Prefix(net);
                step.left.extend(self.classes.assign(peer, None));
                after.push(Change::Peer(peer, None));
            }
        }
        let touched: BTreeSet<ClassId> = dead
            .iter()
            .filter_map(|id| self.atoms.get(*id))
            .flat_map(|atom| atom.classes.iter().copied())
            .collect();
        for id in touched {
            let Some(class) = self.classes.get(id) else { continue };
            let key: Vec<AtomId> = class.key.iter().copied().filter(|atom| !dead.contains(atom)).collect();
            let only_blocks = key.iter().all(is_block_in(&self.atoms));
            let mut members: Vec<PeerKey> = class.members.iter().copied().collect();
            members.sort_unstable();
            let target = self.classes.find(&key);
            for peer in members {
                let class = match peer {
                    // An address that no selector of pods or nodes matches is left to the prefixes.
                    PeerKey::Address(_) if only_blocks => None,
                    _ => Some(target.unwrap_or(id)),
                };
                if class != Some(id) {
                    self.classes.assign(peer, class);
                    after.push(Change::Peer(peer, class.map(Assigned::settled)));
                }
            }
            if target.is_none() && self.classes.get(id).is_some_and(|class| !class.members.is_empty()) {
                self.classes.rekey(id, &key, &mut self.atoms);
            } else {
                step.left.insert(id);
            }
        }
        for state in self.world.namespaces.values_mut() {
            for id in &dead {
                if let AtomKey::Pods(Namespaces::Selected(_), pods) = &**self.atoms.key(*id) {
                    state.selected.remove(pods, *id);
                }
            }
        }
        // Classes that are left have the atoms in their keys until they go, right after this.
        step.dead_atoms = dead;
    }

    fn retire_classes(&mut self, step: &mut Step, last: &mut Vec<Change>) {
        for id in &step.left {
            let Some(class) = self.classes.remove(*id, &mut self.atoms) else { continue };
            for set in self.sets_asking(&class.key) {
                for direction in Direction::ALL {
                    if self.table.verdicts.contains_key(&(set, direction, *id)) {
                        last.push(Change::Verdicts(set, direction, *id, None));
                    }
                }
            }
            for atom in &*class.key {
                let is_port = matches!(**self.atoms.key(*atom), AtomKey::Port(_));
                if is_port && self.atoms.get(*atom).is_some_and(|atom| atom.classes.is_empty()) {
                    // No pod has this port under the name any more.
                    self.atoms.remove(*atom);
                }
            }
        }
        for id in &step.dead_atoms {
            self.atoms.remove(*id);
        }
    }
}

fn is_block_in(atoms: &crate::atoms::Atoms) -> impl Fn(&AtomId) -> bool {
    |id| matches!(**atoms.key(*id), AtomKey::Block(_))
}

/// The moves that change verdicts: in one step when it is only one, else in two.
fn moves(peers: &[PeerMove], endpoints: &[(IpAddr, SetId, SetId)], is_in_force: bool) -> Vec<Change> {
    let mut changes = Vec::new();
    if is_in_force && peers.len() + endpoints.len() > 1 {
        for PeerMove { peer, old, new, .. } in peers {
            changes.push(Change::Peer(*peer, Some(Assigned { old: *old, new: *new })));
        }
        for (addr, old, new) in endpoints {
            changes.push(Change::Endpoint(*addr, Some(Assigned { old: *old, new: *new })));
        }
    }
    for PeerMove { peer, new, has_entry, .. } in peers {
        changes.push(Change::Peer(*peer, has_entry.then_some(Assigned::settled(*new))));
    }
    for (addr, _, new) in endpoints {
        let set = (*new != SetId::NONE).then_some(Assigned::settled(*new));
        changes.push(Change::Endpoint(*addr, set));
    }
    changes
}
