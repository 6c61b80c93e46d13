//! `podway policy learn`: least-privilege policies from the flows that were seen.

mod propose;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use podway_agent::Instance;
use podway_agent::flows::socket;
use podway_flows::flow::EventName;
use podway_flows::{Answer, End, Flow, Query, Verdict};
use podway_lab::spec::LabName;

use super::ROWS;
use crate::{OK, output};
use propose::{Party, Proposal, SYSTEM_NAMESPACE, Seen, propose, yaml};

/// Most different connections that are kept while flows are read.
const MAX_CONNECTIONS: usize = 1_000_000;
/// Longest line of input, in bytes.
const MAX_LINE: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(crate) struct Learn {
    /// Flows as `podway flows --all -o json` prints them; - is standard input
    #[arg(value_name = "FILE", required_unless_present = "lab", conflicts_with = "lab")]
    flows: Vec<PathBuf>,
    /// The flows that the agents of this lab remember
    #[arg(long, value_name = "NAME")]
    lab: Option<LabName>,
    /// Propose for the pods of this namespace; may be given several times [default: all but kube-system]
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Vec<String>,
}

/// What was read.
#[derive(Debug, Default)]
struct Heard {
    connections: BTreeMap<(IpAddr, IpAddr, u8, u16), Seen>,
    /// Flows that began while they were seen.
    starts: u64,
    /// Packets that were dropped.
    drops: u64,
    /// Connections that were older than their first event: who opened them is not known.
    without_beginning: u64,
    /// Events that were lost before anybody could read them.
    lost: u64,
}

pub(super) fn run(args: &Learn) -> anyhow::Result<u8> {
    let mut heard = Heard::default();
    match &args.lab {
        Some(lab) => heard.read_lab(lab)?,
        None => {
            for path in &args.flows {
                let name = path.display().to_string();
                if name == "-" {
                    heard.read(std::io::stdin().lock(), "standard input")?;
                } else {
                    heard.read(
                        BufReader::new(File::open(path).with_context(|| format!("open {name}"))?),
                        &name,
                    )?;
                }
            }
        }
    }
    let seen: Vec<Seen> = heard.connections.values().cloned().collect();
    let proposal = propose(&seen, &args.namespace);
    tell(&heard, &proposal, args);
    for policy in &proposal.policies {
        output::print(&format!("---\n{}", yaml(policy)));
    }
    Ok(OK)
}

impl Heard {
    fn read_lab(&mut self, lab: &LabName) -> anyhow::Result<()> {
        // Says what to do when there is no such lab, or nobody runs it.
        podway_lab::client::Client::of_lab(lab)?;
        for node in crate::flows::nodes(lab)? {
            let instance = Instance::parse(&format!("{lab}/{node}"))?;
            let mut result = Ok(());
            socket::ask(&instance.run_dir(), &Query::default(), |answer| {
                result = self.take(answer);
                result.is_ok()
            })
            .with_context(|| format!("flows of instance {instance}"))?;
            result?;
        }
        Ok(())
    }

