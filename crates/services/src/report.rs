//! Questions that others have about Services: why an endpoint is used or not, what load balancers should be told.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use podway_model::{Service, endpoint_slice::AddressType, service::TrafficPolicy};

use crate::{
    claims::{Key, Owner},
    compiler::{Compiler, Entry},
    findings::Finding,
    lower::{NotHandled, UnitKey, handled, node_port},
    select::{Choice, Selection, Uses, dedup, gather},
    table::{Family, Frontend, FrontendKey, FrontendKind, Protocol, ServiceId, SetKind},
};

/// What a load balancer in front asks for at `spec.healthCheckNodePort`: 200 with the number of endpoints, or 503.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port at the node's addresses.
    pub port: u16,
    /// Namespace of the Service.
    pub namespace: Arc<str>,
    /// Name of the Service.
    pub name: Arc<str>,
    /// Ready endpoints on this node.
    pub local_ready: usize,
}

/// An address of a Service that clients beyond the cluster use, which the node may announce.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalAddress {
    /// Namespace of the Service.
    pub namespace: Arc<str>,
    /// Name of the Service.
    pub name: Arc<str>,
    /// The address.
    pub addr: IpAddr,
    /// [`FrontendKind::LoadBalancer`] or [`FrontendKind::ExternalIp`].
    pub kind: FrontendKind,
    /// `spec.loadBalancerClass`: with one, the address is somebody else's to announce.
    pub class: Option<Arc<str>>,
    /// Whether only nodes with an endpoint of their own may attract traffic (`externalTrafficPolicy: Local`).
    pub local_only: bool,
    /// Whether the Service has an endpoint that serves anywhere.
    pub serves: bool,
    /// Whether it has one on this node.
    pub serves_here: bool,
}

/// Everything there is to say about a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceReport {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Why it has no frontends; `None` when it is handled.
    pub not_handled: Option<NotHandled>,
    /// Its ports, by family.
    pub ports: Vec<PortReport>,
    /// Slices of which nothing is used.
    pub unused_slices: Vec<UnusedSlice>,
    /// What is wrong with it.
    pub findings: Vec<Finding>,
}

/// A port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortReport {
    /// Its number in the table.
    pub id: ServiceId,
    /// Name; empty when it has none.
    pub name: Arc<str>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Family.
    pub family: Family,
    /// Port at the Service's addresses.
    pub port: u16,
    /// Where it answers, or would.
    pub frontends: Vec<FrontendReport>,
    /// Endpoints, sorted by address and port.
    pub endpoints: Vec<EndpointReport>,
}

/// A frontend that a Service asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendReport {
    /// Where.
    pub key: FrontendKey,
    /// What it would do.
    pub frontend: Frontend,
    /// The object that has it instead, such as `Service default/web`.
    pub held_by: Option<String>,
}

/// An endpoint, and whether it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointReport {
    /// Its address.
    pub addr: IpAddr,
    /// Its port.
    pub port: u16,
    /// The EndpointSlice that it is in.
    pub slice: Arc<str>,
    /// The Pod, when it is one.
    pub pod: Option<Arc<str>>,
    /// The node that it is on.
    pub node: Option<Arc<str>>,
    /// The zone that it is in.
    pub zone: Option<Arc<str>>,
    /// Whether it is on this node.
    pub local: bool,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether it serves.
    pub serving: bool,
    /// Whether it is about to end.
    pub terminating: bool,
    /// Whether it is in the cluster-wide set.
    pub cluster: Choice,
    /// Whether it is in the set of this node.
    pub node_local: Choice,
}

/// A slice of which nothing is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnusedSlice {
    /// Its name.
    pub slice: Arc<str>,
    /// How many endpoints it has.
    pub endpoints: usize,
    /// Why.
    pub why: String,
}

impl Compiler {
    /// The health check of a Service, when it has one: a load balancer under `externalTrafficPolicy: Local`.
    pub fn health_check(&self, namespace: &str, name: &str) -> Option<HealthCheck> {
        let (key, entry) = self.services.get_key_value(&Key::new(namespace, name))?;
        health_check(key, entry)
    }

