//! Agents in network namespaces: two nodes on a bridge, an API server, pods attached through the agent's socket.
//!
//! Needs root and a binary with the kernel object; says so and succeeds without. The agents are processes of
//! their own (this file started again with `agent` as its first argument), so that they can be killed. Names begin with
//! `pwt-agent`; what an interrupted run left is removed by the next one.

#![expect(clippy::print_stdout, reason = "a test program without harness tells what it does")]
#![expect(clippy::unwrap_used, reason = "a failed step of a test panics")]

mod capabilities;
mod scenarios;
mod world;

use std::io::Read as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use podway_agent::services::config::ServiceMode;
use podway_agent::{AgentConfig, Credentials, Instance, LogFormat, NetworkMode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|a| a == "agent") {
        return agent(&arguments[1..]);
    }
    if arguments.iter().any(|a| a == "--list") {
        return ExitCode::SUCCESS;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return ExitCode::SUCCESS;
    }
    if !podway_bpf_host::is_built_in() {
        println!("skipped: built without the kernel object (cargo xtask bpf)");
        return ExitCode::SUCCESS;
    }
    let filter = arguments.iter().find(|a| !a.starts_with('-'));
    let mut failed = Vec::new();
    for (name, scenario) in scenarios::ALL.iter().chain(capabilities::ALL) {
        if filter.is_some_and(|f| !name.contains(f.as_str())) {
            continue;
        }
        let begun = Instant::now();
        println!("{name} ...");
        let passed = catch_unwind(AssertUnwindSafe(scenario)).is_ok();
        println!("{name} {} ({:.1} s)", if passed { "ok" } else { "FAILED" }, begun.elapsed().as_secs_f64());
        if !passed {
            failed.push(name);
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed: {failed:?}");
    ExitCode::FAILURE
}

/// `agent NODE KUBECONFIG INSTANCE [mtu=N] [direct] [underlay6]`: an agent that ends with its parent.
fn agent(arguments: &[String]) -> ExitCode {
    let [node, kubeconfig, instance, rest @ ..] = arguments else { return ExitCode::FAILURE };
    std::thread::spawn(|| {
        let mut end = Vec::new();
        std::io::stdin().read_to_end(&mut end).ok();
        std::process::abort();
    });
    podway_agent::logging::init(LogFormat::Text);
    let credentials = Credentials::Kubeconfig(kubeconfig.into());
    let mut config = AgentConfig::new(node, Instance::parse(instance).unwrap(), credentials);
    // Socket programs would be attached to the whole machine.
    config.services.mode = ServiceMode::None;
    for option in rest {
        match option.split_once('=') {
            Some(("mtu", mtu)) => config.pod_mtu = Some(mtu.parse().unwrap()),
            None if option == "direct" => config.mode = NetworkMode::Direct,
            None if option == "underlay6" => config.underlay_v6 = Some(true),
            _ => panic!("unknown option {option:?}"),
        }
    }
    match podway_agent::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the agent cannot run");
            ExitCode::FAILURE
        }
    }
}
