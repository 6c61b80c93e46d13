//! Tables about endpoints: slices merged, changes noticed.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use podway_model::{EndpointSlice, Protocol, Service};
use podway_services::{Changes, Compiler, ServiceTable, TableChange, table::SetId};
use serde_json::{Value, json};

use super::super::cluster::{self, Endpoints, Listed};
use crate::{Tally, data};

/// Slices change from one list to another.
pub(super) fn update(case: &Value, package: &str, name: &str, tally: &mut Tally) -> Result<()> {
    let node = if package == "proxy" { "test-hostname" } else { "test-node" };
    let either = |a: &str, b: &str| case.get(a).or_else(|| case.get(b));
    let before = cluster::slices(either("previousEndpointSlices", "previousEndpoints"))?;
    let after = cluster::slices(either("currentEndpointSlices", "currentEndpoints"))?;
    let services = cluster::services_for(before.iter().chain(&after).flatten())?;
    let mut compiler = Compiler::new(cluster::node(node));
    compiler.load(&services, before.iter().flatten());
    // The writers' tables say less of an endpoint.
    let full = package == "proxy";
    let mut mismatches = Vec::new();
    let previous = cluster::endpoints(either("previousEndpointsMap", "oldEndpoints"))?;
    compare("before", &previous, &cluster::compiled(&compiler, &services, full), &mut mismatches);
    let old = compiler.table().clone();
    let changes = cluster::replace(&mut compiler, &before, &after);
    let result = cluster::endpoints(case.get("expectedResult"))?;
    compare("after", &result, &cluster::compiled(&compiler, &services, full), &mut mismatches);

    let checks = compiler.health_checks();
    let local: BTreeMap<String, u64> = checks
        .iter()
        .filter(|check| check.local_ready > 0)
        .map(|check| (format!("{}/{}", check.namespace, check.name), check.local_ready as u64))
        .collect();
    let expected = case.get("expectedLocalEndpoints").and_then(Value::as_object);
    let expected =
        expected.into_iter().flatten().filter_map(|(name, count)| Some((name.clone(), count.as_u64()?)));
    compare("local endpoints", &expected.collect(), &local, &mut mismatches);

    let cleanup = data::flag(case, "expectedConntrackCleanupRequired");
    compare("UDP flows may be stale", &cleanup, &moves_udp(&old, &changes), &mut mismatches);
    if case.get("expectedChangedEndpoints").is_some() {
        let expected: BTreeSet<String> =
            data::parsed(case, "expectedChangedEndpoints")?.into_iter().collect();
        let touched: BTreeSet<String> = changes
            .iter()
            .flat_map(|change| &change.services)
            .map(|(namespace, name)| format!("{namespace}/{name}"))
            .collect();
        compare("changed services", &expected, &touched, &mut mismatches);
    }
    tally.settle(name, &mismatches);
    Ok(())
}

fn compare<T: PartialEq + std::fmt::Debug>(
    what: &str,
    expected: &T,
    actual: &T,
    mismatches: &mut Vec<String>,
) {
    if expected != actual {
        mismatches.push(format!("{what}: expected {expected:?}\n        was {actual:?}"));
    }
}

/// Whether flows of UDP may have lost their endpoint, or got the first one: only sets that changed are looked at, as
/// whoever forgets stale flows would.
fn moves_udp(old: &ServiceTable, changes: &[Changes]) -> bool {
    let mut table = old.clone();
    let mut moves = false;
    for change in changes.iter().flat_map(|changes| &changes.table) {
        if let TableChange::Set(id @ SetId { service, .. }, _) = change {
            moves |= table.services.get(service).is_some_and(|meta| meta.protocol == Protocol::Udp)
                || old.sets.contains_key(id) && old.services[service].protocol == Protocol::Udp;
        }
        table.apply(change);
    }
    moves
}

/// Slices of several Services; the endpoints of one are asked for.
pub(super) fn map(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let slices = cluster::slices(case.get("endpointSlices"))?;
    let asked = data::text(case, "namespacedName")?;
    let mut services = cluster::services_for(slices.iter().flatten())?;
    let mut compiler = Compiler::new(cluster::node(data::text_or_empty(case, "hostname")));
    compiler.load(&services, []);
    // One after the other: a slice that comes twice replaces itself.
    slices.iter().flatten().for_each(|slice| {
        compiler.apply_slice(slice);
    });
    services.retain(|service| format!("{}/{}", service.namespace, service.name) == asked);
    let expected = cluster::endpoints(case.get("expectedMap"))?;
    tally.check(name, &expected, &cluster::compiled(&compiler, &services, true));
    Ok(())
}

/// One slice is written or removed: is that a change, and to what?
pub(super) fn slice_update(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let starting = cluster::slices(case.get("startingSlices"))?;
    let slice =
        EndpointSlice::parse(case.get("paramEndpointSlice").context("paramEndpointSlice is missing")?)?;
    let services = cluster::services_for(starting.iter().flatten().chain([&slice]))?;
    let node =
        case.get("endpointsChangeTracker").map_or("", |tracker| data::text_or_empty(tracker, "nodeName"));
    let mut compiler = Compiler::new(cluster::node(node));
    compiler.load(&services, starting.iter().flatten());
    let changes = if data::flag(case, "paramRemoveSlice") {
        compiler.remove_slice(&slice.namespace, &slice.name)
    } else {
        compiler.apply_slice(&slice)
    };
    let changed = data::flag(case, "expectedReturnVal");
    let mut mismatches = Vec::new();
    compare("is a change", &changed, &!changes.services.is_empty(), &mut mismatches);
    if changed {
        let expected = cluster::endpoints(case.get("expectedCurrentChange"))?;
        compare("endpoints", &expected, &cluster::compiled(&compiler, &services, true), &mut mismatches);
    }
    tally.settle(name, &mismatches);
    Ok(())
}

