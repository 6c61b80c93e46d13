//! The pool and its journal against a naive model: random histories with crashes, torn files and lost files.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use proptest::prelude::*;

use super::pool::{Lease, REST_MS, USABLE_MAX};
use super::*;

fn id(n: usize) -> AttachmentId {
    AttachmentId::new(format!("c{n}"), "eth0")
}

fn pod(name: &str) -> Owner {
    Owner { pod: Some(name.into()), network: Some("podway".into()), ..Owner::default() }
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn open(path: &Path, now: u64, cidrs: &[&str]) -> Leases {
    let mut leases = Leases::open(path, "boot-1", now);
    leases.set_ranges(&nets(cidrs));
    leases
}

fn temp() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    (dir, path)
}

#[test]
fn addresses_come_in_order_and_rest_before_reuse() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/29"]);
    let mut got = Vec::new();
    for n in 0..6 {
        got.push(leases.allocate(&id(n), &Owner::default(), 0).unwrap().addresses[0].to_string());
    }
    assert_eq!(got, ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
    let full = leases.allocate(&id(9), &Owner::default(), 0).unwrap_err();
    assert_eq!(
        full.to_string(),
        "no free pod address: 10.0.0.0/29: 6 of 6 in use, 0 resting; delete pods or give the node a larger podCIDR"
    );
    leases.release(&id(3), 1000);
    leases.release(&id(1), 2000);
    let resting = leases.allocate(&id(9), &Owner::default(), 5000).unwrap_err();
    assert_eq!((resting.usage[0].leased, resting.usage[0].resting), (4, 2));
    assert_eq!(resting.retry_in, Some(1000 + REST_MS - 5000));
    assert!(resting.to_string().ends_with("the next one is free in 26 s"), "{resting}");
    // Freed first, reused first.
    assert_eq!(
        leases.allocate(&id(9), &Owner::default(), 1000 + REST_MS).unwrap().addresses[0].to_string(),
        "10.0.0.4"
    );
    assert!(leases.allocate(&id(10), &Owner::default(), 1999 + REST_MS).is_err());
    assert_eq!(
        leases.allocate(&id(10), &Owner::default(), 2000 + REST_MS).unwrap().addresses[0].to_string(),
        "10.0.0.2"
    );
}

#[test]
fn ranges_leave_out_what_is_not_a_host_address() {
    for (cidr, first, usable) in [
        ("10.0.0.0/24", "10.0.0.1", 254),
        ("10.0.0.4/30", "10.0.0.5", 2),
        ("10.0.0.4/31", "10.0.0.4", 2),
        ("10.0.0.4/32", "10.0.0.4", 1),
        ("10.0.0.77/24", "10.0.0.1", 254),
        ("10.0.0.0/8", "10.0.0.1", USABLE_MAX),
        ("fd00::/64", "fd00::1", USABLE_MAX),
        ("::/0", "::1", USABLE_MAX),
        ("fd00::/126", "fd00::1", 3),
        ("fd00::8/127", "fd00::8", 2),
        ("fd00::8/128", "fd00::8", 1),
    ] {
        let (_dir, path) = temp();
        let mut leases = open(&path, 0, &[cidr]);
        assert_eq!(leases.usage(0)[0].usable, usable, "{cidr}");
        assert_eq!(
            leases.allocate(&id(0), &Owner::default(), 0).unwrap().addresses[0].to_string(),
            first,
            "{cidr}"
        );
    }
}

#[test]
fn dual_stack_is_all_or_nothing() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/24", "fd00::8/127", "10.1.0.0/24"]);
    let first = leases.allocate(&id(0), &pod("shop/checkout"), 0).unwrap();
    assert_eq!(first.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::8".parse().unwrap()]);
    leases.allocate(&id(1), &Owner::default(), 0).unwrap();
    let error = leases.allocate(&id(2), &Owner::default(), 0).unwrap_err();
    assert_eq!(error.usage.len(), 1, "only the family that is full is named: {error}");
    assert_eq!(error.usage[0].cidr.to_string(), "fd00::8/127");
    assert_eq!(leases.usage(0)[0].leased, 2, "nothing of the other family was taken");
    // The same attachment again: the same addresses.
    assert_eq!(leases.allocate(&id(0), &Owner::default(), 7).unwrap(), first);
}

