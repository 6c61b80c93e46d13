//! What the compiler's changes add up to: the tables that a datapath looks into, and what they mean.
//!
//! # Looking up
//! An address has an [`Assigned`] class: that of its exact entry, else that of the longest prefix that holds it, else
//! [`ClassId::NONE`]. An endpoint has an assigned set. The verdict of one direction at an endpoint is the longest match
//! of protocol and port among the entries of (set, direction, class); when none matches, among those of (set,
//! direction, [`ClassId::NONE`]); when none matches, the set's default. That is a constant number of look-ups.
//!
//! # Changing
//! [`Change`]s have to be made in their order. Verdicts are written before anything leads to them; then peers and
//! endpoints are moved; then, after a grace in which packets that began before have ended, what nothing leads to any
//! more is deleted. While more than one thing moves, each moves in two steps: at first it has two views, `old` and
//! `new`, and what is allowed is what both allow; when all have two, each keeps the new one. So a connection, whose
//! two ends are judged by different entries, is never allowed on the way unless the old or the new state allows it.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;
use podway_model::policy::Direction;

use crate::{prefixes::PrefixMap, verdicts::Verdicts};

/// Number of a set of policies: what endpoints have in common that the same policies select.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetId(pub u32);

impl SetId {
    /// No policy: everything is allowed.
    pub const NONE: Self = Self(0);
}

/// Number of a class of peers: what those have in common that the same selectors match.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClassId(pub u32);

impl ClassId {
    /// Matched by no selector.
    pub const NONE: Self = Self(0);
}

/// Number of a rule; the same for as long as its policy has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub u32);

impl RuleId {
    /// No rule: with a denial, the default of the set's isolating policies; with an allowance, that nothing denies.
    pub const DEFAULT: Self = Self(0);
}

/// What is done with a connection in one direction at an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Verdict {
    /// Whether it is allowed.
    pub allow: bool,
    /// It is allowed only because the policy that denies it is in audit mode; `rule` is what would deny it.
    pub audit: bool,
    /// By which rule.
    pub rule: RuleId,
}

/// A verdict for some protocols and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// IP protocol number; 0 is any protocol.
    pub protocol: u8,
    /// First port of the prefix.
    pub port: u16,
    /// How many leading bits of the port count: 16 is one port, 0 is all.
    pub bits: u8,
    /// What is done.
    pub verdict: Verdict,
}

impl Entry {
    fn matches(&self, protocol: u8, port: u16) -> bool {
        self.protocol == 0
            || self.protocol == protocol && (u32::from(self.port ^ port) >> (16 - u32::from(self.bits))) == 0
    }

    /// Length of the match, protocol before port, as in one key of a longest-prefix table.
    fn length(&self) -> u8 {
        if self.protocol == 0 { 0 } else { 8 + self.bits }
    }
}

/// The longest match.
pub(crate) fn longest(entries: &[Entry], protocol: u8, port: u16) -> Option<Verdict> {
    entries.iter().filter(|e| e.matches(protocol, port)).max_by_key(|e| e.length()).map(|e| e.verdict)
}

/// A policy by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyRef {
    /// Kind of the object.
    pub kind: &'static str,
    /// Its namespace; empty for cluster policies.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// A rule by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleRef {
    /// Whose rule it is.
    pub policy: PolicyRef,
    /// Of which list.
    pub direction: Direction,
    /// Its index in that list, from 0.
    pub index: usize,
    /// Its own name; empty when it has none.
    pub name: String,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, direction, index, name } = self;
        write!(f, "{policy} {direction} rule {}", index + 1)?;
        if name.is_empty() { Ok(()) } else { write!(f, " ({name})") }
    }
}

/// What a set is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetInfo {
    /// What holds where there is no entry, by direction: ingress, egress.
    pub defaults: [Verdict; 2],
    /// Policies that select the set's endpoints, in the order of judgement.
    pub policies: Vec<PolicyRef>,
    /// NetworkPolicies that isolate them, by direction: whose default the default denial is.
    pub isolating: [Vec<PolicyRef>; 2],
}

/// Index of a direction in pairs of this crate.
pub(crate) const fn at(direction: Direction) -> usize {
    match direction {
        Direction::Ingress => 0,
        Direction::Egress => 1,
    }
}

/// What is assigned to an address: one thing, or two while it moves from one to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assigned<T> {
    /// What it was.
    pub old: T,
    /// What it is.
    pub new: T,
}

impl<T: Copy> Assigned<T> {
    /// One thing.
    pub const fn settled(value: T) -> Self {
        Self { old: value, new: value }
    }
}

/// Who has a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PeerKey {
    /// An address of a pod or a node.
    Address(IpAddr),
    /// Addresses that have no entry of their own.
    Prefix(IpNet),
}

