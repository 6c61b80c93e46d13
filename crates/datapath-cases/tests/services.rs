//! Services in user space: what packets become, and who is chosen.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use podway_abi::{
    Addr, Hook, Reason,
    services::{
        Backend, Frontend, FrontendKey, MASQUERADE_FIRST_PORT, MASQUERADE_PORTS, address_flags,
        backend_flags, route, scope, set_kind,
    },
};
use podway_datapath::{Action, Scratch, Verdict, decide};
use podway_datapath_cases::{
    HostEnv, HostTables, PacketBytes,
    frames::{L4, TTL, ip},
    world::{
        self, HOST_1_MAC, HOST_2_MAC, Interfaces, NODE, OTHER_POD, OUTSIDE, POD_1, POD_1_MAC, POD_2,
        POD_2_MAC, addr,
    },
};

const INTERFACES: Interfaces = Interfaces { pod_1: 11, pod_2: 12, pod_3: 13, uplink: 2, tunnel: 3 };
const VIP: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const NODE_PORT: u16 = 30_080;
const WIRE: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 9, 1], [2, 0, 0, 0, 9, 2]);

fn backend(at: &str, local: bool) -> Backend {
    let flags = if local { backend_flags::LOCAL } else { 0 };
    Backend { addr: addr(at), service: 1, incarnation: 0, port: 8080, flags, proto: 6 }
}

/// The world with one service of both protocols at the cluster IP's port 80 and at a node port.
fn tables(family: usize, backends: &[Backend], routes: u32) -> HostTables {
    let mut tables = world::tables(true, &INTERFACES);
    tables.services.set(1, set_kind::CLUSTER, backends);
    let any = if family == 0 { podway_abi::services::ANY_V4 } else { Addr::UNSPECIFIED };
    for proto in [6, 17, 132] {
        let at = |addr, port, scope| FrontendKey { addr, port, proto, scope };
        let frontend = Frontend { service: 1, flags: routes, affinity_s: 0 };
        tables.services.frontends.insert(at(addr(VIP[family]), 80, scope::ADDRESS), frontend);
        tables.services.frontends.insert(at(any, NODE_PORT, scope::NODE), frontend);
    }
    tables.services.addresses.insert(addr(VIP[family]), address_flags::VIP);
    tables.services.addresses.insert(addr(NODE[family]), address_flags::OWN | address_flags::NODE_PORTS);
    tables.services.masquerade = [addr(NODE[0]), addr(NODE[1])];
    tables
}

const MASQUERADE_ALL: u32 = route::MASQUERADE | route::MASQUERADE << 3 | route::MASQUERADE << 6;

fn send(tables: &HostTables, hook: Hook, ifindex: u32, frame: &[u8]) -> (Action, Scratch) {
    let env =
        HostEnv { hook, ifindex, now_ns: 1_000_000_000, tagged: false, tunnel_key: None, decided: false };
    let mut scratch = Scratch::new();
    let action = decide(&PacketBytes(frame), tables, &env, &mut scratch);
    if action.verdict != Verdict::Drop {
        tables.apply(&scratch);
    }
    (action, scratch)
}

fn from_pod_1(family: usize, to: &str, l4: L4) -> Vec<u8> {
    ip((POD_1_MAC, HOST_1_MAC), POD_1[family], to, TTL, l4)
}

/// Source and destination as the packet leaves.
fn ends(scratch: &Scratch) -> ((Addr, u16), (Addr, u16)) {
    let p = &scratch.packet;
    ((p.src, p.src_port), (p.dst, p.dst_port))
}

#[test]
fn a_connection_goes_to_a_backend_and_its_answers_come_from_the_service() {
    for family in 0..2 {
        let tables = tables(family, &[backend(POD_2[family], true)], 0);
        let there = from_pod_1(family, VIP[family], L4::Syn(40_000, 80));
        let back = ip((POD_2_MAC, HOST_2_MAC), POD_2[family], POD_1[family], TTL, L4::Syn(8080, 40_000));
        // The second round goes by the routes that the first one found.
        for _ in 0..2 {
            let (action, scratch) = send(&tables, Hook::FromPod, INTERFACES.pod_1, &there);
            assert_eq!((action.verdict, scratch.route.target.id), (Verdict::ToPod, 2));
            assert_eq!(ends(&scratch), ((addr(POD_1[family]), 40_000), (addr(POD_2[family]), 8080)));
            let (action, scratch) = send(&tables, Hook::FromPod, INTERFACES.pod_2, &back);
            assert_eq!((action.verdict, scratch.route.target.id), (Verdict::ToPod, 1));
            assert_eq!(ends(&scratch), ((addr(VIP[family]), 80), (addr(POD_1[family]), 40_000)));
        }
        assert_eq!(tables.conntrack.borrow().len(), 1, "one flow, that between pod and backend");
    }
}

#[test]
fn a_pod_that_reaches_itself_sees_its_node() {
    for family in 0..2 {
        let tables = tables(family, &[backend(POD_1[family], true)], 0);
        let (action, scratch) = send(
            &tables,
            Hook::FromPod,
            INTERFACES.pod_1,
            &from_pod_1(family, VIP[family], L4::Udp(4000, 80)),
        );
        assert_eq!(action.verdict, Verdict::ToPod);
        let (src, dst) = ends(&scratch);
        assert_eq!((src.0, dst), (addr(NODE[family]), (addr(POD_1[family]), 8080)));
        let answer = from_pod_1(family, NODE[family], L4::Udp(8080, src.1));
        let (action, scratch) = send(&tables, Hook::FromPod, INTERFACES.pod_1, &answer);
        assert_eq!((action.verdict, scratch.route.target.id), (Verdict::ToPod, 1));
        assert_eq!(ends(&scratch), ((addr(VIP[family]), 80), (addr(POD_1[family]), 4000)));
    }
}