    fn read(&mut self, mut input: impl BufRead, name: &str) -> anyhow::Result<()> {
        let mut line = Vec::new();
        for number in 1_u64.. {
            line.clear();
            let read = std::io::Read::take(&mut input, MAX_LINE).read_until(b'\n', &mut line);
            if read.with_context(|| format!("read {name}"))? == 0 {
                return Ok(());
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let answer: Answer = serde_json::from_slice(&line).with_context(|| {
                format!("{name}, line {number}: not a flow as podway flows -o json prints it")
            })?;
            self.take(answer).with_context(|| format!("{name}, line {number}"))?;
        }
        Ok(())
    }

    fn take(&mut self, answer: Answer) -> anyhow::Result<()> {
        let flow = match answer {
            Answer::Flow(flow) => flow,
            Answer::Lost(loss) => {
                self.lost += loss.events;
                return Ok(());
            }
            Answer::Error(error) => bail!("the agent says: {error}"),
            Answer::Done(_) => return Ok(()),
        };
        match (flow.event, flow.verdict) {
            (EventName::Start, Verdict::Forwarded) => {}
            (EventName::Drop, _) | (_, Verdict::Dropped) => {
                self.drops += flow.packets.max(1);
                return Ok(());
            }
            (EventName::End, _) => return Ok(()),
        }
        let is_syn =
            |flags: &String| flags.split(',').any(|f| f == "SYN") && !flags.split(',').any(|f| f == "ACK");
        if flow.protocol.as_deref() == Some("TCP") && !flow.tcp_flags.as_ref().is_some_and(is_syn) {
            self.without_beginning += 1;
            return Ok(());
        }
        self.starts += 1;
        if let Some(seen) = seen(&flow) {
            let key = (seen.source.ip(), seen.target.ip(), seen.protocol, seen.port);
            self.connections.insert(key, seen);
            if self.connections.len() > MAX_CONNECTIONS {
                bail!(
                    "more than {MAX_CONNECTIONS} different connections; choose fewer flows, by time or by namespace"
                );
            }
        }
        Ok(())
    }
}

/// The connection that a flow is of; nothing when its packet could not be read.
fn seen(flow: &Flow) -> Option<Seen> {
    let protocol = match flow.protocol.as_deref()? {
        "TCP" => 6,
        "UDP" => 17,
        "SCTP" => 132,
        "ICMP" => 1,
        "ICMPv6" => 58,
        other => other.parse().ok()?,
    };
    // Where a node sends in a client's place, the client is who policies judge.
    let source = flow.client.as_ref().or(flow.source.as_ref())?;
    let target = flow.destination.as_ref()?;
    let has_ports = matches!(protocol, 6 | 17 | 132);
    Some(Seen {
        source: party(source)?,
        target: party(target)?,
        protocol,
        port: if has_ports { target.port? } else { 0 },
    })
}

fn party(end: &End) -> Option<Party> {
    let ip = end.ip?;
    Some(match (&end.pod, &end.node) {
        (Some(pod), _) => Party::Pod {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            labels: pod.labels.clone(),
            node: pod.node.clone(),
            ip,
        },
        (None, Some(node)) => Party::Node { name: node.clone(), ip },
        (None, None) => Party::Address(ip),
    })
}

/// What the proposal is made of, and what it does not say.
fn tell(heard: &Heard, proposal: &Proposal, args: &Learn) {
    let say = |text: String| output::error(&text);
    say(format!(
        "{} flows of {} different connections: {} policies, which allow {} kinds of connections",
        heard.starts,
        heard.connections.len(),
        proposal.policies.len(),
        proposal.connections
    ));
    if proposal.policies.is_empty() {
        say("nothing is proposed: no flow has a pod of the namespaces in question at an end".to_owned());
    } else if args.namespace.is_empty() {
        say(format!(
            "note: nothing is proposed for pods of {SYSTEM_NAMESPACE}; name it with --namespace if you want it"
        ));
    }
    for (count, text) in [
        (heard.drops, "packets were dropped; what they were for is not allowed"),
        (heard.without_beginning, "connections had begun before they were seen, and are left out"),
        (heard.lost, "events were lost, so that connections may be missing"),
    ] {
        if count > 0 {
            say(format!("note: {count} {text}"));
        }
    }
    for pod in &proposal.without_labels {
        say(format!(
            "note: {pod} has no labels that last, by which a policy could select it; nothing is proposed for it"
        ));
    }
    for (list, text) in [
        (&proposal.denied, "was seen and would be denied"),
        (&proposal.surplus, "was not seen and would be allowed"),
    ] {
        for what in list.iter().take(ROWS) {
            say(format!("{text}: {what}"));
        }
        if list.len() > ROWS {
            say(format!("and {} more: {text}", list.len() - ROWS));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOW: &str = r#"{"flow":{"time":"2026-01-01T00:00:00Z","node":"n","event":"start","verdict":"FORWARDED","direction":"ingress","hook":"to_pod","protocol":"TCP","tcpFlags":"SYN","source":{"ip":"10.0.0.1","port":4000,"pod":{"namespace":"x","name":"a","labels":{"app":"a"}}},"destination":{"ip":"10.0.0.2","port":80},"packets":1,"bytes":60,"interface":9}}"#;

    fn read(text: &str) -> anyhow::Result<Heard> {
        let mut heard = Heard::default();
        heard.read(text.as_bytes(), "f").map(|()| heard)
    }

    #[test]
    fn beginnings_count_and_nothing_else() {
        let lost =
            r#"{"lost":{"time":"2026-01-01T00:00:00Z","node":"n","events":7,"cause":"ringBufferFull"}}"#;
        let lines = [
            FLOW.to_owned(),
            FLOW.to_owned(),
            FLOW.replace("\"start\"", "\"end\""),
            FLOW.replace("\"SYN\"", "\"ACK\""),
            FLOW.replace("\"SYN\"", "\"SYN,ACK\""),
            FLOW.replace("\"start\",\"verdict\":\"FORWARDED\"", "\"drop\",\"verdict\":\"DROPPED\""),
            lost.to_owned(),
            String::new(),
        ];
        let heard = read(&lines.join("\n")).unwrap();
        assert_eq!((heard.starts, heard.drops, heard.without_beginning, heard.lost), (2, 1, 2, 7));
        let seen: Vec<&Seen> = heard.connections.values().collect();
        let [Seen { source: Party::Pod { .. }, target: Party::Address(_), protocol: 6, port: 80 }] = seen[..]
        else {
            panic!("{seen:?}")
        };
    }

    #[test]
    fn a_bad_line_is_named() {
        for (text, part) in
            [("{", "f, line 1: not a flow"), ("\n[]", "f, line 2: not a flow"), (r#"{"error":"no"}"#, "no")]
        {
            let error = format!("{:#}", read(text).unwrap_err());
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn who_asked_through_a_node_is_who_counts() {
        let client = r#""client":{"ip":"203.0.113.1","port":9},"packets""#;
        let heard = read(&FLOW.replace("\"packets\"", client)).unwrap();
        assert!(heard.connections.keys().all(|(source, ..)| source.to_string() == "203.0.113.1"));
    }
}
