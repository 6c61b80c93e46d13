//! What the tables have to hold, from the service table.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;
use podway_services::table::{
    Backend, Family, FrontendAddr, FrontendKey, NodeView, ServiceId, SetId, SetKind, Target,
};

use super::{
    kernel::{ElementKey, Found, Op, Ops, Value},
    layout::{Plan, Set},
};
use crate::ServiceTable;

/// Plans that no frontend has any more are kept up to this number: the next change often wants them back, and to
/// remove a chain is more work for the kernel than to remove elements.
const IDLE_PLANS: usize = 64;

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const KINDS: [SetKind; 2] = [SetKind::Cluster, SetKind::Local];

/// What the kernel has of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) number: u32,
    family: Family,
    pub(super) frontends: BTreeMap<FrontendKey, Plan>,
    /// By [`SetKind`]: the backend of each slot.
    slots: [Vec<(IpAddr, u16)>; 2],
    /// Whether clients' backends are remembered.
    members: bool,
    ranges: BTreeSet<(IpAddr, IpNet)>,
    /// Backends on this node.
    pub(super) locals: Vec<IpAddr>,
}

impl Record {
    /// What a service of the table needs; `None` when no packet can be for it.
    pub(super) fn of(
        table: &ServiceTable,
        id: ServiceId,
        keys: &BTreeSet<FrontendKey>,
        number: u32,
        old_slots: [&[(IpAddr, u16)]; 2],
    ) -> Option<Self> {
        let family = table.services.get(&id)?.family;
        let set = |kind| table.sets.get(&SetId { service: id, kind }).map_or(&[][..], |s| &**s);
        let count = |kind| u32::try_from(set(kind).len()).unwrap_or(u32::MAX);
        let mut used = [false; 2];
        let (mut frontends, mut ranges, mut members) = (BTreeMap::new(), BTreeSet::new(), false);
        for key in keys {
            let Some(frontend) = table.frontends.get(key).filter(|f| f.service == id) else { continue };
            let node_port = matches!(key.addr, FrontendAddr::Node(_));
            frontends.insert(*key, Plan::of(key.addr.family(), node_port, frontend, count));
            for route in &frontend.routes {
                if let Target::Set(kind) = route.target {
                    used[kind as usize] = true;
                }
            }
            members |= frontend.affinity_s.is_some();
            if let (FrontendAddr::Ip(addr), Some(nets)) = (key.addr, &frontend.source_ranges) {
                let mine = nets.iter().filter(|n| n.addr().is_ipv4() == addr.is_ipv4());
                let mine: Vec<IpNet> = mine.map(IpNet::trunc).collect();
                ranges.extend(IpNet::aggregate(&mine).into_iter().map(|net| (addr, net)));
            }
        }
        if frontends.is_empty() {
            return None;
        }
        let slots = KINDS.map(|kind| {
            if used[kind as usize] { arrange(old_slots[kind as usize], set(kind)) } else { Vec::new() }
        });
        let mut locals: Vec<IpAddr> = KINDS
            .into_iter()
            .filter(|k| used[*k as usize])
            .flat_map(|k| set(k).iter().filter(|b| b.local).map(|b| b.addr))
            .collect();
        locals.sort_unstable();
        locals.dedup();
        Some(Self { number, family, frontends, slots, members, ranges, locals })
    }

    pub(super) fn slots(&self) -> [&[(IpAddr, u16)]; 2] {
        [&self.slots[0], &self.slots[1]]
    }

