//! Host ports and bandwidth limits.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use podway_cni::{Bandwidth, Limit, PortMapping, Protocol, RuntimeConfig};
use podway_link::{Netlink, Netns, sysctl};

use crate::scenarios::Scenario;
use crate::world::{Pod, TestNode, World, wait};

pub(crate) const ALL: &[Scenario] = &[
    ("host_ports_lead_to_pods_from_everywhere", host_ports_lead_to_pods_from_everywhere),
    ("a_host_port_has_one_pod", a_host_port_has_one_pod),
    ("host_ports_outlive_the_agent_and_are_put_right", host_ports_outlive_the_agent_and_are_put_right),
    ("a_pod_with_ports_does_not_reach_the_loopback", a_pod_with_ports_does_not_reach_the_loopback),
    ("datagrams_follow_their_port_to_the_next_pod", datagrams_follow_their_port_to_the_next_pod),
    ("bandwidth_is_limited_on_every_path", bandwidth_is_limited_on_every_path),
    ("limits_outlive_the_agent_and_are_put_right", limits_outlive_the_agent_and_are_put_right),
];

const PORT: u16 = 8080;
const WAIT: Duration = Duration::from_secs(2);

fn ports(mappings: &[(Protocol, u16, u16, &str)]) -> RuntimeConfig {
    let mapping = |(protocol, host_port, container_port, ip): &(Protocol, u16, u16, &str)| PortMapping {
        host_port: *host_port,
        container_port: *container_port,
        protocol: *protocol,
        host_ip: (!ip.is_empty()).then(|| ip.parse().unwrap()),
    };
    RuntimeConfig { port_mappings: mappings.iter().map(mapping).collect(), ..RuntimeConfig::default() }
}

fn add(node: &TestNode, pod: &Pod, runtime: &RuntimeConfig) -> Vec<IpAddr> {
    node.add_with(&pod.name, pod, runtime).unwrap_or_else(|e| panic!("ADD on {}: {e}", node.name))
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Connects from a namespace to an address that leads to port 80 of a pod; returns the client's address as the
/// pod sees it.
fn connect(from: &Netns, to: SocketAddr, pod: &Pod) -> Result<IpAddr, String> {
    let listener = pod.ns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80))).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut client = from
        .run(|| TcpStream::connect_timeout(&to, WAIT))
        .unwrap()
        .map_err(|e| format!("connect {to}: {e}"))?;
    let begun = Instant::now();
    let (mut server, peer) = loop {
        match listener.accept() {
            Ok(accepted) => break accepted,
            Err(_) if begun.elapsed() < WAIT => std::thread::sleep(Duration::from_millis(5)),
            Err(e) => return Err(format!("{to}: connected to somebody else: {e}")),
        }
    };
    client.set_read_timeout(Some(WAIT)).unwrap();
    server.set_nonblocking(false).unwrap();
    server.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).map_err(|e| format!("answer of {to}: {e}"))?;
    Ok(peer.ip().to_canonical())
}

