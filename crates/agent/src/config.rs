//! What an agent is told when it starts, checked before anything is touched.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use podway_kube::Credentials;

use crate::flows::FlowsConfig;
use crate::ids::Instance;
use crate::services::config::ServicesConfig;

/// Name of the tunnel device.
pub const TUNNEL_DEVICE: &str = "podway_vxlan";
/// Default UDP port of VXLAN here: the one Linux used before RFC 7348, which cluster networks kept.
pub const DEFAULT_VXLAN_PORT: u16 = 8472;
/// Default VXLAN network identifier.
pub const DEFAULT_VNI: u32 = 1;
/// Default port of metrics and health.
pub const DEFAULT_METRICS_PORT: u16 = 9950;
/// The pod's IPv4 gateway: link-local, the same in every pod, so that it costs no address of the podCIDR.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The pod's IPv6 gateway.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// How pods of other nodes are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkMode {
    /// Through VXLAN (RFC 7348).
    Vxlan {
        /// UDP destination port.
        port: u16,
        /// Network identifier, 24 bits.
        vni: u32,
    },
    /// By routes to the nodes, which share a link.
    Direct,
}

impl NetworkMode {
    /// Bytes that a packet grows by on its way to another node.
    #[must_use]
    pub fn overhead(self, underlay_v6: bool) -> u32 {
        match (self, underlay_v6) {
            (Self::Direct, _) => 0,
            // Inner Ethernet 14, VXLAN 8, UDP 8, and IPv4 20 or IPv6 40.
            (Self::Vxlan { .. }, false) => 50,
            (Self::Vxlan { .. }, true) => 70,
        }
    }
}

/// Source address translation of what leaves the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masquerade {
    /// Whether it is done at all.
    pub enabled: bool,
    /// Destinations that see the pods' own addresses.
    pub exclude: Vec<IpNet>,
}

/// Where metrics and health are served: `:9950`, `127.0.0.1:9950`, `[::1]:9950`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenAddress {
    /// `None` is every address of the node.
    pub ip: Option<IpAddr>,
    /// TCP port.
    pub port: u16,
}

impl FromStr for ListenAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError {
            field: "metrics-address",
            cause: format!("{text:?} is not an address with a port, such as :9950 or 127.0.0.1:9950"),
        };
        if let Some(port) = text.strip_prefix(':') {
            return Ok(Self { ip: None, port: port.parse().map_err(|_| bad())? });
        }
        let address: SocketAddr = text.parse().map_err(|_| bad())?;
        Ok(Self { ip: Some(address.ip()), port: address.port() })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            Some(ip) => write!(f, "{}", SocketAddr::new(ip, self.port)),
            None => write!(f, ":{}", self.port),
        }
    }
}

/// A setting that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{field}: {cause}")]
pub struct ConfigError {
    /// Name of the flag.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub cause: String,
}

/// Everything an agent is told. [`Self::new`] has the defaults.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Name of this node's Node object.
    pub node_name: String,
    /// Which agent on this machine this is.
    pub instance: Instance,
    /// How to reach the API server.
    pub credentials: Credentials,
    /// How pods of other nodes are reached.
    pub mode: NetworkMode,
    /// Family of the addresses between the nodes (`true` is IPv6); `None` is that of the Node's first
    /// InternalIP.
    pub underlay_v6: Option<bool>,
    /// MTU of the pods, instead of the one that fits.
    pub pod_mtu: Option<u32>,
    /// Source address translation of what leaves the cluster.
    pub masquerade: Masquerade,
    /// Where metrics and health are served; `None` is nowhere.
    pub metrics_address: Option<ListenAddress>,
    /// UDP port of the path MTU proof; equal on all nodes.
    pub probe_port: u16,
    /// Services.
    pub services: ServicesConfig,
    /// Flows that are told.
    pub flows: FlowsConfig,
}

impl AgentConfig {
    /// The defaults for a node.
    #[must_use]
    pub fn new(node_name: impl Into<String>, instance: Instance, credentials: Credentials) -> Self {
        Self {
            node_name: node_name.into(),
            instance,
            credentials,
            mode: NetworkMode::Vxlan { port: DEFAULT_VXLAN_PORT, vni: DEFAULT_VNI },
            underlay_v6: None,
            pod_mtu: None,
            masquerade: Masquerade { enabled: true, exclude: Vec::new() },
            metrics_address: Some(ListenAddress { ip: None, port: DEFAULT_METRICS_PORT }),
            probe_port: podway_link::probe::DEFAULT_PORT,
            services: ServicesConfig::default(),
            flows: FlowsConfig::default(),
        }
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// The first setting that cannot be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let bad = |field, cause: String| Err(ConfigError { field, cause });
        if self.node_name.is_empty() {
            return bad("node-name", "it is empty; give the name of this node's Node object".into());
        }
        if let NetworkMode::Vxlan { port, vni } = self.mode {
            if port == 0 {
                return bad("vxlan-port", "0 is no UDP port; use 1 to 65535".into());
            }
            if vni == 0 || vni >= 1 << 24 {
                return bad("vxlan-vni", format!("{vni} is outside of 1 to {}", (1 << 24) - 1));
            }
            if port == self.probe_port {
                return bad("vxlan-port", format!("{port} is the port of the path MTU proof"));
            }
        }
        if let Some(mtu) = self.pod_mtu
            && !(576..=65_535).contains(&mtu)
        {
            return bad("pod-mtu", format!("{mtu} is outside of 576 to 65535"));
        }
        if self.flows.history > FlowsConfig::HISTORY_MAX {
            return bad(
                "flow-history",
                format!("{} is more than {}", self.flows.history, FlowsConfig::HISTORY_MAX),
            );
        }
        self.services.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AgentConfig {
        let instance = Instance::parse("node").unwrap();
        AgentConfig::new("n1", instance, Credentials::InCluster)
    }

    #[test]
    fn defaults_are_valid_and_each_bad_setting_is_named() {
        assert_eq!(config().validate(), Ok(()));
        type Case = (fn(&mut AgentConfig), &'static str);
        let cases: [Case; 8] = [
            (|c| c.node_name.clear(), "node-name"),
            (|c| c.mode = NetworkMode::Vxlan { port: 0, vni: 1 }, "vxlan-port"),
            (|c| c.mode = NetworkMode::Vxlan { port: c.probe_port, vni: 1 }, "vxlan-port"),
            (|c| c.mode = NetworkMode::Vxlan { port: 1, vni: 0 }, "vxlan-vni"),
            (|c| c.mode = NetworkMode::Vxlan { port: 1, vni: 1 << 24 }, "vxlan-vni"),
            (|c| c.pod_mtu = Some(100), "pod-mtu"),
            (|c| c.pod_mtu = Some(65_536), "pod-mtu"),
            (|c| c.flows.history = FlowsConfig::HISTORY_MAX + 1, "flow-history"),
        ];
        for (change, field) in cases {
            let mut config = config();
            change(&mut config);
            assert_eq!(config.validate().unwrap_err().field, field);
        }
    }

    #[test]
    fn listen_addresses() {
        for (text, shown) in [(":9950", ":9950"), ("127.0.0.1:1", "127.0.0.1:1"), ("[::1]:2", "[::1]:2")] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), shown);
        }
        for bad in ["", "9950", ":", ":x", ":70000", "localhost:1", "::1:2:"] {
            assert!(bad.parse::<ListenAddress>().is_err(), "{bad}");
        }
    }
}
