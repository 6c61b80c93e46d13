//! What a starting agent makes of what it finds: pure.
//!
//! The kernel is the truth for what is attached. A link with our alias is a pod's, and it *lives* when anything
//! says which addresses it has: its entry in the datapath's tables, its host routes, or its lease. One that is
//! marked as gone, or of which nothing is known (the agent died early in an ADD), is *doomed*. A lease without a
//! link ends: the pod's namespace went away while nobody looked. What an interrupted ADD left alive goes with
//! the DEL or GC of the runtime, which never got an answer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use podway_bpf_host::Endpoint;

use crate::ids::AttachmentId;
use crate::leases::pool::{Lease, Owner};

/// A host-side link with one of our aliases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundLink {
    /// Interface index.
    pub ifindex: u32,
    /// From the alias.
    pub id: AttachmentId,
    /// Marked as detached.
    pub gone: bool,
    /// Index of the pod's side in its namespace.
    pub peer_index: Option<u32>,
    /// Destinations of the host routes through it.
    pub routes: Vec<IpAddr>,
}

/// What is to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Attachments that live, with their link. The lease is what the journal is to hold.
    pub live: Vec<(FoundLink, Lease)>,
    /// Of these, the ones whose entry in the datapath's tables is missing or wrong.
    pub incomplete: BTreeSet<AttachmentId>,
    /// Links to delete.
    pub doomed: Vec<FoundLink>,
    /// Entries in the datapath's tables without a living link.
    pub orphans: Vec<u32>,
    /// Leases to end.
    pub ended: Vec<AttachmentId>,
    /// What looked wrong, for the log.
    pub remarks: Vec<String>,
}

/// Brings links, table entries and leases together.
#[must_use]
pub fn plan(links: Vec<FoundLink>, endpoints: &[Endpoint], leases: &[Lease], now: u64) -> Plan {
    let endpoints: BTreeMap<u32, &Endpoint> = endpoints.iter().map(|e| (e.ifindex, e)).collect();
    let leases: BTreeMap<&AttachmentId, &Lease> = leases.iter().map(|l| (&l.id, l)).collect();
    let mut plan = Plan::default();
    let mut taken: BTreeMap<IpAddr, AttachmentId> = BTreeMap::new();
    // Links that the datapath knows come first: of two that claim an address, the complete one keeps it.
    let mut links = links;
    links.sort_by_key(|l| (!endpoints.contains_key(&l.ifindex), l.ifindex));
    for link in links {
        if link.gone {
            plan.doomed.push(link);
            continue;
        }
        let endpoint = endpoints.get(&link.ifindex).filter(|e| e.pod_mac == link.id.pod_mac());
        let leased = leases.get(&link.id);
        let addresses = match (endpoint, leased) {
            (Some(endpoint), _) => in_order(&endpoint.addresses, leased.map(|l| l.addresses.as_slice())),
            // A lease is the whole set; routes may be half of it when the ADD was interrupted.
            (None, Some(lease)) => lease.addresses.clone(),
            (None, None) => in_order(&link.routes, None),
        };
        if addresses.is_empty() {
            plan.doomed.push(link);
            continue;
        }
        if let Some((address, holder)) = addresses.iter().find_map(|a| taken.get(a).map(|h| (*a, h.clone())))
        {
            plan.remarks.push(format!(
                "{} and {holder} both have {address}: removing the link of the former",
                link.id
            ));
            plan.doomed.push(link);
            continue;
        }
        taken.extend(addresses.iter().map(|a| (*a, link.id.clone())));
        if endpoint.is_none_or(|e| e.host_mac != link.id.host_mac() || e.addresses.is_empty()) {
            plan.incomplete.insert(link.id.clone());
        }
        let lease = match leased {
            Some(lease) if lease.addresses == addresses => (*lease).clone(),
            Some(lease) => Lease { addresses, ..(*lease).clone() },
            None => Lease { id: link.id.clone(), addresses, owner: Owner::default(), at: now },
        };
        plan.live.push((link, lease));
    }
    let living: BTreeSet<u32> = plan.live.iter().map(|(l, _)| l.ifindex).collect();
    plan.orphans = endpoints.keys().copied().filter(|i| !living.contains(i)).collect();
    let attached: BTreeSet<&AttachmentId> = plan.live.iter().map(|(l, _)| &l.id).collect();
    plan.ended = leases.keys().filter(|id| !attached.contains(**id)).map(|id| (*id).clone()).collect();
    plan
}

