//! Restarts, damage, refusals: what the kernel holds stays right, and what is not ours stays as it is.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::{
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use common::{
    root,
    scenarios::{Bench, OUTER, cluster_ip, frontend, key, lb, meta, set, vip},
    world::{Outcome, World, address},
};
use podway_proxy_rules::{
    Writer,
    iptables::{IptablesWriter, Kind},
    nft::NftWriter,
};
use podway_services::table::{
    Backend, Family, FrontendAddr, FrontendKind, Protocol, ServiceId, SetId, SetKind, TableChange,
};

struct Mode {
    name: &'static str,
    make: fn() -> Box<dyn Writer>,
    /// Commands that do damage, and a word of what the audit must say.
    damage: &'static [(&'static str, &'static str)],
    /// Prints all rules, ours and others'.
    show: &'static str,
}

const MODES: [Mode; 3] = [
    Mode {
        name: "nft",
        make: || Box::new(NftWriter::new()),
        damage: &[
            ("nft delete table ip podway-services", "table ip podway-services"),
            ("nft flush ruleset", "table ip6 podway-services"),
            ("nft flush chain ip podway-services prerouting", "chain ip prerouting"),
            ("nft flush map ip6 podway-services frontends", "ip6 frontends: fd00:96::1 port 80/TCP"),
            ("nft flush map ip podway-services cluster", "ip cluster: slot 0 of"),
            ("nft delete element ip podway-services vips '{ 10.96.0.1 }'", "ip vips: 10.96.0.1"),
            ("nft add element ip podway-services vips '{ 10.96.0.77 }'", "ip vips: 10.96.0.77"),
            (
                "nft add chain ip podway-services mine; nft add rule ip podway-services mine drop",
                "chain mine",
            ),
            ("nft add rule ip podway-services postrouting drop", "chain ip postrouting"),
        ],
        show: "nft -s list ruleset",
    },
    Mode {
        name: "ipl",
        make: || Box::new(IptablesWriter::new(Kind::Legacy)),
        damage: &[
            ("iptables-legacy -t nat -F PODWAY-SERVICES", "IPv4 nat: -A PODWAY-SERVICES"),
            ("iptables-legacy -t nat -F", "PODWAY"),
            ("ip6tables-legacy -t nat -F PREROUTING", "-A PREROUTING"),
            ("iptables-legacy -t filter -F PODWAY-REJECT", "IPv4 filter: -A PODWAY-REJECT"),
            (
                "iptables-legacy -t nat -I PODWAY-SERVICES 1 -p tcp -j RETURN",
                "-A PODWAY-SERVICES -p tcp -j RETURN",
            ),
            ("iptables-legacy -t nat -N PODWAY-MINE", "chain PODWAY-MINE"),
        ],
        show: "iptables-legacy-save; ip6tables-legacy-save",
    },
    Mode {
        name: "ipn",
        make: || Box::new(IptablesWriter::new(Kind::Nft)),
        damage: &[
            ("iptables-nft -t nat -F PODWAY-SERVICES", "IPv4 nat: -A PODWAY-SERVICES"),
            ("nft flush ruleset", "PODWAY"),
            ("nft delete table ip nat", "PODWAY"),
            ("ip6tables-nft -t nat -F PREROUTING", "-A PREROUTING"),
            ("iptables-nft -t filter -F PODWAY-REJECT", "IPv4 filter: -A PODWAY-REJECT"),
            (
                "iptables-nft -t nat -I PODWAY-SERVICES 1 -p tcp -j RETURN",
                "-A PODWAY-SERVICES -p tcp -j RETURN",
            ),
        ],
        show: "iptables-nft-save; ip6tables-nft-save",
    },
];

