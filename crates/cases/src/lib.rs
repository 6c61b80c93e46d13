//! Cases of other projects' test suites, kept as data outside of this one, run against Podway.
//!
//! A [`suite`](run) reads its folder, maps each case to what corresponds here, and compares. What has no counterpart
//! is counted apart and named with the reason, so that nothing is passed over in silence.

pub mod data;
pub mod dns;
pub mod netpol;
pub mod print;
pub mod services;
pub mod tally;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
pub use tally::Tally;

/// The suites, by the name of their folder.
pub const SUITES: [&str; 3] = ["dns", "netpol", "services"];

/// Where the cases are: `$PODWAY_CASES`, or beside the project.
pub fn root() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/cases");
    std::env::var_os("PODWAY_CASES").map_or(beside, PathBuf::from)
}

/// Runs a suite whose folder is in `root`.
///
/// # Errors
/// There is no such suite, or its data cannot be read. A case that does not come out is no error, but counted.
pub fn run(suite: &str, root: &Path) -> Result<Tally> {
    match suite {
        "dns" => dns::run(&root.join("dns")),
        "netpol" => netpol::run(&root.join("netpol")),
        "services" => services::run(&root.join("services")),
        other => bail!("there is no suite {other:?}; there is {}", SUITES.join(", ")),
    }
}
