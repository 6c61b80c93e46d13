//! The programs.

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    process::{Command, Stdio},
    thread,
};

use podway_services::table::Family;

use super::render::Table;
use crate::{Error, Result};

/// Seconds that a program waits for others that hold the lock.
const LOCK_WAIT: &str = "10";

/// Which of the two implementations of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The kernel's own ip_tables.
    Legacy,
    /// Translated to nf_tables.
    Nft,
}

impl Kind {
    /// The one that is in use: legacy when it has rules in the network namespace of the calling thread, else
    /// nf_tables, as `iptables-wrappers` chooses for kube-proxy.
    ///
    /// # Errors
    /// Neither is installed.
    pub fn in_use() -> Result<Self> {
        let rules = |kind: Kind| -> Result<usize> {
            let mut count = 0;
            for family in [Family::V4, Family::V6] {
                let text = run(&kind.program(family, "save"), &[], "")?;
                count += text.lines().filter(|line| line.starts_with("-A")).count();
            }
            Ok(count)
        };
        // Reading the legacy tables makes the kernel set them up, so that is done only if somebody did before.
        let legacy = ["/proc/self/net/ip_tables_names", "/proc/self/net/ip6_tables_names"]
            .iter()
            .any(|path| std::fs::read_to_string(path).is_ok_and(|names| !names.trim().is_empty()));
        if legacy && rules(Kind::Legacy).unwrap_or(0) > rules(Kind::Nft).unwrap_or(0) {
            return Ok(Kind::Legacy);
        }
        run(&Kind::Nft.program(Family::V4, "save"), &["-t", "nat"], "")?;
        Ok(Kind::Nft)
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Kind::Legacy => "iptables (legacy)",
            Kind::Nft => "iptables (nf_tables)",
        }
    }

    fn program(self, family: Family, what: &str) -> String {
        let ip = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let kind = match self {
            Kind::Legacy => "legacy",
            Kind::Nft => "nft",
        };
        if what.is_empty() { format!("{ip}-{kind}") } else { format!("{ip}-{kind}-{what}") }
    }
}

/// Chains with their rules, in the form in which `iptables-save` prints them, without `-A` and the chain's name.
pub(super) type Chains = BTreeMap<String, Vec<String>>;

/// What a table has of ours, and the rules of the chains that are not ours which lead to ours.
#[derive(Debug, Default)]
pub(super) struct Saved {
    pub(super) ours: Chains,
    pub(super) hooks: Vec<(String, String)>,
}

/// Everything of ours in one table.
pub(super) fn save(kind: Kind, family: Family, table: Table, prefix: &str) -> Result<Saved> {
    let text = run(&kind.program(family, "save"), &["-t", table.name()], "")?;
    let mut saved = Saved::default();
    for line in text.lines() {
        if let Some(chain) = line.strip_prefix(':').and_then(|l| l.split(' ').next()) {
            if chain.starts_with(prefix) {
                saved.ours.entry(chain.to_owned()).or_default();
            }
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|l| l.split_once(' ')) {
            if chain.starts_with(prefix) {
                saved.ours.entry(chain.to_owned()).or_default().push(rule.to_owned());
            } else if rule.contains(prefix) {
                saved.hooks.push((chain.to_owned(), rule.to_owned()));
            }
        }
    }
    Ok(saved)
}

/// Writes one or more tables' input.
pub(super) fn restore(kind: Kind, family: Family, input: &str) -> Result<()> {
    run(&kind.program(family, "restore"), &["--noflush", "-w", LOCK_WAIT], input).map(drop)
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let missing =
        |source: io::Error| Error::Missing { program: program.to_owned(), package: "iptables", source };
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    let stdin = child.stdin.take();
    let output = thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // When it died, its exit status tells more than the broken pipe.
                stdin.write_all(input.as_bytes()).ok();
            }
        });
        child.wait_with_output()
    })
    .map_err(missing)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Error::Refused {
        mechanism: "iptables",
        object: program.to_owned(),
        cause: text.trim().chars().take(2000).collect(),
    })
}
