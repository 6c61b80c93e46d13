//! Delay between two nodes: a process that holds each packet of the pair back, because many kernels lack netem.
//!
//! The fabric's rules send the packets of one direction into a TAP device instead of out of the port of the node
//! they are for. The process reads them there, waits, and writes them back; a rule at the device sends them on to the
//! port. One process serves one pair of nodes, so that a change of another pair disturbs nothing. While it is away,
//! nothing passes; the lab's process starts it again.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::unistd::Pid;
use podway_link::tap::{FRAME_MAX, Tap};
use podway_link::{Netns, sysctl};
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::faults::run_in_place;
use crate::spec::LabName;
use crate::state::{StateDir, start_ticks};

/// Longest delay in one direction, in microseconds: 10 s.
pub const DELAY_MAX_MICROS: u32 = 10_000_000;
/// Most pairs of nodes with a delay, since each has a process and two devices.
pub(crate) const PAIRS_MAX: usize = 100;
/// Bytes that are on their way in one direction at most: 1 Gbit/s for half a second. What is more is lost, as in any
/// queue.
const BYTES_MAX: usize = 64 << 20;
/// Frames that are on their way in one direction at most.
const FRAMES_MAX: usize = 1 << 18;
/// Frames that the kernel keeps for us while we do not read.
const KERNEL_QUEUE: &str = "8192";
/// Frames taken from one direction before the other one has its turn.
const BATCH: usize = 64;
/// How long the process may take to start.
const START: Duration = Duration::from_secs(10);
/// Control group of these processes, within that of the lab.
const GROUP: &str = "links";

/// A process that delays the packets between two nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Relay {
    /// One node.
    pub(crate) a: String,
    /// The other.
    pub(crate) b: String,
    micros: u32,
    pid: i32,
    start_ticks: u64,
    /// Devices in the fabric for the packets from `a` to `b`, and for those from `b` to `a`.
    pub(crate) devices: [String; 2],
}

impl Relay {
    /// Starts one. It ends with the lab.
    pub(crate) fn start(lab: &LabName, a: &str, b: &str, micros: u32) -> anyhow::Result<Self> {
        let log = StateDir::of(lab).path().join("links.log");
        let file = OpenOptions::new().create(true).append(true).open(&log);
        let mut child = Command::new("/proc/self/exe")
            .arg0("podway")
            .args(["internal", "delay", lab.as_str(), a, b, &micros.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file.with_context(|| format!("open {}", log.display()))?)
            .current_dir("/")
            .spawn()
            .context("start the process that delays packets")?;
        let started = Self::greeted(&mut child, a, b, micros);
        if started.is_err() {
            let _ = child.kill();
        }
        // Whoever started it and lives on has to collect it one day.
        std::thread::spawn(move || child.wait());
        started.with_context(|| format!("delay between {a} and {b}; {} says more", log.display()))
    }

    /// Reads which devices it has made.
    fn greeted(child: &mut Child, a: &str, b: &str, micros: u32) -> anyhow::Result<Self> {
        let stdout = child.stdout.take().context("it has no standard output")?;
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::try_from(START)?)? == 0 {
            bail!("it did not come up in {} s", START.as_secs());
        }
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let devices = serde_json::from_str(&line).context("it ended before its devices were there")?;
        let pid = child.id().cast_signed();
        Ok(Self { a: a.into(), b: b.into(), micros, pid, start_ticks: start_ticks(pid)?, devices })
    }

    /// Whether it runs and does this.
    pub(crate) fn serves(&self, a: &str, b: &str, micros: u32) -> bool {
        (self.a.as_str(), self.b.as_str(), self.micros) == (a, b, micros) && self.is_alive()
    }

    fn is_alive(&self) -> bool {
        start_ticks(self.pid).is_ok_and(|ticks| ticks == self.start_ticks)
    }

