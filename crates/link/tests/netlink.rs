//! Links, addresses, routes and neighbours on the running kernel, in namespaces of their own.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Namespace, root};
use ipnet::IpNet;
use nix::errno::Errno;
use podway_link::{
    AddressFlags, Error, FoundTbf, Netlink, ROUTE_PROTOCOL, Route, RouteFilter, Tbf, VethSpec, VxlanSpec,
};

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn veth(name: &str, peer: &str) -> VethSpec<'static> {
    VethSpec { name: name.into(), peer_name: peer.into(), up: true, ..VethSpec::default() }
}

fn route(dst: &str, dev: u32) -> Route {
    Route {
        dst: net(dst),
        via: None,
        dev,
        src: None,
        mtu: None,
        scope_link: false,
        onlink: false,
        protocol: ROUTE_PROTOCOL,
    }
}

#[test]
fn a_veth_pair_is_made_across_namespaces_as_asked() {
    if !root() {
        return;
    }
    let (node, pod) = (Namespace::new("veth-node"), Namespace::new("veth-pod"));
    let mut netlink = node.netlink();
    let alias = format!("podway:{}:eth0", "c".repeat(64));
    let link = netlink
        .create_veth(&VethSpec {
            name: "pw0123456789ab".into(),
            mtu: 1450,
            mac: Some([2, 0, 0, 0, 0, 1]),
            alias: Some(alias.clone()),
            up: true,
            addr_gen_none: true,
            peer_name: "eth0".into(),
            peer_mac: Some([2, 0, 0, 0, 0, 2]),
            peer_mtu: 1400,
            peer_ns: Some(&pod.netns),
        })
        .unwrap();
    let found = netlink.link_by_name("pw0123456789ab").unwrap().unwrap();
    assert_eq!(link, found);
    assert_eq!((found.mtu, found.mac), (1450, [2, 0, 0, 0, 0, 1]));
    assert_eq!((found.kind.as_deref(), found.alias.as_deref()), (Some("veth"), Some(alias.as_str())));
    assert!(found.up && !found.carrier, "the peer is down");
    assert_eq!(netlink.addresses_of(found.index).unwrap(), [], "no address of the kernel's own");

    let peer = pod.netlink().link_by_name("eth0").unwrap().unwrap();
    assert_eq!((peer.mtu, peer.mac, peer.up), (1400, [2, 0, 0, 0, 0, 2], false));
    assert_eq!(found.peer_index, Some(peer.index));

    // The peer is seen and changed from here by the number of its namespace.
    let nsid = found.peer_netnsid.unwrap();
    assert_eq!(netlink.nsid(&pod.netns).unwrap(), Some(nsid));
    netlink.set_peer_mtu(nsid, peer.index, 1380).unwrap();
    pod.netlink().set_up(peer.index).unwrap();
    let changed = netlink.peer_link(nsid, peer.index).unwrap().unwrap();
    assert_eq!((changed.name.as_str(), changed.mtu, changed.up), ("eth0", 1380, true));
    let here = netlink.link_by_index(found.index).unwrap().unwrap();
    assert_eq!((here.name.as_str(), here.mtu, here.carrier), ("pw0123456789ab", 1450, true));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(3);
    while !netlink.link_by_index(found.index).unwrap().unwrap().operational {
        assert!(std::time::Instant::now() < deadline, "a link with a carrier becomes operational");
    }
    assert!(!found.operational, "not without the peer");
    assert_eq!(netlink.peer_link(nsid, 99).unwrap(), None);
    let address = AddressFlags { nodad: true, ..AddressFlags::default() };
    let mut inside = pod.netlink();
    inside.add_address(peer.index, net("10.244.1.7/32"), address).unwrap();
    inside.add_address(peer.index, net("fd00:10:244:1::7/128"), address).unwrap();
    let seen: Vec<IpAddr> = netlink
        .peer_addresses(nsid)
        .unwrap()
        .into_iter()
        .filter(|a| a.index == peer.index && !a.link_scope)
        .map(|a| a.addr)
        .collect();
    assert_eq!(seen, [addr("10.244.1.7"), addr("fd00:10:244:1::7")]);
    let unknown = netlink.set_peer_mtu(4711, peer.index, 1380).unwrap_err();
    assert!(unknown.to_string().contains("set MTU of peer link link 2 of namespace 4711"), "{unknown}");

    assert!(netlink.delete_link(found.index).unwrap());
    assert!(!netlink.delete_link(found.index).unwrap(), "gone already");
    assert_eq!(pod.netlink().link_by_name("eth0").unwrap(), None, "the peer went with it");
}

