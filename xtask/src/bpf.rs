//! Builds the kernel object with whichever toolchain is there.
//!
//! The target `bpfel-unknown-none` has no prebuilt core library, so the build needs a compiler that accepts
//! `-Zbuild-std` and the library's source of the same version, and `bpf-linker`. A rustup nightly with
//! `rust-src` has both; so have Debian's `rustc-web` and `rust-web-src`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{budget, root};

/// Where the object goes; `crates/bpf-host/build.rs` looks for it there.
pub(crate) fn object_path() -> PathBuf {
    root().join("target/bpf/podway-bpf.o")
}

pub(crate) fn build() -> Result<()> {
    let toolchain = Toolchain::find()?;
    let target_dir = root().join("target/bpf");
    println!("building the kernel object with {}", toolchain.name);
    let mut command = Command::new(&toolchain.cargo);
    command
        .args(&toolchain.arguments)
        .args(["build", "--release", "--locked", "-Zbuild-std=core", "--target", "bpfel-unknown-none"])
        .current_dir(root().join("crates/bpf"))
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("PATH", search_path())
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("RUSTC")
        .env_remove("RUSTFLAGS");
    for (key, value) in &toolchain.environment {
        command.env(key, value);
    }
    let status = command.status().with_context(|| format!("cannot run {}", toolchain.cargo.display()))?;
    if !status.success() {
        bail!("building the kernel object failed");
    }
    let built = target_dir.join("bpfel-unknown-none/release/podway-bpf");
    let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    budget::check_object(&bytes)?;
    let object = object_path();
    // An unchanged object keeps its time, so that nothing is built again for it.
    if fs::read(&object).ok().as_deref() != Some(&bytes) {
        fs::write(&object, &bytes).with_context(|| format!("cannot write {}", object.display()))?;
    }
    println!("{} ({} bytes)", object.display(), bytes.len());
    Ok(())
}

struct Toolchain {
    name: String,
    cargo: PathBuf,
    arguments: Vec<&'static str>,
    environment: Vec<(&'static str, String)>,
}

impl Toolchain {
    fn find() -> Result<Self> {
        if !is_on_path("bpf-linker") {
            bail!(
                "bpf-linker is missing. On Debian 12: `sudo make setup`. Elsewhere: `cargo install bpf-linker` \
                 (see https://github.com/aya-rs/bpf-linker)"
            );
        }
        Self::nightly().or_else(Self::debian).context(
            "no toolchain can build for the kernel: neither a rustup nightly with rust-src (`rustup toolchain \
             install nightly --component rust-src`) nor Debian's rustc-web, cargo-web and rust-web-src (`sudo make \
             setup`) is installed",
        )
    }

    /// A rustup nightly, when it has the library's source.
    fn nightly() -> Option<Self> {
        let output = Command::new("rustc")
            .args(["+nightly", "--print", "sysroot"])
            // Only asked for: rustup must not install one for the question.
            .env("RUSTUP_AUTO_INSTALL", "0")
            .env_remove("RUSTUP_TOOLCHAIN")
            .output()
            .ok()
            .filter(|o| o.status.success())?;
        let sysroot = String::from_utf8(output.stdout).ok()?;
        has_source(Path::new(sysroot.trim())).then(|| Self {
            name: "the rustup nightly".to_owned(),
            cargo: PathBuf::from("cargo"),
            arguments: vec!["+nightly"],
            environment: Vec::new(),
        })
    }

    /// Debian's rustc-web; it is a stable release, and takes unstable options when told to.
    fn debian() -> Option<Self> {
        let rustc = "/usr/bin/rustc";
        let output =
            Command::new(rustc).args(["--print", "sysroot"]).output().ok().filter(|o| o.status.success())?;
        let sysroot = String::from_utf8(output.stdout).ok()?;
        let cargo = PathBuf::from("/usr/bin/cargo");
        (has_source(Path::new(sysroot.trim())) && cargo.exists()).then(|| Self {
            name: "Debian's rustc".to_owned(),
            cargo,
            arguments: Vec::new(),
            environment: vec![("RUSTC", rustc.to_owned()), ("RUSTC_BOOTSTRAP", "1".to_owned())],
        })
    }
}

fn has_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
}

/// The caller's path with the places where `cargo install` and Debian's LLVM put their programs.
fn search_path() -> std::ffi::OsString {
    let mut paths: Vec<PathBuf> =
        env::var_os("PATH").map(|p| env::split_paths(&p).collect()).unwrap_or_default();
    if let Some(home) = env::var_os("CARGO_HOME").map(PathBuf::from) {
        paths.push(home.join("bin"));
    } else if let Some(home) = env::var_os("HOME") {
        paths.push(Path::new(&home).join(".cargo/bin"));
    }
    env::join_paths(paths).unwrap_or_default()
}

fn is_on_path(program: &str) -> bool {
    env::split_paths(&search_path()).any(|dir| dir.join(program).is_file())
}
