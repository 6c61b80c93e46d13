//! Kernel parameters under `/proc/sys/net`.
//!
//! They belong to the network namespace of the calling *thread*; use [`crate::Netns::run`] for another's.

use std::path::PathBuf;
use std::{fs, io};

use crate::{Error, Result};

/// Reads `net/...`, e.g. `net/ipv4/ip_forward`; without the newline at the end.
///
/// # Errors
/// When there is no such parameter in this kernel or namespace.
pub fn read(path: &str) -> Result<String> {
    let file = file("read sysctl", path)?;
    fs::read_to_string(file)
        .map(|value| value.trim_end().to_owned())
        .map_err(|e| Error::io("read sysctl", path, e))
}

/// Writes `value` to `net/...` unless it is what is there already.
///
/// # Errors
/// When there is no such parameter, the kernel refuses the value, or `/proc/sys` is mounted read-only.
pub fn write(path: &str, value: &str) -> Result<()> {
    const OPERATION: &str = "write sysctl";
    let wrap = |e: io::Error| Error::io(OPERATION, format!("{path} = {value:?}"), e);
    let file = file(OPERATION, path)?;
    // Containers often have /proc/sys read-only with the right values in it.
    if fs::read_to_string(&file).is_ok_and(|now| now.trim_end() == value) {
        return Ok(());
    }
    fs::write(&file, value).map_err(wrap)
}

/// Writes `value`; a parameter that this kernel does not have is left alone. Returns whether it is there.
///
/// # Errors
/// As [`write`], but for a missing parameter.
pub fn write_if_present(path: &str, value: &str) -> Result<bool> {
    match write(path, value) {
        Ok(()) => Ok(true),
        Err(e) if e.is_not_found() => Ok(false),
        Err(e) => Err(e),
    }
}

fn file(operation: &'static str, path: &str) -> Result<PathBuf> {
    // Interface names may hold dots, so the dotted notation of sysctl(8) is ambiguous: slashes only.
    if !path.starts_with("net/") || path.split('/').any(|part| part.is_empty() || part == "." || part == "..")
    {
        return Err(Error::invalid(operation, path, "the path must be like net/ipv4/ip_forward"));
    }
    Ok(PathBuf::from("/proc/sys").join(path))
}
