//! Control groups (cgroup v2): every process of a lab lives in one subtree, so that one write ends them all.
//!
//! No controllers are switched on: the groups are only there to find and to end processes, and to be the place
//! that socket programs attach to. Works beside cgroup v1 (hybrid hosts).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::spec::LabName;

/// Between two looks at a group that is being emptied.
const POLL: Duration = Duration::from_millis(10);

/// A group, by its folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// The group of a lab: `<cgroup2 mount>/podway/<lab>`. It need not exist yet.
    ///
    /// # Errors
    /// When no cgroup v2 hierarchy is mounted.
    pub fn of_lab(lab: &LabName) -> io::Result<Self> {
        Ok(Self(mount_point()?.join("podway").join(lab.as_str())))
    }

    /// The group of a folder.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// A group below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Creates it and the groups above it. One that is there is no error.
    ///
    /// # Errors
    /// With the folder and the cause.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir_all(&self.0).map_err(|e| named(&e, &self.0))
    }

    /// Moves the calling process, with all its threads, into the group.
    ///
    /// # Errors
    /// With the folder and the cause.
    pub fn join(&self) -> io::Result<()> {
        let file = self.0.join("cgroup.procs");
        fs::write(&file, "0").map_err(|e| named(&e, &file))
    }

    /// Whether the calling process is in the group or below it.
    #[must_use]
    pub fn holds_caller(&self) -> bool {
        let Ok(mount) = mount_point() else { return false };
        fs::read_to_string("/proc/self/cgroup").is_ok_and(|text| {
            text.lines()
                .filter_map(|l| l.strip_prefix("0::/"))
                .any(|own| mount.join(own).starts_with(&self.0))
        })
    }

    /// Kills every process in the group and below it. A group that is not there is empty.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.0.join("cgroup.kill"), "1") {
            Ok(()) => Ok(()),
            Err(e) if gone(&e) => Ok(()),
            Err(e) => Err(named(&e, &self.0)),
        }
    }

    /// Whether a process lives in the group or below it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn is_populated(&self) -> io::Result<bool> {
        match fs::read_to_string(self.0.join("cgroup.events")) {
            Ok(text) => Ok(text.lines().any(|l| l == "populated 1")),
            Err(e) if gone(&e) => Ok(false),
            Err(e) => Err(named(&e, &self.0)),
        }
    }

    /// Kills what is in the group and waits until it is gone. Returns whether it is empty.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill_and_wait(&self, limit: Duration) -> io::Result<bool> {
        let end = Instant::now() + limit;
        self.kill()?;
        while self.is_populated()? {
            if Instant::now() >= end {
                return Ok(false);
            }
            std::thread::sleep(POLL);
        }
        Ok(true)
    }

    /// Removes the group and the groups below it. They must be empty; one that is not there is no error.
    ///
    /// # Errors
    /// With the folder and the cause.
    pub fn remove(&self) -> io::Result<()> {
        remove_tree(&self.0)
    }
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(named(&e, dir)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    // A group whose last process has just ended can be busy for a moment longer.
    let end = Instant::now() + Duration::from_secs(1);
    loop {
        match fs::remove_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(POLL);
            }
            Err(e) if !gone(&e) => return Err(named(&e, dir)),
            _ => return Ok(()),
        }
    }
}

/// The folder vanished: before the look (ENOENT) or between opening and reading (ENODEV).
fn gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(nix::errno::Errno::ENODEV as i32)
}

fn named(e: &io::Error, path: &Path) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

/// Where the cgroup v2 hierarchy is mounted.
///
/// # Errors
/// When it is not, with what to do.
pub fn mount_point() -> io::Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    find_mount(&table).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "no cgroup v2 hierarchy is mounted; mount one: \
             mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
        )
    })
}

/// Fields of a line: proc(5), mountinfo.
fn find_mount(table: &str) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next()? == "cgroup2")
            .then(|| PathBuf::from(left.split(' ').nth(4).unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_in_pure_and_hybrid_hierarchies() {
        for (table, want) in [
            ("30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n", Some("/sys/fs/cgroup")),
            (
                "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw shared:1 - \
                 cgroup cgroup rw,cpu\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
                Some("/sys/fs/cgroup/unified"),
            ),
            ("22 27 0:21 / /proc rw - proc proc rw\n", None),
        ] {
            assert_eq!(find_mount(table), want.map(PathBuf::from));
        }
    }
}
