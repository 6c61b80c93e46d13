//! Structured logs on standard error, as text or one JSON object per line.
//!
//! The level comes from `PODWAY_LOG` (the syntax of tracing-subscriber's `EnvFilter`), `info` without it.

use std::str::FromStr;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("{other:?} is no log format; use text or json")),
        }
    }
}

/// Starts logging, once per process; a second call changes nothing.
pub fn init(format: LogFormat) {
    let filter = EnvFilter::try_from_env("PODWAY_LOG").unwrap_or_else(|_| {
        // The client's own lines about each failed request would say again what the agent says once.
        EnvFilter::new("info,kube_client=off,kube_runtime=off,tower=off")
    });
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    // Only fails when there is a subscriber already: somebody else's logging is as good.
    started.ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        assert_eq!("text".parse(), Ok(LogFormat::Text));
        assert!("xml".parse::<LogFormat>().is_err());
    }
}
