//! All suites as one of the project's tests. Without the test harness, so that the counts are seen whenever it runs.

fn main() -> std::process::ExitCode {
    podway_cases::print::run(&podway_cases::SUITES)
}
