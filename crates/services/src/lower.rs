//! One Service, or one host port, to frontends and backends, without regard to any other.

use std::{collections::BTreeSet, fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use podway_model::{
    Service,
    endpoint_slice::AddressType,
    service::{ServicePort, ServiceType, TrafficPolicy},
};

use crate::{
    findings::Finding,
    ranges::Ranges,
    select::{Selection, Slices, Uses, dedup, gather},
    table::{
        Backend, Family, FrontendAddr, FrontendKey, FrontendKind, NodeView, Origin, Protocol, Route,
        ServiceMeta, SetKind, Target,
    },
};

/// Why a Service has no frontends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotHandled {
    /// Its label leaves it to another proxy.
    OtherProxy(String),
    /// Its label says that proxies pass it over, though it may have a cluster IP.
    LabelledHeadless,
    /// It is a name only.
    ExternalName,
    /// It has no address of its own.
    Headless,
    /// It has not been given an address yet.
    NoClusterIp,
    /// There are slices that name it, but no such Service.
    Unknown,
}

impl fmt::Display for NotHandled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotHandled::OtherProxy(name) => {
                write!(f, "left to the proxy {name:?} by its label service.kubernetes.io/service-proxy-name")
            }
            NotHandled::LabelledHeadless => {
                f.write_str("left alone for its label service.kubernetes.io/headless")
            }
            NotHandled::ExternalName => f.write_str("type ExternalName: a name only"),
            NotHandled::Headless => f.write_str("headless: its clients connect to the endpoints themselves"),
            NotHandled::NoClusterIp => f.write_str("has no cluster IP yet"),
            NotHandled::Unknown => f.write_str("there is no such Service, only EndpointSlices that name it"),
        }
    }
}

/// Whether a Service is ours to handle.
pub(crate) fn handled(service: Option<&Service>) -> Result<&Service, NotHandled> {
    let service = service.ok_or(NotHandled::Unknown)?;
    if let Some(proxy) = &service.proxy_name {
        Err(NotHandled::OtherProxy(proxy.clone()))
    } else if service.labelled_headless {
        Err(NotHandled::LabelledHeadless)
    } else if service.service_type == Some(ServiceType::ExternalName) {
        Err(NotHandled::ExternalName)
    } else if service.headless {
        Err(NotHandled::Headless)
    } else if service.cluster_ips.is_empty() {
        Err(NotHandled::NoClusterIp)
    } else {
        Ok(service)
    }
}

/// Which number: a port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct UnitKey {
    pub(crate) port_name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) family: Family,
}

/// A frontend as one object alone would have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) key: FrontendKey,
    pub(crate) kind: FrontendKind,
    pub(crate) routes: [Route; 3],
    pub(crate) affinity_s: Option<u32>,
    pub(crate) source_ranges: Option<Arc<[IpNet]>>,
    /// The field that asks for it.
    pub(crate) field: String,
}

/// One numbered service.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    pub(crate) key: UnitKey,
    pub(crate) meta: ServiceMeta,
    pub(crate) cluster: Vec<Backend>,
    pub(crate) local: Vec<Backend>,
    pub(crate) wanted: Vec<Wanted>,
}

/// What one object comes to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lowered {
    pub(crate) units: Vec<Unit>,
    pub(crate) vips: BTreeSet<IpAddr>,
    pub(crate) findings: Vec<Finding>,
    /// Addresses of endpoints in no range of pods, with the slice and the index there.
    pub(crate) off_range: Vec<(IpAddr, Arc<str>, usize)>,
    /// Ready endpoints on this node, counted by address.
    pub(crate) local_ready: usize,
    /// Endpoints looked at: the measure of work.
    pub(crate) examined: u64,
}

/// What the whole node contributes.
pub(crate) struct Context<'a> {
    pub(crate) view: &'a NodeView,
    pub(crate) pods: &'a Ranges,
    pub(crate) pools: &'a Ranges,
}

impl Context<'_> {
    /// Whether senders in pods can be told from others, in a family.
    fn knows_pods(&self, family: Family) -> bool {
        self.pods.has(family)
    }
}

