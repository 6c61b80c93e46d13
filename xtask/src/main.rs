//! What the Makefile stands on: building the kernel object, gating it, building and running the tests.
//!
//! `cargo xtask bpf` builds the kernel object; `cargo xtask budget` checks and prints its budget on the
//! running kernel; `cargo xtask test-build` builds every test program and `cargo xtask test-run` runs them,
//! so that the first can be done as an ordinary user and the second as root. `cargo xtask vm` runs the datapath's
//! tests on other kernels.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]

mod bpf;
mod budget;
mod tests;
mod vm;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["bpf"] => bpf::build(),
        ["budget"] => budget::check(),
        ["test-build"] => tests::build(),
        ["cases-build"] => tests::build_cases(),
        ["cases-run"] => tests::run_cases(),
        ["test-run", filters @ ..] => tests::run(filters),
        ["vm", options @ ..] => vm::run(options),
        _ => {
            eprintln!(
                "usage: cargo xtask bpf | budget | test-build | test-run [FILTER…] | cases-build | cases-run | vm [OPTION…]"
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's root.
fn root() -> std::path::PathBuf {
    let manifest = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}
