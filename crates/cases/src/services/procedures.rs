//! `procedures.yaml`: sequences of steps, each with what must be seen after it.

use std::{collections::BTreeMap, net::IpAddr, path::Path};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use podway_model::{EndpointSlice, Service};
use podway_services::{
    Changes, Compiler,
    table::{FrontendAddr, FrontendKind, NodeView, SetKind},
};
use serde_json::{Value, json};

use super::cluster;
use crate::{Tally, data};

/// Runs the file.
///
/// # Errors
/// Data that cannot be read.
pub fn run(path: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    let value = data::yaml(path)?;
    for procedure in data::list(&value, "procedures")? {
        let name = data::text(procedure, "name")?;
        let mut mismatches = Vec::new();
        let known = match name {
            "TestHealthCheckNodePortWhenTerminating" => health_check(procedure, &mut mismatches),
            "TestBuildServiceMapAddRemove"
            | "TestServiceMapUpdateHeadless"
            | "TestUpdateServiceTypeExternalName" => add_remove(procedure, &mut mismatches),
            "TestBuildServiceMapServiceUpdate" => update(procedure, &mut mismatches),
            "TestBadIPs" => spellings(procedure, &mut mismatches),
            "TestEndpointSliceCacheClearedCorrectly" => cleared(&mut mismatches),
            "TestSameServiceEndpointSliceCacheClearedCorrectly" => one_left(&mut mismatches),
            _ => bail!("procedure {name:?} is not known; write what it corresponds to"),
        };
        known.with_context(|| name.to_owned())?;
        tally.settle(&format!("procedure {name}"), &mismatches);
    }
    Ok(tally)
}

/// A Service in the file's shorter spelling.
fn service(short: &Value) -> Result<Service> {
    let mut spec = short.clone();
    let ingress: Vec<Value> =
        data::parsed::<String>(short, "ingress")?.iter().map(|ip| json!({ "ip": ip })).collect();
    if let Some(spec) = spec.as_object_mut() {
        ["namespace", "name", "ingress"].iter().for_each(|field| {
            spec.remove(*field);
        });
    }
    Ok(Service::parse(&json!({
        "metadata": { "namespace": short["namespace"], "name": short["name"] },
        "spec": spec,
        "status": { "loadBalancer": { "ingress": ingress } },
    }))?)
}

fn expect<T: PartialEq + std::fmt::Debug>(
    what: &str,
    expected: &T,
    actual: &T,
    mismatches: &mut Vec<String>,
) {
    if expected != actual {
        mismatches.push(format!("{what}: expected {expected:?}, was {actual:?}"));
    }
}

fn health_check(procedure: &Value, mismatches: &mut Vec<String>) -> Result<()> {
    let mut short = procedure.get("service").context("service is missing")?.clone();
    // What makes the node count: a load balancer under `Local`.
    short["type"] = "LoadBalancer".into();
    short["externalTrafficPolicy"] = "Local".into();
    short["healthCheckNodePort"] = 30_000.into();
    short["ports"][0]["port"] = 80.into();
    let service = service(&short)?;
    let node = data::text(procedure, "node")?;
    let mut compiler = Compiler::new(cluster::node(node));
    compiler.apply_service(&service);
    for (i, step) in data::list(procedure, "steps")?.iter().enumerate() {
        let endpoints: Vec<Value> = data::list(step, "endpoints")?
            .iter()
            .map(|e| {
                json!({
                    "addresses": [e["ip"]],
                    "nodeName": e["node"],
                    "conditions": { "ready": e["ready"], "serving": e["serving"], "terminating": e["terminating"] },
                })
            })
            .collect();
        compiler.apply_slice(&EndpointSlice::parse(&json!({
            "metadata": {
                "namespace": service.namespace,
                "name": "slice",
                "labels": { "kubernetes.io/service-name": service.name },
            },
            "addressType": "IPv4",
            "ports": [{ "name": "", "port": 80, "protocol": "TCP" }],
            "endpoints": endpoints,
        }))?);
        let checks = compiler.health_checks();
        let healthy = checks.iter().filter(|check| check.local_ready > 0).count() as u64;
        let expected = data::number(&step["expect"], "services_with_local_ready_endpoints");
        expect(&format!("step {i}: healthy services"), &expected, &healthy, mismatches);
        expect(&format!("step {i}: health checks"), &1, &checks.len(), mismatches);
    }
    Ok(())
}

