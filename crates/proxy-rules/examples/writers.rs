//! How long the writers take: `cargo run --release -p podway-proxy-rules --example writers -- [SERVICES [ENDPOINTS]]`.
//!
//! In a network namespace of its own, as root. Prints one line for each writer and kind of change: median and longest
//! of several, in milliseconds.
#![expect(clippy::print_stdout, reason = "a program for people")]
#![expect(clippy::unwrap_used, reason = "a program that measures ends at the first surprise")]

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use podway_link::Netns;
use podway_proxy_rules::{
    ServiceTable, Writer,
    iptables::{IptablesWriter, Kind},
    nft::NftWriter,
};
use podway_services::table::{
    Backend, Family, Frontend, FrontendAddr, FrontendKey, FrontendKind, NodeView, Protocol, Route, ServiceId,
    ServiceMeta, SetId, SetKind, TableChange, Target,
};

const NAMESPACE: &str = "pwt-writers";
const ROUNDS: u32 = 21;

fn address(base: [u8; 4], n: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::from(base)) + n))
}

fn set(service: u32, endpoints: u32, first: u32) -> TableChange {
    let backends: Vec<Backend> = (first..first + endpoints)
        .map(|i| Backend {
            addr: address([10, 128, 0, 1], service * 300 + i),
            port: 8080,
            local: false,
            terminating: false,
        })
        .collect();
    TableChange::Set(SetId { service: ServiceId(service), kind: SetKind::Cluster }, Some(Arc::from(backends)))
}

fn key(service: u32) -> FrontendKey {
    FrontendKey {
        addr: FrontendAddr::Ip(address([10, 96, 0, 1], service)),
        port: 80,
        protocol: Protocol::Tcp,
    }
}

fn service(service: u32, endpoints: u32) -> Vec<TableChange> {
    let route = |masquerade| Route { target: Target::Set(SetKind::Cluster), masquerade };
    let FrontendAddr::Ip(vip) = key(service).addr else { unreachable!("made above") };
    vec![
        TableChange::Service(
            ServiceId(service),
            ServiceMeta {
                namespace: format!("namespace-{}", service % 100).into(),
                name: format!("service-{service}").into(),
                port_name: "http".into(),
                protocol: Protocol::Tcp,
                family: Family::V4,
                external: false,
            },
        ),
        set(service, endpoints, 0),
        TableChange::Vip(vip),
        TableChange::Frontend(
            key(service),
            Frontend {
                service: ServiceId(service),
                kind: FrontendKind::ClusterIp,
                routes: [route(false), route(false), route(true)],
                affinity_s: None,
                source_ranges: None,
            },
        ),
    ]
}

fn gone(service: u32) -> Vec<TableChange> {
    let FrontendAddr::Ip(vip) = key(service).addr else { unreachable!("made above") };
    vec![
        TableChange::FrontendGone(key(service)),
        TableChange::VipGone(vip),
        TableChange::Set(SetId { service: ServiceId(service), kind: SetKind::Cluster }, None),
        TableChange::ServiceGone(ServiceId(service)),
    ]
}

fn measure(
    mut writer: Box<dyn Writer>,
    again: impl Fn() -> Box<dyn Writer>,
    label: &str,
    services: u32,
    endpoints: u32,
) {
    let view = NodeView {
        pod_cidrs: vec!["10.128.0.0/9".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        ..NodeView::default()
    };
    let mut table = ServiceTable::default();
    for n in 0..services {
        service(n, endpoints).iter().for_each(|c| table.apply(c));
    }
    let print = |what: &str, mut times: Vec<Duration>| {
        times.sort();
        let ms = |d: Duration| d.as_secs_f64() * 1000.0;
        println!(
            "{label:16} {services:6} {endpoints:4}  {what:34} {:9.2} {:9.2}",
            ms(times[times.len() / 2]),
            ms(*times.last().unwrap())
        );
    };
    let timed = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed()
    };
    print("everything, cold", vec![timed(&mut || drop(writer.sync(&table, &view).unwrap()))]);
    let mut apply = |what: &str, change: &dyn Fn(u32) -> Vec<TableChange>| {
        let times = (0..ROUNDS).map(|round| {
            let changes = change(round);
            timed(&mut || assert_eq!(writer.apply(&changes).unwrap().refused, []))
        });
        print(what, times.collect());
    };
    let middle = services / 2;
    apply("one endpoint replaced", &|round| vec![set(middle, endpoints, 1 + round % 2)]);
    apply("one endpoint more or fewer", &|round| vec![set(middle, endpoints + 1 - round % 2, 0)]);
    apply("one service more", &|round| service(services + round, endpoints));
    apply("one service fewer", &|round| gone(services + round));
    table.apply(&set(middle, endpoints + 1, 0));
    print(
        "audit, nothing wrong",
        (0..5).map(|_| timed(&mut || assert!(writer.audit().unwrap().is_clean()))).collect(),
    );
    let mut next = again();
    let mut written = 0;
    table.apply(&set(middle, endpoints + 1, 0));
    print(
        "restart: all read back, adopted",
        vec![timed(&mut || written = next.sync(&table, &view).unwrap().written)],
    );
    println!("{label:16} {services:6} {endpoints:4}  written after the restart: {written}");
    print("removed", vec![timed(&mut || drop(next.remove().unwrap()))]);
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<u32>().expect("a number"));
    let services = arguments.next().unwrap_or(5000);
    let endpoints = arguments.next().unwrap_or(2);
    let only = std::env::var("ONLY").unwrap_or_default();
    println!("{:16} {:>6} {:>4}  {:34} {:>9} {:>9}", "writer", "svcs", "eps", "", "median", "longest");
    type Make = fn() -> Box<dyn Writer>;
    let modes: [(&str, Make); 3] = [
        ("nftables", || Box::new(NftWriter::new())),
        ("iptables-legacy", || Box::new(IptablesWriter::new(Kind::Legacy))),
        ("iptables-nft", || Box::new(IptablesWriter::new(Kind::Nft))),
    ];
    for (label, make) in modes.into_iter().filter(|(label, _)| label.contains(&only)) {
        let _ = Netns::delete_named(NAMESPACE);
        let namespace = Netns::create_named(NAMESPACE).unwrap();
        namespace.run(|| measure(make(), make, label, services, endpoints)).unwrap();
        drop(namespace);
        Netns::delete_named(NAMESPACE).unwrap();
    }
}
