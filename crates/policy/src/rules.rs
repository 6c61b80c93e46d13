//! Policies prepared for judgement: one form for both kinds, in one order.

use std::{collections::BTreeSet, sync::Arc};

use podway_model::{
    ClusterNetworkPolicy, NetworkPolicy, Protocol, Selector,
    cluster_policy::Tier,
    policy::{Action, Direction, Namespaces, Peer, PortMatch, Rule},
};

use crate::{
    atoms::{AtomId, AtomKey},
    lanes::{LANES, Lanes, OTHER, lane_of},
    table::{PolicyRef, RuleId, RuleRef, SetInfo, Verdict, at},
};

/// Where a policy stands in the order of judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Admin,
    Network,
    Baseline,
}

/// Ports of one protocol, both ends included.
pub(crate) type Range = (Protocol, u16, u16);

/// One rule, prepared.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) id: RuleId,
    pub(crate) action: Action,
    pub(crate) audit: bool,
    pub(crate) stage: Stage,
    pub(crate) index: usize,
    /// `None` is everybody.
    pub(crate) peers: Option<Vec<AtomId>>,
    /// Numbered ports; `None` is all traffic.
    pub(crate) ranges: Option<Vec<Range>>,
    /// Ports by name, which depend on the connection's target.
    pub(crate) named: Vec<(String, Option<Protocol>)>,
}

/// One policy as it is now; a changed object is another.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) reference: PolicyRef,
    pub(crate) stage: Stage,
    pub(crate) priority: u16,
    pub(crate) audit: bool,
    pub(crate) namespaces: Namespaces,
    pub(crate) pods: Selector,
    pub(crate) isolates: [bool; 2],
    pub(crate) rules: [Vec<Rule>; 2],
    /// Rules with numbers, while some set uses the policy.
    pub(crate) prepared: Option<[Vec<Arc<Prepared>>; 2]>,
    /// How many sets use it.
    pub(crate) sets: usize,
}

impl Policy {
    pub(crate) fn network(policy: NetworkPolicy) -> Self {
        Self {
            reference: PolicyRef {
                kind: "NetworkPolicy",
                namespace: policy.namespace.as_str().into(),
                name: policy.name.into(),
            },
            stage: Stage::Network,
            priority: 0,
            audit: policy.audit,
            namespaces: Namespaces::Named(policy.namespace),
            pods: policy.pods,
            isolates: [policy.ingress.is_some(), policy.egress.is_some()],
            rules: [policy.ingress.unwrap_or_default(), policy.egress.unwrap_or_default()],
            prepared: None,
            sets: 0,
        }
    }

    pub(crate) fn cluster(policy: ClusterNetworkPolicy) -> Self {
        Self {
            reference: PolicyRef { kind: policy.kind, namespace: "".into(), name: policy.name.into() },
            stage: match policy.tier {
                Tier::Admin => Stage::Admin,
                Tier::Baseline => Stage::Baseline,
            },
            priority: policy.priority,
            audit: policy.audit,
            namespaces: Namespaces::Selected(policy.namespaces),
            pods: policy.pods,
            isolates: [false, false],
            rules: [policy.ingress, policy.egress],
            prepared: None,
            sets: 0,
        }
    }

    /// The order of judgement. Policies of one priority go by name: the API leaves it open.
    pub(crate) fn order(&self) -> (Stage, u16, &PolicyRef) {
        (self.stage, self.priority, &self.reference)
    }

    /// Whether it says the same as another, so that nothing has to be done.
    pub(crate) fn is_same(&self, other: &Policy) -> bool {
        self.reference == other.reference
            && self.stage == other.stage
            && self.priority == other.priority
            && self.audit == other.audit
            && self.namespaces == other.namespaces
            && self.pods == other.pods
            && self.isolates == other.isolates
            && self.rules == other.rules
    }

    pub(crate) fn rule_ref(&self, direction: Direction, index: usize) -> RuleRef {
        let name = self.rules[at(direction)].get(index).map_or_else(String::new, |rule| rule.name.clone());
        RuleRef { policy: self.reference.clone(), direction, index, name }
    }

    /// Names of ports that targets of a direction are asked for.
    pub(crate) fn names(&self, direction: Direction) -> BTreeSet<&str> {
        let ports = self.rules[at(direction)].iter().filter_map(|rule| rule.ports.as_ref()).flatten();
        ports
            .filter_map(|p| if let PortMatch::Named { name, .. } = p { Some(name.as_str()) } else { None })
            .collect()
    }
}

pub(crate) fn atom_key(peer: &Peer) -> AtomKey {
    match peer {
        Peer::Pods { namespaces, pods } => AtomKey::Pods(namespaces.clone(), pods.clone()),
        Peer::Nodes(selector) => AtomKey::Nodes(selector.clone()),
        Peer::Block(block) => AtomKey::Block(block.clone()),
    }
}

pub(crate) fn ranges_of(rule: &Rule) -> Option<Vec<Range>> {
    let ports = rule.ports.as_ref()?;
    let range = |port: &PortMatch| match port {
        PortMatch::Range(protocol, first, last) => Some((*protocol, *first, *last)),
        PortMatch::Named { .. } => None,
    };
    Some(ports.iter().filter_map(range).collect())
}

pub(crate) fn named_of(rule: &Rule) -> Vec<(String, Option<Protocol>)> {
    let named = |port: &PortMatch| match port {
        PortMatch::Named { name, protocol } => Some((name.clone(), *protocol)),
        PortMatch::Range(..) => None,
    };
    rule.ports.iter().flatten().filter_map(named).collect()
}

