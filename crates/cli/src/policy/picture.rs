//! The matrix of who reaches whom, as SVG.

use std::fmt::Write as _;

/// How much one reaches of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    Everything,
    Something,
    Nothing,
}

/// Width and height of a cell, in pixels.
const CELL: usize = 18;
/// Width of a character of a label.
const CHARACTER: usize = 7;

/// Draws it. `cell` gives the extent from row to column, and what to say about it; `None` where nothing is asked: a pod
/// and itself.
pub(super) fn draw(names: &[&str], mut cell: impl FnMut(usize, usize) -> Option<(Extent, String)>) -> String {
    let label = names.iter().map(|n| n.chars().count()).max().unwrap_or(0) * CHARACTER + 12;
    let (left, top) = (label, label + 20);
    let (width, height) = (left + names.len() * CELL + 20, top + names.len() * CELL + 50);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"16\" font-size=\"12\">row: source, column: target</text>\n"
    );
    for (i, name) in names.iter().enumerate() {
        let (x, y) = (left + i * CELL + 13, top + i * CELL + 13);
        let name = escape(name);
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{name}</text>", left - 6);
        let _ = writeln!(svg, "<text transform=\"translate({x} {}) rotate(-90)\">{name}</text>", top - 6);
    }
    for row in 0..names.len() {
        for column in 0..names.len() {
            let (colour, text) = match cell(row, column) {
                Some((extent, text)) => (colour(extent), text),
                None => (NOT_ASKED, "not asked".to_owned()),
            };
            let (x, y) = (left + column * CELL, top + row * CELL);
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{}\"><title>{} to {}: {}</title></rect>",
                CELL - 1,
                CELL - 1,
                colour,
                escape(names[row]),
                escape(names[column]),
                escape(&text)
            );
        }
    }
    let y = top + names.len() * CELL + 16;
    for (i, (colour, text)) in [
        (colour(Extent::Everything), "everything"),
        (colour(Extent::Something), "some ports"),
        (colour(Extent::Nothing), "nothing"),
        (NOT_ASKED, "itself"),
    ]
    .into_iter()
    .enumerate()
    {
        let x = 8 + i * 90;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{}\"/><text x=\"{}\" y=\"{}\">{text}</text>",
            colour,
            x + 16,
            y + 10
        );
    }
    svg.push_str("</svg>\n");
    svg
}

const NOT_ASKED: &str = "#dddddd";

/// Colours that people who do not tell red from green tell apart (Okabe and Ito).
fn colour(extent: Extent) -> &'static str {
    match extent {
        Extent::Everything => "#009e73",
        Extent::Something => "#f0e442",
        Extent::Nothing => "#d55e00",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
