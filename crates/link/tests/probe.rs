//! Path MTU probes between real namespaces. A bridge stands for the network between two nodes; a smaller MTU
//! on one of its ports drops what is larger without a word, as a network does where ICMP is filtered.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Namespace, root};
use podway_link::probe::{DEFAULT_PORT, PathConfig, Prober, ProberConfig, Report, Responder, Verdict};
use podway_link::{AddressFlags, VethSpec};

struct Network {
    a: Namespace,
    b: Namespace,
    fabric: Namespace,
    /// The port of the bridge that leads to `b`.
    port_b: u32,
}

impl Network {
    fn new(name: &str, mtu: u32, family: [&str; 2]) -> Self {
        let fabric = Namespace::new(&format!("{name}-f"));
        let (a, b) = (Namespace::new(&format!("{name}-a")), Namespace::new(&format!("{name}-b")));
        let mut netlink = fabric.netlink();
        let bridge = netlink.create_bridge("br0", mtu).unwrap();
        netlink.set_up(bridge.index).unwrap();
        let mut ports = Vec::new();
        for (node, port, address) in [(&a, "a", family[0]), (&b, "b", family[1])] {
            let spec = VethSpec {
                name: port.into(),
                mtu,
                up: true,
                peer_name: "eth0".into(),
                peer_mtu: mtu,
                peer_ns: Some(&node.netns),
                ..VethSpec::default()
            };
            let link = netlink.create_veth(&spec).unwrap();
            netlink.set_master(link.index, Some(bridge.index)).unwrap();
            ports.push(link.index);
            let mut inside = node.netlink();
            let eth0 = inside.link_by_name("eth0").unwrap().unwrap().index;
            inside.set_up(eth0).unwrap();
            let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
            inside.add_address(eth0, address.parse().unwrap(), flags).unwrap();
        }
        Self { a, b, fabric, port_b: ports[1] }
    }

    fn narrow(&self, mtu: u32) {
        self.fabric.netlink().set_mtu(self.port_b, mtu).unwrap();
    }
}

/// With less rest between the rounds than usual: tests are short.
fn config() -> ProberConfig {
    let path = PathConfig { interval: Duration::from_secs(1), ..PathConfig::default() };
    ProberConfig { path, ..ProberConfig::default() }
}

/// Runs the prober until a verdict on the peer changes.
fn next(prober: &mut Prober, time: Duration) -> Option<Report> {
    let ends = Instant::now() + time;
    while Instant::now() < ends {
        let reports = prober.run(Duration::from_millis(100)).unwrap();
        if let Some(report) = reports.first() {
            return Some(*report);
        }
    }
    None
}

fn scenario(name: &str, family: [&str; 2], mtu: u16, narrow: u16) {
    if !root() {
        return;
    }
    let network = Network::new(name, mtu.into(), family);
    let [a, b]: [IpAddr; 2] = family.map(|text| text.parse::<ipnet::IpNet>().unwrap().addr());
    let mut responder = network.b.netns.run(|| Responder::bind(&[b], DEFAULT_PORT)).unwrap().unwrap();
    let mut prober = network.a.netns.run(|| Prober::bind(&[a], config())).unwrap().unwrap();
    let (done, silent) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if silent.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(10));
                } else {
                    responder.serve(Duration::from_millis(50)).unwrap();
                }
            }
        });
        // The thread above ends also when an assertion here fails.
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _done = Done(&done);
        prober.set_peers(&BTreeMap::from([(b, mtu)])).unwrap();

        let proven = next(&mut prober, Duration::from_secs(3)).expect("a verdict");
        assert_eq!((proven.before, proven.now), (Verdict::Unknown, Verdict::Proven { mtu }));

        let since = Instant::now();
        network.narrow(narrow.into());
        let found = next(&mut prober, Duration::from_secs(10)).expect("the narrow path");
        assert_eq!(found.now, Verdict::Narrow { expected: mtu, found: narrow });
        assert_eq!(found.send_error, None);
        println!("{name}: {mtu} -> {narrow} found after {:?}", since.elapsed());
        // At most 1.1 s until the next full-size probe, and 5 s from its loss.
        assert!(since.elapsed() < Duration::from_millis(6100), "{:?}", since.elapsed());

        network.narrow(mtu.into());
        let healed = next(&mut prober, Duration::from_secs(5)).expect("the healed path");
        assert_eq!(healed.now, Verdict::Proven { mtu });

        silent.store(true, Ordering::Relaxed);
        let dead = next(&mut prober, Duration::from_secs(10)).expect("the dead peer");
        assert_eq!(dead.now, Verdict::Unreachable);

        // A peer that is not watched any more is not reported.
        prober.set_peers(&BTreeMap::new()).unwrap();
        assert_eq!(prober.verdicts().count(), 0);
        assert_eq!(next(&mut prober, Duration::from_millis(300)), None);
    });
    // A peer without a responder is told from one that is down.
    drop(responder);
    prober.set_peers(&BTreeMap::from([(b, mtu)])).unwrap();
    let refused = next(&mut prober, Duration::from_secs(10)).expect("the peer that is up");
    assert_eq!((refused.before, refused.now), (Verdict::Unknown, Verdict::Refused));
    network.fabric.netlink().set_down(network.port_b).unwrap();
    let down = next(&mut prober, Duration::from_secs(12)).expect("the peer that is down");
    assert_eq!((down.before, down.now), (Verdict::Refused, Verdict::Unreachable));
}

