//! What an attachment is made of in the kernel, links only.
//!
//! ```text
//!   pod namespace                              node
//!   eth0  10.244.1.7/32  ───── veth ─────  pw5f3a…   route 10.244.1.7/32, permanent neighbour
//!         default via 169.254.1.1                    169.254.1.1 is on lo
//!         default via fe80::1                        fe80::1/64
//! ```

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podway_bpf_host::Datapath;
use podway_cni::{AddResult, Interface, IpConfig, Route as CniRoute, RuntimeConfig};
use podway_link::{AddressFlags, Link, Netlink, Netns, ROUTE_PROTOCOL, Route, RouteFilter, VethSpec, sysctl};
use tracing::warn;

use super::{AttachError, Attached, shape};
use crate::config::{GATEWAY_V4, GATEWAY_V6};
use crate::ids::AttachmentId;
use crate::network::{NodeAddresses, pod_link};

/// RT_SCOPE_LINK (rtnetlink(7)).
const SCOPE_LINK: u8 = 253;
/// Links that are removed to make room for one pair: there may be one for each side, and either may come again.
const CLEARINGS: usize = 4;
/// Longest time that the kernel takes to notice that a link has a carrier (net/core/link_watch.c: a second).
const NOTICE_TIMEOUT: Duration = Duration::from_secs(2);

/// The host side of an attachment, marked as gone or not.
pub(super) fn find_link(netlink: &mut Netlink, id: &AttachmentId) -> Result<Option<Link>, AttachError> {
    let Some(link) = netlink.link_by_name(&id.host_link())? else { return Ok(None) };
    Ok(pod_link(&link).is_some_and(|(found, _)| found == *id).then_some(link))
}

/// Marks a link as detached: from now on, whoever finds it may delete it.
pub(super) fn mark_gone(netlink: &mut Netlink, ifindex: u32, id: &AttachmentId) -> Result<(), AttachError> {
    match netlink.set_alias(ifindex, &id.gone_alias()) {
        Err(e) if !e.is_not_found() => Err(e.into()),
        _ => Ok(()),
    }
}

/// Creates the pair, down, the pod's side in its namespace. A leftover of the same name is replaced.
pub(super) fn create_link(
    netlink: &mut Netlink,
    datapath: &Datapath,
    id: &AttachmentId,
    mtu: u32,
    netns: &Netns,
) -> Result<Link, AttachError> {
    let spec = VethSpec {
        name: id.host_link(),
        mtu,
        mac: Some(id.host_mac()),
        alias: Some(id.alias()),
        up: false,
        addr_gen_none: true,
        peer_name: id.ifname.clone(),
        peer_mac: Some(id.pod_mac()),
        peer_mtu: mtu,
        peer_ns: Some(netns),
    };
    let mut attempts = 0;
    loop {
        match netlink.create_veth(&spec) {
            Ok(link) => return Ok(link),
            Err(e) if e.is_exists() && attempts < CLEARINGS => attempts += 1,
            Err(e) => return Err(e.into()),
        }
        if let Some(other) = in_the_way(netlink, id, netns)? {
            datapath.remove_endpoint(other.index)?;
            netlink.delete_link(other.index)?;
        }
    }
}

