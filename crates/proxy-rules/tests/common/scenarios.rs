//! What every writer has to do with real packets.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use podway_proxy_rules::{Feature, ServiceTable, Writer};
use podway_services::table::{
    Backend, Family, Frontend, FrontendAddr, FrontendKey, FrontendKind, Protocol, Route, ServiceId,
    ServiceMeta, SetId, SetKind, TableChange, Target,
};

use super::world::{Outcome, PORT, World, address, ask, ip};

pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
pub const CLUSTER: Target = Target::Set(SetKind::Cluster);
pub const LOCAL: Target = Target::Set(SetKind::Local);

pub const fn route(target: Target, masquerade: bool) -> Route {
    Route { target, masquerade }
}

/// Routes of a cluster IP.
pub const INTERNAL: [Route; 3] = [route(CLUSTER, false), route(CLUSTER, false), route(CLUSTER, true)];
/// Routes of what is reached from outside under `externalTrafficPolicy: Cluster`.
pub const OUTER: [Route; 3] = [route(CLUSTER, true), route(CLUSTER, true), route(CLUSTER, true)];
/// The same under `Local`.
pub const OUTER_LOCAL: [Route; 3] = [route(CLUSTER, true), route(CLUSTER, true), route(LOCAL, false)];
/// `Local` without a local endpoint.
pub const OUTER_DROP: [Route; 3] = [route(CLUSTER, true), route(CLUSTER, true), route(Target::Drop, false)];
pub const NOBODY: [Route; 3] = [route(Target::Reject, false); 3];

/// The n-th cluster IP.
pub fn vip(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 96, 0, n]),
        Family::V6 => ip(&format!("fd00:96::{n:x}")),
    }
}

/// The n-th address of a load balancer, beyond every known range.
pub fn lb(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([203, 0, 113, n]),
        Family::V6 => ip(&format!("2001:db8::{n:x}")),
    }
}

pub fn meta(id: u32, protocol: Protocol, family: Family) -> TableChange {
    let meta = ServiceMeta {
        namespace: "ns".into(),
        name: format!("svc{id}").into(),
        port_name: "p".into(),
        protocol,
        family,
        external: false,
    };
    TableChange::Service(ServiceId(id), meta)
}

pub fn set(id: u32, kind: SetKind, family: Family, members: &[&str]) -> TableChange {
    let mut backends: Vec<Backend> = members
        .iter()
        .map(|m| Backend {
            addr: address(m, family),
            port: PORT,
            local: m.starts_with('p'),
            terminating: false,
        })
        .collect();
    backends.sort();
    let set = (!backends.is_empty()).then(|| Arc::from(backends));
    TableChange::Set(SetId { service: ServiceId(id), kind }, set)
}

pub fn key(addr: FrontendAddr, port: u16, protocol: Protocol) -> FrontendKey {
    FrontendKey { addr, port, protocol }
}

pub fn frontend(id: u32, key: FrontendKey, kind: FrontendKind, routes: [Route; 3]) -> TableChange {
    let frontend = Frontend { service: ServiceId(id), kind, routes, affinity_s: None, source_ranges: None };
    TableChange::Frontend(key, frontend)
}

/// A service with a cluster IP.
pub fn cluster_ip(id: u8, protocol: Protocol, family: Family, members: &[&str]) -> Vec<TableChange> {
    let addr = vip(family, id);
    let routes = if members.is_empty() { NOBODY } else { INTERNAL };
    vec![
        meta(id.into(), protocol, family),
        set(id.into(), SetKind::Cluster, family, members),
        TableChange::Vip(addr),
        frontend(id.into(), key(FrontendAddr::Ip(addr), 80, protocol), FrontendKind::ClusterIp, routes),
    ]
}

/// The writer under test, in the node's namespace, and what it was given so far.
pub struct Bench<'a> {
    pub world: &'a World,
    pub writer: &'a mut dyn Writer,
    pub table: ServiceTable,
    what: String,
}

