//! Why a connection is allowed or not: by which rule, and what would have changed it.

use std::{fmt, net::IpAddr};

use podway_model::{
    Labels,
    pod::NAMESPACE_NAME_LABEL,
    policy::{Action, Direction, Namespaces},
    selector::Requirement,
};

use crate::{
    atoms::AtomKey,
    compiler::Compiler,
    lanes::PROTOCOLS,
    rules::{Prepared, SetRule, Stage},
    sets::resolve,
    table::{PolicyRef, RuleId, RuleRef, SetInfo, Verdict, at},
    world::Owner,
};

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Party {
    /// A pod: namespace, name.
    Pod(String, String),
    /// A node's own network, and with it its pods on the host's network.
    Node(String),
    /// Whoever is at an address that is neither's.
    Address(IpAddr),
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Party::Pod(namespace, name) => write!(f, "{namespace}/{name}"),
            Party::Node(name) => write!(f, "node {name}"),
            Party::Address(addr) => addr.fmt(f),
        }
    }
}

/// A rule that would have allowed it, and what it lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NearMiss {
    /// The rule.
    pub rule: RuleRef,
    /// What would have to be, and what is instead.
    pub lacks: Vec<String>,
}

impl fmt::Display for NearMiss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} would have allowed it if {}", self.rule, self.lacks.join(", and if "))
    }
}

/// What one end says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// Egress is the source's, ingress the target's.
    pub direction: Direction,
    /// What it is.
    pub verdict: Verdict,
    /// By which rule; `None` is a default.
    pub rule: Option<RuleRef>,
    /// Policies that isolate the pod in this direction: whose default a denial without a rule is.
    pub isolating: Vec<PolicyRef>,
    /// All policies that select the pod.
    pub selecting: Vec<PolicyRef>,
    /// What came closest to allowing it, when it is denied.
    pub nearest: Option<NearMiss>,
    /// Why nobody judges this end, when nobody does.
    pub exempt: Option<&'static str>,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |list: &[PolicyRef]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if let Some(why) = self.exempt {
            return write!(f, "allowed: {why}");
        }
        let Verdict { allow, audit, .. } = self.verdict;
        match (&self.rule, allow, audit) {
            (Some(rule), true, false) => write!(f, "allowed by {rule}"),
            (Some(rule), false, _) => write!(f, "denied by {rule}"),
            (Some(rule), true, true) => write!(f, "allowed, and only because {rule} is in audit mode"),
            (None, true, true) => write!(
                f,
                "allowed, and only because what isolates the pod is in audit mode: {}",
                names(&self.isolating)
            ),
            (None, false, _) => {
                write!(f, "denied by default: no rule of {} allows it", names(&self.isolating))
            }
            (None, true, false) if self.selecting.is_empty() => {
                f.write_str("allowed: no policy selects the pod")
            }
            (None, true, false) => {
                write!(f, "allowed: nothing in {} says anything about it", names(&self.selecting))
            }
        }
    }
}

/// Why a connection is allowed or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Where it comes from.
    pub source: Party,
    /// Where it goes.
    pub target: Party,
    /// Whether both ends allow it.
    pub allow: bool,
    /// What the source's end says.
    pub egress: Side,
    /// What the target's end says.
    pub ingress: Side,
}

/// Explains a new connection as the tables judge it. `port` is the target's; 0 for protocols without ports.
pub fn explain(compiler: &Compiler, source: IpAddr, target: IpAddr, protocol: u8, port: u16) -> Explanation {
    let query = Query { compiler, source, target, protocol, port };
    let egress = query.side(Direction::Egress);
    let ingress = query.side(Direction::Ingress);
    Explanation {
        source: party(compiler, source),
        target: party(compiler, target),
        allow: egress.verdict.allow && ingress.verdict.allow,
        egress,
        ingress,
    }
}

fn party(compiler: &Compiler, addr: IpAddr) -> Party {
    match compiler.world.owner(addr) {
        Some(Owner::Pod(_)) => {
            let pod = compiler.pod_at(addr).map(|pod| (pod.namespace.clone(), pod.name.clone()));
            pod.map_or(Party::Address(addr), |(namespace, name)| Party::Pod(namespace, name))
        }
        Some(Owner::Node(name)) => Party::Node(name.clone()),
        None => Party::Address(addr),
    }
}

struct Query<'a> {
    compiler: &'a Compiler,
    source: IpAddr,
    target: IpAddr,
    protocol: u8,
    port: u16,
}

