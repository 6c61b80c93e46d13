//! Running processes in a network namespace, on a given core, for a bounded time.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use podway_link::Netns;

use crate::stop::Stop;

/// Longest wait for a process between two looks at whether to end.
const LOOK: u16 = 100;
/// Output beyond this is cut off: nothing that a bench starts has that much to say.
const OUTPUT_MAX: u64 = 1 << 20;

/// A process that is killed when this value goes.
#[derive(Debug)]
pub struct Running {
    child: Child,
    // Held open: what a bench starts of its own ends when this closes, even after the bench was killed.
    stdin: Option<ChildStdin>,
}

/// What a process said and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// How it ended.
    pub status: ExitStatus,
}

/// The set of one core.
///
/// # Errors
/// When there is no such core in any machine.
fn cpu_set(cpu: usize) -> anyhow::Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("core {cpu}"))?;
    Ok(set)
}

/// Starts a process in a namespace, on one core if one is given. Standard input and output are pipes.
///
/// # Errors
/// When the namespace cannot be entered, there is no such core, or the program cannot be started.
pub fn start(netns: &Netns, cpu: Option<usize>, mut command: Command) -> anyhow::Result<Running> {
    let program = command.get_program().to_string_lossy().into_owned();
    let set = cpu.map(cpu_set).transpose()?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    // A child inherits namespace and cores of the thread that starts it, and this thread is for nothing else.
    let child = netns.run(move || -> anyhow::Result<Child> {
        if let Some(set) = set {
            sched_setaffinity(Pid::from_raw(0), &set).context("choose the core")?;
        }
        Ok(command.spawn()?)
    })?;
    let mut child = child.with_context(|| format!("start {program}"))?;
    let stdin = child.stdin.take();
    Ok(Running { child, stdin })
}

impl Running {
    /// Moves its main thread to a core.
    ///
    /// # Errors
    /// When there is no such core or the process has ended.
    pub fn pin(&self, cpu: usize) -> anyhow::Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        sched_setaffinity(pid, &cpu_set(cpu)?).with_context(|| format!("move a server to core {cpu}"))
    }

    /// Reads a line of its output, for as long as the process lives.
    ///
    /// # Errors
    /// When it ended without one.
    pub fn line(&mut self) -> anyhow::Result<String> {
        let stdout = self.child.stdout.as_mut().context("standard output is read already")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("read a line")?;
        if line.is_empty() {
            bail!("it ended without a word: {}", self.child.wait()?);
        }
        Ok(line.trim_end().to_owned())
    }

    /// Gives it a line and reads its answer.
    ///
    /// # Errors
    /// When it has ended.
    pub fn ask(&mut self, line: &str) -> anyhow::Result<String> {
        let stdin = self.stdin.as_mut().context("standard input is closed already")?;
        writeln!(stdin, "{line}").context("write a line")?;
        self.line()
    }

    /// Ends it.
    pub fn end(&mut self) {
        // One that has ended and was waited for is not touched by either.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Gives it its input and waits for its end.
    ///
    /// # Errors
    /// When it runs longer than `limit` or the bench is to end; it is killed then.
    pub fn finish(mut self, input: &[u8], limit: Duration, stop: &Stop) -> anyhow::Result<Finished> {
        let end = Instant::now() + limit;
        if let Some(mut stdin) = self.stdin.take() {
            // A process that ends without reading says why by itself.
            let _ = stdin.write_all(input);
        }
        let mut stdout = self.child.stdout.take().context("standard output is read already")?;
        let mut said = Vec::new();
        loop {
            stop.check()?;
            if Instant::now() >= end {
                bail!("no end after {} s", limit.as_secs());
            }
            let ready = {
                let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
                match poll(&mut fds, PollTimeout::from(LOOK)) {
                    Ok(ready) => ready > 0,
                    Err(nix::errno::Errno::EINTR) => false,
                    Err(e) => return Err(e).context("wait for output"),
                }
            };
            if ready {
                let mut part = [0; 4096];
                let n = stdout.read(&mut part).context("read output")?;
                if n == 0 {
                    break;
                }
                let room = OUTPUT_MAX.saturating_sub(said.len() as u64);
                let keep = usize::try_from(room).unwrap_or(usize::MAX).min(n);
                said.extend_from_slice(&part[..keep]);
            }
        }
        let status = self.child.wait().context("wait for the end")?;
        Ok(Finished { stdout: said, status })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}
