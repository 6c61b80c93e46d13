//! From connections that were seen to the NetworkPolicies that allow them and nothing else, as far as labels and ports
//! can say it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use podway_model::pod::NAMESPACE_NAME_LABEL;
use podway_model::{Labels, Namespace, NetworkPolicy, NodePeer, Pod, Protocol};
use podway_policy::{Compiler, Reachability, Update};
use serde_json::{Map, Value, json};

/// Not proposed for unless it is named: what runs there serves the cluster, and rarely shows all that it does.
pub(super) const SYSTEM_NAMESPACE: &str = "kube-system";
/// Labels by which people name applications, the best first.
const NAMING: [&str; 5] = ["app.kubernetes.io/name", "app", "k8s-app", "name", "app.kubernetes.io/component"];
/// Longest name of a proposed policy.
const NAME_LIMIT: usize = 63;

/// One end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Party {
    Pod { namespace: String, name: String, labels: Labels, node: String, ip: IpAddr },
    Node { name: String, ip: IpAddr },
    Address(IpAddr),
}

/// A connection that was let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) source: Party,
    pub(super) target: Party,
    /// IP protocol number.
    pub(super) protocol: u8,
    /// The target's; 0 for protocols without ports.
    pub(super) port: u16,
}

/// Pods of one namespace with the same labels, of those that stay when they are replaced.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Workload {
    pub(super) namespace: String,
    pub(super) labels: Labels,
}

