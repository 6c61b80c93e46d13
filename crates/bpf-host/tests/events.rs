//! Events of the programs: every kind through `BPF_PROG_TEST_RUN` and the ring buffer; limits, loss, adoption.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it skips"
)]

mod support;

use std::{net::IpAddr, time::Duration};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use podway_abi::{
    Hook, Reason,
    events::{EVENT_RING_BYTES, Event, EventKind, event_flags},
};
use podway_bpf_host::{AttachMethod, Datapath, EventCounts, EventLimits, EventReader};
use podway_datapath::packet::tcp;
use podway_datapath_cases::{
    frames::{L4, ip},
    world::{HOST_1_MAC, Interfaces, OTHER_POD, POD_1, POD_1_MAC, POD_2, POD_2_MAC},
};
use support::{TestDatapath, can_run};

const INTERFACES: Interfaces =
    Interfaces { pod_1: 1, pod_2: 4_002, pod_3: 4_005, uplink: 4_003, tunnel: 4_004 };
/// No limit that a test reaches.
const ALL: EventLimits = EventLimits { flows_per_second: 10_000_000, drops_per_second: 10_000_000 };

struct World {
    test: TestDatapath,
    reader: EventReader,
}

impl World {
    fn new(name: &str, limits: EventLimits) -> Self {
        // Every CPU remembers for itself what was told, and a test run happens where its caller is.
        let mut here = CpuSet::new();
        here.set(0).unwrap();
        sched_setaffinity(Pid::from_raw(0), &here).unwrap();
        let test = TestDatapath::new(name, AttachMethod::of_this_kernel());
        test.fill(true, &INTERFACES);
        test.get().set_event_limits(limits).unwrap();
        let reader = test.get().take_events().unwrap();
        assert!(test.get().take_events().is_none(), "one reader");
        Self { test, reader }
    }

    fn send(&self, hook: Hook, frame: &[u8]) {
        self.test.get().test_run(hook, frame, INTERFACES.pod_1, 1).unwrap();
    }

    fn events(&mut self) -> Vec<Event> {
        let mut all = Vec::new();
        self.reader.read(usize::MAX, |event| all.push(*event));
        all
    }

    fn counts(&self, kind: &str, reason: Option<Reason>) -> EventCounts {
        let all = self.test.get().event_counts().unwrap();
        let none = EventCounts { kind: "", reason, told: 0, limited: 0, lost: 0 };
        all.into_iter().find(|c| c.kind == kind && c.reason == reason).unwrap_or(none)
    }
}

fn frame(family: usize, l4: L4) -> Vec<u8> {
    ip((POD_1_MAC, HOST_1_MAC), POD_1[family], POD_2[family], 64, l4)
}

/// A TCP packet of the flow 1000 to 80, there or back. Checksums are nobody's business here.
fn segment(back: bool, flags: u8) -> Vec<u8> {
    let mut frame = if back {
        ip((POD_2_MAC, HOST_1_MAC), POD_2[0], POD_1[0], 64, L4::Syn(80, 1000))
    } else {
        frame(0, L4::Syn(1000, 80))
    };
    frame[14 + 20 + 13] = flags;
    frame
}

fn kind(event: &Event) -> EventKind {
    EventKind::from_number(event.kind).unwrap()
}

fn ends(event: &Event) -> ((IpAddr, u16), (IpAddr, u16)) {
    ((event.src.into(), event.src_port), (event.dst.into(), event.dst_port))
}

fn at(text: &str, port: u16) -> (IpAddr, u16) {
    (text.parse().unwrap(), port)
}

