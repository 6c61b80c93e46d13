//! Reads what `iptables-save` and `ip6tables-save` print, of either back end.
//!
//! Any rule may stand in such a dump; what is no part of a service is passed over. What is looked at are the chains
//! that kube-proxy makes: `KUBE-SERVICES` and `KUBE-NODEPORTS` lead by destination to `KUBE-SVC-…` (all endpoints),
//! `KUBE-SVL-…` (endpoints of this node), `KUBE-EXT-…` (traffic from outside) and `KUBE-FW-…` (source ranges), and those
//! to `KUBE-SEP-…`, one per endpoint.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use podway_services::table::{Family, Protocol};

use super::{
    Action, Endpoint, ForeignKind, ForeignRules, ForeignService, Masquerade, ServicePortName, add_endpoint,
    address_and_port, prefix, protocol,
};

/// One rule, as far as services are concerned.
#[derive(Debug, Default)]
struct Rule {
    line: usize,
    source: Option<(IpNet, Not)>,
    destination: Option<(IpNet, Not)>,
    protocol: Option<Protocol>,
    port: Option<u16>,
    comment: Option<String>,
    /// `-j` or `-g`.
    target: Option<String>,
    dnat: Option<(IpAddr, u16)>,
    /// `-m recent --rcheck --seconds`.
    recent_s: Option<u32>,
    source_local: bool,
    destination_local: bool,
}

/// Whether a condition is inverted.
type Not = bool;

/// One of the tables: rules by chain.
type Table = HashMap<String, Vec<Rule>>;

/// The tables of a dump, by name.
type Tables = BTreeMap<String, Table>;

/// Reads a dump of one family.
#[must_use]
pub fn parse(text: &str, family: Family) -> ForeignRules {
    let mut rules = ForeignRules::default();
    let tables = tables(text, &mut rules);
    let empty = Table::new();
    let nat = tables.get("nat").unwrap_or(&empty);
    let filter = tables.get("filter").unwrap_or(&empty);
    let lines: Vec<&str> = text.lines().collect();
    let mut reader = Reader { nat, filter, family, lines: &lines, rules, at: HashMap::new() };
    reader.services();
    reader.refusals();
    reader.rules.masquerades = nat
        .get("KUBE-POSTROUTING")
        .is_some_and(|c| c.iter().any(|r| r.target.as_deref() == Some("MASQUERADE")));
    reader.rules
}

/// Splits a dump into tables and chains.
fn tables(text: &str, out: &mut ForeignRules) -> Tables {
    let mut tables = Tables::new();
    let mut current: Option<String> = None;
    for (number, raw) in (1..).zip(text.lines()) {
        let line = raw.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('*') {
            if let Some(open) = &current {
                out.problem(number, raw, format!("table {open} has no COMMIT before this table"));
            }
            tables.entry(name.to_owned()).or_default();
            current = Some(name.to_owned());
            continue;
        }
        if line == "COMMIT" {
            if current.take().is_none() {
                out.problem(number, raw, "COMMIT outside of a table");
            }
            continue;
        }
        let Some(table) = current.as_ref().and_then(|name| tables.get_mut(name)) else {
            out.problem(number, raw, "a line outside of a table");
            continue;
        };
        if let Some(chain) = line.strip_prefix(':') {
            match chain.split_ascii_whitespace().next() {
                Some(name) => drop(table.entry(name.to_owned()).or_default()),
                None => out.problem(number, raw, "a chain without a name"),
            }
            continue;
        }
        match rule(line, number) {
            Ok((chain, rule)) => table.entry(chain).or_default().push(rule),
            Err(cause) => out.problem(number, raw, cause),
        }
    }
    if let Some(open) = current {
        let last = text.lines().count();
        out.problem(last, text.lines().last().unwrap_or_default(), format!("table {open} has no COMMIT"));
    }
    tables
}

