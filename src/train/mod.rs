//! Training. The loop and the step are below; beside them: what comes before the first step ([`start`]), the data
//! folder ([`open_data`]), the gradients' way over the ranks ([`gradients`]), where the time of a step goes
//! ([`timeline`]), what a step came to ([`report`]), what is done between two steps ([`between`]), and numbers that are
//! not finite ([`nonfinite`]).

mod between;
mod data;
pub mod documents;
mod dry_run;
pub mod evaluate;
mod gradients;
mod memory;
mod nonfinite;
pub mod prove;
mod report;
mod start;
mod timeline;

use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

pub use self::data::open_data;
pub use self::dry_run::dry_run;
use self::evaluate::Evaluation;
use self::gradients::Gradients;
use self::report::{Report, Speed};
use self::timeline::{Part, Timeline};
use crate::comm::Comm;
use crate::config::{Plan, Precision};
use crate::data::loader::{Batch, Loader};
use crate::error::Result;
use crate::model::Gpt;
use crate::optim::adamw::{norm, squares, AdamW};
use crate::optim::schedule::learning_rate;
use crate::random::mix;
use crate::run::checkpoint::{Saving, State};
use crate::run::{Recorder, RunDir};
use crate::stop::StopRequest;
use crate::tokenizer::Tokenizer;
use crate::torch::{self, Marks};
use crate::watch::{Pace, Phase, Watchdog};

/// Where a run begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// At the newest good checkpoint of the run directory, or at the first step.
    Auto,
    /// At the first step; a directory that holds checkpoints is refused.
    Never,
    /// At this checkpoint, or this run's newest.
    From(PathBuf),
}

/// Trains as planned, in a run directory, from where `resume` says.
///
/// # Errors
/// Every class: [`Error`]. Preempted, if a signal asked for a stop and the state was saved.
pub fn train(
    comm: &mut Comm,
    watchdog: &Watchdog,
    stop: &StopRequest,
    plan: Plan,
    run_dir: &Path,
    resume: &Resume,
    allowed: &[String],
) -> Result<()> {
    watchdog.enter(Phase::StartUp, 0);
    let device = torch::select(plan.config.device.name(), comm.local_rank)?;
    if plan.config.deterministic {
        torch::use_deterministic_kernels();
    }
    watchdog.enter(Phase::StartUp, 0);
    comm.use_device(device)?;
    watchdog.enter(Phase::StartUp, 0);
    let mut trainer = Trainer::new(comm, watchdog, device, stop, plan, run_dir)?;
    trainer.begin(resume, allowed)?;
    trainer.announce();
    let done = trainer.run();
    trainer.say_share();
    done
}

/// The type that a precision computes with.
pub fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

struct Trainer<'a> {
    comm: &'a Comm,
    watchdog: &'a Watchdog,
    plan: Plan,
    dir: RunDir,
    device: Device,
    marks: Marks,
    tokenizer: Tokenizer,
    tokenizer_file: PathBuf,
    /// The rank that has verified this one's data.
    verifier: usize,
    loader: Loader,
    valid: Option<Evaluation>,
    model: Gpt,
    gradients: Gradients,
    optimizer: AdamW,
    state: State,
    stop: &'a StopRequest,
    /// FLOP/s of this rank's device.
    peak: f64,
    /// Whether cuDNN's attention may compute micro-steps: they have one shape, and no dropout that it would round.
    cudnn_attention: bool,
    /// The step that this process began after.
    from: usize,
    /// Sequences that it has computed in steps done.
    sequences: usize,
    /// After how many micro-steps the ranks ask each other whether to give a step up.
    asks_every: usize,
    speed: Speed,
    /// How long this rank computes.
    pace: Pace,
    /// Batches skipped since the last update.
    skipped: usize,
    /// Whether no rank is still writing a checkpoint.
    written: bool,
    /// The checkpoint that is being written, on the ranks that write.
    saving: Option<Saving>,
    /// Rank 0's files, once the run has begun.
    recorder: Option<Recorder>,
}

