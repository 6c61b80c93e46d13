//! A node with pods, pods elsewhere and clients outside, as network namespaces; and scenarios that every writer passes.
#![allow(dead_code, reason = "not every test program uses all of it")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a test stops at the first surprise, and says what it leaves out"
)]

pub mod scenarios;
pub mod world;

/// Whether to go on; says so when not.
pub fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}
