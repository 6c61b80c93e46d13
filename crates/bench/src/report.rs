//! What a bench found, as JSON and as a table.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::machine::Machine;
use crate::pairs::{Pairs, Ratio};
use crate::programs::ProgramCost;
use crate::stats::{Interval, median, median_interval};

/// Everything that one bench found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Which bench.
    pub bench: String,
    /// When it began, RFC 3339 in UTC.
    pub begun: String,
    /// Version of Podway.
    pub version: String,
    /// Where.
    pub machine: Machine,
    /// How.
    pub options: Value,
    /// Side by side.
    pub comparisons: Vec<Comparison>,
    /// Side by side, where the distance counts and not the ratio.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<Difference>,
    /// Values that have a bound of their own, and no peer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bounds: Vec<Bound>,
    /// Times of single operations.
    pub times: Vec<Times>,
    /// The same over a size.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curves: Vec<Curve>,
    /// What the kernel's programs cost.
    pub programs: Vec<ProgramCost>,
    /// What was not measured.
    pub skipped: Vec<Skipped>,
}

/// Something that was not measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// What.
    pub what: String,
    /// Why, and what would change that.
    pub why: String,
}

/// Podway and a peer, measured in turns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    /// What was measured.
    pub what: String,
    /// Unit of the values.
    pub unit: String,
    /// The other side.
    pub peer: String,
    /// Values of both.
    pub values: Pairs,
    /// Median of both.
    pub medians: Medians,
    /// How ours relates to the peer's.
    pub ratio: Ratio,
    /// What is aimed at.
    pub goal: Goal,
    /// Whether it is there.
    pub verdict: Verdict,
}

/// How much more one thing is than another, measured in turns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    /// What was measured.
    pub what: String,
    /// Unit of the values.
    pub unit: String,
    /// By whom.
    pub who: String,
    /// Values of both.
    pub values: Pairs,
    /// Median of the pairs' differences.
    pub median: f64,
    /// Where the true one is.
    pub interval: Interval,
    /// It should be at most this.
    pub goal: f64,
    /// Whether it is.
    pub verdict: Verdict,
}

/// A value with a bound.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bound {
    /// What was measured.
    pub what: String,
    /// Unit of the values.
    pub unit: String,
    /// The worst of the runs.
    pub value: f64,
    /// How many runs.
    pub runs: usize,
    /// It should be at most this; `None` is for knowing.
    pub goal: Option<f64>,
}

impl Bound {
    /// The worst of some values. `None` when there are none.
    #[must_use]
    pub fn worst(what: &str, unit: &str, values: &[f64], goal: Option<f64>) -> Option<Self> {
        let value = values.iter().copied().reduce(f64::max)?;
        Some(Self { what: what.into(), unit: unit.into(), value, runs: values.len(), goal })
    }

    /// Whether the goal is reached; nothing when there is none.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        let is_good = self.value <= self.goal?;
        Some(if is_good { Verdict::Reached } else { Verdict::Missed })
    }
}

/// One value over a size, by one side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Curve {
    /// What was measured.
    pub what: String,
    /// By whom.
    pub who: String,
    /// What the size is of.
    pub x: String,
    /// Unit of the values.
    pub unit: String,
    /// Size and value.
    pub points: Vec<(f64, f64)>,
}

/// Medians of both sides.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Medians {
    /// Podway.
    pub ours: f64,
    /// The peer.
    pub peer: f64,
}

/// What a ratio should be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Goal {
    /// More is better: at least this.
    AtLeast(f64),
    /// Less is better: at most this.
    AtMost(f64),
}

/// Whether a goal is reached, as far as the interval lets one say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// The whole interval is on the good side.
    Reached,
    /// The whole interval is on the bad side.
    Missed,
    /// The goal is inside the interval: more pairs would tell.
    Open,
}

/// Times of one kind of operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Which operation.
    pub what: String,
    /// By whom.
    pub who: String,
    /// Unit of the times.
    pub unit: String,
    /// Median.
    pub p50: f64,
    /// 99 of 100 are not longer.
    pub p99: f64,
    /// How many operations.
    pub count: usize,
}