/// Compiles a Service.
pub(crate) fn service(
    context: &Context<'_>,
    service: &Service,
    names: (&Arc<str>, &Arc<str>),
    slices: &Slices,
) -> Lowered {
    let mut lowered = Lowered::default();
    let mut local_ready = [BTreeSet::new(), BTreeSet::new()];
    for family in Family::ALL {
        let Some(cluster_ip) = service.cluster_ip(family) else {
            missing_family(service, slices, family, &mut lowered.findings);
            continue;
        };
        lowered.vips.insert(cluster_ip);
        let addresses = Addresses::of(context, service, family, cluster_ip, &mut lowered.findings);
        lowered.vips.extend(addresses.pooled(context));
        for (i, port) in service.ports.iter().enumerate() {
            let port_name: Arc<str> = port.name.as_str().into();
            let mut candidates = gather(slices, &port_name, port.protocol, family, &context.view.name);
            lowered.examined += candidates.len() as u64;
            dedup(&mut candidates);
            let external = addresses.external() || node_port(service, port).is_some();
            let selection = Selection::new(&candidates, Uses::of(service, external), context.view);
            let (cluster, local) = selection.sets(&candidates);
            let ready = candidates.iter().filter(|c| c.local && c.endpoint.ready);
            local_ready[family as usize].extend(ready.map(|c| c.addr));
            let reach = Reach { cluster: !cluster.is_empty(), local: !local.is_empty(), any: selection.any };
            let routes = Routes { context, family, reach };
            let wanted = addresses.frontends(service, i, &routes);
            lowered.units.push(Unit {
                meta: ServiceMeta {
                    namespace: Arc::clone(names.0),
                    name: Arc::clone(names.1),
                    port_name: Arc::clone(&port_name),
                    protocol: port.protocol,
                    family,
                    external,
                },
                key: UnitKey { port_name, protocol: port.protocol, family },
                cluster,
                local,
                wanted,
            });
        }
        off_range(context, slices, family, &mut lowered);
    }
    // A pod of two families is one pod.
    lowered.local_ready = local_ready.iter().map(BTreeSet::len).max().unwrap_or(0);
    lowered
}

/// The node port, where the type lets it be used.
pub(crate) fn node_port(service: &Service, port: &ServicePort) -> Option<u16> {
    port.node_port.filter(|_| service.has_node_ports())
}

/// What a Service that lacks a family nevertheless has of it.
fn missing_family(service: &Service, slices: &Slices, family: Family, findings: &mut Vec<Finding>) {
    let cause = |what: &str| {
        format!(
            "{what}, but the Service has no {family} cluster IP, so it is not used; set spec.ipFamilies to have both"
        )
    };
    let mut on_service = |field: &str, addr: &IpAddr| {
        if Family::of(addr) == family {
            findings.push(Finding::service(service, field, cause(&format!("{addr} is {family}"))));
        }
    };
    service.external_ips.iter().for_each(|ip| on_service("spec.externalIPs", ip));
    service.ingress.iter().for_each(|ingress| on_service("status.loadBalancer.ingress", &ingress.ip));
    for (name, slice) in slices.iter().filter(|(_, s)| s.address_type == AddressType::Ip(family)) {
        if !slice.endpoints.is_empty() {
            let cause = cause(&format!(
                "{} endpoints of Service {} are {family}",
                slice.endpoints.len(),
                service.name
            ));
            findings.push(Finding::slice(&service.namespace, name, "addressType", cause));
        }
    }
}

fn off_range(context: &Context<'_>, slices: &Slices, family: Family, lowered: &mut Lowered) {
    if !context.pods.has(family) {
        return;
    }
    for (name, slice) in slices.iter().filter(|(_, s)| s.address_type == AddressType::Ip(family)) {
        for (i, endpoint) in slice.endpoints.iter().enumerate() {
            if !context.pods.contains(&endpoint.addr) {
                lowered.off_range.push((endpoint.addr, Arc::clone(name), i));
            }
        }
    }
}

/// The addresses of a Service in one family.
struct Addresses {
    cluster: IpAddr,
    external: Vec<IpAddr>,
    load_balancer: Vec<IpAddr>,
    /// Who may use the load balancer's addresses, as [`crate::table::Frontend::source_ranges`].
    source_ranges: Option<Arc<[IpNet]>>,
    /// Whether this node may.
    node_may: bool,
    family: Family,
}

