//! The nftables writer.
//!
//! It speaks netlink itself, since a change of one backend must not cost a process that first reads all there is. What
//! the tables hold is in [`layout`]. `nft list table ip podway-services` shows it; nft's language cannot express some
//! of the rules, so what it shows cannot be loaded again.
//!
//! The writer knows from memory what is in the kernel, and writes differences. When the kernel refuses one, or when
//! the generation of the rules says that somebody else wrote, the tables are read back and compared.

mod abi;
mod expr;
mod kernel;
mod layout;
mod model;
mod writer;

pub use layout::TABLE;
pub use writer::NftWriter;
