//! A real kubectl for a server of its own.

use super::Server;
use podway_apiserver::{BearerToken, StoreConfig};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kubectl with a kubeconfig and caches of its own, and the server that it asks.
pub struct Kubectl {
    pub server: Server,
    binary: PathBuf,
    home: tempfile::TempDir,
}

impl Kubectl {
    /// With the first kubectl that is found, or `None` with a message.
    pub fn start() -> Option<Self> {
        found().first().map(|(binary, _)| Self::of(binary))
    }

    pub fn of(binary: &Path) -> Self {
        let token = BearerToken::new("0123456789abcdef");
        let server = Server::start(StoreConfig::default(), Some(token.clone()));
        let home = tempfile::tempdir().unwrap();
        let url = format!("http://{}{}", server.address, token.path_prefix());
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": url}}], "users": [{"name": "lab", "user": {}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        std::fs::write(home.path().join("config"), config.to_string()).unwrap();
        Self { server, binary: binary.to_owned(), home }
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .arg("--request-timeout=20s")
            .env("HOME", self.home.path())
            .env("KUBECONFIG", self.home.path().join("config"))
            .env("TERM", "dumb");
        command
    }
}

/// Those that PODWAY_KUBECTL lists (paths with `:` between), otherwise the one on PATH; with their minor versions. One
/// that is listed has to run.
pub fn found() -> Vec<(PathBuf, u32)> {
    let listed = std::env::var_os("PODWAY_KUBECTL");
    let binaries: Vec<PathBuf> = match &listed {
        Some(list) => std::env::split_paths(list).collect(),
        None => vec![PathBuf::from("kubectl")],
    };
    let with_version = |binary: PathBuf| {
        let minor = minor_version(&binary);
        if minor.is_none() {
            println!("skipped: {} is no kubectl that runs here", binary.display());
            assert!(listed.is_none(), "{} does not run", binary.display());
        }
        Some((binary, minor?))
    };
    binaries.into_iter().filter_map(with_version).collect()
}

fn minor_version(binary: &Path) -> Option<u32> {
    let output = Command::new(binary).args(["version", "--client", "-o", "json"]).output().ok()?;
    let version: Value = serde_json::from_slice(&output.stdout).ok()?;
    let minor = version["clientVersion"]["minor"].as_str()?;
    minor.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()
}
