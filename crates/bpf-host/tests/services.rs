//! Services for packets that no socket hook sees: two nodes with pods, joined by a tunnel or by routes, and a client
//! beyond the cluster, all on one bridge. Real sockets talk; this process is in no cgroup of a datapath.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::needless_range_loop,
    clippy::needless_pass_by_value,
    reason = "a test fails by panicking and says why it skips; numbers name families and pods"
)]

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use nix::libc;
use podway_abi::{ABI_VERSION, CtKey, Mac, services::Translation};
use podway_bpf_host::{Datapath, Endpoint, Mode, NodeConfig, Peer, PeerFlags, ServiceWriter};
use podway_link::{AddressFlags, Netlink, Netns, Route, VethSpec, VxlanSpec, sysctl};
use podway_services::table::{
    Backend, Family, Frontend, FrontendAddr, FrontendKey, FrontendKind, NodeView, Protocol, ServiceId,
    ServiceMeta, SetId, SetKind, TableChange, Target,
};

const NODES: [[&str; 2]; 2] = [["172.20.0.1", "fd00:172:20::1"], ["172.20.0.2", "fd00:172:20::2"]];
const CLIENT: [&str; 2] = ["172.20.0.99", "fd00:172:20::99"];
const RANGES: [[&str; 2]; 2] =
    [["10.244.1.0/24", "fd00:10:244:1::/64"], ["10.244.2.0/24", "fd00:10:244:2::/64"]];
/// Two pods on the first node and one on the second.
const PODS: [(usize, [&str; 2]); 3] = [
    (0, ["10.244.1.2", "fd00:10:244:1::2"]),
    (0, ["10.244.1.3", "fd00:10:244:1::3"]),
    (1, ["10.244.2.2", "fd00:10:244:2::2"]),
];
const VIP: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
/// An external address of the services, which the client reaches by way of the first node.
const EXTERNAL: [&str; 2] = ["192.0.2.80", "2001:db8:80::80"];
const TARGET: u16 = 8080;
const WAIT: Duration = Duration::from_secs(2);

/// Ports of the cluster IP: to each pod alone, to all, to nobody, silence.
const EACH: [u16; 3] = [80, 81, 82];
const ALL: u16 = 90;
const NOBODY: u16 = 91;
const SILENCE: u16 = 92;
/// To a port of the second pod where nobody listens.
const CLOSED: u16 = 93;
/// To a process on each node, in the node's own namespace.
const ON_NODES: [u16; 2] = [95, 96];
/// What such a process answers as: this and the node's index.
const NODE_NUMBER: usize = 10;
/// Node ports to each pod, with the node's address as source.
const NODE_PORTS: [u16; 3] = [30_080, 30_081, 30_082];
/// Node port to the first pod, the source kept.
const NODE_PORT_LOCAL: u16 = 30_090;
const NODE_PORT_NOBODY: u16 = 30_091;
/// Node ports to a process on each node, with the node's address as source; and to one on the first node, the source
/// kept.
const NODE_PORTS_ON_NODES: [u16; 2] = [30_095, 30_096];
const NODE_PORT_ON_NODE_LOCAL: u16 = 30_097;
/// To a port of the first node where nobody listens.
const NODE_PORT_CLOSED: u16 = 30_098;

struct Node {
    namespace: Netns,
    datapath: Option<Datapath>,
    writer: Option<ServiceWriter>,
    pins: PathBuf,
}

struct World {
    prefix: String,
    nodes: Vec<Node>,
    pods: Vec<Netns>,
    client: Netns,
}

