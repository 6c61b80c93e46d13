//! Sets of policies: what is judged at endpoints that the same policies select.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use podway_model::{Protocol, pod::NamedPort, policy::Direction};

use crate::{
    atoms::{AtomId, AtomKey, Atoms},
    classes::Classes,
    ids::Slab,
    lanes::Lanes,
    rules::{Isolation, Policy, Prepared, Range, SetRule, Stage, flatten},
    table::{ClassId, Entry, PolicyRef, SetId, SetInfo, at},
};

/// What makes two endpoints share a set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct SetKey {
    /// Numbers of the policies that select them, in the order of judgement.
    pub(crate) policies: Vec<u32>,
    /// Their ports of names that rules for ingress ask for.
    pub(crate) ports: Vec<NamedPort>,
}

/// The rules of one direction.
#[derive(Debug, Default)]
pub(crate) struct SetRules {
    /// In the order of judgement.
    pub(crate) rules: Vec<SetRule>,
    /// Indexes of rules for everybody.
    any: Vec<u32>,
    by_atom: HashMap<AtomId, Vec<u32>>,
    /// Names of ports that its rules ask the target for.
    pub(crate) names: BTreeSet<String>,
}

impl SetRules {
    fn new(mut rules: Vec<SetRule>, direction: Direction) -> Self {
        // Rules of NetworkPolicies have no order. Those for everybody go first, so that a class needs no entries of its
        // own for what everybody may do.
        let everybody = |r: &SetRule| r.rule.peers.is_none() && r.rule.named.is_empty();
        rules.sort_by_key(|r| (r.rule.stage, r.rule.stage == Stage::Network && !everybody(r)));
        let mut set = Self::default();
        for (i, rule) in (0..).zip(&rules) {
            match &rule.rule.peers {
                None => set.any.push(i),
                Some(atoms) => atoms.iter().for_each(|atom| set.by_atom.entry(*atom).or_default().push(i)),
            }
            if direction == Direction::Egress {
                set.names.extend(rule.rule.named.iter().map(|(name, _)| name.clone()));
            }
        }
        set.rules = rules;
        set
    }

    pub(crate) fn atoms(&self) -> impl Iterator<Item = AtomId> {
        self.by_atom.keys().copied()
    }

    /// The rules that match a peer with these atoms, in order.
    pub(crate) fn matching(&self, key: &[AtomId]) -> Vec<&SetRule> {
        let mut found = self.any.clone();
        found.extend(key.iter().filter_map(|atom| self.by_atom.get(atom)).flatten());
        found.sort_unstable();
        found.dedup();
        found.into_iter().map(|i| &self.rules[i as usize]).collect()
    }
}

#[derive(Debug)]
pub(crate) struct Set {
    pub(crate) key: SetKey,
    pub(crate) info: Arc<SetInfo>,
    pub(crate) rules: [SetRules; 2],
    /// The verdicts of class 0.
    base: [Lanes; 2],
    /// How many endpoints have it.
    pub(crate) users: usize,
}

impl Set {
    /// From policies in the order of judgement, whose rules are prepared.
    pub(crate) fn new(key: SetKey, policies: &Slab<Policy>) -> Self {
        let members: Vec<&Policy> = key.policies.iter().filter_map(|id| policies.get(*id)).collect();
        let isolating = |direction: Direction| {
            let isolates = |p: &&Policy| p.isolates[at(direction)];
            // Those that enforce come first: they are what denies.
            let (audited, mut enforced): (Vec<&Policy>, Vec<&Policy>) =
                members.iter().copied().filter(isolates).partition(|p| p.audit);
            let isolation = Isolation { enforced: !enforced.is_empty(), audited: !audited.is_empty() };
            enforced.extend(audited);
            let names: Vec<PolicyRef> = enforced.iter().map(|p| p.reference.clone()).collect();
            (isolation, names)
        };
        let (ingress, isolating_ingress) = isolating(Direction::Ingress);
        let (egress, isolating_egress) = isolating(Direction::Egress);
        let info = SetInfo {
            defaults: [ingress.default_verdict(), egress.default_verdict()],
            policies: members.iter().map(|p| p.reference.clone()).collect(),
            isolating: [isolating_ingress, isolating_egress],
        };
        let rules = Direction::ALL.map(|direction| {
            let prepared = members.iter().filter_map(|p| p.prepared.as_ref()).flat_map(|p| &p[at(direction)]);
            let resolved = |rule: &Prepared| match direction {
                Direction::Ingress => resolve(rule, key.ports.iter()),
                Direction::Egress => Vec::new(),
            };
            let rules = prepared.map(|rule| SetRule { rule: Arc::clone(rule), resolved: resolved(rule) });
            SetRules::new(rules.collect(), direction)
        });
        let base = Direction::ALL.map(|direction| {
            let matching = rules[at(direction)].matching(&[]);
            flatten(&matching, Isolation::of(&info, direction), &|_| Vec::new())
        });
        Self { key, info: Arc::new(info), rules, base, users: 0 }
    }

