//! Training: the loop, and what stands around it.

pub mod evaluate;
pub mod optimizer;
pub mod record;
pub mod schedule;

use std::path::{Path, PathBuf};
use std::time::Instant;

use tch::{Device, Kind};
use tracing::{debug, info, warn};

use self::evaluate::Evaluation;
use self::optimizer::{clip, AdamW};
use self::record::{find_checkpoint, Recorder, RunDir};
use self::schedule::learning_rate;
use crate::checkpoint::{self, Conditions, State, FORMAT_VERSION};
use crate::comm::Comm;
use crate::config::{Auto, Plan, Precision};
use crate::data::loader::{Loader, Samples};
use crate::data::prepare::DataDir;
use crate::data::shard::hex;
use crate::device;
use crate::error::{Error, Result};
use crate::fault::StopRequest;
use crate::metrics::{rounded, TrainRow};
use crate::model::generate::{generate, Sampling};
use crate::model::{Gpt, GptConfig};
use crate::random::mix;
use crate::tokenizer::Tokenizer;

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
pub fn train(comm: &Comm, plan: Plan, run_dir: &Path, resume: &Resume, allowed: &[String]) -> Result<()> {
    let mut trainer = Trainer::new(comm, plan, run_dir)?;
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
    plan: Plan,
    dir: RunDir,
    device: Device,
    tokenizer: Tokenizer,
    tokenizer_file: PathBuf,
    loader: Loader,
    valid: Option<Evaluation>,
    model: Gpt,
    optimizer: AdamW,
    state: State,
    stop: StopRequest,
    /// FLOP/s of this rank's device.
    peak: f64,
    /// Rank 0's files, once the run has begun.
    recorder: Option<Recorder>,
}

/// What one optimizer step came to, alike on every rank but for the times.
struct StepReport {
    loss: f64,
    grad_norm: f64,
    lr: f64,
    stop: bool,
    memory_mib: f64,
    /// Milliseconds: data, compute, exposed communication, optimizer.
    laps: [f64; 4],
}

impl<'a> Trainer<'a> {
    fn new(comm: &'a Comm, plan: Plan, run_dir: &Path) -> Result<Self> {
        let stop = StopRequest::install()?;
        let config = &plan.config;
        let threads = device::set_threads(match config.threads {
            Auto::Number(n) => Some(n),
            Auto::Auto => None,
        });
        let device = device::select(config.device.name(), comm.local_rank)?;
        let data = DataDir::open(&config.data.dir)?;
        let tokenizer = Tokenizer::from_file(&data.tokenizer)?;
        let (layout, block_size) = (config.data.layout, config.data.block_size);
        let padding = i64::from(tokenizer.end_of_text());
        let in_split = |split: &'static str| move |e: anyhow::Error| e.context(format!("the {split} split"));
        let data_sha256 = hex(&data.train.digest());
        let loader = Loader {
            samples: Samples::for_training(data.train, layout, block_size).map_err(in_split("training"))?,
            seed: config.seed,
            batch_size: config.data.batch_size,
            micro_batch: plan.micro_batch,
            loss: config.train.loss,
            padding,
            rank: comm.rank,
            world_size: comm.world_size,
        };
        let valid = match config.train.eval_every {
            0 => None,
            _ => Some(Evaluation {
                split: "valid",
                samples: Samples::for_evaluation(data.valid, layout, block_size).map_err(in_split("validation"))?,
                layout,
                micro_batch: plan.micro_batch,
                padding,
            }),
        };
        let kind = kind(config.precision);
        let mut model = Gpt::new(GptConfig::new(&plan, tokenizer.vocab_size()), device, kind);
        model.initialize(config.seed);
        let optimizer = AdamW::new(&model.parameters, &config.optim);
        let conditions = Conditions {
            lockstep: env!("CARGO_PKG_VERSION").into(),
            libtorch: device::libtorch_version(),
            device: if device.is_cuda() { "cuda" } else { "cpu" }.into(),
            hardware: device::hardware(device),
            world_size: comm.world_size,
            threads,
            micro_batch: plan.micro_batch,
        };
        let state =
            State { format_version: FORMAT_VERSION, step: 0, tokens: 0, elapsed_s: 0.0, data_sha256, conditions };
        Ok(Self {
            comm,
            dir: RunDir(run_dir.to_path_buf()),
            device,
            tokenizer,
            tokenizer_file: data.tokenizer,
            loader,
            valid,
            model,
            optimizer,
            state,
            stop,
            peak: device::measure_peak(device, kind),
            recorder: None,
            plan,
        })
    }

    /// Rank 0 finds and reads what the run begins with; the others receive it.
    fn begin(&mut self, resume: &Resume, allowed: &[String]) -> Result<()> {
        if self.comm.is_root() {
            self.take_up(resume, allowed)?;
        }
        let State { step, tokens, elapsed_s, .. } = self.state;
        let numbers = &self.comm.gather(&[step as f64, tokens as f64, elapsed_s])[0];
        (self.state.step, self.state.tokens, self.state.elapsed_s) =
            (numbers[0] as usize, numbers[1] as u64, numbers[2]);
        self.comm.broadcast(&mut self.model.parameters.flat)?;
        self.comm.broadcast(&mut self.optimizer.exp_avg)?;
        self.comm.broadcast(&mut self.optimizer.exp_avg_sq)?;
        self.model.parameters.publish();
        Ok(())
    }

