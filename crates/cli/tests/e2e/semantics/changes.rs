//! Services that change, come and go, while nobody tells their clients.

use std::time::Duration;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::scene::{FAMILIES, Family, Scene, Want, by, node, service, vip, web};

const ALL: [&str; 3] = ["w1", "w2", "w3"];

pub(super) fn labels(s: &mut Scene) {
    let plain = || service("labelled", 130, json!({"selector": web()}));
    let labelled = |label: &str| {
        let mut object = plain();
        object["metadata"]["labels"] = json!({ label: "" });
        object
    };
    let all = by(&ALL);
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        // From the beginning, when it comes, and when it goes.
        s.delete(&[plain()]);
        s.apply(&[labelled(label)]);
        std::thread::sleep(Duration::from_millis(300));
        for family in FAMILIES {
            s.tcp("client", (vip(family, 130), 80), &Want::Nobody);
        }
        s.apply(&[plain()]);
        for family in FAMILIES {
            for from in ["client", "node-1"] {
                s.tcp(from, (vip(family, 130), 80), &all);
            }
        }
        s.apply(&[labelled(label)]);
        for family in FAMILIES {
            for from in s.pods().iter().copied().chain(["node-1"]) {
                s.tcp(from, (vip(family, 130), 80), &Want::Nobody);
            }
        }
    }
    // Without a cluster IP there is nothing to translate; the endpoints are there for those who look them up.
    let spec = json!({"clusterIP": "None", "clusterIPs": ["None"], "selector": web()});
    s.apply(&[service("headless", 131, spec)]);
    let to = (s.address("w2", Family::V4), 8080);
    s.tcp("client", to, &by(&["w2"]));
    let shown = crate::lab::run(&["services", "default/headless", "--lab", s.lab.name]);
    let shown = crate::lab::text(&shown);
    s.holds(&format!("it is shown as headless: {shown}"), shown.contains("headless"));
}

pub(super) fn types(s: &mut Scene) {
    let ports = |node_port: bool| {
        let mut tcp = json!({"name": "http", "port": 80, "targetPort": 8080});
        if node_port {
            tcp["nodePort"] = 30130.into();
        }
        json!([tcp])
    };
    let name_only = || {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "changing"},
            "spec": {"type": "ExternalName", "externalName": "db.example.com"}})
    };
    let cluster = || service("changing", 132, json!({"selector": web(), "ports": ports(false)}));
    let of_type =
        |kind: &str| service("changing", 132, json!({"type": kind, "selector": web(), "ports": ports(true)}));
    let steps: [(Value, bool, bool); 8] = [
        (name_only(), false, false),
        (cluster(), true, false),
        (of_type("NodePort"), true, true),
        (name_only(), false, false),
        (of_type("NodePort"), true, true),
        (of_type("LoadBalancer"), true, true),
        (cluster(), true, false),
        (name_only(), false, false),
    ];
    for (object, at_vip, at_node) in steps {
        s.apply(&[object]);
        let want = |serves| if serves { by(&ALL) } else { Want::Nobody };
        for family in FAMILIES {
            s.tcp("client", (vip(family, 132), 80), &want(at_vip));
            s.tcp("outside", (node(family, 3), 30130), &want(at_node));
        }
        s.tcp("node-1", (vip(Family::V4, 132), 80), &want(at_vip));
        s.tcp("client", (node(Family::V4, 1), 30130), &want(at_node));
    }
}

