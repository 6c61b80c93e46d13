//! Podway's benches: Podway and what it competes with, side by side on one machine.
//!
//! ```text
//!   net, cni, services ── a bench: makes both sides, measures, removes everything
//!     │  cluster      our side: a lab with real agents
//!     │  network      the peer's side: bridge, VXLAN, iptables rules (rules)
//!     │  traffic      the bytes themselves, in processes of their own (place)
//!     │  programs     what the kernel says our programs cost; comparison with a recorded run
//!     ▼
//!   pairs ── ABBA order ──▶ stats ── median ratio and its interval ──▶ report, plot
//! ```
//!
//! The bench of the policy compiler (policy) has no peer: its values have bounds.
//!
//! Traffic stays in namespaces that a bench makes itself. It may touch the machine's kernel only by counting BPF runs
//! for a moment, through a descriptor that cannot be left behind.

pub mod cluster;
pub mod cni;
mod curves;
pub mod flows;
pub mod machine;
pub mod namespaces;
pub mod net;
pub mod network;
pub mod pairs;
pub mod place;
pub mod plot;
pub mod policy;
pub mod programs;
pub mod report;
pub mod rules;
pub mod services;
pub mod stats;
pub mod stop;
pub mod traffic;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::machine::Machine;
use crate::report::Report;

fn check_pairs(pairs: usize) -> anyhow::Result<()> {
    if !(pairs::MIN_PAIRS..=pairs::MAX_PAIRS).contains(&pairs) {
        bail!("--pairs: {pairs} is not {} to {}", pairs::MIN_PAIRS, pairs::MAX_PAIRS);
    }
    Ok(())
}

fn new_report(bench: &str, machine: Machine) -> Report {
    Report {
        bench: bench.into(),
        begun: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        version: env!("CARGO_PKG_VERSION").into(),
        machine,
        options: serde_json::Value::Null,
        comparisons: vec![],
        differences: vec![],
        bounds: vec![],
        times: vec![],
        curves: vec![],
        programs: vec![],
        skipped: vec![],
    }
}

/// Writes `bench-NAME.json`, and `bench-NAME.svg` when there is something to draw, into a folder, which is made if it
/// is not there.
///
/// # Errors
/// With the file and the cause.
pub fn save(report: &Report, dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let mut json = serde_json::to_vec_pretty(report)?;
    json.push(b'\n');
    let has_picture = !report.comparisons.is_empty() || !report.curves.is_empty();
    let picture = has_picture.then(|| ("svg", plot::svg(report).into_bytes()));
    for (ending, content) in std::iter::once(("json", json)).chain(picture) {
        let path = dir.join(format!("bench-{}.{ending}", report.bench));
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