impl<'a> Bench<'a> {
    pub fn new(world: &'a World, writer: &'a mut dyn Writer) -> Self {
        let mut bench = Self { world, writer, table: ServiceTable::default(), what: String::new() };
        bench.sync();
        bench
    }

    /// Names what comes, for messages.
    pub fn doing(&mut self, what: impl Into<String>) {
        self.what = format!("{}: {}", self.writer.name(), what.into());
    }

    pub fn sync(&mut self) {
        let (view, table) = (self.world.view(), &self.table);
        let writer = &mut self.writer;
        let report = self.world.enter("node", || writer.sync(table, &view)).unwrap();
        assert_eq!(report.refused, [], "{}", self.what);
    }

    pub fn apply(&mut self, changes: &[TableChange]) {
        for change in changes {
            self.table.apply(change);
        }
        assert_eq!(self.table.violations(), Vec::<String>::new(), "{}: the scenario itself", self.what);
        let writer = &mut self.writer;
        let report = self
            .world
            .enter("node", || writer.apply(changes))
            .unwrap_or_else(|e| panic!("{}: {e}", self.what));
        assert_eq!(report.refused, [], "{}", self.what);
    }

    /// Takes everything away by changes.
    pub fn clear(&mut self) {
        let changes = ServiceTable::diff(&self.table, &ServiceTable::default());
        self.apply(&changes);
        assert!(self.table.is_empty());
    }

    /// Exactly these serve, and see the client itself or the node.
    #[track_caller]
    pub fn served(&self, from: &str, protocol: Protocol, to: (IpAddr, u16), by: &[&str], sees_client: bool) {
        let family = Family::of(&to.0);
        let outcomes = self.world.tries(from, protocol, SocketAddr::from(to), 24 * by.len());
        let mut who = BTreeSet::new();
        for outcome in &outcomes {
            let Outcome::Served { by, saw } = outcome else {
                panic!("{}: {from} to {to:?}/{protocol}: {outcome:?}", self.what)
            };
            who.insert(by.as_str());
            // Which of its addresses the node itself has on the way to a pod is no matter of the writer's.
            let client = if from == "node" { sees_client } else { *saw == address(from, family) };
            assert_eq!(client, sees_client, "{}: {from} to {to:?}/{protocol}: {by} saw {saw}", self.what);
        }
        let by: BTreeSet<&str> = by.iter().copied().collect();
        assert_eq!(who, by, "{}: {from} to {to:?}/{protocol}", self.what);
    }

    #[track_caller]
    pub fn all(&self, from: &str, protocol: Protocol, to: (IpAddr, u16), outcome: &Outcome) {
        let outcomes = self.world.tries(from, protocol, SocketAddr::from(to), 2);
        assert!(
            outcomes.iter().all(|o| o == outcome),
            "{}: {from} to {to:?}/{protocol}: {outcomes:?} instead of {outcome:?}",
            self.what
        );
    }

    /// Whether the mechanism does this at all; says so when not.
    pub fn can(&self, feature: Feature) -> bool {
        match self.writer.supports(feature) {
            Ok(()) => true,
            Err(why) => {
                println!("left out: {why}");
                false
            }
        }
    }
}

/// One scenario: leaves nothing behind in the table.
pub type Scenario = (&'static str, fn(&mut Bench<'_>, Family));

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    ("cluster IP: every backend gets its share, and sees the pod", cluster_ips),
    ("cluster IP: backends come and go", backends_change),
    ("a pod that reaches itself is masqueraded", hairpin),
    ("no endpoints: refused at once; then there are some", no_endpoints),
    ("undefined port of a service's address, unused address of the range", undefined),
    ("node port, policy Cluster", node_port),
    ("load balancer, policy Local: the source stays; pods are short-circuited", local_policy),
    ("policy Local without a local endpoint drops", local_without_endpoints),
    ("source ranges", source_ranges),
    ("session affinity, also when the backend goes", affinity),
    ("affinity ends after its timeout", affinity_timeout),
    ("same port, two protocols", two_protocols),
    ("external IP and host port", host_port),
    ("UDP: a flow that goes on finds a new backend", udp_backend_gone),
    ("UDP: a flow begun before there were backends", udp_before_backends),
    ("established connections outlive their backend's removal", established),
    ("many backends", many_backends),
];

