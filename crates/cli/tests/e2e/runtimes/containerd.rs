//! containerd, asked by CRI as a kubelet does it.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::cri::{Cri, Port};
use super::{
    PODS, Place, SERVERS, clear, download, image, namespace, need, on_node, reach_host_port, remove_cgroups,
    traces, upload, wait_for, wait_for_nothing_left,
};
use crate::lab::{Lab, can_run, text};

const DIRECTORY: &str = "/var/tmp/pwt-containerd";
/// What containerd calls the network namespaces that it makes.
const NETNS: &str = "cni-";
/// Where Debian has it.
const LOOPBACK: &str = "/usr/lib/cni/loopback";
/// Bits a second.
const LIMIT: f64 = 10e6;

/// The daemon with storage and state of its own.
struct Containerd {
    place: Place,
    daemon: Child,
    cri: Cri,
}

impl Containerd {
    fn new(lab: &Lab) -> Self {
        remove_leftovers();
        let place = Place::new("containerd", lab);
        // containerd has the loopback of a pod set up by the plugin of this name.
        std::os::unix::fs::symlink(LOOPBACK, place.path("bin/loopback")).unwrap();
        let config = format!(
            "version = 2\nroot = \"{root}\"\nstate = \"{state}\"\n\
             [grpc]\naddress = \"{socket}\"\n\
             [ttrpc]\naddress = \"{socket}.ttrpc\"\n\
             [debug]\nlevel = \"warn\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{opt}\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\n\
             sandbox_image = \"{image}\"\ndisable_cgroup = true\ndisable_apparmor = true\n\
             restrict_oom_score_adj = true\ndisable_tcp_service = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"{bin}\"\nconf_dir = \"{conf}\"\n",
            root = place.path("root"),
            state = place.path("state"),
            socket = place.path("containerd.sock"),
            opt = place.path("opt"),
            bin = place.path("bin"),
            conf = place.path("net.d"),
            image = image::IMAGE,
        );
        fs::write(place.path("config.toml"), config).unwrap();
        let log = File::create(place.path("log")).unwrap();
        let daemon = on_node(lab, "containerd")
            .args(["--config", &place.path("config.toml")])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let cri = Cri::new(Path::new(&place.path("containerd.sock")));
        let containerd = Self { place, daemon, cri };
        wait_for("containerd", Duration::from_secs(30), || containerd.cri.is_up());
        let archive = image::build(&containerd.place.directory);
        let imported = Command::new("ctr")
            .args(["--address", &containerd.place.path("containerd.sock"), "--namespace", "k8s.io"])
            .args(["images", "import", "--snapshotter", "native"])
            .arg(&archive)
            .output()
            .unwrap();
        assert!(imported.status.success(), "{}", text(&imported));
        // CRI hears of it by an event.
        std::thread::sleep(Duration::from_millis(500));
        containerd
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!(
                "--- containerd's log\n{}",
                fs::read_to_string(self.place.path("log")).unwrap_or_default()
            );
        }
        for sandbox in self.cri.sandboxes() {
            if let Err(error) = self.cri.remove_sandbox(&sandbox) {
                println!("{error}");
            }
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        remove_leftovers();
    }
}

/// Ends what an earlier run left and removes its folder: the daemon and its shims, which have the folder in their
/// command lines, and the containers, which are in the network namespaces that their configurations name.
fn remove_leftovers() {
    let (mut namespaces, mut containers) = (Vec::new(), Vec::new());
    configurations(Path::new(DIRECTORY), &mut namespaces, &mut containers);
    namespaces.sort();
    namespaces.dedup();
    let inodes: Vec<u64> =
        namespaces.iter().filter_map(|n| Some(fs::metadata(format!("/run/netns/{n}")).ok()?.ino())).collect();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let ours = String::from_utf8_lossy(&command).contains(&format!("{DIRECTORY}/"));
        let inside = fs::metadata(process.path().join("ns/net")).is_ok_and(|m| inodes.contains(&m.ino()));
        if ours || inside {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
    for name in namespaces {
        let _ = podway_link::Netns::delete_named(&name);
    }
    // runc calls a container's group by the container's name.
    containers.iter().for_each(|name| remove_cgroups(name));
    clear(Path::new(DIRECTORY));
}

/// The containers that have a configuration below a folder, and the network namespaces that these name.
fn configurations(directory: &Path, namespaces: &mut Vec<String>, containers: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            // The containers' own files.
            if !path.ends_with("rootfs") && !path.ends_with("root") {
                configurations(&path, namespaces, containers);
            }
        } else if path.file_name().is_some_and(|n| n == "config.json") {
            // No folder of our own is so long.
            let name = directory.file_name().unwrap_or_default().to_string_lossy();
            containers.extend((name.len() == 64).then(|| name.into_owned()));
            let text = fs::read_to_string(&path).unwrap_or_default();
            namespaces.extend(text.split("/run/netns/").skip(1).filter_map(|rest| {
                let name = rest.split('"').next()?;
                name.starts_with(NETNS).then(|| name.to_owned())
            }));
        }
    }
}