#[test]
fn a_refused_veth_leaves_nothing_and_says_why() {
    if !root() {
        return;
    }
    let (node, pod) = (Namespace::new("refused-node"), Namespace::new("refused-pod"));
    let mut netlink = node.netlink();
    netlink.create_veth(&VethSpec { peer_ns: Some(&pod.netns), ..veth("pw1", "eth0") }).unwrap();

    let taken =
        netlink.create_veth(&VethSpec { peer_ns: Some(&pod.netns), ..veth("pw1", "eth1") }).unwrap_err();
    assert!(taken.is_exists() && taken.to_string().contains("create veth link pw1"), "{taken}");
    let taken =
        netlink.create_veth(&VethSpec { peer_ns: Some(&pod.netns), ..veth("pw2", "eth0") }).unwrap_err();
    assert!(taken.is_exists(), "{taken}");
    let mtu = netlink.create_veth(&VethSpec { mtu: 70_000, ..veth("pw3", "pw4") }).unwrap_err();
    assert_eq!(mtu.errno(), Some(Errno::EINVAL));

    let cases = [
        (veth("", "a"), "1 to 15 bytes"),
        (veth("sixteen-bytes-xx", "a"), "has 16"),
        (veth("a", "b c"), "white space"),
        (veth("a/b", "c"), "'/'"),
        (veth("..", "c"), "'.'"),
        (VethSpec { alias: Some("x".repeat(256)), ..veth("a", "b") }, "255"),
    ];
    for (spec, cause) in cases {
        let error = netlink.create_veth(&spec).unwrap_err();
        assert!(error.to_string().contains(cause), "{error}");
    }
    let names: Vec<String> = netlink.links().unwrap().into_iter().map(|link| link.name).collect();
    assert_eq!(names, ["lo", "pw1"]);
    assert_eq!(pod.netlink().links().unwrap().len(), 2);
}

#[test]
fn a_vxlan_device_takes_metadata_and_serves_both_underlays() {
    if !root() {
        return;
    }
    let node = Namespace::new("vxlan");
    let mut netlink = node.netlink();
    let spec = VxlanSpec { mtu: 8950, mac: Some([2, 0, 0, 0, 0, 9]), port: 8473, ..VxlanSpec::default() };
    let link = netlink.create_vxlan(&spec).unwrap();
    assert_eq!((link.name.as_str(), link.mtu, link.up), ("podway_vxlan", 8950, true));
    assert_eq!((link.kind.as_deref(), link.mac), (Some("vxlan"), [2, 0, 0, 0, 0, 9]));

    // One UDP socket of the kernel for each family.
    let listening = |file: &str| {
        let table = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
        table.lines().any(|line| line.contains(":2119 "))
    };
    assert_eq!(node.netns.run(|| (listening("udp"), listening("udp6"))).unwrap(), (true, true));

    // iproute2 shows what netlink cannot be asked for in two lines; without it the rest has been checked.
    let shown = node
        .netns
        .run(|| std::process::Command::new("ip").args(["-d", "link", "show", "podway_vxlan"]).output());
    if let Ok(Ok(shown)) = shown.map(|shown| shown.map(|o| String::from_utf8_lossy(&o.stdout).into_owned())) {
        for word in ["NOARP", "external", "nolearning", "dstport 8473", "udp6zerocsumrx"] {
            assert!(shown.contains(word), "{word} is not in {shown}");
        }
    }

    let taken = netlink.create_vxlan(&VxlanSpec { name: "other".into(), ..spec.clone() }).unwrap_err();
    assert!(taken.to_string().contains("create vxlan link other"), "{taken}");
    assert!(
        netlink.create_vxlan(&VxlanSpec { port: 0, ..spec }).unwrap_err().to_string().contains("1 to 65535")
    );
    assert_eq!(netlink.links().unwrap().len(), 2, "a refused device is not left behind");
}

