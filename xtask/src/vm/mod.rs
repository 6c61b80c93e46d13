//! `cargo xtask vm`: the datapath's tests on other kernels.
//!
//! Boots a kernel as Debian packages it under QEMU, with a root that is written here, runs the test programs of
//! the datapath and the links in it, and prints what came of them. It is also where to find what the kernel of
//! the machine at hand may lack: IPVS, SCTP, WireGuard, netem.
//!
//! May write to `target/vm` only, and installs nothing but the emulator.

mod cpio;
mod image;
mod init;
mod kernel;
mod modules;
mod protocol;
mod qemu;

use std::{
    fmt::Write as _,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    bpf,
    tests::{self, Program},
};
use image::Unpacked;
use kernel::Kernel;
use qemu::Outcome;

/// Crates whose tests run in the machine.
const CRATES: &[&str] = &["podway-bpf-host", "podway-datapath-cases", "podway-link"];
/// Single test programs of other crates: what needs a kernel with IPVS or SCTP sockets.
const PROGRAMS: &[(&str, &[&str])] = &[("podway-proxy-rules", &["ipvs", "sctp"])];
/// Packages of a tool that only the machine needs, and of its libraries: nothing of them is installed.
const IPVSADM: [&str; 4] = ["ipvsadm", "libnl-3-200", "libnl-genl-3-200", "libpopt0"];
/// The example that prints what the verifier made of the programs.
const BUDGET: &str = "budget";
/// The oldest kernel that Podway runs on.
const FLOOR: &str = "6.1";

const USAGE: &str = "usage: cargo xtask vm [--kernel SERIES]… [--test FILTER]…   (SERIES: 6.1, 6.12, …)";

#[derive(Debug, Default, PartialEq)]
struct Options {
    kernels: Vec<String>,
    filters: Vec<String>,
}

/// Runs the test programs whose crate or name contains one of the filters on every kernel asked for.
pub(crate) fn run(args: &[&str]) -> Result<()> {
    let options = parse(args)?;
    let began = Instant::now();
    qemu::ensure()?;
    if !bpf::object_path().exists() {
        bail!("the kernel object is not built; run `cargo xtask bpf` first");
    }
    let directory = crate::root().join("target/vm");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let programs = programs(&options.filters)?;
    let busybox = kernel::unpack(&kernel::package_file("busybox-static", &directory)?)?.join("bin/busybox");

    let roots = IPVSADM.iter().map(|package| kernel::unpack(&kernel::package_file(package, &directory)?));
    let ipvsadm = Unpacked { program: "sbin/ipvsadm", roots: roots.collect::<Result<_>>()? };
    let common = image::common(&busybox, &[ipvsadm], &programs, &directory)?;

    let mut accelerator = qemu::Accelerator::best();
    let mut columns = Vec::new();
    for series in &options.kernels {
        let Some(kernel) = kernel::find(series, &directory)? else {
            println!("── kernel {series}: not available; apt offers no linux-image-{series}.*-cloud-amd64");
            columns.push((series.clone(), None));
            continue;
        };
        println!("── kernel {} (Debian {})", kernel.release, kernel.version);
        let modules = modules::collect(&kernel.modules)?;
        let root = directory.join(format!("{}.cpio", kernel.release));
        fs::write(&root, image::build(&common, &modules, &programs)?)
            .with_context(|| format!("cannot write {}", root.display()))?;
        let logs = directory.join(&kernel.release);
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let outcome = qemu::run(&mut accelerator, &kernel.image, &root, &logs)?;
        report(&kernel, &outcome, programs.len());
        println!("   logs: {}", logs.display());
        columns.push((series.clone(), Some(outcome)));
    }
    print!("\n{}", matrix(&programs, &columns));
    println!("{:.0} s in all, with building", began.elapsed().as_secs_f64());

    let ran: Vec<_> = columns.iter().filter_map(|(s, o)| Some((s, o.as_ref()?))).collect();
    let bad: Vec<_> =
        ran.iter().filter(|(_, o)| !is_good(o, programs.len())).map(|(s, _)| s.as_str()).collect();
    if !bad.is_empty() {
        bail!("failed on kernel {}", bad.join(", "));
    }
    if ran.is_empty() {
        bail!("none of the kernels is available; run `sudo apt-get update` and try again");
    }
    Ok(())
}

fn parse(args: &[&str]) -> Result<Options> {
    let mut options = Options::default();
    let mut args = args.iter();
    while let Some(option) = args.next() {
        let list = match *option {
            "--kernel" => &mut options.kernels,
            "--test" => &mut options.filters,
            _ => bail!("{option}: unknown\n{USAGE}"),
        };
        let value = args.next().with_context(|| format!("{option}: its value is missing\n{USAGE}"))?;
        if !list.iter().any(|v| v == value) {
            list.push((*value).to_owned());
        }
    }
    if options.kernels.is_empty() {
        options.kernels.push(FLOOR.to_owned());
    }
    Ok(options)
}

/// Builds the programs; those that are tests, and the example of the budget, where the filters let them.
fn programs(filters: &[String]) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    let mut arguments = Vec::new();
    for name in CRATES.iter().filter(|name| may_match(filters, name, None)) {
        arguments.extend(["--package", name]);
    }
    if !arguments.is_empty() {
        programs = tests::programs(&arguments)?;
    }
    for (package, names) in PROGRAMS {
        let names = names.iter().filter(|name| may_match(filters, package, Some(name)));
        let arguments: Vec<&str> = names.flat_map(|name| ["--test", name]).collect();
        if !arguments.is_empty() {
            programs.extend(tests::programs(&[vec!["--package", package], arguments].concat())?);
        }
    }
    programs.retain(|p| {
        let wanted = p.is_test || p.name == BUDGET;
        wanted && (filters.is_empty() || filters.iter().any(|f| p.label().contains(f)))
    });
    if programs.is_empty() {
        bail!("no test program matches {}", filters.join(", "));
    }
    Ok(programs)
}

