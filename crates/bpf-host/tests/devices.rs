//! The cases with real packets on real devices, in namespaces of their own.
//!
//! A node with two pods, an underlay link to a "wire" namespace and a VXLAN device. Frames go in by packet
//! sockets and are caught by packet sockets; the tunnel's are wrapped in VXLAN by the test and by the kernel.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it skips"
)]

mod support;

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use nix::libc;
use podway_abi::{Hook, Mac, Reason};
use podway_bpf_host::AttachMethod;
use podway_datapath::Verdict;
use podway_datapath_cases::{
    At,
    cases::{self, Case},
    frames::{L4, PAYLOAD, ip, ipv4_checksum},
    sequences::{self, Step},
    world::{
        Change, HOST_1_MAC, HOST_2_MAC, HOST_3_MAC, Interfaces, NODE, OTHER_NODE, OTHER_RANGES, POD_1,
        POD_1_MAC, POD_2, POD_2_MAC, POD_3_MAC, THIRD_NODE,
    },
};
use podway_link::{AddressFlags, Netlink, Netns, Route, VethSpec, VxlanSpec, sysctl};
use support::{TestDatapath, can_run};

const NODE_MAC: Mac = [0x02, 0, 0, 0, 8, 1];
const WIRE_MAC: Mac = [0x02, 0, 0, 0, 8, 2];
const VXLAN_PORT: u16 = 8472;
/// Longest wait for a packet that must come.
const SOON: Duration = Duration::from_secs(2);
/// Wait for a packet that must not come.
const NEVER: Duration = Duration::from_millis(30);

/// The namespaces; removed at the end.
struct Net {
    prefix: String,
    node: Netns,
    pods: [Netns; 3],
    wire: Netns,
    interfaces: Interfaces,
}

impl Net {
    fn new(prefix: &str) -> Self {
        remove(prefix);
        let named = |name: &str| Netns::create_named(&format!("{prefix}-{name}")).unwrap();
        let (node, wire) = (named("node"), named("wire"));
        let pods = [named("pod1"), named("pod2"), named("pod3")];
        node.run(|| {
            for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
                sysctl::write(name, "1").unwrap();
            }
            for name in ["all", "default"] {
                sysctl::write(&format!("net/ipv4/conf/{name}/rp_filter"), "0").unwrap();
            }
        })
        .unwrap();
        let mut netlink = Netlink::open_in(&node).unwrap();
        let mut pod = |name: &str, host_mac, pod_mac, pod: &Netns| {
            let spec = VethSpec {
                name: name.to_owned(),
                mac: Some(host_mac),
                up: true,
                addr_gen_none: true,
                peer_name: "eth0".to_owned(),
                peer_mac: Some(pod_mac),
                peer_ns: Some(pod),
                ..VethSpec::default()
            };
            let index = netlink.create_veth(&spec).unwrap().index;
            let mut inside = Netlink::open_in(pod).unwrap();
            let peer = inside.link_by_name("eth0").unwrap().unwrap();
            inside.set_addr_gen_none(peer.index).unwrap();
            inside.set_up(peer.index).unwrap();
            index
        };
        let pod_1 = pod("pod1", HOST_1_MAC, POD_1_MAC, &pods[0]);
        let pod_2 = pod("pod2", HOST_2_MAC, POD_2_MAC, &pods[1]);
        let pod_3 = pod("pod3", HOST_3_MAC, POD_3_MAC, &pods[2]);
        let uplink = pod("eth0", NODE_MAC, WIRE_MAC, &wire);
        let tunnel = netlink.create_vxlan(&VxlanSpec::default()).unwrap().index;
        let interfaces = Interfaces { pod_1, pod_2, pod_3, uplink, tunnel };
        for (family, node_address) in NODE.iter().enumerate() {
            let len = if family == 0 { 16 } else { 64 };
            let address = IpNet::new(node_address.parse().unwrap(), len).unwrap();
            let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
            netlink.add_address(uplink, address, flags).unwrap();
            let other = OTHER_NODE[family].parse().unwrap();
            netlink.replace_neighbour(uplink, other, WIRE_MAC).unwrap();
            netlink.replace_neighbour(uplink, THIRD_NODE[family].parse().unwrap(), WIRE_MAC).unwrap();
            let (range, len) = OTHER_RANGES[family];
            netlink.replace_route(&route_to_other(family, range, len, uplink)).unwrap();
        }
        Self { prefix: prefix.to_owned(), node, pods, wire, interfaces }
    }

    /// Whether the other node has the second pod's addresses, as far as the node's routes are concerned.
    fn route_pod_2(&self, on_other: bool) {
        let mut netlink = Netlink::open_in(&self.node).unwrap();
        for (family, len) in [32, 128].into_iter().enumerate() {
            let route = route_to_other(family, POD_2[family], len, self.interfaces.uplink);
            if on_other {
                netlink.replace_route(&route).unwrap();
            } else {
                netlink.delete_route(&route).unwrap();
            }
        }
    }
}

