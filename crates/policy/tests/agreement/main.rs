//! The compiler against an evaluator that shares nothing with it, on random clusters; and what the tables allow while
//! they change.
//!
//! `PODWAY_TRIPLES` says how many questions (cluster, policies, packet) are asked.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

mod naive;
mod random;

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use naive::{Asked, Objects, Said};
use podway_model::{ClusterNetworkPolicy, Namespace, NetworkPolicy, NodePeer, Pod, policy::Direction};
use podway_policy::{Change, Compiler, PolicyTable, RuleId, Update, Verdict};
use proptest::{prelude::*, test_runner::Config};

const QUESTIONS: usize = 400;

fn cases(default: u64) -> u32 {
    let triples = std::env::var("PODWAY_TRIPLES").ok().map_or(default, |t| t.parse().expect("a number"));
    u32::try_from(triples.div_ceil(QUESTIONS as u64)).unwrap()
}

fn config(default: u64) -> Config {
    Config { cases: cases(default), failure_persistence: None, ..Config::default() }
}

fn updates(objects: &Objects) -> Vec<Update> {
    let mut out = Vec::new();
    out.extend(objects.namespaces.iter().map(|v| Update::Namespace(Namespace::parse(v).unwrap())));
    out.extend(objects.nodes.iter().map(|v| Update::Node(NodePeer::parse(v).unwrap())));
    out.extend(objects.pods.iter().map(|v| Update::Pod(Pod::parse(v).unwrap())));
    out.extend(
        objects.network_policies.iter().map(|v| Update::NetworkPolicy(NetworkPolicy::parse(v).unwrap())),
    );
    out.extend(
        objects
            .cluster_policies
            .iter()
            .map(|v| Update::ClusterPolicy(ClusterNetworkPolicy::parse(v).unwrap())),
    );
    out
}

/// Removals of what is in `old` and not in `new`.
fn removals(old: &Objects, new: &Objects) -> Vec<Update> {
    let id = |v: &serde_json::Value| {
        let text = |p: &str| v.pointer(p).and_then(serde_json::Value::as_str).unwrap_or("").to_owned();
        (text("/metadata/namespace"), text("/metadata/name"))
    };
    let gone = |old: &[serde_json::Value], new: &[serde_json::Value]| {
        let keep: Vec<_> = new.iter().map(id).collect();
        old.iter().map(id).filter(|o| !keep.contains(o)).collect::<Vec<_>>()
    };
    let mut out = Vec::new();
    let pods = gone(&old.pods, &new.pods);
    out.extend(pods.into_iter().map(|(ns, n)| Update::RemovePod(ns, n)));
    let policies = gone(&old.network_policies, &new.network_policies);
    out.extend(policies.into_iter().map(|(ns, n)| Update::RemoveNetworkPolicy(ns, n)));
    let policies = gone(&old.cluster_policies, &new.cluster_policies);
    out.extend(policies.into_iter().map(|(_, n)| Update::RemoveClusterPolicy("ClusterNetworkPolicy", n)));
    out
}

struct Question {
    source: IpAddr,
    target: IpAddr,
    asked: Asked,
    number: u8,
}

/// Questions that differ from case to case, without being part of what is shrunk.
fn questions(salt: u64) -> Vec<Question> {
    let addresses = random::addresses();
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).unwrap() % n
    };
    let mut out = Vec::new();
    while out.len() < QUESTIONS {
        let (source, target) = (addresses[next(addresses.len())], addresses[next(addresses.len())]);
        if source == target || source.is_ipv4() != target.is_ipv4() {
            continue;
        }
        let (protocol, number) = [("TCP", 6), ("UDP", 17), ("SCTP", 132), ("ICMP", 1)][next(4)];
        let port = if number == 1 { 0 } else { random::PORTS[next(random::PORTS.len())] };
        out.push(Question { source, target, asked: Asked { protocol, port }, number });
    }
    out
}

fn name(table: &PolicyTable, rule: RuleId) -> String {
    if rule == RuleId::DEFAULT {
        return "default".to_owned();
    }
    let rule = &table.rules[&rule];
    format!("{} {} {}", rule.policy.name, rule.direction, rule.index)
}

fn same(table: &PolicyTable, verdict: Option<Verdict>, said: Option<Said>) -> bool {
    match (verdict, said) {
        // Endpoints that no policy selects are not in the table.
        (None, None) => true,
        (None, Some(said)) => said.allow && !said.audit && said.because == ["default"],
        (Some(v), Some(s)) => {
            v.allow == s.allow && v.audit == s.audit && s.because.contains(&name(table, v.rule))
        }
        (Some(_), None) => false,
    }
}

