//! What the kernel tests share: a datapath of their own, filled with the cases' world.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use podway_abi::{Addr, Mac, peer_flags};
use podway_bpf_host::{AttachMethod, Counter, Datapath, Endpoint, Mode, NodeConfig, Peer, PeerFlags};
use podway_datapath_cases::world::{
    self, Change, HOST_1_MAC, HOST_2_MAC, HOST_3_MAC, Interfaces, POD_1, POD_1_MAC, POD_2, POD_2_MAC,
    POD_3_MAC,
};

/// Whether the test can run; says why not.
pub(crate) fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    } else if !podway_bpf_host::is_built_in() {
        println!("skipped: built without the kernel object (cargo xtask bpf)");
    }
    root && podway_bpf_host::is_built_in()
}

/// A datapath under a pin directory of its own, removed at the end.
pub(crate) struct TestDatapath {
    pub(crate) datapath: Option<Datapath>,
    pub(crate) pin_dir: PathBuf,
}

impl TestDatapath {
    pub(crate) fn new(name: &str, method: AttachMethod) -> Self {
        let pin_dir = PathBuf::from(format!("/sys/fs/bpf/podway-test-{name}"));
        // What an earlier run left when it was killed.
        let _ = Datapath::remove_all(&pin_dir);
        Self { datapath: Some(Datapath::load_with(&pin_dir, method).unwrap()), pin_dir }
    }

    pub(crate) fn get(&self) -> &Datapath {
        self.datapath.as_ref().unwrap()
    }

    /// Writes the world's tables in one of the two modes.
    pub(crate) fn fill(&self, overlay: bool, interfaces: &Interfaces) {
        let datapath = self.get();
        self.set_mode(overlay, interfaces);
        let _ = datapath.remove_endpoint(interfaces.pod_3);
        datapath.set_endpoint(&pod(1, interfaces.pod_1, POD_1_MAC, HOST_1_MAC, POD_1)).unwrap();
        datapath.set_endpoint(&pod(2, interfaces.pod_2, POD_2_MAC, HOST_2_MAC, POD_2)).unwrap();
        self.set_peers(world::peers());
    }

    /// Makes a change to the world of a mode.
    #[allow(dead_code, reason = "only the tests on devices have sequences")]
    pub(crate) fn change(&self, overlay: bool, interfaces: &Interfaces, change: Change) {
        let datapath = self.get();
        match change {
            Change::Pod1Goes => datapath.remove_endpoint(interfaces.pod_1).unwrap(),
            Change::Pod2Goes | Change::Pod2Moves => {
                datapath.remove_endpoint(interfaces.pod_2).unwrap();
                datapath.remove_endpoint(interfaces.pod_3).unwrap();
            }
            Change::Pod2IsReplaced => {
                datapath.remove_endpoint(interfaces.pod_2).unwrap();
                datapath.set_endpoint(&pod(3, interfaces.pod_3, POD_3_MAC, HOST_3_MAC, POD_2)).unwrap();
            }
            Change::OtherRangesMove => {}
            Change::ModeChanges => self.set_mode(!overlay, interfaces),
        }
        self.set_peers(world::peers_after(change));
    }

    fn set_mode(&self, overlay: bool, interfaces: &Interfaces) {
        let mode = if overlay {
            Mode::Overlay {
                tunnel_ifindex: interfaces.tunnel,
                vni: world::VNI,
                port: world::TUNNEL_PORT,
                underlay: world::NODE[0].parse().unwrap(),
            }
        } else {
            Mode::Direct
        };
        let uplink_ifindex = interfaces.uplink;
        self.get().set_config(&NodeConfig { mode, uplink_ifindex, stack_translates: false }).unwrap();
    }

    fn set_peers(&self, peers: Vec<(Addr, u8, podway_abi::Peer)>) {
        let peers: BTreeMap<IpNet, Peer> = peers
            .into_iter()
            .map(|(addr, len, peer)| (IpNet::new(IpAddr::from(addr), len).unwrap(), from_abi(&peer)))
            .collect();
        self.get().sync_peers(&peers).unwrap();
    }

    /// Sends what goes to the pods by way of the queues on their links.
    #[allow(dead_code, reason = "only the tests on devices have queues")]
    pub(crate) fn queue_all(&self) {
        for endpoint in self.get().endpoints().unwrap() {
            self.get().set_endpoint(&Endpoint { queued: true, ..endpoint }).unwrap();
        }
    }

    /// Packets counted so far for a hook and reason.
    pub(crate) fn count(&self, hook: &str, reason: &str) -> u64 {
        let counters: Vec<Counter> = self.get().counters().unwrap();
        counters.iter().find(|c| c.hook == hook && c.reason == reason).map_or(0, |c| c.packets)
    }
}

impl Drop for TestDatapath {
    fn drop(&mut self) {
        self.datapath.take();
        let _ = Datapath::remove_all(&self.pin_dir);
    }
}

fn pod(id: u32, ifindex: u32, pod_mac: Mac, host_mac: Mac, addresses: [&str; 2]) -> Endpoint {
    let addresses = addresses.iter().map(|t| t.parse().unwrap()).collect();
    Endpoint { id, ifindex, pod_mac, host_mac, addresses, queued: false }
}

fn from_abi(peer: &podway_abi::Peer) -> Peer {
    Peer {
        node: IpAddr::from(Addr { words: peer.node.words }),
        flags: PeerFlags {
            is_node: peer.flags & peer_flags::NODE != 0,
            local: peer.flags & peer_flags::LOCAL != 0,
        },
    }
}
