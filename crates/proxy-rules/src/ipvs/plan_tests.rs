use podway_services::table::{FrontendKind, Route, ServiceMeta};
use proptest::prelude::*;

use super::*;

fn view() -> NodeView {
    NodeView {
        name: "n1".into(),
        addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        node_port_addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        ..NodeView::default()
    }
}

fn route(target: Target, masquerade: bool) -> Route {
    Route { target, masquerade }
}

fn frontend(service: u32, routes: [Route; 3]) -> Frontend {
    Frontend {
        service: ServiceId(service),
        kind: FrontendKind::ClusterIp,
        routes,
        affinity_s: None,
        source_ranges: None,
    }
}

fn at(addr: &str, port: u16) -> FrontendKey {
    FrontendKey { addr: FrontendAddr::Ip(addr.parse().unwrap()), port, protocol: Protocol::Tcp }
}

fn texts(touched: &Touched, desired: &Desired) -> Vec<String> {
    let text = |e: &Element| {
        let value = e.value.as_ref().map_or_else(String::new, |v| format!(" : {v}"));
        format!("{}{} {}{value}", if desired.has(e) { "+" } else { "-" }, e.set, e.key)
    };
    touched.elements.iter().map(text).collect()
}

const CLUSTER: Target = Target::Set(SetKind::Cluster);
const LOCAL: Target = Target::Set(SetKind::Local);

#[test]
fn who_is_treated_differently_is_marked() {
    let mut desired = Desired::new(&ServiceTable::new(), &view());
    let routes = [route(CLUSTER, false), route(CLUSTER, true), route(LOCAL, false)];
    let touched = desired.apply(&[TableChange::Frontend(at("198.51.100.1", 80), frontend(3, routes))]);
    assert_eq!(
        texts(&touched, &desired),
        [
            "+frontends 198.51.100.1 . tcp . 80",
            "+marks_external 198.51.100.1 . tcp . 80 : 0x50000007",
            "+masquerade_node 198.51.100.1 . tcp . 80",
            "+vips 198.51.100.1",
        ]
    );
    let sets: Vec<_> =
        desired.servers.iter().map(|(key, w)| (key.to_string(), w.set.map(|s| s.kind))).collect();
    assert_eq!(
        sets,
        [
            ("198.51.100.1:80 TCP".to_owned(), Some(SetKind::Cluster)),
            ("mark 0x50000007 (IPv4)".to_owned(), Some(SetKind::Local)),
        ]
    );
    // No endpoint here: dropped, and the second server goes.
    let routes = [route(CLUSTER, false), route(CLUSTER, true), route(Target::Drop, false)];
    let touched = desired.apply(&[TableChange::Frontend(at("198.51.100.1", 80), frontend(3, routes))]);
    assert!(
        texts(&touched, &desired).contains(&"+verdicts_external 198.51.100.1 . tcp . 80 : drop".to_owned())
    );
    assert_eq!(desired.servers.len(), 1);
    // Nobody serves: the server stays, without a set, for connections that are open.
    let routes = [route(Target::Reject, false); 3];
    desired.apply(&[TableChange::Frontend(at("198.51.100.1", 80), frontend(3, routes))]);
    assert_eq!(desired.servers.iter().next().map(|(_, w)| w.set), Some(None));
    desired.apply(&[TableChange::FrontendGone(at("198.51.100.1", 80))]);
    assert_eq!(desired.servers.len(), 0);
    assert_eq!(desired.all().elements.len(), 2, "the ranges are left");
}

#[test]
fn one_address_goes_before_all_of_the_nodes() {
    let node = FrontendKey { addr: FrontendAddr::Node(Family::V4), port: 30080, protocol: Protocol::Tcp };
    let mut desired = Desired::new(&ServiceTable::new(), &view());
    let all = [route(CLUSTER, true); 3];
    desired.apply(&[TableChange::Frontend(node, frontend(1, all))]);
    let key = ServerKey::Address("192.0.2.1".parse().unwrap(), 30080, Protocol::Tcp);
    let of = |desired: &Desired| desired.server(&key).map(|w| w.service.0);
    assert_eq!(of(&desired), Some(1));
    desired.apply(&[TableChange::Frontend(at("192.0.2.1", 30080), frontend(2, all))]);
    assert_eq!(of(&desired), Some(2));
    desired.apply(&[TableChange::FrontendGone(at("192.0.2.1", 30080))]);
    assert_eq!(of(&desired), Some(1));
    // The node's own addresses are on their own devices.
    assert!(!desired.all().elements.iter().any(|e| e.set == VIPS));
}