    /// Its elements.
    pub(super) fn elements(&self, plans: &Plans) -> BTreeMap<ElementKey, Value> {
        let mut elements = BTreeMap::new();
        let mut put = |set, key, end, value| {
            elements.insert(ElementKey { family: self.family, set, key, end }, value);
        };
        for (key, plan) in &self.frontends {
            let (set, bytes) = frontend_key(key);
            let mut value = plans.number(plan).to_ne_bytes().to_vec();
            value.extend_from_slice(&self.number.to_ne_bytes());
            put(set, bytes, None, Value::Bytes(value));
        }
        for kind in KINDS {
            for (slot, backend) in self.slots[kind as usize].iter().enumerate() {
                let slot = u32::try_from(slot).unwrap_or(u32::MAX);
                let mut key = self.number.to_ne_bytes().to_vec();
                key.extend_from_slice(&slot.to_ne_bytes());
                put(Set::backends(kind), key, None, Value::Bytes(backend_bytes(backend)));
                if self.members {
                    let mut key = self.number.to_ne_bytes().to_vec();
                    key.extend_from_slice(&backend_bytes(backend));
                    put(Set::members(kind), key, None, Value::None);
                }
            }
        }
        for (addr, net) in &self.ranges {
            let around = |client: IpAddr| {
                let mut key = address_bytes(addr);
                key.extend_from_slice(&self.number.to_ne_bytes());
                key.extend_from_slice(&address_bytes(&client));
                key
            };
            put(Set::Ranges, around(net.network()), Some(around(net.broadcast())), Value::None);
        }
        elements
    }
}

/// Backends into slots, so that as few slots as possible change.
fn arrange(old: &[(IpAddr, u16)], want: &[Backend]) -> Vec<(IpAddr, u16)> {
    let mut missing: HashSet<(IpAddr, u16)> = want.iter().map(|b| (b.addr, b.port)).collect();
    let mut slots: Vec<Option<(IpAddr, u16)>> = vec![None; missing.len()];
    for (slot, backend) in slots.iter_mut().zip(old) {
        if missing.remove(backend) {
            *slot = Some(*backend);
        }
    }
    let mut rest =
        want.iter().map(|b| (b.addr, b.port)).filter(|b| missing.remove(b)).collect::<Vec<_>>().into_iter();
    slots.into_iter().filter_map(|slot| slot.or_else(|| rest.next())).collect()
}

/// The plans in use, each with its number.
#[derive(Clone, Debug, Default)]
pub(super) struct Plans {
    known: HashMap<Plan, (u32, usize)>,
    chains: HashMap<(Family, String), usize>,
    free: Vec<u32>,
    next: u32,
}

impl Plans {
    pub(super) fn number(&self, plan: &Plan) -> u32 {
        self.known.get(plan).map_or(u32::MAX, |(number, _)| *number)
    }

    /// One more frontend has this plan. What has to be written before, when it is a new one, goes to `ops`.
    pub(super) fn acquire(&mut self, plan: &Plan, ops: &mut Ops) {
        if let Some((_, users)) = self.known.get_mut(plan) {
            *users += 1;
            return;
        }
        let number = self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next
        });
        self.insert(*plan, number, 1);
        for chain in plan.chains() {
            let users = self.chains.entry((plan.family, chain.name.clone())).or_default();
            *users += 1;
            if *users == 1 {
                ops.push((None, Op::Chain(plan.family, chain)));
            }
        }
        ops.extend(plan_elements(plan, number).map(|(key, value)| (None, Op::Add(key, value))));
    }

    /// A plan that the kernel has under a number, with its chains.
    pub(super) fn adopt(&mut self, plan: &Plan, number: u32) {
        self.insert(*plan, number, 0);
        for chain in plan.chains() {
            *self.chains.entry((plan.family, chain.name)).or_default() += 1;
        }
    }

    /// Numbers that must not be given out.
    pub(super) fn reserve(&mut self, highest: u32) {
        self.next = self.next.max(highest);
    }

    fn insert(&mut self, plan: Plan, number: u32, users: usize) {
        self.next = self.next.max(number);
        self.known.insert(plan, (number, users));
    }

    /// One frontend fewer.
    pub(super) fn release(&mut self, plan: &Plan) {
        if let Some((_, users)) = self.known.get_mut(plan) {
            *users = users.saturating_sub(1);
        }
    }

    /// Gives up plans that nothing uses, when they are many. Returns what to write.
    pub(super) fn sweep(&mut self) -> Ops {
        let idle: Vec<(Plan, u32)> =
            self.known.iter().filter(|(_, (_, users))| *users == 0).map(|(p, (n, _))| (*p, *n)).collect();
        let mut ops = Ops::new();
        if idle.len() <= IDLE_PLANS {
            return ops;
        }
        let mut chains = Vec::new();
        for (plan, number) in idle {
            self.known.remove(&plan);
            self.free.push(number);
            ops.extend(plan_elements(&plan, number).map(|(key, _)| (None, Op::Remove(key))));
            // Entries name actions: they go first.
            for chain in plan.chains().into_iter().rev() {
                let key = (plan.family, chain.name);
                if let Some(users) = self.chains.get_mut(&key) {
                    *users -= 1;
                    if *users == 0 {
                        self.chains.remove(&key);
                        chains.push(key);
                    }
                }
            }
        }
        chains.sort_by_key(|(_, name)| name.contains("choose-"));
        ops.extend(chains.into_iter().map(|(family, name)| (None, Op::RemoveChain(family, name))));
        ops
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&Plan, u32)> {
        self.known.iter().map(|(plan, (number, _))| (plan, *number))
    }
}

