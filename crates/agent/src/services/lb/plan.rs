//! Who gets which address, and which node answers for it. Pure.
//!
//! What a Service has it keeps, for as long as a pool serves it and nobody older has it, too; so the plan made from
//! its own result is the same plan. Who came first is served first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Value, json};

use super::pool::Pool;
use super::service::{ANNOUNCED_BY, LbService, ObjectName, POOL};

/// What the plan follows from.
#[derive(Debug)]
pub(crate) struct Inputs<'a> {
    /// Services that have, had or want an address.
    pub(crate) services: &'a BTreeMap<ObjectName, LbService>,
    /// All pools.
    pub(crate) pools: &'a [Pool],
    /// Nodes that can answer for an address now.
    pub(crate) nodes: &'a BTreeSet<String>,
    /// Nodes that can go on answering for an address that they have: these, and some more.
    pub(crate) keepers: &'a BTreeSet<String>,
    /// For a Service with `externalTrafficPolicy: Local`: nodes with an endpoint that serves.
    pub(crate) local_nodes: &'a BTreeMap<ObjectName, BTreeSet<String>>,
}

/// What has to be written to a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Write {
    /// Which.
    pub(crate) name: ObjectName,
    /// Its UID.
    pub(crate) uid: String,
    /// Merge patch of the object.
    pub(crate) object: Option<Value>,
    /// Merge patch of its status, to be written afterwards: whoever sees the address sees whose it is.
    pub(crate) status: Option<Value>,
    /// Reason and message of an event, when the addresses change.
    pub(crate) event: Option<(&'static str, String)>,
}

/// Why a Service has not what it wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Which.
    pub(crate) name: ObjectName,
    /// Its UID.
    pub(crate) uid: String,
    /// One CamelCase word.
    pub(crate) reason: &'static str,
    /// What is wrong and what to do.
    pub(crate) message: String,
}

/// The plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Services that differ from it.
    pub(crate) writes: Vec<Write>,
    /// Services that do not get what they want.
    pub(crate) problems: Vec<Problem>,
    /// Addresses in use, by pool.
    pub(crate) used: BTreeMap<String, usize>,
}

/// An address that a Service has in the plan, and the pool that it is from.
type Given = (IpAddr, String);

/// Makes the plan.
#[must_use]
pub(crate) fn plan(inputs: &Inputs<'_>) -> Plan {
    let mut order: Vec<&LbService> = inputs.services.values().filter(|s| s.wanted).collect();
    order.sort_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)));
    let mut allocator = Allocator { inputs, taken: BTreeMap::new(), problems: Vec::new() };
    let mut given: BTreeMap<&ObjectName, Vec<Given>> = BTreeMap::new();
    for service in &order {
        given.insert(&service.name, allocator.keep(service));
    }
    for service in &order {
        let has = given.remove(&service.name).unwrap_or_default();
        given.insert(&service.name, allocator.complete(service, has));
    }
    let mut used = BTreeMap::<String, BTreeSet<IpAddr>>::new();
    for (address, pool) in given.values().flatten() {
        used.entry(pool.clone()).or_default().insert(*address);
    }
    let announcers = announcers(inputs, &order, &given);
    let mut plan = Plan {
        problems: allocator.problems,
        used: used.into_iter().map(|(pool, addresses)| (pool, addresses.len())).collect(),
        writes: Vec::new(),
    };
    for service in inputs.services.values() {
        let has = given.get(&service.name).map_or(&[][..], Vec::as_slice);
        let announcer = announcers.get(&service.name);
        plan.writes.extend(difference(service, has, announcer));
    }
    plan
}

struct Allocator<'a> {
    inputs: &'a Inputs<'a>,
    /// Who has an address.
    taken: BTreeMap<IpAddr, Vec<&'a LbService>>,
    problems: Vec<Problem>,
}

impl<'a> Allocator<'a> {
    fn problem(&mut self, service: &LbService, reason: &'static str, message: String) {
        self.problems.push(Problem { name: service.name.clone(), uid: service.uid.clone(), reason, message });
    }

