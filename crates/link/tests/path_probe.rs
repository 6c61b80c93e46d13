//! The state machine of a path against a simulated network: no sockets, no waiting.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use podway_link::probe::{PathConfig, PathProbe, Verdict};

/// A network that carries packets up to a size, loses some, and answers after a while.
struct Net {
    mtu: u16,
    alive: bool,
    rtt: Duration,
    /// Lost, in percent, each way together.
    loss: u64,
    random: u64,
}

impl Net {
    fn new(mtu: u16) -> Self {
        Self { mtu, alive: true, rtt: Duration::from_millis(1), loss: 0, random: 1 }
    }

    fn lost(&mut self) -> bool {
        // xorshift64: the same run every time.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 100 < self.loss
    }
}

struct Simulation {
    start: Instant,
    now: Instant,
    path: PathProbe,
    answers: BinaryHeap<Reverse<(Instant, u64, u16)>>,
    sent: usize,
    /// Verdicts in the order they came, with the time since the start.
    history: Vec<(Duration, Verdict)>,
    first_full_loss: Option<Instant>,
}

impl Simulation {
    fn new(expected: u16) -> Self {
        let start = Instant::now();
        Self {
            start,
            now: start,
            path: PathProbe::new(expected, PathConfig::default(), 42, start),
            answers: BinaryHeap::new(),
            sent: 0,
            history: Vec::new(),
            first_full_loss: None,
        }
    }