#[test]
fn links_are_changed_and_put_into_a_bridge() {
    if !root() {
        return;
    }
    let node = Namespace::new("change");
    let mut netlink = node.netlink();
    let bridge = netlink.create_bridge("br0", 1500).unwrap();
    assert_eq!((bridge.kind.as_deref(), bridge.up), (Some("bridge"), false));
    let link = netlink.create_veth(&veth("a", "b")).unwrap();
    let look = |netlink: &mut Netlink| netlink.link_by_index(link.index).unwrap().unwrap();

    netlink.set_master(link.index, Some(bridge.index)).unwrap();
    assert_eq!(look(&mut netlink).master, Some(bridge.index));
    netlink.set_master(link.index, None).unwrap();
    assert_eq!(look(&mut netlink).master, None);
    netlink.set_down(link.index).unwrap();
    assert!(!look(&mut netlink).up);
    netlink.rename(link.index, "c").unwrap();
    netlink.set_mac(link.index, [2, 1, 2, 3, 4, 5]).unwrap();
    netlink.set_mtu(link.index, 9000).unwrap();
    netlink.set_alias(link.index, "an alias").unwrap();
    netlink.set_up(link.index).unwrap();
    let changed = look(&mut netlink);
    assert_eq!((changed.name.as_str(), changed.mac, changed.mtu), ("c", [2, 1, 2, 3, 4, 5], 9000));
    assert_eq!(changed.alias.as_deref(), Some("an alias"));
    netlink.set_alias(link.index, "").unwrap();
    assert_eq!(look(&mut netlink).alias, None);

    for error in [
        netlink.set_mtu(999, 1500).unwrap_err(),
        netlink.set_up(999).unwrap_err(),
        netlink.set_master(link.index, Some(999)).unwrap_err(),
    ] {
        assert!(error.to_string().contains("link "), "{error}");
    }
    assert_eq!(netlink.set_mtu(999, 1500).unwrap_err().errno(), Some(Errno::ENODEV));
    // The kernel's own words come along.
    let large = netlink.set_mtu(link.index, 70_000).unwrap_err();
    assert!(
        matches!(&large, Error::Kernel { detail: Some(text), .. } if text.contains("mtu greater")),
        "{large}"
    );
    assert!(netlink.set_mtu(0, 1500).unwrap_err().to_string().contains("begin at 1"));
    assert_eq!(netlink.link_by_name("nobody").unwrap(), None);
    assert_eq!(netlink.link_by_index(999).unwrap(), None);
}

#[test]
fn a_group_is_deleted_at_once() {
    if !root() {
        return;
    }
    let node = Namespace::new("group");
    let mut netlink = node.netlink();
    let mut names: Vec<String> = vec!["lo".into()];
    for n in 0..6 {
        let link = netlink.create_veth(&veth(&format!("a{n}"), &format!("b{n}"))).unwrap();
        if n % 2 == 0 {
            netlink.set_group(link.index, 4711).unwrap();
            assert_eq!(netlink.link_by_index(link.index).unwrap().unwrap().group, 4711);
        } else {
            names.extend([format!("b{n}"), format!("a{n}")]);
        }
    }
    assert!(netlink.delete_group(4711).unwrap());
    assert!(!netlink.delete_group(4711).unwrap(), "it has no links any more");
    assert!(netlink.delete_group(0).unwrap_err().to_string().contains("all links that have none"));
    let left: Vec<String> = netlink.links().unwrap().into_iter().map(|link| link.name).collect();
    assert_eq!(left, names);
}

