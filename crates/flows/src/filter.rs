//! Which flows are meant. Several values of one option are alternatives; different options must all hold.

use std::net::IpAddr;

use ipnet::IpNet;
use podway_abi::Reason;
use podway_abi::events::event_flags;
use podway_model::Selector;
use podway_model::selector::{Operator, Requirement};
use serde::{Deserialize, Serialize};

use crate::flow::{EventName, Verdict};
use crate::identity::{Identity, Kind};
use crate::names::ip;
use crate::record::Record;

/// Why a filter cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{option} {value:?}: {cause}")]
pub struct BadFilter {
    /// The option at fault.
    pub option: &'static str,
    /// What was given.
    pub value: String,
    /// What is wrong and what would be right.
    pub cause: String,
}

/// What was asked for, as text: the options of `podway flows`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct FilterSpec {
    /// `forwarded`, `dropped`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub verdict: Vec<String>,
    /// `start`, `end`, `drop`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub event: Vec<String>,
    /// `[NAMESPACE/]PREFIX` of the pod at either end.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pod: Vec<String>,
    /// Of the pod that opened the flow.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from_pod: Vec<String>,
    /// Of the other.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to_pod: Vec<String>,
    /// Namespace of the pod at either end, or of the service.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespace: Vec<String>,
    /// Label selector for the pod at either end.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub label: Vec<String>,
    /// `[NAMESPACE/]PREFIX` of the service that was asked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service: Vec<String>,
    /// Port at either end, or of the service.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub port: Vec<String>,
    /// Name or number.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub protocol: Vec<String>,
    /// Address or range at either end, or of the service.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ip: Vec<String>,
    /// Name of a reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reason: Vec<String>,
}

/// What was asked for, understood.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    verdict: Vec<Verdict>,
    event: Vec<EventName>,
    pod: Vec<PodPrefix>,
    from_pod: Vec<PodPrefix>,
    to_pod: Vec<PodPrefix>,
    namespace: Vec<String>,
    label: Vec<Selector>,
    service: Vec<PodPrefix>,
    port: Vec<u16>,
    protocol: Vec<u8>,
    ip: Vec<IpNet>,
    reason: Vec<Reason>,
}

/// A namespace, and how the name begins.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PodPrefix {
    namespace: String,
    prefix: String,
}

impl PodPrefix {
    fn matches(&self, namespace: &str, name: &str) -> bool {
        namespace == self.namespace && name.starts_with(&self.prefix)
    }
}

impl Filter {
    /// Understands what was asked for.
    ///
    /// # Errors
    /// The first value that makes no sense.
    pub fn parse(spec: &FilterSpec) -> Result<Self, BadFilter> {
        Ok(Self {
            verdict: all("verdict", &spec.verdict, verdict)?,
            event: all("event", &spec.event, event)?,
            pod: all("pod", &spec.pod, pod)?,
            from_pod: all("from-pod", &spec.from_pod, pod)?,
            to_pod: all("to-pod", &spec.to_pod, pod)?,
            namespace: all("namespace", &spec.namespace, namespace)?,
            label: all("label", &spec.label, label)?,
            service: all("service", &spec.service, pod)?,
            port: all("port", &spec.port, port)?,
            protocol: all("protocol", &spec.protocol, protocol)?.into_iter().flatten().collect(),
            ip: all("ip", &spec.ip, range)?,
            reason: all("reason", &spec.reason, reason)?,
        })
    }

    /// Whether a record is meant.
    #[must_use]
    pub fn matches(&self, record: &Record) -> bool {
        let event = &record.event;
        any(&self.verdict, |v| *v == record.verdict())
            && any(&self.event, |e| *e == record.name())
            && any(&self.reason, |r| record.reason() == Some(*r))
            && any(&self.protocol, |p| record.has(event_flags::PARSED) && *p == event.proto)
            && any(&self.from_pod, |p| opener(record).is_some_and(|i| is_pod(p, i)))
            && any(&self.to_pod, |p| record.destination.as_deref().is_some_and(|i| is_pod(p, i)))
            && any(&self.pod, |p| pods(record).any(|i| is_pod(p, i)))
            && any(&self.label, |selector| pods(record).any(|i| selector.matches(&i.labels)))
            && any(&self.namespace, |n| {
                pods(record).any(|i| i.namespace == *n)
                    || record.service.as_ref().is_some_and(|s| s.namespace == *n)
            })
            && any(&self.service, |p| {
                record.service.as_ref().is_some_and(|s| p.matches(&s.namespace, &s.name))
            })
            && (self.port.is_empty() || self.has_port(record))
            && (self.ip.is_empty() || self.has_address(record))
    }

    fn has_port(&self, record: &Record) -> bool {
        let event = &record.event;
        // An echo's identifier is no port.
        if !record.has(event_flags::PARSED) || !matches!(event.proto, 6 | 17 | 132) {
            return false;
        }
        let asked = record.has(event_flags::SERVICE).then_some(event.asked_port);
        [Some(event.src_port), Some(event.dst_port), asked]
            .into_iter()
            .flatten()
            .any(|p| self.port.contains(&p))
    }

    fn has_address(&self, record: &Record) -> bool {
        let event = &record.event;
        let asked = record.has(event_flags::SERVICE).then(|| ip(&event.asked));
        let client = record.has(event_flags::MASQUERADED).then(|| ip(&event.client));
        let ends = record.has(event_flags::PARSED).then(|| [ip(&event.src), ip(&event.dst)]);
        let mut all = ends.into_iter().flatten().chain(asked).chain(client);
        all.any(|address| self.ip.iter().any(|range| range.contains(&address)))
    }
}

