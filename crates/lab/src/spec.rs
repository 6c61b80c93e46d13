//! What a lab looks like: the options it was made with, and every name, path and address that follows from them.
//!
//! Pure. Labs are isolated from each other and from the machine, so all of them use the same addresses; only
//! names and paths carry the lab's name.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Most nodes of a lab: the last byte of 172.18.1.0/24 names the node.
pub const MAX_NODES: u16 = 200;
/// Domain of services and pods in the lab's names.
pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// Port of the API server on the fabric.
pub const API_PORT: u16 = 6443;
/// Port of the agents' metrics and health, in each node's namespace.
pub const AGENT_HEALTH_PORT: u16 = 9950;
/// Smallest underlay MTU: IPv6 needs 1280 (RFC 8200 section 5) inside the 70 bytes of VXLAN over IPv6.
pub const MIN_UNDERLAY_MTU: u32 = 1350;
/// Largest MTU that a veth takes.
pub const MAX_MTU: u32 = 65_535;
/// What every lab keeps its run-time files below.
pub const RUN_DIR: &str = "/run/podway";
/// What every lab keeps its pinned objects below.
pub const PIN_DIR: &str = "/sys/fs/bpf/podway";

/// A name that cannot be a lab's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("lab name {0:?}: {1}")]
pub struct BadName(String, &'static str);

/// Name of a lab: 1 to 20 lower-case letters, digits and `_`, beginning with a letter.
///
/// There is no `-` in it because namespaces are called `podway-<lab>-…`: lab `a` must not own the
/// namespaces of a lab `a-b`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Folder of the lab's state: description, logs, kubeconfigs.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        labs_dir().join(&self.0)
    }

    /// Run directory of all agents of the lab.
    #[must_use]
    pub fn agents_dir(&self) -> PathBuf {
        Path::new(RUN_DIR).join(&self.0)
    }

    /// Pinned BPF objects of all agents of the lab.
    #[must_use]
    pub fn pin_dir(&self) -> PathBuf {
        Path::new(PIN_DIR).join(&self.0)
    }

    /// What the name of every network namespace of the lab begins with.
    #[must_use]
    pub fn netns_prefix(&self) -> String {
        format!("podway-{}-", self.0)
    }

    /// Network namespace of the fabric that connects the nodes.
    #[must_use]
    pub fn fabric_netns(&self) -> String {
        format!("podway-{}-fabric", self.0)
    }

    /// Network namespace of the client beyond the nodes.
    #[must_use]
    pub fn outside_netns(&self) -> String {
        format!("podway-{}-outside", self.0)
    }

    /// Network namespace of a node.
    #[must_use]
    pub fn node_netns(&self, node: &str) -> String {
        format!("podway-{}-{node}", self.0)
    }

    /// Network namespace of a pod. Names that would be too long for a file end in a hash instead.
    #[must_use]
    pub fn pod_netns(&self, namespace: &str, pod: &str) -> String {
        bounded(format!("podway-{}-pod-{namespace}-{pod}", self.0), &format!("{namespace}/{pod}"))
    }

    /// Folder of a pod's files below the state folder.
    #[must_use]
    pub fn pod_dir(&self, namespace: &str, pod: &str) -> PathBuf {
        self.state_dir().join("pods").join(pod_file(namespace, pod))
    }

    /// Folder of a node's files below the state folder.
    #[must_use]
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.state_dir().join("nodes").join(node)
    }
}

/// Folder of all labs' state.
#[must_use]
pub fn labs_dir() -> PathBuf {
    Path::new(RUN_DIR).join("labs")
}

/// `<namespace>_<pod>`, as a file name. Neither part may hold a `_`, so two pods never share one.
#[must_use]
pub fn pod_file(namespace: &str, pod: &str) -> String {
    bounded(format!("{namespace}_{pod}"), &format!("{namespace}/{pod}"))
}

