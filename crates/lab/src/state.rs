//! What a lab leaves on disk, so that every command finds it again: `/run/podway/labs/<lab>/`.
//!
//! Files are written whole and renamed into place. They hold the API server's token, so only root reads them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};
use podway_apiserver::BearerToken;
use serde::{Deserialize, Serialize};

use crate::delay::Relay;
use crate::faults::Fault;
use crate::spec::{LabName, LabSpec, labs_dir};

/// The lab as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabFile {
    /// Options.
    pub spec: LabSpec,
    /// Bearer token of the API server. Whoever has it can run commands as root on this machine (through the
    /// command annotation), so it is as secret as a root password.
    pub token: String,
}

/// The supervisor that runs the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisorFile {
    /// Its process.
    pub pid: i32,
    /// When that process started, in clock ticks since boot: process numbers are used again.
    pub start_ticks: u64,
    /// Port of the API server on the machine's 127.0.0.1.
    pub api_port: u16,
}

impl SupervisorFile {
    /// Describes the calling process.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn of_self(api_port: u16) -> io::Result<Self> {
        let pid = std::process::id().cast_signed();
        Ok(Self { pid, start_ticks: start_ticks(pid)?, api_port })
    }

    /// Whether the process still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_ticks(self.pid).is_ok_and(|ticks| ticks == self.start_ticks)
    }
}

/// Field 22 of `/proc/<pid>/stat` (proc(5)). A process that has ended and waits for its parent is not alive.
pub(crate) fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the command in brackets and may hold anything.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    match (fields.first(), fields.get(19).and_then(|t| t.parse().ok())) {
        (Some(&state), Some(ticks)) if state != "Z" && state != "X" => Ok(ticks),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Files of one lab.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// The folder of a lab, which need not exist.
    #[must_use]
    pub fn of(lab: &LabName) -> Self {
        Self(lab.state_dir())
    }

    /// Creates the folder, for root alone.
    ///
    /// # Errors
    /// With the folder and the cause.
    pub fn create(&self) -> anyhow::Result<()> {
        for dir in [self.0.clone(), self.0.join("pods"), self.0.join("nodes")] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(())
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Log of the supervisor.
    #[must_use]
    pub fn supervisor_log(&self) -> PathBuf {
        self.0.join("supervisor.log")
    }

    /// Kubeconfig for people on this machine.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.0.join("kubeconfig")
    }

    /// The lab's description. `None` when there is no such lab.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn lab(&self) -> anyhow::Result<Option<LabFile>> {
        self.read("lab.json")
    }

    /// Writes the lab's description.
    ///
    /// # Errors
    /// With the file and the cause.
    pub fn write_lab(&self, lab: &LabFile) -> anyhow::Result<()> {
        self.write("lab.json", &serde_json::to_vec_pretty(lab)?)
    }

    /// The supervisor, if one has ever been up.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn supervisor(&self) -> anyhow::Result<Option<SupervisorFile>> {
        self.read("supervisor.json")
    }

    /// Writes the supervisor's description.
    ///
    /// # Errors
    /// With the file and the cause.
    pub fn write_supervisor(&self, supervisor: &SupervisorFile) -> anyhow::Result<()> {
        self.write("supervisor.json", &serde_json::to_vec_pretty(supervisor)?)
    }

    /// What is wrong between nodes on purpose.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn faults(&self) -> anyhow::Result<Option<Vec<Fault>>> {
        self.read("faults.json")
    }

    /// Writes what is wrong between nodes on purpose.
    ///
    /// # Errors
    /// With the file and the cause.
    pub fn write_faults(&self, faults: &[Fault]) -> anyhow::Result<()> {
        self.write("faults.json", &serde_json::to_vec_pretty(faults)?)
    }

    /// The processes that delay packets between nodes.
    pub(crate) fn relays(&self) -> anyhow::Result<Option<Vec<Relay>>> {
        self.read("relays.json")
    }

    /// Writes which processes delay packets between nodes.
    pub(crate) fn write_relays(&self, relays: &[Relay]) -> anyhow::Result<()> {
        self.write("relays.json", &serde_json::to_vec_pretty(relays)?)
    }

    /// Writes a file whole, for root alone.
    ///
    /// # Errors
    /// With the file and the cause.
    pub fn write(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        write_file(&self.0.join(name), content)
    }

    fn read<T: for<'de> Deserialize<'de>>(&self, name: &str) -> anyhow::Result<Option<T>> {
        let path = self.0.join(name);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).with_context(|| {
                format!("{} is damaged; remove the lab (podway lab down) and make it again", path.display())
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("read {}", path.display())),
        }
    }
}

