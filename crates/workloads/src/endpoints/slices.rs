//! The EndpointSlice controller: pods into slices of limited size, touching as few slices as possible.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::{HEADLESS, MANAGED_BY, SERVICE_NAME, Service, TRIGGER_TIME, address, hostname, same, target_ref};
use crate::hints;
use crate::op::rfc3339;
use crate::planner::Planner;
use crate::read;
use crate::scheduler::ZONE;
use crate::services::Family;
use crate::workloads::owner_reference;
use crate::world::{Kind, Object, Pod, World};

pub(crate) const CONTROLLER: &str = "endpointslice-controller.k8s.io";

/// Whether a slice is this controller's.
fn is_ours(slice: &Object<'_>) -> bool {
    read::label(slice.labels, MANAGED_BY) == Some(CONTROLLER)
}

/// An endpoint that should be in some slice.
struct Wanted<'a> {
    uid: &'a str,
    value: Value,
}

/// A slice being worked on.
struct Slice<'a> {
    object: Object<'a>,
    endpoints: Vec<Value>,
    changed: bool,
}

pub(super) fn reconcile(planner: &mut Planner<'_, '_>, service: &Service<'_>, pods: &[usize]) {
    let world = planner.world;
    let mut existing: HashMap<&str, Vec<Object<'_>>> = HashMap::new();
    for slice in world.owned(Kind::EndpointSlice, service.object.uid).filter(|s| is_ours(s) && !s.deleting) {
        existing.entry(read::text(slice.value, "addressType").unwrap_or_default()).or_default().push(slice);
    }
    for &family in &service.families {
        let slices = existing.remove(family.as_str()).unwrap_or_default();
        reconcile_family(planner, service, family, pods, slices);
    }
    // Of a family that the Service no longer has.
    let mut left: Vec<_> = existing.into_values().flatten().collect();
    left.sort_by_key(|slice| slice.name);
    left.iter().for_each(|slice| planner.delete(Kind::EndpointSlice, slice));
}

/// Slices of Services that are gone or no longer have a selector.
pub(super) fn remove_stray(planner: &mut Planner<'_, '_>) {
    let world = planner.world;
    for slice in world.all(Kind::EndpointSlice).iter().filter(|slice| is_ours(slice) && !slice.deleting) {
        let name = read::label(slice.labels, SERVICE_NAME).unwrap_or_default();
        let service = world.named(Kind::Service, slice.namespace, name);
        let wanted = service.is_some_and(|service| {
            slice.controller == Some(service.uid) && !matches!(Service::parse(&service), Ok(None))
        });
        if !wanted {
            planner.delete(Kind::EndpointSlice, slice);
        }
    }
}