fn bounded(name: String, identity: &str) -> String {
    const LIMIT: usize = 200;
    if name.len() <= LIMIT {
        return name;
    }
    // FNV-1a: stable over versions, and the cut name makes a collision harmless to guess at.
    let hash = identity
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
    let mut end = LIMIT - 17;
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{hash:016x}", &name[..end])
}

impl FromStr for LabName {
    type Err = BadName;
    fn from_str(s: &str) -> Result<Self, BadName> {
        let bad = |why| Err(BadName(s.to_owned(), why));
        if s.is_empty() || s.len() > 20 {
            return bad("must have 1 to 20 characters");
        }
        if !s.starts_with(|c: char| c.is_ascii_lowercase())
            || !s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        {
            return bad("only lower-case letters, digits and '_', beginning with a letter");
        }
        if matches!(s, "labs" | "node") {
            return bad("taken: Podway itself uses this name below /run/podway");
        }
        Ok(Self(s.to_owned()))
    }
}

impl TryFrom<String> for LabName {
    type Error = BadName;
    fn try_from(s: String) -> Result<Self, BadName> {
        s.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How packets travel between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// In VXLAN.
    Vxlan,
    /// Routed by node address, without encapsulation.
    Direct,
}

impl Mode {
    /// As options spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Direct => "direct",
        }
    }
}

/// Address families of pods and services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4 alone.
    Ipv4,
    /// IPv6 alone.
    Ipv6,
    /// Both, IPv4 first.
    Dual,
}

impl Family {
    /// Whether pods have IPv4 addresses.
    #[must_use]
    pub fn has_v4(self) -> bool {
        self != Self::Ipv6
    }

    /// Whether pods have IPv6 addresses.
    #[must_use]
    pub fn has_v6(self) -> bool {
        self != Self::Ipv4
    }
}

/// Address family of the wire between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnderlayFamily {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// By what mechanism the agents serve Services.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceMode {
    /// eBPF.
    #[default]
    Ebpf,
    /// nftables.
    Nftables,
    /// iptables.
    Iptables,
    /// IPVS.
    Ipvs,
    /// Not at all.
    None,
}

impl ServiceMode {
    /// As options spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::None => "none",
        }
    }
}

/// Options of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LabSpec {
    /// Name.
    pub name: LabName,
    /// Number of nodes, from 1.
    pub nodes: u16,
    /// Number of zones that the nodes are dealt out to in turn.
    pub zones: u16,
    /// Overlay or direct routing.
    pub mode: Mode,
    /// Families of pods.
    pub family: Family,
    /// Family of the underlay.
    pub underlay_family: UnderlayFamily,
    /// MTU of the underlay in bytes.
    pub underlay_mtu: u32,
    /// Pod MTU to force on the agents, against what they derive.
    pub pod_mtu: Option<u32>,
    /// UDP port of VXLAN.
    pub vxlan_port: u16,
    /// VXLAN network identifier, 24 bits.
    pub vxlan_vni: u32,
    /// By what mechanism Services are served.
    #[serde(default)]
    pub service_mode: ServiceMode,
    /// Give what goes to cluster IPs the node's address, also when a pod sends it.
    #[serde(default)]
    pub masquerade_all: bool,
    /// Name of how IPVS chooses among endpoints, as the agent takes it; its default when absent.
    #[serde(default)]
    pub ipvs_scheduler: Option<String>,
    /// Addresses for Services of type LoadBalancer; empty is a range of the underlay of each family.
    #[serde(default)]
    pub load_balancer_pool: Vec<IpNet>,
}

/// An option that makes no lab.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {cause}")]
pub struct BadOption {
    /// The option as the user writes it.
    pub option: &'static str,
    /// Why not, and what to do.
    pub cause: String,
}

