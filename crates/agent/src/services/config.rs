//! What an agent is told about services.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;
pub use podway_proxy_rules::ipvs::Scheduler;

use crate::config::ConfigError;

/// By what mechanism services are served on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServiceMode {
    /// Programs and tables of eBPF.
    Ebpf,
    /// Rules and maps of nftables.
    Nftables,
    /// Rules of iptables.
    Iptables,
    /// Virtual servers of IPVS.
    Ipvs,
    /// Not by Podway.
    None,
}

impl ServiceMode {
    /// Every mode.
    pub const ALL: [Self; 5] = [Self::Ebpf, Self::Nftables, Self::Iptables, Self::Ipvs, Self::None];

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

impl ServiceMode {
    /// Whether the node's stack translates, which then has to see every packet that pods exchange.
    #[must_use]
    pub fn is_translated_by_the_stack(self) -> bool {
        matches!(self, Self::Nftables | Self::Iptables | Self::Ipvs)
    }
}

impl fmt::Display for ServiceMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ServiceMode {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::ALL.into_iter().find(|m| m.as_str() == text).ok_or_else(|| ConfigError {
            field: "service-mode",
            cause: format!("{text:?} is none of ebpf, nftables, iptables, ipvs, none"),
        })
    }
}

/// Everything an agent is told about services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicesConfig {
    /// By what mechanism they are served.
    pub mode: ServiceMode,
    /// Ranges of cluster IPs: what is for an address in there that no service has goes nowhere.
    pub service_cidrs: Vec<IpNet>,
    /// Which of the node's addresses serve node ports; empty is all but loopback and link-local ones.
    pub node_port_addresses: Vec<IpNet>,
    /// Give what goes to cluster IPs the node's address, also when a pod sends it.
    pub masquerade_all: bool,
    /// How IPVS chooses among endpoints; none is the default of [`Scheduler`].
    pub ipvs_scheduler: Option<Scheduler>,
    /// Root of the processes whose sockets are translated (eBPF); none is that of all.
    pub cgroup: Option<PathBuf>,
    /// Load balancer addresses to give, besides those of `LoadBalancerPool` objects.
    pub load_balancer_pool: Vec<IpNet>,
}

impl Default for ServicesConfig {
    fn default() -> Self {
        Self {
            mode: ServiceMode::Ebpf,
            service_cidrs: Vec::new(),
            node_port_addresses: Vec::new(),
            masquerade_all: false,
            ipvs_scheduler: None,
            cgroup: None,
            load_balancer_pool: Vec::new(),
        }
    }
}

/// Most ranges of cluster IPs: what the datapath's configuration has room for.
const MAX_SERVICE_CIDRS: usize = podway_bpf_host::MAX_SERVICE_RANGES;

impl ServicesConfig {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// The first setting that cannot be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let bad = |field, cause: String| Err(ConfigError { field, cause });
        if let Some(scheduler) = &self.ipvs_scheduler
            && self.mode != ServiceMode::Ipvs
        {
            let cause = format!(
                "{} is how IPVS chooses, but services are served by {}; leave it out, or choose --service-mode ipvs",
                scheduler.name(),
                self.mode
            );
            return bad("ipvs-scheduler", cause);
        }
        if self.masquerade_all && !self.mode.is_translated_by_the_stack() {
            let cause = match self.mode {
                ServiceMode::Ebpf => {
                    "ebpf cannot do it: sockets of pods are connected to the endpoints themselves; leave it out, or \
                     choose --service-mode nftables, iptables or ipvs"
                }
                _ => "services are not served by Podway; leave it out, or choose another --service-mode",
            };
            return bad("masquerade-all", cause.to_owned());
        }
        for cidr in &self.service_cidrs {
            if let Some(cause) = unusable(*cidr) {
                return bad("service-cidr", cause);
            }
        }
        if self.service_cidrs.len() > MAX_SERVICE_CIDRS {
            return bad(
                "service-cidr",
                format!("{} ranges; at most {MAX_SERVICE_CIDRS} are possible", self.service_cidrs.len()),
            );
        }
        for cidr in &self.load_balancer_pool {
            if let Some(cause) = unusable(*cidr) {
                return bad("load-balancer-pool", cause);
            }
            if let Some(other) = self.service_cidrs.iter().find(|s| s.contains(cidr) || cidr.contains(*s)) {
                return bad(
                    "load-balancer-pool",
                    format!("{cidr} overlaps the range of cluster IPs {other}"),
                );
            }
        }
        Ok(())
    }
}

/// What cannot be a range of service addresses.
fn unusable(cidr: IpNet) -> Option<String> {
    if cidr.trunc() != cidr {
        return Some(format!("{cidr} has host bits set; the range is {}", cidr.trunc()));
    }
    let address = cidr.addr();
    let mapped = matches!(address, IpAddr::V6(a) if a.to_ipv4_mapped().is_some());
    (address.is_unspecified() || address.is_loopback() || address.is_multicast() || mapped)
        .then(|| format!("{cidr} cannot hold addresses of services"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_as_they_are_written() {
        for mode in ServiceMode::ALL {
            assert_eq!(mode.as_str().parse(), Ok(mode));
        }
        assert_eq!("Ebpf".parse::<ServiceMode>().unwrap_err().field, "service-mode");
    }

    #[test]
    fn each_bad_setting_is_named() {
        assert_eq!(ServicesConfig::default().validate(), Ok(()));
        type Case = (fn(&mut ServicesConfig), &'static str);
        let cases: [Case; 7] = [
            (|c| c.ipvs_scheduler = Some(Scheduler::default()), "ipvs-scheduler"),
            (|c| c.masquerade_all = true, "masquerade-all"),
            (
                |c| {
                    c.mode = ServiceMode::None;
                    c.masquerade_all = true;
                },
                "masquerade-all",
            ),
            (|c| c.service_cidrs = vec!["10.96.0.1/16".parse().unwrap()], "service-cidr"),
            (|c| c.service_cidrs = vec!["::/0".parse().unwrap()], "service-cidr"),
            (|c| c.load_balancer_pool = vec!["224.0.0.0/8".parse().unwrap()], "load-balancer-pool"),
            (
                |c| {
                    c.service_cidrs = vec!["10.96.0.0/16".parse().unwrap()];
                    c.load_balancer_pool = vec!["10.96.5.0/24".parse().unwrap()];
                },
                "load-balancer-pool",
            ),
        ];
        for (change, field) in cases {
            let mut config = ServicesConfig::default();
            change(&mut config);
            assert_eq!(config.validate().unwrap_err().field, field);
        }
        let by_ipvs = ServicesConfig {
            mode: ServiceMode::Ipvs,
            masquerade_all: true,
            ipvs_scheduler: Some(Scheduler::MAGLEV),
            ..ServicesConfig::default()
        };
        assert_eq!(by_ipvs.validate(), Ok(()));
    }
}