impl Query<'_> {
    fn side(&self, direction: Direction) -> Side {
        let (endpoint, peer) = match direction {
            Direction::Ingress => (self.target, self.source),
            Direction::Egress => (self.source, self.target),
        };
        let mut side = Side {
            direction,
            verdict: Verdict { allow: true, ..Verdict::default() },
            rule: None,
            isolating: Vec::new(),
            selecting: Vec::new(),
            nearest: None,
            exempt: None,
        };
        if self.source == self.target {
            side.exempt = Some("a pod always reaches itself");
            return side;
        }
        let Some(pod) = self.compiler.pod_at(endpoint) else {
            side.exempt = Some("no policy is about what is not a pod, or is on its node's network");
            return side;
        };
        if !self.compiler.is_endpoint(pod) {
            side.exempt = Some("the pod is on another node, which judges it");
            return side;
        }
        let table = &self.compiler.table;
        let Some(verdict) = table.side(endpoint, direction, peer, self.protocol, self.port) else {
            return side;
        };
        let set = table.endpoints.get(&endpoint).map(|set| set.new);
        let Some(set) = set.and_then(|id| self.compiler.sets.get(id)) else { return side };
        let SetInfo { policies, isolating, .. } = &*set.info;
        side.verdict = verdict;
        side.selecting.clone_from(policies);
        side.isolating.clone_from(&isolating[at(direction)]);
        side.rule = (verdict.rule != RuleId::DEFAULT)
            .then(|| table.rules.get(&verdict.rule))
            .flatten()
            .map(|r| (**r).clone());
        if !verdict.allow || verdict.audit {
            side.nearest = self.nearest(direction, peer, &set.rules[at(direction)].rules, verdict);
        }
        side
    }

    /// Of the rules that could have allowed it before it was denied, the one that lacks least.
    fn nearest(
        &self,
        direction: Direction,
        peer: IpAddr,
        rules: &[SetRule],
        verdict: Verdict,
    ) -> Option<NearMiss> {
        let before =
            rules.iter().take_while(|r| r.rule.id != verdict.rule || verdict.rule == RuleId::DEFAULT);
        let accepts = before.filter(|r| {
            r.rule.action == Action::Accept
                && (verdict.rule != RuleId::DEFAULT || r.rule.stage != Stage::Baseline)
        });
        let miss = |rule: &SetRule| {
            let mut lacks = self.lacking_peer(direction, peer, &rule.rule)?;
            lacks.extend(self.lacking_port(rule));
            (!lacks.is_empty()).then_some((rule.rule.id, lacks))
        };
        let (id, lacks) = accepts.filter_map(miss).min_by_key(|(_, lacks)| lacks.len())?;
        Some(NearMiss { rule: (**self.compiler.table.rules.get(&id)?).clone(), lacks })
    }

    fn lacking_port(&self, rule: &SetRule) -> Option<String> {
        let ranges = rule.rule.ranges.as_ref()?;
        let named = match self.compiler.pod_at(self.target) {
            Some(pod) => resolve(&rule.rule, pod.ports.iter()),
            None => Vec::new(),
        };
        let all = ranges.iter().chain(&named);
        let hit = all.clone().any(|(protocol, first, last)| {
            protocol.number() == self.protocol && (*first..=*last).contains(&self.port)
        });
        if hit {
            return None;
        }
        let text = |(protocol, first, last): &(podway_model::Protocol, u16, u16)| match (*first, *last) {
            (0, u16::MAX) => format!("{protocol}"),
            (first, last) if first == last => format!("{protocol} port {first}"),
            (first, last) => format!("{protocol} ports {first} to {last}"),
        };
        let mut wanted: Vec<String> = all.map(text).collect();
        if named.is_empty() {
            wanted.extend(
                rule.rule.named.iter().map(|(name, _)| format!("a port named {name:?} of the target")),
            );
        }
        let is = match PROTOCOLS.into_iter().find(|p| p.number() == self.protocol) {
            Some(protocol) => format!("{protocol} port {}", self.port),
            None => format!("IP protocol {}", self.protocol),
        };
        Some(format!("it were for {}; it is for {is}", wanted.join(" or ")))
    }

    /// What a peer lacks of what a rule asks; nothing when it matches, `None` when no peer could match.
    fn lacking_peer(&self, direction: Direction, peer: IpAddr, rule: &Prepared) -> Option<Vec<String>> {
        let Some(atoms) = &rule.peers else { return Some(Vec::new()) };
        let who = match direction {
            Direction::Ingress => "the source",
            Direction::Egress => "the target",
        };
        let ways = atoms.iter().map(|atom| self.lacking_atom(who, peer, self.compiler.atoms.key(*atom)));
        ways.min_by_key(Vec::len)
    }

    fn lacking_atom(&self, who: &str, peer: IpAddr, atom: &AtomKey) -> Vec<String> {
        match atom {
            AtomKey::Pods(namespaces, pods) => {
                let Some(pod) = self.compiler.pod_at(peer) else {
                    // Two, as this is farther than one label.
                    return vec![format!("{who} were a pod"), format!("had its labels; it is {peer}")];
                };
                let mut lacks = Vec::new();
                let labels = self.compiler.namespace_labels(&pod.namespace);
                match namespaces {
                    Namespaces::Named(name) if *name != pod.namespace => {
                        lacks.push(format!("{who} were in namespace {name}; it is in {}", pod.namespace));
                    }
                    Namespaces::Named(_) => {}
                    Namespaces::Selected(selector) => {
                        let none = Labels::new();
                        let labels = labels.unwrap_or(&none);
                        lacks.extend(unmet(&format!("{who}'s namespace"), selector.requirements(), labels));
                    }
                }
                lacks.extend(unmet(who, pods.requirements(), &pod.labels));
                lacks
            }
            AtomKey::Nodes(selector) => match self.compiler.world.owner(peer) {
                Some(Owner::Node(name)) => {
                    let node = self.compiler.world.nodes.get(name);
                    let none = Labels::new();
                    let labels = node.map_or(&none, |node| &node.labels);
                    unmet(&format!("{who}'s node"), selector.requirements(), labels)
                }
                _ => vec![format!("{who} were a node"), format!("had its labels; it is {peer}")],
            },
            AtomKey::Block(block) if !block.cidr.contains(&peer) => {
                vec![format!("{who}'s address were in {}; it is {peer}", block.cidr)]
            }
            AtomKey::Block(block) => {
                let except = block.except.iter().filter(|e| e.contains(&peer));
                except
                    .map(|e| format!("{who}'s address were not in the exception {e}; it is {peer}"))
                    .collect()
            }
            AtomKey::Port(_) => Vec::new(),
        }
    }
}