impl LabSpec {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// With the option and what it may be.
    pub fn validate(&self) -> Result<(), BadOption> {
        let bad = |option, cause| Err(BadOption { option, cause });
        if !(1..=MAX_NODES).contains(&self.nodes) {
            return bad("--nodes", format!("{} is not 1 to {MAX_NODES}", self.nodes));
        }
        if !(1..=self.nodes).contains(&self.zones) {
            let text = format!("{} is not 1 to {}, the number of nodes", self.zones, self.nodes);
            return bad("--zones", text);
        }
        if !(MIN_UNDERLAY_MTU..=MAX_MTU).contains(&self.underlay_mtu) {
            return bad(
                "--underlay-mtu",
                format!("{} is not {MIN_UNDERLAY_MTU} to {MAX_MTU} bytes", self.underlay_mtu),
            );
        }
        if let Some(mtu) = self.pod_mtu
            && !(1280..=MAX_MTU).contains(&mtu)
        {
            return bad("--pod-mtu", format!("{mtu} is not 1280 to {MAX_MTU} bytes"));
        }
        if !(1..1 << 24).contains(&self.vxlan_vni) {
            return bad("--vxlan-vni", format!("{} is not 1 to {}", self.vxlan_vni, (1 << 24) - 1));
        }
        match self.vxlan_port {
            0 => return bad("--vxlan-port", "0 is no UDP port; use 1 to 65535".into()),
            podway_link::probe::DEFAULT_PORT => {
                return bad("--vxlan-port", format!("{} is the port of the path MTU proof", self.vxlan_port));
            }
            AGENT_HEALTH_PORT => {
                return bad("--vxlan-port", format!("{} is the port of the agents' health", self.vxlan_port));
            }
            _ => {}
        }
        if let Some(name) = &self.ipvs_scheduler
            && self.service_mode != ServiceMode::Ipvs
        {
            let text = format!(
                "{name} is how IPVS chooses, but services are served by {}; leave it out, or add --service-mode ipvs",
                self.service_mode.as_str()
            );
            return bad("--ipvs-scheduler", text);
        }
        if self.masquerade_all && matches!(self.service_mode, ServiceMode::Ebpf | ServiceMode::None) {
            let text = format!(
                "{} cannot do it; leave it out, or add --service-mode nftables, iptables or ipvs",
                self.service_mode.as_str()
            );
            return bad("--masquerade-all", text);
        }
        for net in &self.load_balancer_pool {
            let inside = |n: &IpNet| n.contains(net) || net.contains(n);
            if net.trunc() != *net {
                return bad(
                    "--load-balancer-pool",
                    format!("{net} has host bits set; the range is {}", net.trunc()),
                );
            }
            if let Some(taken) = self.cluster_cidrs().iter().chain(&self.service_cidrs()).find(|n| inside(n))
            {
                return bad("--load-balancer-pool", format!("{net} overlaps the lab's {taken}"));
            }
            let nodes = self.node_plans();
            let mut others = nodes.iter().flat_map(|n| n.addresses.clone()).chain(self.fabric_addresses());
            if let Some(address) = others.find(|a| net.contains(a)) {
                return bad("--load-balancer-pool", format!("{net} holds {address}, which is taken"));
            }
            if !self.underlay_cidrs().iter().any(|n| n.contains(net)) {
                let text =
                    format!("{net} is not on the network of the nodes, so nobody would ask for it there");
                return bad("--load-balancer-pool", text);
            }
        }
        if self.mode == Mode::Direct {
            let underlay_is_v6 = self.underlay_family == UnderlayFamily::Ipv6;
            // Without encapsulation the nodes' own addresses are the next hops.
            if underlay_is_v6 && self.family == Family::Ipv4 {
                return bad(
                    "--underlay-family",
                    "direct routing of IPv4 pods needs an IPv4 underlay; use --mode vxlan for IPv4 over IPv6"
                        .into(),
                );
            }
        }
        Ok(())
    }

    /// Whether nodes need IPv4 addresses.
    #[must_use]
    pub fn underlay_has_v4(&self) -> bool {
        self.family.has_v4() || self.underlay_family == UnderlayFamily::Ipv4
    }

