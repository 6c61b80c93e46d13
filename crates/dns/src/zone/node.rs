//! What is known under the name of one Service.

use std::net::IpAddr;

use podway_model::{EndpointSlice, Service};

use crate::name::{MAX_LABEL, Name};
use crate::wire::{CLASS_IN, QNAME, rtype};

/// A slice as far as names need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Compact {
    pub(super) service: (Box<str>, Box<str>),
    endpoints: Vec<CompactEndpoint>,
    ports: Vec<Port>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct CompactEndpoint {
    addr: IpAddr,
    ready: bool,
    /// Lower case.
    label: Box<[u8]>,
}

/// A port that has a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    /// `_name._protocol` as on the wire.
    labels: Box<[u8]>,
    number: u16,
}

impl Port {
    fn new(name: &str, protocol: &str, number: u16) -> Option<Self> {
        let (name, protocol) = (format!("_{name}").to_lowercase(), format!("_{protocol}").to_lowercase());
        let fits = name.len() > 1 && name.len() <= MAX_LABEL && protocol.len() <= MAX_LABEL;
        fits.then(|| Self { labels: [wired(&name), wired(&protocol)].concat().into(), number })
    }
}

/// One label as on the wire.
fn wired(label: &str) -> Vec<u8> {
    let mut wire = vec![u8::try_from(label.len()).unwrap_or(0)];
    wire.extend(label.as_bytes());
    wire
}

/// A label as it is looked up.
pub(super) fn label(name: &str) -> Box<[u8]> {
    name.to_ascii_lowercase().into_bytes().into()
}

/// The key of a Service; `None` when its name or its namespace cannot be a label.
pub(super) fn key(namespace: &str, name: &str) -> Option<Box<[u8]>> {
    let fits = |text: &str| (1..=MAX_LABEL).contains(&text.len());
    let (name, namespace) = (name.to_ascii_lowercase(), namespace.to_ascii_lowercase());
    (fits(&name) && fits(&namespace)).then(|| [wired(&name), wired(&namespace)].concat().into())
}

impl Compact {
    /// `None` for a slice of no Service.
    pub(super) fn new(slice: &EndpointSlice) -> Option<Self> {
        let service = (slice.namespace.as_str().into(), slice.service.as_deref()?.into());
        let endpoints = slice.endpoints.iter().map(|e| CompactEndpoint {
            addr: e.addr,
            ready: e.ready,
            label: endpoint_label(e.hostname.as_deref(), e.addr),
        });
        let ports = slice.ports.iter();
        let ports = ports.filter_map(|p| Port::new(&p.name, &p.protocol.to_string(), p.port));
        Some(Self { service, endpoints: endpoints.collect(), ports: ports.collect() })
    }
}

/// The hostname, or else the address with dashes, which is unique in the Service.
fn endpoint_label(hostname: Option<&str>, addr: IpAddr) -> Box<[u8]> {
    match hostname {
        Some(name) if (1..=MAX_LABEL).contains(&name.len()) && !name.contains('.') => label(name),
        _ => addr.to_string().replace(['.', ':'], "-").into_bytes().into(),
    }
}

/// Address records of one family, as on the wire behind a question about their owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    records: Box<[u8]>,
    count: u16,
}

impl Addresses {
    fn new(addresses: &[IpAddr], v6: bool, ttl: u32) -> Self {
        let mut all: Vec<IpAddr> = addresses.iter().copied().filter(|a| a.is_ipv6() == v6).collect();
        all.sort_unstable();
        all.dedup();
        // No message holds more.
        all.truncate(4000);
        let mut records = Vec::new();
        for addr in &all {
            let (kind, octets) = match addr {
                IpAddr::V4(v4) => (rtype::A, v4.octets().to_vec()),
                IpAddr::V6(v6) => (rtype::AAAA, v6.octets().to_vec()),
            };
            records.extend((0xc000 | QNAME).to_be_bytes());
            records.extend(kind.to_be_bytes());
            records.extend(CLASS_IN.to_be_bytes());
            records.extend(ttl.to_be_bytes());
            records.extend((octets.len() as u16).to_be_bytes());
            records.extend(octets);
        }
        Self { records: records.into(), count: all.len() as u16 }
    }

