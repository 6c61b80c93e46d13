//! Links: list, create (veth, bridge, VXLAN), change, delete.

use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use nix::errno::Errno;
use nix::libc;

use super::Netlink;
use crate::socket::{Attributes, number, string};
use crate::{Error, Netns, Result};

/// Longest interface name (IFNAMSIZ without the NUL).
const NAME_MAX: usize = 15;
/// Longest alias (IFALIASZ without the NUL).
const ALIAS_MAX: usize = 255;

const IFINFOMSG: usize = 16;
const IFLA_INFO_KIND: u16 = 1;
const IF_OPER_UP: u8 = 6;

/// A network interface as the kernel reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index, unique within its namespace.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// Hardware address; zeros for a link that has none of six bytes.
    pub mac: [u8; 6],
    /// Administratively up (IFF_UP).
    pub up: bool,
    /// The other side is there (for a veth: the peer is up).
    pub carrier: bool,
    /// It takes packets (operational state `up`, RFC 2863). That comes some time after the carrier: until then the
    /// kernel drops what is sent. Asking for a single link brings it about at once (kernel 6.8 and later).
    pub operational: bool,
    /// `veth`, `bridge`, `vxlan`, …; none for physical links and the loopback.
    pub kind: Option<String>,
    /// For a veth the index of the peer, in the namespace [`Self::peer_netnsid`]; for stacked links
    /// (VLAN, macvlan) the link below.
    pub peer_index: Option<u32>,
    /// The namespace of [`Self::peer_index`] as this namespace numbers it; none when it is the same one.
    pub peer_netnsid: Option<i32>,
    /// Free text that an administrator, or Podway, put on the link.
    pub alias: Option<String>,
    /// The bridge that the link is a port of.
    pub master: Option<u32>,
    /// Number of the group that an administrator, or Podway, put the link into; 0 is nobody's.
    pub group: u32,
}

/// A pair of virtual Ethernet links to create.
#[derive(Debug, Clone, Default)]
pub struct VethSpec<'a> {
    /// Name of the side in this namespace.
    pub name: String,
    /// MTU of the side in this namespace; 0 leaves the kernel's default of 1500.
    pub mtu: u32,
    /// Hardware address; random when none.
    pub mac: Option<[u8; 6]>,
    /// Alias of the side in this namespace, at most 255 bytes.
    pub alias: Option<String>,
    /// Set the side in this namespace up. The peer cannot be in the same request: the kernel configures it
    /// before it has a peer itself and refuses (`veth_open`: ENOTCONN).
    pub up: bool,
    /// Give the side in this namespace no IPv6 link-local address of the kernel's own.
    pub addr_gen_none: bool,
    /// Name of the peer.
    pub peer_name: String,
    /// Hardware address of the peer; random when none.
    pub peer_mac: Option<[u8; 6]>,
    /// MTU of the peer; 0 leaves the kernel's default of 1500.
    pub peer_mtu: u32,
    /// Namespace of the peer; the same one when none.
    pub peer_ns: Option<&'a Netns>,
}

/// A VXLAN device that takes destination and VNI from the metadata of each packet (RFC 7348; `external` in
/// iproute2). It has no forwarding table: whoever sends through it sets the tunnel key, e.g. a tc program.
///
/// In this mode the kernel opens an IPv4 and an IPv6 UDP socket, so one device serves either underlay.
#[derive(Debug, Clone)]
pub struct VxlanSpec {
    /// Interface name.
    pub name: String,
    /// UDP destination port.
    pub port: u16,
    /// MTU of the device.
    pub mtu: u32,
    /// Hardware address; random when none.
    pub mac: Option<[u8; 6]>,
    /// Set it up.
    pub up: bool,
}

impl Default for VxlanSpec {
    fn default() -> Self {
        Self { name: "podway_vxlan".into(), port: 8472, mtu: 1450, mac: None, up: true }
    }
}

