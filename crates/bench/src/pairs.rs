//! Two sides measured in turns, so that whatever else the machine does falls on both.

use serde::{Deserialize, Serialize};

use crate::stats::{Interval, median, median_interval};
use crate::stop::Stop;

/// Fewest pairs of a comparison.
pub const MIN_PAIRS: usize = 15;
/// Most pairs of a comparison: a bench has to end.
pub const MAX_PAIRS: usize = 200;

/// Values of both sides; the n-th of each were measured next to each other.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Pairs {
    /// What Podway did.
    pub ours: Vec<f64>,
    /// What the other side did.
    pub peer: Vec<f64>,
}

/// How the sides relate: the median of the pairs' ratios, ours to the peer's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Median of the ratios.
    pub median: f64,
    /// Where the true one is.
    #[serde(flatten)]
    pub interval: Interval,
}

/// Measures in the order ABBA: ours, peer, peer, ours, and so on. A drift that is the same over four measurements
/// then cancels. One measurement of each side before that warms caches and is thrown away.
///
/// # Errors
/// The first measurement that fails, or that it was interrupted.
pub fn interleave(
    count: usize,
    stop: &Stop,
    mut ours: impl FnMut() -> anyhow::Result<f64>,
    mut peer: impl FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<Pairs> {
    let mut pairs = Pairs::default();
    ours()?;
    peer()?;
    for index in 0..count {
        stop.check()?;
        if index % 2 == 0 {
            pairs.ours.push(ours()?);
            stop.check()?;
            pairs.peer.push(peer()?);
        } else {
            pairs.peer.push(peer()?);
            stop.check()?;
            pairs.ours.push(ours()?);
        }
    }
    Ok(pairs)
}

impl Pairs {
    /// The ratio of each pair.
    #[must_use]
    pub fn ratios(&self) -> Vec<f64> {
        self.ours.iter().zip(&self.peer).map(|(ours, peer)| ours / peer).collect()
    }

    /// The ratio over all pairs. `None` when there are too few for an interval.
    #[must_use]
    pub fn ratio(&self) -> Option<Ratio> {
        let ratios = self.ratios();
        Some(Ratio { median: median(&ratios)?, interval: median_interval(&ratios)? })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn the_order_is_abba_after_one_of_each() {
        let order = RefCell::new(String::new());
        let run = |c: char, value: f64| {
            order.borrow_mut().push(c);
            Ok(value)
        };
        let pairs = interleave(4, &Stop::never(), || run('A', 3.0), || run('B', 2.0)).expect("measured");
        assert_eq!(*order.borrow(), "ABABBAABBA");
        assert_eq!(pairs, Pairs { ours: vec![3.0; 4], peer: vec![2.0; 4] });
        assert_eq!(pairs.ratio(), None, "four pairs have no interval");
    }

    #[test]
    fn ratios_are_those_of_pairs_not_of_medians() {
        // The machine slows down by half on the way; every pair is still 1.25.
        let peer: Vec<f64> = (0..15).map(|i| 100.0 / (1.0 + f64::from(i) / 15.0)).collect();
        let pairs = Pairs { ours: peer.iter().map(|p| p * 1.25).collect(), peer };
        let ratio = pairs.ratio().expect("enough");
        assert!((ratio.median - 1.25).abs() < 1e-12);
        assert!((ratio.interval.high - ratio.interval.low).abs() < 1e-12);
    }

    #[test]
    fn a_failure_and_an_interruption_end_it() {
        let failed = interleave(15, &Stop::never(), || Ok(1.0), || anyhow::bail!("no route"));
        assert_eq!(failed.expect_err("fails").to_string(), "no route");
        let stop = Stop::never();
        let mut runs = 0;
        let ended = interleave(
            15,
            &stop,
            || {
                runs += 1;
                if runs == 3 {
                    stop.request();
                }
                Ok(1.0)
            },
            || Ok(1.0),
        );
        assert_eq!(ended.expect_err("interrupted").to_string(), "interrupted");
        assert_eq!(runs, 3);
    }
}
