//! The compiler against an evaluator that shares nothing with it, and against itself by another way.
//!
//! `PODWAY_PACKETS` says how many packets are compared, `PODWAY_SEED` where the random clusters start.

use std::collections::BTreeMap;

use podway_cases::services::{
    naive,
    random::{self, Cluster, Random},
    target::Observed,
};
use podway_services::{
    Compiler, ServiceTable, TableChange, decide,
    table::{Backend, Frontend, FrontendKey, ServiceId, SetKind},
};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number in the environment"))
}

#[test]
fn engine_and_documentation_agree_on_random_packets() {
    let packets = number("PODWAY_PACKETS", 200_000);
    let first = number("PODWAY_SEED", 1);
    let (mut compared, mut reached) = (0, BTreeMap::new());
    for seed in first.. {
        if compared >= packets {
            break;
        }
        let mut random = Random::new(seed);
        let cluster = Cluster::random(&mut random);
        let compiler = cluster.compile();
        for _ in 0..250 {
            let flow = cluster.packet(&mut random);
            let decision = decide(compiler.table(), compiler.view(), &flow);
            let observed = Observed {
                masquerade: decision.masquerade || decision.hairpin,
                destinations: decision.destinations,
                verdict: decision.verdict,
                untouched: decision.untouched,
            };
            let expected = naive::evaluate(&cluster, &flow);
            assert_eq!(
                observed, expected,
                "seed {seed}: {flow:?} at {:?}\n{:#?}\n{:#?}\n{:#?}",
                cluster.view, cluster.services, cluster.slices, cluster.host_ports
            );
            let kind = decision.frontend.map(|key| compiler.table().frontends[&key].kind);
            *reached.entry(format!("{kind:?} {:?}", observed.verdict)).or_insert(0_u64) += 1;
            compared += 1;
        }
    }
    println!("{compared} packets agree: {reached:#?}");
    // Nothing that is compared may be left out by chance: each kind of frontend with each verdict.
    for kind in ["ClusterIp", "ExternalIp", "LoadBalancer", "NodePort"] {
        for verdict in ["Accept", "Reject", "Drop"] {
            let seen = reached.get(&format!("Some({kind}) {verdict}")).copied().unwrap_or(0);
            assert!(packets < 100_000 || seen > packets / 5000, "{kind} {verdict}: {seen} of {packets}");
        }
    }
}

/// A table with the services' names for their numbers, so that two of them can be compared.
#[derive(Debug, PartialEq)]
struct Named {
    frontends: BTreeMap<FrontendKey, (String, Frontend)>,
    sets: BTreeMap<(String, SetKind), Vec<Backend>>,
    services: BTreeMap<String, bool>,
    vips: Vec<std::net::IpAddr>,
}

fn named(table: &ServiceTable) -> Named {
    let name = |id: &ServiceId| {
        let meta = &table.services[id];
        format!("{}/{}:{}/{}/{}", meta.namespace, meta.name, meta.port_name, meta.protocol, meta.family)
    };
    let frontend = |(key, frontend): (&FrontendKey, &Frontend)| {
        (*key, (name(&frontend.service), Frontend { service: ServiceId(0), ..frontend.clone() }))
    };
    Named {
        frontends: table.frontends.iter().map(frontend).collect(),
        sets: table.sets.iter().map(|(id, set)| ((name(&id.service), id.kind), set.to_vec())).collect(),
        services: table.services.iter().map(|(id, meta)| (name(id), meta.external)).collect(),
        vips: table.vips.iter().copied().collect(),
    }
}

/// Applies changes one by one and looks at the table after each.
fn follow(copy: &mut ServiceTable, changes: &[TableChange], seed: u64) {
    for change in changes {
        copy.apply(change);
        assert_eq!(copy.violations(), Vec::<String>::new(), "seed {seed}: after {change:?} of {changes:#?}");
    }
}

