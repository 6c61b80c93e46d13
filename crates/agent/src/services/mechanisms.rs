//! Which mechanisms there are, and which one is in use.

use std::sync::Arc;

use podway_bpf_host::Datapath;
use tracing::warn;

use super::config::{ServiceMode, ServicesConfig};
use super::kernel::{Ebpf, Kernel, KernelError};

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
        self.open(self.config.mode)
    }

    fn open(&self, mode: ServiceMode) -> Result<Option<Box<dyn Kernel>>, KernelError> {
        Ok(match mode {
            ServiceMode::Ebpf => {
                Some(Box::new(Ebpf::open(Arc::clone(&self.datapath), self.config.cgroup.as_deref())?))
            }
            ServiceMode::None => None,
        })
    }

    /// Removes what the other mechanisms left; lines that say what it was.
    pub(super) fn remove_others(&self) -> Vec<String> {
        let mut removed = Vec::new();
        for mode in ServiceMode::ALL.into_iter().filter(|m| *m != self.config.mode) {
            // A mechanism that this machine does not have has left nothing.
            let Ok(Some(mut kernel)) = self.open(mode) else { continue };
            match kernel.remove() {
                Ok(lines) => removed.extend(lines.into_iter().map(|line| format!("{mode}: {line}"))),
                Err(error) => warn!(%mode, %error, "what this mode of services left cannot be removed"),
            }
        }
        removed
    }
}