    fn take_up(&mut self, resume: &Resume, allowed: &[String]) -> Result<()> {
        let checkpoints = self.dir.checkpoints();
        let found = match resume {
            Resume::Auto => checkpoint::latest(&checkpoints)?,
            Resume::From(path) => Some(find_checkpoint(path)?),
            Resume::Never if checkpoint::list(&checkpoints).is_empty() => None,
            Resume::Never => {
                return Err(Error::Usage(format!(
                    "{} holds checkpoints, and --resume never would begin anew over them; use another --run-dir",
                    self.dir.0.display()
                ))
                .into())
            }
        };
        // All checks come before the first change, so that a refused command leaves the run as it was.
        self.dir.check(&self.plan.config, allowed)?;
        if let Some(path) = &found {
            self.load(path, allowed)?;
            info!("resuming from {} after {} steps", path.display(), self.state.step);
        } else if let Some(path) = &self.plan.config.train.init_from {
            let path = find_checkpoint(path).map_err(|e| e.context("train.init_from"))?;
            checkpoint::verify(&path)?;
            checkpoint::load_model(&path, &mut self.model.parameters)?;
            info!("beginning with the weights of {}", path.display());
        }
        self.dir.claim(&self.plan.config, &self.tokenizer_file)?;
        checkpoint::set_aside_after(&checkpoints, self.state.step)?;
        self.recorder = Some(Recorder::open(&self.dir, self.state.step, self.plan.config.train.steps)?);
        Ok(())
    }

    fn load(&mut self, path: &Path, allowed: &[String]) -> Result<()> {
        let saved = checkpoint::load_state(path)?;
        if saved.data_sha256 != self.state.data_sha256 && !allowed.iter().any(|key| key == "data.dir") {
            return Err(Error::Usage(format!(
                "{} was trained on other data than {} holds (SHA-256 of the training tokens was {}, is {}); name the \
                 folder it was trained on, or allow it with --allow-config-change data.dir",
                path.display(),
                self.plan.config.data.dir.display(),
                saved.data_sha256,
                self.state.data_sha256
            ))
            .into());
        }
        for (name, then, now) in saved.conditions.differences(&self.state.conditions) {
            warn!(
                "resuming with {name} {now}, which was {then}: the run goes on, but not bit for bit as it would have"
            );
        }
        checkpoint::load_model(path, &mut self.model.parameters)?;
        checkpoint::load_optimizer(path, &mut self.optimizer)?;
        let State { step, tokens, elapsed_s, .. } = saved;
        self.state = State { step, tokens, elapsed_s, ..self.state.clone() };
        Ok(())
    }

    /// The loop.
    fn run(&mut self) -> Result<()> {
        let plan = self.plan.config.train.clone();
        self.announce();
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
            }

