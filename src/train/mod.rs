//! Training: the loop, and what stands around it.

pub mod evaluate;
mod gradients;
mod nonfinite;
pub mod prove;
mod start;
mod timeline;

use std::path::{Path, PathBuf};
use std::time::Instant;

use tch::{Device, Kind, Tensor};
use tracing::{debug, info};

use self::evaluate::Evaluation;
use self::gradients::Gradients;
use self::timeline::{Laps, Part};
use crate::comm::{Comm, Deadlines};
use crate::config::{Plan, Precision};
use crate::data::loader::{Batch, Loader};
use crate::error::{Error, Result};
use crate::model::generate::{generate, Sampling};
use crate::model::Gpt;
use crate::optim::adamw::{norm, squares, AdamW};
use crate::optim::schedule::learning_rate;
use crate::random::mix;
use crate::run::checkpoint::{self, Saving, State};
use crate::run::tables::{rounded, TrainRow};
use crate::run::{Recorder, RunDir};
use crate::stop::StopRequest;
use crate::tokenizer::Tokenizer;
use crate::torch::{self, Marks};
use crate::watch::{Phase, Watchdog};

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
/// Every class: [`Error`]. Preempted, where a signal asked for a stop and the state was saved.
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
    trainer.run()
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
    /// Sequences that this process has computed.
    sequences: usize,
    /// Batches skipped since the last update.
    skipped: usize,
    /// The checkpoint that is being written, on the ranks that write.
    saving: Option<Saving>,
    /// Rank 0's files, once the run has begun.
    recorder: Option<Recorder>,
}

/// What one optimizer step came to, alike on every rank but for the times.
struct StepReport {
    loss: f64,
    grad_norm: f64,
    lr: f64,
    stop: bool,
    /// Whether no rank is still writing a checkpoint.
    written: bool,
    memory_mib: f64,
    /// Each rank's milliseconds of computing.
    compute_ms: Vec<f64>,
    /// Milliseconds: data, compute, exposed communication, optimizer.
    laps: [f64; 4],
}

impl<'a> Trainer<'a> {
    fn run(&mut self) -> Result<()> {
        let from = self.state.step;
        let done = self.steps();
        if self.state.step > from {
            info!(
                "rank {} computed {} of the {} sequences of steps {} to {}",
                self.comm.rank,
                self.sequences,
                (self.state.step - from) * self.loader.batch_size,
                from + 1,
                self.state.step
            );
        }
        done
    }

