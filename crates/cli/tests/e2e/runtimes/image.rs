//! A container image of busybox alone, built here: nothing is pulled.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;

use crate::lab::text;

/// Name of the image.
pub(super) const IMAGE: &str = "localhost/pwt-busybox:1";

/// Writes the image as an archive that podman and containerd load, and returns its path.
pub(super) fn build(directory: &Path) -> PathBuf {
    let root = directory.join("rootfs");
    for folder in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).exists());
    fs::copy(busybox.unwrap(), root.join("bin/busybox")).unwrap();
    for tool in ["cat", "dd", "echo", "ip", "nc", "ping", "sh", "sleep", "wc"] {
        symlink("busybox", root.join("bin").join(tool)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
    let layer = directory.join("layer.tar");
    tar(&["--numeric-owner", "--owner=0", "--group=0", "-cf"], &layer, &root, &["."]);
    let sum = Command::new("sha256sum").arg(&layer).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let digest = format!("sha256:{}", sum.split(' ').next().unwrap());
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sleep", "3600"]},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    });
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let manifest = json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
    fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
    let archive = directory.join("image.tar");
    tar(&["-cf"], &archive, directory, &["manifest.json", "config.json", "layer.tar"]);
    archive
}

fn tar(options: &[&str], archive: &Path, from: &Path, what: &[&str]) {
    let output =
        Command::new("tar").args(options).arg(archive).arg("-C").arg(from).args(what).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}
