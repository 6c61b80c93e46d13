//! Removes every trace of an agent: works without one, and without the API server.
//!
//! Works in the network namespace of the caller, which must be the node's. What the agent switched on for the
//! whole node (forwarding) stays on: others may rely on it.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podway_bpf_host::Datapath;
use podway_link::{Netlink, ROUTE_PROTOCOL, RouteFilter};

use crate::config::{GATEWAY_V4, TUNNEL_DEVICE};
use crate::ids::Instance;
use crate::network::pod_link;
use crate::nft::{self, NftError};
use crate::run_dir::{self, RunDirError, RunDirLock};
use crate::{host_ports, masquerade};

/// How long an agent may take to end that was killed.
const ENDING: Duration = Duration::from_secs(2);

/// What was done.
#[derive(Debug, Default)]
pub struct CleanupReport {
    /// What was removed, one line each.
    pub removed: Vec<String>,
    /// What could not be, with the reason.
    pub failed: Vec<String>,
}

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// The agent runs.
    #[error("{0}; stop it first (pods on this node lose their network), or use --force")]
    AgentRuns(RunDirError),
}

impl CleanupReport {
    fn done(&mut self, what: impl fmt::Display) {
        self.removed.push(what.to_string());
    }

    fn failed(&mut self, what: &str, why: impl fmt::Display) {
        self.failed.push(format!("{what}: {why}"));
    }
}

/// Removes links, routes, rules, programs, tables and files of an agent. Goes on after a failure and reports all.
///
/// # Errors
/// The agent runs, and `force` is not given.
pub fn cleanup(instance: &Instance, force: bool) -> Result<CleanupReport, CleanupError> {
    let run_dir = instance.run_dir();
    let mut report = CleanupReport::default();
    // Held to the end, so that no agent starts in between.
    let _lock = if run_dir.exists() {
        match take(&run_dir, force) {
            Ok(lock) => Some(lock),
            Err(taken @ RunDirError::Taken { .. }) if !force => return Err(CleanupError::AgentRuns(taken)),
            Err(error) => {
                report.failed("lock", error);
                None
            }
        }
    } else {
        None
    };
    kernel(&mut report);
    for table in [masquerade::TABLE, host_ports::TABLE] {
        match nft::remove(table) {
            Ok(true) => report.done(format_args!("nftables table inet {table}")),
            Ok(false) | Err(NftError::Missing(_)) => {}
            Err(error) => report.failed("nftables", error),
        }
    }
    report.removed.extend(crate::services::mechanisms::remove_rules());
    let pin_dir = instance.pin_dir();
    if pin_dir.exists() {
        match Datapath::remove_all(&pin_dir) {
            Ok(pins) => report.removed.extend(pins),
            Err(error) => report.failed("pinned programs and tables", error),
        }
    }
    files(&run_dir, &mut report);
    Ok(report)
}

/// An agent that was killed holds its lock until the kernel has taken the process apart; whoever uses force has as a rule
/// just killed it.
fn take(run_dir: &Path, force: bool) -> Result<RunDirLock, RunDirError> {
    let begun = Instant::now();
    loop {
        match run_dir::take(run_dir) {
            Err(RunDirError::Taken { .. }) if force && begun.elapsed() < ENDING => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

fn kernel(report: &mut CleanupReport) {
    let mut netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(error) => return report.failed("links and routes", error),
    };
    let links = netlink.links().unwrap_or_else(|error| {
        report.failed("links", error);
        Vec::new()
    });
    for link in links {
        let pod = pod_link(&link).map(|(id, _)| format!("link {} of {id}", link.name));
        let tunnel = (link.name == TUNNEL_DEVICE && link.kind.as_deref() == Some("vxlan"))
            .then(|| format!("link {TUNNEL_DEVICE}"));
        let Some(what) = pod.or(tunnel) else { continue };
        match netlink.delete_link(link.index) {
            Ok(true) => report.done(what),
            Ok(false) => {}
            Err(error) => report.failed(&what, error),
        }
    }
    let filter = RouteFilter { protocol: Some(ROUTE_PROTOCOL), ..RouteFilter::default() };
    // The routes of the links above went with them.
    let routes = netlink.routes(filter).unwrap_or_else(|error| {
        report.failed("routes", error);
        Vec::new()
    });
    for route in routes {
        let what = format!("route {}", route.dst);
        match netlink.delete_route(&route) {
            Ok(true) => report.done(what),
            Ok(false) => {}
            Err(error) => report.failed(&what, error),
        }
    }
    let unreachable = netlink.unreachable_routes(ROUTE_PROTOCOL).unwrap_or_else(|error| {
        report.failed("unreachable routes", error);
        Vec::new()
    });
    for dst in unreachable {
        let what = format!("unreachable route {dst}");
        match netlink.delete_unreachable(dst, ROUTE_PROTOCOL) {
            Ok(true) => report.done(what),
            Ok(false) => {}
            Err(error) => report.failed(&what, error),
        }
    }
    let held = netlink.held_everywhere().unwrap_or_else(|error| {
        report.failed("addresses of load balancers", error);
        Vec::new()
    });
    for (link, address) in held {
        match netlink.delete_address(link, IpNet::from(address)) {
            Ok(true) => report.done(format_args!("load balancer address {address}")),
            Ok(false) => {}
            Err(error) => report.failed(&format!("load balancer address {address}"), error),
        }
    }
    let gateway = IpNet::from(std::net::IpAddr::V4(GATEWAY_V4));
    match netlink.delete_address(1, gateway) {
        Ok(true) => report.done(format_args!("address {gateway} on lo")),
        Ok(false) => {}
        Err(error) => report.failed(&format!("address {gateway} on lo"), error),
    }
}

fn files(run_dir: &Path, report: &mut CleanupReport) {
    if !run_dir.exists() {
        return;
    }
    match std::fs::remove_dir_all(run_dir) {
        Ok(()) => report.done(format_args!("directory {}", run_dir.display())),
        Err(error) => report.failed(&run_dir.display().to_string(), error),
    }
    // The directories above, when this was the last in them; another agent's stay because they are not empty.
    let mut above = run_dir.parent();
    while let Some(dir) = above.filter(|d| d.starts_with("/run/podway")) {
        if std::fs::remove_dir(dir).is_err() {
            return;
        }
        above = dir.parent();
    }
}
