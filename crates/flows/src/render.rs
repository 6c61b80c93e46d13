//! Flows as lines for people.

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::flow::{End, Ended, EventName, Flow, Loss, LossCause, Verdict};

/// Columns of [`row`].
pub const HEADER: [&str; 8] =
    ["TIME", "NODE", "VERDICT", "EVENT", "PROTOCOL", "SOURCE", "DESTINATION", "DETAILS"];

/// One line: who, to whom, what became of it and why.
#[must_use]
pub fn compact(flow: &Flow) -> String {
    let mut line = format!("{} {}: ", short_time(&flow.time), flow.node);
    let _ = write!(line, "{} -> {}", source(flow), end(flow.destination.as_ref()));
    let _ = write!(line, " {}", flow.protocol.as_deref().unwrap_or("unread packet"));
    let _ = write!(line, " {} {}", verdict(flow.verdict), event(flow.event));
    let details = details(flow);
    if !details.is_empty() {
        let _ = write!(line, " ({details})");
    }
    line
}

/// The same as columns; see [`HEADER`].
#[must_use]
pub fn row(flow: &Flow) -> Vec<String> {
    vec![
        short_time(&flow.time).to_owned(),
        flow.node.clone(),
        verdict(flow.verdict).to_owned(),
        event(flow.event).to_owned(),
        flow.protocol.clone().unwrap_or_else(|| "-".to_owned()),
        source(flow),
        end(flow.destination.as_ref()),
        details(flow),
    ]
}

/// A line about events that nobody will see.
#[must_use]
pub fn loss(loss: &Loss) -> String {
    let why = match loss.cause {
        LossCause::RingBufferFull => "the agent read too slowly, and the ring buffer was full",
        LossCause::ReaderTooSlow => "this reader is slower than the flows; ask for less",
    };
    format!("{} {}: {} events lost: {why}", short_time(&loss.time), loss.node, loss.events)
}

/// The name of a verdict, as in JSON.
#[must_use]
pub const fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Forwarded => "FORWARDED",
        Verdict::Dropped => "DROPPED",
    }
}

const fn event(event: EventName) -> &'static str {
    match event {
        EventName::Start => "start",
        EventName::End => "end",
        EventName::Drop => "drop",
    }
}

/// To the millisecond.
fn short_time(time: &str) -> &str {
    time.get(..23).unwrap_or(time)
}

fn source(flow: &Flow) -> String {
    match &flow.client {
        None => end(flow.source.as_ref()),
        Some(client) => format!("{} (as {})", end(Some(client)), end(flow.source.as_ref())),
    }
}

/// `namespace/pod:port`, or the address.
fn end(end: Option<&End>) -> String {
    let Some(end) = end else { return "?".to_owned() };
    let port = end.port.map(|p| format!(":{p}")).unwrap_or_default();
    match (&end.pod, &end.node, end.ip) {
        (Some(pod), ..) => format!("{}/{}{port}", pod.namespace, pod.name),
        (None, Some(node), _) => format!("node {node}{port}"),
        (None, None, Some(IpAddr::V6(ip))) if !port.is_empty() => format!("[{ip}]{port}"),
        (None, None, Some(ip)) => format!("{ip}{port}"),
        (None, None, None) => "?".to_owned(),
    }
}

fn details(flow: &Flow) -> String {
    let mut parts = Vec::new();
    if let Some(reason) = &flow.reason {
        parts.push(reason.clone());
    }
    if let Some(service) = &flow.service {
        let place = std::net::SocketAddr::new(service.ip, service.port);
        parts.push(match (&service.namespace, &service.name) {
            (Some(namespace), Some(name)) => format!("service {namespace}/{name} at {place}"),
            _ => format!("service at {place}"),
        });
    }
    // Who is believed to have sent it, and who it says it is.
    if let (EventName::Drop, Some(End { pod: Some(_), ip: Some(ip), .. })) = (flow.event, &flow.source) {
        parts.push(format!("from {ip}"));
    }
    if let (EventName::Start | EventName::Drop, Some(flags)) = (flow.event, &flow.tcp_flags) {
        parts.push(flags.clone());
    }
    match flow.event {
        EventName::End => {
            let how = match flow.ended {
                Some(Ended::Reset) => "reset",
                Some(Ended::Expired) => "expired",
                Some(Ended::Closed) | None => "closed",
            };
            let (packets, bytes) = (flow.reply_packets.unwrap_or(0), flow.reply_bytes.unwrap_or(0));
            parts.push(format!(
                "{how} after {}, {} packets {} bytes there, {packets} packets {bytes} bytes back",
                seconds(flow.duration_ms.unwrap_or(0)),
                flow.packets,
                flow.bytes
            ));
        }
        EventName::Drop if flow.packets > 1 => parts.push(format!("{} packets", flow.packets)),
        EventName::Drop | EventName::Start => {}
    }
    parts.join(", ")
}

