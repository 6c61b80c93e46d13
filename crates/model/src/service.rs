//! A Service: where it answers, and how it chooses among its endpoints.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::{
    Rejection,
    net::{Family, Protocol, address, range},
    read::{Object, type_name},
};

/// Label that leaves a Service to another proxy (KEP-2447).
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// Label of Services, and of the slices of headless ones, that proxies pass over whatever its value.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// Seconds that a client keeps its endpoint when `sessionAffinityConfig` does not say (API documentation).
pub const DEFAULT_AFFINITY_S: u32 = 10_800;

/// `spec.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceType {
    /// Reachable inside of the cluster.
    ClusterIp,
    /// And at a port of every node.
    NodePort,
    /// And at addresses of a load balancer.
    LoadBalancer,
    /// A name only.
    ExternalName,
}

/// `spec.internalTrafficPolicy`, `spec.externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// Every endpoint of the cluster.
    #[default]
    Cluster,
    /// Those on the node only.
    Local,
}

/// One of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; empty when it has none.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port at the service's addresses.
    pub port: u16,
    /// Port at the nodes' addresses.
    pub node_port: Option<u16>,
}

/// One of `status.loadBalancer.ingress` that has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ingress {
    /// The address.
    pub ip: IpAddr,
    /// `ipMode: Proxy`: packets are delivered to the node or the pod, never with this destination, so that clients in
    /// the cluster have to go by way of the load balancer (KEP-1860).
    pub proxy: bool,
}

/// What the service proxy needs of a Service object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`; empty when the object has none.
    pub uid: String,
    /// `metadata.creationTimestamp` as written (RFC 3339, so it sorts as text).
    pub created: String,
    /// `spec.type`; `None` when the object was never defaulted.
    pub service_type: Option<ServiceType>,
    /// `spec.clusterIPs` (or `spec.clusterIP`), at most one of each family; empty for a headless Service.
    pub cluster_ips: Vec<IpAddr>,
    /// Whether `spec.clusterIP` is `None`.
    pub headless: bool,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[]` with an address.
    pub ingress: Vec<Ingress>,
    /// `spec.loadBalancerIP`: the address asked for.
    pub load_balancer_ip: Option<IpAddr>,
    /// `spec.loadBalancerClass`: whose load balancer it is; `None` is the cluster's own.
    pub load_balancer_class: Option<String>,
    /// `spec.loadBalancerSourceRanges`; `Some` and empty when there are some and none is valid.
    pub source_ranges: Option<Vec<IpNet>>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.sessionAffinity: ClientIP` with its timeout in seconds (1 to 86,400).
    pub affinity_s: Option<u32>,
    /// `spec.healthCheckNodePort`.
    pub health_check_node_port: Option<u16>,
    /// The proxy that [`PROXY_NAME_LABEL`] leaves it to.
    pub proxy_name: Option<String>,
    /// `spec.externalName`, for the type that is a name only.
    pub external_name: Option<String>,
    /// `spec.publishNotReadyAddresses`: names are about endpoints that are not ready, too.
    pub publish_not_ready: bool,
    /// Whether it has the [`HEADLESS_LABEL`].
    pub labelled_headless: bool,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// Entries of lists that are malformed and left out.
    pub refused: Vec<Rejection>,
}