fn host_ports_lead_to_pods_from_everywhere() {
    for options in [&[][..], &["direct"]] {
        let world = World::ready_with(options);
        let [n1, n2] = [&world.nodes[0], &world.nodes[1]];
        let (pod, near, far) = (world.pod("a"), world.pod("b"), world.pod("c"));
        let runtime = ports(&[
            (Protocol::Tcp, PORT, 80, ""),
            (Protocol::Udp, PORT, 5353, ""),
            (Protocol::Tcp, 81, 80, "127.0.0.1"),
            (Protocol::Tcp, 82, 80, "172.18.1.1"),
        ]);
        add(n1, &pod, &runtime);
        let near_ips = n1.add(&near).unwrap();
        n2.add(&far).unwrap();
        let node = ["172.18.1.1", "fd00:172:18::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), PORT));
        // What comes from beyond the cluster keeps its source; the rest has to come back through the node.
        let masqueraded = node.map(|n| n.ip());
        let own = |text: &str| text.parse::<IpAddr>().unwrap();
        let cases = [
            ("outside", &world.fabric, [Some(own("172.18.0.1")), None]),
            ("the other node", &n2.ns, masqueraded.map(Some)),
            ("the node itself", &n1.ns, masqueraded.map(Some)),
            ("a pod of the node", &near.ns, masqueraded.map(Some)),
            ("a pod of the other node", &far.ns, masqueraded.map(Some)),
            ("the pod itself", &pod.ns, masqueraded.map(Some)),
        ];
        for (who, from, seen) in cases {
            for (target, seen) in node.iter().zip(seen) {
                // The network between the nodes has no IPv6 address that is not a node's.
                let Some(seen) = seen else { continue };
                assert_eq!(connect(from, *target, &pod), Ok(seen), "{who} to {target}");
            }
        }
        let seen = connect(&n1.ns, address("127.0.0.1:8080"), &pod);
        assert_eq!(seen, Ok(masqueraded[0]), "the loopback");
        assert_eq!(connect(&n1.ns, address("127.0.0.1:81"), &pod), Ok(masqueraded[0]), "bound to it");
        assert!(connect(&n2.ns, address("172.18.1.1:81"), &pod).is_err(), "bound to the loopback only");
        assert!(connect(&world.fabric, address("172.18.1.1:82"), &pod).is_ok(), "bound to the address");
        assert!(connect(&n1.ns, address("127.0.0.1:82"), &pod).is_err(), "not to the loopback");
        let refused = connect(&n1.ns, address("[::1]:8080"), &pod).unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
        // A pod's own port is not the node's.
        let refused = connect(&world.fabric, address("172.18.1.1:80"), &pod).unwrap_err();
        assert!(refused.contains("refused"), "{refused}");

        let server = pod.ns.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 5353))).unwrap().unwrap();
        server.set_read_timeout(Some(WAIT)).unwrap();
        for (who, ns, seen) in
            [("outside", &world.fabric, own("172.18.0.1")), ("pod", &far.ns, masqueraded[0])]
        {
            let client = ns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
            client.set_read_timeout(Some(WAIT)).unwrap();
            client.connect(node[0]).unwrap();
            client.send(b"question").unwrap();
            let mut buffer = [0; 16];
            let (_, peer) = server.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{who}: {e}"));
            assert_eq!(peer.ip().to_canonical(), seen, "{who}");
            server.send_to(b"answer", peer).unwrap();
            client.recv(&mut buffer).unwrap_or_else(|e| panic!("answer for {who}: {e}"));
        }
        // Nothing else has changed: pods see one another's own addresses.
        let direct = SocketAddr::new(n1_address(n1, &pod), 80);
        assert_eq!(connect(&near.ns, direct, &pod), Ok(near_ips[0]));

        n1.check(&pod).unwrap();
        n1.del(&pod.name).unwrap();
        assert!(!ports_table(n1).contains("8080"), "{}", ports_table(n1));
        assert!(connect(&world.fabric, node[0], &pod).is_err());
        n1.del(&near.name).unwrap();
        n1.assert_empty();
    }
}

fn n1_address(node: &TestNode, pod: &Pod) -> IpAddr {
    let inside = Netlink::open_in(&pod.ns).unwrap().addresses().unwrap();
    let found = inside.iter().find(|a| a.addr.is_ipv4() && !a.addr.is_loopback());
    found.unwrap_or_else(|| panic!("{} has no address on {}", pod.name, node.name)).addr
}

