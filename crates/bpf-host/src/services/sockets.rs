//! The socket hooks on a cgroup: attached, replaced, detached.
//!
//! Links are pinned, so that they outlive the agent. A successor attaches its program beside the old one and renames
//! its pin over the old one's, which lets go of that: no call is without a program in between, and a call that meets
//! both is translated by the first and left alone by the second.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::programs::{CgroupAttachMode, CgroupSockAddr, links::FdLink};

use crate::{Datapath, Error, Result};

/// The programs, as the kernel object names them.
const PROGRAMS: [&str; 8] = [
    "sock_connect4",
    "sock_connect6",
    "sock_sendmsg4",
    "sock_sendmsg6",
    "sock_recvmsg4",
    "sock_recvmsg6",
    "sock_getpeername4",
    "sock_getpeername6",
];

impl Datapath {
    /// Translates services for the sockets of all processes below `cgroup` (of the unified hierarchy), or replaces the
    /// programs that do. What is attached to other cgroups under the same pins is detached afterwards.
    ///
    /// # Errors
    /// When the cgroup cannot be opened, or the kernel refuses a program.
    pub fn attach_sockets(&self, cgroup: &Path) -> Result<()> {
        let failed = |e| Error::io("open the cgroup", cgroup, e);
        let directory = File::open(cgroup).map_err(failed)?;
        let inode = directory.metadata().map_err(failed)?.ino();
        let links = self.pin_dir.join("links");
        let mut ebpf = self.ebpf();
        for name in PROGRAMS {
            let program: &mut CgroupSockAddr = ebpf
                .program_mut(name)
                .ok_or(Error::Missing { what: "program", name })?
                .try_into()
                .map_err(|source| Error::load(name, source))?;
            match program.load() {
                Ok(()) | Err(aya::programs::ProgramError::AlreadyLoaded) => {}
                Err(source) => return Err(Error::load(name, source)),
            }
            attach(program, name, &directory, cgroup, &links.join(format!("cgroup-{inode}-{name}")))?;
        }
        let kept = format!("cgroup-{inode}-");
        remove_links(&links, |name| !name.starts_with(&kept) || name.ends_with(NEW))
    }

    /// Translates sockets no more; connections that are there stay.
    ///
    /// # Errors
    /// When a link that is pinned cannot be removed.
    pub fn detach_sockets(&self) -> Result<()> {
        remove_links(&self.pin_dir.join("links"), |_| true)
    }

    /// Whether every socket program is attached to this cgroup as far as the pins tell.
    pub fn sockets_are_attached(&self, cgroup: &Path) -> bool {
        let Ok(inode) = fs::metadata(cgroup).map(|m| m.ino()) else { return false };
        let links = self.pin_dir.join("links");
        PROGRAMS.iter().all(|name| links.join(format!("cgroup-{inode}-{name}")).exists())
    }
}

/// Ending of a pin that is about to replace another.
const NEW: &str = "-new";

fn attach(
    program: &mut CgroupSockAddr,
    name: &'static str,
    directory: &File,
    cgroup: &Path,
    pin: &Path,
) -> Result<()> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| Error::Attach {
        operation: "attach",
        hook: name,
        interface: cgroup.display().to_string(),
        source: e,
    };
    // Links are beside one another in any case; the kernel takes no flag for it (`cgroup_bpf_link_attach`).
    let id = program.attach(directory, CgroupAttachMode::Single).map_err(|e| failed(e.into()))?;
    let link = program.take_link(id).map_err(|e| failed(e.into()))?;
    let link = FdLink::try_from(link).map_err(|e| failed(e.into()))?;
    let mut new = pin.as_os_str().to_owned();
    new.push(NEW);
    let new = PathBuf::from(new);
    remove(&new)?;
    link.pin(&new).map_err(|e| failed(e.into()))?;
    fs::rename(&new, pin).map_err(|e| Error::io("replace", pin, e))
}

/// Removes pins of socket hooks.
fn remove_links(links: &Path, which: impl Fn(&str) -> bool) -> Result<()> {
    let entries = match fs::read_dir(links) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("read", links, e)),
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.starts_with("cgroup-") && which(name) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn remove(pin: &Path) -> Result<()> {
    match fs::remove_file(pin) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("remove", pin, e)),
    }
}