    /// Whether nodes need IPv6 addresses.
    #[must_use]
    pub fn underlay_has_v6(&self) -> bool {
        self.family.has_v6() || self.underlay_family == UnderlayFamily::Ipv6
    }

    /// The nodes, in order.
    #[must_use]
    pub fn node_plans(&self) -> Vec<NodePlan> {
        (1..=self.nodes).map(|i| self.node_plan(i)).collect()
    }

    /// The plan of a node by its name, also of one that was not there from the beginning.
    #[must_use]
    pub fn plan_of(&self, name: &str) -> Option<NodePlan> {
        let index: u16 = name.strip_prefix("node-")?.parse().ok()?;
        let plan = self.node_plan(index);
        // `node-01` and `node-+1` are no names of ours.
        ((1..=MAX_NODES).contains(&index) && plan.name == name).then_some(plan)
    }

    /// The plan of the node with this number, 1 to [`MAX_NODES`].
    #[must_use]
    pub fn node_plan(&self, index: u16) -> NodePlan {
        // At most MAX_NODES, so the number fits into one byte.
        let [_, low] = index.to_be_bytes();
        let v4 = IpAddr::V4(Ipv4Addr::new(172, 18, 1, low));
        let v6 = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 1, index));
        let mut addresses = self.both(v4, v6, self.underlay_has_v4(), self.underlay_has_v6());
        if self.underlay_family == UnderlayFamily::Ipv6 {
            addresses.reverse();
        }
        let mut pod_cidrs = Vec::new();
        if self.family.has_v4() {
            pod_cidrs.push(IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 244, low, 0), 24)));
        }
        if self.family.has_v6() {
            let net = Ipv6Addr::new(0xfd00, 0x10, 0x244, index, 0, 0, 0, 0);
            pod_cidrs.push(IpNet::V6(Ipv6Net::new_assert(net, 64)));
        }
        NodePlan {
            name: format!("node-{index}"),
            addresses,
            pod_cidrs,
            zone: format!("zone-{}", index.saturating_sub(1) % self.zones.max(1) + 1),
            region: "lab".into(),
        }
    }

    fn both(&self, v4: IpAddr, v6: IpAddr, has_v4: bool, has_v6: bool) -> Vec<IpAddr> {
        [(v4, has_v4), (v6, has_v6)].into_iter().filter(|(_, has)| *has).map(|(a, _)| a).collect()
    }

    /// Addresses of the fabric itself, underlay family first. They stand for the world outside of the cluster.
    #[must_use]
    pub fn fabric_addresses(&self) -> Vec<IpAddr> {
        let v4 = IpAddr::V4(Ipv4Addr::new(172, 18, 0, 1));
        let v6 = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 1));
        let mut out = self.both(v4, v6, self.underlay_has_v4(), self.underlay_has_v6());
        if self.underlay_family == UnderlayFamily::Ipv6 {
            out.reverse();
        }
        out
    }

    /// Addresses of the client beyond the nodes and of the router before it, by family.
    #[must_use]
    pub fn outside_addresses(&self) -> Vec<(IpAddr, IpAddr)> {
        let v4 = |last| IpAddr::V4(Ipv4Addr::new(172, 19, 0, last));
        let v6 = |last| IpAddr::V6(Ipv6Addr::new(0xfd00, 0x172, 0x19, 0, 0, 0, 0, last));
        let clients = self.both(v4(2), v6(2), self.underlay_has_v4(), self.underlay_has_v6());
        let routers = self.both(v4(1), v6(1), self.underlay_has_v4(), self.underlay_has_v6());
        clients.into_iter().zip(routers).collect()
    }

    /// Prefixes of the underlay.
    #[must_use]
    pub fn underlay_cidrs(&self) -> Vec<IpNet> {
        let net = |address| IpNet::new_assert(address, underlay_prefix(address)).trunc();
        self.fabric_addresses().into_iter().map(net).collect()
    }

    /// All pods' prefixes.
    #[must_use]
    pub fn cluster_cidrs(&self) -> Vec<IpNet> {
        let v4 = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16));
        let v6 = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0), 48));
        [(v4, self.family.has_v4()), (v6, self.family.has_v6())]
            .into_iter()
            .filter_map(|(net, has)| has.then_some(net))
            .collect()
    }

    /// Prefixes of service addresses.
    #[must_use]
    pub fn service_cidrs(&self) -> Vec<IpNet> {
        let v4 = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16));
        let v6 = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 112));
        [(v4, self.family.has_v4()), (v6, self.family.has_v6())]
            .into_iter()
            .filter_map(|(net, has)| has.then_some(net))
            .collect()
    }

    /// Addresses for Services of type LoadBalancer.
    #[must_use]
    pub fn load_balancer_cidrs(&self) -> Vec<IpNet> {
        if !self.load_balancer_pool.is_empty() {
            return self.load_balancer_pool.clone();
        }
        let v4 = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(172, 18, 200, 0), 24));
        let v6 = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0x200, 0), 112));
        [(v4, self.family.has_v4()), (v6, self.family.has_v6())]
            .into_iter()
            .filter_map(|(net, has)| has.then_some(net))
            .collect()
    }

    /// Service addresses of the cluster's DNS: the tenth of each prefix.
    #[must_use]
    pub fn dns_addresses(&self) -> Vec<IpAddr> {
        let v4 = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10));
        let v6 = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 10));
        self.both(v4, v6, self.family.has_v4(), self.family.has_v6())
    }

    /// Addresses of the `kubernetes` Service: the first of each prefix.
    #[must_use]
    pub fn api_service_addresses(&self) -> Vec<IpAddr> {
        let v4 = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
        let v6 = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1));
        self.both(v4, v6, self.family.has_v4(), self.family.has_v6())
    }
}