fn cluster_ips(b: &mut Bench<'_>, family: Family) {
    for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
        b.apply(&cluster_ip(id, protocol, family, &["p1", "r1", "r2"]));
        let to = (vip(family, id), 80);
        b.served("p2", protocol, to, &["p1", "r1", "r2"], true);
        b.served("node", protocol, to, &["p1", "r1", "r2"], true);
        b.served("o1", protocol, to, &["p1", "r1", "r2"], false);
    }
}

fn backends_change(b: &mut Bench<'_>, family: Family) {
    b.apply(&cluster_ip(1, Protocol::Tcp, family, &["r1"]));
    let to = (vip(family, 1), 80);
    for members in
        [&["r1"][..], &["r1", "r2"], &["p1", "r1", "r2"], &["p1", "p2", "r1", "r2"], &["p2", "r2"], &["p1"]]
    {
        b.apply(&[set(1, SetKind::Cluster, family, members)]);
        let from = if members.contains(&"p2") { "o1" } else { "p2" };
        b.served(from, Protocol::Tcp, to, members, from == "p2");
    }
}

fn hairpin(b: &mut Bench<'_>, family: Family) {
    if !b.can(Feature::Hairpin) {
        return;
    }
    for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
        b.apply(&cluster_ip(id, protocol, family, &["p1"]));
        b.served("p1", protocol, (vip(family, id), 80), &["p1"], false);
        b.served("p2", protocol, (vip(family, id), 80), &["p1"], true);
    }
}

fn no_endpoints(b: &mut Bench<'_>, family: Family) {
    for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
        b.apply(&cluster_ip(id, protocol, family, &[]));
        let lb_key = key(FrontendAddr::Ip(lb(family, id)), 80, protocol);
        let np_key = key(FrontendAddr::Node(family), 30000 + u16::from(id), protocol);
        b.apply(&[
            frontend(id.into(), lb_key, FrontendKind::LoadBalancer, NOBODY),
            frontend(id.into(), np_key, FrontendKind::NodePort, NOBODY),
        ]);
        let all =
            [(vip(family, id), 80), (lb(family, id), 80), (address("node", family), 30000 + u16::from(id))];
        for to in all {
            for from in ["p1", "node", "o2"] {
                b.all(from, protocol, to, &Outcome::Refused);
            }
        }
        b.apply(&[
            set(id.into(), SetKind::Cluster, family, &["r1"]),
            frontend(
                id.into(),
                key(FrontendAddr::Ip(vip(family, id)), 80, protocol),
                FrontendKind::ClusterIp,
                INTERNAL,
            ),
            frontend(id.into(), lb_key, FrontendKind::LoadBalancer, OUTER),
            frontend(id.into(), np_key, FrontendKind::NodePort, OUTER),
        ]);
        b.served("p1", protocol, all[0], &["r1"], true);
        b.served("o2", protocol, all[1], &["r1"], false);
        b.served("o2", protocol, all[2], &["r1"], false);
    }
}

