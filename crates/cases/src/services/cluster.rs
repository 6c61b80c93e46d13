//! Small clusters for cases that give less than whole objects.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Result, bail};
use podway_model::{EndpointSlice, Service};
use podway_services::{Changes, Choice, Compiler, table::NodeView};
use serde_json::{Value, json};

/// A node of this name and nothing else.
pub fn node(name: &str) -> NodeView {
    // A node always has a name; some cases do without.
    let name = if name.is_empty() { "this-node" } else { name };
    NodeView { name: name.to_owned(), ..NodeView::default() }
}

/// An endpoint as the cases list it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Address and port.
    pub endpoint: String,
    /// Whether it is on the node.
    pub local: bool,
    /// Ready, serving, terminating; nothing where the case does not say.
    pub conditions: Option<[bool; 3]>,
}

/// Endpoints by service port, in the cases' spelling of it: `namespace/name:port/PROTOCOL`.
pub type Endpoints = BTreeMap<String, Vec<Listed>>;

/// Reads endpoints by service port.
///
/// # Errors
/// Data that is not as expected.
pub fn endpoints(value: Option<&Value>) -> Result<Endpoints> {
    let mut all = Endpoints::new();
    let map = match value {
        None | Some(Value::Null) => return Ok(all),
        Some(Value::Object(map)) => map,
        Some(other) => bail!("endpoints are not a map: {other}"),
    };
    for (port, listed) in map {
        let mut endpoints = Vec::new();
        let items: Vec<&Value> = match listed {
            Value::Array(items) => items.iter().collect(),
            Value::Object(by_address) => by_address.values().collect(),
            other => bail!("endpoints of {port} are not a list: {other}"),
        };
        for item in items {
            let condition = |name: &str| item.get(name).and_then(Value::as_bool);
            endpoints.push(Listed {
                endpoint: crate::data::text(item, "endpoint")?.to_owned(),
                local: crate::data::flag(item, "isLocal"),
                conditions: condition("ready").map(|ready| {
                    [ready, condition("serving").unwrap_or(ready), condition("terminating").unwrap_or(false)]
                }),
            });
        }
        endpoints.sort();
        all.insert(port.clone(), endpoints);
    }
    Ok(all)
}

/// What a compiler makes of the endpoints of all Services, with only as much said as `like` says.
pub fn compiled(compiler: &Compiler, services: &[Service], with_conditions: bool) -> Endpoints {
    let mut all = Endpoints::new();
    for service in services {
        let Some(report) = compiler.explain(&service.namespace, &service.name) else { continue };
        for port in report.ports {
            let mut endpoints: Vec<Listed> = port
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.cluster != Choice::Duplicate)
                .map(|e| Listed {
                    endpoint: std::net::SocketAddr::new(e.addr, e.port).to_string(),
                    local: e.local,
                    conditions: with_conditions.then_some([e.ready, e.serving, e.terminating]),
                })
                .collect();
            endpoints.sort();
            if !endpoints.is_empty() {
                all.insert(port_key(service, &port.name, port.protocol), endpoints);
            }
        }
    }
    all
}

fn port_key(service: &Service, port: &str, protocol: podway_model::Protocol) -> String {
    let colon = if port.is_empty() { "" } else { ":" };
    format!("{}/{}{colon}{port}/{protocol}", service.namespace, service.name)
}

/// Reads slices; null stands for none.
///
/// # Errors
/// A slice that is malformed.
pub fn slices(value: Option<&Value>) -> Result<Vec<Option<EndpointSlice>>> {
    let items = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(other) => bail!("slices are not a list: {other}"),
    };
    let one = |item: &Value| {
        if item.is_null() { Ok(None) } else { Ok(Some(EndpointSlice::parse(item)?)) }
    };
    items.iter().map(one).collect()
}

/// Services for slices that come without: one for each that they name, with every port that they have. They are load
/// balancers under `externalTrafficPolicy: Local`, so that endpoints on the node are counted.
///
/// # Errors
/// Never for slices that were read.
pub fn services_for<'a>(slices: impl Iterator<Item = &'a EndpointSlice>) -> Result<Vec<Service>> {
    /// Numbers of ports by name and protocol.
    type Ports = BTreeMap<(String, String), usize>;
    let mut by_service: BTreeMap<(&str, &str), Ports> = BTreeMap::new();
    for slice in slices {
        let Some(name) = &slice.service else { continue };
        let ports = by_service.entry((&slice.namespace, name)).or_default();
        for port in &slice.ports {
            let number = ports.len() + 1;
            ports.entry((port.name.to_string(), port.protocol.to_string())).or_insert(number);
        }
    }
    let mut services = Vec::new();
    for (i, ((namespace, name), ports)) in by_service.iter().enumerate() {
        let ports: Vec<Value> = ports
            .iter()
            .map(|((name, protocol), port)| json!({ "name": name, "protocol": protocol, "port": port }))
            .collect();
        services.push(Service::parse(&json!({
            "metadata": { "namespace": namespace, "name": name },
            "spec": {
                "type": "LoadBalancer",
                "clusterIP": IpAddr::from([172, 30, 200, i as u8 + 1]).to_string(),
                "externalIPs": [IpAddr::from([192, 0, 2, i as u8 + 1]).to_string()],
                "externalTrafficPolicy": "Local",
                "healthCheckNodePort": 30_000 + i,
                "ports": ports,
            },
        }))?);
    }
    Ok(services)
}

/// Puts `after` in the place of `before`, which are of the same length where both have something: nothing after
/// something is a removal.
pub fn replace(
    compiler: &mut Compiler,
    before: &[Option<EndpointSlice>],
    after: &[Option<EndpointSlice>],
) -> Vec<Changes> {
    let mut changes = Vec::new();
    for i in 0..before.len().max(after.len()) {
        match (before.get(i).and_then(Option::as_ref), after.get(i).and_then(Option::as_ref)) {
            (_, Some(new)) => changes.push(compiler.apply_slice(new)),
            (Some(old), None) => changes.push(compiler.remove_slice(&old.namespace, &old.name)),
            (None, None) => {}
        }
    }
    changes
}
