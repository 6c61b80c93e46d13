//! The `podway` binary: Kubernetes networking on one machine, and the parts of it that production runs.
//!
//! Called as `podway-cni` it is the CNI plugin. That is decided before anything else, because a container
//! runtime starts the plugin for every pod and waits for it.

mod agent;
mod args;
mod bench;
mod cleanup;
mod flows;
mod internal;
mod lab;
mod output;
mod policy;
mod services;

use std::path::Path;
use std::process::ExitCode;

use clap::Parser as _;

use args::{Cli, Command};

/// Everything as asked.
const OK: u8 = 0;
/// Something was not as it should be.
const FAILED: u8 = 1;
/// The command line makes no sense; clap uses the same code.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name().is_some_and(|n| n == "podway-cni") {
        return podway_cni::plugin::main();
    }
    let result = match Cli::parse().command {
        Command::Lab(command) => lab::run(command),
        Command::Agent(args) => agent::run(args),
        Command::Cleanup(args) => match args.of {
            Some(whose) => cleanup::run(&args, whose),
            None => agent::cleanup(&args),
        },
        Command::Services(args) => services::run(&args),
        Command::Flows(args) => flows::run(args),
        Command::Policy(command) => policy::run(command),
        Command::Conntrack(args) => agent::conntrack(&args),
        Command::Bench(command) => bench::run(command),
        Command::Internal(command) => internal::run(command),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::error(&format!("podway: {}", output::told(&error)));
            let usage = error.is::<podway_lab::spec::BadOption>()
                || matches!(error.downcast_ref(), Some(podway_agent::AgentError::Config(_)));
            ExitCode::from(if usage { USAGE } else { FAILED })
        }
    }
}
