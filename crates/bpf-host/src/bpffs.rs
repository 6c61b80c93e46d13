//! The BPF file system: mounting it, and removing what is pinned there.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::{Error, Result};

/// The place where every tool expects bpffs.
const DEFAULT_MOUNT: &str = "/sys/fs/bpf";

/// Mounts bpffs at its usual place when `pin_dir` lies there and nothing is mounted yet.
///
/// Several agents may start at the same time: a mount that has appeared in between is as good.
pub(crate) fn ensure_mounted(pin_dir: &Path) -> Result<()> {
    let root = existing_ancestor(pin_dir);
    if is_bpffs(&root) {
        return Ok(());
    }
    let default = Path::new(DEFAULT_MOUNT);
    if !pin_dir.starts_with(default) {
        let source =
            std::io::Error::other("it is not on a BPF file system; mount one there or choose /sys/fs/bpf");
        return Err(Error::io("pin under", pin_dir, source));
    }
    mount(Some("bpf"), default, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .or_else(|e| if is_bpffs(default) { Ok(()) } else { Err(e) })
        .map_err(|e| Error::io("mount a BPF file system at", default, e.into()))
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

fn existing_ancestor(path: &Path) -> PathBuf {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// Removes a directory tree on bpffs; the last reference to a link detaches its program.
pub(crate) fn remove_tree(dir: &Path) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let mut failed = None;
    remove_into(dir, &mut removed, &mut failed);
    match failed {
        Some(e) => Err(e),
        None => Ok(removed),
    }
}

fn remove_into(dir: &Path, removed: &mut Vec<String>, failed: &mut Option<Error>) {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
        Err(e) => {
            failed.get_or_insert(Error::io("read", dir, e));
            return;
        }
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_into(&path, removed, failed);
        } else {
            match fs::remove_file(&path) {
                Ok(()) => removed.push(path.display().to_string()),
                Err(e) => {
                    failed.get_or_insert(Error::io("remove", &path, e));
                }
            }
        }
    }
    match fs::remove_dir(dir) {
        Ok(()) => {}
        Err(e) => {
            failed.get_or_insert(Error::io("remove", dir, e));
        }
    }
}
