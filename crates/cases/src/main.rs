//! `podway-cases [SUITE…]` runs all suites, or those named, and fails when any case does.

use std::process::ExitCode;

fn main() -> ExitCode {
    let named: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.is_empty()).collect();
    let named: Vec<&str> = named.iter().map(String::as_str).collect();
    podway_cases::print::run(if named.is_empty() { &podway_cases::SUITES } else { &named })
}
