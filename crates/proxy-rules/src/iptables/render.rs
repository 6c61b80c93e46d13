//! One frontend as rules, in the form in which `iptables-save` prints them.

use std::{collections::BTreeMap, fmt::Write as _, net::IpAddr};

use podway_services::{
    ServiceTable,
    table::{
        Backend, Family, Frontend, FrontendAddr, FrontendKey, NodeView, Origin, Protocol, Route, ServiceMeta,
        SetId, SetKind, Target,
    },
};

use super::program::Kind;
use crate::{MASQUERADE_MARK, object_name};

/// All of our chains begin with it.
pub(super) const PREFIX: &str = "PODWAY-";
pub(super) const REJECT: &str = "PODWAY-REJECT";

/// A service with so many backends or fewer is rules of its leaf, when nothing else speaks against it.
const FLAT: usize = 4;

/// The tables that hold rules of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    Nat = 0,
    Filter = 1,
}

impl Table {
    pub(super) const ALL: [Table; 2] = [Table::Nat, Table::Filter];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Table::Nat => "nat",
            Table::Filter => "filter",
        }
    }

    /// What distinguishes leaves of the one table from those of the other.
    pub(super) const fn letter(self) -> char {
        match self {
            Table::Nat => 'N',
            Table::Filter => 'F',
        }
    }
}

/// The rules of one frontend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rendered {
    /// By [`Table`]: rules of its leaf.
    pub(super) leaf: [Vec<String>; 2],
    /// Further chains of the nat table, which other frontends may share.
    pub(super) chains: BTreeMap<String, Vec<String>>,
}

/// What happens to packets of one origin.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Reject,
    Drop,
    Choose(SetKind, bool),
}

pub(super) struct Renderer<'a> {
    pub(super) kind: Kind,
    pub(super) table: &'a ServiceTable,
    pub(super) view: &'a NodeView,
}