fn undefined(b: &mut Bench<'_>, family: Family) {
    if !b.can(Feature::UndefinedPorts) {
        return;
    }
    b.apply(&cluster_ip(1, Protocol::Tcp, family, &["r1"]));
    // An address of our own pool, outside of every range of cluster IPs.
    b.apply(&[
        TableChange::Vip(lb(family, 1)),
        frontend(
            1,
            key(FrontendAddr::Ip(lb(family, 1)), 80, Protocol::Tcp),
            FrontendKind::LoadBalancer,
            OUTER,
        ),
    ]);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for from in ["p1", "node", "o2"] {
            b.all(from, protocol, (vip(family, 1), 81), &Outcome::Refused);
            b.all(from, protocol, (lb(family, 1), 81), &Outcome::Refused);
        }
    }
    for from in ["p1", "o2"] {
        b.all(from, Protocol::Tcp, (vip(family, 99), 80), &Outcome::Silence);
    }
    b.served("o2", Protocol::Tcp, (lb(family, 1), 80), &["r1"], false);
}

fn node_port(b: &mut Bench<'_>, family: Family) {
    for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
        let port = 30000 + u16::from(id);
        b.apply(&cluster_ip(id, protocol, family, &["p1", "r1"]));
        let np = key(FrontendAddr::Node(family), port, protocol);
        b.apply(&[frontend(id.into(), np, FrontendKind::NodePort, OUTER)]);
        let node = address("node", family);
        b.served("o2", protocol, (node, port), &["p1", "r1"], false);
        b.served("p2", protocol, (node, port), &["p1", "r1"], false);
        b.served("node", protocol, (node, port), &["p1", "r1"], true);
        // Not at other addresses of the node.
        let other = if family == Family::V4 { ip("192.168.51.1") } else { ip("fd00:51::1") };
        b.all("o2", protocol, (other, port), &Outcome::Refused);
        b.apply(&[TableChange::FrontendGone(np)]);
        b.all("o2", protocol, (node, port), &Outcome::Refused);
    }
}

fn local_policy(b: &mut Bench<'_>, family: Family) {
    b.apply(&cluster_ip(1, Protocol::Tcp, family, &["p1", "p2", "r1"]));
    let np = key(FrontendAddr::Node(family), 30001, Protocol::Tcp);
    let balancer = key(FrontendAddr::Ip(lb(family, 1)), 80, Protocol::Tcp);
    b.apply(&[
        set(1, SetKind::Local, family, &["p1", "p2"]),
        frontend(1, balancer, FrontendKind::LoadBalancer, OUTER_LOCAL),
        frontend(1, np, FrontendKind::NodePort, OUTER_LOCAL),
    ]);
    for to in [(lb(family, 1), 80), (address("node", family), 30001)] {
        b.served("o1", Protocol::Tcp, to, &["p1", "p2"], true);
        b.served("o2", Protocol::Tcp, to, &["p1", "p2"], true);
        b.served("r2", Protocol::Tcp, to, &["p1", "p2", "r1"], false);
        b.apply(&[set(1, SetKind::Local, family, &["p2"])]);
        b.served("o2", Protocol::Tcp, to, &["p2"], true);
        b.apply(&[set(1, SetKind::Local, family, &["p1", "p2"])]);
    }
}

fn local_without_endpoints(b: &mut Bench<'_>, family: Family) {
    for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
        let port = 30000 + u16::from(id);
        b.apply(&cluster_ip(id, protocol, family, &["r1"]));
        b.apply(&[
            frontend(
                id.into(),
                key(FrontendAddr::Ip(lb(family, id)), 80, protocol),
                FrontendKind::LoadBalancer,
                OUTER_DROP,
            ),
            frontend(
                id.into(),
                key(FrontendAddr::Node(family), port, protocol),
                FrontendKind::NodePort,
                OUTER_DROP,
            ),
        ]);
        for to in [(lb(family, id), 80), (address("node", family), port)] {
            b.all("o2", protocol, to, &Outcome::Silence);
            b.served("p1", protocol, to, &["r1"], false);
        }
    }
}