fn shell(world: &World, command: &str) -> String {
    let output =
        Command::new("ip").args(["netns", "exec", &world.ns("node"), "sh", "-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    // Counters, times, and tables that were made by looking at them.
    text.lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| l.split(" [").next().unwrap_or(l))
        .collect::<Vec<_>>()
        .join("\n")
}

fn fill(bench: &mut Bench<'_>) {
    for family in common::scenarios::FAMILIES {
        let id = if family == Family::V4 { 1 } else { 11 };
        let mut changes = cluster_ip(id, Protocol::Tcp, family, &["p1", "r1"]);
        for change in &mut changes {
            // The same address in both, whatever the number.
            match change {
                TableChange::Vip(addr) => *addr = vip(family, 1),
                TableChange::Frontend(key, _) => key.addr = FrontendAddr::Ip(vip(family, 1)),
                _ => {}
            }
        }
        bench.apply(&changes);
        bench.apply(&[
            frontend(
                id.into(),
                key(FrontendAddr::Ip(lb(family, 1)), 80, Protocol::Tcp),
                FrontendKind::LoadBalancer,
                OUTER,
            ),
            frontend(
                id.into(),
                key(FrontendAddr::Node(family), 30001, Protocol::Tcp),
                FrontendKind::NodePort,
                OUTER,
            ),
        ]);
    }
}

fn works(bench: &Bench<'_>) {
    for family in common::scenarios::FAMILIES {
        bench.served("p2", Protocol::Tcp, (vip(family, 1), 80), &["p1", "r1"], true);
        bench.served("o2", Protocol::Tcp, (address("node", family), 30001), &["p1", "r1"], false);
        bench.all("p2", Protocol::Tcp, (vip(family, 1), 81), &Outcome::Refused);
    }
}

#[test]
fn damage_is_found_repaired_and_told() {
    if !root() {
        return;
    }
    for mode in &MODES {
        let world = World::new(&format!("dmg-{}", mode.name));
        let mut writer = (mode.make)();
        let mut bench = Bench::new(&world, writer.as_mut());
        bench.doing("before the damage");
        fill(&mut bench);
        let audit = |bench: &mut Bench<'_>| {
            let writer = &mut bench.writer;
            world.enter("node", || writer.audit()).unwrap()
        };
        let clean = audit(&mut bench);
        assert!(clean.is_clean() && clean.report.written == 0, "{}: {clean:?}", mode.name);
        for (command, word) in mode.damage {
            bench.doing(format!("after {command}"));
            shell(&world, command);
            let found = audit(&mut bench);
            let said = format!("{found:?}");
            assert!(said.contains(word), "{}: {command}: {said}", mode.name);
            works(&bench);
            let again = audit(&mut bench);
            assert!(again.is_clean(), "{}: after {command} and its repair: {again:?}", mode.name);
            // A change comes before the audit: whether it meets the damage or not, it is not lost.
            shell(&world, command);
            bench.apply(&[set(1, SetKind::Cluster, Family::V4, &["r2"])]);
            audit(&mut bench);
            bench.served("p2", Protocol::Tcp, (vip(Family::V4, 1), 80), &["r2"], true);
            bench.apply(&[set(1, SetKind::Cluster, Family::V4, &["p1", "r1"])]);
            works(&bench);
        }
    }
}

