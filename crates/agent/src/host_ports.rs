//! Host ports: ports of the node that lead to pods (the capability `portMappings`), in an nftables table of their
//! own.
//!
//! The table is there while a pod has a port. A pod that comes or goes is one transaction that adds or deletes its
//! elements; the rules are the same for any number of ports. What leads where is remembered with the addresses
//! that a pod has, and found in the table again when that is lost.
//!
//! ```text
//! to an address of the node ──▶ prerouting, output ──▶ ports: address and port, else port alone ──▶ dnat
//! from inside the cluster, or from the node's loopback ──▶ postrouting: masquerade, so that the answer comes back
//! this way; what comes from beyond the cluster keeps its source
//! ```
//!
//! A port of the loopback works over IPv4 only: the links of pods with ports are allowed to carry loopback addresses
//! for it (`route_localnet`), and a rule keeps the pods from using that towards the node.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::IpAddr;

use ipnet::IpNet;
use podway_cni::{PortMapping, Protocol};
use podway_link::{Netlink, conntrack};
use serde_json::Value;
use tracing::warn;

use crate::ids::AttachmentId;
use crate::nft::{self, NftError};

/// The table's name; `inet` holds both families.
pub const TABLE: &str = "podway_ports";

/// A port of the node that this agent, or its tunnel, listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// What for.
    pub what: &'static str,
}

/// Why a pod does not get its host ports.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Another pod has one of them.
    #[error("host port {mapping} is taken: {holder} has {taken}")]
    Taken {
        /// What was asked for.
        mapping: PortMapping,
        /// What the other has.
        taken: PortMapping,
        /// The other pod.
        holder: String,
    },
    /// Podway itself needs one of them.
    #[error("host port {mapping} is Podway's own on this node: {what}")]
    Reserved {
        /// What was asked for.
        mapping: PortMapping,
        /// What for.
        what: &'static str,
    },
    /// The pod has no address of the family.
    #[error("host port {0} is of a family of which the pod has no address")]
    NoFamily(PortMapping),
    /// The rules cannot be written.
    #[error("host ports cannot be opened: {0}")]
    Nft(#[from] NftError),
}

/// What a pod has.
#[derive(Debug)]
struct Claim {
    /// Who has it, for people.
    holder: String,
    mappings: Vec<PortMapping>,
    /// Where it leads; empty until the pod has addresses.
    addresses: Vec<IpAddr>,
}

/// One port that leads somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Element {
    /// None: whatever address of the node.
    bound: Option<IpAddr>,
    protocol: Protocol,
    port: u16,
    target: (IpAddr, u16),
}

/// The driver. Works in the network namespace of the thread that calls it.
#[derive(Debug, Default)]
pub struct HostPorts {
    reserved: Vec<Reserved>,
    claims: BTreeMap<AttachmentId, Claim>,
    /// The cluster's own addresses.
    inside: Vec<IpNet>,
    /// The table without its elements, as nft showed it right after it was written; none while there is none.
    written: Option<Value>,
}

impl HostPorts {
    /// Sets what no pod may have.
    pub fn set_reserved(&mut self, reserved: Vec<Reserved>) {
        self.reserved = reserved;
    }

    /// Sets the cluster's own addresses, from which connections are masqueraded.
    ///
    /// # Errors
    /// nft is missing or refuses; the next [`Self::audit`] tries again.
    pub fn set_inside(&mut self, inside: &[IpNet]) -> Result<(), NftError> {
        if self.inside == inside {
            return Ok(());
        }
        inside.clone_into(&mut self.inside);
        if self.written.is_some() { self.write() } else { Ok(()) }
    }

    /// Reserves ports for a pod that has no addresses yet.
    ///
    /// # Errors
    /// Somebody has one of them.
    pub fn claim(
        &mut self,
        id: &AttachmentId,
        holder: String,
        mappings: &[PortMapping],
    ) -> Result<(), PortError> {
        if mappings.is_empty() {
            return Ok(());
        }
        for mapping in mappings {
            // Of the node's own ports only those that are not bound to the loopback are in the way.
            let local = mapping.host_ip.is_some_and(|ip| ip.is_loopback());
            let own = |r: &&Reserved| r.port == mapping.host_port && r.protocol == mapping.protocol;
            if let Some(reserved) = self.reserved.iter().find(own).filter(|_| !local) {
                return Err(PortError::Reserved { mapping: *mapping, what: reserved.what });
            }
            for (_, claim) in self.claims.iter().filter(|(other, _)| *other != id) {
                if let Some(taken) = claim.mappings.iter().find(|m| m.overlaps(mapping)) {
                    let holder = claim.holder.clone();
                    return Err(PortError::Taken { mapping: *mapping, taken: *taken, holder });
                }
            }
        }
        let claim = Claim { holder, mappings: mappings.to_vec(), addresses: Vec::new() };
        self.claims.insert(id.clone(), claim);
        Ok(())
    }

