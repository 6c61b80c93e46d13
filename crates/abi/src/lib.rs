//! Keys, values and codes that the kernel programs and user space share.
//!
//! Everything here is plain data with a fixed layout: `repr(C)`, no padding (checked when compiled), the
//! host's byte order unless a field says otherwise. There is no logic beyond conversions, so that both
//! sides can be sure to mean the same bytes.
//!
//! A change of any layout here must raise [`ABI_VERSION`]: the agent pins maps under that number and never
//! reads another version's bytes as its own.
#![no_std]

mod addr;
mod conntrack;
pub mod events;
mod reason;
pub mod services;
mod tables;

pub use addr::Addr;
pub use conntrack::{CtEntry, CtKey, CtRoute, Direction, ct_flags, way};
pub use reason::{Hook, REASON_SLOTS, Reason, counter_index};
pub use tables::{
    Counter, Endpoint, MAX_CONNTRACK, MAX_ENDPOINTS, MAX_PEERS, MAX_PREFIXES, Mac, NodeConfig, Peer, Source,
    endpoint_flags, mode, node_flags, peer_flags,
};

/// Version of every layout in this crate; part of the pin path of the maps.
pub const ABI_VERSION: u32 = 5;

/// Fails the build when `T` has padding: the sum of its fields must be its size.
macro_rules! assert_layout {
    ($t:ty, $size:expr) => {
        const _: () = assert!(core::mem::size_of::<$t>() == $size, concat!("layout of ", stringify!($t)));
        const _: () = assert!(core::mem::align_of::<$t>() <= 8);
    };
}
pub(crate) use assert_layout;

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya reads and writes map bytes as these types")]
mod pod {
    use crate::{Addr, Counter, CtEntry, CtKey, Endpoint, NodeConfig, Peer, Source};

    macro_rules! pod {
        ($($t:ty),*) => { $(
            // SAFETY: `repr(C)`, made of integers only, without padding (`assert_layout!`): every bit pattern is
            // a value and every byte is initialised. Needed because only this crate may implement it here.
            unsafe impl aya::Pod for $t {}
        )* };
    }
    pod!(Addr, Counter, CtEntry, CtKey, Endpoint, NodeConfig, Peer, Source);
}
