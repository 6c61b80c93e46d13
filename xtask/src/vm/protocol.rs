//! What the machine says, line by line, and what came of it.
//!
//! A line that begins with [`MARK`] is `MARK <seconds since boot> <word> <rest>`; every other line is output of
//! the program that runs. Words: `boot` (kernel's release), `probe` (yes or no, name, and why not), `problem` (text), `begin`
//! (program's label), `end` (exit code), `done`.

use anyhow::{Context, Result, bail};

/// How a line of the protocol begins.
pub(super) const MARK: &str = "::podway";

/// What is known of a run so far.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Run {
    /// The kernel's release, once it runs.
    pub(super) release: Option<String>,
    pub(super) probes: Vec<Probe>,
    /// What went wrong before any program ran.
    pub(super) problems: Vec<String>,
    pub(super) programs: Vec<ProgramRun>,
    /// The script came to its end.
    pub(super) done: bool,
}

/// Whether the kernel has something.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Probe {
    pub(super) name: String,
    pub(super) there: bool,
    /// What the probe printed where it is not there.
    pub(super) reason: String,
}

/// A program that was started.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ProgramRun {
    pub(super) label: String,
    /// Seconds of the machine's clock at its start.
    started: f64,
    /// Seconds that it took.
    pub(super) seconds: f64,
    /// `None` while it runs, and when the machine stopped meanwhile.
    pub(super) exit: Option<i32>,
    pub(super) output: Vec<String>,
}

impl Run {
    /// Takes one line from the machine.
    ///
    /// # Errors
    /// When it begins as one of the protocol's and is none.
    pub(super) fn line(&mut self, line: &str) -> Result<()> {
        let line = line.trim_end();
        let Some(said) = line.strip_prefix(MARK) else {
            // Lines between programs are the machine's own complaints.
            match self.programs.last_mut() {
                Some(program) if program.exit.is_none() => program.output.push(line.to_owned()),
                _ if !line.is_empty() => self.problems.push(line.to_owned()),
                _ => {}
            }
            return Ok(());
        };
        let malformed = || format!("the machine said something that is not understood: {line}");
        let mut fields = said.trim_start().splitn(3, ' ');
        let seconds: f64 = fields.next().and_then(|s| s.parse().ok()).with_context(malformed)?;
        let word = fields.next().with_context(malformed)?;
        let rest = fields.next().unwrap_or_default();
        match word {
            "boot" => self.release = Some(rest.to_owned()),
            "problem" => self.problems.push(rest.to_owned()),
            "probe" => {
                let mut fields = rest.splitn(3, ' ').map(str::to_owned);
                let there = match fields.next().as_deref() {
                    Some("yes") => true,
                    Some("no") => false,
                    _ => bail!(malformed()),
                };
                let name = fields.next().with_context(malformed)?;
                self.probes.push(Probe { name, there, reason: fields.next().unwrap_or_default() });
            }
            "begin" => self.programs.push(ProgramRun {
                label: rest.to_owned(),
                started: seconds,
                ..ProgramRun::default()
            }),
            "end" => {
                let program = self.programs.last_mut().with_context(malformed)?;
                program.exit = Some(rest.parse().with_context(malformed)?);
                program.seconds = seconds - program.started;
            }
            "done" => self.done = true,
            _ => bail!(malformed()),
        }
        Ok(())
    }
}

impl ProgramRun {
    /// How many tests passed, by the harness's own count; `None` for what is no test.
    pub(super) fn passed(&self) -> Option<u32> {
        let line = self.output.iter().rev().find(|l| l.starts_with("test result: "))?;
        line.split_once(". ")?.1.split(' ').next()?.parse().ok()
    }

    /// Tests that failed, by name.
    pub(super) fn failed(&self) -> Vec<&str> {
        self.output.iter().filter_map(|l| l.strip_prefix("test ")?.strip_suffix(" ... FAILED")).collect()
    }

    /// What a test said when it did not run: in here everything has to.
    pub(super) fn skips(&self) -> impl Iterator<Item = &str> {
        // Other projects' cases are data outside of the tree, which no guest has.
        let lacking = |why: &&str| !why.starts_with("there are no cases");
        self.output.iter().filter_map(|l| l.strip_prefix("skipped: ")).filter(lacking)
    }

    /// In one or two words.
    pub(super) fn outcome(&self) -> String {
        let skips = self.skips().count();
        match (self.exit, self.passed()) {
            (Some(0), _) if skips > 0 => format!("{skips} skipped"),
            (Some(0), Some(passed)) => format!("{passed} passed"),
            (Some(0), None) => "passed".to_owned(),
            // The signal of the time limit, as the shell reports it.
            (Some(137), _) => "too slow".to_owned(),
            (Some(code), _) => match self.failed().len() {
                0 => format!("exit {code}"),
                failed => format!("{failed} FAILED"),
            },
            (None, _) => "cut off".to_owned(),
        }
    }

    /// It ran to its end, every test ran, and none failed.
    pub(super) fn is_good(&self) -> bool {
        self.exit == Some(0) && self.skips().next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str) -> Run {
        let mut run = Run::default();
        for line in text.lines() {
            run.line(line).unwrap();
        }
        run
    }

    #[test]
    fn a_whole_run_is_understood() {
        let run = run("\r\n::podway 2.10 boot 6.1.0-56-cloud-amd64\r\n::podway 2.50 probe yes IPVS\r\n\
             ::podway 2.51 probe no netkit Error: Unknown device type.\r\n\n::podway 3.00 begin link: netlink\r\nrunning 2 tests\r\n\
             test a ... ok\r\ntest b ... FAILED\r\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\r\n\
             ::podway 4.50 end 101\r\n::podway 5.00 begin bpf-host: budget\n::podway 5.25 end 0\n\
             ::podway 6.00 begin link: probe\nskipped: needs root\ntest result: ok. 1 passed; 0 failed\n\
             ::podway 6.10 end 0\n::podway 6.20 done\n");
        assert_eq!(run.release.as_deref(), Some("6.1.0-56-cloud-amd64"));
        let probes: Vec<_> =
            run.probes.iter().map(|p| (p.name.as_str(), p.there, p.reason.as_str())).collect();
        assert_eq!(probes, [("IPVS", true, ""), ("netkit", false, "Error: Unknown device type.")]);
        assert!(run.done && run.problems.is_empty(), "{:?}", run.problems);
        let [netlink, budget, probe] = run.programs.as_slice() else { panic!("{:?}", run.programs) };
        assert_eq!((netlink.outcome().as_str(), netlink.is_good()), ("1 FAILED", false));
        assert_eq!((netlink.failed(), netlink.passed()), (vec!["b"], Some(1)));
        assert!((netlink.seconds - 1.5).abs() < 0.001);
        assert_eq!((budget.outcome().as_str(), budget.is_good()), ("passed", true));
        assert_eq!((probe.outcome().as_str(), probe.is_good()), ("1 skipped", false));
    }

    #[test]
    fn what_stops_in_between_is_not_good() {
        let run = run("::podway 1.00 boot 6.1\ninsmod: no such file\n::podway 2.00 begin a\nhalf a line");
        assert!(!run.done && !run.programs[0].is_good());
        assert_eq!(run.programs[0].outcome(), "cut off");
        assert_eq!(run.problems, ["insmod: no such file"]);
    }

    #[test]
    fn nonsense_is_refused() {
        for line in
            ["::podway", "::podway x boot", "::podway 1.0 dance", "::podway 1.0 probe", "::podway 1.0 end 0"]
        {
            assert!(Run::default().line(line).is_err(), "{line}");
        }
    }
}
