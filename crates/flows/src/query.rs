//! What a reader says to the agent, and the agent to the reader: one JSON object on a line each.

use serde::{Deserialize, Serialize};

use crate::filter::FilterSpec;
use crate::flow::{Flow, Loss};

/// The one line that a reader sends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Query {
    /// Which flows.
    pub filter: FilterSpec,
    /// So many of the newest; all when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<usize>,
    /// Nothing older than this time, nanoseconds of the Unix clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<i64>,
    /// Then all that happens, until the reader goes.
    pub follow: bool,
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer {
    /// A flow.
    Flow(Box<Flow>),
    /// Events were lost here.
    Lost(Loss),
    /// The question makes no sense, or there are too many readers.
    Error(String),
    /// What was asked of the past has been told. Without `follow` the last line.
    Done(Summary),
}

/// How complete the answer is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Node.
    pub node: String,
    /// Events that the history holds.
    pub kept: usize,
    /// Time of the oldest of them, as in [`Flow::time`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest: Option<String>,
    /// Events that the kernel has told since the datapath was set up.
    pub told: u64,
    /// Events that were lost in the full ring buffer since then.
    pub lost: u64,
    /// Events that were not told since then, because of the limits or because the same had been told shortly before.
    pub limited: u64,
}
