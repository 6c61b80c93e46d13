//! A record as it is shown: the JSON of `podway flows -o json`, a line for each.
//!
//! Field names are part of the interface: they may be added to, not renamed.

use std::net::IpAddr;

use podway_abi::Addr;
use podway_abi::events::event_flags;
use podway_model::Labels;
use serde::{Deserialize, Serialize};

use crate::identity::{Identity, Kind};
use crate::names::{UnixNanos, ip};
use crate::record::Record;

/// What became of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// Let through.
    Forwarded,
    /// Dropped, or refused with an answer.
    Dropped,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventName {
    /// A flow began.
    Start,
    /// A flow ended.
    End,
    /// A packet was dropped.
    Drop,
}

/// Seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Into a pod of the node.
    Ingress,
    /// Out of a pod of the node, or out of the node.
    Egress,
}

/// How a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// Both sides sent FIN.
    Closed,
    /// A side sent RST.
    Reset,
    /// No packet came for as long as the flow is remembered.
    Expired,
}

/// One event of a flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// When, RFC 3339 in UTC with nanoseconds: sorts as text.
    pub time: String,
    /// Node that saw it.
    pub node: String,
    /// What happened.
    pub event: EventName,
    /// What became of the packet.
    pub verdict: Verdict,
    /// Why: a reason of the datapath, as in metrics. Ends have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Into or out of the pod.
    pub direction: Direction,
    /// Program that told it.
    pub hook: String,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6`, `ARP` or the number; nothing when the packet could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// TCP flags of the packet, such as `SYN,ACK`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_flags: Option<String>,
    /// Who opened the flow, or sent the packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<End>,
    /// The other end; behind a service, the endpoint that was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<End>,
    /// What was asked, when that is a service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceEnd>,
    /// Who asked, where the source is the node in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<End>,
    /// Packets from the source; of drops, all that were dropped since the last event for the same flow and reason.
    pub packets: u64,
    /// Bytes from the network layer up, likewise.
    pub bytes: u64,
    /// Of ends: packets that came back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_packets: Option<u64>,
    /// Of ends: bytes that came back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_bytes: Option<u64>,
    /// Of ends: how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// Of ends: milliseconds from the first packet to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// Index of the interface that the packet came in on.
    pub interface: u32,
    /// Of drops: link-layer sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_mac: Option<String>,
}

/// One end of a flow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct End {
    /// Address; nothing when the packet could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Port; of an ICMP echo its identifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The pod that has the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodEnd>,
    /// The node that has the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// A pod at one end of a flow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodEnd {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Its node, as far as known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
}

/// A service that was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceEnd {
    /// Namespace; nothing when only the address is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Name of its port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_name: Option<String>,
    /// Address that was asked.
    pub ip: IpAddr,
    /// Port that was asked.
    pub port: u16,
}

/// Events that nobody will see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Loss {
    /// When that was noticed, as in [`Flow::time`].
    pub time: String,
    /// Node.
    pub node: String,
    /// How many.
    pub events: u64,
    /// Where.
    pub cause: LossCause,
}

/// Where events were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LossCause {
    /// The ring buffer between kernel and agent was full.
    RingBufferFull,
    /// The reader was slower than the agent's history is long.
    ReaderTooSlow,
}

impl Flow {
    /// A record of a node, to be shown.
    #[must_use]
    pub fn of(record: &Record, node: &str) -> Self {
        let event = &record.event;
        let parsed = record.has(event_flags::PARSED);
        let is_end = record.name() == EventName::End;
        let of_end = |n: u64| is_end.then_some(n);
        let masqueraded = record.has(event_flags::MASQUERADED);
        let with_ports = has_ports(event.proto);
        let end = |address: &Addr, port: u16, identity: Option<&Identity>| {
            let mut end = End { ip: parsed.then(|| ip(address)), ..End::default() };
            end.port = (parsed && with_ports).then_some(port);
            match identity {
                Some(i) if i.kind == Kind::Node => end.node = Some(i.name.clone()),
                Some(i) => {
                    end.pod = Some(PodEnd {
                        namespace: i.namespace.clone(),
                        name: i.name.clone(),
                        labels: i.labels.clone(),
                        node: i.node.clone(),
                    });
                }
                None => {}
            }
            (end != End::default()).then_some(end)
        };
        Self {
            time: rfc3339(record.time),
            node: node.to_owned(),
            event: record.name(),
            verdict: record.verdict(),
            reason: record.reason().map(|r| r.name().to_owned()),
            direction: record.direction(),
            hook: record.hook().map_or("unknown", podway_abi::Hook::name).to_owned(),
            protocol: parsed.then(|| protocol(event.proto)),
            tcp_flags: (parsed && event.proto == 6 && event.tcp_flags != 0)
                .then(|| tcp_flags(event.tcp_flags)),
            source: end(&event.src, event.src_port, record.source.as_deref()),
            destination: end(&event.dst, event.dst_port, record.destination.as_deref()),
            service: service(record),
            client: if masqueraded {
                end(&event.client, event.client_port, record.client.as_deref())
            } else {
                None
            },
            packets: event.packets[0],
            bytes: event.bytes[0],
            reply_packets: of_end(event.packets[1]),
            reply_bytes: of_end(event.bytes[1]),
            ended: record.ended(),
            duration_ms: of_end(u64::try_from((record.time - record.began) / 1_000_000).unwrap_or(0)),
            interface: event.ifindex,
            source_mac: (record.name() == EventName::Drop && event.src_mac != [0; 6])
                .then(|| mac(event.src_mac)),
        }
    }
}

fn service(record: &Record) -> Option<ServiceEnd> {
    let event = &record.event;
    let translated = record.has(event_flags::SERVICE);
    let name = record.service.as_deref();
    if !translated && name.is_none() {
        return None;
    }
    let (address, port) =
        if translated { (&event.asked, event.asked_port) } else { (&event.dst, event.dst_port) };
    Some(ServiceEnd {
        namespace: name.map(|n| n.namespace.clone()),
        name: name.map(|n| n.name.clone()),
        port_name: name.map(|n| n.port.clone()).filter(|p| !p.is_empty()),
        ip: ip(address),
        port,
    })
}

/// The name of an IP protocol; 0 is what ARP has.
#[must_use]
pub fn protocol(number: u8) -> String {
    match number {
        0 => "ARP".to_owned(),
        1 => "ICMP".to_owned(),
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        58 => "ICMPv6".to_owned(),
        132 => "SCTP".to_owned(),
        other => other.to_string(),
    }
}

/// Whether flows of this protocol have ports, or an identifier in their place.
const fn has_ports(number: u8) -> bool {
    matches!(number, 1 | 6 | 17 | 58 | 132)
}

fn tcp_flags(bits: u8) -> String {
    let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
    let set: Vec<&str> =
        names.iter().enumerate().filter(|(i, _)| bits & (1 << i) != 0).map(|(_, n)| *n).collect();
    set.join(",")
}

fn mac(octets: [u8; 6]) -> String {
    octets.map(|o| format!("{o:02x}")).join(":")
}

/// A time as text; of a time that has none, the beginning of the epoch.
#[must_use]
pub fn rfc3339(time: UnixNanos) -> String {
    jiff::Timestamp::from_nanosecond(time.into())
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
        .strftime("%Y-%m-%dT%H:%M:%S.%9fZ")
        .to_string()
}
