//! This node's part of the pod network in the kernel, pods apart: forwarding, the gateway address, the tunnel
//! device, the routes to other nodes' pods, and the MTU that follows the underlay.
//!
//! Every function brings what is there to what should be there and leaves alone what is right already, so it
//! may be called at any time and again after any interruption. What is ours is told from what is not by name
//! and alias (the tunnel device), by route protocol (routes) and by alias (pod links).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use podway_link::{
    Address, AddressFlags, Link, Netlink, Netns, ROUTE_PROTOCOL, Route, RouteFilter, VxlanSpec, sysctl,
};
use tracing::{info, warn};

use crate::config::{GATEWAY_V4, GATEWAY_V6, NetworkMode, TUNNEL_DEVICE};
use crate::ids::AttachmentId;
use crate::mtu::{self, PodMtu};
use crate::nodes::{OwnNode, View, WantedRoute};
use crate::repair::Repair;

/// The loopback is the first link of every namespace.
const LOOPBACK: u32 = 1;

/// Why the node's network is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused something.
    #[error(transparent)]
    Kernel(#[from] podway_link::Error),
    /// The Node's address is not on this machine, or nothing carries it.
    #[error("the underlay: {0}")]
    NoUplink(String),
    /// The underlay is too narrow.
    #[error("{0}")]
    Mtu(String),
    /// Somebody else has the tunnel's name.
    #[error("link {TUNNEL_DEVICE} is a {0}, not a VXLAN device: it is not Podway's; remove or rename it")]
    ForeignTunnel(String),
    /// The tunnel device cannot be made.
    #[error("the tunnel device: {source}{hint}")]
    Tunnel {
        /// What the kernel said.
        source: podway_link::Error,
        /// What to look at.
        hint: &'static str,
    },
}

/// The device that carries the traffic between nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
}

/// What is in place on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// The underlay device.
    pub uplink: Uplink,
    /// Interface index of the tunnel device; none in direct mode.
    pub tunnel: Option<u32>,
    /// The MTU in force.
    pub mtu: PodMtu,
    /// Where the node's own connections to pods come from.
    pub addresses: NodeAddresses,
}

/// The node's InternalIPs, as far as they are on this machine: the first of each family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeAddresses {
    /// The IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// The IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

impl NodeAddresses {
    /// The kernel refuses a route whose source is not an address of its own, or is not proven to be unique yet.
    fn choose(internal_ips: &[IpAddr], present: &[Address]) -> Self {
        let usable = |ip: &&IpAddr| present.iter().any(|a| a.addr == **ip && !a.tentative);
        let mut chosen = Self::default();
        for ip in internal_ips.iter().filter(usable) {
            match ip {
                IpAddr::V4(ip) => chosen.v4 = chosen.v4.or(Some(*ip)),
                IpAddr::V6(ip) => chosen.v6 = chosen.v6.or(Some(*ip)),
            }
        }
        chosen
    }

    /// The one of the same family as another address.
    #[must_use]
    pub fn of_family(self, other: IpAddr) -> Option<IpAddr> {
        if other.is_ipv4() { self.v4.map(IpAddr::V4) } else { self.v6.map(IpAddr::V6) }
    }
}

/// What a synchronisation of routes did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteReport {
    /// Routes added or changed.
    pub written: usize,
    /// Routes removed.
    pub removed: usize,
    /// Podcidrs that have no route now, with the reason.
    pub failed: BTreeMap<IpNet, String>,
}

/// The driver. Works in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Network {
    netlink: Netlink,
    mode: NetworkMode,
    explicit_mtu: Option<u32>,
    placed: Placed,
    repairs: Vec<Repair>,
}

/// What was right when this was last looked at: when it is not any more, somebody else changed it.
#[derive(Debug, Default)]
struct Placed {
    forwarding: bool,
    gateway: bool,
    tunnel: bool,
    routes: Vec<Route>,
    unreachable: BTreeSet<IpNet>,
}

impl Network {
    /// Opens the netlink socket.
    ///
    /// # Errors
    /// The kernel gives none.
    pub fn open(mode: NetworkMode, explicit_mtu: Option<u32>) -> Result<Self, NetworkError> {
        let netlink = Netlink::open()?;
        Ok(Self { netlink, mode, explicit_mtu, placed: Placed::default(), repairs: Vec::new() })
    }