#[test]
fn a_second_prefix_of_the_family_is_used_when_the_first_is_full() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/31", "10.1.0.0/31"]);
    let got: Vec<String> = (0..4)
        .map(|n| leases.allocate(&id(n), &Owner::default(), 0).unwrap().addresses[0].to_string())
        .collect();
    assert_eq!(got, ["10.0.0.0", "10.0.0.1", "10.1.0.0", "10.1.0.1"]);
}

#[test]
fn no_prefix_is_an_error_with_words() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &[]);
    assert_eq!(
        leases.allocate(&id(0), &Owner::default(), 0).unwrap_err().to_string(),
        "this node has no podCIDR to take addresses from"
    );
}

#[test]
fn changed_prefixes_keep_the_leases_of_the_old_ones() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/24"]);
    let old = leases.allocate(&id(0), &Owner::default(), 0).unwrap();
    leases.set_ranges(&nets(&["10.9.0.0/24"]));
    assert_eq!(leases.allocate(&id(1), &Owner::default(), 0).unwrap().addresses[0].to_string(), "10.9.0.1");
    assert_eq!(leases.lease(&id(0)), Some(&old));
    assert_eq!(leases.release(&id(0), 5), Some(old));
    assert_eq!(leases.release(&id(0), 5), None, "releasing twice is no error");
}

#[test]
fn a_restart_remembers_leases_and_rest() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/30"]);
    let kept = leases.allocate(&id(0), &pod("a/b"), 100).unwrap();
    leases.allocate(&id(1), &Owner::default(), 100).unwrap();
    leases.release(&id(1), 200);
    drop(leases);
    let mut leases = open(&path, 300, &["10.0.0.0/30"]);
    assert_eq!(leases.lease(&id(0)), Some(&kept));
    assert!(leases.allocate(&id(2), &Owner::default(), 199 + REST_MS).is_err());
    assert_eq!(
        leases.allocate(&id(2), &Owner::default(), 200 + REST_MS).unwrap().addresses[0].to_string(),
        "10.0.0.2"
    );
}

#[test]
fn another_boot_starts_afresh() {
    let (_dir, path) = temp();
    open(&path, 0, &["10.0.0.0/30"]).allocate(&id(0), &Owner::default(), 100).unwrap();
    let leases = Leases::open(&path, "boot-2", 5);
    assert_eq!(leases.iter().count(), 0);
}

#[test]
fn damage_is_reported_by_line_and_costs_that_line() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/24"]);
    for n in 0..3 {
        leases.allocate(&id(n), &Owner::default(), 0).unwrap();
    }
    drop(leases);
    let text = std::fs::read_to_string(&path).unwrap();
    for (broken, kept) in [
        (text.replace("c1", "cX"), vec![id(0), id(2)]),
        (text[..text.len() - 1].to_owned(), vec![id(0), id(1)]),
        (text[..text.len() - 20].to_owned(), vec![id(0), id(1)]),
        (format!("{text}\u{0}\u{0}garbage\n"), vec![id(0), id(1), id(2)]),
        (text.replacen("boot-1", "boot-X", 1), vec![]),
        (String::new(), vec![]),
    ] {
        std::fs::write(&path, &broken).unwrap();
        let (_, found) = Journal::open(&path, "boot-1");
        assert!(found.damage.is_some(), "{broken}");
        let leases = Leases::open(&path, "boot-1", 5);
        assert_eq!(leases.iter().map(|l| l.id.clone()).collect::<Vec<_>>(), kept, "{broken}");
        // The file is whole again at once.
        assert_eq!(Journal::open(&path, "boot-1").1.damage, None);
    }
}

#[test]
fn what_is_no_file_is_unreadable_and_not_fatal() {
    let (_dir, path) = temp();
    std::fs::create_dir(&path).unwrap();
    let mut leases = open(&path, 0, &["10.0.0.0/24"]);
    assert!(leases.journal_is_behind());
    assert!(leases.allocate(&id(0), &Owner::default(), 0).is_ok(), "attaching goes on");
    std::fs::remove_dir(&path).unwrap();
    leases.retry_journal();
    assert!(!leases.journal_is_behind());
    assert!(open(&path, 0, &[]).lease(&id(0)).is_some(), "what was missing is there now");
}