impl Goal {
    /// Judges a ratio.
    #[must_use]
    pub fn judge(self, ratio: &Ratio) -> Verdict {
        let (low, high) = (ratio.interval.low, ratio.interval.high);
        let (good, bad) = match self {
            Self::AtLeast(bound) => (low >= bound, high < bound),
            Self::AtMost(bound) => (high <= bound, low > bound),
        };
        match (good, bad) {
            (true, _) => Verdict::Reached,
            (_, true) => Verdict::Missed,
            _ => Verdict::Open,
        }
    }

    /// The bound.
    #[must_use]
    pub fn bound(self) -> f64 {
        match self {
            Self::AtLeast(bound) | Self::AtMost(bound) => bound,
        }
    }
}

impl Difference {
    /// Evaluates what was measured. `None` when there are too few pairs.
    #[must_use]
    pub fn new(what: &str, unit: &str, who: &str, values: Pairs, goal: f64) -> Option<Self> {
        let differences: Vec<f64> = values.ours.iter().zip(&values.peer).map(|(o, p)| o - p).collect();
        let ratio = Ratio { median: median(&differences)?, interval: median_interval(&differences)? };
        Some(Self {
            what: what.into(),
            unit: unit.into(),
            who: who.into(),
            values,
            median: ratio.median,
            interval: ratio.interval,
            goal,
            verdict: Goal::AtMost(goal).judge(&ratio),
        })
    }
}

impl Verdict {
    const fn word(self) -> &'static str {
        match self {
            Verdict::Reached => "reached",
            Verdict::Missed => "missed",
            Verdict::Open => "open",
        }
    }
}

impl Comparison {
    /// Evaluates what was measured. `None` when there are too few pairs.
    #[must_use]
    pub fn new(what: &str, unit: &str, peer: &str, values: Pairs, goal: Goal) -> Option<Self> {
        let ratio = values.ratio()?;
        Some(Self {
            what: what.into(),
            unit: unit.into(),
            peer: peer.into(),
            medians: Medians { ours: median(&values.ours)?, peer: median(&values.peer)? },
            verdict: goal.judge(&ratio),
            values,
            ratio,
            goal,
        })
    }
}

/// The report as text.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut text = format!("{} · {}\n{}\n\n", report.bench, report.begun, report.machine);
    let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
    let mut rows =
        vec![row(&["WHAT", "PEER", "PODWAY", "PEER'S", "UNIT", "RATIO", "95% INTERVAL", "GOAL", ""])];
    for c in &report.comparisons {
        let sign = if matches!(c.goal, Goal::AtLeast(_)) { "≥" } else { "≤" };
        rows.push(vec![
            c.what.clone(),
            c.peer.clone(),
            number(c.medians.ours),
            number(c.medians.peer),
            c.unit.clone(),
            format!("{:.3}", c.ratio.median),
            format!("{:.3} to {:.3}", c.ratio.interval.low, c.ratio.interval.high),
            format!("{sign} {:.2}", c.goal.bound()),
            c.verdict.word().into(),
        ]);
    }
    if !report.comparisons.is_empty() {
        text += &columns(&rows);
    }
    if !report.differences.is_empty() {
        let mut rows = vec![row(&["DIFFERENCE", "BY", "MEDIAN", "UNIT", "95% INTERVAL", "GOAL", ""])];
        for d in &report.differences {
            rows.push(vec![
                d.what.clone(),
                d.who.clone(),
                number(d.median),
                d.unit.clone(),
                format!("{} to {}", number(d.interval.low), number(d.interval.high)),
                format!("≤ {}", number(d.goal)),
                d.verdict.word().into(),
            ]);
        }
        let _ = write!(text, "\n{}", columns(&rows));
    }
    if !report.bounds.is_empty() {
        let mut rows = vec![row(&["WHAT", "WORST", "UNIT", "RUNS", "GOAL", ""])];
        for b in &report.bounds {
            rows.push(vec![
                b.what.clone(),
                number(b.value),
                b.unit.clone(),
                b.runs.to_string(),
                b.goal.map_or_else(String::new, |goal| format!("≤ {}", number(goal))),
                b.verdict().map_or("", Verdict::word).into(),
            ]);
        }
        text += &columns(&rows);
    }
    if !report.times.is_empty() {
        let mut rows = vec![row(&["OPERATION", "BY", "P50", "P99", "UNIT", "COUNT"])];
        for t in &report.times {
            rows.push(vec![
                t.what.clone(),
                t.who.clone(),
                number(t.p50),
                number(t.p99),
                t.unit.clone(),
                t.count.to_string(),
            ]);
        }
        let _ = write!(text, "\n{}", columns(&rows));
    }
    if !report.programs.is_empty() {
        let mut rows = vec![row(&["PROGRAM", "TRAFFIC", "NS PER RUN", "RUNS"])];
        for p in &report.programs {
            rows.push(vec![p.program.clone(), p.traffic.clone(), number(p.ns_per_run), p.runs.to_string()]);
        }
        let _ = write!(text, "\n{}", columns(&rows));
    }
    for skipped in &report.skipped {
        let _ = write!(text, "\nskipped: {}: {}", skipped.what, skipped.why);
    }
    if !report.skipped.is_empty() {
        text.push('\n');
    }
    text
}