/// One node of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlan {
    /// `node-1` and so on.
    pub name: String,
    /// Addresses on the underlay, the underlay's family first.
    pub addresses: Vec<IpAddr>,
    /// Prefixes of the node's pods.
    pub pod_cidrs: Vec<IpNet>,
    /// `topology.kubernetes.io/zone`.
    pub zone: String,
    /// `topology.kubernetes.io/region`.
    pub region: String,
}

/// Prefix length of the underlay for an address of it.
#[must_use]
pub fn underlay_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 16 } else { 64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> LabSpec {
        LabSpec {
            name: "lab".parse().expect("name"),
            nodes: 3,
            zones: 2,
            mode: Mode::Vxlan,
            family: Family::Ipv4,
            underlay_family: UnderlayFamily::Ipv4,
            underlay_mtu: 1500,
            pod_mtu: None,
            vxlan_port: 8472,
            vxlan_vni: 1,
            service_mode: ServiceMode::Ebpf,
            masquerade_all: false,
            ipvs_scheduler: None,
            load_balancer_pool: Vec::new(),
        }
    }

    #[test]
    fn names_that_could_be_taken_for_others_are_refused() {
        for (name, ok) in [
            ("lab", true),
            ("a_b2", true),
            ("", false),
            ("a-b", false),
            ("Lab", false),
            ("2a", false),
            ("..", false),
            ("a/b", false),
            ("labs", false),
            ("node", false),
            ("abcdefghijklmnopqrstu", false),
        ] {
            assert_eq!(name.parse::<LabName>().is_ok(), ok, "{name}");
        }
    }

    #[test]
    fn long_pod_names_stay_apart_and_fit() {
        let lab: LabName = "lab".parse().expect("name");
        let (a, b) = ("x".repeat(250) + "a", "x".repeat(250) + "b");
        let (a, b) = (lab.pod_netns("ns", &a), lab.pod_netns("ns", &b));
        assert!(a.len() <= 200 && b.len() <= 200 && a != b, "{a} {b}");
        assert_eq!(lab.pod_netns("ns", "p"), "podway-lab-pod-ns-p");
    }

    #[test]
    fn addresses_follow_from_family_and_number() {
        for (family, underlay, node, pods) in [
            (Family::Ipv4, UnderlayFamily::Ipv4, "172.18.1.2", "10.244.2.0/24"),
            (Family::Ipv6, UnderlayFamily::Ipv6, "fd00:172:18::1:2", "fd00:10:244:2::/64"),
            (
                Family::Dual,
                UnderlayFamily::Ipv4,
                "172.18.1.2 fd00:172:18::1:2",
                "10.244.2.0/24 fd00:10:244:2::/64",
            ),
            (
                Family::Dual,
                UnderlayFamily::Ipv6,
                "fd00:172:18::1:2 172.18.1.2",
                "10.244.2.0/24 fd00:10:244:2::/64",
            ),
            (Family::Ipv4, UnderlayFamily::Ipv6, "fd00:172:18::1:2 172.18.1.2", "10.244.2.0/24"),
        ] {
            let spec = LabSpec { family, underlay_family: underlay, ..spec() };
            let plan = &spec.node_plans()[1];
            let text = |v: Vec<String>| v.join(" ");
            assert_eq!(text(plan.addresses.iter().map(ToString::to_string).collect()), node);
            assert_eq!(text(plan.pod_cidrs.iter().map(ToString::to_string).collect()), pods);
            assert_eq!((plan.zone.as_str(), plan.name.as_str()), ("zone-2", "node-2"));
        }
    }

    #[test]
    fn plans_are_found_by_name() {
        for (name, zone) in [
            ("node-1", Some("zone-1")),
            ("node-4", Some("zone-2")),
            ("node-200", Some("zone-2")),
            ("node-201", None),
            ("node-0", None),
            ("node-01", None),
            ("fabric", None),
        ] {
            assert_eq!(spec().plan_of(name).map(|p| p.zone).as_deref(), zone, "{name}");
        }
    }

    #[test]
    fn impossible_options_are_named() {
        let pool = |net: &str| LabSpec { load_balancer_pool: vec![net.parse().expect("range")], ..spec() };
        assert_eq!(pool("172.18.9.0/24").validate(), Ok(()));
        for (change, option) in [
            (LabSpec { nodes: 0, ..spec() }, "--nodes"),
            (LabSpec { ipvs_scheduler: Some("lc".into()), ..spec() }, "--ipvs-scheduler"),
            (LabSpec { masquerade_all: true, ..spec() }, "--masquerade-all"),
            (LabSpec { nodes: 201, ..spec() }, "--nodes"),
            (LabSpec { zones: 4, ..spec() }, "--zones"),
            (LabSpec { underlay_mtu: 1000, ..spec() }, "--underlay-mtu"),
            (LabSpec { pod_mtu: Some(100), ..spec() }, "--pod-mtu"),
            (LabSpec { vxlan_vni: 1 << 24, ..spec() }, "--vxlan-vni"),
            (LabSpec { vxlan_vni: 0, ..spec() }, "--vxlan-vni"),
            (LabSpec { vxlan_port: 0, ..spec() }, "--vxlan-port"),
            (LabSpec { vxlan_port: 9949, ..spec() }, "--vxlan-port"),
            (LabSpec { vxlan_port: 9950, ..spec() }, "--vxlan-port"),
            (pool("172.18.1.0/24"), "--load-balancer-pool"),
            (pool("10.96.7.0/24"), "--load-balancer-pool"),
            (pool("192.0.2.0/24"), "--load-balancer-pool"),
            (pool("172.18.9.1/24"), "--load-balancer-pool"),
            (
                LabSpec { mode: Mode::Direct, underlay_family: UnderlayFamily::Ipv6, ..spec() },
                "--underlay-family",
            ),
        ] {
            assert_eq!(change.validate().map_err(|e| e.option), Err(option));
        }
        assert_eq!(spec().validate(), Ok(()));
    }
}