impl World {
    fn new(prefix: &str, overlay: bool, offload: bool) -> Self {
        remove(prefix);
        let named = |name: &str| Netns::create_named(&format!("{prefix}-{name}")).unwrap();
        let wire = named("wire");
        let mut switch = Netlink::open_in(&wire).unwrap();
        let bridge = switch.create_bridge("br0", 1500).unwrap().index;
        switch.set_up(bridge).unwrap();
        let mut join = |namespace: &Netns, name: &str, addresses: [&str; 2]| {
            let spec = VethSpec {
                name: name.to_owned(),
                up: true,
                peer_name: "eth0".to_owned(),
                peer_ns: Some(namespace),
                ..VethSpec::default()
            };
            let port = switch.create_veth(&spec).unwrap().index;
            switch.set_master(port, Some(bridge)).unwrap();
            let mut inside = Netlink::open_in(namespace).unwrap();
            let lo = inside.link_by_name("lo").unwrap().unwrap().index;
            inside.set_up(lo).unwrap();
            let eth0 = inside.link_by_name("eth0").unwrap().unwrap().index;
            inside.set_up(eth0).unwrap();
            let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
            for (addr, len) in addresses.into_iter().zip([16, 64]) {
                inside.add_address(eth0, IpNet::new(addr.parse().unwrap(), len).unwrap(), flags).unwrap();
            }
            if !offload {
                without_offload(namespace, "eth0");
                without_offload(&wire, name);
            }
            eth0
        };
        let client = named("client");
        let client_eth0 = join(&client, "client", CLIENT);
        let mut routes = Netlink::open_in(&client).unwrap();
        for (family, addr) in EXTERNAL.into_iter().enumerate() {
            let via = NODES[0][family].parse().unwrap();
            routes
                .replace_route(&route(addr.parse::<IpAddr>().unwrap().into(), Some(via), client_eth0))
                .unwrap();
        }
        let mut world = Self { prefix: prefix.to_owned(), nodes: Vec::new(), pods: Vec::new(), client };
        for (index, addresses) in NODES.into_iter().enumerate() {
            let namespace = named(&format!("node{}", index + 1));
            let uplink = join(&namespace, &format!("node{}", index + 1), addresses);
            world.nodes.push(node(prefix, index, namespace, uplink, overlay));
        }
        for (index, (on, addresses)) in PODS.into_iter().enumerate() {
            let pod = named(&format!("pod{}", index + 1));
            attach(&world.nodes[on], &pod, index, addresses, offload);
            serve(&pod, index);
            world.pods.push(pod);
        }
        for (index, node) in world.nodes.iter().enumerate() {
            serve(&node.namespace, NODE_NUMBER + index - 1);
        }
        world
    }

    fn apply(&mut self, changes: &dyn Fn(usize) -> Vec<TableChange>) {
        for (index, node) in self.nodes.iter_mut().enumerate() {
            let report = node.writer.as_mut().unwrap().apply(&changes(index)).unwrap();
            assert!(report.refused.is_empty(), "{report:?}");
        }
    }

    fn pod<R: Send>(&self, index: usize, f: impl FnOnce() -> R + Send) -> R {
        self.pods[index].run(f).unwrap()
    }

    /// What the nodes count, for the message of a failure.
    fn counted(&self) -> String {
        let mut out = String::new();
        for (index, node) in self.nodes.iter().enumerate() {
            for c in node.datapath.as_ref().unwrap().counters().unwrap() {
                write!(out, "node{} {} {} {}; ", index + 1, c.hook, c.reason, c.packets).unwrap();
            }
        }
        out
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.nodes.clear();
        remove(&self.prefix);
    }
}

fn pins(prefix: &str, index: usize) -> PathBuf {
    PathBuf::from(format!("/sys/fs/bpf/podway-test-{prefix}-{index}"))
}

fn remove(prefix: &str) {
    for index in 0..2 {
        let _ = Datapath::remove_all(&pins(prefix, index));
    }
    for name in Netns::list_named(prefix).unwrap() {
        let _ = Netns::delete_named(&name);
    }
}

/// Makes senders sum and receivers check: between offloading devices nobody looks at checksums.
fn without_offload(namespace: &Netns, device: &str) {
    let device = device.to_owned();
    for command in [ETHTOOL_STXCSUM, ETHTOOL_SRXCSUM] {
        namespace.run(|| switch_off(&device, command)).unwrap().unwrap();
    }
}

/// `linux/ethtool.h`: sets whether received, or sent, packets are summed by the device.
const ETHTOOL_SRXCSUM: u32 = 0x15;
const ETHTOOL_STXCSUM: u32 = 0x17;

