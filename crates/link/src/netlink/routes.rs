//! Routes of the main table, and route lookups.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::libc;

use super::Netlink;
use crate::socket::{Attributes, ip, number};
use crate::{Error, Result};

const RTMSG: usize = 12;
const RTNEXTHOP: usize = 8;
const RTAX_MTU: u16 = 2;
const RTNH_F_ONLINK: u32 = 4;

/// A unicast route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination; `0.0.0.0/0` or `::/0` for the default route.
    pub dst: IpNet,
    /// Gateway; none when the destination is on the link.
    pub via: Option<IpAddr>,
    /// Index of the outgoing link.
    pub dev: u32,
    /// Source address that the kernel picks for local sockets.
    pub src: Option<IpAddr>,
    /// MTU of the route in bytes, where it is not that of the link.
    pub mtu: Option<u32>,
    /// The destination is on the link (RT_SCOPE_LINK; IPv4 only, IPv6 has no scopes).
    pub scope_link: bool,
    /// Take the gateway to be on the link even when no address of the link covers it.
    pub onlink: bool,
    /// Who made the route (`rtm_protocol`); Podway's is [`crate::ROUTE_PROTOCOL`].
    pub protocol: u8,
}

/// Which routes to list. The kernel does the filtering.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouteFilter {
    /// Only this family; both when none.
    pub ipv6: Option<bool>,
    /// Only through this link.
    pub dev: Option<u32>,
    /// Only of this protocol.
    pub protocol: Option<u8>,
}

/// Where the kernel would send a packet for an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteTo {
    /// Index of the outgoing link.
    pub dev: u32,
    /// Gateway; none when the destination is on the link.
    pub via: Option<IpAddr>,
    /// Source address that the kernel picks.
    pub src: Option<IpAddr>,
    /// MTU of the route in bytes, where it is not that of the link (a route's own, or a learned path MTU).
    pub mtu: Option<u32>,
    /// The address is one of this namespace's own.
    pub local: bool,
}

impl Netlink {
    /// Adds a route, or replaces the one to the same destination (of the same metric).
    ///
    /// # Errors
    /// When there is no such link or it is down, the gateway is not reachable, families are mixed, or the
    /// process may not.
    pub fn replace_route(&mut self, route: &Route) -> Result<()> {
        const OPERATION: &str = "replace route";
        let mut message = message(OPERATION, route)?;
        if route.onlink {
            message.header.flags |= RouteFlags::Onlink;
        }
        if let Some(src) = route.src {
            message.attributes.push(RouteAttribute::PrefSource(src.into()));
        }
        if let Some(mtu) = route.mtu {
            message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        }
        let message = RouteNetlinkMessage::NewRoute(message);
        self.socket.request(OPERATION, &object(route), message, NLM_F_CREATE | NLM_F_REPLACE).map(drop)
    }

