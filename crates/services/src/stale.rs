//! Which tracked flows have lost their endpoint.

use std::net::IpAddr;

use crate::{
    decide::frontend,
    service_table::ServiceTable,
    table::{NodeView, Protocol, SetKind},
};

/// A flow as connection tracking knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedFlow {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Where the client sent.
    pub dst: IpAddr,
    /// The port there.
    pub dst_port: u16,
    /// Who answers: the endpoint, or the destination itself when nothing was translated.
    pub reply_src: IpAddr,
    /// The port there.
    pub reply_port: u16,
}

/// Whether a flow should be forgotten, so that its next packet is given an endpoint that exists.
///
/// UDP only: a client without a connection goes on sending for ever, to an endpoint that is gone or (when the service
/// had none as the flow began) to nobody. TCP and SCTP notice by themselves, and what is about to end may finish. A
/// flow of a service that has no endpoint stays, as there is nothing better for it.
pub fn is_stale(table: &ServiceTable, view: &NodeView, flow: &TrackedFlow) -> bool {
    if flow.protocol != Protocol::Udp {
        return false;
    }
    let Some((_, found)) = frontend(table, view, flow.dst, flow.dst_port, flow.protocol) else {
        return false;
    };
    let sets = [SetKind::Cluster, SetKind::Local].map(|kind| table.set(found.service, kind));
    let (addr, port) = (flow.reply_src.to_canonical(), flow.reply_port);
    let serves = |set: &&[_]| {
        set.binary_search_by_key(&(addr, port), |backend: &crate::table::Backend| {
            (backend.addr, backend.port)
        })
        .is_ok()
    };
    !sets.iter().all(|set| set.is_empty()) && !sets.iter().any(serves)
}
