//! What a pod asks of the other pods around it: affinity, anti-affinity, topology spread.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::State;
use crate::placement::{NodeInfo, NodeRules};
use crate::read::{self, Malformed};
use crate::selector::Selector;
use crate::world::{Kind, Pod};

/// A pod that has a node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) pod: usize,
    pub(super) node: usize,
}

#[derive(Debug, Clone)]
enum Namespaces<'a> {
    These(Vec<&'a str>),
    /// The listed ones, and those whose labels match.
    Matching(Vec<&'a str>, Selector<'a>),
}

/// A pod affinity term.
#[derive(Debug, Clone)]
pub(super) struct Term<'a> {
    /// None selects no pods.
    selector: Option<Selector<'a>>,
    namespaces: Namespaces<'a>,
    topology_key: &'a str,
}

impl<'a> Term<'a> {
    fn parse(term: &'a Value, namespace: &'a str) -> Result<Self, Malformed> {
        let mut names = Vec::new();
        for (i, name) in read::list(term, "namespaces")?.iter().enumerate() {
            let expected = || Malformed::new(format!("namespaces[{i}]"), "expected a string");
            names.push(name.as_str().ok_or_else(expected)?);
        }
        let namespaces = match Selector::parse(term, "namespaceSelector")? {
            Some(selector) => Namespaces::Matching(names, selector),
            None if names.is_empty() => Namespaces::These(vec![namespace]),
            None => Namespaces::These(names),
        };
        let topology_key = read::string(term, "topologyKey")?.filter(|key| !key.is_empty());
        Ok(Self {
            selector: Selector::parse(term, "labelSelector")?,
            namespaces,
            topology_key: topology_key
                .ok_or_else(|| Malformed::new("topologyKey", "required, but absent"))?,
        })
    }

    fn matches(&self, world: &crate::World<'_>, pod: &Pod<'_>) -> bool {
        let namespace = pod.object.namespace;
        let here = match &self.namespaces {
            Namespaces::These(names) => names.contains(&namespace),
            Namespaces::Matching(names, selector) => {
                let labels = || world.named(Kind::Namespace, "", namespace).and_then(|n| n.labels);
                names.contains(&namespace) || selector.is_empty() || selector.matches(labels())
            }
        };
        here && self.selector.as_ref().is_some_and(|selector| selector.matches(pod.object.labels))
    }
}

/// A topology spread constraint that must hold.
#[derive(Debug, Clone)]
struct Spread<'a> {
    max_skew: usize,
    min_domains: usize,
    topology_key: &'a str,
    selector: Option<Selector<'a>>,
    /// `whenUnsatisfiable: DoNotSchedule`; else only a preference.
    hard: bool,
}

/// What a pod's spec says about its peers.
#[derive(Debug, Clone)]
pub(super) struct PeerRules<'a> {
    attract: Vec<Term<'a>>,
    /// Required anti-affinity: holds for later pods, too.
    pub(super) repel: Vec<Term<'a>>,
    /// Weighted wishes; negative for anti-affinity.
    prefer: Vec<(i64, Term<'a>)>,
    spread: Vec<Spread<'a>>,
    /// Which nodes count for spreading.
    node: Option<NodeRules<'a>>,
}

