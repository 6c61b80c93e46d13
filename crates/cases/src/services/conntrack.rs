//! `conntrack-cleanup.yaml`: which tracked flows must be forgotten.

use std::{net::IpAddr, path::Path};

use anyhow::{Context, Result};
use podway_model::{EndpointSlice, Protocol, Service};
use podway_services::{Compiler, TrackedFlow, is_stale};
use serde_json::Value;

use super::cluster;
use crate::{Tally, data};

/// Runs the file.
///
/// # Errors
/// Data that cannot be read.
pub fn run(path: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    let value = data::yaml(path)?;
    for scenario in data::list(&value, "scenarios")? {
        let name = data::text(scenario, "name")?;
        one(scenario, name, &mut tally).with_context(|| name.to_owned())?;
    }
    Ok(tally)
}

fn one(scenario: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    // Where node ports answer; the cases' flows to node ports leave the address open.
    let own = IpAddr::from([192, 168, 0, 2]);
    let mut view = cluster::node(data::text(scenario, "node")?);
    view.addresses = vec![own];
    view.node_port_addresses = vec![own];
    let mut compiler = Compiler::new(view);
    let service = Service::parse(scenario.get("service").context("service is missing")?)?;
    let slice = EndpointSlice::parse(scenario.get("endpointslice").context("endpointslice is missing")?)?;
    compiler.load([&service], [&slice]);
    let expect = scenario.get("expect").context("expect is missing")?;
    let deleted = data::list(expect, "deleted")?;
    let mut kept = 0;
    for flow in data::list(scenario, "flows_before")? {
        let protocol = data::text(flow, "proto")?;
        let tracked = TrackedFlow {
            protocol: Protocol::from_name(protocol).with_context(|| format!("protocol {protocol:?}"))?,
            dst: if flow["orig_dst"].is_null() { own } else { data::address(flow, "orig_dst")? },
            dst_port: data::number(flow, "orig_dport").try_into()?,
            reply_src: data::address(flow, "reply_src")?,
            reply_port: data::number(flow, "reply_sport").try_into()?,
        };
        let stale = is_stale(compiler.table(), compiler.view(), &tracked);
        kept += u64::from(!stale);
        tally.check(&format!("conntrack: {name}: {flow}"), &deleted.contains(flow), &stale);
    }
    tally.check(&format!("conntrack: {name}: flows that stay"), &data::number(expect, "kept_count"), &kept);
    Ok(())
}