    /// The loop.
    fn steps(&mut self) -> Result<()> {
        let plan = self.plan.config.train.clone();
        match &self.recorder {
            Some(recorder) => recorder.say(|| self.announce()),
            None => self.announce(),
        }
        if (1..=plan.steps).contains(&self.state.step) {
            self.between_steps()?;
        }
        let mut since_row = Instant::now();
        let mut tokens_at_row = self.state.tokens;
        let mut pause = 0.0; // seconds since the last row that were no training
        while self.state.step < plan.steps {
            let start = Instant::now();
            let step = self.state.step + 1;
            let global = self.loader.global_batch(self.state.step);
            let report = self.step(step, &global, start)?;
            self.state.step = step;
            self.state.tokens += self.loader.targets(&global) as u64;
            self.state.elapsed_s += report.laps.iter().sum::<f64>() / 1000.0;

            let row = step.is_multiple_of(plan.log_every).then(|| {
                let seconds = since_row.elapsed().as_secs_f64() - pause;
                let tokens_per_s = (self.state.tokens - tokens_at_row) as f64 / seconds;
                (since_row, tokens_at_row, pause) = (Instant::now(), self.state.tokens, 0.0);
                row(&self.state, &report, tokens_per_s, self.mfu(tokens_per_s))
            });
            if let Some(recorder) = &mut self.recorder {
                recorder.step(step, report.loss, row.as_ref())?;
                recorder.compute_times(step, &report.compute_ms)?;
            }
            let aside = Instant::now();
            if report.written {
                self.finish_save()?;
            }
            if report.stop && step < plan.steps {
                return self.stop();
            }
            self.between_steps()?;
            pause += aside.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// Saves at once, since whoever asked may not wait; what else is due at this step is done by the resumed run.
    fn stop(&mut self) -> Result<()> {
        self.save()?;
        // A launcher may end the job as soon as one rank leaves.
        self.wait_for_save()?;
        Err(Error::Preempted(format!(
            "stopped on request after step {} of {}, saved in {}; to go on, start the same command again (with --resume \
             auto, the default)",
            self.state.step,
            self.plan.config.train.steps,
            self.dir.checkpoints().display()
        ))
        .into())
    }

    /// Evaluates, samples and saves, where that is due after the step done and has not been done yet: after a stop, the
    /// resumed run begins with what the stopped one left out.
    fn between_steps(&mut self) -> Result<()> {
        let (step, plan) = (self.state.step, &self.plan.config.train);
        let last = step == plan.steps;
        let due = |every: usize| every > 0 && (last || step.is_multiple_of(every));
        let mut save = last || due(plan.save_every);
        let sample = due(plan.sample_every);
        if due(plan.eval_every) {
            // What is on its way belongs to the best evaluation so far, which this one may change.
            self.wait_for_save()?;
            save |= self.evaluate(step)?;
        }
        if sample {
            self.sample(step)?;
        }
        if save {
            self.save()?;
        }
        if last {
            self.wait_for_save()?;
        }
        Ok(())
    }

    /// One optimizer step: this rank's micro-batches, the sum over ranks, the update. A GPU is given all of it, and waited for
    /// once.
    fn step(&mut self, step: usize, global: &[usize], start: Instant) -> Result<StepReport> {
        let mut laps = Laps::begin(&self.marks, start)?;
        self.model.parameters.zero_grad();
        let mut loss = Tensor::zeros([1], (Kind::Double, self.device));
        torch::allow_cudnn_attention(self.cudnn_attention);
        for micro_step in 0..self.plan.accumulation {
            laps.wait_for_compute(self.comm, 1)?;
            self.watchdog.enter(Phase::Step, step);
            let batch = self.loader.micro_batch(global, micro_step, self.device)?;
            laps.end(Part::Data)?;
            let seed = self.dropout_seed(step, micro_step);
            // Only the last micro-step makes the gradients whole.
            let last = micro_step + 1 == self.plan.accumulation;
            let mut finished = |grad: &Tensor, end| {
                if last {
                    self.gradients.ready(self.comm, grad, end);
                }
            };
            let Batch { inputs, targets, weights, counted } = &batch;
            let counted = counted.as_ref();
            loss += self.model.forward_backward(inputs, targets, weights, counted, seed, &mut finished);
            self.sequences += batch.inputs.size()[0] as usize;
            laps.end(Part::Compute)?;
        }
        torch::allow_cudnn_attention(false);
        let lr = learning_rate(&self.plan.config.optim, step, self.plan.config.train.steps);
        let norm = self.update(step, lr, &mut laps)?;
        let numbers = Tensor::cat(&[loss, norm], 0);
        laps.wait_for_compute(self.comm, 0)?;
        self.watchdog.enter(Phase::Exchange, step);
        let mut times = laps.finish(self.comm)?;
        let exchange = Instant::now();
        let numbers: Vec<f64> = numbers.try_into()?;
        let (loss, grad_norm) = (numbers[0], numbers[1]);

        let memory = torch::peak_memory_mib(self.device).unwrap_or(0.0);
        let written = self.saving.as_ref().is_none_or(Saving::is_written);
        let [stop, written] = [self.stop.raised(), written].map(|flag| f64::from(u8::from(flag)));
        let ranks = self.comm.gather(&[loss, stop, memory, written, times[Part::Compute as usize]])?;
        self.watchdog.enter(Phase::Step, step);
        times[Part::CommExposed as usize] += exchange.elapsed().as_secs_f64() * 1000.0;
        let total = |column: usize| ranks.iter().map(|rank| rank[column]).sum::<f64>();
        if grad_norm.is_finite() {
            self.skipped = 0;
        } else {
            self.not_finite(step, global, total(0), grad_norm)?;
        }
        Ok(StepReport {
            loss: total(0),
            grad_norm,
            lr,
            stop: total(1) > 0.0,
            written: total(3) as usize == self.comm.world_size,
            memory_mib: ranks.iter().map(|rank| rank[2]).fold(0.0, f64::max),
            compute_ms: ranks.iter().map(|rank| rank[4]).collect(),
            laps: times,
        })
    }

    /// Sums the gradient over the ranks, changes the weights by it, each rank its part of them, and hands them round; nothing
    /// changes if the gradient's norm is not finite, which it is not if a loss is not ([`Gpt::forward_backward`]). Returns the
    /// norm, (1,) fp64.
    fn update(&mut self, step: usize, lr: f64, laps: &mut Laps) -> Result<Tensor> {
        self.watchdog.enter(Phase::Exchange, step);
        let parameters = &mut self.model.parameters;
        self.gradients.finish(self.comm, &mut parameters.grad)?;
        laps.end(Part::CommExposed)?;
        let mut squares = squares(parameters, &self.optimizer.ranges);
        if self.gradients.is_sharded() {
            laps.end(Part::Optimizer)?;
            squares = self.comm.add_up(&squares)?;
            laps.end(Part::CommExposed)?;
        }
        self.watchdog.enter(Phase::Step, step);
        let norm = norm(&squares);
        self.optimizer.step(parameters, step, lr, &norm);
        laps.end(Part::Optimizer)?;
        // Bad weights are not handed round, which might hide whose they are. A GPU's host does not know yet; there the masked
        // update hands round what was there before.
        if parameters.flat.device().is_cuda() || norm.double_value(&[0]).is_finite() {
            self.watchdog.enter(Phase::Exchange, step);
            self.gradients.gather_weights(self.comm, &parameters.flat)?;
            self.watchdog.enter(Phase::Step, step);
            laps.end(Part::CommExposed)?;
            parameters.publish();
            laps.end(Part::Optimizer)?;
        }
        Ok(norm)
    }

    /// Dropout draws the same, whenever and however often a micro-step is computed.
    fn dropout_seed(&self, step: usize, micro_step: usize) -> u64 {
        [step, micro_step, self.comm.rank].iter().fold(self.loader.seed, |seed, &n| mix(seed, n as u64))
    }

    fn evaluate(&mut self, step: usize) -> Result<bool> {
        let Some(valid) = &self.valid else { return Ok(false) };
        self.enter(Phase::Exchange);
        if !self.comm.any(self.recorder.as_ref().is_some_and(|recorder| !recorder.has_evaluation(step)))? {
            return Ok(false);
        }
        let row = valid.run(self.comm, &self.model, self.device, step, |phase| self.enter(phase))?;
        self.enter(Phase::Evaluation);
        let improved = match &mut self.recorder {
            Some(recorder) => recorder.evaluation(&row)?,
            None => false,
        };
        self.enter(Phase::Exchange);
        self.comm.any(improved)
    }

    fn sample(&mut self, step: usize) -> Result<()> {
        let Some(recorder) = self.recorder.as_mut().filter(|recorder| !recorder.has_sample(step)) else {
            return Ok(());
        };
        self.watchdog.enter(Phase::Sampling, step);
        let prompts = match &self.plan.config.train.prompts[..] {
            [] => &[String::new()],
            prompts => prompts,
        };
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| self.tokenizer.encode(prompt)).collect();
        let sampling = Sampling { temperature: 0.8, top_k: Some(40), top_p: None, seed: self.loader.seed };
        let end_of_text = self.tokenizer.end_of_text();
        let mut text = String::new();
        for (prompt, ids) in prompts.iter().zip(generate(&self.model, &ids, 64, &sampling, end_of_text)) {
            text += &format!("{prompt}{}\n\n", String::from_utf8_lossy(&self.tokenizer.decode(&ids)?));
        }
        recorder.sample(step, &text)
    }

    /// Begins to save, once an earlier save is done.
    fn save(&mut self) -> Result<()> {
        self.wait_for_save()?;
        self.enter(Phase::Save);
        let checkpoints = self.dir.checkpoints();
        // One that is there already has the same bits: the run resumed from it.
        let here = || checkpoint::list(&checkpoints).iter().any(|(step, _)| *step == self.state.step);
        let mut needed = self.comm.is_root() && !here();
        let writers = self.writers();
        if let Some(comm) = writers {
            needed = comm.any(needed)?;
        }
        if !needed {
            return self.saved();
        }
        self.recorder.as_ref().map_or(Ok(()), Recorder::sync)?;
        let Self { state, model, optimizer, .. } = &*self;
        self.saving = Some(Saving::begin(&checkpoints, state, &model.parameters, optimizer, writers)?);
        Ok(())
    }

    /// Waits for the save that is under way, if any, and clears what is no longer kept.
    fn finish_save(&mut self) -> Result<()> {
        let Some(saving) = self.saving.take() else { return Ok(()) };
        self.enter(Phase::Save);
        let may_publish = || self.recorder.as_ref().map_or(Ok(()), Recorder::check);
        let path = saving.finish(self.writers(), may_publish)?;
        debug!("saved {}", path.display());
        self.saved()
    }

    /// Waits until no rank saves any more: others may have nothing to write, and yet must not go ahead to where they would
    /// wait no longer than a step may take.
    fn wait_for_save(&mut self) -> Result<()> {
        self.finish_save()?;
        self.enter(Phase::Waiting);
        let Deadlines { step, save, .. } = self.comm.deadlines;
        self.comm.barrier(step.max(save))
    }

    fn saved(&mut self) -> Result<()> {
        match &mut self.recorder {
            Some(recorder) => recorder.saved(self.plan.config.train.keep_last),
            None => Ok(()),
        }
    }

    /// The ranks that write a checkpoint together: all, where each has its part of the optimizer's state.
    fn writers(&self) -> Option<&'a Comm> {
        self.gradients.is_sharded().then_some(self.comm)
    }

    /// Marks progress between two steps.
    fn enter(&self, phase: Phase) {
        self.watchdog.enter(phase, self.state.step);
    }

    fn mfu(&self, tokens_per_s: f64) -> f64 {
        self.model.config.flop_per_token() * tokens_per_s / (self.comm.world_size as f64 * self.peak)
    }
}

fn row(state: &State, report: &StepReport, tokens_per_s: f64, mfu: f64) -> TrainRow {
    let [data_ms, compute_ms, comm_exposed_ms, optimizer_ms] = report.laps.map(rounded);
    TrainRow {
        step: state.step,
        tokens: state.tokens,
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
        world_size: state.conditions.world_size,
        elapsed_s: rounded(state.elapsed_s),
    }
}
