//! Source address translation for what leaves the cluster: one nftables table of our own.
//!
//! The whole table is replaced in one transaction, and only when it has to be. Replacing it does not touch
//! connections that are translated already. Other tables are never read or written.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use ipnet::IpNet;

/// The table's name; `inet` holds both families.
pub const TABLE: &str = "podway";

/// Why the rules are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum MasqueradeError {
    /// There is no `nft` program.
    #[error("cannot run nft: {0}; install nftables, or switch off with --masquerade=false")]
    NoNft(io::Error),
    /// `nft` refused.
    #[error("nft refused the rules: {0}")]
    Refused(String),
}

/// What is to be translated.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// Whose packets: the podCIDRs of this node.
    pub from: Vec<IpNet>,
    /// To where they keep their source: the cluster and what the configuration excludes.
    pub not_to: Vec<IpNet>,
}

impl Rules {
    /// The transaction that makes the table hold these rules and nothing else.
    #[must_use]
    pub fn transaction(&self) -> String {
        let mut text = delete_transaction();
        let _ = writeln!(text, "table inet {TABLE} {{");
        for (family, kind, v6) in [("4", "ipv4_addr", false), ("6", "ipv6_addr", true)] {
            set(&mut text, &format!("pods{family}"), kind, &self.from, v6);
            set(&mut text, &format!("inside{family}"), kind, &self.not_to, v6);
        }
        text.push_str(
            "\tchain postrouting {\n\
             \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
             \t\tip saddr @pods4 ip daddr != @inside4 ip daddr != { 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255 } \
             masquerade fully-random\n\
             \t\tip6 saddr @pods6 ip6 daddr != @inside6 ip6 daddr != { fe80::/10, ff00::/8 } masquerade fully-random\n\
             \t}\n}\n",
        );
        text
    }
}

/// Deletes the table; the first line makes sure that there is one, so that this never fails.
fn delete_transaction() -> String {
    format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")
}

fn set(text: &mut String, name: &str, kind: &str, prefixes: &[IpNet], v6: bool) {
    let _ = writeln!(text, "\tset {name} {{\n\t\ttype {kind}\n\t\tflags interval");
    let mine: Vec<IpNet> =
        prefixes.iter().filter(|p| matches!(p, IpNet::V6(_)) == v6).map(IpNet::trunc).collect();
    // Interval sets refuse overlapping elements.
    let mut merged = IpNet::aggregate(&mine);
    merged.sort();
    if !merged.is_empty() {
        let elements: Vec<String> = merged.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "\t\telements = {{ {} }}", elements.join(", "));
    }
    text.push_str("\t}\n");
}

/// The driver. Works in the network namespace of the thread that calls it.
#[derive(Debug, Default)]
pub struct Masquerade {
    applied: Option<Rules>,
    /// How nft shows what was applied.
    shown: Option<String>,
}

impl Masquerade {
    /// Makes the table hold the rules; does nothing when it was given the same before. Returns whether anything
    /// was written.
    ///
    /// # Errors
    /// nft is missing or refuses. The table is then as it was.
    pub fn apply(&mut self, rules: &Rules) -> Result<bool, MasqueradeError> {
        if self.applied.as_ref() == Some(rules) {
            return Ok(false);
        }
        nft(&["-f", "-"], &rules.transaction())?;
        self.applied = Some(rules.clone());
        self.shown = list()?;
        Ok(true)
    }

    /// Looks whether somebody changed or flushed the table (firewall managers do), and puts it right. Returns
    /// whether that was necessary.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn audit(&mut self) -> Result<bool, MasqueradeError> {
        let Some(rules) = self.applied.clone() else { return Ok(false) };
        if list()? == self.shown {
            return Ok(false);
        }
        self.applied = None;
        self.apply(&rules)
    }
}

/// Deletes the table. Returns whether there was one.
///
/// # Errors
/// nft is missing or refuses.
pub fn remove() -> Result<bool, MasqueradeError> {
    if list()?.is_none() {
        return Ok(false);
    }
    nft(&["-f", "-"], &delete_transaction())?;
    Ok(true)
}

/// The table as nft shows it; none when there is none.
fn list() -> Result<Option<String>, MasqueradeError> {
    match nft(&["--stateless", "list", "table", "inet", TABLE], "") {
        Ok(text) => Ok(Some(text)),
        Err(MasqueradeError::Refused(why)) if why.contains("No such file or directory") => Ok(None),
        Err(e) => Err(e),
    }
}

fn nft(arguments: &[&str], input: &str) -> Result<String, MasqueradeError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(MasqueradeError::NoNft)?;
    if let Some(mut stdin) = child.stdin.take() {
        // nft reads all of its input before it prints anything, so this cannot block for good; when it died,
        // its exit status tells more than the broken pipe.
        stdin.write_all(input.as_bytes()).ok();
    }
    let output = child.wait_with_output().map_err(MasqueradeError::NoNft)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(MasqueradeError::Refused(text.trim().chars().take(2000).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn the_transaction_replaces_the_table() {
        let rules = Rules {
            from: nets(&["10.244.1.0/24", "fd00:10:244:1::/64"]),
            not_to: nets(&["10.244.1.0/24", "10.244.0.0/24", "172.18.1.1/32", "10.244.1.7/32", "fd00::/16"]),
        };
        let text = rules.transaction();
        assert!(
            text.starts_with("add table inet podway\ndelete table inet podway\ntable inet podway {\n"),
            "{text}"
        );
        assert!(text.contains(
            "\tset pods4 {\n\t\ttype ipv4_addr\n\t\tflags interval\n\t\telements = { 10.244.1.0/24 }"
        ));
        // Merged, overlaps gone, sorted.
        assert!(text.contains("elements = { 10.244.0.0/23, 172.18.1.1/32 }"), "{text}");
        assert!(
            text.contains(
                "set inside6 {\n\t\ttype ipv6_addr\n\t\tflags interval\n\t\telements = { fd00::/16 }"
            )
        );
    }

    #[test]
    fn empty_sets_are_written_without_elements() {
        let text = Rules::default().transaction();
        assert!(!text.contains("elements"), "{text}");
    }
}
