//! The cases in user space, and what no table of cases can hold.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking and says why it skips")]

use podway_abi::{CtKey, Hook, Reason, ct_flags};
use podway_datapath::{Scratch, TunnelKey, Verdict, decide, packet::tcp, track};
use podway_datapath_cases::{
    At, HostEnv, HostTables, PacketBytes,
    cases::{self, Case},
    frames::{L4, ip},
    sequences::{self, Step},
    world::{self, Interfaces, POD_1, POD_1_MAC, POD_2},
};
use proptest::prelude::*;

const INTERFACES: Interfaces = Interfaces { pod_1: 11, pod_2: 12, pod_3: 13, uplink: 2, tunnel: 3 };

fn env(case: &Case) -> HostEnv {
    env_at(case.hook, case.at, case.outer)
}

fn env_at(hook: Hook, at: At, tunnel_key: Option<TunnelKey>) -> HostEnv {
    let ifindex = match at {
        At::Pod1 => INTERFACES.pod_1,
        At::Pod2 => INTERFACES.pod_2,
        At::Uplink => INTERFACES.uplink,
        At::Tunnel => INTERFACES.tunnel,
    };
    HostEnv { hook, ifindex, now_ns: 1_000_000_000, tagged: false, tunnel_key, decided: false }
}

#[test]
fn every_case_is_decided_as_expected() {
    for case in cases::all() {
        let tables = world::tables(case.overlay, &INTERFACES);
        let mut scratch = Scratch::new();
        let action = decide(&PacketBytes(&case.frame), &tables, &env(&case), &mut scratch);
        assert_eq!(
            (action.verdict, action.reason),
            (case.expect.verdict, case.expect.reason),
            "{}",
            case.name
        );
        if let Some(target) = case.expect.target {
            assert_eq!(scratch.route.target.id, target, "{}", case.name);
        }
        if let Some(tunnel) = case.expect.tunnel {
            assert_eq!(scratch.route.node, tunnel, "{}", case.name);
        }
        assert_eq!(scratch.new_flow, case.expect.tracked, "{}: tracked", case.name);
        assert!(tables.conntrack.borrow().is_empty(), "{}: a decision writes nothing", case.name);
    }
}

#[test]
fn a_flow_is_routed_by_its_entry_until_something_changes() {
    for sequence in sequences::all() {
        let mut tables = world::tables(sequence.overlay, &INTERFACES);
        for (number, step) in sequence.steps.iter().enumerate() {
            let what = format!("{}, step {number}", sequence.name);
            let (env, frame, expect, established) = match step {
                Step::Change(change) => {
                    world::change(&mut tables, sequence.overlay, &INTERFACES, *change);
                    tables.generation += 1;
                    continue;
                }
                Step::Packet { hook, at, frame, outer, expect, established } => {
                    (env_at(*hook, *at, *outer), frame, expect, *established)
                }
            };
            let (flows, look_ups) = (tables.conntrack.borrow().clone(), tables.look_ups.get());
            let mut scratch = Scratch::new();
            let action = decide(&PacketBytes(frame), &tables, &env, &mut scratch);
            assert_eq!((action.verdict, action.reason), (expect.verdict, expect.reason), "{what}");
            if let Some(target) = expect.target {
                assert_eq!(scratch.route.target.id, target, "{what}");
            }
            if let Some(tunnel) = expect.tunnel {
                assert_eq!(scratch.route.node, tunnel, "{what}");
            }
            assert_eq!(tables.look_ups.get() == look_ups, established, "{what}: by its entry alone");
            if action.verdict == Verdict::Drop {
                assert_eq!(*tables.conntrack.borrow(), flows, "{what}: what is refused leaves no trace");
            } else {
                tables.apply(&scratch);
            }
        }
    }
}

/// That the sequences show anything depends on the number: without a new one, flows stay where they were.
#[test]
fn a_change_that_is_not_announced_is_not_seen_by_established_flows() {
    let sequence = sequences::all().into_iter().find(|s| s.name.ends_with("the pod goes")).unwrap();
    let mut tables = world::tables(sequence.overlay, &INTERFACES);
    let mut last = None;
    for step in &sequence.steps {
        match step {
            Step::Change(change) => world::change(&mut tables, sequence.overlay, &INTERFACES, *change),
            Step::Packet { hook, at, frame, outer, .. } => {
                let mut scratch = Scratch::new();
                last = Some(decide(&PacketBytes(frame), &tables, &env_at(*hook, *at, *outer), &mut scratch));
                tables.apply(&scratch);
            }
        }
    }
    assert_eq!(last.unwrap().verdict, Verdict::ToPod);
}