#[test]
fn a_full_disk_costs_no_lease() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/24"]);
    leases.allocate(&id(0), &Owner::default(), 0).unwrap();
    leases.journal.break_for_test();
    leases.allocate(&id(1), &Owner::default(), 0).unwrap();
    assert!(leases.journal_is_behind());
    leases.release(&id(0), 10).unwrap();
    leases.retry_journal();
    drop(leases);
    let leases = open(&path, 20, &["10.0.0.0/24"]);
    assert_eq!(leases.iter().map(|l| l.id.clone()).collect::<Vec<_>>(), [id(1)]);
}

#[test]
fn a_death_while_the_disk_is_full_is_seen_by_the_next_agent() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/24"]);
    leases.allocate(&id(0), &Owner::default(), 0).unwrap();
    leases.journal.break_for_test();
    leases.allocate(&id(1), &Owner::default(), 0).unwrap();
    drop(leases);
    let (_, found) = Journal::open(&path, "boot-1");
    assert_eq!(found.damage, Some(journal::Damage::Behind));
    assert_eq!(found.records.len(), 1, "what was written before counts");
}

#[test]
fn the_journal_does_not_grow_without_end() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/24"]);
    let mut now = 0;
    for n in 0..3000 {
        leases.allocate(&id(n), &Owner::default(), now).unwrap();
        leases.release(&id(n), now).unwrap();
        now += 1000;
    }
    let lines = std::fs::read_to_string(&path).unwrap().lines().count();
    assert!(lines < 2200, "{lines} lines");
}

#[test]
fn after_a_lost_journal_addresses_well_ahead_are_used() {
    let (_dir, path) = temp();
    let mut leases = open(&path, 0, &["10.0.0.0/24"]);
    for n in 0..10 {
        leases.allocate(&id(n), &Owner::default(), 0).unwrap();
    }
    leases.release(&id(9), 0);
    let held: Vec<Lease> = leases.iter().cloned().collect();
    drop(leases);
    std::fs::remove_file(&path).unwrap();
    let mut leases = Leases::open(&path, "boot-1", 0);
    for lease in &held {
        assert_eq!(leases.adopt(lease), Ok(true));
    }
    leases.set_ranges(&nets(&["10.0.0.0/24"]));
    let next = leases.allocate(&id(20), &Owner::default(), 1000).unwrap().addresses[0];
    assert_eq!(next.to_string(), "10.0.0.73", "9 known, a quarter of 254 left out");
}

