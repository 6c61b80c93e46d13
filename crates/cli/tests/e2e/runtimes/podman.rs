//! podman, with CNI as its network backend.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use super::{
    PODS, Place, SERVERS, clear, image, need, on_node, reach_host_port, remove_cgroups, traces,
    wait_for_nothing_left,
};
use crate::lab::{Lab, can_run, text};

/// Control groups of the containers.
const CGROUP: &str = "pwt-podman";
/// What podman calls the network namespaces that it makes.
const NETNS: &str = "netns-";

/// podman with storage and state of its own.
struct Podman<'a> {
    lab: &'a Lab,
    place: Place,
}

impl<'a> Podman<'a> {
    fn new(lab: &'a Lab) -> Self {
        // What an earlier run left.
        let directory = Path::new("/var/tmp/pwt-podman");
        if directory.join("containers.conf").exists() {
            remove_all(&mut on_node(lab, "podman"), directory);
        }
        clear(directory);
        remove_cgroups(CGROUP);
        let podman = Self { lab, place: Place::new("podman", lab) };
        let config = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\nlog_driver = \"k8s-file\"\n\
             [network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"{bin}\"]\nnetwork_config_dir = \"{config}\"\n\
             default_network = \"podway\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"runc\"\ntmp_dir = \"{tmp}\"\n",
            bin = podman.place.path("bin"),
            config = podman.place.path("net.d"),
            tmp = podman.place.path("tmp"),
        );
        fs::write(podman.place.path("containers.conf"), config).unwrap();
        let archive = image::build(&podman.place.directory);
        podman.must(&["load", "--quiet", "--input", archive.to_str().unwrap()]);
        podman
    }

    fn run(&self, arguments: &[&str]) -> Output {
        with_place(&mut on_node(self.lab, "podman"), &self.place.directory).args(arguments).output().unwrap()
    }

    fn must(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "podman {arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }
}

fn with_place<'c>(command: &'c mut Command, directory: &Path) -> &'c mut Command {
    command
        .env("CONTAINERS_CONF", directory.join("containers.conf"))
        .args(["--storage-driver", "vfs", "--root"])
        .arg(directory.join("root"))
        .arg("--runroot")
        .arg(directory.join("run"))
}

fn remove_all(podman: &mut Command, directory: &Path) {
    let removed = with_place(podman, directory).args(["rm", "--all", "--force", "--time", "0"]).output();
    println!("{}", text(&removed.unwrap()).trim());
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        remove_all(&mut on_node(self.lab, "podman"), &self.place.directory);
        clear(&self.place.directory);
        remove_cgroups(CGROUP);
    }
}

#[test]
fn a_container_of_podman_is_a_pod_among_others() {
    if !can_run() {
        return;
    }
    need("podman", "podman");
    need("runc", "runc");
    need("busybox", "busybox-static");
    let lab = Lab::of("t_podman", PODS, &["--nodes", "2"]);
    let podman = Podman::new(&lab);
    let before = traces(&lab, NETNS);
    let parent = format!("--cgroup-parent=/{CGROUP}");
    let run = |name: &str, publish: &[&str]| {
        let mut arguments = vec!["run", "--detach", "--name", name, &parent];
        arguments.extend(publish);
        arguments.extend([image::IMAGE, "sh", "-c", SERVERS]);
        podman.run(&arguments)
    };
    let up = run("web", &["--publish", "8088:80", "--publish", "127.0.0.1:8089:80"]);
    assert!(up.status.success(), "{}", text(&up));
    let addresses = podman.must(&["exec", "web", "ip", "-4", "-o", "addr", "show", "eth0"]);
    assert!(addresses.contains("inet 10.244.1.") && addresses.contains("/32"), "{addresses}");
    // Pods of this node, of the other one, and the other node itself.
    for target in [lab.pod_ip("a"), lab.pod_ip("b"), "172.18.1.2".parse().unwrap()] {
        podman.must(&["exec", "web", "ping", "-c", "3", "-W", "2", &target.to_string()]);
    }
    reach_host_port(&lab, 8088);

    let second = run("second", &["--publish", "8088:80"]);
    assert!(text(&second).contains("host port 8088/tcp is taken"), "{}", text(&second));
    podman.must(&["rm", "--force", "--time", "0", "second"]);
    reach_host_port(&lab, 8088);

    // podman's own ways: a restart is a new attachment.
    podman.must(&["restart", "--time", "0", "web"]);
    reach_host_port(&lab, 8088);
    podman.must(&["rm", "--force", "--time", "0", "web"]);
    wait_for_nothing_left(&lab, &before, NETNS);
}