/// Writes a file whole and renames it into place, readable for its owner alone.
///
/// # Errors
/// With the file and the cause.
pub fn write_file(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    write_with_mode(path, content, 0o600)
}

/// As [`write_file`], with a mode.
///
/// # Errors
/// With the file and the cause.
pub fn write_with_mode(path: &Path, content: &[u8], mode: u32) -> anyhow::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let write = || -> io::Result<()> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Keeps other `up` and `down` commands of this machine out while it is held.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Waits for the lock. The lock is on the folder of all labs itself, so no file stays behind.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn acquire() -> anyhow::Result<Self> {
        let dir = labs_dir();
        for _ in 0..100 {
            fs::create_dir_all(&dir)
                .with_context(|| format!("create {} (this needs root)", dir.display()))?;
            let file = match File::open(&dir) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e).with_context(|| format!("open {}", dir.display())),
            };
            let file = Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, errno)| errno)
                .with_context(|| format!("lock {}", dir.display()))?;
            // Whoever held the lock may have removed the folder with the last lab in it.
            let (locked, current) = (file.metadata()?, fs::metadata(&dir));
            if current.is_ok_and(|c| c.ino() == locked.ino() && c.dev() == locked.dev()) {
                return Ok(Self { _file: file });
            }
        }
        bail!("{} is removed and created again all the time", dir.display())
    }
}

/// Labs that have a folder, sorted.
///
/// # Errors
/// When the folder of labs cannot be read.
pub fn list() -> anyhow::Result<Vec<LabName>> {
    let dir = labs_dir();
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("read {}", dir.display())),
    };
    let mut names: Vec<LabName> =
        entries.flatten().filter_map(|e| e.file_name().into_string().ok()?.parse().ok()).collect();
    names.sort();
    Ok(names)
}

/// A kubeconfig with one cluster and its token.
///
/// client-go sends no bearer token to a plain HTTP server, so the people's file has the token in the server's path
/// as well.
#[must_use]
pub fn kubeconfig(lab: &LabName, host: &str, token: &str, token_in_path: bool) -> String {
    let path = if token_in_path { BearerToken::new(token).path_prefix() } else { String::new() };
    let config = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": lab, "cluster": {"server": format!("http://{host}{path}")}}],
        "users": [{"name": lab, "user": {"token": token}}],
        "contexts": [{"name": lab, "context": {"cluster": lab, "user": lab}}],
        "current-context": lab,
    });
    // JSON is YAML, and a value made of text only always has a text form.
    format!("{config:#}\n")
}

/// 128 random bits as hexadecimal text.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn new_token() -> anyhow::Result<String> {
    use std::io::Read as _;
    let mut bytes = [0; 16];
    File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).context("read /dev/urandom")?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_number_and_start() {
        let own = SupervisorFile::of_self(1).expect("proc");
        assert!(own.is_alive());
        assert!(!SupervisorFile { start_ticks: own.start_ticks + 1, ..own.clone() }.is_alive());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = child.id().cast_signed();
        let other = SupervisorFile { pid, start_ticks: start_ticks(pid).expect("proc"), api_port: 1 };
        assert!(other.is_alive());
        child.kill().expect("kill");
        // Dead but not yet waited for is dead.
        while start_ticks(pid).is_ok() {
            std::thread::yield_now();
        }
        assert!(!other.is_alive());
        child.wait().expect("wait");
    }

    #[test]
    fn kubeconfigs_carry_the_token_where_clients_send_it_from() {
        let lab: LabName = "lab".parse().expect("name");
        for (in_path, server) in [(true, "http://127.0.0.1:1/token/t0ken"), (false, "http://127.0.0.1:1")] {
            let config: serde_json::Value =
                serde_json::from_str(&kubeconfig(&lab, "127.0.0.1:1", "t0ken", in_path)).expect("JSON");
            assert_eq!(config["clusters"][0]["cluster"]["server"], server);
            assert_eq!(config["users"][0]["user"]["token"], "t0ken");
        }
    }
}
