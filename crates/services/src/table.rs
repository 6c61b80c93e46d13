//! The service table: what a node does with a packet to a service, independent of the mechanism that does it.

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

pub use podway_model::{Family, Protocol};

/// Where a frontend listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendAddr {
    /// One address: a cluster IP, an external IP, a load balancer's address, a host port's own address.
    Ip(IpAddr),
    /// Every address of this node that serves node ports ([`NodeView::node_port_addresses`]), of one family.
    Node(Family),
}

impl FrontendAddr {
    /// The family of the packets it takes.
    pub const fn family(&self) -> Family {
        match self {
            FrontendAddr::Ip(addr) => Family::of(addr),
            FrontendAddr::Node(family) => *family,
        }
    }
}

/// What a packet's destination must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    /// Destination address.
    pub addr: FrontendAddr,
    /// Destination port.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { addr, port, protocol } = self;
        match addr {
            FrontendAddr::Ip(IpAddr::V4(v4)) => write!(f, "{v4}:{port}/{protocol}"),
            FrontendAddr::Ip(IpAddr::V6(v6)) => write!(f, "[{v6}]:{port}/{protocol}"),
            FrontendAddr::Node(family) => write!(f, "the nodes' {family} addresses:{port}/{protocol}"),
        }
    }
}

/// Why a frontend exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip` with `ipMode: VIP`.
    LoadBalancer,
    /// `spec.ports[].nodePort`.
    NodePort,
    /// `containers[].ports[].hostPort` of a pod on this node.
    HostPort,
}

/// Number of one service port of one family (or of one host port): dense, stable while the port exists.
/// A freed number rests for [`SERVICE_ID_REST`] other allocations before it is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId(pub u32);

/// How many allocations a freed [`ServiceId`] stays unused, so that no late reader takes a new service for an old one.
pub const SERVICE_ID_REST: usize = 1024;

/// Which backends of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SetKind {
    /// Cluster-wide, after topology.
    Cluster = 0,
    /// On this node only (a traffic policy is `Local`).
    Local = 1,
}

/// One of the two backend sets of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetId {
    /// The service.
    pub service: ServiceId,
    /// Which set.
    pub kind: SetKind,
}

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// A pod of the cluster.
    Pod = 0,
    /// This node itself.
    Node = 1,
    /// Anyone else.
    External = 2,
}

impl Origin {
    /// Every origin, in the order of [`Frontend::routes`].
    pub const ALL: [Origin; 3] = [Origin::Pod, Origin::Node, Origin::External];
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// To one backend of a set, which is not empty.
    Set(SetKind),
    /// Nobody serves: the sender is told at once (TCP reset, ICMP port unreachable).
    Reject,
    /// Nobody serves here, though others do elsewhere (`Local` without a local endpoint): discarded in silence, so
    /// that a load balancer in front tries another node.
    Drop,
}

/// What happens to packets of one origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    /// Where they go.
    pub target: Target,
    /// Whether the node's own address replaces the source. (A pod that reaches itself is masqueraded in any case.)
    pub masquerade: bool,
}

/// One address, port and protocol at which a service answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// The service port behind it.
    pub service: ServiceId,
    /// Why it exists.
    pub kind: FrontendKind,
    /// By [`Origin`].
    pub routes: [Route; 3],
    /// `sessionAffinity: ClientIP` with its timeout in seconds (1 to 86,400).
    pub affinity_s: Option<u32>,
    /// Who may send, for [`FrontendKind::LoadBalancer`] only: pods and others outside are dropped. Complete: it is
    /// `spec.loadBalancerSourceRanges` of the family, and the load balancer's own addresses when the node may send
    /// (its packets may have them as their source). Whether the node itself may is in [`Frontend::routes`] already,
    /// which drop when it may not; never look at the ranges for [`Origin::Node`].
    pub source_ranges: Option<Arc<[IpNet]>>,
}

impl Frontend {
    /// The route of one origin.
    pub const fn route(&self, origin: Origin) -> Route {
        self.routes[origin as usize]
    }
}

/// One endpoint of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    /// The endpoint's address.
    pub addr: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
    /// Whether it is about to end and serves because nothing else does.
    pub terminating: bool,
}

/// Which object a [`ServiceId`] stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceMeta {
    /// Namespace of the Service (of the Pod, for a host port).
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Name of the port; empty when it has none.
    pub port_name: Arc<str>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Family of frontends and backends.
    pub family: Family,
    /// Whether clients beyond the cluster can reach it: such services get consistent (Maglev) hashing.
    pub external: bool,
}

/// One step from a table to the next. Applied in order, every prefix of a list leaves a table in which each frontend
/// names a service that exists and, by [`Target::Set`], a set that is not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableChange {
    /// A service port appeared, or what is known of it changed.
    Service(ServiceId, ServiceMeta),
    /// A service port is gone; its frontends and sets went before.
    ServiceGone(ServiceId),
    /// The backends of a set, complete, sorted by (address, port), never empty; `None` when it is empty or unused.
    Set(SetId, Option<Arc<[Backend]>>),
    /// A frontend appeared or changed.
    Frontend(FrontendKey, Frontend),
    /// A frontend is gone.
    FrontendGone(FrontendKey),
    /// An address that belongs to services alone (a cluster IP, or an address of our own pools): ports without a
    /// frontend are rejected there.
    Vip(IpAddr),
    /// Such an address is no longer used.
    VipGone(IpAddr),
}

/// What the table needs to know about the node it is for.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NodeView {
    /// `metadata.name`.
    pub name: String,
    /// `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    /// Every address of the node.
    pub addresses: Vec<IpAddr>,
    /// Those at which node ports answer.
    pub node_port_addresses: Vec<IpAddr>,
    /// Where pods have their addresses: senders in there are [`Origin::Pod`].
    pub pod_cidrs: Vec<IpNet>,
    /// Ranges of cluster IPs, when known: packets to addresses in there that no service has are dropped.
    pub service_cidrs: Vec<IpNet>,
    /// Ranges of load balancer addresses that are given out here: like cluster IPs, they belong to services alone
    /// ([`TableChange::Vip`]).
    pub load_balancer_pools: Vec<IpNet>,
    /// Whether everything that reaches a cluster IP is masqueraded.
    pub masquerade_all: bool,
}