/// Before user space has numbered the tables, nothing is kept.
#[test]
fn nothing_is_kept_under_number_zero() {
    let sequence = sequences::all().remove(0);
    let mut tables = world::tables(sequence.overlay, &INTERFACES);
    tables.generation = 0;
    let Step::Packet { hook, at, frame, outer, .. } = &sequence.steps[0] else { panic!("a packet first") };
    for _ in 0..3 {
        let before = tables.look_ups.get();
        let mut scratch = Scratch::new();
        decide(&PacketBytes(frame), &tables, &env_at(*hook, *at, *outer), &mut scratch);
        tables.apply(&scratch);
        assert!(tables.look_ups.get() > before);
    }
}

#[test]
fn a_tagged_frame_of_a_pod_is_dropped() {
    let case = cases::all().into_iter().find(|c| c.hook == Hook::FromPod && c.expect.tracked).unwrap();
    let tables = world::tables(case.overlay, &INTERFACES);
    let tagged = HostEnv { tagged: true, ..env(&case) };
    let action = decide(&PacketBytes(&case.frame), &tables, &tagged, &mut Scratch::new());
    assert_eq!((action.verdict, action.reason), (Verdict::Drop, Reason::Tagged));
}

#[test]
fn a_pod_with_a_limit_gets_its_packets_by_way_of_its_queue() {
    let delivers = |c: &cases::Case| c.expect.verdict == Verdict::ToPod;
    for case in cases::all().into_iter().filter(delivers) {
        let mut tables = world::tables(case.overlay, &INTERFACES);
        for endpoint in tables.endpoints.values_mut() {
            endpoint.flags |= podway_abi::endpoint_flags::QUEUED;
        }
        let mut scratch = Scratch::new();
        let action = decide(&PacketBytes(&case.frame), &tables, &env(&case), &mut scratch);
        assert_eq!(
            (action.verdict, action.reason),
            (Verdict::ToPodQueue, Reason::Delivered),
            "{}",
            case.name
        );
        tables.apply(&scratch);
        // The queue's own hook has nothing to add: the packet is neither judged nor counted as a second one.
        let before = tables.conntrack.borrow().clone();
        let ifindex = scratch.route.target.ifindex;
        let queued = HostEnv { hook: Hook::ToPod, ifindex, decided: true, tunnel_key: None, ..env(&case) };
        let mut scratch = Scratch::new();
        let action = decide(&PacketBytes(&case.frame), &tables, &queued, &mut scratch);
        assert_eq!((action.verdict, action.reason), (Verdict::Pass, Reason::Delivered), "{}", case.name);
        assert!(!scratch.new_flow, "{}", case.name);
        assert_eq!(*tables.conntrack.borrow(), before, "{}", case.name);
    }
}

#[test]
fn names_of_cases_are_unique() {
    let mut names: Vec<String> = cases::all().into_iter().map(|c| c.name).collect();
    names.sort();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count);
}

/// Plays TCP segments between the two pods and returns the flow's final state.
fn play(segments: &[(bool, u8, u64)]) -> (podway_abi::CtEntry, usize) {
    let tables = world::tables(true, &INTERFACES);
    for (from_first, flags, now_s) in segments {
        let (src, dst, ports) =
            if *from_first { (POD_1, POD_2, (40_000, 80)) } else { (POD_2, POD_1, (80, 40_000)) };
        let (mac, ifindex) = if *from_first {
            ((POD_1_MAC, world::HOST_1_MAC), INTERFACES.pod_1)
        } else {
            ((world::POD_2_MAC, world::HOST_2_MAC), INTERFACES.pod_2)
        };
        let mut frame = ip(mac, src[0], dst[0], 64, L4::Syn(ports.0, ports.1));
        frame[14 + 20 + 13] = *flags;
        let env = HostEnv {
            hook: Hook::FromPod,
            ifindex,
            now_ns: now_s * 1_000_000_000,
            tagged: false,
            tunnel_key: None,
            decided: false,
        };
        let mut scratch = Scratch::new();
        decide(&PacketBytes(&frame), &tables, &env, &mut scratch);
        tables.apply(&scratch);
    }
    let flows = tables.conntrack.borrow();
    (*flows.values().next().unwrap(), flows.len())
}

#[test]
fn a_connection_is_one_flow_in_both_directions() {
    let (entry, flows) = play(&[
        (true, tcp::SYN, 1),
        (false, tcp::SYN | tcp::ACK, 1),
        (true, tcp::ACK, 1),
        (false, tcp::ACK, 2),
    ]);
    assert_eq!(flows, 1);
    assert_eq!(entry.packets, [2, 2]);
    assert_ne!(entry.flags & ct_flags::REPLIED, 0);
    assert_ne!(entry.flags & ct_flags::SYN, 0);
    assert_eq!(entry.idle_limit_s, track::idle::TCP_ESTABLISHED);
}