/// Splits a line into words; quotes and backslashes as `iptables-save` writes them.
fn words(line: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut open) = (false, false);
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        match c {
            '\\' => word.push(characters.next().ok_or("ends with a backslash")?),
            '"' => {
                quoted = !quoted;
                open = true;
            }
            c if c.is_ascii_whitespace() && !quoted => {
                if open || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                open = false;
            }
            c => word.push(c),
        }
    }
    if quoted {
        return Err("a quote is not closed");
    }
    if open || !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

/// Reads `[counters] -A CHAIN …`.
fn rule(line: &str, number: usize) -> Result<(String, Rule), String> {
    let words = words(line)?;
    let mut words = words.iter().map(String::as_str).peekable();
    if words.peek().is_some_and(|w| w.starts_with('[')) {
        words.next();
    }
    if !matches!(words.next(), Some("-A" | "--append")) {
        return Err("not a rule, a chain or a table".into());
    }
    let chain = words.next().ok_or("-A without the name of a chain")?.to_owned();
    let mut rule = Rule { line: number, ..Rule::default() };
    let mut not = false;
    while let Some(word) = words.next() {
        if word == "!" {
            not = true;
            continue;
        }
        let mut value = |what: &str| words.next().ok_or_else(|| format!("{what}: its value is missing"));
        match word {
            "-s" | "--source" => {
                let text = value(word)?;
                let net = prefix(text).ok_or_else(|| format!("{word} {text}: neither address nor prefix"))?;
                rule.source = Some((net, not));
            }
            "-d" | "--destination" => {
                let text = value(word)?;
                let net = prefix(text).ok_or_else(|| format!("{word} {text}: neither address nor prefix"))?;
                rule.destination = Some((net, not));
            }
            // Other protocols are none of a service.
            "-p" | "--protocol" => rule.protocol = protocol(value(word)?),
            "--dport" | "--destination-port" => {
                let text = value(word)?;
                // Ranges are none of a service, but no mistake.
                let first = text.split(':').next().unwrap_or_default();
                let port: u16 = first.parse().map_err(|_| format!("{word} {text}: not a port"))?;
                rule.port = (first.len() == text.len()).then_some(port);
            }
            "--comment" => rule.comment = Some(value(word)?.to_owned()),
            "-j" | "--jump" | "-g" | "--goto" => rule.target = Some(value(word)?.to_owned()),
            "--to-destination" => {
                let text = value(word)?;
                // Ranges of addresses or ports are allowed, and not written by any service proxy.
                let end = address_and_port(text);
                let of_service = chain.starts_with("KUBE-");
                if end.is_none() && of_service {
                    return Err(format!("{word} {text}: not one address and port"));
                }
                rule.dnat = end;
            }
            "--seconds" => {
                let text = value(word)?;
                rule.recent_s = Some(text.parse().map_err(|_| format!("{word} {text}: not a number"))?);
            }
            "--src-type" => rule.source_local = value(word)? == "LOCAL" && !not,
            "--dst-type" => rule.destination_local = value(word)? == "LOCAL" && !not,
            // What other options mean, and whether they have a value, need not be known: a value that looks like
            // one of the options above would have to be quoted with a leading dash, which iptables does not accept.
            _ => {}
        }
        not = false;
    }
    Ok((chain, rule))
}

/// Follows the chains.
struct Reader<'a> {
    nat: &'a Table,
    filter: &'a Table,
    family: Family,
    lines: &'a [&'a str],
    rules: ForeignRules,
    /// Index of the service at an address, port and protocol.
    at: HashMap<(Option<IpAddr>, u16, Protocol), usize>,
}