    /// Makes everything that concerns this node alone: forwarding, gateway address, tunnel device, MTU.
    ///
    /// # Errors
    /// The Node's address is on no device, the underlay is too narrow, or the kernel refuses.
    pub fn ensure_local(&mut self, own: &OwnNode) -> Result<Local, NetworkError> {
        let present = self.netlink.addresses()?;
        let addresses = NodeAddresses::choose(&own.internal_ips, &present);
        let uplink = self.uplink(own, &present)?;
        let pods_v6 = own.pod_cidrs.iter().any(|c| matches!(c, IpNet::V6(_)));
        let pods_v4 = own.pod_cidrs.iter().any(|c| matches!(c, IpNet::V4(_)));
        let mtu = mtu::decide(
            &uplink.name,
            uplink.mtu,
            self.mode,
            own.underlay.is_ipv6(),
            pods_v6,
            self.explicit_mtu,
        )
        .map_err(NetworkError::Mtu)?;
        for changed in ensure_forwarding(&uplink.name)? {
            if self.placed.forwarding {
                self.repairs.push(Repair::new("forwarding", format!("{changed} was switched off")));
            }
        }
        self.placed.forwarding = true;
        if pods_v4 {
            let gateway = IpNet::from(IpAddr::V4(GATEWAY_V4));
            let flags = AddressFlags { link_scope: true, ..AddressFlags::default() };
            if self.netlink.add_address(LOOPBACK, gateway, flags)? && self.placed.gateway {
                self.repairs.push(Repair::new("gateway", format!("{GATEWAY_V4} was gone from the loopback")));
            }
            self.placed.gateway = true;
        }
        let tunnel = match self.mode {
            NetworkMode::Vxlan { port, .. } => Some(self.ensure_tunnel(port, mtu.mtu)?),
            NetworkMode::Direct => {
                self.remove_tunnel()?;
                None
            }
        };
        Ok(Local { uplink, tunnel, mtu, addresses })
    }

