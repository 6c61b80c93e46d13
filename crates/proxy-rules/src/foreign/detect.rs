//! Whether another service proxy is at work in the current network namespace.
//!
//! Two proxies that both translate a service's address do not add up: which one wins depends on the order of hooks,
//! and what the other one left goes stale.

use std::fmt;
use std::path::{Path, PathBuf};

use podway_link::Netlink;

use super::{iptables, nft, tools};
use crate::ipvs::{self, Ipvs};

/// Names of the dummy devices on which IPVS proxies keep service addresses.
pub(crate) const KUBE_IPVS_DEVICE: &str = "kube-ipvs0";
const KUBE_ROUTER_DEVICE: &str = "kube-dummy-if";

/// Where BPF file systems usually are.
const BPFFS: [&str; 2] = ["/sys/fs/bpf", "/run/cilium/bpffs"];
/// Where Cilium pins its maps in there, and the maps that mean that it serves services.
const CILIUM_MAPS: [&str; 2] = ["tc/globals/cilium_lb4_services_v2", "tc/globals/cilium_lb6_services_v2"];

/// Another proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proxy {
    /// kube-proxy, in whichever mode.
    KubeProxy,
    /// kube-router's service proxy.
    KubeRouter,
    /// Cilium's kube-proxy replacement.
    Cilium,
    /// Somebody who uses IPVS.
    Ipvs,
}

/// What was found of one proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whose.
    pub proxy: Proxy,
    /// What, one line each.
    pub evidence: Vec<String>,
    /// Whether the program itself runs in this network namespace.
    pub runs: bool,
}

/// The outcome of [`detect`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detection {
    /// What was found, by proxy.
    pub findings: Vec<Finding>,
    /// What could not be looked at, and why.
    pub unknown: Vec<String>,
}

impl Finding {
    /// What it means for this node.
    #[must_use]
    pub fn meaning(&self) -> &'static str {
        match (self.proxy, self.runs) {
            (Proxy::KubeProxy, true) => {
                "kube-proxy runs beside Podway: both translate the addresses of services, and which one a connection \
                 meets depends on the order of the kernel's hooks"
            }
            (Proxy::KubeProxy, false) => {
                "kube-proxy has left rules that nobody keeps up to date: connections that meet them go to endpoints \
                 of the past"
            }
            (Proxy::KubeRouter, _) => {
                "kube-router serves services here, or did, in the place where Podway does"
            }
            (Proxy::Cilium, _) => {
                "Cilium's kube-proxy replacement translates the addresses of services at the socket, before Podway \
                 sees a packet"
            }
            (Proxy::Ipvs, _) => {
                "somebody uses IPVS here; addresses that are services' too are served by whoever wrote last"
            }
        }
    }

    /// What to do.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match (self.proxy, self.runs) {
            (Proxy::KubeProxy, true) => {
                "remove the kube-proxy DaemonSet (kubectl -n kube-system delete daemonset kube-proxy), then run \
                 `podway cleanup --of kube-proxy` on this node"
            }
            (Proxy::KubeProxy, false) => {
                "run `podway cleanup --of kube-proxy` on this node (--dry-run shows what it would remove)"
            }
            (Proxy::KubeRouter, _) => {
                "run kube-router with --run-service-proxy=false, and `kube-router --cleanup-config` once; or start \
                 Podway with --service-mode none"
            }
            (Proxy::Cilium, _) => {
                "set kubeProxyReplacement=false in Cilium's configuration and restart its agent; or start Podway with \
                 --service-mode none"
            }
            (Proxy::Ipvs, _) => {
                "look at `ipvsadm -Ln`; nothing has to be done when none of its addresses is a service's"
            }
        }
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Proxy::KubeProxy => "kube-proxy",
            Proxy::KubeRouter => "kube-router",
            Proxy::Cilium => "Cilium",
            Proxy::Ipvs => "an IPVS user",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { proxy, evidence, .. } = self;
        write!(f, "found {proxy}: {}. {}; {}", evidence.join("; "), self.meaning(), self.advice())
    }
}

