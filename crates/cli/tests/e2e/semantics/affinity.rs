//! Clients that stay with their endpoint, for as long as they are to.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    client::{Kind, Outcome},
    scene::{FAMILIES, Family, Scene, Want, by, node, service, vip, web},
};

const ALL: [&str; 3] = ["w1", "w2", "w3"];

fn sticky(name: &str, n: u8, node_port: u16, seconds: Option<u32>) -> Value {
    let mut spec = json!({
        "type": "NodePort",
        "selector": web(),
        "ports": [
            {"name": "http", "port": 80, "targetPort": 8080, "nodePort": node_port},
            {"name": "dns", "port": 80, "protocol": "UDP", "targetPort": 5353, "nodePort": node_port},
        ],
    });
    if let Some(seconds) = seconds {
        spec["sessionAffinity"] = "ClientIP".into();
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
    }
    service(name, n, spec)
}

/// Who serves the next connection.
fn who(s: &mut Scene, from: &'static str, to: (IpAddr, u16)) -> String {
    match s.client(from).tries(Kind::Tcp, to.into(), 1).remove(0) {
        Outcome::Served { pod, .. } => pod,
        other => format!("{other:?}"),
    }
}

/// The ways to a Service: who asks, and where.
fn ways(family: Family, n: u8, node_port: u16) -> Vec<(&'static str, (IpAddr, u16))> {
    vec![
        ("client", (vip(family, n), 80)),
        ("node-1", (vip(family, n), 80)),
        ("host", (vip(family, n), 80)),
        ("outside", (node(family, 2), node_port)),
        ("client", (node(family, 1), node_port)),
    ]
}

pub(super) fn sticks(s: &mut Scene) {
    s.apply(&[sticky("loyal", 120, 30120, Some(10_800))]);
    let one = Want::One(ALL.to_vec());
    let mut chosen = BTreeSet::new();
    for family in FAMILIES {
        for (from, to) in ways(family, 120, 30120) {
            s.tcp(from, to, &one);
            s.udp(from, to, &one);
            chosen.insert(who(s, from, to));
        }
        if s.is_ebpf() {
            s.tcp("packets", (vip(family, 120), 80), &one);
            s.udp("packets", (vip(family, 120), 80), &one);
        }
    }
    s.holds(&format!("clients of different addresses are spread: {chosen:?}"), chosen.len() > 1);
    // Whose endpoint goes gets another one, and stays with that.
    for (from, to) in [("client", (vip(Family::V4, 120), 80)), ("outside", (node(Family::V6, 2), 30120))] {
        let had = who(s, from, to);
        if !ALL.contains(&had.as_str()) {
            s.fault(&format!("{from} to {to:?}: {had}"));
            continue;
        }
        s.ready(&had, false);
        let rest: Vec<&'static str> = ALL.into_iter().filter(|pod| *pod != had).collect();
        s.tcp(from, to, &Want::One(rest));
        s.ready(&had, true);
        let now = who(s, from, to);
        s.holds(&format!("{from} to {to:?} stays with one that serves: {now}"), now.starts_with('w'));
        std::thread::sleep(Duration::from_millis(500));
        let later = who(s, from, to);
        s.holds(&format!("{from} to {to:?} stays with {now}, not {later}"), now == later);
    }
}

pub(super) fn times_out(s: &mut Scene) {
    if s.mode == "ipvs" {
        // It lasts two minutes longer there.
        return;
    }
    s.apply(&[sticky("brief", 121, 30121, Some(2))]);
    let mut ways = vec![("client", (vip(Family::V4, 121), 80))];
    // With eBPF a client beyond the cluster gets the same one again, by consistent hashing.
    ways.push(if s.is_ebpf() {
        ("packets", (vip(Family::V6, 121), 80))
    } else {
        ("outside", (node(Family::V6, 1), 30121))
    });
    for (from, to) in &ways {
        s.tcp(from, *to, &Want::One(ALL.to_vec()));
    }
    // Every connection begins the time anew.
    let first: Vec<String> = ways.iter().map(|(from, to)| who(s, from, *to)).collect();
    for _ in 0..7 {
        std::thread::sleep(Duration::from_millis(500));
        let now: Vec<String> = ways.iter().map(|(from, to)| who(s, from, *to)).collect();
        s.holds(&format!("within the time {now:?} are still {first:?}"), now == first);
    }
    // Who is silent for longer chooses freely: that twelve free choices of three are all the same happens once in
    // half a million times.
    let mut seen: Vec<BTreeSet<String>> = first.into_iter().map(|pod| BTreeSet::from([pod])).collect();
    for _ in 0..12 {
        if seen.iter().all(|pods| pods.len() > 1) {
            break;
        }
        std::thread::sleep(Duration::from_millis(3100));
        for ((from, to), pods) in ways.iter().zip(&mut seen) {
            if pods.len() == 1 {
                pods.insert(who(s, from, *to));
            }
        }
    }
    for ((from, to), pods) in ways.iter().zip(&seen) {
        s.holds(&format!("{from} to {to:?} chooses anew after the time: {pods:?}"), pods.len() > 1);
    }
}

pub(super) fn switches(s: &mut Scene) {
    for seconds in [None, Some(600), None, Some(600)] {
        s.apply(&[sticky("fickle", 122, 30122, seconds)]);
        let want = if seconds.is_some() { Want::One(ALL.to_vec()) } else { by(&ALL) };
        for (from, to) in ways(Family::V4, 122, 30122) {
            s.tcp(from, to, &want);
        }
        s.udp("outside", (node(Family::V6, 3), 30122), &want);
    }
    // An address that is not the client's is another client.
    let to = SocketAddr::from((vip(Family::V4, 122), 80));
    let mut spread = BTreeSet::new();
    for from in ["w1", "w2", "w3", "client", "node-2", "node-3"] {
        spread.insert(who(s, from, (to.ip(), to.port())));
    }
    s.holds(&format!("six clients are not all at one endpoint: {spread:?}"), spread.len() > 1);
}
