//! Addresses and node ports of Services: what the API server's allocators do when a Service is created or changed.
//!
//! Automatic addresses and ports follow from the Service's name and the seed, so the same manifests get the same ones.
//! A request that cannot be met (taken, out of range, a family that the cluster has not) is reported on the Service,
//! which then stays without addresses: the API server would have refused the object.

mod range;

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::config::Config;
use crate::names;
use crate::planner::Planner;
use crate::read::{self, Malformed};
use crate::world::{Kind, Object};

use range::{AddressRange, PortRange};

pub(crate) const COMPONENT: &str = "service-controller";

/// `spec.ipFamilies` item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn of_cidr(cidr: &IpNet) -> Self {
        Self::of(cidr.network())
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// From the API's spelling.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text {
            "IPv4" => Some(Self::V4),
            "IPv6" => Some(Self::V6),
            _ => None,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }
}

/// Why a Service does not get what it asks for.
struct Refusal {
    reason: &'static str,
    message: String,
}

fn refusal<T>(reason: &'static str, message: String) -> Result<T, Refusal> {
    Err(Refusal { reason, message })
}

/// A port of a Service, as asked for.
struct Port {
    port: u16,
    protocol: String,
    node_port: Option<u16>,
}

/// A Service, as asked for.
struct Request {
    type_: Type,
    headless: bool,
    has_selector: bool,
    policy: Option<Policy>,
    families: Vec<Family>,
    addresses: Vec<IpAddr>,
    ports: Vec<Port>,
    wants_node_ports: bool,
    health_port: Option<u16>,
    wants_health_port: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Single,
    Prefer,
    Require,
}

impl Policy {
    fn as_str(self) -> &'static str {
        match self {
            Self::Single => "SingleStack",
            Self::Prefer => "PreferDualStack",
            Self::Require => "RequireDualStack",
        }
    }
}

impl Request {
    fn parse(service: &Object<'_>) -> Result<Self, Malformed> {
        let value = service.value;
        if read::map(value, "spec")?.is_none() {
            return Err(Malformed::new("spec", "required, but absent"));
        }
        let unknown = |path: &str, found: &str, known: &str| {
            Malformed::new(path, format!("{found:?} is not one of {known}"))
        };
        let type_ = match read::string(value, "spec.type")?.unwrap_or("ClusterIP") {
            "ClusterIP" => Type::ClusterIp,
            "NodePort" => Type::NodePort,
            "LoadBalancer" => Type::LoadBalancer,
            "ExternalName" => Type::ExternalName,
            other => {
                return Err(unknown("spec.type", other, "ClusterIP, NodePort, LoadBalancer, ExternalName"));
            }
        };
        let policy = match read::string(value, "spec.ipFamilyPolicy")? {
            None => None,
            Some("SingleStack") => Some(Policy::Single),
            Some("PreferDualStack") => Some(Policy::Prefer),
            Some("RequireDualStack") => Some(Policy::Require),
            Some(other) => {
                return Err(unknown(
                    "spec.ipFamilyPolicy",
                    other,
                    "SingleStack, PreferDualStack, RequireDualStack",
                ));
            }
        };
        let mut families = Vec::new();
        for (i, family) in read::list(value, "spec.ipFamilies")?.iter().enumerate() {
            let path = format!("spec.ipFamilies[{i}]");
            let text = family.as_str().unwrap_or_default();
            let family = Family::parse(text).ok_or_else(|| unknown(&path, text, "IPv4, IPv6"))?;
            if families.contains(&family) {
                return Err(Malformed::new(path, format!("{text} is there twice")));
            }
            families.push(family);
        }
        let (headless, addresses) = addresses(value)?;
        if headless && type_ != Type::ClusterIp && type_ != Type::ExternalName {
            return Err(Malformed::new(
                "spec.clusterIP",
                "may not be None for types NodePort and LoadBalancer",
            ));
        }
        let mut ports = Vec::new();
        for (i, port) in read::list(value, "spec.ports")?.iter().enumerate() {
            let inside = |error: Malformed| error.within(&format!("spec.ports[{i}]"));
            let number = read::port(port, "port").map_err(inside)?;
            let node_port = match read::number(port, "nodePort") {
                Some(0) => None,
                _ => read::port(port, "nodePort").map_err(inside)?,
            };
            ports.push(Port {
                port: number.ok_or_else(|| inside(Malformed::new("port", "required, but absent")))?,
                protocol: read::string(port, "protocol").map_err(inside)?.unwrap_or("TCP").to_owned(),
                node_port,
            });
        }
        let allocates = read::boolean(value, "spec.allocateLoadBalancerNodePorts")?.unwrap_or(true);
        let local = read::string(value, "spec.externalTrafficPolicy")? == Some("Local");
        let health_port = match read::number(value, "spec.healthCheckNodePort") {
            Some(0) => None,
            _ => read::port(value, "spec.healthCheckNodePort")?,
        };
        Ok(Self {
            type_,
            headless,
            has_selector: read::labels(value, "spec.selector")?.is_some_and(|selector| !selector.is_empty()),
            policy,
            families,
            addresses,
            ports,
            wants_node_ports: type_ == Type::NodePort || type_ == Type::LoadBalancer && allocates,
            health_port,
            wants_health_port: type_ == Type::LoadBalancer && local,
        })
    }
}