impl Detection {
    fn add(&mut self, proxy: Proxy, evidence: String) {
        match self.findings.iter_mut().find(|f| f.proxy == proxy) {
            Some(finding) => finding.evidence.push(evidence),
            None => self.findings.push(Finding { proxy, evidence: vec![evidence], runs: false }),
        }
    }
}

/// Looks for other proxies in the network namespace of the calling thread, and for Cilium's pinned maps on this
/// machine. Changes nothing. What Podway itself made is never reported.
#[must_use]
pub fn detect() -> Detection {
    detect_in(&BPFFS.map(PathBuf::from))
}

/// As [`detect`], with the BPF file systems to look in.
#[must_use]
pub fn detect_in(bpffs: &[PathBuf]) -> Detection {
    let mut detection = Detection::default();
    for save in SAVES {
        match save.text() {
            Ok(None) => {}
            Ok(Some(text)) => chains(&text, save.title, &mut detection),
            Err(error) => detection.unknown.push(error.to_string()),
        }
    }
    match kube_proxy_tables() {
        Ok(families) => {
            for family in families {
                detection.add(Proxy::KubeProxy, format!("nftables table {family} {}", nft::KUBE_PROXY_TABLE));
            }
        }
        Err(error) => detection.unknown.push(error.to_string()),
    }
    virtual_servers(&mut detection);
    cilium(bpffs, &mut detection);
    for finding in &mut detection.findings {
        finding.runs = match finding.proxy {
            Proxy::KubeProxy => !processes("kube-proxy").is_empty(),
            Proxy::KubeRouter => !processes("kube-router").is_empty(),
            Proxy::Cilium => !processes("cilium-agent").is_empty(),
            Proxy::Ipvs => false,
        };
    }
    detection.findings.sort_by_key(|f| f.proxy);
    detection
}

/// One `…tables-save` with its back end and family.
pub(crate) struct Save {
    pub(crate) program: &'static str,
    /// Where the back end has no program of its own name.
    pub(crate) otherwise: Option<&'static str>,
    pub(crate) restore: &'static str,
    pub(crate) title: &'static str,
}

/// Both back ends, both families.
pub(crate) const SAVES: [Save; 4] = [
    Save {
        program: "iptables-legacy-save",
        otherwise: None,
        restore: "iptables-legacy-restore",
        title: "iptables (legacy, IPv4)",
    },
    Save {
        program: "ip6tables-legacy-save",
        otherwise: None,
        restore: "ip6tables-legacy-restore",
        title: "ip6tables (legacy, IPv6)",
    },
    Save {
        program: "iptables-nft-save",
        otherwise: Some("iptables-save"),
        restore: "iptables-nft-restore",
        title: "iptables (nft, IPv4)",
    },
    Save {
        program: "ip6tables-nft-save",
        otherwise: Some("ip6tables-save"),
        restore: "ip6tables-nft-restore",
        title: "ip6tables (nft, IPv6)",
    },
];

impl Save {
    /// The dump, or `None` without the program: then there is nobody who could have made such rules with it.
    pub(crate) fn text(&self) -> Result<Option<String>, tools::ToolError> {
        match tools::run(self.program, &[], "") {
            Err(error) if error.is_missing() => {
                match self.otherwise.map(|other| tools::run(other, &[], "")) {
                    Some(Err(error)) if error.is_missing() => Ok(None),
                    Some(result) => result.map(Some),
                    None => Ok(None),
                }
            }
            result => result.map(Some),
        }
    }
}

