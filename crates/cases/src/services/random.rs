//! Random clusters and packets: small, so that everything collides with everything.

use std::net::IpAddr;

use podway_model::{EndpointSlice, Protocol, Service};
use podway_services::{Compiler, Flow, HostPort, table::NodeView};
use serde_json::{Value, json};

/// A generator of random numbers that gives the same from the same seed (`SplitMix64`).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts anywhere.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }

    /// True in `percent` of a hundred cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of several.
    pub fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    /// Each of several with some probability.
    fn some(&mut self, of: &[&str], percent: usize) -> Vec<String> {
        of.iter().filter(|_| self.chance(percent)).map(|&s| s.to_owned()).collect()
    }
}

const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];
const ZONES: [&str; 3] = ["zone-a", "zone-b", "zone-c"];
const NAMESPACES: [&str; 2] = ["blue", "red"];
const NAMES: [&str; 4] = ["web", "db", "api", "dns"];
const CLUSTER_V4: [&str; 4] = ["172.30.0.1", "172.30.0.2", "172.30.0.3", "172.30.0.4"];
const CLUSTER_V6: [&str; 3] = ["fd00:30::1", "fd00:30::2", "fd00:30::3"];
const EXTERNAL: [&str; 6] =
    ["192.0.2.1", "192.0.2.2", "192.168.0.1", "2001:db8:2::1", "2001:db8:2::2", "172.30.0.2"];
const OWN: [&str; 4] = ["192.168.0.1", "192.168.1.1", "2001:db8::1", "2001:db8:1::1"];
const PODS_V4: [&str; 7] =
    ["10.244.0.1", "10.244.0.2", "10.244.1.1", "10.244.1.2", "10.244.2.1", "192.168.0.1", "203.0.113.77"];
const PODS_V6: [&str; 4] = ["fd00:244::1", "fd00:244::2", "fd00:244:1::1", "2001:db8:77::1"];
const SENDERS: [&str; 12] = [
    "10.244.0.1",
    "10.244.1.2",
    "10.244.9.9",
    "192.168.0.1",
    "192.168.1.1",
    "127.0.0.1",
    "203.0.113.7",
    "198.51.100.9",
    "192.0.2.1",
    "fd00:244::1",
    "2001:db8::1",
    "2600::7",
];
const RANGES: [&str; 6] =
    ["203.0.113.0/24", "192.168.0.0/24", "10.244.0.0/16", "0.0.0.0/0", "2600::/16", "2001:db8::/64"];
const PORTS: [u16; 3] = [53, 80, 443];
const NODE_PORTS: [u16; 3] = [30_001, 30_002, 30_003];
const PORT_NAMES: [&str; 3] = ["", "a", "b"];
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
const CREATED: [&str; 3] = ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"];

/// A host port of a pod: namespace, name, index, and what it is.
pub type HostPortOf = (String, String, usize, HostPort);

/// A cluster as one node sees it.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// The node.
    pub view: NodeView,
    /// Every Service.
    pub services: Vec<Value>,
    /// Every EndpointSlice.
    pub slices: Vec<Value>,
    /// Every host port of the node.
    pub host_ports: Vec<HostPortOf>,
}

impl Cluster {
    /// A cluster of up to eight Services.
    pub fn random(random: &mut Random) -> Self {
        let view = view(random);
        let mut services = Vec::new();
        let mut slices = Vec::new();
        for namespace in NAMESPACES {
            for name in NAMES {
                if random.chance(60) {
                    services.push(service(random, namespace, name));
                }
                let count = if random.chance(85) { 1 + random.below(3) } else { 0 };
                for i in 0..count {
                    slices.push(slice(random, namespace, &format!("{name}-{i}"), name));
                }
            }
        }
        let host_ports = (0..random.below(3)).map(|i| host_port(random, i)).collect();
        Self { view, services, slices, host_ports }
    }

