//! Telling the neighbours on a link that an address is here now: gratuitous ARP (RFC 5227 section 3) and unsolicited
//! neighbour advertisements (RFC 4861 section 7.2.6). Neighbours that remember another place correct it at once.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd as _;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Error, Result};

const OPERATION: &str = "announce";
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// From a router, and in place of what was known (RFC 4861 section 4.4).
const ROUTER_AND_OVERRIDE: u8 = 0b1010_0000;
const TARGET_LINK_LAYER_ADDRESS: u8 = 2;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Tells everybody on a link, whose hardware address is `mac`, that `address` is there. In the network namespace of
/// the calling thread.
///
/// # Errors
/// When there is no such link, it is down, or the process may not.
pub fn announce(index: u32, mac: [u8; 6], address: IpAddr) -> Result<()> {
    let wrap = |source: io::Error| Error::io(OPERATION, format!("{address} on link {index}"), source);
    match address {
        IpAddr::V4(address) => {
            // Some systems heed one form, some the other.
            for operation in [ARP_REQUEST, ARP_REPLY] {
                send_arp(index, &arp(operation, mac, address)).map_err(wrap)?;
            }
            Ok(())
        }
        IpAddr::V6(address) => send_advertisement(index, mac, address).map_err(wrap),
    }
}

/// RFC 826, with the sender as its own target.
fn arp(operation: u16, mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 0x08, 0x00, 6, 4];
    packet.extend(operation.to_be_bytes());
    packet.extend(mac);
    packet.extend(address.octets());
    packet.extend(if operation == ARP_REQUEST { [0; 6] } else { mac });
    packet.extend(address.octets());
    packet
}

fn send_arp(index: u32, packet: &[u8]) -> io::Result<()> {
    // Protocol 0: it only sends. The kernel puts the Ethernet header before the packet.
    let socket = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::sa_family_t,
        sll_protocol: (libc::ETH_P_ARP as u16).to_be(),
        sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    };
    // SAFETY: the descriptor is open for the whole call; `packet` and `to` are live values of the lengths given, and
    // sendto only reads them. Unsafe, because no safe wrapper makes a link-layer address.
    #[expect(unsafe_code, reason = "no safe wrapper makes a link-layer address")]
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn send_advertisement(index: u32, mac: [u8; 6], address: Ipv6Addr) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    // Neighbours drop what could have come through a router (RFC 4861 section 7.1.2).
    socket.set_multicast_hops_v6(255)?;
    socket.set_multicast_if_v6(index)?;
    socket.set_multicast_loop_v6(false)?;
    // The kernel fills in the checksum (RFC 3542 section 3.1).
    let mut packet = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, ROUTER_AND_OVERRIDE, 0, 0, 0];
    packet.extend(address.octets());
    packet.extend([TARGET_LINK_LAYER_ADDRESS, 1]);
    packet.extend(mac);
    let to = SocketAddrV6::new(ALL_NODES, 0, 0, index);
    socket.send_to(&packet, &to.into()).map(drop)
}
