//! The wire of a lab: one namespace with a bridge, one namespace per node with an `eth0` on that bridge.
//!
//! Nothing of it touches the machine's own namespace: the fabric has no leg outside. Its addresses stand for
//! the world beyond the cluster.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context as _;
use ipnet::IpNet;
use podway_link::{AddressFlags, Netlink, Netns, Route, VethSpec, sysctl};

use crate::spec::{LabSpec, NodePlan, underlay_prefix};

/// Name of the bridge in the fabric's namespace.
pub const BRIDGE: &str = "fabric0";
/// Name of a node's link to the fabric.
pub const UPLINK: &str = "eth0";
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
    let mut namespace = |name: String| -> anyhow::Result<Netns> {
        let made = Netns::create_named(&name)?;
        names.push(name);
        Ok(made)
    };
    let fabric = namespace(spec.name.fabric_netns())?;
    fabric.run(|| write_sysctls(SYSCTLS_EVERYWHERE))??;
    prefer_cubic(&fabric)?;
    let mut netlink = Netlink::open_in(&fabric)?;
    let bridge = netlink.create_bridge(BRIDGE, spec.underlay_mtu)?;
    netlink.set_up(bridge.index)?;
    for address in spec.fabric_addresses() {
        netlink.add_address(bridge.index, underlay(address), NO_DAD)?;
    }
    for node in spec.node_plans() {
        let namespace = namespace(spec.name.node_netns(&node.name))?;
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
        netlink.set_master(port.index, Some(bridge.index))?;
        netlink.set_up(port.index)?;
        configure_node(spec, &node, &namespace)?;
    }
    // A bridge takes the smallest MTU of its ports unless it is set once they are there.
    netlink.set_mtu(bridge.index, spec.underlay_mtu)?;
    Ok(())
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