    /// The entries of classes, in the order of their numbers; none when the answers are those of class 0. `only` are the
    /// classes that are asked about; `None` is all whose answers can differ from those of class 0, and class 0 itself.
    /// Classes that the same rules match in the same way share their entries.
    pub(crate) fn compile(
        &self,
        direction: Direction,
        only: Option<&[ClassId]>,
        (atoms, classes): (&Atoms, &Classes),
        scratch: &mut Scratch,
        mut found: impl FnMut(ClassId, Arc<[Entry]>),
    ) {
        let rules = &self.rules[at(direction)];
        scratch.begin(rules.rules.len(), classes.bound());
        if let Some(only) = only {
            for class in only {
                scratch.mark([class], &[]);
                let asked = classes[*class].key.iter().filter_map(|atom| rules.by_atom.get(atom));
                asked.for_each(|indexes| scratch.mark([class], indexes));
            }
        } else {
            for (atom, indexes) in &rules.by_atom {
                scratch.mark(atoms.get(*atom).into_iter().flat_map(|atom| &atom.classes), indexes);
            }
            let named = rules.names.iter().flat_map(|name| atoms.named(name));
            scratch.mark(named.filter_map(|atom| atoms.get(atom)).flat_map(|atom| &atom.classes), &[]);
            scratch.mark([&ClassId::NONE], &[]);
        }
        scratch.touched.sort_unstable();
        let base = &self.base[at(direction)];
        let mut known: HashMap<Vec<u64>, Arc<[Entry]>> = HashMap::new();
        let mut key = Vec::new();
        for class in &scratch.touched {
            if *class == ClassId::NONE {
                let default = Isolation::of(&self.info, direction).default_verdict();
                found(*class, base.encode(&Lanes::constant(default)).into());
                continue;
            }
            let of = &classes[*class].key;
            key.clear();
            key.extend_from_slice(scratch.marks(*class));
            if !rules.names.is_empty() {
                // What the target has under the names is part of the match.
                let asked = of.iter().filter(|atom| match &**atoms.key(**atom) {
                    AtomKey::Port(port) => rules.names.contains(&port.name),
                    _ => false,
                });
                key.extend(asked.map(|atom| u64::from(*atom)));
            }
            let entries = match known.get(&key) {
                Some(entries) => Arc::clone(entries),
                None => {
                    let entries: Arc<[Entry]> = self.lanes(direction, of, atoms).encode(base).into();
                    known.insert(key.clone(), Arc::clone(&entries));
                    entries
                }
            };
            found(*class, entries);
        }
    }

    /// The verdicts for a class.
    pub(crate) fn lanes(&self, direction: Direction, class: &[AtomId], atoms: &Atoms) -> Lanes {
        let isolation = Isolation::of(&self.info, direction);
        let rules = &self.rules[at(direction)];
        let matching = rules.matching(class);
        let named = |rule: &Prepared| match direction {
            Direction::Ingress => Vec::new(),
            Direction::Egress => resolve(rule, ports_of(class, atoms)),
        };
        flatten(&matching, isolation, &named)
    }
}

/// Which rules match which classes, while a set is compiled: a bit for each.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// 64-bit words of one class.
    words: usize,
    /// Where each class has its words, by its number; 0 is nowhere.
    slots: Vec<u32>,
    bits: Vec<u64>,
    touched: Vec<ClassId>,
}