/// The link of ours whose name, or whose pod side's name, the new pair needs and that may be deleted. None when
/// it has gone meanwhile.
fn in_the_way(netlink: &mut Netlink, id: &AttachmentId, netns: &Netns) -> Result<Option<Link>, AttachError> {
    let name = id.host_link();
    if let Some(other) = netlink.link_by_name(&name)? {
        // Only a leftover of an attachment of ours may go; of which one does not matter, since the caller has
        // the turn of this name.
        if pod_link(&other).is_none() {
            return Err(AttachError::InTheWay(format!("link {name} exists and is not Podway's; remove it")));
        }
        return Ok(Some(other));
    }
    // So it is the pod's side. An earlier attachment of the same namespace may be detached while its link still
    // waits for its deletion: that need not be waited for.
    let Some(inside) = Netlink::open_in(netns)?.link_by_name(&id.ifname)? else { return Ok(None) };
    let foreign = || {
        AttachError::InTheWay(format!(
            "the pod's namespace has an interface {} already, and it is not Podway's",
            id.ifname
        ))
    };
    // An index of this namespace only if the pair says the same of the other side.
    let Some(index) = inside.peer_index else { return Err(foreign()) };
    let Some(other) = netlink.link_by_index(index)? else {
        // Deleted in between, or in a namespace that is not this one.
        let still = Netlink::open_in(netns)?.link_by_index(inside.index)?.is_some();
        return if still { Err(foreign()) } else { Ok(None) };
    };
    let pair = other.peer_index == Some(inside.index)
        && other.peer_netnsid.is_some()
        && other.peer_netnsid == netlink.nsid(netns)?;
    match pod_link(&other).filter(|_| pair) {
        Some((_, true)) => Ok(Some(other)),
        Some((attached, false)) => Err(AttachError::InTheWay(format!(
            "interface {} of the pod's namespace belongs to attachment {attached}, which has had no DEL",
            id.ifname
        ))),
        None => Err(foreign()),
    }
}

