//! What our kernel programs cost, as the kernel counts it, and whether that has become more.
//!
//! The kernel counts runs and time of BPF programs only while somebody asks for it, because reading the clock twice
//! per packet is not free. It is asked through a descriptor (`BPF_ENABLE_STATS`, kernel 5.8): counting ends when that
//! closes, even when the bench is killed. The counts themselves come from `/proc/self/fdinfo` (proc(5)).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, bail};
use aya::maps::MapInfo;
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use serde::{Deserialize, Serialize};

use crate::report::Report;

/// More than this share above the recorded cost is a regression.
pub const TOLERANCE: f64 = 0.10;
/// A program that ran less often says nothing about its cost.
const FEWEST_RUNS: u64 = 1000;

/// What one program costs under one kind of traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgramCost {
    /// Name of the program, which is that of its hook.
    pub program: String,
    /// Kind of traffic.
    pub traffic: String,
    /// Runs over all rounds. A packet is a run; one that segmentation offload has yet to cut up counts once.
    pub runs: u64,
    /// Nanoseconds per run: the least over the rounds. What else the machine does can only add to a program's time, so
    /// the least is what moves least between runs of the bench.
    pub ns_per_run: f64,
}

/// Runs and nanoseconds of each program so far.
type Counts = BTreeMap<String, (u64, u64)>;

/// Counts the programs that use the maps pinned in `pin_dirs` (one directory per agent) while `traffic` runs, which
/// it does `rounds` times.
///
/// # Errors
/// When the kernel does not count, or the traffic fails.
pub fn measure(
    pin_dirs: &[impl AsRef<Path>],
    name: &str,
    rounds: usize,
    mut traffic: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<ProgramCost>> {
    let ours = pinned_maps(pin_dirs)?;
    let _counting = enable_stats(Stats::RunTime)
        .context("ask the kernel to count runs of BPF programs (needs kernel 5.8)")?;
    let mut costs: BTreeMap<String, (u64, Vec<f64>)> = BTreeMap::new();
    for _ in 0..rounds {
        let before = counts(&ours)?;
        traffic()?;
        for (program, (runs, time)) in counts(&ours)? {
            let (runs_before, time_before) = before.get(&program).copied().unwrap_or_default();
            let (runs, time) = (runs.saturating_sub(runs_before), time.saturating_sub(time_before));
            if runs >= FEWEST_RUNS {
                let cost = costs.entry(program).or_default();
                cost.0 += runs;
                cost.1.push(exact(time) / exact(runs));
            }
        }
    }
    if costs.is_empty() {
        bail!("none of our programs saw {FEWEST_RUNS} packets of {name}; is the lab's agent alive?");
    }
    Ok(costs
        .into_iter()
        .filter_map(|(program, (runs, per_round))| {
            let ns_per_run = per_round.into_iter().min_by(f64::total_cmp)?;
            Some(ProgramCost { program, traffic: name.into(), runs, ns_per_run })
        })
        .collect())
}

/// Counting of the programs that use given maps, for as long as this value lives.
#[derive(Debug)]
pub struct Counting {
    maps: BTreeSet<u32>,
    _counting: OwnedFd,
}

impl Counting {
    /// Begins to count the programs that use the maps pinned in `pin_dirs`.
    ///
    /// # Errors
    /// When the kernel does not count, or nothing is pinned there.
    pub fn start(pin_dirs: &[impl AsRef<Path>]) -> anyhow::Result<Self> {
        let maps = pinned_maps(pin_dirs)?;
        let counting = enable_stats(Stats::RunTime)
            .context("ask the kernel to count runs of BPF programs (needs kernel 5.8)")?;
        Ok(Self { maps, _counting: counting })
    }

    /// Nanoseconds that all of them have run since they were loaded, while anybody counted.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn total(&self) -> anyhow::Result<u64> {
        Ok(counts(&self.maps)?.values().map(|(_, time)| time).sum())
    }
}

#[expect(clippy::cast_precision_loss, reason = "2^53 nanoseconds are 104 days")]
fn exact(number: u64) -> f64 {
    number as f64
}

fn pinned_maps(dirs: &[impl AsRef<Path>]) -> anyhow::Result<BTreeSet<u32>> {
    let mut ids = BTreeSet::new();
    for dir in dirs {
        let dir = dir.as_ref();
        let found = maps_below(dir).with_context(|| format!("read the maps pinned in {}", dir.display()))?;
        if found.is_empty() {
            bail!("no maps are pinned in {}; is the agent of that node alive?", dir.display());
        }
        ids.extend(found);
    }
    Ok(ids)
}