impl Reader<'_> {
    /// What `KUBE-SERVICES` and `KUBE-NODEPORTS` of the table `nat` lead to.
    fn services(&mut self) {
        let nat = self.nat;
        for chain in ["KUBE-SERVICES", "KUBE-NODEPORTS"] {
            let node_ports = chain == "KUBE-NODEPORTS";
            for rule in nat.get(chain).map(Vec::as_slice).unwrap_or_default() {
                let (Some(protocol), Some(port), Some(target)) = (rule.protocol, rule.port, &rule.target)
                else {
                    continue;
                };
                if !target.starts_with("KUBE-") || target == "KUBE-MARK-MASQ" {
                    continue;
                }
                let address = match (node_ports, host(rule)) {
                    // For 127.0.0.0/8 there is a rule of its own, for counting.
                    (true, _) => None,
                    (false, Some(address)) => Some(address),
                    (false, None) => {
                        self.problem(rule, "a service without an address");
                        continue;
                    }
                };
                if self.at.contains_key(&(address, port, protocol)) {
                    continue;
                }
                let comment = rule.comment.as_deref().unwrap_or_default();
                let (object, words) = comment.split_once(' ').unwrap_or((comment, ""));
                let kind = match words {
                    _ if node_ports => ForeignKind::NodePort,
                    "cluster IP" => ForeignKind::ClusterIp,
                    "external IP" => ForeignKind::ExternalIp,
                    "loadbalancer IP" => ForeignKind::LoadBalancer,
                    _ => ForeignKind::Unknown,
                };
                let mut service = ForeignService {
                    object: ServicePortName::parse(object),
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
                self.follow(rule, target, &mut service, &mut HashSet::new());
                self.add(service);
            }
        }
    }

    /// Collects what a chain of a service does. Each chain is entered once, so that a circle ends.
    fn follow(&mut self, from: &Rule, chain: &str, service: &mut ForeignService, seen: &mut HashSet<String>) {
        if !seen.insert(chain.to_owned()) {
            return;
        }
        let Some(rules) = self.nat.get(chain) else {
            self.problem(from, format!("there is no chain {chain}"));
            return;
        };
        // Traffic from outside goes to the endpoints of this node, whatever the exceptions before say.
        let local = rules.iter().find(|r| r.target.as_deref().is_some_and(|t| t.starts_with("KUBE-SVL-")));
        if let Some(rule) = local.filter(|_| chain.starts_with("KUBE-EXT-") || chain.starts_with("KUBE-FW-"))
        {
            service.local_only = true;
            let target = rule.target.clone().unwrap_or_default();
            self.follow(rule, &target, service, seen);
            return;
        }
        if chain.starts_with("KUBE-SVL-") {
            service.local_only = true;
        }
        for rule in rules {
            let Some(target) = rule.target.as_deref() else { continue };
            match target {
                "KUBE-MARK-MASQ" if chain.starts_with("KUBE-SEP-") => {}
                "KUBE-MARK-MASQ" => {
                    // A rule for one frontend of several that share the chain.
                    let other = host(rule).is_some_and(|d| Some(d) != service.address);
                    let masquerade = match rule.source {
                        Some((_, true)) => Masquerade::OutsidePods,
                        None if !rule.source_local => Masquerade::Always,
                        _ => Masquerade::No,
                    };
                    if !other {
                        service.masquerade = service.masquerade.max(masquerade);
                    }
                }
                "DNAT" => {
                    if let Some((address, port)) = rule.dnat {
                        add_endpoint(&mut service.endpoints, Endpoint { address, port, weight: None });
                    } else {
                        self.problem(rule, "DNAT without a destination");
                    }
                }
                _ if target.starts_with("KUBE-SEP-") => {
                    if let Some(seconds) = rule.recent_s {
                        service.affinity_s = Some(seconds);
                    }
                    self.follow(rule, target, service, seen);
                }
                _ if target.starts_with("KUBE-") && target != "KUBE-MARK-DROP" => {
                    if let (true, Some((range, false))) = (chain.starts_with("KUBE-FW-"), rule.source) {
                        service.source_ranges.push(range);
                    }
                    self.follow(rule, target, service, seen);
                }
                _ => {}
            }
        }
    }

    /// What the table `filter` refuses: services without endpoints, and senders outside of the source ranges.
    fn refusals(&mut self) {
        let filter = self.filter;
        for chain in ["KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-PROXY-FIREWALL", "KUBE-NODEPORTS"] {
            for rule in filter.get(chain).map(Vec::as_slice).unwrap_or_default() {
                let (Some(protocol), Some(port), Some(target)) =
                    (rule.protocol, rule.port, rule.target.as_deref())
                else {
                    continue;
                };
                let address = host(rule);
                let known = self.at.get(&(address, port, protocol)).copied();
                let action = match target {
                    "REJECT" => Action::Reject,
                    "DROP" => Action::Drop,
                    _ => continue,
                };
                match known {
                    // The rule behind the source ranges.
                    Some(_) if chain == "KUBE-PROXY-FIREWALL" => {}
                    Some(index) => self.rules.services[index].action = action,
                    None => {
                        let comment = rule.comment.as_deref().unwrap_or_default();
                        let object = comment.split(' ').next().and_then(ServicePortName::parse);
                        let kind = match (address, chain) {
                            (None, _) => ForeignKind::NodePort,
                            (_, "KUBE-SERVICES") => ForeignKind::ClusterIp,
                            _ => ForeignKind::External,
                        };
                        self.add(ForeignService {
                            object,
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
                        });
                    }
                }
            }
        }
    }

    fn add(&mut self, service: ForeignService) {
        let index = self.rules.services.len();
        self.at.insert((service.address, service.port, service.protocol), index);
        self.rules.services.push(service);
    }

    fn problem(&mut self, rule: &Rule, cause: impl Into<String>) {
        let text = self.lines.get(rule.line.saturating_sub(1)).copied().unwrap_or_default();
        self.rules.problem(rule.line, text, cause);
    }
}

