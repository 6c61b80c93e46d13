//! The result of ADD (CNI specification, section 5, "ADD Success") for each version, and its merge with the
//! result of the plugin before us in the chain.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::NetConf;
use crate::error::{CniError, code};
use crate::version::Version;

/// What an ADD made, in the words of the newest version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct AddResult {
    /// Links that were made, on the host and in the container.
    pub interfaces: Vec<Interface>,
    /// Addresses of the container.
    pub ips: Vec<IpConfig>,
    /// Routes of the container.
    pub routes: Vec<Route>,
    /// DNS settings of the container.
    #[serde(skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
}

/// A link.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Interface {
    /// Interface name.
    pub name: String,
    /// Hardware address, `aa:bb:cc:dd:ee:ff`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// MTU in bytes (since 1.1.0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Path of the namespace that it is in; none on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

/// An address of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IpConfig {
    /// Address with its prefix length.
    pub address: IpNet,
    /// Default gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into [`AddResult::interfaces`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<u32>,
}

/// A route of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// MTU in bytes (since 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Scope, 0 universe, 253 link (since 1.1.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

/// DNS settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Name servers, by priority.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Search list.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// True when nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl AddResult {
    /// The JSON to print: this result in the version of the configuration, behind the result of the plugin
    /// before us when there is one. What that one said stays as it is.
    ///
    /// # Errors
    /// Code 7 when `prevResult` is not what the specification says.
    pub fn to_json(&self, config: &NetConf) -> Result<Value, CniError> {
        let mut merged = match &config.prev_result {
            Some(previous) => previous.clone(),
            None => Map::new(),
        };
        let offset = previous_list(&merged, "interfaces")?.len();
        previous_list(&merged, "ips")?;
        previous_list(&merged, "routes")?;

        let version = config.version;
        merged.insert("cniVersion".into(), version.as_str().into());
        append(&mut merged, "interfaces", self.interfaces.iter().map(|i| interface(i, version)));
        append(&mut merged, "ips", self.ips.iter().map(|i| ip(i, version, offset)));
        append(&mut merged, "routes", self.routes.iter().map(|r| route(r, version)));
        let dns_before = merged.get("dns").and_then(Value::as_object).is_some_and(|dns| !dns.is_empty());
        if !dns_before {
            let dns = if self.dns.is_empty() { &config.dns } else { &self.dns };
            if !dns.is_empty() {
                merged.insert("dns".into(), json!(dns));
            }
        }
        Ok(Value::Object(merged))
    }
}

fn previous_list<'a>(previous: &'a Map<String, Value>, key: &str) -> Result<&'a [Value], CniError> {
    match previous.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => {
            let msg = format!("prevResult.{key} must be a list, it is {other}");
            Err(CniError::new(code::INVALID_CONFIG, msg))
        }
    }
}

fn append(result: &mut Map<String, Value>, key: &str, values: impl Iterator<Item = Value>) {
    let mut list = match result.remove(key) {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    list.extend(values);
    // `ips` and `routes` without an entry may be left out (all versions).
    if !list.is_empty() {
        result.insert(key.into(), Value::Array(list));
    }
}

fn interface(interface: &Interface, version: Version) -> Value {
    let mut interface = interface.clone();
    if version < Version::V1_1_0 {
        interface.mtu = None;
    }
    json!(interface)
}

fn ip(ip: &IpConfig, version: Version, offset: usize) -> Value {
    let mut value = json!(ip);
    if let Some(index) = ip.interface {
        value["interface"] = json!(offset + index as usize);
    }
    if version < Version::V1_0_0 {
        value["version"] = json!(if ip.address.addr().is_ipv4() { "4" } else { "6" });
    }
    value
}

fn route(route: &Route, version: Version) -> Value {
    let mut route = route.clone();
    if version < Version::V1_1_0 {
        (route.mtu, route.scope) = (None, None);
    }
    json!(route)
}
