//! How many cases came out as expected, and which did not.

use std::{collections::BTreeMap, fmt::Debug};

/// The result of a suite.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    passed: usize,
    failed: Vec<String>,
    /// Cases without a counterpart, by the reason.
    not_applicable: BTreeMap<String, Vec<String>>,
}

impl Tally {
    /// Compares what a case expects with what came out.
    pub fn check<T: PartialEq + Debug>(&mut self, case: &str, expected: &T, actual: &T) {
        if expected == actual {
            self.passed += 1;
        } else {
            self.fail(case, &format!("expected {expected:?}\n       was {actual:?}"));
        }
    }

    /// A case whose parts have been compared: it passes as a whole or not.
    pub fn settle(&mut self, case: &str, mismatches: &[String]) {
        if mismatches.is_empty() {
            self.passed += 1;
        } else {
            self.fail(case, &mismatches.join("\n    "));
        }
    }

    /// A case that did not come out.
    pub fn fail(&mut self, case: &str, what: &str) {
        self.failed.push(format!("{case}\n    {what}"));
    }

    /// A case without a counterpart here.
    pub fn not_applicable(&mut self, case: &str, why: &str) {
        self.not_applicable.entry(why.to_owned()).or_default().push(case.to_owned());
    }

    /// Adds the result of a part of the suite.
    pub fn add(&mut self, part: Tally) {
        self.passed += part.passed;
        self.failed.extend(part.failed);
        for (why, cases) in part.not_applicable {
            self.not_applicable.entry(why).or_default().extend(cases);
        }
    }

    /// How many came out as expected.
    pub fn passed(&self) -> usize {
        self.passed
    }

    /// What did not, one text each.
    pub fn failed(&self) -> &[String] {
        &self.failed
    }

    /// Reasons why cases have no counterpart, with the cases.
    pub fn inapplicable(&self) -> &BTreeMap<String, Vec<String>> {
        &self.not_applicable
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed.len())?;
        let inapplicable: usize = self.not_applicable.values().map(Vec::len).sum();
        if inapplicable > 0 {
            write!(f, ", {inapplicable} not applicable")?;
        }
        Ok(())
    }
}