impl Netlink {
    /// Creates a veth pair, the peer directly in its namespace. Alias and address-generation mode are in
    /// place before the link is up.
    ///
    /// # Errors
    /// When a name is taken (see [`Error::is_exists`]) or not valid, an MTU is out of range, or the process may not. After
    /// an error nothing of the pair is left.
    pub fn create_veth(&mut self, spec: &VethSpec<'_>) -> Result<Link> {
        const OPERATION: &str = "create veth";
        check_name(OPERATION, &spec.name)?;
        check_name(OPERATION, &spec.peer_name)?;
        check_alias(OPERATION, &spec.name, spec.alias.as_deref())?;

        let mut peer = named(&spec.peer_name, spec.peer_mtu, spec.peer_mac);
        if let Some(namespace) = spec.peer_ns {
            peer.attributes.push(LinkAttribute::NetNsFd(namespace.as_fd().as_raw_fd()));
        }
        let mut message = named(&spec.name, spec.mtu, spec.mac);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        // The kernel takes alias and address generation only for a link that exists; until they are set the
        // link stays down.
        let later = spec.alias.is_some() || spec.addr_gen_none;
        if spec.up && !later {
            set_flag(&mut message, LinkFlags::Up, true);
        }
        let link = self.create(OPERATION, &spec.name, message)?;
        if !later {
            return Ok(link);
        }
        let index = link.index;
        let finished = self.finish_veth(spec, link);
        if finished.is_err() {
            // The first error is the one to tell.
            let _ = self.delete_link(index);
        }
        finished
    }

    fn finish_veth(&mut self, spec: &VethSpec<'_>, link: Link) -> Result<Link> {
        if let Some(alias) = &spec.alias {
            self.set_alias(link.index, alias)?;
        }
        if spec.addr_gen_none {
            self.set_addr_gen_none(link.index)?;
        }
        if spec.up {
            self.set_up(link.index)?;
        }
        Ok(Link { alias: spec.alias.clone(), up: spec.up, ..link })
    }

    /// Creates a bridge, down.
    ///
    /// # Errors
    /// When the name is taken or not valid, or the process may not.
    pub fn create_bridge(&mut self, name: &str, mtu: u32) -> Result<Link> {
        const OPERATION: &str = "create bridge";
        check_name(OPERATION, name)?;
        let mut message = named(name, mtu, None);
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
        self.create(OPERATION, name, message)
    }

