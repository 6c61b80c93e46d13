//! The cases under the kernel's own test runs (`BPF_PROG_TEST_RUN`), and what the kernel made of the programs.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it skips"
)]

mod support;

use podway_abi::Reason;
use podway_bpf_host::{AttachMethod, Datapath};
use podway_datapath::Verdict;
use podway_datapath_cases::{
    cases::{self, Case},
    world::Interfaces,
};
use support::{TestDatapath, can_run};

/// The loopback device stands for the first pod's link: a test run needs a device that exists, and sends
/// nothing through it. The other numbers are of no device.
const INTERFACES: Interfaces =
    Interfaces { pod_1: 1, pod_2: 4_002, pod_3: 4_005, uplink: 4_003, tunnel: 4_004 };

const TC_ACT_OK: i32 = 0;
const TC_ACT_SHOT: i32 = 2;
const TC_ACT_REDIRECT: i32 = 7;

#[test]
fn every_case_under_test_run() {
    if !can_run() {
        return;
    }
    let test = TestDatapath::new("run", AttachMethod::of_this_kernel());
    for case in cases::all() {
        test.fill(case.overlay, &INTERFACES);
        check(&test, &case);
    }
}

fn check(test: &TestDatapath, case: &Case) {
    let (verdict, reason) = match case.outer {
        // A test run cannot carry a tunnel key: what needs one must be refused.
        Some(_) => (Verdict::Drop, Reason::NoTunnelKey),
        None => (case.expect.verdict, case.expect.reason),
    };
    let before = test.count(case.hook.name(), reason.name());
    let flows_before = test.get().conntrack().unwrap().len();
    let run = test.get().test_run(case.hook, &case.frame, INTERFACES.pod_1, 1);
    let run = match run {
        Ok(run) => run,
        // The kernel itself refuses a test run over an IP packet cut within its header; such a packet cannot
        // reach a program there.
        Err(e) if reason == Reason::Malformed => {
            println!("not run: {}: {e}", case.name);
            return;
        }
        Err(e) => panic!("{}: {e}", case.name),
    };
    let expected = match verdict {
        Verdict::Pass | Verdict::SetTunnel => TC_ACT_OK,
        Verdict::Drop => TC_ACT_SHOT,
        Verdict::ToPod | Verdict::ToPodQueue | Verdict::ToTunnel | Verdict::ToUplink | Verdict::Reject => {
            TC_ACT_REDIRECT
        }
    };
    assert_eq!(run.code, expected, "{}", case.name);
    assert_eq!(test.count(case.hook.name(), reason.name()), before + 1, "{}: counted", case.name);
    let packet = match case.expect.target {
        Some(target) if verdict == Verdict::ToPod => cases::delivered(&case.frame, target),
        _ => case.frame.clone(),
    };
    assert_eq!(run.packet, packet, "{}: packet", case.name);
    let flows_after = test.get().conntrack().unwrap().len();
    if !(case.expect.tracked && case.outer.is_none()) {
        assert_eq!(flows_after, flows_before, "{}: not tracked", case.name);
    }
}

#[test]
fn flows_are_tracked_in_both_directions_and_swept() {
    use podway_abi::Hook;
    use podway_datapath_cases::{
        frames::{L4, ip},
        world::{HOST_1_MAC, POD_1, POD_1_MAC, POD_2},
    };
    if !can_run() {
        return;
    }
    let test = TestDatapath::new("flows", AttachMethod::of_this_kernel());
    test.fill(true, &INTERFACES);
    let there = ip((POD_1_MAC, HOST_1_MAC), POD_1[0], POD_2[0], 64, L4::Udp(1000, 2000));
    let back = ip((HOST_1_MAC, POD_1_MAC), POD_2[0], POD_1[0], 64, L4::Udp(2000, 1000));
    for _ in 0..3 {
        test.get().test_run(Hook::FromPod, &there, INTERFACES.pod_1, 1).unwrap();
    }
    test.get().test_run(Hook::ToPod, &back, INTERFACES.pod_1, 1).unwrap();
    let flows = test.get().conntrack().unwrap();
    assert_eq!(flows.len(), 1, "{flows:?}");
    assert_eq!(flows[0].source, (POD_1[0].parse().unwrap(), 1000));
    assert_eq!(flows[0].destination, (POD_2[0].parse().unwrap(), 2000));
    assert_eq!(flows[0].packets, [3, 1]);
    assert_eq!(flows[0].state, "answered");
    let sweep = test.get().sweep_conntrack(|event| panic!("{event:?}")).unwrap();
    assert_eq!((sweep.live, sweep.removed), (1, 0));
}

