//! What somebody else changed of what is Podway's, and was put right: told, and counted.

/// One thing that was put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// The kind of thing, a value of the metric's label.
    pub what: &'static str,
    /// What was found, with names.
    pub detail: String,
}

impl Repair {
    /// A repair of a kind.
    pub fn new(what: &'static str, detail: impl Into<String>) -> Self {
        Self { what, detail: detail.into() }
    }
}
