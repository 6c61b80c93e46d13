//! The networks that are compared: three pods on two nodes, connected by Podway or by what the kernel has.
//!
//! The peer is what a careful administrator would set up by hand: per node a bridge with the pods on it, and a kernel
//! VXLAN device with static neighbours and a route to the other node's pods. Wire, addresses, MTU and sysctls are
//! those of a lab. With rules, both nodes have what kube-proxy would have put there, and bridged packets pass through
//! them as on any node with `net.bridge.bridge-nf-call-iptables=1`.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use podway_link::{Netns, sysctl};

use crate::cluster::{Cluster, NAMESPACE};
use crate::namespaces::Group;
use crate::place::{Running, start};
use crate::rules;
use crate::stop::Stop;
use crate::traffic::{Kind, LISTENING, Outcome};

/// Longest time that a tool may take to set something up.
const TOOL_TIMEOUT: Duration = Duration::from_secs(60);
/// What a client may take beyond the time that it measures for.
const CLIENT_SLACK: Duration = Duration::from_secs(10);
/// MTU of pods: what VXLAN over IPv4 leaves of 1500 bytes.
const POD_MTU: u32 = 1450;
/// Switches iptables on for bridged packets.
const BRIDGE_CALLS: &str = "net/bridge/bridge-nf-call-iptables";

/// Which way traffic goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Between pods on one node.
    SameNode,
    /// Between pods on two nodes.
    TwoNodes,
}

/// Cores of client and server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cores {
    /// Where the client runs.
    pub client: usize,
    /// Where the server runs.
    pub server: usize,
}

/// Three pods that can be measured between: one with the client, two with servers.
#[derive(Debug)]
pub struct Network {
    /// For tables.
    pub name: String,
    client: Netns,
    same: Server,
    far: Server,
}

#[derive(Debug)]
struct Server {
    address: IpAddr,
    process: Running,
}

/// The command that runs a part of the bench in a process of its own.
#[must_use]
pub fn own_part(arguments: &[&str]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("bench").args(arguments);
    command
}

impl Server {
    fn start(netns: &Netns, address: IpAddr) -> anyhow::Result<Self> {
        let mut process = start(netns, None, own_part(&["serve"]))?;
        let said = process.line().context("start the bench's server")?;
        if said != LISTENING {
            bail!("the bench's server said {said:?}");
        }
        Ok(Self { address, process })
    }
}

impl Network {
    /// The pods of a lab.
    ///
    /// # Errors
    /// When a pod has no address or a server does not start.
    pub fn of_cluster(cluster: &Cluster) -> anyhow::Result<Self> {
        let netns = |pod: &str| Netns::open_named(&cluster.name.pod_netns(NAMESPACE, pod));
        let server = |pod: &str| {
            let seen = cluster.seen.pods.iter().find(|p| p.name == pod);
            let address =
                seen.and_then(|p| p.addresses.first()).with_context(|| format!("{pod} has no address"))?;
            Server::start(&netns(pod)?, *address)
        };
        Ok(Self { name: "podway".into(), client: netns(CLIENT)?, same: server(SAME)?, far: server(FAR)? })
    }

    /// Measures once.
    ///
    /// # Errors
    /// When the client fails, or the bench is to end.
    pub fn measure(
        &self,
        path: Path,
        kind: Kind,
        cores: Cores,
        time: Duration,
        stop: &Stop,
    ) -> anyhow::Result<Outcome> {
        let server = match path {
            Path::SameNode => &self.same,
            Path::TwoNodes => &self.far,
        };
        server.process.pin(cores.server)?;
        let kind = if kind == Kind::Stream { "stream" } else { "requests" };
        let (address, milliseconds) = (server.address.to_string(), time.as_millis().to_string());
        let client = own_part(&["measure", kind, &address, "--milliseconds", &milliseconds]);
        let client = start(&self.client, Some(cores.client), client)?;
        let finished = client
            .finish(&[], time + CLIENT_SLACK, stop)
            .with_context(|| format!("{kind} over {}", self.name))?;
        // Ctrl-C on a terminal reaches the client as well.
        stop.check()?;
        if !finished.status.success() {
            bail!("{kind} over {}: the client ended with {}", self.name, finished.status);
        }
        serde_json::from_slice(&finished.stdout).context("understand the client")
    }
}

/// Names of the pods: with the client, on its node, on the other node.
pub const CLIENT: &str = "client";
/// See [`CLIENT`].
pub const SAME: &str = "same";
/// See [`CLIENT`].
pub const FAR: &str = "far";

/// The kernel's own means, in a group of namespaces.
#[derive(Debug)]
pub struct Peer {
    // Servers end before their namespaces go.
    /// The pods.
    pub network: Network,
    _group: Group,
}

/// What has to be on the machine for [`Peer`].
pub const PEER_TOOLS: [&str; 2] = ["ip", "bridge"];

