//! What the datapath says of itself: counters, fill of the tables, size of the programs, test runs.

use std::time::Duration;

use aya::programs::{TestRun as _, TestRunOptions};
use podway_abi::{Hook, MAX_CONNTRACK, MAX_ENDPOINTS, MAX_PEERS, MAX_PREFIXES, Reason, counter_index};

use crate::{Datapath, Error, Result, lock, program};

/// Packets that ended with one reason at one hook, over all CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Name of the hook.
    pub hook: &'static str,
    /// Name of the reason.
    pub reason: &'static str,
    /// Whether these packets were dropped.
    pub dropped: bool,
    /// Packets, a GSO super-packet counting once.
    pub packets: u64,
    /// Bytes from the network layer up.
    pub bytes: u64,
}

/// Fill of one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// Name of the table.
    pub name: &'static str,
    /// Entries in it; those of the connection table as of the last sweep.
    pub entries: u64,
    /// Its limit.
    pub max_entries: u64,
}

/// Size of one program, as the kernel accounts for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramReport {
    /// Name of the hook.
    pub hook: &'static str,
    /// Instructions that the verifier walked; its limit is one million. Kernel 5.16 and later.
    pub verified_instructions: Option<u32>,
    /// Bytes of the translated program.
    pub translated_bytes: Option<u32>,
}

/// Outcome of one run of a program over a given packet (`BPF_PROG_TEST_RUN`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// The `TC_ACT_*` code.
    pub code: i32,
    /// The packet as the program left it.
    pub packet: Vec<u8>,
    /// Mean time of one run.
    pub duration: Duration,
}

impl Datapath {
    /// Every counter that is not zero.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn counters(&self) -> Result<Vec<Counter>> {
        let mut all = Vec::new();
        for hook in Hook::ALL {
            for reason in Reason::ALL {
                let per_cpu = self
                    .counters
                    .get(&counter_index(hook, *reason), 0)
                    .map_err(|e| Error::map("COUNTERS", e))?;
                let packets: u64 = per_cpu.iter().map(|c| c.packets).sum();
                if packets == 0 {
                    continue;
                }
                all.push(Counter {
                    hook: hook.name(),
                    reason: reason.name(),
                    dropped: reason.is_drop(),
                    packets,
                    bytes: per_cpu.iter().map(|c| c.bytes).sum(),
                });
            }
        }
        Ok(all)
    }

    /// Fill of every table that can become full.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub fn map_fill(&self) -> Result<Vec<MapFill>> {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let (endpoints, sources) = {
            let pods = lock(&self.pods);
            (pods.endpoints.keys().count(), pods.sources.keys().count())
        };
        let (peers, prefixes) = lock(&self.peers).count();
        let flows = lock(&self.flows).count();
        let fill = |name, entries: usize, max: u32| MapFill {
            name,
            entries: count(entries),
            max_entries: max.into(),
        };
        Ok(vec![
            fill("endpoints", endpoints, MAX_ENDPOINTS),
            fill("sources", sources, MAX_ENDPOINTS),
            fill("peers", peers, MAX_PEERS),
            fill("prefixes", prefixes, MAX_PREFIXES),
            fill("conntrack", flows, MAX_CONNTRACK),
        ])
    }

    /// What the kernel's verifier made of each program.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn programs(&self) -> Result<Vec<ProgramReport>> {
        let mut ebpf = self.ebpf();
        Hook::ALL
            .into_iter()
            .map(|hook| {
                let info = program(&mut ebpf, hook)?.info().map_err(|e| Error::load(hook.name(), e))?;
                Ok(ProgramReport {
                    hook: hook.name(),
                    verified_instructions: info.verified_instruction_count(),
                    translated_bytes: info.size_translated(),
                })
            })
            .collect()
    }

    /// Runs a program over a packet without any device, as if it had come in on `ifindex` of this namespace.
    ///
    /// # Errors
    /// When the kernel refuses the run, for example a packet shorter than an Ethernet header.
    pub fn test_run(&self, hook: Hook, packet: &[u8], ifindex: u32, repeat: u32) -> Result<TestRun> {
        let mut ebpf = self.ebpf();
        let program = program(&mut ebpf, hook)?;
        let mut out = vec![0; packet.len() + 256];
        let context = skb_context(ifindex);
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::default()
        };
        let result = program.test_run(options).map_err(|e| Error::load(hook.name(), e))?;
        out.truncate(usize::try_from(result.data_size_out).unwrap_or(usize::MAX));
        Ok(TestRun { code: result.return_value.cast_signed(), packet: out, duration: result.duration })
    }
}

/// A `struct __sk_buff` with nothing but an interface (`linux/bpf.h`: 192 bytes, `ifindex` being the eleventh
/// 32-bit field). The kernel demands that all fields it does not take are zero.
fn skb_context(ifindex: u32) -> [u8; 192] {
    let mut context = [0; 192];
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    context
}