#[test]
fn addresses_are_added_once_and_deleted_once() {
    if !root() {
        return;
    }
    let node = Namespace::new("address");
    let mut netlink = node.netlink();
    let link = netlink.create_veth(&VethSpec { addr_gen_none: true, ..veth("a", "b") }).unwrap();
    let link_scope = AddressFlags { link_scope: true, ..AddressFlags::default() };
    let nodad = AddressFlags { nodad: true, ..AddressFlags::default() };
    for (address, flags, on) in [
        ("169.254.1.1/32", link_scope, 1),
        ("fe80::1/64", nodad, link.index),
        ("10.0.0.1/24", nodad, link.index),
    ] {
        assert!(netlink.add_address(on, net(address), flags).unwrap(), "{address}");
        assert!(!netlink.add_address(on, net(address), flags).unwrap(), "{address} is there already");
    }
    let of_link = netlink.addresses_of(link.index).unwrap();
    assert_eq!(
        of_link.iter().map(|a| (a.addr, a.prefix_len)).collect::<Vec<_>>(),
        [(addr("10.0.0.1"), 24), (addr("fe80::1"), 64)]
    );
    assert!(of_link.iter().all(|a| !a.tentative));
    let all = netlink.addresses().unwrap();
    assert!(all.iter().any(|a| a.addr == addr("169.254.1.1") && a.link_scope && a.index == 1), "{all:?}");
    assert!(netlink.delete_address(link.index, net("10.0.0.1/24")).unwrap());
    assert!(!netlink.delete_address(link.index, net("10.0.0.1/24")).unwrap());
    assert!(!netlink.delete_address(999, net("10.0.0.1/24")).unwrap());
    assert_eq!(netlink.addresses_of(999).unwrap(), []);
    let error = netlink.add_address(999, net("10.0.0.1/24"), nodad).unwrap_err();
    assert!(error.is_not_found() && error.to_string().contains("10.0.0.1/24 on link 999"), "{error}");
}

#[test]
fn routes_are_replaced_listed_looked_up_and_deleted() {
    if !root() {
        return;
    }
    let node = Namespace::new("route");
    let mut netlink = node.netlink();
    let link = netlink.create_veth(&VethSpec { addr_gen_none: true, ..veth("a", "b") }).unwrap().index;
    let other = netlink.create_veth(&veth("c", "d")).unwrap().index;
    let nodad = AddressFlags { nodad: true, ..AddressFlags::default() };
    for address in ["172.18.1.1/16", "fd00:172:18::1/64", "fe80::9/64"] {
        netlink.add_address(link, net(address), nodad).unwrap();
    }
    let wanted = [
        // To a pod, to another node through the tunnel, through a node, and as the pod itself has it.
        Route { scope_link: true, ..route("10.244.1.7/32", link) },
        Route {
            src: Some(addr("172.18.1.1")),
            mtu: Some(1450),
            scope_link: true,
            ..route("10.244.2.0/24", other)
        },
        Route { via: Some(addr("172.18.1.3")), ..route("10.244.3.0/24", link) },
        Route { via: Some(addr("169.254.1.1")), onlink: true, mtu: Some(1450), ..route("0.0.0.0/0", link) },
        route("fd00:10:244:1::7/128", link),
        Route { src: Some(addr("fd00:172:18::1")), mtu: Some(1430), ..route("fd00:10:244:2::/64", other) },
        Route { via: Some(addr("fe80::1")), mtu: Some(1430), ..route("::/0", link) },
    ];
    for route in &wanted {
        netlink.replace_route(route).unwrap();
        netlink.replace_route(route).unwrap();
    }
    let ours = RouteFilter { protocol: Some(ROUTE_PROTOCOL), ..RouteFilter::default() };
    let sorted = |mut routes: Vec<Route>| {
        routes.sort_by_key(|route| route.dst);
        routes
    };
    assert_eq!(sorted(netlink.routes(ours).unwrap()), sorted(wanted.to_vec()));
    let all = netlink.routes(RouteFilter::default()).unwrap();
    assert!(
        all.iter().any(|r| r.dst == net("172.18.0.0/16") && r.protocol == 2),
        "the kernel's own: {all:?}"
    );
    let through = RouteFilter { dev: Some(other), ipv6: Some(false), protocol: None };
    assert_eq!(netlink.routes(through).unwrap(), [wanted[1].clone()]);

    // A replacement takes the place of the old one.
    let moved = Route { mtu: Some(1400), ..wanted[1].clone() };
    netlink.replace_route(&moved).unwrap();
    assert_eq!(netlink.routes(through).unwrap(), [moved]);

    let to = netlink.route_to(addr("10.244.3.9")).unwrap().unwrap();
    assert_eq!((to.dev, to.via, to.src), (link, Some(addr("172.18.1.3")), Some(addr("172.18.1.1"))));
    let to = netlink.route_to(addr("fd00:10:244:2::9")).unwrap().unwrap();
    assert_eq!((to.dev, to.via, to.src, to.mtu), (other, None, Some(addr("fd00:172:18::1")), Some(1430)));
    assert!(netlink.route_to(addr("172.18.1.1")).unwrap().unwrap().local);

    for route in &wanted {
        assert!(netlink.delete_route(route).unwrap(), "{route:?}");
        assert!(!netlink.delete_route(route).unwrap(), "{route:?} is gone already");
    }
    assert_eq!(netlink.routes(ours).unwrap(), []);
    assert_eq!(netlink.route_to(addr("10.244.3.9")).unwrap(), None);
    assert_eq!(netlink.route_to(addr("2001:db8::1")).unwrap(), None);
    assert!(!netlink.delete_route(&route("10.9.9.0/24", 999)).unwrap());

    let cases = [
        (Route { via: Some(addr("fe80::1")), ..route("10.9.0.0/24", link) }, "same address family"),
        (route("10.9.0.0/24", 0), "begin at 1"),
        (Route { via: Some(addr("192.0.2.1")), ..route("10.9.0.0/24", link) }, "10.9.0.0/24 via 192.0.2.1"),
    ];
    for (route, cause) in cases {
        let error = netlink.replace_route(&route).unwrap_err();
        assert!(error.to_string().contains(cause), "{error}");
    }
}

