//! Runs the tools of the mechanisms in the calling thread's network namespace.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};

/// Why a tool gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed, or cannot be started.
    #[error("cannot run {tool}: {source}")]
    CannotRun {
        /// Its name.
        tool: String,
        /// Why.
        source: io::Error,
    },
    /// It says that it failed.
    #[error("{command} failed: {said}")]
    Failed {
        /// The command line.
        command: String,
        /// What it said.
        said: String,
    },
}

impl ToolError {
    /// The tool is not there: neither is what only it could have made, as far as can be known.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::CannotRun { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Runs a tool with this input and returns what it printed.
pub(crate) fn run(tool: &str, arguments: &[&str], input: &str) -> Result<String, ToolError> {
    let cannot = |source| ToolError::CannotRun { tool: tool.to_owned(), source };
    let mut child = Command::new(tool)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    // Written by a thread of its own: a tool that prints before it has read all would otherwise wait for us.
    let writer = child.stdin.take().map(|mut stdin| {
        let input = input.as_bytes().to_vec();
        std::thread::spawn(move || stdin.write_all(&input))
    });
    let output = child.wait_with_output().map_err(cannot)?;
    if let Some(writer) = writer {
        // A tool that fails need not read everything; what it says counts.
        let _ = writer.join();
    }
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = match said.trim() {
        "" => output.status.to_string(),
        said => said.lines().take(3).collect::<Vec<_>>().join(" / "),
    };
    Err(ToolError::Failed { command: [&[tool], arguments].concat().join(" "), said })
}
