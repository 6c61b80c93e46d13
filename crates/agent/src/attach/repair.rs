//! Compares the node's side of every pod with what ADD made of it, and puts right what is different: links that
//! were set down, routes, addresses and neighbours that were deleted, entries that left the datapath.
//!
//! Reads everything at once, so that a node full of pods costs a handful of requests. What is wrong is looked at
//! again with the turn of the attachment: a DEL may be at work on it.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use podway_bpf_host::Endpoint;
use podway_link::{FoundTbf, Link, Netlink, ROUTE_PROTOCOL, RouteFilter};
use tracing::warn;

use super::{AttachError, Attached, Attacher, endpoint, in_map_order, lock, shape, steps};
use crate::config::GATEWAY_V6;
use crate::ids::AttachmentId;
use crate::network::{NodeAddresses, pod_link};
use crate::repair::Repair;

/// What the kernel has for all pods.
struct Found {
    links: HashMap<u32, Link>,
    /// Links that have the gateway address.
    gateways: BTreeSet<u32>,
    routes: HashMap<(u32, IpNet), Option<IpAddr>>,
    /// None when they are not to be compared this time.
    endpoints: Option<Vec<Endpoint>>,
    /// Limits on links, likewise.
    limits: Option<Vec<FoundTbf>>,
}

impl Attacher {
    /// Puts the node's side of the pods right. `thorough` also compares what takes a request for each pod
    /// (neighbours), and what nobody changes by mistake (the datapath's tables); programs are attached anew
    /// then, which replaces those that are there without a packet noticing.
    ///
    /// # Errors
    /// The kernel does not tell what there is. A single pod that cannot be put right is logged.
    pub fn repair(&self, thorough: bool) -> Result<Vec<Repair>, AttachError> {
        // Before the kernel is read: what is attached later is no concern of this look.
        let attached = self.alive();
        if attached.is_empty() {
            return Ok(Vec::new());
        }
        let mut netlink = self.socket()?;
        let limited = attached.iter().any(|(_, pod)| pod.owner.runtime.bandwidth.ingress.is_some());
        let found = self.found(&mut netlink, thorough, limited)?;
        let node = self.node();
        let mut repairs = Vec::new();
        for (id, pod) in attached {
            let Some(link) = found.links.get(&pod.ifindex) else { continue };
            if pod_link(link).is_some_and(|(_, gone)| gone) {
                continue;
            }
            let mut wrong = found.wrong(link, &id, &pod, node);
            if thorough {
                wrong.extend(wrong_neighbours(&mut netlink, &id, &pod)?);
            }
            if wrong.is_empty() && !thorough {
                continue;
            }
            let Ok(_turn) = self.turn(&id) else { continue };
            if lock(&self.attached).get(&id).is_none_or(|a| a.ifindex != pod.ifindex) {
                continue;
            }
            match self.put_right(&mut netlink, &id, &pod, &wrong, thorough) {
                Ok(missing) => {
                    if !missing.is_empty() {
                        let found = format!("{id}: {} had no {}", link.name, missing.join(" and no "));
                        repairs.push(Repair::new("pod_programs", found));
                    }
                    repairs.extend(wrong);
                }
                // The namespace of the pod went away, and the link with it.
                Err(AttachError::Link(e)) if e.is_not_found() => {}
                Err(error) => {
                    let wrong: Vec<&str> = wrong.iter().map(|r| r.detail.as_str()).collect();
                    warn!(attachment = %id, %error, ?wrong, "cannot put a pod right; trying again");
                }
            }
        }
        self.give_back(netlink);
        Ok(repairs)
    }

    fn found(&self, netlink: &mut Netlink, thorough: bool, limited: bool) -> Result<Found, AttachError> {
        let filter = RouteFilter { protocol: Some(ROUTE_PROTOCOL), ..RouteFilter::default() };
        let gateway = IpAddr::V6(GATEWAY_V6);
        Ok(Found {
            links: netlink.links()?.into_iter().map(|l| (l.index, l)).collect(),
            gateways: netlink
                .addresses()?
                .into_iter()
                .filter(|a| a.addr == gateway)
                .map(|a| a.index)
                .collect(),
            routes: netlink.routes(filter)?.into_iter().map(|r| ((r.dev, r.dst), r.src)).collect(),
            endpoints: if thorough { Some(self.datapath.endpoints()?) } else { None },
            limits: if thorough && limited { Some(netlink.tbfs()?) } else { None },
        })
    }

