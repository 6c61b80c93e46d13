//! Tables about the node: its addresses for node ports, and who is a pod.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::{Context, Result};
use ipnet::IpNet;
use podway_model::Family;
use podway_services::{
    NodePortAddresses, origin,
    table::{NodeView, Origin},
};
use serde_json::Value;

use crate::{Tally, data};

/// Which of the node's addresses serve node ports.
pub(super) fn node_ips(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let selection = NodePortAddresses::new(&data::parsed::<IpNet>(case, "cidrs")?);
    let mut addresses = Vec::new();
    for interface in data::list(case, "itfAddrsPairs")? {
        addresses.extend(data::parsed::<IpNet>(interface, "addrs")?.iter().map(IpNet::addr));
    }
    let chosen = selection.of(&addresses);
    let mut mismatches = Vec::new();
    for (family, field) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let expected = case.pointer(&format!("/expected/{field}")).context("expected is missing")?;
        let ips: BTreeSet<IpAddr> = data::parsed(expected, "ips")?.into_iter().collect();
        let actual: BTreeSet<IpAddr> = chosen.iter().copied().filter(|ip| Family::of(ip) == family).collect();
        // What the case expects of a family without any address of it on the node is nothing, whatever was selected.
        let expected = (ips, data::flag(expected, "matchAll"));
        let actual = (actual, selection.all(family));
        if expected != actual {
            mismatches.push(format!("{field}: expected {expected:?}, was {actual:?}"));
        }
    }
    tally.settle(name, &mismatches);
    Ok(())
}

/// Whether loopback is among them.
pub(super) fn loopback(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let ranges: Vec<IpNet> = data::parsed(case, "cidrStrings")?;
    let selection = NodePortAddresses::new(&ranges);
    // Any address of 127.0.0.0/8 may be on the loopback device: the usual one, and one in each range.
    let mut loopback = vec![IpAddr::from([127, 0, 0, 1])];
    loopback.extend(ranges.iter().map(IpNet::network).filter(IpAddr::is_loopback));
    let chosen = selection.of(&loopback).iter().any(IpAddr::is_ipv4);
    tally.check(name, &data::flag(case, "want"), &chosen);
    Ok(())
}

/// Whether a range selects every address.
pub(super) fn zero(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let range: Option<IpNet> = data::text(case, "input")?.parse().ok();
    let all = range.is_some_and(|range| NodePortAddresses::new(&[range]).all(Family::of_net(&range)));
    tally.check(name, &data::flag(case, "expected"), &all);
    Ok(())
}

/// Who is a pod: those in the range, and nobody else.
pub(super) fn detect_local(case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    let range: IpNet = data::text(case, "cidr")?.parse()?;
    let said =
        |field: &str| case.get(field).and_then(Value::as_array).and_then(|words| words.last()?.as_str());
    let view = NodeView { pod_cidrs: vec![range], ..NodeView::default() };
    let is_pod = |addr: IpAddr| origin(&view, &addr) == Origin::Pod;
    let outside = |addr: IpAddr, up: bool| -> Option<IpAddr> {
        match addr {
            IpAddr::V4(v4) => {
                let n = u32::from(v4);
                Some(std::net::Ipv4Addr::from(if up { n.checked_add(1)? } else { n.checked_sub(1)? }).into())
            }
            IpAddr::V6(v6) => {
                let n = u128::from(v6);
                Some(std::net::Ipv6Addr::from(if up { n.checked_add(1)? } else { n.checked_sub(1)? }).into())
            }
        }
    };
    let mut mismatches = Vec::new();
    for field in ["expectedIfLocalOutput", "expectedIfNotLocalOutput"] {
        if said(field) != Some(&range.to_string()) {
            mismatches.push(format!("{field} is not about {range}"));
        }
    }
    if !is_pod(range.network()) || !is_pod(range.broadcast()) {
        mismatches.push(format!("the ends of {range} are not pods"));
    }
    let beyond = [outside(range.network(), false), outside(range.broadcast(), true)];
    if beyond.into_iter().flatten().any(is_pod) {
        mismatches.push(format!("addresses beside {range} are pods"));
    }
    tally.settle(name, &mismatches);
    Ok(())
}