    pub(super) fn count(&self) -> u16 {
        self.count
    }

    /// The records, beginning with another one each time, in two parts with how many are in each.
    pub(super) fn rotated(&self, turn: usize) -> [(u16, &[u8]); 2] {
        if self.count == 0 {
            return [(0, &[]); 2];
        }
        let first = turn % usize::from(self.count);
        let size = self.records.len() / usize::from(self.count);
        let (back, front) = self.records.split_at(first * size);
        [(self.count - first as u16, front), (first as u16, back)]
    }

    /// The addresses' bytes one by one.
    pub(super) fn octets(&self) -> impl Iterator<Item = &[u8]> {
        let size = self.records.len().checked_div(usize::from(self.count)).unwrap_or(1).max(1);
        self.records.chunks_exact(size).filter_map(|record| record.get(12..))
    }
}

/// An endpoint, or several with one hostname.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) label: Box<[u8]>,
    pub(super) a: Addresses,
    pub(super) aaaa: Addresses,
}

/// One SRV record; those that are the same are answered once, but each counts for the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Srv {
    /// `_port._protocol` as on the wire.
    pub(super) labels: Box<[u8]>,
    pub(super) number: u16,
    /// Label in front of the Service's name; none is the Service itself.
    pub(super) target: Option<Box<[u8]>>,
}

/// Everything under one Service's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServiceNode {
    pub(super) external: Option<Name>,
    pub(super) a: Addresses,
    pub(super) aaaa: Addresses,
    pub(super) srv: Vec<Srv>,
    /// By label.
    pub(super) endpoints: Vec<Endpoint>,
    /// Addresses that lead back to it, with the label of the endpoint.
    pub(super) reverse: Vec<(IpAddr, Option<Box<[u8]>>)>,
}

impl ServiceNode {
    /// `None` when nothing has that name.
    pub(super) fn new<'a>(
        service: &Service,
        slices: impl Iterator<Item = &'a Compact>,
        ttl: u32,
    ) -> Option<Self> {
        if service.service_type == Some(podway_model::service::ServiceType::ExternalName) {
            let external = Name::parse(service.external_name.as_deref()?).ok()?;
            return Some(Self { external: Some(external), ..Self::default() });
        }
        let mut node = Self::default();
        let mut found: Vec<(Box<[u8]>, IpAddr)> = Vec::new();
        for slice in slices {
            for endpoint in slice.endpoints.iter().filter(|e| e.ready || service.publish_not_ready) {
                found.push((endpoint.label.clone(), endpoint.addr));
                if service.headless {
                    let target = Some(endpoint.label.clone());
                    node.srv.extend(slice.ports.iter().map(|port| Srv {
                        labels: port.labels.clone(),
                        number: port.number,
                        target: target.clone(),
                    }));
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        let addresses = if service.headless {
            found.iter().map(|(_, addr)| *addr).collect()
        } else {
            service.cluster_ips.clone()
        };
        if addresses.is_empty() {
            return None;
        }
        if !service.headless {
            for port in &service.ports {
                let port = Port::new(&port.name, &port.protocol.to_string(), port.port);
                node.srv.extend(port.into_iter().flat_map(|port| {
                    let srv = Srv { labels: port.labels, number: port.number, target: None };
                    std::iter::repeat_n(srv, addresses.len())
                }));
            }
            node.reverse.extend(addresses.iter().map(|addr| (*addr, None)));
        }
        node.a = Addresses::new(&addresses, false, ttl);
        node.aaaa = Addresses::new(&addresses, true, ttl);
        for group in found.chunk_by(|a, b| a.0 == b.0) {
            let addresses: Vec<IpAddr> = group.iter().map(|(_, addr)| *addr).collect();
            node.endpoints.push(Endpoint {
                label: group[0].0.clone(),
                a: Addresses::new(&addresses, false, ttl),
                aaaa: Addresses::new(&addresses, true, ttl),
            });
        }
        node.reverse.extend(found.into_iter().map(|(label, addr)| (addr, Some(label))));
        Some(node)
    }

    pub(super) fn endpoint(&self, label: &[u8]) -> Option<&Endpoint> {
        let at = self.endpoints.binary_search_by(|e| (*e.label).cmp(label)).ok()?;
        self.endpoints.get(at)
    }
}
