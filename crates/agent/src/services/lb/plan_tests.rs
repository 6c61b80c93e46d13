//! The plan, case by case: and that it is at rest with its own result.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::plan::{Inputs, Plan, plan};
use super::pool::Pool;
use super::service::{ANNOUNCED_BY, LbService, ObjectName, POOL, REQUEST, SHARED};

struct Cluster {
    objects: BTreeMap<ObjectName, Value>,
    pools: Vec<Pool>,
    nodes: BTreeSet<String>,
    not_ready: BTreeSet<String>,
    local: BTreeMap<ObjectName, BTreeSet<String>>,
}

impl Cluster {
    fn new(pools: &[Value]) -> Self {
        Self {
            objects: BTreeMap::new(),
            pools: pools.iter().map(|p| Pool::read(p).unwrap()).collect(),
            nodes: ["n1", "n2", "n3"].map(str::to_owned).into(),
            not_ready: BTreeSet::new(),
            local: BTreeMap::new(),
        }
    }

    fn add(&mut self, name: &str, spec: &Value, annotations: &Value) {
        let mut spec = spec.clone();
        for (key, default) in [
            ("type", json!("LoadBalancer")),
            ("ipFamilies", json!(["IPv4"])),
            ("ports", json!([{"port": 80}])),
        ] {
            spec.as_object_mut().unwrap().entry(key).or_insert(default);
        }
        let created = format!("2026-01-01T00:00:{:02}Z", self.objects.len());
        self.objects.insert(
            ("x".into(), name.into()),
            json!({"metadata": {"namespace": "x", "name": name, "creationTimestamp": created,
                                "annotations": annotations}, "spec": spec}),
        );
    }

    fn object(&mut self, name: &str) -> &mut Value {
        self.objects.get_mut(&("x".into(), name.into())).unwrap()
    }

    fn plan(&self) -> Plan {
        let services =
            self.objects.iter().filter_map(|(n, o)| Some((n.clone(), LbService::read(o)?))).collect();
        plan(&Inputs {
            services: &services,
            pools: &self.pools,
            nodes: &self.nodes,
            keepers: &self.nodes.union(&self.not_ready).cloned().collect(),
            local_nodes: &self.local,
        })
    }

    /// Writes the plan, as the API server would, and shows that nothing is left to do.
    fn settle(&mut self) -> Plan {
        let made = self.plan();
        for write in &made.writes {
            let object = self.objects.get_mut(&write.name).unwrap();
            for patch in [&write.object, &write.status].into_iter().flatten() {
                merge(object, patch);
            }
        }
        let again = self.plan();
        assert!(again.writes.is_empty(), "not at rest: {:?}", again.writes);
        made
    }

    fn addresses(&self, name: &str) -> Vec<String> {
        let list = self.objects[&("x".into(), name.into())].pointer("/status/loadBalancer/ingress");
        let list = list.and_then(Value::as_array).cloned().unwrap_or_default();
        list.iter().map(|i| i["ip"].as_str().unwrap().to_owned()).collect()
    }

    fn annotation(&self, name: &str, key: &str) -> Option<String> {
        let value = &self.objects[&("x".into(), name.into())]["metadata"]["annotations"][key];
        value.as_str().map(str::to_owned)
    }
}

/// RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(key);
        } else {
            merge(target.as_object_mut().unwrap().entry(key).or_insert(Value::Null), value);
        }
    }
}

fn pool(name: &str, cidrs: &[&str]) -> Value {
    json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}})
}

fn small() -> Value {
    pool("small", &["192.0.2.0/30"])
}

fn only(plan: &Plan) -> (&'static str, &str) {
    assert_eq!(plan.problems.len(), 1, "{:?}", plan.problems);
    (plan.problems[0].reason, &plan.problems[0].message)
}