    /// The addresses that a Service has already and keeps.
    fn keep(&mut self, service: &'a LbService) -> Vec<Given> {
        let mut kept = Vec::new();
        if service.pool.is_none() || service.bad_request.is_some() {
            return kept;
        }
        for &address in &service.ingress {
            if !service.families[usize::from(address.is_ipv6())]
                || kept.iter().any(|(k, _): &Given| k.is_ipv4() == address.is_ipv4())
                || !(service.requested.is_empty() || service.requested.contains(&address))
            {
                continue;
            }
            let serving = |p: &&Pool| p.serves(service) && p.contains(address);
            let Some(pool) = self.inputs.pools.iter().find(serving) else {
                let message = format!("{address} is no longer in a pool that serves {}", service.title());
                self.problem(service, "LoadBalancerAddressReleased", message);
                continue;
            };
            if let Some((other, why)) = self.conflict(service, address) {
                let message = format!("{address} stays with {}, which is older: {why}", other.title());
                self.problem(service, "LoadBalancerAddressTaken", message);
                continue;
            }
            self.taken.entry(address).or_default().push(service);
            kept.push((address, pool.name.clone()));
        }
        kept
    }

    /// Who has an address and does not share it with this Service.
    fn conflict(&self, service: &LbService, address: IpAddr) -> Option<(&'a LbService, String)> {
        let holders = self.taken.get(&address).map_or(&[][..], Vec::as_slice);
        holders.iter().find_map(|other| service.may_share_with(other).err().map(|why| (*other, why)))
    }

    /// Adds what is missing.
    fn complete(&mut self, service: &'a LbService, mut has: Vec<Given>) -> Vec<Given> {
        if let Some(why) = &service.bad_request {
            self.problem(service, "LoadBalancerRequestInvalid", why.clone());
            return has;
        }
        for v6 in [false, true] {
            if !service.families[usize::from(v6)] || has.iter().any(|(a, _)| a.is_ipv6() == v6) {
                continue;
            }
            let requested = service.requested.iter().copied().find(|a| a.is_ipv6() == v6);
            let found = match requested {
                Some(address) => self.requested(service, address),
                // Who names the addresses wants these and no others.
                None if !service.requested.is_empty() => continue,
                None => self.shared(service, v6).map_or_else(|| self.free(service, v6, !has.is_empty()), Ok),
            };
            match found {
                Ok(given) => {
                    self.taken.entry(given.0).or_default().push(service);
                    has.push(given);
                }
                Err(Some((reason, message))) => self.problem(service, reason, message),
                Err(None) => {}
            }
        }
        has
    }

    fn requested(
        &self,
        service: &LbService,
        address: IpAddr,
    ) -> Result<Given, Option<(&'static str, String)>> {
        let Some(pool) = self.inputs.pools.iter().find(|p| p.serves(service) && p.contains(address)) else {
            let elsewhere = self.inputs.pools.iter().find(|p| p.contains(address));
            let hint = elsewhere.map_or_else(
                || "no pool has it".to_owned(),
                |p| format!("pool {} has it, but is not for this Service", p.name),
            );
            let message = format!("{} asks for {address}: {hint}", service.title());
            return Err(Some(("LoadBalancerRequestRefused", message)));
        };
        match self.conflict(service, address) {
            None => Ok((address, pool.name.clone())),
            Some((other, why)) => {
                let message = format!(
                    "{} asks for {address} of pool {}, which {} has: {why}",
                    service.title(),
                    pool.name,
                    other.title()
                );
                Err(Some(("LoadBalancerRequestRefused", message)))
            }
        }
    }

    /// An address of somebody who shares with this Service.
    fn shared(&self, service: &LbService, v6: bool) -> Option<Given> {
        service.share_key.as_ref()?;
        self.taken.iter().filter(|(a, holders)| a.is_ipv6() == v6 && !holders.is_empty()).find_map(
            |(address, holders)| {
                let all = holders.iter().all(|other| service.may_share_with(other).is_ok());
                let pool = self.inputs.pools.iter().find(|p| p.serves(service) && p.contains(*address))?;
                all.then(|| (*address, pool.name.clone()))
            },
        )
    }