/// The kernel's limit is one million instructions; 60% of it is the budget.
const VERIFIER_BUDGET: u32 = 600_000;

#[test]
fn the_verifier_walks_every_program_within_the_budget() {
    if !can_run() {
        return;
    }
    let test = TestDatapath::new("budget", AttachMethod::of_this_kernel());
    for program in test.get().programs().unwrap() {
        println!("{program:?}");
        assert!(program.verified_instructions.is_none_or(|n| n <= VERIFIER_BUDGET), "{program:?}");
    }
}

#[test]
fn an_object_of_maps_is_found_again_and_removed() {
    if !can_run() {
        return;
    }
    let mut test = TestDatapath::new("adopt", AttachMethod::of_this_kernel());
    test.fill(true, &INTERFACES);
    let endpoints = test.get().endpoints().unwrap();
    let peers = test.get().peers().unwrap();
    assert_eq!((endpoints.len(), peers.len()), (2, 10));
    // The agent goes; its successor finds what it left.
    test.datapath.take();
    test.datapath = Some(Datapath::load(&test.pin_dir).unwrap());
    assert_eq!(test.get().endpoints().unwrap(), endpoints);
    assert_eq!(test.get().peers().unwrap(), peers);
    let report = test.get().sync_peers(&peers).unwrap();
    assert_eq!((report.written, report.removed), (0, 0), "nothing to write when nothing changed");
    test.get().remove_endpoint(INTERFACES.pod_2).unwrap();
    test.get().remove_endpoint(INTERFACES.pod_2).unwrap();
    assert_eq!(test.get().endpoints().unwrap(), endpoints[..1]);
    test.datapath.take();
    let removed = Datapath::remove_all(&test.pin_dir).unwrap();
    assert!(removed.len() >= 7, "{removed:?}");
    assert!(!test.pin_dir.exists());
}

#[test]
fn what_cannot_be_programmed_is_refused_by_name() {
    use podway_bpf_host::{Endpoint, Peer, PeerFlags};
    if !can_run() {
        return;
    }
    let test = TestDatapath::new("refuse", AttachMethod::of_this_kernel());
    let mut endpoint = Endpoint {
        id: 1,
        ifindex: 7,
        pod_mac: [2; 6],
        host_mac: [2; 6],
        addresses: Vec::new(),
        queued: false,
    };
    let error = test.get().set_endpoint(&endpoint).unwrap_err().to_string();
    assert!(error.contains("interface 7") && error.contains("no address"), "{error}");
    endpoint.addresses = vec!["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()];
    let error = test.get().set_endpoint(&endpoint).unwrap_err().to_string();
    assert!(error.contains("10.0.0.1 and 10.0.0.2"), "{error}");
    let peer = Peer { node: "10.0.0.1".parse().unwrap(), flags: PeerFlags::default() };
    let error = test.get().sync_peers(&[("::/0".parse().unwrap(), peer)].into()).unwrap_err().to_string();
    assert!(error.contains("::/0") && error.contains("every IPv4 address"), "{error}");
    let error = test.get().attach_pod(999_999).unwrap_err().to_string();
    assert!(error.contains("999999"), "{error}");
}