#[test]
fn addresses_are_given_kept_and_released() {
    let mut cluster = Cluster::new(&[small()]);
    cluster.add("a", &json!({}), &json!({}));
    cluster.add("b", &json!({}), &json!({}));
    let made = cluster.settle();
    assert_eq!(
        (cluster.addresses("a"), cluster.addresses("b")),
        (vec!["192.0.2.1".into()], vec!["192.0.2.2".into()])
    );
    assert_eq!(cluster.annotation("a", POOL).as_deref(), Some("small"));
    assert_eq!(made.writes[0].event, Some(("LoadBalancerAssigned", "192.0.2.1 from pool small".into())));
    assert_eq!(made.used["small"], 2);

    cluster.add("c", &json!({}), &json!({}));
    let plan = cluster.settle();
    let (reason, message) = only(&plan);
    assert_eq!(reason, "LoadBalancerPoolExhausted");
    assert!(message.contains("x/c") && message.contains("small (192.0.2.1-192.0.2.2)"), "{message}");

    // The type changes: the address is free, and the one that waited gets it.
    cluster.object("a")["spec"]["type"] = json!("ClusterIP");
    cluster.settle();
    assert!(cluster.addresses("a").is_empty());
    assert_eq!(cluster.annotation("a", POOL), None);
    assert_eq!(cluster.annotation("a", ANNOUNCED_BY), None);
    assert_eq!(cluster.addresses("c"), ["192.0.2.1"]);

    // The pool goes: so do the addresses, and it is said.
    cluster.pools.clear();
    let plan = cluster.settle();
    assert!(plan.problems.iter().any(|p| p.reason == "LoadBalancerAddressReleased"), "{:?}", plan.problems);
    assert!(cluster.addresses("b").is_empty());
}

