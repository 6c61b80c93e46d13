//! EndpointSlices of Services with a selector, and the Endpoints objects that older clients still read.

mod legacy;
mod mirror;
mod slices;

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::planner::Planner;
use crate::read::{self, Labels, Malformed};
use crate::selector::Selector;
use crate::services::Family;
use crate::world::{Kind, Object, Pod, World};

/// Whom its events are from.
pub(crate) use slices::CONTROLLER as COMPONENT;

/// Label of a slice: which Service it is of.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Label of the endpoints of a Service without cluster IP.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// When what led to the object happened; consumers measure their latency against it.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Bring the endpoints of all Services up to date.
pub(crate) fn reconcile(planner: &mut Planner<'_, '_>) {
    let world = planner.world;
    for object in world.all(Kind::Service).iter().filter(|service| !service.deleting) {
        match Service::parse(object) {
            Ok(Some(service)) => {
                let pods = service.pods(world);
                slices::reconcile(planner, &service, &pods);
                legacy::reconcile(planner, &service, &pods);
            }
            Ok(None) => {}
            Err(error) => planner.malformed(object, &error),
        }
    }
    slices::remove_stray(planner);
    legacy::remove_stray(planner);
    mirror::reconcile(planner);
}

/// A Service with a selector, as far as its endpoints are concerned.
struct Service<'a> {
    object: Object<'a>,
    selector: Selector<'a>,
    selector_labels: Labels<'a>,
    families: Vec<Family>,
    headless: bool,
    publish_not_ready: bool,
    distribution: Option<&'a str>,
    /// Endpoints are shared out among the zones.
    auto_hints: bool,
    ports: Vec<ServicePort<'a>>,
}

struct ServicePort<'a> {
    name: &'a str,
    protocol: &'a str,
    target: Target<'a>,
    app_protocol: Option<&'a str>,
}

enum Target<'a> {
    Number(u16),
    /// Of a container's port.
    Name(&'a str),
}

impl<'a> Service<'a> {
    /// Nothing for Services whose endpoints are somebody else's: ExternalName, no selector, and those whose addresses
    /// have not been settled (or were refused).
    fn parse(object: &Object<'a>) -> Result<Option<Self>, Malformed> {
        let value = object.value;
        let selector_labels = read::labels(value, "spec.selector")?.filter(|selector| !selector.is_empty());
        if selector_labels.is_none() || read::text(value, "spec.type") == Some("ExternalName") {
            return Ok(None);
        }
        let families: Vec<Family> =
            read::list(value, "spec.ipFamilies")?.iter().filter_map(|f| Family::parse(f.as_str()?)).collect();
        let Some(cluster_ip) = read::text(value, "spec.clusterIP").filter(|_| !families.is_empty()) else {
            return Ok(None);
        };
        let mut ports = Vec::new();
        for (i, port) in read::list(value, "spec.ports")?.iter().enumerate() {
            ports.push(ServicePort::parse(port).map_err(|error| error.within(&format!("spec.ports[{i}]")))?);
        }
        Ok(Some(Self {
            object: *object,
            selector: Selector::from_map(selector_labels),
            selector_labels,
            families,
            headless: cluster_ip == "None",
            publish_not_ready: read::boolean(value, "spec.publishNotReadyAddresses")?.unwrap_or(false),
            distribution: read::string(value, "spec.trafficDistribution")?,
            auto_hints: crate::hints::wants_auto(value),
            ports,
        }))
    }

    /// Indexes of the selected pods that are endpoints at all. The rarest of the selector's labels narrows the search.
    fn pods(&self, world: &World<'a>) -> Vec<usize> {
        let namespace = self.object.namespace;
        let candidates = self
            .selector_labels
            .into_iter()
            .flatten()
            .map(|(key, value)| world.pods_with(namespace, key, value.as_str().unwrap_or_default()))
            .min_by_key(|pods| pods.len())
            .unwrap_or_default();
        let is_endpoint = |&&i: &&usize| {
            let pod = &world.pods[i];
            !pod.finished() && self.selector.matches(pod.object.labels)
        };
        candidates.iter().filter(is_endpoint).copied().collect()
    }

