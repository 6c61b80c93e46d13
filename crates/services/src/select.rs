//! Which endpoints serve: readiness with its fall-backs, traffic policies, topology.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use podway_model::{
    EndpointSlice, Service,
    endpoint_slice::{AddressType, Endpoint},
    service::TrafficPolicy,
};

use crate::table::{Backend, Family, NodeView, Protocol};

/// The slices of one Service, by name.
pub(crate) type Slices = BTreeMap<Arc<str>, EndpointSlice>;

/// Whether an endpoint is in a set of backends, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// It is.
    Used,
    /// It is about to end, and used since nothing is ready.
    UsedTerminating,
    /// It is not ready.
    NotReady,
    /// It is about to end, and others are ready.
    Terminating,
    /// Its hints are for other zones, and there are endpoints for the node's own.
    OtherZone,
    /// Its hints are for other nodes, and there are endpoints for this one.
    OtherNode,
    /// It is on another node, and the set is of this node's endpoints.
    Remote,
    /// The same address and port is in another slice (or earlier in this one), in a better state.
    Duplicate,
    /// No traffic policy of the Service needs the set.
    SetUnused,
}

impl Choice {
    /// Whether it is in the set.
    pub const fn is_used(self) -> bool {
        matches!(self, Choice::Used | Choice::UsedTerminating)
    }
}

/// An endpoint at a port.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) addr: IpAddr,
    pub(crate) port: u16,
    pub(crate) local: bool,
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) slice: &'a str,
}

impl Candidate<'_> {
    fn key(&self) -> (IpAddr, u16) {
        (self.addr, self.port)
    }

    /// Of two endpoints with one address and port the one that can do more is believed: an address that was given to
    /// another pod is still in the slice of the old one, terminating. Then the local one.
    fn rank(&self) -> (bool, bool, bool, bool) {
        let e = self.endpoint;
        (!e.ready, !e.serving, e.terminating, !self.local)
    }

    fn serves_while_terminating(&self) -> bool {
        self.endpoint.serving && self.endpoint.terminating
    }

    fn backend(&self) -> Backend {
        Backend { addr: self.addr, port: self.port, local: self.local, terminating: !self.endpoint.ready }
    }
}

/// The endpoints of a service port in all slices, sorted by address and port, the best of each pair first.
pub(crate) fn gather<'a>(
    slices: &'a Slices,
    port_name: &str,
    protocol: Protocol,
    family: Family,
    node: &str,
) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::new();
    for (name, slice) in slices {
        if slice.address_type != AddressType::Ip(family) {
            continue;
        }
        for port in slice.ports.iter().filter(|p| p.protocol == protocol && *p.name == *port_name) {
            candidates.extend(slice.endpoints.iter().map(|endpoint| Candidate {
                addr: endpoint.addr,
                port: port.port,
                local: endpoint.node.as_deref() == Some(node),
                endpoint,
                slice: name,
            }));
        }
    }
    candidates.sort_by(|a, b| a.key().cmp(&b.key()).then_with(|| a.rank().cmp(&b.rank())));
    candidates
}

/// Leaves one of each address and port.
pub(crate) fn dedup(candidates: &mut Vec<Candidate<'_>>) {
    candidates.dedup_by_key(|candidate| candidate.key());
}

/// Which sets the traffic policies of a service need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Uses {
    pub(crate) cluster: bool,
    pub(crate) local: bool,
}

impl Uses {
    /// `external`: whether clients beyond the cluster have an address to use. They are why `internalTrafficPolicy:
    /// Local` alone does not do without the cluster-wide set, and the only ones whom `externalTrafficPolicy` concerns.
    pub(crate) fn of(service: &Service, external: bool) -> Self {
        let internal_local = service.internal_policy == TrafficPolicy::Local;
        let external_local = service.external_policy == TrafficPolicy::Local && external;
        Self { cluster: !internal_local || external, local: internal_local || external_local }
    }
}

