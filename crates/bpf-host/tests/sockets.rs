//! Services at the socket hooks: real sockets of a process in a cgroup of its own, in namespaces that stand for a node
//! and a pod. Backends are servers on addresses of the loopback device.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::needless_range_loop,
    clippy::needless_pass_by_value,
    reason = "a test fails by panicking and says why it skips; numbers name families and pods"
)]

use std::{
    collections::HashSet,
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use podway_bpf_host::{Datapath, ServiceWriter};
use podway_link::{AddressFlags, Netlink, Netns};
use podway_services::table::{
    Backend, Family, Frontend, FrontendAddr, FrontendKey, FrontendKind, NodeView, Protocol, Route, ServiceId,
    ServiceMeta, SetId, SetKind, TableChange, Target,
};

const PINS: &str = "/sys/fs/bpf/podway-test-sockets";
const NODE_ADDRESS: &str = "172.18.9.1";
const VIPS: [&str; 2] = ["10.96.9.10", "fd00:10:96::910"];
const BALANCER: &str = "198.51.100.9";
/// Three backends of each family, all on this node's loopback device.
const BACKENDS: [[&str; 3]; 2] = [
    ["10.244.9.1", "10.244.9.2", "10.244.9.3"],
    ["fd00:10:244:9::1", "fd00:10:244:9::2", "fd00:10:244:9::3"],
];
const PORT: u16 = 80;
const TARGET: u16 = 8080;
const NODE_PORT: u16 = 30_080;
const EMPTY_PORT: u16 = 81;
const AFFINITY_PORT: u16 = 82;
const LOCAL_PORT: u16 = 83;
const WAIT: Duration = Duration::from_secs(2);

/// The process is in this cgroup for the time of the test.
struct Cgroup(PathBuf);

impl Cgroup {
    fn root() -> Option<PathBuf> {
        ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(PathBuf::from)
            .find(|p| p.join("cgroup.procs").exists() && p.join("cgroup.controllers").exists())
    }

    fn enter(name: &str) -> Option<Self> {
        let root = Self::root()?;
        let path = root.join(name);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("cgroup.procs"), std::process::id().to_string()).unwrap();
        Some(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let root = self.0.parent().unwrap_or(Path::new("/"));
        let _ = fs::write(root.join("cgroup.procs"), std::process::id().to_string());
        let _ = fs::remove_dir(&self.0);
    }
}

/// Everything that the test makes, removed at the end.
struct World {
    node: Netns,
    pod: Netns,
    datapath: Option<Datapath>,
    cgroup: Cgroup,
}

impl World {
    fn new(cgroup: Cgroup) -> Self {
        clean();
        let (node, pod) = (namespace("pwt-sock-node"), namespace("pwt-sock-pod"));
        let datapath = Datapath::load(Path::new(PINS)).unwrap();
        datapath.attach_sockets(&cgroup.0).unwrap();
        Self { node, pod, datapath: Some(datapath), cgroup }
    }

    fn datapath(&self) -> &Datapath {
        self.datapath.as_ref().unwrap()
    }

    fn writer(&self) -> ServiceWriter {
        let mut writer = self.datapath().services().unwrap();
        self.node.run(|| writer.set_node(&view()).map(|_| ())).unwrap().unwrap();
        writer
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.datapath.take();
        clean();
    }
}

fn clean() {
    let _ = Datapath::remove_all(Path::new(PINS));
    for name in Netns::list_named("pwt-sock").unwrap_or_default() {
        let _ = Netns::delete_named(&name);
    }
}

fn namespace(name: &str) -> Netns {
    let namespace = Netns::create_named(name).unwrap();
    let mut netlink = Netlink::open_in(&namespace).unwrap();
    let lo = netlink.link_by_name("lo").unwrap().unwrap().index;
    netlink.set_up(lo).unwrap();
    let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
    for addr in BACKENDS.iter().flatten().chain([&NODE_ADDRESS]) {
        let addr: IpAddr = addr.parse().unwrap();
        netlink.add_address(lo, addr.into(), flags).unwrap();
    }
    namespace
}

fn addr_of(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn view() -> NodeView {
    let node: IpAddr = NODE_ADDRESS.parse().unwrap();
    NodeView {
        name: "node".to_owned(),
        addresses: vec![node],
        node_port_addresses: vec![node, addr_of("127.0.0.1"), addr_of("::1")],
        ..NodeView::default()
    }
}

const TO_CLUSTER: Route = Route { target: Target::Set(SetKind::Cluster), masquerade: false };
const TO_LOCAL: Route = Route { target: Target::Set(SetKind::Local), masquerade: false };
const REJECT: Route = Route { target: Target::Reject, masquerade: false };

fn frontend(service: u32, route: Route) -> Frontend {
    Frontend {
        service: ServiceId(service),
        kind: FrontendKind::ClusterIp,
        routes: [route; 3],
        affinity_s: None,
        source_ranges: None,
    }
}

fn at(addr: &str, port: u16, protocol: Protocol) -> FrontendKey {
    FrontendKey { addr: FrontendAddr::Ip(addr.parse().unwrap()), port, protocol }
}

fn backends(family: usize, which: &[usize]) -> Arc<[Backend]> {
    which
        .iter()
        .map(|i| Backend {
            addr: BACKENDS[family][*i].parse().unwrap(),
            port: TARGET,
            local: *i == 0,
            terminating: false,
        })
        .collect()
}

fn meta(protocol: Protocol, family: usize) -> ServiceMeta {
    ServiceMeta {
        namespace: "default".into(),
        name: "web".into(),
        port_name: "".into(),
        protocol,
        family: if family == 0 { Family::V4 } else { Family::V6 },
        external: true,
    }
}

const fn service_of(family: usize, protocol: Protocol) -> u32 {
    (family * 2) as u32 + matches!(protocol, Protocol::Udp) as u32
}

/// Both families, TCP and UDP, behind the same ports.
fn table() -> Vec<TableChange> {
    let mut all = Vec::new();
    for family in 0..2 {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let id = service_of(family, protocol);
            all.push(TableChange::Service(ServiceId(id), meta(protocol, family)));
            let set = |kind| SetId { service: ServiceId(id), kind };
            all.push(TableChange::Set(set(SetKind::Cluster), Some(backends(family, &[0, 1, 2]))));
            all.push(TableChange::Set(set(SetKind::Local), Some(backends(family, &[0]))));
            let vip = VIPS[family];
            let mut add = |key, frontend| all.push(TableChange::Frontend(key, frontend));
            add(at(vip, PORT, protocol), frontend(id, TO_CLUSTER));
            add(at(vip, EMPTY_PORT, protocol), frontend(id, REJECT));
            add(at(vip, LOCAL_PORT, protocol), frontend(id, TO_LOCAL));
            let affine = Frontend { affinity_s: Some(60), ..frontend(id, TO_CLUSTER) };
            add(at(vip, AFFINITY_PORT, protocol), affine);
            let node = if family == 0 { Family::V4 } else { Family::V6 };
            let kind = FrontendKind::NodePort;
            add(
                FrontendKey { addr: FrontendAddr::Node(node), port: NODE_PORT, protocol },
                Frontend { kind, ..frontend(id, TO_CLUSTER) },
            );
        }
        all.push(TableChange::Vip(VIPS[family].parse().unwrap()));
    }
    let ranged = Frontend {
        kind: FrontendKind::LoadBalancer,
        source_ranges: Some(["203.0.113.0/24".parse().unwrap()].into()),
        ..frontend(service_of(0, Protocol::Tcp), TO_CLUSTER)
    };
    all.push(TableChange::Frontend(at(BALANCER, PORT, Protocol::Tcp), ranged));
    all
}

fn socket_addr(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Servers that answer with their own address: one accepted connection or datagram after the other, until dropped.
fn serve(namespace: &Netns) {
    for addr in BACKENDS.into_iter().flatten() {
        let at = socket_addr(addr, TARGET);
        let (listener, udp) =
            namespace.run(|| (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap())).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut stream = stream;
                let _ = stream.write_all(addr.as_bytes());
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(addr.as_bytes(), from);
            }
        });
    }
}

