//! Which ranks compute more slowly than the others, by the times that travel with each step. A rank keeps its own window of
//! steps ([`Pace`]), so that rank 0 has but one number of each to look at.

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

/// The times of a rank's last steps.
#[derive(Default)]
pub struct Pace(VecDeque<f64>);

impl Pace {
    /// Takes the milliseconds of a step. Returns their median over the window; not a number before that is full.
    pub fn step(&mut self, ms: f64) -> f64 {
        self.0.truncate(WINDOW - 1);
        self.0.push_front(ms);
        if self.0.len() < WINDOW {
            return f64::NAN;
        }
        median(&mut self.0.iter().copied().collect::<Vec<_>>())
    }
}

/// The ranks that have been slow.
#[derive(Default)]
pub struct Stragglers {
    /// For how many steps a rank has been slow; from [`LASTING`] on it is named, and stays so until it has recovered.
    slow_for: Vec<usize>,
}

impl Stragglers {
    /// Takes each rank's [`Pace`] after a step. Returns the ranks that are slow now and were not before.
    pub fn step(&mut self, medians: &[f64]) -> Vec<Straggler> {
        if medians.iter().any(|ms| ms.is_nan()) {
            return Vec::new();
        }
        self.slow_for.resize(medians.len(), 0);
        let median_ms = median(&mut medians.to_vec());
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
fn median(values: &mut [f64]) -> f64 {
    let middle = values.len().saturating_sub(1) / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::mix;

    const WORLDS: [usize; 4] = [1, 2, 3, 8];

    /// All ranks of a job.
    #[derive(Default)]
    struct Job {
        paces: Vec<Pace>,
        stragglers: Stragglers,
    }

    impl Job {
        fn step(&mut self, times: &[f64]) -> Vec<Straggler> {
            self.paces.resize_with(times.len(), Pace::default);
            let medians: Vec<f64> = self.paces.iter_mut().zip(times).map(|(pace, &ms)| pace.step(ms)).collect();
            self.stragglers.step(&medians)
        }
    }

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
                let mut job = Job::default();
                for step in 0..10_000 {
                    let found = job.step(&noisy(seed, step, ranks, ms));
                    assert_eq!(found, [], "{ranks} ranks, {ms} ms, step {step}");
                }
            }
        }
    }

    #[test]
    fn a_rank_slowed_twofold_is_named_once_within_twenty_steps() {
        for ranks in &WORLDS[1..] {
            for slow in 0..*ranks {
                let mut job = Job::default();
                let mut events = Vec::new();
                for step in 1..=500 {
                    let mut times = noisy(7, step, *ranks, 40.0);
                    // Slow from step 101 to 200 and from 301 on.
                    if (101..=200).contains(&step) || step > 300 {
                        times[slow] *= 2.0;
                    }
                    events.extend(job.step(&times).into_iter().map(|found| (step, found)));
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
            let mut job = Job::default();
            for step in 0..200 {
                let ms = if ranks == 1 && step % 40 > 20 { 400.0 } else { 40.0 + step as f64 };
                assert_eq!(job.step(&vec![ms; ranks]), []);
            }
        }
    }

    #[test]
    fn half_the_ranks_may_be_slow() {
        let mut job = Job::default();
        let found: Vec<usize> =
            (0..20).flat_map(|_| job.step(&[90.0, 40.0, 90.0, 40.0])).map(|found| found.rank).collect();
        assert_eq!(found, [0, 2]);
    }

    #[test]
    fn a_few_milliseconds_are_nobodys_fault() {
        let mut job = Job::default();
        assert!((0..50).all(|_| job.step(&[3.0, 7.0, 3.0]).is_empty()));
    }
}
