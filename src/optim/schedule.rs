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
    let Some((from, to)) = decay(optim, steps) else { return optim.lr };
    let done = if to > from { (step.saturating_sub(from) as f64 / (to - from) as f64).min(1.0) } else { 1.0 };
    let left = match optim.schedule {
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        _ => 1.0 - done,
    };
    optim.min_lr + (optim.lr - optim.min_lr) * left
}

/// The steps at which the decay begins and ends; `None` for a rate that stays.
pub fn decay(optim: &Optim, steps: usize) -> Option<(usize, usize)> {
    let warmup = optim.warmup_steps;
    match (optim.schedule, optim.decay_steps) {
        (Schedule::Constant, _) => None,
        (Schedule::Wsd, length) => Some((steps.saturating_sub(length).max(warmup), steps)),
        (Schedule::Cosine | Schedule::Linear, 0) => Some((warmup, steps)),
        (Schedule::Cosine | Schedule::Linear, end) => Some((warmup, end)),
    }
}

/// A smaller change of the learning rate is none that shows in the loss.
const JUMP: f64 = 0.25;

/// The learning rates of the step after `done`, as an older configuration of the run has it and as the new one has it, if the
/// change of configuration makes the rate jump there. `older` and `newer` come with their steps in all.
pub fn jump(older: (&Optim, usize), newer: (&Optim, usize), done: usize) -> Option<(f64, f64)> {
    let rate = |(optim, steps): (&Optim, usize), step| learning_rate(optim, step, steps);
    let far = |a: f64, b: f64| (a - b).abs() > JUMP * a.max(b);
    let (last, then, now) = (rate(older, done), rate(older, done + 1), rate(newer, done + 1));
    (far(then, now) && far(last, now)).then_some((then, now))
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
    fn a_schedule_that_is_made_longer_or_shorter_jumps() {
        let cosine = optim(Schedule::Cosine, 0);
        let found = jump((&cosine, 100), (&cosine, 200), 100);
        assert!(matches!(found, Some((then, now)) if then == 0.1 && (now - 0.58).abs() < 0.01), "{found:?}");
        assert!(jump((&cosine, 200), (&cosine, 100), 90).is_some());
        // Its own course is no jump, not even in the warm-up; nor is what a decay that is fixed leaves alone.
        assert_eq!(jump((&cosine, 100), (&cosine, 100), 1), None);
        let fixed = optim(Schedule::Cosine, 100);
        assert_eq!(jump((&fixed, 100), (&fixed, 200), 100), None);
        assert_eq!(jump((&cosine, 100), (&fixed, 200), 100), None);
        let higher = Optim { lr: 2.0, ..optim(Schedule::Constant, 0) };
        assert_eq!(jump((&optim(Schedule::Constant, 0), 100), (&higher, 100), 50), Some((1.0, 2.0)));
        // The very end of a decay to nothing.
        let to_zero = Optim { min_lr: 0.0, ..optim(Schedule::Linear, 0) };
        assert!(jump((&to_zero, 100), (&to_zero, 101), 100).is_none_or(|(then, _)| then == 0.0));
    }

    #[test]
    fn no_warm_up_begins_at_the_full_rate() {
        let optim = Optim { warmup_steps: 0, ..optim(Schedule::Constant, 0) };
        assert_eq!(learning_rate(&optim, 1, 10), 1.0);
    }
}
