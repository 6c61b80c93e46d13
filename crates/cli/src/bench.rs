//! `podway bench …`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use podway_bench::namespaces::OnlyOne;
use podway_bench::report::{Report, table};
use podway_bench::stop::Stop;
use podway_bench::{cni, net, save, traffic};

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
    /// Answer the bench's clients
    #[command(hide = true)]
    Serve,
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
        Bench::Serve => traffic::serve().map(|()| OK),
        Bench::Measure { kind, server, milliseconds } => {
            let kind = match kind {
                Kind::Stream => traffic::Kind::Stream,
                Kind::Requests => traffic::Kind::Requests,
            };
            output::json(&traffic::measure(kind, server, Duration::from_millis(milliseconds))?)?;
            Ok(OK)
        }
    }
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
