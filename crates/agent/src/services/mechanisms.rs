//! Which mechanisms there are, which one is in use, and who else is at work.

use std::sync::Arc;

use podway_bpf_host::Datapath;
use podway_proxy_rules::foreign::detect;
use podway_proxy_rules::iptables::{IptablesWriter, Kind};
use podway_proxy_rules::ipvs::{IpvsWriter, Scheduler};
use podway_proxy_rules::nft::NftWriter;
use tracing::{debug, warn};

use super::config::{ServiceMode, ServicesConfig};
use super::kernel::{Ebpf, Kernel, KernelError, Rules};
use crate::events::Reporter;

/// Makes the mechanism that the configuration names, and removes what the others left.
pub(super) struct Mechanisms {
    config: ServicesConfig,
    datapath: Arc<Datapath>,
}

impl Mechanisms {
    pub(super) fn new(config: &ServicesConfig, datapath: &Arc<Datapath>) -> Self {
        Self { config: config.clone(), datapath: Arc::clone(datapath) }
    }

    /// The one that is named; `None` when none is.
    ///
    /// # Errors
    /// The kernel, or this machine, lacks what it needs.
    pub(super) fn chosen(&self) -> Result<Option<Box<dyn Kernel>>, KernelError> {
        Ok(match self.config.mode {
            ServiceMode::Ebpf => Some(self.ebpf()?),
            ServiceMode::Nftables => Some(Box::new(Rules::new(NftWriter::new()))),
            ServiceMode::Iptables => Some(Box::new(Rules::new(IptablesWriter::new(Kind::in_use()?)))),
            ServiceMode::Ipvs => Some(Box::new(Rules::new(IpvsWriter::new(
                self.config.ipvs_scheduler.clone().unwrap_or_default(),
            )))),
            ServiceMode::None => None,
        })
    }

    fn ebpf(&self) -> Result<Box<dyn Kernel>, KernelError> {
        Ok(Box::new(Ebpf::open(Arc::clone(&self.datapath), self.config.cgroup.as_deref())?))
    }

    /// Removes what the other mechanisms left; lines that say what it was.
    pub(super) fn remove_others(&self) -> Vec<String> {
        let mut removed = Vec::new();
        for mode in ServiceMode::ALL.into_iter().filter(|m| *m != self.config.mode) {
            // A mechanism that this machine does not have has left nothing.
            let kernels: Vec<Box<dyn Kernel>> = match mode {
                ServiceMode::Ebpf => self.ebpf().into_iter().collect(),
                ServiceMode::None => Vec::new(),
                other => rules(other),
            };
            for mut kernel in kernels {
                match kernel.remove() {
                    Ok(lines) => removed.extend(lines.into_iter().map(|line| format!("{mode}: {line}"))),
                    Err(error) => debug!(%mode, %error, "what this mode of services may have left"),
                }
            }
        }
        removed
    }
}

/// Writers of one mode, of every kind that it has.
fn rules(mode: ServiceMode) -> Vec<Box<dyn Kernel>> {
    match mode {
        ServiceMode::Nftables => vec![Box::new(Rules::new(NftWriter::new()))],
        ServiceMode::Iptables => Kind::in_use()
            .into_iter()
            .map(|k| Box::new(Rules::new(IptablesWriter::new(k))) as Box<dyn Kernel>)
            .collect(),
        ServiceMode::Ipvs => vec![Box::new(Rules::new(IpvsWriter::new(Scheduler::default())))],
        ServiceMode::Ebpf | ServiceMode::None => Vec::new(),
    }
}

/// Removes the rules of every mechanism, for `podway cleanup`; lines that say what it was.
pub(crate) fn remove_rules() -> Vec<String> {
    let mut removed = Vec::new();
    for mode in ServiceMode::ALL {
        for mut kernel in rules(mode) {
            match kernel.remove() {
                Ok(lines) => removed.extend(lines),
                // What is not installed has left nothing.
                Err(error) => debug!(%mode, %error, "what this mode of services may have left"),
            }
        }
    }
    removed
}

/// Tells about other proxies that are at work in the calling thread's network namespace, or have left something.
pub(super) fn tell_others(reporter: &Reporter) {
    let found = detect::detect();
    for finding in &found.findings {
        let evidence = finding.evidence.iter().take(3).cloned().collect::<Vec<_>>().join("; ");
        let message = format!("{}: {evidence}. {}; {}", finding.proxy, finding.meaning(), finding.advice());
        reporter.warning("OtherServiceProxy", &finding.proxy.to_string(), &message);
    }
    for why in found.unknown {
        warn!(why, "whether another service proxy is at work cannot be told completely");
    }
}
