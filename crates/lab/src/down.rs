//! Removing a lab, whatever is left of it: after a normal run, after `kill -9` of anything, and again.
//!
//! It does not rely on the lab's own files: names and paths follow from the lab's name. Every step is tried
//! even when an earlier one failed, and what is still there is told.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use podway_link::Netns;

use crate::cgroup::Cgroup;
use crate::spec::{LabName, PIN_DIR, RUN_DIR, labs_dir};
use crate::state::Lock;

/// How long killed processes may take to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a removal did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// What was there and is gone.
    pub removed: Vec<String>,
    /// What is still there, with the cause.
    pub left: Vec<String>,
}

/// Removes the lab.
///
/// # Errors
/// When the lock cannot be taken, or when the caller itself runs inside the lab.
pub fn down(lab: &LabName) -> anyhow::Result<Removal> {
    let _lock = Lock::acquire()?;
    remove(lab)
}

/// As [`down`], for a caller that has the lock.
pub(crate) fn remove(lab: &LabName) -> anyhow::Result<Removal> {
    let mut out = Removal::default();
    let cgroup = Cgroup::of_lab(lab)?;
    if cgroup.holds_caller() {
        anyhow::bail!("this command runs inside lab {lab} and would end itself; run it from outside");
    }
    if cgroup.path().exists() {
        match cgroup.kill_and_wait(PATIENCE) {
            Ok(true) => out.note("processes and control groups", cgroup.remove()),
            Ok(false) => out.left.push(format!(
                "processes in {}: still there {} s after SIGKILL",
                cgroup.path().display(),
                PATIENCE.as_secs()
            )),
            Err(e) => out.left.push(format!("processes: {e}")),
        }
    }
    match Netns::list_named(&lab.netns_prefix()) {
        Ok(names) => {
            let mut gone = 0;
            for name in names {
                match Netns::delete_named(&name) {
                    Ok(()) => gone += 1,
                    Err(e) => out.left.push(e.to_string()),
                }
            }
            if gone > 0 {
                out.removed.push(format!("{gone} network namespaces"));
            }
        }
        Err(e) => out.left.push(e.to_string()),
    }
    out.remove_tree("pinned BPF objects", &lab.pin_dir());
    out.remove_tree("agents' files", &lab.agents_dir());
    out.remove_tree("state", &lab.state_dir());
    // Shared parents go with the last lab; others may still need them.
    for dir in [labs_dir().as_path(), Path::new(RUN_DIR), Path::new(PIN_DIR)] {
        let _ = fs::remove_dir(dir);
    }
    if let Some(parent) = cgroup.path().parent() {
        let _ = fs::remove_dir(parent);
    }
    Ok(out)
}

impl Removal {
    fn note(&mut self, what: &str, result: io::Result<()>) {
        match result {
            Ok(()) => self.removed.push(what.to_owned()),
            Err(e) => self.left.push(format!("{what}: {e}")),
        }
    }

    fn remove_tree(&mut self, what: &str, dir: &Path) {
        match fs::remove_dir_all(dir) {
            Ok(()) => self.removed.push(format!("{what} in {}", dir.display())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => self.left.push(format!("{what} in {}: {e}", dir.display())),
        }
    }
}
