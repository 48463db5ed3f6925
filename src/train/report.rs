//! What a step came to: what the ranks tell each other at its end, and its row in train.csv.

use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::timeline::{Part, Timeline};
use super::Trainer;
use crate::comm::Join;
use crate::error::Result;
use crate::run::tables::{rounded, TrainRow};
use crate::torch;
use crate::watch::Phase;

/// Milliseconds between two looks of the ranks at each other within a step of many micro-batches.
const BETWEEN_LOOKS_MS: f64 = 1000.0;

/// What one optimizer step came to, alike on every rank but for the times.
#[derive(Default)]
pub(super) struct Report {
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    /// Targets counted, over all ranks.
    pub targets: u64,
    /// Whether a rank was asked to stop.
    pub stop: bool,
    pub memory_mib: f64,
    /// The pace of each rank's computing; on rank 0 only.
    pub paces: Vec<f64>,
    /// Milliseconds of each [`Part`].
    pub times: [f64; 4],
}

/// How fast it goes since the last row of train.csv.
pub(super) struct Speed {
    since: Instant,
    /// The run's tokens then.
    tokens: u64,
    /// Time since then that was no training.
    aside: Duration,
}

impl Speed {
    pub fn from(tokens: u64) -> Self {
        Self { since: Instant::now(), tokens, aside: Duration::ZERO }
    }

    /// Does not count this time.
    pub fn pause(&mut self, aside: Duration) {
        self.aside += aside;
    }

    /// Targets a second since the last call.
    fn tokens_per_s(&mut self, tokens: u64) -> f64 {
        let seconds = self.since.elapsed().saturating_sub(self.aside).as_secs_f64();
        let done = tokens - self.tokens;
        *self = Self::from(tokens);
        done as f64 / seconds
    }
}

impl Trainer<'_> {
    /// Whether the ranks give a step up before this micro-step, since one of them was asked to stop. They ask each other about
    /// once a second: a step of many micro-batches may take minutes.
    pub(super) fn gives_up(&self, step: usize, micro_step: usize, timeline: &mut Timeline) -> Result<bool> {
        self.stop.note(step, micro_step, self.plan.accumulation);
        if micro_step == 0 || !micro_step.is_multiple_of(self.asks_every) {
            return Ok(false);
        }
        timeline.enter(Part::Exchange)?;
        self.comm.any(self.stop.is_raised())
    }

    /// The one exchange of a step that decides everything: the loss of the global batch, whether to stop, whether saves are
    /// written, and how each rank fares. `mine` is what this rank knows, `since` when it began to wait for the others.
    pub(super) fn agree(&mut self, mine: Report, global: &[usize], since: Instant) -> Result<Report> {
        let Report { loss, grad_norm, lr, mut times, .. } = mine;
        let step = self.state.step + 1;
        let memory = torch::peak_memory_mib(self.device).unwrap_or(0.0);
        let writes = self.saving.as_ref().is_some_and(|saving| !saving.is_written());
        let [stop, writes] = [self.stop.is_raised(), writes].map(|flag| f64::from(u8::from(flag)));
        let compute_ms = times[Part::Compute as usize];
        let joins = [Join::Sum, Join::Most, Join::Most, Join::Most, Join::Most];
        let pace = self.pace.step(compute_ms);
        let (all, paces) = self.comm.reduce(&[loss, stop, writes, memory, compute_ms], &joins, &[pace])?;
        let [loss, stop, writes, memory_mib, most_ms] = [0, 1, 2, 3, 4].map(|place| all[place]);
        self.watchdog.enter(Phase::Step, step);
        times[Part::Exchange as usize] += since.elapsed().as_secs_f64() * 1000.0;
        if grad_norm.is_finite() {
            self.skipped = 0;
        } else {
            self.not_finite(step, global, loss, grad_norm)?;
        }
        self.written = writes == 0.0;
        self.sequences += self.loader.share(global).len();
        let micro_step_ms = most_ms / self.plan.accumulation as f64;
        self.asks_every = (BETWEEN_LOOKS_MS / micro_step_ms).max(1.0) as usize;
        Ok(Report {
            loss,
            grad_norm,
            lr,
            targets: self.loader.targets(global) as u64,
            stop: stop > 0.0,
            memory_mib,
            paces,
            times,
        })
    }

    /// Counts a step, and writes its row if one is due.
    pub(super) fn record(&mut self, report: &Report) -> Result<()> {
        self.state.step += 1;
        self.state.tokens += report.targets;
        self.state.elapsed_s += report.times.iter().sum::<f64>() / 1000.0;
        let step = self.state.step;
        let row = step.is_multiple_of(self.plan.config.train.log_every).then(|| {
            let tokens_per_s = self.speed.tokens_per_s(self.state.tokens);
            self.row(report, tokens_per_s)
        });
        if let Some(recorder) = &mut self.recorder {
            recorder.step(step, report.loss, row.as_ref())?;
            recorder.paces(step, &report.paces)?;
        }
        Ok(())
    }

    /// Says which part of the work this rank has done.
    pub(super) fn say_share(&self) {
        let (from, to) = (self.from, self.state.step);
        if to > from {
            let all = (to - from) * self.loader.batch_size;
            let (rank, mine) = (self.comm.rank, self.sequences);
            info!("rank {rank} computed {mine} of the {all} sequences of steps {} to {to}", from + 1);
            self.say_messages();
        }
    }

    /// Says how many small messages it has cost so far: what is said before the first step and at the end tells what a step
    /// costs.
    pub(super) fn say_messages(&self) {
        debug!("rank {} has sent {} messages that carry no tensor", self.comm.rank, self.comm.messages());
    }

    fn row(&self, report: &Report, tokens_per_s: f64) -> TrainRow {
        let [data_ms, compute_ms, comm_exposed_ms, optimizer_ms] = report.times.map(rounded);
        let mfu = self.model.shape.flop_per_token() * tokens_per_s / (self.comm.world_size as f64 * self.peak);
        TrainRow {
            step: self.state.step,
            tokens: self.state.tokens,
            loss: report.loss,
            ppl: report.loss.exp(),
            lr: report.lr,
            grad_norm: report.grad_norm,
            step_ms: rounded(data_ms + compute_ms + comm_exposed_ms + optimizer_ms),
            data_ms,
            compute_ms,
            comm_exposed_ms,
            optimizer_ms,
            tokens_per_s: rounded(tokens_per_s),
            mfu: Some(mfu).filter(|mfu| mfu.is_finite()),
            memory_mib: Some(rounded(report.memory_mib)).filter(|&mib| mib > 0.0),
            world_size: self.comm.world_size,
            elapsed_s: rounded(self.state.elapsed_s),
        }
    }
}