/// One step of the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A rule's name, for those who report.
    Rule(RuleId, Option<Arc<RuleRef>>),
    /// A set, or its end.
    Set(SetId, Option<Arc<SetInfo>>),
    /// The entries of a class in a set, in place of what there was; `None` is their end.
    Verdicts(SetId, Direction, ClassId, Option<Arc<[Entry]>>),
    /// The class of a peer; `None` ends its entry.
    Peer(PeerKey, Option<Assigned<ClassId>>),
    /// The set of an endpoint of this node; `None` ends its entry.
    Endpoint(IpAddr, Option<Assigned<SetId>>),
    /// What began before has to end before the next change is made.
    Grace,
}

/// The tables.
#[derive(Clone, Debug, Default)]
pub struct PolicyTable {
    /// Names of rules.
    pub rules: HashMap<RuleId, Arc<RuleRef>>,
    /// Sets.
    pub sets: HashMap<SetId, Arc<SetInfo>>,
    /// Verdicts.
    pub verdicts: Verdicts,
    /// Endpoints of this node that some policy selects.
    pub endpoints: HashMap<IpAddr, Assigned<SetId>>,
    /// Classes of single addresses.
    pub addresses: HashMap<IpAddr, Assigned<ClassId>>,
    /// Classes of all others.
    pub prefixes: PrefixMap<Assigned<ClassId>>,
}

/// What the two ends of a connection say to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// What the source's egress policies say; `None` when the source is no endpoint of this node.
    pub egress: Option<Verdict>,
    /// What the target's ingress policies say; `None` when the target is no endpoint of this node.
    pub ingress: Option<Verdict>,
}

impl Judgement {
    /// Whether it is allowed, as far as this node judges it.
    pub fn allow(&self) -> bool {
        [self.egress, self.ingress].iter().flatten().all(|v| v.allow)
    }
}

impl PolicyTable {
    /// Makes one step.
    pub fn apply(&mut self, change: &Change) {
        fn put<K: Eq + std::hash::Hash, V>(map: &mut HashMap<K, V>, key: K, value: Option<V>) {
            match value {
                Some(value) => {
                    map.insert(key, value);
                }
                None => {
                    map.remove(&key);
                }
            }
        }
        match change {
            Change::Rule(id, rule) => put(&mut self.rules, *id, rule.clone()),
            Change::Set(id, info) => put(&mut self.sets, *id, info.clone()),
            Change::Verdicts(set, direction, class, entries) => {
                self.verdicts.set((*set, *direction, *class), entries.clone());
            }
            Change::Peer(PeerKey::Address(addr), class) => put(&mut self.addresses, *addr, *class),
            Change::Peer(PeerKey::Prefix(prefix), class) => self.prefixes.set(*prefix, *class),
            Change::Endpoint(addr, set) => put(&mut self.endpoints, *addr, *set),
            Change::Grace => {}
        }
    }

    /// How many entries all verdicts have together: what a map of the kernel has to hold.
    pub fn entries(&self) -> usize {
        self.verdicts.entries()
    }

    /// The class of an address. IPv4 and IPv6 never meet: a prefix of one family holds no address of the other.
    pub fn class(&self, addr: IpAddr) -> Assigned<ClassId> {
        let exact = self.addresses.get(&addr);
        exact.or_else(|| self.prefixes.longest(addr)).copied().unwrap_or(Assigned::settled(ClassId::NONE))
    }

    /// The verdict of a set for a class.
    pub fn verdict(
        &self,
        set: SetId,
        direction: Direction,
        class: ClassId,
        protocol: u8,
        port: u16,
    ) -> Verdict {
        let Some(info) = self.sets.get(&set) else {
            return Verdict { allow: true, ..Verdict::default() };
        };
        let find = |class| longest(self.verdicts.get(&(set, direction, class))?, protocol, port);
        find(class).or_else(|| find(ClassId::NONE)).unwrap_or(info.defaults[at(direction)])
    }

    /// The verdict of one direction at an endpoint; `None` when no policy of this node is about that address.
    pub fn side(
        &self,
        endpoint: IpAddr,
        direction: Direction,
        peer: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Option<Verdict> {
        let set = self.endpoints.get(&endpoint)?;
        let class = self.class(peer);
        let old = self.verdict(set.old, direction, class.old, protocol, port);
        if set.old == set.new && class.old == class.new || !old.allow {
            return Some(old);
        }
        Some(self.verdict(set.new, direction, class.new, protocol, port))
    }

    /// Judges a new connection. `port` is the target's, 0 for protocols without ports.
    pub fn judge(&self, source: IpAddr, target: IpAddr, protocol: u8, port: u16) -> Judgement {
        if source == target {
            return Judgement { egress: None, ingress: None };
        }
        Judgement {
            egress: self.side(source, Direction::Egress, target, protocol, port),
            ingress: self.side(target, Direction::Ingress, source, protocol, port),
        }
    }
}

/// The prefix that holds all IPv4 addresses: in 16-byte form `::ffff:0:0/96`. It is an entry of its own wherever there
/// are IPv6 prefixes, so that `::/0` does not match IPv4 in tables that keep both families in one.
pub(crate) fn ipv4_boundary() -> IpNet {
    IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0)
}