/// Four digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:w$}")).collect();
        out.push_str(cells.join("   ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn report() -> Report {
        let pairs = |f: f64| Pairs {
            ours: (0..15).map(|i| f * (10.0 + f64::from(i))).collect(),
            peer: (0..15).map(|i| 10.0 + f64::from(i)).collect(),
        };
        Report {
            bench: "net".into(),
            begun: "2026-01-01T00:00:00Z".into(),
            version: "0".into(),
            machine: Machine::default(),
            options: Value::Null,
            comparisons: vec![
                Comparison::new("two <nodes> & more", "Gbit/s", "vxlan", pairs(1.25), Goal::AtLeast(1.0))
                    .expect("enough"),
                Comparison::new("ADD", "ms", "bridge", pairs(0.25), Goal::AtMost(0.5)).expect("enough"),
            ],
            differences: vec![Difference::new("connect", "ns", "podway", pairs(1.5), 500.0).expect("enough")],
            bounds: vec![Bound::worst("compile", "s", &[1.5, 1.75], Some(2.0)).expect("two values")],
            curves: vec![
                Curve {
                    what: "connect".into(),
                    who: "podway".into(),
                    x: "services".into(),
                    unit: "µs".into(),
                    points: vec![(10.0, 2.0), (1000.0, 2.5)],
                },
                Curve {
                    what: "connect".into(),
                    who: "iptables".into(),
                    x: "services".into(),
                    unit: "µs".into(),
                    points: vec![(10.0, 3.0), (1000.0, 250.0)],
                },
            ],
            times: vec![Times {
                what: "ADD".into(),
                who: "podway".into(),
                unit: "ms".into(),
                p50: 2.0,
                p99: 3.0,
                count: 9,
            }],
            programs: vec![ProgramCost {
                program: "from_pod".into(),
                traffic: "requests".into(),
                runs: 5,
                ns_per_run: 321.0,
            }],
            skipped: vec![Skipped { what: "x".into(), why: "not there".into() }],
        }
    }

    #[test]
    fn goals_are_judged_by_the_whole_interval() {
        let ratio = |low, high| Ratio {
            median: f64::midpoint(low, high),
            interval: Interval { low, high, confidence: 0.96 },
        };
        for (goal, low, high, want) in [
            (Goal::AtLeast(1.0), 1.0, 1.2, Verdict::Reached),
            (Goal::AtLeast(1.0), 0.8, 0.99, Verdict::Missed),
            (Goal::AtLeast(1.0), 0.9, 1.1, Verdict::Open),
            (Goal::AtMost(0.5), 0.3, 0.5, Verdict::Reached),
            (Goal::AtMost(0.5), 0.51, 0.6, Verdict::Missed),
            (Goal::AtMost(0.5), 0.4, 0.6, Verdict::Open),
        ] {
            assert_eq!(goal.judge(&ratio(low, high)), want, "{goal:?} {low} {high}");
        }
    }

    #[test]
    fn a_report_survives_json_and_its_table_has_every_row() {
        let report = report();
        let text = serde_json::to_string(&report).expect("JSON");
        assert_eq!(serde_json::from_str::<Report>(&text).expect("report"), report);
        let table = table(&report);
        for part in [
            "two <nodes> & more",
            "1.250 to 1.250",
            "≥ 1.00   reached",
            "≤ 0.50   reached",
            "from_pod",
            "321.0",
            "≤ 500.0   reached",
            "compile   1.75    s      2      ≤ 2.00   reached",
            "skipped: x: not there",
        ] {
            assert!(table.contains(part), "{part} in\n{table}");
        }
    }
}