impl Scratch {
    fn begin(&mut self, rules: usize, classes: usize) {
        for class in self.touched.drain(..) {
            self.slots[class.0 as usize] = 0;
        }
        self.slots.resize(self.slots.len().max(classes), 0);
        self.words = rules.div_ceil(64);
        self.bits.clear();
    }

    fn mark<'a>(&mut self, classes: impl IntoIterator<Item = &'a ClassId>, rules: &[u32]) {
        for class in classes {
            let slot = &mut self.slots[class.0 as usize];
            if *slot == 0 {
                self.touched.push(*class);
                *slot = u32::try_from(self.touched.len()).expect("classes have 32-bit numbers");
                self.bits.resize(self.bits.len() + self.words, 0);
            }
            let first = (*slot as usize - 1) * self.words;
            for rule in rules {
                self.bits[first + (rule / 64) as usize] |= 1 << (rule % 64);
            }
        }
    }

    fn marks(&self, class: ClassId) -> &[u64] {
        let slot = self.slots[class.0 as usize] as usize - 1;
        &self.bits[slot * self.words..(slot + 1) * self.words]
    }
}

/// The named ports that a class has.
pub(crate) fn ports_of<'a>(class: &'a [AtomId], atoms: &'a Atoms) -> impl Iterator<Item = &'a NamedPort> {
    class.iter().filter_map(|atom| match &**atoms.key(*atom) {
        AtomKey::Port(port) => Some(port),
        _ => None,
    })
}

/// What a rule's names come to at a target with these ports.
pub(crate) fn resolve<'a>(rule: &Prepared, ports: impl Iterator<Item = &'a NamedPort>) -> Vec<Range> {
    let asked = |port: &NamedPort| {
        let same = |(name, protocol): &(String, Option<Protocol>)| {
            *name == port.name && protocol.is_none_or(|p| p == port.protocol)
        };
        rule.named.iter().any(same)
    };
    ports.filter(|port| asked(port)).map(|port| (port.protocol, port.port, port.port)).collect()
}

/// All sets in use.
#[derive(Debug)]
pub(crate) struct Sets {
    slab: Slab<Option<Set>>,
    ids: HashMap<SetKey, SetId>,
    /// Sets whose rules for egress ask for a name.
    pub(crate) by_name: HashMap<String, BTreeSet<SetId>>,
}

impl Default for Sets {
    fn default() -> Self {
        let mut slab = Slab::default();
        // Number 0 is that of no policy.
        slab.insert(None);
        Self { slab, ids: HashMap::new(), by_name: HashMap::new() }
    }
}

impl Sets {
    pub(crate) fn find(&self, key: &SetKey) -> Option<SetId> {
        self.ids.get(key).copied()
    }

    pub(crate) fn insert(&mut self, set: Set, atoms: &mut Atoms) -> SetId {
        let key = set.key.clone();
        let id = SetId(self.slab.insert(Some(set)));
        self.ids.insert(key, id);
        let Some(set) = self.get(id) else { return id };
        let asked: BTreeSet<AtomId> = set.rules.iter().flat_map(SetRules::atoms).collect();
        let names: Vec<String> = set.rules.iter().flat_map(|r| &r.names).cloned().collect();
        for atom in asked {
            if let Some(atom) = atoms.get_mut(atom) {
                atom.sets.insert(id);
            }
        }
        for name in names {
            self.by_name.entry(name).or_default().insert(id);
        }
        id
    }

    pub(crate) fn remove(&mut self, id: SetId, atoms: &mut Atoms) -> Option<Set> {
        let set = self.slab.remove(id.0)??;
        self.ids.remove(&set.key);
        for atom in set.rules.iter().flat_map(SetRules::atoms) {
            if let Some(atom) = atoms.get_mut(atom) {
                atom.sets.remove(&id);
            }
        }
        for name in set.rules.iter().flat_map(|r| &r.names) {
            if let Some(sets) = self.by_name.get_mut(name) {
                sets.remove(&id);
                if sets.is_empty() {
                    self.by_name.remove(name);
                }
            }
        }
        Some(set)
    }

    pub(crate) fn get(&self, id: SetId) -> Option<&Set> {
        self.slab.get(id.0)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: SetId) -> Option<&mut Set> {
        self.slab.get_mut(id.0)?.as_mut()
    }

    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }
}
