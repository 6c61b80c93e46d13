//! Faults between two nodes: nothing passes, packets above a size do not, or some of them do not.
//!
//! The fabric's bridge drops the packets by rules of its own nftables table, by the ports of the two nodes, so that
//! everything of the pair is hit: tunnel, probes, and the search for neighbours. Nobody is told, as on a broken link.
//!
//! The kernel hands packets between namespaces in bundles of many segments. A rule would see the bundle, so the links
//! of the nodes concerned hand over segment by segment while a fault by size or by chance is in force.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use podway_link::Netns;
use serde::{Deserialize, Serialize};

use crate::exec;
use crate::spec::LabName;
use crate::state::{Lock, StateDir};
use crate::topology::UPLINK;

/// nftables table in the fabric's namespace.
const TABLE: &str = "podway_faults";
/// What the kernel calls no limit (`GSO_MAX_SEGS`).
const UNBUNDLED_OFF: u32 = 65_535;
/// Parts of a whole in which chance is counted.
const MILLION: u32 = 1_000_000;

/// What is wrong between two nodes, in both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// One node.
    pub a: String,
    /// The other.
    pub b: String,
    /// Nothing passes.
    pub down: bool,
    /// Larger IP packets do not pass, in bytes.
    pub mtu: Option<u32>,
    /// So many of a million packets do not pass.
    pub loss_ppm: Option<u32>,
}

impl Fault {
    fn is_none(&self) -> bool {
        !self.down && self.mtu.is_none() && self.loss_ppm.is_none()
    }

    fn is_between(&self, a: &str, b: &str) -> bool {
        (self.a == a && self.b == b) || (self.a == b && self.b == a)
    }

    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        if self.down {
            return "down".into();
        }
        let mtu = self.mtu.map(|mtu| format!("packets above {mtu} bytes are lost"));
        let loss = self.loss_ppm.map(|ppm| format!("{} % of packets are lost", f64::from(ppm) / 10_000.0));
        mtu.into_iter().chain(loss).collect::<Vec<_>>().join(", ")
    }
}

/// A share of packets from a percentage such as `5` or `0.1`, in parts of a million.
///
/// # Errors
/// When it is no number above 0 and up to 100.
pub fn percentage(text: &str) -> Result<u32, String> {
    let bad = || format!("{text:?} is no percentage above 0 and up to 100, such as 5 or 0.1");
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if part.len() > 4 || !part.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let whole: u32 = whole.parse().ok().filter(|w| *w <= 100).ok_or_else(bad)?;
    let part: u32 = format!("{part:0<4}").parse().map_err(|_| bad())?;
    let ppm = whole * 10_000 + part;
    if (1..=MILLION).contains(&ppm) { Ok(ppm) } else { Err(bad()) }
}

/// The faults of a lab.
///
/// # Errors
/// When their file is damaged.
pub fn list(lab: &LabName) -> anyhow::Result<Vec<Fault>> {
    Ok(StateDir::of(lab).faults()?.unwrap_or_default())
}

/// Puts a fault between two nodes, in place of what was wrong between them before. One with nothing in it mends the
/// link.
///
/// # Errors
/// When a node is not there, or the kernel refuses.
pub fn put(lab: &LabName, fault: Fault) -> anyhow::Result<()> {
    for node in [&fault.a, &fault.b] {
        exec::check_node(lab, node)?;
    }
    if fault.a == fault.b {
        bail!("{} has no link to itself; name two nodes", fault.a);
    }
    change(lab, |faults| {
        faults.retain(|f| !f.is_between(&fault.a, &fault.b));
        if !fault.is_none() {
            faults.push(fault);
        }
    })
}

/// Forgets the faults of a node that goes.
pub(crate) fn forget(lab: &LabName, node: &str) -> anyhow::Result<()> {
    if list(lab)?.iter().any(|f| f.a == node || f.b == node) {
        change(lab, |faults| faults.retain(|f| f.a != node && f.b != node))?;
    }
    Ok(())
}

fn change(lab: &LabName, edit: impl FnOnce(&mut Vec<Fault>)) -> anyhow::Result<()> {
    let _lock = Lock::acquire()?;
    let before = list(lab)?;
    let mut faults = before.clone();
    edit(&mut faults);
    faults.sort_by(|x, y| (&x.a, &x.b).cmp(&(&y.a, &y.b)));
    let nodes = exec::nodes(lab)?;
    for node in nodes.iter().filter(|n| takes_apart(&before, n) != takes_apart(&faults, n)) {
        let segments = if takes_apart(&faults, node) { 1 } else { UNBUNDLED_OFF };
        let arguments = ["link", "set", "dev", UPLINK, "gso_max_segs", &segments.to_string()];
        run(&Netns::open_named(&lab.node_netns(node))?, "ip", &arguments, "")
            .with_context(|| format!("link of {node}"))?;
    }
    run(&Netns::open_named(&lab.fabric_netns())?, "nft", &["-f", "-"], &rules(&faults)).context("fabric")?;
    StateDir::of(lab).write_faults(&faults)
}