#[test]
fn what_somebody_else_wrote_is_left_alone() {
    let mut cluster = Cluster::new(&[]);
    cluster.add("cloud", &json!({}), &json!({}));
    cluster.object("cloud")["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}});
    assert!(cluster.plan().writes.is_empty());
    cluster.add("other", &json!({"loadBalancerClass": "example.com/lb"}), &json!({}));
    cluster.pools = vec![Pool::read(&small()).unwrap()];
    assert!(cluster.plan().writes.iter().all(|w| w.name.1 == "cloud"));
}

#[test]
fn requests_are_met_or_refused_by_name() {
    let mut cluster = Cluster::new(&[small(), pool("wide", &["198.51.100.0/24", "2001:db8::/120"])]);
    cluster.add("first", &json!({"loadBalancerIP": "192.0.2.2"}), &json!({}));
    cluster.add("second", &json!({}), &json!({REQUEST: "192.0.2.2"}));
    cluster.add("third", &json!({}), &json!({REQUEST: "203.0.113.7"}));
    let both = json!({"ipFamilies": ["IPv6", "IPv4"]});
    cluster.add("dual", &both, &json!({REQUEST: "198.51.100.77,2001:db8::77"}));
    cluster.add("bad", &json!({}), &json!({REQUEST: "nonsense"}));
    let made = cluster.settle();
    assert_eq!(cluster.addresses("first"), ["192.0.2.2"]);
    assert_eq!(cluster.addresses("dual"), ["198.51.100.77", "2001:db8::77"]);
    let find = |name: &str| made.problems.iter().find(|p| p.name.1 == name).unwrap();
    assert!(
        find("second").message.contains("192.0.2.2 of pool small, which x/first has"),
        "{:?}",
        find("second")
    );
    assert!(find("third").message.contains("no pool has it"));
    assert_eq!(find("bad").reason, "LoadBalancerRequestInvalid");
    // A changed request moves the Service.
    cluster.object("first")["spec"]["loadBalancerIP"] = json!("192.0.2.1");
    cluster.settle();
    assert_eq!(
        (cluster.addresses("first"), cluster.addresses("second")),
        (vec!["192.0.2.1".into()], vec!["192.0.2.2".into()])
    );
}

#[test]
fn an_address_is_shared_by_who_agrees_and_answered_for_by_one_node() {
    let mut cluster = Cluster::new(&[pool("wide", &["198.51.100.0/24"])]);
    let key = json!({SHARED: "k"});
    let port = |port: u16, protocol: &str| json!({"ports": [{"port": port, "protocol": protocol}]});
    cluster.add("dns-udp", &port(53, "UDP"), &key);
    cluster.add("dns-tcp", &port(53, "TCP"), &key);
    cluster.add("clash", &port(53, "TCP"), &key);
    cluster.add("stranger", &port(99, "TCP"), &json!({SHARED: "other"}));
    cluster.add(
        "local",
        &json!({"ports": [{"port": 7}], "externalTrafficPolicy": "Local", "selector": {"a": "b"}}),
        &key,
    );
    cluster.settle();
    assert_eq!(cluster.addresses("dns-udp"), cluster.addresses("dns-tcp"));
    for other in ["clash", "stranger", "local"] {
        assert_ne!(cluster.addresses("dns-udp"), cluster.addresses(other), "{other}");
    }
    assert_eq!(cluster.annotation("dns-udp", ANNOUNCED_BY), cluster.annotation("dns-tcp", ANNOUNCED_BY));
    // Asking for it without agreeing is refused.
    cluster.add("thief", &json!({"loadBalancerIP": cluster.addresses("dns-udp")[0]}), &json!({}));
    let plan = cluster.settle();
    assert!(only(&plan).1.contains("equal annotation podway.dev/shared-address"), "{:?}", plan.problems);
}

#[test]
fn an_address_stays_on_its_node_while_that_can_serve_it() {
    let mut cluster = Cluster::new(&[pool("wide", &["198.51.100.0/24"])]);
    for i in 0..30 {
        cluster.add(&format!("s{i}"), &json!({}), &json!({}));
    }
    let local = json!({"externalTrafficPolicy": "Local"});
    cluster.add("local", &local, &json!({}));
    cluster.settle();
    let on = |cluster: &Cluster, node: &str| {
        (0..30)
            .filter(|i| cluster.annotation(&format!("s{i}"), ANNOUNCED_BY).as_deref() == Some(node))
            .count()
    };
    for node in ["n1", "n2", "n3"] {
        assert!(on(&cluster, node) > 3, "{node} has {} of 30", on(&cluster, node));
    }
    // Without an endpoint nobody answers.
    assert_eq!(cluster.annotation("local", ANNOUNCED_BY), None);
    let name = ("x".to_owned(), "local".to_owned());
    cluster.local.insert(name.clone(), BTreeSet::from(["n2".to_owned()]));
    cluster.settle();
    assert_eq!(cluster.annotation("local", ANNOUNCED_BY).as_deref(), Some("n2"));
    cluster.local.insert(name, BTreeSet::from(["n2".to_owned(), "n3".to_owned()]));
    assert!(cluster.plan().writes.is_empty());

    let before = on(&cluster, "n1");
    cluster.nodes.remove("n2");
    cluster.not_ready.insert("n2".into());
    assert!(cluster.plan().writes.is_empty());
    cluster.not_ready.clear();
    let made = cluster.settle();
    assert_eq!(cluster.annotation("local", ANNOUNCED_BY).as_deref(), Some("n3"));
    assert_eq!(on(&cluster, "n2"), 0);
    assert!(on(&cluster, "n1") >= before);
    assert!(made.writes.iter().all(|w| w.status.is_none() && w.event.is_none()));
    // It does not come back by itself: that would break connections for nothing.
    cluster.nodes.insert("n2".into());
    assert!(cluster.plan().writes.is_empty());
}

#[test]
fn two_that_hold_one_address_are_told_apart_by_age() {
    let mut cluster = Cluster::new(&[small()]);
    for name in ["old", "young"] {
        cluster.add(name, &json!({}), &json!({POOL: "small"}));
        cluster.object(name)["status"] = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.2"}]}});
    }
    let made = cluster.settle();
    assert_eq!(
        (cluster.addresses("old"), cluster.addresses("young")),
        (vec!["192.0.2.2".into()], vec!["192.0.2.1".into()])
    );
    let (reason, message) = only(&made);
    assert!(reason == "LoadBalancerAddressTaken" && message.contains("stays with x/old"), "{message}");
}