#[test]
fn a_restart_writes_nothing_and_others_rules_stay() {
    if !root() {
        return;
    }
    for mode in &MODES {
        let world = World::new(&format!("own-{}", mode.name));
        let others = match mode.name {
            "nft" => {
                "nft add table inet others; nft add chain inet others c '{ type filter hook input priority 5 ; }'; \
                 nft add rule inet others c tcp dport 9 drop; nft add table ip podway; nft add chain ip podway c"
            }
            "ipl" => {
                "iptables-legacy -t nat -N KUBE-SERVICES; iptables-legacy -t nat -A PREROUTING -j KUBE-SERVICES; \
                 iptables-legacy -A FORWARD -s 1.2.3.4 -j DROP; iptables-legacy -t nat -N PODWAYS; \
                 ip6tables-legacy -t nat -N OTHER; ip6tables-legacy -N OTHER"
            }
            _ => {
                "iptables-nft -t nat -N KUBE-SERVICES; iptables-nft -t nat -A PREROUTING -j KUBE-SERVICES; \
                 iptables-nft -A FORWARD -s 1.2.3.4 -j DROP; iptables-nft -t nat -N PODWAYS; \
                 ip6tables-nft -t nat -N OTHER; ip6tables-nft -N OTHER; \
                 iptables-nft -t nat -A INPUT -s 1.2.3.4 -j ACCEPT; iptables-nft -t nat -A OUTPUT -s 1.2.3.4 -j ACCEPT; \
                 iptables-nft -t nat -A POSTROUTING -s 1.2.3.4 -j ACCEPT; iptables-nft -A INPUT -s 1.2.3.4 -j DROP; \
                 iptables-nft -A OUTPUT -s 1.2.3.4 -j DROP; ip6tables-nft -t nat -A PREROUTING -s ::5 -j ACCEPT; \
                 ip6tables-nft -t nat -A POSTROUTING -s ::5 -j ACCEPT; ip6tables-nft -t nat -A OUTPUT -s ::5 -j ACCEPT; \
                 ip6tables-nft -A FORWARD -s ::5 -j DROP; ip6tables-nft -A INPUT -s ::5 -j DROP; \
                 ip6tables-nft -A OUTPUT -s ::5 -j DROP"
            }
        };
        shell(&world, others);
        let before = shell(&world, mode.show);
        let mut writer = (mode.make)();
        let mut bench = Bench::new(&world, writer.as_mut());
        bench.doing("with others' rules");
        fill(&mut bench);
        works(&bench);
        let ours = shell(&world, mode.show);
        assert_ne!(before, ours);

        let mut next = (mode.make)();
        let (view, table) = (world.view(), bench.table.clone());
        let report = world.enter("node", || next.sync(&table, &view)).unwrap();
        assert_eq!((report.written, report.removed), (0, 0), "{}", mode.name);
        assert_eq!(shell(&world, mode.show), ours);
        let report = world
            .enter("node", || next.apply(&[set(1, SetKind::Cluster, Family::V4, &["p1", "r1", "r2"])]))
            .unwrap();
        // nftables: one backend, three frontends that now choose among three, and the chains for that.
        assert!(report.written < 20, "{}: {report:?}", mode.name);
        bench.served("p2", Protocol::Tcp, (vip(Family::V4, 1), 80), &["p1", "r1", "r2"], true);

        let removed = world.enter("node", || next.remove()).unwrap();
        assert!(!removed.is_empty());
        assert_eq!(shell(&world, mode.show), before, "{}", mode.name);
        assert_eq!(world.enter("node", || next.remove()).unwrap(), Vec::<String>::new());
    }
}

