//! The IPVS writer with real packets, and readers and removal of what others do with IPVS. Runs where the kernel has
//! IPVS: in the virtual machine of `cargo xtask vm`.
#![expect(clippy::print_stdout, reason = "a test that does not run says why")]
#![expect(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::root;
use common::scenarios::{
    Bench, INTERNAL, OUTER, OUTER_LOCAL, SCENARIOS, cluster_ip, frontend, key, lb, meta, set, vip,
};
use common::world::{World, address, ip};
use podway_link::Netns;
use podway_proxy_rules::foreign::{self, cleanup, detect};
use podway_proxy_rules::ipvs::{IpvsWriter, Scheduler};
use podway_proxy_rules::{AuditReport, Error, Feature, Report, ServiceTable, Writer};
use podway_services::table::{
    Backend, Family, FrontendAddr, FrontendKind, NodeView, Protocol, ServiceId, SetId, SetKind, TableChange,
};

/// Whether to go on. From here on a failure is told at once, not only at the end of everything.
fn ready() -> bool {
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| std::panic::set_hook(Box::new(|panic| say(&panic.to_string()))));
    if !root() {
        return false;
    }
    let there = Path::new("/proc/net/ip_vs").exists();
    if !there {
        println!("skipped: this kernel has no IPVS; `cargo xtask vm --test ipvs` runs this in one that has");
    }
    there
}

