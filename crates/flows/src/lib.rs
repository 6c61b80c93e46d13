//! Flows for people: what the datapath tells, joined with names, kept for a while, filtered and shown.
//!
//! ```text
//!   events (numbers and addresses) ─▶ names ─▶ record ─▶ history ─▶ filter ─▶ flow ─▶ render
//!                                      pods, nodes,       bounded    what was   JSON     lines
//!                                      services                      asked for
//! ```
//!
//! Pure: no kernel, no sockets, no clock. The agent feeds it, `podway flows` shows what comes out.

pub mod filter;
pub mod flow;
pub mod history;
pub mod identity;
pub mod names;
pub mod query;
pub mod record;
pub mod render;

pub use filter::{BadFilter, Filter, FilterSpec};
pub use flow::{End, Flow, Loss, PodEnd, Verdict};
pub use history::{Entry, History, Limits};
pub use identity::{Identity, Kind, ServiceName};
pub use names::{Names, UnixNanos};
pub use query::{Answer, Query, Summary};
pub use record::Record;
