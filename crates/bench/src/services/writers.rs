//! Podway's own mechanisms: the compiler, and one of the writers behind it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use podway_bpf_host::{Datapath, ServiceWriter};
use podway_link::Netns;
use podway_model::{EndpointSlice, Service};
use podway_proxy_rules::Writer;
use podway_proxy_rules::iptables::{IptablesWriter, Kind};
use podway_proxy_rules::nft::NftWriter;
use podway_services::table::{NodeView, TableChange};
use podway_services::{Compiler, ServiceTable};

use super::mechanism::{Mechanism, Mode};
use super::population::{CLIENT_CIDR, ENDPOINT_CIDRS, Population, SERVICE_CIDR};
use super::scratch::{NODE_ADDRESS, Scratch};
use crate::stop::Stop;

/// Where the bench pins its programs; nothing stays there.
const PIN_DIR: &str = "/sys/fs/bpf/podway-bench";

/// Prepares one.
///
/// # Errors
/// When the kernel refuses, or the mode is none of ours.
pub(super) fn start(mode: Mode, scratch: &Scratch) -> anyhow::Result<Box<dyn Mechanism>> {
    let kernel = match mode {
        Mode::Ebpf => Kernel::Ebpf(Box::new(Ebpf::start(scratch)?)),
        Mode::Nftables => Kernel::Rules(Box::new(NftWriter::new())),
        Mode::Iptables => Kernel::Rules(Box::new(IptablesWriter::new(Kind::Nft))),
        Mode::IptablesLegacy => Kernel::Rules(Box::new(IptablesWriter::new(Kind::Legacy))),
        other => bail!("{} has no writer", other.name()),
    };
    let node = scratch.node.try_clone()?;
    Ok(Box::new(Own { node, compiler: Compiler::new(view()?), kernel }))
}

fn view() -> anyhow::Result<NodeView> {
    let mut pod_cidrs = vec![CLIENT_CIDR.parse()?];
    for cidr in ENDPOINT_CIDRS {
        pod_cidrs.push(cidr.parse()?);
    }
    Ok(NodeView {
        name: "node-1".into(),
        addresses: vec![NODE_ADDRESS.into()],
        node_port_addresses: vec![NODE_ADDRESS.into()],
        pod_cidrs,
        service_cidrs: vec![SERVICE_CIDR.parse()?],
        ..NodeView::default()
    })
}

struct Own {
    node: Netns,
    compiler: Compiler,
    kernel: Kernel,
}

enum Kernel {
    Ebpf(Box<Ebpf>),
    Rules(Box<dyn Writer>),
}

/// Programs and tables of our own, which no namespace takes with it.
struct Ebpf {
    datapath: Datapath,
    writer: ServiceWriter,
    cgroup: PathBuf,
}

impl Ebpf {
    fn start(scratch: &Scratch) -> anyhow::Result<Self> {
        let pin_dir = PathBuf::from(PIN_DIR);
        // What a run that was killed left.
        Datapath::remove_all(&pin_dir)?;
        let cgroup = scratch.cgroup().context("the client has no control group")?;
        let datapath = Datapath::load(&pin_dir)?;
        let writer = datapath.services()?;
        Ok(Self { datapath, writer, cgroup })
    }
}

impl Drop for Ebpf {
    fn drop(&mut self) {
        // The next run removes it and says what it could not.
        let _ = Datapath::remove_all(PIN_DIR.as_ref());
    }
}

impl Mechanism for Own {
    fn fill(
        &mut self,
        population: &Population,
        _: &Scratch,
        _: Duration,
        _: &Stop,
    ) -> anyhow::Result<Duration> {
        let (mut services, mut slices) = (Vec::new(), Vec::new());
        let objects: Vec<_> =
            (0..population.services).map(|i| (population.service(i), population.slice(i, 0))).collect();
        let begun = Instant::now();
        for (service, slice) in &objects {
            services.push(Service::parse(service)?);
            slices.push(EndpointSlice::parse(slice)?);
        }
        self.compiler.load(&services, &slices);
        let (compiler, kernel) = (&self.compiler, &mut self.kernel);
        self.node.run(move || kernel.fill(compiler.table(), compiler.view()))??;
        Ok(begun.elapsed())
    }

    fn change(&mut self, population: &Population, service: u32, generation: u32) -> anyhow::Result<Duration> {
        let object = population.slice(service, generation);
        let (compiler, kernel) = (&mut self.compiler, &mut self.kernel);
        self.node.run(move || {
            let begun = Instant::now();
            let slice = EndpointSlice::parse(&object)?;
            let changes = compiler.apply_slice(&slice);
            if changes.table.is_empty() {
                bail!("a changed endpoint changed nothing in the table");
            }
            kernel.apply(&changes.table)?;
            Ok(begun.elapsed())
        })?
    }

    fn remove(self: Box<Self>) -> anyhow::Result<()> {
        Ok(())
    }
}

impl Kernel {
    fn fill(&mut self, table: &ServiceTable, view: &NodeView) -> anyhow::Result<()> {
        match self {
            Kernel::Ebpf(ebpf) => {
                ebpf.writer.set_node(view)?;
                let all = ServiceTable::diff(&ServiceTable::new(), table);
                if let Some(refused) = ebpf.writer.sync(&all)?.refused.first() {
                    bail!("refused: {refused:?}");
                }
                Ok(ebpf.datapath.attach_sockets(&ebpf.cgroup)?)
            }
            Kernel::Rules(writer) => {
                if let Some(refused) = writer.sync(table, view)?.refused.first() {
                    bail!("refused: {refused:?}");
                }
                Ok(())
            }
        }
    }

    fn apply(&mut self, changes: &[TableChange]) -> anyhow::Result<()> {
        let refused = match self {
            Kernel::Ebpf(ebpf) => ebpf.writer.apply(changes)?.refused.first().map(|r| format!("{r:?}")),
            Kernel::Rules(writer) => writer.apply(changes)?.refused.first().map(|r| format!("{r:?}")),
        };
        refused.map_or(Ok(()), |refused| bail!("refused: {refused}"))
    }
}
