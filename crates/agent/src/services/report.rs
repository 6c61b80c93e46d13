//! How services are, as JSON: the list, and everything about one.
//!
//! Field names are part of the interface of `podway services -o json`: they may be added to, not renamed.

use std::collections::{BTreeMap, HashMap};

use podway_bpf_host::MapFill;
use podway_services::table::{
    FrontendAddr, FrontendKey, FrontendKind, Origin, Route, ServiceId, SetKind, Target,
};
use podway_services::{Choice, Compiler, EndpointReport, Finding, PortReport, ServiceTable};
use serde_json::{Value, json};

use super::kernel::{Counts, Refused};
use super::lb::ObjectName;

/// What the reports are made of.
pub(super) struct Sources<'a> {
    pub(super) node: &'a str,
    pub(super) mode: &'static str,
    /// The kernel holds what the table says.
    pub(super) in_force: bool,
    /// Why it does not.
    pub(super) problem: Option<&'a str>,
    pub(super) compiler: &'a Compiler,
    /// Every Service that there is.
    pub(super) services: Vec<&'a ObjectName>,
    pub(super) refused: &'a [Refused],
    pub(super) counts: &'a HashMap<ServiceId, Counts>,
    pub(super) fill: Vec<MapFill>,
}

impl Sources<'_> {
    fn head(&self) -> Value {
        json!({
            "node": self.node,
            "mode": self.mode,
            "inForce": self.in_force,
            "problem": self.problem,
        })
    }

    /// All Services in short, what is wrong, and how full the tables are.
    pub(super) fn list(&self) -> Value {
        let table = self.compiler.table();
        let mut by_service = summaries(table, self.counts);
        let mut services = Vec::new();
        for name in &self.services {
            let summary = by_service.remove(&(name.0.as_str(), name.1.as_str())).unwrap_or_default();
            let not_handled = self.compiler.handles(&name.0, &name.1).err().map(|why| why.to_string());
            services.push(json!({
                "namespace": name.0,
                "name": name.1,
                "notHandled": not_handled,
                "frontends": summary.frontends,
                "endpoints": summary.endpoints,
                "localEndpoints": summary.local,
                "counters": counters(&summary.counts),
            }));
        }
        let mut value = self.head();
        value["services"] = json!(services);
        value["findings"] = self.compiler.findings().iter().map(finding).collect();
        value["refused"] = self
            .refused
            .iter()
            .map(|r| {
                let service = r.service.as_ref().map(|(namespace, name)| format!("{namespace}/{name}"));
                json!({"service": service, "cause": r.cause})
            })
            .collect();
        value["tables"] = self
            .fill
            .iter()
            .map(|m| json!({"name": m.name, "entries": m.entries, "maxEntries": m.max_entries}))
            .collect();
        value
    }

    /// Everything about one Service; an error when nobody has heard of it.
    pub(super) fn one(&self, namespace: &str, name: &str) -> Value {
        let Some(report) = self.compiler.explain(namespace, name) else {
            let error = format!("there is no Service {namespace}/{name}, and no EndpointSlice that names it");
            return json!({"error": error});
        };
        let own = |r: &&Refused| r.service.as_ref().is_some_and(|(ns, n)| ns == namespace && n == name);
        let mut value = self.head();
        value["service"] = json!({
            "namespace": &*report.namespace,
            "name": &*report.name,
            "notHandled": report.not_handled.as_ref().map(ToString::to_string),
            "ports": report.ports.iter().map(|p| self.port(p)).collect::<Vec<_>>(),
            "unusedSlices": report.unused_slices.iter().map(|s| {
                json!({"name": &*s.slice, "endpoints": s.endpoints, "why": s.why})
            }).collect::<Vec<_>>(),
            "findings": report.findings.iter().map(finding).collect::<Vec<_>>(),
            "refused": self.refused.iter().filter(own).map(|r| r.cause.clone()).collect::<Vec<_>>(),
        });
        value
    }

    fn port(&self, port: &PortReport) -> Value {
        let frontends: Vec<Value> = port
            .frontends
            .iter()
            .map(|f| {
                let routes: BTreeMap<&str, String> = Origin::ALL
                    .into_iter()
                    .map(|origin| {
                        let name = match origin {
                            Origin::Pod => "fromPods",
                            Origin::Node => "fromNode",
                            Origin::External => "fromOutside",
                        };
                        (name, route(f.frontend.route(origin)))
                    })
                    .collect();
                json!({
                    "address": place(&f.key),
                    "kind": kind(f.frontend.kind),
                    "routes": routes,
                    "affinitySeconds": f.frontend.affinity_s,
                    "sourceRanges": f.frontend.source_ranges.as_ref().map(|r| r.iter().map(ToString::to_string).collect::<Vec<_>>()),
                    "heldBy": f.held_by,
                })
            })
            .collect();
        let counts = self.counts.get(&port.id).copied().unwrap_or_default();
        json!({
            "name": &*port.name,
            "port": port.port,
            "protocol": port.protocol.to_string(),
            "family": port.family.to_string(),
            "frontends": frontends,
            "endpoints": port.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
            "counters": counters(&counts),
        })
    }
}

