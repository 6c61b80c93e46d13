//! What the table means for one packet: the definition that every writer's mechanism must agree with.

use std::net::IpAddr;

use crate::{
    service_table::ServiceTable,
    table::{Family, Frontend, FrontendAddr, FrontendKey, NodeView, Origin, Protocol, Target},
};

/// The first packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

/// Whether a packet may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It goes on, to one of the destinations if there are any.
    Accept,
    /// The sender is told at once.
    Reject,
    /// It is discarded in silence.
    Drop,
}

/// What happens to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The frontend that took it.
    pub frontend: Option<FrontendKey>,
    /// Where it may go, all of them equally likely, sorted.
    pub destinations: Vec<(IpAddr, u16)>,
    /// Whether the node's address replaces its source, whichever destination it gets.
    pub masquerade: bool,
    /// Whether the sender is one of the destinations: on the way to itself it is masqueraded in any case.
    pub hairpin: bool,
    /// Whether it may go on.
    pub verdict: Verdict,
    /// No service has anything to do with it.
    pub untouched: bool,
}

impl Decision {
    fn without_destination(frontend: Option<FrontendKey>, verdict: Verdict, untouched: bool) -> Self {
        Self { frontend, destinations: Vec::new(), masquerade: false, hairpin: false, verdict, untouched }
    }
}

/// Who sends from an address. The node's own addresses go before the ranges of pods, which may contain some.
pub fn origin(view: &NodeView, src: &IpAddr) -> Origin {
    let src = src.to_canonical();
    if src.is_loopback() || view.addresses.contains(&src) {
        Origin::Node
    } else if view.pod_cidrs.iter().any(|range| range.contains(&src)) {
        Origin::Pod
    } else {
        Origin::External
    }
}

/// The frontend that takes packets to (address, port, protocol): one of that very address goes before one of every
/// node address.
pub fn frontend<'a>(
    table: &'a ServiceTable,
    view: &NodeView,
    dst: IpAddr,
    port: u16,
    protocol: Protocol,
) -> Option<(FrontendKey, &'a Frontend)> {
    let dst = dst.to_canonical();
    let at = |addr| {
        let key = FrontendKey { addr, port, protocol };
        table.frontends.get(&key).map(|frontend| (key, frontend))
    };
    at(FrontendAddr::Ip(dst)).or_else(|| {
        let serves = view.node_port_addresses.contains(&dst);
        serves.then(|| at(FrontendAddr::Node(Family::of(&dst)))).flatten()
    })
}

/// What happens to the first packet of a flow on a node.
pub fn decide(table: &ServiceTable, view: &NodeView, flow: &Flow) -> Decision {
    let (src, dst) = (flow.src.to_canonical(), flow.dst.to_canonical());
    let Some((key, found)) = frontend(table, view, dst, flow.port, flow.protocol) else {
        return if table.vips.contains(&dst) {
            Decision::without_destination(None, Verdict::Reject, false)
        } else if view.service_cidrs.iter().any(|range| range.contains(&dst)) {
            Decision::without_destination(None, Verdict::Drop, false)
        } else {
            Decision::without_destination(None, Verdict::Accept, true)
        };
    };
    let origin = origin(view, &src);
    if let Some(ranges) = &found.source_ranges
        && origin != Origin::Node
        && !ranges.iter().any(|range| range.contains(&src))
    {
        return Decision::without_destination(Some(key), Verdict::Drop, false);
    }
    let route = found.route(origin);
    match route.target {
        Target::Reject => Decision::without_destination(Some(key), Verdict::Reject, false),
        Target::Drop => Decision::without_destination(Some(key), Verdict::Drop, false),
        Target::Set(kind) => {
            let set = table.set(found.service, kind);
            Decision {
                frontend: Some(key),
                destinations: set.iter().map(|backend| (backend.addr, backend.port)).collect(),
                masquerade: route.masquerade,
                hairpin: set.iter().any(|backend| backend.addr == src),
                verdict: Verdict::Accept,
                untouched: false,
            }
        }
    }
}