#[expect(unsafe_code, reason = "nix has no call for offloads")]
fn switch_off(device: &str, command: u32) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // `struct ethtool_value`.
    let mut value = [command, 0];
    // SAFETY: all fields are integers, a pointer, or unions of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    // SAFETY: the kernel reads the request and the value, which live until it returns.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn route(dst: IpNet, via: Option<IpAddr>, dev: u32) -> Route {
    Route {
        dst,
        via,
        dev,
        src: None,
        mtu: None,
        scope_link: via.is_none(),
        onlink: via.is_some(),
        protocol: podway_link::ROUTE_PROTOCOL,
    }
}

fn node(prefix: &str, index: usize, namespace: Netns, uplink: u32, overlay: bool) -> Node {
    namespace
        .run(|| {
            for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
                sysctl::write(name, "1").unwrap();
            }
        })
        .unwrap();
    let mut netlink = Netlink::open_in(&namespace).unwrap();
    let tunnel = netlink.create_vxlan(&VxlanSpec::default()).unwrap().index;
    let other = 1 - index;
    for family in 0..2 {
        let via = (!overlay).then(|| NODES[other][family].parse().unwrap());
        let dev = if overlay { tunnel } else { uplink };
        netlink.replace_route(&route(RANGES[other][family].parse().unwrap(), via, dev)).unwrap();
    }
    let pins = pins(prefix, index);
    let datapath = Datapath::load(&pins).unwrap();
    let mode = if overlay {
        Mode::Overlay {
            tunnel_ifindex: tunnel,
            vni: 1,
            port: 8472,
            underlay: NODES[index][0].parse().unwrap(),
        }
    } else {
        Mode::Direct
    };
    datapath.set_config(&NodeConfig { mode, uplink_ifindex: uplink, stack_translates: false }).unwrap();
    datapath.sync_peers(&peers(index)).unwrap();
    let writer = namespace
        .run(|| {
            datapath.attach_uplink(uplink).unwrap();
            datapath.attach_tunnel(tunnel).unwrap();
            let mut writer = datapath.services().unwrap();
            let addresses: Vec<IpAddr> = NODES[index].iter().map(|a| a.parse().unwrap()).collect();
            let view = NodeView {
                name: format!("node{}", index + 1),
                addresses: addresses.clone(),
                node_port_addresses: addresses,
                ..NodeView::default()
            };
            writer.set_node(&view).unwrap();
            writer
        })
        .unwrap();
    Node { namespace, datapath: Some(datapath), writer: Some(writer), pins }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.writer.take();
        self.datapath.take();
        let _ = Datapath::remove_all(&self.pins);
    }
}

fn peers(here: usize) -> BTreeMap<IpNet, Peer> {
    let mut all = BTreeMap::new();
    for (index, addresses) in NODES.iter().enumerate() {
        let node: IpAddr = addresses[0].parse().unwrap();
        let local = index == here;
        for family in 0..2 {
            let flags = |is_node| PeerFlags { is_node, local };
            let own: IpAddr = addresses[family].parse().unwrap();
            all.insert(own.into(), Peer { node, flags: flags(true) });
            all.insert(RANGES[index][family].parse().unwrap(), Peer { node, flags: flags(false) });
        }
    }
    all
}