    /// Deletes the route with this destination, gateway, link and protocol. Returns false when there is
    /// none.
    ///
    /// # Errors
    /// When families are mixed or the process may not.
    pub fn delete_route(&mut self, route: &Route) -> Result<bool> {
        const OPERATION: &str = "delete route";
        let mut message = message(OPERATION, route)?;
        if !route.scope_link {
            // "Any scope": a route without gateway may have been stored as link or as universe.
            message.header.scope = RouteScope::NoWhere;
        }
        match self.socket.request(OPERATION, &object(route), RouteNetlinkMessage::DelRoute(message), 0) {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.errno(), Some(Errno::ESRCH | Errno::ENODEV | Errno::ENETUNREACH)) => {
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Unicast routes of the main table. A route with several next hops comes as one [`Route`] for each.
    ///
    /// # Errors
    /// When there is no such link or the kernel does not answer.
    pub fn routes(&mut self, filter: RouteFilter) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for (ipv6, family) in [(false, AddressFamily::Inet), (true, AddressFamily::Inet6)] {
            if filter.ipv6.is_some_and(|only| only != ipv6) {
                continue;
            }
            let protocol = filter.protocol.unwrap_or_default();
            let found = self.dump_routes(family, RouteType::Unicast, protocol, filter.dev, decode_routes)?;
            routes.extend(found.into_iter().filter(|route| {
                filter.dev.is_none_or(|dev| dev == route.dev)
                    && filter.protocol.is_none_or(|protocol| protocol == route.protocol)
            }));
        }
        Ok(routes)
    }

    /// Adds the route that refuses a destination: whoever sends there gets an ICMP error at once. More specific
    /// routes go before it. One that is there already is left alone.
    ///
    /// # Errors
    /// When a route of another kind to the very same destination is there, or the process may not.
    pub fn add_unreachable(&mut self, dst: IpNet, protocol: u8) -> Result<()> {
        const OPERATION: &str = "add unreachable route";
        let message = RouteNetlinkMessage::NewRoute(unreachable(dst, protocol));
        match self.socket.request(OPERATION, &dst.to_string(), message, NLM_F_CREATE | NLM_F_EXCL) {
            Err(e) if e.is_exists() && self.unreachable_routes(protocol)?.contains(&dst.trunc()) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Deletes what [`Self::add_unreachable`] made. Returns false when there is none.
    ///
    /// # Errors
    /// When the process may not.
    pub fn delete_unreachable(&mut self, dst: IpNet, protocol: u8) -> Result<bool> {
        const OPERATION: &str = "delete unreachable route";
        let mut message = unreachable(dst, protocol);
        message.header.scope = RouteScope::NoWhere;
        match self.socket.request(OPERATION, &dst.to_string(), RouteNetlinkMessage::DelRoute(message), 0) {
            Ok(_) => Ok(true),
            Err(e) if e.errno() == Some(Errno::ESRCH) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Destinations of the main table's unreachable routes of a protocol.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn unreachable_routes(&mut self, protocol: u8) -> Result<Vec<IpNet>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            found.extend(self.dump_routes(
                family,
                RouteType::Unreachable,
                protocol,
                None,
                decode_unreachable,
            )?);
        }
        found.retain(|(_, of)| *of == protocol);
        Ok(found.into_iter().map(|(dst, _)| dst).collect())
    }

    /// The routes of one family and type in the main table. The kernel filters where it can.
    fn dump_routes<T>(
        &mut self,
        family: AddressFamily,
        kind: RouteType,
        protocol: u8,
        dev: Option<u32>,
        decode: impl Fn(&[u8]) -> Vec<T>,
    ) -> Result<Vec<T>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = kind;
        message.header.protocol = protocol.into();
        message.attributes.push(RouteAttribute::Table(RouteHeader::RT_TABLE_MAIN.into()));
        message.attributes.extend(dev.map(RouteAttribute::Oif));
        let message = RouteNetlinkMessage::GetRoute(message);
        let found = self.socket.dump("list", "routes", &message, |kind, payload| {
            if kind == libc::RTM_NEWROUTE { Some(decode(payload)) } else { None }
        });
        match found {
            Ok(found) => Ok(found.into_iter().flatten().collect()),
            // No table yet: nothing was ever routed in this family; or no such family.
            Err(e) if matches!(e.errno(), Some(Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP)) => {
                Ok(Vec::new())
            }
            Err(e) => Err(e),
        }
    }

    /// Asks the kernel how it would reach an address; none when it would not.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn route_to(&mut self, destination: IpAddr) -> Result<Option<RouteTo>> {
        const OPERATION: &str = "look up route";
        let object = format!("to {destination}");
        let mut message = RouteMessage::default();
        message.header.address_family = family(destination);
        message.header.destination_prefix_length = IpNet::from(destination).prefix_len();
        message.attributes.push(RouteAttribute::Destination(destination.into()));
        match self.socket.request(OPERATION, &object, RouteNetlinkMessage::GetRoute(message), 0) {
            Ok(answers) => {
                let found = answers.iter().find(|(kind, _)| *kind == libc::RTM_NEWROUTE);
                Ok(found.and_then(|(_, payload)| decode_lookup(payload)))
            }
            Err(e)
                if matches!(
                    e.errno(),
                    // The last two are prohibit and blackhole routes.
                    Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES | Errno::EINVAL)
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn message(operation: &'static str, route: &Route) -> Result<RouteMessage> {
    let ipv4 = route.dst.addr().is_ipv4();
    if [route.via, route.src].into_iter().flatten().any(|address| address.is_ipv4() != ipv4) {
        let cause = "destination, via and src must be of the same address family";
        return Err(Error::invalid(operation, object(route), cause));
    }
    if route.dev == 0 {
        return Err(Error::invalid(operation, object(route), "dev is 0; interface indexes begin at 1"));
    }
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.dst.addr());
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.destination_prefix_length = route.dst.prefix_len();
    if route.scope_link {
        message.header.scope = RouteScope::Link;
    }
    message.attributes.push(RouteAttribute::Destination(route.dst.network().into()));
    message.attributes.push(RouteAttribute::Oif(route.dev));
    if let Some(via) = route.via {
        message.attributes.push(RouteAttribute::Gateway(via.into()));
    }
    Ok(message)
}

/// No link, and scope universe, as the kernel wants it of a route that leads nowhere.
fn unreachable(dst: IpNet, protocol: u8) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(dst.addr());
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unreachable;
    message.header.protocol = RouteProtocol::from(protocol);
    message.header.destination_prefix_length = dst.prefix_len();
    message.attributes.push(RouteAttribute::Destination(dst.network().into()));
    message
}

