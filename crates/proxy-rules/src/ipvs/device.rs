//! The device that holds services' addresses, and the kernel parameters that IPVS needs.
//!
//! IPVS takes packets that are addressed to the node itself; a dummy device makes a service's address one of the
//! node's. The node must not answer ARP for it on its real devices: announcing addresses is somebody else's work.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use podway_link::{AddressFlags, Netlink, sysctl};

use crate::foreign::tools::{self, ToolError};
use crate::{Error, Result};

/// Name of the device.
pub(crate) const DEVICE: &str = "podway-ipvs0";

/// A kernel parameter that was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// As in `/proc/sys`, with slashes.
    pub path: String,
    /// What it was.
    pub was: String,
    /// What it is now.
    pub now: &'static str,
    /// Why.
    pub why: &'static str,
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} → {} ({})", self.path, self.was, self.now, self.why)
    }
}

const FOR_IPVS: [(&str, &str, &str); 4] = [
    ("net/ipv4/vs/conntrack", "1", "so that nftables can masquerade what IPVS translates"),
    ("net/ipv4/vs/expire_nodest_conn", "1", "so that datagrams leave an endpoint that is gone"),
    (
        "net/ipv4/vs/expire_quiescent_template",
        "1",
        "so that session affinity leaves an endpoint that takes no new connections",
    ),
    ("net/ipv4/ip_forward", "1", "so that packets to endpoints are forwarded"),
];

const FOR_LINKS: [(&str, &str, &str); 2] = [
    ("arp_ignore", "1", "so that nobody is told that services' addresses are here"),
    ("arp_announce", "2", "so that no service's address is the source of an ARP request"),
];

/// Sets the parameters and says which were something else before. The links are those with an address of the node.
pub(crate) fn set_parameters(netlink: &mut Netlink, node: &[IpAddr]) -> Result<Vec<Sysctl>> {
    let wrap = |path: &str| {
        let path = path.to_owned();
        move |error| io("set kernel parameter", path, error)
    };
    let mut wanted: Vec<(String, &'static str, &'static str)> =
        FOR_IPVS.iter().map(|(path, value, why)| ((*path).to_owned(), *value, *why)).collect();
    if sysctl::read("net/ipv6/conf/all/forwarding").is_ok() && node.iter().any(IpAddr::is_ipv6) {
        wanted.push(("net/ipv6/conf/all/forwarding".into(), "1", FOR_IPVS[3].2));
    }
    let links: BTreeSet<u32> = netlink
        .addresses()
        .map_err(|e| io("list", "addresses".into(), e))?
        .iter()
        .filter(|a| node.contains(&a.addr))
        .map(|a| a.index)
        .collect();
    for link in netlink.links().map_err(|e| io("list", "links".into(), e))? {
        // The loopback hears no ARP, and its parameters would go for nothing.
        if links.contains(&link.index) && link.index != 1 {
            for (name, value, why) in FOR_LINKS {
                wanted.push((format!("net/ipv4/conf/{}/{name}", link.name), value, why));
            }
        }
    }
    let mut changed = Vec::new();
    for (path, now, why) in wanted {
        let was = sysctl::read(&path).map_err(wrap(&path))?;
        // More than we need is as good.
        if was.parse::<u32>().ok() >= now.parse().ok() {
            continue;
        }
        sysctl::write(&path, now).map_err(wrap(&path))?;
        changed.push(Sysctl { path, was, now, why });
    }
    Ok(changed)
}

/// Index of the device, which is made if it is not there, and up.
pub(crate) fn ensure(netlink: &mut Netlink) -> Result<u32> {
    let find = |netlink: &mut Netlink| {
        netlink.link_by_name(DEVICE).map(|l| l.map(|l| l.index)).map_err(|e| io("find", DEVICE.into(), e))
    };
    let index = match find(netlink)? {
        Some(index) => index,
        None => {
            tools::run("ip", &["link", "add", DEVICE, "type", "dummy"], "").map_err(|error| match error {
                ToolError::CannotRun { tool, source } => {
                    Error::Missing { program: tool, package: "iproute2", source }
                }
                ToolError::Failed { said, .. } => Error::Kernel {
                    what: "dummy devices",
                    cause: said,
                    advice: "load the module dummy, or choose another --service-mode",
                },
            })?;
            find(netlink)?.ok_or_else(|| Error::Kernel {
                what: "dummy devices",
                cause: "the device is not there after it was made".into(),
                advice: "look at the kernel's log",
            })?
        }
    };
    netlink.set_up(index).map_err(|e| io("set up", DEVICE.into(), e))?;
    Ok(index)
}

/// The addresses of the device; those that the kernel gives every link are none of ours.
pub(crate) fn addresses(netlink: &mut Netlink, index: u32) -> Result<BTreeSet<IpAddr>> {
    let all = netlink.addresses_of(index).map_err(|e| io("list addresses", DEVICE.into(), e))?;
    Ok(all.iter().filter(|a| !(a.link_scope && a.addr.is_ipv6())).map(|a| a.addr).collect())
}

/// Adds an address. Returns whether it was not there before.
pub(crate) fn add(netlink: &mut Netlink, index: u32, addr: IpAddr) -> Result<bool> {
    let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
    netlink
        .add_address(index, IpNet::from(addr), flags)
        .map_err(|e| io("add", format!("{addr} to {DEVICE}"), e))
}

/// Deletes an address. Returns whether it was there.
pub(crate) fn delete(netlink: &mut Netlink, index: u32, addr: IpAddr) -> Result<bool> {
    netlink
        .delete_address(index, IpNet::from(addr))
        .map_err(|e| io("delete", format!("{addr} of {DEVICE}"), e))
}

/// An error of the link layer as one of ours.
pub(crate) fn io(operation: &'static str, object: String, error: podway_link::Error) -> Error {
    Error::Io { operation, object, source: std::io::Error::other(error) }
}