/// Whom the cluster-wide set is limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Anyone,
    Zone,
    Node,
}

/// What the endpoints of a service port come to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Selection<'a> {
    uses: Uses,
    topology: Topology,
    node: &'a str,
    zone: &'a str,
    any_ready: bool,
    local_ready: bool,
    /// Whether anything serves anywhere.
    pub(crate) any: bool,
}

impl<'a> Selection<'a> {
    /// `candidates` without duplicates.
    pub(crate) fn new(candidates: &[Candidate<'_>], uses: Uses, view: &'a NodeView) -> Self {
        let (node, zone) = (view.name.as_str(), view.zone.as_deref().unwrap_or_default());
        let mut selection = Self {
            uses,
            topology: Topology::Anyone,
            node,
            zone,
            any_ready: false,
            local_ready: false,
            any: false,
        };
        let (mut all_node_hints, mut for_node) = (true, false);
        let (mut all_zone_hints, mut for_zone) = (true, false);
        for candidate in candidates {
            let endpoint = candidate.endpoint;
            if !endpoint.ready {
                selection.any |= candidate.serves_while_terminating();
                continue;
            }
            selection.any_ready = true;
            selection.local_ready |= candidate.local;
            all_node_hints &= !endpoint.node_hints().is_empty();
            for_node |= names(endpoint.node_hints(), node);
            all_zone_hints &= !endpoint.zone_hints().is_empty();
            for_zone |= names(endpoint.zone_hints(), zone);
        }
        selection.any |= selection.any_ready;
        // Hints are used only when every ready endpoint has them and some are meant for here: anything else means
        // that they are being rolled out, or that nobody planned for this node.
        if all_node_hints && for_node {
            selection.topology = Topology::Node;
        } else if all_zone_hints && for_zone {
            selection.topology = Topology::Zone;
        }
        selection
    }

    /// Whether an endpoint is in the cluster-wide set.
    pub(crate) fn cluster(&self, candidate: &Candidate<'_>) -> Choice {
        if !self.uses.cluster {
            return Choice::SetUnused;
        }
        let endpoint = candidate.endpoint;
        if !endpoint.ready {
            return not_ready(candidate, self.any_ready);
        }
        match self.topology {
            Topology::Node if !names(endpoint.node_hints(), self.node) => Choice::OtherNode,
            Topology::Zone if !names(endpoint.zone_hints(), self.zone) => Choice::OtherZone,
            _ => Choice::Used,
        }
    }

    /// Whether an endpoint is in the set of this node.
    pub(crate) fn local(&self, candidate: &Candidate<'_>) -> Choice {
        if !self.uses.local {
            Choice::SetUnused
        } else if !candidate.local {
            Choice::Remote
        } else if candidate.endpoint.ready {
            Choice::Used
        } else {
            not_ready(candidate, self.local_ready)
        }
    }

    /// The two sets.
    pub(crate) fn sets(&self, candidates: &[Candidate<'_>]) -> (Vec<Backend>, Vec<Backend>) {
        let of = |used: bool, choice: &dyn Fn(&Candidate<'_>) -> Choice| {
            if !used {
                return Vec::new();
            }
            candidates.iter().filter(|c| choice(c).is_used()).map(Candidate::backend).collect()
        };
        (of(self.uses.cluster, &|c| self.cluster(c)), of(self.uses.local, &|c| self.local(c)))
    }
}

fn not_ready(candidate: &Candidate<'_>, others_are: bool) -> Choice {
    match (candidate.serves_while_terminating(), others_are) {
        (true, false) => Choice::UsedTerminating,
        (true, true) => Choice::Terminating,
        (false, _) => Choice::NotReady,
    }
}

/// Whether a name is among hints; an unknown (empty) name never is.
fn names(hints: &[Arc<str>], name: &str) -> bool {
    !name.is_empty() && hints.iter().any(|hint| **hint == *name)
}