/// The addresses in the order of the lease when it has the same ones, IPv4 first otherwise.
fn in_order(addresses: &[IpAddr], lease: Option<&[IpAddr]>) -> Vec<IpAddr> {
    let mut sorted = addresses.to_vec();
    sorted.sort_unstable();
    if let Some(lease) = lease {
        let mut same = lease.to_vec();
        same.sort_unstable();
        if same == sorted {
            return lease.to_vec();
        }
    }
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> AttachmentId {
        AttachmentId::new(format!("c{n}"), "eth0")
    }

    fn addr(n: u32) -> IpAddr {
        format!("10.0.0.{n}").parse().unwrap()
    }

    fn link(n: u32, routes: &[u32]) -> FoundLink {
        let routes = routes.iter().map(|r| addr(*r)).collect();
        FoundLink { ifindex: n, id: id(n), gone: false, peer_index: Some(2), routes }
    }

    fn endpoint(n: u32, address: u32) -> Endpoint {
        Endpoint {
            id: n,
            ifindex: n,
            pod_mac: id(n).pod_mac(),
            host_mac: id(n).host_mac(),
            addresses: vec![addr(address)],
            queued: false,
        }
    }

    fn lease(n: u32, address: u32) -> Lease {
        let owner = Owner { pod: Some(format!("ns/p{n}")), ..Owner::default() };
        Lease { id: id(n), addresses: vec![addr(address)], owner, at: 5 }
    }

    /// `live`, `incomplete`, `doomed`, `orphans`, `ended` in one line.
    fn shown(plan: &Plan) -> String {
        let live: Vec<String> =
            plan.live.iter().map(|(l, lease)| format!("{}={}", l.ifindex, lease.addresses[0])).collect();
        let incomplete: Vec<&str> = plan.incomplete.iter().map(|i| i.container_id.as_str()).collect();
        let doomed: Vec<u32> = plan.doomed.iter().map(|l| l.ifindex).collect();
        let ended: Vec<&str> = plan.ended.iter().map(|i| i.container_id.as_str()).collect();
        format!(
            "live {live:?} incomplete {incomplete:?} doomed {doomed:?} orphans {:?} ended {ended:?}",
            plan.orphans
        )
        .replace('"', "")
    }

    #[test]
    fn what_is_found_decides() {
        let gone = FoundLink { gone: true, ..link(1, &[1]) };
        type Case<'a> = (&'a str, Vec<FoundLink>, Vec<Endpoint>, Vec<Lease>, &'a str);
        let cases: Vec<Case<'_>> = vec![
            (
                "all is well",
                vec![link(1, &[1])],
                vec![endpoint(1, 1)],
                vec![lease(1, 1)],
                "live [1=10.0.0.1] incomplete [] doomed [] orphans [] ended []",
            ),
            (
                "the journal is lost",
                vec![link(1, &[1])],
                vec![endpoint(1, 1)],
                vec![],
                "live [1=10.0.0.1] incomplete [] doomed [] orphans [] ended []",
            ),
            (
                "journal and pins are lost",
                vec![link(1, &[1])],
                vec![],
                vec![],
                "live [1=10.0.0.1] incomplete [c1] doomed [] orphans [] ended []",
            ),
            (
                "the pins are lost",
                vec![link(1, &[])],
                vec![],
                vec![lease(1, 1)],
                "live [1=10.0.0.1] incomplete [c1] doomed [] orphans [] ended []",
            ),
            (
                "the journal remembers another address",
                vec![link(1, &[1])],
                vec![endpoint(1, 1)],
                vec![lease(1, 7)],
                "live [1=10.0.0.1] incomplete [] doomed [] orphans [] ended []",
            ),
            (
                "died after the DEL was marked",
                vec![gone.clone()],
                vec![],
                vec![lease(1, 1)],
                "live [] incomplete [] doomed [1] orphans [] ended [c1]",
            ),
            (
                "died after the DEL was answered",
                vec![gone],
                vec![],
                vec![],
                "live [] incomplete [] doomed [1] orphans [] ended []",
            ),
            (
                "a link of which nothing is known",
                vec![link(1, &[])],
                vec![],
                vec![],
                "live [] incomplete [] doomed [1] orphans [] ended []",
            ),
            (
                "the namespace went away",
                vec![],
                vec![endpoint(1, 1)],
                vec![lease(1, 1)],
                "live [] incomplete [] doomed [] orphans [1] ended [c1]",
            ),
            (
                "leased, then died",
                vec![],
                vec![],
                vec![lease(1, 1)],
                "live [] incomplete [] doomed [] orphans [] ended [c1]",
            ),
            (
                "two claim an address",
                vec![link(1, &[1]), link(2, &[1])],
                vec![endpoint(2, 1)],
                vec![],
                "live [2=10.0.0.1] incomplete [] doomed [1] orphans [] ended []",
            ),
            (
                "an entry of an interface index that is another's now",
                vec![link(2, &[2])],
                vec![Endpoint { ifindex: 2, ..endpoint(1, 1) }],
                vec![lease(2, 2)],
                "live [2=10.0.0.2] incomplete [c2] doomed [] orphans [] ended []",
            ),
        ];
        for (what, links, endpoints, leases, want) in cases {
            let plan = plan(links, &endpoints, &leases, 9);
            assert_eq!(shown(&plan), want, "{what}");
        }
    }

    #[test]
    fn the_owner_survives_and_the_order_of_the_lease_counts() {
        let mut both = lease(1, 1);
        both.addresses = vec!["fd00::1".parse().unwrap(), addr(1)];
        let mut known = endpoint(1, 1);
        known.addresses.push("fd00::1".parse().unwrap());
        let plan = plan(vec![link(1, &[1])], &[known], std::slice::from_ref(&both), 9);
        assert_eq!(plan.live[0].1, both);
    }
}
