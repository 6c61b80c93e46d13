//! Embeds the kernel object when it has been built, so that the crate checks without the BPF toolchain.
//!
//! `cargo xtask bpf` leaves the object at `target/bpf/podway-bpf.o`; `PODWAY_BPF_OBJECT` names another one.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(kernel_object)");
    println!("cargo::rerun-if-env-changed=PODWAY_BPF_OBJECT");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let object = env::var_os("PODWAY_BPF_OBJECT")
        .map_or_else(|| manifest.join("../../target/bpf/podway-bpf.o"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    if object.is_file() {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("podway-bpf.o");
        fs::copy(&object, out).expect("the kernel object can be copied into OUT_DIR");
        println!("cargo::rustc-cfg=kernel_object");
    }
}