fn attach(node: &Node, pod: &Netns, index: usize, addresses: [&str; 2], offload: bool) {
    let number = u8::try_from(index).unwrap();
    let (pod_mac, host_mac): (Mac, Mac) = ([2, 0, 0, 0, number, 1], [2, 0, 0, 0, number, 0xfe]);
    let name = format!("pod{}", index + 1);
    let mut netlink = Netlink::open_in(&node.namespace).unwrap();
    let spec = VethSpec {
        name: name.clone(),
        mac: Some(host_mac),
        up: true,
        addr_gen_none: true,
        peer_name: "eth0".to_owned(),
        peer_mac: Some(pod_mac),
        peer_ns: Some(pod),
        ..VethSpec::default()
    };
    let ifindex = netlink.create_veth(&spec).unwrap().index;
    let mut inside = Netlink::open_in(pod).unwrap();
    let lo = inside.link_by_name("lo").unwrap().unwrap().index;
    inside.set_up(lo).unwrap();
    let eth0 = inside.link_by_name("eth0").unwrap().unwrap().index;
    inside.set_up(eth0).unwrap();
    let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
    for (addr, gateway) in addresses.into_iter().zip(["169.254.1.1", "fe80::1"]) {
        let addr: IpAddr = addr.parse().unwrap();
        let gateway: IpAddr = gateway.parse().unwrap();
        inside.add_address(eth0, addr.into(), flags).unwrap();
        inside.replace_neighbour(eth0, gateway, host_mac).unwrap();
        let any = if addr.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        inside.replace_route(&route(any.parse().unwrap(), Some(gateway), eth0)).unwrap();
        netlink.replace_neighbour(ifindex, addr, pod_mac).unwrap();
        netlink.replace_route(&route(addr.into(), None, ifindex)).unwrap();
    }
    if !offload {
        without_offload(pod, "eth0");
        without_offload(&node.namespace, &name);
    }
    let datapath = node.datapath.as_ref().unwrap();
    let endpoint = Endpoint {
        id: u32::from(number) + 1,
        ifindex,
        pod_mac,
        host_mac,
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        queued: false,
    };
    datapath.set_endpoint(&endpoint).unwrap();
    node.namespace.run(|| datapath.attach_pod(ifindex)).unwrap().unwrap();
}

/// Answers with the pod's number and whom it sees: one connection or datagram after the other.
fn serve(pod: &Netns, index: usize) {
    for any in ["0.0.0.0", "::"] {
        let v6_only = any == "::";
        let at = SocketAddr::new(any.parse().unwrap(), if v6_only { TARGET + 1 } else { TARGET });
        let (listener, udp) =
            pod.run(|| (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap())).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let peer = stream.peer_addr().map(|p| p.ip().to_string()).unwrap_or_default();
                let mut ask = [0; 1];
                let _ = stream.set_read_timeout(Some(WAIT)).and_then(|()| stream.read_exact(&mut ask));
                // More than one segment, so that offloads have something to do.
                let _ = stream.write_all(format!("{} {peer} {}", index + 1, "x".repeat(40_000)).as_bytes());
            }
        });
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while let Ok((len, from)) = udp.recv_from(&mut buffer) {
                let answer = format!("{} {} {}", index + 1, from.ip(), "y".repeat(len));
                let _ = udp.send_to(answer.as_bytes(), from);
            }
        });
    }
}

/// Number of the pod that answered, and whom it saw.
type Answer = (usize, IpAddr);

fn parse(answer: &str, payload: usize) -> io::Result<Answer> {
    let mut parts = answer.split(' ');
    let cut = || io::Error::other(format!("{} bytes", answer.len()));
    let number = parts.next().and_then(|n| n.parse().ok()).ok_or_else(cut)?;
    let seen = parts.next().and_then(|n| n.parse().ok()).ok_or_else(cut)?;
    if parts.next().is_some_and(|p| p.len() == payload) { Ok((number, seen)) } else { Err(cut()) }
}

fn tcp(to: SocketAddr) -> io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&to, WAIT)?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.write_all(b"?")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    parse(&answer, 40_000)
}

/// A connected datagram socket: it hears only the one it asked, and of errors.
fn connected(to: SocketAddr) -> UdpSocket {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket.connect(to).unwrap();
    socket
}

fn ask(socket: &UdpSocket, payload: usize) -> io::Result<Answer> {
    socket.send(&vec![b'?'; payload])?;
    let mut buffer = vec![0; 65_536];
    let len = socket.recv(&mut buffer)?;
    parse(&String::from_utf8_lossy(&buffer[..len]), payload)
}