impl Addresses {
    fn of(
        context: &Context<'_>,
        service: &Service,
        family: Family,
        cluster: IpAddr,
        findings: &mut Vec<Finding>,
    ) -> Self {
        let of_family = |ip: &IpAddr| Family::of(ip) == family;
        let load_balancer: Vec<IpAddr> = service
            .ingress
            .iter()
            .filter(|ingress| service.has_load_balancer() && !ingress.proxy && of_family(&ingress.ip))
            .map(|ingress| ingress.ip)
            .collect();
        let mut node_may = true;
        let source_ranges =
            service.source_ranges.as_ref().filter(|_| !load_balancer.is_empty()).map(|listed| {
                let mut ranges: Vec<IpNet> =
                    listed.iter().filter(|r| Family::of_net(r) == family).copied().collect();
                if ranges.is_empty() {
                    let cause = format!(
                        "no range is {family}, so nobody is let in at {}; add one such as {}",
                        load_balancer[0],
                        if family == Family::V4 { "0.0.0.0/0" } else { "::/0" },
                    );
                    findings.push(Finding::service(service, "spec.loadBalancerSourceRanges", cause));
                }
                node_may =
                    context.view.addresses.iter().any(|addr| ranges.iter().any(|range| range.contains(addr)));
                if node_may {
                    // The address may be one of the node's own, and is its source then.
                    ranges.extend(load_balancer.iter().map(|ip| IpNet::from(*ip)));
                }
                ranges.into()
            });
        let external = service.external_ips.iter().filter(|ip| of_family(ip)).copied().collect();
        Self { cluster, external, load_balancer, source_ranges, node_may, family }
    }

    /// Whether clients beyond the cluster have an address to use.
    fn external(&self) -> bool {
        !(self.external.is_empty() && self.load_balancer.is_empty())
    }

    fn pooled(&self, context: &Context<'_>) -> impl Iterator<Item = IpAddr> {
        self.load_balancer.iter().copied().filter(|ip| context.pools.contains(ip))
    }

    fn frontends(&self, service: &Service, index: usize, routes: &Routes<'_>) -> Vec<Wanted> {
        let port = &service.ports[index];
        let mut wanted = Vec::new();
        let mut add =
            |addr, number, kind, routes: [Route; 3], source_ranges: Option<&Arc<[IpNet]>>, field: String| {
                wanted.push(Wanted {
                    key: FrontendKey { addr, port: number, protocol: port.protocol },
                    kind,
                    routes,
                    affinity_s: service.affinity_s,
                    source_ranges: source_ranges.cloned(),
                    field,
                });
            };
        let internal = routes.internal(service.internal_policy);
        let at = |what: &str| format!("{what} (spec.ports[{index}])");
        add(
            FrontendAddr::Ip(self.cluster),
            port.port,
            FrontendKind::ClusterIp,
            internal,
            None,
            at("spec.clusterIPs"),
        );
        let external = routes.external(service.external_policy);
        let mut balanced = external;
        if !self.node_may {
            // Who is not let in learns nothing, not even that nobody serves.
            balanced[Origin::Node as usize] = Route { target: Target::Drop, masquerade: false };
        }
        for ip in &self.load_balancer {
            add(
                FrontendAddr::Ip(*ip),
                port.port,
                FrontendKind::LoadBalancer,
                balanced,
                self.source_ranges.as_ref(),
                at("status.loadBalancer.ingress"),
            );
        }
        for ip in &self.external {
            add(
                FrontendAddr::Ip(*ip),
                port.port,
                FrontendKind::ExternalIp,
                external,
                None,
                at("spec.externalIPs"),
            );
        }
        if let Some(number) = node_port(service, port) {
            let field = format!("spec.ports[{index}].nodePort");
            add(FrontendAddr::Node(self.family), number, FrontendKind::NodePort, external, None, field);
        }
        wanted
    }
}

/// What there is behind a service port.
#[derive(Clone, Copy)]
struct Reach {
    cluster: bool,
    local: bool,
    /// Whether anything serves anywhere.
    any: bool,
}

struct Routes<'a> {
    context: &'a Context<'a>,
    family: Family,
    reach: Reach,
}