    /// All health checks, in the order of namespace and name.
    pub fn health_checks(&self) -> Vec<HealthCheck> {
        let mut all: Vec<HealthCheck> =
            self.services.iter().filter_map(|(key, entry)| health_check(key, entry)).collect();
        all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        all
    }

    /// The addresses of a Service for clients beyond the cluster.
    pub fn external_addresses(&self, namespace: &str, name: &str) -> Vec<ExternalAddress> {
        let known = self.services.get_key_value(&Key::new(namespace, name));
        known.map(|(key, entry)| self.addresses_of(key, entry)).unwrap_or_default()
    }

    /// Those of all Services, in the order of namespace and name.
    pub fn all_external_addresses(&self) -> Vec<ExternalAddress> {
        let mut all: Vec<ExternalAddress> =
            self.services.iter().flat_map(|(key, entry)| self.addresses_of(key, entry)).collect();
        all.sort_by(|a, b| (&a.namespace, &a.name, a.addr).cmp(&(&b.namespace, &b.name, b.addr)));
        all
    }

    /// Everything there is to say about a Service; `None` when nobody has heard of it.
    pub fn explain(&self, namespace: &str, name: &str) -> Option<ServiceReport> {
        let (key, entry) = self.services.get_key_value(&Key::new(namespace, name))?;
        let lost = |f: &Finding| f.kind == "Service" && f.namespace == namespace && f.name == name;
        let mut findings = entry.findings().to_vec();
        findings.extend(self.claims.all_conflicts().filter(lost));
        let mut report = ServiceReport {
            namespace: Arc::clone(&key.namespace),
            name: Arc::clone(&key.name),
            not_handled: None,
            ports: Vec::new(),
            unused_slices: Vec::new(),
            findings,
        };
        match handled(entry.service.as_ref()) {
            Ok(service) => self.explain_handled(key, entry, service, &mut report),
            Err(why) => report.not_handled = Some(why),
        }
        Some(report)
    }

    fn explain_handled(&self, key: &Key, entry: &Entry, service: &Service, report: &mut ServiceReport) {
        let owner = Owner::Service(key.clone());
        for family in Family::ALL.into_iter().filter(|f| service.cluster_ip(*f).is_some()) {
            for port in &service.ports {
                let unit = UnitKey { port_name: port.name.as_str().into(), protocol: port.protocol, family };
                let Some(id) = entry.id(&unit) else { continue };
                let frontends = entry.keys(&unit).iter().filter_map(|frontend| {
                    let claim = self.claims.of(frontend, &owner)?;
                    let winner = self.claims.winner(frontend).filter(|winner| winner.owner != owner);
                    Some(FrontendReport {
                        key: *frontend,
                        frontend: claim.frontend.clone(),
                        held_by: winner.map(|winner| winner.owner.to_string()),
                    })
                });
                report.ports.push(PortReport {
                    id,
                    name: Arc::clone(&unit.port_name),
                    protocol: port.protocol,
                    family,
                    port: port.port,
                    frontends: frontends.collect(),
                    endpoints: self.explain_endpoints(
                        entry,
                        service,
                        &unit,
                        node_port(service, port).is_some(),
                    ),
                });
            }
        }
        for (name, slice) in &entry.slices {
            let used = report.ports.iter().any(|p| p.endpoints.iter().any(|e| e.slice == *name));
            if used || slice.endpoints.is_empty() {
                continue;
            }
            let why = match slice.address_type {
                AddressType::Fqdn => "it holds names, not addresses".to_owned(),
                AddressType::Ip(family) if service.cluster_ip(family).is_none() => {
                    format!("its endpoints are {family}, and the Service has no {family} cluster IP")
                }
                AddressType::Ip(_) => {
                    let has = |p: &podway_model::endpoint_slice::EndpointPort| {
                        format!("{:?}/{}", &*p.name, p.protocol)
                    };
                    let ports: Vec<String> = slice.ports.iter().map(has).collect();
                    format!(
                        "none of its ports ({}) is a port of the Service by name and protocol",
                        ports.join(", ")
                    )
                }
            };
            let slice = UnusedSlice { slice: Arc::clone(name), endpoints: slice.endpoints.len(), why };
            report.unused_slices.push(slice);
        }
    }