            let aside = Instant::now();
            let last = step == plan.steps;
            let due = |every: usize| every > 0 && (last || step.is_multiple_of(every));
            let mut save = report.stop || last || due(plan.save_every);
            if due(plan.eval_every) {
                save |= self.evaluate(step)?;
            }
            if due(plan.sample_every) {
                self.sample(step)?;
            }
            if save {
                self.save(plan.keep_last)?;
            }
            pause += aside.elapsed().as_secs_f64();
            if report.stop && !last {
                return Err(Error::Preempted(format!(
                    "stopped on request after step {step} of {}, saved in {}; start the same command again to go on",
                    plan.steps,
                    self.dir.checkpoints().display()
                ))
                .into());
            }
        }
        Ok(())
    }

    /// One optimizer step: this rank's micro-batches, the sum over ranks, the update.
    fn step(&mut self, step: usize, global: &[usize], start: Instant) -> Result<StepReport> {
        let mut laps = Laps { last: start, times: [0.0; 4] };
        self.model.parameters.zero_grad();
        let mut loss = 0.0;
        for micro_step in 0..self.plan.accumulation {
            let batch = self.loader.micro_batch(global, micro_step, self.device);
            laps.end(DATA);
            let seed = [step, micro_step, self.comm.rank].iter().fold(self.loader.seed, |seed, &n| mix(seed, n as u64));
            loss += self.model.forward_backward(&batch.inputs, &batch.targets, &batch.weights, seed);
            laps.end(COMPUTE);
        }
        self.comm.all_reduce(&mut self.model.parameters.grad)?;
        let memory = device::peak_resident_mib().filter(|_| !self.device.is_cuda()).unwrap_or(0.0);
        let ranks = self.comm.gather(&[loss, f64::from(u8::from(self.stop.raised())), memory]);
        laps.end(COMM_EXPOSED);

        let total = |column: usize| ranks.iter().map(|rank| rank[column]).sum::<f64>();
        let grad_norm = clip(&mut self.model.parameters, self.plan.config.optim.grad_clip);
        if !total(0).is_finite() || !grad_norm.is_finite() {
            return Err(self.not_finite(step, global, total(0), grad_norm));
        }
        let lr = learning_rate(&self.plan.config.optim, step, self.plan.config.train.steps);
        self.optimizer.step(&mut self.model.parameters, step, lr);
        laps.end(OPTIMIZER);
        Ok(StepReport {
            loss: total(0),
            grad_norm,
            lr,
            stop: total(1) > 0.0,
            memory_mib: ranks.iter().map(|rank| rank[2]).fold(0.0, f64::max),
            laps: laps.times,
        })
    }

    fn not_finite(&self, step: usize, global: &[usize], loss: f64, grad_norm: f64) -> anyhow::Error {
        let parameters = &self.model.parameters;
        let finite = |tensor: &tch::Tensor| tensor.isfinite().all().int64_value(&[]) == 1;
        let names = parameters.specs.iter().filter(|spec| !finite(&spec.view(&parameters.grad)));
        let names: Vec<&str> = names.take(3).map(|spec| spec.name.as_str()).collect();
        let mine = self.loader.share(global);
        Error::Numbers(format!(
            "step {step}: the loss is {loss} and the gradient's norm {grad_norm}; nothing was changed. First gradients that \
             are not finite: {}. This rank's samples: {:?}. Try a lower optim.lr, more optim.warmup_steps, or fp32",
            if names.is_empty() { "none".into() } else { names.join(", ") },
            &mine[..mine.len().min(8)]
        ))
        .into()
    }

    fn evaluate(&mut self, step: usize) -> Result<bool> {
        let Some(valid) = &self.valid else { return Ok(false) };
        let row = valid.run(self.comm, &self.model, self.device, step);
        let improved = match &mut self.recorder {
            Some(recorder) => recorder.evaluation(&row)?,
            None => false,
        };
        Ok(self.comm.any(improved))
    }

    fn sample(&mut self, step: usize) -> Result<()> {
        let Some(recorder) = &mut self.recorder else { return Ok(()) };
        let prompts = &self.plan.config.train.prompts;
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| self.tokenizer.encode(prompt)).collect();
        let sampling = Sampling { temperature: 0.8, top_k: Some(40), top_p: None, seed: self.loader.seed };
        let end_of_text = self.tokenizer.end_of_text();
        let mut text = String::new();
        for (prompt, ids) in prompts.iter().zip(generate(&self.model, &ids, 64, &sampling, end_of_text)) {
            text += &format!("{prompt}{}\n\n", String::from_utf8_lossy(&self.tokenizer.decode(&ids)?));
        }
        recorder.sample(step, &text)
    }

    fn save(&mut self, keep_last: usize) -> Result<()> {
        if let Some(recorder) = &mut self.recorder {
            let path = checkpoint::save(&self.dir.checkpoints(), &self.state, &self.model.parameters, &self.optimizer)?;
            recorder.saved(keep_last)?;
            recorder.say(|| debug!("saved {}", path.display()));
        }
        Ok(())
    }

    fn announce(&self) {
        let State { step, conditions, .. } = &self.state;
        let train = &self.plan.config.train;
        if *step >= train.steps {
            info!("the run in {} is complete: {step} steps; --set train.steps=N goes on", self.dir.0.display());
            return;
        }
        info!(
            "{} parameters, vocabulary {}, on {:?} ({}), {} ranks x {} threads, {} sequences a step as {} x {} x {} (ranks, \
             micro-steps, sequences)",
            self.model.parameters.numel(),
            self.model.config.vocab_size,
            self.device,
            conditions.hardware,
            conditions.world_size,
            conditions.threads,
            self.plan.config.data.batch_size,
            conditions.world_size,
            self.plan.accumulation,
            self.plan.micro_batch,
        );
        let global = self.loader.global_batch(*step);
        let mine = self.loader.share(&global);
        info!(
            "rank {} computes {} of the {} sequences of each step; of step {} samples {:?}{}",
            self.comm.rank,
            mine.len(),
            global.len(),
            step + 1,
            &mine[..mine.len().min(16)],
            if mine.len() > 16 { " ..." } else { "" }
        );
    }

    fn mfu(&self, tokens_per_s: f64) -> f64 {
        self.model.config.flop_per_token() * tokens_per_s / (self.comm.world_size as f64 * self.peak)
    }
}

const DATA: usize = 0;
const COMPUTE: usize = 1;
const COMM_EXPOSED: usize = 2;
const OPTIMIZER: usize = 3;

/// A step's time, cut where one part ends and the next begins, so that the parts add up to the whole.
struct Laps {
    last: Instant,
    times: [f64; 4],
}

impl Laps {
    fn end(&mut self, part: usize) {
        let now = Instant::now();
        self.times[part] += (now - self.last).as_secs_f64() * 1000.0;
        self.last = now;
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