/// Maps are in folders `maps-v<layout>`.
fn maps_below(dir: &Path) -> anyhow::Result<Vec<u32>> {
    let mut ids = Vec::new();
    for folder in fs::read_dir(dir)?.flatten() {
        if folder.file_name().to_string_lossy().starts_with("maps-") {
            for map in fs::read_dir(folder.path())?.flatten() {
                ids.push(MapInfo::from_pin(map.path())?.id());
            }
        }
    }
    Ok(ids)
}

fn counts(maps: &BTreeSet<u32>) -> anyhow::Result<Counts> {
    let mut counts = Counts::new();
    for program in loaded_programs() {
        // One that is unloaded between being listed and being opened is none of ours: ours stay.
        let Ok(program) = program else { continue };
        let (Ok(Some(used)), Some(name)) = (program.map_ids(), program.name_as_str()) else { continue };
        if !used.iter().any(|id| maps.contains(id)) {
            continue;
        }
        let Ok(fd) = program.fd() else { continue };
        let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let (runs, time) = parse(&text).with_context(|| format!("{path} has no run_cnt and run_time_ns"))?;
        let count = counts.entry(name.to_owned()).or_default();
        count.0 += runs;
        count.1 += time;
    }
    Ok(counts)
}

/// Runs and nanoseconds.
fn parse(fdinfo: &str) -> Option<(u64, u64)> {
    let field = |name: &str| -> Option<u64> {
        fdinfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?.trim().parse().ok()
    };
    Some((field("run_cnt")?, field("run_time_ns")?))
}

/// Reads the program costs of a report that was recorded earlier.
///
/// # Errors
/// When the file cannot be read, is no report, or has no program costs to compare with.
pub fn baseline(path: &Path) -> anyhow::Result<Vec<ProgramCost>> {
    let text = fs::read(path).with_context(|| format!("--baseline {}", path.display()))?;
    let report: Report = serde_json::from_slice(&text)
        .with_context(|| format!("--baseline {}: not a report that podway bench wrote", path.display()))?;
    if report.programs.is_empty() {
        bail!("--baseline {}: field programs is empty, so there is nothing to compare with", path.display());
    }
    Ok(report.programs)
}

/// What has become worse since the baseline, a line each.
#[must_use]
pub fn regressions(baseline: &[ProgramCost], now: &[ProgramCost]) -> Vec<String> {
    let mut lines = Vec::new();
    for was in baseline {
        let is = now.iter().find(|p| p.program == was.program && p.traffic == was.traffic);
        let what = format!("{} ({})", was.program, was.traffic);
        match is {
            None => lines.push(format!("{what}: is in the baseline and was not measured")),
            Some(is) if is.ns_per_run > was.ns_per_run * (1.0 + TOLERANCE) => lines.push(format!(
                "{what}: {:.0} ns per run, {:.0} in the baseline, {:+.0}%",
                is.ns_per_run,
                was.ns_per_run,
                (is.ns_per_run / was.ns_per_run - 1.0) * 100.0
            )),
            Some(_) => {}
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_counts_are_understood() {
        let text =
            "pos:\t0\nflags:\t02000002\nprog_type:\t3\nprog_jited:\t1\nrun_time_ns:\t123456\nrun_cnt:\t789\n";
        assert_eq!(parse(text), Some((789, 123_456)));
        assert_eq!(parse("pos:\t0\n"), None);
    }

    #[test]
    fn more_than_a_tenth_is_a_regression_and_so_is_a_missing_program() {
        let cost = |program: &str, ns| ProgramCost {
            program: program.into(),
            traffic: "requests".into(),
            runs: 5000,
            ns_per_run: ns,
        };
        let before = [cost("from_pod", 300.0), cost("to_pod", 100.0), cost("to_tunnel", 100.0)];
        assert_eq!(regressions(&before, &before), Vec::<String>::new());
        let now = [cost("from_pod", 329.0), cost("to_pod", 111.0), cost("new", 1.0)];
        let found = regressions(&before, &now);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].contains("to_pod (requests): 111 ns per run, 100 in the baseline, +11%"),
            "{found:?}"
        );
        assert!(found[1].contains("to_tunnel") && found[1].contains("not measured"), "{found:?}");
    }

    #[test]
    fn a_baseline_that_is_none_is_refused_with_the_file() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("b.json");
        let mut report = crate::report::tests::report();
        fs::write(&path, serde_json::to_vec(&report).expect("JSON")).expect("write");
        assert_eq!(baseline(&path).expect("baseline").len(), 1);
        report.programs.clear();
        for (text, part) in [
            (serde_json::to_vec(&report).expect("JSON"), "nothing to compare"),
            (b"{}".to_vec(), "not a report"),
        ] {
            fs::write(&path, text).expect("write");
            let error = format!("{:#}", baseline(&path).expect_err("refused"));
            assert!(error.contains(part) && error.contains("b.json"), "{error}");
        }
        assert!(baseline(&dir.path().join("none")).is_err());
    }
}
