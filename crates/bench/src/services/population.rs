//! The services of a bench: any number of them, each with the same number of endpoints, all of which one server answers.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::traffic::PORT;

/// Most services: cluster IPs are counted upwards within 10.96.0.0/12.
pub const MAX_SERVICES: u32 = 1_000_000;
/// Most endpoints of all services together: a second set of as many addresses stands by for changes.
pub const MAX_ENDPOINTS: u32 = 2_000_000;
/// Where cluster IPs are.
pub const SERVICE_CIDR: &str = "10.96.0.0/12";
/// Where endpoints are, and where they are after a change: all of it is local to the server.
pub const ENDPOINT_CIDRS: [&str; 2] = ["10.128.0.0/10", "10.192.0.0/11"];

const FIRST_SERVICE: u32 = u32::from_be_bytes([10, 96, 1, 0]);
const FIRST_ENDPOINT: u32 = u32::from_be_bytes([10, 128, 0, 1]);
const FIRST_SPARE: u32 = u32::from_be_bytes([10, 192, 0, 1]);

/// How many services, and endpoints of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Population {
    /// Services.
    pub services: u32,
    /// Endpoints of a service.
    pub endpoints: u32,
}

/// Cluster IP of a service.
#[must_use]
pub fn service_address(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST_SERVICE + index)
}

impl Population {
    /// Address of an endpoint. The first one of a service has another address in odd generations: that is what a
    /// change of one endpoint changes.
    #[must_use]
    pub fn endpoint_address(&self, service: u32, endpoint: u32, generation: u32) -> Ipv4Addr {
        let number = service * self.endpoints + endpoint;
        let first = if endpoint == 0 && generation % 2 == 1 { FIRST_SPARE } else { FIRST_ENDPOINT };
        Ipv4Addr::from(first + number)
    }

