//! Namespaces that a bench makes and removes again, whatever happens in between.

use anyhow::{Context as _, bail};
use podway_link::Netns;

/// What the name of every namespace of a bench begins with.
const PREFIX: &str = "podway-bench-";

/// Keeps other benches of this machine from running at the same time: they would measure each other. The name goes
/// with the process, so nothing is left of it.
#[derive(Debug)]
pub struct OnlyOne {
    _socket: std::os::unix::net::UnixListener,
}

impl OnlyOne {
    /// Takes the place.
    ///
    /// # Errors
    /// When another bench has it, or the caller is not root.
    pub fn take() -> anyhow::Result<Self> {
        use std::os::linux::net::SocketAddrExt as _;
        use std::os::unix::net::{SocketAddr, UnixListener};
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "a bench makes network namespaces and loads BPF programs, which needs root; run it with sudo"
            );
        }
        let address = SocketAddr::from_abstract_name("podway-bench").context("name the lock")?;
        match UnixListener::bind_addr(&address) {
            Ok(socket) => Ok(Self { _socket: socket }),
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                bail!("another podway bench runs on this machine; wait for it, they would measure each other")
            }
            Err(e) => Err(e).context("take the lock of the bench"),
        }
    }
}

/// A group of namespaces, removed when it goes.
#[derive(Debug)]
pub struct Group {
    prefix: String,
}

impl Group {
    /// A group by its name. Namespaces that a run before left behind are removed.
    ///
    /// # Errors
    /// When they cannot be removed.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let group = Self { prefix: format!("{PREFIX}{name}-") };
        group.remove()?;
        Ok(group)
    }

    /// The whole name of a namespace of the group.
    #[must_use]
    pub fn name(&self, part: &str) -> String {
        format!("{}{part}", self.prefix)
    }

    /// Makes a namespace of the group.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create(&self, part: &str) -> anyhow::Result<Netns> {
        Ok(Netns::create_named(&self.name(part))?)
    }

    fn remove(&self) -> anyhow::Result<()> {
        for name in Netns::list_named(&self.prefix)? {
            Netns::delete_named(&name)?;
        }
        Ok(())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The next run tries again and says so.
        let _ = self.remove();
    }
}