impl Renderer<'_> {
    /// The rules of a frontend; none for one whose service is not known.
    pub(super) fn frontend(&self, key: &FrontendKey) -> Option<Rendered> {
        let frontend = self.table.frontends.get(key)?;
        let meta = self.table.services.get(&frontend.service)?;
        let mut rendered = Rendered::default();
        let condition = self.condition(key, meta);
        let actions = Origin::ALL.map(|origin| self.action(frontend, frontend.route(origin)));
        self.translate(key, frontend, meta, &condition, actions, &mut rendered);
        self.refuse(key, frontend, &condition, actions, &mut rendered);
        Some(rendered)
    }

    fn action(&self, frontend: &Frontend, route: Route) -> Action {
        match route.target {
            Target::Drop => Action::Drop,
            Target::Set(kind) if !self.set(frontend, kind).is_empty() => {
                Action::Choose(kind, route.masquerade)
            }
            Target::Set(_) | Target::Reject => Action::Reject,
        }
    }

    fn set(&self, frontend: &Frontend, kind: SetKind) -> &[Backend] {
        self.table.sets.get(&SetId { service: frontend.service, kind }).map_or(&[], |set| set)
    }

    fn condition(&self, key: &FrontendKey, meta: &ServiceMeta) -> String {
        let protocol = protocol_name(key.protocol);
        let mut text = String::new();
        if let FrontendAddr::Ip(addr) = key.addr {
            let _ = write!(text, "-d {} ", host(&addr));
        }
        let _ = write!(text, "-p {protocol}");
        if self.kind == Kind::Nft {
            let _ = write!(text, " -m comment --comment \"{}\"", comment(meta));
        }
        let _ = write!(text, " -m {protocol} --dport {}", key.port);
        text
    }

    fn translate(
        &self,
        key: &FrontendKey,
        frontend: &Frontend,
        meta: &ServiceMeta,
        condition: &str,
        actions: [Action; 3],
        to: &mut Rendered,
    ) {
        let leaf = &mut to.leaf[Table::Nat as usize];
        let usual = [self.view.masquerade_all, self.view.masquerade_all, true];
        let kinds = actions.map(|a| match a {
            Action::Choose(kind, _) => Some(kind),
            _ => None,
        });
        if kinds == [None; 3] {
            return;
        }
        let [pod, node, external] = actions;
        let alike = kinds[0] == kinds[1] && kinds[1] == kinds[2] && frontend.source_ranges.is_none();
        let as_usual = actions
            .iter()
            .zip(usual)
            .all(|(a, masquerade)| matches!(a, Action::Choose(_, m) if *m == masquerade));
        let service = Service { frontend, meta, protocol: protocol_name(key.protocol) };
        if let (true, Some(kind)) = (alike && as_usual, kinds[0]) {
            let set = self.set(frontend, kind);
            if frontend.affinity_s.is_none() && set.len() <= FLAT {
                *leaf = choose(condition, set, |backend| service.backend(backend, &mut to.chains));
                // One comment for a service will do.
                return;
            }
            let chain = self.set_chain(&service, kind, None, &mut to.chains);
            leaf.push(format!("{condition} -g {chain}"));
            return;
        }
        if let (true, Action::Choose(kind, masquerade)) = (alike && pod == node && node == external, pod) {
            let chain = self.set_chain(&service, kind, Some(masquerade), &mut to.chains);
            leaf.push(format!("{condition} -g {chain}"));
            return;
        }
        let family = key.addr.family();
        let target = |action: Action, chains: &mut BTreeMap<String, Vec<String>>| match action {
            Action::Choose(kind, masquerade) => {
                format!("-g {}", self.set_chain(&service, kind, Some(masquerade), chains))
            }
            Action::Reject | Action::Drop => "-j RETURN".into(),
        };
        let mut rules = vec![format!("-m addrtype --src-type LOCAL {}", target(node, &mut to.chains))];
        let mut others = Vec::new();
        if pod != external {
            let target = target(pod, &mut to.chains);
            for range in self.pod_cidrs(family) {
                others.push(format!("-s {range} {target}"));
            }
        }
        others.push(target(external, &mut to.chains));
        let name = |what: &str| format!("{PREFIX}{what}-{}", hash(&format!("{key:?}")));
        match &frontend.source_ranges {
            None => rules.append(&mut others),
            Some(ranges) => {
                let inner = name("IN");
                for range in ranges.iter().filter(|r| r.addr().is_ipv4() == (family == Family::V4)) {
                    rules.push(if range.prefix_len() == 0 {
                        format!("-g {inner}")
                    } else {
                        format!("-s {} -g {inner}", range.trunc())
                    });
                }
                to.chains.insert(inner, others);
            }
        }
        let outer = name("SVC");
        to.leaf[Table::Nat as usize].push(format!("{condition} -g {outer}"));
        to.chains.insert(outer, rules);
    }

    /// What was not translated, because nobody serves or the client may not.
    fn refuse(
        &self,
        key: &FrontendKey,
        frontend: &Frontend,
        condition: &str,
        actions: [Action; 3],
        to: &mut Rendered,
    ) {
        let leaf = &mut to.leaf[Table::Filter as usize];
        let verdict = |action: Action| match action {
            Action::Reject => Some(format!("-g {REJECT}")),
            Action::Drop => Some("-j DROP".into()),
            // Translated before it gets here.
            Action::Choose(..) => None,
        };
        let [pod, node, external] = actions.map(verdict);
        if frontend.source_ranges.is_none() && pod == node && node == external {
            leaf.extend(external.map(|v| format!("{condition} {v}")));
            return;
        }
        let family = key.addr.family();
        leaf.extend(node.map(|v| format!("{condition} -m addrtype --src-type LOCAL {v}")));
        if pod != external {
            for range in self.pod_cidrs(family) {
                // Where pods are served, those that come here are outside of the ranges.
                leaf.extend(pod.iter().map(|v| format!("-s {range} {condition} {v}")));
            }
        }
        match &frontend.source_ranges {
            None => leaf.extend(external.map(|v| format!("{condition} {v}"))),
            Some(ranges) => {
                for range in ranges.iter().filter(|r| r.addr().is_ipv4() == (family == Family::V4)) {
                    if range.prefix_len() > 0 {
                        leaf.extend(external.iter().map(|v| format!("-s {} {condition} {v}", range.trunc())));
                    } else {
                        leaf.extend(external.iter().map(|v| format!("{condition} {v}")));
                    }
                }
                leaf.push(format!("{condition} -j DROP"));
            }
        }
    }

    /// The chain that chooses from a set. Without a word on masquerading it stays as it was marked before.
    fn set_chain(
        &self,
        service: &Service<'_>,
        kind: SetKind,
        masquerade: Option<bool>,
        chains: &mut BTreeMap<String, Vec<String>>,
    ) -> String {
        let Service { frontend, meta, protocol } = service;
        let identity = format!("{} {:?} {kind:?}", object_name(meta), meta.family);
        let affinity = frontend.affinity_s;
        let name = format!("{PREFIX}SET-{}", hash(&format!("{identity} {masquerade:?} {affinity:?}")));
        if chains.contains_key(&name) {
            return name;
        }
        let mut rules = Vec::new();
        rules.extend(masquerade.map(|on| format!("-j MARK --set-xmark {}", mark(on))));
        let set = self.set(frontend, kind);
        let condition = format!("-p {protocol}");
        if let Some(seconds) = affinity {
            let mask = match meta.family {
                Family::V4 => "255.255.255.255",
                Family::V6 => "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            };
            let each: Vec<(String, String)> = set
                .iter()
                .map(|backend| {
                    let list = format!("{PREFIX}{}", hash(&format!("{identity} {backend:?}")));
                    let chain = format!("{PREFIX}AFF-{}", hash(&format!("{identity} {backend:?}")));
                    let mut rules = Vec::new();
                    if backend.local {
                        rules.push(format!("-s {} -j MARK --set-xmark {}", host(&backend.addr), mark(true)));
                    }
                    rules.push(format!(
                        "-p {protocol} -m recent --set --name {list} --mask {mask} --rsource -j DNAT --to-destination {}",
                        destination(backend)
                    ));
                    chains.insert(chain.clone(), rules);
                    (list, chain)
                })
                .collect();
            for (list, chain) in &each {
                rules.push(format!(
                    "-m recent --rcheck --seconds {seconds} --reap --name {list} --mask {mask} --rsource -g {chain}"
                ));
            }
            let mut each = each.into_iter();
            rules.extend(choose(&condition, set, |_| {
                each.next().map_or_else(String::new, |(_, chain)| format!("-g {chain}"))
            }));
        } else {
            rules.extend(choose(&condition, set, |backend| service.backend(backend, chains)));
        }
        chains.insert(name.clone(), rules);
        name
    }

    pub(super) fn pod_cidrs(&self, family: Family) -> impl Iterator<Item = String> {
        let mine = self.view.pod_cidrs.iter().filter(move |net| Family::of(&net.addr()) == family);
        mine.map(|net| net.trunc().to_string()).collect::<Vec<_>>().into_iter()
    }
}

