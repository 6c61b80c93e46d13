//! Endpoints that are near, by the hints that `trafficDistribution` makes the controller write.

use serde_json::json;

use super::scene::{FAMILIES, Scene, Want, by, node, service, vip, web};

pub(super) fn distribution(s: &mut Scene) {
    let kinds = ["PreferClose", "PreferSameZone", "PreferSameNode"];
    let objects: Vec<_> = (150..)
        .zip(kinds)
        .map(|(n, kind)| {
            let spec = json!({"type": "NodePort", "selector": web(), "trafficDistribution": kind,
                "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30000 + u16::from(n)}]});
            service(&kind.to_lowercase(), n, spec)
        })
        .collect();
    s.apply(&objects);
    // The first and the third node are in one zone, the second in the other.
    let zones = |s: &mut Scene, n: u8, one: &Want, other: &Want| {
        for family in FAMILIES {
            for from in s.pods().iter().copied().chain(["node-1", "host", "w3"]) {
                s.tcp(from, (vip(family, n), 80), one);
            }
            s.tcp("w2", (vip(family, n), 80), other);
            s.tcp("outside", (node(family, 1), 30000 + u16::from(n)), one);
            s.tcp("outside", (node(family, 2), 30000 + u16::from(n)), other);
        }
    };
    for n in [150, 151] {
        zones(s, n, &by(&["w1", "w3"]), &by(&["w2"]));
    }
    let nodes = |s: &mut Scene, places: &[(&'static str, u8, Want)]| {
        for family in FAMILIES {
            for (from, n, want) in places {
                s.tcp(from, (vip(family, 152), 80), want);
                s.tcp("outside", (node(family, *n), 30152), want);
            }
        }
    };
    nodes(s, &[("client", 1, by(&["w1"])), ("w2", 2, by(&["w2"])), ("w3", 3, by(&["w3"]))]);
    // The one on the node goes: the one in the zone is next, then any.
    s.ready("w1", false);
    nodes(s, &[("client", 1, by(&["w3"])), ("w2", 2, by(&["w2"]))]);
    for n in [150, 151] {
        zones(s, n, &by(&["w3"]), &by(&["w2"]));
    }
    s.ready("w3", false);
    nodes(s, &[("client", 1, by(&["w2"])), ("w3", 3, by(&["w2"]))]);
    for n in [150, 151] {
        zones(s, n, &by(&["w2"]), &by(&["w2"]));
    }
    for pod in ["w1", "w3"] {
        s.ready(pod, true);
    }
    nodes(s, &[("client", 1, by(&["w1"])), ("w3", 3, by(&["w3"]))]);
}