/// The elements that lead from a plan's number to its chains.
pub(super) fn plan_elements(plan: &Plan, number: u32) -> impl Iterator<Item = (ElementKey, Value)> {
    let (arriving, sent) = plan.entries();
    let family = plan.family;
    [(Set::Plans, arriving), (Set::OutputPlans, sent)].into_iter().map(move |(set, chain)| {
        (ElementKey { family, set, key: number.to_ne_bytes().to_vec(), end: None }, Value::Chain(chain))
    })
}

/// The elements that come from the node and not from services.
pub(super) fn node_elements(view: &NodeView) -> BTreeMap<ElementKey, Value> {
    let mut elements = BTreeMap::new();
    for addr in &view.node_port_addresses {
        elements.insert(address_element(Set::NodeAddresses, *addr), Value::None);
    }
    for (set, nets) in [(Set::Pods, &view.pod_cidrs), (Set::ServiceRanges, &view.service_cidrs)] {
        for net in IpNet::aggregate(&nets.iter().map(IpNet::trunc).collect::<Vec<_>>()) {
            let family = Family::of(&net.addr());
            let element = |addr: IpAddr, end| ElementKey { family, set, key: address_bytes(&addr), end };
            elements.insert(element(net.network(), None), Value::None);
            if let Some(after) = next_address(net.broadcast()) {
                elements.insert(element(after, Some(Vec::new())), Value::None);
            }
        }
    }
    elements
}

/// An element of a set of addresses.
pub(super) fn address_element(set: Set, addr: IpAddr) -> ElementKey {
    ElementKey { family: Family::of(&addr), set, key: address_bytes(&addr), end: None }
}

/// The element for a pod that may reach itself.
pub(super) fn hairpin_element(addr: IpAddr) -> ElementKey {
    let mut key = address_bytes(&addr);
    key.extend_from_within(..);
    ElementKey { family: Family::of(&addr), set: Set::Hairpin, key, end: None }
}

