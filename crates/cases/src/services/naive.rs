//! What should become of a packet, worked out anew for each from the objects themselves, after the documentation of the
//! API fields. Slow, plain, and without a line of the compiler's.

#![expect(clippy::unwrap_used, reason = "it reads what random clusters are made of, which is well formed")]

use std::net::IpAddr;

use ipnet::IpNet;
use podway_services::{Flow, HostPort, Verdict};
use serde_json::Value;

use super::{random::Cluster, target::Observed};

/// A service port, or a host port, that a packet may be for.
enum Taker<'a> {
    ClusterIp(&'a Value, &'a Value),
    External(&'a Value, &'a Value, Option<Vec<IpNet>>),
    HostPort(&'a HostPort),
}

/// What becomes of a packet.
pub fn evaluate(cluster: &Cluster, flow: &Flow) -> Observed {
    let nothing =
        |verdict, untouched| Observed { destinations: vec![], masquerade: false, verdict, untouched };
    let from_node = flow.src.is_loopback() || cluster.view.addresses.contains(&flow.src);
    let from_pod = !from_node && cluster.view.pod_cidrs.iter().any(|c| c.contains(&flow.src));
    let Some(taker) = taker(cluster, flow) else {
        let vip = handled(cluster).any(|service| {
            cluster_ip(service, flow.dst.is_ipv4()) == Some(flow.dst)
                || cluster.view.load_balancer_pools.iter().any(|pool| pool.contains(&flow.dst))
                    && balanced(service).contains(&flow.dst)
        });
        return if vip {
            nothing(Verdict::Reject, false)
        } else if cluster.view.service_cidrs.iter().any(|c| c.contains(&flow.dst)) {
            nothing(Verdict::Drop, false)
        } else {
            nothing(Verdict::Accept, true)
        };
    };
    let (service, port, external) = match &taker {
        Taker::HostPort(host_port) => {
            let pod = host_port.pod_ips.iter().find(|ip| ip.is_ipv4() == flow.dst.is_ipv4());
            let pod = *pod.expect("it was taken since the pod has an address of the family");
            return Observed {
                destinations: vec![(pod, host_port.container_port)],
                masquerade: from_node || flow.src == pod,
                verdict: Verdict::Accept,
                untouched: false,
            };
        }
        Taker::ClusterIp(service, port) => (*service, *port, false),
        Taker::External(service, port, ranges) => {
            if let Some(ranges) = ranges {
                let within = |ip: &IpAddr| ranges.iter().any(|r| r.contains(ip));
                // "Traffic will be restricted to the specified client IPs": the node is a client when one of its
                // addresses is specified, and may then have the load balancer's address as its source.
                let node_may = cluster.view.addresses.iter().any(within);
                let itself = node_may && balanced(service).contains(&flow.src);
                let may = if from_node { node_may } else { within(&flow.src) || itself };
                if !may {
                    return nothing(Verdict::Drop, false);
                }
            }
            (*service, *port, true)
        }
    };
    let policy = |field: &str| service["spec"][field] == "Local";
    let local_only = if external { policy("externalTrafficPolicy") } else { policy("internalTrafficPolicy") };
    // Clients in the cluster get what a load balancer would lead them to, and that leads to some node with endpoints.
    let short_circuit = external && local_only && (from_node || from_pod);
    let endpoints = endpoints(cluster, service, port, flow.dst.is_ipv4());
    let chosen = if local_only && !short_circuit {
        let here: Vec<&End> =
            endpoints.iter().filter(|e| e.node.as_deref() == Some(&cluster.view.name)).collect();
        let anywhere = !serving(&endpoints.iter().collect::<Vec<_>>()).is_empty();
        let chosen = serving(&here);
        if chosen.is_empty() {
            // Others serve: be silent, so that the sender's load balancer tries them.
            return nothing(if anywhere { Verdict::Drop } else { Verdict::Reject }, false);
        }
        chosen
    } else {
        let chosen = near(cluster, serving(&endpoints.iter().collect::<Vec<_>>()));
        if chosen.is_empty() {
            return nothing(Verdict::Reject, false);
        }
        chosen
    };
    let mut destinations: Vec<(IpAddr, u16)> = chosen.iter().map(|e| (e.addr, e.port)).collect();
    destinations.sort();
    let pods_known = cluster.view.pod_cidrs.iter().any(|c| c.addr().is_ipv4() == flow.dst.is_ipv4());
    let masquerade = if external {
        // "Cluster" may lead to another node, whose answer must come back here; "Local" preserves the client's address.
        !local_only || from_node
    } else {
        cluster.view.masquerade_all || pods_known && !from_pod
    };
    let hairpin = destinations.iter().any(|(addr, _)| *addr == flow.src);
    Observed { destinations, masquerade: masquerade || hairpin, verdict: Verdict::Accept, untouched: false }
}