#[test]
fn a_connection_ends_and_its_ports_can_be_used_again() {
    let open = [(true, tcp::SYN, 1), (false, tcp::SYN | tcp::ACK, 1), (true, tcp::ACK, 1)];
    let half = [open.as_slice(), &[(true, tcp::FIN | tcp::ACK, 2)]].concat();
    assert_eq!(play(&half).0.idle_limit_s, track::idle::TCP_HALF_CLOSED);
    let closed = [half.as_slice(), &[(false, tcp::FIN | tcp::ACK, 2)]].concat();
    assert_eq!(play(&closed).0.idle_limit_s, track::idle::TCP_CLOSED);
    let reset = [open.as_slice(), &[(false, tcp::RST, 2)]].concat();
    assert_eq!(play(&reset).0.idle_limit_s, track::idle::TCP_CLOSED);
    // Another connection with the same ports right away, opened by the other side this time.
    let again = [closed.as_slice(), &[(false, tcp::SYN, 3)]].concat();
    let (entry, _) = play(&again);
    assert_eq!(entry.packets, [1, 0]);
    assert_eq!(entry.idle_limit_s, track::idle::TCP_OPENING);
    // A flow that has been idle for longer than its limit starts over.
    let stale = [open.as_slice(), &[(true, tcp::ACK, 1 + 7_501)]].concat();
    assert_eq!(play(&stale).0.packets, [1, 0]);
}

fn any_hook() -> impl Strategy<Value = Hook> {
    prop::sample::select(Hook::ALL.to_vec())
}

proptest! {
    /// No bytes whatever make a decision panic, and what a pod sends never leaves under another's address.
    #[test]
    fn any_bytes_are_decided(hook in any_hook(), bytes in prop::collection::vec(any::<u8>(), 0..200), overlay: bool) {
        let tables = world::tables(overlay, &INTERFACES);
        run(&tables, hook, &bytes);
    }

    /// The same around valid packets: one byte of a case's frame changed.
    #[test]
    fn damaged_packets_are_decided(case in prop::sample::select(cases::all()), at in 0usize..120, value: u8, cut in 0usize..200) {
        let tables = world::tables(case.overlay, &INTERFACES);
        let mut frame = case.frame.clone();
        let len = frame.len();
        frame[at % len] = value;
        frame.truncate(cut.max(1));
        run(&tables, case.hook, &frame);
    }

    /// Both directions of a flow have the same key, and different flows have different ones.
    #[test]
    fn a_key_serves_both_directions(a: [u8; 4], b: [u8; 4], pa: u16, pb: u16, proto: u8) {
        let mut packet = podway_datapath::Packet::EMPTY;
        packet.src = std::net::Ipv4Addr::from(a).into();
        packet.dst = std::net::Ipv4Addr::from(b).into();
        packet.src_port = pa;
        packet.dst_port = pb;
        packet.proto = proto;
        let mut reply = packet;
        std::mem::swap(&mut reply.src, &mut reply.dst);
        std::mem::swap(&mut reply.src_port, &mut reply.dst_port);
        let (mut k1, mut k2) = (CtKey::default(), CtKey::default());
        let from_b_1 = track::key(&packet, &mut k1);
        let from_b_2 = track::key(&reply, &mut k2);
        prop_assert_eq!(k1, k2);
        prop_assert!(from_b_1 != from_b_2 || (a == b && pa == pb));
        let mut other = packet;
        other.dst_port = pb.wrapping_add(1);
        let mut k3 = CtKey::default();
        track::key(&other, &mut k3);
        prop_assert_ne!(k1, k3);
    }
}

fn run(tables: &HostTables, hook: Hook, bytes: &[u8]) {
    let env = HostEnv {
        hook,
        ifindex: INTERFACES.pod_1,
        now_ns: 1,
        tagged: false,
        tunnel_key: Some(TunnelKey { source: world::addr(world::OTHER_NODE[0]), vni: world::VNI }),
        decided: false,
    };
    let mut scratch = Scratch::new();
    let action = decide(&PacketBytes(bytes), tables, &env, &mut scratch);
    let forwarded =
        !matches!(action.verdict, podway_datapath::Verdict::Drop | podway_datapath::Verdict::Pass);
    if hook == Hook::FromPod && forwarded {
        let own = [world::addr(POD_1[0]), world::addr(POD_1[1])];
        assert!(own.contains(&scratch.packet.src), "forwarded from {}", scratch.packet.src);
    }
}
