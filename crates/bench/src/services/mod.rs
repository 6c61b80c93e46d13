//! `podway bench services`: what a service costs, by mechanism and number of services.
//!
//! Every mechanism gets the same place ([`scratch`]) and the same services ([`population`]). The client opens
//! connections to services chosen at random, so that neither a cache nor the order of rules flatters anyone.

pub mod connector;
pub mod mechanism;
pub mod population;
pub mod scratch;
mod writers;

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;

use self::connector::{Answer, Task};
use self::mechanism::{Mechanism, Mode};
use self::population::{MAX_ENDPOINTS, MAX_SERVICES, Population, service_address};
use self::scratch::Scratch;
use crate::machine::Machine;
use crate::pairs::{Pairs, interleave};
use crate::report::{Comparison, Curve, Difference, Goal, Report, Skipped, Times};
use crate::stats::{median, quantile};
use crate::stop::Stop;
use crate::{check_pairs, new_report};

/// Connections that one measurement opens.
const CONNECTIONS: u32 = 300;
/// Changes of which the time is taken.
const CHANGES: u32 = 60;
/// What `connect()` to a service may take longer than one straight to an endpoint, in nanoseconds.
const GOAL_DIFFERENCE_NS: f64 = 500.0;
/// Number of services from which on the goals against other mechanisms hold.
const GOAL_SERVICES: u32 = 30_000;

/// How to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Mechanisms, Podway's own and what kube-proxy leaves in the kernel.
    pub modes: Vec<Mode>,
    /// Numbers of services.
    pub services: Vec<u32>,
    /// Endpoints of each service.
    pub endpoints: u32,
    /// Pairs of each comparison.
    pub pairs: usize,
    /// Time of each measurement of requests over one connection.
    pub time: Duration,
    /// Longest time to load the rules of one mechanism; it is skipped beyond.
    pub patience: Duration,
}

/// Runs the bench. `say` is told what happens.
///
/// # Errors
/// When an option is bad, a part cannot be made, or it is interrupted. Everything that was made is removed.
pub fn run(options: &Options, stop: &Stop, mut say: impl FnMut(&str)) -> anyhow::Result<Report> {
    check(options)?;
    let mut report = new_report("services", Machine::of_now());
    report.options = json!({
        "modes": options.modes.iter().map(|m| m.name()).collect::<Vec<_>>(),
        "services": options.services,
        "endpoints": options.endpoints,
        "pairs": options.pairs,
        "milliseconds": u64::try_from(options.time.as_millis())?,
    });
    let mut modes = Vec::new();
    for mode in &options.modes {
        match mode.missing() {
            Some(why) => report.skipped.push(Skipped { what: mode.name().into(), why }),
            None => modes.push(*mode),
        }
    }
    if modes.is_empty() {
        bail!(
            "none of the chosen mechanisms is on this machine; see what was skipped above, or choose --modes"
        );
    }
    for services in &options.services {
        let population = Population { services: *services, endpoints: options.endpoints };
        Round { options, population, modes: &modes, stop, say: &mut say }.run(&mut report)?;
    }
    Ok(report)
}

fn check(options: &Options) -> anyhow::Result<()> {
    check_pairs(options.pairs)?;
    if options.endpoints == 0 {
        bail!("--endpoints: a service needs one at least");
    }
    for services in &options.services {
        let all = u64::from(*services) * u64::from(options.endpoints);
        if !(1..=MAX_SERVICES).contains(services) || all > u64::from(MAX_ENDPOINTS) {
            bail!(
                "--services: {services} with {} endpoints each; 1 to {MAX_SERVICES} services and at most \
                 {MAX_ENDPOINTS} endpoints are possible",
                options.endpoints
            );
        }
    }
    Ok(())
}

/// One number of services.
struct Round<'a, F> {
    options: &'a Options,
    population: Population,
    modes: &'a [Mode],
    stop: &'a Stop,
    say: &'a mut F,
}

/// A mechanism with the services in it.
struct Filled {
    mode: Mode,
    // Goes before the place that it is in.
    mechanism: Box<dyn Mechanism>,
    scratch: Scratch,
}

