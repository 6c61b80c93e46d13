//! The Services part of the check: every pod to every cluster IP, and the client beyond the nodes to every node
//! port and load balancer. TCP only.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use podway_link::Netns;
use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinSet;

use super::tcp::{exchange, sockets};
use super::{Endpoint, Outcome, PATIENCE, micros};
use crate::client::Client;
use crate::observe::NodeStatus;
use crate::spec::LabName;
use crate::standin::Answer;

/// Targets of one source at a time.
const AT_ONCE: usize = 50;
/// Tries, and the pause between them: what has just been made may take a moment to reach every node.
const TRIES: usize = 3;
const AGAIN: Duration = Duration::from_millis(600);

/// Who asks from beyond the cluster.
const OUTSIDE: &str = "outside";

/// One way to one Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePath {
    /// Pod, or `outside`.
    pub from: String,
    /// `namespace/name`.
    pub service: String,
    /// `ClusterIP`, `NodePort` or `LoadBalancer`.
    pub kind: &'static str,
    /// Address and port that were asked.
    pub address: SocketAddr,
    /// How it went.
    pub outcome: Outcome,
}

/// A place at which a Service has to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    service: String,
    kind: &'static str,
    address: SocketAddr,
    /// Namespace and name of who may answer; none when an endpoint is no pod.
    answers: Option<BTreeSet<(String, String)>>,
    /// The sender's own address has to be seen.
    keeps_source: bool,
}

/// What the API server has of Services.
pub(super) async fn targets(client: &mut Client, nodes: &[NodeStatus]) -> anyhow::Result<Vec<Target>> {
    let services = client.read("/api/v1/services").await?;
    let slices = client.read("/apis/discovery.k8s.io/v1/endpointslices").await?;
    Ok(derive(&services, &slices, nodes))
}

/// A ready endpoint: its node, and its pod when it is one.
struct Ready {
    node: String,
    pod: Option<(String, String)>,
}

