//! Answers out of the zone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::node::{Addresses, ServiceNode, Srv};
use super::{PodNames, Zone};
use crate::name::{Lower, Name};
use crate::wire::{CLASS_IN, HEADER, Query, Rcode, Reply, Section, rtype};

/// CNAME records that are followed inside of the zone.
const MAX_CHAIN: usize = 8;
/// Version of the specification, as the data of a TXT record.
const VERSION: &[u8] = b"\x051.1.0";
/// Time to live of the version, which does not change: eight hours.
const VERSION_TTL: u32 = 28_800;

/// What a zone could do about a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The response is complete.
    Done,
    /// It has the CNAME record; what this name has belongs behind it.
    Elsewhere(Name),
    /// The name belongs to others. Nothing has been written.
    NotHere,
}

/// What a name of the zone is.
enum Place<'z> {
    Apex,
    NameServer,
    Version,
    /// It exists, since names are below it.
    Empty,
    Service {
        node: &'z ServiceNode,
    },
    Port {
        node: &'z ServiceNode,
    },
    Endpoint {
        a: &'z Addresses,
        aaaa: &'z Addresses,
    },
    Pod(IpAddr),
    Missing,
}

impl Zone {
    /// Answers a query. `turn` says which of several addresses comes first.
    pub fn answer(&self, query: &Query<'_>, reply: &mut Reply<'_>, turn: usize) -> Found {
        if query.class != CLASS_IN {
            return Found::NotHere;
        }
        if matches!(query.qtype, rtype::AXFR | rtype::IXFR) && self.zone_of(&query.name).is_some() {
            reply.rcode(Rcode::Refused);
            return Found::Done;
        }
        let Some((_, prefix)) = self.zone_of(&query.name) else { return self.reverse(query, reply) };
        if !self.synced {
            reply.rcode(Rcode::ServFail);
            return Found::Done;
        }
        reply.authoritative();
        let (mut name, mut prefix, mut at) = (query.name, prefix, HEADER);
        for _ in 0..MAX_CHAIN {
            let suffix_start = name.start(prefix);
            let suffix = if at == HEADER {
                &query.name_as_sent()[suffix_start..]
            } else {
                &name.wire()[suffix_start..]
            };
            let asked =
                Asked { name: &name, prefix, at, suffix: Bytes::new(suffix), qtype: query.qtype, turn };
            match self.write(&asked, reply) {
                Step::Done => return Found::Done,
                Step::To(target, place) => {
                    let lower = target.lower();
                    let Some((_, count)) = self.zone_of(&lower) else { return Found::Elsewhere(target) };
                    (name, prefix, at) = (lower, count, place);
                }
            }
        }
        reply.rcode(Rcode::ServFail);
        Found::Done
    }

    /// The zone that a name is in, and how many labels are in front of it.
    fn zone_of(&self, name: &Lower) -> Option<(&Name, usize)> {
        self.config.zones.iter().find_map(|zone| Some((zone, name.strip(zone)?)))
    }

