//! The state machine of one path: what to send when, and what the answers mean.
//!
//! It works in rounds. A round sends a few sizes at once, always a small one among them, and ends when all are
//! acknowledged or the time is over. At rest a round every few seconds has the small and the full size. If
//! the full size is lost while the small one is answered, rounds follow at once; after three such the search
//! begins: each of its rounds cuts the range between the largest answered and the smallest lost size into
//! nine. The result is confirmed with three copies of the boundary before anybody is told. The full size
//! is part of every round, so whatever the state is, one answer to it ends all doubt.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Probes remembered while their answer may still come.
const OUTSTANDING_MAX: usize = 128;
/// How old a probe may be for its answer to count.
const ANSWER_AGE_MAX: Duration = Duration::from_secs(2);
/// How long the word of the peer's kernel that nobody listens counts: longer than the usual interval, because kernels
/// send few of such errors (Linux one a second to each peer, `icmp_ratelimit`).
const REFUSAL_AGE_MAX: Duration = Duration::from_secs(4);
/// Sizes within the range in a round of the search.
const CUTS: u32 = 8;
/// Searches that came to nothing before the next waits for the usual interval.
const SEARCHES_MAX: u8 = 3;

/// How a path is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathConfig {
    /// Time between rounds while nothing is wrong.
    pub interval: Duration,
    /// Shortest time to wait for an answer.
    pub timeout_min: Duration,
    /// Longest time to wait for an answer.
    pub timeout_max: Duration,
    /// Size of the small probe in bytes, as an IP packet. It has to fit through anything.
    pub small: u16,
    /// Rounds that must lose the full size, with the small one answered, before the search.
    pub attempts: u8,
    /// Rounds without any answer before the peer counts as unreachable.
    pub silent_attempts: u8,
}

impl Default for PathConfig {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(3),
            timeout_min: Duration::from_millis(250),
            timeout_max: Duration::from_secs(1),
            small: 128,
            attempts: 3,
            silent_attempts: 5,
        }
    }
}

/// What is known about a path. Sizes are those of IP packets, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet.
    Unknown,
    /// Small probes are not answered: the peer is down, or UDP is filtered. Nothing is known about the size.
    Unreachable,
    /// The peer's kernel says that nobody listens there (ICMP port unreachable): its responder is down, the peer is
    /// not. Nothing is known about the size.
    Refused,
    /// A packet of the expected size arrived whole.
    Proven {
        /// The size.
        mtu: u16,
    },
    /// Packets of the expected size are lost while smaller ones arrive.
    Narrow {
        /// What the path should carry.
        expected: u16,
        /// What it carries.
        found: u16,
    },
}

/// What became of the probes of a path since it is watched. Those whose answer may still come are in neither number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Probes that were acknowledged.
    pub answered: u64,
    /// Probes that were not, within two seconds. Those that are larger than the path carries are among them.
    pub lost: u64,
}

/// A probe to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Size as an IP packet, in bytes.
    pub size: u16,
    /// Repeated by the acknowledgement.
    pub nonce: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A round each interval.
    Watch,
    /// The full size was lost: how often with the small one answered, how often without any answer.
    Suspect { lost: u8, silent: u8 },
    /// `low` is answered, `high` is lost.
    Search { low: u16, high: u16, silent: u8 },
    /// The search has ended: `low` fits and `low + 1` does not. Once more, with copies.
    Confirm { low: u16 },
}

#[derive(Debug)]
struct Round {
    /// Sizes and whether they were answered.
    sizes: Vec<(u16, bool)>,
    /// Copies of what is not answered that are still to be sent, and when.
    copies: u8,
    again: Instant,
    ends: Instant,
}

/// Watches one path.
#[derive(Debug)]
pub struct PathProbe {
    config: PathConfig,
    expected: u16,
    phase: Phase,
    round: Option<Round>,
    /// When the next round begins, while there is none.
    next: Instant,
    outstanding: VecDeque<(u64, u16, Instant)>,
    rtt: Option<Duration>,
    counts: Counts,
    searches: u8,
    refused: Option<Instant>,
    verdict: Verdict,
    random: u64,
}

impl PathProbe {
    /// Watches a path that should carry IP packets of `expected` bytes. The first round is due at once.
    /// `seed` must be unpredictable for others: the nonces come from it.
    pub fn new(expected: u16, config: PathConfig, seed: u64, now: Instant) -> Self {
        Self {
            config,
            expected: expected.max(config.small.saturating_add(1)),
            phase: Phase::Watch,
            round: None,
            next: now,
            outstanding: VecDeque::new(),
            rtt: None,
            counts: Counts::default(),
            searches: 0,
            refused: None,
            verdict: Verdict::Unknown,
            random: seed,
        }
    }

    /// Changes what the path should carry; a round follows at once.
    pub fn set_expected(&mut self, expected: u16, now: Instant) {
        let expected = expected.max(self.config.small.saturating_add(1));
        if expected != self.expected {
            self.expected = expected;
            self.rest(now);
        }
    }

