//! The wire of a lab: one namespace with a bridge, one namespace per node with an `eth0` on that bridge, and one with a
//! client beyond the nodes.
//!
//! Nothing of it touches the machine's own namespace: the fabric has no leg outside. Its addresses stand for
//! the world beyond the cluster.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context as _;
use ipnet::IpNet;
use podway_link::{AddressFlags, Netlink, Netns, Route, VethSpec, sysctl};

use crate::spec::{LabName, LabSpec, NodePlan, underlay_prefix};

/// Name of the bridge in the fabric's namespace.
pub const BRIDGE: &str = "fabric0";
/// The bridge's link-layer address: locally administered (IEEE 802, second bit of the first octet).
const BRIDGE_MAC: [u8; 6] = [0x02, 0x50, 0x57, 0x00, 0x00, 0x01];
/// Name of a node's link to the fabric.
pub const UPLINK: &str = "eth0";
/// Name of the fabric's link to the client beyond the nodes.
const OUTSIDE: &str = "outside";
/// `RTPROT_STATIC`: routes made by an administrator, which agents leave alone.
const ROUTE_STATIC: u8 = 4;

/// Creates fabric and nodes. On an error everything made so far is removed again.
///
/// # Errors
/// With operation, object and cause.
pub fn create(spec: &LabSpec) -> anyhow::Result<()> {
    let mut names = Vec::new();
    let made = create_all(spec, &mut names);
    if made.is_err() {
        // The first error is the one to tell.
        for name in names {
            let _ = Netns::delete_named(&name);
        }
    }
    made
}

fn create_all(spec: &LabSpec, names: &mut Vec<String>) -> anyhow::Result<()> {
    let fabric = namespace(spec.name.fabric_netns(), names)?;
    fabric.run(|| write_sysctls(SYSCTLS_EVERYWHERE))??;
    prefer_cubic(&fabric)?;
    let mut netlink = Netlink::open_in(&fabric)?;
    let bridge = netlink.create_bridge(BRIDGE, spec.underlay_mtu)?;
    // A bridge without an address of its own takes the smallest of its ports': a node that comes or goes would change
    // it under the neighbours' eyes.
    netlink.set_mac(bridge.index, BRIDGE_MAC)?;
    netlink.set_up(bridge.index)?;
    for address in spec.fabric_addresses() {
        netlink.add_address(bridge.index, underlay(address), NO_DAD)?;
    }
    for node in spec.node_plans() {
        wire_node(spec, &node, &mut netlink, bridge.index, names)?;
    }
    wire_outside(spec, &fabric, &mut netlink, names)?;
    // A bridge takes the smallest MTU of its ports unless it is set once they are there.
    netlink.set_mtu(bridge.index, spec.underlay_mtu)?;
    Ok(())
}

/// Makes a namespace and notes its name, for the case that something goes wrong later.
fn namespace(name: String, names: &mut Vec<String>) -> anyhow::Result<Netns> {
    let made = Netns::create_named(&name)?;
    names.push(name);
    Ok(made)
}

fn wire_node(
    spec: &LabSpec,
    node: &NodePlan,
    netlink: &mut Netlink,
    bridge: u32,
    names: &mut Vec<String>,
) -> anyhow::Result<()> {
    let namespace = namespace(spec.name.node_netns(&node.name), names)?;
    namespace.run(|| {
        write_sysctls(SYSCTLS_EVERYWHERE)?;
        write_sysctls(SYSCTLS_NODE)
    })??;
    prefer_cubic(&namespace)?;
    let port = netlink.create_veth(&VethSpec {
        name: node.name.clone(),
        mtu: spec.underlay_mtu,
        peer_name: UPLINK.into(),
        peer_mtu: spec.underlay_mtu,
        peer_ns: Some(&namespace),
        ..VethSpec::default()
    })?;
    netlink.set_master(port.index, Some(bridge))?;
    netlink.set_up(port.index)?;
    configure_node(spec, node, &namespace)
}

/// A client beyond the nodes: on a network of its own behind the fabric, which routes between the two. It knows the
/// way to the nodes and to nothing else of the cluster.
fn wire_outside(
    spec: &LabSpec,
    fabric: &Netns,
    netlink: &mut Netlink,
    names: &mut Vec<String>,
) -> anyhow::Result<()> {
    let client = namespace(spec.name.outside_netns(), names)?;
    client.run(|| write_sysctls(SYSCTLS_EVERYWHERE))??;
    prefer_cubic(&client)?;
    fabric.run(|| write_sysctls(SYSCTLS_ROUTER))??;
    let router = netlink.create_veth(&VethSpec {
        name: OUTSIDE.into(),
        mtu: spec.underlay_mtu,
        peer_name: UPLINK.into(),
        peer_mtu: spec.underlay_mtu,
        peer_ns: Some(&client),
        ..VethSpec::default()
    })?;
    netlink.set_up(router.index)?;
    let mut inside = Netlink::open_in(&client)?;
    let uplink =
        inside.link_by_name(UPLINK)?.context("the outside client has no link right after it was made")?.index;
    inside.set_up(uplink)?;
    for (address, via) in spec.outside_addresses() {
        let prefix = if address.is_ipv4() { 24 } else { 64 };
        netlink.add_address(router.index, IpNet::new_assert(via, prefix), NO_DAD)?;
        inside.add_address(uplink, IpNet::new_assert(address, prefix), NO_DAD)?;
        for dst in spec.underlay_cidrs().into_iter().filter(|n| n.addr().is_ipv4() == address.is_ipv4()) {
            inside.replace_route(&Route {
                dst,
                via: Some(via),
                dev: uplink,
                src: None,
                mtu: None,
                scope_link: false,
                onlink: false,
                protocol: ROUTE_STATIC,
            })?;
        }
    }
    Ok(())
}

