//! Real packets through what the writers write.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test stops at the first surprise, and says how far it is"
)]

mod common;

use common::{
    root,
    scenarios::{Bench, FAMILIES, SCENARIOS},
    world::World,
};
use podway_proxy_rules::{
    Writer,
    iptables::{IptablesWriter, Kind},
    nft::NftWriter,
};

fn all_scenarios(name: &str, mut writer: impl Writer) {
    if !root() {
        return;
    }
    let only = std::env::var("SCENARIO").unwrap_or_default();
    let world = World::new(name);
    let mut bench = Bench::new(&world, &mut writer);
    for (what, scenario) in SCENARIOS.iter().filter(|(what, _)| what.contains(&only)) {
        for family in FAMILIES {
            bench.doing(format!("{what} ({family:?})"));
            scenario(&mut bench, family);
            bench.clear();
            println!("ok: {what} ({family:?})");
        }
    }
    let writer = &mut bench.writer;
    let removed = world.enter("node", || writer.remove()).unwrap();
    assert!(!removed.is_empty());
}

#[test]
fn nftables() {
    all_scenarios("nft", NftWriter::new());
}

#[test]
fn iptables_legacy() {
    all_scenarios("iptl", IptablesWriter::new(Kind::Legacy));
}

#[test]
fn iptables_nft() {
    all_scenarios("iptn", IptablesWriter::new(Kind::Nft));
}
