//! How IPVS chooses among real servers.

use std::str::FromStr;

/// Names of the kernel's schedulers, each in a module `ip_vs_<name>`, and what they do.
const SCHEDULERS: [(&str, &str); 12] = [
    ("rr", "one after the other"),
    ("wrr", "one after the other, by weight; all weigh the same here"),
    ("lc", "the one with the fewest connections"),
    ("wlc", "the one with the fewest connections, by weight"),
    ("sed", "the one with the shortest expected delay"),
    ("nq", "one that is idle, else the shortest expected delay"),
    ("sh", "by a hash of the client's address"),
    ("mh", "by a Maglev hash of the client's address and port"),
    ("dh", "by a hash of the destination: one endpoint per service"),
    ("lblc", "one endpoint per service until it has too much to do"),
    ("lblcr", "a few endpoints per service by their load"),
    ("fo", "the one with the highest weight: one endpoint per service"),
];

/// A scheduler of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheduler(&'static str);

/// A name that is none of a scheduler.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}: not an IPVS scheduler; there are {names}", names = Scheduler::names())]
pub struct UnknownScheduler(String);

impl Scheduler {
    /// Consistent hashing, as in the Maglev paper.
    pub const MAGLEV: Self = Self("mh");

    /// The name, as `ipvsadm -s` takes it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.0
    }

    /// The names of all, separated by commas.
    #[must_use]
    pub fn names() -> String {
        SCHEDULERS.map(|(name, _)| name).join(", ")
    }

    /// What it does, for people.
    #[must_use]
    pub fn description(&self) -> &'static str {
        SCHEDULERS.iter().find(|(name, _)| *name == self.0).map_or("", |(_, what)| what)
    }

    /// Whether it chooses by a hash of the client. Then it has to look further where the chosen endpoint takes no new
    /// connections.
    pub(super) fn hashes_client(&self) -> bool {
        matches!(self.0, "sh" | "mh")
    }

    /// Whether the client's port is part of the hash: only so do the connections of one client spread.
    pub(super) fn hashes_port(&self) -> bool {
        self.0 == "mh"
    }
}

impl Default for Scheduler {
    /// One after the other, as kube-proxy does.
    fn default() -> Self {
        Self("rr")
    }
}

impl FromStr for Scheduler {
    type Err = UnknownScheduler;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = SCHEDULERS.iter().find(|(name, _)| *name == text);
        found.map(|(name, _)| Self(name)).ok_or_else(|| UnknownScheduler(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_and_others_refused_with_those() {
        for (name, _) in SCHEDULERS {
            let scheduler: Scheduler = name.parse().unwrap();
            assert_eq!(scheduler.name(), name);
            assert!(!scheduler.description().is_empty());
        }
        let error = "random".parse::<Scheduler>().unwrap_err().to_string();
        assert_eq!(
            error,
            "random: not an IPVS scheduler; there are rr, wrr, lc, wlc, sed, nq, sh, mh, dh, lblc, lblcr, fo"
        );
        assert_eq!(Scheduler::default().name(), "rr");
    }
}