impl Routes<'_> {
    fn target(&self, policy: TrafficPolicy) -> Target {
        let Reach { cluster, local, any } = self.reach;
        match policy {
            TrafficPolicy::Local if local => Target::Set(SetKind::Local),
            TrafficPolicy::Local if any => Target::Drop,
            TrafficPolicy::Cluster if cluster => Target::Set(SetKind::Cluster),
            _ => Target::Reject,
        }
    }

    /// At the cluster IP: who comes from beyond the pods is masqueraded, since endpoints elsewhere would answer
    /// directly. Where pods cannot be told from others, nobody is.
    fn internal(&self, policy: TrafficPolicy) -> [Route; 3] {
        let target = self.target(policy);
        let all = self.context.view.masquerade_all;
        let others = all || self.context.knows_pods(self.family);
        [all, others, others].map(|masquerade| Route { target, masquerade: masquerade && is_set(target) })
    }

    /// At addresses for clients beyond the cluster. Under `Cluster` everything is masqueraded, since the endpoint may
    /// be on another node; under `Local` only the node itself is, and clients within the cluster get what a load
    /// balancer would lead them to: any endpoint of the cluster.
    fn external(&self, policy: TrafficPolicy) -> [Route; 3] {
        let cluster = self.target(TrafficPolicy::Cluster);
        let target = self.target(policy);
        let route = |target, masquerade: bool| Route { target, masquerade: masquerade && is_set(target) };
        match policy {
            TrafficPolicy::Cluster => [route(cluster, true); 3],
            TrafficPolicy::Local => [route(cluster, false), route(cluster, true), route(target, false)],
        }
    }
}

fn is_set(target: Target) -> bool {
    matches!(target, Target::Set(_))
}

/// A port of a pod on this node that is also a port of the node (`containers[].ports[].hostPort`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// `metadata.creationTimestamp` of the Pod, as written.
    pub created: String,
    /// `hostIP`: the address of the node to answer at, all of them when absent (or unspecified).
    pub host_ip: Option<IpAddr>,
    /// `hostPort`.
    pub port: u16,
    /// `protocol`.
    pub protocol: Protocol,
    /// The pod's addresses.
    pub pod_ips: Vec<IpAddr>,
    /// `containerPort`.
    pub container_port: u16,
}

/// Compiles a host port. Replies come back by way of this node in any case, so that nobody is masqueraded but the
/// node itself (whose source may be loopback).
pub(crate) fn host_port(port: &HostPort, names: (&Arc<str>, &Arc<str>), index: usize) -> Lowered {
    let mut lowered = Lowered::default();
    let host_ip = port.host_ip.map(|ip| ip.to_canonical()).filter(|ip| !ip.is_unspecified());
    for pod_ip in &port.pod_ips {
        let family = Family::of(pod_ip);
        let addr = match host_ip {
            Some(ip) if Family::of(&ip) == family => FrontendAddr::Ip(ip),
            Some(_) => continue,
            None => FrontendAddr::Node(family),
        };
        // Slashes keep the name apart from those of ports of Services.
        let port_name: Arc<str> = format!("hostPort/{index}").into();
        if lowered.units.iter().any(|unit| unit.key.family == family) {
            continue;
        }
        let target = Target::Set(SetKind::Local);
        lowered.units.push(Unit {
            meta: ServiceMeta {
                namespace: Arc::clone(names.0),
                name: Arc::clone(names.1),
                port_name: Arc::clone(&port_name),
                protocol: port.protocol,
                family,
                external: true,
            },
            key: UnitKey { port_name, protocol: port.protocol, family },
            cluster: Vec::new(),
            local: vec![Backend {
                addr: *pod_ip,
                port: port.container_port,
                local: true,
                terminating: false,
            }],
            wanted: vec![Wanted {
                key: FrontendKey { addr, port: port.port, protocol: port.protocol },
                kind: FrontendKind::HostPort,
                routes: [false, true, false].map(|masquerade| Route { target, masquerade }),
                affinity_s: None,
                source_ranges: None,
                field: format!("hostPort {} of port {index}", port.port),
            }],
        });
    }
    lowered.examined = lowered.units.len() as u64;
    lowered
}
