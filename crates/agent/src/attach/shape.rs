//! Bandwidth limits as queues: what a pod gets waits on the node's side of its link, what it sends on its own side.
//!
//! On its own side, a pod that sends too fast waits instead of losing packets. A container with CAP_NET_ADMIN can
//! take that queue away; runtimes do not give this capability unless a pod asks for it.

use podway_cni::Limit;
use podway_link::{FoundTbf, Tbf};

/// Least burst, in bytes: the largest IP packet there is and its Ethernet header, whatever MTU the link will have.
const BURST_MIN: u64 = 65_536 + 14;
/// Bursts from here on (in bits) are what runtimes write when the pod said nothing about bursts (2³¹−1, 2³²−1). Taken by
/// their word they would be no limit for the first quarter of a gigabyte.
const BURST_UNSAID: u64 = i32::MAX as u64;
/// Parts of a second that may pass at once when nothing was said, and that may wait: 50 ms.
const PART: u64 = 20;
/// Most that may wait, in bytes.
const QUEUE_MAX: u64 = 64 << 20;

/// The queue that keeps a limit.
pub(super) fn tbf(limit: &Limit) -> Tbf {
    let rate = (limit.rate / 8).max(1);
    let burst = if limit.burst >= BURST_UNSAID { rate / PART } else { limit.burst / 8 };
    let burst = burst.clamp(BURST_MIN, u64::from(u32::MAX) - QUEUE_MAX);
    let fits = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Tbf { rate, burst: fits(burst), limit: fits(burst + queue(rate)) }
}

/// The limit that a queue keeps.
pub(super) fn limit(found: &FoundTbf) -> Limit {
    let burst = u64::from(found.limit).saturating_sub(queue(found.rate));
    Limit { rate: found.rate * 8, burst: burst * 8 }
}

/// Whether a queue keeps a limit.
pub(super) fn keeps(found: &FoundTbf, limit: &Limit) -> bool {
    let wanted = tbf(limit);
    (found.rate, found.limit) == (wanted.rate, wanted.limit)
}

fn queue(rate: u64) -> u64 {
    (rate / PART).clamp(BURST_MIN, QUEUE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_queues() {
        for (rate, burst, wanted) in [
            // A burst below the largest packet would let nothing through.
            (1_000_000, 8, Tbf { rate: 125_000, burst: 65_550, limit: 131_100 }),
            (1_000_000, 8_000_000, Tbf { rate: 125_000, burst: 1_000_000, limit: 1_065_550 }),
            // What containerd and CRI-O write for a pod that has only a rate.
            (1_000_000, u64::from(u32::MAX), Tbf { rate: 125_000, burst: 65_550, limit: 131_100 }),
            (
                1_000_000_000,
                u64::from(u32::MAX),
                Tbf { rate: 125_000_000, burst: 6_250_000, limit: 12_500_000 },
            ),
            (
                podway_cni::runtime_config::RATE_MAX,
                podway_cni::runtime_config::BURST_MAX,
                Tbf { rate: 125_000_000_000_000, burst: u32::MAX - (64 << 20), limit: u32::MAX },
            ),
        ] {
            assert_eq!(tbf(&Limit { rate, burst }), wanted, "{rate} {burst}");
        }
    }

    #[test]
    fn a_limit_is_read_back_from_its_queue() {
        for limit in [
            Limit { rate: 1_000, burst: 8 },
            Limit { rate: 10_000_000, burst: 10_000_000 },
            Limit { rate: 10_000_000_000, burst: u64::from(u32::MAX) },
        ] {
            let tbf = tbf(&limit);
            let found = FoundTbf { index: 1, rate: tbf.rate, limit: tbf.limit };
            assert!(keeps(&found, &limit));
            assert!(keeps(&found, &super::limit(&found)), "{limit:?}");
        }
    }
}
