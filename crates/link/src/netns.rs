//! Network namespaces: open ones, named ones under `/run/netns`, and running code inside one.
//!
//! A thread that entered a namespace is never used for anything else afterwards: [`Netns::run`] has its own
//! thread each time, so no pool ever holds a worker in the wrong place.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::{Error, Netlink, Result};

/// Where named namespaces live, shared with `ip netns`.
pub const NETNS_DIR: &str = "/run/netns";

const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// An open network namespace. It stays alive for as long as this value, even when its name is removed and
/// its last process is gone.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

impl Netns {
    /// Opens the namespace that a file stands for: `/run/netns/<name>`, `/proc/<pid>/ns/net`.
    ///
    /// # Errors
    /// When the file cannot be opened or is no network namespace.
    pub fn open(path: &Path) -> Result<Self> {
        let wrap =
            |source: io::Error| Error::io("open network namespace", path.display().to_string(), source);
        // A FIFO in the place of the file must not stop us: open without waiting, then look.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).bits())
            .open(path)
            .map_err(wrap)?;
        let kind = nix::sys::statfs::fstatfs(&file).map_err(|e| wrap(e.into()))?.filesystem_type();
        if kind != nix::sys::statfs::NSFS_MAGIC {
            return Err(Error::invalid(
                "open network namespace",
                path.display().to_string(),
                "the file is no namespace (its mount may be gone); recreate the namespace",
            ));
        }
        Ok(Self { fd: file.into() })
    }

    /// Takes over an open namespace file, e.g. one that was received over a socket.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn current() -> Result<Self> {
        Self::open(Path::new(OWN_NAMESPACE))
    }

    /// Creates the namespace `name` under [`NETNS_DIR`], as `ip netns add` does, with its loopback up.
    ///
    /// # Errors
    /// When the name is taken (see [`Error::is_exists`]), is no file name, or the process may not.
    pub fn create_named(name: &str) -> Result<Self> {
        const OPERATION: &str = "create network namespace";
        let path = named_path(OPERATION, name)?;
        let wrap = |source: io::Error| Error::io(OPERATION, name, source);
        prepare_directory().map_err(wrap)?;
        OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path).map_err(wrap)?;
        let made = on_own_thread(|| -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some(OWN_NAMESPACE), &path, Some("none"), MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        });
        let opened = made.map_err(wrap).and_then(|()| Self::open(&path)).and_then(|namespace| {
            let mut netlink = Netlink::open_in(&namespace)?;
            // The loopback is always the first link of a namespace.
            netlink.set_up(1)?;
            Ok(namespace)
        });
        if opened.is_err() {
            // The first error is the one to tell; a name that stays behind would be in the way of the next try.
            let _ = Self::delete_named(name);
        }
        opened
    }

    /// Removes the name. The namespace itself goes when nothing uses it any more. A name that is not there
    /// is no error.
    ///
    /// # Errors
    /// When the name is no file name or the process may not.
    pub fn delete_named(name: &str) -> Result<()> {
        const OPERATION: &str = "delete network namespace";
        let path = named_path(OPERATION, name)?;
        match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // EINVAL: not a mount point, which is what a creation that was interrupted leaves.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(Error::io(OPERATION, name, errno)),
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(OPERATION, name, e)),
        }
    }

    /// Names under [`NETNS_DIR`] that begin with `prefix`, sorted.
    ///
    /// # Errors
    /// When the directory is there but cannot be read.
    pub fn list_named(prefix: &str) -> Result<Vec<String>> {
        let wrap = |e| Error::io("list network namespaces", NETNS_DIR, e);
        let entries = match fs::read_dir(NETNS_DIR) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(wrap(e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            match entry.map_err(wrap)?.file_name().into_string() {
                Ok(name) if name.starts_with(prefix) => names.push(name),
                _ => {}
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Opens the namespace `name` under [`NETNS_DIR`].
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn open_named(name: &str) -> Result<Self> {
        Self::open(&named_path("open network namespace", name)?)
    }

    /// Runs `f` inside the namespace, on a thread of its own, and waits for it. Sockets opened and processes
    /// started by `f` belong to the namespace; the calling thread stays where it is.
    ///
    /// # Errors
    /// When the namespace cannot be entered. A panic of `f` goes on in the caller.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R> {
        on_own_thread(|| -> io::Result<R> {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
            Ok(f())
        })
        .map_err(|source| Error::io("enter network namespace", self.describe(), source))
    }

    /// The open file.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A second handle of the same namespace.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone().map_err(|e| Error::io("duplicate", "network namespace", e))?;
        Ok(Self { fd })
    }

    /// Device and inode of the namespace file: two handles are of the same namespace when these are equal.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn id(&self) -> Result<(u64, u64)> {
        let wrap = |e: io::Error| Error::io("stat", "network namespace", e);
        let file = File::from(self.fd.try_clone().map_err(wrap)?);
        let metadata = file.metadata().map_err(wrap)?;
        Ok((metadata.dev(), metadata.ino()))
    }

    fn describe(&self) -> String {
        self.id().map_or_else(|_| "?".into(), |(_, inode)| format!("net:[{inode}]"))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Runs `f` on a fresh thread and hands a panic on.
fn on_own_thread<R: Send>(f: impl FnOnce() -> io::Result<R> + Send) -> io::Result<R> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("podway-netns".into()).spawn_scoped(scope, f)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Every namespace with a name under [`NETNS_DIR`] or a process visible in `/proc`, once each.
pub(crate) fn reachable() -> Result<Vec<Netns>> {
    let mut paths: Vec<PathBuf> =
        Netns::list_named("")?.into_iter().map(|name| Path::new(NETNS_DIR).join(name)).collect();
    let processes = fs::read_dir("/proc").map_err(|e| Error::io("list", "/proc", e))?;
    paths.extend(processes.flatten().filter_map(|process| {
        let name = process.file_name();
        name.as_encoded_bytes().iter().all(u8::is_ascii_digit).then(|| process.path().join("ns/net"))
    }));
    let mut seen = HashSet::new();
    let mut namespaces = Vec::new();
    for path in paths {
        // A process that has just ended, or a name whose mount is gone, is no namespace any more.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if seen.insert((metadata.dev(), metadata.ino()))
            && let Ok(namespace) = Netns::open(&path)
        {
            namespaces.push(namespace);
        }
    }
    Ok(namespaces)
}

fn named_path(operation: &'static str, name: &str) -> Result<PathBuf> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) || name.len() > 255 {
        return Err(Error::invalid(
            operation,
            format!("{name:?}"),
            "the name must be a file name of 1 to 255 bytes without '/'",
        ));
    }
    Ok(Path::new(NETNS_DIR).join(name))
}

/// Makes [`NETNS_DIR`] a shared mount, so that a namespace that is deleted here is unmounted in every other
/// mount namespace too instead of being kept alive there.
fn prepare_directory() -> io::Result<()> {
    fs::create_dir_all(NETNS_DIR)?;
    // Two processes that both find the directory unprepared would mount it over itself twice. iproute2
    // takes the same lock.
    let directory = File::open(NETNS_DIR)?;
    let _lock = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let share =
        || mount(None::<&str>, NETNS_DIR, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    match share() {
        Ok(()) => Ok(()),
        // Not a mount point yet.
        Err(Errno::EINVAL) => {
            mount(
                Some(NETNS_DIR),
                NETNS_DIR,
                Some("none"),
                MsFlags::MS_BIND | MsFlags::MS_REC,
                None::<&str>,
            )?;
            Ok(share()?)
        }
        Err(errno) => Err(errno.into()),
    }
}