fn derive(services: &Value, slices: &Value, nodes: &[NodeStatus]) -> Vec<Target> {
    let items = |list: &Value| list["items"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    // By namespace, Service, port name and family.
    let mut ready: BTreeMap<(String, String, String, bool), Vec<Ready>> = BTreeMap::new();
    for slice in items(slices) {
        let namespace = text(&slice["metadata"]["namespace"]);
        let service = text(&slice["metadata"]["labels"]["kubernetes.io/service-name"]);
        let v6 = slice["addressType"] == "IPv6";
        for port in slice["ports"].as_array().into_iter().flatten() {
            let key = (namespace.clone(), service.clone(), text(&port["name"]), v6);
            for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
                if endpoint["conditions"]["ready"] == false {
                    continue;
                }
                let reference = &endpoint["targetRef"];
                let pod = (reference["kind"] == "Pod")
                    .then(|| (text(&reference["namespace"]), text(&reference["name"])));
                ready.entry(key.clone()).or_default().push(Ready { node: text(&endpoint["nodeName"]), pod });
            }
        }
    }
    let mut out = Vec::new();
    for service in items(services) {
        let (namespace, name) = (text(&service["metadata"]["namespace"]), text(&service["metadata"]["name"]));
        let spec = &service["spec"];
        // Somebody else's.
        if !service["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"].is_null() {
            continue;
        }
        let ports = spec["ports"].as_array().into_iter().flatten();
        for port in ports.filter(|p| p["protocol"].as_str().unwrap_or("TCP") == "TCP") {
            let of = |v6: bool| {
                let key = (namespace.clone(), name.clone(), text(&port["name"]), v6);
                ready.get(&key).map_or(&[][..], Vec::as_slice)
            };
            let mut add = |kind, ip: IpAddr, number: &Value, serve: Vec<&Ready>, keeps_source| {
                let number = number.as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0);
                let Some(number) = number.filter(|_| !serve.is_empty()) else { return };
                out.push(Target {
                    service: format!("{namespace}/{name}"),
                    kind,
                    address: SocketAddr::new(ip, number),
                    answers: serve.iter().map(|r| r.pod.clone()).collect(),
                    keeps_source,
                });
            };
            let on = |node: Option<&str>, v6: bool| -> Vec<&Ready> {
                of(v6).iter().filter(|r| node.is_none_or(|n| r.node == n)).collect()
            };
            let mut ips = spec["clusterIPs"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let ips: Vec<IpAddr> = ips.by_ref().filter_map(|ip| ip.parse().ok()).collect();
            let inner_local = spec["internalTrafficPolicy"] == "Local";
            for ip in ips.iter().filter(|_| !inner_local) {
                add("ClusterIP", *ip, &port["port"], on(None, ip.is_ipv6()), false);
            }
            let local = spec["externalTrafficPolicy"] == "Local";
            for node in nodes.iter().filter(|n| !n.stopped && n.ready) {
                let own = local.then_some(node.name.as_str());
                for ip in node.addresses.iter().filter(|a| ips.iter().any(|i| i.is_ipv6() == a.is_ipv6())) {
                    add("NodePort", *ip, &port["nodePort"], on(own, ip.is_ipv6()), local);
                }
            }
            // Only what Podway gave is answered for in the lab.
            let ours = !service["metadata"]["annotations"]["podway.dev/announced-by"].is_null();
            let ingress = service["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
            for ip in ingress.filter(|_| ours).filter_map(|i| i["ip"].as_str()?.parse::<IpAddr>().ok()) {
                // Without source ranges that might leave the client out.
                if spec["loadBalancerSourceRanges"].as_array().is_none_or(Vec::is_empty) {
                    add("LoadBalancer", ip, &port["port"], on(None, ip.is_ipv6()), local);
                }
            }
        }
    }
    out
}

/// A place to ask from.
pub(super) struct Source {
    name: String,
    netns: String,
    addresses: Vec<IpAddr>,
    outside: bool,
}

impl Source {
    pub(super) fn of(endpoint: &Endpoint) -> Self {
        Self {
            name: endpoint.name.clone(),
            netns: endpoint.netns.clone(),
            addresses: endpoint.addresses.clone(),
            outside: false,
        }
    }

    pub(super) fn outside(lab: &LabName, addresses: Vec<IpAddr>) -> Self {
        Self { name: OUTSIDE.into(), netns: lab.outside_netns(), addresses, outside: true }
    }
}

/// Asks everything that this source should reach.
pub(super) async fn ask(source: &Source, targets: &[Target]) -> anyhow::Result<Vec<ServicePath>> {
    let mine: Vec<&Target> = targets
        .iter()
        .filter(|t| (t.kind != "ClusterIP") == source.outside)
        .filter(|t| source.addresses.iter().any(|a| a.is_ipv4() == t.address.is_ipv4()))
        .collect();
    let mut out = Vec::new();
    for part in mine.chunks(AT_ONCE) {
        let ips: Vec<IpAddr> = part.iter().flat_map(|t| std::iter::repeat_n(t.address.ip(), TRIES)).collect();
        let netns = source.netns.clone();
        let made = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            Netns::open_named(&netns)?.run(|| sockets(&ips))?.context("make sockets")
        });
        let mut made = made.await?.with_context(|| format!("sockets in {}", source.name))?;
        let mut asking = JoinSet::new();
        for (index, target) in part.iter().enumerate() {
            let own = made.drain(..TRIES).collect();
            let (target, addresses) = ((*target).clone(), source.addresses.clone());
            asking.spawn(async move { (index, try_often(own, &target, &addresses).await) });
        }
        let mut outcomes = BTreeMap::new();
        while let Some(done) = asking.join_next().await {
            let (index, outcome) = done.context("a connection of the check failed")?;
            outcomes.insert(index, outcome);
        }
        out.extend(part.iter().zip(outcomes.into_values()).map(|(target, outcome)| ServicePath {
            from: source.name.clone(),
            service: target.service.clone(),
            kind: target.kind,
            address: target.address,
            outcome,
        }));
    }
    Ok(out)
}

async fn try_often(sockets: Vec<socket2::Socket>, target: &Target, sources: &[IpAddr]) -> Outcome {
    let mut last = Outcome::Failed { cause: "not tried".into() };
    for (turn, socket) in sockets.into_iter().enumerate() {
        if turn > 0 {
            tokio::time::sleep(AGAIN).await;
        }
        let begun = Instant::now();
        last = match tokio::time::timeout(PATIENCE, exchange(socket, target.address)).await {
            Err(_) => Outcome::Failed { cause: format!("no answer in {} ms", PATIENCE.as_millis()) },
            Ok(Err(e)) => Outcome::Failed { cause: e.to_string() },
            Ok(Ok(text)) => judge(&text, target, sources, micros(begun)),
        };
        if last.is_ok() {
            break;
        }
    }
    last
}

