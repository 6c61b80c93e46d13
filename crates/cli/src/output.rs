//! What commands print. Results go to standard output, progress and errors to standard error.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Prints a result. A reader that has gone away (`| head`) is no error.
pub(crate) fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Prints a result as JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?));
    Ok(())
}

/// Prints an object as JSON that has a long list, an item on a line, and further fields. The list is written as it is
/// made, so it may be longer than memory. A reader that has gone away is no error.
pub(crate) fn json_with_list(
    field: &str,
    items: impl Iterator<Item = serde_json::Value>,
    rest: &serde_json::Value,
) -> anyhow::Result<()> {
    let write = || -> io::Result<()> {
        let mut out = io::BufWriter::with_capacity(1 << 16, io::stdout().lock());
        write!(out, "{{{}: [", serde_json::Value::from(field))?;
        for (i, item) in items.enumerate() {
            out.write_all(if i > 0 { b",\n" } else { b"\n" })?;
            serde_json::to_writer(&mut out, &item)?;
        }
        out.write_all(b"]")?;
        for (field, value) in rest.as_object().into_iter().flatten() {
            write!(out, ",\n{}: {value}", serde_json::Value::from(field.as_str()))?;
        }
        out.write_all(b"}\n")?;
        out.flush()
    };
    match write() {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// An error and its causes. Most errors name their cause themselves: what has been said is not said again.
pub(crate) fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// Prints an error.
pub(crate) fn error(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Lines of columns, each as wide as it must be.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out.push_str(cells.join("   ").trim_end());
        out.push('\n');
    }
    out
}

/// News about something that takes a while: one line that changes on a terminal, a line per change elsewhere.
pub(crate) struct Progress {
    terminal: bool,
    last: String,
    detailed: Instant,
    details: Vec<String>,
}

/// Between two lists of what is being waited for.
const DETAILS_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            terminal: io::stderr().is_terminal(),
            last: String::new(),
            detailed: Instant::now(),
            details: Vec::new(),
        }
    }

    /// Whether these were the last details shown.
    pub(crate) fn has_shown(&self, details: &[String]) -> bool {
        !details.is_empty() && self.details == details
    }

    /// A line that stays.
    pub(crate) fn say(&mut self, text: &str) {
        self.end();
        error(text);
    }

    /// The line that changes; `details` are shown now and then when the wait is long and they have changed.
    pub(crate) fn update(&mut self, text: &str, details: impl FnOnce() -> Vec<String>) {
        if self.detailed.elapsed() >= DETAILS_EVERY {
            self.detailed = Instant::now();
            let details = details();
            // The same list again says nothing new.
            if details != self.details {
                self.end();
                for line in &details {
                    error(&format!("  {line}"));
                }
                self.details = details;
            }
        }
        if text == self.last {
            return;
        }
        text.clone_into(&mut self.last);
        if self.terminal {
            // Back to the start of the line, and clear to its end (ECMA-48 EL).
            let _ = write!(io::stderr().lock(), "\r{text}\x1b[K");
        } else {
            error(text);
        }
    }

    /// Leaves the line that changes.
    pub(crate) fn end(&mut self) {
        if self.terminal && !self.last.is_empty() {
            error("");
            self.last.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let cause = io::Error::other("no such file");
        let naming = anyhow::Error::new(cause).context("kubeconfig /none: no such file; check --kubeconfig");
        assert_eq!(told(&naming), "kubeconfig /none: no such file; check --kubeconfig");
        let silent = anyhow::Error::new(io::Error::other("no such file")).context("read the state");
        assert_eq!(told(&silent), "read the state: no such file");
    }

    #[test]
    fn details_are_shown_when_they_are_due_and_new() {
        let mut progress = Progress::new();
        let lines = |text: &str| vec![text.to_owned()];
        progress.update("1", || lines("early"));
        assert!(!progress.has_shown(&lines("early")) && !progress.has_shown(&[]));
        for text in ["a", "a", "b"] {
            progress.detailed = Instant::now().checked_sub(DETAILS_EVERY).expect("up for long enough");
            progress.update("2", || lines(text));
            assert!(progress.has_shown(&lines(text)));
        }
        assert!(!progress.has_shown(&lines("a")));
    }

    #[test]
    fn columns_line_up() {
        let rows = [["A", "BB", ""], ["long", "é", "x"]].map(|r| r.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "A      BB\nlong   é    x\n");
    }
}