fn object(route: &Route) -> String {
    match route.via {
        Some(via) => format!("{} via {via} dev {}", route.dst, route.dev),
        None => format!("{} dev {}", route.dst, route.dev),
    }
}

/// The parts of a route message that matter here.
struct Decoded<'a> {
    family: u8,
    dst_len: u8,
    table: u32,
    protocol: u8,
    scope: u8,
    kind: u8,
    flags: u32,
    dst: Option<IpAddr>,
    src: Option<IpAddr>,
    via: Option<IpAddr>,
    dev: Option<u32>,
    mtu: Option<u32>,
    hops: &'a [u8],
}

impl Decoded<'_> {
    fn destination(&self) -> Option<IpNet> {
        let any: IpAddr = match i32::from(self.family) {
            libc::AF_INET => std::net::Ipv4Addr::UNSPECIFIED.into(),
            libc::AF_INET6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        IpNet::new(self.dst.unwrap_or(any), self.dst_len).ok()
    }
}

fn decode(payload: &[u8]) -> Option<Decoded<'_>> {
    let [family, dst_len, _, _, table, protocol, scope, kind] = *payload.first_chunk()?;
    let mut route = Decoded {
        family,
        dst_len,
        table: table.into(),
        protocol,
        scope,
        kind,
        flags: number(payload.get(8..)?)?,
        dst: None,
        src: None,
        via: None,
        dev: None,
        mtu: None,
        hops: &[],
    };
    for (kind, value) in Attributes(payload.get(RTMSG..)?) {
        match kind {
            libc::RTA_DST => route.dst = ip(value),
            libc::RTA_PREFSRC => route.src = ip(value),
            libc::RTA_GATEWAY => route.via = ip(value),
            libc::RTA_VIA => route.via = value.get(2..).and_then(ip),
            libc::RTA_OIF => route.dev = number(value),
            libc::RTA_TABLE => route.table = number(value)?,
            libc::RTA_MULTIPATH => route.hops = value,
            libc::RTA_METRICS => {
                route.mtu =
                    Attributes(value).find(|(kind, _)| *kind == RTAX_MTU).and_then(|(_, v)| number(v));
            }
            _ => {}
        }
    }
    Some(route)
}

/// Decodes a route of the main table, once for each next hop. Other tables, other types (blackhole, local,
/// …) and cached exceptions give nothing.
pub(crate) fn decode_routes(payload: &[u8]) -> Vec<Route> {
    let Some(route) = decode(payload) else { return Vec::new() };
    let cloned = route.flags & libc::RTM_F_CLONED != 0;
    if route.table != u32::from(libc::RT_TABLE_MAIN) || route.kind != libc::RTN_UNICAST || cloned {
        return Vec::new();
    }
    let Some(dst) = route.destination() else { return Vec::new() };
    let one = |dev: u32, via: Option<IpAddr>, flags: u32| Route {
        dst,
        via,
        dev,
        src: route.src,
        mtu: route.mtu,
        scope_link: route.scope == libc::RT_SCOPE_LINK,
        onlink: flags & RTNH_F_ONLINK != 0,
        protocol: route.protocol,
    };
    match route.dev {
        Some(dev) if route.hops.is_empty() => vec![one(dev, route.via, route.flags)],
        _ => next_hops(route.hops).map(|(dev, via, flags)| one(dev, via, flags)).collect(),
    }
}

/// Destination and protocol of an unreachable route of the main table.
fn decode_unreachable(payload: &[u8]) -> Vec<(IpNet, u8)> {
    let route = decode(payload)
        .filter(|r| r.table == u32::from(libc::RT_TABLE_MAIN) && r.kind == libc::RTN_UNREACHABLE);
    route.and_then(|r| Some((r.destination()?, r.protocol))).into_iter().collect()
}

/// The `struct rtnexthop`s of RTA_MULTIPATH: link, gateway, flags.
fn next_hops(mut rest: &[u8]) -> impl Iterator<Item = (u32, Option<IpAddr>, u32)> + '_ {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let hop = rest.get(..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let flags = u32::from(*hop.get(2)?);
        let dev = number(hop.get(4..)?)?;
        let via = Attributes(hop.get(RTNEXTHOP..)?).find_map(|(kind, value)| match kind {
            libc::RTA_GATEWAY => ip(value),
            libc::RTA_VIA => value.get(2..).and_then(ip),
            _ => None,
        });
        Some((dev, via, flags))
    })
}

fn decode_lookup(payload: &[u8]) -> Option<RouteTo> {
    let route = decode(payload)?;
    if !matches!(route.kind, libc::RTN_UNICAST | libc::RTN_LOCAL) {
        return None;
    }
    Some(RouteTo {
        dev: route.dev?,
        via: route.via,
        src: route.src,
        mtu: route.mtu,
        local: route.kind == libc::RTN_LOCAL,
    })
}