    /// What no node's pods may have for an address, with what it is: the prefixes of the devices that carry this
    /// node's addresses, its gateways, its own addresses on whatever device, and what never leaves a link or a
    /// machine. A route to such a podCIDR would cut this node off.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn reserved(&mut self, internal_ips: &[IpAddr]) -> Result<Vec<(IpNet, String)>, NetworkError> {
        let links = self.netlink.links()?;
        let name = |index: u32| links.iter().find(|l| l.index == index).map_or("?", |l| l.name.as_str());
        let of_pod = |index: u32| links.iter().any(|l| l.index == index && pod_link(l).is_some());
        let defaults: Vec<Route> = self
            .netlink
            .routes(RouteFilter::default())?
            .into_iter()
            .filter(|r| r.dst.prefix_len() == 0 && !of_pod(r.dev))
            .collect();
        let present = self.netlink.addresses()?;
        let mut uplinks: Vec<u32> = present
            .iter()
            .filter(|a| a.index != LOOPBACK && internal_ips.contains(&a.addr))
            .map(|a| a.index)
            .collect();
        if uplinks.is_empty() {
            // Not known yet, or on the loopback: see `uplink`.
            uplinks.extend(defaults.iter().map(|r| r.dev));
        }
        let mut reserved: Vec<(IpNet, String)> = Vec::new();
        for address in present.iter().filter(|a| uplinks.contains(&a.index) && !a.link_scope) {
            if let Ok(prefix) = IpNet::new(address.addr, address.prefix_len)
                && prefix.prefix_len() > 0
            {
                let prefix = prefix.trunc();
                reserved.push((prefix, format!("the underlay {prefix} ({})", name(address.index))));
            }
        }
        for via in defaults.iter().filter_map(|r| r.via) {
            reserved.push((via.into(), format!("the default gateway {via}")));
        }
        for address in present.iter().filter(|a| !of_pod(a.index)) {
            let what = format!("address {} of {} on this machine", address.addr, name(address.index));
            reserved.push((address.addr.into(), what));
        }
        for (range, what) in [
            ("169.254.0.0/16", "link-local addresses"),
            ("fe80::/10", "link-local addresses"),
            ("127.0.0.0/8", "loopback addresses"),
        ] {
            reserved.push((range.parse().expect("a valid prefix"), format!("the {what} {range}")));
        }
        reserved.dedup();
        Ok(reserved)
    }

    /// The device that holds the Node's address; when that is the loopback (addresses announced by a routing
    /// protocol), the one with the default route.
    fn uplink(&mut self, own: &OwnNode, addresses: &[Address]) -> Result<Uplink, NetworkError> {
        let Some(holder) = addresses.iter().find(|a| a.addr == own.underlay) else {
            return Err(NetworkError::NoUplink(format!(
                "address {} of Node {:?} is on no interface of this machine; check the Node's InternalIP and \
                 --node-name",
                own.underlay, own.name
            )));
        };
        let mut index = holder.index;
        if index == LOOPBACK {
            let default = self
                .netlink
                .routes(RouteFilter { ipv6: Some(own.underlay.is_ipv6()), ..RouteFilter::default() })?
                .into_iter()
                .find(|r| r.dst.prefix_len() == 0);
            index = default.map(|r| r.dev).ok_or_else(|| {
                NetworkError::NoUplink(format!(
                    "address {} is on the loopback and there is no default route",
                    own.underlay
                ))
            })?;
        }
        let link = self.netlink.link_by_index(index)?.ok_or_else(|| {
            NetworkError::NoUplink(format!("interface {index}, which held {}, is gone", own.underlay))
        })?;
        Ok(Uplink { index, name: link.name, mtu: link.mtu })
    }

    fn ensure_tunnel(&mut self, port: u16, mtu: u32) -> Result<u32, NetworkError> {
        // The kernel does not let the port of a device be changed; the alias remembers which one it has.
        let alias = format!("podway-tunnel:{port}");
        let wrap = |source: podway_link::Error| {
            let hint = match source.errno() {
                Some(nix::errno::Errno::EADDRINUSE | nix::errno::Errno::EEXIST) => {
                    "; another VXLAN device has this UDP port: remove it, or set --vxlan-port on all nodes"
                }
                _ => "",
            };
            NetworkError::Tunnel { source, hint }
        };
        let existing = self.netlink.link_by_name(TUNNEL_DEVICE)?;
        let link = match existing {
            Some(link) if link.kind.as_deref() != Some("vxlan") => {
                let kind = link.kind.unwrap_or_else(|| "device without a kind".into());
                return Err(NetworkError::ForeignTunnel(kind));
            }
            Some(link) if link.alias.as_deref() == Some(&alias) => link,
            other => {
                if let Some(stale) = other {
                    info!(alias = stale.alias.as_deref(), port, "replacing the tunnel device");
                    self.netlink.delete_link(stale.index)?;
                }
                let spec = VxlanSpec { name: TUNNEL_DEVICE.into(), port, mtu, mac: None, up: false };
                if self.placed.tunnel {
                    let found = format!("{TUNNEL_DEVICE} was deleted or replaced");
                    self.repairs.push(Repair::new("tunnel", found));
                }
                let link = self.netlink.create_vxlan(&spec).map_err(wrap)?;
                // Down until now, and that is no damage.
                self.placed.tunnel = false;
                self.netlink.set_addr_gen_none(link.index)?;
                self.netlink.set_alias(link.index, &alias)?;
                link
            }
        };
        if link.mtu != mtu {
            self.netlink.set_mtu(link.index, mtu)?;
        }
        if !link.up {
            if self.placed.tunnel {
                self.repairs.push(Repair::new("tunnel", format!("{TUNNEL_DEVICE} was down")));
            }
            self.netlink.set_up(link.index).map_err(wrap)?;
        }
        self.placed.tunnel = true;
        // A packet of another node itself comes out of the tunnel with a source that is routed over the
        // underlay: strict reverse-path filtering (RFC 3704) would drop it. Loose, whatever `all` says.
        sysctl::write_if_present(&format!("net/ipv4/conf/{TUNNEL_DEVICE}/rp_filter"), "2")?;
        // Loose filtering is strict on a device without an address. (Only what is forwarded into a pod by the stack
        // comes so far: where services are translated by rules.)
        let gateway = IpNet::from(IpAddr::V4(GATEWAY_V4));
        let flags = AddressFlags { link_scope: true, no_prefix_route: true, ..AddressFlags::default() };
        self.netlink.add_address(link.index, gateway, flags)?;
        Ok(link.index)
    }

    fn remove_tunnel(&mut self) -> Result<(), NetworkError> {
        if let Some(link) = self.netlink.link_by_name(TUNNEL_DEVICE)?
            && link.alias.as_deref().is_some_and(|a| a.starts_with("podway-tunnel:"))
        {
            info!("removing the tunnel device: the mode is direct");
            self.netlink.delete_link(link.index)?;
        }
        Ok(())
    }

    /// Makes the routes to other nodes' pods what the view says, and those of this node's own podCIDRs
    /// unreachable but for the addresses that a pod has, whose routes are more specific: what is for nobody must
    /// not follow the default route. One that cannot be made costs itself only.
    ///
    /// # Errors
    /// The kernel does not tell which routes there are.
    pub fn sync_routes(&mut self, view: &View, local: &Local) -> Result<RouteReport, NetworkError> {
        let pod_links: Vec<u32> =
            self.netlink.links()?.iter().filter(|l| pod_link(l).is_some()).map(|l| l.index).collect();
        let filter = RouteFilter { protocol: Some(ROUTE_PROTOCOL), ..RouteFilter::default() };
        let present: Vec<Route> =
            self.netlink.routes(filter)?.into_iter().filter(|r| !pod_links.contains(&r.dev)).collect();
        let mut report = RouteReport::default();
        let mut kept: Vec<IpNet> = Vec::new();
        let mut placed: Vec<Route> = Vec::with_capacity(view.routes.len());
        for wanted in &view.routes {
            let route = Route {
                dst: wanted.dst,
                via: wanted.via,
                dev: local.tunnel.unwrap_or(local.uplink.index),
                src: wanted.src,
                mtu: None,
                scope_link: wanted.via.is_none() && matches!(wanted.dst, IpNet::V4(_)),
                onlink: false,
                protocol: ROUTE_PROTOCOL,
            };
            if present.iter().any(|p| same(p, &route)) {
                kept.push(route.dst);
                placed.push(route);
                continue;
            }
            match self.add_route(wanted, &route) {
                Ok(()) => {
                    report.written += 1;
                    kept.push(route.dst);
                    if self.placed.routes.contains(&route) {
                        self.repairs
                            .push(Repair::new("route", format!("the route {} was missing", route.dst)));
                    }
                }
                Err(why) => {
                    report.failed.insert(route.dst, why);
                    continue;
                }
            }
            placed.push(route);
        }
        self.placed.routes = placed;
        for stale in present {
            // A replaced route with another device or gateway is gone already; deleting by all of its fields
            // cannot hit the new one.
            let right = view.routes.iter().any(|w| {
                w.dst == stale.dst
                    && kept.contains(&w.dst)
                    && w.via == stale.via
                    && stale.dev == local.tunnel.unwrap_or(local.uplink.index)
            });
            if right {
                continue;
            }
            if self.netlink.delete_route(&stale)? {
                report.removed += 1;
            }
        }
        self.sync_unreachable(&view.own.pod_cidrs, &mut report)?;
        Ok(report)
    }

    fn sync_unreachable(&mut self, cidrs: &[IpNet], report: &mut RouteReport) -> Result<(), NetworkError> {
        let present = self.netlink.unreachable_routes(ROUTE_PROTOCOL)?;
        for cidr in cidrs.iter().filter(|c| !present.contains(c)) {
            match self.netlink.add_unreachable(*cidr, ROUTE_PROTOCOL) {
                Ok(()) => {
                    report.written += 1;
                    if self.placed.unreachable.contains(cidr) {
                        let found = format!("the unreachable route {cidr} was missing");
                        self.repairs.push(Repair::new("route", found));
                    }
                }
                Err(why) => {
                    report.failed.insert(*cidr, why.to_string());
                }
            }
        }
        self.placed.unreachable = cidrs.iter().copied().collect();
        for stale in present.into_iter().filter(|p| !cidrs.contains(p)) {
            report.removed += usize::from(self.netlink.delete_unreachable(stale, ROUTE_PROTOCOL)?);
        }
        Ok(())
    }

    /// What was put right since this was asked last.
    pub fn take_repairs(&mut self) -> Vec<Repair> {
        std::mem::take(&mut self.repairs)
    }

    fn add_route(&mut self, wanted: &WantedRoute, route: &Route) -> Result<(), String> {
        if let Some(via) = wanted.via {
            let reached = self.netlink.route_to(via).map_err(|e| e.to_string())?;
            match reached {
                Some(to) if to.via.is_none() && !to.local => {}
                Some(to) => {
                    let through = to.via.map_or_else(|| "this node".to_owned(), |v| format!("router {v}"));
                    return Err(format!(
                        "node address {via} is reached through {through}, not directly: direct routing needs all \
                         nodes on one link; use --mode vxlan"
                    ));
                }
                None => return Err(format!("there is no route to node address {via}")),
            }
        }
        self.netlink.replace_route(route).map_err(|e| e.to_string())
    }

    /// Gives both sides of every pod's link, and the pod's routes, the MTU, where they have another. Returns the pods that were changed
    /// and those that could not be, with the reason.
    ///
    /// # Errors
    /// The kernel does not tell which links there are.
    pub fn follow_mtu(&mut self, mtu: u32) -> Result<(usize, BTreeMap<AttachmentId, String>), NetworkError> {
        let mut changed = 0;
        let mut failed = BTreeMap::new();
        let mut namespaces = None;
        for link in self.netlink.links()? {
            let Some((id, false)) = pod_link(&link) else { continue };
            if link.mtu == mtu {
                continue;
            }
            // Finding them takes a look at every process, so once for all pods.
            let namespaces = match &mut namespaces {
                Some(found) => found,
                empty => empty.insert(self.netlink.peer_namespaces()?),
            };
            let why = match link.peer_netnsid.and_then(|nsid| namespaces.get(&nsid)) {
                None => "its namespace has neither a process nor a name under /run/netns".to_owned(),
                Some(netns) => match set_pod_mtu(&mut self.netlink, &link, netns, mtu) {
                    Ok(()) => {
                        changed += 1;
                        continue;
                    }
                    // The pod went away meanwhile.
                    Err(e) if e.is_not_found() => continue,
                    Err(e) => e.to_string(),
                },
            };
            warn!(attachment = %id, mtu, why, "cannot set the MTU of a pod");
            failed.insert(id, why);
        }
        Ok((changed, failed))
    }
}