    /// Tells that a probe was acknowledged. An acknowledgement of a probe that was not sent, or too long ago,
    /// changes nothing.
    pub fn on_ack(&mut self, nonce: u64, size: u16, now: Instant) {
        let Some(position) = self.outstanding.iter().position(|sent| (sent.0, sent.1) == (nonce, size))
        else {
            return;
        };
        let Some((_, _, sent)) = self.outstanding.remove(position) else { return };
        let age = now.saturating_duration_since(sent);
        if age > ANSWER_AGE_MAX {
            self.counts.lost += 1;
            return;
        }
        self.counts.answered += 1;
        self.rtt = Some(self.rtt.map_or(age, |rtt| rtt.mul_f64(0.8) + age.mul_f64(0.2)));
        // An answer that comes after the end of its round (a machine short of CPU) still tells of the size.
        if let Phase::Search { low, .. } | Phase::Confirm { low } = self.phase
            && size > low
        {
            let high = match self.phase {
                Phase::Search { high, .. } if high > size => high,
                _ => self.expected,
            };
            self.phase = Phase::Search { low: size.min(self.expected - 1), high, silent: 0 };
        }
        let Some(round) = &mut self.round else { return };
        for (candidate, answered) in &mut round.sizes {
            *answered |= *candidate == size;
        }
        // One answer to the full size says all there is to know.
        if size == self.expected || round.sizes.iter().all(|(_, answered)| *answered) {
            round.ends = now;
        }
    }

    /// Tells that the peer's kernel refused a probe because nobody listens for it.
    pub fn on_refusal(&mut self, now: Instant) {
        self.refused = Some(now);
    }

    /// Goes on to `now`; returns what to send. To be called when [`Self::wakeup`] is reached.
    pub fn poll(&mut self, now: Instant) -> Vec<Probe> {
        if let Some(mut round) = self.round.take_if(|round| round.ends <= now) {
            round.sizes.sort_unstable();
            self.conclude(&round, now);
        }
        self.give_up(now);
        let timeout = self.timeout();
        match &mut self.round {
            None if self.next <= now => {
                let (sizes, copies) = self.sizes();
                let spacing = timeout / u32::from(copies);
                let round = Round {
                    sizes: sizes.iter().map(|size| (*size, false)).collect(),
                    copies: copies - 1,
                    again: now + spacing / 2,
                    ends: now + timeout,
                };
                self.round = Some(round);
                self.send(&sizes, now)
            }
            Some(round) if round.copies > 0 && round.again <= now => {
                round.copies -= 1;
                round.again = now + timeout / 4;
                let missing: Vec<u16> =
                    round.sizes.iter().filter(|(_, answered)| !answered).map(|(size, _)| *size).collect();
                self.send(&missing, now)
            }
            _ => Vec::new(),
        }
    }

    /// When [`Self::poll`] has something to do again.
    pub fn wakeup(&self) -> Instant {
        match &self.round {
            None => self.next,
            Some(round) if round.copies > 0 => round.again.min(round.ends),
            Some(round) => round.ends,
        }
    }

    /// What is known.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// What the path should carry.
    pub fn expected(&self) -> u16 {
        self.expected
    }