    /// Opens the ports that a pod has reserved.
    ///
    /// # Errors
    /// The pod has no address of the family of one of them; nft is missing or refuses. The reservation stays.
    pub fn open(&mut self, id: &AttachmentId, addresses: &[IpAddr]) -> Result<(), PortError> {
        let Some(claim) = self.claims.get_mut(id) else { return Ok(()) };
        for mapping in &claim.mappings {
            if let Some(ip) = mapping.host_ip
                && !addresses.iter().any(|a| a.is_ipv4() == ip.is_ipv4())
            {
                return Err(PortError::NoFamily(*mapping));
            }
        }
        addresses.clone_into(&mut claim.addresses);
        let added = claim.elements();
        self.change("add", &added)?;
        forget_flows(&added, true);
        Ok(())
    }

    /// Closes and gives up a pod's ports; one without any is no error.
    ///
    /// # Errors
    /// nft is missing or refuses; the pod keeps its ports then.
    pub fn close(&mut self, id: &AttachmentId) -> Result<(), NftError> {
        let Some(claim) = self.claims.remove(id) else { return Ok(()) };
        let removed = claim.elements();
        let done = if removed.is_empty() { Ok(()) } else { self.change("delete", &removed) };
        match &done {
            Ok(()) => forget_flows(&removed, false),
            Err(_) => drop(self.claims.insert(id.clone(), claim)),
        }
        done
    }

    /// Takes over what a pod has, without writing it; see [`Self::restore`].
    pub fn adopt(
        &mut self,
        id: &AttachmentId,
        holder: String,
        mappings: &[PortMapping],
        addresses: &[IpAddr],
    ) {
        if !mappings.is_empty() {
            let claim = Claim { holder, mappings: mappings.to_vec(), addresses: addresses.to_vec() };
            self.claims.insert(id.clone(), claim);
        }
    }

    /// Makes the table hold what was adopted and nothing else. What it says of the cluster's addresses holds until
    /// they are known ([`Self::set_inside`]).
    ///
    /// # Errors
    /// nft is missing or refuses.
    pub fn restore(&mut self) -> Result<(), NftError> {
        if self.claims.is_empty() {
            return match nft::remove(TABLE) {
                // Without nft there can be no table of ours either.
                Ok(_) | Err(NftError::Missing(_)) => Ok(()),
                Err(e) => Err(e),
            };
        }
        if self.inside.is_empty()
            && let Some(json) = show()?
        {
            self.inside = inside_of(&json);
        }
        self.write()
    }

    /// Looks whether somebody changed or flushed the table (firewall managers do), and puts it right. Returns
    /// whether that was necessary.
    ///
    /// # Errors
    /// nft is missing or refuses.
    pub fn audit(&mut self) -> Result<bool, NftError> {
        if self.elements().is_empty() {
            return Ok(false);
        }
        let shown = show()?.map(|json| split(&json));
        if let (Some((fixed, elements)), Some(written)) = (&shown, &self.written)
            && fixed == written
            && *elements == self.elements()
        {
            return Ok(false);
        }
        self.write()?;
        Ok(true)
    }

    /// Number of ports that lead to pods.
    #[must_use]
    pub fn len(&self) -> usize {
        self.claims.values().map(|c| c.mappings.len()).sum()
    }

    /// Whether no port leads to a pod.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    fn elements(&self) -> BTreeSet<Element> {
        self.claims.values().flat_map(Claim::elements).collect()
    }

    /// Adds or deletes elements; when the table is not as it was left, all of it is written.
    fn change(&mut self, verb: &str, elements: &BTreeSet<Element>) -> Result<(), NftError> {
        if self.written.is_none() || self.elements().is_empty() {
            return self.write();
        }
        let mut text = String::new();
        for element in elements {
            let (map, key) = (element.map(), element.key());
            let value = if verb == "add" { format!(" : {}", element.value()) } else { String::new() };
            let _ = writeln!(text, "{verb} element inet {TABLE} {map} {{ {key}{value} }}");
        }
        match nft::transaction(&text) {
            Err(NftError::Refused(_)) => self.write(),
            other => other,
        }
    }

    /// Writes the whole table, or removes it when no port leads anywhere.
    fn write(&mut self) -> Result<(), NftError> {
        self.written = None;
        let elements = self.elements();
        if elements.is_empty() {
            return nft::transaction(&nft::deletion(TABLE));
        }
        nft::transaction(&table(&elements, &self.inside))?;
        self.written = show()?.map(|json| split(&json).0);
        Ok(())
    }
}