    fn place(&self, name: &Lower, prefix: usize) -> Place<'_> {
        if prefix == 0 {
            return Place::Apex;
        }
        match (name.label(prefix - 1), prefix) {
            (b"svc" | b"pod", 1) | (b"dns", 1) => Place::Empty,
            (b"dns-version", 1) => Place::Version,
            (b"dns", 2) if name.label(0) == b"ns" => Place::NameServer,
            (b"svc", _) => self.service_place(name, prefix - 1),
            (b"pod", _) => self.pod_place(name, prefix - 1),
            _ => Place::Missing,
        }
    }

    fn exists(&self, namespace: &[u8]) -> bool {
        self.is_exposed(namespace) && self.namespaces.contains_key(namespace)
    }

    /// `count` labels are in front of `svc`.
    fn service_place(&self, name: &Lower, count: usize) -> Place<'_> {
        let namespace = name.label(count - 1);
        if !self.exists(namespace) {
            return Place::Missing;
        }
        if count == 1 {
            return Place::Empty;
        }
        let Some(node) = self.services.get(name.slice(count - 2, count)) else { return Place::Missing };
        match count - 2 {
            0 => Place::Service { node },
            1 => {
                if let Some(endpoint) = node.endpoint(name.label(0)) {
                    return Place::Endpoint { a: &endpoint.a, aaaa: &endpoint.aaaa };
                }
                // `_tcp` exists when there is a port below it (RFC 8020).
                let protocol = name.slice(0, 1);
                if node.srv.iter().any(|srv| srv.labels.ends_with(protocol) && is_protocol(srv, protocol)) {
                    Place::Empty
                } else {
                    Place::Missing
                }
            }
            2 if node.srv.iter().any(|srv| *srv.labels == *name.slice(0, 2)) => Place::Port { node },
            _ => Place::Missing,
        }
    }

    fn pod_place(&self, name: &Lower, count: usize) -> Place<'_> {
        let namespace = name.label(count - 1);
        if !self.exists(namespace) {
            return Place::Missing;
        }
        match count {
            1 => Place::Empty,
            2 => match address_of(name.label(0)) {
                Some(addr) if self.is_pod(addr, namespace) => Place::Pod(addr),
                _ => Place::Missing,
            },
            _ => Place::Missing,
        }
    }

    fn is_pod(&self, addr: IpAddr, namespace: &[u8]) -> bool {
        match self.config.pods {
            PodNames::Disabled => false,
            PodNames::Insecure => true,
            PodNames::Verified => {
                self.pods_at.get(&addr).is_some_and(|all| all.iter().any(|label| **label == *namespace))
            }
        }
    }

    fn write(&self, asked: &Asked<'_>, reply: &mut Reply<'_>) -> Step {
        let ttl = self.config.ttl;
        let before = reply.count(Section::Answer);
        let mut exists = true;
        match self.place(asked.name, asked.prefix) {
            Place::Apex if asked.qtype == rtype::SOA => self.soa(asked, Section::Answer, reply),
            Place::Apex if asked.qtype == rtype::NS => {
                let [high, low] = asked.pointer(asked.prefix);
                let rdata: [&[u8]; 2] = [b"\x02ns\x03dns", &[high, low]];
                if let Some(at) = reply.pointed(Section::Answer, asked.owner(), rtype::NS, ttl, &rdata) {
                    self.name_servers(at, None, Section::Additional, reply);
                }
            }
            Place::NameServer => self.name_servers(asked.at, Some(asked.qtype), Section::Answer, reply),
            Place::Version if matches!(asked.qtype, rtype::TXT) => {
                reply.pointed(Section::Answer, asked.owner(), rtype::TXT, VERSION_TTL, &[VERSION]);
            }
            Place::Service { node } => {
                if let Some(target) = &node.external {
                    let rdata = [target.wire()];
                    let at = reply.pointed(Section::Answer, asked.owner(), rtype::CNAME, ttl, &rdata);
                    return match at {
                        Some(at) if matches!(asked.qtype, rtype::CNAME | rtype::ANY) => {
                            reply.remember(at);
                            Step::Done
                        }
                        Some(at) => {
                            reply.remember(at);
                            Step::To(target.clone(), at)
                        }
                        None => Step::Done,
                    };
                }
                if asked.qtype == rtype::SRV {
                    self.srv(asked, node, None, reply);
                } else {
                    asked.addresses(&node.a, &node.aaaa, ttl, reply);
                }
            }
            Place::Port { node } if asked.qtype == rtype::SRV => {
                self.srv(asked, node, Some(asked.name.slice(0, 2)), reply);
            }
            Place::Endpoint { a, aaaa } => asked.addresses(a, aaaa, ttl, reply),
            Place::Pod(addr) => {
                write_address(addr, asked.owner(), Some(asked.qtype), Section::Answer, ttl, reply);
            }
            Place::Apex | Place::Empty | Place::Version | Place::Port { .. } => {}
            Place::Missing => exists = false,
        }
        if reply.is_truncated() || reply.count(Section::Answer) > before {
            return Step::Done;
        }
        if !exists {
            reply.rcode(Rcode::NxDomain);
        } else if asked.qtype == rtype::ANY {
            // Something is there, and not everything has to be told (RFC 8482 section 4.2).
            reply.pointed(Section::Answer, asked.owner(), rtype::HINFO, ttl, &[b"\x07RFC8482\0"]);
            return Step::Done;
        }
        self.soa(asked, Section::Authority, reply);
        Step::Done
    }

    fn soa(&self, asked: &Asked<'_>, section: Section, reply: &mut Reply<'_>) {
        let zone = asked.pointer(asked.prefix);
        let ttl = self.config.ttl;
        let mut numbers = [0; 20];
        for (to, number) in numbers.chunks_exact_mut(4).zip([self.serial, 7200, 1800, 86_400, ttl]) {
            to.copy_from_slice(&number.to_be_bytes());
        }
        let rdata: [&[u8]; 5] = [b"\x02ns\x03dns", &zone, b"\x0ahostmaster", &zone, &numbers];
        reply.pointed(section, u16::from_be_bytes(zone) & 0x3fff, rtype::SOA, ttl, &rdata);
    }

    fn name_servers(&self, owner: usize, qtype: Option<u16>, section: Section, reply: &mut Reply<'_>) {
        for addr in &self.config.name_servers {
            write_address(*addr, owner as u16, qtype, section, self.config.ttl, reply);
        }
    }

    /// Records of a Service's ports, or of one, with the addresses of their targets.
    fn srv(&self, asked: &Asked<'_>, node: &ServiceNode, port: Option<&[u8]>, reply: &mut Reply<'_>) {
        let matching: Vec<&Srv> =
            node.srv.iter().filter(|srv| port.is_none_or(|port| *srv.labels == *port)).collect();
        let weight = (100 / matching.len().max(1)).max(1) as u16;
        let mut answered: Vec<(u16, Option<&[u8]>)> = Vec::new();
        let mut targets: Vec<(Option<&[u8]>, usize)> = Vec::new();
        let service = asked.name.slice(asked.prefix - 3, asked.prefix);
        for srv in matching {
            let target = srv.target.as_deref();
            if answered.contains(&(srv.number, target)) {
                continue;
            }
            answered.push((srv.number, target));
            let length = [target.map_or(0, |label| label.len() as u8)];
            let label: [&[u8]; 2] = target.map_or([&[], &[]], |label| [&length, label]);
            let (weight, number) = (weight.to_be_bytes(), srv.number.to_be_bytes());
            // The target is written out (RFC 2782); its zone in the case of the question.
            let rdata: [&[u8]; 7] =
                [&[0, 0], &weight, &number, label[0], label[1], service, asked.suffix.get()];
            let Some(at) = reply.pointed(Section::Answer, asked.owner(), rtype::SRV, self.config.ttl, &rdata)
            else {
                return;
            };
            if !targets.iter().any(|(known, _)| *known == target) {
                targets.push((target, at + 6));
            }
        }
        for (target, at) in targets {
            let (a, aaaa) = match target.and_then(|label| node.endpoint(label)) {
                Some(endpoint) => (&endpoint.a, &endpoint.aaaa),
                None => (&node.a, &node.aaaa),
            };
            for (kind, addresses) in [(rtype::A, a), (rtype::AAAA, aaaa)] {
                for octets in addresses.octets() {
                    reply.pointed(Section::Additional, at as u16, kind, self.config.ttl, &[octets]);
                }
            }
        }
    }

    /// Names of addresses; those that the cluster does not have are others'.
    fn reverse(&self, query: &Query<'_>, reply: &mut Reply<'_>) -> Found {
        let Some((addr, prefix)) = reversed(&query.name) else { return Found::NotHere };
        if !self.synced {
            reply.rcode(Rcode::ServFail);
            return Found::Done;
        }
        let Some(zone) = self.config.zones.first() else { return Found::NotHere };
        let all = self.owners.get(&addr).map_or(&[][..], Vec::as_slice);
        let services = all.iter().any(|owner| !owner.endpoint);
        let told: Vec<_> = all
            .iter()
            .filter(|owner| !(services && owner.endpoint) && self.is_exposed(namespace_of(&owner.labels)))
            .collect();
        if told.is_empty() {
            return Found::NotHere;
        }
        reply.authoritative();
        if query.qtype == rtype::PTR || query.qtype == rtype::ANY {
            for owner in told {
                let rdata: [&[u8]; 3] = [&owner.labels, b"\x03svc", zone.wire()];
                reply.pointed(Section::Answer, HEADER as u16, rtype::PTR, self.config.ttl, &rdata);
            }
        } else {
            let suffix = Bytes::new(&[]);
            let asked = Asked { name: &query.name, prefix, at: HEADER, suffix, qtype: query.qtype, turn: 0 };
            self.soa(&asked, Section::Authority, reply);
        }
        Found::Done
    }
}

