//! What our two tables (`ip podway-services` and `ip6 podway-services`) are made of.
//!
//! A packet's destination is looked up in `frontends` (or, at the node's addresses, in `node-ports`), which leads to a
//! chain that says what happens by origin, or how many backends there are to choose from. Those chains are few and
//! shared, whatever the number of services: a service is elements of maps. The chain takes a random slot and looks the
//! backend up by slot and frontend. Only a service with session affinity has chains of its own, and a set of clients
//! for each backend.

use std::{fmt, net::IpAddr};

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

/// Clients of one backend that are remembered at one time. One more is served without being remembered.
const CLIENTS: u32 = 1 << 16;

/// Every set and chain for session affinity begins with it; those of single backends with the longer one.
pub(super) const STICKY: &str = "sticky-";
pub(super) const STICKY_BACKEND: &str = "sticky-to-";

/// A set or map that is always there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Set {
    /// Address, protocol, port → chain.
    Frontends,
    /// Protocol, port → chain.
    NodePorts,
    /// Slot, address, protocol, port → address, port: the whole cluster.
    Cluster,
    /// The same for this node's backends.
    Local,
    /// Slot, protocol, port → address, port: the whole cluster.
    NodePortCluster,
    /// The same for this node's backends.
    NodePortLocal,
    /// Address, protocol, port, range of clients.
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
}

impl Set {
    pub(super) const ALL: [Set; 12] = [
        Set::Frontends,
        Set::NodePorts,
        Set::Cluster,
        Set::Local,
        Set::NodePortCluster,
        Set::NodePortLocal,
        Set::Ranges,
        Set::Hairpin,
        Set::Vips,
        Set::ServiceRanges,
        Set::Pods,
        Set::NodeAddresses,
    ];

    pub(super) const fn backends(kind: SetKind, node_port: bool) -> Self {
        match (kind, node_port) {
            (SetKind::Cluster, false) => Set::Cluster,
            (SetKind::Local, false) => Set::Local,
            (SetKind::Cluster, true) => Set::NodePortCluster,
            (SetKind::Local, true) => Set::NodePortLocal,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Set::Frontends => "frontends",
            Set::NodePorts => "node-ports",
            Set::Cluster => "cluster",
            Set::Local => "local",
            Set::NodePortCluster => "node-port-cluster",
            Set::NodePortLocal => "node-port-local",
            Set::Ranges => "source-ranges",
            Set::Hairpin => "hairpin",
            Set::Vips => "vips",
            Set::ServiceRanges => "service-ranges",
            Set::Pods => "pods",
            Set::NodeAddresses => "node-addresses",
        }
    }

    pub(super) fn definition(self, family: Family) -> SetDefinition {
        use Field::{Address, Mark, Port, Protocol};
        let backend = Data::Fields(&[Address, Port]);
        let (key, data, flags): (&[Field], Data, u32) = match self {
            Set::Frontends => (&[Address, Protocol, Port], Data::Verdict, 0),
            Set::NodePorts => (&[Protocol, Port], Data::Verdict, 0),
            Set::Cluster | Set::Local => (&[Mark, Address, Protocol, Port], backend, 0),
            Set::NodePortCluster | Set::NodePortLocal => (&[Mark, Protocol, Port], backend, 0),
            Set::Ranges => (&[Address, Protocol, Port, Address], Data::None, FLAG_INTERVAL | FLAG_CONCAT),
            Set::Hairpin => (&[Address, Address], Data::None, 0),
            Set::Vips | Set::NodeAddresses => (&[Address], Data::None, 0),
            Set::ServiceRanges | Set::Pods => (&[Address], Data::None, FLAG_INTERVAL),
        };
        let (data_type, data_len) = match data {
            Data::None => (None, 0),
            Data::Fields(fields) => (Some(type_of(fields, family)), length_of(fields, family)),
            // The kernel's own length of a verdict.
            Data::Verdict => (Some(TYPE_VERDICT), 16),
        };
        SetDefinition {
            name: self.name().to_owned(),
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
            limit: None,
        }
    }
}

/// The set of clients that had one backend lately.
pub(super) fn clients(name: &str, family: Family) -> SetDefinition {
    SetDefinition {
        name: name.to_owned(),
        flags: FLAG_TIMEOUT | FLAG_EVAL,
        limit: Some(CLIENTS),
        ..Set::Vips.definition(family)
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
    pub(super) name: String,
    pub(super) flags: u32,
    pub(super) key_type: u32,
    pub(super) key_len: u32,
    pub(super) data_type: Option<u32>,
    pub(super) data_len: u32,
    pub(super) field_lens: Vec<u32>,
    pub(super) limit: Option<u32>,
}

impl SetDefinition {
    /// What of it is compared: flags, type and length of the key, type of the data.
    pub(super) fn shape(&self) -> [u32; 4] {
        [self.flags, self.key_type, self.key_len, self.data_type.unwrap_or(0)]
    }
}

/// Where a chain begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    pub(super) kind: &'static str,
    pub(super) number: u32,
    pub(super) priority: i32,
}

