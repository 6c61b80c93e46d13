//! Values over a size as a picture: a panel for each thing measured, a line for each side, both axes logarithmic.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::plot::{WIDTH, line, text};
use crate::report::Curve;

const LEFT: f64 = 90.0;
const RIGHT: f64 = 250.0;
const HEIGHT: f64 = 260.0;
const MARGIN: f64 = 90.0;
/// Told apart without colour vision as well (Okabe and Ito, 2008).
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];

/// What the panels of these curves need in height.
pub(crate) fn height(curves: &[Curve]) -> f64 {
    panels(curves).iter().fold(0.0, |sum, _| sum + HEIGHT + MARGIN)
}

/// Draws the panels from `top` downwards.
pub(crate) fn draw(out: &mut String, curves: &[Curve], mut top: f64) {
    let mut sides: Vec<&str> = Vec::new();
    for curve in curves {
        if !sides.contains(&curve.who.as_str()) {
            sides.push(&curve.who);
        }
    }
    for (what, curves) in panels(curves) {
        panel(out, what, &curves, &sides, top);
        top += HEIGHT + MARGIN;
    }
}

fn panels(curves: &[Curve]) -> Vec<(&str, Vec<&Curve>)> {
    let mut panels: Vec<(&str, Vec<&Curve>)> = Vec::new();
    for curve in curves {
        match panels.iter_mut().find(|(what, _)| *what == curve.what) {
            Some((_, list)) => list.push(curve),
            None => panels.push((&curve.what, vec![curve])),
        }
    }
    panels
}

/// A logarithmic scale from whole powers of ten to whole powers of ten, or to the ends where it is narrow.
struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, 0.0_f64);
        for value in values.filter(|v| v.is_finite() && *v > 0.0) {
            low = low.min(value);
            high = high.max(value);
        }
        if !low.is_finite() {
            (low, high) = (1.0, 10.0);
        }
        Self { low: low / 1.15, high: high * 1.15, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.clamp(self.low, self.high) / self.low).ln() / (self.high / self.low).ln();
        self.from + share * (self.to - self.from)
    }

    /// 1, 2 and 5 of every decade inside.
    fn ticks(&self) -> Vec<f64> {
        let mut ticks = Vec::new();
        for decade in -6..=9 {
            for step in [1.0, 2.0, 5.0] {
                let tick = step * 10.0_f64.powi(decade);
                if (self.low..=self.high).contains(&tick) {
                    ticks.push(tick);
                }
            }
        }
        ticks
    }
}

fn panel(out: &mut String, what: &str, curves: &[&Curve], sides: &[&str], top: f64) {
    let bottom = top + HEIGHT;
    let points = || curves.iter().flat_map(|c| c.points.iter());
    let x = Scale::of(points().map(|p| p.0), LEFT, WIDTH - RIGHT);
    let y = Scale::of(points().map(|p| p.1), bottom, top);
    let unit = curves.first().map_or("", |c| c.unit.as_str());
    text(out, 16.0, top - 14.0, "start", "14", "#111111", &format!("{what} ({unit})"));
    for tick in y.ticks() {
        line(out, (LEFT, y.at(tick)), (WIDTH - RIGHT, y.at(tick)), "#e4e4e4", 1.0, "");
        text(out, LEFT - 8.0, y.at(tick) + 4.0, "end", "11", "#555555", &format!("{tick}"));
    }
    // The sizes that were measured, not round ones.
    let mut sizes = BTreeMap::new();
    for (size, _) in points() {
        sizes.insert(size.to_bits(), *size);
    }
    for size in sizes.values() {
        line(out, (x.at(*size), top), (x.at(*size), bottom), "#e4e4e4", 1.0, "");
        text(out, x.at(*size), bottom + 18.0, "middle", "11", "#555555", &format!("{size}"));
    }
    let name = curves.first().map_or("", |c| c.x.as_str());
    text(out, f64::midpoint(LEFT, WIDTH - RIGHT), bottom + 36.0, "middle", "11", "#555555", name);
    for (row, curve) in curves.iter().enumerate() {
        let side = sides.iter().position(|s| *s == curve.who).unwrap_or_default();
        let colour = COLOURS[side % COLOURS.len()];
        let mut sorted = curve.points.clone();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        let path: Vec<String> = sorted.iter().map(|p| format!("{:.1},{:.1}", x.at(p.0), y.at(p.1))).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for point in &sorted {
            let _ = writeln!(
                out,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                x.at(point.0),
                y.at(point.1)
            );
        }
        // A list at the side: labels at the ends of lines cover one another.
        let at = top + 14.0 + 18.0 * f64::from(u32::try_from(row).unwrap_or_default());
        line(out, (WIDTH - RIGHT + 20.0, at - 4.0), (WIDTH - RIGHT + 44.0, at - 4.0), colour, 3.0, "");
        let last = sorted.last().map(|p| format!(" {:.3}", p.1)).unwrap_or_default();
        let label = format!("{}{last}", curve.who);
        text(out, WIDTH - RIGHT + 52.0, at, "start", "12", "#111111", &label);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_inside_its_panel() {
        let report = crate::report::tests::report();
        let mut svg = String::new();
        draw(&mut svg, &report.curves, 100.0);
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (2, 4));
        for (attribute, low, high) in [("cx=\"", LEFT, WIDTH - RIGHT), ("cy=\"", 100.0, 100.0 + HEIGHT)] {
            for part in svg.split(attribute).skip(1) {
                let value: f64 = part.split('"').next().expect("quoted").parse().expect("number");
                assert!((low..=high).contains(&value), "{attribute}{value}");
            }
        }
        assert!((height(&report.curves) - (HEIGHT + MARGIN)).abs() < 1e-9);
    }
}