/// Connects and returns who answered, and whom the socket takes for its peer.
fn ask_tcp(to: SocketAddr) -> io::Result<(String, SocketAddr)> {
    let mut stream = TcpStream::connect_timeout(&to, WAIT)?;
    stream.set_read_timeout(Some(WAIT))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok((answer, stream.peer_addr()?))
}

fn any_of(to: SocketAddr) -> SocketAddr {
    SocketAddr::new(if to.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() }, 0)
}

fn udp(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(any_of(to)).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket
}

fn exchange(socket: &UdpSocket, to: SocketAddr) -> io::Result<(String, SocketAddr)> {
    socket.send_to(b"?", to)?;
    let mut buffer = [0; 64];
    let (len, from) = socket.recv_from(&mut buffer)?;
    Ok((String::from_utf8_lossy(&buffer[..len]).into_owned(), from))
}

fn exchange_connected(socket: &UdpSocket) -> io::Result<String> {
    socket.send(b"?")?;
    let mut buffer = [0; 64];
    let len = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

fn refused<T: std::fmt::Debug>(result: io::Result<T>) {
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn services_at_the_sockets_of_a_cgroup() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    if !podway_bpf_host::is_built_in() {
        println!("skipped: built without the kernel object (cargo xtask bpf)");
        return;
    }
    let Some(cgroup) = Cgroup::enter(&format!("pwt-sock-{}", std::process::id())) else {
        println!("skipped: there is no unified cgroup hierarchy");
        return;
    };
    let mut world = World::new(cgroup);
    let mut writer = world.writer();
    let report = writer.sync(&table()).unwrap();
    assert!(report.refused.is_empty(), "{report:?}");
    serve(&world.node);
    serve(&world.pod);
    for namespace in [&world.node, &world.pod] {
        namespace
            .run(|| {
                connections();
                datagrams();
                what_nobody_serves();
                choices();
            })
            .unwrap();
    }
    world.node.run(node_ports_of_the_node).unwrap();
    world.pod.run(node_ports_of_a_pod).unwrap();
    world.node.run(|| assert!(ask_tcp(socket_addr(BALANCER, PORT)).is_ok())).unwrap();
    // The pod's address is not known to the hook: nothing is translated, and nothing there answers.
    world.pod.run(|| assert!(ask_tcp(socket_addr(BALANCER, PORT)).is_err())).unwrap();
    counted(&writer);
    moving(&world, &mut writer);
    drop(writer);
    restarted(&mut world);
    world.datapath().detach_sockets().unwrap();
    // The kernel takes the programs off some time after the last link to them went.
    let end = Instant::now() + Duration::from_secs(5);
    while world.node.run(|| ask_tcp(socket_addr(VIPS[0], PORT)).is_ok()).unwrap() {
        assert!(Instant::now() < end, "detached programs still translate");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn connections() {
    for (family, vip) in VIPS.into_iter().enumerate() {
        let to = socket_addr(vip, PORT);
        let (answer, peer) = ask_tcp(to).unwrap();
        assert!(BACKENDS[family].contains(&answer.as_str()), "{answer}");
        assert_eq!(peer, to, "getpeername tells the service");
        let (answer, _) = ask_tcp(socket_addr(vip, LOCAL_PORT)).unwrap();
        assert_eq!(answer, BACKENDS[family][0], "only the local one");
    }
    // An IPv6 socket that speaks IPv4.
    let IpAddr::V4(v4) = VIPS[0].parse().unwrap() else { panic!() };
    let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), PORT);
    let (answer, peer) = ask_tcp(mapped).unwrap();
    assert!(BACKENDS[0].contains(&answer.as_str()), "{answer}");
    assert_eq!(peer, mapped);
    // What is no service is left alone.
    let direct = socket_addr(BACKENDS[0][1], TARGET);
    assert_eq!(ask_tcp(direct).unwrap(), (BACKENDS[0][1].to_owned(), direct));
}

fn datagrams() {
    for (family, vip) in VIPS.into_iter().enumerate() {
        let to = socket_addr(vip, PORT);
        let socket = udp(to);
        let (first, from) = exchange(&socket, to).unwrap();
        assert!(BACKENDS[family].contains(&first.as_str()), "{first}");
        assert_eq!(from, to, "the sender is told to be the service");
        for _ in 0..5 {
            assert_eq!(exchange(&socket, to).unwrap().0, first, "a socket keeps its backend");
        }
        // The same socket to somebody else.
        let other = BACKENDS[family].into_iter().find(|b| *b != first).unwrap();
        let direct = socket_addr(other, TARGET);
        assert_eq!(exchange(&socket, direct).unwrap(), (other.to_owned(), direct));
        let connected = udp(to);
        connected.connect(to).unwrap();
        assert!(BACKENDS[family].contains(&exchange_connected(&connected).unwrap().as_str()));
        assert_eq!(connected.peer_addr().unwrap(), to);
    }
    let IpAddr::V4(v4) = VIPS[0].parse().unwrap() else { panic!() };
    let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), PORT);
    let (answer, from) = exchange(&udp(mapped), mapped).unwrap();
    assert!(BACKENDS[0].contains(&answer.as_str()), "{answer}");
    assert_eq!(from, mapped);
}