fn tool(world: &World, command: &[&str]) -> String {
    let output = world.enter("node", || Command::new(command[0]).args(&command[1..]).output()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn audit(bench: &mut Bench<'_>) -> AuditReport {
    let (world, writer) = (bench.world, &mut bench.writer);
    world.enter("node", || writer.audit()).unwrap()
}

/// Nothing of ours is left.
fn assert_empty(world: &World) {
    assert_eq!(tool(world, &["ipvsadm", "-Sn"]), "");
    assert!(!tool(world, &["nft", "list", "tables"]).contains("podway"));
    assert!(!tool(world, &["ip", "-o", "link"]).contains("podway"));
}

/// Says how far a long test is, past the harness, which keeps a test's output to itself until its end.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// What IPVS does in another way, and why.
const OTHERWISE: [(&str, &str); 1] = [(
    "affinity ends after its timeout",
    "persistence lasts until the kernel forgets the client's last connection, two minutes after its end",
)];

fn all_scenarios(family: Family) {
    if !ready() {
        return;
    }
    let world = World::new(&format!("ipvs-{family:?}").to_lowercase());
    let mut writer = IpvsWriter::new(Scheduler::default());
    let mut bench = Bench::new(&world, &mut writer);
    let mut failed = Vec::new();
    assert!(OTHERWISE.iter().all(|(title, _)| SCENARIOS.iter().any(|(what, _)| what == title)));
    for (what, scenario) in SCENARIOS {
        if let Some((_, why)) = OTHERWISE.iter().find(|(title, _)| title == what) {
            say(&format!("left out: {what}: {why}"));
            continue;
        }
        if *what == "many backends" && family == Family::V6 {
            // It starts its servers with the first family only, for both.
            for port in 8100..8140 {
                world.serve("r1", port);
                world.serve("r2", port);
            }
        }
        let began = Instant::now();
        bench.doing(format!("{what} ({family:?})"));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| scenario(&mut bench, family)));
        bench.clear();
        let took = began.elapsed().as_secs_f64();
        match result {
            Ok(()) => say(&format!("ok: {what} ({family:?}), {took:.1} s")),
            Err(_) => {
                say(&format!("FAILED: {what} ({family:?}), {took:.1} s"));
                failed.push(what);
            }
        }
    }
    let writer = &mut bench.writer;
    world.enter("node", || writer.remove()).unwrap();
    assert_empty(&world);
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn scenarios_v4() {
    all_scenarios(Family::V4);
}

#[test]
fn scenarios_v6() {
    all_scenarios(Family::V6);
}

/// A network namespace without a network, for what needs no packets.
struct Lite(String);

impl Lite {
    fn new(name: &str) -> Self {
        let name = format!("pwt-ipvs-{name}");
        Netns::delete_named(&name).unwrap();
        Netns::create_named(&name).unwrap();
        Self(name)
    }

    fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        Netns::open_named(&self.0).unwrap().run(f).unwrap()
    }

    fn tool(&self, command: &str) -> String {
        let words: Vec<&str> = command.split(' ').collect();
        let output = self.enter(|| Command::new(words[0]).args(&words[1..]).output()).unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What `ipvsadm -Sn` prints, sorted. The kernel leaves some out while servers of other namespaces come and go, so
    /// that it is asked three times.
    fn saved(&self) -> Vec<String> {
        let dumps = (0..3).map(|_| self.tool("ipvsadm -Sn")).collect::<String>();
        let lines: BTreeSet<&str> = dumps.lines().map(str::trim_end).collect();
        lines.into_iter().map(str::to_owned).collect()
    }

    fn sync(&self, writer: &mut IpvsWriter, table: &ServiceTable) -> podway_proxy_rules::Result<Report> {
        self.enter(|| writer.sync(table, &view()))
    }

    fn apply(&self, writer: &mut IpvsWriter, changes: &[TableChange]) -> Report {
        self.enter(|| writer.apply(changes)).unwrap()
    }

    fn audit(&self, writer: &mut IpvsWriter) -> AuditReport {
        self.enter(|| writer.audit()).unwrap()
    }
}

impl Drop for Lite {
    fn drop(&mut self) {
        let _ = Netns::delete_named(&self.0);
    }
}

fn view() -> NodeView {
    NodeView {
        name: "node".into(),
        addresses: vec![ip("192.168.50.1"), ip("fd00:50::1")],
        node_port_addresses: vec![ip("192.168.50.1"), ip("fd00:50::1")],
        pod_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/32".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        ..NodeView::default()
    }
}

fn table(changes: &[TableChange]) -> ServiceTable {
    let mut table = ServiceTable::default();
    for change in changes {
        table.apply(change);
    }
    assert_eq!(table.violations(), Vec::<String>::new());
    table
}

/// Every kind of frontend.
fn mixed() -> ServiceTable {
    let mut changes = cluster_ip(1, Protocol::Tcp, Family::V4, &["p1", "r1"]);
    changes.extend(cluster_ip(2, Protocol::Udp, Family::V6, &["p1"]));
    changes.extend(cluster_ip(3, Protocol::Sctp, Family::V4, &["r2"]));
    changes.extend(cluster_ip(4, Protocol::Tcp, Family::V4, &[]));
    changes.push(set(1, SetKind::Local, Family::V4, &["p1"]));
    changes.push(frontend(
        1,
        key(FrontendAddr::Ip(lb(Family::V4, 1)), 80, Protocol::Tcp),
        FrontendKind::LoadBalancer,
        OUTER_LOCAL,
    ));
    changes.push(frontend(
        2,
        key(FrontendAddr::Node(Family::V6), 30002, Protocol::Udp),
        FrontendKind::NodePort,
        OUTER,
    ));
    for change in &mut changes {
        if let TableChange::Frontend(_, frontend) = change
            && frontend.service == ServiceId(2)
        {
            frontend.affinity_s = Some(10_800);
        }
    }
    table(&changes)
}

/// The lines of [`mixed`].
const MIXED: [&str; 12] = [
    "-A --sctp-service 10.96.0.3:80 -s rr",
    "-A -f 1342177283 -s rr",
    "-A -t 10.96.0.1:80 -s rr",
    "-A -t 203.0.113.1:80 -s rr",
    "-A -u [fd00:50::1]:30002 -s rr -p 10800",
    "-A -u [fd00:96::2]:80 -s rr -p 10800",
    "-a --sctp-service 10.96.0.3:80 -r 10.244.1.12:8080 -m -w 1",
    "-a -f 1342177283 -r 10.244.0.11:8080 -m -w 1",
    "-a -t 10.96.0.1:80 -r 10.244.0.11:8080 -m -w 1",
    "-a -t 10.96.0.1:80 -r 10.244.1.11:8080 -m -w 1",
    "-a -t 203.0.113.1:80 -r 10.244.0.11:8080 -m -w 1",
    "-a -t 203.0.113.1:80 -r 10.244.1.11:8080 -m -w 1",
];

/// The same with those of IPv6, which ipvsadm prints with the length of the clients' prefix.
fn assert_mixed(saved: &[String]) {
    for line in MIXED {
        assert!(saved.iter().any(|s| s.starts_with(line)), "{line} in {saved:#?}");
    }
    assert_eq!(saved.len(), MIXED.len() + 2, "{saved:#?}");
}

#[test]
fn what_is_written_is_what_ipvsadm_sees_and_our_reader_reads() {
    if !ready() {
        return;
    }
    let lite = Lite::new("read");
    let mut writer = IpvsWriter::new(Scheduler::default());
    let report = lite.sync(&mut writer, &mixed()).unwrap();
    assert_eq!(report.refused, []);
    let saved = lite.saved();
    for line in &saved {
        say(&format!("saved: {line}"));
    }
    assert_mixed(&saved);
    let rules = foreign::ipvs::parse(&saved.join("\n"));
    assert_eq!(rules.problems, []);
    assert_eq!((rules.services.len(), rules.endpoints()), (6, 8));
    let affine = rules.services.iter().filter(|s| s.affinity_s == Some(10_800)).count();
    assert_eq!(affine, 2);
    assert!(rules.services.iter().flat_map(|s| &s.endpoints).all(|e| e.port == 8080 && e.weight == Some(1)));
    // Our own are no other proxy's.
    let detection = lite.enter(|| detect::detect_in(&[]));
    assert!(detection.findings.is_empty(), "{detection:?}");
}

#[test]
fn a_restart_adopts_and_a_change_in_between_is_written() {
    if !ready() {
        return;
    }
    let lite = Lite::new("adopt");
    // Of somebody else, from before.
    lite.tool("ipvsadm -A -t 192.0.2.99:25 -s wrr");
    lite.tool("ipvsadm -a -t 192.0.2.99:25 -r 192.0.2.100:25 -m");
    let mut first = IpvsWriter::new(Scheduler::default());
    let written = lite.sync(&mut first, &mixed()).unwrap();
    assert!(written.written > 20, "{written:?}");
    let addresses = lite.tool("ip -o addr show dev podway-ipvs0");
    for addr in ["10.96.0.1/32", "10.96.0.4/32", "203.0.113.1/32", "fd00:96::2/128"] {
        assert!(addresses.contains(addr), "{addr} in {addresses}");
    }
    assert!(!addresses.contains("192.168.50.1"), "{addresses}");
    drop(first);

    let mut second = IpvsWriter::new(Scheduler::default());
    let report = lite.sync(&mut second, &mixed()).unwrap();
    assert_eq!((report.written, report.removed), (0, 0), "all is adopted");
    assert!(lite.audit(&mut second).is_clean());
    drop(second);

    // Two services went while nobody looked, one got another scheduler and endpoint.
    let mut third = IpvsWriter::new("lc".parse().unwrap());
    lite.sync(&mut third, &table(&cluster_ip(1, Protocol::Tcp, Family::V4, &["p1", "r2"]))).unwrap();
    assert_eq!(
        lite.saved(),
        [
            "-A -t 10.96.0.1:80 -s lc",
            "-A -t 192.0.2.99:25 -s wrr",
            "-a -t 10.96.0.1:80 -r 10.244.0.11:8080 -m -w 1",
            "-a -t 10.96.0.1:80 -r 10.244.1.12:8080 -m -w 1",
            "-a -t 192.0.2.99:25 -r 192.0.2.100:25 -m -w 1",
        ]
    );
    let removed = lite.enter(|| third.remove()).unwrap();
    assert_eq!(
        removed,
        ["IPVS virtual server 10.96.0.1:80 TCP", "nftables table inet podway-ipvs", "device podway-ipvs0"]
    );
    assert_eq!(lite.saved().len(), 2, "somebody else's are left");
    assert!(lite.enter(|| third.remove()).unwrap().is_empty());
}

#[test]
fn what_others_change_is_repaired_and_said() {
    if !ready() {
        return;
    }
    let lite = Lite::new("audit");
    let mut writer = IpvsWriter::new(Scheduler::default());
    lite.sync(&mut writer, &mixed()).unwrap();
    for (harm, missing, foreign) in [
        ("ipvsadm -D -t 10.96.0.1:80", "virtual server 10.96.0.1:80 TCP", ""),
        (
            "ipvsadm -d -t 10.96.0.1:80 -r 10.244.0.11:8080",
            "real server 10.244.0.11:8080 of virtual server 10.96.0.1:80 TCP",
            "",
        ),
        (
            "ipvsadm -e -t 10.96.0.1:80 -r 10.244.0.11:8080 -m -w 7",
            "",
            "weight of real server 10.244.0.11:8080",
        ),
        (
            "ipvsadm -a -t 10.96.0.1:80 -r 10.0.0.9:1 -m",
            "",
            "real server 10.0.0.9:1 of virtual server 10.96.0.1",
        ),
        ("ipvsadm -E -t 10.96.0.1:80 -s sh", "", "scheduler or persistence of virtual server 10.96.0.1:80"),
        ("ipvsadm -C", "virtual server 203.0.113.1:80 TCP", ""),
        ("ip addr del 10.96.0.1/32 dev podway-ipvs0", "address 10.96.0.1", ""),
        ("ip addr add 10.96.0.77/32 dev podway-ipvs0", "", "address 10.96.0.77"),
        ("ip link del podway-ipvs0", "device podway-ipvs0", ""),
        ("nft delete element inet podway-ipvs frontends4 { 10.96.0.1 . tcp . 80 }", "the set frontends", ""),
        ("nft add element inet podway-ipvs vips4 { 10.9.9.9 }", "", "10.9.9.9 in the set vips"),
        ("nft flush chain inet podway-ipvs input", "rules of the nftables table", ""),
        ("nft delete table inet podway-ipvs", "rules of the nftables table", ""),
        ("nft flush ruleset", "rules of the nftables table", ""),
    ] {
        lite.tool(harm);
        let audit = lite.audit(&mut writer);
        let says = |lines: &[String], wanted: &str| {
            if wanted.is_empty() { lines.is_empty() } else { lines.iter().any(|l| l.contains(wanted)) }
        };
        assert!(says(&audit.missing, missing), "{harm}: {audit:#?}");
        // What the nftables table recorded is lost with it: the servers are then like somebody else's.
        assert!(says(&audit.foreign, foreign), "{harm}: {audit:#?}");
        assert_eq!(audit.report.refused, [], "{harm}");
        assert_mixed(&lite.saved());
        let again = lite.audit(&mut writer);
        assert!(again.is_clean(), "{harm}: {again:#?}");
        assert!(lite.tool("ip -o addr show dev podway-ipvs0").contains("10.96.0.1/32"), "{harm}");
    }
}

#[test]
fn every_scheduler_is_taken_and_a_missing_one_named() {
    if !ready() {
        return;
    }
    let lite = Lite::new("schedulers");
    let table = table(&cluster_ip(1, Protocol::Tcp, Family::V4, &["p1", "r1"]));
    for name in Scheduler::names().split(", ").filter(|name| *name != "fo") {
        let mut writer = IpvsWriter::new(name.parse().unwrap());
        assert_eq!(lite.sync(&mut writer, &table).unwrap().refused, [], "{name}");
        let wanted = match name {
            "mh" => "-A -t 10.96.0.1:80 -s mh -b mh-fallback,mh-port".to_owned(),
            "sh" => "-A -t 10.96.0.1:80 -s sh -b sh-fallback".to_owned(),
            name => format!("-A -t 10.96.0.1:80 -s {name}"),
        };
        assert_eq!(lite.saved()[0], wanted);
        assert_eq!(writer.supports(Feature::Maglev).is_ok(), name == "mh");
    }
    // This kernel's module of that scheduler is not loaded, and nobody here loads one.
    let mut writer = IpvsWriter::new("fo".parse().unwrap());
    let error = lite.sync(&mut writer, &table).unwrap_err().to_string();
    assert_eq!(
        error,
        "this kernel has no IPVS scheduler of that name (fo); load its module (modprobe ip_vs_<name>), or choose \
         another --ipvs-scheduler"
    );
}

#[test]
fn kernel_parameters_are_set_and_said() {
    if !ready() {
        return;
    }
    let lite = Lite::new("sysctl");
    lite.tool("ip link add eth9 type dummy");
    lite.tool("ip addr add 192.168.50.1/24 dev eth9");
    let mut writer = IpvsWriter::new(Scheduler::default());
    lite.sync(&mut writer, &ServiceTable::default()).unwrap();
    let said: Vec<String> = writer.sysctls().iter().map(ToString::to_string).collect();
    for wanted in [
        "net/ipv4/vs/conntrack: 0 → 1 (so that nftables can masquerade",
        "net/ipv4/vs/expire_nodest_conn: 0 → 1",
        "net/ipv4/conf/eth9/arp_ignore: 0 → 1",
        "net/ipv4/conf/eth9/arp_announce: 0 → 2",
    ] {
        assert!(said.iter().any(|s| s.starts_with(wanted)), "{wanted} in {said:#?}");
    }
    assert_eq!(lite.tool("cat /proc/sys/net/ipv4/vs/conntrack").trim(), "1");
    lite.sync(&mut writer, &ServiceTable::default()).unwrap();
    assert!(writer.sysctls().is_empty(), "nothing is changed twice");
}

#[test]
fn what_ipvs_cannot_do_is_refused_by_name() {
    let mut writer = IpvsWriter::new(Scheduler::default());
    let loopback = NodeView { node_port_addresses: vec![ip("127.0.0.1")], ..view() };
    let error = writer.sync(&ServiceTable::default(), &loopback).unwrap_err();
    assert!(error.to_string().starts_with("ipvs cannot do node ports at loopback addresses: "), "{error}");
    assert!(matches!(error, Error::Unsupported(_)));
    for (feature, advice) in [
        (Feature::Maglev, "--ipvs-scheduler mh"),
        (Feature::SocketTranslation, "--service-mode ebpf"),
        (Feature::DirectServerReturn, "--service-mode ebpf"),
    ] {
        let why = writer.supports(feature).unwrap_err().to_string();
        assert!(why.contains(advice), "{why}");
    }
    assert!(matches!(writer.apply(&[]), Err(Error::NotSynced("ipvs"))));
    assert!(matches!(writer.audit(), Err(Error::NotSynced("ipvs"))));
}

#[test]
fn what_kube_proxys_ipvs_mode_left_is_found_and_removed_and_nothing_else() {
    if !ready() {
        return;
    }
    let lite = Lite::new("cleanup");
    lite.tool("ip link add eth9 type dummy");
    lite.tool("ip addr add 192.168.50.1/24 dev eth9");
    // Somebody's mail server, ours, and what kube-proxy makes.
    lite.tool("ipvsadm -A -t 192.0.2.99:25 -s wrr");
    lite.tool("ipvsadm -A -t 192.168.50.1:25 -s wrr");
    let mut writer = IpvsWriter::new(Scheduler::default());
    lite.sync(&mut writer, &table(&cluster_ip(1, Protocol::Tcp, Family::V4, &["p1"]))).unwrap();
    let before = lite.saved();
    let detection = lite.enter(|| detect::detect_in(&[]));
    assert_eq!(detection.findings.len(), 1);
    assert_eq!(detection.findings[0].evidence, ["2 IPVS virtual servers"]);
    assert_eq!(detection.findings[0].proxy, detect::Proxy::Ipvs);
    // Without kube-proxy's device nobody can tell whose they are.
    let report = lite.enter(|| cleanup::kube_proxy(false, false)).unwrap();
    assert_eq!((report.removed.len(), report.kept.len(), report.failed.len()), (0, 2, 0), "{report:?}");

    lite.tool("ip link add kube-ipvs0 type dummy");
    for (addr, line) in [
        ("10.96.0.10/32", "-u 10.96.0.10:53"),
        ("fd00:96::a/128", "-u [fd00:96::a]:53"),
        ("10.96.0.1/32", "-t 10.96.0.1:443"),
    ] {
        lite.tool(&format!("ip addr add {addr} dev kube-ipvs0"));
        lite.tool(&format!("ipvsadm -A {line} -s rr"));
    }
    lite.tool("ipvsadm -A -t 192.168.50.1:30080 -s rr");
    lite.tool("ipvsadm -a -t 192.168.50.1:30080 -r 10.244.0.11:8080 -m");
    let detection = lite.enter(|| detect::detect_in(&[]));
    let [finding] = detection.findings.as_slice() else { panic!("{detection:?}") };
    assert_eq!(finding.proxy, detect::Proxy::KubeProxy);
    assert_eq!(finding.evidence, ["device kube-ipvs0 with 3 addresses", "6 IPVS virtual servers"]);

    let report = lite.enter(|| cleanup::kube_proxy(true, false)).unwrap();
    assert_eq!(report.removed.len(), 5, "{report:?}");
    assert_eq!(lite.saved().len(), before.len() + 5, "a dry run removes nothing");
    let report = lite.enter(|| cleanup::kube_proxy(false, false)).unwrap();
    assert_eq!((report.removed.len(), report.failed.len()), (5, 0), "{report:#?}");
    assert_eq!(lite.saved(), before);
    assert!(!lite.tool("ip -o link").contains("kube-ipvs0"));
    assert!(lite.audit(&mut writer).is_clean());
}

#[test]
fn connections_end_in_peace_and_are_counted() {
    if !ready() {
        return;
    }
    let world = World::new("ipvs-drain");
    let mut writer = IpvsWriter::new(Scheduler::default());
    let listener = world.enter("r1", || TcpListener::bind((address("r1", Family::V4), 9999))).unwrap();
    let to = SocketAddr::from((vip(Family::V4, 1), 80));
    let id = SetId { service: ServiceId(1), kind: SetKind::Cluster };
    let one = Backend { addr: address("r1", Family::V4), port: 9999, local: false, terminating: false };
    {
        let mut bench = Bench::new(&world, &mut writer);
        bench.doing("drain");
        bench.apply(&cluster_ip(1, Protocol::Tcp, Family::V4, &["r2"]));
        bench.apply(&[TableChange::Set(id, Some(Arc::from([one])))]);
        let mut client = world.enter("p1", || TcpStream::connect(to)).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        bench.apply(&[set(1, SetKind::Cluster, Family::V4, &["r2"])]);
        let saved = tool(&world, &["ipvsadm", "-Sn"]);
        assert!(saved.contains("-r 10.244.1.11:9999 -m -w 0"), "{saved}");
        // It talks on, through a restart, too; who is new goes elsewhere.
        bench.sync();
        let mut buffer = [0; 5];
        for _ in 0..3 {
            client.write_all(b"hello").unwrap();
            server.read_exact(&mut buffer).unwrap();
        }
        bench.served("p2", Protocol::Tcp, (to.ip(), to.port()), &["r2"], true);
        assert!(tool(&world, &["ipvsadm", "-Sn"]).contains(":9999 -m -w 0"));
        // An end that IPVS forgets after ten seconds.
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        let began = Instant::now();
        while tool(&world, &["ipvsadm", "-Sn"]).contains(":9999") {
            assert!(began.elapsed() < Duration::from_secs(30), "the real server stays");
            std::thread::sleep(Duration::from_millis(500));
            assert!(audit(&mut bench).is_clean());
        }
        say(&format!(
            "the real server went {:.0} s after its last connection",
            began.elapsed().as_secs_f64()
        ));
    }
    let counters = world.enter("node", || writer.counters()).unwrap();
    assert_eq!(counters.len(), 1);
    assert!(counters[0].service == ServiceId(1) && counters[0].connections == 25, "{counters:?}");
    assert_eq!(writer.draining(), 0);
}

/// What it costs, in this machine's time.
#[test]
fn a_change_costs_the_change() {
    if !ready() {
        return;
    }
    let lite = Lite::new("cost");
    let service = |n: u32, members: &[&str]| {
        let addr = IpAddr::from([10, 96, 1 + u8::try_from(n / 250).unwrap(), u8::try_from(n % 250).unwrap()]);
        let key = key(FrontendAddr::Ip(addr), 80, Protocol::Tcp);
        [
            meta(n, Protocol::Tcp, Family::V4),
            set(n, SetKind::Cluster, Family::V4, members),
            TableChange::Vip(addr),
            frontend(n, key, FrontendKind::ClusterIp, INTERNAL),
        ]
    };
    let all: Vec<TableChange> = (0..1000).flat_map(|n| service(n, &["p1", "r1"])).collect();
    let mut writer = IpvsWriter::new(Scheduler::default());
    let report = lite.sync(&mut writer, &table(&all)).unwrap();
    say(&format!(
        "1,000 services, 2,000 endpoints: {:.2} s for {} writes",
        report.took.as_secs_f64(),
        report.written
    ));
    // What ipvsadm prints may lack some while other tests change theirs; an audit looks at each.
    assert!(lite.audit(&mut writer).is_clean());
    let mut times = Vec::new();
    for round in 0..10 {
        let members: &[&str] = if round % 2 == 0 { &["r1", "r2"] } else { &["p2", "r1"] };
        let began = Instant::now();
        let report = lite.apply(&mut writer, &[set(500 + round, SetKind::Cluster, Family::V4, members)]);
        times.push(began.elapsed());
        assert!(report.written + report.removed <= 8, "{report:?}");
    }
    times.sort();
    say(&format!("an endpoint of one of them changed: {:.1} ms (median)", times[5].as_secs_f64() * 1000.0));
    let began = Instant::now();
    let report = lite.apply(&mut writer, &service(1001, &["p1"]));
    say(&format!("a service more: {:.1} ms", began.elapsed().as_secs_f64() * 1000.0));
    assert!(report.written <= 10, "{report:?}");
}