fn compare(table: &PolicyTable, objects: &Objects, salt: u64) -> Result<(), TestCaseError> {
    for q in questions(salt) {
        for (direction, text, endpoint, peer) in [
            (Direction::Egress, "egress", q.source, q.target),
            (Direction::Ingress, "ingress", q.target, q.source),
        ] {
            let said = objects.side(text, endpoint, peer, q.asked);
            let verdict = table.side(endpoint, direction, peer, q.number, q.asked.port);
            let because = verdict.map(|v| name(table, v.rule));
            prop_assert!(
                same(table, verdict, said.clone()),
                "{} -> {} {} {}, {text}: {verdict:?} ({because:?}), the documentation says {said:?}",
                q.source,
                q.target,
                q.asked.protocol,
                q.asked.port
            );
        }
    }
    Ok(())
}

/// Makes changes one by one; on the way, nothing is allowed that neither the old nor the new state allows.
fn follow(
    table: &mut PolicyTable,
    new: &PolicyTable,
    changes: &[Change],
    salt: u64,
) -> Result<(), TestCaseError> {
    let old = table.clone();
    let questions = questions(salt);
    let judge = |t: &PolicyTable, q: &Question| t.judge(q.source, q.target, q.number, q.asked.port).allow();
    let never: Vec<&Question> = questions.iter().filter(|q| !judge(&old, q) && !judge(new, q)).collect();
    for change in changes {
        table.apply(change);
        for q in &never {
            prop_assert!(
                !judge(table, q),
                "{} -> {} {} {} is allowed after {change:?}, and neither before nor after all of {changes:#?}",
                q.source,
                q.target,
                q.asked.protocol,
                q.asked.port
            );
        }
    }
    Ok(())
}

/// The parts of tables that do not depend on numbers.
fn shape(compiler: &Compiler) -> podway_policy::Size {
    compiler.size()
}

static ASKED: AtomicU64 = AtomicU64::new(0);

proptest! {
    #![proptest_config(config(200_000))]

    #[test]
    fn tables_say_what_the_documentation_says(objects in random::cluster(), salt in any::<u64>()) {
        let mut compiler = Compiler::for_cluster();
        compiler.apply(updates(&objects));
        compare(compiler.table(), &objects, salt)?;
        let asked = ASKED.fetch_add(QUESTIONS as u64, Ordering::Relaxed) + QUESTIONS as u64;
        if asked == u64::from(cases(200_000)) * QUESTIONS as u64 {
            println!("{asked} questions, no mismatch");
        }
    }
}

proptest! {
    #![proptest_config(config(60_000))]

    #[test]
    fn one_by_one_is_the_same_as_at_once(
        old in random::cluster(),
        new in random::cluster(),
        order in any::<u64>(),
        at_once in any::<bool>(),
    ) {
        let mut compiler = Compiler::for_cluster();
        compiler.apply(updates(&old));
        let mut table = compiler.table().clone();
        let mut steps = removals(&old, &new);
        steps.extend(updates(&new));
        let mut state = order | 1;
        for i in (1..steps.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            steps.swap(i, usize::try_from(state >> 33).unwrap() % (i + 1));
        }
        let batches: Vec<Vec<Update>> = if at_once { vec![steps] } else { steps.into_iter().map(|s| vec![s]).collect() };
        for batch in batches {
            let changes = compiler.apply(batch);
            follow(&mut table, compiler.table(), &changes, order)?;
        }
        compare(compiler.table(), &new, order)?;
        let mut fresh = Compiler::for_cluster();
        fresh.apply(updates(&new));
        prop_assert_eq!(shape(&compiler), shape(&fresh));
        // Nothing is left when everything is gone.
        let everything = Objects { namespaces: new.namespaces.clone(), nodes: new.nodes.clone(), ..Objects::default() };
        compiler.apply(removals(&new, &everything));
        let size = compiler.size();
        prop_assert_eq!((size.selectors, size.classes, size.sets, size.rules, size.entries), (0, 1, 0, 0, 0));
        prop_assert_eq!((size.addresses, size.prefixes), (0, 0));
        prop_assert!(compiler.table().sets.is_empty() && compiler.table().verdicts.is_empty());
    }
}