#[test]
fn one_by_one_is_the_same_as_at_once() {
    let clusters = number("PODWAY_CLUSTERS", 400);
    let first = number("PODWAY_SEED", 1);
    for seed in first..first + clusters {
        let mut random = Random::new(seed);
        let target = Cluster::random(&mut random);
        let mut compiler = Compiler::new(random::view(&mut random));
        let mut copy = ServiceTable::new();
        // Anything at first, then what is wanted, in any order.
        for _ in 0..random.below(60) {
            let changes = wander(&mut compiler, &mut random);
            follow(&mut copy, &changes.table, seed);
            assert_eq!(&copy, compiler.table(), "seed {seed}");
        }
        let mut changes = settle(&mut compiler, &target, &mut random);
        changes.push(compiler.set_view(target.view.clone()));
        for change in &changes {
            follow(&mut copy, &change.table, seed);
        }
        assert_eq!(&copy, compiler.table(), "seed {seed}");
        let at_once = target.compile();
        assert_eq!(named(compiler.table()), named(at_once.table()), "seed {seed}");
        assert_eq!(compiler.findings(), at_once.findings(), "seed {seed}");
        assert_eq!(compiler.health_checks(), at_once.health_checks(), "seed {seed}");
        assert_eq!(compiler.all_external_addresses(), at_once.all_external_addresses(), "seed {seed}");

        // From any table to any other.
        let mut from = copy;
        let steps = ServiceTable::diff(&from, at_once.table());
        follow(&mut from, &steps, seed);
        assert_eq!(&from, at_once.table(), "seed {seed}");
        assert!(ServiceTable::diff(&from, at_once.table()).is_empty());
    }
}

/// Something happens, no matter what.
fn wander(compiler: &mut Compiler, random: &mut Random) -> podway_services::Changes {
    let namespace = random.one(&["blue", "red"]);
    let name = random.one(&["web", "db", "api", "dns"]);
    let slice = format!("{name}-{}", random.below(4));
    match random.below(12) {
        0..=3 => compiler.apply_service(&random::parse_service(&random::service(random, namespace, name))),
        4..=7 => {
            let service = random.one(&["web", "db", "api", "dns"]);
            compiler.apply_slice(&random::parse_slice(&random::slice(random, namespace, &slice, service)))
        }
        8 => compiler.remove_service(namespace, name),
        9 => compiler.remove_slice(namespace, &slice),
        10 => match random.below(4) {
            0 => compiler.set_view(random::view(random)),
            1 => compiler.set_node("node-2", &[[203, 0, 113, 77].into()]),
            2 => compiler.remove_node("node-2"),
            _ => compiler.remove_host_port(namespace, "pod", random.below(3)),
        },
        _ => {
            let index = random.below(3);
            let (namespace, pod, index, port) = random::host_port(random, index);
            compiler.set_host_port(&namespace, &pod, index, &port)
        }
    }
}

/// Leads to a cluster from wherever the compiler is.
fn settle(compiler: &mut Compiler, target: &Cluster, random: &mut Random) -> Vec<podway_services::Changes> {
    type Step<'a> = Box<dyn Fn(&mut Compiler) -> podway_services::Changes + 'a>;
    let mut steps: Vec<Step<'_>> = vec![Box::new(|c| c.remove_node("node-2"))];
    let has = |list: &[serde_json::Value], namespace: &str, name: &str| {
        list.iter().any(|o| o["metadata"]["namespace"] == namespace && o["metadata"]["name"] == name)
    };
    for namespace in ["blue", "red"] {
        for name in ["web", "db", "api", "dns"] {
            if !has(&target.services, namespace, name) {
                steps.push(Box::new(move |c| c.remove_service(namespace, name)));
            }
            for i in 0..4 {
                let slice = format!("{name}-{i}");
                if !has(&target.slices, namespace, &slice) {
                    steps.push(Box::new(move |c| c.remove_slice(namespace, &slice)));
                }
            }
        }
        for pod in ["web", "pod"] {
            for i in 0..3 {
                if !target.host_ports.iter().any(|(n, p, index, _)| n == namespace && p == pod && *index == i)
                {
                    steps.push(Box::new(move |c| c.remove_host_port(namespace, pod, i)));
                }
            }
        }
    }
    for service in &target.services {
        steps.push(Box::new(|c| c.apply_service(&random::parse_service(service))));
    }
    for slice in &target.slices {
        steps.push(Box::new(|c| c.apply_slice(&random::parse_slice(slice))));
    }
    for (namespace, pod, index, port) in &target.host_ports {
        steps.push(Box::new(move |c| c.set_host_port(namespace, pod, *index, port)));
    }
    for i in (1..steps.len()).rev() {
        steps.swap(i, random.below(i + 1));
    }
    steps.iter().map(|step| step(compiler)).collect()
}
