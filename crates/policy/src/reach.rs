//! Who can talk to whom, over all ports at once.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use podway_model::{Protocol, policy::Direction};

use crate::{
    compiler::Compiler,
    lanes::{Lanes, PROTOCOLS},
    table::{ClassId, SetId, Verdict},
};

/// Some ports for which both ends say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The protocol; `None` is all those without ports, and the ports then mean nothing.
    pub protocol: Option<Protocol>,
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
    /// What the source's policies for egress say.
    pub egress: Verdict,
    /// What the target's policies for ingress say.
    pub ingress: Verdict,
}

impl Piece {
    /// Whether both ends allow it.
    pub fn allow(&self) -> bool {
        self.egress.allow && self.ingress.allow
    }
}

/// Answers for pairs of addresses, each kind of pair worked out once.
#[derive(Debug)]
pub struct Reachability<'a> {
    compiler: &'a Compiler,
    functions: HashMap<(SetId, Direction, ClassId), usize>,
    lanes: Vec<Lanes>,
    pairs: HashMap<(usize, usize), Arc<[Piece]>>,
}

impl<'a> Reachability<'a> {
    /// Of everything that a compiler knows.
    pub fn new(compiler: &'a Compiler) -> Self {
        let allow = Lanes::constant(Verdict { allow: true, ..Verdict::default() });
        Self { compiler, functions: HashMap::new(), lanes: vec![allow], pairs: HashMap::new() }
    }

    /// What holds between two addresses, for every protocol and port.
    pub fn between(&mut self, source: IpAddr, target: IpAddr) -> Arc<[Piece]> {
        let same = source == target;
        let egress = if same { 0 } else { self.function(source, Direction::Egress, target) };
        let ingress = if same { 0 } else { self.function(target, Direction::Ingress, source) };
        if let Some(pieces) = self.pairs.get(&(egress, ingress)) {
            return Arc::clone(pieces);
        }
        let pieces = pieces(&self.lanes[egress], &self.lanes[ingress]);
        self.pairs.insert((egress, ingress), Arc::clone(&pieces));
        pieces
    }

    fn function(&mut self, endpoint: IpAddr, direction: Direction, peer: IpAddr) -> usize {
        let table = self.compiler.table();
        let Some(set) = table.endpoints.get(&endpoint).map(|set| set.new) else { return 0 };
        let class = table.class(peer).new;
        // A class without entries has the verdicts of class 0.
        let class = if table.verdicts.contains_key(&(set, direction, class)) { class } else { ClassId::NONE };
        if let Some(function) = self.functions.get(&(set, direction, class)) {
            return *function;
        }
        let key = self.compiler.classes.key(class);
        let Some(state) = self.compiler.sets.get(set) else { return 0 };
        self.lanes.push(state.lanes(direction, &key, &self.compiler.atoms));
        let function = self.lanes.len() - 1;
        self.functions.insert((set, direction, class), function);
        function
    }
}

fn pieces(egress: &Lanes, ingress: &Lanes) -> Arc<[Piece]> {
    let mut out: Vec<Piece> = Vec::new();
    for (lane, protocol) in PROTOCOLS.into_iter().enumerate() {
        let (mine, theirs) = (egress.lane(lane), ingress.lane(lane));
        let mut starts: Vec<u16> = mine.iter().chain(theirs).map(|(first, _)| *first).collect();
        starts.sort_unstable();
        starts.dedup();
        for (i, first) in starts.iter().enumerate() {
            let last = starts.get(i + 1).map_or(u16::MAX, |next| next - 1);
            let (egress, ingress) = (egress.at(lane, *first), ingress.at(lane, *first));
            out.push(Piece { protocol: Some(protocol), first: *first, last, egress, ingress });
        }
    }
    let (egress, ingress) = (egress.other(), ingress.other());
    out.push(Piece { protocol: None, first: 0, last: 0, egress, ingress });
    out.into()
}