struct Service<'a> {
    frontend: &'a Frontend,
    meta: &'a ServiceMeta,
    protocol: &'static str,
}

impl Service<'_> {
    /// The target for a backend. One on this node has a chain: the pod itself may be who asks.
    fn backend(&self, backend: &Backend, chains: &mut BTreeMap<String, Vec<String>>) -> String {
        let translate = format!("-j DNAT --to-destination {}", destination(backend));
        if !backend.local {
            return translate;
        }
        let protocol = self.protocol;
        let name = format!("{PREFIX}POD-{}", hash(&format!("{} {protocol}", destination(backend))));
        chains.insert(
            name.clone(),
            vec![
                format!("-s {} -j MARK --set-xmark {}", host(&backend.addr), mark(true)),
                format!("-p {protocol} {translate}"),
            ],
        );
        format!("-g {name}")
    }
}

/// One of the backends, each as likely as any other.
fn choose(condition: &str, set: &[Backend], mut target: impl FnMut(&Backend) -> String) -> Vec<String> {
    let rule = |(i, backend): (usize, &Backend)| {
        let target = target(backend);
        match set.len() - i {
            1 => format!("{condition} {target}"),
            rest => {
                format!("{condition} -m statistic --mode random --probability {} {target}", probability(rest))
            }
        }
    };
    set.iter().enumerate().map(rule).collect()
}

/// One in `rest`, as the kernel keeps it and iptables prints it: in steps of 2^-31.
fn probability(rest: usize) -> String {
    let steps = (f64::from(1_u32 << 31) / rest as f64).round();
    format!("{:.11}", steps / f64::from(1_u32 << 31))
}

/// Our bit, set or cleared, and no other.
pub(super) fn mark(on: bool) -> String {
    format!("{:#x}/{MASQUERADE_MARK:#x}", if on { MASQUERADE_MARK } else { 0 })
}

/// An address as the network of itself.
pub(super) fn host(addr: &IpAddr) -> String {
    format!("{addr}/{}", if addr.is_ipv4() { 32 } else { 128 })
}

pub(super) const fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

fn destination(backend: &Backend) -> String {
    match backend.addr {
        IpAddr::V4(addr) => format!("{addr}:{}", backend.port),
        IpAddr::V6(addr) => format!("[{addr}]:{}", backend.port),
    }
}

/// The object's name; the kernel takes 255 bytes, and names of Kubernetes need no escaping.
fn comment(meta: &ServiceMeta) -> String {
    let name = object_name(meta);
    name.chars()
        .filter(|c| c.is_ascii_graphic() || *c == ' ')
        .filter(|c| !matches!(c, '"' | '\\'))
        .take(200)
        .collect()
}

/// FNV-1a: chains are told apart by it, within 28 characters, the same on every start.
fn hash(text: &str) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016X}")
}
