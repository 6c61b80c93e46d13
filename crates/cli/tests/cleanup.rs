//! `podway cleanup --of kube-proxy` as a user runs it, in a network namespace of its own.
//!
//! Needs root and nft; without root the tests say so and pass.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it skips"
)]

use std::process::{Command, Output};

use podway_link::Netns;

struct Scratch(String);

impl Scratch {
    fn new() -> Self {
        let name = format!("pwt-cli-cleanup-{}", std::process::id());
        Netns::delete_named(&name).unwrap();
        Netns::create_named(&name).unwrap();
        Self(name)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let namespace = Netns::open_named(&self.0).unwrap();
        namespace.run(|| Command::new(program).args(arguments).output()).unwrap().unwrap()
    }

    fn podway(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = self.run(env!("CARGO_BIN_EXE_podway"), arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    fn nft(&self, arguments: &[&str]) -> String {
        let output = self.run("nft", arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = Netns::delete_named(&self.0);
    }
}

#[test]
fn kube_proxys_table_goes_and_others_stay() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let scratch = Scratch::new();
    scratch.nft(&["add", "table", "ip", "kube-proxy"]);
    scratch.nft(&["add", "table", "inet", "somebody"]);
    let before = scratch.nft(&["list", "tables"]);

    let dry = scratch.podway(&["cleanup", "--of", "kube-proxy", "--dry-run"]);
    assert_eq!(dry, (Some(0), "would remove nftables table ip kube-proxy\n".into(), String::new()));
    assert_eq!(scratch.nft(&["list", "tables"]), before);
    let done = scratch.podway(&["cleanup", "--of", "kube-proxy"]);
    assert_eq!(done, (Some(0), "removed nftables table ip kube-proxy\n".into(), String::new()));
    assert_eq!(scratch.nft(&["list", "tables"]).trim(), "table inet somebody");
    let again = scratch.podway(&["cleanup", "--of", "kube-proxy"]);
    assert_eq!(again, (Some(0), "nothing of kube-proxy was there\n".into(), String::new()));
}

#[test]
fn wrong_options_are_refused_by_name() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_podway")).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = run(&["cleanup", "--of", "kube-router"]);
    assert!(code == Some(2) && said.contains("kube-router") && said.contains("kube-proxy"), "{said}");
    let (code, said) = run(&["cleanup", "--dry-run"]);
    assert!(code == Some(2) && said.contains("--of"), "{said}");
}