/// `spec.clusterIP` and `spec.clusterIPs`: headless or not, and the addresses asked for.
fn addresses(service: &Value) -> Result<(bool, Vec<IpAddr>), Malformed> {
    let single = read::string(service, "spec.clusterIP")?.filter(|text| !text.is_empty());
    let mut texts = Vec::new();
    for (i, text) in read::list(service, "spec.clusterIPs")?.iter().enumerate() {
        let path = format!("spec.clusterIPs[{i}]");
        texts.push((text.as_str().ok_or_else(|| Malformed::new(&path, "expected a string"))?, path));
    }
    match (single, texts.first()) {
        (Some(single), Some((first, _))) if single != *first => {
            return Err(Malformed::new(
                "spec.clusterIPs[0]",
                format!("{first:?} differs from spec.clusterIP {single:?}"),
            ));
        }
        (Some(single), None) => texts.push((single, "spec.clusterIP".into())),
        _ => {}
    }
    if texts.first().is_some_and(|(text, _)| *text == "None") {
        return Ok((true, Vec::new()));
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (text, path) in texts {
        let address: IpAddr = text
            .parse()
            .map_err(|_| Malformed::new(&path, format!("{text:?} is not an IP address, and not None")))?;
        if addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return Err(Malformed::new(path, "a second address of the same family"));
        }
        addresses.push(address);
    }
    Ok((false, addresses))
}

/// Give every Service what its type and its family policy ask for.
pub(crate) fn reconcile(planner: &mut Planner<'_, '_>) {
    let world = planner.world;
    let services = world.all(Kind::Service);
    // Who came first keeps what two claim.
    let mut order: Vec<usize> = (0..services.len()).filter(|&i| !services[i].deleting).collect();
    order.sort_by_key(|&i| (services[i].created, services[i].namespace, services[i].name));

    let mut pools = Pools::new(planner.config);
    let mut requests = Vec::new();
    for i in order {
        let service = &services[i];
        match Request::parse(service) {
            Ok(request) => match pools.register(services, i, &request) {
                Ok(()) => requests.push((i, request)),
                Err(Refusal { reason, message }) => planner.warning(service, COMPONENT, reason, message),
            },
            Err(error) => planner.malformed(service, &error),
        }
    }
    for (i, request) in requests {
        match pools.fulfil(planner.config, &services[i], i, &request) {
            Ok(spec) => {
                if services[i].value.get("spec") != Some(&spec) {
                    let mut value = services[i].value.clone();
                    value["spec"] = spec;
                    planner.update(value);
                }
            }
            Err(Refusal { reason, message }) => planner.warning(&services[i], COMPONENT, reason, message),
        }
    }
}

/// What there is to hand out.
struct Pools {
    /// The cluster's primary family first.
    ranges: Vec<AddressRange>,
    ports: PortRange,
}

impl Pools {
    fn new(config: &Config) -> Self {
        let reserved = || config.reserved_service_addresses.iter().map(|reserved| reserved.offset);
        Self {
            ranges: config.service_cidrs.iter().map(|cidr| AddressRange::new(*cidr, reserved())).collect(),
            ports: PortRange::new(config.node_ports.clone()),
        }
    }

    fn range(&mut self, family: Family) -> Option<&mut AddressRange> {
        self.ranges.iter_mut().find(|range| Family::of_cidr(&range.cidr) == family)
    }

    fn has(&self, family: Family) -> bool {
        self.ranges.iter().any(|range| Family::of_cidr(&range.cidr) == family)
    }