/// Forgets the UDP flows whose way has changed: datagrams of a client that goes on sending would follow the old one. Of
/// ports that were `opened` these are all to the node itself that go elsewhere; of others, those to the pod.
fn forget_flows(elements: &BTreeSet<Element>, opened: bool) {
    let mut own = None;
    for element in elements.iter().filter(|e| e.protocol == Protocol::Udp) {
        let target = element.target.0;
        let forgotten = match (opened, &own) {
            (true, None) => Netlink::open().and_then(|mut n| n.addresses()).map(|list| {
                own = Some(list.into_iter().map(|a| a.addr).collect::<BTreeSet<IpAddr>>());
            }),
            _ => Ok(()),
        }
        .and_then(|()| {
            conntrack::forget_udp(target.is_ipv6(), element.port, |flow| {
                let here = own.as_ref().is_none_or(|own| own.contains(&flow.destination));
                here && (flow.answers == target) != opened
            })
        });
        if let Err(error) = forgotten {
            warn!(port = %element.mapping(), %error, "clients that send all the time may not reach another pod");
        }
    }
}

/// The ports that lead to an address, as the table has them: for when nothing else remembers.
///
/// # Errors
/// nft is missing or refuses.
pub fn found(address: IpAddr) -> Result<Vec<PortMapping>, NftError> {
    let Some(json) = show()? else { return Ok(Vec::new()) };
    let leads_there = |e: &Element| e.target.0 == address;
    Ok(split(&json).1.iter().filter(|e| leads_there(e)).map(Element::mapping).collect())
}

/// Deletes the table. Returns whether there was one.
///
/// # Errors
/// nft is missing or refuses.
pub fn remove() -> Result<bool, NftError> {
    nft::remove(TABLE)
}

fn show() -> Result<Option<Value>, NftError> {
    let Some(text) = nft::list("--json", TABLE)? else { return Ok(None) };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| NftError::Refused(format!("what nft shows of the table {TABLE} is no JSON: {e}")))
}

impl Claim {
    fn elements(&self) -> BTreeSet<Element> {
        let mut elements = BTreeSet::new();
        for mapping in &self.mappings {
            for address in &self.addresses {
                if mapping.host_ip.is_some_and(|ip| ip.is_ipv4() != address.is_ipv4()) {
                    continue;
                }
                elements.insert(Element {
                    bound: mapping.host_ip.filter(|ip| !ip.is_unspecified()),
                    protocol: mapping.protocol,
                    port: mapping.host_port,
                    target: (*address, mapping.container_port),
                });
            }
        }
        elements
    }
}

impl Element {
    fn map(&self) -> &'static str {
        match (self.bound.is_some(), self.target.0.is_ipv4()) {
            (true, true) => "bound4",
            (true, false) => "bound6",
            (false, true) => "any4",
            (false, false) => "any6",
        }
    }

    fn key(&self) -> String {
        let port = format!("{} . {}", self.protocol, self.port);
        self.bound.map_or(port.clone(), |ip| format!("{ip} . {port}"))
    }

    fn value(&self) -> impl fmt::Display {
        format!("{} . {}", self.target.0, self.target.1)
    }

    fn mapping(&self) -> PortMapping {
        let every: IpAddr = if self.target.0.is_ipv4() {
            std::net::Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        PortMapping {
            host_port: self.port,
            container_port: self.target.1,
            protocol: self.protocol,
            host_ip: Some(self.bound.unwrap_or(every)),
        }
    }

    /// Reads `[{"concat": ["10.0.0.1", "tcp", 80]}, {"concat": ["10.244.1.7", 8080]}]`, the first with or without
    /// an address.
    fn read(pair: &Value) -> Option<Self> {
        let parts = |value: &Value| value.get("concat").and_then(Value::as_array).cloned();
        let ip = |value: &Value| value.as_str()?.parse::<IpAddr>().ok();
        // Services that have a name are shown by it only when asked for.
        let number = |value: &Value| value.as_u64().and_then(|n| u16::try_from(n).ok());
        let key = parts(pair.get(0)?)?;
        let (bound, rest) = match key.as_slice() {
            [address, rest @ ..] if rest.len() == 2 => (Some(ip(address)?), rest),
            rest => (None, rest),
        };
        let [protocol, port] = rest else { return None };
        let target = parts(pair.get(1)?)?;
        let [address, to] = target.as_slice() else { return None };
        Some(Self {
            bound,
            protocol: Protocol::parse(protocol.as_str()?)?,
            port: number(port)?,
            target: (ip(address)?, number(to)?),
        })
    }
}