    fn free(
        &self,
        service: &LbService,
        v6: bool,
        has_other_family: bool,
    ) -> Result<Given, Option<(&'static str, String)>> {
        let mut pools: Vec<&Pool> =
            self.inputs.pools.iter().filter(|p| p.serves(service) && p.has_family(v6)).collect();
        // Pools that were made for such Services first, so that the others keep room for the rest.
        pools.sort_by_key(|p| (!p.is_special(), &p.name));
        for pool in &pools {
            if let Some(address) = pool.free(v6, |a| self.taken.contains_key(&a)) {
                return Ok((address, pool.name.clone()));
            }
        }
        let family = if v6 { "IPv6" } else { "IPv4" };
        if pools.is_empty() {
            // A Service of both families in a cluster with pools of one is served in that one.
            if has_other_family {
                return Err(None);
            }
            let message = format!(
                "no pool with {family} addresses serves {}; make a LoadBalancerPool, or widen serviceSelector or \
                 namespaces of one",
                service.title()
            );
            return Err(Some(("LoadBalancerNoPool", message)));
        }
        let names: Vec<String> = pools.iter().map(ToString::to_string).collect();
        let message = format!(
            "no {family} address is free for {}: pool {} is exhausted; add addresses or delete Services",
            service.title(),
            names.join(", pool ")
        );
        Err(Some(("LoadBalancerPoolExhausted", message)))
    }
}

/// One node for each Service with addresses; the same one for all that share an address.
fn announcers(
    inputs: &Inputs<'_>,
    order: &[&LbService],
    given: &BTreeMap<&ObjectName, Vec<Given>>,
) -> BTreeMap<ObjectName, String> {
    let nobody = BTreeSet::new();
    let mut by_address: BTreeMap<IpAddr, String> = BTreeMap::new();
    let mut out = BTreeMap::new();
    for service in order {
        let addresses = given.get(&service.name).map_or(&[][..], Vec::as_slice);
        let Some((first, _)) = addresses.first() else { continue };
        let with = service.local.then(|| inputs.local_nodes.get(&service.name).unwrap_or(&nobody));
        let serves = |node: &String| with.is_none_or(|with| with.contains(node));
        let decided = addresses.iter().find_map(|(a, _)| by_address.get(a)).cloned();
        // Moving an address breaks connections: it stays where it is while it can.
        let stays = service.announced_by.clone().filter(|node| inputs.keepers.contains(node) && serves(node));
        let candidates = inputs.nodes.iter().filter(|node| serves(node));
        let chosen = decided
            .or(stays)
            .or_else(|| candidates.max_by_key(|node| weight(&first.to_string(), node)).cloned());
        if let Some(node) = chosen {
            for (address, _) in addresses {
                by_address.entry(*address).or_insert_with(|| node.clone());
            }
            out.insert(service.name.clone(), node);
        }
    }
    out
}

/// Rendezvous hashing: every address has an order of nodes of its own.
fn weight(address: &str, node: &str) -> u32 {
    crc32fast::hash(format!("{node}\0{address}").as_bytes())
}

fn difference(service: &LbService, has: &[Given], announcer: Option<&String>) -> Option<Write> {
    let addresses: Vec<IpAddr> = has.iter().map(|(a, _)| *a).collect();
    let pool = has.first().map(|(_, pool)| pool.clone());
    // Addresses that somebody else wrote are somebody else's, for as long as we have none for this Service.
    if pool.is_none() && service.pool.is_none() {
        return None;
    }
    let mut annotations = serde_json::Map::new();
    if pool != service.pool {
        annotations.insert(POOL.to_owned(), json!(pool));
    }
    if announcer != service.announced_by.as_ref() {
        annotations.insert(ANNOUNCED_BY.to_owned(), json!(announcer));
    }
    let same =
        service.ingress.len() == addresses.len() && addresses.iter().all(|a| service.ingress.contains(a));
    let status = (!same || (addresses.is_empty() && service.has_ingress)).then(|| {
        let ingress: Vec<Value> = addresses.iter().map(|a| json!({"ip": a, "ipMode": "VIP"})).collect();
        json!({"status": {"loadBalancer": {"ingress": if ingress.is_empty() { Value::Null } else { json!(ingress) }}}})
    });
    let object = (!annotations.is_empty()).then(|| json!({"metadata": {"annotations": annotations}}));
    if status.is_none() && object.is_none() {
        return None;
    }
    let list =
        |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let event = (!same).then(|| {
        if addresses.is_empty() {
            ("LoadBalancerReleased", format!("{} released", list(&service.ingress)))
        } else {
            let pool = pool.as_deref().unwrap_or_default();
            ("LoadBalancerAssigned", format!("{} from pool {pool}", list(&addresses)))
        }
    });
    Some(Write { name: service.name.clone(), uid: service.uid.clone(), object, status, event })
}