#[derive(Default)]
struct Summary {
    frontends: Vec<String>,
    /// Of the port with the most.
    endpoints: usize,
    local: usize,
    counts: Counts,
}

fn summaries<'a>(
    table: &'a ServiceTable,
    counts: &HashMap<ServiceId, Counts>,
) -> HashMap<(&'a str, &'a str), Summary> {
    let mut out: HashMap<(&str, &str), Summary> = HashMap::new();
    for (id, meta) in &table.services {
        let summary = out.entry((&*meta.namespace, &*meta.name)).or_default();
        // Ports with a Local policy alone have no cluster-wide set.
        let sets = [SetKind::Cluster, SetKind::Local].map(|kind| table.set(*id, kind));
        let local = sets[1].len().max(sets[0].iter().filter(|b| b.local).count());
        summary.endpoints = summary.endpoints.max(sets[0].len()).max(sets[1].len());
        summary.local = summary.local.max(local);
        if let Some(count) = counts.get(id) {
            summary.counts.connections += count.connections;
            summary.counts.refused += count.refused;
            summary.counts.packets += count.packets;
            summary.counts.bytes += count.bytes;
        }
    }
    for (key, frontend) in &table.frontends {
        let Some(meta) = table.services.get(&frontend.service) else { continue };
        if let Some(summary) = out.get_mut(&(&*meta.namespace, &*meta.name)) {
            summary.frontends.push(place(key));
        }
    }
    out
}

fn counters(counts: &Counts) -> Value {
    json!({
        "connections": counts.connections,
        "refused": counts.refused,
        "packets": counts.packets,
        "bytes": counts.bytes,
    })
}

fn finding(finding: &Finding) -> Value {
    json!({
        "kind": finding.kind,
        "namespace": finding.namespace,
        "name": finding.name,
        "field": finding.field,
        "cause": finding.cause,
    })
}

fn place(key: &FrontendKey) -> String {
    let address = match key.addr {
        FrontendAddr::Ip(ip) => std::net::SocketAddr::new(ip, key.port).to_string(),
        FrontendAddr::Node(family) => format!("node({family}):{}", key.port),
    };
    format!("{address}/{}", key.protocol)
}

fn kind(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::ExternalIp => "ExternalIP",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::NodePort => "NodePort",
        FrontendKind::HostPort => "HostPort",
    }
}

fn route(route: Route) -> String {
    let target = match route.target {
        Target::Set(SetKind::Cluster) => "any endpoint",
        Target::Set(SetKind::Local) => "endpoints of this node",
        Target::Reject => return "rejected: no endpoint serves".to_owned(),
        Target::Drop => return "dropped: no endpoint of this node serves".to_owned(),
    };
    let source = if route.masquerade { "with the node's address as source" } else { "source kept" };
    format!("{target}, {source}")
}

fn endpoint(endpoint: &EndpointReport) -> Value {
    let used = endpoint.cluster.is_used() || endpoint.node_local.is_used();
    json!({
        "address": std::net::SocketAddr::new(endpoint.addr, endpoint.port).to_string(),
        "slice": &*endpoint.slice,
        "pod": endpoint.pod.as_deref(),
        "node": endpoint.node.as_deref(),
        "zone": endpoint.zone.as_deref(),
        "local": endpoint.local,
        "ready": endpoint.ready,
        "serving": endpoint.serving,
        "terminating": endpoint.terminating,
        "used": used,
        "cluster": choice(endpoint.cluster),
        "nodeLocal": choice(endpoint.node_local),
    })
}

/// Why an endpoint is in a set or not.
fn choice(choice: Choice) -> &'static str {
    match choice {
        Choice::Used => "used",
        Choice::UsedTerminating => "used: terminating, and nothing is ready",
        Choice::NotReady => "not used: not ready",
        Choice::Terminating => "not used: terminating, and others are ready",
        Choice::OtherZone => "not used: for other zones",
        Choice::OtherNode => "not used: for other nodes",
        Choice::Remote => "not used: on another node",
        Choice::Duplicate => "not used: the same address and port is in another slice",
        Choice::SetUnused => "no traffic policy needs it",
    }
}
