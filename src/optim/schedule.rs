//! The learning rate's course.

use crate::config::{Optim, Schedule};

/// The learning rate of a step, `step` counted from 1, of `steps` in all.
///
/// Every schedule begins with a linear rise over `warmup_steps`. Then `constant` stays; `cosine` (Loshchilov and Hutter
/// 2017) and `linear` fall to `min_lr` at `decay_steps`, or at `steps` if that is 0; `wsd` stays and falls linearly
/// over the last `decay_steps` (warm-up-stable-decay, Hu et al. 2024).
pub fn learning_rate(optim: &Optim, step: usize, steps: usize) -> f64 {
    let warmup = optim.warmup_steps;
    if step < warmup {
        return optim.lr * step as f64 / warmup as f64;
    }
    let (from, to) = match (optim.schedule, optim.decay_steps) {
        (Schedule::Constant, _) => return optim.lr,
        (Schedule::Wsd, length) => (steps.saturating_sub(length).max(warmup), steps),
        (Schedule::Cosine | Schedule::Linear, 0) => (warmup, steps),
        (Schedule::Cosine | Schedule::Linear, end) => (warmup, end),
    };
    let done = if to > from { (step.saturating_sub(from) as f64 / (to - from) as f64).min(1.0) } else { 1.0 };
    let left = match optim.schedule {
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        _ => 1.0 - done,
    };
    optim.min_lr + (optim.lr - optim.min_lr) * left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optim(schedule: Schedule, decay_steps: usize) -> Optim {
        Optim { lr: 1.0, min_lr: 0.1, warmup_steps: 10, decay_steps, schedule, ..Optim::default() }
    }

    #[test]
    fn each_schedule_at_its_corners() {
        let cases = [
            (Schedule::Constant, 0, [(1, 0.1), (10, 1.0), (60, 1.0), (100, 1.0)]),
            (Schedule::Cosine, 0, [(1, 0.1), (10, 1.0), (55, 0.55), (100, 0.1)]),
            (Schedule::Linear, 0, [(1, 0.1), (10, 1.0), (55, 0.55), (100, 0.1)]),
            (Schedule::Linear, 50, [(1, 0.1), (10, 1.0), (30, 0.55), (70, 0.1)]),
            (Schedule::Wsd, 20, [(1, 0.1), (80, 1.0), (90, 0.55), (100, 0.1)]),
        ];
        for (schedule, decay, points) in cases {
            for (step, expected) in points {
                let found = learning_rate(&optim(schedule, decay), step, 100);
                assert!((found - expected).abs() < 1e-12, "{schedule:?} at step {step}: {found}, expected {expected}");
            }
        }
    }

    #[test]
    fn no_warm_up_begins_at_the_full_rate() {
        let optim = Optim { warmup_steps: 0, ..optim(Schedule::Constant, 0) };
        assert_eq!(learning_rate(&optim, 1, 10), 1.0);
    }
}
