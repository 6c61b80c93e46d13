//! The mechanisms that translate services: Podway's writers, and the rules that kube-proxy leaves in the kernel.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::bail;
use podway_lab::cgroup::{self, Cgroup};
use podway_link::Netns;

use super::population::Population;
use super::scratch::Scratch;
use crate::network::on_path;
use crate::place::start;
use crate::rules::kube_proxy_for;
use crate::stop::Stop;

/// A mechanism that can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Podway's default: at the socket, in eBPF.
    Ebpf,
    /// Podway's nftables writer.
    Nftables,
    /// Podway's iptables writer, over nf_tables.
    Iptables,
    /// Podway's iptables writer, over x_tables.
    IptablesLegacy,
    /// Podway's IPVS writer.
    Ipvs,
    /// Rules as kube-proxy's nftables mode makes them.
    KubeNftables,
    /// Rules as kube-proxy's iptables mode makes them, over nf_tables.
    KubeIptables,
    /// The same over x_tables.
    KubeIptablesLegacy,
}

/// Services in the kernel, by one mechanism.
pub trait Mechanism {
    /// Puts all services there and says how long that took.
    ///
    /// # Errors
    /// When it fails or takes longer than `patience`.
    fn fill(
        &mut self,
        population: &Population,
        scratch: &Scratch,
        patience: Duration,
        stop: &Stop,
    ) -> anyhow::Result<Duration>;

    /// Changes one endpoint of a service and says how long that took.
    ///
    /// # Errors
    /// When it fails.
    fn change(&mut self, population: &Population, service: u32, generation: u32) -> anyhow::Result<Duration>;

    /// Removes what would outlive the namespaces.
    ///
    /// # Errors
    /// With what stays.
    fn remove(self: Box<Self>) -> anyhow::Result<()>;
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 8] = [
        Mode::Ebpf,
        Mode::Nftables,
        Mode::Iptables,
        Mode::IptablesLegacy,
        Mode::Ipvs,
        Mode::KubeNftables,
        Mode::KubeIptables,
        Mode::KubeIptablesLegacy,
    ];

    /// Its name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Mode::Ebpf => "ebpf",
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
            Mode::IptablesLegacy => "iptables-legacy",
            Mode::Ipvs => "ipvs",
            Mode::KubeNftables => "kube-nftables",
            Mode::KubeIptables => "kube-iptables",
            Mode::KubeIptablesLegacy => "kube-iptables-legacy",
        }
    }

    /// Whether it is a writer of Podway.
    #[must_use]
    pub const fn is_ours(self) -> bool {
        matches!(self, Mode::Ebpf | Mode::Nftables | Mode::Iptables | Mode::IptablesLegacy | Mode::Ipvs)
    }

    /// What a connection over eBPF may take at most of one over this mechanism, with very many services.
    #[must_use]
    pub const fn goal(self) -> f64 {
        match self {
            Mode::KubeIptables => 1.0 / 10.0,
            Mode::KubeIptablesLegacy => 1.0 / 3.0,
            Mode::KubeNftables => 1.0 / 1.1,
            _ => 1.0,
        }
    }

    /// What the machine lacks for it.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        let tool = |name: &str, package: &str| {
            (!on_path(name)).then(|| format!("there is no {name}; install {package}"))
        };
        match self {
            Mode::Ebpf => cgroup::mount_point().err().map(|e| format!("no cgroup v2: {e}")),
            Mode::Nftables | Mode::KubeNftables => tool("nft", "nftables"),
            Mode::Iptables | Mode::KubeIptables => tool("iptables-nft-restore", "iptables"),
            Mode::IptablesLegacy | Mode::KubeIptablesLegacy => tool("iptables-legacy-restore", "iptables"),
            Mode::Ipvs => (!PathBuf::from("/proc/net/ip_vs").exists())
                .then(|| "this kernel has no IPVS (module ip_vs)".to_owned()),
        }
    }

    /// The client's control group, where the mechanism works by those.
    ///
    /// # Errors
    /// When there is no cgroup v2.
    pub fn cgroup(self) -> anyhow::Result<Option<Cgroup>> {
        Ok(match self {
            Mode::Ebpf => Some(Cgroup::at(cgroup::mount_point()?.join("podway-bench"))),
            _ => None,
        })
    }

    /// Prepares it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn start(self, scratch: &Scratch) -> anyhow::Result<Box<dyn Mechanism>> {
        let kube = |command: &'static [&'static str], rules: fn(&Population) -> String| {
            Box::new(KubeProxy { command, rules }) as Box<dyn Mechanism>
        };
        Ok(match self {
            Mode::KubeNftables => kube(&["nft", "-f", "-"], Population::kube_nftables),
            Mode::KubeIptables => kube(&["iptables-nft-restore"], kube_proxy_for),
            Mode::KubeIptablesLegacy => kube(&["iptables-legacy-restore"], kube_proxy_for),
            own => super::writers::start(own, scratch)?,
        })
    }
}

/// Rules of kube-proxy's shape, loaded by the tool that it uses.
struct KubeProxy {
    command: &'static [&'static str],
    rules: fn(&Population) -> String,
}

impl Mechanism for KubeProxy {
    fn fill(
        &mut self,
        population: &Population,
        scratch: &Scratch,
        patience: Duration,
        stop: &Stop,
    ) -> anyhow::Result<Duration> {
        let rules = (self.rules)(population);
        let begun = Instant::now();
        load(&scratch.node, self.command, &rules, patience, stop)?;
        Ok(begun.elapsed())
    }

    fn change(&mut self, _: &Population, _: u32, _: u32) -> anyhow::Result<Duration> {
        bail!("these rules are loaded as a whole: how they change is up to kube-proxy")
    }

    fn remove(self: Box<Self>) -> anyhow::Result<()> {
        Ok(())
    }
}

fn load(node: &Netns, command: &[&str], input: &str, patience: Duration, stop: &Stop) -> anyhow::Result<()> {
    let Some((program, arguments)) = command.split_first() else { bail!("no program to load rules with") };
    let mut process = Command::new(program);
    process.args(arguments);
    let finished = start(node, None, process)?.finish(input.as_bytes(), patience, stop)?;
    if !finished.status.success() {
        bail!("{program}: {}", finished.status);
    }
    Ok(())
}