    /// Smoothed time from probe to acknowledgement.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// What became of the probes.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn timeout(&self) -> Duration {
        // Copies go out within the first half, so their answers come in time, too.
        let guess = self.rtt.map_or(self.config.timeout_min * 2, |rtt| rtt.mul_f64(2.5));
        guess.clamp(self.config.timeout_min, self.config.timeout_max.max(self.config.timeout_min))
    }

    /// Sizes of the next round, and how often each is sent as long as it is not answered.
    fn sizes(&self) -> (Vec<u16>, u8) {
        let mut sizes = vec![self.config.small, self.expected];
        let copies = match (self.phase, self.verdict) {
            (Phase::Watch, Verdict::Narrow { found, .. }) => {
                // Is it still so, and does it end where it ended?
                sizes.extend([found, found.saturating_add(1)]);
                2
            }
            (Phase::Watch | Phase::Suspect { .. }, _) => 1,
            (Phase::Search { low, high, .. }, _) => {
                let (start, width) = (u32::from(low), u32::from(high.saturating_sub(low)));
                let cuts = CUTS.min(width.saturating_sub(1));
                // Below u16::MAX, because each is below `high`.
                sizes.extend((1..=cuts).map(|cut| (start + width * cut / (cuts + 1)) as u16));
                2
            }
            (Phase::Confirm { low }, _) => {
                sizes.extend([low, low.saturating_add(1)]);
                3
            }
        };
        sizes.retain(|size| *size <= self.expected);
        sizes.sort_unstable();
        sizes.dedup();
        (sizes, copies)
    }

    fn send(&mut self, sizes: &[u16], now: Instant) -> Vec<Probe> {
        let probes: Vec<Probe> =
            sizes.iter().map(|size| Probe { size: *size, nonce: self.nonce() }).collect();
        for probe in &probes {
            if self.outstanding.len() == OUTSTANDING_MAX {
                self.outstanding.pop_front();
                self.counts.lost += 1;
            }
            self.outstanding.push_back((probe.nonce, probe.size, now));
        }
        probes
    }

    /// Counts as lost what is not answered any more.
    fn give_up(&mut self, now: Instant) {
        let old = |(_, _, sent): &mut _| now.saturating_duration_since(*sent) > ANSWER_AGE_MAX;
        while self.outstanding.pop_front_if(old).is_some() {
            self.counts.lost += 1;
        }
    }

    /// SplitMix64.
    fn nonce(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// What a finished round means. Its sizes are sorted.
    fn conclude(&mut self, round: &Round, now: Instant) {
        let answered = |size: u16| round.sizes.contains(&(size, true));
        let largest = round.sizes.iter().rev().find(|(_, answered)| *answered).map(|(size, _)| *size);
        if largest == Some(self.expected) {
            self.verdict = Verdict::Proven { mtu: self.expected };
            self.searches = 0;
            return self.rest_a_while(now);
        }
        self.phase = match (self.phase, largest) {
            (Phase::Watch, None) => self.suspect(0, 1),
            (Phase::Watch, Some(_)) => match self.verdict {
                Verdict::Narrow { expected, found } if expected == self.expected => {
                    if answered(found.saturating_add(1)) {
                        Phase::Search { low: found + 1, high: self.expected, silent: 0 }
                    } else if answered(found) {
                        return self.rest_a_while(now);
                    } else {
                        self.suspect(1, 0)
                    }
                }
                _ => self.suspect(1, 0),
            },
            (Phase::Suspect { lost, silent }, None) => self.suspect(lost, silent.saturating_add(1)),
            (Phase::Suspect { lost, silent }, Some(_)) => self.suspect(lost.saturating_add(1), silent),
            (Phase::Search { low, high, silent }, None) => {
                let silent = silent.saturating_add(1);
                if silent >= self.config.silent_attempts {
                    self.suspect(0, silent)
                } else {
                    Phase::Search { low, high, silent }
                }
            }
            (Phase::Search { low, .. }, Some(largest)) => {
                let low = low.max(largest);
                let high = round.sizes.iter().map(|(size, _)| *size).find(|size| *size > low);
                let high = high.unwrap_or(self.expected);
                if high - low <= 1 { Phase::Confirm { low } } else { Phase::Search { low, high, silent: 0 } }
            }
            (Phase::Confirm { low }, Some(largest)) if largest > low => {
                // What was lost before was lost by chance.
                self.search(largest, now)
            }
            (Phase::Confirm { low }, Some(largest)) if largest == low => {
                self.verdict = Verdict::Narrow { expected: self.expected, found: low };
                self.searches = 0;
                return self.rest_a_while(now);
            }
            // The path changed during the search.
            (Phase::Confirm { .. }, Some(_)) => self.search(self.config.small, now),
            (Phase::Confirm { .. }, None) => self.suspect(0, 1),
        };
        if let Phase::Suspect { lost, silent } = self.phase {
            if lost >= self.config.attempts {
                self.phase = self.search(self.config.small, now);
            } else if silent >= self.config.silent_attempts {
                let refused =
                    self.refused.is_some_and(|at| now.saturating_duration_since(at) <= REFUSAL_AGE_MAX);
                self.verdict = if refused { Verdict::Refused } else { Verdict::Unreachable };
                self.searches = 0;
                return self.rest_a_while(now);
            }
        }
        if self.phase != Phase::Watch {
            self.next = now;
        }
    }

    fn suspect(&self, lost: u8, silent: u8) -> Phase {
        // To ask a peer that is known to be silent more often than the interval would help nobody.
        if matches!(self.verdict, Verdict::Unreachable | Verdict::Refused) && lost == 0 {
            return Phase::Suspect { lost, silent: self.config.silent_attempts };
        }
        Phase::Suspect { lost, silent }
    }

    /// Begins a search above `low`, unless several have come to nothing: then the path changes all the time,
    /// and is looked at again after the usual pause.
    fn search(&mut self, low: u16, now: Instant) -> Phase {
        self.searches += 1;
        if self.searches > SEARCHES_MAX {
            self.searches = 0;
            self.next = now + self.pause();
            return Phase::Watch;
        }
        if self.expected - low <= 1 {
            Phase::Confirm { low }
        } else {
            Phase::Search { low, high: self.expected, silent: 0 }
        }
    }

    fn rest(&mut self, until: Instant) {
        self.phase = Phase::Watch;
        self.round = None;
        self.next = until;
    }

    fn rest_a_while(&mut self, now: Instant) {
        let pause = self.pause();
        self.rest(now + pause);
    }

    /// The interval, a tenth more or less, so that the nodes of a cluster do not probe in step.
    fn pause(&mut self) -> Duration {
        let jitter = 0.9 + 0.2 * ((self.nonce() >> 40) as f64 / f64::from(1 << 24));
        self.config.interval.mul_f64(jitter)
    }
}