impl Service {
    /// Reads a Service object. Fields that the API server would have filled in may be absent.
    ///
    /// An entry of a list (an external IP, a port) that is malformed is left out and recorded in
    /// [`Service::refused`].
    ///
    /// # Errors
    /// The first other field that is malformed.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let object = Object::new("Service", value);
        let mut refused = Vec::new();
        let name = object.name()?;
        let (cluster_ips, headless) = cluster_ips(&object)?;
        let service = Self {
            namespace: object.namespace()?,
            name,
            uid: object.string("/metadata/uid")?.unwrap_or_default().to_owned(),
            created: object.string("/metadata/creationTimestamp")?.unwrap_or_default().to_owned(),
            service_type: service_type(&object)?,
            cluster_ips,
            headless,
            external_ips: external_ips(&object, &mut refused)?,
            ingress: ingress(&object, &mut refused)?,
            load_balancer_ip: load_balancer_ip(&object, &mut refused)?,
            load_balancer_class: some_text(object.string("/spec/loadBalancerClass")?),
            source_ranges: source_ranges(&object, &mut refused)?,
            internal_policy: policy(&object, "/spec/internalTrafficPolicy")?,
            external_policy: policy(&object, "/spec/externalTrafficPolicy")?,
            affinity_s: affinity(&object)?,
            health_check_node_port: object.port("/spec/healthCheckNodePort")?,
            // Whatever its value: an empty one is no name of ours either.
            proxy_name: object.label(PROXY_NAME_LABEL)?.map(str::to_owned),
            external_name: some_text(object.string("/spec/externalName")?),
            publish_not_ready: object
                .boolean("spec.publishNotReadyAddresses", value.pointer("/spec/publishNotReadyAddresses"))?
                .unwrap_or(false),
            labelled_headless: object.label(HEADLESS_LABEL)?.is_some(),
            ports: ports(&object, &mut refused)?,
            refused: Vec::new(),
        };
        Ok(Self { refused, ..service })
    }

    /// The cluster IP of a family.
    pub fn cluster_ip(&self, family: Family) -> Option<IpAddr> {
        self.cluster_ips.iter().copied().find(|ip| Family::of(ip) == family)
    }

    /// Whether the type lets node ports be used: it does, or the object was never defaulted.
    pub fn has_node_ports(&self) -> bool {
        matches!(self.service_type, None | Some(ServiceType::NodePort | ServiceType::LoadBalancer))
    }

    /// Whether the type lets load balancer addresses be used: it does, or the object was never defaulted.
    pub fn has_load_balancer(&self) -> bool {
        matches!(self.service_type, None | Some(ServiceType::LoadBalancer))
    }
}

fn some_text(text: Option<&str>) -> Option<String> {
    text.filter(|t| !t.is_empty()).map(str::to_owned)
}

fn service_type(object: &Object<'_>) -> Result<Option<ServiceType>, Rejection> {
    Ok(Some(match object.string("/spec/type")? {
        None | Some("") => return Ok(None),
        Some("ClusterIP") => ServiceType::ClusterIp,
        Some("NodePort") => ServiceType::NodePort,
        Some("LoadBalancer") => ServiceType::LoadBalancer,
        Some("ExternalName") => ServiceType::ExternalName,
        Some(other) => {
            let cause = format!("{other:?} is none of ClusterIP, NodePort, LoadBalancer, ExternalName");
            return Err(object.reject("spec.type", &cause));
        }
    }))
}

fn cluster_ips(object: &Object<'_>) -> Result<(Vec<IpAddr>, bool), Rejection> {
    let mut texts = Vec::new();
    for (i, entry) in object.array("/spec/clusterIPs")?.iter().enumerate() {
        let field = format!("spec.clusterIPs[{i}]");
        texts.push((object.text(&field, entry)?, field));
    }
    if texts.is_empty() {
        texts.extend(object.string("/spec/clusterIP")?.map(|text| (text, "spec.clusterIP".to_owned())));
    }
    let mut ips: Vec<IpAddr> = Vec::new();
    for (text, field) in texts {
        match text {
            "None" => return Ok((Vec::new(), true)),
            // Not allocated yet.
            "" => continue,
            _ => {}
        }
        let ip = usable(object, &field, text)?;
        if let Some(other) = ips.iter().find(|o| Family::of(o) == Family::of(&ip)) {
            let cause =
                format!("{ip} is the second cluster IP of its family after {other}; one of each is possible");
            return Err(object.reject(&field, &cause));
        }
        ips.push(ip);
    }
    Ok((ips, false))
}

/// An address that a service can have.
fn usable(object: &Object<'_>, field: &str, text: &str) -> Result<IpAddr, Rejection> {
    let ip = address(text).ok_or_else(|| object.reject(field, &format!("{text:?} is not an IP address")))?;
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
        return Err(object.reject(field, &format!("{ip} cannot be the address of a service")));
    }
    Ok(ip)
}