fn source_ranges(b: &mut Bench<'_>, family: Family) {
    if !b.can(Feature::SourceRanges) {
        return;
    }
    b.apply(&cluster_ip(1, Protocol::Tcp, family, &["r1"]));
    let ranged = |nets: &[&str]| {
        let frontend = Frontend {
            service: ServiceId(1),
            kind: FrontendKind::LoadBalancer,
            routes: OUTER,
            affinity_s: None,
            source_ranges: Some(nets.iter().map(|n| n.parse().unwrap()).collect()),
        };
        [TableChange::Frontend(key(FrontendAddr::Ip(lb(family, 1)), 80, Protocol::Tcp), frontend)]
    };
    let to = (lb(family, 1), 80);
    let (first, second) = match family {
        Family::V4 => ("192.168.50.0/24", "192.168.51.0/24"),
        Family::V6 => ("fd00:50::/64", "fd00:51::/64"),
    };
    b.apply(&ranged(&[first]));
    b.served("o1", Protocol::Tcp, to, &["r1"], false);
    b.served("node", Protocol::Tcp, to, &["r1"], true);
    b.all("o2", Protocol::Tcp, to, &Outcome::Silence);
    b.all("p1", Protocol::Tcp, to, &Outcome::Silence);
    b.apply(&ranged(&[second]));
    b.served("o2", Protocol::Tcp, to, &["r1"], false);
    b.all("o1", Protocol::Tcp, to, &Outcome::Silence);
    b.apply(&ranged(&[first, second]));
    b.served("o1", Protocol::Tcp, to, &["r1"], false);
    b.served("o2", Protocol::Tcp, to, &["r1"], false);
    // The cluster IP is not concerned.
    b.served("p1", Protocol::Tcp, (vip(family, 1), 80), &["r1"], true);
}

fn with_affinity(mut changes: Vec<TableChange>, seconds: u32) -> Vec<TableChange> {
    for change in &mut changes {
        if let TableChange::Frontend(_, frontend) = change {
            frontend.affinity_s = Some(seconds);
        }
    }
    changes
}

fn who(outcome: Outcome) -> String {
    match outcome {
        Outcome::Served { by, .. } => by,
        other => panic!("{other:?}"),
    }
}

fn affinity(b: &mut Bench<'_>, family: Family) {
    if !b.can(Feature::Affinity) {
        return;
    }
    for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
        b.apply(&with_affinity(cluster_ip(id, protocol, family, &["p1", "r1", "r2"]), 600));
        let to = SocketAddr::from((vip(family, id), 80));
        let mut chosen = BTreeSet::new();
        for from in ["p2", "o1", "o2", "node"] {
            let by: BTreeSet<String> = b.world.tries(from, protocol, to, 20).into_iter().map(who).collect();
            assert_eq!(by.len(), 1, "{from} stays with one: {by:?}");
            chosen.extend(by);
        }
        // More backends: clients stay. Theirs goes: they move, and stay there.
        let had = who(b.world.tries("o1", protocol, to, 1).remove(0));
        b.apply(&[set(id.into(), SetKind::Cluster, family, &["p1", "p2", "r1", "r2"])]);
        let by: BTreeSet<String> = b.world.tries("o1", protocol, to, 20).into_iter().map(who).collect();
        assert_eq!(by, BTreeSet::from([had.clone()]));
        let rest: Vec<&str> = ["p1", "p2", "r1", "r2"].into_iter().filter(|m| *m != had).collect();
        b.apply(&[set(id.into(), SetKind::Cluster, family, &rest)]);
        let by: BTreeSet<String> = b.world.tries("o1", protocol, to, 20).into_iter().map(who).collect();
        assert_eq!(by.len(), 1, "after {had} went: {by:?}");
        assert!(!by.contains(&had));
    }
}

fn affinity_timeout(b: &mut Bench<'_>, family: Family) {
    if !b.can(Feature::Affinity) {
        return;
    }
    b.apply(&with_affinity(cluster_ip(1, Protocol::Tcp, family, &["p1", "p2", "r1", "r2"]), 1));
    let to = SocketAddr::from((vip(family, 1), 80));
    let mut seen = BTreeSet::new();
    // Four backends: the chance that twelve free choices are all the same is one in four million.
    for _ in 0..12 {
        seen.insert(who(b.world.tries("o1", Protocol::Tcp, to, 1).remove(0)));
        if seen.len() > 1 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1200));
    }
    panic!("{}: always {seen:?}", b.what);
}

