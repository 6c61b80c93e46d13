//! Tables about Services: which are handled, and with which addresses.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context, Result};
use ipnet::IpNet;
use podway_model::{EndpointSlice, Family, Service};
use podway_services::{
    Compiler, ServiceTable,
    table::{FrontendAddr, FrontendKind, Origin, Target},
};
use serde_json::{Value, json};

use super::super::cluster;
use crate::{Tally, data};

/// What the cases say of a service port, in the words of the table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Port {
    cluster_ip: Option<IpAddr>,
    port: u16,
    protocol: String,
    health_check: u16,
    external_ips: Vec<IpAddr>,
    load_balancer: Vec<IpAddr>,
    source_ranges: Vec<IpNet>,
}

/// The object, with the names that it needs where the case leaves them out.
fn service(case: &Value) -> Result<Service> {
    let mut value = case.get("service").context("service is missing")?.clone();
    for (field, name) in [("namespace", "ns"), ("name", "svc")] {
        let known = value.pointer(&format!("/metadata/{field}")).and_then(Value::as_str);
        if known.unwrap_or_default().is_empty() {
            value["metadata"][field] = name.into();
        }
    }
    Ok(Service::parse(&value)?)
}

fn family(name: &str) -> Family {
    if name == "IPv6" { Family::V6 } else { Family::V4 }
}

/// The ports of a Service with their addresses, in one family.
pub(super) fn ports(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let service = service(case)?;
    let family = family(data::text(case, "ipFamily")?);
    let mut compiler = Compiler::new(cluster::node(""));
    compiler.load([&service], []);
    let mut actual: BTreeMap<String, Port> = BTreeMap::new();
    let check = compiler.health_check(&service.namespace, &service.name);
    for (key, frontend) in &compiler.table().frontends {
        let meta = &compiler.table().services[&frontend.service];
        let FrontendAddr::Ip(addr) = key.addr else { continue };
        if meta.family != family {
            continue;
        }
        let colon = if meta.port_name.is_empty() { "" } else { ":" };
        let id = format!("{}/{}{colon}{}/{}", meta.namespace, meta.name, meta.port_name, meta.protocol);
        let port = actual.entry(id).or_default();
        match frontend.kind {
            FrontendKind::ClusterIp => {
                port.cluster_ip = Some(addr);
                port.port = key.port;
            }
            // The same address may be both.
            FrontendKind::LoadBalancer => port.load_balancer.push(addr),
            FrontendKind::ExternalIp => port.external_ips.push(addr),
            FrontendKind::NodePort | FrontendKind::HostPort => {}
        }
        port.protocol = meta.protocol.to_string();
        port.health_check = check.as_ref().map_or(0, |check| check.port);
    }
    for port in actual.values_mut() {
        // Without an address to guard, ranges are in no frontend; they must have been read nevertheless.
        let ranges = service.source_ranges.iter().flatten();
        port.source_ranges = ranges.filter(|range| Family::of_net(range) == family).copied().collect();
        for ip in &service.external_ips {
            if port.load_balancer.contains(ip) && !port.external_ips.contains(ip) {
                port.external_ips.push(*ip);
            }
        }
    }
    let mut expected: BTreeMap<String, Port> = BTreeMap::new();
    for (id, value) in case.get("expected").and_then(Value::as_object).into_iter().flatten() {
        expected.insert(
            id.clone(),
            Port {
                cluster_ip: Some(data::address(value, "clusterIP")?),
                port: data::number(value, "port").try_into()?,
                protocol: data::text(value, "protocol")?.to_owned(),
                health_check: data::number(value, "healthCheckNodePort").try_into()?,
                external_ips: data::parsed(value, "externalIPs")?,
                load_balancer: data::parsed(value, "loadBalancerVIPs")?,
                source_ranges: data::parsed(value, "loadBalancerSourceRanges")?,
            },
        );
    }
    tally.check(name, &expected, &actual);
    Ok(())
}

/// Whether packets to a load balancer's address are taken.
pub(super) fn ingress_mode(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let addr = data::address(case, "svcLBIP")?;
    let service = Service::parse(&json!({
        "metadata": { "namespace": "ns1", "name": "svc1" },
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": case["svcIP"],
            "ports": [{ "name": "p80", "port": 80, "protocol": "TCP", "nodePort": 3001 }],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": case["svcLBIP"], "ipMode": case["ipMode"] }] } },
    }))?;
    let slice = slice(&[json!({ "addresses": ["10.180.0.1"], "nodeName": "test-node" })])?;
    let mut compiler = Compiler::new(cluster::node("test-node"));
    compiler.load([&service], [&slice]);
    let taken =
        compiler.table().frontends.keys().any(|key| key.addr == FrontendAddr::Ip(addr) && key.port == 80);
    tally.check(name, &data::flag(case, "expectedRule"), &taken);
    Ok(())
}

fn slice(endpoints: &[Value]) -> Result<EndpointSlice> {
    Ok(EndpointSlice::parse(&json!({
        "metadata": {
            "namespace": "ns1",
            "name": "svc1-1",
            "labels": { "kubernetes.io/service-name": "svc1" },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "p80", "port": 80, "protocol": "TCP" }],
        "endpoints": endpoints,
    }))?)
}

