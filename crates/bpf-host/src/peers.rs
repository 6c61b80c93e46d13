//! Where the cluster's addresses are: the peer tables, written by difference.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
};

use aya::maps::{HashMap, LpmTrie, Map, MapData, lpm_trie::Key};
use ipnet::IpNet;
use podway_abi::{Addr, peer_flags};

use crate::{Datapath, Error, Result, ignore_missing, lock};

/// Where an address or range of the cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Underlay address of the node that has it.
    pub node: IpAddr,
    /// What it is.
    pub flags: PeerFlags,
}

/// What a peer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerFlags {
    /// A node's own address, not a pod's.
    pub is_node: bool,
    /// On this node.
    pub local: bool,
}

/// What a synchronisation changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncReport {
    /// Entries added or changed.
    pub written: usize,
    /// Entries removed.
    pub removed: usize,
}

/// First address of `::ffff:0:0/96`, where IPv4 lives in the same tree.
const V4_MAPPED: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0);

/// The peer tables.
pub(crate) struct Peers {
    hosts: HashMap<MapData, Addr, podway_abi::Peer>,
    prefixes: LpmTrie<MapData, Addr, podway_abi::Peer>,
    /// What the two hold, once it has been read.
    known: Option<BTreeMap<IpNet, Peer>>,
}

impl Datapath {
    /// Makes the peer tables hold exactly `wanted`. Only the difference is written: new and changed entries
    /// first, so that no address is without an entry in between.
    ///
    /// # Errors
    /// [`Error::BadPeer`] for an IPv6 prefix that would also hold every IPv4 address; [`Error::Map`] when a
    /// table is full. What was written before the error stays and is known.
    pub fn sync_peers(&self, wanted: &BTreeMap<IpNet, Peer>) -> Result<SyncReport> {
        for prefix in wanted.keys() {
            if matches!(prefix, IpNet::V6(v6) if v6.prefix_len() < 96 && v6.contains(&V4_MAPPED)) {
                return Err(Error::BadPeer {
                    prefix: prefix.to_string(),
                    cause: "would match every IPv4 address as well; the cluster's ranges are longer",
                });
            }
        }
        let mut peers = lock(&self.peers);
        let mut known = match peers.known.take() {
            Some(known) => known,
            None => peers.read()?,
        };
        let mut result = peers.write_difference(&mut known, wanted);
        peers.known = Some(known);
        if !result.as_ref().is_ok_and(|report| report.written + report.removed == 0) {
            let raised = self.generation.raise();
            result = result.and_then(|report| raised.map(|()| report));
        }
        result
    }

    /// What the peer tables hold.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn peers(&self) -> Result<BTreeMap<IpNet, Peer>> {
        lock(&self.peers).read()
    }
}

impl Peers {
    pub(crate) fn new(hosts: Map, prefixes: Map) -> Result<Self> {
        Ok(Self { hosts: HashMap::try_from(hosts)?, prefixes: LpmTrie::try_from(prefixes)?, known: None })
    }

    /// Entries for single addresses, and for prefixes.
    pub(crate) fn count(&self) -> (usize, usize) {
        match &self.known {
            Some(known) => {
                let single = known.keys().filter(|p| p.prefix_len() == p.max_prefix_len()).count();
                (single, known.len() - single)
            }
            None => (self.hosts.keys().count(), self.prefixes.keys().count()),
        }
    }

    fn read(&self) -> Result<BTreeMap<IpNet, Peer>> {
        let mut all = BTreeMap::new();
        for entry in self.hosts.iter() {
            let (addr, peer) = entry.map_err(|e| Error::map("PEERS", e))?;
            all.insert(IpNet::from(IpAddr::from(addr)), from_abi(&peer));
        }
        for entry in self.prefixes.iter() {
            let (key, peer) = entry.map_err(|e| Error::map("PREFIXES", e))?;
            let addr = key.data();
            let len = if addr.is_v4() { key.prefix_len().saturating_sub(96) } else { key.prefix_len() };
            // The kernel holds nothing longer than 128 bits, so the prefix is one.
            if let Ok(prefix) = IpNet::new(IpAddr::from(addr), u8::try_from(len).unwrap_or(128)) {
                all.insert(prefix, from_abi(&peer));
            }
        }
        Ok(all)
    }

    fn write_difference(
        &mut self,
        known: &mut BTreeMap<IpNet, Peer>,
        wanted: &BTreeMap<IpNet, Peer>,
    ) -> Result<SyncReport> {
        let mut report = SyncReport::default();
        for (prefix, peer) in wanted {
            if known.get(prefix) == Some(peer) {
                continue;
            }
            self.write_peer(prefix, peer)?;
            known.insert(*prefix, *peer);
            report.written += 1;
        }
        let gone: Vec<IpNet> = known.keys().filter(|p| !wanted.contains_key(p)).copied().collect();
        for prefix in gone {
            self.remove_peer(&prefix)?;
            known.remove(&prefix);
            report.removed += 1;
        }
        Ok(report)
    }

    fn write_peer(&mut self, prefix: &IpNet, peer: &Peer) -> Result<()> {
        let value = to_abi(peer);
        let addr = Addr::from(prefix.addr());
        if prefix.prefix_len() == prefix.max_prefix_len() {
            self.hosts.insert(addr, value, 0).map_err(|e| Error::map("PEERS", e))
        } else {
            let key = Key::new(addr.prefix_len(prefix.prefix_len()), addr);
            self.prefixes.insert(&key, value, 0).map_err(|e| Error::map("PREFIXES", e))
        }
    }

    fn remove_peer(&mut self, prefix: &IpNet) -> Result<()> {
        let addr = Addr::from(prefix.addr());
        if prefix.prefix_len() == prefix.max_prefix_len() {
            ignore_missing(self.hosts.remove(&addr), "PEERS")
        } else {
            let key = Key::new(addr.prefix_len(prefix.prefix_len()), addr);
            ignore_missing(self.prefixes.remove(&key), "PREFIXES")
        }
    }
}

fn to_abi(peer: &Peer) -> podway_abi::Peer {
    let mut flags = 0;
    if peer.flags.is_node {
        flags |= peer_flags::NODE;
    }
    if peer.flags.local {
        flags |= peer_flags::LOCAL;
    }
    podway_abi::Peer { node: Addr::from(peer.node), flags }
}

fn from_abi(peer: &podway_abi::Peer) -> Peer {
    Peer {
        node: IpAddr::from(peer.node),
        flags: PeerFlags {
            is_node: peer.flags & peer_flags::NODE != 0,
            local: peer.flags & peer_flags::LOCAL != 0,
        },
    }
}
