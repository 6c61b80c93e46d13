//! Addresses of links.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags as KernelFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::libc;

use super::Netlink;
use crate::socket::{Attributes, ip, number};
use crate::{Error, Result};

pub(super) const IFADDRMSG: usize = 8;

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Index of the link.
    pub index: u32,
    /// The address itself (for a point-to-point link the local one).
    pub addr: IpAddr,
    /// Length of the prefix that is on the link.
    pub prefix_len: u8,
    /// Not valid beyond the link (RT_SCOPE_LINK; every IPv6 link-local address has it).
    pub link_scope: bool,
    /// Not usable: duplicate address detection (RFC 4862) runs, or found a duplicate.
    pub tentative: bool,
}

/// How to add an address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AddressFlags {
    /// Use it at once, without duplicate address detection (IPv6 only).
    pub nodad: bool,
    /// Not valid beyond the link (IPv4; for IPv6 the address itself says so).
    pub link_scope: bool,
    /// Add no route for the prefix.
    pub no_prefix_route: bool,
}

impl Netlink {
    /// Adds an address. Returns false when the link had it already.
    ///
    /// # Errors
    /// When there is no such link, IPv6 is switched off on it, or the process may not.
    pub fn add_address(&mut self, index: u32, address: IpNet, flags: AddressFlags) -> Result<bool> {
        const OPERATION: &str = "add address";
        let mut message = message(OPERATION, index, address)?;
        if flags.link_scope {
            message.header.scope = AddressScope::Link;
        }
        let mut bits = KernelFlags::empty();
        bits.set(KernelFlags::Nodad, flags.nodad && address.addr().is_ipv6());
        bits.set(KernelFlags::Noprefixroute, flags.no_prefix_route);
        if !bits.is_empty() {
            message.attributes.push(AddressAttribute::Flags(bits));
        }
        let message = RouteNetlinkMessage::NewAddress(message);
        match self.socket.request(OPERATION, &object(index, address), message, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(_) => Ok(true),
            Err(e) if e.is_exists() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Deletes an address. Returns false when the link does not have it, or is not there.
    ///
    /// # Errors
    /// When the process may not.
    pub fn delete_address(&mut self, index: u32, address: IpNet) -> Result<bool> {
        const OPERATION: &str = "delete address";
        let message = RouteNetlinkMessage::DelAddress(message(OPERATION, index, address)?);
        match self.socket.request(OPERATION, &object(index, address), message, 0) {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.errno(), Some(Errno::EADDRNOTAVAIL | Errno::ENODEV | Errno::ENXIO)) => {
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// All addresses of the namespace, of both families.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        self.list("addresses", AddressMessage::default())
    }

    /// The addresses of one link; none when there is no such link.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn addresses_of(&mut self, index: u32) -> Result<Vec<Address>> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        match self.list(&format!("addresses of link {index}"), message) {
            Err(e) if e.errno() == Some(Errno::ENODEV) => Ok(Vec::new()),
            other => other,
        }
    }

    /// All addresses of another namespace, known by the number that this namespace has for it
    /// ([`super::Link::peer_netnsid`]).
    ///
    /// # Errors
    /// When there is no such namespace.
    pub fn peer_addresses(&mut self, nsid: i32) -> Result<Vec<Address>> {
        let mut message = AddressMessage::default();
        message.attributes.push(AddressAttribute::TargetNetNsId(nsid));
        self.list(&format!("addresses of namespace {nsid}"), message)
    }

    fn list(&mut self, object: &str, message: AddressMessage) -> Result<Vec<Address>> {
        self.socket.dump("list", object, &RouteNetlinkMessage::GetAddress(message), |kind, payload| {
            if kind == libc::RTM_NEWADDR { decode_address(payload) } else { None }
        })
    }
}

pub(super) fn message(operation: &'static str, index: u32, address: IpNet) -> Result<AddressMessage> {
    if index == 0 {
        return Err(Error::invalid(operation, object(index, address), "interface indexes begin at 1"));
    }
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix_len();
    message.header.family = if address.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message.attributes.push(AddressAttribute::Address(address.addr()));
    Ok(message)
}

pub(super) fn object(index: u32, address: IpNet) -> String {
    format!("{address} on link {index}")
}

/// Decodes `struct ifaddrmsg` and its attributes.
pub(crate) fn decode_address(payload: &[u8]) -> Option<Address> {
    let [_family, prefix_len, flags, scope] = *payload.first_chunk()?;
    let index = number(payload.get(4..)?)?;
    let (mut local, mut address, mut flags) = (None, None, u32::from(flags));
    for (kind, value) in Attributes(payload.get(IFADDRMSG..)?) {
        match kind {
            libc::IFA_LOCAL => local = ip(value),
            libc::IFA_ADDRESS => address = ip(value),
            libc::IFA_FLAGS => flags = number(value)?,
            _ => {}
        }
    }
    Some(Address {
        index,
        // On a point-to-point link IFA_ADDRESS is the other end.
        addr: local.or(address)?,
        prefix_len,
        link_scope: scope == libc::RT_SCOPE_LINK,
        tentative: flags & (libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED) != 0,
    })
}
