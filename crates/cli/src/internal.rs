//! Commands that Podway starts itself.

use std::io;

use anyhow::Context as _;
use podway_lab::cgroup::Cgroup;
use podway_lab::{delay, pod_exec, standin, supervisor};
use tracing_subscriber::EnvFilter;

use crate::OK;
use crate::args::Internal;

pub(crate) fn run(command: Internal) -> anyhow::Result<u8> {
    match command {
        Internal::Supervise { lab } => {
            log();
            let result = supervisor::run(&lab);
            if let Err(error) = &result {
                tracing::error!(error = format!("{error:#}"), "the lab ends");
            }
            result.map(|()| OK)
        }
        Internal::StandIn { config } => {
            let text = std::fs::read(&config).with_context(|| format!("read {}", config.display()))?;
            let config =
                serde_json::from_slice(&text).with_context(|| format!("understand {}", config.display()))?;
            Ok(standin::run(config)?)
        }
        // The nodes are there for those who list processes.
        Internal::Delay { lab, micros, a: _, b: _ } => {
            log();
            delay::run(&lab, micros).map(|()| OK)
        }
        Internal::PodExec(args) => Err(pod_exec::PodExec {
            cgroup: args.cgroup.map(Cgroup::at),
            netns: args.netns,
            hostname: args.hostname,
            hosts: args.hosts,
            resolv_conf: args.resolv_conf,
            own_sysfs: args.own_sysfs,
            arg0: args.arg0,
            env: Vec::new(),
            command: args.command,
        }
        .exec()),
    }
}

/// Logs of a process in the background go to standard error, which is its log file.
fn log() {
    let filter = EnvFilter::try_from_env("PODWAY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(io::stderr).init();
}