#[derive(Debug, Default)]
pub(super) struct Proposal {
    /// NetworkPolicy objects.
    pub(super) policies: Vec<Value>,
    /// Pods that no label tells from others, so that nothing is proposed for them.
    pub(super) without_labels: BTreeSet<String>,
    /// What was seen and would be denied.
    pub(super) denied: BTreeSet<String>,
    /// What was not seen and would be allowed between what was seen.
    pub(super) surplus: BTreeSet<String>,
    /// Different connections by workload, protocol and port.
    pub(super) connections: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Peer {
    Pods(Workload),
    Block(IpNet),
}

type Ports = BTreeSet<(&'static str, u16)>;
type Rules = BTreeMap<Peer, Ports>;

impl Party {
    pub(super) fn ip(&self) -> IpAddr {
        match self {
            Self::Pod { ip, .. } | Self::Node { ip, .. } | Self::Address(ip) => *ip,
        }
    }

    fn workload(&self) -> Option<Workload> {
        match self {
            Self::Pod { namespace, labels, .. } => {
                let stays = |(key, _): &(&String, &String)| is_lasting(key);
                let labels = labels.iter().filter(stays).map(|(k, v)| (k.clone(), v.clone())).collect();
                Some(Workload { namespace: namespace.clone(), labels })
            }
            _ => None,
        }
    }

    fn peer(&self) -> Peer {
        self.workload().map_or_else(|| Peer::Block(IpNet::from(self.ip())), Peer::Pods)
    }

    fn is_dns(&self) -> bool {
        let Self::Pod { labels, .. } = self else { return false };
        let named = |key: &str| labels.get(key).is_some_and(|v| matches!(v.as_str(), "kube-dns" | "coredns"));
        ["k8s-app", "app.kubernetes.io/name", "app"].into_iter().any(named)
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { namespace, name, .. } => write!(f, "{namespace}/{name}"),
            Self::Node { name, .. } => write!(f, "node {name}"),
            Self::Address(ip) => write!(f, "{ip}"),
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels: Vec<String> = self.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        write!(f, "{} {}", self.namespace, labels.join(","))
    }
}

/// Whether a label stays when a pod is replaced by its successor, or the application by its next version.
fn is_lasting(key: &str) -> bool {
    let prefix = key.split_once('/').map_or("", |(prefix, _)| prefix);
    let by_controllers = [
        "pod-template-hash",
        "pod-template-generation",
        "controller-revision-hash",
        "controller-uid",
        "job-name",
        "chart",
        "heritage",
        "helm.sh/chart",
        "app.kubernetes.io/version",
        "app.kubernetes.io/managed-by",
    ];
    let domains =
        ["statefulset.kubernetes.io", "apps.kubernetes.io", "batch.kubernetes.io", "topology.kubernetes.io"];
    !by_controllers.contains(&key) && !domains.contains(&prefix)
}

fn protocol_name(number: u8) -> Option<&'static str> {
    [(Protocol::Tcp, "TCP"), (Protocol::Udp, "UDP"), (Protocol::Sctp, "SCTP")]
        .into_iter()
        .find(|(protocol, _)| protocol.number() == number)
        .map(|(_, name)| name)
}

/// Whether no policy is asked: what a node sends to its own pods, and what a pod sends to itself.
fn is_exempt(seen: &Seen) -> bool {
    let own_node = match (&seen.source, &seen.target) {
        (Party::Node { name, .. }, Party::Pod { node, .. }) => name == node,
        _ => false,
    };
    own_node || seen.source.ip() == seen.target.ip()
}

/// Proposes policies for the pods of some namespaces; for none named, of all but [`SYSTEM_NAMESPACE`].
pub(super) fn propose(seen: &[Seen], namespaces: &[String]) -> Proposal {
    let is_wanted = |namespace: &str| match namespaces {
        [] => namespace != SYSTEM_NAMESPACE,
        some => some.iter().any(|n| n == namespace),
    };
    let mut proposal = Proposal::default();
    let mut workloads = BTreeSet::new();
    for party in seen.iter().flat_map(|s| [&s.source, &s.target]) {
        let Some(workload) = party.workload() else { continue };
        if workload.labels.is_empty() {
            proposal.without_labels.insert(party.to_string());
        }
        workloads.insert(workload);
    }
    let mut rules: BTreeMap<Workload, [Rules; 2]> = BTreeMap::new();
    for workload in workloads.iter().filter(|w| is_wanted(&w.namespace) && !w.labels.is_empty()) {
        rules.insert(workload.clone(), [Rules::new(), Rules::new()]);
    }
    let mut used: BTreeSet<(Peer, Peer, &'static str, u16)> = BTreeSet::new();
    for connection in seen.iter().filter(|s| !is_exempt(s)) {
        let Seen { source, target, protocol, port } = connection;
        // Rules with ports know three protocols; one without would allow everything.
        let Some(protocol) = protocol_name(*protocol) else { continue };
        let (from, to) = (source.peer(), target.peer());
        let mut ports = Ports::from([(protocol, *port)]);
        if target.is_dns() || *port == 53 {
            // An answer that is too long for UDP is asked for again by TCP (RFC 7766).
            ports.extend([("UDP", *port), ("TCP", *port)]);
        }
        if used.insert((from.clone(), to.clone(), protocol, *port)) {
            proposal.connections += 1;
        }
        for (end, other, direction) in [(source, &to, 1), (target, &from, 0)] {
            if let Some(rules) = end.workload().and_then(|w| rules.get_mut(&w)) {
                rules[direction].entry(other.clone()).or_default().extend(ports.iter().copied());
            }
        }
    }
    let mut names = BTreeSet::new();
    for (workload, [ingress, egress]) in &rules {
        let name = name_of(workload, &mut names);
        let direction = |rules: &Rules, field: &str| rules_of(workload, rules, field, &workloads);
        proposal.policies.push(json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": workload.namespace},
            "spec": {
                "podSelector": selector(workload, &workloads),
                "policyTypes": ["Ingress", "Egress"],
                "ingress": direction(ingress, "from"),
                "egress": direction(egress, "to"),
            },
        }));
    }
    judge(&mut proposal, seen, &rules);
    proposal
}

fn name_of(workload: &Workload, taken: &mut BTreeSet<(String, String)>) -> String {
    let named = NAMING.into_iter().find_map(|key| workload.labels.get(key));
    let text = named.or_else(|| workload.labels.values().next()).map_or("pods", String::as_str);
    let clean: String = text
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(NAME_LIMIT - 12)
        .collect();
    let base = format!("learned-{}", clean.trim_matches('-'));
    let base = base.trim_end_matches('-').to_owned();
    let numbered = (2..).map(|n| format!("{base}-{n}"));
    let free = |name: &String| taken.insert((workload.namespace.clone(), name.clone()));
    std::iter::once(base.clone()).chain(numbered).find(free).unwrap_or(base)
}