#[test]
fn a_black_hole_is_found_and_its_end_too_ipv4() {
    scenario("p4", ["172.31.0.1/24", "172.31.0.2/24"], 1500, 1400);
}

#[test]
fn a_black_hole_is_found_and_its_end_too_ipv6() {
    scenario("p6", ["fd00:172:31::1/64", "fd00:172:31::2/64"], 1500, 1380);
}

#[test]
fn jumbo_frames_over_an_ordinary_network_are_found() {
    scenario("pj", ["172.31.0.1/24", "172.31.0.2/24"], 9000, 1500);
}

#[test]
fn a_narrow_link_of_the_node_itself_is_named_by_its_error() {
    if !root() {
        return;
    }
    let network = Network::new("pl", 1500, ["172.31.0.1/24", "172.31.0.2/24"]);
    let [a, b]: [IpAddr; 2] = ["172.31.0.1", "172.31.0.2"].map(|text| text.parse().unwrap());
    let mut responder = network.b.netns.run(|| Responder::bind(&[b], DEFAULT_PORT)).unwrap().unwrap();
    let mut prober = network.a.netns.run(|| Prober::bind(&[a], config())).unwrap().unwrap();
    // More than the link takes, as with a pod MTU that leaves no room for the tunnel.
    prober.set_peers(&BTreeMap::from([(b, 1550)])).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| responder.serve(Duration::from_secs(6)).unwrap());
        let report = next(&mut prober, Duration::from_secs(6)).expect("a verdict");
        assert_eq!(report.now, Verdict::Narrow { expected: 1550, found: 1500 });
        assert_eq!(report.send_error, Some(nix::errno::Errno::EMSGSIZE));
    });
}

#[test]
fn many_peers_are_held_to_the_rate() {
    if !root() {
        return;
    }
    let node = Namespace::new("rate");
    let loopback: IpAddr = "127.0.0.1".parse().unwrap();
    let config = ProberConfig { packets_per_second: 200, ..ProberConfig::default() };
    let mut prober = node.netns.run(|| Prober::bind(&[loopback], config)).unwrap().unwrap();
    let peers = (1..=250u8).flat_map(|x| (1..=8u8).map(move |y| (IpAddr::from([127, 1, y, x]), 1500)));
    prober.set_peers(&peers.collect()).unwrap();
    let sent = || {
        let counters = node.netns.run(podway_link::snmp::Counters::read).unwrap().unwrap();
        counters.value("Udp.OutDatagrams")
    };
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(3) {
        prober.run(Duration::from_millis(100)).unwrap();
    }
    // A burst of 50 and 200 a second; a round is two packets.
    let sent = sent();
    assert!((400..=700).contains(&sent), "{sent} packets in 3 s");
    let too_many = (0..20_000u32).map(|n| (IpAddr::from((0x7f02_0000 + n).to_be_bytes()), 1500));
    assert!(prober.set_peers(&too_many.collect()).unwrap_err().to_string().contains("at most 16384"));
    assert_eq!(prober.verdicts().count(), 2000, "a refused set changes nothing");
}