fn chains(text: &str, title: &str, detection: &mut Detection) {
    let ours = iptables::chains(text, iptables::is_kube_proxy_chain);
    // The kubelet makes two of the chains, too, and no service.
    let serves = |name: &str| {
        !matches!(name, "KUBE-FIREWALL" | "KUBE-MARK-DROP" | "KUBE-MARK-MASQ" | "KUBE-POSTROUTING")
    };
    let serving = ours.iter().filter(|(_, name)| serves(name)).count();
    if serving > 0 {
        let services = ours.iter().filter(|(_, name)| name.starts_with("KUBE-SVC-")).count();
        let all = ours.len();
        detection
            .add(Proxy::KubeProxy, format!("{all} KUBE-* chains in {title}, {services} of them of services"));
    }
    let routers = iptables::chains(text, |name| name.starts_with("KUBE-ROUTER-SERVICES"));
    if !routers.is_empty() {
        detection.add(Proxy::KubeRouter, format!("{} KUBE-ROUTER-SERVICES chains in {title}", routers.len()));
    }
}

/// The families in which there is a table `kube-proxy`.
pub(crate) fn kube_proxy_tables() -> Result<Vec<String>, tools::ToolError> {
    let listed = match tools::run("nft", &["list", "tables"], "") {
        Ok(listed) => listed,
        Err(error) if error.is_missing() => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let family = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("table"), Some(family), Some(name)) if name == nft::KUBE_PROXY_TABLE => {
                Some(family.to_owned())
            }
            _ => None,
        }
    };
    Ok(listed.lines().filter_map(family).collect())
}

fn virtual_servers(detection: &mut Detection) {
    let mut proxy = Proxy::Ipvs;
    match Netlink::open() {
        Ok(mut netlink) => {
            for (name, of) in [(KUBE_IPVS_DEVICE, Proxy::KubeProxy), (KUBE_ROUTER_DEVICE, Proxy::KubeRouter)]
            {
                match netlink.link_by_name(name) {
                    Ok(Some(link)) => {
                        let addresses = netlink.addresses_of(link.index).map_or(0, |a| a.len());
                        detection.add(of, format!("device {name} with {addresses} addresses"));
                        proxy = of;
                    }
                    Ok(None) => {}
                    Err(error) => detection.unknown.push(error.to_string()),
                }
            }
        }
        Err(error) => detection.unknown.push(error.to_string()),
    }
    if !ipvs_is_loaded() {
        return;
    }
    let servers = Ipvs::open().and_then(|mut ipvs| ipvs.servers());
    match servers {
        Ok(servers) => {
            let own = ipvs::own_servers();
            let foreign = servers.iter().filter(|s| !own.contains(&s.key)).count();
            if foreign > 0 {
                detection.add(proxy, format!("{foreign} IPVS virtual servers"));
            }
        }
        Err(error) => detection.unknown.push(format!("IPVS virtual servers: {error}")),
    }
}

/// Whether IPVS is there. Asking it for anything would load it.
pub(crate) fn ipvs_is_loaded() -> bool {
    Path::new("/proc/thread-self/net/ip_vs").exists()
}

fn cilium(bpffs: &[PathBuf], detection: &mut Detection) {
    for root in bpffs {
        for map in CILIUM_MAPS {
            let path = root.join(map);
            match path.try_exists() {
                Ok(true) => detection.add(Proxy::Cilium, format!("service map {}", path.display())),
                Ok(false) => {}
                Err(error) => detection.unknown.push(format!("{}: {error}", path.display())),
            }
        }
    }
}

/// Processes of this name in the current network namespace.
pub(crate) fn processes(name: &str) -> Vec<i32> {
    let namespace = |path: &Path| std::fs::read_link(path).ok();
    let Some(own) = namespace(Path::new("/proc/thread-self/ns/net")) else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let found = entries.flatten().filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let path = entry.path();
        // The kernel keeps 15 characters.
        let comm = std::fs::read_to_string(path.join("comm")).ok()?;
        (comm.trim_end() == name && namespace(&path.join("ns/net")).as_ref() == Some(&own)).then_some(pid)
    });
    found.collect()
}
