//! Time that goes on across restarts of the agent and starts over with the machine.

use nix::time::{ClockId, clock_gettime};

/// Milliseconds since boot, time in suspend included (`CLOCK_BOOTTIME`).
#[must_use]
pub fn now_ms() -> u64 {
    // The clock exists on every Linux that can run this (2.6.39); 0 would only make addresses rest longer.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |t| {
        let seconds = u64::try_from(t.tv_sec()).unwrap_or(0);
        seconds * 1000 + u64::try_from(t.tv_nsec() / 1_000_000).unwrap_or(0)
    })
}

/// Nanoseconds of the clock that the kernel's programs stamp with (`CLOCK_MONOTONIC`).
#[must_use]
pub fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| {
        let seconds = u64::try_from(t.tv_sec()).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(t.tv_nsec()).unwrap_or(0)
    })
}

/// Nanoseconds of the Unix clock (`CLOCK_REALTIME`).
#[must_use]
pub fn unix_ns() -> i64 {
    clock_gettime(ClockId::CLOCK_REALTIME).map_or(0, |t| t.tv_sec() * 1_000_000_000 + t.tv_nsec())
}

/// Identifies the boot of the machine.
#[must_use]
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "unknown".to_owned(), |id| id.trim().to_owned())
}