fn external_ips(object: &Object<'_>, refused: &mut Vec<Rejection>) -> Result<Vec<IpAddr>, Rejection> {
    let mut ips = Vec::new();
    for (i, entry) in object.array("/spec/externalIPs")?.iter().enumerate() {
        let field = format!("spec.externalIPs[{i}]");
        match object.text(&field, entry).and_then(|text| usable(object, &field, text)) {
            Ok(ip) if ips.contains(&ip) => {}
            Ok(ip) => ips.push(ip),
            Err(rejection) => refused.push(rejection),
        }
    }
    Ok(ips)
}

fn ingress(object: &Object<'_>, refused: &mut Vec<Rejection>) -> Result<Vec<Ingress>, Rejection> {
    let mut all: Vec<Ingress> = Vec::new();
    for (i, entry) in object.array("/status/loadBalancer/ingress")?.iter().enumerate() {
        let at = format!("status.loadBalancer.ingress[{i}]");
        match one_ingress(object, &at, entry) {
            // By name only, or named twice.
            Ok(None) => {}
            Ok(Some(new)) if all.iter().any(|old| old.ip == new.ip) => {}
            Ok(Some(new)) => all.push(new),
            Err(rejection) => refused.push(rejection),
        }
    }
    Ok(all)
}

fn one_ingress(object: &Object<'_>, at: &str, entry: &Value) -> Result<Option<Ingress>, Rejection> {
    let Some(entry) = entry.as_object() else {
        return Err(object.reject(at, &format!("is {}, not an object", type_name(entry))));
    };
    let proxy = match entry.get("ipMode") {
        None | Some(Value::Null) => false,
        Some(Value::String(mode)) if mode == "VIP" => false,
        Some(Value::String(mode)) if mode == "Proxy" => true,
        Some(other) => {
            return Err(object.reject(&format!("{at}.ipMode"), &format!("{other} is neither VIP nor Proxy")));
        }
    };
    let field = format!("{at}.ip");
    match entry.get("ip") {
        None | Some(Value::Null) => Ok(None),
        Some(ip) => match object.text(&field, ip)? {
            "" => Ok(None),
            text => Ok(Some(Ingress { ip: usable(object, &field, text)?, proxy })),
        },
    }
}

fn load_balancer_ip(object: &Object<'_>, refused: &mut Vec<Rejection>) -> Result<Option<IpAddr>, Rejection> {
    let Some(text) = object.string("/spec/loadBalancerIP")?.filter(|t| !t.is_empty()) else {
        return Ok(None);
    };
    match usable(object, "spec.loadBalancerIP", text) {
        Ok(ip) => Ok(Some(ip)),
        Err(rejection) => {
            refused.push(rejection);
            Ok(None)
        }
    }
}

fn source_ranges(object: &Object<'_>, refused: &mut Vec<Rejection>) -> Result<Option<Vec<IpNet>>, Rejection> {
    let listed = object.array("/spec/loadBalancerSourceRanges")?;
    if listed.is_empty() {
        return Ok(None);
    }
    let mut ranges = Vec::new();
    for (i, entry) in listed.iter().enumerate() {
        let field = format!("spec.loadBalancerSourceRanges[{i}]");
        let parsed = object.text(&field, entry).and_then(|text| {
            range(text).ok_or_else(|| {
                object.reject(
                    &field,
                    &format!("{text:?} is not a CIDR such as 203.0.113.0/24; nobody is let in by it"),
                )
            })
        });
        match parsed {
            Ok(range) if ranges.contains(&range) => {}
            Ok(range) => ranges.push(range),
            Err(rejection) => refused.push(rejection),
        }
    }
    Ok(Some(ranges))
}

fn policy(object: &Object<'_>, pointer: &str) -> Result<TrafficPolicy, Rejection> {
    match object.string(pointer)? {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => {
            let field = pointer.trim_start_matches('/').replace('/', ".");
            Err(object.reject(&field, &format!("{other:?} is neither Cluster nor Local")))
        }
    }
}

