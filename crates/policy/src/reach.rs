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
    /// By set, direction and number of the list of entries, which is `None` where class 0 says it.
    functions: HashMap<(SetId, Direction, Option<u32>), u32>,
    lanes: Vec<Lanes>,
    pairs: HashMap<(u32, u32), Arc<[Piece]>>,
}

/// An address, with what the tables know of it. It is looked up once for all the pairs that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    address: IpAddr,
    set: Option<SetId>,
    class: ClassId,
}

impl Place {
    /// Whether every connection of it is judged as that of another, towards whomever.
    pub fn is_like(&self, other: &Place) -> bool {
        self.set == other.set && self.class == other.class
    }
}

impl<'a> Reachability<'a> {
    /// Of everything that a compiler knows.
    pub fn new(compiler: &'a Compiler) -> Self {
        let allow = Lanes::constant(Verdict { allow: true, ..Verdict::default() });
        Self { compiler, functions: HashMap::new(), lanes: vec![allow], pairs: HashMap::new() }
    }

    /// What holds between two addresses, for every protocol and port.
    pub fn between(&mut self, source: IpAddr, target: IpAddr) -> Arc<[Piece]> {
        let (source, target) = (self.place(source), self.place(target));
        self.from_to(source, target)
    }

    /// The same, for addresses that have been looked up.
    pub fn from_to(&mut self, source: Place, target: Place) -> Arc<[Piece]> {
        let same = source.address == target.address;
        let egress = if same { 0 } else { self.function(source, Direction::Egress, target) };
        let ingress = if same { 0 } else { self.function(target, Direction::Ingress, source) };
        if let Some(pieces) = self.pairs.get(&(egress, ingress)) {
            return Arc::clone(pieces);
        }
        let pieces = pieces(&self.lanes[egress as usize], &self.lanes[ingress as usize]);
        self.pairs.insert((egress, ingress), Arc::clone(&pieces));
        pieces
    }

    /// Looks an address up.
    pub fn place(&self, address: IpAddr) -> Place {
        let table = self.compiler.table();
        let set = table.endpoints.get(&address).map(|set| set.new);
        Place { address, set, class: table.class(address).new }
    }

    fn function(&mut self, endpoint: Place, direction: Direction, peer: Place) -> u32 {
        let Some(set) = endpoint.set else { return 0 };
        let list = self.compiler.table().verdicts.list(&(set, direction, peer.class));
        if let Some(function) = self.functions.get(&(set, direction, list)) {
            return *function;
        }
        let class = if list.is_some() { peer.class } else { ClassId::NONE };
        let Some(state) = self.compiler.sets.get(set) else { return 0 };
        let key = &self.compiler.classes[class].key;
        self.lanes.push(state.lanes(direction, key, &self.compiler.atoms));
        let function = u32::try_from(self.lanes.len() - 1).expect("memory ends before 2^32 functions do");
        self.functions.insert((set, direction, list), function);
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
