//! The wire of a lab in real namespaces: made, used, removed without a trace.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use podway_lab::cgroup::Cgroup;
use podway_lab::down::down;
use podway_lab::spec::{Family, LabName, LabSpec, Mode, ServiceMode, UnderlayFamily};
use podway_lab::state::StateDir;
use podway_lab::topology;
use podway_link::{Netlink, Netns};

struct Guard(LabName);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = down(&self.0);
    }
}

fn spec(name: &str) -> LabSpec {
    LabSpec {
        name: name.parse().expect("name"),
        nodes: 3,
        zones: 2,
        mode: Mode::Vxlan,
        family: Family::Dual,
        underlay_family: UnderlayFamily::Ipv4,
        underlay_mtu: 9000,
        pod_mtu: None,
        vxlan_port: 8472,
        vxlan_vni: 1,
        service_mode: ServiceMode::Ebpf,
        masquerade_all: false,
        ipvs_scheduler: None,
        load_balancer_pool: Vec::new(),
    }
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        let _ = writeln!(std::io::stderr(), "skipped: needs root");
    }
    root
}

#[test]
fn nodes_reach_each_other_in_both_families_and_nothing_stays_behind() {
    if !is_root() {
        return;
    }
    let spec = spec("pwttopo");
    let guard = Guard(spec.name.clone());
    // What an interrupted run left is removed first.
    down(&spec.name).expect("down");
    topology::create(&spec).expect("create");
    let plans = spec.node_plans();
    let (first, last) = (&plans[0], &plans[2]);
    let open = |node: &str| Netns::open_named(&spec.name.node_netns(node)).expect("namespace");
    let (client, server) = (open(&first.name), open(&last.name));
    for (index, address) in last.addresses.iter().enumerate() {
        let listener =
            server.run(|| TcpListener::bind(SocketAddr::new(*address, 0))).expect("enter").expect("bind");
        let target = listener.local_addr().expect("address");
        let seen: IpAddr = std::thread::scope(|scope| {
            let peer = scope.spawn(|| listener.accept().expect("accept").1.ip());
            client
                .run(|| TcpStream::connect_timeout(&target, Duration::from_secs(2)))
                .expect("enter")
                .expect("connect");
            peer.join().expect("no panic")
        });
        assert_eq!(seen, first.addresses[index]);
    }
    let mut netlink = Netlink::open_in(&client).expect("netlink");
    let uplink = netlink.link_by_name(topology::UPLINK).expect("links").expect("uplink");
    assert_eq!((uplink.mtu, uplink.up), (9000, true));
    let forwards =
        client.run(|| podway_link::sysctl::read("net/ipv4/ip_forward")).expect("enter").expect("read");
    assert_eq!(forwards, "1");

    // A process in the lab's group that ignores everything but SIGKILL, and a second lab of a similar name.
    let cgroup = Cgroup::of_lab(&spec.name).expect("cgroup2").child("node-1");
    cgroup.create().expect("create group");
    let mut stubborn = std::process::Command::new("sh")
        .args(["-c", "trap '' TERM; sleep 60 & wait"])
        .spawn()
        .expect("spawn");
    std::fs::write(cgroup.path().join("cgroup.procs"), stubborn.id().to_string()).expect("move");
    let other = LabSpec { name: "pwttopo2".parse().expect("name"), nodes: 1, zones: 1, ..spec.clone() };
    let other_guard = Guard(other.name.clone());
    down(&other.name).expect("down");
    topology::create(&other).expect("create");
    StateDir::of(&other.name).create().expect("state");
    assert!(topology::create(&spec).is_err(), "a second fabric of the same name");
    assert_eq!(
        Netns::list_named(&spec.name.netns_prefix()).expect("list").len(),
        5,
        "and the first is whole"
    );
    drop((client, server));
    let removal = down(&spec.name).expect("down");
    assert_eq!(removal.left, Vec::<String>::new());
    assert!(!stubborn.wait().expect("wait").success());
    assert_eq!(Netns::list_named(&spec.name.netns_prefix()).expect("list"), Vec::<String>::new());
    assert!(!Path::new(&spec.name.state_dir()).exists() && !cgroup.path().exists());
    assert_eq!(
        Netns::list_named(&other.name.netns_prefix()).expect("list").len(),
        3,
        "the other lab is whole"
    );
    let again = down(&spec.name).expect("down again");
    assert_eq!((again.removed, again.left), (Vec::new(), Vec::new()));
    drop((guard, other_guard));
}
