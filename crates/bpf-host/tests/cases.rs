//! Packets of other projects' cases, and of random clusters, through the kernel's programs (`BPF_PROG_TEST_RUN`):
//! compiled, written into tables under a pin directory of their own, and sent many times to see every destination.
//!
//! A pod's packet goes in where pods send, one from beyond the cluster where the underlay comes in. What the node itself
//! sends meets the socket hooks, which have no test run: their decision is asked over the kernel's tables instead.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it skips"
)]

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use etherparse::{PacketBuilder, SlicedPacket};
use ipnet::IpNet;
use podway_abi::{
    Addr, Hook,
    services::{Origin as AbiOrigin, client},
};
use podway_bpf_host::{Datapath, Endpoint, Mode, NodeConfig, Peer, PeerFlags, ServiceWriter};
use podway_cases::services::{
    naive, packets,
    random::{Cluster, Random},
    target::{Observed, Packet, Scenario, Target},
};
use podway_datapath::service::{self, Choice, Outcome, Query};
use podway_services::{
    Flow, ServiceTable, TableChange, Verdict,
    table::{NodeView, Origin, Protocol},
};

/// A test run needs a device that exists; nothing is sent through it.
const LOOPBACK: u32 = 1;
const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 1, 0xfe]);
const TC_ACT_SHOT: i32 = 2;

/// The kernel's programs over tables of their own.
struct Kernel {
    datapath: Datapath,
    writer: ServiceWriter,
    /// Packets whose translation was refused by name.
    refused: usize,
    port: u16,
}

impl Kernel {
    fn new(pins: &str) -> Self {
        let pins = Path::new(pins);
        let _ = Datapath::remove_all(pins);
        let datapath = Datapath::load(pins).unwrap();
        let writer = datapath.services().unwrap();
        Self { datapath, writer, refused: 0, port: 1024 }
    }

    fn program(&mut self, view: &NodeView, table: &ServiceTable) {
        let mut peers = std::collections::BTreeMap::new();
        let here: IpAddr = "192.168.255.1".parse().unwrap();
        let there: IpAddr = "192.168.255.2".parse().unwrap();
        for range in &view.pod_cidrs {
            peers.insert(*range, Peer { node: there, flags: PeerFlags { is_node: false, local: false } });
        }
        for addr in &view.addresses {
            peers.insert(
                IpNet::from(*addr),
                Peer { node: here, flags: PeerFlags { is_node: true, local: true } },
            );
        }
        self.datapath.sync_peers(&peers).unwrap();
        let mode = Mode::Overlay { tunnel_ifindex: 4_004, vni: 1, port: 8472, underlay: here };
        let config = NodeConfig { mode, uplink_ifindex: LOOPBACK, stack_translates: false };
        self.datapath.set_config(&config).unwrap();
        self.writer.set_node(view).unwrap();
        let report = self.writer.sync(&ServiceTable::diff(&ServiceTable::default(), table)).unwrap();
        assert!(report.refused.is_empty(), "{report:?}");
    }

    fn count(&self, reason: &str) -> u64 {
        let counters = self.datapath.counters().unwrap();
        counters.iter().filter(|c| c.reason == reason).map(|c| c.packets).sum()
    }

    /// What becomes of a flow: nothing when the mechanism refuses it by name.
    fn observe(&mut self, view: &NodeView, flow: &Flow, times: usize) -> Option<Observed> {
        match podway_services::origin(view, &flow.src) {
            Origin::Node => Some(self.ask(flow, times)),
            Origin::Pod => {
                let endpoint = Endpoint {
                    id: 1,
                    ifindex: LOOPBACK,
                    pod_mac: MACS.0,
                    host_mac: MACS.1,
                    addresses: vec![flow.src],
                    queued: false,
                };
                self.datapath.set_endpoint(&endpoint).unwrap();
                let observed = self.send(Hook::FromPod, flow, times);
                self.datapath.remove_endpoint(LOOPBACK).unwrap();
                observed
            }
            Origin::External => self.send(Hook::FromUplink, flow, times),
        }
    }