/// What the steps look at.
fn compare(
    step: usize,
    expected: &Value,
    compiler: &Compiler,
    changes: &[Changes],
    mismatches: &mut Vec<String>,
) {
    // A number of ours is a port in a family; the cases have one family.
    let ports = compiler.table().services.len() as u64;
    expect(&format!("step {step}: ports"), &data::number(expected, "service_ports"), &ports, mismatches);
    let updated = changes.iter().filter(|changes| !changes.table.is_empty()).count() as u64;
    expect(
        &format!("step {step}: updates"),
        &data::number(expected, "updated_services"),
        &updated,
        mismatches,
    );
    let checks: BTreeMap<String, u64> = compiler
        .health_checks()
        .iter()
        .map(|check| (format!("{}/{}", check.namespace, check.name), u64::from(check.port)))
        .collect();
    if let Some(listed) = expected.get("health_check_node_ports").and_then(Value::as_object) {
        let listed = listed.iter().filter_map(|(name, port)| Some((name.clone(), port.as_u64()?))).collect();
        expect(&format!("step {step}: health checks"), &listed, &checks, mismatches);
    }
    if expected.get("health_check_node_ports_count").is_some() {
        let count = data::number(expected, "health_check_node_ports_count");
        expect(&format!("step {step}: health checks"), &count, &(checks.len() as u64), mismatches);
    }
}

fn add_remove(procedure: &Value, mismatches: &mut Vec<String>) -> Result<()> {
    let mut compiler = Compiler::new(cluster::node(""));
    for (i, step) in data::list(procedure, "steps")?.iter().enumerate() {
        let mut changes = Vec::new();
        for short in data::list(step, "add")?.iter().chain(data::list(step, "update")?) {
            changes.push(compiler.apply_service(&service(short)?));
        }
        for name in data::parsed::<String>(step, "delete")? {
            let (namespace, name) = name.split_once('/').context("a name without namespace")?;
            changes.push(compiler.remove_service(namespace, name));
        }
        compare(i, &step["expect"], &compiler, &changes, mismatches);
    }
    Ok(())
}

fn update(procedure: &Value, mismatches: &mut Vec<String>) -> Result<()> {
    let mut compiler = Compiler::new(cluster::node(""));
    for (i, step) in data::list(procedure, "steps")?.iter().enumerate() {
        let text = step.get("add").or_else(|| step.get("update")).and_then(Value::as_str);
        let version = text.and_then(|text| text.split(' ').next()).context("a step without version")?;
        let changes = compiler.apply_service(&service(procedure.get(version).context("no such version")?)?);
        compare(i, &step["expect"], &compiler, &[changes], mismatches);
    }
    Ok(())
}

