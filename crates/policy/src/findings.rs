//! What is odd about policies when they are put together with pods.

use std::{collections::BTreeSet, fmt};

use podway_model::policy::{Direction, Namespaces};

use crate::{
    compiler::Compiler,
    rules::Policy,
    table::{PolicyRef, at},
    world::own_addresses,
};

/// Something that the owner of a policy should know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Whose.
    pub policy: PolicyRef,
    /// The field that it is about.
    pub field: String,
    /// What is odd, and what comes of it.
    pub cause: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, field, cause } = self;
        match policy.namespace.is_empty() {
            true => write!(f, "{policy}: {field}: {cause}"),
            false => write!(f, "{} {policy}: {field}: {cause}", policy.kind),
        }
    }
}

impl Compiler {
    /// What is odd at the moment, sorted: policies that select no pod, names of ports that no pod has, fields that are
    /// not understood, equal priorities. Looks at everything, so it is for reports.
    pub fn findings(&self) -> Vec<Finding> {
        let mut found: Vec<Finding> = self.policies.iter().flat_map(|(_, p)| self.findings_of(p)).collect();
        let cluster: Vec<&Policy> = self
            .cluster
            .values()
            .filter_map(|id| self.policies.get(*id))
            .filter(|p| p.priority > 0)
            .collect();
        for policy in &cluster {
            let same = |other: &&&Policy| {
                other.stage == policy.stage
                    && other.priority == policy.priority
                    && other.reference < policy.reference
            };
            if let Some(other) = cluster.iter().find(same) {
                found.push(Finding {
                    policy: policy.reference.clone(),
                    field: "spec.priority".to_owned(),
                    cause: format!(
                        "{} is that of {}, too; the API leaves open which is judged first, here it goes by name",
                        policy.priority, other.reference
                    ),
                });
            }
        }
        found.sort();
        found.dedup();
        found
    }

    fn findings_of(&self, policy: &Policy) -> Vec<Finding> {
        let mut found = Vec::new();
        let mut say = |field: String, cause: String| {
            found.push(Finding { policy: policy.reference.clone(), field, cause });
        };
        for direction in Direction::ALL {
            for (i, rule) in policy.rules[at(direction)].iter().enumerate() {
                for field in &rule.not_understood {
                    let result = if rule.peers.is_none() { "denies everything" } else { "accepts nothing" };
                    say(field.clone(), format!("is not understood; rule {} therefore {result}", i + 1));
                }
            }
        }
        let mut subjects = self.subjects(policy).peekable();
        if subjects.peek().is_none() {
            let field = match policy.namespaces {
                Namespaces::Named(_) => "spec.podSelector",
                Namespaces::Selected(_) => "spec.subject",
            };
            say(field.to_owned(), "selects no pod".to_owned());
            return found;
        }
        let names: BTreeSet<&str> =
            subjects.flat_map(|pod| pod.ports.iter().map(|p| p.name.as_str())).collect();
        for name in policy.names(Direction::Ingress) {
            if !names.contains(name) {
                say("spec.ingress".to_owned(), format!("no pod that it selects has a port named {name:?}"));
            }
        }
        for name in policy.names(Direction::Egress) {
            let mut pods = self.world.pods.iter().map(|(_, state)| &state.pod);
            if !pods.any(|pod| !own_addresses(pod).is_empty() && pod.ports.iter().any(|p| p.name == name)) {
                say("spec.egress".to_owned(), format!("no pod has a port named {name:?}"));
            }
        }
        found
    }
}