#[test]
fn one_refused_service_does_not_stop_the_others() {
    if !root() {
        return;
    }
    for mode in &MODES {
        let world = World::new(&format!("ref-{}", mode.name));
        let mut writer = (mode.make)();
        let mut bench = Bench::new(&world, writer.as_mut());
        bench.doing("one service refused");
        fill(&mut bench);
        // The kernel cannot translate an IPv4 packet to an IPv6 address.
        let wrong = |addr| -> Arc<[Backend]> {
            Arc::from([Backend { addr, port: 80, local: false, terminating: false }])
        };
        let mut changes = cluster_ip(2, Protocol::Tcp, Family::V4, &["r1"]);
        changes[1] = TableChange::Set(
            SetId { service: ServiceId(2), kind: SetKind::Cluster },
            Some(wrong(address("r1", Family::V6))),
        );
        changes.extend(cluster_ip(3, Protocol::Tcp, Family::V4, &["r2"]));
        for change in &changes {
            bench.table.apply(change);
        }
        let writer = &mut bench.writer;
        let report = world.enter("node", || writer.apply(&changes)).unwrap();
        assert_eq!(report.refused.len(), 1, "{}: {report:?}", mode.name);
        assert_eq!(report.refused[0].service, ServiceId(2));
        assert_eq!(report.refused[0].object, "ns/svc2:p (TCP)");
        assert!(!report.refused[0].cause.is_empty());
        works(&bench);
        bench.served("p2", Protocol::Tcp, (vip(Family::V4, 3), 80), &["r2"], true);
        // Others change meanwhile; the audit tries again, and says that it is still so.
        bench.served("p2", Protocol::Tcp, (vip(Family::V4, 3), 80), &["r2"], true);
        let writer = &mut bench.writer;
        let audit = world.enter("node", || writer.audit()).unwrap();
        assert_eq!(audit.report.refused.len(), 1, "{}: {audit:?}", mode.name);
        // A whole table with it, from a new start.
        let mut next = (mode.make)();
        let (view, table) = (world.view(), bench.table.clone());
        let report = world.enter("node", || next.sync(&table, &view)).unwrap();
        assert_eq!(report.refused.len(), 1, "{}: {report:?}", mode.name);
        works(&bench);
        // Corrected.
        let right = [set(2, SetKind::Cluster, Family::V4, &["r1"])];
        bench.apply(&right);
        bench.served("p2", Protocol::Tcp, (vip(Family::V4, 2), 80), &["r1"], true);
        works(&bench);
        // An existing service that becomes wrong keeps what it had.
        let worse = [TableChange::Set(
            SetId { service: ServiceId(3), kind: SetKind::Cluster },
            Some(wrong(address("r1", Family::V6))),
        )];
        let writer = &mut bench.writer;
        let report = world.enter("node", || writer.apply(&worse)).unwrap();
        assert_eq!(report.refused.len(), 1, "{}: {report:?}", mode.name);
        bench.served("p2", Protocol::Tcp, (vip(Family::V4, 3), 80), &["r2"], true);
    }
}

#[test]
fn no_connection_fails_while_rules_change() {
    if !root() {
        return;
    }
    for mode in &MODES {
        let world = World::new(&format!("gap-{}", mode.name));
        let mut writer = (mode.make)();
        let mut bench = Bench::new(&world, writer.as_mut());
        bench.doing("while rules change");
        fill(&mut bench);
        let (stop, tries) = (AtomicBool::new(false), AtomicUsize::new(0));
        let to = SocketAddr::from((vip(Family::V4, 1), 80));
        thread::scope(|scope| {
            let client = scope.spawn(|| {
                let mut failed = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    for outcome in world.tries("p2", Protocol::Tcp, to, 20) {
                        tries.fetch_add(1, Ordering::Relaxed);
                        if !matches!(outcome, Outcome::Served { .. }) {
                            failed.push(outcome);
                        }
                    }
                }
                failed
            });
            for round in 0..20_u8 {
                let members: &[&str] = match round % 4 {
                    0 => &["p1", "r1", "r2"],
                    1 => &["r1", "r2"],
                    2 => &["p1"],
                    _ => &["p1", "r1"],
                };
                bench.apply(&[set(1, SetKind::Cluster, Family::V4, members)]);
                bench.apply(&cluster_ip(20 + round, Protocol::Tcp, Family::V4, &["r1"]));
                if round % 5 == 4 {
                    // A new agent takes over.
                    let mut next = (mode.make)();
                    let (view, table) = (world.view(), bench.table.clone());
                    world.enter("node", || next.sync(&table, &view)).unwrap();
                    bench.sync();
                }
            }
            bench.apply(&[meta(1, Protocol::Tcp, Family::V4)]);
            stop.store(true, Ordering::Relaxed);
            let failed = client.join().unwrap();
            assert!(failed.is_empty(), "{}: {failed:?} of {tries:?}", mode.name);
        });
        println!("{}: {} connections", mode.name, tries.load(Ordering::Relaxed));
    }
}
