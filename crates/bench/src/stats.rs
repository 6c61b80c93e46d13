//! Order statistics: medians, quantiles, and an interval for a median that assumes nothing about the distribution.
//!
//! Times and rates on a busy machine are skewed and have outliers, so means and standard deviations say little about
//! them. The interval is that of the sign test (Conover, *Practical Nonparametric Statistics*, "confidence interval
//! for a quantile"): of `n` independent values, the number below the true median is binomial with `n` and one half,
//! so the k-th smallest and the k-th largest value enclose the median with a probability that can be computed.

use serde::{Deserialize, Serialize};

/// What an interval holds the median with, at least.
pub const CONFIDENCE: f64 = 0.95;
/// Most values that [`median_interval`] takes: beyond, one half to that power is no longer a normal number.
pub const MAX_VALUES: usize = 1000;

/// An interval around a median.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end, one of the values.
    pub low: f64,
    /// Upper end, one of the values.
    pub high: f64,
    /// Probability that the true median is inside: the smallest that is possible and at least [`CONFIDENCE`].
    pub confidence: f64,
}

/// The middle value, or the mean of the two in the middle. `None` without values.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    let upper = sorted.get(sorted.len() / 2)?;
    Some(if sorted.len() % 2 == 1 { *upper } else { f64::midpoint(sorted[sorted.len() / 2 - 1], *upper) })
}

/// The smallest value that at least the share `q` of all values does not exceed (nearest rank). `None` without values.
#[must_use]
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let sorted = sorted(values);
    let rank = (1..=sorted.len()).find(|rank| share(*rank, sorted.len()) >= q)?;
    sorted.get(rank - 1).copied()
}

/// The interval that holds the median. `None` for fewer than six values, which cannot be that sure of anything, and
/// for more than [`MAX_VALUES`].
#[must_use]
pub fn median_interval(values: &[f64]) -> Option<Interval> {
    let sorted = sorted(values);
    let n = sorted.len();
    if n > MAX_VALUES {
        return None;
    }
    // Grows k for as long as what is left outside stays below the error that is allowed.
    let (mut below, mut probability) = (0.0, 0.5_f64.powi(i32::try_from(n).ok()?));
    let mut found = None;
    for k in 1..=n / 2 {
        below += probability;
        let confidence = 2.0_f64.mul_add(-below, 1.0);
        if confidence < CONFIDENCE {
            break;
        }
        found = Some(Interval { low: sorted[k - 1], high: sorted[n - k], confidence });
        // Binomial(n, k) from Binomial(n, k - 1).
        probability *= share(n + 1 - k, k);
    }
    found
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// `part / whole`. Numbers of values are far below 2^32, so nothing is rounded.
fn share(part: usize, whole: usize) -> f64 {
    let exact = |n: usize| u32::try_from(n).map_or(f64::INFINITY, f64::from);
    exact(part) / exact(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: u32) -> Vec<f64> {
        (1..=n).rev().map(f64::from).collect()
    }

    #[test]
    fn medians_and_quantiles_of_known_values() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), Some(3.0));
        for (q, want) in [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0), (0.0, 1.0)] {
            assert_eq!(quantile(&numbers(100), q), Some(want), "{q}");
        }
        assert_eq!(quantile(&[7.0], 0.99), Some(7.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    /// Ranks and coverage as the tables for the sign test have them.
    #[test]
    fn intervals_have_the_ranks_of_the_sign_test() {
        for (n, low, high, confidence) in [
            (6, 1.0, 6.0, 0.96875),
            (10, 2.0, 9.0, 0.978_516),
            (15, 4.0, 12.0, 0.964_844),
            (20, 6.0, 15.0, 0.958_611),
            (25, 8.0, 18.0, 0.956_714),
            (100, 40.0, 61.0, 0.964_800),
        ] {
            let found = median_interval(&numbers(n)).expect("enough values");
            assert_eq!((found.low, found.high), (low, high), "{n} values");
            assert!((found.confidence - confidence).abs() < 1e-6, "{n} values: {}", found.confidence);
        }
        assert_eq!(median_interval(&numbers(5)), None);
        assert_eq!(median_interval(&numbers(1001)), None);
    }

    /// Draws from a skewed distribution with a known median: the interval must miss it about as rarely as it says.
    #[test]
    fn intervals_cover_the_true_median_as_often_as_they_say() {
        // SplitMix64 with a fixed seed: the same draws each time.
        let mut state = 42_u64;
        let mut uniform = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (f64::from(u32::try_from((z ^ (z >> 31)) >> 32).expect("32 bits")) + 0.5) / 4_294_967_296.0
        };
        // Exponential distribution: its median is ln 2.
        let rounds = 4000;
        let missed = (0..rounds)
            .filter(|_| {
                let values: Vec<f64> = (0..15).map(|_| -uniform().ln()).collect();
                let found = median_interval(&values).expect("enough values");
                !(found.low..=found.high).contains(&std::f64::consts::LN_2)
            })
            .count();
        // 3.5% is what 15 values promise; 4000 rounds are within one percent of it.
        assert!((100..=180).contains(&missed), "{missed} of {rounds} missed");
    }
}