/// Selects the workload's pods, and no pods of workloads that have its labels and more.
fn selector(workload: &Workload, all: &BTreeSet<Workload>) -> Value {
    let mut without: BTreeSet<&String> = BTreeSet::new();
    for other in all.iter().filter(|o| o.namespace == workload.namespace && *o != workload) {
        let has_all = workload.labels.iter().all(|(key, value)| other.labels.get(key) == Some(value));
        if has_all && !other.labels.keys().any(|key| without.contains(key)) {
            without.extend(other.labels.keys().find(|key| !workload.labels.contains_key(*key)));
        }
    }
    let mut selector = Map::new();
    if !workload.labels.is_empty() {
        selector.insert("matchLabels".into(), json!(workload.labels));
    }
    if !without.is_empty() {
        let absent = |key: &&String| json!({"key": key, "operator": "DoesNotExist"});
        selector.insert("matchExpressions".into(), without.iter().map(absent).collect());
    }
    Value::Object(selector)
}

/// Rules, of which each has all the peers with the same ports.
fn rules_of(own: &Workload, rules: &Rules, field: &str, all: &BTreeSet<Workload>) -> Value {
    let mut by_ports: BTreeMap<&Ports, Vec<Value>> = BTreeMap::new();
    for (peer, ports) in rules {
        let peer = match peer {
            Peer::Block(net) => json!({"ipBlock": {"cidr": net}}),
            Peer::Pods(workload) if workload.namespace == own.namespace => {
                json!({"podSelector": selector(workload, all)})
            }
            Peer::Pods(workload) => json!({
                "namespaceSelector": {"matchLabels": {NAMESPACE_NAME_LABEL: workload.namespace}},
                "podSelector": selector(workload, all)}),
        };
        by_ports.entry(ports).or_default().push(peer);
    }
    let rule = |(ports, peers): (&Ports, Vec<Value>)| {
        let port = |(protocol, port): &(&str, u16)| json!({"protocol": protocol, "port": port});
        json!({field: peers, "ports": ports.iter().map(port).collect::<Vec<_>>()})
    };
    by_ports.into_iter().map(rule).collect()
}

/// Compiles the proposal with all that was seen: what of it would be denied, and what else would be allowed.
fn judge(proposal: &mut Proposal, seen: &[Seen], rules: &BTreeMap<Workload, [Rules; 2]>) {
    let mut updates = Vec::new();
    let mut pods: BTreeMap<IpAddr, &Party> = BTreeMap::new();
    for party in seen.iter().flat_map(|s| [&s.source, &s.target]) {
        match party {
            Party::Pod { namespace, name, labels, node, ip } => {
                if pods.insert(*ip, party).is_none() {
                    updates.push(Update::Namespace(Namespace::new(namespace, Labels::new())));
                    updates.push(Update::Pod(Pod {
                        namespace: namespace.clone(),
                        // A pod of two families is two here.
                        name: format!("{name} {ip}"),
                        labels: labels.clone(),
                        node: node.clone(),
                        addresses: vec![*ip],
                        ..Pod::default()
                    }));
                }
            }
            Party::Node { name, ip } => updates.push(Update::Node(NodePeer {
                name: format!("{name} {ip}"),
                addresses: vec![*ip],
                ..NodePeer::default()
            })),
            Party::Address(_) => {}
        }
    }
    for policy in &proposal.policies {
        match NetworkPolicy::parse(policy) {
            Ok(policy) => updates.push(Update::NetworkPolicy(policy)),
            // Cannot be reached by labels that a cluster has accepted; input from elsewhere may hold others.
            Err(rejection) => {
                proposal.denied.insert(format!("everything of a policy that would be refused: {rejection}"));
            }
        }
    }
    let mut compiler = Compiler::for_cluster();
    compiler.apply(updates);
    let mut used: BTreeMap<(Peer, Peer), Ports> = BTreeMap::new();
    for connection in seen.iter().filter(|s| !is_exempt(s)) {
        let Seen { source, target, protocol, port } = connection;
        let name = protocol_name(*protocol);
        if !compiler.table().judge(source.ip(), target.ip(), *protocol, *port).allow() {
            let what = match name {
                Some(name) => format!("{name} {port}"),
                None if matches!(protocol, 1 | 58) => "ICMP".to_owned(),
                None => format!("IP protocol {protocol}"),
            };
            let why = if name.is_none() { " (rules can allow it only together with everything)" } else { "" };
            proposal.denied.insert(format!("{source} to {target}: {what}{why}"));
        }
        if let Some(name) = name {
            let ports = used.entry((source.peer(), target.peer())).or_default();
            ports.insert((name, *port));
            if target.is_dns() || *port == 53 {
                ports.extend([("UDP", *port), ("TCP", *port)]);
            }
        }
    }
    let mut reach = Reachability::new(&compiler);
    let none = Ports::new();
    for (from, source) in &pods {
        for (to, target) in &pods {
            let is_policed = |party: &Party| party.workload().is_some_and(|w| rules.contains_key(&w));
            let (own, other) = (source.peer(), target.peer());
            // Two pods of one workload are asked for only when both were seen.
            if from == to || from.is_ipv4() != to.is_ipv4() || !(is_policed(source) && is_policed(target)) {
                continue;
            }
            let ports = used.get(&(own, other)).unwrap_or(&none);
            for piece in reach.between(*from, *to).iter().filter(|p| p.allow()) {
                let protocol = piece.protocol.and_then(|p| protocol_name(p.number()));
                let is_used = protocol
                    .is_some_and(|name| (piece.first..=piece.last).all(|p| ports.contains(&(name, p))));
                if !is_used {
                    let what = match protocol {
                        Some(name) if piece.first == piece.last => format!("{name} {}", piece.first),
                        Some(name) => format!("{name} {}-{}", piece.first, piece.last),
                        None => "other protocols".to_owned(),
                    };
                    proposal.surplus.insert(format!("{source} to {target}: {what}"));
                }
            }
        }
    }
}