#[test]
fn unreachable_routes_refuse_what_has_no_better_route() {
    if !root() {
        return;
    }
    let node = Namespace::new("unreachable");
    let mut netlink = node.netlink();
    let link = netlink.create_veth(&VethSpec { addr_gen_none: true, ..veth("a", "b") }).unwrap().index;
    for (range, pod, nobody) in [
        ("10.244.1.0/24", "10.244.1.7", "10.244.1.8"),
        ("fd00:10:244:1::/64", "fd00:10:244:1::7", "fd00:10:244:1::8"),
    ] {
        let v4 = net(range).addr().is_ipv4();
        netlink
            .replace_route(&Route { scope_link: v4, ..route(if v4 { "0.0.0.0/0" } else { "::/0" }, link) })
            .unwrap();
        assert!(netlink.route_to(addr(nobody)).unwrap().is_some(), "the default route takes it");
        for _ in 0..2 {
            netlink.add_unreachable(net(range), ROUTE_PROTOCOL).unwrap();
        }
        netlink
            .replace_route(&Route { scope_link: v4, ..route(&IpNet::from(addr(pod)).to_string(), link) })
            .unwrap();
        assert_eq!(netlink.route_to(addr(nobody)).unwrap(), None);
        assert_eq!(netlink.route_to(addr(pod)).unwrap().unwrap().dev, link);
        assert_eq!(netlink.unreachable_routes(ROUTE_PROTOCOL).unwrap(), [net(range)]);
        assert_eq!(netlink.unreachable_routes(4).unwrap(), []);
        let all = netlink.routes(RouteFilter::default()).unwrap();
        assert!(!all.iter().any(|r| r.dst == net(range)), "it leads nowhere: {all:?}");
        assert!(!netlink.delete_unreachable(net(range), 4).unwrap(), "somebody else's");
        assert!(netlink.delete_unreachable(net(range), ROUTE_PROTOCOL).unwrap());
        assert!(!netlink.delete_unreachable(net(range), ROUTE_PROTOCOL).unwrap());
        assert!(netlink.route_to(addr(nobody)).unwrap().is_some());
    }
}

#[test]
fn neighbours_are_permanent_and_idempotent() {
    if !root() {
        return;
    }
    let node = Namespace::new("neighbour");
    let mut netlink = node.netlink();
    let link = netlink.create_veth(&veth("a", "b")).unwrap().index;
    for address in ["10.244.1.7", "fd00:10:244:1::7"] {
        let address = addr(address);
        netlink.replace_neighbour(link, address, [2, 0, 0, 0, 0, 1]).unwrap();
        netlink.replace_neighbour(link, address, [2, 0, 0, 0, 0, 2]).unwrap();
        let all = netlink.neighbours(link).unwrap();
        let found = all.iter().find(|n| n.addr == address).unwrap();
        assert_eq!((found.mac, found.permanent), (Some([2, 0, 0, 0, 0, 2]), true));
        assert!(netlink.delete_neighbour(link, address).unwrap());
        assert!(!netlink.delete_neighbour(link, address).unwrap());
        assert!(!netlink.delete_neighbour(999, address).unwrap());
    }
    let error = netlink.replace_neighbour(999, addr("10.244.1.7"), [2; 6]).unwrap_err();
    assert!(error.to_string().contains("10.244.1.7 on link 999"), "{error}");
}

