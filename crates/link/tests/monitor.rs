//! Changes as they are told, on the running kernel.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::time::{Duration, Instant};

use common::{Namespace, root};
use podway_link::monitor::{Change, Monitor};
use podway_link::{AddressFlags, ROUTE_PROTOCOL, Route, VethSpec};

/// Reads changes until one fits.
fn wait(monitor: &mut Monitor, what: &str, fits: impl Fn(&Change) -> bool) {
    let ends = Instant::now() + Duration::from_secs(5);
    let mut seen = Vec::new();
    while Instant::now() < ends {
        let changes = monitor.next(Some(Duration::from_millis(100))).unwrap();
        if changes.iter().any(&fits) {
            return;
        }
        seen.extend(changes);
    }
    panic!("{what} was not told; {seen:?}");
}

#[test]
fn links_addresses_and_routes_are_told() {
    if !root() {
        return;
    }
    let namespace = Namespace::new("monitor");
    let mut monitor = Monitor::open_in(&namespace.netns).unwrap();
    let mut netlink = namespace.netlink();
    assert_eq!(monitor.next(Some(Duration::from_millis(10))).unwrap(), []);
    let spec = VethSpec { name: "a".into(), peer_name: "b".into(), up: true, ..VethSpec::default() };
    let index = netlink.create_veth(&spec).unwrap().index;
    wait(
        &mut monitor,
        "a new link",
        |c| matches!(c, Change::Link { index: i, name, removed: false, .. } if *i == index && name == "a"),
    );
    netlink.set_mtu(index, 1400).unwrap();
    wait(&mut monitor, "an MTU", |c| matches!(c, Change::Link { index: i, mtu: 1400, .. } if *i == index));

    let flags = AddressFlags { nodad: true, ..AddressFlags::default() };
    for text in ["10.0.0.1/32", "fd00::1/128"] {
        let address: ipnet::IpNet = text.parse().unwrap();
        for removed in [false, true] {
            if removed {
                netlink.delete_address(index, address).unwrap();
            } else {
                netlink.add_address(index, address, flags).unwrap();
            }
            let told = Change::Address { index, addr: address.addr(), removed };
            wait(&mut monitor, "an address", |c| *c == told);
        }
    }
    for text in ["10.1.0.0/24", "fd00:1::/64"] {
        let dst = text.parse().unwrap();
        let route = Route {
            dst,
            via: None,
            dev: index,
            src: None,
            mtu: None,
            scope_link: false,
            onlink: false,
            protocol: ROUTE_PROTOCOL,
        };
        for removed in [false, true] {
            if removed {
                netlink.delete_route(&route).unwrap();
            } else {
                netlink.replace_route(&route).unwrap();
            }
            let told = Change::Route { dst, dev: index, protocol: ROUTE_PROTOCOL, removed };
            wait(&mut monitor, "a route", |c| *c == told);
        }
    }
    netlink.delete_link(index).unwrap();
    wait(
        &mut monitor,
        "a link that is gone",
        |c| matches!(c, Change::Link { index: i, removed: true, .. } if *i == index),
    );
}

#[test]
fn lost_changes_are_told_as_an_overrun() {
    if !root() {
        return;
    }
    let namespace = Namespace::new("overrun");
    let mut monitor = Monitor::open_in(&namespace.netns).unwrap();
    let mut netlink = namespace.netlink();
    let spec = VethSpec { name: "a".into(), peer_name: "b".into(), ..VethSpec::default() };
    let index = netlink.create_veth(&spec).unwrap().index;
    for step in 0..20_000 {
        netlink.set_mtu(index, 1400 + step % 2).unwrap();
    }
    wait(&mut monitor, "the overrun", |c| *c == Change::Overrun);
    // What comes later is told again.
    while !monitor.next(Some(Duration::from_millis(10))).unwrap().is_empty() {}
    netlink.set_mtu(index, 1234).unwrap();
    wait(&mut monitor, "a change after the overrun", |c| matches!(c, Change::Link { mtu: 1234, .. }));
}