    /// Note what a Service has or asks for explicitly.
    fn register(&mut self, services: &[Object<'_>], i: usize, request: &Request) -> Result<(), Refusal> {
        if request.type_ == Type::ExternalName {
            return Ok(());
        }
        let named = |owner: usize| format!("Service {}/{}", services[owner].namespace, services[owner].name);
        for &address in &request.addresses {
            let Some(range) = self.ranges.iter_mut().find(|range| range.cidr.contains(&address)) else {
                let cidrs: Vec<String> = self.ranges.iter().map(|range| range.cidr.to_string()).collect();
                let message = format!(
                    "spec.clusterIPs: {address} is not in the cluster's service range ({}); choose another or leave it out",
                    cidrs.join(", ")
                );
                return refusal("ClusterIPOutOfRange", message);
            };
            if let Err(owner) = range.occupy(address, i) {
                let message = format!(
                    "spec.clusterIPs: {address} is already allocated to {}; choose another or leave it out",
                    named(owner)
                );
                return refusal("ClusterIPAlreadyAllocated", message);
            }
        }
        let explicit =
            request.ports.iter().filter(|_| request.exposes_node_ports()).filter_map(|p| p.node_port);
        for port in explicit.chain(request.health_port.filter(|_| request.wants_health_port)) {
            if !self.ports.ports.contains(&port) {
                let (first, last) = (self.ports.ports.start(), self.ports.ports.end());
                let message = format!(
                    "spec.ports: nodePort {port} is not in the valid range; the range of valid ports is {first}-{last}"
                );
                return refusal("NodePortOutOfRange", message);
            }
            if let Err(owner) = self.ports.occupy(port, i) {
                let message = format!(
                    "spec.ports: nodePort {port} is already allocated to {}; choose another or leave it out",
                    named(owner)
                );
                return refusal("PortAlreadyAllocated", message);
            }
        }
        Ok(())
    }

    /// The Service's spec with everything filled in.
    fn fulfil(
        &mut self,
        config: &Config,
        service: &Object<'_>,
        i: usize,
        request: &Request,
    ) -> Result<Value, Refusal> {
        let mut spec = service.value["spec"].clone();
        let hash = |what: &str| names::hash(config.seed, &[service.namespace, service.name, what]);
        if request.type_ == Type::ExternalName {
            release(&mut spec);
            return Ok(spec);
        }
        let (policy, families) = self.families(request)?;
        spec["ipFamilyPolicy"] = policy.as_str().into();
        spec["ipFamilies"] = families.iter().map(|family| family.as_str()).collect();
        if request.headless {
            spec["clusterIP"] = "None".into();
            spec["clusterIPs"] = json!(["None"]);
        } else {
            let mut addresses = Vec::new();
            for family in families {
                let held = request.addresses.iter().find(|address| Family::of(**address) == family);
                let address = match held {
                    Some(address) => *address,
                    None => self.address(config, service, i, family, hash("clusterIP"))?,
                };
                addresses.push(address.to_string());
            }
            spec["clusterIP"] = addresses.first().map_or(Value::Null, |first| first.as_str().into());
            spec["clusterIPs"] = addresses.into();
        }
        self.node_ports(&mut spec, i, request, hash)?;
        Ok(spec)
    }

    fn address(
        &mut self,
        config: &Config,
        service: &Object<'_>,
        i: usize,
        family: Family,
        hash: u64,
    ) -> Result<IpAddr, Refusal> {
        let reserved = config
            .reserved_service_addresses
            .iter()
            .find(|reserved| reserved.namespace == service.namespace && reserved.name == service.name);
        let Some(range) = self.range(family) else {
            return refusal(
                "FamilyNotConfigured",
                format!("the cluster has no {} service range", family.as_str()),
            );
        };
        let address = reserved.and_then(|reserved| range.take_reserved(i, reserved.offset));
        if let Some(address) = address.or_else(|| range.allocate(i, hash)) {
            return Ok(address);
        }
        let message = format!(
            "range {} is full: {} addresses are in use; delete Services or configure a larger range",
            range.cidr,
            range.used()
        );
        refusal("ClusterIPsExhausted", message)
    }

    /// The policy and the families that result from what was asked for and what the cluster has.
    fn families(&self, request: &Request) -> Result<(Policy, Vec<Family>), Refusal> {
        let Some(primary) = self.ranges.first().map(|range| Family::of_cidr(&range.cidr)) else {
            return refusal("FamilyNotConfigured", "the cluster has no service range; configure one".into());
        };
        // Nobody routes to a headless Service without selector: it may name families that the cluster has not.
        let free = request.headless && !request.has_selector;
        let mut families = request.families.clone();
        for (i, &address) in request.addresses.iter().enumerate() {
            match families.get(i) {
                None => families.push(Family::of(address)),
                Some(family) if *family == Family::of(address) => {}
                Some(family) => {
                    let message = format!(
                        "spec.clusterIPs[{i}]: {address} is not {}, as spec.ipFamilies[{i}] says",
                        family.as_str()
                    );
                    return refusal("FamilyMismatch", message);
                }
            }
        }
        let policy = match request.policy {
            Some(policy) => policy,
            None if families.len() == 2 || families.is_empty() && free => Policy::Require,
            None => Policy::Single,
        };
        if families.is_empty() {
            families.push(primary);
        }
        if let Some(i) = families.iter().position(|family| !self.has(*family)).filter(|_| !free) {
            let message = format!(
                "spec.ipFamilies[{i}]: {} is not configured on this cluster; add a service range of that family, or remove it from the Service",
                families[i].as_str()
            );
            return refusal("FamilyNotConfigured", message);
        }
        let dual = self.has(Family::V4) && self.has(Family::V6);
        match policy {
            Policy::Single => families.truncate(1),
            Policy::Require if !dual && !free => {
                let message = "spec.ipFamilyPolicy: this cluster is not configured for dual-stack services; add a service range of the other family, or use PreferDualStack";
                return refusal("FamilyNotConfigured", message.into());
            }
            Policy::Prefer | Policy::Require => {
                if families.len() == 1 && (dual || free && policy == Policy::Require) {
                    families.push(families[0].other());
                }
            }
        }
        Ok((policy, families))
    }

    fn node_ports(
        &mut self,
        spec: &mut Value,
        i: usize,
        request: &Request,
        hash: impl Fn(&str) -> u64,
    ) -> Result<(), Refusal> {
        // The same port for two protocols (DNS, HTTP/3) shares a node port.
        let mut by_port: HashMap<u16, Vec<(u16, &str)>> = HashMap::new();
        for port in &request.ports {
            if let Some(node_port) = port.node_port {
                by_port.entry(port.port).or_default().push((node_port, &port.protocol));
            }
        }
        for (n, port) in request.ports.iter().enumerate() {
            let target = &mut spec["ports"][n];
            if !request.exposes_node_ports() {
                // Left over from another type.
                if let Some(target) = target.as_object_mut() {
                    target.remove("nodePort");
                }
                continue;
            }
            if port.node_port.is_some() || !request.wants_node_ports {
                continue;
            }
            let given = by_port.entry(port.port).or_default();
            let shared = given
                .iter()
                .map(|(node_port, _)| *node_port)
                .find(|node_port| !given.contains(&(*node_port, port.protocol.as_str())));
            let what = format!("nodePort/{}/{}", port.port, port.protocol);
            let node_port = match shared.or_else(|| self.ports.allocate(i, hash(&what))) {
                Some(node_port) => node_port,
                None => return refusal("NodePortsExhausted", self.exhausted()),
            };
            given.push((node_port, &port.protocol));
            target["nodePort"] = node_port.into();
        }
        if request.wants_health_port && request.health_port.is_none() {
            match self.ports.allocate(i, hash("healthCheckNodePort")) {
                Some(port) => spec["healthCheckNodePort"] = port.into(),
                None => return refusal("NodePortsExhausted", self.exhausted()),
            }
        }
        if !request.wants_health_port
            && let Some(spec) = spec.as_object_mut()
        {
            spec.remove("healthCheckNodePort");
        }
        Ok(())
    }

    fn exhausted(&self) -> String {
        let (first, last, used) = (self.ports.ports.start(), self.ports.ports.end(), self.ports.used());
        format!(
            "node ports {first}-{last} are used up: {used} are in use; delete Services or configure a larger range"
        )
    }
}

impl Request {
    fn exposes_node_ports(&self) -> bool {
        matches!(self.type_, Type::NodePort | Type::LoadBalancer)
    }
}

/// A Service that became an ExternalName gives back what it had.
fn release(spec: &mut Value) {
    if let Some(spec) = spec.as_object_mut() {
        for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "healthCheckNodePort"] {
            spec.remove(key);
        }
    }
    if let Some(ports) = spec.get_mut("ports").and_then(Value::as_array_mut) {
        ports.iter_mut().filter_map(Value::as_object_mut).for_each(|port| {
            port.remove("nodePort");
        });
    }
}

#[cfg(test)]
mod tests;
