//! `podway bench` as a user runs it: to its end, and interrupted; nothing is left of it.
//!
//! Needs root, the kernel object and iproute2; without root the tests say so and pass.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it skips"
)]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

/// Benches refuse to run beside each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_podway"));
    command.arg("bench").args(arguments);
    command
}

fn is_root() -> bool {
    if !geteuid().is_root() {
        println!("skipped: needs root");
    }
    geteuid().is_root()
}

fn nothing_is_left(lab: &str) {
    let names: Vec<String> = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.starts_with("podway-bench-") || n.starts_with(&format!("podway-{lab}-")))
        .collect();
    assert_eq!(names, Vec::<String>::new());
    for dir in ["/run/podway/labs", "/run/podway", "/sys/fs/bpf/podway"] {
        assert!(!Path::new(dir).join(lab).exists(), "{dir}/{lab}");
    }
}

#[test]
fn bad_options_are_refused_by_name_before_anything_is_made() {
    if !is_root() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (arguments, part) in [
        (&["net", "--pairs", "14"][..], "--pairs: 14 is not 15 to"),
        (&["net", "--milliseconds", "20000"], "--milliseconds: 20000 is not"),
        (&["net", "--services", "60000"], "--services: 60000 is more than"),
        (&["net", "--baseline", "/nonexistent.json"], "--baseline /nonexistent.json"),
        (&["flows", "--rate", "10"], "--rate: 10 is not 1000 to"),
        (&["flows", "--milliseconds", "5"], "--milliseconds: 5 is not 100 to"),
        (&["policy", "--runs", "0"], "--runs: 0 is not 1 to"),
        (&["cni", "--operations", "0"], "--operations: 0 is not 1 to"),
        (&["cni", "--concurrent", "1000"], "--concurrent: 1000 is not 1 to"),
    ] {
        let output = bench(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(part), "{arguments:?}: {said}");
        assert!(!said.contains("making"), "{arguments:?}: {said}");
    }
}

#[test]
fn an_interrupted_bench_leaves_nothing_and_a_second_one_is_refused() {
    if !is_root() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut child = bench(&["net"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let begun: Vec<String> = lines.by_ref().take(2).collect();
    assert!(begun.get(1).is_some_and(|l| l.starts_with("two nodes, stream")), "{begun:?}");

    let second = bench(&["cni"]).output().unwrap();
    assert!(String::from_utf8_lossy(&second.stderr).contains("another podway bench runs"), "{second:?}");

    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let rest: Vec<String> = lines.collect();
    assert!(!child.wait().unwrap().success());
    assert!(rest.iter().any(|l| l.contains("interrupted")), "{rest:?}");
    nothing_is_left("bench_net");
}

#[test]
fn attachments_are_measured_to_the_end() {
    if !is_root() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let mut command = bench(&["cni", "--operations", "2", "--concurrent", "4", "-o", "json", "--save"]);
    let output = command.arg(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let comparisons = report["comparisons"].as_array().unwrap();
    if let Some(skipped) = report["skipped"].as_array().unwrap().first() {
        println!("skipped: {skipped}");
        assert!(comparisons.is_empty());
    } else {
        assert_eq!(comparisons.len(), 3);
        for comparison in comparisons {
            for side in ["ours", "peer"] {
                let values = comparison["values"][side].as_array().unwrap();
                assert_eq!(values.len(), 15);
                assert!(values.iter().all(|v| v.as_f64().unwrap() > 0.0), "{comparison}");
            }
        }
    }
    let saved = std::fs::read(dir.path().join("bench-cni.json")).unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&saved).unwrap(), report);
    assert!(std::fs::read_to_string(dir.path().join("bench-cni.svg")).unwrap().starts_with("<svg"));
    nothing_is_left("bench_cni");
}
