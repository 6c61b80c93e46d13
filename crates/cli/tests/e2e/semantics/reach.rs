//! Where a Service answers, to whom, and what arrives there.

use std::net::{IpAddr, SocketAddr};

use serde_json::json;

use super::{
    client::{Kind, Outcome},
    scene::{FAMILIES, Family, Saw, Scene, Want, balanced, by, node, service, vip, web},
};

const ALL: [&str; 3] = ["w1", "w2", "w3"];

pub(super) fn addresses(s: &mut Scene) {
    let ports = json!([
        {"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30100},
        {"name": "admin", "port": 81, "targetPort": 8081, "nodePort": 30101},
        {"name": "dns", "port": 80, "protocol": "UDP", "targetPort": 5353, "nodePort": 30100},
    ]);
    let requests = [balanced(Family::V4, 20), balanced(Family::V6, 20)].map(|ip| ip.to_string()).join(",");
    let mut object =
        service("every", 100, json!({"type": "LoadBalancer", "selector": web(), "ports": ports}));
    object["metadata"]["annotations"] = json!({"podway.dev/load-balancer-ips": requests});
    s.apply(&[object]);
    for family in FAMILIES {
        let cluster = vip(family, 100);
        let (kept, replaced) = (by(&ALL).seeing(Saw::Client), by(&ALL).seeing(Saw::NotClient));
        for from in s.pods() {
            s.tcp(from, (cluster, 80), &kept);
            s.tcp(from, (cluster, 81), &kept);
            s.udp(from, (cluster, 80), &kept);
            answers_from(s, from, (cluster, 80), 8080);
            answers_from(s, from, (cluster, 81), 8081);
            // At once, not when the client loses patience.
            s.tcp(from, (cluster, 82), &Want::Refused);
            s.udp(from, (cluster, 81), &Want::Refused);
            s.tcp(from, (balanced(family, 20), 80), &by(&ALL));
            s.tcp(from, (balanced(family, 20), 82), &Want::Refused);
            for n in [1, 2] {
                s.tcp(from, (node(family, n), 30100), &by(&ALL));
                s.udp(from, (node(family, n), 30100), &by(&ALL));
            }
        }
        for from in ["node-1", "host"] {
            s.tcp(from, (cluster, 80), &by(&ALL));
            s.udp(from, (cluster, 80), &by(&ALL));
            s.tcp(from, (cluster, 82), &Want::Refused);
            s.tcp(from, (balanced(family, 20), 80), &by(&ALL));
            for n in [1, 2] {
                s.tcp(from, (node(family, n), 30101), &by(&ALL));
                s.udp(from, (node(family, n), 30100), &by(&ALL));
            }
        }
        for n in 1..=3 {
            s.tcp("outside", (node(family, n), 30100), &replaced);
            s.tcp("outside", (node(family, n), 30101), &replaced);
            s.udp("outside", (node(family, n), 30100), &replaced);
        }
        s.tcp("outside", (balanced(family, 20), 80), &replaced);
        s.udp("outside", (balanced(family, 20), 80), &replaced);
        s.tcp("outside", (balanced(family, 20), 82), &Want::Refused);
        // Node ports are at all of a node's addresses, but not at loopback unless that is asked for.
        let loopback: IpAddr = if family == Family::V4 { "127.0.0.1" } else { "::1" }.parse().unwrap();
        s.tcp("node-1", (loopback, 30100), &Want::Refused);
    }
    let another: IpAddr = "172.18.1.91".parse().unwrap();
    s.lab.on_node("node-1", &["sh", "-c", "ip address add 172.18.1.91/16 dev $(ip -o route get 172.18.1.2 | sed 's/.* dev \\([^ ]*\\).*/\\1/')"]);
    s.tcp("outside", (another, 30100), &by(&ALL));
    s.tcp("client", (another, 30100), &by(&ALL));
}

/// The one port leads to the one port of the pods, not to another.
fn answers_from(s: &mut Scene, from: &'static str, to: (IpAddr, u16), port: u16) {
    let outcomes = s.client(from).tries(Kind::Tcp, to.into(), 4);
    let fits = |o: &Outcome| matches!(o, Outcome::Served { port: p, .. } if *p == port);
    s.holds(&format!("{from} to {to:?} reaches port {port}: {outcomes:?}"), outcomes.iter().all(fits));
}

pub(super) fn hairpin(s: &mut Scene) {
    s.apply(&[service(
        "mirror",
        101,
        json!({"type": "NodePort", "selector": web(), "ports": [
            {"port": 80, "targetPort": 8080, "nodePort": 30102},
            {"name": "dns", "port": 80, "protocol": "UDP", "targetPort": 5353, "nodePort": 30102},
        ]}),
    )]);
    for family in FAMILIES {
        for to in [(vip(family, 101), 80), (node(family, 1), 30102)] {
            s.tcp("w1", to, &by(&ALL));
            s.udp("w1", to, &by(&ALL));
        }
    }
}

pub(super) fn fragments_and_errors(s: &mut Scene) {
    let spec = json!({"type": "NodePort", "selector": web(), "ports": [
        {"port": 80, "protocol": "UDP", "targetPort": 5353, "nodePort": 30103}]});
    s.apply(&[
        service("large", 102, spec),
        service(
            "deaf",
            103,
            json!({"type": "NodePort", "ports": [
        {"name": "http", "port": 80, "protocol": "UDP", "targetPort": 7, "nodePort": 30104},
        {"name": "tcp", "port": 80, "targetPort": 7, "nodePort": 30104}]}),
        ),
    ]);
    // A port of a pod that nobody listens at: it is the pod that says so, of itself.
    let deaf = s.slices_of(
        "deaf",
        &[("w2", [true, true, false])],
        json!([{"name": "http", "port": 7, "protocol": "UDP"}, {"name": "tcp", "port": 7, "protocol": "TCP"}]),
    );
    s.apply(&deaf);
    for family in FAMILIES {
        for from in s.pods() {
            s.expect(from, Kind::ConnectedUdp, (vip(family, 102), 80).into(), 4000, &by(&ALL));
            s.udp(from, (vip(family, 103), 80), &Want::Refused);
            s.tcp(from, (vip(family, 103), 80), &Want::Refused);
        }
        for from in ["node-1", "outside"] {
            s.expect(from, Kind::ConnectedUdp, (node(family, 1), 30103).into(), 4000, &by(&ALL));
            s.udp(from, (node(family, 1), 30104), &Want::Refused);
            s.tcp(from, (node(family, 1), 30104), &Want::Refused);
        }
    }
}

pub(super) fn external_ip(s: &mut Scene) {
    let address = |family| -> IpAddr {
        if family == Family::V4 { "203.0.113.7" } else { "2001:db8::7" }.parse().unwrap()
    };
    let ips = FAMILIES.map(address);
    s.apply(&[service("abroad", 104, json!({"selector": web(), "externalIPs": ips}))]);
    for family in FAMILIES {
        for from in s.pods().iter().copied().chain(["node-1", "node-3", "host"]) {
            s.tcp(from, (address(family), 80), &by(&ALL));
        }
    }
    s.apply(&[service("abroad", 104, json!({"selector": web()}))]);
    s.tcp("client", (address(Family::V4), 80), &Want::Nobody);
}

pub(super) fn source_ranges(s: &mut Scene) {
    let ask = |ranges: &[&str]| {
        let mut spec = json!({"type": "LoadBalancer", "selector": web()});
        if !ranges.is_empty() {
            spec["loadBalancerSourceRanges"] = json!(ranges);
        }
        let mut object = service("fenced", 105, spec);
        let ips = FAMILIES.map(|family| balanced(family, 21).to_string()).join(",");
        object["metadata"]["annotations"] = json!({"podway.dev/load-balancer-ips": ips});
        object
    };
    s.apply(&[ask(&["172.19.0.0/24", "fd00:172:19::/64"])]);
    let everybody = ["outside", "client"];
    for family in FAMILIES {
        let to = (balanced(family, 21), 80);
        s.tcp("outside", to, &by(&ALL));
        s.tcp("client", to, &Want::Silence);
        // The others of its addresses are not concerned.
        s.tcp("client", (vip(family, 105), 80), &by(&ALL));
    }
    s.apply(&[ask(&["10.244.0.0/16", "fd00:10:244::/48"])]);
    for family in FAMILIES {
        let to = (balanced(family, 21), 80);
        s.tcp("outside", to, &Want::Silence);
        for from in s.pods() {
            s.tcp(from, to, &by(&ALL));
        }
    }
    s.apply(&[ask(&[])]);
    for family in FAMILIES {
        for from in everybody {
            s.tcp(from, (balanced(family, 21), 80), &by(&ALL));
        }
    }
}

pub(super) fn named_ports(s: &mut Scene) {
    let spec = json!({"selector": web(), "ports": [{"port": 80, "targetPort": "odd"}]});
    s.apply(&[service("named", 106, spec)]);
    for family in FAMILIES {
        s.tcp("client", (vip(family, 106), 80), &by(&ALL));
    }
    let to = SocketAddr::from((vip(Family::V4, 106), 80));
    let outcomes = s.client("client").tries(Kind::Tcp, to, 30);
    let fits = |o: &Outcome| matches!(o, Outcome::Served { pod, port, .. } if *port == 8089 + pod[1..].parse::<u16>().unwrap());
    s.holds(
        &format!("each pod answers at the port of its own name: {outcomes:?}"),
        outcomes.iter().all(fits),
    );
}