/// How many service ports drop because the policy is `Local` and nobody is.
pub(super) fn no_local_endpoints(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let external = data::text_or_empty(case, "externalTrafficPolicy");
    let service = Service::parse(&json!({
        "metadata": { "namespace": "ns1", "name": "svc1" },
        "spec": {
            "type": if external.is_empty() { "ClusterIP" } else { "NodePort" },
            "clusterIP": "172.30.1.1",
            "internalTrafficPolicy": case["internalTrafficPolicy"],
            "externalTrafficPolicy": external,
            "ports": [{ "name": "p80", "port": 80, "protocol": "TCP", "nodePort": 123 }],
        },
    }))?;
    let endpoint = |e: &Value| json!({ "addresses": [e["ip"]], "nodeName": e["nodeName"] });
    let slice = slice(&data::list(case, "endpoints")?.iter().map(endpoint).collect::<Vec<_>>())?;
    let mut compiler = Compiler::new(cluster::node("test-node"));
    compiler.load([&service], [&slice]);
    let (internal, external) = dropping(compiler.table());
    let expected = (
        data::number(case, "expectedSyncProxyRulesNoLocalEndpointsTotalInternal"),
        data::number(case, "expectedSyncProxyRulesNoLocalEndpointsTotalExternal"),
    );
    tally.check(name, &expected, &(internal, external));
    Ok(())
}

fn dropping(table: &ServiceTable) -> (u64, u64) {
    let count = |internal: bool| {
        let of_kind = |kind| (kind == FrontendKind::ClusterIp) == internal;
        let drops = table.frontends.values().filter(|f| {
            of_kind(f.kind) && f.source_ranges.is_none() && f.route(Origin::External).target == Target::Drop
        });
        drops.map(|frontend| frontend.service).collect::<std::collections::BTreeSet<_>>().len() as u64
    };
    (count(true), count(false))
}

/// Whether a Service is left alone.
pub(super) fn skipped(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let service = service(case)?;
    let mut compiler = Compiler::new(cluster::node(""));
    compiler.load([&service], []);
    let skipped = compiler.handles(&service.namespace, &service.name).is_err();
    tally.check(name, &data::flag(case, "shouldSkip"), &skipped);
    Ok(())
}

/// The cluster IP of a family.
pub(super) fn cluster_ip(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let service = service(case)?;
    let ip = service.cluster_ip(family(data::text(case, "requestFamily")?));
    let expected = data::text(case, "expectedResult")?;
    let expected: Option<IpAddr> = (!expected.is_empty()).then(|| expected.parse()).transpose()?;
    tally.check(name, &expected, &ip);
    Ok(())
}

/// A Service of both families with these fields.
fn dual_stack(fields: &[(&str, Value)], status: &Value) -> Result<ServiceTable> {
    let mut value = json!({
        "metadata": { "namespace": "ns", "name": "svc" },
        "spec": {
            "type": "LoadBalancer",
            "clusterIPs": ["172.30.0.1", "fd00:172:30::1"],
            "ports": [{ "port": 80, "protocol": "TCP" }],
        },
        "status": status,
    });
    for (field, content) in fields {
        value["spec"][*field] = content.clone();
    }
    let mut compiler = Compiler::new(cluster::node(""));
    compiler.load([&Service::parse(&value)?], []);
    Ok(compiler.table().clone())
}

/// Addresses of a list end up in the frontends of their family.
pub(super) fn addresses_by_family(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let table = dual_stack(&[("externalIPs", case["ipString"].clone())], &Value::Null)?;
    let wanted = if data::flag(case, "wantIPv6") { Family::V6 } else { Family::V4 };
    let of = |wanted_family: bool| {
        let mut ips: Vec<IpAddr> = table
            .frontends
            .iter()
            .filter(|(_, frontend)| frontend.kind == FrontendKind::ExternalIp)
            .filter(|(_, frontend)| (table.services[&frontend.service].family == wanted) == wanted_family)
            .filter_map(|(key, _)| if let FrontendAddr::Ip(ip) = key.addr { Some(ip) } else { None })
            .collect();
        ips.sort();
        ips
    };
    let sorted = |field| {
        let mut ips: Vec<IpAddr> = data::parsed(case, field)?;
        ips.sort();
        Ok::<_, anyhow::Error>(ips)
    };
    tally.check(name, &(sorted("expectCorrect")?, sorted("expectIncorrect")?), &(of(true), of(false)));
    Ok(())
}

/// Ranges of a list guard the load balancer's address of their family.
pub(super) fn ranges_by_family(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let status = json!({ "loadBalancer": { "ingress": [{ "ip": "192.0.2.1" }, { "ip": "2001:db8::1" }] } });
    let table = dual_stack(&[("loadBalancerSourceRanges", case["ipString"].clone())], &status)?;
    let wanted = if data::flag(case, "wantIPv6") { Family::V6 } else { Family::V4 };
    let of = |wanted_family: bool| {
        let guarded = table.frontends.values().filter(|frontend| frontend.kind == FrontendKind::LoadBalancer);
        let of_family =
            guarded.filter(|frontend| (table.services[&frontend.service].family == wanted) == wanted_family);
        let mut ranges: Vec<IpNet> =
            of_family.filter_map(|frontend| frontend.source_ranges.as_deref()).flatten().copied().collect();
        ranges.sort();
        ranges
    };
    let sorted = |field| {
        let mut ranges: Vec<IpNet> = data::parsed(case, field)?;
        ranges.sort();
        Ok::<_, anyhow::Error>(ranges)
    };
    tally.check(name, &(sorted("expectCorrect")?, sorted("expectIncorrect")?), &(of(true), of(false)));
    Ok(())
}
