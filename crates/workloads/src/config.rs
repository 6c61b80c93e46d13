//! What a cluster operator decides once: address ranges, limits, and the seed of generated names.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use jiff::SignedDuration;

/// Settings of the controllers. [`Config::default`] is a single-stack IPv4 cluster in the usual ranges.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Generated names, automatic service addresses and node ports derive from this: the same seed and the same
    /// objects give the same names and addresses.
    pub seed: u64,
    /// Ranges from which nodes get their podCIDRs: at most one per family. Empty: nodes are left alone.
    pub cluster_cidrs: Vec<IpNet>,
    /// Prefix length of a node's IPv4 podCIDR.
    pub node_prefix_v4: u8,
    /// Prefix length of a node's IPv6 podCIDR.
    pub node_prefix_v6: u8,
    /// Index of the first subnet handed to a node; 1 skips the all-zero subnet, so that the n-th node of
    /// 10.244.0.0/16 has 10.244.n.0/24.
    pub first_node_subnet: u32,
    /// Ranges of service addresses: one per family, the cluster's primary family first.
    pub service_cidrs: Vec<IpNet>,
    /// Node ports.
    pub node_ports: RangeInclusive<u16>,
    /// Addresses kept for Services that other parts know by address. Empty `addresses` of a family that has no
    /// service range are ignored.
    pub reserved_service_addresses: Vec<ReservedAddress>,
    /// `maxEndpointsPerSlice` of the EndpointSlice controller.
    pub endpoints_per_slice: usize,
    /// Events older than this are deleted (`--event-ttl` of kube-apiserver).
    pub event_ttl: SignedDuration,
}

/// A service address that is kept for one Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservedAddress {
    /// `metadata.namespace` of the Service.
    pub namespace: String,
    /// `metadata.name` of the Service.
    pub name: String,
    /// Offset into each service range: 1 is 10.96.0.1 in 10.96.0.0/16.
    pub offset: u32,
}

impl Default for Config {
    fn default() -> Self {
        let v4 = |a: [u8; 4], prefix| IpNet::new_assert(IpAddr::from(a), prefix);
        Self {
            seed: 0,
            cluster_cidrs: vec![v4([10, 244, 0, 0], 16)],
            node_prefix_v4: 24,
            node_prefix_v6: 64,
            first_node_subnet: 1,
            service_cidrs: vec![v4([10, 96, 0, 0], 16)],
            node_ports: 30000..=32767,
            reserved_service_addresses: vec![
                ReservedAddress { namespace: "default".into(), name: "kubernetes".into(), offset: 1 },
                ReservedAddress { namespace: "kube-system".into(), name: "kube-dns".into(), offset: 10 },
            ],
            endpoints_per_slice: 100,
            event_ttl: SignedDuration::from_hours(1),
        }
    }
}