    /// Creates a VXLAN device in collect-metadata mode.
    ///
    /// # Errors
    /// When the name or (once up) the UDP port is taken, the MTU is out of range, or the process may not.
    pub fn create_vxlan(&mut self, spec: &VxlanSpec) -> Result<Link> {
        const OPERATION: &str = "create vxlan";
        check_name(OPERATION, &spec.name)?;
        if spec.port == 0 {
            return Err(Error::invalid(OPERATION, &spec.name, "port must be 1 to 65535"));
        }
        let mut message = named(&spec.name, spec.mtu, spec.mac);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::CollectMetadata(true),
                InfoVxlan::Port(spec.port),
                InfoVxlan::Learning(false),
                // The inner packet has its own checksum; RFC 6935 permits none outside for tunnels.
                InfoVxlan::UDPCsum(false),
                InfoVxlan::UDPZeroCsumTX(true),
                InfoVxlan::UDPZeroCsumRX(true),
            ])),
        ]));
        // Inner Ethernet addresses are written by the sender: no neighbour is ever asked for.
        set_flag(&mut message, LinkFlags::Noarp, true);
        if spec.up {
            set_flag(&mut message, LinkFlags::Up, true);
        }
        self.create(OPERATION, &spec.name, message)
    }

    /// Deletes a link, and with a veth its peer. Returns false when there is none of that index.
    ///
    /// # Errors
    /// When the link cannot be deleted (physical links, the loopback) or the process may not.
    pub fn delete_link(&mut self, index: u32) -> Result<bool> {
        const OPERATION: &str = "delete link";
        let message = RouteNetlinkMessage::DelLink(indexed(OPERATION, index)?);
        match self.socket.request(OPERATION, &object(index), message, 0) {
            Ok(_) => Ok(true),
            Err(e) if e.errno() == Some(Errno::ENODEV) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Deletes all links of a group, and with veths their peers. The kernel waits several times for every CPU
    /// while it deletes links, and holds the lock of the whole link layer: once for a group, not once for each.
    ///
    /// Returns false when the group has no links.
    ///
    /// # Errors
    /// When the group is 0, which is that of every other link; when one of the links cannot be deleted (nothing is
    /// deleted then), or the process may not.
    pub fn delete_group(&mut self, group: u32) -> Result<bool> {
        const OPERATION: &str = "delete links of group";
        let object = group.to_string();
        if group == 0 {
            return Err(Error::invalid(OPERATION, object, "0 is the group of all links that have none"));
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group));
        match self.socket.request(OPERATION, &object, RouteNetlinkMessage::DelLink(message), 0) {
            Ok(_) => Ok(true),
            Err(e) if e.errno() == Some(Errno::ENODEV) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Puts a link into a group.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn set_group(&mut self, index: u32, group: u32) -> Result<()> {
        self.change("set group of link", index, |m| m.attributes.push(LinkAttribute::Group(group)))
    }

    /// Sets a link up.
    ///
    /// # Errors
    /// When there is no such link or it refuses (a VXLAN device whose UDP port is in use).
    pub fn set_up(&mut self, index: u32) -> Result<()> {
        self.change("set link up", index, |m| set_flag(m, LinkFlags::Up, true))
    }

    /// Sets a link down.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn set_down(&mut self, index: u32) -> Result<()> {
        self.change("set link down", index, |m| set_flag(m, LinkFlags::Up, false))
    }

    /// Sets the MTU in bytes.
    ///
    /// # Errors
    /// When there is no such link or the MTU is outside of what it supports.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<()> {
        self.change("set MTU of link", index, |m| m.attributes.push(LinkAttribute::Mtu(mtu)))
    }

    /// Sets the hardware address.
    ///
    /// # Errors
    /// When there is no such link or the address is not a valid one (multicast, zero).
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> Result<()> {
        self.change("set MAC of link", index, |m| m.attributes.push(LinkAttribute::Address(mac.to_vec())))
    }

    /// Makes the link a port of a bridge, or takes it out of the one it is in.
    ///
    /// # Errors
    /// When either link is not there or the master takes no ports.
    pub fn set_master(&mut self, index: u32, master: Option<u32>) -> Result<()> {
        self.change("set master of link", index, |m| {
            m.attributes.push(LinkAttribute::Controller(master.unwrap_or(0)));
        })
    }

    /// Sets the alias, at most 255 bytes; an empty one removes it.
    ///
    /// # Errors
    /// When there is no such link or the alias is too long.
    pub fn set_alias(&mut self, index: u32, alias: &str) -> Result<()> {
        const OPERATION: &str = "set alias of link";
        check_alias(OPERATION, &object(index), Some(alias))?;
        self.change(OPERATION, index, |m| m.attributes.push(LinkAttribute::IfAlias(alias.into())))
    }

    /// Renames a link. Kernels before 6.2 want it down.
    ///
    /// # Errors
    /// When there is no such link, the name is taken or not valid.
    pub fn rename(&mut self, index: u32, name: &str) -> Result<()> {
        const OPERATION: &str = "rename link";
        check_name(OPERATION, name)?;
        self.change(OPERATION, index, |m| m.attributes.push(LinkAttribute::IfName(name.into())))
    }

    /// Stops the kernel from giving the link an IPv6 link-local address when it comes up. Without IPv6 in
    /// the kernel or on the link there is nothing to stop.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn set_addr_gen_none(&mut self, index: u32) -> Result<()> {
        let changed = self.change("set IPv6 address generation of link", index, |m| {
            m.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
                AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
            ])]));
        });
        match changed {
            Err(e) if e.errno() == Some(Errno::EAFNOSUPPORT) => Ok(()),
            other => other,
        }
    }

    /// All links of the namespace.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(skip_statistics());
        self.socket.dump("list", "links", &RouteNetlinkMessage::GetLink(message), decode_new_link)
    }

    /// The link of that name.
    ///
    /// # Errors
    /// When the name is not valid or the kernel does not answer.
    pub fn link_by_name(&mut self, name: &str) -> Result<Option<Link>> {
        const OPERATION: &str = "find";
        check_name(OPERATION, name)?;
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        self.find(OPERATION, &format!("link {name}"), message)
    }

    /// The link of that index.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<Link>> {
        let message = indexed("find", index)?;
        self.find("find", &object(index), message)
    }

    /// The link of that index in another namespace, known by the number that this namespace has for it
    /// ([`Link::peer_netnsid`]).
    ///
    /// # Errors
    /// When there is no such namespace.
    pub fn peer_link(&mut self, nsid: i32, peer_index: u32) -> Result<Option<Link>> {
        let mut message = indexed("find peer", peer_index)?;
        message.attributes.push(LinkAttribute::IfNetnsId(nsid));
        self.find("find peer", &object(peer_index), message)
    }

    fn create(&mut self, operation: &'static str, name: &str, message: LinkMessage) -> Result<Link> {
        let object = format!("link {name}");
        // With ECHO the kernel (6.2 and later) sends the new link along with the acknowledgement.
        let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO;
        let answers =
            self.socket.request(operation, &object, RouteNetlinkMessage::NewLink(message), flags)?;
        let echoed = answers
            .iter()
            .filter_map(|(kind, payload)| decode_new_link(*kind, payload))
            .find(|link| link.name == name);
        match echoed {
            Some(link) => Ok(link),
            None => self
                .link_by_name(name)?
                .ok_or_else(|| Error::answer(operation, object, "the new link is gone already")),
        }
    }

    fn change(
        &mut self,
        operation: &'static str,
        index: u32,
        fill: impl FnOnce(&mut LinkMessage),
    ) -> Result<()> {
        let mut message = indexed(operation, index)?;
        fill(&mut message);
        self.socket.request(operation, &object(index), RouteNetlinkMessage::SetLink(message), 0).map(drop)
    }

    fn find(
        &mut self,
        operation: &'static str,
        object: &str,
        mut message: LinkMessage,
    ) -> Result<Option<Link>> {
        message.attributes.push(skip_statistics());
        match self.socket.request(operation, object, RouteNetlinkMessage::GetLink(message), 0) {
            Ok(answers) => answers
                .iter()
                .find_map(|(kind, payload)| decode_new_link(*kind, payload))
                .map(Some)
                .ok_or_else(|| Error::answer(operation, object, "no link in it")),
            Err(e) if e.errno() == Some(Errno::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn named(name: &str, mtu: u32, mac: Option<[u8; 6]>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.into()));
    if mtu != 0 {
        message.attributes.push(LinkAttribute::Mtu(mtu));
    }
    if let Some(mac) = mac {
        message.attributes.push(LinkAttribute::Address(mac.to_vec()));
    }
    message
}

/// Index 0 means "by name" to the kernel: with no name in the message it could hit anything.
fn indexed(operation: &'static str, index: u32) -> Result<LinkMessage> {
    if index == 0 {
        return Err(Error::invalid(operation, "link 0", "interface indexes begin at 1"));
    }
    let mut message = LinkMessage::default();
    message.header.index = index;
    Ok(message)
}

fn set_flag(message: &mut LinkMessage, flag: LinkFlags, on: bool) {
    message.header.change_mask |= flag;
    message.header.flags.set(flag, on);
}

fn skip_statistics() -> LinkAttribute {
    LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])
}