/// A route to the other node, as its agent would have made it.
fn route_to_other(family: usize, range: &str, len: u8, uplink: u32) -> Route {
    Route {
        dst: IpNet::new(range.parse().unwrap(), len).unwrap(),
        via: Some(OTHER_NODE[family].parse().unwrap()),
        dev: uplink,
        src: None,
        mtu: None,
        scope_link: false,
        onlink: false,
        protocol: podway_link::ROUTE_PROTOCOL,
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        remove(&self.prefix);
    }
}

fn remove(prefix: &str) {
    for name in Netns::list_named(prefix).unwrap() {
        let _ = Netns::delete_named(&name);
    }
}

/// A packet socket on one device of a namespace.
struct Tap(OwnedFd);

impl Tap {
    fn open(namespace: &Netns, device: &str) -> Self {
        let fd = namespace.run(|| packet_socket(device)).unwrap().unwrap();
        Self(fd)
    }

    fn send(&self, frame: &[u8]) {
        match nix::unistd::write(&self.0, frame) {
            Ok(sent) => assert_eq!(sent, frame.len()),
            // What an egress program drops is reported to the sender.
            Err(nix::errno::Errno::ENOBUFS) => {}
            Err(e) => panic!("{e}"),
        }
    }

    /// The next frame that comes in and holds the cases' payload, within `wait`.
    fn receive(&self, wait: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + wait;
        let mut buffer = vec![0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let millis = i32::try_from(left.as_millis()).unwrap();
            let mut poll =
                [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&self.0), nix::poll::PollFlags::POLLIN)];
            let timeout = nix::poll::PollTimeout::try_from(millis).unwrap();
            if nix::poll::poll(&mut poll, timeout).unwrap() == 0 {
                return None;
            }
            let (len, outgoing) = receive(&self.0, &mut buffer).unwrap();
            let frame = &buffer[..len];
            if !outgoing && frame.windows(PAYLOAD.len()).any(|w| w == PAYLOAD) && wanted(frame) {
                return Some(frame.to_vec());
            }
        }
    }
}

#[expect(unsafe_code, reason = "nix has no constructor for packet socket addresses")]
fn packet_socket(device: &str) -> io::Result<OwnedFd> {
    let index = nix::net::if_::if_nametoindex(device)?;
    let protocol = u16::try_from(libc::ETH_P_ALL).unwrap_or_default().to_be();
    // SAFETY: plain system calls; the address is a whole, zeroed `sockaddr_ll` of the size that is given.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol));
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let size = size_of::<libc::sockaddr_ll>() as u32;
        if libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(fd)
    }
}

/// Length of the next frame, and whether this host sent it.
#[expect(unsafe_code, reason = "nix has no view of a packet socket address")]
fn receive(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
    // SAFETY: the buffer's own length is given, and the address is a whole, zeroed `sockaddr_ll`.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        let mut size = size_of::<libc::sockaddr_ll>() as u32;
        let len = libc::recvfrom(
            fd.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            0,
            (&raw mut address).cast(),
            &raw mut size,
        );
        if len < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((len as usize, address.sll_pkttype == libc::PACKET_OUTGOING))
    }
}

struct Taps {
    pod_1: Tap,
    pod_2: Tap,
    pod_3: Tap,
    wire: Tap,
    node_pod_1: Tap,
    node_tunnel: Tap,
}

