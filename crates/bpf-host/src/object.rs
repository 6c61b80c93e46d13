//! The embedded kernel object.

use crate::Result;

#[cfg(kernel_object)]
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/podway-bpf.o"));

/// Whether this build holds the kernel object.
pub const fn is_built_in() -> bool {
    cfg!(kernel_object)
}

pub(crate) fn bytes() -> Result<&'static [u8]> {
    #[cfg(kernel_object)]
    return Ok(OBJECT);
    #[cfg(not(kernel_object))]
    Err(crate::Error::NoKernelObject)
}