/// The table of host ports as nft shows it; empty when there is none.
fn ports_table(node: &TestNode) -> String {
    let mut nft = Command::new("nft");
    nft.args(["list", "table", "inet", podway_agent::host_ports::TABLE]);
    let output = node.ns.run(move || nft.output()).unwrap().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn a_host_port_has_one_pod() {
    let world = World::ready();
    let node = &world.nodes[0];
    let (a, b) = (world.pod("a"), world.pod("b"));
    add(node, &a, &ports(&[(Protocol::Tcp, PORT, 80, "")]));
    for (wanted, code, part) in [
        ((Protocol::Tcp, PORT, 80, ""), 11, "host port 8080/tcp is taken: pod test/a has 8080/tcp"),
        ((Protocol::Tcp, PORT, 80, "127.0.0.1"), 11, "127.0.0.1:8080/tcp is taken: pod test/a"),
        ((Protocol::Udp, 8472, 80, ""), 7, "8472/udp is Podway's own on this node: the VXLAN tunnel"),
        ((Protocol::Tcp, 9950, 80, ""), 7, "metrics and health"),
    ] {
        let error = node.add_with("b", &b, &ports(&[wanted])).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    // A refused pod holds nothing, and the same ports are free for others.
    assert_eq!(node.metric("podway_pods "), 1.0);
    assert_eq!(node.metric("podway_host_ports "), 1.0);
    add(node, &b, &ports(&[(Protocol::Udp, PORT, 80, ""), (Protocol::Tcp, 9950, 80, "127.0.0.1")]));
    // The runtime knows `b` alone.
    node.gc(&["b"]).unwrap();
    let text = ports_table(node);
    assert!(text.contains("udp . 8080") && !text.contains("tcp . 8080"), "{text}");
    add(node, &a, &ports(&[(Protocol::Tcp, PORT, 80, "")]));
    node.gc(&[]).unwrap();
    assert_eq!(ports_table(node), "");
    node.assert_empty();
}

fn host_ports_outlive_the_agent_and_are_put_right() {
    let mut world = World::ready();
    let (a, b) = (world.pod("a"), world.pod("b"));
    add(&world.nodes[0], &a, &ports(&[(Protocol::Tcp, PORT, 80, ""), (Protocol::Tcp, 81, 80, "172.18.1.1")]));
    let target = address("172.18.1.1:8080");
    let reaches = |world: &World| connect(&world.fabric, target, &a).is_ok();
    assert!(reaches(&world));
    let before = ports_table(&world.nodes[0]);

    world.nodes[0].kill();
    assert!(reaches(&world), "without an agent");
    world.nodes[0].start(&[], &[]);
    world.nodes[0].wait_ready();
    assert!(reaches(&world), "after a restart");
    assert_eq!(ports_table(&world.nodes[0]), before);

    // Somebody else's doing: all of it, the rules, one port, one port too many.
    let deletion = "delete element inet podway_ports any4 { tcp . 8080 }";
    for damage in [
        "flush ruleset",
        "flush chain inet podway_ports prerouting",
        deletion,
        "add element inet podway_ports any4 { tcp . 99 : 10.244.1.1 . 99 }",
    ] {
        let node = &world.nodes[0];
        let repairs = || {
            let (_, text) = node.http("/metrics");
            let line = text.lines().find(|l| l.starts_with("podway_repairs_total{what=\"host_ports\"}"));
            line.map_or(0.0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
        };
        let before_damage = repairs();
        assert!(node.ns.run(|| Command::new("nft").arg(damage).status()).unwrap().unwrap().success());
        wait(damage, 11, || repairs() > before_damage);
        assert_eq!(ports_table(node), before, "{damage}");
        assert!(reaches(&world), "{damage}");
    }

    // A port that is not there any more when its pod goes, or comes, is no hindrance.
    let node = &world.nodes[0];
    assert!(node.ns.run(|| Command::new("nft").arg(deletion).status()).unwrap().unwrap().success());
    add(node, &b, &ports(&[(Protocol::Tcp, 83, 80, "")]));
    assert!(node.ns.run(|| Command::new("nft").arg("flush ruleset").status()).unwrap().unwrap().success());
    node.del("b").unwrap();
    assert_eq!(ports_table(node), before);

    // Without the journal, the table itself tells.
    world.nodes[0].kill();
    fs::remove_file(world.nodes[0].instance.run_dir().join("leases")).unwrap();
    world.nodes[0].start(&[], &[]);
    world.nodes[0].wait_ready();
    assert!(reaches(&world), "without the journal");
    let error = world.nodes[0].add_with("b", &b, &ports(&[(Protocol::Tcp, PORT, 80, "")])).unwrap_err();
    assert!(error.to_string().contains("8080/tcp is taken: container a/eth0"), "{error}");
    world.nodes[0].del("a").unwrap();
    assert_eq!(ports_table(&world.nodes[0]), "");
    world.nodes[0].assert_empty();
}

fn a_pod_with_ports_does_not_reach_the_loopback() {
    let world = World::ready();
    let node = &world.nodes[0];
    let pod = world.pod("a");
    add(node, &pod, &ports(&[(Protocol::Tcp, PORT, 80, "")]));
    // A pod that goes to the trouble of sending loopback addresses to the node.
    let shell = "ip rule add pref 10 lookup local && ip rule del pref 0 && ip rule add pref 5 to 127.0.0.5 lookup 100 && \
                 ip route add 127.0.0.5 via 169.254.1.1 dev eth0 onlink table 100";
    let done = pod.ns.run(|| Command::new("sh").args(["-c", shell]).status()).unwrap().unwrap();
    assert!(done.success());
    pod.ns.run(|| sysctl::write("net/ipv4/conf/eth0/route_localnet", "1")).unwrap().unwrap();
    let server = node.ns.run(|| UdpSocket::bind("127.0.0.5:7777")).unwrap().unwrap();
    server.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let own = n1_address(node, &pod);
    let arrives = || {
        let client = pod.ns.run(|| UdpSocket::bind((own, 0))).unwrap().unwrap();
        client.send_to(b"knock", "127.0.0.5:7777").ok();
        server.recv(&mut [0; 16]).is_ok()
    };
    assert!(!arrives());
    // It is the rule that holds it off.
    let flush = ["flush", "chain", "inet", "podway_ports", "loopback"];
    assert!(node.ns.run(|| Command::new("nft").args(flush).status()).unwrap().unwrap().success());
    assert!(arrives(), "the test itself does not work");
    wait("the rule to come back", 11, || !arrives());
}

fn datagrams_follow_their_port_to_the_next_pod() {
    let world = World::ready();
    let node = &world.nodes[0];
    let client = world.fabric.run(|| UdpSocket::bind("172.18.0.1:40000")).unwrap().unwrap();
    client.connect("172.18.1.1:5353").unwrap();
    let runtime = ports(&[(Protocol::Udp, 5353, 53, "")]);
    // A client that sends all the time, before there is a pod and while one replaces the other.
    for name in ["a", "b"] {
        for _ in 0..3 {
            client.send(b"early").ok();
        }
        let pod = world.pod(name);
        add(node, &pod, &runtime);
        let server = pod.ns.run(|| UdpSocket::bind("0.0.0.0:53")).unwrap().unwrap();
        server.set_nonblocking(true).unwrap();
        wait(&format!("datagrams at {name}"), 5, || {
            client.send(b"question").ok();
            std::thread::sleep(Duration::from_millis(20));
            server.recv(&mut [0; 16]).is_ok()
        });
        node.del(name).unwrap();
    }
    node.assert_empty();
}

/// What passes in bits a second, from one namespace to another.
fn rate(from: &Netns, to: (&Netns, IpAddr), target: SocketAddr) -> f64 {
    let listener = to.0.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, target.port()))).unwrap().unwrap();
    let mut sender = from.run(|| TcpStream::connect_timeout(&target, WAIT)).unwrap().unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    sender.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let length = Duration::from_millis(2500);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let begun = Instant::now();
            while begun.elapsed() < length {
                sender.write_all(&[0; 32 << 10]).ok();
            }
        });
        // Without the burst and the start of the connection.
        let (mut bytes, mut buffer) = (0, vec![0; 256 << 10]);
        let begun = Instant::now();
        let mut counted = None;
        while begun.elapsed() < length {
            let read = receiver.read(&mut buffer).unwrap_or(0);
            match counted {
                None if begun.elapsed() > length / 3 => counted = Some(Instant::now()),
                None => {}
                Some(_) => bytes += read,
            }
        }
        let seconds = counted.unwrap().elapsed().as_secs_f64();
        8.0 * f64::from(u32::try_from(bytes).unwrap()) / seconds
    })
}

