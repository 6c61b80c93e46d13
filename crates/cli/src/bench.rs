//! `podway bench …`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use podway_bench::namespaces::OnlyOne;
use podway_bench::report::{Report, table};
use podway_bench::services::mechanism::Mode;
use podway_bench::stop::Stop;
use podway_bench::{cni, flows, net, policy, save, services, traffic};
use podway_lab::cgroup::Cgroup;

use crate::args::{Format, OutputFormat};
use crate::{FAILED, OK, output};

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Throughput and requests between pods, against bridge and kernel VXLAN, bare and with kube-proxy's rules
    ///
    /// Everything happens in network namespaces, which are removed at the end and after Ctrl-C.
    Net(Net),
    /// ADD and DEL of the CNI plugin, against bridge + host-local + portmap
    Cni(Cni),
    /// What a service costs: first packet, steady traffic, programming, by mechanism and number of services
    ///
    /// Mechanisms are Podway's own (ebpf, nftables, iptables, iptables-legacy, ipvs) and what kube-proxy leaves in the
    /// kernel (kube-nftables, kube-iptables, kube-iptables-legacy). Those that this machine lacks are skipped by name.
    Services(Services),
    /// Compiling network policies: time, memory, label changes, `podway policy check`
    ///
    /// Each value is the worst of the runs and has a bound. Needs no privileges and no network.
    Policy(PolicyBench),
    /// Compile policies for the bench
    #[command(hide = true)]
    Compile(Compile),
    /// What it costs to tell flows, and whether what is not told is counted
    Flows(Flows),
    /// Open flows at a rate
    #[command(hide = true)]
    Burst {
        /// With whom
        server: IpAddr,
        /// Flows a second
        #[arg(long)]
        rate: u32,
        /// For how long
        #[arg(long)]
        milliseconds: u64,
    },
    /// Answer the bench's clients
    #[command(hide = true)]
    Serve,
    /// Open connections as standard input says
    #[command(hide = true)]
    Connect {
        /// Control group to move into first
        #[arg(long)]
        cgroup: Option<PathBuf>,
    },
    /// Be one of the bench's clients
    #[command(hide = true)]
    Measure {
        /// What
        kind: Kind,
        /// With whom
        server: IpAddr,
        /// For how long
        #[arg(long)]
        milliseconds: u64,
        /// Control group to move into first
        #[arg(long)]
        cgroup: Option<PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    Stream,
    Requests,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Pairs of each comparison, at least 15
    #[arg(long, default_value_t = podway_bench::pairs::MIN_PAIRS)]
    pairs: usize,
    /// Folder to write the report (JSON) and the plot (SVG) into
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Net {
    #[command(flatten)]
    common: Common,
    /// Time of each measurement
    #[arg(long, default_value_t = 1000)]
    milliseconds: u64,
    /// Services whose iptables rules the peer has to pass
    #[arg(long, default_value_t = 1000)]
    services: u16,
    /// Report of an earlier run (JSON): fail when one of our kernel programs costs over 10% more than there
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Only the comparisons with this in their name, such as "stream"
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Cni {
    #[command(flatten)]
    common: Common,
    /// ADDs and DELs of one measurement, one after the other
    #[arg(long, default_value_t = 20)]
    operations: usize,
    /// ADDs at the same time
    #[arg(long, default_value_t = 50)]
    concurrent: usize,
}

#[derive(Debug, Args)]
pub(crate) struct Services {
    #[command(flatten)]
    common: Common,
    /// Mechanisms to measure; the first is compared with the others, or ebpf if it is among them
    #[arg(long, value_delimiter = ',', value_name = "MODE", default_values_t = Mode::ALL.map(ModeName), value_parser = mode)]
    modes: Vec<ModeName>,
    /// Numbers of services
    #[arg(long, value_delimiter = ',', value_name = "N", default_values_t = [10, 1_000, 5_000, 10_000, 30_000])]
    services: Vec<u32>,
    /// Endpoints of each service
    #[arg(long, default_value_t = 2)]
    endpoints: u32,
    /// Time of each measurement of requests over an open connection
    #[arg(long, default_value_t = 200)]
    milliseconds: u64,
    /// Seconds that loading the rules of one mechanism may take; it is skipped beyond
    #[arg(long, default_value_t = 600)]
    patience: u64,
}

#[derive(Debug, Args)]
pub(crate) struct PolicyBench {
    /// Runs of each row, of which the worst counts
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Folder to write the report (JSON) into
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Compile {
    #[arg(value_parser = clap::value_parser!(u16).range(1..=20_000))]
    pods: u16,
    #[arg(value_parser = clap::value_parser!(u16).range(1..=20_000))]
    policies: u16,
    #[arg(value_parser = shape)]
    shape: policy::Shape,
    #[arg(long)]
    node: bool,
}

fn shape(name: &str) -> Result<policy::Shape, String> {
    policy::Shape::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| format!("{name:?} is no shape"))
}

#[derive(Debug, Args)]
pub(crate) struct Flows {
    #[command(flatten)]
    common: Common,
    /// Time of each measurement
    #[arg(long, default_value_t = 1000)]
    milliseconds: u64,
    /// Flows a second that are opened; the cost is given for 100,000 in any case
    #[arg(long, default_value_t = 100_000)]
    rate: u32,
}

/// A mode by its name on the command line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ModeName(Mode);

impl std::fmt::Display for ModeName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.name())
    }
}