    fn explain_endpoints(
        &self,
        entry: &Entry,
        service: &Service,
        unit: &UnitKey,
        has_node_port: bool,
    ) -> Vec<EndpointReport> {
        let view = self.view();
        let all = gather(&entry.slices, &unit.port_name, unit.protocol, unit.family, &view.name);
        let mut unique = all.clone();
        dedup(&mut unique);
        let of_family = |ip: &IpAddr| Family::of(ip) == unit.family;
        let external = has_node_port
            || service.external_ips.iter().any(of_family)
            || service.has_load_balancer()
                && service.ingress.iter().any(|ingress| !ingress.proxy && of_family(&ingress.ip));
        let uses = Uses::of(service, external);
        let selection = Selection::new(&unique, uses, view);
        let mut seen = BTreeSet::new();
        all.iter()
            .map(|candidate| {
                let first = seen.insert((candidate.addr, candidate.port));
                let endpoint = candidate.endpoint;
                let choice = |choice| if first { choice } else { Choice::Duplicate };
                EndpointReport {
                    addr: candidate.addr,
                    port: candidate.port,
                    slice: candidate.slice.into(),
                    pod: endpoint.pod.as_deref().map(Arc::from),
                    node: endpoint.node.clone(),
                    zone: endpoint.zone.clone(),
                    local: candidate.local,
                    ready: endpoint.ready,
                    serving: endpoint.serving,
                    terminating: endpoint.terminating,
                    cluster: choice(selection.cluster(candidate)),
                    node_local: choice(selection.local(candidate)),
                }
            })
            .collect()
    }

    fn addresses_of(&self, key: &Key, entry: &Entry) -> Vec<ExternalAddress> {
        let Ok(service) = handled(entry.service.as_ref()) else { return Vec::new() };
        let class: Option<Arc<str>> = service.load_balancer_class.as_deref().map(Arc::from);
        let balanced = service.ingress.iter().filter(|ingress| service.has_load_balancer() && !ingress.proxy);
        let balanced = balanced.map(|ingress| (ingress.ip, FrontendKind::LoadBalancer, class.clone()));
        let external = service.external_ips.iter().map(|ip| (*ip, FrontendKind::ExternalIp, None));
        balanced
            .chain(external)
            .filter(|(addr, ..)| service.cluster_ip(Family::of(addr)).is_some())
            .map(|(addr, kind, class)| {
                let (serves, serves_here) = self.serves(entry, service, Family::of(&addr));
                ExternalAddress {
                    namespace: Arc::clone(&key.namespace),
                    name: Arc::clone(&key.name),
                    addr,
                    kind,
                    class,
                    local_only: service.external_policy == TrafficPolicy::Local,
                    serves,
                    serves_here,
                }
            })
            .collect()
    }

    /// Whether any port serves anywhere, and on this node.
    fn serves(&self, entry: &Entry, service: &Service, family: Family) -> (bool, bool) {
        let (mut anywhere, mut here) = (false, false);
        for port in &service.ports {
            let unit = UnitKey { port_name: port.name.as_str().into(), protocol: port.protocol, family };
            let Some(id) = entry.id(&unit) else { continue };
            let cluster = self.table().set(id, SetKind::Cluster);
            anywhere |= !cluster.is_empty();
            here |= !self.table().set(id, SetKind::Local).is_empty() || cluster.iter().any(|b| b.local);
        }
        (anywhere, here)
    }
}

fn health_check(key: &Key, entry: &Entry) -> Option<HealthCheck> {
    let service = handled(entry.service.as_ref()).ok()?;
    let applies = service.has_load_balancer() && service.external_policy == TrafficPolicy::Local;
    Some(HealthCheck {
        port: service.health_check_node_port.filter(|_| applies)?,
        namespace: Arc::clone(&key.namespace),
        name: Arc::clone(&key.name),
        local_ready: entry.local_ready(),
    })
}
