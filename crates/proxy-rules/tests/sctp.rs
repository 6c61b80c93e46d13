//! SCTP sockets through each writer. Runs where the kernel has SCTP: in the virtual machine of `cargo xtask vm`.
#![expect(clippy::print_stdout, reason = "a test that does not run says why")]
#![expect(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::root;
use common::scenarios::{Bench, FAMILIES, OUTER, cluster_ip, frontend, key, set, vip};
use common::world::{PORT, World, address};
use podway_proxy_rules::iptables::{IptablesWriter, Kind};
use podway_proxy_rules::ipvs::{IpvsWriter, Scheduler};
use podway_proxy_rules::nft::NftWriter;
use podway_proxy_rules::{Feature, Writer};
use podway_services::table::{Family, FrontendAddr, FrontendKind, Protocol, SetKind, TableChange};
use socket2::{Domain, Socket, Type};

/// How long an answer is waited for, that comes.
const PATIENCE: Duration = Duration::from_secs(5);

fn socket(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(socket2::Protocol::from(132)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Whether to go on: an SCTP socket can be made.
fn ready() -> bool {
    if !root() {
        return false;
    }
    let there = socket((IpAddr::from([127, 0, 0, 1]), 0).into()).is_ok();
    if !there {
        println!("skipped: this kernel has no SCTP; `cargo xtask vm --test sctp` runs this in one that has");
    }
    there
}

/// Servers that answer with a pod's name and who asked, until dropped.
struct Servers(Arc<AtomicBool>);

impl Servers {
    fn start(world: &World, pods: &[&str]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for pod in pods {
            for family in FAMILIES {
                let addr = SocketAddr::new(address(pod, family), PORT);
                let listener = world.enter(pod, || {
                    let listener = socket(addr)?;
                    listener.bind(&addr.into())?;
                    listener.listen(16)?;
                    io::Result::Ok(listener)
                });
                let listener = listener.unwrap();
                listener.set_nonblocking(true).unwrap();
                let (stop, name) = (Arc::clone(&stop), (*pod).to_owned());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let Ok((mut stream, peer)) = listener.accept() else {
                            std::thread::sleep(Duration::from_millis(2));
                            continue;
                        };
                        let peer = peer.as_socket().map(|p| p.ip().to_canonical()).unwrap();
                        let _ = stream.write_all(format!("{name} {peer}").as_bytes());
                    }
                });
            }
        }
        Self(stop)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How many ICMP errors of the kind "destination unreachable" a member has received.
fn unreachables(world: &World, member: &str, family: Family) -> u64 {
    let read = |name: &str| world.enter(member, || std::fs::read_to_string(name)).unwrap();
    let last = |line: Option<&str>| line.and_then(|l| l.split_whitespace().last()?.parse().ok()).unwrap();
    if family == Family::V6 {
        let text = read("/proc/thread-self/net/snmp6");
        return last(text.lines().find(|l| l.starts_with("Icmp6InDestUnreachs ")));
    }
    // A line of names, a line of values.
    let text = read("/proc/thread-self/net/snmp");
    let lines: Vec<Vec<&str>> =
        text.lines().filter(|l| l.starts_with("Icmp: ")).map(|l| l.split(' ').collect()).collect();
    let at = lines[0].iter().position(|name| *name == "InDestUnreachs").unwrap();
    lines[1][at].parse().unwrap()
}

fn ask(world: &World, from: &str, to: SocketAddr, patience: Duration) -> io::Result<(String, IpAddr)> {
    world.enter(from, || {
        let mut socket = socket(to)?;
        // Also how long connect() waits.
        socket.set_write_timeout(Some(patience))?;
        socket.connect(&to.into())?;
        let mut buffer = [0; 100];
        let length = socket.read(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let (name, peer) = text.split_once(' ').ok_or_else(|| io::Error::other(text.clone()))?;
        Ok((name.to_owned(), peer.parse().map_err(io::Error::other)?))
    })
}

/// Who answers, of a number of tries; all see the client itself or all do not.
#[track_caller]
fn served(bench: &Bench<'_>, from: &str, to: SocketAddr, sees_client: bool) -> BTreeSet<String> {
    let tries = (0..16).map(|_| {
        let (name, peer) =
            ask(bench.world, from, to, PATIENCE).unwrap_or_else(|e| panic!("{from} to {to}: {e}"));
        let family = Family::of(&to.ip());
        assert_eq!(peer == address(from, family), sees_client, "{from} to {to}: {name} saw {peer}");
        name
    });
    tries.collect()
}

fn check(name: &str, mut writer: impl Writer) {
    if !ready() {
        return;
    }
    let world = World::new(name);
    let _servers = Servers::start(&world, &["p1", "r1"]);
    let mut bench = Bench::new(&world, &mut writer);
    bench.doing("SCTP");
    assert!(bench.can(Feature::Sctp));
    let both = BTreeSet::from(["p1".to_owned(), "r1".to_owned()]);
    for family in FAMILIES {
        bench.apply(&cluster_ip(1, Protocol::Sctp, family, &["p1", "r1"]));
        let node_port = key(FrontendAddr::Node(family), 30001, Protocol::Sctp);
        bench.apply(&[frontend(1, node_port, FrontendKind::NodePort, OUTER)]);
        let to = SocketAddr::from((vip(family, 1), 80));
        let outside = SocketAddr::from((address("node", family), 30001));
        assert_eq!(served(&bench, "p2", to, true), both, "{name}: cluster IP ({family:?})");
        assert_eq!(served(&bench, "o2", outside, false), both, "{name}: node port ({family:?})");
        // A pod that reaches itself.
        bench.apply(&[set(1, SetKind::Cluster, family, &["p1"])]);
        assert_eq!(served(&bench, "p1", to, false).len(), 1, "{name}: hairpin ({family:?})");
        // An open association outlives the change that takes its backend away.
        let open = world.enter("p2", || {
            let socket = socket(to).unwrap();
            socket.connect(&to.into()).unwrap();
            socket
        });
        bench.apply(&[set(1, SetKind::Cluster, family, &["r1"])]);
        let (mut open, mut buffer) = (open, [0; 100]);
        let length = open.read(&mut buffer).unwrap();
        assert!(String::from_utf8_lossy(&buffer[..length]).starts_with("p1 "), "{name} ({family:?})");
        drop(open);
        assert_eq!(served(&bench, "p2", to, true), BTreeSet::from(["r1".to_owned()]));
        // Nobody there: told at once.
        bench.apply(&[TableChange::FrontendGone(node_port)]);
        let mut nobody = cluster_ip(1, Protocol::Sctp, family, &[]);
        // The frontend refuses before its set is empty.
        nobody.rotate_left(2);
        bench.apply(&nobody);
        // An SCTP socket takes an ICMP error for a hint and asks on; the error itself has to come.
        for from in ["p2", "o2"] {
            let before = unreachables(&world, from, family);
            ask(&world, from, to, Duration::from_millis(500)).expect_err("nobody serves");
            assert!(unreachables(&world, from, family) > before, "{name}: {from} ({family:?})");
        }
        bench.clear();
    }
    let writer = &mut bench.writer;
    world.enter("node", || writer.remove()).unwrap();
}

#[test]
fn nftables() {
    check("sctp-nft", NftWriter::new());
}

#[test]
fn iptables_legacy() {
    check("sctp-ipt", IptablesWriter::new(Kind::Legacy));
}

#[test]
fn iptables_nft() {
    check("sctp-iptnft", IptablesWriter::new(Kind::Nft));
}

#[test]
fn ipvs() {
    if !std::path::Path::new("/proc/net/ip_vs").exists() {
        println!("skipped: this kernel has no IPVS; `cargo xtask vm --test sctp` runs this in one that has");
        return;
    }
    check("sctp-ipvs", IpvsWriter::new(Scheduler::default()));
}
