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
    layout::{Action, Chain, Plan, Set, SetDefinition, clients},
};
use crate::{ServiceTable, object_name};

/// Plans that no frontend has any more are kept up to this number: the next change often wants them back, and to
/// remove a chain is more work for the kernel than to remove elements.
const IDLE_PLANS: usize = 64;

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const KINDS: [SetKind; 2] = [SetKind::Cluster, SetKind::Local];

/// What the kernel has of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    family: Family,
    pub(super) frontends: BTreeMap<FrontendKey, Plan>,
    /// By [`SetKind`]: the backend of each slot.
    slots: [Vec<(IpAddr, u16)>; 2],
    ranges: BTreeSet<(FrontendKey, IpNet)>,
    /// Backends on this node.
    pub(super) locals: Vec<IpAddr>,
    /// Chains of session affinity, by name.
    pub(super) chains: BTreeMap<String, Chain>,
}

impl Record {
    /// What a service of the table needs; `None` when no packet can be for it.
    pub(super) fn of(
        table: &ServiceTable,
        id: ServiceId,
        keys: &BTreeSet<FrontendKey>,
        old_slots: [&[(IpAddr, u16)]; 2],
    ) -> Option<Self> {
        let meta = table.services.get(&id)?;
        let family = meta.family;
        let hash = fnv(&object_name(meta));
        let set = |kind| table.sets.get(&SetId { service: id, kind }).map_or(&[][..], |s| &**s);
        let count = |kind| u32::try_from(set(kind).len()).unwrap_or(u32::MAX);
        let mut used = [false; 2];
        let (mut frontends, mut ranges, mut sticky) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        for key in keys {
            let Some(frontend) = table.frontends.get(key).filter(|f| f.service == id) else { continue };
            let node_port = matches!(key.addr, FrontendAddr::Node(_));
            let plan = Plan::of(key.addr.family(), node_port, frontend, hash, count);
            sticky.extend(plan.actions.into_iter().filter(|a| matches!(a, Action::Stick { .. })));
            frontends.insert(*key, plan);
            for route in &frontend.routes {
                if let Target::Set(kind) = route.target {
                    used[kind as usize] = true;
                }
            }
            if let Some(nets) = &frontend.source_ranges {
                let mine = nets.iter().filter(|n| Family::of(&n.addr()) == key.addr.family());
                let mine: Vec<IpNet> = mine.map(IpNet::trunc).collect();
                ranges.extend(IpNet::aggregate(&mine).into_iter().map(|net| (*key, net)));
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
        let mut chains = BTreeMap::new();
        for action in sticky {
            if let Action::Stick { service, kind, seconds, .. } = action {
                // Whatever the slots, the same order of rules.
                let mut backends = slots[kind as usize].clone();
                backends.sort_unstable();
                let own = backends.iter().map(|b| Chain::sticky_backend(service, b, seconds));
                chains.extend(own.map(|c| (c.name.clone(), c)));
                chains.extend(action.sticky_chain(&backends, family).map(|c| (c.name.clone(), c)));
            }
        }
        Some(Self { family, frontends, slots, ranges, locals, chains })
    }

    /// What its chains need before them: the sets of clients.
    pub(super) fn sets(&self) -> impl Iterator<Item = (String, SetDefinition)> {
        let of_backends = self.chains.keys().filter(|name| Chain::rank(name) == 0);
        of_backends.map(|name| (name.clone(), clients(name, self.family)))
    }

    pub(super) const fn family(&self) -> Family {
        self.family
    }

    pub(super) fn slots(&self) -> [&[(IpAddr, u16)]; 2] {
        [&self.slots[0], &self.slots[1]]
    }

    /// Its elements.
    pub(super) fn elements(&self) -> BTreeMap<ElementKey, Value> {
        let mut elements = BTreeMap::new();
        let mut put = |set, key, end, value| {
            elements.insert(ElementKey { family: self.family, set, key, end }, value);
        };
        for (key, plan) in &self.frontends {
            let (set, bytes) = frontend_key(key);
            let mut chooses = [false; 2];
            for action in plan.actions {
                if let Action::Choose { kind, .. } = action {
                    chooses[kind as usize] = true;
                }
            }
            for kind in KINDS.into_iter().filter(|k| chooses[*k as usize]) {
                let set = Set::backends(kind, set == Set::NodePorts);
                for (slot, backend) in self.slots[kind as usize].iter().enumerate() {
                    let mut key = u32::try_from(slot).unwrap_or(u32::MAX).to_ne_bytes().to_vec();
                    key.extend_from_slice(&bytes);
                    put(set, key, None, Value::Bytes(backend_bytes(backend)));
                }
            }
            put(set, bytes, None, Value::Chain(plan.entry()));
        }
        for (key, net) in &self.ranges {
            let around = |client: IpAddr| {
                let mut bytes = frontend_key(key).1;
                bytes.extend_from_slice(&address_bytes(&client));
                bytes
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

/// The plans in use.
#[derive(Clone, Debug, Default)]
pub(super) struct Plans {
    known: HashMap<Plan, (usize, Option<ServiceId>)>,
    chains: HashMap<(Family, String), usize>,
}

impl Plans {
    /// One more frontend, of this service, has this plan. Chains that have to be written before go to `ops`.
    pub(super) fn acquire(&mut self, plan: &Plan, service: ServiceId, ops: &mut Ops) {
        // An idle plan has its chains still.
        if let Some((users, _)) = self.known.get_mut(plan) {
            *users += 1;
            return;
        }
        let owner = plan.is_sticky().then_some(service);
        self.known.insert(*plan, (1, owner));
        for chain in plan.chains() {
            let users = self.chains.entry((plan.family, chain.name.clone())).or_default();
            *users += 1;
            if *users == 1 {
                ops.push((owner, Op::Chain(plan.family, chain)));
            }
        }
    }

    /// One frontend fewer.
    pub(super) fn release(&mut self, plan: &Plan) {
        if let Some((users, _)) = self.known.get_mut(plan) {
            *users = users.saturating_sub(1);
        }
    }

    /// Gives up plans that nothing uses, when they are many; those with chains of single services always. Returns the
    /// chains that go.
    pub(super) fn sweep(&mut self) -> Vec<(Family, String)> {
        let idle: Vec<Plan> =
            self.known.iter().filter(|(_, (users, _))| *users == 0).map(|(p, _)| *p).collect();
        let many = idle.len() > IDLE_PLANS;
        let mut gone = Vec::new();
        for plan in idle.into_iter().filter(|plan| many || plan.is_sticky()) {
            self.known.remove(&plan);
            for chain in plan.chains() {
                let key = (plan.family, chain.name);
                if let Some(users) = self.chains.get_mut(&key) {
                    *users -= 1;
                    if *users == 0 {
                        self.chains.remove(&key);
                        gone.push(key);
                    }
                }
            }
        }
        gone
    }

    /// Every plan, with the service whose chains it names.
    pub(super) fn all(&self) -> impl Iterator<Item = (&Plan, Option<ServiceId>)> {
        self.known.iter().map(|(plan, (_, owner))| (plan, *owner))
    }
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
            // Of two ranges with nothing in between the kernel refuses the second: they are one. The prefixes are sorted.
            if elements.remove(&element(net.network(), Some(Vec::new()))).is_none() {
                elements.insert(element(net.network(), None), Value::None);
            }
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

/// The backends that the kernel has in the slots of a frontend (its element's key), by set.
pub(super) type FoundSlots = HashMap<(Set, Vec<u8>), Vec<(IpAddr, u16)>>;

type Slots = BTreeMap<u32, (IpAddr, u16)>;

/// Reads the slots; those behind a hole are left out.
pub(super) fn found_slots(found: &Found) -> FoundSlots {
    let mut by_slot: HashMap<(Set, Vec<u8>), Slots> = HashMap::new();
    for (key, value) in &found.elements {
        if matches!(key.set, Set::Cluster | Set::Local | Set::NodePortCluster | Set::NodePortLocal)
            && let (Some((slot, frontend)), Value::Bytes(value)) = (key.key.split_first_chunk::<4>(), value)
            && let Some(backend) = backend_from(key.family, value)
        {
            let slots = by_slot.entry((key.set, frontend.to_vec())).or_default();
            slots.insert(u32::from_ne_bytes(*slot), backend);
        }
    }
    let whole = |slots: Slots| {
        slots.into_iter().enumerate().map_while(|(i, (slot, b))| (slot as usize == i).then_some(b)).collect()
    };
    by_slot.into_iter().map(|(key, slots)| (key, whole(slots))).collect()
}

/// The slots that the kernel has for a service with these frontends, by [`SetKind`].
pub(super) fn slots_of(found: &FoundSlots, keys: &BTreeSet<FrontendKey>) -> [Vec<(IpAddr, u16)>; 2] {
    KINDS.map(|kind| {
        let mut all = keys.iter().filter_map(|key| {
            let (set, bytes) = frontend_key(key);
            found.get(&(Set::backends(kind, set == Set::NodePorts), bytes)).cloned()
        });
        all.next().unwrap_or_default()
    })
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
        Set::Cluster | Set::Local | Set::NodePortCluster | Set::NodePortLocal => {
            let slot = key.key.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b));
            let addr = address(key.key.get(4..).unwrap_or_default());
            let of = addr.filter(|_| matches!(key.set, Set::Cluster | Set::Local));
            of.map_or_else(|| format!("slot {slot}"), |addr| format!("slot {slot} of {addr}"))
        }
        Set::Ranges | Set::Hairpin => address(&key.key).map_or_else(String::new, |a| a.to_string()),
        Set::Vips | Set::ServiceRanges | Set::Pods | Set::NodeAddresses => {
            let end = if key.end.is_some() { "end before " } else { "" };
            address(&key.key).map_or_else(String::new, |a| format!("{end}{a}"))
        }
    };
    format!("{family} {}: {what}", key.set.name())
}

/// FNV-1a: services with session affinity are told apart by it, the same on every start.
fn fnv(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
