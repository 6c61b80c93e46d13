//! Which machine, and what else it was doing.

use std::fmt;
use std::fs;

use serde::{Deserialize, Serialize};

/// What figures depend on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// Release of the kernel.
    pub kernel: String,
    /// Model of the processor.
    pub cpu: String,
    /// Cores that are there.
    pub cores: usize,
    /// Mebibytes of memory.
    pub memory_mib: u64,
    /// Load of the last minute when the bench began: what else ran.
    pub load: f64,
}

impl Machine {
    /// This machine now. What it does not tell stays empty.
    #[must_use]
    pub fn of_now() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let after = |text: &str, key: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default();
            line.trim_start_matches([' ', '\t', ':']).to_owned()
        };
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: after(&cpu, "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: after(&memory, "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0) / 1024,
            load: read("/proc/loadavg").split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(0.0),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "kernel {}, {} cores of {}, {} MiB, load at the beginning {:.2}",
            self.kernel, self.cores, self.cpu, self.memory_mib, self.load
        )
    }
}
