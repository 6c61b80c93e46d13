//! Other namespaces as this one numbers them: the kernel gives each namespace that a link's peer is in a
//! number, and every namespace has numbers of its own.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use nix::libc;

use super::Netlink;
use crate::netns::reachable;
use crate::socket::Attributes;
use crate::{Error, Netns, Result};

const RTGENMSG: usize = 4;
const NETNSA_NSID: u16 = 1;

impl Netlink {
    /// The number that this socket's namespace has for another; none when it has none yet.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn nsid(&mut self, namespace: &Netns) -> Result<Option<i32>> {
        const OPERATION: &str = "look up number of";
        const OBJECT: &str = "network namespace";
        let fd: RawFd = namespace.as_fd().as_raw_fd();
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(fd.cast_unsigned()));
        let answers = self.socket.request(OPERATION, OBJECT, RouteNetlinkMessage::GetNsId(message), 0)?;
        let number =
            answers.iter().filter(|(kind, _)| *kind == libc::RTM_NEWNSID).find_map(|(_, payload)| {
                let (_, value) =
                    Attributes(payload.get(RTGENMSG..)?).find(|(kind, _)| *kind == NETNSA_NSID)?;
                value.first_chunk().copied().map(i32::from_ne_bytes)
            });
        // -1 is the kernel's "no number".
        number
            .map(|number| (number >= 0).then_some(number))
            .ok_or_else(|| Error::answer(OPERATION, OBJECT, "no number in it"))
    }

    /// Every namespace that this one has a number for and that has a name under [`crate::NETNS_DIR`] or a process
    /// visible in `/proc`. This looks at each process: once for many links, not once for each.
    ///
    /// # Errors
    /// When neither directory can be read or the kernel does not answer.
    pub fn peer_namespaces(&mut self) -> Result<BTreeMap<i32, Netns>> {
        let mut found = BTreeMap::new();
        for namespace in reachable()? {
            if let Some(number) = self.nsid(&namespace)? {
                found.insert(number, namespace);
            }
        }
        Ok(found)
    }

    /// Sets the MTU of the peer of a veth, in the namespace [`super::Link::peer_netnsid`].
    ///
    /// The kernel changes a link only from within its namespace (with IFLA_TARGET_NETNSID the request would
    /// move a link instead), so the namespace is searched for as in [`Self::peer_namespaces`]. With many peers
    /// call that once, and [`Netlink::open_in`] and [`Netlink::set_mtu`] for each.
    ///
    /// # Errors
    /// When the namespace has neither name nor process, there is no such link, or the MTU is outside of
    /// what it supports.
    pub fn set_peer_mtu(&mut self, nsid: i32, peer_index: u32, mtu: u32) -> Result<()> {
        match self.peer_namespaces()?.remove(&nsid) {
            Some(namespace) => Netlink::open_in(&namespace)?.set_mtu(peer_index, mtu),
            None => Err(Error::invalid(
                "set MTU of peer link",
                format!("link {peer_index} of namespace {nsid}"),
                "no process and no name under /run/netns belongs to the namespace",
            )),
        }
    }
}