impl<F: FnMut(&str)> Round<'_, F> {
    fn run(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let mut bare = Scratch::up("svc-bare", None, self.stop)?;
        let mut all = Vec::new();
        for mode in self.modes {
            match self.fill(*mode, report)? {
                Some(filled) => all.push(filled),
                None => continue,
            }
        }
        // The one that the others are compared with: the default if it was chosen, else the first.
        let Some(own) = all.iter().position(|f| f.mode == Mode::Ebpf).or(Some(0)).filter(|_| !all.is_empty())
        else {
            return Ok(());
        };
        let mut ours = all.swap_remove(own);
        if ours.mode == Mode::Ebpf {
            self.against_direct(&mut ours, &mut bare, report)?;
        }
        for other in &mut all {
            self.against(&mut ours, other, report)?;
        }
        all.insert(0, ours);
        for filled in &mut all {
            self.change(filled, report)?;
        }
        for filled in all {
            filled.mechanism.remove()?;
        }
        Ok(())
    }

    fn label(&self, what: &str) -> String {
        format!("{what}, {} services", self.population.services)
    }

    fn tell(&mut self, what: &str) {
        let text = self.label(what);
        (self.say)(&text);
    }

    fn fill(&mut self, mode: Mode, report: &mut Report) -> anyhow::Result<Option<Filled>> {
        self.tell(&format!("loading {}", mode.name()));
        let scratch = Scratch::up(&format!("svc-{}", mode.name()), mode.cgroup()?, self.stop)?;
        let mut mechanism = mode.start(&scratch)?;
        match mechanism.fill(&self.population, &scratch, self.options.patience, self.stop) {
            Ok(time) => {
                let who = mode.name();
                report.times.push(one_time(&self.label("program all"), who, "s", time.as_secs_f64()));
                self.point(report, "program all services", who, "s", time.as_secs_f64());
                Ok(Some(Filled { mode, mechanism, scratch }))
            }
            Err(error) => {
                self.stop.check()?;
                report.skipped.push(Skipped { what: self.label(mode.name()), why: format!("{error:#}") });
                Ok(None)
            }
        }
    }

    fn against_direct(
        &mut self,
        ours: &mut Filled,
        bare: &mut Scratch,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let who = ours.mode.name();
        self.tell(&format!("connections through {who} and straight to endpoints"));
        let mut pairs = Pairs::default();
        for round in 0..=self.options.pairs {
            self.stop.check()?;
            let answer = ours.scratch.connect(&self.task(true, true, round))?;
            // The first warms up.
            if round > 0 {
                pairs.ours.push(answer.services.p50_us * 1e3);
                pairs.peer.push(answer.endpoints.p50_us * 1e3);
            }
        }
        report.differences.push(
            Difference::new(
                &self.label("connect() to a service beyond one to its endpoint"),
                "ns",
                who,
                pairs,
                GOAL_DIFFERENCE_NS,
            )
            .context("too few pairs for an interval")?,
        );
        let seed = std::cell::Cell::new(0);
        let direct = self.task(false, true, 0);
        let once = |scratch: &mut Scratch| -> anyhow::Result<f64> {
            seed.set(seed.get() + 1);
            Ok(scratch.connect(&Task { seed: seed.get(), ..direct })?.endpoints.p50_us)
        };
        let pairs = interleave(self.options.pairs, self.stop, || once(&mut ours.scratch), || once(bare))?;
        let what = self.label("connect() straight to an endpoint");
        report.comparisons.push(
            Comparison::new(&what, "µs", "no services at all", pairs, Goal::AtMost(1.03))
                .context("too few pairs for an interval")?,
        );
        Ok(())
    }

    fn against(&mut self, ours: &mut Filled, other: &mut Filled, report: &mut Report) -> anyhow::Result<()> {
        let (who, them) = (ours.mode.name(), other.mode.name());
        self.tell(&format!("{who} against {them}"));
        let seed = std::cell::Cell::new(0);
        let task = self.task(true, false, 0);
        let times = std::cell::RefCell::new((Vec::new(), Vec::new()));
        let once = |filled: &mut Filled, mine: bool| -> anyhow::Result<f64> {
            seed.set(seed.get() + 1);
            let Answer { services, .. } = filled.scratch.connect(&Task { seed: seed.get(), ..task })?;
            let mut times = times.borrow_mut();
            (if mine { &mut times.0 } else { &mut times.1 }).push((services.p50_us, services.p99_us));
            Ok(services.p50_us)
        };
        let pairs = interleave(
            self.options.pairs,
            self.stop,
            || once(&mut *ours, true),
            || once(&mut *other, false),
        )?;
        let what = self.label("connect() to a service");
        let goal =
            Goal::AtMost(if self.population.services >= GOAL_SERVICES { other.mode.goal() } else { 1.0 });
        report
            .comparisons
            .push(Comparison::new(&what, "µs", them, pairs, goal).context("too few pairs for an interval")?);
        let (own, theirs) = times.into_inner();
        for (who, delays) in [(who, own), (them, theirs)] {
            let listed = report.times.iter().any(|t| t.what == what && t.who == who);
            if listed {
                continue;
            }
            let (p50, p99): (Vec<f64>, Vec<f64>) = delays.into_iter().skip(1).unzip();
            let (p50, p99) = (median(&p50).unwrap_or_default(), median(&p99).unwrap_or_default());
            report.times.push(Times {
                what: what.clone(),
                who: who.into(),
                unit: "µs".into(),
                p50,
                p99,
                count: self.options.pairs,
            });
            self.point(report, "connect() to a service, p50", who, "µs", p50);
        }
        let address = service_address(self.population.services / 2);
        let steady = interleave(
            self.options.pairs,
            self.stop,
            || ours.scratch.requests(address, self.options.time, self.stop),
            || other.scratch.requests(address, self.options.time, self.stop),
        )?;
        let what = self.label("request over an open connection");
        report.comparisons.push(
            Comparison::new(&what, "µs", them, steady, Goal::AtMost(1.0))
                .context("too few pairs for an interval")?,
        );
        Ok(())
    }

    fn change(&mut self, filled: &mut Filled, report: &mut Report) -> anyhow::Result<()> {
        if !filled.mode.is_ours() {
            return Ok(());
        }
        let who = filled.mode.name();
        self.tell(&format!("changing one endpoint, {who}"));
        let mut times = Vec::new();
        for change in 0..CHANGES {
            self.stop.check()?;
            // Spread over all services; a prime step meets them in no order.
            let service = (u64::from(change) * 7919 % u64::from(self.population.services)) as u32;
            let time =
                filled.mechanism.change(&self.population, service, 1 + change / self.population.services)?;
            times.push(time.as_secs_f64() * 1e3);
        }
        let (p50, p99) =
            (quantile(&times, 0.5).unwrap_or_default(), quantile(&times, 0.99).unwrap_or_default());
        report.times.push(Times {
            what: self.label("one endpoint changed"),
            who: who.into(),
            unit: "ms".into(),
            p50,
            p99,
            count: times.len(),
        });
        self.point(report, "program one changed endpoint, p50", who, "ms", p50);
        Ok(())
    }

    fn task(&self, to_services: bool, to_endpoints: bool, round: usize) -> Task {
        Task {
            services: self.population.services,
            endpoints: self.population.endpoints,
            count: CONNECTIONS,
            to_services,
            to_endpoints,
            seed: 1 + round as u64,
        }
    }

    fn point(&self, report: &mut Report, what: &str, who: &str, unit: &str, y: f64) {
        let x = f64::from(self.population.services);
        match report.curves.iter_mut().find(|c| c.what == what && c.who == who) {
            Some(curve) => curve.points.push((x, y)),
            None => report.curves.push(Curve {
                what: what.into(),
                who: who.into(),
                x: "services".into(),
                unit: unit.into(),
                points: vec![(x, y)],
            }),
        }
    }
}

fn one_time(what: &str, who: &str, unit: &str, value: f64) -> Times {
    Times { what: what.into(), who: who.into(), unit: unit.into(), p50: value, p99: value, count: 1 }
}