#[test]
fn dumps_are_whole_while_the_tables_change() {
    if !root() {
        return;
    }
    let node = Namespace::new("churn");
    let mut netlink = node.netlink();
    // More than fits into one part of a dump.
    for number in 0..60 {
        netlink.create_veth(&veth(&format!("a{number}"), &format!("b{number}"))).unwrap();
    }
    let link = netlink.link_by_name("a0").unwrap().unwrap().index;
    for number in 0..=255 {
        netlink.replace_route(&route(&format!("10.1.{number}.0/24"), link)).unwrap();
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut netlink = node.netlink();
            while !done.load(Ordering::Relaxed) {
                let made = netlink.create_veth(&veth("x", "y")).unwrap();
                netlink.delete_link(made.index).unwrap();
            }
        });
        for _ in 0..50 {
            let links = netlink.links().unwrap();
            let kept = links.iter().filter(|l| l.name.starts_with(['a', 'b'])).count();
            assert_eq!(kept, 120);
            let ours = RouteFilter { protocol: Some(ROUTE_PROTOCOL), dev: Some(link), ipv6: None };
            assert_eq!(netlink.routes(ours).unwrap().len(), 256);
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_rate_is_limited_and_the_limit_changed() {
    if !root() {
        return;
    }
    let node = Namespace::new("tbf");
    let mut netlink = node.netlink();
    let link = netlink.create_veth(&veth("a", "b")).unwrap();
    let cases = [
        Tbf { rate: 125_000, burst: 70_000, limit: 100_000 },
        Tbf { rate: 1_250_000, burst: 80_000, limit: 150_000 },
        Tbf { rate: 125_000_000_000_000, burst: u32::MAX, limit: u32::MAX },
    ];
    for tbf in cases {
        netlink.set_tbf(link.index, &tbf).unwrap();
        let found = FoundTbf { index: link.index, rate: tbf.rate, limit: tbf.limit };
        assert_eq!(netlink.tbfs().unwrap(), [found]);
    }
    for wrong in [Tbf { rate: 0, ..cases[0] }, Tbf { burst: 0, ..cases[0] }, Tbf { limit: 0, ..cases[0] }] {
        let error = netlink.set_tbf(link.index, &wrong).unwrap_err().to_string();
        assert!(error.contains("above 0"), "{error}");
    }
    assert!(netlink.set_tbf(link.index + 100, &cases[0]).unwrap_err().is_not_found());

    // 1 Mbit/s for a burst of 70 kB and 100 kB more: 0.8 s, where an unlimited link takes none.
    netlink.set_tbf(link.index, &cases[0]).unwrap();
    let nodad = AddressFlags { nodad: true, ..AddressFlags::default() };
    netlink.add_address(link.index, net("10.9.0.1/24"), nodad).unwrap();
    let peer = netlink.link_by_name("b").unwrap().unwrap();
    netlink.set_up(peer.index).unwrap();
    netlink.replace_neighbour(link.index, addr("10.9.0.2"), peer.mac).unwrap();
    let passed = || {
        let text = std::process::Command::new("cat").arg("/proc/net/dev").output().unwrap().stdout;
        let text = String::from_utf8(text).unwrap();
        let line = text.lines().find(|l| l.trim_start().starts_with("b:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let socket = node.netns.run(|| std::net::UdpSocket::bind("10.9.0.1:0")).unwrap().unwrap();
    let begun = std::time::Instant::now();
    for _ in 0..300 {
        // What does not fit into the queue is refused or dropped.
        socket.send_to(&[0; 1000], "10.9.0.2:9").ok();
    }
    let wait = std::time::Duration::from_millis(400);
    std::thread::sleep(wait);
    let (bytes, took) = (node.netns.run(passed).unwrap(), begun.elapsed().as_secs_f64());
    let allowed = 70_000.0 + took * 125_000.0 + 2_000.0;
    assert!((70_000.0..allowed).contains(&(bytes as f64)), "{bytes} bytes in {took:.2} s");
}
