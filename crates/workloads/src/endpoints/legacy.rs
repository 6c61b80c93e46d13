//! The `v1` Endpoints object of each Service with a selector: primary family only, terminating pods left out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Service, ServicePort, TRIGGER_TIME, address, hostname, same, target_ref};
use crate::op::rfc3339;
use crate::planner::Planner;
use crate::read;
use crate::world::{Kind, Object};

const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const CONTROLLER: &str = "endpoint-controller";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// An Endpoints object lists no more addresses than this; EndpointSlices list all.
const MAX_ADDRESSES: usize = 1000;

/// Whether an Endpoints object is this controller's.
pub(super) fn is_ours(endpoints: &Object<'_>) -> bool {
    read::label(endpoints.labels, MANAGED_BY) == Some(CONTROLLER)
}

#[derive(Default)]
struct Subset {
    ready: BTreeMap<IpAddr, Value>,
    not_ready: BTreeMap<IpAddr, Value>,
}

pub(super) fn reconcile(planner: &mut Planner<'_, '_>, service: &Service<'_>, pods: &[usize]) {
    let (world, owner) = (planner.world, &service.object);
    let (subsets, truncated) = subsets(planner, service, pods);
    let labels = service.labels((MANAGED_BY, CONTROLLER));
    let Some(existing) = world.named(Kind::Endpoints, owner.namespace, owner.name) else {
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {
                "name": owner.name,
                "namespace": owner.namespace,
                "labels": labels,
                "annotations": { TRIGGER_TIME: rfc3339(world.now) },
            },
        });
        if !subsets.is_empty() {
            object["subsets"] = subsets.into();
        }
        if truncated {
            object["metadata"]["annotations"][OVER_CAPACITY] = "truncated".into();
        }
        planner.create(object);
        return;
    };
    let subsets = Value::from(subsets);
    let annotations = existing.value.pointer("/metadata/annotations").and_then(Value::as_object);
    let was_truncated = read::label(annotations, OVER_CAPACITY) == Some("truncated");
    let unchanged = same(existing.value.get("subsets"), Some(&subsets))
        && existing.value.pointer("/metadata/labels") == Some(&labels)
        && was_truncated == truncated;
    if unchanged || existing.deleting {
        return;
    }
    let mut value = existing.value.clone();
    value["metadata"]["labels"] = labels;
    let annotations = read::object_mut(&mut value["metadata"], "annotations");
    annotations[TRIGGER_TIME] = rfc3339(world.now).into();
    if truncated {
        annotations[OVER_CAPACITY] = "truncated".into();
    } else if let Some(annotations) = annotations.as_object_mut() {
        annotations.remove(OVER_CAPACITY);
    }
    value["subsets"] = subsets;
    planner.update(value);
}

/// Endpoints of Services that are gone or no longer have a selector.
pub(super) fn remove_stray(planner: &mut Planner<'_, '_>) {
    let world = planner.world;
    for endpoints in world.all(Kind::Endpoints).iter().filter(|e| is_ours(e) && !e.deleting) {
        let service = world.named(Kind::Service, endpoints.namespace, endpoints.name);
        if !service.is_some_and(|service| !matches!(Service::parse(&service), Ok(None))) {
            planner.delete(Kind::Endpoints, endpoints);
        }
    }
}

/// Addresses that share their ports form a subset. Whether some had to be left out.
fn subsets(planner: &Planner<'_, '_>, service: &Service<'_>, pods: &[usize]) -> (Vec<Value>, bool) {
    let world = planner.world;
    let mut subsets: BTreeMap<Vec<Option<u16>>, Subset> = BTreeMap::new();
    let family = service.families[0];
    let (mut ready_count, mut not_ready_count) = (0, 0);
    for &i in pods {
        let pod = &world.pods[i];
        let Some(ip) = address(pod, family) else { continue };
        if pod.object.deleting && !service.publish_not_ready {
            continue;
        }
        let numbers = service.numbers_on(pod);
        if numbers.iter().all(Option::is_none) && !(service.headless && service.ports.is_empty()) {
            continue;
        }
        let mut entry = json!({ "ip": ip.to_string(), "targetRef": target_ref(pod) });
        if let Some(node) = pod.node {
            entry["nodeName"] = node.into();
        }
        if let Some(name) = hostname(pod, &service.object) {
            entry["hostname"] = name.into();
        }
        let subset = subsets.entry(numbers).or_default();
        if service.publish_not_ready || pod.ready {
            ready_count += 1;
            subset.ready.insert(ip, entry);
        } else {
            not_ready_count += 1;
            subset.not_ready.insert(ip, entry);
        }
    }
    // Those that can be used have priority.
    let mut ready_room = MAX_ADDRESSES;
    let mut not_ready_room = MAX_ADDRESSES.saturating_sub(ready_count);
    let mut list = Vec::new();
    for (numbers, subset) in subsets {
        let ready: Vec<Value> = subset.ready.into_values().take(ready_room).collect();
        let not_ready: Vec<Value> = subset.not_ready.into_values().take(not_ready_room).collect();
        ready_room -= ready.len();
        not_ready_room -= not_ready.len();
        let mut value = json!({});
        let lists = [
            ("addresses", ready.into()),
            ("notReadyAddresses", not_ready.into()),
            ("ports", ports(service, &numbers)),
        ];
        for (key, list) in lists {
            if !same(Some(&list), None) {
                value[key] = list;
            }
        }
        if value.get("addresses").is_some() || value.get("notReadyAddresses").is_some() {
            list.push(value);
        }
    }
    (list, ready_count + not_ready_count > MAX_ADDRESSES)
}

fn ports(service: &Service<'_>, numbers: &[Option<u16>]) -> Value {
    let port = |(port, number): (&ServicePort<'_>, u16)| {
        let mut value = json!({ "port": number, "protocol": port.protocol });
        if !port.name.is_empty() {
            value["name"] = port.name.into();
        }
        if let Some(protocol) = port.app_protocol {
            value["appProtocol"] = protocol.into();
        }
        value
    };
    service.ports_at(numbers).map(port).collect()
}
