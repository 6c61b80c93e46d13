//! `topology.yaml`: which endpoints serve, given readiness, traffic policies and hints.

use std::{collections::BTreeSet, net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use podway_model::{EndpointSlice, Service};
use podway_services::{
    Compiler,
    table::{FrontendKind, Origin, SetKind, Target},
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
    for case in data::list(&value, "cases")? {
        let name = format!("topology: {}", data::text(case, "name")?);
        let gate = case.pointer("/feature_gates/PreferSameTrafficDistribution");
        let node_hints = data::list(case, "endpoints")?
            .iter()
            .any(|endpoint| endpoint.get("nodeHints").is_some_and(|hints| !hints.is_null()));
        if node_hints && gate == Some(&Value::Bool(false)) {
            tally.not_applicable(
                &name,
                "a feature gate is off that can no longer be turned off; there are none here",
            );
            continue;
        }
        one(case, &name, &mut tally).with_context(|| name.clone())?;
    }
    Ok(tally)
}

fn one(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let node = case.get("node").context("node is missing")?;
    let mut view = cluster::node(data::text_or_empty(node, "name"));
    view.zone = node.get("zone").and_then(Value::as_str).map(str::to_owned);
    let service = case.get("service").context("service is missing")?;
    let number = data::number(service, "nodePort");
    let service = Service::parse(&json!({
        "metadata": { "namespace": "ns", "name": "svc" },
        "spec": {
            "type": if number > 0 { "NodePort" } else { "ClusterIP" },
            "clusterIP": "172.30.0.1",
            "internalTrafficPolicy": service["internalTrafficPolicy"],
            "externalTrafficPolicy": service["externalTrafficPolicy"],
            "ports": [{ "port": 80, "protocol": "TCP", "nodePort": number }],
        },
    }))?;
    let mut slices = Vec::new();
    for (i, endpoint) in data::list(case, "endpoints")?.iter().enumerate() {
        let addr: SocketAddr = data::text(endpoint, "endpoint")?.parse()?;
        let hints = |field: &str| -> Result<Value> {
            Ok(data::list(endpoint, field)?.iter().map(|name| json!({ "name": name })).collect())
        };
        let local = data::flag(endpoint, "local");
        slices.push(EndpointSlice::parse(&json!({
            "metadata": {
                "namespace": "ns",
                "name": format!("svc-{i}"),
                "labels": { "kubernetes.io/service-name": "svc" },
            },
            "addressType": "IPv4",
            "ports": [{ "port": addr.port(), "protocol": "TCP" }],
            "endpoints": [{
                "addresses": [addr.ip().to_string()],
                "nodeName": if local { view.name.as_str() } else { "another-node" },
                "conditions": {
                    "ready": endpoint["ready"],
                    "serving": endpoint["serving"],
                    "terminating": endpoint["terminating"],
                },
                "hints": { "forZones": hints("zoneHints")?, "forNodes": hints("nodeHints")? },
            }],
        }))?);
    }
    let mut compiler = Compiler::new(view);
    compiler.load([&service], &slices);
    let table = compiler.table();
    let (_, internal) = table
        .frontends
        .iter()
        .find(|(_, frontend)| frontend.kind == FrontendKind::ClusterIp)
        .context("there is no frontend")?;
    let set = |kind| -> BTreeSet<String> {
        let set = table.set(internal.service, kind);
        set.iter().map(|b| SocketAddr::new(b.addr, b.port).to_string()).collect()
    };
    let (in_cluster, local) = (set(SetKind::Cluster), set(SetKind::Local));
    let all: BTreeSet<String> = in_cluster.union(&local).cloned().collect();
    let any = internal.route(Origin::Pod).target != Target::Reject;
    let expect = case.get("expect").context("expect is missing")?;
    let wanted =
        |field: &str| -> Result<BTreeSet<String>> { Ok(data::parsed(expect, field)?.into_iter().collect()) };
    let expected =
        (wanted("cluster")?, wanted("local")?, wanted("all")?, data::flag(expect, "has_any_endpoints"));
    tally.check(name, &expected, &(in_cluster, local, all, any));
    Ok(())
}