#[test]
fn a_flow_begins_once_and_ends_once() {
    if !can_run() {
        return;
    }
    let mut world = World::new("ev-flow", ALL);
    for family in 0..2 {
        for _ in 0..3 {
            world.send(Hook::FromPod, &frame(family, L4::Udp(1000, 2000)));
        }
        let events = world.events();
        assert_eq!(events.len(), 1, "only the first packet is told of: {events:?}");
        let event = &events[0];
        assert_eq!((kind(event), event.proto, event.hook), (EventKind::Start, 17, Hook::FromPod as u8));
        assert_eq!(ends(event), (at(POD_1[family], 1000), at(POD_2[family], 2000)));
        assert_eq!((event.reason, event.ifindex), (Reason::Delivered as u8, INTERFACES.pod_1));
        assert_eq!((event.packets, event.flags), ([1, 0], event_flags::PARSED));
        assert!(event.time_ns > 0 && event.bytes[0] > 28);
    }

    world.send(Hook::FromPod, &segment(false, tcp::SYN));
    world.send(Hook::ToPod, &segment(true, tcp::SYN | tcp::ACK));
    world.send(Hook::FromPod, &segment(false, tcp::ACK));
    assert_eq!(world.events().iter().map(kind).collect::<Vec<_>>(), [EventKind::Start]);
    world.send(Hook::FromPod, &segment(false, tcp::FIN | tcp::ACK));
    assert_eq!(world.events(), [], "one side may go on");
    world.send(Hook::ToPod, &segment(true, tcp::FIN | tcp::ACK));
    world.send(Hook::FromPod, &segment(false, tcp::ACK));
    let events = world.events();
    assert_eq!(events.len(), 1, "{events:?}");
    let end = &events[0];
    assert_eq!(kind(end), EventKind::End);
    assert_eq!(ends(end), (at(POD_1[0], 1000), at(POD_2[0], 80)));
    assert_eq!((end.packets, end.flags), ([3, 2], event_flags::PARSED | event_flags::REPLIED));
    assert!(end.created_ns > 0 && end.created_ns <= end.time_ns + 10_000_000);
    world.send(Hook::ToPod, &segment(true, tcp::RST));
    assert_eq!(world.events(), [], "an end is told once");

    // The same ports again, at once.
    world.send(Hook::FromPod, &segment(false, tcp::SYN));
    let events = world.events();
    assert_eq!(events.iter().map(kind).collect::<Vec<_>>(), [EventKind::Start], "{events:?}");
    world.send(Hook::ToPod, &segment(true, tcp::RST | tcp::ACK));
    let events = world.events();
    assert_eq!(events.len(), 1);
    assert!(kind(&events[0]) == EventKind::End && events[0].flags & event_flags::RESET != 0);
    assert_eq!(world.counts("start", None).told, 4);
    assert_eq!(world.counts("end", None).told, 2);
}

#[test]
fn the_sweep_tells_ends_that_the_programs_did_not() {
    if !can_run() {
        return;
    }
    let mut world = World::new("ev-sweep", EventLimits::NONE);
    world.send(Hook::FromPod, &frame(0, L4::Udp(1, 2)));
    world.send(Hook::FromPod, &segment(false, tcp::SYN));
    world.send(Hook::FromPod, &segment(false, tcp::RST));
    assert_eq!(world.events(), [], "nothing is told that nobody asked for");
    assert_eq!(world.test.get().event_counts().unwrap(), []);
    let mut told = Vec::new();
    world.test.get().sweep_conntrack(|e| told.push(*e)).unwrap();
    assert_eq!(told, [], "both may go on");
    // Idle limits are 10 s and 30 s: as if these had passed.
    let report = world.test.get().sweep_conntrack_at(Duration::from_secs(60), |e| told.push(*e)).unwrap();
    assert_eq!((report.removed, report.live), (2, 0));
    told.sort_by_key(|e| e.proto);
    let [tcp, udp] = &told[..] else { panic!("{told:?}") };
    assert_eq!(ends(udp), (at(POD_1[0], 1), at(POD_2[0], 2)));
    assert_eq!((udp.flags, udp.packets), (event_flags::PARSED | event_flags::EXPIRED, [1, 0]));
    assert_eq!((tcp.flags, tcp.packets), (event_flags::PARSED | event_flags::RESET, [2, 0]));
    assert_eq!((kind(udp), udp.ifindex, udp.hook), (EventKind::End, INTERFACES.pod_1, Hook::FromPod as u8));

    // An end that the programs told is not told again.
    world.test.get().set_event_limits(ALL).unwrap();
    world.send(Hook::FromPod, &segment(false, tcp::SYN));
    world.send(Hook::FromPod, &segment(false, tcp::RST));
    assert_eq!(world.events().len(), 2);
    let report = world.test.get().sweep_conntrack_at(Duration::from_secs(60), |e| panic!("{e:?}")).unwrap();
    assert_eq!(report.removed, 1);
}

#[test]
fn drops_have_reasons_and_are_told_once_a_second() {
    if !can_run() {
        return;
    }
    let mut world = World::new("ev-drop", ALL);
    let macs = (POD_1_MAC, HOST_1_MAC);
    let spoofed = ip(macs, POD_2[0], OTHER_POD[0], 64, L4::Udp(7, 8));
    for _ in 0..5 {
        world.send(Hook::FromPod, &spoofed);
    }
    // Another port of the sender is the same sender that tries again; another one that is asked is not.
    world.send(Hook::FromPod, &ip(macs, POD_2[0], OTHER_POD[0], 64, L4::Udp(9, 8)));
    world.send(Hook::FromPod, &ip(macs, POD_2[0], OTHER_POD[0], 64, L4::Udp(7, 9)));
    let events = world.events();
    assert_eq!(events.len(), 2, "{events:?}");
    for event in &events {
        assert_eq!((kind(event), event.reason), (EventKind::Drop, Reason::SpoofedAddress as u8));
        assert_eq!((event.src_mac, event.packets[0]), (POD_1_MAC, 1));
    }
    assert_eq!(ends(&events[0]), (at(POD_2[0], 7), at(OTHER_POD[0], 8)));
    let counts = world.counts("drop", Some(Reason::SpoofedAddress));
    assert_eq!((counts.told, counts.limited, counts.lost), (2, 5, 0));
    assert_eq!(world.test.count("from_pod", "spoofed_address"), 7, "counters miss none");

    std::thread::sleep(Duration::from_millis(1_100));
    world.send(Hook::FromPod, &spoofed);
    let events = world.events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].packets[0], 6, "with those that were not told");
    assert_eq!(events[0].bytes[0], 6 * (spoofed.len() as u64 - 14));

    // What could not be read has no ends, and not those of the packet before it either.
    world.send(Hook::FromTunnel, &spoofed);
    let mut vlan = spoofed.clone();
    vlan[12..14].copy_from_slice(&[0x88, 0xcc]);
    world.send(Hook::FromPod, &vlan);
    let events = world.events();
    let reasons: Vec<u8> = events.iter().map(|e| e.reason).collect();
    assert_eq!(reasons, [Reason::NoTunnelKey as u8, Reason::UnsupportedProtocol as u8]);
    assert!(events.iter().all(|e| e.flags == 0 && e.ifindex == INTERFACES.pod_1), "{events:?}");
    // A packet that is dropped opens no flow.
    assert_eq!(world.test.get().conntrack().unwrap(), []);
}