enum Step {
    Done,
    To(Name, usize),
}

/// A few bytes that outlive the name they are from.
struct Bytes {
    bytes: [u8; crate::name::MAX_NAME],
    len: usize,
}

impl Bytes {
    fn new(from: &[u8]) -> Self {
        let mut bytes = [0; crate::name::MAX_NAME];
        let len = from.len().min(bytes.len());
        bytes[..len].copy_from_slice(&from[..len]);
        Self { bytes, len }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The name at hand: the question's, or one that a CNAME record led to.
struct Asked<'a> {
    name: &'a Lower,
    /// Labels in front of the zone.
    prefix: usize,
    /// Where the name is in the message.
    at: usize,
    /// The zone in the case of the question.
    suffix: Bytes,
    qtype: u16,
    turn: usize,
}

impl Asked<'_> {
    fn owner(&self) -> u16 {
        self.at as u16
    }

    /// Pointer to what is behind the first labels of the name.
    fn pointer(&self, labels: usize) -> [u8; 2] {
        (0xc000 | (self.at + self.name.start(labels)) as u16).to_be_bytes()
    }

    fn addresses(&self, a: &Addresses, aaaa: &Addresses, ttl: u32, reply: &mut Reply<'_>) {
        let addresses = match self.qtype {
            rtype::A => a,
            rtype::AAAA => aaaa,
            _ => return,
        };
        if self.at != HEADER {
            for octets in addresses.octets() {
                reply.pointed(Section::Answer, self.owner(), self.qtype, ttl, &[octets]);
            }
            return;
        }
        let size = 12 + if self.qtype == rtype::A { 4 } else { 16 };
        for (count, records) in addresses.rotated(self.turn) {
            // As many as there is room for: a truncated response with some is of more use than one without.
            let fitting = count.min((reply.room() / size) as u16);
            reply.raw(Section::Answer, fitting, &records[..usize::from(fitting) * size]);
            if fitting < count {
                reply.truncate();
                return;
            }
        }
        debug_assert!(reply.count(Section::Answer) >= addresses.count());
    }
}