impl<'a> PeerRules<'a> {
    pub(super) fn parse(pod: &Pod<'a>, spec: &'a Value) -> Result<Self, Malformed> {
        let namespace = pod.object.namespace;
        let required = |kind: &str| {
            let path = format!("affinity.{kind}.requiredDuringSchedulingIgnoredDuringExecution");
            let terms = read::list(spec, &path)?.iter().enumerate();
            terms
                .map(|(i, term)| Term::parse(term, namespace).map_err(|e| e.within(&format!("{path}[{i}]"))))
                .collect::<Result<Vec<_>, _>>()
        };
        let mut prefer = Vec::new();
        for (kind, sign) in [("podAffinity", 1), ("podAntiAffinity", -1)] {
            let path = format!("affinity.{kind}.preferredDuringSchedulingIgnoredDuringExecution");
            for (i, item) in read::list(spec, &path)?.iter().enumerate() {
                let inside = |error: Malformed| error.within(&format!("{path}[{i}]"));
                let weight = read::count(item, "weight").map_err(inside)?.unwrap_or(0);
                let term = item.get("podAffinityTerm").unwrap_or(&Value::Null);
                let term = Term::parse(term, namespace).map_err(|e| inside(e.within("podAffinityTerm")))?;
                prefer.push((sign * weight, term));
            }
        }
        let mut spread = Vec::new();
        for (i, constraint) in read::list(spec, "topologySpreadConstraints")?.iter().enumerate() {
            let inside = |error: Malformed| error.within(&format!("topologySpreadConstraints[{i}]"));
            let parse = || {
                let key = read::string(constraint, "topologyKey")?;
                let count =
                    |path| read::count(constraint, path).map(|n| n.and_then(|n| usize::try_from(n).ok()));
                Ok(Spread {
                    max_skew: count("maxSkew")?.unwrap_or(1).max(1),
                    min_domains: count("minDomains")?.unwrap_or(1),
                    topology_key: key.ok_or_else(|| Malformed::new("topologyKey", "required, but absent"))?,
                    selector: Selector::parse(constraint, "labelSelector")?,
                    hard: read::string(constraint, "whenUnsatisfiable")? != Some("ScheduleAnyway"),
                })
            };
            spread.push(parse().map_err(inside)?);
        }
        let node = if spread.is_empty() { None } else { Some(NodeRules::parse(spec)?) };
        Ok(Self {
            attract: required("podAffinity")?,
            repel: required("podAntiAffinity")?,
            prefer,
            spread,
            node,
        })
    }
}

/// Where one pod's peers are, counted once for all nodes.
pub(super) struct Check<'r, 'a> {
    /// Per attracting term: its key and the domains that have a match; None when the pod is the first of its kind and
    /// may found the group anywhere.
    attract: Vec<(&'a str, Option<HashSet<&'a str>>)>,
    /// Key and domain pairs that the pod's own anti-affinity, or somebody else's, closes.
    own_repel: HashSet<(&'a str, &'a str)>,
    others_repel: HashSet<(&'a str, &'a str)>,
    prefer: HashMap<(&'a str, &'a str), i64>,
    prefer_keys: Vec<&'a str>,
    spread: Vec<(&'r Spread<'a>, HashMap<&'a str, usize>, usize, bool)>,
}

impl<'r, 'a> Check<'r, 'a> {
    pub(super) fn new(state: &State<'_, 'a>, index: usize, rules: &'r PeerRules<'a>) -> Self {
        let (world, nodes) = (state.world, &state.nodes);
        let pod = &world.pods[index];
        let domains = |term: &Term<'a>| {
            let key = term.topology_key;
            let matching = state.placed.iter().filter(|placed| term.matches(world, &world.pods[placed.pod]));
            matching.filter_map(|placed| nodes[placed.node].label(key)).collect::<Vec<_>>()
        };
        let attract = rules.attract.iter().map(|term| {
            let found: HashSet<&str> = domains(term).into_iter().collect();
            let founds_group = found.is_empty() && term.matches(world, pod);
            (term.topology_key, (!founds_group).then_some(found))
        });
        let own_repel =
            rules.repel.iter().flat_map(|term| domains(term).into_iter().map(|d| (term.topology_key, d)));
        let mut others_repel = HashSet::new();
        for (_, node, terms) in &state.repelling {
            for term in terms.iter().filter(|term| term.matches(world, pod)) {
                if let Some(domain) = nodes[*node].label(term.topology_key) {
                    others_repel.insert((term.topology_key, domain));
                }
            }
        }
        let mut prefer: HashMap<_, i64> = HashMap::new();
        for (weight, term) in &rules.prefer {
            for domain in domains(term) {
                *prefer.entry((term.topology_key, domain)).or_default() += weight;
            }
        }
        let mut prefer_keys: Vec<_> = rules.prefer.iter().map(|(_, term)| term.topology_key).collect();
        prefer_keys.sort_unstable();
        prefer_keys.dedup();
        Self {
            attract: attract.collect(),
            own_repel: own_repel.collect(),
            others_repel,
            prefer,
            prefer_keys,
            spread: rules.spread.iter().map(|spread| spread_counts(state, pod, rules, spread)).collect(),
        }
    }