fn reconcile_family(
    planner: &mut Planner<'_, '_>,
    service: &Service<'_>,
    family: Family,
    pods: &[usize],
    existing: Vec<Object<'_>>,
) {
    let world = planner.world;
    let max = planner.config.endpoints_per_slice.max(1);
    // Pods whose named ports resolve alike share slices.
    let mut groups: Vec<(Value, Vec<Wanted<'_>>)> = Vec::new();
    let mut group_of: HashMap<Vec<Option<u16>>, usize> = HashMap::new();
    for &i in pods {
        let pod = &world.pods[i];
        let Some(value) = endpoint(world, service, pod, family) else { continue };
        let group = *group_of.entry(service.numbers_on(pod)).or_insert_with_key(|numbers| {
            groups.push((ports(service, numbers), Vec::new()));
            groups.len() - 1
        });
        groups[group].1.push(Wanted { uid: pod.object.uid, value });
    }
    let mut slices_of: Vec<Vec<Slice<'_>>> = groups.iter().map(|_| Vec::new()).collect();
    let mut spare = Vec::new();
    for object in existing {
        let ports = object.value.get("ports");
        match groups.iter().position(|(wanted, _)| same(ports, Some(wanted))) {
            Some(group) => slices_of[group].push(Slice { object, endpoints: Vec::new(), changed: false }),
            None => spare.push(object),
        }
    }
    let mut new = Vec::new();
    let mut kept = Vec::new();
    for ((ports, wanted), mut slices) in groups.into_iter().zip(slices_of) {
        let mut left = keep(&mut slices, wanted, service.auto_hints).into_iter();
        // Slices that change anyway take what is left, then others with room, then new ones.
        slices.sort_by_key(|slice| !slice.changed);
        for slice in &mut slices {
            let before = slice.endpoints.len();
            slice.endpoints.extend(left.by_ref().take(max.saturating_sub(before)));
            slice.changed |= slice.endpoints.len() > before;
        }
        loop {
            let endpoints: Vec<Value> = left.by_ref().take(max).collect();
            if endpoints.is_empty() {
                break;
            }
            new.push((ports.clone(), endpoints));
        }
        for slice in slices {
            if slice.endpoints.is_empty() {
                spare.push(slice.object);
            } else {
                kept.push((ports.clone(), slice));
            }
        }
    }
    let placeholder = kept.is_empty() && new.is_empty();
    if service.auto_hints && !placeholder {
        share_out(planner, service, &mut kept, &mut new);
    }
    for (ports, slice) in kept {
        write(planner, service, &slice.object, &ports, slice.endpoints.into(), slice.changed);
    }
    let mut spare = spare.into_iter();
    for (ports, endpoints) in new {
        // A slice that has lost its endpoints is used again, rather than one deleted and one created.
        match spare.next() {
            Some(object) => write(planner, service, &object, &ports, endpoints.into(), true),
            None => create(planner, service, family, &ports, &endpoints.into()),
        }
    }
    if placeholder {
        // A Service without endpoints has one empty slice: consumers can tell "none" from "not seen yet".
        match spare.next() {
            Some(object) => {
                let filled = |key| !same(object.value.get(key), None);
                let changed = filled("endpoints") || filled("ports");
                write(planner, service, &object, &Value::Null, Value::Null, changed);
            }
            None => create(planner, service, family, &Value::Null, &Value::Null),
        }
    }
    spare.for_each(|object| planner.delete(Kind::EndpointSlice, &object));
}

/// Hints for `Auto`, over all slices of a family. Why there are none is said in an event.
fn share_out(
    planner: &mut Planner<'_, '_>,
    service: &Service<'_>,
    kept: &mut [(Value, Slice<'_>)],
    new: &mut [(Value, Vec<Value>)],
) {
    let shares = hints::zone_shares(planner.world.nodes.iter().map(share));
    let mut slices = hints::Slices::default();
    let mut take = |endpoints: &mut Vec<Value>, changed: bool| {
        let list = if changed { &mut slices.written } else { &mut slices.unchanged };
        list.push(std::mem::take(endpoints));
    };
    new.iter_mut().for_each(|(_, endpoints)| take(endpoints, true));
    kept.iter_mut().for_each(|(_, slice)| take(&mut slice.endpoints, slice.changed));
    let (changed, result) = hints::assign(&mut slices, shares.as_ref());
    let mut written = slices.written.into_iter();
    let mut unchanged = slices.unchanged.into_iter().zip(changed);
    for (_, endpoints) in new {
        *endpoints = written.next().unwrap_or_default();
    }
    for (_, slice) in kept {
        if slice.changed {
            slice.endpoints = written.next().unwrap_or_default();
        } else if let Some((endpoints, changed)) = unchanged.next() {
            (slice.endpoints, slice.changed) = (endpoints, changed);
        }
    }
    if let Err(why) = result {
        planner.warning(&service.object, CONTROLLER, "TopologyAwareHintsDisabled", why.to_string());
    }
}

/// What a node counts for when endpoints are shared out among zones.
fn share<'a>(node: &Object<'a>) -> hints::NodeShare<'a> {
    let ready = read::condition(node.value, "Ready").and_then(|c| read::text(c, "status")) == Some("True");
    hints::NodeShare {
        usable: ready && !hints::CONTROL_PLANE.iter().any(|label| read::label(node.labels, label).is_some()),
        zone: read::label(node.labels, ZONE),
        milli_cpu: read::at(node.value, "status.allocatable.cpu").and_then(hints::milli).unwrap_or(0),
    }
}

/// Distribute the wanted endpoints over the slices that have them already; returns those that are in none. With
/// `keep_hints`, endpoints have the hints that they had.
fn keep(slices: &mut [Slice<'_>], wanted: Vec<Wanted<'_>>, keep_hints: bool) -> Vec<Value> {
    let mut order = Vec::with_capacity(wanted.len());
    let mut wanted: HashMap<&str, Value> = wanted
        .into_iter()
        .map(|wanted| {
            order.push(wanted.uid);
            (wanted.uid, wanted.value)
        })
        .collect();
    for slice in slices {
        for old in read::list(slice.object.value, "endpoints").unwrap_or_default() {
            // What is not wanted, or has been found in another slice, goes.
            match read::text(old, "targetRef.uid").and_then(|uid| wanted.remove(uid)) {
                Some(mut value) => {
                    if keep_hints && let Some(hints) = old.get("hints") {
                        value["hints"] = hints.clone();
                    }
                    slice.changed |= *old != value;
                    slice.endpoints.push(value);
                }
                None => slice.changed = true,
            }
        }
    }
    order.into_iter().filter_map(|uid| wanted.remove(uid)).collect()
}

/// The pod as an endpoint; nothing when it has no address of the family.
fn endpoint(world: &World<'_>, service: &Service<'_>, pod: &Pod<'_>, family: Family) -> Option<Value> {
    let address = address(pod, family)?;
    let terminating = pod.object.deleting;
    let ready = service.publish_not_ready || pod.ready && !terminating;
    let mut endpoint = json!({
        "addresses": [address.to_string()],
        "conditions": { "ready": ready, "serving": pod.ready, "terminating": terminating },
        "targetRef": target_ref(pod),
    });
    if let Some(name) = hostname(pod, &service.object) {
        endpoint["hostname"] = name.into();
    }
    let zone = pod.node.and_then(|node| world.node(node)).and_then(|node| read::label(node.labels, ZONE));
    if let Some(node) = pod.node {
        endpoint["nodeName"] = node.into();
    }
    if let Some(zone) = zone {
        endpoint["zone"] = zone.into();
    }
    let distribution = service.distribution.filter(|_| !service.auto_hints);
    if let Some(hints) = hints::by_distribution(distribution, ready, pod.node, zone) {
        endpoint["hints"] = hints;
    }
    Some(endpoint)
}

fn ports(service: &Service<'_>, numbers: &[Option<u16>]) -> Value {
    let port = |(port, number): (&super::ServicePort<'_>, u16)| {
        let mut value = json!({ "name": port.name, "protocol": port.protocol, "port": number });
        if let Some(protocol) = port.app_protocol {
            value["appProtocol"] = protocol.into();
        }
        value
    };
    service.ports_at(numbers).map(port).collect()
}

fn labels(service: &Service<'_>) -> Value {
    let mut labels = service.labels((MANAGED_BY, CONTROLLER));
    labels[SERVICE_NAME] = service.object.name.into();
    debug_assert!(service.headless == labels.get(HEADLESS).is_some());
    labels
}

fn write(
    planner: &mut Planner<'_, '_>,
    service: &Service<'_>,
    object: &Object<'_>,
    ports: &Value,
    endpoints: Value,
    changed: bool,
) {
    let labels = labels(service);
    if !changed && object.value.pointer("/metadata/labels") == Some(&labels) {
        return;
    }
    let mut value = object.value.clone();
    value["metadata"]["labels"] = labels;
    value["ports"] = ports.clone();
    value["endpoints"] = endpoints;
    read::object_mut(&mut value["metadata"], "annotations")[TRIGGER_TIME] = rfc3339(planner.world.now).into();
    planner.update(value);
}

fn create(
    planner: &mut Planner<'_, '_>,
    service: &Service<'_>,
    family: Family,
    ports: &Value,
    endpoints: &Value,
) {
    let (world, owner) = (planner.world, &service.object);
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
            "labels": labels(service),
            "annotations": { TRIGGER_TIME: rfc3339(world.now) },
            "ownerReferences": [owner_reference(Kind::Service, owner)],
        },
        "addressType": family.as_str(),
        "endpoints": endpoints,
        "ports": ports,
    }));
}
