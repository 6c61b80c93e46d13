//! What the kernel has to hold for a table: virtual servers, elements of the rules' sets, addresses. Pure.
//!
//! A virtual server answers everybody alike. Where senders are treated differently (a traffic policy is `Local`), the
//! server at the address serves the node's own set, and packets of the others are marked: a second virtual server
//! answers to the mark.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use podway_services::ServiceTable;
use podway_services::table::{
    Backend, Family, Frontend, FrontendAddr, FrontendKey, NodeView, Origin, Protocol, ServiceId, SetId,
    SetKind, TableChange, Target,
};

use super::netlink::{ServerKey, ServerSpec};
use super::scheduler::Scheduler;

/// Marks of packets for virtual servers by mark: these bits, the service's number, the kind of the set.
const MARK: u32 = 0x5000_0000;
/// Service numbers that have room in a mark.
const MARK_SERVICES: u32 = 1 << 22;

/// One element of a set or map of the rules.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Element {
    /// Name of the set, without the family.
    pub(crate) set: &'static str,
    pub(crate) family: Family,
    /// The key, as nft takes and prints it.
    pub(crate) key: String,
    /// The value, in a map.
    pub(crate) value: Option<String>,
}

/// Names of the sets for each origin, in the order of [`Origin::ALL`].
pub(crate) const VERDICTS: [&str; 3] = ["verdicts_pod", "verdicts_node", "verdicts_external"];
pub(crate) const MARKS: [&str; 3] = ["marks_pod", "marks_node", "marks_external"];
pub(crate) const MASQUERADES: [&str; 3] = ["masquerade_pod", "masquerade_node", "masquerade_external"];
/// Addresses on our device: other ports there are refused.
pub(crate) const VIPS: &str = "vips";
/// Where services answer.
pub(crate) const FRONTENDS: &str = "frontends";
/// Virtual servers that are ours, by address and by mark.
pub(crate) const SERVERS: &str = "servers";
pub(crate) const MARKED: &str = "marked";
/// Where only some may send, and who.
pub(crate) const RANGED: &str = "ranged";
pub(crate) const ALLOWED: &str = "allowed";
/// Endpoints on this node, twice: source and destination of a pod that reaches itself.
pub(crate) const HAIRPIN: &str = "hairpin";
/// Where pods have their addresses, and ranges that belong to services alone.
pub(crate) const PODS: &str = "pods";
pub(crate) const RESERVED: &str = "reserved";

/// What a virtual server should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) service: ServiceId,
    /// Whose backends; `None` when it only lets open connections end.
    pub(crate) set: Option<SetId>,
    pub(crate) affinity_s: Option<u32>,
    /// How many frontends want it.
    owners: usize,
}

/// What one frontend adds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Contribution {
    servers: Vec<(ServerKey, Wanted)>,
    elements: Vec<Element>,
}

/// What has to be looked at after a change.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    pub(crate) elements: BTreeSet<Element>,
    pub(crate) servers: BTreeSet<ServerKey>,
}

/// The whole of what should be.
#[derive(Debug, Default)]
pub(crate) struct Desired {
    pub(crate) table: ServiceTable,
    pub(crate) view: NodeView,
    contributions: BTreeMap<FrontendKey, Contribution>,
    /// With how many want each.
    elements: BTreeMap<Element, usize>,
    servers: BTreeMap<ServerKey, Wanted>,
    /// Which servers take their backends from a set.
    of_sets: BTreeMap<SetId, BTreeSet<ServerKey>>,
}

impl Desired {
    /// For a whole table.
    pub(crate) fn new(table: &ServiceTable, view: &NodeView) -> Self {
        let mut desired = Self { table: table.clone(), view: view.clone(), ..Self::default() };
        let mut touched = Touched::default();
        for (name, ranges) in [
            (PODS, view.pod_cidrs.clone()),
            (RESERVED, view.service_cidrs.iter().chain(&view.load_balancer_pools).copied().collect()),
        ] {
            for range in IpNet::aggregate(&ranges.iter().map(IpNet::trunc).collect()) {
                let element = element(name, Family::of(&range.addr()), prefix(&range), None);
                desired.count(&element, true, &mut touched);
            }
        }
        for vip in &table.vips {
            desired.count(&vip_element(*vip), true, &mut touched);
        }
        for backends in table.sets.values() {
            for element in hairpins(backends) {
                desired.count(&element, true, &mut touched);
            }
        }
        for key in table.frontends.keys() {
            desired.frontend(*key, &mut touched);
        }
        desired
    }