/// Whether there is nothing to choose from, or something fits.
fn any<T>(wanted: &[T], fits: impl FnMut(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(fits)
}

/// Who opened the flow: behind a masqueraded source, the client.
fn opener(record: &Record) -> Option<&Identity> {
    record.client.as_deref().or(record.source.as_deref())
}

/// The pods at the ends.
fn pods(record: &Record) -> impl Iterator<Item = &Identity> {
    [&record.source, &record.destination, &record.client]
        .into_iter()
        .filter_map(|i| i.as_deref())
        .filter(|i| i.kind == Kind::Pod)
}

fn is_pod(wanted: &PodPrefix, identity: &Identity) -> bool {
    identity.kind == Kind::Pod && wanted.matches(&identity.namespace, &identity.name)
}

fn all<T>(
    option: &'static str,
    values: &[String],
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, BadFilter> {
    let one =
        |value: &String| parse(value).map_err(|cause| BadFilter { option, value: value.clone(), cause });
    values.iter().map(one).collect()
}

fn verdict(text: &str) -> Result<Verdict, String> {
    match text.to_ascii_lowercase().as_str() {
        "forwarded" => Ok(Verdict::Forwarded),
        "dropped" => Ok(Verdict::Dropped),
        _ => Err("is no verdict; there are forwarded and dropped".to_owned()),
    }
}

fn event(text: &str) -> Result<EventName, String> {
    match text.to_ascii_lowercase().as_str() {
        "start" => Ok(EventName::Start),
        "end" => Ok(EventName::End),
        "drop" => Ok(EventName::Drop),
        _ => Err("is no event; there are start, end and drop".to_owned()),
    }
}

/// As in other tools for flows: without a namespace it is `default`, and a name stands for all that begin like it.
fn pod(text: &str) -> Result<PodPrefix, String> {
    let (namespace, prefix) = text.split_once('/').unwrap_or(("default", text));
    if prefix.contains('/') {
        return Err("has more than one /; write [NAMESPACE/]NAME".to_owned());
    }
    if namespace.is_empty() || (prefix.is_empty() && !text.contains('/')) {
        return Err("names nothing; write [NAMESPACE/]NAME, or NAMESPACE/ for all of a namespace".to_owned());
    }
    Ok(PodPrefix { namespace: namespace.to_owned(), prefix: prefix.to_owned() })
}

fn namespace(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if text.is_empty() || text.len() > 63 || !text.chars().all(fits) {
        return Err("is no name of a namespace (lower-case letters, digits and -)".to_owned());
    }
    Ok(text.to_owned())
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| "is no port; write a number from 0 to 65535".to_owned())
}

fn protocol(text: &str) -> Result<Vec<u8>, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "tcp" => vec![6],
        "udp" => vec![17],
        "sctp" => vec![132],
        // Whoever asks for ICMP as a rule means both.
        "icmp" => vec![1, 58],
        "icmpv4" => vec![1],
        "icmpv6" => vec![58],
        "arp" => vec![0],
        number => vec![number.parse().map_err(|_| {
            "is no protocol; there are tcp, udp, sctp, icmp, icmpv4, icmpv6, arp and numbers to 255"
                .to_owned()
        })?],
    })
}

fn range(text: &str) -> Result<IpNet, String> {
    text.parse::<IpAddr>()
        .map(IpNet::from)
        .or_else(|_| text.parse::<IpNet>())
        .map_err(|_| "is neither an IP address nor a range such as 10.0.0.0/8".to_owned())
}

fn reason(text: &str) -> Result<Reason, String> {
    Reason::ALL.iter().copied().find(|r| r.name() == text.to_ascii_lowercase()).ok_or_else(|| {
        let drops: Vec<&str> = Reason::ALL.iter().filter(|r| r.is_drop()).map(|r| r.name()).collect();
        format!("is no reason; reasons of drops are {}", drops.join(", "))
    })
}

/// A label selector as kubectl takes it: `a=b,c!=d,e in (f,g),h,!i`.
fn label(text: &str) -> Result<Selector, String> {
    let parts = split_outside(text).ok_or("has a ( without its ), or the other way round")?;
    let requirements = parts.iter().map(|part| requirement(part.trim())).collect::<Result<Vec<_>, _>>()?;
    Ok(Selector::new(requirements))
}

/// At commas that are not within parentheses.
fn split_outside(text: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_u32);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.checked_sub(1)?,
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (depth == 0).then_some(parts)
}

fn requirement(part: &str) -> Result<Requirement, String> {
    let made = |key: &str, operator| {
        let key = key.trim();
        if key.is_empty() || key.contains(|c: char| c.is_whitespace() || "=!(),".contains(c)) {
            return Err(format!(
                "{key:?} is no label; write KEY=VALUE, KEY!=VALUE, KEY in (A,B), KEY or !KEY"
            ));
        }
        Ok(Requirement { key: key.to_owned(), operator })
    };
    let one = |value: &str| vec![value.trim().to_owned()];
    let set = |list: &str| -> Result<Vec<String>, String> {
        let inner = list.trim().strip_prefix('(').and_then(|l| l.strip_suffix(')'));
        let inner = inner.ok_or_else(|| format!("{list:?} is no list; write (A,B)"))?;
        Ok(inner.split(',').map(|v| v.trim().to_owned()).collect())
    };
    if let Some((key, list)) = part.split_once(" notin ") {
        made(key, Operator::NotIn(set(list)?))
    } else if let Some((key, list)) = part.split_once(" in ") {
        made(key, Operator::In(set(list)?))
    } else if let Some((key, value)) = part.split_once("!=") {
        made(key, Operator::NotIn(one(value)))
    } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        made(key, Operator::In(one(value)))
    } else if let Some(key) = part.strip_prefix('!') {
        made(key, Operator::DoesNotExist)
    } else {
        made(part, Operator::Exists)
    }
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