fn affinity(object: &Object<'_>) -> Result<Option<u32>, Rejection> {
    match object.string("/spec/sessionAffinity")? {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => {
            return Err(
                object.reject("spec.sessionAffinity", &format!("{other:?} is neither None nor ClientIP"))
            );
        }
    }
    let seconds = match object.number("/spec/sessionAffinityConfig/clientIP/timeoutSeconds")? {
        None => return Ok(Some(DEFAULT_AFFINITY_S)),
        Some(seconds) => seconds,
    };
    match u32::try_from(seconds).ok().filter(|s| (1..=86_400).contains(s)) {
        Some(seconds) => Ok(Some(seconds)),
        None => Err(object.reject(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            &format!("{seconds} is not between 1 and 86400 (one day)"),
        )),
    }
}

fn ports(object: &Object<'_>, refused: &mut Vec<Rejection>) -> Result<Vec<ServicePort>, Rejection> {
    let mut ports: Vec<ServicePort> = Vec::new();
    for (i, entry) in object.array("/spec/ports")?.iter().enumerate() {
        let at = format!("spec.ports[{i}]");
        let port = match one_port(object, &at, entry) {
            Ok(port) => port,
            Err(rejection) => {
                refused.push(rejection);
                continue;
            }
        };
        // A name means a port, and so does (protocol, port): the API server lets neither come twice.
        let twin = ports
            .iter()
            .position(|p| p.protocol == port.protocol && (p.name == port.name || p.port == port.port));
        match twin {
            Some(other) => {
                let cause = format!("has the name or the port of spec.ports[{other}], which is used");
                refused.push(object.reject(&at, &cause));
            }
            None => ports.push(port),
        }
    }
    Ok(ports)
}