#[derive(Debug, Clone)]
enum Step {
    Allocate(usize),
    Release(usize),
    Wait(u64),
    /// The agent dies and comes back; the file is as it was.
    Crash,
    /// … and its last bytes are gone.
    Tear(usize),
    /// … and the file is gone.
    Lose,
    /// … and one byte is another.
    Flip(usize, u8),
    DiskFull,
    DiskFree,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..12usize).prop_map(Step::Allocate),
        6 => (0..12usize).prop_map(Step::Release),
        4 => (0..20_000u64).prop_map(Step::Wait),
        2 => Just(Step::Crash),
        1 => (1..120usize).prop_map(Step::Tear),
        1 => Just(Step::Lose),
        1 => (any::<usize>(), 1..=255u8).prop_map(|(at, bits)| Step::Flip(at, bits)),
        1 => Just(Step::DiskFull),
        1 => Just(Step::DiskFree),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever happens to agent and file: no two attachments ever share an address, an attachment that the
    /// kernel knows keeps its addresses, and an address rests before it is used again. (Of the last, a second
    /// damage within a minute, a long time without writing, or a file without a readable line, makes a promise
    /// of best effort.)
    #[test]
    fn histories(steps in prop::collection::vec(step(), 1..60)) {
        let cidrs = ["10.0.0.0/26", "fd00::/122"];
        let (_dir, path) = temp();
        let mut now = 1_000_000;
        let mut leases = open(&path, now, &cidrs);
        // The kernel's truth: what is attached. And when each address was last freed.
        let mut held: BTreeMap<AttachmentId, Lease> = BTreeMap::new();
        let mut freed: BTreeMap<IpAddr, u64> = BTreeMap::new();
        let mut damaged_at: Option<u64> = None;
        // Since when, and of how many new leases, nothing could be written.
        let mut behind: Option<(u64, usize)> = None;
        for step in steps {
            let mut restart = None;
            match step {
                Step::Allocate(n) => {
                    // 62 and 63 addresses for 12 attachments, some of them resting.
                    if let Ok(lease) = leases.allocate(&id(n), &Owner::default(), now) {
                        if let Some(before) = held.get(&lease.id) {
                            prop_assert_eq!(before, &lease);
                        } else {
                            for address in &lease.addresses {
                                if let Some(at) = freed.get(address) {
                                    prop_assert!(now >= at + REST_MS, "{} rests since {}, now {}", address, at, now);
                                }
                            }
                        }
                        if let Some((_, lost)) = &mut behind {
                            *lost += 1;
                        }
                        held.insert(lease.id.clone(), lease);
                    }
                }
                Step::Release(n) => {
                    let released = leases.release(&id(n), now);
                    prop_assert_eq!(&released, &held.remove(&id(n)));
                    for address in released.into_iter().flat_map(|l| l.addresses) {
                        freed.insert(address, now);
                    }
                }
                Step::Wait(ms) => now += ms,
                Step::Crash => restart = Some(None),
                Step::Tear(bytes) => restart = Some(Some(Step::Tear(bytes))),
                Step::Lose => restart = Some(Some(Step::Lose)),
                Step::Flip(at, bits) => restart = Some(Some(Step::Flip(at, bits))),
                Step::DiskFull => {
                    leases.journal.break_for_test();
                    behind.get_or_insert((now, 0));
                }
                Step::DiskFree => {
                    leases.retry_journal();
                    behind = None;
                }
            }
            if let Some(damage) = restart {
                if damage.is_some() || leases.journal_is_behind() {
                    let (since, lost) = behind.unwrap_or((now, 0));
                    if damaged_at.is_some_and(|at| since < at + 2 * REST_MS) || lost > 10 {
                        freed.clear();
                    }
                    damaged_at = Some(now);
                }
                drop(leases);
                match damage {
                    Some(Step::Tear(bytes)) => {
                        let text = std::fs::read(&path).unwrap();
                        std::fs::write(&path, &text[..text.len().saturating_sub(bytes)]).unwrap();
                    }
                    Some(Step::Lose) => std::fs::remove_file(&path).unwrap(),
                    Some(Step::Flip(at, bits)) => {
                        let mut text = std::fs::read(&path).unwrap();
                        let at = at % text.len();
                        text[at] ^= bits;
                        std::fs::write(&path, text).unwrap();
                    }
                    _ => {}
                }
                let damage = Journal::open(&path, "boot-1").1.damage;
                if matches!(damage, Some(journal::Damage::Missing | journal::Damage::Unreadable(_))) {
                    freed.clear();
                }
                behind = None;
                leases = Leases::open(&path, "boot-1", now);
                let unattached: Vec<AttachmentId> =
                    leases.iter().map(|l| l.id.clone()).filter(|i| !held.contains_key(i)).collect();
                for gone in unattached {
                    leases.release(&gone, now);
                }
                for lease in held.values() {
                    prop_assert!(leases.adopt(lease).is_ok());
                }
                leases.set_ranges(&nets(&cidrs));
                for lease in held.values_mut() {
                    *lease = leases.lease(&lease.id).expect("adopted").clone();
                }
            }
            let addresses: Vec<IpAddr> = leases.iter().flat_map(|l| l.addresses.clone()).collect();
            let distinct: BTreeSet<IpAddr> = addresses.iter().copied().collect();
            prop_assert_eq!(addresses.len(), distinct.len());
            prop_assert_eq!(leases.iter().cloned().collect::<Vec<_>>(), held.values().cloned().collect::<Vec<_>>());
        }
    }

    /// Without damage, a restart is not to be noticed: the same requests get the same answers.
    #[test]
    fn a_restart_changes_nothing(steps in prop::collection::vec((0..8usize, any::<bool>(), 0..15_000u64), 1..40)) {
        let (_dir, path) = temp();
        let (_other, other) = temp();
        let cidrs = ["10.0.0.0/28"];
        let mut steady = open(&other, 0, &cidrs);
        let mut leases = open(&path, 0, &cidrs);
        let mut now = 0;
        for (n, allocate, wait) in steps {
            now += wait;
            drop(leases);
            leases = open(&path, now, &cidrs);
            if allocate {
                prop_assert_eq!(leases.allocate(&id(n), &Owner::default(), now).is_ok(), steady.allocate(&id(n), &Owner::default(), now).is_ok());
            } else {
                prop_assert_eq!(leases.release(&id(n), now).is_some(), steady.release(&id(n), now).is_some());
            }
        }
    }
}
