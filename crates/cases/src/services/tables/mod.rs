//! `tables/`: tables of unit tests, each mapped to what does the same here.

mod endpoints;
mod services;
mod util;

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{Tally, data};

/// Runs the folder.
///
/// # Errors
/// Data that cannot be read.
pub fn run(folder: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    for package in ["proxy", "nftables", "iptables", "ipvs", "util"] {
        let folder = folder.join(package);
        if !folder.is_dir() {
            continue;
        }
        for path in data::files(&folder)? {
            let value = data::yaml(&path)?;
            let test = data::text(&value, "test")?;
            for (i, entry) in data::list(&value, "cases")?.iter().enumerate() {
                let case = entry.get("case").context("case is missing")?;
                let named = ["name", "desc"].iter().find_map(|field| case.get(*field)?.as_str());
                let named = named.or_else(|| entry.get("key")?.as_str()).unwrap_or_default();
                let name = format!("{package} {test} {i} {named}");
                one(test, package, case, &name, &mut tally).with_context(|| name.clone())?;
            }
        }
    }
    Ok(tally)
}

fn one(test: &str, package: &str, case: &Value, name: &str, tally: &mut Tally) -> Result<()> {
    match test {
        "TestUpdateEndpointsMap" => endpoints::update(case, package, name, tally),
        "TestEndpointsMapFromESC" | "TestEndpointInfoByServicePort" => endpoints::map(case, name, tally),
        "TestEndpointSliceUpdate" => endpoints::slice_update(case, name, tally),
        "TestCheckoutChanges" => endpoints::checkout(case, name, tally),
        "TestEsDataChanged" => endpoints::data_changed(case, name, tally),
        "TestGetLocalEndpointIPs" => endpoints::local(case, name, tally),
        "TestServiceToServiceMap" => services::ports(case, name, tally),
        "TestLoadBalancerIngressRouteTypeProxy" => services::ingress_mode(case, name, tally),
        "TestNoEndpointsMetric" => services::no_local_endpoints(case, name, tally),
        "TestShouldSkipService" => services::skipped(case, name, tally),
        "TestGetClusterIPByFamily" => services::cluster_ip(case, name, tally),
        "TestMapIPsByIPFamily" => services::addresses_by_family(case, name, tally),
        "TestMapCIDRsByIPFamily" => services::ranges_by_family(case, name, tally),
        "TestGetNodeIPs" => util::node_ips(case, name, tally),
        "TestContainsIPv4Loopback" => util::loopback(case, name, tally),
        "TestIsZeroCIDR" => util::zero(case, name, tally),
        "TestDetectLocalByCIDR" => util::detect_local(case, name, tally),
        "TestIPPart" => {
            tally.not_applicable(name, "splits a text of address and port; endpoints are never texts here");
            Ok(())
        }
        "TestAddressSet" => {
            tally.not_applicable(
                name,
                "collects values of Go's net.Addr into a set; there is no such type here",
            );
            Ok(())
        }
        _ => {
            tally.fail(name, "nothing is known of this test; map it to what it corresponds to");
            Ok(())
        }
    }
}