/// A chain with its rules. A rule is told by its comment when it is looked for, so that says everything that can be
/// different about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) hook: Option<Hook>,
    pub(super) rules: Vec<(String, Vec<u8>)>,
}

impl Chain {
    pub(super) fn new(name: impl Into<String>, hook: Option<Hook>) -> Self {
        Self { name: name.into(), hook, rules: Vec::new() }
    }

    fn rule(mut self, comment: impl Into<String>, rule: Rule) -> Self {
        self.rules.push((comment.into(), rule.into_bytes()));
        self
    }

    /// Chains that name others come after these when they are written, and go before them.
    pub(super) fn rank(name: &str) -> u8 {
        if name.starts_with(STICKY_BACKEND) {
            0
        } else if name.contains(CHOOSE) || name.starts_with(STICKY) || name == REJECT || name == DROP {
            1
        } else if name.contains(FROM) {
            2
        } else {
            3
        }
    }
}

/// The chains that are always there.
pub(super) fn fixed_chains(family: Family) -> Vec<Chain> {
    let rule = || Rule::new(family);
    let nat = |number, priority| Some(Hook { kind: "nat", number, priority });
    let services = |chain: Chain| {
        chain
            .rule("services", rule().dispatch(false))
            .rule("node ports", rule().destination_in(Set::NodeAddresses).dispatch(true))
            .rule("ports that no service has", rule().destination_in(Set::Vips).goto(REJECT))
            .rule("addresses that no service has", rule().destination_in(Set::ServiceRanges).goto(DROP))
    };
    vec![
        Chain::new(REJECT, None).rule("TCP", rule().protocol(6).reset()).rule("others", rule().unreachable()),
        Chain::new(DROP, None).rule("in silence", rule().drop()),
        services(Chain::new("prerouting", nat(0, -100))),
        // The refusals themselves come by here, and their receiver may be a service's address.
        services(Chain::new("output", nat(3, -100)).rule("answers of the node", rule().related().accept())),
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
const CHOOSE: &str = "choose-";
const FROM: &str = "from-";

/// What happens to a packet of one origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Action {
    Reject,
    Drop,
    Choose {
        kind: SetKind,
        count: u32,
        masquerade: bool,
    },
    /// Session affinity, for the service of this hash.
    Stick {
        service: u64,
        kind: SetKind,
        masquerade: bool,
        seconds: u32,
    },
}

impl Action {
    /// The chain that does it.
    pub(super) fn chain_name(self, node_port: bool) -> String {
        match self {
            Action::Reject => REJECT.into(),
            Action::Drop => DROP.into(),
            Action::Choose { .. } => format!("{}{CHOOSE}{self}", prefix(node_port)),
            Action::Stick { .. } => format!("{STICKY}{self}"),
        }
    }

    /// The chain, where services share it.
    fn shared_chain(self, node_port: bool, family: Family) -> Option<Chain> {
        let Action::Choose { kind, count, masquerade } = self else { return None };
        let rule = || Rule::new(family);
        Some(
            Chain::new(self.chain_name(node_port), None)
                .masquerade(masquerade, family)
                .rule(format!("one of {count}"), rule().choose(kind, node_port, count).translate())
                // A packet may see the chain of before a change and the slots of after it.
                .rule("the first", rule().choose(kind, node_port, 1).translate()),
        )
    }

    /// The chain of a service with session affinity to these backends, in their order.
    pub(super) fn sticky_chain(self, backends: &[(IpAddr, u16)], family: Family) -> Option<Chain> {
        let Action::Stick { service, masquerade, seconds, .. } = self else { return None };
        let mut chain = Chain::new(self.chain_name(false), None).masquerade(masquerade, family);
        for backend in backends {
            let name = sticky_backend(service, backend, seconds);
            let rule = Rule::new(family).remembered(&name).goto(&name);
            chain = chain.rule(format!("clients of {} port {}", backend.0, backend.1), rule);
        }
        for (i, backend) in backends.iter().enumerate() {
            let name = sticky_backend(service, backend, seconds);
            let rest = u32::try_from(backends.len() - i).unwrap_or(u32::MAX);
            chain = chain.rule(
                format!("one in {rest}: {} port {}", backend.0, backend.1),
                Rule::new(family).one_in(rest).goto(&name),
            );
        }
        Some(chain)
    }
}

impl Chain {
    fn masquerade(self, on: bool, family: Family) -> Self {
        if on {
            self.rule("the node's address replaces the source", Rule::new(family).mark(true))
        } else {
            self
        }
    }

    /// The chain that leads to one backend of a service with session affinity; the set has the same name.
    pub(super) fn sticky_backend(service: u64, backend: &(IpAddr, u16), seconds: u32) -> Self {
        let family = Family::of(&backend.0);
        let name = sticky_backend(service, backend, seconds);
        let rule = || Rule::new(family);
        Self::new(name.clone(), None)
            .rule(
                format!("{} port {} for {seconds} s", backend.0, backend.1),
                rule().remember(&name, seconds).translate_to(backend),
            )
            .rule("too many clients to remember them", rule().translate_to(backend))
    }
}

/// Chain and set of one backend of a service with session affinity.
fn sticky_backend(service: u64, backend: &(IpAddr, u16), seconds: u32) -> String {
    let addr = backend.0.to_string().replace(':', ".");
    format!("{STICKY_BACKEND}{service:016x}-{addr}-{}-{seconds}s", backend.1)
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |kind: &SetKind| if *kind == SetKind::Cluster { 'c' } else { 'l' };
        let m = |masquerade: &bool| if *masquerade { "m" } else { "" };
        match self {
            Action::Reject => f.write_str("r"),
            Action::Drop => f.write_str("d"),
            Action::Choose { kind, count, masquerade } => {
                write!(f, "{}{count}{}", letter(kind), m(masquerade))
            }
            Action::Stick { service, kind, masquerade, seconds } => {
                write!(f, "{service:016x}-{}{}-{seconds}s", letter(kind), m(masquerade))
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
    node_port: bool,
    ranges: bool,
    pub(super) actions: [Action; 3],
}

impl Plan {
    /// The plan of a frontend; `service` tells services with session affinity apart.
    pub(super) fn of(
        family: Family,
        node_port: bool,
        frontend: &Frontend,
        service: u64,
        count: impl Fn(SetKind) -> u32,
    ) -> Self {
        let action = |origin| {
            let route = frontend.route(origin);
            let masquerade = route.masquerade;
            match route.target {
                Target::Reject => Action::Reject,
                Target::Drop => Action::Drop,
                Target::Set(kind) => match (count(kind), frontend.affinity_s) {
                    // The table promises that this does not happen; a client is better told than left waiting.
                    (0, _) => Action::Reject,
                    (_, Some(seconds)) => Action::Stick { service, kind, masquerade, seconds },
                    (count, None) => Action::Choose { kind, count, masquerade },
                },
            }
        };
        let ranges = !node_port && frontend.source_ranges.is_some();
        Self { family, node_port, ranges, actions: Origin::ALL.map(action) }
    }

    /// The chain that it begins with.
    pub(super) fn entry(&self) -> String {
        let [pod, node, external] = self.actions;
        let one = external.chain_name(self.node_port);
        if self.has_origins() {
            let ranges = if self.ranges { "ranges-" } else { "" };
            format!("{}{FROM}{ranges}pod-{pod}-node-{node}-other-{external}", prefix(self.node_port))
        } else {
            one
        }
    }

    fn has_origins(&self) -> bool {
        let [pod, node, external] = self.actions;
        self.ranges || pod != external || node != external
    }

    /// Whether chains of single services are part of it.
    pub(super) fn is_sticky(&self) -> bool {
        self.actions.iter().any(|a| matches!(a, Action::Stick { .. }))
    }

    /// The chains of it that services share, in an order in which each is there before it is named.
    pub(super) fn chains(&self) -> Vec<Chain> {
        let mut chains: Vec<Chain> =
            self.actions.iter().filter_map(|a| a.shared_chain(self.node_port, self.family)).collect();
        if !self.has_origins() {
            return chains;
        }
        let [pod, node, external] = self.actions;
        let rule = || Rule::new(self.family);
        let name = |action: Action| action.chain_name(self.node_port);
        let mut chain = Chain::new(self.entry(), None);
        if self.ranges {
            chain = chain
                .rule("the node", rule().sent_by_node().goto(&name(node)))
                .rule("clients that may not", rule().outside_ranges().drop());
        }
        if pod != external {
            chain = chain.rule("pods", rule().source_in(Set::Pods).goto(&name(pod)));
        }
        if !self.ranges && node != external {
            chain = chain.rule("the node", rule().sent_by_node().goto(&name(node)));
        }
        chains.push(chain.rule("others", rule().goto(&name(external))));
        chains
    }
}