    /// Takes changes, and says what they touch.
    pub(crate) fn apply(&mut self, changes: &[TableChange]) -> Touched {
        let mut touched = Touched::default();
        for change in changes {
            match change {
                TableChange::Set(id, backends) => {
                    let old = self.table.sets.get(id).cloned();
                    let new = backends.clone();
                    for (backends, more) in [(new, true), (old, false)] {
                        for element in backends.iter().flat_map(|b| hairpins(b)) {
                            self.count(&element, more, &mut touched);
                        }
                    }
                    touched.servers.extend(self.of_sets.get(id).into_iter().flatten());
                }
                TableChange::Vip(vip) if !self.table.vips.contains(vip) => {
                    self.count(&vip_element(*vip), true, &mut touched);
                }
                TableChange::VipGone(vip) if self.table.vips.contains(vip) => {
                    self.count(&vip_element(*vip), false, &mut touched);
                }
                _ => {}
            }
            self.table.apply(change);
            if let TableChange::Frontend(key, _) | TableChange::FrontendGone(key) = change {
                self.frontend(*key, &mut touched);
                // One of a single address goes before one of every node address.
                if let FrontendAddr::Ip(addr) = key.addr {
                    let node = FrontendKey { addr: FrontendAddr::Node(Family::of(&addr)), ..*key };
                    if self.table.frontends.contains_key(&node)
                        && self.view.node_port_addresses.contains(&addr)
                    {
                        self.frontend(node, &mut touched);
                    }
                }
            }
        }
        touched
    }

    /// Everything, for a comparison with the kernel.
    pub(crate) fn all(&self) -> Touched {
        Touched {
            elements: self.elements.keys().cloned().collect(),
            servers: self.servers.keys().copied().collect(),
        }
    }

    /// Whether an element should be there.
    pub(crate) fn has(&self, element: &Element) -> bool {
        self.elements.contains_key(element)
    }

    /// What a virtual server should be; `None` when there should be none.
    pub(crate) fn server(&self, key: &ServerKey) -> Option<&Wanted> {
        self.servers.get(key)
    }

    /// What every virtual server that should be answers to.
    pub(crate) fn server_keys(&self) -> impl Iterator<Item = &ServerKey> {
        self.servers.iter().filter(|(_, wanted)| wanted.set.is_some()).map(|(key, _)| key)
    }

    /// The backends of a server, none when it has no set.
    pub(crate) fn backends(&self, wanted: &Wanted) -> Arc<[Backend]> {
        let set = wanted.set.and_then(|set| self.table.sets.get(&set));
        set.cloned().unwrap_or_else(|| Arc::from([]))
    }

    /// The transport protocol of a server's connections.
    pub(crate) fn protocol(&self, key: &ServerKey) -> Option<Protocol> {
        match key {
            ServerKey::Address(_, _, protocol) => Some(*protocol),
            ServerKey::Mark(mark, _) => {
                Some(self.table.services.get(&ServiceId((mark & !MARK) >> 1))?.protocol)
            }
        }
    }

    /// Takes what one frontend adds anew.
    fn frontend(&mut self, key: FrontendKey, touched: &mut Touched) {
        let new = match self.table.frontends.get(&key) {
            Some(frontend) => contribution(key, frontend, &self.view, &self.table),
            None => Contribution::default(),
        };
        let old = self.contributions.remove(&key).unwrap_or_default();
        if new == old {
            if !new.elements.is_empty() {
                self.contributions.insert(key, new);
            }
            return;
        }
        for (contribution, more) in [(&new, true), (&old, false)] {
            for element in &contribution.elements {
                self.count(element, more, touched);
            }
        }
        for (key, _) in &old.servers {
            if let Some(wanted) = self.servers.get_mut(key) {
                wanted.owners -= 1;
                if wanted.owners == 0 {
                    let set = wanted.set;
                    self.servers.remove(key);
                    self.of_set(set, key, false);
                }
            }
            touched.servers.insert(*key);
        }
        for (key, wanted) in &new.servers {
            let before = self.servers.get(key).cloned();
            let owners = before.as_ref().map_or(0, |w| w.owners) + 1;
            self.of_set(before.and_then(|w| w.set), key, false);
            self.of_set(wanted.set, key, true);
            self.servers.insert(*key, Wanted { owners, ..wanted.clone() });
            touched.servers.insert(*key);
        }
        if !new.elements.is_empty() {
            self.contributions.insert(key, new);
        }
    }

    fn of_set(&mut self, set: Option<SetId>, key: &ServerKey, more: bool) {
        let Some(set) = set else { return };
        let servers = self.of_sets.entry(set).or_default();
        if more {
            servers.insert(*key);
        } else {
            servers.remove(key);
        }
        if servers.is_empty() {
            self.of_sets.remove(&set);
        }
    }

    fn count(&mut self, element: &Element, more: bool, touched: &mut Touched) {
        touched.elements.insert(element.clone());
        if more {
            *self.elements.entry(element.clone()).or_default() += 1;
        } else if let Some(count) = self.elements.get_mut(element) {
            *count -= 1;
            if *count == 0 {
                self.elements.remove(element);
            }
        }
    }
}

/// How a server chooses.
pub(crate) fn spec(scheduler: &Scheduler, affinity_s: Option<u32>) -> ServerSpec {
    ServerSpec {
        scheduler: scheduler.name().to_owned(),
        persistent_s: affinity_s,
        fallback: scheduler.hashes_client(),
        hash_port: scheduler.hashes_port(),
    }
}