    /// Where each of the Service's ports leads on a pod; nothing for a named port that the pod lacks.
    fn numbers_on(&self, pod: &Pod<'_>) -> Vec<Option<u16>> {
        let number = |port: &ServicePort<'_>| match port.target {
            Target::Number(number) => Some(number),
            Target::Name(name) => container_port(pod, name, port.protocol),
        };
        self.ports.iter().map(number).collect()
    }

    /// The ports that lead somewhere, with where.
    fn ports_at(&self, numbers: &[Option<u16>]) -> impl Iterator<Item = (&ServicePort<'a>, u16)> {
        self.ports.iter().zip(numbers).filter_map(|(port, number)| Some((port, (*number)?)))
    }

    /// Labels of what is made for the Service.
    fn labels(&self, managed_by: (&str, &str)) -> Value {
        let mut labels = json!({});
        for (key, value) in self.object.labels.into_iter().flatten() {
            if key != HEADLESS && key != SERVICE_NAME && key != MANAGED_BY {
                labels[key] = value.clone();
            }
        }
        if self.headless {
            labels[HEADLESS] = "".into();
        }
        labels[managed_by.0] = managed_by.1.into();
        labels
    }
}

impl<'a> ServicePort<'a> {
    fn parse(port: &'a Value) -> Result<Self, Malformed> {
        let number =
            read::port(port, "port")?.ok_or_else(|| Malformed::new("port", "required, but absent"))?;
        let target = match read::at(port, "targetPort") {
            None => Target::Number(number),
            Some(Value::String(name)) => match name.parse() {
                // A number in quotes is a name to the API, and names of ports have a letter.
                Ok(number) if number > 0 => Target::Number(number),
                _ => Target::Name(name),
            },
            Some(_) => Target::Number(read::port(port, "targetPort")?.unwrap_or(number)),
        };
        Ok(Self {
            name: read::string(port, "name")?.unwrap_or_default(),
            protocol: read::string(port, "protocol")?.unwrap_or("TCP"),
            target,
            app_protocol: read::string(port, "appProtocol")?,
        })
    }
}

/// The number of a container's port by name and protocol. Restartable init containers (sidecars) count.
fn container_port(pod: &Pod<'_>, name: &str, protocol: &str) -> Option<u16> {
    let containers = |list: &str| read::list(pod.object.value, list).unwrap_or_default().iter();
    let sidecars = containers("spec.initContainers")
        .filter(|container| read::text(container, "restartPolicy") == Some("Always"));
    containers("spec.containers")
        .chain(sidecars)
        .flat_map(|container| read::list(container, "ports").unwrap_or_default())
        .find(|port| {
            read::text(port, "name") == Some(name)
                && read::text(port, "protocol").unwrap_or("TCP") == protocol
        })
        .and_then(|port| read::port(port, "containerPort").ok()?)
}

/// The pod's address of a family.
fn address(pod: &Pod<'_>, family: Family) -> Option<IpAddr> {
    let of_family = |text: &str| text.parse().ok().filter(|address| Family::of(*address) == family);
    let listed = read::list(pod.object.value, "status.podIPs").unwrap_or_default();
    listed
        .iter()
        .filter_map(|item| read::text(item, "ip"))
        .chain(read::text(pod.object.value, "status.podIP"))
        .find_map(of_family)
}

/// The host name that the pod has under the Service, if it asks for one.
fn hostname<'a>(pod: &Pod<'a>, service: &Object<'_>) -> Option<&'a str> {
    let under = read::text(pod.object.value, "spec.subdomain") == Some(service.name);
    read::text(pod.object.value, "spec.hostname").filter(|name| under && !name.is_empty())
}

fn target_ref(pod: &Pod<'_>) -> Value {
    json!({
        "kind": "Pod",
        "namespace": pod.object.namespace,
        "name": pod.object.name,
        "uid": pod.object.uid,
    })
}

/// The same to the API: null, absent, and an empty list or object.
fn same(a: Option<&Value>, b: Option<&Value>) -> bool {
    let empty = |value: Option<&Value>| match value {
        None | Some(Value::Null) => true,
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(_) => false,
    };
    a == b || empty(a) && empty(b)
}

#[cfg(test)]
mod tests;
