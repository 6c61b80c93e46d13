//! The `nft` program. Works in the network namespace of the thread that calls it.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use ipnet::IpNet;

/// Why rules are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// There is no `nft` program.
    #[error("cannot run nft: {0}; install nftables")]
    Missing(io::Error),
    /// `nft` refused.
    #[error("nft refused the rules: {0}")]
    Refused(String),
}

/// A transaction of nft commands: all of it or nothing.
///
/// # Errors
/// nft is missing or refuses.
pub(crate) fn transaction(text: &str) -> Result<(), NftError> {
    run(&["-f", "-"], text).map(drop)
}

/// A table of the family `inet` as nft shows it, with further options; none when there is none.
///
/// # Errors
/// nft is missing or refuses.
pub(crate) fn list(option: &str, table: &str) -> Result<Option<String>, NftError> {
    match run(&[option, "list", "table", "inet", table], "") {
        Ok(text) => Ok(Some(text)),
        Err(NftError::Refused(why)) if why.contains("No such file or directory") => Ok(None),
        Err(e) => Err(e),
    }
}

/// The commands that delete a table; the first line makes sure that there is one, so that this never fails.
pub(crate) fn deletion(table: &str) -> String {
    format!("add table inet {table}\ndelete table inet {table}\n")
}

/// Deletes a table. Returns whether there was one.
///
/// # Errors
/// nft is missing or refuses.
pub(crate) fn remove(table: &str) -> Result<bool, NftError> {
    if list("--stateless", table)?.is_none() {
        return Ok(false);
    }
    transaction(&deletion(table))?;
    Ok(true)
}

/// Writes a set of those of the prefixes that are of one family, within a table.
pub(crate) fn prefix_set(text: &mut String, name: &str, prefixes: &[IpNet], v6: bool) {
    let kind = if v6 { "ipv6_addr" } else { "ipv4_addr" };
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

fn run(arguments: &[&str], input: &str) -> Result<String, NftError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(NftError::Missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        // nft reads all of its input before it prints anything, so this cannot block for good; when it died,
        // its exit status tells more than the broken pipe.
        stdin.write_all(input.as_bytes()).ok();
    }
    let output = child.wait_with_output().map_err(NftError::Missing)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(NftError::Refused(text.trim().chars().take(2000).collect()))
}