/// The element that records a virtual server as ours.
pub(crate) fn record(key: &ServerKey) -> Element {
    match key {
        ServerKey::Address(addr, port, protocol) => {
            element(SERVERS, Family::of(addr), tuple(*addr, *protocol, *port), None)
        }
        ServerKey::Mark(mark, family) => element(MARKED, *family, mark_text(*mark), None),
    }
}

/// Whether an element records a virtual server.
pub(crate) fn is_record(element: &Element) -> bool {
    matches!(element.set, SERVERS | MARKED)
}

/// A mark as our elements have it.
pub(crate) fn mark_text(mark: u32) -> String {
    format!("{mark:#010x}")
}

/// A prefix as nft prints it: one address without its length.
pub(crate) fn prefix(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

/// A protocol's name as nft prints it.
pub(crate) const fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

fn element(set: &'static str, family: Family, key: String, value: Option<String>) -> Element {
    Element { set, family, key, value }
}

/// The element of an address on our device.
pub(crate) fn vip_element(vip: IpAddr) -> Element {
    element(VIPS, Family::of(&vip), vip.to_string(), None)
}

fn tuple(addr: IpAddr, protocol: Protocol, port: u16) -> String {
    format!("{addr} . {} . {port}", protocol_name(protocol))
}

fn hairpins(backends: &[Backend]) -> impl Iterator<Item = Element> + '_ {
    backends
        .iter()
        .filter(|b| b.local)
        .map(|b| element(HAIRPIN, Family::of(&b.addr), format!("{addr} . {addr}", addr = b.addr), None))
}

/// The mark for a set, while its service's number has room.
fn mark(set: SetId) -> Option<u32> {
    (set.service.0 < MARK_SERVICES).then_some(MARK | (set.service.0 << 1) | set.kind as u32)
}

fn contribution(
    key: FrontendKey,
    frontend: &Frontend,
    view: &NodeView,
    table: &ServiceTable,
) -> Contribution {
    let mut all = Contribution::default();
    let addresses: Vec<IpAddr> = match key.addr {
        FrontendAddr::Ip(addr) => vec![addr],
        FrontendAddr::Node(family) => view
            .node_port_addresses
            .iter()
            .filter(|addr| Family::of(addr) == family && !addr.is_loopback())
            .filter(|addr| {
                !table.frontends.contains_key(&FrontendKey { addr: FrontendAddr::Ip(**addr), ..key })
            })
            .copied()
            .collect(),
    };
    for addr in addresses {
        at_address(addr, key, frontend, view, &mut all);
    }
    all
}

fn at_address(addr: IpAddr, key: FrontendKey, frontend: &Frontend, view: &NodeView, all: &mut Contribution) {
    let family = Family::of(&addr);
    let here = tuple(addr, key.protocol, key.port);
    let mut add = |set, value: Option<String>| all.elements.push(element(set, family, here.clone(), value));
    add(FRONTENDS, None);
    let kind = |origin: Origin| match frontend.route(origin).target {
        Target::Set(kind) => Some(kind),
        Target::Reject | Target::Drop => None,
    };
    // The node's own set first: its packets need no mark.
    let main: Option<SetKind> = [Origin::Node, Origin::Pod, Origin::External].into_iter().find_map(kind);
    let mut marked = BTreeSet::new();
    for origin in Origin::ALL {
        let route = frontend.route(origin);
        match route.target {
            Target::Reject => add(VERDICTS[origin as usize], Some("goto refuse".to_owned())),
            Target::Drop => add(VERDICTS[origin as usize], Some("drop".to_owned())),
            Target::Set(kind) => {
                if route.masquerade {
                    add(MASQUERADES[origin as usize], None);
                }
                if Some(kind) != main {
                    let set = SetId { service: frontend.service, kind };
                    match mark(set) {
                        Some(mark) => {
                            add(MARKS[origin as usize], Some(mark_text(mark)));
                            marked.insert((mark, set));
                        }
                        // Better nothing than the wrong endpoint.
                        None => add(VERDICTS[origin as usize], Some("goto refuse".to_owned())),
                    }
                }
            }
        }
    }
    // The load balancer's address only: there are none of these elsewhere.
    if let Some(ranges) = &frontend.source_ranges {
        add(RANGED, None);
        let mine: Vec<IpNet> =
            ranges.iter().filter(|r| Family::of(&r.addr()) == family).map(IpNet::trunc).collect();
        for range in IpNet::aggregate(&mine) {
            all.elements.push(element(ALLOWED, family, format!("{here} . {}", prefix(&range)), None));
        }
    }
    // Addresses of the node are where they are already.
    if matches!(key.addr, FrontendAddr::Ip(_)) && !view.addresses.contains(&addr) {
        all.elements.push(vip_element(addr));
    }
    let wanted = |set| Wanted { service: frontend.service, set, affinity_s: frontend.affinity_s, owners: 1 };
    let set = main.map(|kind| SetId { service: frontend.service, kind });
    all.servers.push((ServerKey::Address(addr, key.port, key.protocol), wanted(set)));
    all.servers
        .extend(marked.into_iter().map(|(mark, set)| (ServerKey::Mark(mark, family), wanted(Some(set)))));
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
