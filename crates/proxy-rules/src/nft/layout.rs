//! What our two tables (`ip podway-services` and `ip6 podway-services`) are made of.
//!
//! A packet's destination is looked up in `frontends` (or, at the node's addresses, in `node-ports`), which gives the
//! number of a *plan* and the number of the service. A plan is what happens by origin, and how many backends there are
//! to choose from; plans are few, whatever the number of services, and each has its chain. That chain, or the chain of
//! an action that it goes to, takes a random slot and looks up the backend by service number and slot.
//!
//! So a service is elements of maps and nothing else, and a change of its backends is a change of those. The maps of
//! services hold data and no verdicts, because after each change of a map of verdicts the kernel walks all of it.

use std::fmt;

use podway_services::table::{Family, Frontend, Origin, SetKind, Target};

use super::{
    abi::{FLAG_CONCAT, FLAG_EVAL, FLAG_INTERVAL, FLAG_MAP, FLAG_TIMEOUT},
    abi::{TYPE_BITS, TYPE_IPV4, TYPE_IPV6, TYPE_MARK, TYPE_PORT, TYPE_PROTOCOL, TYPE_VERDICT},
    expr::Rule,
};

/// The name of our table in either family.
pub const TABLE: &str = "podway-services";

/// What the table's comment says; a table that says something else is from another version and is replaced.
pub(super) const COMMENT: &str = "Podway services, layout 1; changes are undone";

/// Clients whose backend is remembered at one time. One more is served without being remembered.
const AFFINITY_LIMIT: u32 = 1 << 18;

/// A set or map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Set {
    /// Address, protocol, port → plan, number.
    Frontends,
    /// Protocol, port → plan, number.
    NodePorts,
    /// Number, slot → address, port: the whole cluster.
    Cluster,
    /// Number, slot → address, port: this node.
    Local,
    /// Number, address, port, where the service has session affinity.
    ClusterMembers,
    /// The same for this node's.
    LocalMembers,
    /// Client, number → address, port. The kernel writes it.
    Affinity,
    /// Frontend address, number, client range.
    Ranges,
    /// Backend, backend.
    Hairpin,
    /// Addresses that belong to services alone.
    Vips,
    /// Ranges of cluster IPs.
    ServiceRanges,
    /// Ranges of pods.
    Pods,
    /// Addresses at which node ports answer.
    NodeAddresses,
    /// Plan → chain, for what arrives.
    Plans,
    /// Plan → chain, for what the node sends.
    OutputPlans,
}

impl Set {
    pub(super) const ALL: [Set; 15] = [
        Set::Frontends,
        Set::NodePorts,
        Set::Cluster,
        Set::Local,
        Set::ClusterMembers,
        Set::LocalMembers,
        Set::Affinity,
        Set::Ranges,
        Set::Hairpin,
        Set::Vips,
        Set::ServiceRanges,
        Set::Pods,
        Set::NodeAddresses,
        Set::Plans,
        Set::OutputPlans,
    ];

    pub(super) const fn backends(kind: SetKind) -> Self {
        match kind {
            SetKind::Cluster => Set::Cluster,
            SetKind::Local => Set::Local,
        }
    }

    pub(super) const fn members(kind: SetKind) -> Self {
        match kind {
            SetKind::Cluster => Set::ClusterMembers,
            SetKind::Local => Set::LocalMembers,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Set::Frontends => "frontends",
            Set::NodePorts => "node-ports",
            Set::Cluster => "cluster",
            Set::Local => "local",
            Set::ClusterMembers => "cluster-members",
            Set::LocalMembers => "local-members",
            Set::Affinity => "affinity",
            Set::Ranges => "source-ranges",
            Set::Hairpin => "hairpin",
            Set::Vips => "vips",
            Set::ServiceRanges => "service-ranges",
            Set::Pods => "pods",
            Set::NodeAddresses => "node-addresses",
            Set::Plans => "plans",
            Set::OutputPlans => "output-plans",
        }
    }