/// The one address that a rule is for.
fn host(rule: &Rule) -> Option<IpAddr> {
    let (net, not) = rule.destination?;
    (!not && net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

/// How the names of chains begin of which there is one per service, endpoint or frontend.
pub(crate) const SERVICE_CHAINS: [&str; 6] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"];

/// The chains of which there is one, of the iptables and IPVS modes and of their releases so far.
const CHAINS: [&str; 15] = [
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FIREWALL",
    "KUBE-FORWARD",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-LOAD-BALANCER",
    "KUBE-MARK-DROP",
    "KUBE-MARK-MASQ",
    "KUBE-NODE-PORT",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-PROXY-CANARY",
    "KUBE-PROXY-FIREWALL",
    "KUBE-SERVICES",
    "KUBE-SOURCE-RANGES-FIREWALL",
];

/// IP sets of the IPVS mode begin so; IPv6 ones with `KUBE-6-`.
const SETS: [&str; 7] = [
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
    "LOAD-BALANCER",
    "LOOP-BACK",
    "NODE-PORT",
];

/// Whether a chain of this name is kube-proxy's. Others begin with `KUBE-`, too: the kubelet's, and those of network
/// policy programs.
#[must_use]
pub fn is_kube_proxy_chain(name: &str) -> bool {
    SERVICE_CHAINS.iter().any(|prefix| name.starts_with(prefix)) || CHAINS.contains(&name)
}

/// Whether an IP set of this name is one of kube-proxy's IPVS mode.
#[must_use]
pub fn is_kube_proxy_set(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("KUBE-") else { return false };
    let rest = rest.strip_prefix("6-").unwrap_or(rest);
    SETS.iter().any(|set| rest.starts_with(set))
}

/// Names of the chains in a dump for which `wanted` holds: table and chain.
#[must_use]
pub fn chains(text: &str, wanted: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let mut table = "";
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim();
        } else if let Some(chain) = line.strip_prefix(':') {
            let name = chain.split_ascii_whitespace().next().unwrap_or_default();
            if wanted(name) {
                found.push((table.to_owned(), name.to_owned()));
            }
        }
    }
    found
}

/// The rules in a dump that lead from another chain to one of these: table, and the rule as `iptables-save` prints
/// it (`-A …`).
#[must_use]
pub fn jumps_to(text: &str, wanted: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let mut table = "";
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim();
            continue;
        }
        let Ok((chain, rule)) = rule(line, 0) else { continue };
        if !wanted(&chain) && rule.target.as_deref().is_some_and(&wanted) {
            found.push((table.to_owned(), line.trim().to_owned()));
        }
    }
    found
}

#[cfg(test)]
#[path = "iptables_tests.rs"]
mod tests;
