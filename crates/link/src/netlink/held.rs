//! Addresses that a link has for a time only: each goes by itself unless it is renewed.
//!
//! A load balancer's address sits on one node of many. The kernel answers ARP and neighbour discovery for it, whether
//! the process that put it there lives or not; when that process is gone for good, the kernel takes it away.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags as KernelFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use nix::libc;

use super::Netlink;
use super::addresses::{IFADDRMSG, decode_address, message, object};
use crate::socket::Attributes;
use crate::{ROUTE_PROTOCOL, Result};

/// `IFA_PROTO` (linux/if_addr.h, since 5.18): who manages an address.
const IFA_PROTO: u16 = 11;

impl Netlink {
    /// Gives a link an address for `valid`, or renews it. Returns whether the link has not had it before.
    ///
    /// It is never chosen as the source of the node's own connections, has no route of its own and no duplicate address
    /// detection, and is marked as Podway's ([`Self::held_addresses`]).
    ///
    /// # Errors
    /// When there is no such link, IPv6 is switched off on it, somebody else manages this address, or the process may
    /// not.
    pub fn hold_address(&mut self, index: u32, address: IpAddr, valid: Duration) -> Result<bool> {
        const OPERATION: &str = "hold address";
        let net = IpNet::from(address);
        let mut message = message(OPERATION, index, net)?;
        let mut flags = KernelFlags::Noprefixroute;
        flags.set(KernelFlags::Nodad, address.is_ipv6());
        message.attributes.push(AddressAttribute::Flags(flags));
        // Whole seconds, and never nothing: zero would be refused. A preferred time of zero means: not as a source
        // (RFC 4862 section 5.5.4).
        let mut times = CacheInfo::default();
        times.ifa_valid = u32::try_from(valid.as_secs()).unwrap_or(u32::MAX).max(1);
        message.attributes.push(AddressAttribute::CacheInfo(times));
        message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(ROUTE_PROTOCOL)));
        if address.is_ipv4() {
            message.header.scope = AddressScope::Universe;
        }
        let object = object(index, net);
        let new = RouteNetlinkMessage::NewAddress(message.clone());
        match self.socket.request(OPERATION, &object, new, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(_) => return Ok(true),
            Err(e) if e.is_exists() => {}
            Err(e) => return Err(e),
        }
        // An address that a person gave the link for good must not vanish.
        if !self.held_addresses(index)?.contains(&address) {
            return Ok(false);
        }
        let renew = RouteNetlinkMessage::NewAddress(message);
        self.socket.request(OPERATION, &object, renew, NLM_F_REPLACE)?;
        Ok(false)
    }

    /// The addresses of a link that [`Self::hold_address`] put there; of all links for index 0.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn held_addresses(&mut self, index: u32) -> Result<Vec<IpAddr>> {
        Ok(self
            .held_everywhere()?
            .into_iter()
            .filter(|(i, _)| index == 0 || *i == index)
            .map(|(_, a)| a)
            .collect())
    }

    /// All such addresses of the namespace, with the index of their link.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn held_everywhere(&mut self) -> Result<Vec<(u32, IpAddr)>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.socket.dump("list", "held addresses", &request, |kind, payload| {
            if kind != libc::RTM_NEWADDR {
                return None;
            }
            let ours = Attributes(payload.get(IFADDRMSG..)?)
                .any(|(kind, value)| kind == IFA_PROTO && value.first() == Some(&ROUTE_PROTOCOL));
            let found = decode_address(payload).filter(|_| ours)?;
            Some((found.index, found.addr))
        })
    }
}
