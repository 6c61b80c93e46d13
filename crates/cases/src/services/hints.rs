//! `hints/`: which zones and nodes the EndpointSlice controller gives endpoints to.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result};
use podway_workloads::hints::{self, Allocation, NodeShare, Slices};
use serde_json::Value;

use crate::{Tally, data};

/// Runs the folder.
///
/// # Errors
/// Data that cannot be read.
pub fn run(folder: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    for package in ["trafficdist", "topologycache"] {
        for path in data::files(&folder.join(package))? {
            let value = data::yaml(&path)?;
            let test = data::text(&value, "test")?;
            for (i, entry) in data::list(&value, "cases")?.iter().enumerate() {
                let case = entry.get("case").context("case is missing")?;
                let name = format!("hints: {test} {i} {}", data::text_or_empty(case, "name"));
                one(test, case, &name, &mut tally).with_context(|| name.clone())?;
            }
        }
    }
    Ok(tally)
}

fn one(test: &str, case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    match test {
        "TestReconcileHints" => distribution(case, name, tally),
        "TestAddHints" => add(case, name, tally),
        "Test_getTotalReadyEndpoints" => {
            let slices = slices(case.get("si").context("si is missing")?)?;
            let expected = (data::number(case, "expectedTotal"), data::number(case, "expectedTotalReady"));
            tally.check(name, &expected, &(slices.total() as u64, slices.ready() as u64));
            Ok(())
        }
        "TestSetNodes" => nodes(case, name, tally),
        "Test_getHintsByZone" => {
            let endpoints = data::list(case.get("slice").context("slice is missing")?, "endpoints")?;
            let fitting =
                hints::by_hint(endpoints, &counts(case, "allocatedHintsByZone"), &allocations(case));
            let expected = case.get("expectedHintsByZone").filter(|v| !v.is_null());
            let expected = expected.map(|_| counts(case, "expectedHintsByZone"));
            tally.check(name, &expected, &fitting);
            Ok(())
        }
        "Test_getGivingAndReceivingZones" => {
            let moves =
                hints::giving_and_receiving(&allocations(case), &counts(case, "allocatedHintsByZone"));
            tally.check(
                name,
                &(counts(case, "expectedGivingZones"), counts(case, "expectedReceivingZones")),
                &moves,
            );
            Ok(())
        }
        "Test_redistributeHints" => {
            let mut all = data::list(case, "slices")?
                .iter()
                .map(|slice| Ok(data::list(slice, "endpoints")?.to_vec()))
                .collect::<Result<Vec<_>>>()?;
            let mut open: Vec<&mut Vec<Value>> = all.iter_mut().collect();
            let moved =
                hints::redistribute(&mut open, counts(case, "givingZones"), counts(case, "receivingZones"));
            tally.check(name, &counts(case, "expectedRedistributions"), &moved);
            Ok(())
        }
        _ => {
            tally.fail(name, "nothing is known of this test; map it to what it corresponds to");
            Ok(())
        }
    }
}

/// Slices by what is done with them, each reduced to its endpoints.
fn by_fate(case: &Value, field: &str) -> Result<Vec<Vec<Value>>> {
    data::list(case, field)?.iter().map(|slice| Ok(data::list(slice, "endpoints")?.to_vec())).collect()
}

fn slices(info: &Value) -> Result<Slices> {
    let mut written = by_fate(info, "ToCreate")?;
    written.extend(by_fate(info, "ToUpdate")?);
    Ok(Slices { written, unchanged: by_fate(info, "Unchanged")? })
}

fn distribution(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let distribution = case.get("trafficDistribution").and_then(Value::as_str);
    let hinted = |endpoint: &Value| {
        let text = |field: &str| endpoint.get(field).and_then(Value::as_str);
        let ready = endpoint.pointer("/conditions/ready") == Some(&Value::Bool(true));
        let hints = hints::by_distribution(distribution, ready, text("nodeName"), text("zone"));
        let mut endpoint = endpoint.clone();
        if let Some(endpoint) = endpoint.as_object_mut() {
            endpoint.remove("hints");
            endpoint.extend(hints.map(|hints| ("hints".to_owned(), hints)));
        }
        endpoint
    };
    let after = |slices: Vec<Vec<Value>>| -> Vec<Vec<Value>> {
        slices.iter().map(|endpoints| endpoints.iter().map(hinted).collect()).collect()
    };
    let created = after(by_fate(case, "slicesToCreate")?);
    let mut updated = after(by_fate(case, "slicesToUpdate")?);
    let before = by_fate(case, "slicesUnchanged")?;
    let mut unchanged = Vec::new();
    for (before, after) in before.iter().zip(after(before.clone())) {
        if *before == after { unchanged.push(after) } else { updated.push(after) }
    }
    let expected = (
        by_fate(case, "wantSlicesToCreate")?,
        by_fate(case, "wantSlicesToUpdate")?,
        by_fate(case, "wantSlicesUnchanged")?,
    );
    tally.check(name, &expected, &(created, updated, unchanged));
    Ok(())
}