/// The table as a transaction that replaces it.
fn table(elements: &BTreeSet<Element>, inside: &[IpNet]) -> String {
    let mut text = nft::deletion(TABLE);
    let _ = writeln!(text, "table inet {TABLE} {{");
    for (name, key, value) in [
        ("any4", "", "ipv4_addr"),
        ("any6", "", "ipv6_addr"),
        ("bound4", "ipv4_addr . ", "ipv4_addr"),
        ("bound6", "ipv6_addr . ", "ipv6_addr"),
    ] {
        let _ = writeln!(text, "\tmap {name} {{");
        let _ = writeln!(text, "\t\ttype {key}inet_proto . inet_service : {value} . inet_service");
        let mine: Vec<String> = elements
            .iter()
            .filter(|e| e.map() == name)
            .map(|e| format!("{} : {}", e.key(), e.value()))
            .collect();
        if !mine.is_empty() {
            let _ = writeln!(text, "\t\telements = {{ {} }}", mine.join(", "));
        }
        text.push_str("\t}\n");
    }
    nft::prefix_set(&mut text, "inside4", inside, false);
    nft::prefix_set(&mut text, "inside6", inside, true);
    // -100: what other host port implementations and kube-proxy use, too. Before the table `podway` masquerades.
    text.push_str(
        "\tchain ports {\n\
         \t\tip6 daddr ::1 return\n\
         \t\tdnat ip to ip daddr . meta l4proto . th dport map @bound4\n\
         \t\tdnat ip6 to ip6 daddr . meta l4proto . th dport map @bound6\n\
         \t\tmeta nfproto ipv4 dnat ip to meta l4proto . th dport map @any4\n\
         \t\tmeta nfproto ipv6 dnat ip6 to meta l4proto . th dport map @any6\n\
         \t}\n\
         \tchain prerouting {\n\
         \t\ttype nat hook prerouting priority -100; policy accept;\n\
         \t\tfib daddr type local jump ports\n\
         \t}\n\
         \tchain output {\n\
         \t\ttype nat hook output priority -100; policy accept;\n\
         \t\tfib daddr type local jump ports\n\
         \t}\n\
         \tchain postrouting {\n\
         \t\ttype nat hook postrouting priority 99; policy accept;\n\
         \t\tct status dnat oifname \"pw*\" ip saddr 127.0.0.0/8 masquerade fully-random\n\
         \t\tct status dnat oifname \"pw*\" ip saddr @inside4 masquerade fully-random\n\
         \t\tct status dnat oifname \"pw*\" ip6 saddr @inside6 masquerade fully-random\n\
         \t}\n\
         \tchain loopback {\n\
         \t\ttype filter hook prerouting priority -300; policy accept;\n\
         \t\tiifname \"pw*\" ip daddr 127.0.0.0/8 drop\n\
         \t}\n}\n",
    );
    text
}

/// The cluster's addresses as the table has them: `"10.0.0.1"` or `{"prefix": {"addr": "10.0.0.0", "len": 8}}`.
fn inside_of(shown: &Value) -> Vec<IpNet> {
    let objects = shown.get("nftables").and_then(Value::as_array).into_iter().flatten();
    let elements = objects.filter_map(|o| o.pointer("/set/elem")?.as_array()).flatten();
    let read = |element: &Value| match element.get("prefix") {
        Some(prefix) => {
            let len = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
            IpNet::new(prefix.get("addr")?.as_str()?.parse().ok()?, len).ok()
        }
        None => element.as_str()?.parse::<IpAddr>().ok().map(IpNet::from),
    };
    elements.filter_map(read).collect()
}

