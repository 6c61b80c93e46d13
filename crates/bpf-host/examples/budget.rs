//! Prints how the running kernel's verifier takes the programs, and fails when they are over the budget.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]

use std::{path::PathBuf, process::ExitCode};

use podway_bpf_host::Datapath;

/// 60% of the verifier's limit of one million.
const MAX_INSTRUCTIONS: u32 = 600_000;

fn main() -> ExitCode {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("error: loading programs needs root");
        return ExitCode::from(2);
    }
    let pins = PathBuf::from(format!("/sys/fs/bpf/podway-budget-{}", std::process::id()));
    let programs = Datapath::load(&pins).and_then(|datapath| datapath.programs());
    let removed = Datapath::remove_all(&pins);
    let programs = match (programs, removed) {
        (Ok(programs), Ok(_)) => programs,
        (Err(e), _) | (_, Err(e)) => {
            eprintln!("error: {e}");
            return ExitCode::FAILURE;
        }
    };
    println!("{:<14} {:>24} {:>14}", "program", "verifier instructions", "bytes");
    let mut worst = 0;
    for program in &programs {
        let walked = program.verified_instructions.unwrap_or_default();
        println!("{:<14} {walked:>24} {:>14}", program.hook, program.translated_bytes.unwrap_or_default());
        worst = worst.max(walked);
    }
    println!("most {worst} instructions, budget {MAX_INSTRUCTIONS} of 1000000");
    if worst > MAX_INSTRUCTIONS { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
