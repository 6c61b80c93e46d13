//! `podway agent`, `podway cleanup` and `podway conntrack`: the production side, each a thin door to its crate.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use podway_agent::flows::FlowsConfig;
use podway_agent::services::config::ServicesConfig;
use podway_agent::{AgentConfig, AgentError, CleanupReport, Credentials, Masquerade, NetworkMode};
use podway_bpf_host::{Datapath, Flow};
use serde_json::json;

use crate::args::{Agent, Cleanup, Conntrack, Mode, OutputFormat, UnderlayFamily};
use crate::output::{self, table};
use crate::{FAILED, OK};

/// Protocol numbers that people know by name (IANA).
const PROTOCOLS: [(u8, &str); 5] = [(1, "icmp"), (6, "tcp"), (17, "udp"), (58, "icmpv6"), (132, "sctp")];

pub(crate) fn run(args: Agent) -> anyhow::Result<u8> {
    podway_agent::logging::init(args.log_format);
    let credentials = args.kubeconfig.map_or(Credentials::InCluster, Credentials::Kubeconfig);
    let mut config = AgentConfig::new(args.node_name, args.instance.instance, credentials);
    config.mode = match args.mode {
        Mode::Vxlan => NetworkMode::Vxlan { port: args.vxlan_port, vni: args.vxlan_vni },
        Mode::Direct => NetworkMode::Direct,
    };
    config.underlay_v6 = args.underlay_family.map(|f| matches!(f, UnderlayFamily::Ipv6));
    config.pod_mtu = args.pod_mtu;
    config.masquerade = Masquerade { enabled: args.masquerade, exclude: args.masquerade_exclude };
    config.metrics_address = (!args.no_metrics).then_some(args.metrics_address);
    config.probe_port = args.probe_port;
    config.services = ServicesConfig {
        mode: args.service_mode.of_agent(),
        service_cidrs: args.service_cidr,
        node_port_addresses: args.node_port_addresses,
        masquerade_all: args.masquerade_all,
        ipvs_scheduler: args.ipvs_scheduler,
        cgroup: args.cgroup,
        load_balancer_pool: args.load_balancer_pool,
    };
    config.flows = FlowsConfig { enabled: args.flows, history: args.flow_history };
    match podway_agent::run(config) {
        Ok(()) => Ok(OK),
        // What is wrong with the command line is told like every command's.
        Err(error @ AgentError::Config(_)) => Err(error.into()),
        Err(error) if tracing::enabled!(tracing::Level::ERROR) => {
            tracing::error!(%error, "the agent cannot run");
            Ok(FAILED)
        }
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn cleanup(args: &Cleanup) -> anyhow::Result<u8> {
    let instance = &args.instance.instance;
    let CleanupReport { removed, failed } = podway_agent::cleanup(instance, args.force)?;
    if removed.is_empty() && failed.is_empty() {
        output::print(&format!("nothing of instance {instance} was there\n"));
    }
    for line in removed {
        output::print(&format!("removed {line}\n"));
    }
    for line in &failed {
        output::error(&format!("still there: {line}"));
    }
    Ok(if failed.is_empty() { OK } else { FAILED })
}

pub(crate) fn conntrack(args: &Conntrack) -> anyhow::Result<u8> {
    let instance = &args.instance.instance;
    let dir = instance.pin_dir();
    if !dir.exists() {
        bail!(
            "no agent of instance {instance} has run here ({} is not there); name another with --instance, \
             or look inside a lab: podway lab node exec NODE -- podway conntrack",
            dir.display()
        );
    }
    let mut flows = Datapath::load(&dir)?.conntrack().context("read the connection table")?;
    flows.sort_by_key(|f| (f.protocol, f.source, f.destination));
    match args.format.output {
        OutputFormat::Json => output::json(&flows.iter().map(as_json).collect::<Vec<_>>())?,
        OutputFormat::Text => output::print(&as_text(&flows)),
    }
    Ok(OK)
}

fn protocol(number: u8) -> String {
    PROTOCOLS
        .iter()
        .find(|(n, _)| *n == number)
        .map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned())
}

fn end((address, port): (IpAddr, u16)) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

fn seconds(time: Duration) -> String {
    format!("{:.1}s", time.as_secs_f64())
}

fn as_text(flows: &[Flow]) -> String {
    let head = ["PROTO", "FROM", "TO", "STATE", "PACKETS", "BYTES", "AGE", "IDLE", "EXPIRES"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(flows.iter().map(|f| {
        vec![
            protocol(f.protocol),
            end(f.source),
            end(f.destination),
            f.state.to_owned(),
            format!("{}/{}", f.packets[0], f.packets[1]),
            format!("{}/{}", f.bytes[0], f.bytes[1]),
            seconds(f.age),
            seconds(f.idle),
            seconds(f.expires_in),
        ]
    }));
    table(&rows)
}

fn as_json(flow: &Flow) -> serde_json::Value {
    let end = |(address, port): (IpAddr, u16)| json!({"address": address, "port": port});
    json!({
        "protocol": protocol(flow.protocol),
        "source": end(flow.source),
        "destination": end(flow.destination),
        "state": flow.state,
        "packets": {"forward": flow.packets[0], "reply": flow.packets[1]},
        "bytes": {"forward": flow.bytes[0], "reply": flow.bytes[1]},
        "ageSeconds": flow.age.as_secs_f64(),
        "idleSeconds": flow.idle.as_secs_f64(),
        "expiresInSeconds": flow.expires_in.as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_shown_for_people_and_programs() {
        let flow = Flow {
            protocol: 6,
            source: ("fd00::1".parse().expect("address"), 40000),
            destination: ("fd00::2".parse().expect("address"), 8080),
            packets: [3, 2],
            bytes: [300, 200],
            state: "established",
            age: Duration::from_millis(1500),
            idle: Duration::from_millis(200),
            expires_in: Duration::from_secs(60),
        };
        let text = as_text(std::slice::from_ref(&flow));
        let line = text.lines().nth(1).expect("a row");
        for part in
            ["tcp", "[fd00::1]:40000", "[fd00::2]:8080", "established", "3/2", "300/200", "1.5s", "60.0s"]
        {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert_eq!(as_json(&flow)["destination"]["port"], 8080);
        assert_eq!(protocol(89), "89");
    }
}
