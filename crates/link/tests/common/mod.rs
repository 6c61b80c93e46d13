//! Namespaces for tests: made anew (also after a run that crashed), gone at the end.

#![expect(clippy::print_stdout, reason = "a skipped test says so")]

use podway_link::{Netlink, Netns};

/// True when the test can make namespaces; says so when not.
pub(crate) fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

/// A named namespace that goes with this value.
pub(crate) struct Namespace {
    pub(crate) name: String,
    pub(crate) netns: Netns,
}

impl Namespace {
    pub(crate) fn new(name: &str) -> Self {
        let name = format!("pwt-link-{name}");
        Netns::delete_named(&name).unwrap();
        Self { netns: Netns::create_named(&name).unwrap(), name }
    }

    pub(crate) fn netlink(&self) -> Netlink {
        Netlink::open_in(&self.netns).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        Netns::delete_named(&self.name).unwrap();
    }
}