    /// The Service object of an index.
    #[must_use]
    pub fn service(&self, index: u32) -> Value {
        let address = service_address(index).to_string();
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": name(index), "namespace": NAMESPACE, "uid": name(index),
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {
                "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
                "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
                "ports": [{ "port": PORT, "targetPort": PORT, "protocol": "TCP" }],
            },
        })
    }

    /// Its EndpointSlice, in one generation.
    #[must_use]
    pub fn slice(&self, index: u32, generation: u32) -> Value {
        let endpoints: Vec<Value> = (0..self.endpoints)
            .map(|e| {
                json!({
                    "addresses": [self.endpoint_address(index, e, generation).to_string()],
                    "conditions": { "ready": true, "serving": true, "terminating": false },
                    "nodeName": format!("node-{}", e + 1),
                })
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-1", name(index)), "namespace": NAMESPACE,
                "labels": { "kubernetes.io/service-name": name(index) },
            },
            "addressType": "IPv4",
            "ports": [{ "name": "", "port": PORT, "protocol": "TCP" }],
            "endpoints": endpoints,
        })
    }

    /// What kube-proxy's nftables mode puts into the kernel for these services: the input of `nft -f`.
    ///
    /// Written from the structure of its rules: sets and verdict maps keyed by address, protocol and port, and a chain
    /// per service that spreads over its endpoints.
    #[must_use]
    pub fn kube_nftables(&self) -> String {
        let mut text = String::from(
            "table ip kube-proxy {\n\
             set hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service; }\n\
             set cluster-ips { type ipv4_addr; }\n\
             map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }\n\
             map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }\n\
             map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n\
             map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n\
             map service-nodeports { type inet_proto . inet_service : verdict; }\n\
             chain nodeport-endpoints-check { ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @no-endpoint-nodeports; }\n\
             chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }\n\
             chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }\n",
        );
        let _ = writeln!(
            text,
            "chain services {{\n\
             ip daddr @cluster-ips ip saddr != {CLIENT_CIDR} meta mark set meta mark | 0x4000\n\
             ip daddr . meta l4proto . th dport vmap @service-ips\n\
             fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports\n}}\n\
             chain masquerading {{\n\
             meta mark & 0x4000 != 0 meta mark set meta mark ^ 0x4000 masquerade fully-random\n\
             ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random\n}}\n\
             chain cluster-ips-check {{ ip daddr @cluster-ips reject; ip daddr {SERVICE_CIDR} drop; }}"
        );
        for (chain, hook, priority, rules) in [
            ("filter-prerouting-pre-dnat", "filter hook prerouting", "-110", &["firewall-check"][..]),
            ("filter-output-pre-dnat", "filter hook output", "-110", &["firewall-check"]),
            (
                "filter-input",
                "filter hook input",
                "0",
                &["nodeport-endpoints-check", "service-endpoints-check"],
            ),
            ("filter-forward", "filter hook forward", "0", &["service-endpoints-check", "cluster-ips-check"]),
            ("filter-output", "filter hook output", "0", &["service-endpoints-check", "cluster-ips-check"]),
        ] {
            let _ = writeln!(text, "chain {chain} {{ type {hook} priority {priority};");
            for rule in rules {
                let _ = writeln!(text, "ct state new jump {rule}");
            }
            text += "}\n";
        }
        text += "chain nat-prerouting { type nat hook prerouting priority -100; jump services; }\n\
                 chain nat-output { type nat hook output priority -100; jump services; }\n\
                 chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }\n";
        for index in 0..self.services {
            let _ = write!(
                text,
                "chain service-{index:08X}-bench/{}/tcp/ {{ meta l4proto tcp dnat ip to numgen random mod {} map {{ ",
                name(index),
                self.endpoints
            );
            for endpoint in 0..self.endpoints {
                let _ = write!(text, "{endpoint} : {} . {PORT}, ", self.endpoint_address(index, endpoint, 0));
            }
            text += "}; }\n";
        }
        text += "}\n";
        // Element by element statements of a bounded length: nft takes very long ones badly.
        for first in (0..self.services).step_by(1000) {
            let last = (first + 1000).min(self.services);
            text += "add element ip kube-proxy cluster-ips { ";
            for index in first..last {
                let _ = write!(text, "{}, ", service_address(index));
            }
            text += "}\nadd element ip kube-proxy service-ips { ";
            for index in first..last {
                let _ = write!(
                    text,
                    "{} . tcp . {PORT} : goto service-{index:08X}-bench/{}/tcp/, ",
                    service_address(index),
                    name(index)
                );
            }
            text += "}\nadd element ip kube-proxy hairpin-connections { ";
            for index in first..last {
                for endpoint in 0..self.endpoints {
                    let address = self.endpoint_address(index, endpoint, 0);
                    let _ = write!(text, "{address} . {address} . tcp . {PORT}, ");
                }
            }
            text += "}\n";
        }
        text
    }
}

/// Namespace of the bench's objects.
pub const NAMESPACE: &str = "bench";
/// Where the client is.
pub const CLIENT_CIDR: &str = "10.244.0.0/16";

/// Name of a service.
#[must_use]
pub fn name(index: u32) -> String {
    format!("service-{index}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn addresses_are_distinct_and_a_generation_changes_one_endpoint() {
        let population = Population { services: 500, endpoints: 4 };
        let mut seen = BTreeSet::new();
        for service in 0..500 {
            assert!(seen.insert(service_address(service)));
            for endpoint in 0..4 {
                assert!(seen.insert(population.endpoint_address(service, endpoint, 0)));
            }
            assert!(seen.insert(population.endpoint_address(service, 0, 1)));
            assert_eq!(
                population.endpoint_address(service, 1, 1),
                population.endpoint_address(service, 1, 2)
            );
        }
    }

    #[test]
    fn every_service_has_its_chain_and_its_element() {
        let text = Population { services: 2500, endpoints: 2 }.kube_nftables();
        assert_eq!(text.matches("chain service-").count(), 2500 + 1, "one more is the check of endpoints");
        assert_eq!(text.matches(": goto service-").count(), 2500);
        assert_eq!(text.matches("add element ip kube-proxy service-ips").count(), 3);
    }
}
