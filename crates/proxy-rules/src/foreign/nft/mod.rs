//! Reads what `nft list ruleset` prints, as text or (`nft -j`) as JSON.
//!
//! Both forms are read into the same few facts of each rule; from them the services of the tables named `kube-proxy`
//! are made. Other tables are passed over. kube-proxy looks up destinations in the verdict maps `service-ips` and
//! `service-nodeports`; they lead to `service-…` chains (all endpoints), `external-…` chains (traffic from outside)
//! and, in older releases, to `endpoint-…` chains; `no-endpoint-…` maps refuse.

mod json;
mod text;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use podway_services::table::{Family, Protocol};

use super::{
    Action, Endpoint, ForeignKind, ForeignRules, ForeignService, Masquerade, ServicePortName, add_endpoint,
    protocol,
};

pub use json::parse as parse_json;
pub use text::parse as parse_text;

/// Name of kube-proxy's tables.
pub const KUBE_PROXY_TABLE: &str = "kube-proxy";

/// One of kube-proxy's tables.
#[derive(Debug, Default)]
struct Table {
    family: String,
    /// Elements of sets and maps.
    elements: HashMap<String, Vec<Element>>,
    chains: BTreeMap<String, Vec<Rule>>,
}

/// One element of a set or map.
#[derive(Debug)]
struct Element {
    line: usize,
    /// Parts of the key.
    key: Vec<String>,
    /// The verdict: `drop`, `goto x`; empty in a set.
    verdict: String,
    comment: Option<String>,
}

/// What a rule says, as far as services are concerned.
#[derive(Debug, Default)]
struct Rule {
    /// `ip saddr …`, and whether it is inverted.
    source: Option<(Vec<IpNet>, bool)>,
    /// `ip saddr @set`, `ip daddr @set` and the like.
    sets: Vec<String>,
    /// `fib saddr type local`.
    source_local: bool,
    /// Chains of `jump`, `goto` and of verdict maps in the rule.
    targets: Vec<String>,
    /// Addresses and ports of `dnat`, or of the map that it takes them from.
    dnat: Vec<(IpAddr, u16)>,
    /// `reject` or `drop`.
    refuses: Option<Action>,
    /// The mark for masquerading is set.
    marks: bool,
    masquerades: bool,
    /// Seconds of the set that the rule updates or looks in.
    timeout_s: Option<u32>,
}

/// The services of all of kube-proxy's tables.
fn services(tables: &[Table], rules: &mut ForeignRules) {
    for table in tables {
        let family = match table.family.as_str() {
            "ip6" => Family::V6,
            _ => Family::V4,
        };
        let mut reader = Reader { table, family, rules, at: HashMap::new() };
        reader.forwarding();
        reader.refusals();
        rules.masquerades |= table.chains.values().flatten().any(|r| r.masquerades);
    }
}

struct Reader<'a> {
    table: &'a Table,
    family: Family,
    rules: &'a mut ForeignRules,
    at: HashMap<Key, usize>,
}

type Key = (Option<IpAddr>, u16, Protocol);