    /// Ends it, with its devices. What it holds is lost.
    pub(crate) fn stop(&self) {
        if self.is_alive() {
            // It may just have ended by itself.
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

/// The process: delays what comes into its devices, and never returns unless it fails.
///
/// # Errors
/// When the lab is not there, or the kernel has no TAP devices.
pub fn run(lab: &LabName, micros: u32) -> anyhow::Result<()> {
    // On its own, so that a Ctrl-C for the command that started it is not for it.
    nix::unistd::setsid().context("start a session")?;
    let group = Cgroup::of_lab(lab)?.child(GROUP);
    group.create()?;
    group.join()?;
    let delay = Duration::from_micros(micros.into());
    Netns::open_named(&lab.fabric_netns())?.run(|| -> anyhow::Result<()> {
        let wires = [device()?, device()?];
        let names = serde_json::to_string(&[wires[0].tap.name(), wires[1].tap.name()])?;
        {
            let mut out = io::stdout().lock();
            writeln!(out, "{names}").and_then(|()| out.flush()).context("nobody waits for the delay")?;
        }
        relay(wires, delay).context("the devices of the delay")
    })?
}

/// A device in the fabric that nothing but the rules sends into.
fn device() -> anyhow::Result<Wire> {
    let tap = Tap::create("delay%d")?;
    let name = tap.name();
    // Otherwise the fabric itself would look for neighbours and routers there.
    sysctl::write_if_present(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    run_in_place("ip", &["link", "set", "dev", name, "txqueuelen", KERNEL_QUEUE, "up"], "")?;
    Ok(Wire { tap, queue: Queue::default() })
}

/// One direction.
struct Wire {
    tap: Tap,
    queue: Queue,
}

/// Frames on their way, each with the time at which it arrives. All wait equally long, so they stay in order.
#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<(Instant, Box<[u8]>)>,
    bytes: usize,
    lost: u64,
}

impl Queue {
    fn push(&mut self, due: Instant, frame: &[u8]) {
        if self.frames.len() >= FRAMES_MAX || self.bytes + frame.len() > BYTES_MAX {
            self.lost += 1;
            return;
        }
        self.bytes += frame.len();
        self.frames.push_back((due, frame.into()));
    }

    fn pop(&mut self, now: Instant) -> Option<Box<[u8]>> {
        let (_, frame) = self.frames.pop_front_if(|(due, _)| *due <= now)?;
        self.bytes -= frame.len();
        Some(frame)
    }

    fn due(&self) -> Option<Instant> {
        self.frames.front().map(|(due, _)| *due)
    }
}

fn relay(mut wires: [Wire; 2], delay: Duration) -> io::Result<()> {
    let mut buffer = Box::new([0; FRAME_MAX]);
    loop {
        for wire in &mut wires {
            while let Some(frame) = wire.queue.pop(Instant::now()) {
                // Lost as on any wire when the kernel has no memory for it.
                let _ = wire.tap.send(&frame);
            }
        }
        let due = wires.iter().filter_map(|w| w.queue.due()).min();
        let wait = due.map(|due| TimeSpec::from_duration(due.saturating_duration_since(Instant::now())));
        let mut fds = wires.each_ref().map(|w| PollFd::new(w.tap.as_fd(), PollFlags::POLLIN));
        match ppoll(&mut fds, wait, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for wire in &mut wires {
            let before = wire.queue.lost;
            for _ in 0..BATCH {
                let Some(frame) = wire.tap.receive(&mut buffer)? else { break };
                wire.queue.push(Instant::now() + delay, frame);
            }
            if before == 0 && wire.queue.lost > 0 {
                tracing::warn!(
                    device = wire.tap.name(),
                    bytes = wire.queue.bytes,
                    frames = wire.queue.frames.len(),
                    "more is on its way than is kept; what is more is lost from now on"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_leave_in_order_when_their_time_has_come() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut queue = Queue::default();
        assert_eq!((queue.pop(start), queue.due()), (None, None));
        queue.push(at(50), &[1; 60]);
        queue.push(at(52), &[2; 1500]);
        assert_eq!((queue.due(), queue.bytes), (Some(at(50)), 1560));
        assert_eq!(queue.pop(at(49)), None);
        assert_eq!(queue.pop(at(51)).as_deref(), Some(&[1; 60][..]));
        assert_eq!(queue.pop(at(51)), None);
        assert_eq!(queue.pop(at(52)).as_deref(), Some(&[2; 1500][..]));
        assert_eq!((queue.bytes, queue.lost), (0, 0));
    }

    #[test]
    fn what_is_too_much_is_lost_and_nothing_else() {
        let now = Instant::now();
        for (size, fit) in [(FRAME_MAX, BYTES_MAX / FRAME_MAX), (60, FRAMES_MAX)] {
            let mut queue = Queue::default();
            let frame = vec![0; size];
            for _ in 0..fit + 3 {
                queue.push(now, &frame);
            }
            assert_eq!((queue.frames.len(), queue.lost), (fit, 3), "{size}");
            queue.pop(now).expect("the first one");
            queue.push(now, &frame);
            assert_eq!((queue.frames.len(), queue.lost), (fit, 3), "{size}");
        }
    }
}