fn spellings(procedure: &Value, mismatches: &mut Vec<String>) -> Result<()> {
    let input = procedure.get("input").context("input is missing")?;
    let service = Service::parse(&json!({
        "metadata": { "namespace": "ns1", "name": "svc1" },
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": input["clusterIP"],
            "externalIPs": [input["externalIP"]],
            "loadBalancerSourceRanges": input["loadBalancerSourceRanges"],
            "ports": [{ "name": "p80", "port": input["port"], "nodePort": input["nodePort"], "protocol": "TCP" }],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": input["lb_ingress"] }] } },
    }))?;
    let slice = EndpointSlice::parse(&json!({
        "metadata": { "namespace": "ns1", "name": "svc1-1", "labels": { "kubernetes.io/service-name": "svc1" } },
        "addressType": "IPv4",
        "ports": [{ "name": "p80", "port": 80, "protocol": "TCP" }],
        "endpoints": [{ "addresses": [input["endpoint"]] }],
    }))?;
    let mut compiler = Compiler::new(NodeView { name: "test-node".to_owned(), ..NodeView::default() });
    compiler.load([&service], [&slice]);
    let table = compiler.table();
    let expected = procedure.get("expect").context("expect is missing")?;
    let found = |kind: FrontendKind| -> Vec<IpAddr> {
        let of_kind = table.frontends.iter().filter(|(_, frontend)| frontend.kind == kind);
        of_kind
            .filter_map(|(key, _)| if let FrontendAddr::Ip(ip) = key.addr { Some(ip) } else { None })
            .collect()
    };
    for (field, kind) in [
        ("clusterIP", FrontendKind::ClusterIp),
        ("lb_ingress", FrontendKind::LoadBalancer),
        ("externalIP", FrontendKind::ExternalIp),
    ] {
        expect(field, &vec![data::address(expected, field)?], &found(kind), mismatches);
    }
    let balanced = table.frontends.values().find(|frontend| frontend.kind == FrontendKind::LoadBalancer);
    let ranges: Vec<IpNet> = balanced.and_then(|f| f.source_ranges.as_deref()).unwrap_or_default().to_vec();
    expect("ranges", &data::parsed::<IpNet>(expected, "loadBalancerSourceRanges")?, &ranges, mismatches);
    let service = balanced.context("there is no load balancer")?.service;
    let backends: Vec<IpAddr> =
        table.set(service, SetKind::Cluster).iter().map(|backend| backend.addr).collect();
    expect("endpoint", &vec![data::address(expected, "endpoint")?], &backends, mismatches);
    Ok(())
}

/// Slices of same or different names, Services and namespaces, as the procedure names them.
fn some_slices() -> Result<Vec<EndpointSlice>> {
    let names = [
        ("ns1", "svc1-1", "svc1"),
        ("ns1", "svc1-2", "svc1"),
        ("ns1", "svc2-1", "svc2"),
        ("ns2", "svc1-1", "svc1"),
    ];
    let slice = |(namespace, name, service): &(&str, &str, &str)| {
        Ok(EndpointSlice::parse(&json!({
            "metadata": {
                "namespace": namespace,
                "name": name,
                "labels": { "kubernetes.io/service-name": service },
            },
            "addressType": "IPv4",
            "ports": [{ "name": "p", "port": 80, "protocol": "TCP" }],
            "endpoints": [{ "addresses": ["10.0.0.1"] }],
        }))?)
    };
    names.iter().map(slice).collect()
}

fn cleared(mismatches: &mut Vec<String>) -> Result<()> {
    let slices = some_slices()?;
    for count in 1..=slices.len() {
        let mut compiler = Compiler::new(cluster::node(""));
        compiler.load([], &slices[..count]);
        expect("slices before", &count, &compiler.objects().1, mismatches);
        for slice in &slices[..count] {
            compiler.remove_slice(&slice.namespace, &slice.name);
        }
        expect("slices left", &0, &compiler.objects().1, mismatches);
        let left = compiler.explain("ns1", "svc1").is_some();
        expect("a Service that nothing names is forgotten", &false, &left, mismatches);
    }
    Ok(())
}

fn one_left(mismatches: &mut Vec<String>) -> Result<()> {
    let slices = some_slices()?;
    let mut compiler = Compiler::new(cluster::node(""));
    compiler.load([], &slices[..2]);
    compiler.remove_slice("ns1", "svc1-1");
    expect("slices left", &1, &compiler.objects().1, mismatches);
    expect("its Service is known", &true, &compiler.explain("ns1", "svc1").is_some(), mismatches);
    Ok(())
}
