//! This node's part of the pod network in the kernel, pods apart: forwarding, the gateway address, the tunnel
//! device, the routes to other nodes' pods, and the MTU that follows the underlay.
//!
//! Every function brings what is there to what should be there and leaves alone what is right already, so it
//! may be called at any time and again after any interruption. What is ours is told from what is not by name
//! and alias (the tunnel device), by route protocol (routes) and by alias (pod links).

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use podway_link::{AddressFlags, Link, Netlink, ROUTE_PROTOCOL, Route, RouteFilter, VxlanSpec, sysctl};
use tracing::{info, warn};

use crate::config::{GATEWAY_V4, NetworkMode, TUNNEL_DEVICE};
use crate::ids::AttachmentId;
use crate::mtu::{self, PodMtu};
use crate::nodes::{OwnNode, View, WantedRoute};

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
}

impl Network {
    /// Opens the netlink socket.
    ///
    /// # Errors
    /// The kernel gives none.
    pub fn open(mode: NetworkMode, explicit_mtu: Option<u32>) -> Result<Self, NetworkError> {
        Ok(Self { netlink: Netlink::open()?, mode, explicit_mtu })
    }

    /// Makes everything that concerns this node alone: forwarding, gateway address, tunnel device, MTU.
    ///
    /// # Errors
    /// The Node's address is on no device, the underlay is too narrow, or the kernel refuses.
    pub fn ensure_local(&mut self, own: &OwnNode) -> Result<Local, NetworkError> {
        let uplink = self.uplink(own)?;
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
        ensure_forwarding(&uplink.name)?;
        if pods_v4 {
            let gateway = IpNet::from(IpAddr::V4(GATEWAY_V4));
            let flags = AddressFlags { link_scope: true, ..AddressFlags::default() };
            self.netlink.add_address(LOOPBACK, gateway, flags)?;
        }
        let tunnel = match self.mode {
            NetworkMode::Vxlan { port, .. } => Some(self.ensure_tunnel(port, mtu.mtu)?),
            NetworkMode::Direct => {
                self.remove_tunnel()?;
                None
            }
        };
        Ok(Local { uplink, tunnel, mtu })
    }

    /// The device that holds the Node's address; when that is the loopback (addresses announced by a routing
    /// protocol), the one with the default route.
    fn uplink(&mut self, own: &OwnNode) -> Result<Uplink, NetworkError> {
        let addresses = self.netlink.addresses()?;
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
                let link = self.netlink.create_vxlan(&spec).map_err(wrap)?;
                self.netlink.set_addr_gen_none(link.index)?;
                self.netlink.set_alias(link.index, &alias)?;
                link
            }
        };
        if link.mtu != mtu {
            self.netlink.set_mtu(link.index, mtu)?;
        }
        if !link.up {
            self.netlink.set_up(link.index).map_err(wrap)?;
        }
        // A packet of another node itself comes out of the tunnel with a source that is routed over the
        // underlay: strict reverse-path filtering (RFC 3704) would drop it. Loose, whatever `all` says.
        sysctl::write_if_present(&format!("net/ipv4/conf/{TUNNEL_DEVICE}/rp_filter"), "2")?;
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

    /// Makes the routes to other nodes' pods what the view says. One that cannot be made costs itself only.
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
                continue;
            }
            match self.add_route(wanted, &route) {
                Ok(()) => {
                    report.written += 1;
                    kept.push(route.dst);
                }
                Err(why) => {
                    report.failed.insert(route.dst, why);
                }
            }
        }
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
        Ok(report)
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

    /// Gives both sides of every pod's link the MTU, where they have another. Returns the pods that were changed
    /// and those that could not be, with the reason.
    ///
    /// # Errors
    /// The kernel does not tell which links there are.
    pub fn follow_mtu(&mut self, mtu: u32) -> Result<(usize, BTreeMap<AttachmentId, String>), NetworkError> {
        let mut changed = 0;
        let mut failed = BTreeMap::new();
        for link in self.netlink.links()? {
            let Some((id, false)) = pod_link(&link) else { continue };
            if link.mtu == mtu {
                continue;
            }
            match set_pod_mtu(&mut self.netlink, &link, mtu) {
                Ok(()) => changed += 1,
                // The pod went away meanwhile.
                Err(e) if e.is_not_found() => {}
                Err(e) => {
                    warn!(attachment = %id, mtu, error = %e, "cannot set the MTU of a pod");
                    failed.insert(id, e.to_string());
                }
            }
        }
        Ok((changed, failed))
    }
}

/// Sets the MTU of both sides. The pod's side first: should this be interrupted, the host's side still has the
/// old one and shows that there is something left to do.
///
/// # Errors
/// A side is gone or refuses.
pub fn set_pod_mtu(netlink: &mut Netlink, link: &Link, mtu: u32) -> Result<(), podway_link::Error> {
    if let (Some(nsid), Some(peer)) = (link.peer_netnsid, link.peer_index) {
        netlink.set_peer_mtu(nsid, peer, mtu)?;
    }
    netlink.set_mtu(link.index, mtu)
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

/// Makes the node a router. Only ever switches on: others on the machine may rely on it, too.
fn ensure_forwarding(uplink: &str) -> Result<(), NetworkError> {
    sysctl::write("net/ipv4/ip_forward", "1")?;
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
        }
        // A kernel without IPv6.
        Err(e) if e.is_not_found() => {}
        Err(e) => return Err(e.into()),
    }
    Ok(())
}
