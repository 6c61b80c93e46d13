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

use std::io;

pub use layout::TABLE;
pub use writer::NftWriter;

/// The number that every change of nf_tables rules in the network namespace of the calling thread raises.
pub(crate) fn generation() -> io::Result<u32> {
    kernel::Kernel::open()?.generation()
}

/// The generation after some changes; the kernel leaves out 0.
pub(crate) const fn generation_after(generation: u32, changes: u32) -> u32 {
    match generation.checked_add(changes) {
        Some(next) => next,
        None => generation.wrapping_add(changes).wrapping_add(1),
    }
}