const LIMIT: Limit = Limit { rate: 20_000_000, burst: u32::MAX as u64 };

fn limited(ingress: bool, egress: bool) -> RuntimeConfig {
    let limit = |on: bool| on.then_some(LIMIT);
    let bandwidth = Bandwidth { ingress: limit(ingress), egress: limit(egress) };
    RuntimeConfig { bandwidth, ..RuntimeConfig::default() }
}

/// Payload comes to 93% and more of what is on the wire.
fn assert_limited(what: &str, rate: f64) {
    println!("  {what}: {:.1} Mbit/s", rate / 1e6);
    assert!((14e6..21e6).contains(&rate), "{what}: {rate} bits a second with a limit of 20,000,000");
}

fn bandwidth_is_limited_on_every_path() {
    for options in [&[][..], &["direct"]] {
        let world = World::ready_with(options);
        let [n1, n2] = [&world.nodes[0], &world.nodes[1]];
        let (slow, near, far, mute) = (world.pod("a"), world.pod("b"), world.pod("c"), world.pod("d"));
        let at = add(n1, &slow, &limited(true, false))[0];
        let near_at = n1.add(&near).unwrap()[0];
        let far_at = n2.add(&far).unwrap()[0];
        add(n1, &mute, &limited(false, true));
        let to_slow = SocketAddr::new(at, 5001);
        for (who, from) in
            [("a pod of the node", &near.ns), ("a pod of the other node", &far.ns), ("the node", &n1.ns)]
        {
            assert_limited(&format!("from {who}"), rate(from, (&slow.ns, at), to_slow));
        }
        // The other direction is not limited, nor is anybody else.
        let free = rate(&slow.ns, (&near.ns, near_at), SocketAddr::new(near_at, 5001));
        assert!(free > 60e6, "what the pod sends: {free}");
        for (who, ns, to) in
            [("a pod of the node", &near.ns, near_at), ("a pod of the other node", &far.ns, far_at)]
        {
            let sent = rate(&mute.ns, (ns, to), SocketAddr::new(to, 5001));
            assert_limited(&format!("to {who}"), sent);
        }
        n1.check(&slow).unwrap();
        n1.check(&mute).unwrap();
    }
}

