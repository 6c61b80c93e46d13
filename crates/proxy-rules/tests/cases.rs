//! Cases of other projects, and random clusters, with crafted packets through what the writers write.

#[path = "common/wire.rs"]
#[allow(clippy::unwrap_used, unreachable_pub, dead_code, reason = "test code")]
mod wire;

use std::net::IpAddr;

use podway_cases::{
    Tally,
    services::{
        packets,
        random::{Cluster, Random},
        target::{Observed, Scenario, Target},
    },
};
use podway_proxy_rules::{
    Writer,
    iptables::{IptablesWriter, Kind},
    nft::NftWriter,
};
use podway_services::{Flow, ServiceTable, decide};
use wire::Wire;

type Make = fn() -> Box<dyn Writer>;

const WRITERS: [(&str, Make); 3] = [
    ("nft", || Box::new(NftWriter::new())),
    ("iptables-legacy", || Box::new(IptablesWriter::new(Kind::Legacy))),
    ("iptables-nft", || Box::new(IptablesWriter::new(Kind::Nft))),
];

struct Kernel {
    name: &'static str,
    make: Make,
}

impl Target for Kernel {
    fn name(&self) -> &str {
        self.name
    }

    fn run(&mut self, scenario: &Scenario) -> Result<Vec<Observed>, String> {
        let compiler = scenario.compile();
        let mut wire = Wire::new(&format!("case-{}", self.name), &scenario.view);
        let mut writer = (self.make)();
        wire.program(writer.as_mut(), compiler.table(), &scenario.view)?;
        let send = |packet: &podway_cases::services::target::Packet| {
            let fate = wire.send(&packet.flow, &scenario.view, 40);
            Observed {
                destinations: fate.destinations.into_iter().collect(),
                masquerade: fate.masquerade,
                verdict: fate.verdict,
                untouched: fate.untouched,
            }
        };
        Ok(scenario.packets.iter().map(send).collect())
    }
}

#[test]
fn packets_of_other_projects_cases() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let folder = podway_cases::root().join("services/packets");
    if !folder.is_dir() {
        println!("skipped: there are no cases in {}", folder.display());
        return;
    }
    let scenarios = packets::read(&folder).unwrap();
    for (name, make) in WRITERS {
        let mut tally = Tally::default();
        for scenario in &scenarios {
            tally.add(packets::run(scenario, &mut Kernel { name, make }));
        }
        println!("services, packets in the kernel by {name}: {tally}");
        assert!(tally.failed().is_empty(), "{name}: {:#?}", tally.failed());
        assert!(tally.passed() > 0);
    }
}

/// Where the kernel and the decision differ, for one packet.
fn disagreement(wire: &mut Wire, cluster: &Cluster, table: &ServiceTable, flow: &Flow) -> Option<String> {
    let view = &cluster.view;
    let decision = decide(table, view, flow);
    let sticky = decision.frontend.is_some_and(|key| table.frontends[&key].affinity_s.is_some());
    // With so many, that one of n is never chosen happens once in ten thousand million times.
    let tries = 24 * decision.destinations.len().max(1);
    let fate = wire.send(flow, view, tries);
    let found: Vec<(IpAddr, u16)> = fate.destinations.iter().copied().collect();
    let destinations = if sticky {
        found.len() == decision.destinations.len().min(1)
            && found.iter().all(|d| decision.destinations.contains(d))
    } else {
        found == decision.destinations
    };
    let to_itself = found.iter().any(|(addr, _)| *addr == flow.src);
    let agree = destinations
        && fate.verdict == decision.verdict
        && fate.untouched == decision.untouched
        && fate.masquerade == (decision.masquerade || to_itself);
    (!agree).then(|| format!("{flow:?}: {fate:?} instead of {decision:?}"))
}

#[test]
fn random_clusters_agree_with_the_decisions() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let number =
        |name: &str, default| std::env::var(name).map_or(default, |text| text.parse::<u64>().unwrap());
    let (clusters, first) = (number("PODWAY_CLUSTERS", 8), number("PODWAY_SEED", 1));
    for (name, make) in WRITERS {
        let (mut compared, mut served, mut left_out) = (0, 0, 0);
        for seed in first..first + clusters {
            let mut random = Random::new(seed);
            let mut before = Cluster::random(&mut random);
            let mut cluster = Cluster::random(&mut random);
            // Loopback is left to nobody but the node, and these writers refuse node ports there.
            cluster.view.node_port_addresses.retain(|addr| !addr.is_loopback());
            before.view = cluster.view.clone();
            let mut wire = Wire::new(&format!("rnd-{name}"), &cluster.view);
            let mut writer = make();
            let (old, compiler) = (before.compile(), cluster.compile());
            wire.program(writer.as_mut(), old.table(), &cluster.view).unwrap();
            let changes = ServiceTable::diff(old.table(), compiler.table());
            wire.apply(writer.as_mut(), &changes);
            for _ in 0..60 {
                let flow = cluster.packet(&mut random);
                let decision = decide(compiler.table(), &cluster.view, &flow);
                // What is translated to the node itself looks as if it had not been translated.
                let own =
                    |(addr, _): &(IpAddr, u16)| addr.is_loopback() || cluster.view.addresses.contains(addr);
                let odd = flow.dst.is_loopback() || flow.src.is_loopback() || flow.src == flow.dst;
                if odd || decision.destinations.iter().any(own) {
                    left_out += 1;
                    continue;
                }
                if let Some(what) = disagreement(&mut wire, &cluster, compiler.table(), &flow) {
                    panic!("{name}, seed {seed}: {what}\n{:#?}\n{:#?}", compiler.table(), cluster.view);
                }
                compared += 1;
                served += usize::from(!decision.destinations.is_empty());
            }
        }
        println!("{name}: {compared} flows agree, {served} of them served; {left_out} left out");
        assert!(compared > 0 && served > 0);
    }
}