fn to(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Service numbers: (family, protocol, which backends).
const fn id(family: usize, protocol: Protocol, which: usize) -> ServiceId {
    ServiceId((family * 2 + matches!(protocol, Protocol::Udp) as usize) as u32 * 10 + which as u32)
}

fn backends(family: usize, node: usize, which: &[usize], port: u16) -> Arc<[Backend]> {
    which
        .iter()
        .map(|i| Backend {
            addr: PODS[*i].1[family].parse().unwrap(),
            port: port + family as u16,
            local: PODS[*i].0 == node,
            terminating: false,
        })
        .collect()
}

fn routed(target: Target, masquerade: bool) -> [podway_services::table::Route; 3] {
    [podway_services::table::Route { target, masquerade }; 3]
}

const CLUSTER: Target = Target::Set(SetKind::Cluster);

/// The table of one node.
fn table(node: usize) -> Vec<TableChange> {
    let mut all = Vec::new();
    for family in 0..2 {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            of_protocol(node, family, protocol, &mut all);
        }
        all.push(TableChange::Vip(addr(VIP[family])));
    }
    all
}

fn of_protocol(node: usize, family: usize, protocol: Protocol, all: &mut Vec<TableChange>) {
    let kind_of_family = if family == 0 { Family::V4 } else { Family::V6 };
    let mut service = |which: usize, members: Arc<[Backend]>| {
        let service = id(family, protocol, which);
        let meta = ServiceMeta {
            namespace: "default".into(),
            name: format!("s{which}").into(),
            port_name: "".into(),
            protocol,
            family: kind_of_family,
            external: true,
        };
        all.push(TableChange::Service(service, meta));
        all.push(TableChange::Set(SetId { service, kind: SetKind::Cluster }, Some(members)));
        service
    };
    let each = [0, 1, 2].map(|i| service(i, backends(family, node, &[i], TARGET)));
    let every = service(3, backends(family, node, &[0, 1, 2], TARGET));
    let on_nodes = [0, 1].map(|i: usize| {
        let addr = addr(NODES[i][family]);
        let backend = Backend { addr, port: TARGET + family as u16, local: i == node, terminating: false };
        service(5 + i, [backend].into())
    });
    let closed = service(4, backends(family, node, &[1], TARGET + 1000));
    let nobody_there =
        Backend { addr: addr(NODES[0][family]), port: TARGET + 1000, local: node == 0, terminating: false };
    let closed_on_node = service(7, [nobody_there].into());
    let mut frontend = |at, port, service, kind, routes| {
        let key = FrontendKey { addr: at, port, protocol };
        all.push(TableChange::Frontend(
            key,
            Frontend { service, kind, routes, affinity_s: None, source_ranges: None },
        ));
    };
    let vip = FrontendAddr::Ip(addr(VIP[family]));
    let external = FrontendAddr::Ip(addr(EXTERNAL[family]));
    let any = FrontendAddr::Node(kind_of_family);
    let kind = FrontendKind::ClusterIp;
    for (i, service) in each.into_iter().enumerate() {
        frontend(vip, EACH[i], service, kind, routed(CLUSTER, false));
        frontend(any, NODE_PORTS[i], service, FrontendKind::NodePort, routed(CLUSTER, true));
    }
    for (port, service) in ON_NODES.into_iter().zip(on_nodes) {
        frontend(vip, port, service, kind, routed(CLUSTER, false));
    }
    for (port, service) in NODE_PORTS_ON_NODES.into_iter().zip(on_nodes) {
        frontend(any, port, service, FrontendKind::NodePort, routed(CLUSTER, true));
    }
    frontend(any, NODE_PORT_ON_NODE_LOCAL, on_nodes[0], FrontendKind::NodePort, routed(CLUSTER, false));
    frontend(any, NODE_PORT_CLOSED, closed_on_node, FrontendKind::NodePort, routed(CLUSTER, true));
    frontend(vip, ALL, every, kind, routed(CLUSTER, false));
    frontend(vip, NOBODY, every, kind, routed(Target::Reject, false));
    frontend(vip, SILENCE, every, kind, routed(Target::Drop, false));
    frontend(vip, CLOSED, closed, kind, routed(CLUSTER, false));
    frontend(any, NODE_PORT_LOCAL, each[0], FrontendKind::NodePort, routed(CLUSTER, false));
    frontend(any, NODE_PORT_NOBODY, every, FrontendKind::NodePort, routed(Target::Reject, false));
    frontend(external, ALL, every, FrontendKind::LoadBalancer, routed(CLUSTER, true));
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

#[test]
fn overlay() {
    if can_run() {
        run("pwt-svo", true, true);
    }
}

#[test]
fn direct() {
    if can_run() {
        run("pwt-svd", false, true);
    }
}

/// The same where every checksum is summed and checked.
#[test]
fn overlay_without_offloads() {
    if can_run() {
        run("pwt-svc", true, false);
    }
}

fn run(prefix: &str, overlay: bool, offload: bool) {
    let mut world = World::new(prefix, overlay, offload);
    // Sockets that speak to an address before a service is there.
    let early: Vec<UdpSocket> = (0..2).map(|f| world.pod(0, || connected(to(VIP[f], EACH[1])))).collect();
    for socket in &early {
        assert!(ask(socket, 10).is_err(), "nobody is there yet");
    }
    world.apply(&table);
    for (family, socket) in early.iter().enumerate() {
        expect(&world, "a service that came later", ask(socket, 10), (2, addr(PODS[0].1[family])));
    }
    for family in 0..2 {
        println!("family {family}");
        from_pods(&world, family);
        refused(&world, family);
        from_outside(&world, family);
        fragments(&world, family);
        counters(&world, family);
        forgotten(&world, family);
        moving(&mut world, family);
    }
}

fn expect<T: std::fmt::Debug + PartialEq>(world: &World, what: &str, got: io::Result<T>, wanted: T) {
    match got {
        Ok(got) => assert_eq!(got, wanted, "{what}"),
        Err(e) => panic!("{what}: {e}; {}", world.counted()),
    }
}

/// Each pod to each pod by the cluster IP: on the same node, on the other one, and to itself.
fn from_pods(world: &World, family: usize) {
    for from in 0..3 {
        for at in 0..3 {
            let vip = to(VIP[family], EACH[at]);
            // A pod that reaches itself sees its node.
            let seen = if from == at { NODES[PODS[from].0][family] } else { PODS[from].1[family] };
            let what = format!("pod {} to pod {} by {vip}", from + 1, at + 1);
            expect(world, &format!("TCP {what}"), world.pod(from, || tcp(vip)), (at + 1, addr(seen)));
            let udp = world.pod(from, || ask(&connected(vip), 10));
            expect(world, &format!("UDP {what}"), udp, (at + 1, addr(seen)));
        }
    }
    let answered: HashSet<usize> =
        (0..30).map(|_| world.pod(0, || tcp(to(VIP[family], ALL))).unwrap().0).collect();
    assert_eq!(answered.len(), 3, "every backend is chosen");
    // What serves on the nodes themselves: the answers come from the stack.
    for (i, port) in ON_NODES.into_iter().enumerate() {
        let vip = to(VIP[family], port);
        let wanted = (NODE_NUMBER + i, addr(PODS[0].1[family]));
        expect(world, &format!("TCP to node {} by {vip}", i + 1), world.pod(0, || tcp(vip)), wanted);
        expect(
            world,
            &format!("UDP to node {} by {vip}", i + 1),
            world.pod(0, || ask(&connected(vip), 10)),
            wanted,
        );
    }
    // A node port of the other node.
    let node_port = to(NODES[1][family], NODE_PORTS[2]);
    let got = world.pod(0, || tcp(node_port));
    expect(world, "node port of the other node", got, (3, addr(NODES[1][family])));
}

fn refused(world: &World, family: usize) {
    let refused = |what: &str, got: io::Result<Answer>| {
        let kind = got.as_ref().map_err(io::Error::kind).err();
        assert_eq!(kind, Some(io::ErrorKind::ConnectionRefused), "{what}: {got:?}; {}", world.counted());
    };
    for port in [NOBODY, 7777, CLOSED] {
        let vip = to(VIP[family], port);
        refused(&format!("TCP {port}"), world.pod(0, || tcp(vip)));
        refused(&format!("UDP {port}"), world.pod(0, || ask(&connected(vip), 10)));
    }
    let silent = to(VIP[family], SILENCE);
    let got = world.pod(0, || TcpStream::connect_timeout(&silent, Duration::from_millis(300)));
    assert_eq!(got.unwrap_err().kind(), io::ErrorKind::TimedOut);
    let node_port = to(NODES[0][family], NODE_PORT_NOBODY);
    refused("node port", world.client.run(|| tcp(node_port)).unwrap());
    refused("node port", world.client.run(|| ask(&connected(node_port), 10)).unwrap());
}

fn from_outside(world: &World, family: usize) {
    let outside = |f: &(dyn Fn() -> io::Result<Answer> + Sync)| world.client.run(f).unwrap();
    for at in 0..3 {
        let node_port = to(NODES[0][family], NODE_PORTS[at]);
        let what = format!("client to pod {} by {node_port}", at + 1);
        let wanted = (at + 1, addr(NODES[0][family]));
        expect(world, &format!("TCP {what}"), outside(&|| tcp(node_port)), wanted);
        expect(world, &format!("UDP {what}"), outside(&|| ask(&connected(node_port), 10)), wanted);
    }
    let kept = to(NODES[0][family], NODE_PORT_LOCAL);
    expect(world, "the source is kept", outside(&|| tcp(kept)), (1, addr(CLIENT[family])));
    // A node itself as backend: here it sees the client, elsewhere the node that the client asked.
    for (i, port) in NODE_PORTS_ON_NODES.into_iter().enumerate() {
        let node_port = to(NODES[0][family], port);
        let what = format!("client to node {} by {node_port}", i + 1);
        let seen = if i == 0 { CLIENT[family] } else { NODES[0][family] };
        let wanted = (NODE_NUMBER + i, addr(seen));
        expect(world, &format!("TCP {what}"), outside(&|| tcp(node_port)), wanted);
        expect(world, &format!("UDP {what}"), outside(&|| ask(&connected(node_port), 10)), wanted);
        expect(world, &format!("fragments {what}"), outside(&|| ask(&connected(node_port), 5000)), wanted);
    }
    let kept = to(NODES[0][family], NODE_PORT_ON_NODE_LOCAL);
    let wanted = (NODE_NUMBER, addr(CLIENT[family]));
    expect(world, "the source is kept, to the node", outside(&|| tcp(kept)), wanted);
    // Sockets of another node are clients as well, and its pods.
    let from_node = |f: &(dyn Fn() -> io::Result<Answer> + Sync)| world.nodes[1].namespace.run(f).unwrap();
    let node_port = to(NODES[0][family], NODE_PORTS_ON_NODES[0]);
    let wanted = (NODE_NUMBER, addr(NODES[1][family]));
    expect(world, "node to node by node port", from_node(&|| tcp(node_port)), wanted);
    let wanted = (1, addr(NODES[0][family]));
    let node_port = to(NODES[0][family], NODE_PORTS[0]);
    expect(world, "node to pod by another's node port", from_node(&|| tcp(node_port)), wanted);
    let node_port = to(NODES[0][family], NODE_PORTS_ON_NODES[1]);
    let wanted = (NODE_NUMBER + 1, addr(NODES[0][family]));
    expect(world, "node to itself by another's node port", from_node(&|| tcp(node_port)), wanted);
    for port in NODE_PORTS_ON_NODES {
        let node_port = to(NODES[0][family], port);
        for pod in [0, 2] {
            let what = format!("pod {} by {node_port}", pod + 1);
            let got = world.pod(pod, || tcp(node_port)).map(|answer| answer.0);
            let wanted = NODE_NUMBER + usize::from(port - NODE_PORTS_ON_NODES[0]);
            expect(world, &what, got, wanted);
        }
    }
    let closed = to(NODES[0][family], NODE_PORT_CLOSED);
    for got in [outside(&|| tcp(closed)), outside(&|| ask(&connected(closed), 10))] {
        let kind = got.as_ref().map_err(io::Error::kind).err();
        assert_eq!(kind, Some(io::ErrorKind::ConnectionRefused), "{closed}: {got:?}; {}", world.counted());
    }
    let external = to(EXTERNAL[family], ALL);
    let answered: HashSet<usize> = (0..40).map(|_| outside(&|| tcp(external)).unwrap().0).collect();
    assert_eq!(answered.len(), 3, "every backend is chosen by hash");
}

/// Datagrams larger than the path takes.
fn fragments(world: &World, family: usize) {
    for at in 0..3 {
        let vip = to(VIP[family], EACH[at]);
        let seen = if at == 0 { NODES[0][family] } else { PODS[0].1[family] };
        let got = world.pod(0, || ask(&connected(vip), 5000));
        expect(world, &format!("fragments to pod {} by {vip}", at + 1), got, (at + 1, addr(seen)));
        let node_port = to(NODES[0][family], NODE_PORTS[at]);
        let got = world.client.run(|| ask(&connected(node_port), 5000)).unwrap();
        expect(world, "fragments from outside", got, (at + 1, addr(NODES[0][family])));
    }
}

/// What is counted of the first pod's packets to the second one.
fn counters(world: &World, family: usize) {
    let service = id(family, Protocol::Udp, 1);
    let count = || {
        let counts = world.nodes[0].writer.as_ref().unwrap().counters();
        let of = counts.into_iter().find(|c| c.id == service).unwrap();
        (of.connections, of.packets, of.bytes)
    };
    let socket = world.pod(0, || connected(to(VIP[family], EACH[1])));
    let before = count();
    for _ in 0..3 {
        ask(&socket, 10).unwrap();
    }
    let after = count();
    assert_eq!(
        (after.0 - before.0, after.1 - before.1),
        (1, 3),
        "one exchange, three packets; answers are not counted"
    );
    let each = 10 + 8 + if family == 0 { 20 } else { 40 };
    assert_eq!(after.2 - before.2, 3 * each);
}

/// Translations go with their flows, and the ports that these had: those of a socket that is still in use stay.
fn forgotten(world: &World, family: usize) {
    let node = &world.nodes[0];
    let translations = || {
        let pin = node.pins.join(format!("maps-v{ABI_VERSION}/TRANSLATIONS"));
        let map = aya::maps::Map::LruHashMap(aya::maps::MapData::from_pin(pin).unwrap());
        aya::maps::HashMap::<_, CtKey, Translation>::try_from(map).unwrap().keys().count()
    };
    let sweep = |later| {
        let report = node.datapath.as_ref().unwrap().sweep_conntrack_at(later, |_| {}).unwrap();
        assert!(report.translations <= 2 * report.removed, "{report:?}");
        report.translations
    };
    // Everything so far; a packet that was on its way may open a flow again behind the sweep.
    let node_port = to(NODES[0][family], NODE_PORTS[2]);
    let mut left = usize::MAX;
    for _ in 0..10 {
        sweep(Duration::from_secs(100_000));
        std::thread::sleep(Duration::from_millis(100));
        left = translations();
        if left == 0 {
            break;
        }
    }
    assert_eq!(left, 0, "each belongs to a flow");
    let answered = world.client.run(|| (0..20).all(|_| tcp(node_port).is_ok())).unwrap();
    assert!(answered);
    let open = world.client.run(|| connected(node_port)).unwrap();
    ask(&open, 10).unwrap();
    assert_eq!(translations(), 42);
    assert_eq!(sweep(Duration::ZERO), 0, "closed connections rest for some seconds");
    assert_eq!(sweep(Duration::from_secs(20)), 40);
    assert_eq!(translations(), 2);
    assert_eq!(ask(&open, 10).unwrap().0, 3);
    assert_eq!(sweep(Duration::from_secs(300)), 2);
    assert_eq!(ask(&open, 10).unwrap().0, 3, "it begins again");
}

/// Datagrams of one socket after their backend has gone.
fn moving(world: &mut World, family: usize) {
    let vip = to(VIP[family], ALL);
    let socket = world.pod(0, || connected(vip));
    let first = ask(&socket, 10).unwrap().0;
    assert_eq!(ask(&socket, 10).unwrap().0, first, "a flow keeps its backend");
    let left: Vec<usize> = (0..3).filter(|i| i + 1 != first).collect();
    let set = SetId { service: id(family, Protocol::Udp, 3), kind: SetKind::Cluster };
    world.apply(&|node| vec![TableChange::Set(set, Some(backends(family, node, &left, TARGET)))]);
    let moved = ask(&socket, 10).unwrap().0;
    assert_ne!(moved, first, "it moves with the next datagram");
    assert_eq!(ask(&socket, 10).unwrap().0, moved);
}