pub(super) fn ports(s: &mut Scene) {
    let with =
        |ports: Value| service("moving", 133, json!({"type": "NodePort", "selector": web(), "ports": ports}));
    let all = by(&ALL);
    s.apply(&[with(json!([{"name": "a", "port": 80, "targetPort": 8080, "nodePort": 30131}]))]);
    s.tcp("client", (vip(Family::V4, 133), 80), &all);
    s.tcp("outside", (node(Family::V4, 1), 30131), &all);
    // Another port of the Service, another node port, and one more of each.
    s.apply(&[with(json!([
        {"name": "a", "port": 8000, "targetPort": 8081, "nodePort": 30132},
        {"name": "b", "port": 8001, "protocol": "UDP", "targetPort": 5353, "nodePort": 30133},
    ]))]);
    for family in FAMILIES {
        for from in s.pods() {
            s.tcp(from, (vip(family, 133), 8000), &all);
            s.udp(from, (vip(family, 133), 8001), &all);
            s.tcp(from, (vip(family, 133), 80), &Want::Refused);
        }
        s.tcp("outside", (node(family, 1), 30132), &all);
        s.udp("outside", (node(family, 1), 30133), &all);
        s.tcp("outside", (node(family, 1), 30131), &Want::Refused);
    }
    s.apply(&[with(
        json!([{"name": "b", "port": 8001, "protocol": "UDP", "targetPort": 5353, "nodePort": 30133}]),
    )]);
    s.tcp("client", (vip(Family::V4, 133), 8000), &Want::Refused);
    s.tcp("outside", (node(Family::V4, 1), 30132), &Want::Refused);
    s.udp("client", (vip(Family::V4, 133), 8001), &all);
}

pub(super) fn up_and_down(s: &mut Scene) {
    let object = |i: u8| service(&format!("up{i}"), 134 + i, json!({"selector": web()}));
    let all = by(&ALL);
    s.apply(&[object(1), object(2)]);
    s.tcp("client", (vip(Family::V4, 135), 80), &all);
    s.tcp("client", (vip(Family::V4, 136), 80), &all);
    s.delete(&[object(1)]);
    for from in s.pods().iter().copied().chain(["node-1"]) {
        s.tcp(from, (vip(Family::V4, 135), 80), &Want::Nobody);
    }
    s.tcp("client", (vip(Family::V4, 136), 80), &all);
    s.apply(&[object(3)]);
    s.tcp("client", (vip(Family::V4, 137), 80), &all);
    s.tcp("client", (vip(Family::V4, 136), 80), &all);
    // The address that was, again, of a Service by the same name.
    s.apply(&[object(1)]);
    for family in FAMILIES {
        for from in s.pods().iter().copied().chain(["node-1"]) {
            s.tcp(from, (vip(family, 135), 80), &all);
        }
    }
}

pub(super) fn api_server_away(s: &mut Scene) {
    s.apply(&[service(
        "steady",
        139,
        json!({"type": "NodePort", "selector": web(),
        "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30139}]}),
    )]);
    let all = by(&ALL);
    let reached = |s: &mut Scene| {
        for from in ["client", "node-1"] {
            s.tcp(from, (vip(Family::V4, 139), 80), &all);
        }
        s.tcp("outside", (node(Family::V6, 2), 30139), &all);
    };
    reached(s);
    let file = std::fs::read_to_string(format!("/run/podway/labs/{}/supervisor.json", s.lab.name)).unwrap();
    let file: Value = serde_json::from_str(&file).unwrap();
    let supervisor = Pid::from_raw(i32::try_from(file["pid"].as_i64().unwrap()).unwrap());
    kill(supervisor, Signal::SIGSTOP).unwrap();
    reached(s);
    // An agent that starts meanwhile knows nothing, and changes nothing.
    let agent = s.lab.agent_pid("node-2");
    kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
    reached(s);
    kill(supervisor, Signal::SIGCONT).unwrap();
    reached(s);
    // And what changes afterwards arrives, on the node with the new agent too.
    s.ready("w3", false);
    s.tcp("outside", (node(Family::V6, 2), 30139), &by(&["w1", "w2"]));
    s.tcp("client", (vip(Family::V4, 139), 80), &by(&["w1", "w2"]));
    s.ready("w3", true);
    s.tcp("outside", (node(Family::V6, 2), 30139), &all);
}