fn judge(text: &[u8], target: &Target, sources: &[IpAddr], micros: u64) -> Outcome {
    // Whoever is behind it that is no pod of the lab need not speak as its stand-ins do.
    let Some(answers) = &target.answers else { return Outcome::Ok { micros } };
    let start = text.windows(4).position(|w| w == b"\r\n\r\n").map_or(0, |at| at + 4);
    let Ok(answer) = serde_json::from_slice::<Answer>(&text[start..]) else {
        // A command that runs in place of a stand-in: that somebody answered is all that can be known.
        return if text.is_empty() {
            Outcome::Failed { cause: "connected, but nothing came".into() }
        } else {
            Outcome::Ok { micros }
        };
    };
    let who = (answer.identity.namespace, answer.identity.pod);
    if !answers.contains(&who) {
        return Outcome::Failed { cause: format!("answered by {}/{}, which is no endpoint", who.0, who.1) };
    }
    if target.keeps_source && !sources.contains(&answer.peer_address) {
        return Outcome::WrongSource { seen: answer.peer_address };
    }
    Outcome::Ok { micros }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, address: &str, ready: bool) -> NodeStatus {
        NodeStatus {
            name: name.into(),
            zone: String::new(),
            addresses: vec![address.parse().expect("address")],
            pod_cidrs: Vec::new(),
            ready,
            stopped: false,
            message: String::new(),
            uplink_mtu: None,
        }
    }

    #[test]
    fn targets_are_where_somebody_ready_has_to_answer() {
        let pod = |name: &str, node: &str, ready: bool| {
            json!({"nodeName": node, "conditions": {"ready": ready},
                   "targetRef": {"kind": "Pod", "namespace": "x", "name": name}})
        };
        let slices = json!({"items": [
            {"metadata": {"namespace": "x", "labels": {"kubernetes.io/service-name": "a"}}, "addressType": "IPv4",
             "ports": [{"name": "http", "port": 8080}],
             "endpoints": [pod("a1", "n1", true), pod("a2", "n2", false)]},
            {"metadata": {"namespace": "x", "labels": {"kubernetes.io/service-name": "api"}}, "addressType": "IPv4",
             "ports": [{"name": "", "port": 6443}], "endpoints": [{"addresses": ["192.0.2.1"]}]}]});
        let services = json!({"items": [
            {"metadata": {"namespace": "x", "name": "a", "annotations": {"podway.dev/announced-by": "n1"}},
             "spec": {"clusterIPs": ["10.0.0.1"], "externalTrafficPolicy": "Local",
                      "ports": [{"name": "http", "port": 80, "nodePort": 30080},
                                {"name": "dns", "port": 53, "protocol": "UDP"}]},
             "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}},
            {"metadata": {"namespace": "x", "name": "api"},
             "spec": {"clusterIPs": ["10.0.0.2"], "ports": [{"port": 443}]}},
            {"metadata": {"namespace": "x", "name": "idle"},
             "spec": {"clusterIPs": ["10.0.0.3"], "ports": [{"port": 80}]}},
            {"metadata": {"namespace": "x", "name": "headless"},
             "spec": {"clusterIPs": ["None"], "ports": [{"port": 80}]}}]});
        let nodes =
            [node("n1", "192.0.2.11", true), node("n2", "192.0.2.12", true), node("n3", "192.0.2.13", false)];
        let targets = derive(&services, &slices, &nodes);
        let shown: Vec<String> = targets
            .iter()
            .map(|t| format!("{} {} {} {}", t.service, t.kind, t.address, t.keeps_source))
            .collect();
        assert_eq!(
            shown,
            [
                "x/a ClusterIP 10.0.0.1:80 false",
                "x/a NodePort 192.0.2.11:30080 true",
                "x/a LoadBalancer 192.0.2.9:80 true",
                "x/api ClusterIP 10.0.0.2:443 false",
            ]
        );
        assert_eq!(targets[0].answers, Some([("x".to_owned(), "a1".to_owned())].into()));
        assert_eq!(targets[3].answers, None, "an endpoint that is no pod may answer as it likes");
    }

    #[test]
    fn answers_are_judged_by_who_gave_them_and_whom_they_saw() {
        let target = Target {
            service: "x/a".into(),
            kind: "NodePort",
            address: "192.0.2.1:80".parse().expect("address"),
            answers: Some([("x".to_owned(), "a1".to_owned())].into()),
            keeps_source: true,
        };
        let own: IpAddr = "172.19.0.2".parse().expect("address");
        let body = |pod: &str, peer: &str| {
            format!(
                "HTTP/1.1 200 OK\r\n\r\n{{\"pod\":\"{pod}\",\"namespace\":\"x\",\"node\":\"n\",\"container\":\"c\",\
                 \"addresses\":[],\"address\":\"10.244.2.2\",\"port\":80,\"protocol\":\"TCP\",\"peerAddress\":\"{peer}\",\
                 \"peerPort\":1}}"
            )
        };
        let run = |text: &str| judge(text.as_bytes(), &target, &[own], 7);
        assert_eq!(run(&body("a1", "172.19.0.2")), Outcome::Ok { micros: 7 });
        assert!(matches!(run(&body("a1", "192.0.2.1")), Outcome::WrongSource { .. }));
        assert!(matches!(run(&body("b", "172.19.0.2")), Outcome::Failed { .. }));
        assert!(matches!(run(""), Outcome::Failed { .. }));
        assert_eq!(run("HTTP/1.1 200 OK\r\n\r\nhello"), Outcome::Ok { micros: 7 });
    }
}
