//! The kernel's tables of services when they are large, and when they are full.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says why it skips"
)]

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use podway_abi::services::{MAX_BACKENDS, MAX_FRONTENDS};
use podway_bpf_host::{Datapath, ServiceWriter};
use podway_services::table::{
    Backend, Family, Frontend, FrontendAddr, FrontendKey, FrontendKind, Protocol, Route, ServiceId,
    ServiceMeta, SetId, SetKind, TableChange, Target,
};

struct Tables {
    writer: ServiceWriter,
    _datapath: Datapath,
    pins: PathBuf,
}

impl Tables {
    fn new(name: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        if !podway_bpf_host::is_built_in() {
            println!("skipped: built without the kernel object (cargo xtask bpf)");
            return None;
        }
        let pins = PathBuf::from(format!("/sys/fs/bpf/podway-test-{name}"));
        let _ = Datapath::remove_all(&pins);
        let datapath = Datapath::load(Path::new(&pins)).unwrap();
        Some(Self { writer: datapath.services().unwrap(), _datapath: datapath, pins })
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        let _ = Datapath::remove_all(&self.pins);
    }
}

fn addr(base: u32, i: u32) -> IpAddr {
    Ipv4Addr::from(base + i).into()
}

fn meta(i: u32) -> ServiceMeta {
    ServiceMeta {
        namespace: "default".into(),
        name: format!("service-{i}").into(),
        port_name: "".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        external: false,
    }
}

fn backends(first: u32, count: u32) -> Arc<[Backend]> {
    let one =
        |i| Backend { addr: addr(0x0a00_0000, first + i), port: 8080, local: false, terminating: false };
    (0..count).map(one).collect()
}

fn set(service: u32, first: u32, count: u32) -> TableChange {
    let id = SetId { service: ServiceId(service), kind: SetKind::Cluster };
    TableChange::Set(id, Some(backends(first, count)))
}

fn frontend(service: u32, port: u16, addr: IpAddr) -> TableChange {
    let key = FrontendKey { addr: FrontendAddr::Ip(addr), port, protocol: Protocol::Tcp };
    let route = Route { target: Target::Set(SetKind::Cluster), masquerade: false };
    let frontend = Frontend {
        service: ServiceId(service),
        kind: FrontendKind::ClusterIp,
        routes: [route; 3],
        affinity_s: None,
        source_ranges: None,
    };
    TableChange::Frontend(key, frontend)
}

fn entries(writer: &ServiceWriter, name: &str) -> u64 {
    writer.fill().iter().find(|f| f.name == name).unwrap().entries
}

#[test]
fn what_finds_no_room_is_refused_by_name_and_tried_again() {
    let Some(mut tables) = Tables::new("full") else { return };
    let writer = &mut tables.writer;
    let vip = addr(0x0a60_0000, 1);
    writer
        .apply(&[
            TableChange::Service(ServiceId(1), meta(1)),
            set(1, 0, 3),
            frontend(1, 80, vip),
            TableChange::Service(ServiceId(2), meta(2)),
        ])
        .unwrap();
    let before = writer.dump();
    // More backends than there is room for: the service keeps those of them that it had.
    let report = writer.apply(&[set(1, 1, MAX_BACKENDS)]).unwrap();
    assert_eq!(report.refused.len(), 1, "{:?}", report.refused);
    let refused = &report.refused[0];
    assert_eq!(refused.service.as_ref().unwrap().name.as_ref(), "service-1");
    assert!(refused.what.contains("endpoints"), "{refused:?}");
    let now = writer.dump();
    assert_eq!(now[0].backends[0], before[0].backends[0][1..], "nothing new, and nothing that went");
    assert_eq!(entries(writer, "service_backends"), 2);
    // Another service still finds room, and leaves none for a third.
    let report = writer.apply(&[set(2, 0, MAX_BACKENDS - 10)]).unwrap();
    assert_eq!(report.refused.len(), 1, "the first one only");
    let third = [TableChange::Service(ServiceId(3), meta(3)), set(3, 0, 100), frontend(3, 81, vip)];
    let report = writer.apply(&third).unwrap();
    assert_eq!(report.refused.len(), 2, "{:?}", report.refused);
    assert!(writer.dump()[1].backends[0].is_empty(), "it rejects");
    // Room again: what was refused is written without being asked for.
    let report = writer.apply(&[set(2, 0, 10)]).unwrap();
    assert_eq!(report.refused.len(), 1, "{:?}", report.refused);
    assert_eq!(writer.dump()[1].backends[0].len(), 100);
    let report = writer.apply(&[set(1, 1, 5)]).unwrap();
    assert!(report.refused.is_empty(), "{:?}", report.refused);
    assert_eq!(writer.dump()[0].backends[0].len(), 5);
}

#[test]
fn frontends_beyond_the_limit_are_refused() {
    let Some(mut tables) = Tables::new("frontends") else { return };
    let writer = &mut tables.writer;
    let mut changes = vec![TableChange::Service(ServiceId(1), meta(1)), set(1, 0, 1)];
    changes.extend((0..MAX_FRONTENDS + 3).map(|i| frontend(1, 80, addr(0x0b00_0000, i))));
    let report = writer.apply(&changes).unwrap();
    assert_eq!(report.refused.len(), 3);
    assert!(report.refused[0].what.contains("port 80/TCP"), "{:?}", report.refused[0]);
    assert_eq!(entries(writer, "frontends"), u64::from(MAX_FRONTENDS));
    let gone = |i| {
        let addr = FrontendAddr::Ip(addr(0x0b00_0000, i));
        TableChange::FrontendGone(FrontendKey { addr, port: 80, protocol: Protocol::Tcp })
    };
    let report = writer.apply(&[gone(0), gone(1)]).unwrap();
    assert_eq!(report.refused.len(), 1, "two of them found room");
}

/// Not a limit, but a size: 10,000 services with 25 endpoints each, and one change of one of them.
#[test]
fn a_change_of_one_service_writes_that_service() {
    let Some(mut tables) = Tables::new("large") else { return };
    let writer = &mut tables.writer;
    let mut changes = Vec::new();
    for i in 0..10_000 {
        changes.push(TableChange::Service(ServiceId(i), meta(i)));
        changes.push(set(i, i * 25, 25));
        changes.push(frontend(i, 80, addr(0x0a60_0000, i)));
    }
    let began = Instant::now();
    writer.sync(&changes).unwrap();
    println!("10,000 services, 250,000 endpoints: {:?}", began.elapsed());
    assert_eq!(entries(writer, "service_backends"), 250_000);
    let mut times = Vec::new();
    for i in 0..1_000 {
        let began = Instant::now();
        let report = writer.apply(&[set(i, i * 25, 24)]).unwrap();
        times.push(began.elapsed());
        // The hole is filled and the set's word stored; at most that.
        assert!(report.written <= 2, "{report:?}");
        assert_eq!(report.backends_gone, 1);
    }
    times.sort_unstable();
    println!("one endpoint less: p50 {:?}, p99 {:?}", times[500], times[990]);
    // A successor finds all of it again.
    let before = writer.dump();
    let began = Instant::now();
    let adopted = tables._datapath.services().unwrap();
    println!("adopted in {:?}", began.elapsed());
    assert_eq!(adopted.dump(), before);
}