fn seconds(milliseconds: u64) -> String {
    format!("{}.{:03}s", milliseconds / 1000, milliseconds % 1000)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn flow(value: &serde_json::Value) -> Flow {
        let mut whole = json!({"time": "2026-11-23T10:00:00.123456789Z", "node": "n1", "event": "start",
            "verdict": "FORWARDED", "reason": "delivered", "direction": "egress", "hook": "from_pod",
            "protocol": "TCP", "packets": 1, "bytes": 60, "interface": 7,
            "source": {"ip": "10.0.0.1", "port": 40000, "pod": {"namespace": "x", "name": "a"}},
            "destination": {"ip": "10.0.0.2", "port": 80, "pod": {"namespace": "x", "name": "b"}}});
        for (key, value) in value.as_object().unwrap() {
            whole[key] = value.clone();
        }
        serde_json::from_value(whole).unwrap()
    }

    #[test]
    fn lines_say_who_what_and_why() {
        let head = "2026-11-23T10:00:00.123 n1: ";
        for (value, want) in [
            (json!({"tcpFlags": "SYN"}), "x/a:40000 -> x/b:80 TCP FORWARDED start (delivered, SYN)"),
            (
                json!({"service": {"namespace": "x", "name": "web", "ip": "10.96.0.1", "port": 80}}),
                "x/a:40000 -> x/b:80 TCP FORWARDED start (delivered, service x/web at 10.96.0.1:80)",
            ),
            (
                json!({"service": {"ip": "fd00::1", "port": 80}, "client": {"ip": "192.0.2.1", "port": 9},
                    "source": {"ip": "172.18.1.1", "port": 10240, "node": "n1"}}),
                "192.0.2.1:9 (as node n1:10240) -> x/b:80 TCP FORWARDED start (delivered, service at [fd00::1]:80)",
            ),
            (
                json!({"event": "end", "reason": null, "ended": "closed", "durationMs": 1234, "packets": 5,
                    "bytes": 500, "replyPackets": 4, "replyBytes": 400, "tcpFlags": "FIN,ACK"}),
                "x/a:40000 -> x/b:80 TCP FORWARDED end \
                 (closed after 1.234s, 5 packets 500 bytes there, 4 packets 400 bytes back)",
            ),
            (
                json!({"event": "drop", "verdict": "DROPPED", "reason": "spoofed_address", "packets": 3,
                    "destination": {"ip": "fd00::2", "port": 80}}),
                "x/a:40000 -> [fd00::2]:80 TCP DROPPED drop (spoofed_address, from 10.0.0.1, 3 packets)",
            ),
            (
                json!({"event": "drop", "verdict": "DROPPED", "reason": "malformed", "protocol": null,
                    "source": {"pod": {"namespace": "x", "name": "a"}}, "destination": null}),
                "x/a -> ? unread packet DROPPED drop (malformed)",
            ),
        ] {
            let flow = flow(&value);
            assert_eq!(compact(&flow), format!("{head}{want}"));
            assert_eq!(row(&flow).len(), HEADER.len());
        }
    }

    #[test]
    fn losses_say_where() {
        let lost = Loss {
            time: "2026-11-23T10:00:00.123456789Z".into(),
            node: "n1".into(),
            events: 7,
            cause: LossCause::ReaderTooSlow,
        };
        assert!(loss(&lost).contains("n1: 7 events lost: this reader is slower"));
    }
}
