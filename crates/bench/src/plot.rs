//! The comparisons as a picture: one line each, a dot per pair, the interval, and the goal.
//!
//! Ratios are on a logarithmic axis, so that twice as much and half as much are equally far from 1.

use std::fmt::Write as _;

use crate::curves;
use crate::report::{Comparison, Goal, Report, Verdict};

pub(crate) const WIDTH: f64 = 960.0;
const LEFT: f64 = 400.0;
const RIGHT: f64 = 90.0;
const TOP: f64 = 64.0;
const ROW: f64 = 44.0;
const TICKS: [f64; 13] = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0];

/// Draws the report as SVG 1.1.
#[must_use]
pub fn svg(report: &Report) -> String {
    let rows = &report.comparisons;
    let axis = Axis::of(rows);
    let bottom = rows.iter().fold(TOP, |y, _| y + ROW);
    let below = bottom + 110.0;
    let height =
        if report.curves.is_empty() { bottom + 56.0 } else { below + curves::height(&report.curves) };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    text(
        &mut out,
        16.0,
        24.0,
        "start",
        "16",
        "#111111",
        &format!("podway bench {}: ratio to the peer", report.bench),
    );
    let place = format!("{} · {}", report.begun, report.machine);
    text(&mut out, 16.0, 44.0, "start", "11", "#555555", &place);
    for tick in TICKS.into_iter().filter(|t| axis.holds(*t)) {
        let x = axis.x(tick);
        let colour = if (tick - 1.0).abs() < 1e-9 { "#888888" } else { "#e4e4e4" };
        line(&mut out, (x, TOP), (x, bottom), colour, 1.0, "");
        text(&mut out, x, bottom + 18.0, "middle", "11", "#555555", &format!("{tick}×"));
    }
    let mut y = TOP + ROW / 2.0;
    for row in rows {
        draw(&mut out, &axis, row, y);
        y += ROW;
    }
    let legend =
        "dot: one pair · bar: 95% interval of the median · dashes: goal, reached to the side of its arrow";
    text(&mut out, LEFT, bottom + 42.0, "start", "11", "#555555", legend);
    curves::draw(&mut out, &report.curves, below);
    out += "</svg>\n";
    out
}

fn draw(out: &mut String, axis: &Axis, row: &Comparison, y: f64) {
    let colour = match row.verdict {
        Verdict::Reached => "#1a7f37",
        Verdict::Missed => "#c62828",
        Verdict::Open => "#9a6700",
    };
    text(out, LEFT - 14.0, y - 3.0, "end", "12", "#111111", &row.what);
    text(out, LEFT - 14.0, y + 12.0, "end", "11", "#555555", &format!("against {}", row.peer));
    for ratio in row.values.ratios().into_iter().filter(|r| axis.holds(*r)) {
        let _ = writeln!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"#0969da\" fill-opacity=\"0.35\"/>",
            axis.x(ratio),
            y - 8.0
        );
    }
    let (low, high) = (axis.x(row.ratio.interval.low), axis.x(row.ratio.interval.high));
    line(out, (low, y + 3.0), (high, y + 3.0), colour, 4.0, "");
    let middle = axis.x(row.ratio.median);
    line(out, (middle, y - 3.0), (middle, y + 9.0), colour, 2.0, "");
    let goal = axis.x(row.goal.bound());
    line(out, (goal, y - 16.0), (goal, y + 16.0), "#333333", 1.0, " stroke-dasharray=\"3 2\"");
    let arrow = if matches!(row.goal, Goal::AtLeast(_)) { "▸" } else { "◂" };
    let side = if matches!(row.goal, Goal::AtLeast(_)) { goal + 5.0 } else { goal - 5.0 };
    text(out, side, y + 18.0, "middle", "9", "#333333", arrow);
    text(out, WIDTH - RIGHT + 14.0, y + 4.0, "start", "13", colour, &format!("{:.2}×", row.ratio.median));
}

struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    /// From below everything to above everything that is drawn; absurd values are cut off.
    fn of(rows: &[Comparison]) -> Self {
        let all = rows.iter().flat_map(|r| {
            let interval = r.ratio.interval;
            r.values.ratios().into_iter().chain([interval.low, interval.high, r.goal.bound()])
        });
        let (mut low, mut high) = (0.8_f64, 1.25_f64);
        for ratio in all.filter(|r| r.is_finite() && *r > 0.0) {
            low = low.min(ratio);
            high = high.max(ratio);
        }
        Self { low: (low / 1.08).max(0.04), high: (high * 1.08).min(25.0) }
    }

    fn holds(&self, ratio: f64) -> bool {
        (self.low..=self.high).contains(&ratio)
    }

    fn x(&self, ratio: f64) -> f64 {
        let ratio = ratio.clamp(self.low, self.high);
        LEFT + (ratio / self.low).ln() / (self.high / self.low).ln() * (WIDTH - LEFT - RIGHT)
    }
}

pub(crate) fn line(out: &mut String, from: (f64, f64), to: (f64, f64), colour: &str, width: f64, more: &str) {
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\"{more}/>",
        from.0, from.1, to.0, to.1
    );
}

pub(crate) fn text(out: &mut String, x: f64, y: f64, anchor: &str, size: &str, colour: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" fill=\"{colour}\">{content}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_drawn_inside_and_names_are_escaped() {
        let report = crate::report::tests::report();
        let svg = svg(&Report { curves: vec![], ..report.clone() });
        assert_eq!(svg.matches("r=\"2.5\"").count(), 30);
        assert!(svg.contains("two &lt;nodes&gt; &amp; more") && svg.ends_with("</svg>\n"));
        for part in svg.split("cx=\"").skip(1) {
            let x: f64 = part.split('"').next().expect("quoted").parse().expect("number");
            assert!((LEFT..=WIDTH - RIGHT).contains(&x), "{x}");
        }
        let axis = Axis::of(&report.comparisons);
        let (half, one, double) = (axis.x(0.5), axis.x(1.0), axis.x(2.0_f64.min(axis.high)));
        assert!(half < one && one < double, "{half} {one} {double}");
    }
}