/// Sets the MTU of both sides and of the pod's default routes. The pod's part first: should this be interrupted,
/// the host's side still has the old one and shows that there is something left to do.
///
/// # Errors
/// A side is gone or refuses.
pub fn set_pod_mtu(
    netlink: &mut Netlink,
    link: &Link,
    netns: &Netns,
    mtu: u32,
) -> Result<(), podway_link::Error> {
    if let Some(index) = link.peer_index {
        set_mtu_inside(&mut Netlink::open_in(netns)?, index, mtu)?;
    }
    netlink.set_mtu(link.index, mtu)
}

/// No route ever promises more than its link carries: the routes shrink before it, and grow after it.
fn set_mtu_inside(netlink: &mut Netlink, index: u32, mtu: u32) -> Result<(), podway_link::Error> {
    let shrinks = netlink.link_by_index(index)?.is_some_and(|link| mtu < link.mtu);
    if shrinks {
        set_route_mtu(netlink, index, mtu)?;
    }
    netlink.set_mtu(index, mtu)?;
    if !shrinks {
        set_route_mtu(netlink, index, mtu)?;
    }
    Ok(())
}

fn set_route_mtu(netlink: &mut Netlink, index: u32, mtu: u32) -> Result<(), podway_link::Error> {
    let gateways = [Some(GATEWAY_V4.into()), Some(GATEWAY_V6.into())];
    // Those that ADD made; what else the pod has made for itself is its own business.
    let ours = |r: &Route| r.dst.prefix_len() == 0 && gateways.contains(&r.via) && r.mtu != Some(mtu);
    let filter = RouteFilter { dev: Some(index), ..RouteFilter::default() };
    for route in netlink.routes(filter)?.into_iter().filter(ours) {
        netlink.replace_route(&Route { mtu: Some(mtu), ..route })?;
    }
    Ok(())
}

