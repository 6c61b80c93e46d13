//! What is tested.

use std::io::ErrorKind;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use podway_agent::crash;
use podway_link::probe::{Prober, ProberConfig, Responder, Verdict};
use podway_link::{Netlink, Netns};
use serde_json::json;

use crate::world::{Pod, World, exchange, node_object, wait};

pub(crate) type Scenario = (&'static str, fn());

pub(crate) const ALL: &[Scenario] = &[
    ("every_pair_reaches_every_other", every_pair_reaches_every_other),
    ("every_pair_over_an_ipv6_underlay", every_pair_over_an_ipv6_underlay),
    ("every_pair_by_direct_routing", every_pair_by_direct_routing),
    ("full_size_packets_pass_and_larger_ones_do_not", full_size_packets_pass_and_larger_ones_do_not),
    ("check_tells_what_is_different", check_tells_what_is_different),
    ("a_restart_adopts_everything", a_restart_adopts_everything),
    ("lost_state_is_rebuilt_from_the_kernel", lost_state_is_rebuilt_from_the_kernel),
    ("death_at_each_step_of_add_leaves_nothing", death_at_each_step_of_add_leaves_nothing),
    ("death_at_each_step_of_del_leaves_nothing", death_at_each_step_of_del_leaves_nothing),
    ("many_at_once_leave_nothing", many_at_once_leave_nothing),
    ("gc_removes_what_the_runtime_does_not_know", gc_removes_what_the_runtime_does_not_know),
    ("del_works_without_the_namespace", del_works_without_the_namespace),
    ("one_namespace_is_attached_a_thousand_times", one_namespace_is_attached_a_thousand_times),
    ("not_even_the_first_packet_is_lost", not_even_the_first_packet_is_lost),
    ("what_is_not_ours_is_not_replaced", what_is_not_ours_is_not_replaced),
    ("an_address_that_no_pod_has_is_unreachable", an_address_that_no_pod_has_is_unreachable),
    ("the_node_reaches_its_pods_from_its_own_address", the_node_reaches_its_pods_from_its_own_address),
    ("the_mtu_follows_the_underlay", the_mtu_follows_the_underlay),
    ("a_narrow_path_is_found_and_reported", a_narrow_path_is_found_and_reported),
    (
        "a_wrong_mtu_is_reported_and_its_fragments_are_counted",
        a_wrong_mtu_is_reported_and_its_fragments_are_counted,
    ),
    ("what_leaves_the_cluster_is_masqueraded", what_leaves_the_cluster_is_masqueraded),
    ("flushed_masquerade_rules_are_put_right", flushed_masquerade_rules_are_put_right),
    (
        "without_the_api_server_pods_are_attached_from_memory",
        without_the_api_server_pods_are_attached_from_memory,
    ),
    ("nodes_come_and_go", nodes_come_and_go),
    ("a_range_that_would_cut_nodes_off_is_refused", a_range_that_would_cut_nodes_off_is_refused),
    ("what_somebody_else_changes_is_put_right", what_somebody_else_changes_is_put_right),
    ("removed_pins_end_the_agent_and_a_start_repairs", removed_pins_end_the_agent_and_a_start_repairs),
    ("a_second_add_elsewhere_is_refused", a_second_add_elsewhere_is_refused),
    ("cleanup_leaves_nothing", cleanup_leaves_nothing),
];

fn addresses(node: &crate::world::TestNode, pod: &Pod) -> Vec<IpAddr> {
    node.add(pod).unwrap_or_else(|e| panic!("ADD on {}: {e}", node.name))
}

fn own(number: u8) -> [IpAddr; 2] {
    [format!("172.18.1.{number}").parse().unwrap(), format!("fd00:172:18::{number}").parse().unwrap()]
}

fn every_pair_reaches_every_other() {
    every_pair(&World::ready(), 1450);
}

fn every_pair_over_an_ipv6_underlay() {
    every_pair(&World::ready_with(&["underlay6"]), 1430);
}

fn every_pair_by_direct_routing() {
    every_pair(&World::ready_with(&["direct"]), 1500);
}

fn every_pair(world: &World, mtu: u32) {
    let [n1, n2] = world.nodes.as_slice() else { unreachable!() };
    let pods = [(n1, world.pod("a")), (n1, world.pod("b")), (n2, world.pod("c"))];
    let attached: Vec<Vec<IpAddr>> = pods.iter().map(|(node, pod)| addresses(node, pod)).collect();
    assert_eq!(attached[0][0].to_string(), "10.244.1.1");
    assert_eq!(attached[2][1].to_string(), "fd00:10:244:2::1");
    let mut ends: Vec<(String, &Netns, &[IpAddr])> = Vec::new();
    for ((_, pod), ips) in pods.iter().zip(&attached) {
        ends.push((format!("pod {}", pod.name), &pod.ns, ips));
    }
    let (own1, own2) = (own(1), own(2));
    ends.push(("node n1".into(), &n1.ns, &own1));
    ends.push(("node n2".into(), &n2.ns, &own2));
    let mut failures = Vec::new();
    for (from_name, from, from_ips) in &ends {
        for (to_name, to, to_ips) in &ends {
            for family in 0..2 {
                if let Err(error) = exchange((from, from_ips[family]), (to, to_ips[family])) {
                    failures.push(format!("{from_name} -> {to_name}: {error}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(mtus(&pods[0].1), mtu);
    for (from, to) in attached[0].iter().zip(&attached[2]) {
        let (from, to) = ((&pods[0].1.ns, *from), (&pods[2].1.ns, *to));
        let size = u16::try_from(mtu).unwrap();
        assert_eq!(proven(from, to, size), Verdict::Proven { mtu: size });
    }
    assert_eq!(n1.metric("podway_ip_fragments_created_total"), 0.0);
    println!("  resident: {:.1} MB", n1.metric("podway_resident_memory_bytes") / 1e6);
}

/// Which of the sizes reaches pod `to` from pod `from` with don't-fragment set.
fn proven(from: (&Netns, IpAddr), to: (&Netns, IpAddr), size: u16) -> Verdict {
    let port = 9000;
    let mut responder = to.0.run(|| Responder::bind(&[to.1], port)).unwrap().unwrap();
    let config = ProberConfig { port, ..ProberConfig::default() };
    let mut prober = from.0.run(|| Prober::bind(&[from.1], config)).unwrap().unwrap();
    prober.set_peers(&[(to.1, size)].into()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        for report in prober.run(Duration::from_millis(20)).unwrap() {
            if !matches!(report.now, Verdict::Unknown) {
                return report.now;
            }
        }
        responder.serve(Duration::from_millis(5)).unwrap();
    }
    Verdict::Unknown
}

fn full_size_packets_pass_and_larger_ones_do_not() {
    let world = World::ready();
    let [n1, n2] = world.nodes.as_slice() else { unreachable!() };
    let (a, c) = (world.pod("a"), world.pod("c"));
    let (from, to) = (addresses(n1, &a), addresses(n2, &c));
    for family in 0..2 {
        let (from, to) = ((&a.ns, from[family]), (&c.ns, to[family]));
        assert_eq!(proven(from, to, 1450), Verdict::Proven { mtu: 1450 });
        assert_eq!(proven(from, to, 1451), Verdict::Narrow { expected: 1451, found: 1450 });
    }
    assert_eq!(n1.metric("podway_ip_fragments_created_total"), 0.0);
    assert_eq!(n2.metric("podway_ip_fragments_created_total"), 0.0);
    assert_eq!(n1.metric("podway_pod_mtu_bytes"), 1450.0);
}

fn check_tells_what_is_different() {
    let world = World::ready();
    let node = &world.nodes[0];
    let pod = world.pod("a");
    assert_eq!(node.check(&pod).unwrap_err().code, podway_cni::code::UNKNOWN_CONTAINER);
    let ips = addresses(node, &pod);
    node.check(&pod).unwrap();
    let mut inside = Netlink::open_in(&pod.ns).unwrap();
    let eth0 = inside.link_by_name("eth0").unwrap().unwrap().index;
    inside.delete_address(eth0, ipnet::IpNet::from(ips[0])).unwrap();
    let error = node.check(&pod).unwrap_err();
    assert!(error.msg.contains("lost address 10.244.1.1"), "{error}");
    inside.delete_link(eth0).unwrap();
    assert!(node.check(&pod).is_err());
    node.del("a").unwrap();
    node.assert_empty();
}

fn a_restart_adopts_everything() {
    let mut world = World::ready();
    let (a, c) = (world.pod("a"), world.pod("c"));
    let (from, to) = (addresses(&world.nodes[0], &a), addresses(&world.nodes[1], &c));
    let pair = |family: usize| ((&a.ns, from[family]), (&c.ns, to[family]));
    world.nodes[0].kill();
    world.nodes[1].kill();
    for family in 0..2 {
        let (a, c) = pair(family);
        exchange(a, c).expect("traffic goes on without agents");
    }
    for node in &mut world.nodes {
        node.start(&[], &[]);
    }
    // While it starts, too.
    let deadline = Instant::now() + Duration::from_secs(3);
    while Instant::now() < deadline {
        let (a, c) = pair(0);
        exchange(a, c).expect("traffic goes on while the agents start");
    }
    for node in &world.nodes {
        node.wait_ready();
    }
    let node = &mut world.nodes[0];
    node.check(&a).unwrap();
    let again = world_pod_after_restart(node);
    assert_eq!(again.to_string(), "10.244.1.2", "the address of the running pod is known");
    node.del("a").unwrap();
    node.del("after").unwrap();
    node.assert_empty();
    assert!(node.terminate(), "SIGTERM ends it in order");
    assert!(!node.socket().exists());
}

fn world_pod_after_restart(node: &crate::world::TestNode) -> IpAddr {
    let name = format!("{}-pod-after", crate::world::PREFIX);
    let pod = Pod { name: "after".into(), ns: Netns::create_named(&name).unwrap() };
    addresses(node, &pod)[0]
}

fn lost_state_is_rebuilt_from_the_kernel() {
    let mut world = World::ready();
    let pods: Vec<Pod> = (0..3).map(|n| world.pod(&format!("p{n}"))).collect();
    let before: Vec<Vec<IpAddr>> = pods.iter().map(|p| addresses(&world.nodes[0], p)).collect();
    let other = world.pod("c");
    let to = addresses(&world.nodes[1], &other);
    for damage in ["journal", "pins"] {
        let node = &mut world.nodes[0];
        node.kill();
        match damage {
            "journal" => std::fs::remove_file(node.instance.run_dir().join("leases")).unwrap(),
            _ => {
                podway_bpf_host::Datapath::remove_all(&node.instance.pin_dir()).unwrap();
            }
        }
        node.start(&[], &[]);
        node.wait_ready();
        let next = world.pod("next");
        let node = &world.nodes[0];
        let fresh = addresses(node, &next);
        assert!(!before.iter().any(|b| b.contains(&fresh[0])), "{damage}: {fresh:?} is in use");
        node.del("next").unwrap();
        for (pod, ips) in pods.iter().zip(&before) {
            node.check(pod).unwrap_or_else(|e| panic!("{damage}: {e}"));
            for family in 0..2 {
                exchange((&pod.ns, ips[family]), (&other.ns, to[family]))
                    .unwrap_or_else(|e| panic!("{damage}: {e}"));
            }
        }
    }
    for pod in &pods {
        world.nodes[0].del(&pod.name).unwrap();
    }
    world.nodes[0].assert_empty();
}

fn death_at_each_step_of_add_leaves_nothing() {
    let mut world = World::ready();
    for (n, step) in crash::STEPS.iter().filter(|s| s.starts_with("add.")).enumerate() {
        let pod = world.pod(&format!("a{n}"));
        let node = &mut world.nodes[0];
        node.kill();
        node.start(&[(crash::VARIABLE, step)], &[]);
        node.wait_ready();
        assert!(node.add(&pod).is_err(), "{step}");
        wait(&format!("death at {step}"), 10, || node.has_died());
        node.start(&[], &[]);
        node.wait_ready();
        // Half of the runtimes' ways out each: DEL, or GC later on.
        if n % 2 == 0 {
            node.del(&pod.name).unwrap_or_else(|e| panic!("{step}: {e}"));
        } else {
            node.gc(&[]).unwrap_or_else(|e| panic!("{step}: {e}"));
        }
        node.assert_empty();
        // The same container may be attached after all.
        node.add(&pod).unwrap_or_else(|e| panic!("{step}, again: {e}"));
        node.del(&pod.name).unwrap();
        node.assert_empty();
    }
}

fn death_at_each_step_of_del_leaves_nothing() {
    let mut world = World::ready();
    for (n, step) in crash::STEPS.iter().filter(|s| s.starts_with("del.")).enumerate() {
        let pod = world.pod(&format!("d{n}"));
        let node = &mut world.nodes[0];
        node.kill();
        node.start(&[(crash::VARIABLE, step)], &[]);
        node.wait_ready();
        addresses(node, &pod);
        node.del(&pod.name).ok();
        wait(&format!("death at {step}"), 10, || node.has_died());
        node.start(&[], &[]);
        node.wait_ready();
        // The runtime had no answer, and asks again.
        node.del(&pod.name).unwrap_or_else(|e| panic!("{step}: {e}"));
        node.assert_empty();
    }
}

fn many_at_once_leave_nothing() {
    let world = World::ready();
    let node = &world.nodes[0];
    give_room(&world);
    let pods: Vec<Pod> = (0..50).map(|n| world.pod(&format!("m{n}"))).collect();
    let begun = Instant::now();
    let mut ips: Vec<IpAddr> = std::thread::scope(|scope| {
        let threads: Vec<_> = pods.iter().map(|pod| scope.spawn(|| addresses(node, pod))).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    println!("  50 ADDs at once: {:?}", begun.elapsed());
    ips.sort_unstable();
    ips.dedup();
    assert_eq!(ips.len(), 100, "every pod has two addresses of its own");
    assert_eq!(node.metric("podway_pods "), 50.0);
    println!("  resident with 50 pods: {:.1} MB", node.metric("podway_resident_memory_bytes") / 1e6);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| node.del(&pod.name).unwrap());
        }
    });
    println!("  50 DELs at once: {:?}", begun.elapsed());
    node.assert_empty();
    println!("  … and nothing left: {:?}", begun.elapsed());
    // One after the other, as pods come and go on a node.
    let (mut adds, mut dels) = (Vec::new(), Vec::new());
    for pod in pods.iter().cycle().take(1000) {
        let begun = Instant::now();
        addresses(node, pod);
        adds.push(begun.elapsed());
        let begun = Instant::now();
        node.del(&pod.name).unwrap();
        dels.push(begun.elapsed());
    }
    print_times("ADD", adds);
    print_times("DEL", dels);
    node.assert_empty();
}

/// A freed address rests for 30 s, so a /24 would be used up within a few.
fn give_room(world: &World) {
    let mut large = node_object(1);
    large["spec"] = json!({"podCIDRs": ["10.244.16.0/20", "fd00:10:244:1::/64"]});
    world.put_node(&large);
    let node = &world.nodes[0];
    wait("the large range", 5, || node.http("/metrics").1.contains("10.244.16.0/20"));
}

fn print_times(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |per_mille: usize| times[times.len() * per_mille / 1000 - 1];
    println!("  {what}: p50 {:?}, p99 {:?}, longest {:?}", at(500), at(990), at(1000));
}

fn gc_removes_what_the_runtime_does_not_know() {
    let world = World::ready();
    let node = &world.nodes[0];
    let pods: Vec<Pod> = (0..4).map(|n| world.pod(&format!("g{n}"))).collect();
    for pod in &pods {
        addresses(node, pod);
    }
    node.gc(&["g1", "g3", "unheard-of"]).unwrap();
    wait("two links", 10, || node.pod_links().len() == 2);
    node.check(&pods[1]).unwrap();
    node.check(&pods[3]).unwrap();
    assert!(node.check(&pods[0]).is_err());
    node.gc(&[]).unwrap();
    node.assert_empty();
}

fn del_works_without_the_namespace() {
    let world = World::ready();
    let node = &world.nodes[0];
    let pod = world.pod("a");
    addresses(node, &pod);
    drop(pod);
    wait("the link to go with the namespace", 10, || node.pod_links().is_empty());
    wait("the pod to leave the datapath", 10, || {
        node.metric("podway_table_entries{table=\"sources\"}") == 0.0
    });
    assert_eq!(node.metric("podway_pods "), 1.0, "its addresses are held until the runtime says so");
    node.del("a").unwrap();
    node.assert_empty();
    node.del("a").unwrap();
    node.del("never-there").unwrap();
}

fn one_namespace_is_attached_a_thousand_times() {
    let world = World::ready();
    let node = &world.nodes[0];
    give_room(&world);
    let pod = world.pod("a");
    let (mut adds, mut dels) = (Vec::new(), Vec::new());
    for n in 0..1000 {
        // Another container each time, which is another link, and now and then the same again.
        let container = format!("cycle{}", n - n % 10 / 9);
        let begun = Instant::now();
        node.add_as(&container, &pod).unwrap_or_else(|e| panic!("ADD {n}: {e}"));
        adds.push(begun.elapsed());
        let begun = Instant::now();
        node.del(&container).unwrap();
        dels.push(begun.elapsed());
    }
    print_times("ADD", adds);
    print_times("DEL", dels);
    node.assert_empty();
    let links = Netlink::open_in(&pod.ns).unwrap().links().unwrap();
    assert_eq!(links.len(), 1, "{links:?}");
}

fn not_even_the_first_packet_is_lost() {
    let world = World::ready();
    let node = &world.nodes[0];
    let bind = |ns: &Netns, ip: IpAddr| {
        let socket = ns.run(|| UdpSocket::bind((ip, 0))).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket
    };
    for n in 0..60 {
        let pod = world.pod(&format!("first{n}"));
        let ips = addresses(node, &pod);
        // Alternating: the one that sends first tells about its side of the link.
        let family = n / 2 % 2;
        let ends = [(&pod.ns, ips[family]), (&node.ns, own(1)[family])];
        let (first, second) = (ends[n % 2], ends[1 - n % 2]);
        let (from, to) = (bind(first.0, first.1), bind(second.0, second.1));
        from.send_to(b"first", to.local_addr().unwrap()).unwrap();
        let (_, peer) =
            to.recv_from(&mut [0; 16]).unwrap_or_else(|e| panic!("pod {n}, to {}, there: {e}", second.1));
        to.send_to(b"answer", peer).unwrap();
        from.recv(&mut [0; 16]).unwrap_or_else(|e| panic!("pod {n}, from {}, back: {e}", second.1));
        node.del(&pod.name).unwrap();
    }
    node.assert_empty();
}

fn what_is_not_ours_is_not_replaced() {
    let world = World::ready();
    let node = &world.nodes[0];
    let (taken, pod) = (world.pod("taken"), world.pod("a"));
    // Of another plugin, between the same two namespaces.
    let foreign = podway_link::VethSpec {
        name: "other0".into(),
        peer_name: "eth0".into(),
        peer_ns: Some(&taken.ns),
        ..podway_link::VethSpec::default()
    };
    let mut netlink = Netlink::open_in(&node.ns).unwrap();
    netlink.create_veth(&foreign).unwrap();
    let error = node.add(&taken).unwrap_err();
    assert!(error.details.contains("interface eth0 already, and it is not Podway's"), "{error}");
    assert!(netlink.link_by_name("other0").unwrap().is_some());
    // Of another container that is attached still.
    node.add_as("first", &pod).unwrap();
    let error = node.add_as("second", &pod).unwrap_err();
    assert!(error.details.contains("belongs to attachment first/eth0"), "{error}");
    assert_eq!(node.pod_links().len(), 1);
    node.del("first").unwrap();
    node.add_as("second", &pod).unwrap();
    node.del("second").unwrap();
    node.assert_empty();
}

fn an_address_that_no_pod_has_is_unreachable() {
    let world = World::ready();
    let node = &world.nodes[0];
    let mut netlink = Netlink::open_in(&node.ns).unwrap();
    let eth0 = netlink.link_by_name("eth0").unwrap().unwrap().index;
    for (dst, via) in [("0.0.0.0/0", "172.18.0.1"), ("::/0", "fd00:172:18::2")] {
        let route = podway_link::Route {
            dst: dst.parse().unwrap(),
            via: Some(via.parse().unwrap()),
            dev: eth0,
            src: None,
            mtu: None,
            scope_link: false,
            onlink: false,
            protocol: 4,
        };
        netlink.replace_route(&route).unwrap();
    }
    let pod = world.pod("a");
    let ips = addresses(node, &pod);
    for (ip, nobody) in ips.iter().zip(["10.244.1.99:9", "[fd00:10:244:1::99]:9"]) {
        let socket = pod.ns.run(|| UdpSocket::bind((*ip, 0))).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        // Without these, UDP keeps to itself what may pass.
        match ip {
            IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap(),
            IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true).unwrap(),
        }
        socket.connect(nobody).unwrap();
        let begun = Instant::now();
        socket.send(b"anybody?").unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        let unreachable = [ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable];
        assert!(unreachable.contains(&error.kind()), "{nobody}: {error}");
        assert!(begun.elapsed() < Duration::from_millis(500), "{nobody}: {:?}", begun.elapsed());
    }
    // The range changes, and the refusal with it; what is attached keeps its address.
    let mut moved = node_object(1);
    moved["spec"] = json!({"podCIDRs": ["10.244.55.0/24", "fd00:10:244:1::/64"]});
    world.put_node(&moved);
    let want = ["10.244.55.0/24", "fd00:10:244:1::/64"].map(|t| t.parse().unwrap());
    wait("the new range to be refused", 5, || netlink.unreachable_routes(80).unwrap() == want);
    assert!(netlink.route_to(ips[0]).unwrap().is_some_and(|to| to.dev != eth0));
}

fn the_node_reaches_its_pods_from_its_own_address() {
    let world = World::ready();
    let node = &world.nodes[0];
    let mut netlink = Netlink::open_in(&node.ns).unwrap();
    // What the kernel could choose as well: an address of a link with a lower index, and link-local ones.
    for address in ["10.9.9.9/32", "fd00:9::9/128"] {
        netlink.add_address(1, address.parse().unwrap(), podway_link::AddressFlags::default()).unwrap();
    }
    let pod = world.pod("a");
    let ips = addresses(node, &pod);
    let source = |family: usize| {
        let any = ["0.0.0.0:0", "[::]:0"][family];
        let socket = node.ns.run(|| UdpSocket::bind(any)).unwrap().unwrap();
        socket.connect((ips[family], 9)).map(|()| socket.local_addr().unwrap().ip())
    };
    for family in 0..2 {
        assert_eq!(source(family).unwrap(), own(1)[family]);
    }
    // The kernel deletes IPv4 routes along with the address that is their source.
    let eth0 = netlink.link_by_name("eth0").unwrap().unwrap().index;
    let nodad = podway_link::AddressFlags { nodad: true, ..Default::default() };
    for address in ["172.18.1.1/16", "fd00:172:18::1/64"] {
        let address = address.parse().unwrap();
        assert!(netlink.delete_address(eth0, address).unwrap());
        std::thread::sleep(Duration::from_millis(200));
        netlink.add_address(eth0, address, nodad).unwrap();
    }
    for (family, (own, ip)) in own(1).into_iter().zip(&ips).enumerate() {
        wait("the route and its source", 5, || source(family).is_ok_and(|ip| ip == own));
        exchange((&node.ns, own), (&pod.ns, *ip)).unwrap();
    }
}

/// The MTU of a pod's link, once that of its default routes is the same.
fn mtus(pod: &Pod) -> u32 {
    let mut inside = Netlink::open_in(&pod.ns).unwrap();
    let link = inside.link_by_name("eth0").unwrap().unwrap();
    let routes = inside.routes(podway_link::RouteFilter::default()).unwrap();
    let defaults: Vec<Option<u32>> =
        routes.iter().filter(|r| r.dst.prefix_len() == 0).map(|r| r.mtu).collect();
    if defaults == [Some(link.mtu); 2] { link.mtu } else { 0 }
}

fn the_mtu_follows_the_underlay() {
    let world = World::ready();
    let node = &world.nodes[0];
    let pod = world.pod("a");
    addresses(node, &pod);
    assert_eq!(mtus(&pod), 1450);
    let mut netlink = Netlink::open_in(&node.ns).unwrap();
    let eth0 = netlink.link_by_name("eth0").unwrap().unwrap().index;
    for (uplink, pods) in [(1400, 1350), (9000, 8950)] {
        netlink.set_mtu(eth0, uplink).unwrap();
        wait(&format!("pod MTU {pods}"), 5, || mtus(&pod) == pods);
        let host = node.pod_links()[0].clone();
        wait("the other sides", 5, || {
            let mut mtu = |name: &str| netlink.link_by_name(name).unwrap().unwrap().mtu;
            mtu(&host) == pods && mtu("podway_vxlan") == pods
        });
        let new = world.pod("new");
        addresses(node, &new);
        assert_eq!(mtus(&new), pods);
        node.del("new").unwrap();
    }
}

fn a_narrow_path_is_found_and_reported() {
    let world = World::ready();
    let node = &world.nodes[0];
    wait("the path to be proven", 10, || {
        node.http("/metrics").1.contains("podway_path_mtu_narrow{node=\"n2\"} 0")
    });
    world.set_port_mtu(2, 1400);
    let begun = Instant::now();
    let reported = || world.events().into_iter().find(|e| e.starts_with("PathMTUNarrow: n1 -> n2"));
    wait("the event", 10, || reported().is_some());
    println!("  found after {:.1} s", begun.elapsed().as_secs_f64());
    let event = reported().unwrap();
    assert!(event.contains("at most 1400 bytes, expected 1500"), "{event}");
    assert_eq!(node.metric("podway_path_mtu_narrow{node=\"n2\"}"), 1.0);
    assert_eq!(node.metric("podway_path_mtu_bytes{node=\"n2\"}"), 1400.0);
    world.set_port_mtu(2, 1500);
    wait("the end of it", 15, || world.events().iter().any(|e| e.starts_with("PathMTUHealed: n1 -> n2")));
}

fn a_wrong_mtu_is_reported_and_its_fragments_are_counted() {
    let world = World::ready_with(&["mtu=1500"]);
    let (a, c) = (world.pod("a"), world.pod("c"));
    let (from, to) = (addresses(&world.nodes[0], &a), addresses(&world.nodes[1], &c));
    assert_eq!(mtus(&a), 1500);
    let reported =
        |text: &str| world.events().iter().any(|e| e.starts_with("PodMTUTooLarge: ") && e.contains(text));
    wait("the event", 10, || reported("pod MTU 1500 is set by hand"));
    let node = &world.nodes[0];
    assert_eq!(node.metric("podway_pod_mtu_fitting_bytes"), 1450.0);
    // The packets of the incident: they fit the pod's link, and not the way to the other node.
    let sender = a.ns.run(|| UdpSocket::bind((from[0], 0))).unwrap().unwrap();
    for _ in 0..10 {
        sender.send_to(&[0; 1472], (to[0], 9)).unwrap();
    }
    assert!(node.metric("podway_ip_fragments_created_total") >= 20.0);
    wait("the event to count them", 30, || reported("IP fragments were made on this node"));
}

fn what_leaves_the_cluster_is_masqueraded() {
    let world = World::ready();
    let node = &world.nodes[0];
    let pod = world.pod("a");
    let ips = addresses(node, &pod);
    let outside: IpAddr = "172.18.0.1".parse().unwrap();
    let error = exchange((&pod.ns, ips[0]), (&world.fabric, outside)).unwrap_err();
    assert_eq!(error, "10.244.1.1 was seen as 172.18.1.1");
    // To a node that is none of the cluster's business a moment ago, and then is: its own address.
    let mut third = node_object(3);
    third["status"] = json!({"addresses": [{"type": "InternalIP", "address": "172.18.0.1"}]});
    third["spec"] = json!({});
    world.put_node(&third);
    wait("the node to be known", 5, || node.metric("podway_nodes") == 3.0);
    let seen = || exchange((&pod.ns, ips[0]), (&world.fabric, outside)).unwrap_err();
    wait("the pod's own source", 5, || !seen().contains("was seen as"));
}

fn flushed_masquerade_rules_are_put_right() {
    let world = World::new();
    let rules = podway_agent::masquerade::Rules {
        from: vec!["10.244.1.0/24".parse().unwrap(), "fd00:10:244:1::/64".parse().unwrap()],
        not_to: vec!["10.244.0.0/16".parse().unwrap(), "fd00::/16".parse().unwrap()],
        tunnel_port: Some(8472),
    };
    world.nodes[0]
        .ns
        .run(|| {
            let mut masquerade = podway_agent::masquerade::Masquerade::default();
            assert!(masquerade.apply(&rules).unwrap());
            assert!(!masquerade.apply(&rules).unwrap(), "written once");
            assert!(!masquerade.audit().unwrap(), "nothing to put right");
            for damage in
                [["flush", "ruleset"].as_slice(), &["flush", "chain", "inet", "podway", "postrouting"]]
            {
                assert!(std::process::Command::new("nft").args(damage).status().unwrap().success());
                assert!(masquerade.audit().unwrap(), "{damage:?}");
                assert!(!masquerade.audit().unwrap(), "{damage:?}");
            }
            assert!(podway_agent::masquerade::remove().unwrap());
            assert!(!podway_agent::masquerade::remove().unwrap());
        })
        .unwrap();
}

fn without_the_api_server_pods_are_attached_from_memory() {
    let mut world = World::ready();
    let (a, c) = (world.pod("a"), world.pod("c"));
    addresses(&world.nodes[0], &a);
    let to = addresses(&world.nodes[1], &c);
    world.stop_api();
    world.nodes[0].restart();
    let b = world.pod("b");
    let ips = addresses(&world.nodes[0], &b);
    for family in 0..2 {
        exchange((&b.ns, ips[family]), (&c.ns, to[family])).expect("peers of the earlier agent are in force");
    }
    let node = &world.nodes[0];
    wait("readyz to tell", 20, || {
        let (code, text) = node.http("/readyz");
        code == 200 && text.contains("[-] api: away") && text.contains("from what is remembered")
    });
    assert_eq!(node.metric("podway_api_connected"), 0.0);
    // Without memory, nothing is attached, and the reason is told.
    world.nodes[0].kill();
    std::fs::remove_file(world.nodes[0].instance.run_dir().join("node.json")).unwrap();
    world.nodes[0].start(&[], &[]);
    let d = world.pod("d");
    wait("the socket", 10, || world.nodes[0].socket().exists());
    let error = world.nodes[0].add(&d).unwrap_err();
    assert_eq!(error.code, podway_cni::code::TRY_AGAIN, "{error}");
    world.start_api();
    world.nodes[0].wait_ready();
    addresses(&world.nodes[0], &d);
    wait("the API server", 20, || world.nodes[0].metric("podway_api_connected") == 1.0);
}

fn nodes_come_and_go() {
    let world = World::ready();
    let node = &world.nodes[0];
    let peers = |node: &crate::world::TestNode| node.metric("podway_peers");
    assert_eq!(peers(node), 8.0);
    // A malformed one and one that overlaps cost themselves only.
    let mut broken = node_object(9);
    broken["spec"] = json!({"podCIDRs": ["10.244.9.0"]});
    world.put_node(&broken);
    let mut greedy = node_object(8);
    greedy["spec"] = json!({"podCIDRs": ["10.244.0.0/16"]});
    world.put_node(&greedy);
    world.put_node(&node_object(3));
    wait("node n3", 5, || peers(node) == 8.0 + 2.0 + 4.0);
    let (code, text) = node.http("/readyz");
    assert!(code == 200 && text.contains("2 refused"), "{text}");
    let routes = || {
        let filter = podway_link::RouteFilter { protocol: Some(80), ..Default::default() };
        Netlink::open_in(&node.ns).unwrap().routes(filter).unwrap().len()
    };
    wait("four routes", 5, || routes() == 4);
    for name in ["n3", "n8", "n9"] {
        world.delete_node(name);
    }
    wait("nothing but the two nodes", 5, || peers(node) == 8.0 && routes() == 2);
    // A node loses its range to an older one: nothing is attached there, and the reason is told.
    let node = &world.nodes[1];
    let mut mine = node_object(2);
    mine["spec"] = json!({"podCIDRs": ["10.244.1.0/25"]});
    world.put_node(&mine);
    wait("the refusal", 5, || world.events().iter().any(|e| e.starts_with("PodCIDROverlap: Node n2")));
    let pod = world.pod("a");
    // The event is written a moment before the range is out of use.
    wait("the reason", 5, || match node.add(&pod) {
        Ok(_) => node.del("a").is_err(),
        Err(error) => error.details.contains("is refused: Node n2"),
    });
    // … and gets a range so small that it is full at once.
    let mut small = node_object(2);
    small["spec"] = json!({"podCIDRs": ["10.244.77.0/30"]});
    world.put_node(&small);
    node.wait_ready();
    let pods: Vec<Pod> = (0..3).map(|n| world.pod(&format!("s{n}"))).collect();
    addresses(node, &pods[0]);
    addresses(node, &pods[1]);
    let error = node.add(&pods[2]).unwrap_err();
    assert!(error.details.contains("10.244.77.0/30: 2 of 2 in use"), "{error}");
    wait("the event", 5, || world.events().iter().any(|e| e.starts_with("AddressesExhausted: ")));
}

fn a_range_that_would_cut_nodes_off_is_refused() {
    let world = World::ready();
    let [n1, n2] = world.nodes.as_slice() else { unreachable!() };
    let routes = |node: &crate::world::TestNode| -> Vec<String> {
        let filter = podway_link::RouteFilter { protocol: Some(80), ..Default::default() };
        let found = Netlink::open_in(&node.ns).unwrap().routes(filter).unwrap();
        found.iter().map(|r| r.dst.to_string()).collect()
    };
    assert_eq!(routes(n1), ["10.244.2.0/24", "fd00:10:244:2::/64"]);
    // Holds the API server and no node's address; n2 is what the incident was made of, n3 is not even there.
    for (number, name) in [(2, "n2"), (3, "n3")] {
        let mut object = node_object(number);
        object["spec"] = json!({"podCIDRs": ["172.18.0.0/24", format!("fd00:10:244:{number}::/64")]});
        object["metadata"]["creationTimestamp"] = json!("2001-01-01T00:00:00Z");
        world.put_node(&object);
        let want =
            format!("{name}: spec.podCIDRs[0]: 172.18.0.0/24 overlaps the underlay 172.18.0.0/16 (eth0)");
        for node in [n1, n2] {
            wait("the refusal", 5, || {
                node.http("/readyz").1.contains(if number == 2 { want.as_str() } else { "2 refused" })
            });
            let found = routes(node);
            assert!(!found.iter().any(|r| r.starts_with("172.")), "{}: {found:?}", node.name);
        }
        if name == "n2" {
            wait("its old route to go, and the other family to stay", 5, || {
                routes(n1) == ["fd00:10:244:2::/64"]
            });
            wait("the event", 5, || {
                world.events().iter().any(|e| e.contains("PodCIDROverlap") && e.contains(&want))
            });
        }
    }
    // The API server still has the way to correct it. A syntax error is told as what it is.
    let mut broken = node_object(2);
    broken["spec"] = json!({"podCIDRs": ["10.244.2.0"]});
    world.put_node(&broken);
    wait("the event", 5, || world.events().iter().any(|e| e.starts_with("InvalidPodCIDR: Node n2")));
    world.put_node(&node_object(2));
    world.delete_node("n3");
    wait("the routes", 5, || routes(n1) == ["10.244.2.0/24", "fd00:10:244:2::/64"]);
    // What is reserved follows the addresses of the machine.
    let mut netlink = Netlink::open_in(&n1.ns).unwrap();
    let eth0 = netlink.link_by_name("eth0").unwrap().unwrap().index;
    netlink.add_address(eth0, "10.244.2.250/30".parse().unwrap(), Default::default()).unwrap();
    wait("the route to go", 5, || routes(n1) == ["fd00:10:244:2::/64"]);
    netlink.delete_address(eth0, "10.244.2.250/30".parse().unwrap()).unwrap();
    wait("the route to come back", 5, || routes(n1) == ["10.244.2.0/24", "fd00:10:244:2::/64"]);
}

fn what_somebody_else_changes_is_put_right() {
    let mut world = World::ready();
    let (a, c) = (world.pod("a"), world.pod("c"));
    let (from, to) = (addresses(&world.nodes[0], &a), addresses(&world.nodes[1], &c));
    let ns = Netns::open_named(&format!("{}-n1", crate::world::PREFIX)).unwrap();
    let mut netlink = Netlink::open_in(&ns).unwrap();
    let link = netlink.link_by_name(&world.nodes[0].pod_links()[0]).unwrap().unwrap();
    let vxlan = |netlink: &mut Netlink| netlink.link_by_name("podway_vxlan").unwrap().map(|l| l.index);
    let run = |command: &str| {
        let words: Vec<String> = command.split(' ').map(str::to_owned).collect();
        let status =
            ns.run(move || std::process::Command::new(&words[0]).args(&words[1..]).status()).unwrap();
        assert!(status.unwrap().success(), "{command}");
    };
    let name = link.name.as_str();
    // What is done, the metric's label, how long it may take.
    let damages = [
        (format!("ip -4 route del {} dev {name}", from[0]), "pod_route", 5),
        (format!("ip -6 route del {} dev {name}", from[1]), "pod_route", 5),
        (format!("ip link set {name} down"), "pod_link", 5),
        (format!("ip -6 addr del fe80::1/64 dev {name}"), "pod_gateway", 5),
        (format!("ip neigh del {} dev {name}", from[0]), "pod_neighbour", 15),
        (format!("ip link set {name} alias nobody"), "pod_alias", 5),
        ("ip -4 route del 10.244.2.0/24".into(), "route", 15),
        ("ip -4 route del unreachable 10.244.1.0/24".into(), "route", 15),
        ("ip addr del 169.254.1.1/32 dev lo".into(), "gateway", 5),
        ("sysctl -qw net.ipv4.ip_forward=0".into(), "forwarding", 15),
        ("ip link set podway_vxlan down".into(), "tunnel", 5),
        ("ip link del podway_vxlan".into(), "tunnel", 5),
        (format!("tc qdisc del dev {name} clsact"), "pod_programs", 20),
    ];
    let pins = |node: &crate::world::TestNode| {
        std::fs::read_dir(node.instance.pin_dir().join("links")).unwrap().count()
    };
    let before = pins(&world.nodes[0]);
    for (damage, what, seconds) in &damages {
        let node = &world.nodes[0];
        let counted = || {
            let begin = format!("podway_repairs_total{{what=\"{what}\"}} ");
            let text = node.http("/metrics").1;
            text.lines().find_map(|l| l.strip_prefix(&begin)?.parse::<f64>().ok()).unwrap_or(0.0)
        };
        let earlier = counted();
        run(damage);
        wait(&format!("the repair after {damage:?}"), *seconds, || counted() > earlier);
        for family in 0..2 {
            wait("both ways", 5, || exchange((&a.ns, from[family]), (&c.ns, to[family])).is_ok());
            wait("the node's way", 5, || exchange((&ns, own(1)[family]), (&a.ns, from[family])).is_ok());
        }
        node.check(&a).unwrap_or_else(|e| panic!("{damage}: {e}"));
    }
    assert!(vxlan(&mut netlink).is_some());
    assert_eq!(pins(&world.nodes[0]), before, "the pins of the deleted tunnel are gone");
    // A start puts right what happened while no agent was there.
    world.nodes[0].kill();
    for (damage, ..) in &damages[..5] {
        run(damage);
        if damage.ends_with("down") {
            // Takes everything else along.
            break;
        }
    }
    world.nodes[0].start(&[], &[]);
    world.nodes[0].wait_ready();
    for family in 0..2 {
        wait("both ways", 5, || exchange((&a.ns, from[family]), (&c.ns, to[family])).is_ok());
        wait("the node's way", 5, || exchange((&ns, own(1)[family]), (&a.ns, from[family])).is_ok());
    }
    // Nothing is repaired that is not broken.
    let sum = || {
        let text = world.nodes[0].http("/metrics").1;
        let lines = text.lines().filter(|l| l.starts_with("podway_repairs_total{"));
        lines.map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
    };
    let settled = sum();
    let pods: Vec<Pod> = (0..8).map(|n| world.pod(&format!("r{n}"))).collect();
    // While pods come and go, for some looks of the agent.
    for _ in 0..20 {
        for pod in &pods {
            addresses(&world.nodes[0], pod);
        }
        std::thread::sleep(Duration::from_millis(150));
        for pod in &pods {
            world.nodes[0].del(&pod.name).unwrap();
        }
    }
    assert_eq!(sum(), settled);
}

fn removed_pins_end_the_agent_and_a_start_repairs() {
    let mut world = World::ready();
    let (a, c) = (world.pod("a"), world.pod("c"));
    let (from, to) = (addresses(&world.nodes[0], &a), addresses(&world.nodes[1], &c));
    std::fs::remove_dir_all(world.nodes[0].instance.pin_dir()).unwrap();
    wait("the agent to end", 10, || world.nodes[0].has_died());
    world.nodes[0].start(&[], &[]);
    world.nodes[0].wait_ready();
    for family in 0..2 {
        wait("both ways", 5, || exchange((&a.ns, from[family]), (&c.ns, to[family])).is_ok());
        wait("the node's way", 5, || {
            exchange((&world.nodes[0].ns, own(1)[family]), (&c.ns, to[family])).is_ok()
        });
    }
    let b = world.pod("b");
    addresses(&world.nodes[0], &b);
    std::thread::sleep(Duration::from_secs(4));
    assert!(!world.nodes[0].has_died(), "and goes on");
}

fn a_second_add_elsewhere_is_refused() {
    let world = World::ready();
    let node = &world.nodes[0];
    let (a, b) = (world.pod("a"), world.pod("b"));
    let first = addresses(node, &a);
    let error = node.add_as("a", &b).unwrap_err();
    assert_eq!(error.code, podway_cni::code::INVALID_ENVIRONMENT, "{error}");
    assert!(error.msg.contains("CNI_CONTAINERID a has interface CNI_IFNAME eth0"), "{error}");
    node.check(&a).unwrap();
    exchange((&node.ns, own(1)[0]), (&a.ns, first[0])).unwrap();
    // The same namespace again replaces; another one after the first is gone is a first one.
    addresses(node, &a);
    node.check(&a).unwrap();
    drop(a);
    wait("the link to go", 5, || node.pod_links().is_empty());
    node.add_as("a", &b).unwrap();
    node.del("a").unwrap();
    node.assert_empty();
}

fn cleanup_leaves_nothing() {
    let mut world = World::ready();
    let pods: Vec<Pod> = (0..3).map(|n| world.pod(&format!("c{n}"))).collect();
    for pod in &pods {
        addresses(&world.nodes[0], pod);
    }
    let instance = world.nodes[0].instance.clone();
    let refused = world.nodes[0].ns.run(|| podway_agent::cleanup(&instance, false)).unwrap();
    assert!(refused.unwrap_err().to_string().contains("--force"));
    world.nodes[0].kill();
    let ns = &world.nodes[0].ns;
    let report = ns.run(|| podway_agent::cleanup(&instance, false)).unwrap().unwrap();
    assert_eq!(report.failed, Vec::<String>::new());
    assert!(report.removed.len() > 6, "{:?}", report.removed);
    let mut netlink = Netlink::open_in(ns).unwrap();
    let links: Vec<String> = netlink.links().unwrap().into_iter().map(|l| l.name).collect();
    assert_eq!(links, ["lo", "eth0"]);
    let filter = podway_link::RouteFilter { protocol: Some(80), ..Default::default() };
    assert_eq!(netlink.routes(filter).unwrap(), []);
    assert_eq!(netlink.unreachable_routes(80).unwrap(), []);
    assert!(!netlink.addresses().unwrap().iter().any(|a| a.addr.to_string() == "169.254.1.1"));
    assert!(!instance.run_dir().exists() && !instance.pin_dir().exists());
    let again = ns.run(|| podway_agent::cleanup(&instance, false)).unwrap().unwrap();
    assert_eq!((again.removed, again.failed), (vec![], vec![]));
}