/// Configures the host's side and sets it up.
pub(super) fn host_side(
    netlink: &mut Netlink,
    ifindex: u32,
    id: &AttachmentId,
    addresses: &[IpAddr],
    node: NodeAddresses,
    runtime: &RuntimeConfig,
) -> Result<(), AttachError> {
    if let Some(limit) = &runtime.bandwidth.ingress {
        netlink.set_tbf(ifindex, &shape::tbf(limit)).map_err(AttachError::Bandwidth)?;
    }
    // Answers to connections from the loopback come back through the link with a loopback address.
    if addresses.iter().any(IpAddr::is_ipv4)
        && runtime.port_mappings.iter().any(|m| m.host_ip.is_none_or(|ip| ip.is_ipv4()))
    {
        sysctl::write(&format!("net/ipv4/conf/{}/route_localnet", id.host_link()), "1")?;
    }
    if addresses.iter().any(IpAddr::is_ipv6) {
        let gateway = IpNet::new(IpAddr::V6(GATEWAY_V6), 64).expect("64 is a prefix length of IPv6");
        let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
        match netlink.add_address(ifindex, gateway, flags) {
            Ok(_) => {}
            Err(e) if e.is_permission() => {
                enable_ipv6(&id.host_link())?;
                netlink.add_address(ifindex, gateway, flags)?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    netlink.set_up(ifindex)?;
    for address in addresses {
        netlink.replace_neighbour(ifindex, *address, id.pod_mac())?;
        netlink.replace_route(&host_route(ifindex, *address, node))?;
    }
    Ok(())
}

/// The node's route to a pod. Its own processes reach the pod with the address that other nodes know, whatever
/// else is on the node (the gateway address on the loopback, fe80::1 on the link itself).
pub(super) fn host_route(ifindex: u32, address: IpAddr, node: NodeAddresses) -> Route {
    Route {
        dst: IpNet::from(address),
        via: None,
        dev: ifindex,
        src: node.of_family(address),
        mtu: None,
        scope_link: address.is_ipv4(),
        onlink: false,
        protocol: ROUTE_PROTOCOL,
    }
}

/// Waits until a link whose other side is up takes packets: until the kernel has noticed, it drops them.
pub(super) fn wait_operational(netlink: &mut Netlink, index: u32) -> Result<(), AttachError> {
    wait("the link takes no packets yet", index, || {
        Ok(netlink.link_by_index(index)?.is_none_or(|link| link.operational))
    })
}

/// Waits until the kernel takes packets for the pod's addresses: for IPv6 that is some time after the link is
/// operational, without duplicate address detection as well.
fn wait_local(netlink: &mut Netlink, index: u32, addresses: &[IpAddr]) -> Result<(), AttachError> {
    for address in addresses.iter().filter(|a| a.is_ipv6()) {
        wait("the address takes no packets yet", index, || {
            Ok(netlink.route_to(*address)?.is_some_and(|to| to.local))
        })?;
    }
    Ok(())
}

fn wait(
    what: &str,
    index: u32,
    mut done: impl FnMut() -> Result<bool, AttachError>,
) -> Result<(), AttachError> {
    let deadline = Instant::now() + NOTICE_TIMEOUT;
    while !done()? {
        if Instant::now() >= deadline {
            // It becomes so by itself; a pod that loses its first packets is better than none.
            warn!(index, "a new pod loses its first packets: {what}");
            break;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Configures the pod's side and sets it up. The link takes packets afterwards.
pub(super) fn pod_side(
    id: &AttachmentId,
    host: &Link,
    addresses: &[IpAddr],
    mtu: u32,
    netns: &Netns,
    runtime: &RuntimeConfig,
) -> Result<(), AttachError> {
    let mut netlink = Netlink::open_in(netns)?;
    let index = match host.peer_index {
        Some(index) => index,
        None => pod_link_index(&mut netlink, id)?,
    };
    if let Some(limit) = &runtime.bandwidth.egress {
        netlink.set_tbf(index, &shape::tbf(limit)).map_err(AttachError::Bandwidth)?;
    }
    for address in addresses {
        let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
        match netlink.add_address(index, IpNet::from(*address), flags) {
            Ok(_) => {}
            // Some runtimes create namespaces with IPv6 switched off.
            Err(e) if e.is_permission() && address.is_ipv6() => {
                netns.run(|| enable_ipv6(&id.ifname))??;
                netlink.add_address(index, IpNet::from(*address), flags)?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    netlink.set_up(index)?;
    for address in addresses {
        let gateway = gateway(*address);
        netlink.replace_neighbour(index, gateway, id.host_mac())?;
        for route in pod_routes(index, *address, mtu) {
            netlink.replace_route(&route)?;
        }
    }
    wait_operational(&mut netlink, index)?;
    wait_local(&mut netlink, index, addresses)
}

fn pod_link_index(netlink: &mut Netlink, id: &AttachmentId) -> Result<u32, AttachError> {
    netlink.link_by_name(&id.ifname)?.map(|l| l.index).ok_or_else(|| {
        AttachError::InTheWay(format!("interface {} has vanished from the pod's namespace", id.ifname))
    })
}

fn enable_ipv6(interface: &str) -> Result<(), podway_link::Error> {
    sysctl::write(&format!("net/ipv6/conf/{interface}/disable_ipv6"), "0")
}

fn gateway(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() }
}

/// The pod's routes of one family: the gateway (IPv4 only, fe80::/64 is on every link), then everything. The
/// latter says its MTU itself: it holds when somebody raises that of the link.
fn pod_routes(index: u32, address: IpAddr, mtu: u32) -> Vec<Route> {
    let route = |dst: IpNet, via: Option<IpAddr>| Route {
        dst,
        via,
        dev: index,
        src: None,
        mtu: via.map(|_| mtu),
        scope_link: via.is_none(),
        onlink: via.is_some(),
        // RTPROT_BOOT: what interface configuration in a container usually has.
        protocol: 3,
    };
    let gateway = gateway(address);
    let mut routes = Vec::with_capacity(2);
    if address.is_ipv4() {
        routes.push(route(IpNet::from(gateway), None));
    }
    routes.push(route(default_of(address), Some(gateway)));
    routes
}

fn default_of(address: IpAddr) -> IpNet {
    let unspecified: IpAddr = if address.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    IpNet::new(unspecified, 0).expect("0 is a prefix length of both families")
}

/// Says what is different from what ADD made, if anything.
pub(super) fn verify(
    netlink: &mut Netlink,
    id: &AttachmentId,
    attached: &Attached,
    netns: &Netns,
) -> Result<Option<String>, AttachError> {
    let Attached { ifindex, addresses, owner } = attached;
    let (ifindex, bandwidth) = (*ifindex, owner.runtime.bandwidth);
    let host = netlink.link_by_index(ifindex)?.filter(|l| pod_link(l).is_some_and(|(found, _)| found == *id));
    let Some(host) = host else { return Ok(Some(format!("link {} is gone", id.host_link()))) };
    if !host.up {
        return Ok(Some(format!("link {} is down", host.name)));
    }
    let routes = netlink.routes(RouteFilter { dev: Some(ifindex), ..RouteFilter::default() })?;
    if let Some(missing) = addresses.iter().find(|a| !routes.iter().any(|r| r.dst == IpNet::from(**a))) {
        return Ok(Some(format!("the node has no route to {missing} through {}", host.name)));
    }
    let mut inside = Netlink::open_in(netns)?;
    let Some(pod) = inside.link_by_name(&id.ifname)? else {
        return Ok(Some(format!("interface {} is gone from the pod's namespace", id.ifname)));
    };
    if Some(pod.index) != host.peer_index {
        return Ok(Some(format!("interface {} is not the other side of {}", id.ifname, host.name)));
    }
    if !pod.up {
        return Ok(Some(format!("interface {} is down", id.ifname)));
    }
    let present = inside.addresses_of(pod.index)?;
    if let Some(missing) = addresses.iter().find(|a| !present.iter().any(|p| p.addr == **a)) {
        return Ok(Some(format!("interface {} has lost address {missing}", id.ifname)));
    }
    let routes = inside.routes(RouteFilter { dev: Some(pod.index), ..RouteFilter::default() })?;
    for (limit, netlink, index, what) in [
        (bandwidth.ingress, &mut *netlink, ifindex, "gets"),
        (bandwidth.egress, &mut inside, pod.index, "sends"),
    ] {
        let Some(limit) = limit else { continue };
        if !netlink.tbfs()?.iter().any(|found| found.index == index && shape::keeps(found, &limit)) {
            return Ok(Some(format!("what the pod {what} is not limited as it should be")));
        }
    }
    for address in addresses {
        let want = default_of(*address);
        if !routes.iter().any(|r| r.dst == want && r.via == Some(gateway(*address))) {
            return Ok(Some(format!("the pod has no default route via {}", gateway(*address))));
        }
    }
    Ok(None)
}

/// The result of an ADD.
#[must_use]
pub fn result(id: &AttachmentId, addresses: &[IpAddr], mtu: u32, netns_path: &str) -> AddResult {
    let interface = |name: String, mac: [u8; 6], sandbox: Option<String>| Interface {
        name,
        mac: mac_text(mac),
        mtu: Some(mtu),
        sandbox,
    };
    let mut result = AddResult {
        interfaces: vec![
            interface(id.host_link(), id.host_mac(), None),
            interface(id.ifname.clone(), id.pod_mac(), Some(netns_path.to_owned())),
        ],
        ..AddResult::default()
    };
    for address in addresses {
        let gateway = gateway(*address);
        result.ips.push(IpConfig {
            address: IpNet::from(*address),
            gateway: Some(gateway),
            interface: Some(1),
        });
        if address.is_ipv4() {
            let dst = IpNet::from(gateway);
            result.routes.push(CniRoute { dst, gw: None, mtu: None, scope: Some(SCOPE_LINK) });
        }
        let dst = default_of(*address);
        result.routes.push(CniRoute { dst, gw: Some(gateway), mtu: Some(mtu), scope: None });
    }
    result
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_has_both_sides_and_all_routes() {
        let id = AttachmentId::new("c1", "eth0");
        let addresses = ["10.244.1.7".parse().unwrap(), "fd00::7".parse().unwrap()];
        let result = result(&id, &addresses, 1450, "/run/netns/x");
        assert_eq!(result.interfaces[1].sandbox.as_deref(), Some("/run/netns/x"));
        assert_eq!(result.interfaces[0].mtu, Some(1450));
        assert_eq!(result.interfaces[0].mac.len(), 17);
        let ips: Vec<String> =
            result.ips.iter().map(|i| format!("{} via {}", i.address, i.gateway.unwrap())).collect();
        assert_eq!(ips, ["10.244.1.7/32 via 169.254.1.1", "fd00::7/128 via fe80::1"]);
        let routes: Vec<String> = result.routes.iter().map(|r| r.dst.to_string()).collect();
        assert_eq!(routes, ["169.254.1.1/32", "0.0.0.0/0", "::/0"]);
        let mtus: Vec<Option<u32>> = result.routes.iter().map(|r| r.mtu).collect();
        assert_eq!(mtus, [None, Some(1450), Some(1450)]);
    }
}
