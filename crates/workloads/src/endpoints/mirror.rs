//! EndpointSlices for Endpoints objects that people write themselves, for Services without selector.

use std::collections::HashMap;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::{MANAGED_BY, SERVICE_NAME, TRIGGER_TIME, legacy, same};
use crate::op::rfc3339;
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::services::Family;
use crate::workloads::owner_reference;
use crate::world::{Kind, Object, World};

const CONTROLLER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// Addresses of one subset that are mirrored.
const MAX_PER_SUBSET: usize = 1000;

pub(super) fn reconcile(planner: &mut Planner<'_, '_>) {
    let world = planner.world;
    for endpoints in world.all(Kind::Endpoints).iter().filter(|e| should_mirror(world, e)) {
        match wanted(endpoints) {
            Ok(wanted) => mirror(planner, endpoints, wanted),
            Err(error) => planner.malformed(endpoints, &error),
        }
    }
    for slice in world.all(Kind::EndpointSlice).iter().filter(|slice| is_ours(slice) && !slice.deleting) {
        let name = read::label(slice.labels, SERVICE_NAME).unwrap_or_default();
        let source = world.named(Kind::Endpoints, slice.namespace, name);
        if !source.is_some_and(|e| slice.controller == Some(e.uid) && should_mirror(world, &e)) {
            planner.delete(Kind::EndpointSlice, slice);
        }
    }
}

fn is_ours(slice: &Object<'_>) -> bool {
    read::label(slice.labels, MANAGED_BY) == Some(CONTROLLER)
}

fn should_mirror(world: &World<'_>, endpoints: &Object<'_>) -> bool {
    let annotations = endpoints.value.pointer("/metadata/annotations").and_then(Value::as_object);
    let service = world.named(Kind::Service, endpoints.namespace, endpoints.name);
    !endpoints.deleting
        && !legacy::is_ours(endpoints)
        && read::label(endpoints.labels, SKIP) != Some("true")
        && read::label(annotations, LEADER).is_none()
        && service.is_some_and(|service| {
            let selector = read::at(service.value, "spec.selector").and_then(Value::as_object);
            !service.deleting && selector.is_none_or(serde_json::Map::is_empty)
        })
}

/// Family, ports, endpoints of each slice to have.
type Slices = Vec<(Family, Value, Vec<Value>)>;

fn wanted(endpoints: &Object<'_>) -> Result<Slices, Malformed> {
    let mut slices: Slices = Vec::new();
    for (s, subset) in read::list(endpoints.value, "subsets")?.iter().enumerate() {
        let inside = |error: Malformed| error.within(&format!("subsets[{s}]"));
        let mut ports = Vec::new();
        for port in read::list(subset, "ports").map_err(inside)? {
            let name = read::text(port, "name").unwrap_or_default();
            let protocol = read::text(port, "protocol").unwrap_or("TCP");
            let mut value = json!({ "name": name, "protocol": protocol, "port": port["port"] });
            if let Some(protocol) = read::text(port, "appProtocol") {
                value["appProtocol"] = protocol.into();
            }
            ports.push(value);
        }
        let ports = Value::from(ports);
        let mut room = MAX_PER_SUBSET;
        for (list, ready) in [("addresses", true), ("notReadyAddresses", false)] {
            let addresses = read::list(subset, list).map_err(inside)?;
            for (a, address) in addresses.iter().enumerate().take(room) {
                let (family, endpoint) =
                    endpoint(address, ready).map_err(|e| inside(e.within(&format!("{list}[{a}]"))))?;
                match slices.iter_mut().find(|(f, p, _)| *f == family && *p == ports) {
                    Some((_, _, endpoints)) => endpoints.push(endpoint),
                    None => slices.push((family, ports.clone(), vec![endpoint])),
                }
            }
            room = room.saturating_sub(addresses.len());
        }
    }
    Ok(slices)
}

fn endpoint(address: &Value, ready: bool) -> Result<(Family, Value), Malformed> {
    let text = read::string(address, "ip")?.unwrap_or_default();
    let ip: IpAddr =
        text.parse().map_err(|_| Malformed::new("ip", format!("{text:?} is not an IP address")))?;
    let mut endpoint = json!({ "addresses": [text], "conditions": { "ready": ready } });
    for key in ["hostname", "nodeName", "targetRef"] {
        if let Some(value) = address.get(key).filter(|value| !value.is_null()) {
            endpoint[key] = value.clone();
        }
    }
    Ok((Family::of(ip), endpoint))
}

fn mirror(planner: &mut Planner<'_, '_>, endpoints: &Object<'_>, wanted: Slices) {
    let world = planner.world;
    let mut existing: HashMap<&str, Vec<Object<'_>>> = HashMap::new();
    for slice in world.owned(Kind::EndpointSlice, endpoints.uid).filter(|s| is_ours(s) && !s.deleting) {
        existing.entry(read::text(slice.value, "addressType").unwrap_or_default()).or_default().push(slice);
    }
    let mut labels =
        endpoints.value.pointer("/metadata/labels").filter(|l| l.is_object()).cloned().unwrap_or(json!({}));
    labels[SERVICE_NAME] = endpoints.name.into();
    labels[MANAGED_BY] = CONTROLLER.into();
    for (family, ports, addresses) in wanted {
        let slices = existing.entry(family.as_str()).or_default();
        let same_ports = |slice: &Object<'_>| same(slice.value.get("ports"), Some(&ports));
        let found = slices.iter().position(same_ports).or_else(|| (!slices.is_empty()).then_some(0));
        let addresses = Value::from(addresses);
        let Some(slice) = found.map(|i| slices.remove(i)) else {
            create(planner, endpoints, family, &labels, &ports, &addresses);
            continue;
        };
        let unchanged = same_ports(&slice)
            && slice.value.get("endpoints") == Some(&addresses)
            && slice.value.pointer("/metadata/labels") == Some(&labels);
        if !unchanged {
            let mut value = slice.value.clone();
            value["metadata"]["labels"] = labels.clone();
            value["ports"] = ports;
            value["endpoints"] = addresses;
            read::object_mut(&mut value["metadata"], "annotations")[TRIGGER_TIME] = rfc3339(world.now).into();
            planner.update(value);
        }
    }
    let mut left: Vec<_> = existing.into_values().flatten().collect();
    left.sort_by_key(|slice| slice.name);
    left.iter().for_each(|slice| planner.delete(Kind::EndpointSlice, slice));
}

fn create(
    planner: &mut Planner<'_, '_>,
    owner: &Object<'_>,
    family: Family,
    labels: &Value,
    ports: &Value,
    endpoints: &Value,
) {
    let world = planner.world;
    let base = format!("{}-", owner.name);
    let exists = |name: &str| world.named(Kind::EndpointSlice, owner.namespace, name).is_some();
    let name = planner.free_name("EndpointSlice", owner.namespace, &base, exists);
    planner.create(json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "generateName": base,
            "namespace": owner.namespace,
            "labels": labels,
            "annotations": { TRIGGER_TIME: rfc3339(world.now) },
            "ownerReferences": [owner_reference(Kind::Endpoints, owner)],
        },
        "addressType": family.as_str(),
        "endpoints": endpoints,
        "ports": ports,
    }));
}