fn two_protocols(b: &mut Bench<'_>, family: Family) {
    let addr = vip(family, 1);
    b.apply(&cluster_ip(1, Protocol::Tcp, family, &["p1"]));
    b.apply(&[
        meta(2, Protocol::Udp, family),
        set(2, SetKind::Cluster, family, &["r1"]),
        frontend(2, key(FrontendAddr::Ip(addr), 80, Protocol::Udp), FrontendKind::ClusterIp, INTERNAL),
    ]);
    b.served("p2", Protocol::Tcp, (addr, 80), &["p1"], true);
    b.served("p2", Protocol::Udp, (addr, 80), &["r1"], true);
    b.apply(&[TableChange::FrontendGone(key(FrontendAddr::Ip(addr), 80, Protocol::Udp))]);
    b.served("p2", Protocol::Tcp, (addr, 80), &["p1"], true);
    b.all("p2", Protocol::Udp, (addr, 80), &Outcome::Refused);
}

fn host_port(b: &mut Bench<'_>, family: Family) {
    b.apply(&cluster_ip(1, Protocol::Tcp, family, &["p1"]));
    let external = key(FrontendAddr::Ip(lb(family, 9)), 80, Protocol::Tcp);
    let node = address("node", family);
    b.apply(&[
        frontend(1, external, FrontendKind::ExternalIp, OUTER),
        meta(2, Protocol::Tcp, family),
        set(2, SetKind::Cluster, family, &["p2"]),
        frontend(
            2,
            key(FrontendAddr::Node(family), 9090, Protocol::Tcp),
            FrontendKind::HostPort,
            [route(CLUSTER, false); 3],
        ),
        frontend(
            2,
            key(FrontendAddr::Ip(node), 9091, Protocol::Tcp),
            FrontendKind::HostPort,
            [route(CLUSTER, false); 3],
        ),
    ]);
    b.served("o2", Protocol::Tcp, (lb(family, 9), 80), &["p1"], false);
    b.served("o2", Protocol::Tcp, (node, 9090), &["p2"], true);
    b.served("o2", Protocol::Tcp, (node, 9091), &["p2"], true);
    b.served("r1", Protocol::Tcp, (node, 9091), &["p2"], true);
}

fn udp_socket(b: &Bench<'_>, from: &str, family: Family) -> UdpSocket {
    let addr = address(from, family);
    b.world.enter(from, || UdpSocket::bind((addr, 0))).unwrap()
}

fn udp_backend_gone(b: &mut Bench<'_>, family: Family) {
    b.apply(&cluster_ip(1, Protocol::Udp, family, &["r1"]));
    let np = key(FrontendAddr::Node(family), 30001, Protocol::Udp);
    b.apply(&[frontend(1, np, FrontendKind::NodePort, OUTER)]);
    let pod = (udp_socket(b, "p2", family), SocketAddr::from((vip(family, 1), 80)));
    let outside = (udp_socket(b, "o2", family), SocketAddr::from((address("node", family), 30001)));
    for (socket, to) in [&pod, &outside] {
        assert_eq!(who(ask(socket, *to)), "r1");
        assert_eq!(who(ask(socket, *to)), "r1");
    }
    b.apply(&[set(1, SetKind::Cluster, family, &["r2"])]);
    for (socket, to) in [&pod, &outside] {
        assert_eq!(who(ask(socket, *to)), "r2", "{}: the very next datagram", b.what);
    }
    // A backend more changes nothing for them.
    b.apply(&[set(1, SetKind::Cluster, family, &["p1", "r1", "r2"])]);
    for (socket, to) in [&pod, &outside] {
        for _ in 0..8 {
            assert_eq!(who(ask(socket, *to)), "r2");
        }
    }
}

