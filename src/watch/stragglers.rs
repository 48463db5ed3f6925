//! Which ranks compute more slowly than the others, by the times that travel with each step.

use std::collections::VecDeque;

/// Steps over which a rank is judged. Its median counts, so that five odd steps name nobody.
const WINDOW: usize = 10;

/// A rank is slow from this multiple of the median rank's time on, ...
const SLOW: f64 = 1.5;

/// ... and by at least this many milliseconds: what an operating system takes from a process now and then is no fault ...
const LEAST_MS: f64 = 5.0;

/// ... and has been so for as many steps: an overloaded machine holds up one rank for a while, and then another ...
const LASTING: usize = 8;

/// ... until it is below this multiple again.
const RECOVERED: f64 = 1.25;

/// A rank that has become slow.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct Straggler {
    pub rank: usize,
    /// Its median time over the window.
    pub compute_ms: f64,
    /// The median rank's.
    pub median_ms: f64,
}

impl Straggler {
    /// How many times as long as the median rank it takes.
    pub fn factor(&self) -> f64 {
        self.compute_ms / self.median_ms
    }
}

/// The last steps' times of each rank.
#[derive(Default)]
pub struct Stragglers {
    windows: Vec<VecDeque<f64>>,
    /// For how many steps a rank has been slow; from [`LASTING`] on it is named, and stays so until it has recovered.
    slow_for: Vec<usize>,
}

impl Stragglers {
    /// Takes each rank's milliseconds of a step. Returns the ranks that are slow now and were not before.
    pub fn step(&mut self, times: &[f64]) -> Vec<Straggler> {
        self.windows.resize_with(times.len(), VecDeque::new);
        self.slow_for.resize(times.len(), 0);
        for (window, &time) in self.windows.iter_mut().zip(times) {
            window.truncate(WINDOW - 1);
            window.push_front(time);
        }
        if self.windows.iter().any(|window| window.len() < WINDOW) {
            return Vec::new();
        }
        let medians: Vec<f64> = self.windows.iter().map(|window| median(window.iter().copied())).collect();
        let median_ms = median(medians.iter().copied());
        let mut found = Vec::new();
        for (rank, (&compute_ms, slow_for)) in medians.iter().zip(&mut self.slow_for).enumerate() {
            let slow = compute_ms >= SLOW * median_ms && compute_ms >= median_ms + LEAST_MS;
            let recovering = *slow_for >= LASTING && compute_ms >= RECOVERED * median_ms;
            *slow_for = if slow || recovering { *slow_for + 1 } else { 0 };
            if *slow_for == LASTING {
                found.push(Straggler { rank, compute_ms, median_ms });
            }
        }
        found
    }
}

/// The lower median: of two ranks the faster one's, so that half the ranks may be slow and are measured by the others.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::mix;

    const WORLDS: [usize; 4] = [1, 2, 3, 8];

    /// From 0 to below 1, the same in every run.
    fn uniform(seed: u64, step: usize, rank: usize) -> f64 {
        (mix(mix(seed, step as u64), rank as u64) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A step's times around `ms`: a fifth of noise, and now and then a step that takes five times as long.
    fn noisy(seed: u64, step: usize, ranks: usize, ms: f64) -> Vec<f64> {
        let time = |rank| {
            let odd = if uniform(seed + 1, step, rank) < 0.05 { 5.0 } else { 1.0 };
            ms * odd * (0.9 + 0.2 * uniform(seed, step, rank))
        };
        (0..ranks).map(time).collect()
    }

    #[test]
    fn quiet_ranks_are_never_named() {
        for ranks in WORLDS {
            for (seed, ms) in [(1, 3.0), (2, 40.0), (3, 1000.0)] {
                let mut stragglers = Stragglers::default();
                for step in 0..10_000 {
                    let found = stragglers.step(&noisy(seed, step, ranks, ms));
                    assert_eq!(found, [], "{ranks} ranks, {ms} ms, step {step}");
                }
            }
        }
    }

    #[test]
    fn a_rank_slowed_twofold_is_named_once_within_twenty_steps() {
        for ranks in &WORLDS[1..] {
            for slow in 0..*ranks {
                let mut stragglers = Stragglers::default();
                let mut events = Vec::new();
                for step in 1..=500 {
                    let mut times = noisy(7, step, *ranks, 40.0);
                    // Slow from step 101 to 200 and from 301 on.
                    if (101..=200).contains(&step) || step > 300 {
                        times[slow] *= 2.0;
                    }
                    events.extend(stragglers.step(&times).into_iter().map(|found| (step, found)));
                }
                assert_eq!(events.len(), 2, "{events:?}");
                for (&(step, found), begun) in events.iter().zip([100, 300]) {
                    assert!((begun + 1..=begun + 20).contains(&step), "named at step {step}");
                    assert_eq!(found.rank, slow);
                    assert!((1.5..2.5).contains(&found.factor()), "{found:?}");
                }
            }
        }
    }

    #[test]
    fn one_rank_alone_and_a_world_that_slows_together_are_no_stragglers() {
        for ranks in WORLDS {
            let mut stragglers = Stragglers::default();
            for step in 0..200 {
                let ms = if ranks == 1 && step % 40 > 20 { 400.0 } else { 40.0 + step as f64 };
                assert_eq!(stragglers.step(&vec![ms; ranks]), []);
            }
        }
    }

    #[test]
    fn half_the_ranks_may_be_slow() {
        let mut stragglers = Stragglers::default();
        let found: Vec<usize> =
            (0..20).flat_map(|_| stragglers.step(&[90.0, 40.0, 90.0, 40.0])).map(|found| found.rank).collect();
        assert_eq!(found, [0, 2]);
    }

    #[test]
    fn a_few_milliseconds_are_nobodys_fault() {
        let mut stragglers = Stragglers::default();
        assert!((0..50).all(|_| stragglers.step(&[3.0, 7.0, 3.0]).is_empty()));
    }
}
