//! Addresses that are held for a time, and what the neighbours make of them.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::{Namespace, root};
use podway_link::{AddressFlags, VethSpec, announce};

const NODAD: AddressFlags = AddressFlags { nodad: true, link_scope: false, no_prefix_route: false };

#[test]
fn a_held_address_is_announced_renewed_and_goes_by_itself() {
    if !root() {
        return;
    }
    let (router, one, two) =
        (Namespace::new("held-router"), Namespace::new("held-one"), Namespace::new("held-two"));
    let mut fabric = router.netlink();
    let bridge = fabric.create_bridge("br0", 1500).unwrap();
    fabric.set_up(bridge.index).unwrap();
    for address in ["192.0.2.1/24", "2001:db8::1/64"] {
        fabric.add_address(bridge.index, address.parse().unwrap(), NODAD).unwrap();
    }
    let mut nodes = Vec::new();
    for (number, namespace) in [(2, &one), (3, &two)] {
        let port = fabric
            .create_veth(&VethSpec {
                name: format!("p{number}"),
                peer_name: "eth0".into(),
                peer_ns: Some(&namespace.netns),
                up: true,
                ..VethSpec::default()
            })
            .unwrap();
        fabric.set_master(port.index, Some(bridge.index)).unwrap();
        let mut netlink = namespace.netlink();
        let eth0 = netlink.link_by_name("eth0").unwrap().unwrap();
        netlink.set_up(eth0.index).unwrap();
        for address in [format!("192.0.2.{number}/24"), format!("2001:db8::{number}/64")] {
            netlink.add_address(eth0.index, address.parse().unwrap(), NODAD).unwrap();
        }
        nodes.push((namespace, netlink, eth0));
    }
    let held: [IpAddr; 2] = ["192.0.2.200".parse().unwrap(), "2001:db8::200".parse().unwrap()];
    let long = Duration::from_secs(60);
    for (number, (namespace, netlink, eth0)) in nodes.iter_mut().enumerate() {
        // From the first to the second, as after the death of a node: the first does not let go.
        for address in held {
            assert!(netlink.hold_address(eth0.index, address, long).unwrap());
            assert!(!netlink.hold_address(eth0.index, address, long).unwrap(), "a renewal is nothing new");
            let mac = eth0.mac;
            namespace.netns.run(|| announce::announce(eth0.index, mac, address)).unwrap().unwrap();
        }
        assert_eq!(netlink.held_addresses(eth0.index).unwrap(), held);
        // Whoever asked before the announcement knows the new place.
        for address in held {
            let deadline = Instant::now() + Duration::from_secs(5);
            loop {
                let socket = router.netns.run(|| {
                    std::net::UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })
                });
                socket.unwrap().unwrap().send_to(b"x", (address, 9)).unwrap();
                let known = fabric.neighbours(bridge.index).unwrap();
                if known.iter().any(|n| n.addr == address && n.mac == Some(eth0.mac)) {
                    break;
                }
                assert!(Instant::now() < deadline, "node {number}, {address}: {known:?}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    let (_, netlink, eth0) = &mut nodes[1];
    // Never the source of the node's own connections, and somebody else's address stays somebody else's.
    let route = netlink.route_to("2001:db8::1".parse().unwrap()).unwrap().unwrap();
    assert_ne!(route.src, Some(held[1]));
    let own: IpAddr = "192.0.2.3".parse().unwrap();
    netlink.add_address(eth0.index, "192.0.2.77/32".parse().unwrap(), NODAD).unwrap();
    assert!(
        !netlink.hold_address(eth0.index, "192.0.2.77".parse().unwrap(), Duration::from_secs(1)).unwrap()
    );
    assert!(!netlink.held_addresses(eth0.index).unwrap().contains(&own));
    for address in held {
        netlink.hold_address(eth0.index, address, Duration::from_secs(1)).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while !netlink.held_addresses(eth0.index).unwrap().is_empty() {
        assert!(Instant::now() < deadline, "they stay");
        std::thread::sleep(Duration::from_millis(100));
    }
    let left = netlink.addresses_of(eth0.index).unwrap();
    assert!(left.iter().any(|a| a.addr == own) && left.iter().any(|a| a.addr.to_string() == "192.0.2.77"));
}
