//! What the tables know about the node.

#![expect(unsafe_code, reason = "a socket option that the system library has no wrapper for")]

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use ipnet::IpNet;
use nix::{
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
use podway_abi::{
    Addr,
    services::{MAX_SERVICE_RANGES, Range, ServiceConfig, address_flags},
};
use podway_services::table::{Family, NodeView};

use super::{ApplyReport, Failure, ServiceWriter};
use crate::{Error, Result};

/// `SO_NETNS_COOKIE` of `asm-generic/socket.h` (Linux 5.14, commit e8b9eab99232).
const SO_NETNS_COOKIE: libc::c_int = 71;

impl ServiceWriter {
    /// Writes which addresses are the node's, where node ports answer, and what replaces a masqueraded source: the
    /// first of [`NodeView::addresses`] of each family. The calling thread's network namespace becomes the node's:
    /// sockets in it are the node's own.
    ///
    /// # Errors
    /// When the kernel refuses a write. A table that is full is one of the causes here: without the node's addresses
    /// nothing works.
    pub fn set_node(&mut self, view: &NodeView) -> Result<ApplyReport> {
        let mut report = ApplyReport::default();
        let mut wanted = std::collections::BTreeMap::new();
        for addr in &view.addresses {
            *wanted.entry(*addr).or_insert(0) |= address_flags::OWN;
        }
        for addr in &view.node_port_addresses {
            *wanted.entry(*addr).or_insert(0) |= address_flags::OWN | address_flags::NODE_PORTS;
        }
        let old = std::mem::replace(&mut self.node_addresses, wanted);
        let mut touched: Vec<IpAddr> = old.keys().chain(self.node_addresses.keys()).copied().collect();
        touched.sort_unstable();
        touched.dedup();
        for addr in touched {
            self.write_address(addr, &mut report).map_err(|failure| match failure {
                Failure::Error(error) => error,
                Failure::Full(_) | Failure::NoService => Error::io(
                    "write the node's address into",
                    "SERVICE_ADDRS".as_ref(),
                    io::Error::from_raw_os_error(libc::E2BIG),
                ),
            })?;
        }
        let config = config(view)?;
        if self.config.get(&0, 0).ok() != Some(config) {
            self.config.set(0, config, 0).map_err(|e| Error::map("SERVICE_CONFIG", e))?;
            report.written += 1;
        }
        Ok(report)
    }
}

fn config(view: &NodeView) -> Result<ServiceConfig> {
    let first = |family: Family| {
        let addr = view.addresses.iter().find(|a| Family::of(a) == family && !a.is_loopback());
        addr.map_or(Addr::UNSPECIFIED, |a| Addr::from(*a))
    };
    let mut config = ServiceConfig {
        node_netns: netns_cookie()?,
        masquerade_v4: first(Family::V4),
        masquerade_v6: first(Family::V6),
        ..ServiceConfig::default()
    };
    for (slot, range) in config.ranges.iter_mut().zip(&view.service_cidrs) {
        *slot = to_range(range);
    }
    // More are refused where they are configured.
    config.range_count = u32::try_from(view.service_cidrs.len().min(MAX_SERVICE_RANGES)).unwrap_or(0);
    Ok(config)
}

fn to_range(range: &IpNet) -> Range {
    let mask = match range {
        // The upper 96 bits must be those of an IPv4 address.
        IpNet::V4(v4) => {
            let [a, b, c, d] = v4.netmask().octets();
            Addr { words: [u32::MAX, u32::MAX, u32::MAX, u32::from_ne_bytes([a, b, c, d])] }
        }
        IpNet::V6(v6) => Addr::from(v6.netmask()),
    };
    Range { addr: Addr::from(range.network()), mask }
}

/// The cookie of the calling thread's network namespace.
fn netns_cookie() -> Result<u64> {
    let failed = |e: io::Error| Error::io("read the cookie of", "the network namespace".as_ref(), e);
    let probe: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| failed(e.into()))?;
    let mut cookie = 0u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(8);
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which is that large. Needed because neither the
    // standard library nor nix has this option.
    let result = unsafe {
        libc::getsockopt(
            probe.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(cookie)
}