    /// A packet, most likely to some address of some Service.
    pub fn packet(&self, random: &mut Random) -> Flow {
        let tries = if random.chance(80) { 4 } else { 0 };
        let aimed = (0..tries).find_map(|_| self.aim(random));
        let (dst, port, protocol) = aimed.unwrap_or_else(|| {
            let nowhere = ["172.30.0.99", "127.0.0.1", "8.8.8.8", "2600::8", "fd00:30::99", "192.0.2.99"];
            let lists: [&[&str]; 5] = [&CLUSTER_V4, &CLUSTER_V6, &EXTERNAL, &OWN, &nowhere];
            let ports: &[u16] = if random.chance(50) { &PORTS } else { &NODE_PORTS };
            let dst = random.one(random.clone().one(&lists));
            (address(dst), random.one(ports), random.one(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp]))
        });
        // Both ends are of one family.
        let senders: Vec<&str> =
            SENDERS.into_iter().filter(|s| address(s).is_ipv4() == dst.is_ipv4()).collect();
        let src = if random.chance(4) { dst } else { address(random.one(&senders)) };
        Flow { src, dst, port, protocol }
    }

    fn aim(&self, random: &mut Random) -> Option<(IpAddr, u16, Protocol)> {
        if self.services.is_empty() {
            return None;
        }
        let service = random.one(&self.services);
        let port = random.one(service["spec"]["ports"].as_array()?);
        let protocol = Protocol::from_name(port["protocol"].as_str()?)?;
        let number = |field: &str| port[field].as_u64().and_then(|n| u16::try_from(n).ok());
        let listed = |list: &Value| -> Vec<String> {
            let texts = list.as_array().into_iter().flatten();
            texts.filter_map(|item| item.get("ip").unwrap_or(item).as_str().map(str::to_owned)).collect()
        };
        let addresses = match random.below(4) {
            0 => listed(&service["spec"]["clusterIPs"]),
            1 => listed(&service["status"]["loadBalancer"]["ingress"]),
            2 => listed(&service["spec"]["externalIPs"]),
            _ => return Some((address(random.one(&OWN)), number("nodePort")?, protocol)),
        };
        let dst = if addresses.is_empty() { None } else { random.one(&addresses).parse().ok() };
        Some((dst?, number("port")?, protocol))
    }

    /// Everything at once.
    ///
    /// # Panics
    /// Never for what [`Cluster::random`] makes: it is well formed.
    pub fn compile(&self) -> Compiler {
        let services: Vec<Service> = self.services.iter().map(parse_service).collect();
        let slices: Vec<EndpointSlice> = self.slices.iter().map(parse_slice).collect();
        let mut compiler = Compiler::new(self.view.clone());
        compiler.load(&services, &slices);
        for (namespace, pod, index, port) in &self.host_ports {
            compiler.set_host_port(namespace, pod, *index, port);
        }
        compiler
    }
}

/// Reads a Service that was made here.
///
/// # Panics
/// It is malformed.
pub fn parse_service(value: &Value) -> Service {
    Service::parse(value).expect("random Services are well formed")
}

/// Reads an EndpointSlice that was made here.
///
/// # Panics
/// It is malformed.
pub fn parse_slice(value: &Value) -> EndpointSlice {
    EndpointSlice::parse(value).expect("random EndpointSlices are well formed")
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("the lists above hold addresses")
}

/// A node, with more or less known about the cluster.
pub fn view(random: &mut Random) -> NodeView {
    let ranges = |texts: &[&str]| texts.iter().map(|t| t.parse().expect("a range")).collect();
    let addresses: Vec<IpAddr> = OWN.into_iter().map(address).collect();
    let mut node_port_addresses: Vec<IpAddr> =
        addresses.iter().copied().filter(|_| random.chance(70)).collect();
    if random.chance(30) {
        node_port_addresses.push(address("127.0.0.1"));
    }
    NodeView {
        name: NODES[0].to_owned(),
        zone: random
            .one(&[None, Some(""), Some("zone-a"), Some("zone-a"), Some("zone-b")])
            .map(str::to_owned),
        addresses,
        node_port_addresses,
        pod_cidrs: ranges(random.one::<&[&str]>(&[
            &[],
            &["10.244.0.0/16"],
            &["10.244.0.0/16", "fd00:244::/32"],
        ])),
        service_cidrs: ranges(random.one::<&[&str]>(&[
            &[],
            &["172.30.0.0/16"],
            &["172.30.0.0/16", "fd00:30::/112"],
        ])),
        masquerade_all: random.chance(15),
        load_balancer_pools: ranges(random.one::<&[&str]>(&[&[], &["192.0.2.0/24"]])),
    }
}

