//! Entering a pod or a node and becoming a program there.
//!
//! Runs in a process of its own with one thread: it joins the control group and the network namespace, takes
//! private mount and UTS namespaces in which the pod's `/etc/hosts`, `/etc/resolv.conf` and host name are in
//! place, and executes the program.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::cgroup::Cgroup;

/// What to enter and what to run. Parts that are absent are left as the caller has them.
#[derive(Debug, Clone, Default)]
pub struct PodExec {
    /// Control group to join.
    pub cgroup: Option<Cgroup>,
    /// File of the network namespace.
    pub netns: Option<PathBuf>,
    /// Host name.
    pub hostname: Option<String>,
    /// File to see as `/etc/hosts`.
    pub hosts: Option<PathBuf>,
    /// File to see as `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
    /// See the `/sys` of the network namespace, where `/sys/class/net` has its links. It hides the machine's BPF and
    /// cgroup file systems, so pods have it and nodes do not.
    pub own_sysfs: bool,
    /// Environment variables to set, besides those of the caller.
    pub env: Vec<(String, OsString)>,
    /// What the program is told to be called; its path when absent.
    pub arg0: Option<OsString>,
    /// The program and its arguments.
    pub command: Vec<OsString>,
}

impl PodExec {
    /// Becomes the program. Returns only when that failed.
    #[must_use]
    pub fn exec(self) -> anyhow::Error {
        match self.enter() {
            Ok(mut command) => {
                let error = command.exec();
                anyhow::Error::new(error).context(format!("run {}", command.get_program().to_string_lossy()))
            }
            Err(e) => e,
        }
    }

    fn enter(self) -> anyhow::Result<Command> {
        let Some((program, arguments)) = self.command.split_first() else {
            bail!("no command to run; put it after --");
        };
        if let Some(cgroup) = &self.cgroup {
            cgroup.join()?;
        }
        if let Some(path) = &self.netns {
            let file =
                File::open(path).with_context(|| format!("open network namespace {}", path.display()))?;
            setns(&file, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("enter network namespace {}", path.display()))?;
        }
        if self.own_sysfs || self.hostname.is_some() || self.hosts.is_some() || self.resolv_conf.is_some() {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)
                .context("unshare mount and UTS namespaces")?;
            // Slave, not private: a network namespace that is deleted later must not live on in here.
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
                .context("make mounts private")?;
        }
        if let Some(hostname) = &self.hostname {
            nix::unistd::sethostname(hostname).with_context(|| format!("set host name {hostname}"))?;
        }
        for (source, target) in [(&self.hosts, "/etc/hosts"), (&self.resolv_conf, "/etc/resolv.conf")] {
            if let Some(source) = source {
                cover(source, Path::new(target))?;
            }
        }
        if self.own_sysfs {
            // sysfs shows the namespace of whoever mounts it.
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("sysfs"), "/sys", Some("sysfs"), flags, None::<&str>).context("mount /sys")?;
        }
        let mut command = Command::new(program);
        command.args(arguments).envs(self.env);
        if let Some(name) = self.arg0 {
            command.arg0(name);
        }
        Ok(command)
    }
}

/// Mounts `source` over `target`. Where `target` does not exist there is nothing to cover, and a program that
/// does not find it behaves as on any such machine.
fn cover(source: &Path, target: &Path) -> anyhow::Result<()> {
    // A mount follows the link that /etc/resolv.conf often is; a dangling one cannot be mounted over.
    let target = match fs::canonicalize(target) {
        Ok(path) => path,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            tracing::warn!(file = %target.display(), "not there on this machine, so the pod has none either");
            return Ok(());
        }
        Err(e) => return Err(e).with_context(|| format!("find {}", target.display())),
    };
    mount(Some(source), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mount {} over {}", source.display(), target.display()))
}