/// A policy as YAML: block style, every text in double quotes as JSON writes it, which YAML reads the same.
pub(super) fn yaml(value: &Value) -> String {
    let mut out = String::new();
    write(value, 0, &mut out);
    out
}

fn write(value: &Value, indent: usize, out: &mut String) {
    let pad = "  ".repeat(indent);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (i, (key, value)) in fields.iter().enumerate() {
                if i > 0 || !out.ends_with("- ") {
                    out.push_str(&pad);
                }
                let is_plain = key.chars().all(|c| c.is_ascii_alphanumeric());
                let key = if is_plain { key.clone() } else { Value::from(key.as_str()).to_string() };
                out.push_str(&key);
                out.push(':');
                nested(value, indent, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                out.push_str(&pad);
                out.push_str("- ");
                match item {
                    Value::Object(fields) if !fields.is_empty() => write(item, indent + 1, out),
                    other => {
                        out.push_str(&other.to_string());
                        out.push('\n');
                    }
                }
            }
        }
        other => {
            out.push_str(&other.to_string());
            out.push('\n');
        }
    }
}

fn nested(value: &Value, indent: usize, out: &mut String) {
    let is_block = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if is_block {
        out.push('\n');
        write(value, indent + 1, out);
    } else {
        out.push(' ');
        out.push_str(&value.to_string());
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, name: &str, labels: &[(&str, &str)], last: u8) -> Party {
        Party::Pod {
            namespace: namespace.into(),
            name: name.into(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            node: format!("n{}", last % 2),
            ip: [10, 0, 0, last].into(),
        }
    }

    fn web(last: u8) -> Party {
        pod("shop", &format!("web-{last}"), &[("app", "web"), ("pod-template-hash", "abc")], last)
    }

    fn canary() -> Party {
        pod("shop", "canary", &[("app", "web"), ("track", "canary")], 9)
    }

    fn db() -> Party {
        pod("data", "db-0", &[("app", "db"), ("apps.kubernetes.io/pod-index", "0")], 3)
    }

    fn dns() -> Party {
        pod("kube-system", "dns", &[("k8s-app", "kube-dns")], 4)
    }

    fn seen(source: Party, target: Party, protocol: u8, port: u16) -> Seen {
        Seen { source, target, protocol, port }
    }

    #[test]
    fn what_was_seen_is_allowed_and_nothing_else() {
        let outside = Party::Address("203.0.113.7".parse().unwrap());
        let all = vec![
            seen(web(1), db(), 6, 5432),
            seen(web(2), db(), 6, 5432),
            seen(web(1), dns(), 17, 53),
            seen(canary(), db(), 6, 5433),
            seen(outside, web(1), 6, 80),
            seen(Party::Node { name: "n1".into(), ip: [192, 0, 2, 1].into() }, web(1), 6, 8080),
            seen(Party::Node { name: "n0".into(), ip: [192, 0, 2, 2].into() }, web(1), 6, 9090),
        ];
        let proposal = propose(&all, &[]);
        assert!(proposal.denied.is_empty(), "{:?}", proposal.denied);
        assert!(proposal.surplus.is_empty(), "{:?}", proposal.surplus);
        assert_eq!(proposal.connections, 5);
        let names: Vec<String> = proposal
            .policies
            .iter()
            .map(|p| format!("{}/{}", p["metadata"]["namespace"], p["metadata"]["name"]).replace('"', ""))
            .collect();
        assert_eq!(names, ["data/learned-db", "shop/learned-web", "shop/learned-web-2"]);
        let web = &proposal.policies[1]["spec"];
        assert_eq!(
            web["podSelector"],
            json!({"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "track", "operator": "DoesNotExist"}]})
        );
        let both = json!([{"protocol": "TCP", "port": 53}, {"protocol": "UDP", "port": 53}]);
        assert!(web["egress"].as_array().unwrap().iter().any(|rule| rule["ports"] == both), "{web}");
        // The probe by the pod's own node needs no rule, that by another one does.
        let blocks: Vec<String> =
            web["ingress"].as_array().unwrap().iter().map(ToString::to_string).collect();
        assert!(blocks.iter().any(|b| b.contains("192.0.2.2/32") && b.contains("9090")), "{blocks:?}");
        assert!(!blocks.iter().any(|b| b.contains("192.0.2.1/32")), "{blocks:?}");
    }

    #[test]
    fn only_namespaces_that_are_asked_for() {
        let all = [seen(web(1), db(), 6, 5432), seen(web(1), dns(), 17, 53)];
        for (namespaces, expected) in
            [(vec![], 2), (vec!["data"], 1), (vec!["kube-system", "shop"], 2), (vec!["other"], 0)]
        {
            let namespaces: Vec<String> = namespaces.into_iter().map(str::to_owned).collect();
            assert_eq!(propose(&all, &namespaces).policies.len(), expected, "{namespaces:?}");
        }
    }

    #[test]
    fn what_no_rule_can_say_is_told() {
        let bare = pod("shop", "bare", &[("pod-template-hash", "x")], 7);
        let proposal = propose(&[seen(web(1), db(), 1, 0), seen(bare.clone(), db(), 6, 1)], &[]);
        assert_eq!(proposal.without_labels, BTreeSet::from(["shop/bare".to_owned()]));
        assert_eq!(proposal.denied.len(), 1, "{:?}", proposal.denied);
        assert!(proposal.denied.iter().all(|d| d.contains("ICMP")), "{:?}", proposal.denied);
        // Rules for it mean pods that have none of the labels that others were seen to have.
        assert!(proposal.surplus.is_empty(), "{:?}", proposal.surplus);
        let from = &proposal.policies[0]["spec"]["ingress"][0]["from"][0]["podSelector"];
        assert_eq!(*from, json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}));
    }

    #[test]
    fn yaml_reads_as_it_was_meant() {
        let policy = &propose(&[seen(web(1), db(), 6, 5432)], &[]).policies[1];
        let text = yaml(policy);
        let expected = "apiVersion: \"networking.k8s.io/v1\"\nkind: \"NetworkPolicy\"\nmetadata:\n  name: \"learned-web\"\n  \
                        namespace: \"shop\"\nspec:\n  egress:\n    - ports:\n        - port: 5432\n          protocol: \
                        \"TCP\"\n      to:\n        - namespaceSelector:\n            matchLabels:\n              \
                        \"kubernetes.io/metadata.name\": \"data\"\n          podSelector:\n            matchLabels:\n              \
                        app: \"db\"\n  ingress: []\n  podSelector:\n    matchLabels:\n      app: \"web\"\n  policyTypes:\n    \
                        - \"Ingress\"\n    - \"Egress\"\n";
        assert_eq!(text, expected);
    }
}
