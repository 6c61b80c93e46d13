//! Suites run for people who look at a terminal.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is what people see")]

use std::process::ExitCode;

/// Runs suites and prints what did not come out, what has no counterpart, and a line with the counts of each.
pub fn run(suites: &[&str]) -> ExitCode {
    let root = crate::root();
    if !root.is_dir() {
        println!("skipped: there are no cases at {}; set PODWAY_CASES to where they are", root.display());
        return ExitCode::SUCCESS;
    }
    let mut failed = false;
    for suite in suites {
        if crate::SUITES.contains(suite) && !root.join(suite).is_dir() {
            println!("{suite}: skipped, it is not at {}", root.display());
            continue;
        }
        match crate::run(suite, &root) {
            Ok(tally) => {
                failed |= !tally.failed().is_empty();
                tally.failed().iter().for_each(|case| println!("FAILED {case}"));
                for (why, cases) in tally.inapplicable() {
                    println!("not applicable: {why}");
                    cases.iter().for_each(|case| println!("    {case}"));
                }
                println!("{suite}: {tally}");
            }
            Err(error) => {
                eprintln!("error: {suite}: {error:#}");
                failed = true;
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