/// Wires one more node of a lab that is there. On an error nothing of it stays.
///
/// # Errors
/// With operation, object and cause.
pub fn add_node(spec: &LabSpec, node: &NodePlan) -> anyhow::Result<()> {
    let (_fabric, mut netlink) = open_fabric(&spec.name)?;
    let bridge = netlink.link_by_name(BRIDGE)?.with_context(|| format!("the fabric has no {BRIDGE}"))?.index;
    let mut names = Vec::new();
    let made = wire_node(spec, node, &mut netlink, bridge, &mut names);
    if made.is_err() {
        // The first error is the one to tell.
        for name in names {
            let _ = Netns::delete_named(&name);
        }
    }
    made
}

/// Takes a node's port off the fabric. One that is not there is no error.
///
/// # Errors
/// With operation, object and cause.
pub fn forget_node(lab: &LabName, node: &str) -> anyhow::Result<()> {
    let (_fabric, mut netlink) = open_fabric(lab)?;
    if let Some(port) = netlink.link_by_name(node)? {
        netlink.delete_link(port.index)?;
    }
    Ok(())
}

/// Connects a node to the fabric, or cuts it off.
///
/// # Errors
/// With operation, object and cause.
pub fn set_port(lab: &LabName, node: &str, up: bool) -> anyhow::Result<()> {
    let (_fabric, mut netlink) = open_fabric(lab)?;
    let port = netlink.link_by_name(node)?.with_context(|| format!("the fabric has no port for {node}"))?;
    if up {
        netlink.set_up(port.index)?;
    } else {
        netlink.set_down(port.index)?;
    }
    Ok(())
}

fn open_fabric(lab: &LabName) -> anyhow::Result<(Netns, Netlink)> {
    let fabric = Netns::open_named(&lab.fabric_netns())?;
    let netlink = Netlink::open_in(&fabric)?;
    Ok((fabric, netlink))
}

fn configure_node(spec: &LabSpec, node: &NodePlan, namespace: &Netns) -> anyhow::Result<()> {
    let mut netlink = Netlink::open_in(namespace)?;
    let uplink = netlink
        .link_by_name(UPLINK)?
        .with_context(|| format!("{} has no {UPLINK} right after it was made", node.name))?
        .index;
    netlink.set_up(uplink)?;
    for address in &node.addresses {
        netlink.add_address(uplink, underlay(*address), NO_DAD)?;
    }
    for via in spec.fabric_addresses() {
        let any = match via {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        netlink.replace_route(&Route {
            dst: IpNet::new_assert(any, 0),
            via: Some(via),
            dev: uplink,
            src: None,
            mtu: None,
            scope_link: false,
            onlink: false,
            protocol: ROUTE_STATIC,
        })?;
    }
    Ok(())
}

const NO_DAD: AddressFlags = AddressFlags { nodad: true, link_scope: false, no_prefix_route: false };

/// Addresses are the plan's alone.
const SYSCTLS_EVERYWHERE: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
];

/// What every Kubernetes node needs: it forwards, and packets of pods come in by another link than the routes to
/// their source might say.
const SYSCTLS_NODE: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

/// The fabric is the router between the nodes and the client beyond them.
const SYSCTLS_ROUTER: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
];

/// Writes the parameters in the calling thread's namespace; those that the kernel lacks are left out.
fn write_sysctls(table: &[(&str, &str)]) -> podway_link::Result<()> {
    for (path, value) in table {
        sysctl::write_if_present(path, value)?;
    }
    Ok(())
}

/// Gives a namespace the TCP that most clusters run: machines default to all sorts.
///
/// The kernel lets a namespace have only what `tcp_allowed_congestion_control` of the machine names, and that
/// setting is the machine's to make. Then the default stays, and programs that care (`iperf3 -C cubic`) say so.
pub(crate) fn prefer_cubic(namespace: &Netns) -> podway_link::Result<()> {
    match namespace.run(|| sysctl::write_if_present("net/ipv4/tcp_congestion_control", "cubic"))? {
        Err(e) if !e.is_permission() => Err(e),
        _ => Ok(()),
    }
}

fn underlay(address: IpAddr) -> IpNet {
    IpNet::new_assert(address, underlay_prefix(address))
}