fn mode(name: &str) -> Result<ModeName, String> {
    Mode::ALL.into_iter().find(|m| m.name() == name).map(ModeName).ok_or_else(|| {
        format!("there is no such mechanism; choose from {}", Mode::ALL.map(Mode::name).join(", "))
    })
}

pub(crate) fn run(command: Bench) -> anyhow::Result<u8> {
    let say = |text: &str| output::error(&format!("{text} …"));
    match command {
        Bench::Net(args) => {
            let _only = OnlyOne::take()?;
            let options = net::Options {
                pairs: args.common.pairs,
                time: Duration::from_millis(args.milliseconds),
                services: args.services,
                baseline: args.baseline,
                only: args.only,
            };
            let (report, worse) = measured(|stop| net::run(&options, stop, say))?;
            finish(&report, &args.common)?;
            for line in &worse {
                output::error(&format!("regression: {line}"));
            }
            Ok(if worse.is_empty() { OK } else { FAILED })
        }
        Bench::Cni(args) => {
            let _only = OnlyOne::take()?;
            let options = cni::Options {
                pairs: args.common.pairs,
                operations: args.operations,
                concurrent: args.concurrent,
            };
            let report = measured(|stop| cni::run(options, stop, say))?;
            finish(&report, &args.common)?;
            Ok(OK)
        }
        Bench::Services(args) => {
            let _only = OnlyOne::take()?;
            let options = services::Options {
                modes: args.modes.iter().map(|m| m.0).collect(),
                services: args.services,
                endpoints: args.endpoints,
                pairs: args.common.pairs,
                time: Duration::from_millis(args.milliseconds),
                patience: Duration::from_secs(args.patience),
            };
            let report = measured(|stop| services::run(&options, stop, say))?;
            finish(&report, &args.common)?;
            Ok(OK)
        }
        Bench::Policy(args) => {
            let report = measured(|stop| policy::run(policy::Options { runs: args.runs }, stop, say))?;
            match args.format.output {
                OutputFormat::Json => output::json(&report)?,
                OutputFormat::Text => output::print(&table(&report)),
            }
            args.save.as_deref().map_or(Ok(()), |dir| save(&report, dir))?;
            Ok(OK)
        }
        Bench::Compile(Compile { pods, policies, shape, node }) => {
            let size = policy::Size { pods: pods.into(), policies: policies.into(), node, shape };
            output::json(&policy::measure(size)?)?;
            Ok(OK)
        }
        Bench::Flows(args) => {
            let _only = OnlyOne::take()?;
            let options = flows::Options {
                pairs: args.common.pairs,
                time: Duration::from_millis(args.milliseconds),
                rate: args.rate,
            };
            let report = measured(|stop| flows::run(options, stop, say))?;
            finish(&report, &args.common)?;
            Ok(OK)
        }
        Bench::Burst { server, rate, milliseconds } => {
            flows::sender(server, rate, Duration::from_millis(milliseconds)).map(|()| OK)
        }
        Bench::Serve => traffic::serve().map(|()| OK),
        Bench::Connect { cgroup } => {
            join(cgroup)?;
            services::connector::run().map(|()| OK)
        }
        Bench::Measure { kind, server, milliseconds, cgroup } => {
            join(cgroup)?;
            let kind = match kind {
                Kind::Stream => traffic::Kind::Stream,
                Kind::Requests => traffic::Kind::Requests,
            };
            output::json(&traffic::measure(kind, server, Duration::from_millis(milliseconds))?)?;
            Ok(OK)
        }
    }
}

fn join(cgroup: Option<PathBuf>) -> anyhow::Result<()> {
    Ok(cgroup.map_or(Ok(()), |path| Cgroup::at(path).join())?)
}

/// Ctrl-C on a terminal ends the bench's own processes too; what then fails is not the news.
fn measured<T>(bench: impl FnOnce(&Stop) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let stop = Stop::on_signals()?;
    bench(&stop).map_err(|error| match stop.check() {
        Err(interrupted) => interrupted,
        Ok(()) => error,
    })
}

fn finish(report: &Report, common: &Common) -> anyhow::Result<()> {
    match common.format.output {
        OutputFormat::Json => output::json(report)?,
        OutputFormat::Text => output::print(&table(report)),
    }
    common.save.as_deref().map_or(Ok(()), |dir| save(report, dir))
}
