//! Neighbours: which hardware address answers for an IP address on a link.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::libc;

use super::Netlink;
use crate::socket::{Attributes, ip, number};
use crate::{Error, Result};

const NDMSG: usize = 12;

/// A neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Index of the link.
    pub index: u32,
    /// IP address.
    pub addr: IpAddr,
    /// Hardware address, when it is known.
    pub mac: Option<[u8; 6]>,
    /// Set by an administrator; never asked for, never forgotten (NUD_PERMANENT).
    pub permanent: bool,
}

impl Netlink {
    /// Adds a permanent entry, or replaces the one that is there.
    ///
    /// # Errors
    /// When there is no such link or the process may not.
    pub fn replace_neighbour(&mut self, index: u32, address: IpAddr, mac: [u8; 6]) -> Result<()> {
        const OPERATION: &str = "replace neighbour";
        let mut message = message(OPERATION, index, address)?;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        let message = RouteNetlinkMessage::NewNeighbour(message);
        self.socket
            .request(OPERATION, &object(index, address), message, NLM_F_CREATE | NLM_F_REPLACE)
            .map(drop)
    }

    /// Deletes an entry. Returns false when there is none, or no such link.
    ///
    /// # Errors
    /// When the process may not.
    pub fn delete_neighbour(&mut self, index: u32, address: IpAddr) -> Result<bool> {
        const OPERATION: &str = "delete neighbour";
        let message = RouteNetlinkMessage::DelNeighbour(message(OPERATION, index, address)?);
        match self.socket.request(OPERATION, &object(index, address), message, 0) {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.errno(), Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The IPv4 and IPv6 entries of one link.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn neighbours(&mut self, index: u32) -> Result<Vec<Neighbour>> {
        let mut message = NeighbourMessage::default();
        message.attributes.push(NeighbourAttribute::IfIndex(index));
        let message = RouteNetlinkMessage::GetNeighbour(message);
        self.socket.dump("list", &format!("neighbours of link {index}"), &message, |kind, payload| {
            if kind == libc::RTM_NEWNEIGH { decode(payload).filter(|n| n.index == index) } else { None }
        })
    }
}

fn message(operation: &'static str, index: u32, address: IpAddr) -> Result<NeighbourMessage> {
    if index == 0 {
        return Err(Error::invalid(operation, object(index, address), "interface indexes begin at 1"));
    }
    let mut message = NeighbourMessage::default();
    message.header.ifindex = index;
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    Ok(message)
}

fn object(index: u32, address: IpAddr) -> String {
    format!("{address} on link {index}")
}

/// Decodes `struct ndmsg` and its attributes. Bridge forwarding entries have no IP address and give nothing.
fn decode(payload: &[u8]) -> Option<Neighbour> {
    let index = number(payload.get(4..)?)?;
    let state = u16::from_ne_bytes(*payload.get(8..)?.first_chunk()?);
    let (mut addr, mut mac) = (None, None);
    for (kind, value) in Attributes(payload.get(NDMSG..)?) {
        match kind {
            libc::NDA_DST => addr = ip(value),
            libc::NDA_LLADDR => mac = value.try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { index, addr: addr?, mac, permanent: state & libc::NUD_PERMANENT != 0 })
}
