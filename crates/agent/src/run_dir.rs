//! The agent's directory, and the lock that makes sure there is one agent for each.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Name of the lock file; it holds the process id.
pub const LOCK: &str = "agent.lock";
/// Name of the CNI socket.
pub const SOCKET: &str = "agent.sock";
/// Name of the address journal.
pub const LEASES: &str = "leases";

/// Why the directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// It cannot be made or written.
    #[error("run directory {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent has it.
    #[error("an agent of this instance runs already{} (lock {})", pid.map(|p| format!(", process {p}")).unwrap_or_default(), path.display())]
    Taken {
        /// The lock file.
        path: PathBuf,
        /// The process, as far as the file says.
        pid: Option<u32>,
    },
}

/// The lock. It is released when this is dropped, or the process ends however it may.
#[derive(Debug)]
pub struct RunDirLock {
    _lock: Flock<File>,
}

/// Makes the directory (mode 0700) and takes its lock.
///
/// # Errors
/// It cannot be made, or another agent has it.
pub fn take(dir: &Path) -> Result<RunDirLock, RunDirError> {
    let fail = |source| RunDirError::Io { path: dir.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(fail)?;
    let path = dir.join(LOCK);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(fail)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // For people and for the message of the next one who wants it; the lock itself is the flock.
            lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).ok();
            Ok(RunDirLock { _lock: lock })
        }
        Err((mut file, _)) => {
            let mut text = String::new();
            file.read_to_string(&mut text).ok();
            Err(RunDirError::Taken { path, pid: text.trim().parse().ok() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = take(&path).unwrap();
        let error = take(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        assert!(take(&path).is_ok());
    }
}