#[test]
fn a_pod_of_containerd_is_a_pod_among_others() {
    if !can_run() {
        return;
    }
    need("containerd", "containerd");
    need("runc", "runc");
    need("busybox", "busybox-static");
    need(LOOPBACK, "containernetworking-plugins");
    let lab = Lab::of("t_containerd", PODS, &["--nodes", "2"]);
    let containerd = Containerd::new(&lab);
    let cri = &containerd.cri;
    let before = traces(&lab, NETNS);
    let ports = [Port { host: 8088, container: 80 }, Port { host: 8089, container: 82 }];
    // The first has no limits.
    let free = cri.run_sandbox("free", &[Port { host: 8090, container: 82 }], &[]).unwrap();
    cri.run_container(&free, SERVERS);
    let limits = [("kubernetes.io/ingress-bandwidth", "10M"), ("kubernetes.io/egress-bandwidth", "10M")];
    let web = cri.run_sandbox("web", &ports, &limits).unwrap();
    let main = cri.run_container(&web, SERVERS);
    let (code, text) = cri.exec(&main, &["ip", "-4", "-o", "addr", "show", "eth0"]);
    assert!(code == 0 && text.contains("/32"), "{text}");
    let address = text.split_whitespace().nth(3).unwrap().split('/').next().unwrap().parse().unwrap();
    for target in [lab.pod_ip("a"), lab.pod_ip("b"), "172.18.1.2".parse().unwrap()] {
        let (code, text) = cri.exec(&main, &["ping", "-c", "3", "-W", "2", &target.to_string()]);
        assert_eq!(code, 0, "{target}: {text}");
    }
    reach_host_port(&lab, 8088);

    let taken = cri.run_sandbox("second", &ports[..1], &[]).err().unwrap();
    assert!(taken.contains("host port 8088/tcp is taken: pod default/web"), "{taken}");

    // Limits, measured over whatever leads into the pod: a pod of its node, one of another node, and a host port.
    let (near, far, outside) =
        (namespace(&lab, "pod-default-a"), namespace(&lab, "pod-default-b"), namespace(&lab, "outside"));
    let (sends, counts) = (SocketAddr::new(address, 81), SocketAddr::new(address, 82));
    let node = |port| SocketAddr::new("172.18.1.1".parse().unwrap(), port);
    for (what, rate) in [
        ("from the pod to one of its node", download(&near, sends)),
        ("from the pod to one of the other node", download(&far, sends)),
        ("to the pod from one of its node", upload(&near, counts)),
        ("to the pod from one of the other node", upload(&far, counts)),
        ("to the pod from outside, by its host port", upload(&outside, node(8089))),
    ] {
        println!("{what}: {:.2} Mbit/s", rate / 1e6);
        // Headers take up to 7%, and a burst of 64 KiB is free.
        assert!(
            (0.8 * LIMIT..1.1 * LIMIT).contains(&rate),
            "{what}: {rate} bits a second with a limit of {LIMIT}"
        );
    }
    let unlimited = upload(&outside, node(8090));
    println!("to a pod without limits: {:.0} Mbit/s", unlimited / 1e6);
    assert!(unlimited > 5.0 * LIMIT, "{unlimited}");

    for sandbox in [&web, &free] {
        cri.remove_sandbox(&sandbox.0).unwrap();
    }
    wait_for_nothing_left(&lab, &before, NETNS);
}