/// A rule in a set: its named ports known as far as they depend on the set.
#[derive(Clone, Debug)]
pub(crate) struct SetRule {
    pub(crate) rule: Arc<Prepared>,
    /// Where the endpoint is the target: what its names come to.
    pub(crate) resolved: Vec<Range>,
}

/// The default of a direction, and what goes on when only policies in audit mode isolate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Isolation {
    pub(crate) enforced: bool,
    pub(crate) audited: bool,
}

impl Isolation {
    /// What holds where no rule says anything.
    pub(crate) fn default_verdict(self) -> Verdict {
        Verdict { allow: !self.enforced, audit: !self.enforced && self.audited, rule: RuleId::DEFAULT }
    }

    pub(crate) fn of(info: &SetInfo, direction: Direction) -> Self {
        let default = info.defaults[at(direction)];
        Self { enforced: !default.allow, audited: default.audit }
    }
}

/// Ports that no rule has decided yet, and the denial in audit mode that they have met.
#[derive(Clone, Copy)]
struct Open {
    first: u16,
    last: u16,
    mark: Option<RuleId>,
}

impl Open {
    fn allowed(self, rule: RuleId) -> (u16, u16, Verdict) {
        let verdict = Verdict { allow: true, audit: self.mark.is_some(), rule: self.mark.unwrap_or(rule) };
        (self.first, self.last, verdict)
    }
}

/// Cuts a range out of what is open.
fn take(open: &mut Vec<Open>, first: u16, last: u16, taken: &mut Vec<Open>) {
    let mut rest = Vec::with_capacity(open.len() + 1);
    for piece in open.drain(..) {
        if piece.last < first || last < piece.first {
            rest.push(piece);
            continue;
        }
        if piece.first < first {
            rest.push(Open { last: first - 1, ..piece });
        }
        if last < piece.last {
            rest.push(Open { first: last + 1, ..piece });
        }
        taken.push(Open { first: piece.first.max(first), last: piece.last.min(last), ..piece });
    }
    *open = rest;
}

/// Flattens rules, which are in the order of judgement and all match the peer, to one verdict for each protocol and
/// port. `named` says what else a rule's named ports come to.
pub(crate) fn flatten<'a>(
    rules: &[&'a SetRule],
    isolation: Isolation,
    named: &dyn Fn(&'a Prepared) -> Vec<Range>,
) -> Lanes {
    let by_name: Vec<Vec<Range>> =
        rules.iter().map(|r| if r.rule.named.is_empty() { Vec::new() } else { named(&r.rule) }).collect();
    let ranges: [Vec<(u16, u16, Verdict)>; LANES] = std::array::from_fn(|lane| {
        let mut judge =
            Judge { open: vec![Open { first: 0, last: last_of(lane), mark: None }], done: Vec::new() };
        let mut passed = Vec::new();
        let stage = |stage: Stage| {
            let rules = rules.iter().zip(&by_name);
            rules.filter(move |(r, _)| r.rule.stage == stage)
        };
        for (rule, by_name) in stage(Stage::Admin) {
            judge.rule(rule, by_name, lane, &mut passed);
            if judge.open.is_empty() {
                break;
            }
        }
        judge.open.append(&mut passed);
        for (rule, by_name) in stage(Stage::Network) {
            if judge.open.is_empty() {
                break;
            }
            judge.rule(rule, by_name, lane, &mut passed);
        }
        if isolation.enforced {
            let deny = Verdict { allow: false, audit: false, rule: RuleId::DEFAULT };
            judge.done.extend(judge.open.drain(..).map(|o| (o.first, o.last, deny)));
        } else if isolation.audited {
            judge.open.iter_mut().for_each(|o| {
                o.mark.get_or_insert(RuleId::DEFAULT);
            });
        }
        for (rule, by_name) in stage(Stage::Baseline) {
            if judge.open.is_empty() {
                break;
            }
            judge.rule(rule, by_name, lane, &mut passed);
        }
        judge.open.append(&mut passed);
        judge.done.extend(judge.open.drain(..).map(|o| o.allowed(RuleId::DEFAULT)));
        judge.done
    });
    Lanes::from_ranges(ranges)
}

fn last_of(lane: usize) -> u16 {
    if lane == OTHER { 0 } else { u16::MAX }
}

struct Judge {
    open: Vec<Open>,
    done: Vec<(u16, u16, Verdict)>,
}

impl Judge {
    fn rule(&mut self, rule: &SetRule, by_name: &[Range], lane: usize, passed: &mut Vec<Open>) {
        let mut taken = Vec::new();
        match &rule.rule.ranges {
            None => taken.append(&mut self.open),
            // Protocols without ports are matched only by rules without ports.
            Some(_) if lane == OTHER => return,
            Some(ranges) => {
                let of_lane = |(protocol, ..): &&Range| lane_of(*protocol) == lane;
                for (_, first, last) in ranges.iter().chain(&rule.resolved).chain(by_name).filter(of_lane) {
                    take(&mut self.open, *first, *last, &mut taken);
                }
            }
        }
        let Prepared { id, action, audit, .. } = &*rule.rule;
        match action {
            Action::Accept => self.done.extend(taken.into_iter().map(|o| o.allowed(*id))),
            Action::Deny if *audit => {
                self.open.extend(taken.into_iter().map(|o| Open { mark: o.mark.or(Some(*id)), ..o }));
            }
            Action::Deny => {
                let deny = Verdict { allow: false, audit: false, rule: *id };
                self.done.extend(taken.into_iter().map(|o| (o.first, o.last, deny)));
            }
            Action::Pass => passed.append(&mut taken),
        }
    }
}
