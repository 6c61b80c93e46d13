//! Real projects' manifests, read in place: every pod up, everything reachable.

use std::path::{Path, PathBuf};

use crate::lab::{Lab, can_run, text};

/// Where the manifests are; none when they are not on this machine.
fn manifests() -> Option<PathBuf> {
    let dir = std::env::var_os("PODWAY_MANIFESTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/manifests"),
        PathBuf::from,
    );
    if !dir.is_dir() {
        println!("skipped: no manifests at {} (set PODWAY_MANIFESTS)", dir.display());
        return None;
    }
    Some(dir)
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples")
}

/// Brings a project up and checks it; returns the number of ready pods.
fn up_and_check(name: &'static str, paths: &[PathBuf], options: &[&str]) -> usize {
    let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let lab = Lab::up(name, &paths, options);
    let check = lab.run(&["check"]);
    assert!(check.status.success(), "{}", text(&check));
    let pods = lab.get(&["pods", "-A"]);
    let items = pods["items"].as_array().unwrap();
    for pod in items {
        let ready = pod["status"]["conditions"]
            .as_array()
            .is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"));
        assert!(ready, "{}: {}", pod["metadata"]["name"], pod["status"]);
    }
    items.len()
}

#[test]
fn the_example() {
    if can_run() {
        for (name, options) in [
            ("t_example4", &["--family", "ipv4"] as &[&str]),
            ("t_example6", &["--family", "ipv6"]),
            ("t_exampled", &["--family", "dual", "--mode", "direct"]),
        ] {
            assert!(up_and_check(name, &[example()], options) >= 3);
        }
    }
}

macro_rules! projects {
    ($($test:ident: $folder:literal, $lab:literal, [$($file:literal),*], $least:literal;)*) => { $(
        #[test]
        fn $test() {
            let Some(dir) = manifests().filter(|_| can_run()) else { return };
            let files: &[&str] = &[$($file),*];
            let paths: Vec<PathBuf> = if files.is_empty() {
                vec![dir.join($folder)]
            } else {
                files.iter().map(|f| dir.join($folder).join(f)).collect()
            };
            let pods = up_and_check($lab, &paths, &["--family", "dual"]);
            assert!(pods >= $least, "{pods} pods");
        }
    )* };
}

projects! {
    microservices_demo: "microservices-demo", "t_micro", [], 12;
    kube_prometheus: "kube-prometheus", "t_kubeprom", [], 5;
    guestbook: "guestbook", "t_guest", ["guestbook-all-in-one.yaml"], 3;
    bookinfo: "bookinfo", "t_book", ["bookinfo__platform__kube__bookinfo.yaml"], 6;
    argo_cd: "argo-cd", "t_argo", ["install.yaml"], 6;
}