fn unmet(whose: &str, requirements: &[Requirement], labels: &Labels) -> Vec<String> {
    let text = |requirement: &Requirement| {
        let is = match labels.get(&requirement.key) {
            Some(value) => format!("it is {value}"),
            None if requirement.key == NAMESPACE_NAME_LABEL => "its name is unknown".to_owned(),
            None => "it has none".to_owned(),
        };
        format!("{whose} had {requirement}; {is}")
    };
    requirements.iter().filter(|r| !r.is_met(labels)).map(text).collect()
}

#[cfg(test)]
mod tests {
    use podway_model::{Namespace, NetworkPolicy, Pod};
    use serde_json::{Value, json};

    use super::*;
    use crate::compiler::Update;

    fn pod(namespace: &str, name: &str, ip: &str, labels: &Value) -> Update {
        let pod = Pod::parse(&json!({"metadata": {"namespace": namespace, "name": name, "labels": labels},
            "status": {"podIP": ip}}));
        Update::Pod(pod.unwrap())
    }

    #[test]
    fn a_denial_names_its_policies_and_what_came_closest() {
        let policy = json!({"metadata": {"name": "payments-ingress", "namespace": "payments"}, "spec": {
            "podSelector": {"matchLabels": {"app": "api"}},
            "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "checkout"}}}],
                "ports": [{"port": 8080}]}]}});
        let mut compiler = Compiler::for_cluster();
        compiler.apply([
            Update::Namespace(Namespace::new("default", Labels::new())),
            pod("payments", "api", "10.0.0.1", &json!({"app": "api"})),
            pod("checkout", "web", "10.0.0.2", &json!({})),
            pod("default", "stray", "10.0.0.3", &json!({})),
            Update::NetworkPolicy(NetworkPolicy::parse(&policy).unwrap()),
        ]);
        let ask = |source: &str, port| {
            explain(&compiler, source.parse().unwrap(), "10.0.0.1".parse().unwrap(), 6, port).ingress
        };
        for (source, port, said, nearest) in [
            ("10.0.0.2", 8080, "allowed by payments/payments-ingress ingress rule 1", None),
            (
                "10.0.0.3",
                8080,
                "denied by default: no rule of payments/payments-ingress allows it",
                Some(
                    "payments/payments-ingress ingress rule 1 would have allowed it if the source's namespace had \
                     kubernetes.io/metadata.name=checkout; it is default",
                ),
            ),
            (
                "10.0.0.2",
                80,
                "denied by default: no rule of payments/payments-ingress allows it",
                Some(
                    "payments/payments-ingress ingress rule 1 would have allowed it if it were for TCP port 8080; it is \
                     for TCP port 80",
                ),
            ),
        ] {
            let side = ask(source, port);
            assert_eq!(side.to_string(), said);
            assert_eq!(side.nearest.map(|n| n.to_string()).as_deref(), nearest);
        }
        let back = explain(&compiler, "10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap(), 6, 1);
        assert!(back.allow);
        assert_eq!(back.ingress.to_string(), "allowed: no policy selects the pod");
    }
}
