//! Who may have a frontend when several objects ask for the same one.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use crate::{
    findings::Finding,
    table::{Frontend, FrontendKey},
};

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// An object that asks for frontends.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Owner {
    Service(Key),
    /// One of the host ports of a pod.
    HostPort(Key, usize),
}

impl Owner {
    fn kind(&self) -> &'static str {
        match self {
            Owner::Service(_) => "Service",
            Owner::HostPort(..) => "Pod",
        }
    }

    pub(crate) fn key(&self) -> &Key {
        match self {
            Owner::Service(key) | Owner::HostPort(key, _) => key,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind(), self.key().namespace, self.key().name)
    }
}

/// What one object asks for.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    /// `metadata.creationTimestamp` as written: RFC 3339, which sorts as text.
    pub(crate) created: Arc<str>,
    pub(crate) owner: Owner,
    pub(crate) field: Box<str>,
    pub(crate) frontend: Frontend,
}

impl Claim {
    /// The oldest object wins, then the one whose namespace and name sort first.
    fn rank(&self) -> (&str, &Key, &Owner) {
        (&self.created, self.owner.key(), &self.owner)
    }
}

/// All claims. Nearly every frontend has one.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_key: HashMap<FrontendKey, Vec<Claim>>,
    contested: BTreeSet<FrontendKey>,
}

impl Claims {
    /// Sets what an owner asks for at `key`.
    pub(crate) fn set(&mut self, key: FrontendKey, claim: Claim) {
        let claims = self.by_key.entry(key).or_default();
        claims.retain(|c| c.owner != claim.owner);
        let at = claims.partition_point(|c| c.rank() < claim.rank());
        claims.insert(at, claim);
        self.settle(key);
    }

    /// The owner no longer asks for it.
    pub(crate) fn release(&mut self, key: FrontendKey, owner: &Owner) {
        if let Some(claims) = self.by_key.get_mut(&key) {
            claims.retain(|c| c.owner != *owner);
            if claims.is_empty() {
                self.by_key.remove(&key);
            }
        }
        self.settle(key);
    }

    fn settle(&mut self, key: FrontendKey) {
        if self.by_key.get(&key).is_some_and(|claims| claims.len() > 1) {
            self.contested.insert(key);
        } else {
            self.contested.remove(&key);
        }
    }

    /// Who has it.
    pub(crate) fn winner(&self, key: &FrontendKey) -> Option<&Claim> {
        self.by_key.get(key)?.first()
    }

    /// What `owner` asks for at `key`.
    pub(crate) fn of(&self, key: &FrontendKey, owner: &Owner) -> Option<&Claim> {
        self.by_key.get(key)?.iter().find(|claim| claim.owner == *owner)
    }

    /// What to tell those who did not get it.
    pub(crate) fn conflicts(&self, key: &FrontendKey) -> Vec<Finding> {
        if !self.contested.contains(key) {
            return Vec::new();
        }
        let Some((winner, losers)) = self.by_key.get(key).and_then(|claims| claims.split_first()) else {
            return Vec::new();
        };
        let finding = |loser: &Claim| {
            let why = if loser.created == winner.created { "comes first by name" } else { "is older" };
            Finding {
                kind: loser.owner.kind().to_owned(),
                namespace: loser.owner.key().namespace.to_string(),
                name: loser.owner.key().name.to_string(),
                field: loser.field.to_string(),
                cause: format!(
                    "{key} belongs to {}, which {why}; {} does not answer there until one of them is changed",
                    winner.owner, loser.owner
                ),
            }
        };
        losers.iter().map(finding).collect()
    }

    /// Every conflict.
    pub(crate) fn all_conflicts(&self) -> impl Iterator<Item = Finding> {
        self.contested.iter().flat_map(|key| self.conflicts(key))
    }
}
