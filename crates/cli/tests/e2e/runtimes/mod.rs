//! Containers of real runtimes, from Debian's packages, on a node of a lab: podman by its CNI backend, and containerd
//! by CRI.
//!
//! The runtimes run inside the network namespace of the lab's first node, with folders of their own under
//! `/var/tmp/pwt-…`, which the next run clears when this one is killed. Images are built here.

mod containerd;
mod cri;
mod image;
mod podman;

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use podway_link::Netns;
use serde_json::json;

use crate::lab::{Lab, podway, wait_for};

/// What the container serves: a greeting on port 80, three megabytes to take on 81, and on 82 it counts what comes.
const SERVERS: &str = "nc -ll -p 80 -e echo hello & \
    nc -ll -p 81 -e dd if=/dev/zero bs=64k count=48 & \
    nc -ll -p 82 -e wc -c & \
    sleep 3600";
/// Bytes of the 48 blocks.
const BLOCKS: usize = 48 << 16;
const WAIT: Duration = Duration::from_secs(20);

/// Panics with the name of the package when a program is missing.
fn need(program: &str, package: &str) {
    let found =
        Command::new("sh").args(["-c", &format!("command -v {program}")]).stdout(Stdio::null()).status();
    assert!(
        found.unwrap().success(),
        "{program} is not installed: sudo make setup, or apt-get install {package}"
    );
}

/// Folders of one runtime, with the plugin and its configuration in them.
struct Place {
    directory: PathBuf,
}

impl Place {
    /// A cleared folder.
    fn new(name: &str, lab: &Lab) -> Self {
        let place = Self { directory: PathBuf::from(format!("/var/tmp/pwt-{name}")) };
        for folder in ["bin", "net.d"] {
            fs::create_dir_all(place.directory.join(folder)).unwrap();
        }
        symlink(podway().canonicalize().unwrap(), place.directory.join("bin/podway-cni")).unwrap();
        let config = json!({
            "cniVersion": "0.4.0", "name": "podway",
            "plugins": [{
                "type": "podway-cni",
                "socket": format!("/run/podway/{}/node-1/agent.sock", lab.name),
                "capabilities": {"portMappings": true, "bandwidth": true},
            }],
        });
        fs::write(place.directory.join("net.d/10-podway.conflist"), config.to_string()).unwrap();
        place
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).to_str().unwrap().to_owned()
    }
}

/// Unmounts what is mounted below a folder, and removes it.
fn clear(directory: &Path) {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let below = format!("{}/", directory.display());
    for target in mounts.lines().rev().filter_map(|l| l.split(' ').nth(1)).filter(|t| t.starts_with(&below)) {
        let _ = Command::new("umount").args(["--lazy", target]).stderr(Stdio::null()).status();
    }
    let _ = fs::remove_dir_all(directory);
}

/// Removes control groups of containers, which have ended, from all hierarchies.
fn remove_cgroups(name: &str) {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let of_groups = |line: &&str| line.split(' ').nth(2).is_some_and(|kind| kind.starts_with("cgroup"));
    for root in mounts.lines().filter(of_groups).filter_map(|l| l.split(' ').nth(1)) {
        remove_cgroup(&Path::new(root).join(name));
    }
}

fn remove_cgroup(group: &Path) {
    for inner in fs::read_dir(group).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir())
    {
        remove_cgroup(&inner);
    }
    let _ = fs::remove_dir(group);
}

/// A command in the network namespace of the lab's first node; the other namespaces are the machine's.
fn on_node(lab: &Lab, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/podway-{}-node-1", lab.name)).arg("--").arg(program);
    command
}

/// A namespace of the lab.
fn namespace(lab: &Lab, rest: &str) -> Netns {
    Netns::open_named(&format!("podway-{}-{rest}", lab.name)).unwrap()
}

