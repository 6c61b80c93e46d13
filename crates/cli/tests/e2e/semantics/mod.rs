//! Every semantic of a Service with real packets, in one lab for each mode: clients in pods, on nodes and beyond the
//! cluster, and what they have to meet.
//!
//! `SEMANTICS=word` tries those whose name contains the word.

mod affinity;
mod changes;
mod client;
mod datagrams;
mod policies;
mod reach;
mod scene;
mod topology;

use scene::Scene;

use crate::lab::can_run;

/// A check by its name. Each has Services of its own and leaves the pods as they were.
type Check = (&'static str, fn(&mut Scene));

const CHECKS: &[Check] = &[
    ("several ports, several protocols, every type of address", reach::addresses),
    ("a pod that reaches itself", reach::hairpin),
    ("fragments and errors", reach::fragments_and_errors),
    ("external IP that no node has", reach::external_ip),
    ("source ranges of a load balancer", reach::source_ranges),
    ("named target ports that differ between pods", reach::named_ports),
    ("internalTrafficPolicy Local", policies::internal_local),
    ("internalTrafficPolicy Local, endpoint with the node's network", policies::internal_local_of_host),
    ("externalTrafficPolicy Local and its health-check node port", policies::external_local),
    ("terminating endpoints", policies::terminating),
    ("endpoints of pods that are not ready", policies::readiness),
    ("endpoints of pods that have failed", policies::failed_pods),
    ("session affinity", affinity::sticks),
    ("session affinity and its timeout", affinity::times_out),
    ("session affinity, switched on and off", affinity::switches),
    ("labels of Services that are somebody else's", changes::labels),
    ("types that change", changes::types),
    ("ports that change", changes::ports),
    ("up, down and made again", changes::up_and_down),
    ("UDP: sockets follow their backend", datagrams::backend_cycles),
    ("UDP: the server's pod is made again", datagrams::pod_is_made_again),
    ("UDP: endpoints that become ready", datagrams::endpoints_become_ready),
    ("trafficDistribution", topology::distribution),
    ("the API server does not answer", changes::api_server_away),
];

fn semantics(name: &'static str, mode: &'static str) {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(name, mode, &[]);
    for (what, check) in CHECKS {
        scene.run(what, *check);
    }
    scene.end();
}

#[test]
fn semantics_by_ebpf() {
    semantics("sem_ebpf", "ebpf");
}

#[test]
fn semantics_by_nftables() {
    semantics("sem_nft", "nftables");
}

#[test]
fn semantics_by_iptables() {
    semantics("sem_ipt", "iptables");
}
