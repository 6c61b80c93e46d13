//! `packets/`: what becomes of single packets in given clusters.

use std::{net::IpAddr, path::Path};

use anyhow::{Context, Result, bail};
use podway_model::{EndpointSlice, Protocol, Service};
use podway_services::{Flow, Verdict, table::NodeView};
use serde_json::Value;

use super::target::{Observed, Packet, Scenario, Target};
use crate::{Tally, data};

/// Reads all scenarios.
///
/// # Errors
/// Data that cannot be read.
pub fn read(folder: &Path) -> Result<Vec<Scenario>> {
    let mut scenarios = Vec::new();
    for mode in ["nftables", "iptables", "ipvs"] {
        let folder = folder.join(mode);
        if !folder.is_dir() {
            continue;
        }
        for path in data::files(&folder)? {
            let value = data::yaml(&path)?;
            for entry in data::list(&value, "scenarios")? {
                let id = data::text(entry, "id")?;
                scenarios.push(scenario(entry).with_context(|| format!("{}: {id}", path.display()))?);
            }
        }
    }
    Ok(scenarios)
}

/// Runs one scenario against one target.
pub fn run(scenario: &Scenario, target: &mut dyn Target) -> Tally {
    let mut tally = Tally::default();
    let prefix = format!("{} {}", target.name(), scenario.id);
    let compiler = scenario.compile();
    let observed = match target.run(scenario) {
        Ok(observed) => observed,
        Err(why) => {
            tally.not_applicable(&prefix, &why);
            return tally;
        }
    };
    for (packet, observed) in scenario.packets.iter().zip(observed) {
        let case = format!("{prefix}: {}", packet.name);
        let to_vip = compiler.table().vips.contains(&packet.flow.dst);
        if packet.health_check {
            // The node answers there itself; no service may take the packet away.
            let answers = compiler.health_checks().iter().any(|check| check.port == packet.flow.port);
            let free = Observed { untouched: true, ..packet.expected.clone() };
            tally.check(&case, &(true, free), &(answers, observed));
        } else if packet.expected.untouched && to_vip && scenario.view.service_cidrs.is_empty() {
            tally.not_applicable(
                &case,
                "the iptables proxy leaves undefined ports of cluster IPs alone; here they are rejected",
            );
        } else {
            tally.check(&case, &packet.expected, &observed);
        }
    }
    tally
}

fn scenario(entry: &Value) -> Result<Scenario> {
    let node = entry.get("node").context("node is missing")?;
    let config = entry.get("config").context("config is missing")?;
    let localhost = config.get("localhost_nodeports").is_none_or(|flag| flag == true);
    let mut node_port_addresses: Vec<IpAddr> = data::parsed(node, "nodeport_ips")?;
    node_port_addresses.retain(|ip| localhost || !ip.is_loopback());
    let range = |field: &str| -> Result<Vec<ipnet::IpNet>> {
        match config.get(field).and_then(Value::as_str) {
            Some(text) => Ok(vec![text.parse().with_context(|| format!("{field}: {text:?} is no range"))?]),
            None => Ok(Vec::new()),
        }
    };
    let view = NodeView {
        name: data::text(node, "name")?.to_owned(),
        zone: node.get("zone").and_then(Value::as_str).map(str::to_owned),
        addresses: data::parsed(node, "local_ips")?,
        node_port_addresses,
        pod_cidrs: range("pod_cidr")?,
        service_cidrs: range("service_cidr")?,
        masquerade_all: data::flag(config, "masquerade_all"),
        ..NodeView::default()
    };
    let services = data::list(entry, "services")?.iter().map(Service::parse).collect::<Result<_, _>>()?;
    let slices =
        data::list(entry, "endpointslices")?.iter().map(EndpointSlice::parse).collect::<Result<_, _>>()?;
    let packets = data::list(entry, "packets")?.iter().map(packet).collect::<Result<_>>()?;
    Ok(Scenario { id: data::text(entry, "id")?.to_owned(), view, services, slices, packets })
}

fn packet(entry: &Value) -> Result<Packet> {
    let protocol = data::text(entry, "proto")?;
    let expect = entry.get("expect").context("expect is missing")?;
    let mut destinations = Vec::new();
    for item in data::parsed::<std::net::SocketAddr>(expect, "destinations")? {
        destinations.push((item.ip(), item.port()));
    }
    destinations.sort();
    Ok(Packet {
        name: data::text(entry, "name")?.to_owned(),
        flow: Flow {
            src: data::address(entry, "src")?,
            dst: data::address(entry, "dst")?,
            port: data::number(entry, "port").try_into()?,
            protocol: Protocol::from_name(protocol).with_context(|| format!("protocol {protocol:?}"))?,
        },
        expected: Observed {
            destinations,
            masquerade: data::flag(expect, "masquerade"),
            verdict: match data::text(expect, "verdict")? {
                "ACCEPT" => Verdict::Accept,
                "REJECT" => Verdict::Reject,
                "DROP" => Verdict::Drop,
                other => bail!("verdict {other:?} is not known"),
            },
            untouched: data::flag(expect, "untouched"),
        },
        health_check: data::flag(expect, "explicit_accept"),
    })
}