/// A Service of this name.
pub fn service(random: &mut Random, namespace: &str, name: &str) -> Value {
    let service_type = random.one(&[
        "ClusterIP",
        "ClusterIP",
        "NodePort",
        "NodePort",
        "LoadBalancer",
        "LoadBalancer",
        "ExternalName",
    ]);
    let (v4, v6) = (random.one(&CLUSTER_V4), random.one(&CLUSTER_V6));
    let cluster_ips = match random.below(10) {
        0..=4 => json!([v4]),
        5 => json!([v6]),
        6..=7 => json!([v4, v6]),
        8 => json!([v6, v4]),
        _ if service_type == "ClusterIP" => random.one(&[json!(["None"]), json!([])]),
        _ => json!([v4]),
    };
    let node_ports = matches!(service_type, "NodePort" | "LoadBalancer");
    let mut ports = Vec::new();
    for (i, port_name) in PORT_NAMES.into_iter().enumerate() {
        if i == 0 || random.chance(40) {
            ports.push(json!({
                "name": port_name,
                "port": PORTS[(i + random.below(2)) % 3],
                "protocol": PROTOCOLS[random.one(&[0, 0, 1, 2])],
                "nodePort": if node_ports && random.chance(80) { random.one(&NODE_PORTS) } else { 0 },
            }));
        }
    }
    // One number of a protocol, one node port of a protocol: the API server lets nothing else pass.
    let mut seen = Vec::new();
    ports.retain(|port| {
        let keys = [("port", &port["port"]), ("node", &port["nodePort"])];
        let keys = keys.map(|(kind, number)| (kind, number.clone(), port["protocol"].clone()));
        let free = keys.iter().all(|key| key.1 == 0 || !seen.contains(key));
        seen.extend(keys);
        free
    });
    let mut labels = json!({});
    if random.chance(5) {
        labels["service.kubernetes.io/service-proxy-name"] = "another".into();
    }
    let mut ingress = Vec::new();
    if service_type == "LoadBalancer" {
        for ip in random.some(&EXTERNAL[..5], 30) {
            ingress.push(match random.below(4) {
                0 => json!({ "ip": ip, "ipMode": "Proxy" }),
                1 => json!({ "ip": ip, "ipMode": "VIP" }),
                _ => json!({ "ip": ip }),
            });
        }
        if random.chance(10) {
            ingress.push(json!({ "hostname": "lb.example.org" }));
        }
    }
    let mut spec = json!({
        "type": service_type,
        "clusterIPs": cluster_ips,
        "ports": ports,
        "externalIPs": random.some(&EXTERNAL, 12),
        "internalTrafficPolicy": random.one(&["Cluster", "Cluster", "Local"]),
        "sessionAffinity": random.one(&["None", "ClientIP"]),
    });
    if service_type != "ClusterIP" || random.chance(50) {
        spec["externalTrafficPolicy"] = random.one(&["Cluster", "Local"]).into();
    }
    if random.chance(35) {
        spec["loadBalancerSourceRanges"] = random.some(&RANGES, 30).into();
    }
    json!({
        "metadata": { "namespace": namespace, "name": name, "labels": labels, "creationTimestamp": random.one(&CREATED) },
        "spec": spec,
        "status": { "loadBalancer": { "ingress": ingress } },
    })
}

/// A slice of a Service.
pub fn slice(random: &mut Random, namespace: &str, name: &str, service: &str) -> Value {
    let v6 = random.chance(30);
    let hinted = random.chance(50);
    let mut endpoints = Vec::new();
    let count = if random.chance(90) { 1 + random.below(5) } else { 0 };
    for _ in 0..count {
        let mut conditions = json!({});
        // A pod that is well, one that is about to end, or anything at all.
        match random.below(6) {
            0..=2 => conditions["ready"] = true.into(),
            3 => conditions = json!({ "ready": false, "serving": true, "terminating": true }),
            4 => conditions = json!({ "ready": false, "serving": false, "terminating": random.chance(50) }),
            _ => {
                for (key, percent) in [("ready", 50), ("serving", 50), ("terminating", 50)] {
                    if random.chance(percent) {
                        conditions[key] = random.chance(50).into();
                    }
                }
            }
        }
        let mut endpoint = json!({
            "addresses": [if v6 { random.one(&PODS_V6) } else { random.one(&PODS_V4) }],
            "conditions": conditions,
        });
        if random.chance(90) {
            endpoint["nodeName"] = random.one(&NODES).into();
        }
        if hinted && random.chance(95) {
            let named =
                |names: Vec<String>| names.into_iter().map(|n| json!({ "name": n })).collect::<Value>();
            endpoint["hints"] = json!({ "forZones": named(random.some(&ZONES, 60)) });
            if random.chance(50) {
                endpoint["hints"]["forNodes"] = named(random.some(&NODES, 60));
            }
        }
        endpoints.push(endpoint);
    }
    let mut ports = Vec::new();
    for port_name in PORT_NAMES {
        for protocol in PROTOCOLS {
            if random.chance(75) {
                ports.push(json!({ "name": port_name, "protocol": protocol, "port": random.one(&[8080, 8080, 9090]) }));
            }
        }
    }
    let mut labels = json!({ "kubernetes.io/service-name": service });
    if random.chance(5) {
        labels = json!({});
    }
    json!({
        "metadata": { "namespace": namespace, "name": name, "labels": labels },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "endpoints": endpoints,
        "ports": ports,
    })
}

/// A host port of one of a few pods.
pub fn host_port(random: &mut Random, index: usize) -> HostPortOf {
    let port = HostPort {
        created: random.one(&CREATED).to_owned(),
        host_ip: random
            .one(&[None, None, Some("192.168.0.1"), Some("0.0.0.0"), Some("2001:db8::1")])
            .map(address),
        port: random.one(&[30_001, 30_002, 443]),
        protocol: random.one(&[Protocol::Tcp, Protocol::Udp]),
        pod_ips: random
            .one::<&[&str]>(&[&["10.244.0.1"], &["10.244.0.2", "fd00:244::2"]])
            .iter()
            .map(|ip| address(ip))
            .collect(),
        container_port: 8080,
    };
    (random.one(&NAMESPACES).to_owned(), random.one(&["web", "pod"]).to_owned(), index, port)
}