fn what_nobody_serves() {
    for vip in VIPS {
        refused(ask_tcp(socket_addr(vip, EMPTY_PORT)));
        refused(ask_tcp(socket_addr(vip, 7777)));
        let to = socket_addr(vip, EMPTY_PORT);
        refused(exchange(&udp(to), to));
        refused(udp(to).connect(to));
        let to = socket_addr(vip, 7777);
        refused(exchange(&udp(to), to));
    }
}

fn choices() {
    let answers = |port| -> HashSet<String> {
        (0..40).map(|_| ask_tcp(socket_addr(VIPS[0], port)).unwrap().0).collect()
    };
    assert_eq!(answers(PORT).len(), 3, "every backend is chosen");
    assert_eq!(answers(AFFINITY_PORT).len(), 1, "a client keeps its backend");
}

fn node_ports_of_the_node() {
    for (family, addr) in [(0, NODE_ADDRESS), (0, "127.0.0.1"), (1, "::1")] {
        let to = socket_addr(addr, NODE_PORT);
        let (answer, peer) = ask_tcp(to).unwrap();
        assert!(BACKENDS[family].contains(&answer.as_str()), "{answer}");
        assert_eq!(peer, to);
    }
}

fn node_ports_of_a_pod() {
    assert!(ask_tcp(socket_addr(NODE_ADDRESS, NODE_PORT)).is_ok());
    // A pod's loopback is its own, and nobody listens there.
    refused(ask_tcp(socket_addr("127.0.0.1", NODE_PORT)));
    refused(ask_tcp(socket_addr("::1", NODE_PORT)));
}

