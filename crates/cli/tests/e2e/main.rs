//! The binary as a user runs it: labs come up, packets move, processes die, and nothing is left.
//!
//! Each test has a lab of its own, so they run side by side. They need root, the kernel object, and the programs
//! that `make setup` installs; without root they say so and pass.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it skips"
)]

mod attachments;
mod capabilities;
mod faults;
mod flows;
mod lab;
mod links;
mod live;
mod paths;
mod policy;
mod projects;
mod runtimes;
mod semantics;
mod services;