    pub(super) fn definition(self, family: Family) -> SetDefinition {
        use Field::{Address, Mark, Port, Protocol};
        let (key, data, flags): (&[Field], Data, u32) = match self {
            Set::Frontends => (&[Address, Protocol, Port], Data::Fields(&[Mark, Mark]), 0),
            Set::NodePorts => (&[Protocol, Port], Data::Fields(&[Mark, Mark]), 0),
            Set::Cluster | Set::Local => (&[Mark, Mark], Data::Fields(&[Address, Port]), 0),
            Set::ClusterMembers | Set::LocalMembers => (&[Mark, Address, Port], Data::None, 0),
            Set::Affinity => (&[Address, Mark], Data::Fields(&[Address, Port]), FLAG_TIMEOUT | FLAG_EVAL),
            Set::Ranges => (&[Address, Mark, Address], Data::None, FLAG_INTERVAL | FLAG_CONCAT),
            Set::Hairpin => (&[Address, Address], Data::None, 0),
            Set::Vips | Set::NodeAddresses => (&[Address], Data::None, 0),
            Set::ServiceRanges | Set::Pods => (&[Address], Data::None, FLAG_INTERVAL),
            Set::Plans | Set::OutputPlans => (&[Mark], Data::Verdict, 0),
        };
        let (data_type, data_len) = match data {
            Data::None => (None, 0),
            Data::Fields(fields) => (Some(type_of(fields, family)), length_of(fields, family)),
            // The kernel's own length of a verdict.
            Data::Verdict => (Some(TYPE_VERDICT), 16),
        };
        SetDefinition {
            name: self.name(),
            flags: flags | if data_type.is_some() { FLAG_MAP } else { 0 },
            key_type: type_of(key, family),
            key_len: length_of(key, family),
            data_type,
            data_len,
            field_lens: if flags & FLAG_CONCAT == 0 {
                Vec::new()
            } else {
                key.iter().map(|f| f.len(family).next_multiple_of(4)).collect()
            },
            limit: (self == Set::Affinity).then_some(AFFINITY_LIMIT),
        }
    }
}

enum Data {
    None,
    Fields(&'static [Field]),
    Verdict,
}

#[derive(Clone, Copy)]
enum Field {
    Address,
    Protocol,
    Port,
    Mark,
}

impl Field {
    const fn kind(self, family: Family) -> u32 {
        match (self, family) {
            (Field::Address, Family::V4) => TYPE_IPV4,
            (Field::Address, Family::V6) => TYPE_IPV6,
            (Field::Protocol, _) => TYPE_PROTOCOL,
            (Field::Port, _) => TYPE_PORT,
            (Field::Mark, _) => TYPE_MARK,
        }
    }

    const fn len(self, family: Family) -> u32 {
        match (self, family) {
            (Field::Address, Family::V4) | (Field::Mark, _) => 4,
            (Field::Address, Family::V6) => 16,
            (Field::Protocol, _) => 1,
            (Field::Port, _) => 2,
        }
    }
}

fn type_of(fields: &[Field], family: Family) -> u32 {
    fields.iter().fold(0, |whole, f| whole << TYPE_BITS | f.kind(family))
}

fn length_of(fields: &[Field], family: Family) -> u32 {
    fields.iter().map(|f| f.len(family).next_multiple_of(4)).sum()
}

/// A set as it is created and as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SetDefinition {
    pub(super) name: &'static str,
    pub(super) flags: u32,
    pub(super) key_type: u32,
    pub(super) key_len: u32,
    pub(super) data_type: Option<u32>,
    pub(super) data_len: u32,
    pub(super) field_lens: Vec<u32>,
    pub(super) limit: Option<u32>,
}

/// Where a chain begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    pub(super) kind: &'static str,
    pub(super) number: u32,
    pub(super) priority: i32,
}

/// A chain with its rules. A rule is told by its comment when it is looked for.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) hook: Option<Hook>,
    pub(super) rules: Vec<(String, Vec<u8>)>,
}

impl Chain {
    fn new(name: impl Into<String>, hook: Option<Hook>) -> Self {
        Self { name: name.into(), hook, rules: Vec::new() }
    }

    fn rule(mut self, comment: impl Into<String>, rule: Rule) -> Self {
        self.rules.push((comment.into(), rule.into_bytes()));
        self
    }
}

/// The chains that are always there.
pub(super) fn fixed_chains(family: Family) -> Vec<Chain> {
    let rule = || Rule::new(family);
    let nat = |number, priority| Some(Hook { kind: "nat", number, priority });
    let services = |chain: Chain, plans: Set| {
        chain
            .rule("services", rule().frontend(false).follow_plan(plans))
            .rule("node ports", rule().destination_in(Set::NodeAddresses).frontend(true).follow_plan(plans))
            .rule("ports that no service has", rule().destination_in(Set::Vips).goto(REJECT))
            .rule("addresses that no service has", rule().destination_in(Set::ServiceRanges).goto(DROP))
    };
    vec![
        Chain::new(REJECT, None).rule("TCP", rule().protocol(6).reset()).rule("others", rule().unreachable()),
        Chain::new(DROP, None).rule("in silence", rule().drop()),
        services(Chain::new("prerouting", nat(0, -100)), Set::Plans),
        services(Chain::new("output", nat(3, -100)), Set::OutputPlans),
        Chain::new("postrouting", nat(4, 99))
            .rule("masquerade what was chosen for it", rule().marked().mark(false).masquerade())
            .rule("pods that reach themselves", rule().hairpin().masquerade()),
        // Answers that are not translated back would make the client reset the connection.
        Chain::new("forward", Some(Hook { kind: "filter", number: 2, priority: 0 }))
            .rule("answers that belong to no connection", rule().source_in(Set::Pods).invalid().drop()),
    ]
}