/// Slices are written upon others: what was there before and after?
pub(super) fn checkout(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let applied = cluster::slices(case.get("appliedSlices"))?;
    let pending = cluster::slices(case.get("pendingSlices"))?;
    let services = cluster::services_for(applied.iter().chain(&pending).flatten())?;
    let node =
        case.get("endpointsChangeTracker").map_or("", |tracker| data::text_or_empty(tracker, "nodeName"));
    let mut compiler = Compiler::new(cluster::node(node));
    compiler.load(&services, applied.iter().flatten());
    let before = cluster::compiled(&compiler, &services, true);
    let mut changed = false;
    for slice in pending.iter().flatten() {
        changed |= !compiler.apply_slice(slice).services.is_empty();
    }
    let after = cluster::compiled(&compiler, &services, true);
    let changes: Vec<(Endpoints, Endpoints)> = if changed { vec![(before, after)] } else { Vec::new() };
    let expected = data::list(case, "expectedChanges")?
        .iter()
        .map(|change| {
            Ok((cluster::endpoints(change.get("previous"))?, cluster::endpoints(change.get("current"))?))
        })
        .collect::<Result<Vec<_>>>()?;
    tally.check(name, &expected, &changes);
    Ok(())
}

/// Is a slice different enough to look at its Service again?
pub(super) fn data_changed(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let slice =
        |field: &str| Ok::<_, anyhow::Error>(EndpointSlice::parse(case.get(field).unwrap_or(&Value::Null))?);
    let (initial, updated) = (slice("initialSlice")?, slice("updatedSlice")?);
    let services = cluster::services_for([&initial, &updated].into_iter())?;
    let mut compiler = Compiler::new(cluster::node(""));
    compiler.load(&services, [&initial]);
    let looked_at = !compiler.apply_slice(&updated).services.is_empty();
    tally.check(name, &data::flag(case, "expectChanged"), &looked_at);
    Ok(())
}

/// The ready endpoints on the node, by Service.
pub(super) fn local(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let listed = case.get("endpointsMap").and_then(Value::as_object);
    let mut slices = Vec::new();
    for (i, (port, endpoints)) in listed.into_iter().flatten().enumerate() {
        let (service, rest) = port.split_once('/').context("a port without namespace")?;
        let (name_and_port, protocol) = rest.rsplit_once('/').context("a port without protocol")?;
        let (service_name, port_name) = name_and_port.split_once(':').unwrap_or((name_and_port, ""));
        for (j, endpoint) in endpoints.as_array().into_iter().flatten().enumerate() {
            slices.push(EndpointSlice::parse(&json!({
                "metadata": {
                    "namespace": service,
                    "name": format!("{service_name}-{i}-{j}"),
                    "labels": { "kubernetes.io/service-name": service_name },
                },
                "addressType": "IPv4",
                "ports": [{ "name": port_name, "protocol": protocol, "port": endpoint["port"] }],
                "endpoints": [{
                    "addresses": [endpoint["ip"]],
                    "nodeName": if data::flag(endpoint, "isLocal") { "this-node" } else { "another-node" },
                    "conditions": {
                        "ready": endpoint["ready"],
                        "serving": endpoint["serving"],
                        "terminating": endpoint["terminating"],
                    },
                }],
            }))?);
        }
    }
    let services: Vec<Service> = cluster::services_for(slices.iter())?;
    let mut compiler = Compiler::new(cluster::node("this-node"));
    compiler.load(&services, &slices);
    let mut local: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (port, endpoints) in cluster::compiled(&compiler, &services, true) {
        let service = port.rsplit_once('/').map_or(port.as_str(), |(rest, _)| rest);
        let service = service.split_once(':').map_or(service, |(service, _)| service).to_owned();
        let ready = |e: &&Listed| e.local && e.conditions.is_some_and(|[ready, ..]| ready);
        for endpoint in endpoints.iter().filter(ready) {
            let addr: std::net::SocketAddr = endpoint.endpoint.parse()?;
            local.entry(service.clone()).or_default().insert(addr.ip().to_string());
        }
    }
    let mut mismatches = Vec::new();
    let mut expected: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (service, _) in case.get("expected").and_then(Value::as_object).into_iter().flatten() {
        expected.insert(service.clone(), data::parsed(&case["expected"], service)?.into_iter().collect());
    }
    compare("addresses", &expected, &local, &mut mismatches);
    for check in compiler.health_checks() {
        let service = format!("{}/{}", check.namespace, check.name);
        let count = local.get(&service).map_or(0, BTreeSet::len);
        compare(&format!("count of {service}"), &count, &check.local_ready, &mut mismatches);
    }
    tally.settle(name, &mismatches);
    Ok(())
}
