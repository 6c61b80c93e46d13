//! The iptables writer: `iptables-restore` and `ip6tables-restore`, of the legacy or the nf_tables kind.
//!
//! Frontends are found by a short walk: a tree over the low bits of the address (which spread service addresses
//! evenly, as high bits do not), whose leaves hold a few frontends each, or blocks of node ports. Small services are
//! rules of their leaf; larger ones, and those that treat origins differently, have chains of their own. A change
//! rewrites the leaf and those chains in one `iptables-restore --noflush`, never anything else.
//!
//! The legacy kind hands the whole table to the kernel each time, whatever changes. So what counts there is how few
//! rules there are; that is why rules carry no comments in it.

mod program;
mod render;
mod tree;
mod writer;

pub use program::Kind;
pub use writer::IptablesWriter;