/// Whether a program of a crate, of this name where it is known, may be one that the filters let pass: only then is
/// it built. Filters are parts of `directory: name`.
fn may_match(filters: &[String], package: &str, name: Option<&str>) -> bool {
    filters.is_empty()
        || filters.iter().any(|filter| match filter.split_once(": ") {
            Some((directory, rest)) => {
                package.ends_with(directory) && name.is_none_or(|name| name.starts_with(rest))
            }
            None => {
                name.is_none_or(|name| name.contains(filter.as_str()) || package.contains(filter.as_str()))
            }
        })
}

fn is_good(outcome: &Outcome, programs: usize) -> bool {
    let run = &outcome.run;
    outcome.cut.is_none()
        && run.problems.is_empty()
        && run.programs.len() == programs
        && run.programs.iter().all(protocol::ProgramRun::is_good)
}

fn report(kernel: &Kernel, outcome: &Outcome, programs: usize) {
    let run = &outcome.run;
    match outcome.boot {
        Some(boot) => println!(
            "   {} booted in {}, {} in all ({})",
            run.release.as_deref().unwrap_or(&kernel.release),
            seconds(boot),
            seconds(outcome.total),
            outcome.accelerator.name()
        ),
        None => println!("   did not boot ({})", outcome.accelerator.name()),
    }
    for probe in &run.probes {
        let line = format!("   probe {:<12} {:<3} {}", probe.name, yes_or_no(probe.there), probe.reason);
        println!("{}", line.trim_end());
    }
    for problem in &run.problems {
        println!("   problem: {problem}");
    }
    for program in &run.programs {
        println!("   {:<40} {:<12} {:>6.1} s", program.label, program.outcome(), program.seconds);
        if !program.is_good() || program.label.ends_with(BUDGET) {
            for line in program.output.iter().filter(|l| !l.is_empty()) {
                println!("      {line}");
            }
        }
    }
    if run.programs.len() < programs {
        println!("   {} of {programs} programs did not start", programs - run.programs.len());
    }
    if let Some(cut) = &outcome.cut {
        println!("   {cut}");
    }
}

/// A row for each probe and program, a column for each kernel.
fn matrix(programs: &[Program], columns: &[(String, Option<Outcome>)]) -> String {
    let header = columns.iter().map(|(series, outcome)| match outcome {
        Some(_) => series.clone(),
        None => format!("{series} (not available)"),
    });
    let mut rows: Vec<(String, Vec<String>)> = vec![(String::new(), header.collect())];
    let mut row = |title: &str, cell: &dyn Fn(&Outcome) -> Option<String>| {
        let cells = columns.iter().map(|(_, outcome)| outcome.as_ref().and_then(cell));
        rows.push((title.to_owned(), cells.map(|c| c.unwrap_or_else(|| "–".to_owned())).collect()));
    };
    row("kernel", &|o| o.run.release.clone());
    row("boot", &|o| o.boot.map(seconds));
    row("total", &|o| Some(format!("{} ({})", seconds(o.total), o.accelerator.name())));
    for program in programs {
        let label = program.label();
        row(&label, &|o| {
            let run = o.run.programs.iter().find(|p| p.label == label)?;
            Some(format!("{}, {:.1} s", run.outcome(), run.seconds))
        });
    }
    let probes = columns.iter().find_map(|(_, o)| o.as_ref()).map(|o| o.run.probes.as_slice());
    for name in probes.unwrap_or_default().iter().map(|p| &p.name) {
        row(&format!("has {name}"), &|o| {
            let probe = o.run.probes.iter().find(|p| p.name == *name)?;
            Some(yes_or_no(probe.there).to_owned())
        });
    }
    let mut text = String::new();
    for (title, cells) in rows {
        let cells: String = cells.iter().map(|c| format!("  {c:<26}")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "{}", format!("{title:<38}{cells}").trim_end());
    }
    text
}

const fn yes_or_no(there: bool) -> &'static str {
    if there { "yes" } else { "no" }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests_of_options {
    use super::*;

    #[test]
    fn options_are_read_and_refused_with_the_usage() {
        let read = |args: &[&str]| parse(args).map(|o| (o.kernels.join(" "), o.filters.join(" ")));
        let refused = |args: &[&str]| parse(args).err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(read(&[]).ok(), Some(("6.1".into(), String::new())));
        let all = ["--kernel", "6.1", "--test", "link", "--kernel", "6.12", "--kernel", "6.1"];
        assert_eq!(read(&all).ok(), Some(("6.1 6.12".into(), "link".into())));
        assert!(refused(&["--kernel"]).contains("--kernel: its value is missing"));
        let may = |filter: &str, package, name| may_match(&[filter.to_owned()], package, name);
        assert!(may_match(&[], "podway-link", None) && may("netlink", "podway-link", None));
        assert!(may("link: netlink", "podway-link", None) && !may("link: netlink", "podway-bpf-host", None));
        assert!(
            may("rules: ip", "podway-proxy-rules", Some("ipvs"))
                && may("rules", "podway-proxy-rules", Some("ipvs"))
        );
        assert!(
            !may("link", "podway-proxy-rules", Some("ipvs"))
                && !may("rules: sc", "podway-proxy-rules", Some("ipvs"))
        );
        assert!(refused(&["link"]).contains("link: unknown") && refused(&["link"]).contains("usage"));
    }
}
