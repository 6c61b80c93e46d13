//! Network policies compiled to classes of peers and one table of verdicts, and why each verdict is what it is.
//!
//! Pure: no I/O, no clock, no kernel types. Everything that has precedence (tiers, priorities, deny and pass, default
//! denial) is decided here, so that a datapath only looks up.
//!
//! [`Compiler`] takes objects and returns what changes; [`PolicyTable`] is what the changes add up to and says how it

mod atoms;
mod classes;
mod commit;
mod compiler;
mod explain;
mod findings;
mod ids;
mod index;
mod lanes;
mod prefixes;
mod reach;
mod rules;
mod sets;
pub mod table;
mod verdicts;
mod world;

pub use compiler::{Compiler, Size, Update};
pub use explain::{Explanation, NearMiss, Party, Side, explain};
pub use findings::Finding;
pub use prefixes::PrefixMap;
pub use reach::{Piece, Place, Reachability};
pub use table::{
    Assigned, Change, ClassId, Entry, Judgement, PeerKey, PolicyRef, PolicyTable, RuleId, RuleRef, SetId,
    SetInfo, Verdict,
};
pub use verdicts::{VerdictKey, Verdicts};