/// The attachment whose host side a link is, and whether it waits for its deletion.
#[must_use]
pub fn pod_link(link: &Link) -> Option<(AttachmentId, bool)> {
    if link.kind.as_deref() != Some("veth") {
        return None;
    }
    AttachmentId::from_alias(link.alias.as_deref()?)
}

fn same(present: &Route, wanted: &Route) -> bool {
    present.dst == wanted.dst
        && present.via == wanted.via
        && present.dev == wanted.dev
        && present.src == wanted.src
        && present.mtu == wanted.mtu
}

/// Makes the node a router. Only ever switches on: others on the machine may rely on it, too. Returns the settings
/// that were off.
fn ensure_forwarding(uplink: &str) -> Result<Vec<&'static str>, NetworkError> {
    let mut changed = Vec::new();
    let forwarding = "net/ipv4/ip_forward";
    if sysctl::read(forwarding)? != "1" {
        sysctl::write(forwarding, "1")?;
        changed.push(forwarding);
    }
    let forwarding = "net/ipv6/conf/all/forwarding";
    match sysctl::read(forwarding) {
        Ok(value) if value == "1" => {}
        Ok(_) => {
            // A router ignores router advertisements (RFC 4861 section 6.2.7) and would lose the default route
            // that came with one. 2 means: accept them although forwarding.
            let accept_ra = format!("net/ipv6/conf/{uplink}/accept_ra");
            if sysctl::read(&accept_ra).is_ok_and(|v| v == "1") {
                sysctl::write(&accept_ra, "2")?;
            }
            sysctl::write(forwarding, "1")?;
            changed.push(forwarding);
        }
        // A kernel without IPv6.
        Err(e) if e.is_not_found() => {}
        Err(e) => return Err(e.into()),
    }
    Ok(changed)
}