    fn run(&mut self, net: &mut Net, time: Duration) -> Verdict {
        let ends = self.now + time;
        let mut steps = 0;
        while self.now < ends {
            steps += 1;
            assert!(steps < 1_000_000, "the machine spins without time passing");
            while let Some(Reverse((at, nonce, size))) = self.answers.peek().copied() {
                if at > self.now {
                    break;
                }
                self.answers.pop();
                self.path.on_ack(nonce, size, self.now);
            }
            if self.path.wakeup() <= self.now {
                let before = self.path.verdict();
                for probe in self.path.poll(self.now) {
                    self.sent += 1;
                    let carried = net.alive && probe.size <= net.mtu && !net.lost();
                    if carried {
                        self.answers.push(Reverse((self.now + net.rtt, probe.nonce, probe.size)));
                    } else if probe.size == self.path.expected() {
                        self.first_full_loss.get_or_insert(self.now);
                    }
                }
                if self.path.verdict() != before {
                    self.history.push((self.now - self.start, self.path.verdict()));
                }
            }
            let answer = self.answers.peek().map(|Reverse((at, _, _))| *at);
            let next = answer.map_or(self.path.wakeup(), |at| at.min(self.path.wakeup()));
            self.now = next.max(self.now).min(ends);
        }
        self.path.verdict()
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_good_path_is_proven_at_once_and_costs_two_packets_a_round() {
    let (mut net, mut simulation) = (Net::new(1500), Simulation::new(1500));
    assert_eq!(simulation.run(&mut net, SECOND), Verdict::Proven { mtu: 1500 });
    assert!(simulation.history[0].0 < Duration::from_millis(10));
    simulation.run(&mut net, 299 * SECOND);
    assert_eq!(simulation.history.len(), 1);
    // 100 rounds of 3 s, a tenth more or less.
    assert!((180..=230).contains(&simulation.sent), "{} packets in 5 minutes", simulation.sent);
}

#[test]
fn the_exact_size_is_found_within_five_seconds_of_the_first_loss() {
    let cases = [
        (1500, 1400),
        (1500, 1499),
        (1500, 1450),
        (1500, 1280),
        (1500, 576),
        (1500, 128),
        (1500, 129),
        (9000, 1500),
        (9000, 8999),
        (9000, 8950),
        (65535, 9000),
        (1280, 1279),
        (129, 128),
    ];
    for (expected, found) in cases {
        for rtt in
            [Duration::ZERO, Duration::from_millis(1), Duration::from_millis(80), Duration::from_millis(300)]
        {
            let mut net = Net::new(expected);
            net.rtt = rtt;
            let mut simulation = Simulation::new(expected);
            assert_eq!(simulation.run(&mut net, 10 * SECOND), Verdict::Proven { mtu: expected });
            simulation.first_full_loss = None;
            net.mtu = found;
            assert_eq!(
                simulation.run(&mut net, 20 * SECOND),
                Verdict::Narrow { expected, found },
                "{expected} -> {found} rtt {rtt:?} {:?}",
                simulation.history
            );
            let (at, _) = simulation.history[1];
            let took = at - (simulation.first_full_loss.unwrap() - simulation.start);
            // With a round trip of 300 ms each of about ten rounds takes 750 ms.
            let limit = if rtt > Duration::from_millis(100) { 10 * SECOND } else { 5 * SECOND };
            assert!(took < limit, "{expected} -> {found} rtt {rtt:?}: {took:?}");
            assert_eq!(simulation.history.len(), 2, "{:?}", simulation.history);
        }
    }
}

#[test]
fn a_path_that_is_narrow_from_the_start_is_found() {
    let (mut net, mut simulation) = (Net::new(1400), Simulation::new(1500));
    simulation.run(&mut net, 5 * SECOND);
    assert_eq!(simulation.history.len(), 1);
    assert_eq!(simulation.history[0].1, Verdict::Narrow { expected: 1500, found: 1400 });
}

#[test]
fn a_dead_peer_is_unreachable_and_never_narrow() {
    // From the start.
    let mut net = Net::new(1500);
    net.alive = false;
    let mut simulation = Simulation::new(1500);
    assert_eq!(simulation.run(&mut net, 60 * SECOND), Verdict::Unreachable);
    assert_eq!(simulation.history.len(), 1);
    assert!(simulation.sent < 80, "{} packets to a dead peer in a minute", simulation.sent);
    // It comes to life.
    net.alive = true;
    assert_eq!(simulation.run(&mut net, 5 * SECOND), Verdict::Proven { mtu: 1500 });
    // It dies: at rest, and at each moment of a search.
    for moment in 0..60 {
        let (mut net, mut simulation) = (Net::new(1500), Simulation::new(1500));
        simulation.run(&mut net, SECOND);
        net.mtu = 1400;
        simulation.run(&mut net, 2 * SECOND + Duration::from_millis(50 * moment));
        net.alive = false;
        assert_eq!(simulation.run(&mut net, 20 * SECOND), Verdict::Unreachable, "moment {moment}");
        // A verdict that came before the death, or on answers from before it, was true.
        for (at, verdict) in &simulation.history {
            if let Verdict::Narrow { found, .. } = verdict {
                assert_eq!(*found, 1400, "moment {moment} at {at:?}: {:?}", simulation.history);
            }
        }
        let expected_last = simulation.history.last().map(|(_, verdict)| *verdict);
        assert_eq!(expected_last, Some(Verdict::Unreachable));
    }
}

#[test]
fn healing_and_further_changes_are_reported() {
    let (mut net, mut simulation) = (Net::new(1500), Simulation::new(1500));
    let steps = [
        (1400, Verdict::Narrow { expected: 1500, found: 1400 }),
        (1300, Verdict::Narrow { expected: 1500, found: 1300 }),
        (1450, Verdict::Narrow { expected: 1500, found: 1450 }),
        (1451, Verdict::Narrow { expected: 1500, found: 1451 }),
        (1500, Verdict::Proven { mtu: 1500 }),
        (1492, Verdict::Narrow { expected: 1500, found: 1492 }),
        (9000, Verdict::Proven { mtu: 1500 }),
    ];
    simulation.run(&mut net, SECOND);
    for (mtu, verdict) in steps {
        net.mtu = mtu;
        assert_eq!(simulation.run(&mut net, 10 * SECOND), verdict);
    }
    assert_eq!(simulation.history.len(), 1 + steps.len(), "{:?}", simulation.history);
}

#[test]
fn random_loss_is_not_a_narrow_path() {
    for loss in [1, 5, 10, 20] {
        for seed in 1..=20 {
            let mut net = Net::new(1500);
            (net.loss, net.random) = (loss, seed * 7919);
            let mut simulation = Simulation::new(1500);
            simulation.run(&mut net, 600 * SECOND);
            let accused: Vec<_> =
                simulation.history.iter().filter(|(_, v)| *v != Verdict::Proven { mtu: 1500 }).collect();
            assert!(accused.is_empty(), "loss {loss} % seed {seed}: {accused:?}");
        }
    }
}

#[test]
fn a_narrow_path_with_loss_is_found_exactly() {
    for loss in [1, 5, 10] {
        for seed in 1..=20 {
            let mut net = Net::new(1400);
            (net.loss, net.random) = (loss, seed * 104_729);
            let mut simulation = Simulation::new(1500);
            let verdict = simulation.run(&mut net, 30 * SECOND);
            assert_eq!(verdict, Verdict::Narrow { expected: 1500, found: 1400 }, "loss {loss} % seed {seed}");
        }
    }
}

#[test]
fn a_changed_expectation_is_proven_anew() {
    let (mut net, mut simulation) = (Net::new(1500), Simulation::new(1500));
    simulation.run(&mut net, SECOND);
    // The uplink's MTU was raised, the network's was not.
    simulation.path.set_expected(9000, simulation.now);
    assert_eq!(simulation.run(&mut net, 6 * SECOND), Verdict::Narrow { expected: 9000, found: 1500 });
    simulation.path.set_expected(1500, simulation.now);
    assert_eq!(simulation.run(&mut net, SECOND), Verdict::Proven { mtu: 1500 });
}

#[test]
fn answers_that_were_not_asked_for_change_nothing() {
    let start = Instant::now();
    let mut path = PathProbe::new(1500, PathConfig::default(), 7, start);
    let probes = path.poll(start);
    assert_eq!(probes.iter().map(|p| p.size).collect::<Vec<_>>(), [128, 1500]);
    let later = start + Duration::from_millis(10);
    path.on_ack(probes[0].nonce ^ 1, 1500, later);
    // The right nonce with the size of another probe.
    path.on_ack(probes[0].nonce, 1500, later);
    path.poll(later);
    assert_eq!(path.verdict(), Verdict::Unknown);
    // Too late to say anything about now.
    path.on_ack(probes[1].nonce, 1500, start + Duration::from_secs(3));
    path.poll(start + Duration::from_secs(3));
    assert_eq!(path.verdict(), Verdict::Unknown);
}

#[test]
fn a_path_that_flaps_does_not_flood() {
    let (mut net, mut simulation) = (Net::new(1500), Simulation::new(1500));
    for step in 0..600 {
        net.mtu = if step % 2 == 0 { 1400 } else { 1300 };
        simulation.run(&mut net, Duration::from_millis(370));
    }
    // 222 s; a search at full speed sends about 20 packets each quarter of a second.
    assert!(simulation.sent < 222 * 80, "{}", simulation.sent);
}

#[test]
fn answers_later_than_their_round_are_not_wasted() {
    // Each answer takes longer than the shortest timeout, and the first ones come before any is known.
    for rtt in [260, 400, 700] {
        let mut net = Net::new(1400);
        net.rtt = Duration::from_millis(rtt);
        let mut simulation = Simulation::new(1500);
        let verdict = simulation.run(&mut net, 20 * SECOND);
        assert_eq!(verdict, Verdict::Narrow { expected: 1500, found: 1400 }, "rtt {rtt} ms");
    }
}

#[test]
fn every_probe_is_counted_once_as_answered_or_lost() {
    for (loss, alive, rtt, answered) in [
        (0, true, 1, 1.0..=1.0),
        (30, true, 1, 0.6..=0.8),
        (0, false, 1, 0.0..=0.0),
        // Answers that come after more than two seconds are none.
        (0, true, 2_001, 0.0..=0.0),
        (0, true, 1_900, 1.0..=1.0),
    ] {
        let (mut net, mut simulation) = (Net::new(1500), Simulation::new(1500));
        (net.loss, net.alive, net.rtt) = (loss, alive, Duration::from_millis(rtt));
        simulation.run(&mut net, 300 * SECOND);
        let counts = simulation.path.counts();
        let all = counts.answered + counts.lost;
        let share = counts.answered as f64 / all as f64;
        assert!(answered.contains(&share), "loss {loss}, alive {alive}, {rtt} ms: {counts:?}");
        // What was sent within the last two seconds may still be answered.
        let sent = simulation.sent as u64;
        assert!(all <= sent && sent - all <= 32, "{counts:?} of {sent}");
    }
}