fn counted(writer: &ServiceWriter) {
    let counts = writer.counters();
    let tcp = counts.iter().find(|c| c.id == ServiceId(service_of(0, Protocol::Tcp))).unwrap();
    assert!(tcp.connections >= 160, "{tcp:?}");
    assert_eq!(tcp.refused, 2, "{tcp:?}");
    let fill = writer.fill();
    let entries = |name: &str| fill.iter().find(|f| f.name == name).unwrap().entries;
    assert_eq!(entries("frontends"), 21);
    assert_eq!(entries("services"), 4);
    assert_eq!(entries("service_backends"), 12);
    assert!(entries("service_maglev") > 0);
}

/// Sockets of datagrams whose backend goes.
fn moving(world: &World, writer: &mut ServiceWriter) {
    let to = socket_addr(VIPS[0], PORT);
    let socket = world.pod.run(|| udp(to)).unwrap();
    let (first, _) = exchange(&socket, to).unwrap();
    let connected = world.pod.run(|| udp(to)).unwrap();
    connected.connect(to).unwrap();
    let second = exchange_connected(&connected).unwrap();
    let direct = world.pod.run(|| udp(to)).unwrap();
    let gone: HashSet<&str> = [first.as_str(), second.as_str()].into();
    direct.connect((second.as_str(), TARGET)).unwrap();
    let left: Vec<usize> = (0..3).filter(|i| !gone.contains(BACKENDS[0][*i])).collect();
    let id = SetId { service: ServiceId(service_of(0, Protocol::Udp)), kind: SetKind::Cluster };
    let local = SetId { kind: SetKind::Local, ..id };
    assert_eq!(world.pod.run(|| writer.destroy_stale_sockets()).unwrap().unwrap(), 0, "nothing is stale yet");
    let report = writer
        .apply(&[TableChange::Set(id, Some(backends(0, &left))), TableChange::Set(local, None)])
        .unwrap();
    assert_eq!(report.backends_gone, gone.len());
    let (moved, from) = exchange(&socket, to).unwrap();
    assert!(!gone.contains(moved.as_str()), "{moved}");
    assert_eq!(from, to);
    assert_eq!(
        world.node.run(|| writer.destroy_stale_sockets()).unwrap().unwrap(),
        0,
        "not in this namespace"
    );
    assert_eq!(world.pod.run(|| writer.destroy_stale_sockets()).unwrap().unwrap(), 1);
    let error = connected.recv(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "the application is told");
    assert_eq!(exchange_connected(&direct).unwrap(), second, "it never asked for the service");
    connected.connect(to).unwrap();
    assert!(!gone.contains(exchange_connected(&connected).unwrap().as_str()), "it connects anew");
    // As it was.
    writer
        .apply(&[
            TableChange::Set(id, Some(backends(0, &[0, 1, 2]))),
            TableChange::Set(local, Some(backends(0, &[0]))),
        ])
        .unwrap();
}

