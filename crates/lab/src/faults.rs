//! Faults between two nodes: nothing passes, packets above a size do not, some of them do not, or all are late.
//!
//! The fabric's bridge drops the packets by rules of its own nftables table, by the ports of the two nodes, so that
//! everything of the pair is hit: tunnel, probes, and the search for neighbours. Nobody is told, as on a broken link.
//!
//! The kernel hands packets between namespaces in bundles of many segments. A rule would see the bundle, so the links
//! of the nodes concerned hand over segment by segment while a fault by size or by chance is in force.
//!
//! What is left is delayed by a process of its own ([`crate::delay`]).

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use podway_link::Netns;
use serde::{Deserialize, Serialize};

use crate::delay::{DELAY_MAX_MICROS, PAIRS_MAX, Relay};
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
    /// The packets of each direction are so much later, in microseconds.
    pub delay_micros: Option<u32>,
}

impl Fault {
    fn is_none(&self) -> bool {
        !self.down && self.mtu.is_none() && self.loss_ppm.is_none() && self.delay_micros.is_none()
    }

    pub(crate) fn is_between(&self, a: &str, b: &str) -> bool {
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
        let delay = self
            .delay_micros
            .map(|micros| format!("packets are {} ms late in each direction", f64::from(micros) / 1_000.0));
        mtu.into_iter().chain(loss).chain(delay).collect::<Vec<_>>().join(", ")
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

/// A delay from milliseconds such as `50` or `0.5`, in microseconds. 0 means none.
///
/// # Errors
/// When it is no number from 0 to 10000.
pub fn milliseconds(text: &str) -> Result<u32, String> {
    let bad = || {
        let most = DELAY_MAX_MICROS / 1_000;
        format!("{text:?} is no number of milliseconds from 0 to {most}, such as 50 or 0.5")
    };
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || part.len() > 3 || !digits(whole) || !digits(part) {
        return Err(bad());
    }
    let whole: u32 = whole.parse().map_err(|_| bad())?;
    let part: u32 = format!("{part:0<3}").parse().map_err(|_| bad())?;
    let micros = whole.checked_mul(1_000).and_then(|w| w.checked_add(part));
    micros.filter(|micros| *micros <= DELAY_MAX_MICROS).ok_or_else(bad)
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
    .map(drop)
}

/// Forgets the faults of a node that goes.
pub(crate) fn forget(lab: &LabName, node: &str) -> anyhow::Result<()> {
    if list(lab)?.iter().any(|f| f.a == node || f.b == node) {
        change(lab, |faults| faults.retain(|f| f.a != node && f.b != node))?;
    }
    Ok(())
}

/// Starts again what delays packets and has ended. Returns whether there was such a process.
pub(crate) fn mend(lab: &LabName) -> anyhow::Result<bool> {
    let relays = StateDir::of(lab).relays()?.unwrap_or_default();
    let whole = delays(&list(lab)?).all(|(a, b, micros)| relays.iter().any(|r| r.serves(a, b, micros)));
    // Without the lock a change half-way looks like this, too; with it, there is nothing to start then.
    if whole { Ok(false) } else { change(lab, |_| ()) }
}

/// Returns whether a process that delays packets had to be started.
fn change(lab: &LabName, edit: impl FnOnce(&mut Vec<Fault>)) -> anyhow::Result<bool> {
    let _lock = Lock::acquire()?;
    let state = StateDir::of(lab);
    let before = list(lab)?;
    let mut faults = before.clone();
    edit(&mut faults);
    faults.sort_by(|x, y| (&x.a, &x.b).cmp(&(&y.a, &y.b)));
    if delays(&faults).count() > PAIRS_MAX {
        bail!("{PAIRS_MAX} links of lab {lab} have a delay, which is the most; give one of them --delay 0");
    }
    let nodes = exec::nodes(lab)?;
    for node in nodes.iter().filter(|n| takes_apart(&before, n) != takes_apart(&faults, n)) {
        let segments = if takes_apart(&faults, node) { 1 } else { UNBUNDLED_OFF };
        let arguments = ["link", "set", "dev", UPLINK, "gso_max_segs", &segments.to_string()];
        run(&Netns::open_named(&lab.node_netns(node))?, "ip", &arguments, "")
            .with_context(|| format!("link of {node}"))?;
    }

    let old = state.relays()?.unwrap_or_default();
    let mut relays: Vec<Relay> = Vec::new();
    let mut put = || -> anyhow::Result<()> {
        for (a, b, micros) in delays(&faults) {
            relays.push(match old.iter().find(|r| r.serves(a, b, micros)) {
                Some(relay) => relay.clone(),
                None => Relay::start(lab, a, b, micros)?,
            });
        }
        run(&Netns::open_named(&lab.fabric_netns())?, "nft", &["-f", "-"], &rules(&faults, &relays))
            .context("fabric")?;
        state.write_relays(&relays)?;
        state.write_faults(&faults)
    };
    let done = put();
    // Only after the rules, so that what is to pass without delay never waits for it.
    let (unused, used) = if done.is_ok() { (&old, &relays) } else { (&relays, &old) };
    unused.iter().filter(|relay| !used.contains(relay)).for_each(Relay::stop);
    done.map(|()| relays.iter().any(|relay| !old.contains(relay)))
}

/// Pairs with a delay in microseconds.
fn delays(faults: &[Fault]) -> impl Iterator<Item = (&str, &str, u32)> {
    faults.iter().filter_map(|f| Some((f.a.as_str(), f.b.as_str(), f.delay_micros?)))
}

/// Whether the node's packets have to come one by one.
fn takes_apart(faults: &[Fault], node: &str) -> bool {
    faults.iter().any(|f| (f.a == node || f.b == node) && (f.mtu.is_some() || f.loss_ppm.is_some()))
}

/// The whole tables, which take the place of those before in one step.
///
/// What is to be delayed gets a mark where both ports are known, leaves for a device of its relay at the port of the
/// node it is for, and comes back from there.
fn rules(faults: &[Fault], relays: &[Relay]) -> String {
    let (mut bridge, mut ports) = (String::new(), String::new());
    let mut mark = 0;
    for fault in faults {
        let relay = relays.iter().find(|r| (&r.a, &r.b) == (&fault.a, &fault.b));
        for (way, (from, to)) in [(&fault.a, &fault.b), (&fault.b, &fault.a)].into_iter().enumerate() {
            let pair = format!("iifname \"{from}\" oifname \"{to}\"");
            if fault.down {
                bridge.push_str(&format!("\t\t{pair} counter drop\n"));
            }
            if let Some(mtu) = fault.mtu {
                bridge.push_str(&format!("\t\t{pair} meta length > {mtu} counter drop\n"));
            }
            if let Some(ppm) = fault.loss_ppm {
                bridge.push_str(&format!("\t\t{pair} numgen random mod {MILLION} < {ppm} counter drop\n"));
            }
            if let Some(device) = relay.and_then(|r| r.devices.get(way)) {
                mark += 1;
                bridge.push_str(&format!("\t\t{pair} counter meta mark set {mark}\n"));
                let hook =
                    |way, at| format!("type filter hook {way} device \"{at}\" priority 0; policy accept;");
                ports.push_str(&format!(
                    "\tchain out{mark} {{\n\t\t{}\n\t\tmeta mark {mark} counter fwd to \"{device}\"\n\t}}\n",
                    hook("egress", to)
                ));
                ports.push_str(&format!(
                    "\tchain back{mark} {{\n\t\t{}\n\t\tcounter fwd to \"{to}\"\n\t}}\n",
                    hook("ingress", device)
                ));
            }
        }
    }
    let mut out = String::new();
    for family in ["bridge", "netdev"] {
        out.push_str(&format!("table {family} {TABLE}\ndelete table {family} {TABLE}\n"));
    }
    if !bridge.is_empty() {
        out.push_str(&format!(
            "table bridge {TABLE} {{\n\tchain forward {{\n\t\ttype filter hook forward priority 0; policy accept;\n\
             {bridge}\t}}\n}}\n"
        ));
    }
    if !ports.is_empty() {
        out.push_str(&format!("table netdev {TABLE} {{\n{ports}}}\n"));
    }
    out
}

fn run(namespace: &Netns, program: &str, arguments: &[&str], input: &str) -> anyhow::Result<()> {
    namespace.run(|| run_in_place(program, arguments, input))?
}

/// Runs a program in the calling thread's namespace. What it says is in the error when it fails.
pub(crate) fn run_in_place(program: &str, arguments: &[&str], input: &str) -> anyhow::Result<()> {
    let run = || -> std::io::Result<_> {
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
    };
    let output = run().with_context(|| format!("run {program}; install it with make setup"))?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(a: &str, b: &str) -> Fault {
        Fault { a: a.into(), b: b.into(), down: false, mtu: None, loss_ppm: None, delay_micros: None }
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
        let nothing = rules(&[], &[]);
        assert!(!nothing.contains('{') && nothing.contains("delete table netdev podway_faults"), "{nothing}");
        let faults = [
            Fault { down: true, ..fault("node-1", "node-2") },
            Fault { mtu: Some(1400), loss_ppm: Some(50_000), ..fault("node-1", "node-3") },
        ];
        let text = rules(&faults, &[]);
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
    fn delayed_packets_go_through_the_device_of_their_direction() {
        let faults = [
            Fault { loss_ppm: Some(1), ..fault("node-1", "node-2") },
            Fault { delay_micros: Some(50_000), ..fault("node-3", "node-1") },
        ];
        let relay: Relay = serde_json::from_value(serde_json::json!({
            "a": "node-3", "b": "node-1", "micros": 50_000, "pid": 0, "start_ticks": 0,
            "devices": ["delay0", "delay1"],
        }))
        .expect("relay");
        let text = rules(&faults, &[relay]);
        for part in [
            "iifname \"node-3\" oifname \"node-1\" counter meta mark set 1\n",
            "hook egress device \"node-1\" priority 0; policy accept;\n\t\tmeta mark 1 counter fwd to \"delay0\"\n",
            "hook ingress device \"delay0\" priority 0; policy accept;\n\t\tcounter fwd to \"node-1\"\n",
            "iifname \"node-1\" oifname \"node-3\" counter meta mark set 2\n",
            "hook egress device \"node-3\" priority 0; policy accept;\n\t\tmeta mark 2 counter fwd to \"delay1\"\n",
            "hook ingress device \"delay1\" priority 0; policy accept;\n\t\tcounter fwd to \"node-3\"\n",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!((text.matches(" mark set ").count(), text.matches("fwd to").count()), (2, 4), "{text}");
        assert_eq!(delays(&faults).collect::<Vec<_>>(), [("node-3", "node-1", 50_000)]);
    }

    #[test]
    fn delays_are_milliseconds() {
        for (text, want) in [
            ("50", Some(50_000)),
            ("0.5", Some(500)),
            ("0.001", Some(1)),
            ("0", Some(0)),
            ("10000", Some(10_000_000)),
            ("10000.001", None),
            ("99999999999", None),
            ("4294968", None),
            ("0.0001", None),
            ("-1", None),
            ("+1", None),
            ("50ms", None),
            (".5", None),
            ("", None),
        ] {
            assert_eq!(milliseconds(text).ok(), want, "{text}");
        }
        let error = milliseconds("50ms").expect_err("a unit");
        assert!(error.contains("50ms") && error.contains("0 to 10000"), "{error}");
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
            Fault { mtu: Some(1400), loss_ppm: Some(125_000), delay_micros: Some(500), ..fault("a", "b") }
                .describe(),
            "packets above 1400 bytes are lost, 12.5 % of packets are lost, packets are 0.5 ms late in each direction"
        );
        assert!(faults[0].is_between("node-2", "node-1") && !faults[0].is_between("node-1", "node-1"));
    }
}