    /// Why the pod's peers, or its own wishes about them, keep it from this node.
    pub(super) fn refusal(&self, node: &NodeInfo<'a>) -> Option<&'static str> {
        for (spread, counts, lowest, selects_itself) in &self.spread {
            if !spread.hard {
                continue;
            }
            let Some(count) = node.label(spread.topology_key).and_then(|domain| counts.get(domain)) else {
                return Some("node(s) didn't match pod topology spread constraints (missing required label)");
            };
            if count + usize::from(*selects_itself) > lowest + spread.max_skew {
                return Some("node(s) didn't match pod topology spread constraints");
            }
        }
        let in_domain = |key: &'a str, set: &HashSet<(&'a str, &'a str)>| {
            node.label(key).is_some_and(|domain| set.contains(&(key, domain)))
        };
        let closed = |set: &HashSet<(&'a str, &'a str)>| set.iter().any(|(key, _)| in_domain(key, set));
        for (key, domains) in &self.attract {
            let fits = match (node.label(key), domains) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(domain), Some(domains)) => domains.contains(domain),
            };
            if !fits {
                return Some("node(s) didn't match pod affinity rules");
            }
        }
        if closed(&self.own_repel) {
            return Some("node(s) didn't match pod anti-affinity rules");
        }
        closed(&self.others_repel).then_some("node(s) didn't satisfy existing pods anti-affinity rules")
    }

    /// Weights of the preferred terms that hold here, less what soft spreading says against it.
    pub(super) fn liking(&self, node: &NodeInfo<'a>) -> i64 {
        let domain = |key: &&'a str| node.label(key).and_then(|domain| self.prefer.get(&(*key, domain)));
        let preferred: i64 = self.prefer_keys.iter().filter_map(domain).sum();
        let crowded: usize = self
            .spread
            .iter()
            .filter(|(spread, ..)| !spread.hard)
            .filter_map(|(spread, counts, ..)| counts.get(node.label(spread.topology_key)?))
            .sum();
        preferred - i64::try_from(crowded).unwrap_or(i64::MAX)
    }
}

/// The constraint, its matching pods per domain of eligible nodes, the lowest of these numbers, and whether the pod
/// itself matches.
fn spread_counts<'r, 'a>(
    state: &State<'_, 'a>,
    pod: &Pod<'a>,
    rules: &PeerRules<'a>,
    spread: &'r Spread<'a>,
) -> (&'r Spread<'a>, HashMap<&'a str, usize>, usize, bool) {
    let selects = |pod: &Pod<'_>| spread.selector.as_ref().is_some_and(|s| s.matches(pod.object.labels));
    let eligible = |node: &NodeInfo<'_>| rules.node.as_ref().is_none_or(|rules| rules.select(&node.object));
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for node in state.nodes.iter().filter(|node| eligible(node)) {
        if let Some(domain) = node.label(spread.topology_key) {
            counts.entry(domain).or_default();
        }
    }
    for placed in &state.placed {
        let (other, node) = (&state.world.pods[placed.pod], &state.nodes[placed.node]);
        if other.object.namespace == pod.object.namespace
            && !other.object.deleting
            && eligible(node)
            && selects(other)
            && let Some(domain) = node.label(spread.topology_key)
        {
            *counts.entry(domain).or_default() += 1;
        }
    }
    let lowest =
        if counts.len() < spread.min_domains { 0 } else { counts.values().copied().min().unwrap_or(0) };
    (spread, counts, lowest, selects(pod))
}