impl Trainer<'_> {
    /// The loop: a step, its row, and what is due between two steps.
    fn run(&mut self) -> Result<()> {
        let steps = self.plan.config.train.steps;
        if (1..=steps).contains(&self.state.step) {
            self.between_steps()?; // what a stopped run left undone
        }
        while self.state.step < steps {
            let Some(report) = self.step()? else { return self.preempt() };
            self.record(&report)?;
            if report.stop && self.state.step < steps {
                return self.preempt();
            }
            self.between_steps()?;
        }
        Ok(())
    }

    /// One optimizer step: this rank's micro-batches, the sum over the ranks, the update. A GPU is given all of it, and waited
    /// for once. `None` if a request to stop came meanwhile, early enough to give the step up: nothing has changed then.
    fn step(&mut self) -> Result<Option<Report>> {
        let step = self.state.step + 1;
        let mut timeline = Timeline::begin(self.comm, self.watchdog, &self.marks, step)?;
        let global = self.loader.global_batch(self.state.step); // sample numbers, (batch_size,), of all ranks
        let mut loss = Tensor::zeros([1], (Kind::Double, self.device));
        self.model.parameters.zero_grad();
        torch::allow_cudnn_attention(self.cudnn_attention);
        for micro_step in 0..self.plan.accumulation {
            if self.gives_up(step, micro_step, &mut timeline)? {
                return Ok(None);
            }
            timeline.enter(Part::Data)?;
            let batch = self.loader.micro_batch(&global, micro_step, self.device)?;
            timeline.enter(Part::Compute)?;
            loss += self.forward_backward(&batch, step, micro_step); // (1,)
        }
        torch::allow_cudnn_attention(false);
        timeline.enter(Part::Exchange)?;
        self.gradients.sum(self.comm, &mut self.model.parameters.grad)?;
        let lr = learning_rate(&self.plan.config.optim, step, self.plan.config.train.steps);
        let norm = self.update(step, lr, &mut timeline)?; // (1,)
        let numbers = Tensor::cat(&[loss, norm], 0); // before the wait, so that there is one
        let (times, exchange) = timeline.end()?;
        let numbers: Vec<f64> = numbers.try_into()?;
        let mine = Report { loss: numbers[0], grad_norm: numbers[1], lr, times, ..Report::default() };
        self.agree(mine, &global, exchange).map(Some)
    }

    /// Adds a micro-batch's gradients to the flat gradient, and returns its part of the loss, (1,) fp64.
    fn forward_backward(&mut self, batch: &Batch, step: usize, micro_step: usize) -> Tensor {
        let seed = self.dropout_seed(step, micro_step);
        // Only the last micro-step makes the gradients whole.
        let last = micro_step + 1 == self.plan.accumulation;
        let mut finished = |grad: &Tensor, end| {
            if last {
                self.gradients.ready(self.comm, grad, end);
            }
        };
        let Batch { inputs, targets, weights, counted } = batch;
        self.model.forward_backward(inputs, targets, weights, counted.as_ref(), seed, &mut finished)
    }

    /// Changes the weights by the summed gradient, each rank its part of them, and hands them round; nothing changes if the
    /// gradient's norm is not finite, which it is not if a loss is not ([`Gpt::forward_backward`]). Returns the norm.
    fn update(&mut self, step: usize, lr: f64, timeline: &mut Timeline) -> Result<Tensor> {
        let parameters = &mut self.model.parameters;
        timeline.enter(Part::Optimizer)?;
        let mut squares = squares(parameters, &self.optimizer.ranges);
        if self.gradients.is_sharded() {
            timeline.enter(Part::Exchange)?;
            squares = self.comm.add_up(&squares)?;
            timeline.enter(Part::Optimizer)?;
        }
        let norm = norm(&squares);
        self.optimizer.step(parameters, step, lr, &norm);
        // Bad weights are not sent to other ranks, which might hide whose they are. A GPU's host does not know yet;
        // there the masked update sends the old weights.
        if parameters.flat.device().is_cuda() || norm.double_value(&[0]).is_finite() {
            parameters.publish();
            timeline.enter(Part::Exchange)?;
            // In bf16 that is half of what the fp32 weights are. Those are gathered where they are wanted.
            self.gradients.gather(self.comm, parameters.compute())?;
        }
        Ok(norm)
    }

    /// Makes the fp32 weights whole on each rank, which under ZeRO-1 has updated but its part; all ranks call it.
    fn gather_weights(&self) -> Result<()> {
        let parameters = &self.model.parameters;
        match parameters.copy() {
            None => Ok(()), // a step has gathered them
            Some(_) => self.gradients.gather(self.comm, &parameters.flat),
        }
    }

    /// Dropout draws the same, whenever and however often a micro-step is computed.
    fn dropout_seed(&self, step: usize, micro_step: usize) -> u64 {
        [step, micro_step, self.comm.rank].iter().fold(self.loader.seed, |seed, &n| mix(seed, n as u64))
    }

    /// Marks progress between two steps.
    fn enter(&self, phase: Phase) {
        self.watchdog.enter(phase, self.state.step);
    }
}