#[test]
fn a_client_beyond_the_cluster_is_masqueraded_and_answered_on_the_underlay() {
    for family in 0..2 {
        let tables = tables(family, &[backend(OTHER_POD[family], false)], 0);
        let there = ip(WIRE, OUTSIDE[family], NODE[family], TTL, L4::Syn(50_000, NODE_PORT));
        let (action, scratch) = send(&tables, Hook::FromUplink, INTERFACES.uplink, &there);
        assert_eq!(action.verdict, Verdict::ToTunnel);
        let (src, dst) = ends(&scratch);
        assert_eq!((src.0, dst), (addr(NODE[family]), (addr(OTHER_POD[family]), 8080)));
        let ports = MASQUERADE_FIRST_PORT..MASQUERADE_FIRST_PORT + u16::try_from(MASQUERADE_PORTS).unwrap();
        assert!(ports.contains(&src.1), "{}", src.1);
        let again = send(&tables, Hook::FromUplink, INTERFACES.uplink, &there).1;
        assert_eq!(ends(&again), (src, dst), "the same flow");
    }
}

#[test]
fn two_flows_never_get_the_same_port() {
    let tables = tables(0, &[backend(OTHER_POD[0], false)], MASQUERADE_ALL);
    let mut ports = std::collections::HashSet::new();
    for client in 0..2_000 {
        let there = ip(WIRE, OUTSIDE[0], NODE[0], TTL, L4::Udp(10_000 + client, NODE_PORT));
        let (action, scratch) = send(&tables, Hook::FromUplink, INTERFACES.uplink, &there);
        assert_eq!(action.verdict, Verdict::ToTunnel);
        assert!(ports.insert(ends(&scratch).0.1));
    }
}

#[test]
fn without_an_address_of_its_own_a_node_masquerades_nothing() {
    let mut tables = tables(0, &[backend(OTHER_POD[0], false)], MASQUERADE_ALL);
    tables.services.masquerade = [Addr::UNSPECIFIED; 2];
    let there = ip(WIRE, OUTSIDE[0], NODE[0], TTL, L4::Syn(50_000, NODE_PORT));
    let (action, _) = send(&tables, Hook::FromUplink, INTERFACES.uplink, &there);
    assert_eq!(action, Action::drop(Reason::NoMasqueradePort));
}

#[test]
fn what_nobody_serves_is_told_and_what_is_elsewhere_is_not() {
    let refused = Action { verdict: Verdict::Reject, reason: Reason::Rejected };
    let reject = route::REJECT | route::REJECT << 3 | route::REJECT << 6;
    let drop = route::DROP | route::DROP << 3 | route::DROP << 6;
    for (routes, port, want) in
        [(reject, 80, refused), (drop, 80, Action::drop(Reason::NoLocalEndpoint)), (0, 81, refused)]
    {
        let tables = tables(0, &[backend(POD_2[0], true)], routes);
        let (action, _) =
            send(&tables, Hook::FromPod, INTERFACES.pod_1, &from_pod_1(0, VIP[0], L4::Syn(40_000, port)));
        assert_eq!(action, want);
        assert!(tables.conntrack.borrow().is_empty());
    }
    let mut tables = tables(0, &[], 0);
    let (action, _) = send(&tables, Hook::FromPod, INTERFACES.pod_1, &from_pod_1(0, VIP[0], L4::Syn(1, 80)));
    assert_eq!(action, refused, "a set without backends");
    let mask = Addr { words: [u32::MAX, u32::MAX, u32::MAX, addr("255.255.0.0").v4_word()] };
    tables.services.ranges = vec![(addr("10.96.0.0"), mask)];
    let (action, _) =
        send(&tables, Hook::FromPod, INTERFACES.pod_1, &from_pod_1(0, "10.96.0.99", L4::Syn(1, 80)));
    assert_eq!(action, Action::drop(Reason::NoService));
}

#[test]
fn datagrams_move_when_their_backend_goes_and_connections_do_not() {
    for (l4, moves) in [(L4::Udp(4000, 80), true), (L4::Syn(4000, 80), false)] {
        let mut tables = tables(0, &[backend(POD_2[0], true)], 0);
        let there = from_pod_1(0, VIP[0], l4);
        assert_eq!(ends(&send(&tables, Hook::FromPod, INTERFACES.pod_1, &there).1).1.0, addr(POD_2[0]));
        tables.services.backends[0].incarnation += 1;
        tables.services.backends[0].service = 0;
        tables.services.set(1, set_kind::CLUSTER, &[backend(OTHER_POD[0], false)]);
        let mut there = there;
        if !moves {
            // No longer the first segment: ACK.
            there[14 + 20 + 13] = 0x10;
        }
        let (_, scratch) = send(&tables, Hook::FromPod, INTERFACES.pod_1, &there);
        let wanted = if moves { OTHER_POD[0] } else { POD_2[0] };
        assert_eq!(ends(&scratch).1.0, addr(wanted));
    }
}

#[test]
fn a_plain_flow_asks_no_service_twice() {
    let tables = tables(0, &[backend(POD_2[0], true)], 0);
    let there = from_pod_1(0, POD_2[0], L4::Udp(4000, 9000));
    for _ in 0..3 {
        let (action, scratch) = send(&tables, Hook::FromPod, INTERFACES.pod_1, &there);
        assert_eq!(action.verdict, Verdict::ToPod);
        assert!(!scratch.rewrite);
    }
    assert!(tables.services.translations.borrow().is_empty());
}