/// Everything that a container leaves on a node when it is not removed as it should be.
fn traces(lab: &Lab, netns_prefix: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for command in [
        "ip -o link | sed 's/:.*<.*//; s/@.*//'",
        "ip route show table all proto 80; ip -6 route show proto 80",
        "tc qdisc show | grep tbf || true",
        "nft list tables",
        "nft list table inet podway_ports 2>/dev/null || true",
    ] {
        let text = lab.on_node("node-1", &["sh", "-c", command]);
        found.extend(text.lines().map(str::to_owned));
    }
    found.insert(format!("pods {}", lab.metric("node-1", "podway_pods ")));
    found.insert(format!("ports {}", lab.metric("node-1", "podway_host_ports ")));
    found.insert(format!("endpoints {}", lab.metric("node-1", "podway_table_entries{table=\"endpoints\"}")));
    for name in fs::read_dir("/run/netns").unwrap().flatten() {
        let name = name.file_name().to_string_lossy().into_owned();
        if name.starts_with(netns_prefix) {
            found.insert(name);
        }
    }
    found
}

/// Connects from a namespace.
fn connect(from: &Netns, to: SocketAddr) -> Result<TcpStream, String> {
    let stream = from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(3))).unwrap();
    let stream = stream.map_err(|e| format!("{to}: {e}"))?;
    stream.set_read_timeout(Some(WAIT)).unwrap();
    stream.set_write_timeout(Some(WAIT)).unwrap();
    Ok(stream)
}

/// What a server says by itself.
fn greeting(from: &Netns, to: SocketAddr) -> Result<String, String> {
    let mut text = String::new();
    connect(from, to)?.read_to_string(&mut text).map_err(|e| format!("{to}: {e}"))?;
    Ok(text)
}

/// Bits a second at which the server's blocks come, without the first quarter.
fn download(from: &Netns, to: SocketAddr) -> f64 {
    let mut stream = connect(from, to).unwrap();
    let mut buffer = vec![0; 64 << 10];
    let (mut bytes, mut begun) = (0, None);
    loop {
        let read = stream.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        bytes += read;
        if begun.is_none() && bytes > BLOCKS / 4 {
            begun = Some((Instant::now(), bytes));
        }
    }
    assert_eq!(bytes, BLOCKS, "all of it");
    let (begun, before) = begun.unwrap();
    bits(bytes - before) / begun.elapsed().as_secs_f64()
}

/// Bits a second at which the server takes as much; it tells how many bytes it has when it has all.
fn upload(from: &Netns, to: SocketAddr) -> f64 {
    let mut stream = connect(from, to).unwrap();
    let begun = Instant::now();
    stream.write_all(&vec![0; BLOCKS]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer.trim(), BLOCKS.to_string());
    bits(BLOCKS) / begun.elapsed().as_secs_f64()
}

fn bits(bytes: usize) -> f64 {
    8.0 * f64::from(u32::try_from(bytes).unwrap())
}

/// A pod of the lab on the runtimes' node, and one on the other.
const PODS: &str = crate::lab::PAIR;

/// Every place from which a host port is to be reached.
fn everywhere(lab: &Lab) -> [(&'static str, Netns, IpAddr); 6] {
    let node: IpAddr = "172.18.1.1".parse().unwrap();
    [
        ("outside", namespace(lab, "outside"), node),
        ("the other node", namespace(lab, "node-2"), node),
        ("the node", namespace(lab, "node-1"), node),
        ("the node's loopback", namespace(lab, "node-1"), "127.0.0.1".parse().unwrap()),
        ("a pod of the node", namespace(lab, "pod-default-a"), node),
        ("a pod of the other node", namespace(lab, "pod-default-b"), node),
    ]
}

/// The container answers at its host port, from everywhere.
fn reach_host_port(lab: &Lab, port: u16) {
    for (who, from, at) in everywhere(lab) {
        let target = SocketAddr::new(at, port);
        let mut said = Err(String::new());
        // The server may take a moment to listen.
        for _ in 0..20 {
            said = greeting(&from, target);
            if said.is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(said.as_deref().map(str::trim), Ok("hello"), "{who} to {target}");
    }
}

/// Waits until a node has no more than it had.
fn wait_for_nothing_left(lab: &Lab, before: &BTreeSet<String>, netns_prefix: &str) {
    let mut left = BTreeSet::new();
    let begun = Instant::now();
    while begun.elapsed() < WAIT {
        left = traces(lab, netns_prefix);
        if left == *before {
            return;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    panic!("left: {:?}; gone: {:?}", left.difference(before), before.difference(&left));
}