    fn send(&mut self, hook: Hook, flow: &Flow, times: usize) -> Option<Observed> {
        let reasons =
            ["service_rejected", "no_local_endpoint", "out_of_source_range", "no_service", "sctp_port"];
        let before = reasons.map(|r| self.count(r));
        let mut destinations = BTreeSet::new();
        let mut seen = Observed {
            destinations: Vec::new(),
            masquerade: false,
            verdict: Verdict::Accept,
            untouched: false,
        };
        for _ in 0..times {
            self.port = if self.port == 9_999 { 1024 } else { self.port + 1 };
            let frame = frame(flow, self.port);
            let run = self.datapath.test_run(hook, &frame, LOOPBACK, 1).unwrap();
            let after = reasons.map(|r| self.count(r));
            if after[4] > before[4] {
                return None;
            }
            if after[0] > before[0] {
                seen.verdict = Verdict::Reject;
                return Some(seen);
            }
            if (1..4).any(|i| after[i] > before[i]) {
                seen.verdict = Verdict::Drop;
                return Some(seen);
            }
            assert_ne!(run.code, TC_ACT_SHOT, "{flow:?}: dropped; {:?}", self.datapath.counters());
            let (src, dst) = ends(&run.packet);
            if (src.0, dst) == (flow.src, (flow.dst, flow.port)) {
                seen.untouched = true;
                return Some(seen);
            }
            seen.masquerade |= src.0 != flow.src;
            destinations.insert(dst);
        }
        seen.destinations = destinations.into_iter().collect();
        Some(seen)
    }

    /// The decision of a socket of the node.
    fn ask(&self, flow: &Flow, times: usize) -> Observed {
        let mut destinations = BTreeSet::new();
        let mut seen = Observed {
            destinations: Vec::new(),
            masquerade: false,
            verdict: Verdict::Accept,
            untouched: false,
        };
        for _ in 0..times {
            let query = Query {
                client: client::namespace(1),
                src: Addr::from(flow.src),
                dst: Addr::from(flow.dst),
                src_port: 0,
                dst_port: flow.port,
                proto: flow.protocol.number(),
                origin: AbiOrigin::Node,
                sticky: false,
            };
            let mut choice = Choice::NONE;
            match service::choose(&self.writer, &query, &mut choice) {
                Outcome::Untouched => seen.untouched = true,
                Outcome::Undefined | Outcome::Reject => seen.verdict = Verdict::Reject,
                Outcome::Drop | Outcome::OutOfRange | Outcome::UnknownSource | Outcome::Unassigned => {
                    seen.verdict = Verdict::Drop;
                }
                Outcome::Backend => {
                    let addr = IpAddr::from(choice.addr);
                    seen.masquerade |= choice.masquerade || addr == flow.src;
                    destinations.insert((addr, choice.port));
                }
            }
        }
        seen.destinations = destinations.into_iter().collect();
        seen
    }
}

fn frame(flow: &Flow, port: u16) -> Vec<u8> {
    let eth = PacketBuilder::ethernet2(MACS.0, MACS.1);
    let step = match (flow.src, flow.dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => eth.ipv4(s.octets(), d.octets(), 64),
        (IpAddr::V6(s), IpAddr::V6(d)) => eth.ipv6(s.octets(), d.octets(), 64),
        _ => panic!("{flow:?} is of two families"),
    };
    let mut out = Vec::new();
    match flow.protocol {
        Protocol::Tcp => step.tcp(port, flow.port, 1, 1000).syn().write(&mut out, &[]).unwrap(),
        Protocol::Udp => step.udp(port, flow.port).write(&mut out, b"x").unwrap(),
        Protocol::Sctp => {
            // The common header (RFC 9260 section 3.1) and an INIT chunk's beginning.
            let mut body = [port.to_be_bytes(), flow.port.to_be_bytes()].concat();
            body.extend([0; 8]);
            body.extend([1, 0, 0, 20]);
            body.extend([0; 16]);
            step.write(&mut out, 132.into(), &body).unwrap();
        }
    }
    out
}

fn ends(packet: &[u8]) -> ((IpAddr, u16), (IpAddr, u16)) {
    let sliced = SlicedPacket::from_ethernet(packet).unwrap();
    let (src, dst, at): (IpAddr, IpAddr, usize) = match sliced.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into(), 34)
        }
        etherparse::NetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into(), 54)
        }
        _ => panic!("no IP packet"),
    };
    let port = |i: usize| u16::from_be_bytes([packet[at + i], packet[at + i + 1]]);
    ((src, port(0)), (dst, port(2)))
}

impl Target for Kernel {
    fn name(&self) -> &str {
        "kernel"
    }

    fn run(&mut self, scenario: &Scenario) -> Result<Vec<Observed>, String> {
        if scenario.view.pod_cidrs.is_empty() {
            return Err("where pods are is always known to the datapath".to_owned());
        }
        let compiler = scenario.compile();
        self.program(compiler.view(), compiler.table());
        let observe = |packet: &Packet| {
            let times = 16 * packet.expected.destinations.len().max(1);
            self.observe(&scenario.view, &packet.flow, times).unwrap_or_else(|| {
                self.refused += 1;
                packet.expected.clone()
            })
        };
        Ok(scenario.packets.iter().map(observe).collect())
    }
}

fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    } else if !podway_bpf_host::is_built_in() {
        println!("skipped: built without the kernel object (cargo xtask bpf)");
    }
    root && podway_bpf_host::is_built_in()
}

const PINS: &str = "/sys/fs/bpf/podway-test-cases";
const RANDOM_PINS: &str = "/sys/fs/bpf/podway-test-random";

#[test]
fn packets_of_other_projects() {
    let folder = podway_cases::root().join("services/packets");
    if !can_run() {
        return;
    }
    if !folder.is_dir() {
        println!("skipped: there are no cases at {}", folder.display());
        return;
    }
    let mut kernel = Kernel::new(PINS);
    let mut tally = podway_cases::Tally::default();
    for scenario in packets::read(&folder).unwrap() {
        tally.add(packets::run(&scenario, &mut kernel));
    }
    println!(
        "services, packets in the kernel by ebpf: {tally}; {} of them refused by name (SCTP to another port)",
        kernel.refused
    );
    drop(kernel);
    let _ = Datapath::remove_all(Path::new(PINS));
    assert!(tally.failed().is_empty(), "{:#?}", tally.failed());
    assert!(tally.passed() > 100, "{} cases", tally.passed());
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number in the environment"))
}

/// The kernel and an evaluator written from the API's documentation, which share nothing.
#[test]
fn random_clusters() {
    if !can_run() {
        return;
    }
    let packets = number("PODWAY_PACKETS", 3_000);
    let mut kernel = Kernel::new(RANDOM_PINS);
    let (mut compared, mut reached) = (0, std::collections::BTreeMap::new());
    for seed in number("PODWAY_SEED", 1).. {
        if compared >= packets {
            break;
        }
        let mut random = Random::new(seed);
        let cluster = Cluster::random(&mut random);
        let compiler = cluster.compile();
        kernel.program(compiler.view(), compiler.table());
        for _ in 0..50 {
            let flow = cluster.packet(&mut random);
            let mut expected = naive::evaluate(&cluster, &flow);
            // What claims to come from the address that it goes to, or goes to loopback, is nobody's on the wire.
            let on_wire = podway_services::origin(compiler.view(), &flow.src) != Origin::Node;
            // And where pods of its family are has to be known.
            let known = compiler.view().pod_cidrs.iter().any(|r| r.addr().is_ipv4() == flow.src.is_ipv4());
            if on_wire && (!known || flow.src == flow.dst || flow.dst.is_loopback()) {
                continue;
            }
            // A backend that is the node itself sees the client: the node takes its own address for a forged one.
            let on_node = |d: &(IpAddr, u16)| compiler.view().addresses.contains(&d.0);
            if on_wire && !expected.destinations.is_empty() && expected.destinations.iter().all(on_node) {
                expected.masquerade = false;
            }
            let times = 16 * expected.destinations.len().max(1);
            let Some(observed) = kernel.observe(compiler.view(), &flow, times) else {
                kernel.refused += 1;
                continue;
            };
            let found = podway_services::frontend(
                compiler.table(),
                compiler.view(),
                flow.dst,
                flow.port,
                flow.protocol,
            );
            let observed = match found {
                // One client gets one of them.
                Some((_, frontend)) if frontend.affinity_s.is_some() => {
                    let within = observed.destinations.iter().all(|d| expected.destinations.contains(d));
                    assert!(within, "seed {seed}: {flow:?}: {observed:?}, not {expected:?}");
                    assert_eq!(observed.destinations.is_empty(), expected.destinations.is_empty());
                    let Observed { destinations, masquerade, .. } = expected.clone();
                    Observed { destinations, masquerade, ..observed }
                }
                _ => observed,
            };
            assert_eq!(observed, expected, "seed {seed}: {flow:?} at {:?}", compiler.view());
            *reached.entry(format!("{:?}", observed.verdict)).or_insert(0_u64) += 1;
            compared += 1;
        }
        // Affinity of one cluster is none of the next one's: its services may have other backends.
        let everything: Vec<TableChange> = Vec::new();
        kernel.writer.sync(&everything).unwrap();
    }
    println!("{compared} packets agree: {reached:?}; {} refused by name", kernel.refused);
    drop(kernel);
    let _ = Datapath::remove_all(Path::new(RANDOM_PINS));
}