fn udp_before_backends(b: &mut Bench<'_>, family: Family) {
    // Before the service is known at all its datagrams are for nobody.
    let socket = udp_socket(b, "p2", family);
    let to = SocketAddr::from((lb(family, 5), 80));
    assert!(matches!(ask(&socket, to), Outcome::Silence | Outcome::Refused | Outcome::Other(_)));
    b.apply(&[
        meta(1, Protocol::Udp, family),
        frontend(
            1,
            key(FrontendAddr::Ip(lb(family, 5)), 80, Protocol::Udp),
            FrontendKind::ExternalIp,
            NOBODY,
        ),
    ]);
    b.apply(&[
        set(1, SetKind::Cluster, family, &["p1"]),
        frontend(1, key(FrontendAddr::Ip(lb(family, 5)), 80, Protocol::Udp), FrontendKind::ExternalIp, OUTER),
    ]);
    // An error that an earlier datagram brought back may still be waiting on the socket.
    let mut last = ask(&socket, to);
    if !matches!(last, Outcome::Served { .. }) {
        last = ask(&socket, to);
    }
    assert_eq!(who(last), "p1", "{}", b.what);
}

fn established(b: &mut Bench<'_>, family: Family) {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
    };
    b.apply(&cluster_ip(1, Protocol::Tcp, family, &["r1"]));
    let listener = b.world.enter("r1", || TcpListener::bind((address("r1", family), 9999))).unwrap();
    let one: Arc<[Backend]> =
        Arc::from([Backend { addr: address("r1", family), port: 9999, local: false, terminating: false }]);
    b.apply(&[TableChange::Set(SetId { service: ServiceId(1), kind: SetKind::Cluster }, Some(one))]);
    let to = SocketAddr::from((vip(family, 1), 80));
    let mut client = b.world.enter("p2", || TcpStream::connect(to)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    b.apply(&[set(1, SetKind::Cluster, family, &["r2"])]);
    server.write_all(b"still here").unwrap();
    let mut buffer = [0; 10];
    client.read_exact(&mut buffer).unwrap();
    client.write_all(b"yes").unwrap();
    b.served("p2", Protocol::Tcp, (vip(family, 1), 80), &["r2"], true);
    b.clear();
    // And when the whole service is gone.
    server.write_all(b"still here").unwrap();
    client.read_exact(&mut buffer).unwrap();
}

fn many_backends(b: &mut Bench<'_>, family: Family) {
    // 40 ports of two pods; the servers are of both families and stay for the second.
    for port in if family == Family::V4 { 8100..8140 } else { 0..0 } {
        b.world.serve("r1", port);
        b.world.serve("r2", port);
    }
    let backends: Vec<Backend> = ["r1", "r2"]
        .iter()
        .flat_map(|m| (8100..8140).map(|port| (*m, port)))
        .map(|(m, port)| Backend { addr: address(m, family), port, local: false, terminating: false })
        .collect();
    b.apply(&cluster_ip(1, Protocol::Tcp, family, &["r1"]));
    let id = SetId { service: ServiceId(1), kind: SetKind::Cluster };
    b.apply(&[TableChange::Set(id, Some(backends.into()))]);
    let outcomes = b.world.tries("p1", Protocol::Tcp, SocketAddr::from((vip(family, 1), 80)), 300);
    let first = outcomes.iter().filter(|o| matches!(o, Outcome::Served { by, .. } if by == "r1")).count();
    let second = outcomes.iter().filter(|o| matches!(o, Outcome::Served { by, .. } if by == "r2")).count();
    assert_eq!(first + second, 300, "{}: {outcomes:?}", b.what);
    // Five standard deviations around one half.
    assert!((107..=193).contains(&first), "{}: {first} of 300", b.what);
}