impl Reader<'_> {
    fn forwarding(&mut self) {
        let table = self.table;
        let of_clusters: HashSet<&str> =
            elements(table, "cluster-ips").iter().filter_map(|e| e.key.first().map(String::as_str)).collect();
        let firewalls: HashMap<Key, &str> = elements(table, "firewall-ips")
            .iter()
            .filter_map(|e| Some((key(e, false)?, e.verdict.rsplit(' ').next()?)))
            .collect();
        // A rule for all cluster IPs, of newer releases.
        let everywhere = table.chains.get("services").and_then(|c| {
            c.iter().find(|r| r.marks && r.sets.iter().any(|s| s == "cluster-ips")).map(masquerade_of)
        });
        for (map, node_ports) in [("service-ips", false), ("service-nodeports", true)] {
            for element in elements(table, map) {
                let Some(key) = self.key(element, node_ports) else { continue };
                let (address, port, protocol) = key;
                let Some(target) =
                    element.verdict.strip_prefix("goto ").or(element.verdict.strip_prefix("jump "))
                else {
                    self.problem(element, "a service without a chain");
                    continue;
                };
                let external = target.starts_with("external-");
                let cluster = element.key.first().is_some_and(|a| of_clusters.contains(a.as_str()));
                let kind = match (node_ports, cluster, firewalls.get(&key)) {
                    (true, ..) => ForeignKind::NodePort,
                    (_, true, _) => ForeignKind::ClusterIp,
                    (_, _, Some(_)) => ForeignKind::LoadBalancer,
                    _ => ForeignKind::External,
                };
                let mut service = ForeignService {
                    object: object(target),
                    address,
                    family: self.family,
                    port,
                    protocol,
                    kind,
                    action: Action::Forward,
                    endpoints: Vec::new(),
                    masquerade: Masquerade::No,
                    affinity_s: None,
                    source_ranges: Vec::new(),
                    local_only: false,
                };
                if let (ForeignKind::ClusterIp, Some(masquerade)) = (kind, everywhere) {
                    service.masquerade = masquerade;
                }
                if let Some(chain) = firewalls.get(&key).and_then(|name| table.chains.get(*name)) {
                    let ranges = chain.iter().filter_map(|r| r.source.as_ref());
                    service.source_ranges = ranges.flat_map(|(nets, _)| nets.iter().copied()).collect();
                }
                if table.chains.contains_key(target) {
                    // Pods and the node itself are short-circuited before what outside senders get.
                    let short = |r: &Rule| r.source.is_some() || r.source_local;
                    service.local_only = external
                        && table.chains[target]
                            .iter()
                            .any(|r| short(r) && r.targets.iter().any(|t| is_service(t)));
                    self.follow(target, &mut service, &mut HashSet::new());
                } else {
                    self.problem(element, &format!("there is no chain {target}"));
                }
                self.add(key, service);
            }
        }
    }

    /// Collects what a chain of a service does. Each chain is entered once, so that a circle ends.
    fn follow(&mut self, chain: &str, service: &mut ForeignService, seen: &mut HashSet<String>) {
        if !seen.insert(chain.to_owned()) {
            return;
        }
        let table = self.table;
        let Some(rules) = table.chains.get(chain) else { return };
        let endpoint_chain = chain.starts_with("endpoint-");
        for rule in rules {
            if rule.timeout_s.is_some() {
                service.affinity_s = rule.timeout_s;
            }
            // An endpoint's own rule is for a pod that reaches itself.
            if rule.marks && !endpoint_chain {
                service.masquerade = service.masquerade.max(masquerade_of(rule));
            }
            for (address, port) in &rule.dnat {
                add_endpoint(
                    &mut service.endpoints,
                    Endpoint { address: *address, port: *port, weight: None },
                );
            }
            if service.local_only && (rule.source.is_some() || rule.source_local) {
                continue;
            }
            for target in &rule.targets {
                self.follow(target, service, seen);
            }
        }
    }

    fn refusals(&mut self) {
        let table = self.table;
        for (map, node_ports) in [("no-endpoint-services", false), ("no-endpoint-nodeports", true)] {
            for element in elements(table, map) {
                let Some(key) = self.key(element, node_ports) else { continue };
                let action = if element.verdict == "drop" {
                    Action::Drop
                } else {
                    let chain = element.verdict.rsplit(' ').next().and_then(|name| table.chains.get(name));
                    match chain.and_then(|c| c.iter().find_map(|r| r.refuses)) {
                        Some(action) => action,
                        None => {
                            self.problem(element, "neither rejects nor drops");
                            continue;
                        }
                    }
                };
                if let Some(index) = self.at.get(&key) {
                    self.rules.services[*index].action = action;
                    continue;
                }
                let (address, port, protocol) = key;
                let kind = match (node_ports, action) {
                    (true, _) => ForeignKind::NodePort,
                    (_, Action::Drop) => ForeignKind::External,
                    _ => ForeignKind::Unknown,
                };
                let service = ForeignService {
                    object: element.comment.as_deref().and_then(ServicePortName::parse),
                    address,
                    family: self.family,
                    port,
                    protocol,
                    kind,
                    action,
                    endpoints: Vec::new(),
                    masquerade: Masquerade::No,
                    affinity_s: None,
                    source_ranges: Vec::new(),
                    local_only: action == Action::Drop,
                };
                self.add(key, service);
            }
        }
    }

    fn key(&mut self, element: &Element, node_ports: bool) -> Option<Key> {
        let key = key(element, node_ports);
        if key.is_none() {
            self.problem(element, "not an address, protocol and port");
        }
        key
    }

    fn add(&mut self, key: Key, service: ForeignService) {
        self.at.insert(key, self.rules.services.len());
        self.rules.services.push(service);
    }

    fn problem(&mut self, element: &Element, cause: &str) {
        let text = format!("{} : {}", element.key.join(" . "), element.verdict);
        self.rules.problem(element.line, &text, cause);
    }
}

fn elements<'a>(table: &'a Table, name: &str) -> &'a [Element] {
    table.elements.get(name).map(Vec::as_slice).unwrap_or_default()
}

fn key(element: &Element, node_ports: bool) -> Option<Key> {
    match (element.key.as_slice(), node_ports) {
        ([address, name, port], false) => {
            Some((Some(address.parse().ok()?), port.parse().ok()?, protocol(name)?))
        }
        ([name, port], true) => Some((None, port.parse().ok()?, protocol(name)?)),
        _ => None,
    }
}

fn masquerade_of(rule: &Rule) -> Masquerade {
    match (&rule.source, rule.source_local) {
        (Some((_, true)), _) => Masquerade::OutsidePods,
        (None, false) => Masquerade::Always,
        _ => Masquerade::No,
    }
}

fn is_service(chain: &str) -> bool {
    chain.starts_with("service-")
}

/// The Service that a chain is named after: `service-HASH-namespace/name/protocol/port`, in which only the hash has
/// no dash.
fn object(chain: &str) -> Option<ServicePortName> {
    let (_, rest) = chain.split_once('-')?;
    let (_, rest) = rest.split_once('-')?;
    let mut parts = rest.split("__").next()?.splitn(4, '/');
    let (namespace, name, _, port) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    ServicePortName::parse(&format!("{namespace}/{name}:{port}"))
}

#[cfg(test)]
#[path = "../nft_tests.rs"]
mod tests;