#[test]
fn ranges_are_joined_and_of_one_family() {
    let mut desired = Desired::new(&ServiceTable::new(), &view());
    let ranges = ["203.0.113.0/25", "203.0.113.128/25", "203.0.113.7/32", "2001:db8::/32"];
    let ranges: Vec<IpNet> = ranges.iter().map(|r| r.parse().unwrap()).collect();
    let frontend = Frontend { source_ranges: Some(ranges.into()), ..frontend(1, [route(CLUSTER, false); 3]) };
    let touched = desired.apply(&[TableChange::Frontend(at("198.51.100.1", 80), frontend)]);
    let allowed: Vec<_> = texts(&touched, &desired).into_iter().filter(|t| t.contains("allowed")).collect();
    assert_eq!(allowed, ["+allowed 198.51.100.1 . tcp . 80 . 203.0.113.0/24"]);
}

fn arbitrary_target() -> impl Strategy<Value = Target> {
    prop_oneof![Just(CLUSTER), Just(LOCAL), Just(Target::Reject), Just(Target::Drop)]
}

fn arbitrary_change() -> impl Strategy<Value = TableChange> {
    let key = (0u8..6, 0u16..3, any::<bool>()).prop_map(|(addr, port, udp)| FrontendKey {
        addr: match addr {
            0 => FrontendAddr::Node(Family::V4),
            1 => FrontendAddr::Node(Family::V6),
            2 => FrontendAddr::Ip("192.0.2.1".parse().unwrap()),
            n => FrontendAddr::Ip(format!("10.96.0.{n}").parse().unwrap()),
        },
        port: 30000 + port,
        protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
    });
    let frontend = (0u32..4, proptest::array::uniform3((arbitrary_target(), any::<bool>())), any::<bool>())
        .prop_map(|(service, routes, ranges)| Frontend {
            source_ranges: ranges.then(|| vec!["203.0.113.0/24".parse().unwrap()].into()),
            affinity_s: (service == 3).then_some(60),
            ..frontend(service, routes.map(|(t, m)| route(t, m)))
        });
    let backend = (1u8..5, any::<bool>()).prop_map(|(n, local)| Backend {
        addr: format!("10.244.0.{n}").parse().unwrap(),
        port: 8080,
        local,
        terminating: false,
    });
    let set = (0u32..4, any::<bool>()).prop_map(|(service, local)| SetId {
        service: ServiceId(service),
        kind: if local { SetKind::Local } else { SetKind::Cluster },
    });
    let backends = proptest::collection::btree_set(backend, 1..4)
        .prop_map(|b| Arc::<[Backend]>::from(b.into_iter().collect::<Vec<_>>()));
    let vip = (3u8..6).prop_map(|n| format!("10.96.0.{n}").parse::<IpAddr>().unwrap());
    prop_oneof![
        3 => (key.clone(), frontend).prop_map(|(k, f)| TableChange::Frontend(k, f)),
        1 => key.prop_map(TableChange::FrontendGone),
        3 => (set.clone(), backends).prop_map(|(id, b)| TableChange::Set(id, Some(b))),
        1 => set.prop_map(|id| TableChange::Set(id, None)),
        1 => vip.clone().prop_map(TableChange::Vip),
        1 => vip.prop_map(TableChange::VipGone),
        1 => (0u32..4).prop_map(|n| TableChange::Service(ServiceId(n), ServiceMeta {
            namespace: "ns".into(),
            name: "s".into(),
            port_name: "".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
            external: false,
        })),
    ]
}

proptest! {
    /// Step by step comes to the same as all at once, and what a step does not name does not change.
    #[test]
    fn changes_come_to_the_same_as_the_whole(changes in proptest::collection::vec(arbitrary_change(), 1..40)) {
        let view = view();
        let mut desired = Desired::new(&ServiceTable::new(), &view);
        for change in &changes {
            let (elements, servers) = (desired.elements.clone(), desired.servers.clone());
            let backends: BTreeMap<_, _> = servers.iter().map(|(k, w)| (*k, desired.backends(w))).collect();
            let touched = desired.apply(std::slice::from_ref(change));
            for element in elements.keys().chain(desired.elements.keys()) {
                let changed = elements.contains_key(element) != desired.elements.contains_key(element);
                prop_assert!(!changed || touched.elements.contains(element));
            }
            for key in servers.keys().chain(desired.servers.keys()) {
                let now = desired.servers.get(key);
                let same = servers.get(key).map(|w| (w.set, w.affinity_s)) == now.map(|w| (w.set, w.affinity_s))
                    && backends.get(key) == now.map(|w| desired.backends(w)).as_ref();
                prop_assert!(same || touched.servers.contains(key), "{key} is not said to have changed");
            }
        }
        let whole = Desired::new(&desired.table, &view);
        prop_assert_eq!(&whole.elements, &desired.elements);
        prop_assert_eq!(&whole.servers, &desired.servers);
        prop_assert_eq!(&whole.of_sets, &desired.of_sets);
        prop_assert_eq!(&whole.contributions, &desired.contributions);
    }
}
