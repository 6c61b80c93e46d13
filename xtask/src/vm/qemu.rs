//! The machine itself: started, listened to, and stopped when it takes too long.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::protocol::Run;

/// The emulator.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// The machine's memory: maps of several nodes at once, preallocated, and the root filesystem.
const MEMORY_MIB: &str = "4096";

/// How the machine's processors work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    /// Emulated in software.
    Tcg,
}

/// What came of a machine.
pub(super) struct Outcome {
    pub(super) run: Run,
    pub(super) accelerator: Accelerator,
    /// From the emulator's start to the first process.
    pub(super) boot: Option<Duration>,
    /// From the emulator's start to its end.
    pub(super) total: Duration,
    /// Why the machine was stopped, or ended early.
    pub(super) cut: Option<String>,
}

/// A machine that has not said a word after this long does not boot.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// The same with the processor's own virtualisation, which takes about a second where it works.
const BOOT_LIMIT_KVM: Duration = Duration::from_secs(8);
const TOTAL_LIMIT: Duration = Duration::from_secs(1500);

/// Boots a kernel with this first root and listens until the end. Files of the run go to `directory`.
///
/// `/dev/kvm` may be there without working, as on machines that are virtual themselves: what counts is whether
/// the machine boots. When it does not, this and later ones are emulated.
pub(super) fn run(
    accelerator: &mut Accelerator,
    kernel: &Path,
    root: &Path,
    directory: &Path,
) -> Result<Outcome> {
    let outcome = start(*accelerator, kernel, root, directory)?;
    if *accelerator == Accelerator::Tcg || outcome.boot.is_some() {
        return Ok(outcome);
    }
    println!("   /dev/kvm is there, but nothing boots with it; the processors are emulated");
    *accelerator = Accelerator::Tcg;
    start(*accelerator, kernel, root, directory)
}

fn start(accelerator: Accelerator, kernel: &Path, root: &Path, directory: &Path) -> Result<Outcome> {
    let kernel_log = directory.join("kernel.log");
    let console = directory.join("console.log");
    let mut command = Command::new(QEMU);
    command
        .args(["-accel", accelerator.name(), "-cpu", "max", "-smp", "2", "-m", MEMORY_MIB])
        .args(["-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(root)
        // A panic ends the machine at once.
        .args(["-append", "console=ttyS0 loglevel=5 panic=-1 mitigations=off random.trust_cpu=on"])
        .arg("-serial")
        .arg(format!("file:{}", kernel_log.display()))
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(directory.join("qemu.log")).context("cannot write qemu.log")?);
    let started = Instant::now();
    let mut machine = Machine(command.spawn().with_context(|| format!("cannot run {QEMU}"))?);
    let lines = machine.lines()?;
    let mut console =
        File::create(&console).with_context(|| format!("cannot write {}", console.display()))?;
    let mut run = Run::default();
    let (mut boot, mut cut) = (None, None);
    let boot_limit = if accelerator == Accelerator::Kvm { BOOT_LIMIT_KVM } else { BOOT_LIMIT };
    loop {
        let limit = if boot.is_some() { TOTAL_LIMIT } else { boot_limit };
        match lines.recv_timeout(limit.saturating_sub(started.elapsed())) {
            Ok(line) => {
                console.write_all(line.as_bytes())?;
                run.line(&line)?;
                if run.release.is_some() {
                    boot.get_or_insert_with(|| started.elapsed());
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                cut = Some(format!("stopped after {} s", limit.as_secs()));
                break;
            }
        }
    }
    // After its last word the machine closes its console by going away, or it was too slow.
    if cut.is_some() {
        machine.kill();
    }
    let status = machine.0.wait().context("cannot wait for the emulator")?;
    if cut.is_none() && !run.done {
        let said = |file: &str| fs::read(directory.join(file)).unwrap_or_default();
        let text = [said("qemu.log"), said("kernel.log")].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        // A panic says why in its first lines; without one the end is what there is.
        let from = lines
            .iter()
            .position(|l| l.contains("Kernel panic") || l.contains("BUG: ") || l.contains("Oops: "))
            .unwrap_or(lines.len().saturating_sub(10));
        let last: Vec<&str> = lines.into_iter().skip(from).take(10).collect();
        cut = Some(format!("ended early ({status}):\n{}", last.join("\n")));
    }
    Ok(Outcome { run, accelerator, boot, total: started.elapsed(), cut })
}

impl Accelerator {
    /// The fastest that this machine may have.
    pub(super) fn best() -> Self {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        if kvm.is_ok() { Self::Kvm } else { Self::Tcg }
    }

    /// As the emulator's option calls it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A running emulator, which does not outlive us.
struct Machine(Child);

impl Machine {
    /// Lines of its console, with their ends, as they come; the channel closes with the machine.
    fn lines(&mut self) -> Result<mpsc::Receiver<String>> {
        let console = self.0.stdout.take().context("the emulator has no console")?;
        let (sender, receiver) = mpsc::sync_channel(1024);
        std::thread::spawn(move || {
            let mut console = BufReader::new(console);
            let mut line = Vec::new();
            while console.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
                line.clear();
            }
        });
        Ok(receiver)
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        let _ = self.0.wait();
    }
}

/// Makes sure that the emulator is there: installs it as root, or says what to install.
pub(super) fn ensure() -> Result<()> {
    const PACKAGE: &str = "qemu-system-x86";
    let there = || Command::new(QEMU).arg("-version").output().is_ok_and(|o| o.status.success());
    if there() {
        return Ok(());
    }
    let command = format!("sudo apt-get install --no-install-recommends {PACKAGE}");
    let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    if !is_root {
        bail!("{QEMU} is not installed; run `{command}`");
    }
    let status = Command::new(crate::root().join("scripts/setup")).arg(PACKAGE).status();
    if !status.context("cannot run scripts/setup")?.success() || !there() {
        bail!("{QEMU} cannot be installed; see what `{command}` says");
    }
    Ok(())
}