/// What nft shows: everything but the elements of the maps, and these.
fn split(shown: &Value) -> (Value, BTreeSet<Element>) {
    let mut elements = BTreeSet::new();
    let mut rest = Vec::new();
    for object in shown.get("nftables").and_then(Value::as_array).into_iter().flatten() {
        let mut object = object.clone();
        if object.get("metainfo").is_some() {
            continue;
        }
        if let Some(Value::Object(map)) = object.get_mut("map")
            && let Some(list) = map.remove("elem")
        {
            elements.extend(list.as_array().into_iter().flatten().filter_map(Element::read));
        }
        for inner in object.as_object_mut().into_iter().flat_map(|o| o.values_mut()) {
            if let Value::Object(fields) = inner {
                fields.remove("handle");
            }
        }
        rest.push(object);
    }
    (Value::Array(rest), elements)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn id(name: &str) -> AttachmentId {
        AttachmentId::new(name, "eth0")
    }

    fn mapping(ip: &str, port: u16) -> PortMapping {
        let host_ip = (!ip.is_empty()).then(|| ip.parse().unwrap());
        PortMapping { host_port: port, container_port: 80, protocol: Protocol::Tcp, host_ip }
    }

    fn addresses() -> Vec<IpAddr> {
        vec!["10.244.1.7".parse().unwrap(), "fd00::7".parse().unwrap()]
    }

    #[test]
    fn a_port_has_one_holder() {
        let mut ports = HostPorts::default();
        ports.set_reserved(vec![Reserved { protocol: Protocol::Tcp, port: 9950, what: "the metrics" }]);
        ports.claim(&id("a"), "shop/a".into(), &[mapping("", 8080), mapping("10.0.0.1", 81)]).unwrap();
        for (wanted, part) in [
            (mapping("", 8080), "host port 8080/tcp is taken: shop/a has 8080/tcp"),
            (mapping("::", 8080), "host port [::]:8080/tcp is taken: shop/a"),
            (mapping("", 81), "shop/a has 10.0.0.1:81/tcp"),
            (mapping("", 9950), "Podway's own on this node: the metrics"),
        ] {
            let error = ports.claim(&id("b"), "shop/b".into(), &[wanted]).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let udp = PortMapping { protocol: Protocol::Udp, ..mapping("", 8080) };
        let free = [mapping("10.0.0.2", 81), mapping("127.0.0.1", 9950), udp];
        ports.claim(&id("b"), "shop/b".into(), &free).unwrap();
        assert_eq!(ports.len(), 5);
        // One that asks again has the ports itself.
        ports.claim(&id("a"), "shop/a".into(), &[mapping("", 8080)]).unwrap();
    }

    #[test]
    fn a_pod_without_the_family_is_told() {
        let mut ports = HostPorts::default();
        ports.claim(&id("a"), "shop/a".into(), &[mapping("::", 80)]).unwrap();
        let error = ports.open(&id("a"), &addresses()[..1]).unwrap_err().to_string();
        assert_eq!(error, "host port [::]:80/tcp is of a family of which the pod has no address");
    }

    #[test]
    fn the_table_has_an_element_for_each_family() {
        let mappings = vec![mapping("", 8080), mapping("127.0.0.1", 81)];
        let claim = Claim { holder: String::new(), mappings, addresses: addresses() };
        let text = table(&claim.elements(), &["10.244.0.0/16".parse().unwrap()]);
        for part in [
            "map any4 {\n\t\ttype inet_proto . inet_service : ipv4_addr . inet_service\n\t\telements = { tcp . 8080 : 10.244.1.7 . 80 }",
            "elements = { tcp . 8080 : fd00::7 . 80 }",
            "elements = { 127.0.0.1 . tcp . 81 : 10.244.1.7 . 80 }",
            "elements = { 10.244.0.0/16 }",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert_eq!(text.matches("elements = ").count(), 4, "{text}");
    }

    #[test]
    fn what_nft_shows_is_read_back() {
        let shown = json!({"nftables": [
            {"metainfo": {"version": "1"}},
            {"table": {"name": TABLE, "handle": 1}},
            {"map": {"name": "any4", "handle": 6, "elem": [
                [{"concat": ["tcp", 8080]}, {"concat": ["10.244.1.7", 80]}],
            ]}},
            {"map": {"name": "bound6", "handle": 7, "elem": [
                [{"concat": ["fd00::1", "udp", 53]}, {"concat": ["fd00::7", 5353]}],
            ]}},
            {"set": {"name": "inside4", "elem": ["172.18.1.1", {"prefix": {"addr": "10.244.0.0", "len": 16}}]}},
            {"set": {"name": "inside6"}},
        ]});
        let (fixed, elements) = split(&shown);
        let inside: Vec<String> = inside_of(&shown).iter().map(ToString::to_string).collect();
        assert_eq!(inside, ["172.18.1.1/32", "10.244.0.0/16"]);
        assert_eq!(fixed[0], json!({"table": {"name": TABLE}}));
        assert_eq!(fixed[1], json!({"map": {"name": "any4"}}));
        let shown: Vec<String> =
            elements.iter().map(|e| format!("{} to {}", e.mapping(), e.value())).collect();
        assert_eq!(shown, ["0.0.0.0:8080/tcp to 10.244.1.7 . 80", "[fd00::1]:53/udp to fd00::7 . 5353"]);
    }
}