fn add(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let info = case.get("sliceInfo").context("sliceInfo is missing")?;
    let created = data::list(info, "ToCreate")?.len();
    let mut slices = slices(info)?;
    let shares = case.get("cpuRatiosByZone").and_then(Value::as_object).map(|shares| {
        shares
            .iter()
            .filter_map(|(zone, share)| Some((zone.clone(), share.as_f64()?)))
            .collect::<BTreeMap<_, _>>()
    });
    let (changed, result) = hints::assign(&mut slices, shares.as_ref());
    let mut updated = slices.written.split_off(created);
    let rewritten = slices.unchanged.into_iter().zip(changed).filter(|(_, changed)| *changed);
    updated.extend(rewritten.map(|(endpoints, _)| endpoints));
    let said = match &result {
        Ok(_) => "Topology Aware Hints has been enabled".to_owned(),
        Err(why) => why.to_string(),
    };
    let event =
        data::list(case, "expectedEvents")?.first().map_or("", |event| data::text_or_empty(event, "Message"));
    let by_zone = case.pointer("/expectedEndpointsByAddrType/IPv4");
    let by_zone = by_zone.map(|_| counts(&case["expectedEndpointsByAddrType"], "IPv4"));
    let expected = (
        by_fate(case, "expectedSlicesToCreate")?,
        by_fate(case, "expectedSlicesToUpdate")?,
        event.to_owned(),
        by_zone,
    );
    tally.check(name, &expected, &(slices.written, updated, said, result.ok()));
    Ok(())
}

fn nodes(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let nodes = data::list(case, "nodes")?.iter().map(|node| {
        let labelled = |label: &&str| node.get("labels").is_some_and(|labels| labels.get(*label).is_some());
        let digits = node.pointer("/cpu/i/value").and_then(Value::as_u64).unwrap_or(0);
        // A decimal quantity: value × 10^scale.
        let scale = node.pointer("/cpu/i/scale").and_then(Value::as_i64).unwrap_or(0) + 3;
        let power = 10_u64.pow(scale.unsigned_abs() as u32);
        NodeShare {
            usable: data::text_or_empty(node, "ready") == "True"
                && !hints::CONTROL_PLANE.iter().any(labelled),
            zone: node.get("zone").and_then(Value::as_str),
            milli_cpu: if scale < 0 { digits / power } else { digits * power },
        }
    });
    let shares = hints::zone_shares(nodes);
    let mut mismatches = Vec::new();
    if data::flag(case, "expectSufficientNodeInfo") != shares.is_some() {
        mismatches.push(format!("shares {shares:?}"));
    }
    if let Some(expected) = case.get("expectedRatios").and_then(Value::as_object) {
        let shares = shares.unwrap_or_default();
        let near = |(zone, share): (&String, &Value)| {
            let expected = share.as_f64().unwrap_or(f64::NAN);
            shares.get(zone).is_some_and(|share| (share - expected).abs() < 1e-9)
        };
        if expected.len() != shares.len() || !expected.iter().all(near) {
            mismatches.push(format!("expected shares {expected:?}, were {shares:?}"));
        }
    }
    tally.settle(name, &mismatches);
    Ok(())
}

fn counts(value: &Value, field: &str) -> BTreeMap<String, i64> {
    let map = value.get(field).and_then(Value::as_object);
    map.into_iter().flatten().filter_map(|(zone, count)| Some((zone.clone(), count.as_i64()?))).collect()
}

fn allocations(case: &Value) -> BTreeMap<String, Allocation> {
    let map = case.get("allocations").and_then(Value::as_object);
    let allocation = |value: &Value| Allocation {
        minimum: value.get("minimum").and_then(Value::as_i64).unwrap_or(0),
        maximum: value.get("maximum").and_then(Value::as_i64).unwrap_or(0),
        desired: value.get("desired").and_then(Value::as_f64).unwrap_or(0.0),
    };
    map.into_iter().flatten().map(|(zone, value)| (zone.clone(), allocation(value))).collect()
}