fn run_all(name: &str, method: AttachMethod) {
    let net = Net::new(&format!("pwt-{name}"));
    let test = TestDatapath::new(name, method);
    let taps = Taps {
        pod_1: Tap::open(&net.pods[0], "eth0"),
        pod_2: Tap::open(&net.pods[1], "eth0"),
        pod_3: Tap::open(&net.pods[2], "eth0"),
        wire: Tap::open(&net.wire, "eth0"),
        node_pod_1: Tap::open(&net.node, "pod1"),
        node_tunnel: Tap::open(&net.node, "podway_vxlan"),
    };
    net.node
        .run(|| {
            // Twice: the second time replaces the first one's programs.
            for _ in 0..2 {
                test.get().attach_pod(net.interfaces.pod_1).unwrap();
                test.get().attach_pod(net.interfaces.pod_2).unwrap();
                test.get().attach_pod(net.interfaces.pod_3).unwrap();
                test.get().attach_uplink(net.interfaces.uplink).unwrap();
                test.get().attach_tunnel(net.interfaces.tunnel).unwrap();
            }
        })
        .unwrap();
    let mut run = 0;
    for case in cases::all() {
        // A packet on the tunnel device that came out of no tunnel cannot be made from outside.
        if case.hook == Hook::FromTunnel && case.outer.is_none() {
            continue;
        }
        test.fill(case.overlay, &net.interfaces);
        check(&test, &taps, &case);
        run += 1;
        if case.expect.verdict == Verdict::ToPod {
            test.queue_all();
            let before = test.count("to_pod", Reason::Delivered.name());
            check(&test, &taps, &case);
            assert!(test.count("to_pod", Reason::Delivered.name()) > before, "{}: not queued", case.name);
        }
    }
    println!("{run} cases on devices");
    for sequence in sequences::all() {
        test.fill(sequence.overlay, &net.interfaces);
        net.route_pod_2(false);
        // What earlier sequences left of the same flow is looked up anew, because the tables changed.
        for (number, step) in sequence.steps.into_iter().enumerate() {
            match step {
                Step::Change(change) => {
                    test.change(sequence.overlay, &net.interfaces, change);
                    net.route_pod_2(change == Change::Pod2Moves);
                }
                Step::Packet { hook, at, frame, outer, expect, .. } => {
                    let name = format!("{}, step {number}", sequence.name);
                    let overlay = sequence.overlay;
                    check(&test, &taps, &Case { name, overlay, hook, at, frame, outer, expect });
                }
            }
        }
    }
    net.node
        .run(|| {
            test.get().detach_uplink(net.interfaces.uplink).unwrap();
            test.get().detach_uplink(net.interfaces.uplink).unwrap();
        })
        .unwrap();
    // The kernel frees a link some time after the last reference to it, so the first packets may still be counted.
    let deadline = Instant::now() + SOON;
    let is_counted = || {
        let before = test.count("from_uplink", Reason::ToStack.name());
        taps.wire.send(&to_node(&ip((WIRE_MAC, NODE_MAC), OTHER_NODE[0], NODE[0], 64, L4::Udp(1, 2))));
        std::thread::sleep(NEVER);
        test.count("from_uplink", Reason::ToStack.name()) != before
    };
    while is_counted() {
        assert!(Instant::now() < deadline, "still attached");
    }
}

