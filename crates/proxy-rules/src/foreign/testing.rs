//! For tests: dumps of a real kube-proxy, read where they are, and nft in a namespace of its own.

use std::path::PathBuf;

use podway_link::Netns;

/// A dump by its file name, or `None` with a message where the collection is not there.
pub(crate) fn dump(file: &str) -> Option<String> {
    let cases = std::env::var_os("PODWAY_CASES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/cases"),
        PathBuf::from,
    );
    let path = cases.join("foreign-rules").join(file);
    if !path.exists() {
        println!("skipped: {} is not there; set PODWAY_CASES", path.display());
        return None;
    }
    if path.extension().is_some_and(|e| e == "gz") {
        let output = std::process::Command::new("gzip").arg("-dc").arg(&path).output().expect("gzip runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return Some(String::from_utf8(output.stdout).expect("a dump is text"));
    }
    Some(std::fs::read_to_string(path).expect("the dump can be read"))
}

/// A network namespace that goes with the value.
pub(crate) struct Scratch {
    name: String,
    pub(crate) namespace: Netns,
}

impl Scratch {
    /// A new one, or `None` with a message without the right to make one.
    pub(crate) fn new(name: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        // What earlier runs left when they crashed.
        for old in Netns::list_named(&format!("{name}-")).expect("namespaces can be listed") {
            let pid = old.rsplit('-').next().unwrap_or_default();
            if !PathBuf::from("/proc").join(pid).exists() {
                let _ = Netns::delete_named(&old);
            }
        }
        let name = format!("{name}-{}", std::process::id());
        let namespace = Netns::create_named(&name).expect("a network namespace");
        Some(Self { name, namespace })
    }

    pub(crate) fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.namespace.run(f).expect("the namespace can be entered")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = Netns::delete_named(&self.name);
    }
}

/// What `nft -j` prints of a ruleset.
pub(crate) fn as_json(name: &str, ruleset: &str) -> Option<String> {
    let scratch = Scratch::new(name)?;
    scratch.run(|| {
        super::tools::run("nft", &["-f", "-"], ruleset).expect("nft takes its own output");
        Some(super::tools::run("nft", &["-j", "list", "ruleset"], "").expect("nft lists"))
    })
}