    /// Returns the programs that were missing.
    fn put_right(
        &self,
        netlink: &mut Netlink,
        id: &AttachmentId,
        pod: &Attached,
        wrong: &[Repair],
        thorough: bool,
    ) -> Result<Vec<&'static str>, AttachError> {
        // The programs first: nothing may pass a link that has none.
        let missing =
            if thorough || !wrong.is_empty() { self.datapath.attach_pod(pod.ifindex)? } else { Vec::new() };
        if wrong.is_empty() {
            return Ok(missing);
        }
        for repair in wrong {
            match repair.what {
                "pod_alias" => netlink.set_alias(pod.ifindex, &id.alias())?,
                "pod_mac" => netlink.set_mac(pod.ifindex, id.host_mac())?,
                "pod_endpoint" => {
                    self.datapath.set_endpoint(&endpoint(pod.ifindex, id, &pod.addresses, &pod.owner))?;
                }
                _ => {}
            }
        }
        steps::host_side(netlink, pod.ifindex, id, &pod.addresses, self.node(), &pod.owner.runtime)?;
        Ok(missing)
    }
}

impl Found {
    fn wrong(&self, link: &Link, id: &AttachmentId, pod: &Attached, node: NodeAddresses) -> Vec<Repair> {
        let mut wrong = Vec::new();
        let mut add = |what, text: String| wrong.push(Repair::new(what, format!("{id}: {text}")));
        let name = &link.name;
        if pod_link(link).is_none_or(|(found, _)| found != *id) {
            add("pod_alias", format!("{name} had lost its alias"));
        }
        if link.mac != id.host_mac() {
            add("pod_mac", format!("{name} had another hardware address"));
        }
        if !link.up {
            add("pod_link", format!("{name} was down"));
        }
        if pod.addresses.iter().any(IpAddr::is_ipv6) && !self.gateways.contains(&link.index) {
            add("pod_gateway", format!("{name} had lost {GATEWAY_V6}"));
        }
        for address in &pod.addresses {
            let wanted = steps::host_route(link.index, *address, node);
            match self.routes.get(&(link.index, wanted.dst)) {
                None => add("pod_route", format!("the route {} through {name} was missing", wanted.dst)),
                Some(src) if *src != wanted.src => {
                    add("pod_route", format!("the route {} through {name} had another source", wanted.dst));
                }
                Some(_) => {}
            }
        }
        if let Some(endpoints) = &self.endpoints
            && !endpoints.contains(&endpoint(link.index, id, &in_map_order(&pod.addresses), &pod.owner))
        {
            add("pod_endpoint", "the datapath did not know it".to_owned());
        }
        if let (Some(limits), Some(limit)) = (&self.limits, &pod.owner.runtime.bandwidth.ingress)
            && !limits.iter().any(|found| found.index == link.index && shape::keeps(found, limit))
        {
            add("pod_bandwidth", format!("the bandwidth of {name} was not limited"));
        }
        wrong
    }
}

fn wrong_neighbours(
    netlink: &mut Netlink,
    id: &AttachmentId,
    pod: &Attached,
) -> Result<Vec<Repair>, AttachError> {
    let found = match netlink.neighbours(pod.ifindex) {
        Ok(found) => found,
        Err(e) if e.is_not_found() => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let right = |address: &IpAddr| {
        found.iter().any(|n| n.addr == *address && n.permanent && n.mac == Some(id.pod_mac()))
    };
    let wrong = pod.addresses.iter().filter(|a| !right(a));
    Ok(wrong
        .map(|a| Repair::new("pod_neighbour", format!("{id}: the neighbour {a} was missing or wrong")))
        .collect())
}