/// The agent goes, and another one comes.
fn restarted(world: &mut World) {
    let before = world.datapath().services().unwrap().dump();
    assert_eq!(before.len(), 21);
    world.datapath.take();
    world.node.run(|| ask_tcp(socket_addr(VIPS[0], PORT)).unwrap()).unwrap();
    world.datapath = Some(Datapath::load(Path::new(PINS)).unwrap());
    world.datapath().attach_sockets(&world.cgroup.0).unwrap();
    assert!(world.datapath().sockets_are_attached(&world.cgroup.0));
    let mut writer = world.writer();
    assert_eq!(writer.dump(), before);
    let report = writer.sync(&table()).unwrap();
    assert_eq!((report.written, report.removed), (0, 0), "nothing has changed: {report:?}");
    world.node.run(|| ask_tcp(socket_addr(VIPS[0], PORT)).unwrap()).unwrap();
    // The new agent numbers services as it pleases: the frontends say which is which.
    let renumbered: Vec<TableChange> = table()
        .into_iter()
        .map(|change| match change {
            TableChange::Service(id, meta) => TableChange::Service(ServiceId(3 - id.0), meta),
            TableChange::Set(set, backends) => {
                TableChange::Set(SetId { service: ServiceId(3 - set.service.0), ..set }, backends)
            }
            TableChange::Frontend(key, frontend) => {
                let service = ServiceId(3 - frontend.service.0);
                TableChange::Frontend(key, Frontend { service, ..frontend })
            }
            other => other,
        })
        .collect();
    let mut writer = world.writer();
    let report = writer.sync(&renumbered).unwrap();
    assert_eq!((report.written, report.removed), (0, 0), "{report:?}");
    assert_eq!(writer.dump(), before);
    let report = writer.sync(&[]).unwrap();
    assert!(report.removed >= 21, "{report:?}");
    assert!(writer.dump().is_empty());
    writer.sync(&table()).unwrap();
}