/// Whether the node's packets have to come one by one.
fn takes_apart(faults: &[Fault], node: &str) -> bool {
    faults.iter().any(|f| (f.a == node || f.b == node) && (f.mtu.is_some() || f.loss_ppm.is_some()))
}

/// The whole table, which takes the place of the one before in one step.
fn rules(faults: &[Fault]) -> String {
    let mut out = format!("table bridge {TABLE}\ndelete table bridge {TABLE}\n");
    if faults.is_empty() {
        return out;
    }
    out.push_str(&format!(
        "table bridge {TABLE} {{\n\tchain forward {{\n\t\ttype filter hook forward priority 0; policy accept;\n"
    ));
    for fault in faults {
        for (from, to) in [(&fault.a, &fault.b), (&fault.b, &fault.a)] {
            let pair = format!("iifname \"{from}\" oifname \"{to}\"");
            if fault.down {
                out.push_str(&format!("\t\t{pair} counter drop\n"));
            }
            if let Some(mtu) = fault.mtu {
                out.push_str(&format!("\t\t{pair} meta length > {mtu} counter drop\n"));
            }
            if let Some(ppm) = fault.loss_ppm {
                out.push_str(&format!("\t\t{pair} numgen random mod {MILLION} < {ppm} counter drop\n"));
            }
        }
    }
    out.push_str("\t}\n}\n");
    out
}

fn run(namespace: &Netns, program: &str, arguments: &[&str], input: &str) -> anyhow::Result<()> {
    let output = namespace.run(|| {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that refuses its arguments may not read; its own words say more.
            let _ = stdin.write_all(input.as_bytes());
        }
        child.wait_with_output()
    })?;
    let output = output.with_context(|| format!("run {program}; install it with make setup"))?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(a: &str, b: &str) -> Fault {
        Fault { a: a.into(), b: b.into(), down: false, mtu: None, loss_ppm: None }
    }

    #[test]
    fn percentages() {
        for (text, want) in [
            ("5", Some(50_000)),
            ("100", Some(1_000_000)),
            ("0.1", Some(1_000)),
            ("0.0001", Some(1)),
            ("12.5", Some(125_000)),
            ("0", None),
            ("0.00001", None),
            ("100.1", None),
            ("-1", None),
            ("5%", None),
            ("", None),
            ("1.+2", None),
        ] {
            assert_eq!(percentage(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn rules_hit_both_directions_and_nobody_else() {
        assert_eq!(rules(&[]), "table bridge podway_faults\ndelete table bridge podway_faults\n");
        let text = rules(&[
            Fault { down: true, ..fault("node-1", "node-2") },
            Fault { mtu: Some(1400), loss_ppm: Some(50_000), ..fault("node-1", "node-3") },
        ]);
        for line in [
            "iifname \"node-1\" oifname \"node-2\" counter drop",
            "iifname \"node-2\" oifname \"node-1\" counter drop",
            "iifname \"node-3\" oifname \"node-1\" meta length > 1400 counter drop",
            "iifname \"node-1\" oifname \"node-3\" numgen random mod 1000000 < 50000 counter drop",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert_eq!(text.matches("drop").count(), 6, "{text}");
    }

    #[test]
    fn packets_are_taken_apart_where_they_are_looked_at_one_by_one() {
        let faults = [
            Fault { down: true, ..fault("node-1", "node-2") },
            Fault { loss_ppm: Some(1), ..fault("node-3", "node-4") },
        ];
        for (node, want) in [("node-1", false), ("node-3", true), ("node-4", true), ("node-5", false)] {
            assert_eq!(takes_apart(&faults, node), want, "{node}");
        }
        assert_eq!(
            Fault { mtu: Some(1400), loss_ppm: Some(125_000), ..fault("a", "b") }.describe(),
            "packets above 1400 bytes are lost, 12.5 % of packets are lost"
        );
        assert!(faults[0].is_between("node-2", "node-1") && !faults[0].is_between("node-1", "node-1"));
    }
}