fn limits_outlive_the_agent_and_are_put_right() {
    let mut world = World::ready();
    let (slow, near) = (world.pod("a"), world.pod("b"));
    let at = add(&world.nodes[0], &slow, &limited(true, true))[0];
    world.nodes[0].add(&near).unwrap();
    let target = SocketAddr::new(at, 5001);
    let passes = || rate(&near.ns, (&slow.ns, at), target);
    world.nodes[0].restart();
    assert_limited("after a restart", passes());
    let node = &world.nodes[0];
    let link = node.pod_links().into_iter().find(|l| {
        let id = podway_agent::ids::AttachmentId::new("a", "eth0");
        *l == id.host_link()
    });
    let link = link.unwrap();
    let delete = ["qdisc", "del", "dev", &link, "root"];
    assert!(node.ns.run(|| Command::new("tc").args(delete).status()).unwrap().unwrap().success());
    let error = node.check(&slow).unwrap_err();
    assert!(error.msg.contains("what the pod gets is not limited"), "{error}");
    wait("the limit to come back", 15, || node.check(&slow).is_ok());
    assert_limited("after a repair", passes());
    assert_eq!(node.metric("podway_repairs_total{what=\"pod_bandwidth\"}"), 1.0);
    let inside = ["qdisc", "del", "dev", "eth0", "root"];
    assert!(slow.ns.run(|| Command::new("tc").args(inside).status()).unwrap().unwrap().success());
    let error = node.check(&slow).unwrap_err();
    assert!(error.msg.contains("what the pod sends is not limited"), "{error}");

    world.nodes[0].kill();
    fs::remove_file(world.nodes[0].instance.run_dir().join("leases")).unwrap();
    world.nodes[0].start(&[], &[]);
    world.nodes[0].wait_ready();
    std::thread::sleep(Duration::from_secs(1));
    assert_limited("without the journal", passes());
    world.nodes[0].check(&slow).unwrap();
    world.nodes[0].del("a").unwrap();
    world.nodes[0].del("b").unwrap();
    world.nodes[0].assert_empty();
}