fn one_port(object: &Object<'_>, at: &str, entry: &Value) -> Result<ServicePort, Rejection> {
    if !entry.is_object() {
        return Err(object.reject(at, &format!("is {}, not an object", type_name(entry))));
    }
    let name = match entry.get("name") {
        None | Some(Value::Null) => "",
        Some(name) => object.text(&format!("{at}.name"), name)?,
    };
    let protocol = object.protocol(at, entry)?;
    let number = |key: &str| object.port_value(&format!("{at}.{key}"), entry.get(key));
    let port = number("port")?
        .ok_or_else(|| object.reject(&format!("{at}.port"), "is missing; a port needs a number"))?;
    Ok(ServicePort { name: name.to_owned(), protocol, port, node_port: number("nodePort")? })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(spec: &Value, status: &Value) -> Result<Service, Rejection> {
        Service::parse(&json!({
            "metadata": {"namespace": "default", "name": "web", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": spec, "status": status,
        }))
    }

    #[test]
    fn a_load_balancer_is_read() {
        let parsed = service(
            &json!({
                "type": "LoadBalancer", "clusterIP": "172.30.0.1", "clusterIPs": ["172.30.0.1", "fd00::1"],
                "externalIPs": ["192.0.2.1", "192.0.2.1"], "loadBalancerClass": "example.org/lb",
                "loadBalancerSourceRanges": [" 203.0.113.7/24"], "externalTrafficPolicy": "Local",
                "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
                "healthCheckNodePort": 30_009, "loadBalancerIP": "192.0.2.9",
                "ports": [{"name": "http", "port": 80, "nodePort": 30_080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
            }),
            &json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.2", "ipMode": "Proxy"}, {"hostname": "lb"}, {"ip": "2001:db8::1"}]}}),
        )
        .unwrap();
        assert_eq!(parsed.cluster_ip(Family::V6), Some("fd00::1".parse().unwrap()));
        assert_eq!(parsed.external_ips.len(), 1);
        assert_eq!(parsed.source_ranges, Some(vec!["203.0.113.0/24".parse().unwrap()]));
        assert_eq!(
            (parsed.internal_policy, parsed.external_policy),
            (TrafficPolicy::Cluster, TrafficPolicy::Local)
        );
        assert_eq!((parsed.affinity_s, parsed.health_check_node_port), (Some(60), Some(30_009)));
        assert_eq!(parsed.ingress.iter().map(|i| i.proxy).collect::<Vec<_>>(), [true, false]);
        assert_eq!(parsed.ports[0].node_port, Some(30_080));
        assert_eq!(parsed.ports[1].protocol, Protocol::Udp);
        assert!(parsed.refused.is_empty());
        assert!(parsed.has_load_balancer() && parsed.has_node_ports());
    }

    #[test]
    fn fields_that_nobody_filled_in_may_be_absent() {
        let parsed =
            service(&json!({"clusterIP": "172.30.0.1", "ports": [{"port": 80}]}), &Value::Null).unwrap();
        assert_eq!(
            (parsed.service_type, parsed.affinity_s, parsed.source_ranges.clone()),
            (None, None, None)
        );
        assert!(parsed.has_node_ports() && parsed.has_load_balancer() && !parsed.headless);
        let affinity = service(&json!({"sessionAffinity": "ClientIP"}), &Value::Null).unwrap();
        assert_eq!((affinity.affinity_s, affinity.cluster_ips.len()), (Some(10_800), 0));
        assert!(service(&json!({"clusterIP": "None"}), &Value::Null).unwrap().headless);
    }

    #[test]
    fn what_is_malformed_is_named() {
        let cases: &[(Value, &str, &str)] = &[
            (json!({"type": "Internal"}), "spec.type", "none of ClusterIP"),
            (json!({"type": 1}), "spec.type", "a number, not a string"),
            (json!({"clusterIPs": ["10.0.0.300"]}), "spec.clusterIPs[0]", "not an IP address"),
            (json!({"clusterIPs": ["10.0.0.1", "10.0.0.2"]}), "spec.clusterIPs[1]", "second cluster IP"),
            (json!({"clusterIPs": "10.0.0.1"}), "spec.clusterIPs", "not a list"),
            (json!({"clusterIP": "127.0.0.1"}), "spec.clusterIP", "cannot be the address"),
            (json!({"externalIPs": {}}), "spec.externalIPs", "not a list"),
            (
                json!({"internalTrafficPolicy": "Near"}),
                "spec.internalTrafficPolicy",
                "neither Cluster nor Local",
            ),
            (json!({"sessionAffinity": "Cookie"}), "spec.sessionAffinity", "neither None nor ClientIP"),
            (
                json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}),
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                "between 1 and 86400",
            ),
            (json!({"healthCheckNodePort": 70_000}), "spec.healthCheckNodePort", "not a port"),
            (json!({"ports": 80}), "spec.ports", "not a list"),
        ];
        for (spec, field, cause) in cases {
            let rejection = service(spec, &Value::Null).unwrap_err();
            assert_eq!(&rejection.field, field, "{spec}");
            assert!(rejection.cause.contains(cause), "{} lacks {cause}", rejection.cause);
            assert!(rejection.to_string().starts_with("Service default/web: "), "{rejection}");
        }
        let nowhere = Service::parse(&json!({"metadata": {"name": "web"}})).unwrap_err();
        assert_eq!(nowhere.field, "metadata.namespace");
    }

    #[test]
    fn entries_that_are_malformed_cost_themselves() {
        let parsed = service(
            &json!({
                "externalIPs": ["192.0.2.1", "x", 7, "224.0.0.1"],
                "loadBalancerSourceRanges": ["any"],
                "ports": [{"port": 80}, {"port": 0}, {"port": 80, "name": "again"}, "http", {"port": 1, "protocol": "ICMP"}],
            }),
            &json!({"loadBalancer": {"ingress": [{"ip": "no"}, {"ip": "192.0.2.5"}, {"ip": "192.0.2.6", "ipMode": "Direct"}, 1]}}),
        )
        .unwrap();
        assert_eq!((parsed.external_ips.len(), parsed.ports.len(), parsed.ingress.len()), (1, 1, 1));
        assert_eq!(parsed.source_ranges, Some(Vec::new()), "whoever wanted a restriction has one");
        let fields: Vec<&str> = parsed.refused.iter().map(|r| r.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "spec.externalIPs[1]",
                "spec.externalIPs[2]",
                "spec.externalIPs[3]",
                "status.loadBalancer.ingress[0].ip",
                "status.loadBalancer.ingress[2].ipMode",
                "status.loadBalancer.ingress[3]",
                "spec.loadBalancerSourceRanges[0]",
                "spec.ports[1].port",
                "spec.ports[2]",
                "spec.ports[3]",
                "spec.ports[4].protocol",
            ]
        );
    }
}