fn object(index: u32) -> String {
    format!("link {index}")
}

fn check_name(operation: &'static str, name: &str) -> Result<()> {
    // The kernel's own rule, dev_valid_name.
    let cause = if name.is_empty() || name.len() > NAME_MAX {
        format!("an interface name has 1 to {NAME_MAX} bytes, this one has {}", name.len())
    } else if name == "."
        || name == ".."
        || name.contains(['/', ':', '\0'])
        || name.contains(char::is_whitespace)
    {
        "an interface name may not be '.' or '..' or contain '/', ':' or white space".into()
    } else {
        return Ok(());
    };
    Err(Error::invalid(operation, format!("link {name:?}"), cause))
}

fn check_alias(operation: &'static str, object: &str, alias: Option<&str>) -> Result<()> {
    match alias {
        Some(alias) if alias.len() > ALIAS_MAX => {
            let cause = format!("an alias has at most {ALIAS_MAX} bytes, this one has {}", alias.len());
            Err(Error::invalid(operation, object, cause))
        }
        _ => Ok(()),
    }
}

fn decode_new_link(kind: u16, payload: &[u8]) -> Option<Link> {
    if kind == libc::RTM_NEWLINK { decode_link(payload) } else { None }
}

/// Decodes `struct ifinfomsg` and the attributes that [`Link`] has.
pub(crate) fn decode_link(payload: &[u8]) -> Option<Link> {
    let flags = number(payload.get(8..)?)?;
    let mut link = Link {
        index: number(payload.get(4..)?)?,
        up: flags & libc::IFF_UP as u32 != 0,
        carrier: flags & libc::IFF_LOWER_UP as u32 != 0,
        ..Link::default()
    };
    for (kind, value) in Attributes(payload.get(IFINFOMSG..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = string(value),
            libc::IFLA_OPERSTATE => link.operational = value.first() == Some(&IF_OPER_UP),
            libc::IFLA_MTU => link.mtu = number(value)?,
            libc::IFLA_ADDRESS => link.mac = value.try_into().unwrap_or_default(),
            libc::IFLA_LINK => link.peer_index = number(value).filter(|peer| *peer != 0),
            libc::IFLA_LINK_NETNSID => {
                link.peer_netnsid = value.first_chunk().copied().map(i32::from_ne_bytes);
            }
            libc::IFLA_IFALIAS => link.alias = Some(string(value)),
            libc::IFLA_MASTER => link.master = number(value),
            libc::IFLA_GROUP => link.group = number(value)?,
            libc::IFLA_LINKINFO => {
                link.kind =
                    Attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND).map(|(_, v)| string(v));
            }
            _ => {}
        }
    }
    Some(link)
}