fn check(test: &TestDatapath, taps: &Taps, case: &Case) {
    let (hook, reason) = (case.hook.name(), case.expect.reason.name());
    let before = test.count(hook, reason);
    match (case.at, case.hook) {
        (At::Pod1, Hook::FromPod) => taps.pod_1.send(&case.frame),
        (At::Pod2, _) => taps.pod_2.send(&case.frame),
        (At::Pod1, _) => taps.node_pod_1.send(&case.frame),
        (At::Uplink, _) => taps.wire.send(&to_node(&case.frame)),
        (At::Tunnel, Hook::ToTunnel) => taps.node_tunnel.send(&case.frame),
        (At::Tunnel, _) => taps.wire.send(&wrap(case)),
    }
    wait_for_count(test, hook, reason, before);
    match case.expect.verdict {
        Verdict::ToPod | Verdict::ToPodQueue => {
            let target = case.expect.target.unwrap();
            let tap = match target {
                1 => &taps.pod_1,
                2 => &taps.pod_2,
                _ => &taps.pod_3,
            };
            let expected = cases::delivered(&case.frame, target);
            let got = tap.receive(SOON, |f| f[..expected.len().min(f.len())] == expected);
            assert!(got.is_some(), "{}: not delivered", case.name);
        }
        Verdict::ToTunnel | Verdict::SetTunnel => {
            let tail = &case.frame[14..];
            let got = taps.wire.receive(SOON, |f| f.ends_with(tail) && f.len() > case.frame.len() + 36);
            let outer = got.unwrap_or_else(|| panic!("{}: nothing on the wire", case.name));
            let end = case.expect.tunnel.unwrap().v4_word().to_ne_bytes();
            assert_eq!(outer[14 + 16..14 + 20], end, "{}: outer destination", case.name);
            assert_eq!(outer[36..38], VXLAN_PORT.to_be_bytes(), "{}: outer port", case.name);
            assert_eq!(outer[42..50], [8, 0, 0, 0, 0, 0, 1, 0], "{}: VXLAN header", case.name);
            assert_eq!(ipv4_checksum(&outer), 0, "{}: outer checksum", case.name);
            let field = |at: usize| usize::from(u16::from_be_bytes([outer[at], outer[at + 1]]));
            assert_eq!(
                (field(14 + 2), field(38)),
                (outer.len() - 14, outer.len() - 34),
                "{}: lengths",
                case.name
            );
            assert_eq!(outer[14 + 12..14 + 16], [172, 18, 1, 1], "{}: outer source", case.name);
            assert_eq!((outer[14 + 8], outer[14 + 9]), (64, 17), "{}: outer TTL, UDP", case.name);
            assert_eq!(outer[50..64], case.frame[..14], "{}: inner Ethernet header", case.name);
        }
        Verdict::ToUplink => {
            let got = taps.wire.receive(SOON, |f| f[14..] == case.frame[14..]);
            let frame = got.unwrap_or_else(|| panic!("{}: nothing on the wire", case.name));
            assert_eq!(frame[..12], [WIRE_MAC, NODE_MAC].concat(), "{}: link-layer addresses", case.name);
        }
        // No case of the table is about services; a packet that is rejected goes nowhere else either.
        Verdict::Drop | Verdict::Reject => {
            let pods = [("pod 1", &taps.pod_1), ("pod 2", &taps.pod_2), ("pod 3", &taps.pod_3)];
            for (name, tap) in pods.into_iter().chain([("wire", &taps.wire)]) {
                let leaked = tap.receive(NEVER / 3, |f| f.ends_with(&case.frame[case.frame.len().min(34)..]));
                assert!(leaked.is_none() || case.frame.len() < 48, "{}: leaked to {name}", case.name);
            }
        }
        Verdict::Pass => {}
    }
}