impl Peer {
    /// Sets up bridge and VXLAN. With `rules` (the program that loads them, and how many services) iptables as well.
    ///
    /// # Errors
    /// When a tool fails; what it said is on standard error.
    pub fn up(name: &str, group: &str, rules: Option<(&str, u16)>, stop: &Stop) -> anyhow::Result<Self> {
        let group = Group::new(group)?;
        let mut made = Vec::new();
        for part in ["fabric", "node1", "node2", CLIENT, SAME, FAR] {
            made.push(group.create(part)?);
        }
        let [fabric, node1, node2, client, same, far] = made.as_slice() else {
            bail!("six namespaces were made")
        };
        for node in [node1, node2] {
            node.run(|| node_sysctls(rules.is_some()))??;
        }
        let n = |part: &str| group.name(part);
        let mut batch = "link add fabric0 mtu 1500 type bridge\nlink set fabric0 up\n".to_owned();
        for i in [1, 2] {
            batch += &format!(
                "link add node{i} mtu 1500 type veth peer name eth0 netns {}\n\
                 link set node{i} master fabric0 up\n",
                n(&format!("node{i}"))
            );
        }
        tool(fabric, "ip", &["-batch", "-"], &batch, stop)?;
        for (node, own, other, pods) in
            [(node1, 1, 2, &[(CLIENT, client), (SAME, same)][..]), (node2, 2, 1, &[(FAR, far)])]
        {
            tool(node, "ip", &["-batch", "-"], &node_batch(own, other), stop)?;
            let other_end = format!("fdb append {} dev vxlan0 dst 172.18.1.{other}\n", vtep_mac(other));
            tool(node, "bridge", &["-batch", "-"], &other_end, stop)?;
            for (index, (pod, netns)) in pods.iter().enumerate() {
                let batch = format!(
                    "link add {pod} mtu {POD_MTU} type veth peer name eth0 mtu {POD_MTU} netns {}\n\
                     link set {pod} master cni0 up\n",
                    n(pod)
                );
                tool(node, "ip", &["-batch", "-"], &batch, stop)?;
                let batch = format!(
                    "addr add 10.244.{own}.{}/24 dev eth0\nlink set eth0 up\nroute add default via 10.244.{own}.1\n",
                    index + 2
                );
                tool(netns, "ip", &["-batch", "-"], &batch, stop)?;
            }
            if let Some((restore, services)) = rules {
                tool(node, restore, &[], &rules::kube_proxy(services), stop)?;
            }
        }
        let address = |node, last| IpAddr::V4(Ipv4Addr::new(10, 244, node, last));
        let network = Network {
            name: name.into(),
            client: client.try_clone()?,
            same: Server::start(same, address(1, 3))?,
            far: Server::start(far, address(2, 2))?,
        };
        Ok(Self { network, _group: group })
    }
}

fn node_batch(own: u8, other: u8) -> String {
    format!(
        "addr add 172.18.1.{own}/16 dev eth0\n\
         link set eth0 up\n\
         link add cni0 mtu {POD_MTU} type bridge\n\
         addr add 10.244.{own}.1/24 dev cni0\n\
         link set cni0 up\n\
         link add vxlan0 address {} mtu {POD_MTU} type vxlan id 1 local 172.18.1.{own} dev eth0 dstport 8472 \
         nolearning noudpcsum\n\
         addr add 10.244.{own}.0/32 dev vxlan0\n\
         link set vxlan0 up\n\
         route add 10.244.{other}.0/24 via 10.244.{other}.0 dev vxlan0 onlink\n\
         neigh add 10.244.{other}.0 lladdr {} dev vxlan0 nud permanent\n",
        vtep_mac(own),
        vtep_mac(other)
    )
}

fn vtep_mac(node: u8) -> String {
    format!("02:00:00:00:00:{node:02x}")
}

fn node_sysctls(rules: bool) -> podway_link::Result<()> {
    for (path, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv6/conf/all/accept_ra", "0"),
    ] {
        sysctl::write_if_present(path, value)?;
    }
    // New namespaces have it on where the kernel has it; a bare bridge is one without.
    sysctl::write_if_present(BRIDGE_CALLS, if rules { "1" } else { "0" })?;
    Ok(())
}

/// Whether bridged packets can be made to pass iptables on this machine.
#[must_use]
pub fn bridges_call_iptables() -> bool {
    sysctl::read(BRIDGE_CALLS).is_ok()
}

/// The tool that loads iptables rules: the one over x_tables if it is there, because it is the faster one.
#[must_use]
pub fn rules_tool() -> Option<&'static str> {
    ["iptables-legacy-restore", "iptables-restore"].into_iter().find(|tool| on_path(tool))
}

/// Whether a program is there.
#[must_use]
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn tool(netns: &Netns, program: &str, arguments: &[&str], input: &str, stop: &Stop) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    command.args(arguments);
    let finished = start(netns, None, command)?.finish(input.as_bytes(), TOOL_TIMEOUT, stop)?;
    if !finished.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), finished.status);
    }
    Ok(())
}
