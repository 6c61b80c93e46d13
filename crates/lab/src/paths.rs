//! What the nodes' agents know of the paths to each other, from their metrics: it shows a fault as a cluster sees it,
//! and also one that nobody made on purpose.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use podway_link::Netns;
use serde::Serialize;

use crate::faults::Fault;
use crate::observe::NodeStatus;
use crate::spec::{AGENT_HEALTH_PORT, LabName};

/// How long an agent may take for its metrics.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most bytes of metrics taken from an agent: 200 nodes are some 200 KiB.
const PAGE_MAX: u64 = 8 << 20;

/// A path between two nodes, as the agent at its beginning sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PathStatus {
    /// Node whose agent sees it.
    pub from: String,
    /// Node at the other end.
    pub to: String,
    /// The other node does not answer.
    pub silent: bool,
    /// Largest IP packet that arrives, in bytes.
    pub mtu: Option<u32>,
    /// Largest IP packet that should arrive, in bytes.
    pub expected_mtu: Option<u32>,
    /// Smoothed time of a round trip, in seconds.
    pub rtt_seconds: Option<f64>,
    /// Probes that were answered since the agent watches the path.
    pub probes_answered: u64,
    /// Probes that were lost.
    pub probes_lost: u64,
}

impl PathStatus {
    fn is_narrow(&self) -> bool {
        self.mtu < self.expected_mtu
    }

    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut out = Vec::new();
        if self.silent {
            out.push("silent".to_owned());
        }
        if let (true, Some(mtu), Some(expected)) = (self.is_narrow(), self.mtu, self.expected_mtu) {
            out.push(format!("carries {mtu} bytes, should carry {expected}"));
        }
        if let Some(rtt) = self.rtt_seconds {
            out.push(format!("round trip {:.1} ms", rtt * 1_000.0));
        }
        let all = self.probes_answered + self.probes_lost;
        out.push(format!("{} of {all} probes lost so far", self.probes_lost));
        out.join(", ")
    }
}

/// Paths that are worth a look: between nodes with a fault, and every other that is not as it should be. Paths from and
/// to stopped nodes are left out, and so are those of an agent that does not answer.
#[must_use]
pub fn notable(lab: &LabName, nodes: &[NodeStatus], faults: &[Fault]) -> Vec<PathStatus> {
    let running = || nodes.iter().filter(|n| !n.stopped);
    let seen = std::thread::scope(|scope| {
        let asked: Vec<_> = running().map(|node| scope.spawn(|| of_node(lab, &node.name))).collect();
        // A panic there is a defect; what the others say is shown all the same.
        asked.into_iter().filter_map(|a| a.join().ok()?.ok()).flatten().collect::<Vec<_>>()
    });
    let place = |name: &str| nodes.iter().position(|n| n.name == name);
    let mut paths: Vec<PathStatus> = seen
        .into_iter()
        .filter(|p| running().any(|n| n.name == p.to))
        .filter(|p| p.silent || p.is_narrow() || faults.iter().any(|f| f.is_between(&p.from, &p.to)))
        .collect();
    paths.sort_by_key(|p| (place(&p.from), place(&p.to)));
    paths
}

fn of_node(lab: &LabName, node: &str) -> anyhow::Result<Vec<PathStatus>> {
    let page = Netns::open_named(&lab.node_netns(node))?.run(metrics)??;
    Ok(read(node, &page))
}

/// The agent's metrics, in the calling thread's namespace.
fn metrics() -> io::Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, AGENT_HEALTH_PORT));
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
    let mut page = String::new();
    stream.take(PAGE_MAX).read_to_string(&mut page)?;
    Ok(page)
}

/// Reads the lines about paths. Others, the HTTP header and its chunks among them, are not of that form.
fn read(from: &str, page: &str) -> Vec<PathStatus> {
    let mut paths = BTreeMap::<String, PathStatus>::new();
    for line in page.lines() {
        let Some((metric, labels, value)) = row(line) else { continue };
        let Some(to) = label(labels, "node") else { continue };
        let path = paths.entry(to.to_owned()).or_insert_with(|| PathStatus {
            from: from.to_owned(),
            to: to.to_owned(),
            ..PathStatus::default()
        });
        // Whole numbers, and small ones.
        let whole = value as u64;
        match (metric, label(labels, "result")) {
            ("silent", _) => path.silent = whole == 1,
            ("mtu_bytes", _) => path.mtu = u32::try_from(whole).ok(),
            ("mtu_expected_bytes", _) => path.expected_mtu = u32::try_from(whole).ok(),
            ("rtt_seconds", _) => path.rtt_seconds = Some(value),
            ("probes_total", Some("answered")) => path.probes_answered = whole,
            ("probes_total", Some("lost")) => path.probes_lost = whole,
            _ => {}
        }
    }
    paths.into_values().collect()
}

/// `podway_path_NAME{LABELS} VALUE`.
fn row(line: &str) -> Option<(&str, &str, f64)> {
    let (name, rest) = line.strip_prefix("podway_path_")?.split_once('{')?;
    let (labels, value) = rest.rsplit_once("} ")?;
    Some((name, labels, value.parse().ok()?))
}

fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    // Names of nodes and results hold neither commas nor quotation marks.
    labels.split(',').find_map(|l| l.strip_prefix(name)?.strip_prefix("=\"")?.strip_suffix('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "HTTP/1.1 200 OK\r\n\r\n\
        # HELP podway_path_silent 1 while another node does not answer path probes.\n\
        # TYPE podway_path_silent gauge\n\
        podway_path_silent{node=\"node-2\"} 0\n\
        podway_path_silent{node=\"node-3\"} 1\n\
        podway_path_mtu_bytes{node=\"node-2\"} 1400\n\
        podway_path_mtu_expected_bytes{node=\"node-2\"} 1500\n\
        podway_path_probes_total{node=\"node-2\",result=\"answered\"} 16\n\
        podway_path_probes_total{node=\"node-2\",result=\"lost\"} 12\n\
        podway_path_probes_total{node=\"node-3\",result=\"lost\"} 5\n\
        podway_path_rtt_seconds{node=\"node-2\"} 0.0379\n\
        podway_path_silent{node=\"node-4\"} x\n\
        podway_path_silent\n\
        podway_pods 3\n";

    #[test]
    fn metrics_tell_of_each_path() {
        let paths = read("node-1", PAGE);
        let texts: Vec<_> = paths.iter().map(|p| (&*p.from, &*p.to, p.describe())).collect();
        let narrow = "carries 1400 bytes, should carry 1500, round trip 37.9 ms, 12 of 28 probes lost so far";
        assert_eq!(
            texts,
            [
                ("node-1", "node-2", narrow.to_owned()),
                ("node-1", "node-3", "silent, 5 of 5 probes lost so far".to_owned()),
            ]
        );
    }

    #[test]
    fn an_agent_that_is_not_there_costs_its_own_paths() {
        let lab = "no_such_lab".parse().expect("name");
        assert!(of_node(&lab, "node-1").is_err());
        assert_eq!(notable(&lab, &[], &[]), []);
    }
}