/// Waits until a packet is counted.
fn wait_for_count(test: &TestDatapath, hook: &str, reason: &str, before: u64) {
    let deadline = Instant::now() + SOON;
    while test.count(hook, reason) == before {
        assert!(Instant::now() < deadline, "{hook}: no {reason}; {:?}", test.get().counters());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The frame addressed to the node's underlay device.
fn to_node(frame: &[u8]) -> Vec<u8> {
    let mut out = frame.to_vec();
    out[..6].copy_from_slice(&NODE_MAC);
    out[6..12].copy_from_slice(&WIRE_MAC);
    out
}

/// A VXLAN packet (RFC 7348 section 5) from the case's outer source to the node, around the case's frame.
fn wrap(case: &Case) -> Vec<u8> {
    let key = case.outer.expect("a tunnelled case has an outer header");
    let outer = key.source.to_string();
    let [_, v0, v1, v2] = key.vni.to_be_bytes();
    let mut vxlan = vec![8, 0, 0, 0, v0, v1, v2, 0];
    vxlan.extend(&case.frame);
    let mut out = Vec::new();
    let node: std::net::Ipv4Addr = NODE[0].parse().unwrap();
    let source: std::net::Ipv4Addr = outer.parse().unwrap();
    etherparse::PacketBuilder::ethernet2(WIRE_MAC, NODE_MAC)
        .ipv4(source.octets(), node.octets(), 64)
        .udp(50_000, VXLAN_PORT)
        .write(&mut out, &vxlan)
        .unwrap();
    out
}

#[test]
fn every_case_on_real_devices() {
    if can_run() {
        run_all("devices", AttachMethod::of_this_kernel());
    }
}

#[test]
fn every_case_with_clsact_filters() {
    if can_run() {
        run_all("clsact", AttachMethod::Clsact);
    }
}

/// The kernel takes an 802.1Q tag out of the bytes before any program runs; the decision still sees it.
#[test]
fn a_tagged_frame_of_a_pod_is_dropped() {
    if !can_run() {
        return;
    }
    let net = Net::new("pwt-tagged");
    let test = TestDatapath::new("tagged", AttachMethod::of_this_kernel());
    test.fill(true, &net.interfaces);
    net.node.run(|| test.get().attach_pod(net.interfaces.pod_1).unwrap()).unwrap();
    let mut frame = ip((POD_1_MAC, HOST_1_MAC), POD_1[0], POD_2[0], 64, L4::Udp(1, 2));
    frame.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    Tap::open(&net.pods[0], "eth0").send(&frame);
    wait_for_count(&test, "from_pod", Reason::Tagged.name(), 0);
}

/// The programs stay when the loader goes, and a successor takes them over without a gap.
#[test]
fn programs_outlive_their_loader() {
    if !can_run() {
        return;
    }
    let net = Net::new("pwt-outlive");
    let mut test = TestDatapath::new("outlive", AttachMethod::of_this_kernel());
    test.fill(true, &net.interfaces);
    let attach = |test: &TestDatapath| {
        net.node
            .run(|| {
                test.get().attach_pod(net.interfaces.pod_1).unwrap();
                test.get().attach_pod(net.interfaces.pod_2).unwrap();
            })
            .unwrap();
    };
    attach(&test);
    let (from, to) = (Tap::open(&net.pods[0], "eth0"), Tap::open(&net.pods[1], "eth0"));
    let frame = ip((POD_1_MAC, HOST_1_MAC), POD_1[0], POD_2[0], 64, L4::Udp(1, 2));
    let expected = cases::delivered(&frame, 2);
    let arrives = || {
        from.send(&frame);
        to.receive(SOON, |f| f == expected).is_some()
    };
    assert!(arrives());
    test.datapath.take();
    assert!(arrives(), "without the loader");
    test.datapath = Some(podway_bpf_host::Datapath::load(&test.pin_dir).unwrap());
    assert!(arrives(), "before the successor attaches");
    attach(&test);
    assert!(arrives(), "under the successor");
    // A device that goes takes its programs along; the other pods' stay.
    let mut netlink = Netlink::open_in(&net.node).unwrap();
    netlink.delete_link(net.interfaces.pod_2).unwrap();
    let before = test.count("from_pod", Reason::Delivered.name());
    assert!(before >= 4);
    from.send(&frame);
    wait_for_count(&test, "from_pod", Reason::Delivered.name(), before);
}

#[test]
fn removed_filters_of_a_pod_are_noticed() {
    if !can_run() {
        return;
    }
    let net = Net::new("pwt-refilter");
    let test = TestDatapath::new("refilter", AttachMethod::of_this_kernel());
    let pod = net.interfaces.pod_1;
    net.node
        .run(|| {
            assert_eq!(test.get().attach_pod(pod).unwrap(), ["from_pod", "to_pod"]);
            assert!(test.get().attach_pod(pod).unwrap().is_empty(), "replaced");
            podway_bpf_host::Datapath::remove_filters(pod);
            assert_eq!(test.get().attach_pod(pod).unwrap(), ["from_pod", "to_pod"]);
            assert!(test.get().attach_pod(pod).unwrap().is_empty(), "replaced");
        })
        .unwrap();
}

#[test]
fn removed_pins_are_noticed() {
    if !can_run() {
        return;
    }
    let net = Net::new("pwt-intact");
    let test = TestDatapath::new("intact", AttachMethod::of_this_kernel());
    let (uplink, tunnel) = (net.interfaces.uplink, net.interfaces.tunnel);
    let intact = || test.get().intact(uplink, Some(tunnel)).unwrap();
    net.node
        .run(|| {
            test.get().attach_uplink(uplink).unwrap();
            test.get().attach_tunnel(tunnel).unwrap();
            assert!(intact());
            // Programs are pinned for devices that this node no longer uses: removed by name.
            test.get().detach_tunnel(tunnel).unwrap();
            assert_eq!(intact(), AttachMethod::of_this_kernel() == AttachMethod::Clsact);
            test.get().attach_tunnel(tunnel).unwrap();
            assert!(intact());
        })
        .unwrap();
    podway_bpf_host::Datapath::remove_all(&test.pin_dir).unwrap();
    assert!(!intact(), "without pins");
    let _other = podway_bpf_host::Datapath::load(&test.pin_dir).unwrap();
    assert!(!intact(), "somebody else's maps are pinned");
}