/// The element of a frontend, without its value.
pub(super) fn frontend_key(key: &FrontendKey) -> (Set, Vec<u8>) {
    let (set, mut bytes) = match key.addr {
        FrontendAddr::Ip(addr) => (Set::Frontends, address_bytes(&addr)),
        FrontendAddr::Node(_) => (Set::NodePorts, Vec::new()),
    };
    bytes.extend_from_slice(&[key.protocol.number(), 0, 0, 0]);
    bytes.extend_from_slice(&key.port.to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
    (set, bytes)
}

/// The backends that the kernel has in slots, by family, kind and number of the service.
pub(super) type FoundSlots = HashMap<(SetKind, u32), Vec<(IpAddr, u16)>>;

/// Reads the slots; those behind a hole are left out.
pub(super) fn found_slots(found: &Found) -> FoundSlots {
    let mut by_slot: HashMap<(SetKind, u32), BTreeMap<u32, (IpAddr, u16)>> = HashMap::new();
    for (key, value) in &found.elements {
        let kind = match key.set {
            Set::Cluster => SetKind::Cluster,
            Set::Local => SetKind::Local,
            _ => continue,
        };
        if let (Some((number, rest)), Value::Bytes(value)) = (key.key.split_first_chunk::<4>(), value)
            && let (Some(slot), Some(backend)) = (rest.first_chunk::<4>(), backend_from(key.family, value))
        {
            by_slot
                .entry((kind, u32::from_ne_bytes(*number)))
                .or_default()
                .insert(u32::from_ne_bytes(*slot), backend);
        }
    }
    let whole = |slots: BTreeMap<u32, (IpAddr, u16)>| {
        slots.into_iter().enumerate().map_while(|(i, (slot, b))| (slot as usize == i).then_some(b)).collect()
    };
    by_slot.into_iter().map(|(key, slots)| (key, whole(slots))).collect()
}

fn backend_from(family: Family, bytes: &[u8]) -> Option<(IpAddr, u16)> {
    let (addr, rest): (IpAddr, &[u8]) = match family {
        Family::V4 => bytes.split_first_chunk::<4>().map(|(a, r)| ((*a).into(), r))?,
        Family::V6 => bytes.split_first_chunk::<16>().map(|(a, r)| ((*a).into(), r))?,
    };
    Some((addr, u16::from_be_bytes(*rest.first_chunk()?)))
}

fn backend_bytes((addr, port): &(IpAddr, u16)) -> Vec<u8> {
    let mut bytes = address_bytes(addr);
    bytes.extend_from_slice(&port.to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes
}

fn address_bytes(addr: &IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

fn next_address(addr: IpAddr) -> Option<IpAddr> {
    Some(match addr {
        IpAddr::V4(addr) => IpAddr::V4(u32::from(addr).checked_add(1)?.into()),
        IpAddr::V6(addr) => IpAddr::V6(u128::from(addr).checked_add(1)?.into()),
    })
}

/// What an element is, for messages.
pub(super) fn describe(key: &ElementKey) -> String {
    let family = if key.family == Family::V4 { "ip" } else { "ip6" };
    let address = |bytes: &[u8]| match key.family {
        Family::V4 => bytes.first_chunk::<4>().map(|a| IpAddr::from(*a)),
        Family::V6 => bytes.first_chunk::<16>().map(|a| IpAddr::from(*a)),
    };
    let number =
        |at: usize| key.key.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b));
    let what = match key.set {
        Set::Frontends | Set::NodePorts => {
            let protocol_at = key.key.len().saturating_sub(8);
            let protocol = match key.key.get(protocol_at) {
                Some(6) => "TCP",
                Some(17) => "UDP",
                Some(132) => "SCTP",
                _ => "?",
            };
            let port = key.key.get(protocol_at + 4..).and_then(|b| b.first_chunk());
            let port = port.map_or(0, |b| u16::from_be_bytes(*b));
            match address(&key.key).filter(|_| key.set == Set::Frontends) {
                Some(addr) => format!("{addr} port {port}/{protocol}"),
                None => format!("port {port}/{protocol}"),
            }
        }
        Set::Cluster | Set::Local => format!("slot {} of number {}", number(4), number(0)),
        Set::ClusterMembers | Set::LocalMembers => format!("member of number {}", number(0)),
        Set::Plans | Set::OutputPlans => format!("plan {}", number(0)),
        Set::Ranges | Set::Affinity | Set::Hairpin => {
            address(&key.key).map_or_else(String::new, |a| a.to_string())
        }
        Set::Vips | Set::ServiceRanges | Set::Pods | Set::NodeAddresses => {
            let end = if key.end.is_some() { "end before " } else { "" };
            address(&key.key).map_or_else(String::new, |a| format!("{end}{a}"))
        }
    };
    format!("{family} {}: {what}", key.set.name())
}