const REJECT: &str = "reject";
const DROP: &str = "drop";

/// What happens to a packet of one origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Action {
    Reject,
    Drop,
    Choose { kind: SetKind, count: u32, masquerade: bool, affinity_s: Option<u32> },
}

impl Action {
    /// The chain that does it.
    pub(super) fn chain_name(self, node_port: bool) -> String {
        match self {
            Action::Reject => REJECT.into(),
            Action::Drop => DROP.into(),
            Action::Choose { .. } => format!("{}choose-{self}", prefix(node_port)),
        }
    }

    fn chain(self, node_port: bool, family: Family) -> Option<Chain> {
        let Action::Choose { kind, count, masquerade, affinity_s } = self else { return None };
        let rule = || Rule::new(family);
        let mut chain = Chain::new(self.chain_name(node_port), None);
        if masquerade {
            chain = chain.rule("the node's address replaces the source", rule().mark(true));
        }
        if let Some(seconds) = affinity_s {
            chain = chain
                .rule(
                    "the backend that the client had",
                    rule().frontend(node_port).remembered(kind).refresh(seconds).translate_remembered(),
                )
                .rule(
                    format!("one of {count}, for this client from now on"),
                    rule().frontend(node_port).choose(kind, count).remember(seconds).translate(),
                );
        }
        Some(
            chain
                .rule(format!("one of {count}"), rule().frontend(node_port).choose(kind, count).translate())
                // A packet may see the plan of before a change and the slots of after it.
                .rule("the first", rule().frontend(node_port).choose(kind, 1).translate()),
        )
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Reject => f.write_str("r"),
            Action::Drop => f.write_str("d"),
            Action::Choose { kind, count, masquerade, affinity_s } => {
                write!(f, "{}{count}", if *kind == SetKind::Cluster { 'c' } else { 'l' })?;
                if *masquerade {
                    f.write_str("m")?;
                }
                affinity_s.map_or(Ok(()), |seconds| write!(f, "a{seconds}"))
            }
        }
    }
}

const fn prefix(node_port: bool) -> &'static str {
    if node_port { "node-" } else { "" }
}

/// Everything that decides what happens to a packet, apart from which backends there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Plan {
    pub(super) family: Family,
    pub(super) node_port: bool,
    pub(super) ranges: bool,
    pub(super) actions: [Action; 3],
}

impl Plan {
    /// The plan of a frontend.
    pub(super) fn of(
        family: Family,
        node_port: bool,
        frontend: &Frontend,
        count: impl Fn(SetKind) -> u32,
    ) -> Self {
        let action = |origin| {
            let route = frontend.route(origin);
            match route.target {
                Target::Reject => Action::Reject,
                Target::Drop => Action::Drop,
                Target::Set(kind) => match count(kind) {
                    // The table promises that this does not happen; a client is better told than left waiting.
                    0 => Action::Reject,
                    count => Action::Choose {
                        kind,
                        count,
                        masquerade: route.masquerade,
                        affinity_s: frontend.affinity_s,
                    },
                },
            }
        };
        let actions = Origin::ALL.map(action);
        let ranges = frontend.source_ranges.is_some();
        // Without anything to look up again, both kinds of frontend have the same chains: one plan.
        let looks_up = ranges || actions.iter().any(|a| matches!(a, Action::Choose { .. }));
        Self { family, node_port: node_port && looks_up, ranges, actions }
    }

    /// The chain for what arrives, and the one for what the node sends.
    pub(super) fn entries(&self) -> (String, String) {
        let [pod, node, external] = self.actions;
        let arriving = if self.ranges || pod != external {
            let ranges = if self.ranges { "ranges-" } else { "" };
            format!("{}from-{ranges}pod-{pod}-other-{external}", prefix(self.node_port))
        } else {
            pod.chain_name(self.node_port)
        };
        (arriving, node.chain_name(self.node_port))
    }

    /// The chains that it needs, in an order in which each is there before it is named.
    pub(super) fn chains(&self) -> Vec<Chain> {
        let mut chains: Vec<Chain> =
            self.actions.iter().filter_map(|a| a.chain(self.node_port, self.family)).collect();
        let [pod, _, external] = self.actions;
        if self.ranges || pod != external {
            let rule = || Rule::new(self.family);
            let mut chain = Chain::new(self.entries().0, None);
            if self.ranges {
                chain = chain
                    .rule("clients that may not", rule().frontend(self.node_port).outside_ranges().drop());
            }
            chains.push(
                chain
                    .rule("pods", rule().source_in(Set::Pods).goto(&pod.chain_name(self.node_port)))
                    .rule("others", rule().goto(&external.chain_name(self.node_port))),
            );
        }
        chains
    }
}