fn write_address(
    addr: IpAddr,
    owner: u16,
    qtype: Option<u16>,
    section: Section,
    ttl: u32,
    reply: &mut Reply<'_>,
) {
    match addr {
        IpAddr::V4(v4) if qtype.is_none_or(|t| t == rtype::A) => {
            reply.pointed(section, owner, rtype::A, ttl, &[&v4.octets()]);
        }
        IpAddr::V6(v6) if qtype.is_none_or(|t| t == rtype::AAAA) => {
            reply.pointed(section, owner, rtype::AAAA, ttl, &[&v6.octets()]);
        }
        _ => {}
    }
}

/// Whether `protocol` (on the wire) is the second label of a port, not the end of it.
fn is_protocol(srv: &Srv, protocol: &[u8]) -> bool {
    let first = srv.labels.first().map_or(0, |len| usize::from(*len) + 1);
    srv.labels.get(first..) == Some(protocol)
}

/// The last label of `service.namespace` or `endpoint.service.namespace`.
fn namespace_of(labels: &[u8]) -> &[u8] {
    let mut at = 0;
    loop {
        let Some(&len) = labels.get(at) else { return &[] };
        let next = at + 1 + usize::from(len);
        if next >= labels.len() {
            return labels.get(at + 1..).unwrap_or_default();
        }
        at = next;
    }
}

/// `10-0-0-1` or `fd00--1`.
fn address_of(label: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(label).ok()?;
    let v4 = text.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| text.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()
}

/// The address of a name for a reverse look-up, and how many labels it takes.
fn reversed(name: &Lower) -> Option<(IpAddr, usize)> {
    let count = name.count().checked_sub(2)?;
    if name.label(count + 1) != b"arpa" {
        return None;
    }
    match (name.label(count), count) {
        (b"in-addr", 4) => {
            let mut octets = [0; 4];
            for (i, octet) in octets.iter_mut().rev().enumerate() {
                let text = std::str::from_utf8(name.label(i)).ok()?;
                let plain =
                    text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
                *octet = text.parse().ok().filter(|_| plain)?;
            }
            Some((IpAddr::from(octets), count))
        }
        (b"ip6", 32) => {
            let mut octets = [0u8; 16];
            for i in 0..32 {
                let &[digit] = name.label(31 - i) else { return None };
                octets[i / 2] = octets[i / 2] << 4 | char::from(digit).to_digit(16)? as u8;
            }
            Some((IpAddr::from(octets), count))
        }
        _ => None,
    }
}