/// Services that are this proxy's.
fn handled(cluster: &Cluster) -> impl Iterator<Item = &Value> {
    cluster.services.iter().filter(|service| {
        let ips = service["spec"]["clusterIPs"].as_array().map(Vec::as_slice).unwrap_or_default();
        service.pointer("/metadata/labels/service.kubernetes.io~1service-proxy-name").is_none()
            && service["spec"]["type"] != "ExternalName"
            && !ips.is_empty()
            && ips[0] != "None"
    })
}

fn ips(list: &Value) -> Vec<IpAddr> {
    list.as_array().into_iter().flatten().map(|ip| ip.as_str().unwrap().parse().unwrap()).collect()
}

fn cluster_ip(service: &Value, v4: bool) -> Option<IpAddr> {
    ips(&service["spec"]["clusterIPs"]).into_iter().find(|ip| ip.is_ipv4() == v4)
}

/// Addresses of the load balancer that packets arrive with, in the families that the Service has.
fn balanced(service: &Value) -> Vec<IpAddr> {
    if service["spec"]["type"] != "LoadBalancer" {
        return vec![];
    }
    let ingress = service["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
    let vip = ingress.filter(|i| i["ipMode"] != "Proxy").filter_map(|i| i["ip"].as_str()?.parse().ok());
    vip.filter(|ip: &IpAddr| cluster_ip(service, ip.is_ipv4()).is_some()).collect()
}

/// Who takes the packet: of several objects the oldest, then the first by namespace and name.
fn taker<'a>(cluster: &'a Cluster, flow: &Flow) -> Option<Taker<'a>> {
    let v4 = flow.dst.is_ipv4();
    let at_node = cluster.view.node_port_addresses.contains(&flow.dst);
    // An exact address goes before "any address of the node".
    let mut exact: Vec<(Vec<&str>, Taker<'a>)> = vec![];
    let mut any: Vec<(Vec<&str>, Taker<'a>)> = vec![];
    for service in handled(cluster) {
        let Some(cluster_ip) = cluster_ip(service, v4) else { continue };
        let meta = &service["metadata"];
        let age = ["creationTimestamp", "namespace", "name"].map(|k| meta[k].as_str().unwrap());
        let rank = |kind| age.into_iter().chain(["service", kind]).collect::<Vec<_>>();
        for port in service["spec"]["ports"].as_array().into_iter().flatten() {
            if port["protocol"].as_str() != Some(&flow.protocol.to_string()) {
                continue;
            }
            if port["port"] == flow.port {
                if cluster_ip == flow.dst {
                    exact.push((rank("1"), Taker::ClusterIp(service, port)));
                }
                if balanced(service).contains(&flow.dst) {
                    exact.push((rank("2"), Taker::External(service, port, ranges(service, v4))));
                }
                if ips(&service["spec"]["externalIPs"]).contains(&flow.dst) {
                    exact.push((rank("3"), Taker::External(service, port, None)));
                }
            }
            if port["nodePort"] == flow.port && flow.port != 0 && at_node {
                any.push((rank("4"), Taker::External(service, port, None)));
            }
        }
    }
    for (namespace, pod, index, host_port) in &cluster.host_ports {
        if host_port.port != flow.port
            || host_port.protocol != flow.protocol
            || !host_port.pod_ips.iter().any(|ip| ip.is_ipv4() == v4)
        {
            continue;
        }
        let index = ["0", "1", "2"][*index];
        let rank: Vec<&str> = vec![&host_port.created, namespace, pod, "then the pod", index];
        match host_port.host_ip.filter(|ip| !ip.is_unspecified()) {
            Some(ip) if ip == flow.dst => exact.push((rank, Taker::HostPort(host_port))),
            None if at_node => {
                // An unspecified address is of a family, too, but means every address.
                any.push((rank, Taker::HostPort(host_port)));
            }
            _ => {}
        }
    }
    let first = |mut takers: Vec<(Vec<&str>, Taker<'a>)>| {
        takers.sort_by(|a, b| a.0.cmp(&b.0));
        takers.into_iter().next().map(|(_, taker)| taker)
    };
    first(exact).or_else(|| first(any))
}

/// `loadBalancerSourceRanges` of a family; all families count when asking whether there are any.
fn ranges(service: &Value, v4: bool) -> Option<Vec<IpNet>> {
    let listed = service["spec"]["loadBalancerSourceRanges"].as_array()?;
    let parsed = listed.iter().map(|r| r.as_str().unwrap().parse::<IpNet>().unwrap());
    (!listed.is_empty()).then(|| parsed.filter(|r| r.addr().is_ipv4() == v4).collect())
}

#[derive(Clone, Debug)]
struct End {
    addr: IpAddr,
    port: u16,
    node: Option<String>,
    ready: bool,
    serving: bool,
    terminating: bool,
    zones: Vec<String>,
    nodes: Vec<String>,
}

/// All endpoints of a service port, one of each address and port: the one in the best state, here rather than elsewhere.
fn endpoints(cluster: &Cluster, service: &Value, port: &Value, v4: bool) -> Vec<End> {
    let meta = &service["metadata"];
    let mut slices: Vec<&Value> = cluster
        .slices
        .iter()
        .filter(|s| s["metadata"]["namespace"] == meta["namespace"])
        .filter(|s| s["metadata"]["labels"]["kubernetes.io/service-name"] == meta["name"])
        .filter(|s| s["addressType"] == if v4 { "IPv4" } else { "IPv6" })
        .collect();
    slices.sort_by_key(|s| s["metadata"]["name"].as_str());
    let mut ends: Vec<End> = vec![];
    for slice in slices {
        for p in slice["ports"].as_array().into_iter().flatten() {
            if p["name"] != port["name"] || p["protocol"] != port["protocol"] {
                continue;
            }
            for e in slice["endpoints"].as_array().into_iter().flatten() {
                let end = end(e, p["port"].as_u64().unwrap() as u16);
                let state = |e: &End| {
                    let here = e.node.as_deref() == Some(&cluster.view.name);
                    (e.ready, e.serving, !e.terminating, here)
                };
                match ends.iter_mut().find(|old| (old.addr, old.port) == (end.addr, end.port)) {
                    Some(old) if state(old) < state(&end) => *old = end,
                    Some(_) => {}
                    None => ends.push(end),
                }
            }
        }
    }
    ends
}

fn end(e: &Value, port: u16) -> End {
    let names = |field: &str| -> Vec<String> {
        let listed = e["hints"][field].as_array().into_iter().flatten();
        listed.map(|h| h["name"].as_str().unwrap().to_owned()).collect()
    };
    let condition = |name: &str| e["conditions"][name].as_bool();
    // "A nil value should be interpreted as true", and serving "should be deferred to ready"; who does not serve is
    // not ready, either.
    let ready = condition("ready").unwrap_or_else(|| condition("serving") != Some(false));
    End {
        addr: e["addresses"][0].as_str().unwrap().parse().unwrap(),
        port,
        node: e["nodeName"].as_str().map(str::to_owned),
        ready,
        serving: condition("serving").unwrap_or(ready),
        terminating: condition("terminating") == Some(true),
        zones: names("forZones"),
        nodes: names("forNodes"),
    }
}

/// The ready ones; when there are none, those that still serve while they end.
fn serving<'a>(endpoints: &[&'a End]) -> Vec<&'a End> {
    let ready: Vec<&End> = endpoints.iter().copied().filter(|e| e.ready).collect();
    if ready.is_empty() {
        endpoints.iter().copied().filter(|e| e.serving && e.terminating).collect()
    } else {
        ready
    }
}

/// Those meant for this node, else for this zone, else all; hints count when every ready endpoint has one.
fn near<'a>(cluster: &Cluster, serving: Vec<&'a End>) -> Vec<&'a End> {
    if serving.iter().any(|e| !e.ready) {
        return serving;
    }
    if serving.iter().all(|e| !e.nodes.is_empty()) {
        let mine: Vec<&End> =
            serving.iter().copied().filter(|e| e.nodes.contains(&cluster.view.name)).collect();
        if !mine.is_empty() {
            return mine;
        }
    }
    if let Some(zone) = cluster.view.zone.as_ref().filter(|zone| !zone.is_empty())
        && serving.iter().all(|e| !e.zones.is_empty())
    {
        let mine: Vec<&End> = serving.iter().copied().filter(|e| e.zones.contains(zone)).collect();
        if !mine.is_empty() {
            return mine;
        }
    }
    serving
}