#[test]
fn a_flood_is_limited_and_counted() {
    if !can_run() {
        return;
    }
    // 15 windows a second: one event each.
    let mut world = World::new("ev-flood", EventLimits { flows_per_second: 10, drops_per_second: 10 });
    for port in 0..2_000_u16 {
        world.send(Hook::FromPod, &frame(0, L4::Udp(port + 1, 53)));
        world.send(
            Hook::FromPod,
            &ip((POD_1_MAC, HOST_1_MAC), POD_2[0], OTHER_POD[0], 64, L4::Udp(7, port + 1)),
        );
    }
    let events = world.events();
    let starts = world.counts("start", None);
    let drops = world.counts("drop", Some(Reason::SpoofedAddress));
    assert_eq!((starts.told + starts.limited, starts.lost), (2_000, 0));
    assert_eq!((drops.told + drops.limited, drops.lost), (2_000, 0));
    assert_eq!(events.len() as u64, starts.told + drops.told);
    assert!(starts.limited > 1_900 && drops.limited > 1_900, "{starts:?} {drops:?}");
    // Another reason has room of its own.
    let mut mac = frame(0, L4::Udp(1, 2));
    mac[11] ^= 1;
    world.send(Hook::FromPod, &mac);
    assert_eq!(world.events().iter().filter(|e| e.reason == Reason::SpoofedMac as u8).count(), 1);
}

#[test]
fn what_nobody_reads_is_counted_as_lost_and_a_successor_reads_the_rest() {
    if !can_run() {
        return;
    }
    let mut world = World::new("ev-full", ALL);
    let fits = u64::from(EVENT_RING_BYTES) / (size_of::<Event>() as u64 + 8);
    let macs = (POD_1_MAC, HOST_1_MAC);
    let mut sent = 0;
    'ports: for low in 1..=60_000_u16 {
        world.send(Hook::FromPod, &ip(macs, POD_1[0], POD_2[0], 64, L4::Udp(low, 53)));
        sent += 1;
        if sent > fits + 100 {
            break 'ports;
        }
    }
    let counts = world.counts("start", None);
    assert_eq!(counts.told + counts.lost, sent, "{counts:?}");
    assert!(counts.lost >= 100 && counts.told <= fits, "{counts:?}, room for {fits}");
    // The agent dies without having read.
    world.test.datapath.take();
    drop(world.reader);
    world.test.datapath = Some(Datapath::load(&world.test.pin_dir).unwrap());
    world.reader = world.test.get().take_events().unwrap();
    assert_eq!(world.events().len() as u64, counts.told);
    assert_eq!(world.counts("start", None), counts, "counts go on");
    world.send(Hook::FromPod, &ip(macs, POD_1[0], POD_2[0], 64, L4::Udp(1, 54)));
    assert_eq!(world.events().len(), 1, "limits stay, and there is room again");
}

#[test]
fn a_reader_that_waits_is_woken_before_the_buffer_is_full() {
    if !can_run() {
        return;
    }
    let world = World::new("ev-wake", ALL);
    let begun = std::time::Instant::now();
    std::thread::scope(|scope| {
        let woken = scope.spawn(|| {
            let _ = world.reader.wait(Duration::from_millis(50));
            world.reader.wait(Duration::from_secs(30)).unwrap();
            begun.elapsed()
        });
        std::thread::sleep(Duration::from_millis(200));
        let wakes = u64::from(EVENT_RING_BYTES) / 4 / size_of::<Event>() as u64 + 10;
        for port in 0..u16::try_from(wakes).unwrap() {
            world.send(
                Hook::FromPod,
                &ip((POD_1_MAC, HOST_1_MAC), POD_1[0], POD_2[0], 64, L4::Udp(port + 1, 53)),
            );
        }
        let woken = woken.join().unwrap();
        assert!(woken < Duration::from_secs(29), "woken after {woken:?}");
    });
}
