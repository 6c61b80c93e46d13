//! UDP, which has no connections that end by themselves: sockets that go on must not go on to nobody.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    client::{Kind, Outcome},
    scene::{FAMILIES, Family, Scene, balanced, by, node, service, vip},
};

const READY: [bool; 3] = [true, true, false];

fn spec(node_port: u16) -> Value {
    json!({
        "type": "LoadBalancer",
        "ports": [{"name": "dns", "port": 80, "protocol": "UDP", "targetPort": 5353, "nodePort": node_port}],
    })
}

fn slices(s: &mut Scene, service: &str, pods: &[&'static str]) {
    let pods: Vec<_> = pods.iter().map(|pod| (*pod, READY)).collect();
    let ports = json!([{"name": "dns", "port": 5353, "protocol": "UDP"}]);
    let slices = s.slices_of(service, &pods, ports);
    s.apply(&slices);
}

fn is_by(outcome: &Outcome, pod: &str) -> bool {
    matches!(outcome, Outcome::Served { pod: p, .. } if p == pod)
}

/// A socket that goes on.
struct Flow {
    from: &'static str,
    kind: Kind,
    to: SocketAddr,
    id: u32,
}

/// Sockets of all kinds of clients to all kinds of addresses of a Service.
fn open(s: &mut Scene, n: u8, node_port: u16, service_ip: u8) -> Vec<Flow> {
    let mut flows = Vec::new();
    let mut ways: Vec<(&'static str, (IpAddr, u16))> = Vec::new();
    for family in FAMILIES {
        for from in s.pods().iter().copied().chain(["node-1", "host", "w2"]) {
            ways.push((from, (vip(family, n), 80)));
        }
        ways.push(("client", (node(family, 1), node_port)));
        // At the node of one of the endpoints, and at one that has none.
        ways.push(("outside", (node(family, 1), node_port)));
        ways.push(("outside", (node(family, 3), node_port)));
        ways.push(("outside", (balanced(family, service_ip), 80)));
    }
    for (from, to) in ways {
        for kind in [Kind::Udp, Kind::ConnectedUdp] {
            let (id, _) = s.client(from).open(kind, to.into());
            flows.push(Flow { from, kind, to: to.into(), id });
        }
    }
    flows
}

/// Every socket comes to be answered by this pod, and goes on to be.
fn all_by(s: &mut Scene, flows: &[Flow], pod: &'static str) {
    for flow in flows {
        let mut last = Outcome::Silence;
        let mut served = false;
        for _ in 0..12 {
            last = s.client(flow.from).ask(flow.id, flow.to);
            served = is_by(&last, pod);
            // What the application is told is that it has to connect anew.
            let told = flow.kind == Kind::ConnectedUdp && s.is_ebpf() && last == Outcome::Aborted;
            if served || told {
                served = true;
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let Flow { from, kind, to, .. } = flow;
        s.holds(&format!("the {kind:?} socket of {from} to {to} reaches {pod}, not {last:?}"), served);
    }
}

fn balanced_service(name: &str, n: u8, node_port: u16, last: u8) -> Value {
    let mut object = service(name, n, spec(node_port));
    let ips = FAMILIES.map(|family| balanced(family, last).to_string()).join(",");
    object["metadata"]["annotations"] = json!({"podway.dev/load-balancer-ips": ips});
    object
}

pub(super) fn backend_cycles(s: &mut Scene) {
    s.apply(&[balanced_service("names", 140, 30140, 30)]);
    slices(s, "names", &["w1"]);
    for family in FAMILIES {
        s.udp("client", (vip(family, 140), 80), &by(&["w1"]));
        s.udp("node-1", (vip(family, 140), 80), &by(&["w1"]));
        s.udp("outside", (node(family, 1), 30140), &by(&["w1"]));
        s.udp("outside", (node(family, 3), 30140), &by(&["w1"]));
        s.udp("outside", (balanced(family, 30), 80), &by(&["w1"]));
    }
    let flows = open(s, 140, 30140, 30);
    all_by(s, &flows, "w1");
    slices(s, "names", &["w2"]);
    for family in FAMILIES {
        s.udp("client", (vip(family, 140), 80), &by(&["w2"]));
        s.udp("outside", (node(family, 3), 30140), &by(&["w2"]));
    }
    all_by(s, &flows, "w2");
    // And none at all, and then another one. Where connections are tracked, a flow goes on while there is nothing better.
    slices(s, "names", &[]);
    for flow in flows.iter().filter(|_| s.mode == "ebpf").collect::<Vec<_>>() {
        let Flow { from, kind, to, .. } = flow;
        s.comes(&format!("nobody serves the {kind:?} socket of {from} to {to}"), |s| {
            !is_by(&s.client(flow.from).ask(flow.id, flow.to), "w2")
        });
    }
    slices(s, "names", &["w3"]);
    let unconnected: Vec<Flow> = flows.into_iter().filter(|f| f.kind == Kind::Udp).collect();
    all_by(s, &unconnected, "w3");
}

pub(super) fn pod_is_made_again(s: &mut Scene) {
    let pod = || {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "w8", "labels": {"app": "again"}},
            "spec": {"nodeName": "node-2", "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "main", "image": "web", "ports": [{"containerPort": 5353, "protocol": "UDP"}]}]}})
    };
    let mut object = balanced_service("again", 141, 30141, 31);
    object["spec"]["selector"] = json!({"app": "again"});
    s.apply(&[pod(), object]);
    for family in FAMILIES {
        s.udp("client", (vip(family, 141), 80), &by(&["w8"]));
        s.udp("outside", (node(family, 3), 30141), &by(&["w8"]));
        s.udp("outside", (balanced(family, 31), 80), &by(&["w8"]));
    }
    let before = s.address("w8", Family::V4);
    let flows = open(s, 141, 30141, 31);
    all_by(s, &flows, "w8");
    s.leave("w8");
    s.delete(&[pod()]);
    s.comes("the pod is gone", |s| !s.lab.run(&["exec", "w8", "--", "true"]).status.success());
    s.apply(&[pod()]);
    s.comes("the pod is there again", |s| s.lab.run(&["exec", "w8", "--", "true"]).status.success());
    let after = s.address("w8", Family::V4);
    s.udp("client", (vip(Family::V4, 141), 80), &by(&["w8"]));
    all_by(s, &flows, "w8");
    s.holds(&format!("it has another address than {before}: {after}"), before != after);
    s.leave("w8");
    s.delete(&[pod()]);
}

pub(super) fn endpoints_become_ready(s: &mut Scene) {
    s.apply(&[balanced_service("late", 142, 30142, 32)]);
    slices(s, "late", &[]);
    s.udp("client", (vip(Family::V4, 142), 80), &super::scene::Want::Refused);
    s.udp("outside", (balanced(Family::V4, 32), 80), &super::scene::Want::Refused);
    // Begun while there is nobody.
    let flows: Vec<Flow> =
        open(s, 142, 30142, 32).into_iter().filter(|f| f.kind == Kind::Udp || !s.is_ebpf()).collect();
    slices(s, "late", &["w2"]);
    all_by(s, &flows, "w2");
}
