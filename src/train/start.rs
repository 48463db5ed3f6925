//! What comes before the first step: opening, resuming, and agreeing.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use tracing::{debug, info, warn};

use super::data::open_data;
use super::evaluate::Evaluation;
use super::gradients::Gradients;
use super::report::Speed;
use super::{kind, Resume, Trainer};
use crate::comm::Comm;
use crate::config::{Auto, Config, Data, Layout, Optim, Plan, Schedule, Tokens, Train};
use crate::data::loader::{Loader, Samples};
use crate::error::{Error, Result};
use crate::files::hex;
use crate::host;
use crate::model::Gpt;
use crate::optim::adamw::AdamW;
use crate::optim::schedule::jump;
use crate::run::checkpoint::{self, Conditions, OptimizerFiles, State, FORMAT_VERSION, MOMENTS};
use crate::run::lease::Lease;
use crate::run::restarts;
use crate::run::{find_checkpoint, Recorder, RunDir};
use crate::stop::StopRequest;
use crate::tokenizer::Tokenizer;
use crate::torch::{self, Marks};
use crate::watch::{Pace, Phase, Watchdog};

/// What a run reads, opened and checked.
pub(super) struct Opened {
    pub threads: usize,
    /// The rank that verified the data for this one.
    pub verifier: usize,
    pub tokenizer: Tokenizer,
    pub tokenizer_file: PathBuf,
    /// SHA-256 of the training tokens.
    pub data_sha256: String,
    pub loader: Loader,
    pub valid: Option<Evaluation>,
}

/// Opens what a run reads, and puts the number of its steps into the plan, if that follows from the data.
pub(super) fn open(comm: &Comm, plan: &mut Plan, next: impl FnMut()) -> Result<Opened> {
    let config = &plan.config;
    let threads = torch::set_threads(match config.threads {
        Auto::Number(n) => Some(n),
        Auto::Auto => None,
    })?;
    let (data, verifier) = open_data(comm, &config.data.dir, next)?;
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
            split: "valid".into(),
            samples: Samples::for_evaluation(data.valid, layout, block_size).map_err(in_split("validation"))?,
            layout,
            bytes: data.meta.valid.bytes,
            micro_batch: plan.micro_batch,
            padding,
        }),
    };
    let tokenizer_file = data.tokenizer;
    let steps = steps(&config.train, &loader);
    plan.config.train = plan.config.train.clone().of_steps(steps);
    Ok(Opened { threads, verifier, tokenizer, tokenizer_file, data_sha256, loader, valid })
}

/// How many steps the configuration asks for with this data; says so if it does not name them.
fn steps(train: &Train, loader: &Loader) -> usize {
    let (asked, steps) = match (train.tokens, train.epochs) {
        (Some(Tokens(tokens)), _) => (format!("train.tokens {tokens}"), loader.steps_to_targets(tokens)),
        (None, Some(epochs)) => (format!("train.epochs {epochs}"), loader.steps_to_epochs(epochs)),
        (None, None) => return train.steps,
    };
    info!("{asked}: that takes {steps} steps of {} sequences", loader.batch_size);
    steps
}

impl<'a> Trainer<'a> {
    pub(super) fn new(
        comm: &'a Comm,
        watchdog: &'a Watchdog,
        device: Device,
        stop: &'a StopRequest,
        mut plan: Plan,
        run_dir: &Path,
    ) -> Result<Self> {
        let opened = open(comm, &mut plan, || watchdog.enter(Phase::StartUp, 0))?;
        let Opened { threads, verifier, tokenizer, tokenizer_file, data_sha256, loader, valid } = opened;
        if device == Device::Cpu {
            torch::keep_memory();
        }
        let config = &plan.config;
        let layout = config.data.layout;
        let kind = kind(config.precision);
        let cudnn_attention =
            kind == Kind::BFloat16 && layout == Layout::Packed && torch::cudnn_attention_is_exact(config.model.dropout);
        let mut model = Gpt::new(plan.shape(tokenizer.vocab_size()), device, kind);
        model.initialize(config.seed);
        let gradients = Gradients::new(comm, &model.parameters, &config.comm, config.optim.zero1);
        let optimizer = AdamW::new(&model.parameters, gradients.owned(comm.rank), &config.optim);
        let conditions = Conditions {
            lockstep: env!("CARGO_PKG_VERSION").into(),
            libtorch: torch::libtorch_version(),
            device: if device.is_cuda() { "cuda" } else { "cpu" }.into(),
            hardware: torch::hardware(device),
            world_size: comm.world_size,
            threads,
            micro_batch: plan.micro_batch,
        };
        let state =
            State { format_version: FORMAT_VERSION, step: 0, tokens: 0, elapsed_s: 0.0, data_sha256, conditions };
        Ok(Self {
            comm,
            watchdog,
            dir: RunDir(run_dir.to_path_buf()),
            device,
            marks: Marks::on(device)?,
            tokenizer,
            tokenizer_file,
            verifier,
            loader,
            valid,
            model,
            gradients,
            optimizer,
            state,
            stop,
            peak: torch::measure_peak(device, kind),
            cudnn_attention,
            from: 0,
            sequences: 0,
            asks_every: 1,
            speed: Speed::from(0),
            pace: Pace::default(),
            skipped: 0,
            written: false,
            saving: None,
            recorder: None,
            plan,
        })
    }

    /// Rank 0 finds and reads what the run begins with; the others receive it.
    pub(super) fn begin(&mut self, resume: &Resume, allowed: &[String]) -> Result<()> {
        // First, so that a job that is refused leaves the run directory as it was.
        self.compare_ranks()?;
        let hosts = self.comm.gather_text(&self.comm.host())?;
        self.enter(Phase::StartUp);
        let found = if self.comm.is_root() { self.take_up(resume, allowed)? } else { None };
        self.comm.barrier(self.comm.deadlines.startup)?;
        let State { step, tokens, elapsed_s, .. } = self.state;
        let resumes = f64::from(u8::from(found.is_some()));
        let numbers = &self.comm.gather(&[step as f64, tokens as f64, elapsed_s, resumes])?[0];
        (self.state.step, self.state.tokens, self.state.elapsed_s) =
            (numbers[0] as usize, numbers[1] as u64, numbers[2]);
        // Rank 0 has made the run directory this job's.
        self.watchdog.leave_heartbeats(self.dir.heartbeats())?;
        if let Some(recorder) = &mut self.recorder {
            recorder.hosts = hosts;
        }
        self.enter(Phase::StartUp);
        self.comm.broadcast(&mut self.model.parameters.flat)?;
        self.comm.wait(self.device)?;
        self.model.parameters.publish();
        if numbers[3] > 0.0 {
            self.take_up_moments(found)?;
        }
        (self.from, self.speed) = (self.state.step, Speed::from(self.state.tokens));
        Ok(())
    }

    /// Rank 0 reads the optimizer's state bucket by bucket, whoever wrote it; each rank keeps what it updates.
    fn take_up_moments(&mut self, files: Option<OptimizerFiles>) -> Result<()> {
        self.comm.barrier(self.comm.deadlines.startup)?;
        for (start, length) in self.gradients.buckets() {
            self.enter(Phase::StartUp);
            let zeros = || Tensor::zeros([length], (Kind::Float, self.device));
            let mut moments = [zeros(), zeros()];
            for (name, moment) in MOMENTS.iter().zip(&mut moments) {
                if let Some(files) = &files {
                    files.read(name, start, moment)?;
                }
                self.comm.broadcast(moment)?;
            }
            self.optimizer.fill(start, &moments[0], &moments[1]);
        }
        Ok(())
    }

    /// Compares what every rank brings along: replicas that differ from the start would train on without a word.
    fn compare_ranks(&self) -> Result<()> {
        if self.comm.world_size == 1 {
            return Ok(());
        }
        // Opening the data takes some nodes longer than others.
        self.comm.barrier(self.comm.deadlines.startup)?;
        let Conditions { lockstep, libtorch, hardware, .. } = &self.state.conditions;
        let tokenizer = std::fs::read(&self.tokenizer_file).map_err(|e| Error::read(&self.tokenizer_file, e))?;
        // (name, what it is, whether a difference is an error)
        let brought = [
            ("configuration", self.plan.config.to_yaml()?, true),
            ("training data", format!("SHA-256 {}", self.state.data_sha256), true),
            ("tokenizer", format!("SHA-256 {}", hex(&Sha256::digest(tokenizer))), true),
            ("versions of Lockstep and LibTorch", format!("{lockstep}, {libtorch}"), true),
            ("program", host::binary().map_or("unknown".into(), |(_, digest)| format!("SHA-256 {digest}")), true),
            ("kind of hardware", hardware.clone(), false),
        ];
        // 48 bits of each digest, exact in a float.
        let bits = |text: &String| Sha256::digest(text)[..6].iter().fold(0.0, |bits, &b| bits * 256.0 + f64::from(b));
        let ranks = self.comm.gather(&brought.iter().map(|(_, text, _)| bits(text)).collect::<Vec<_>>())?;
        for (place, (name, text, fatal)) in brought.iter().enumerate() {
            let others: Vec<usize> = (1..ranks.len()).filter(|&rank| ranks[rank][place] != ranks[0][place]).collect();
            let Some(&other) = others.first() else { continue };
            let texts = self.comm.gather_text(text)?;
            let difference = match *name {
                "configuration" => differences(&texts[other], &texts[0])?,
                _ => format!("{} on rank {other}, {} on rank 0", texts[other], texts[0]),
            };
            if *fatal {
                return Err(Error::Communication(format!(
                    "ranks {others:?} have another {name} than rank 0: {difference}; start every rank with the same files, on \
                     a file system that all nodes share"
                ))
                .into());
            }
            if self.comm.is_root() {
                warn!("ranks {others:?} have another {name} than rank 0: {difference}");
            }
        }
        Ok(())
    }

    /// Reads the weights and numbers of the checkpoint that the run goes on from, and returns its optimizer's state.
    fn take_up(&mut self, resume: &Resume, allowed: &[String]) -> Result<Option<OptimizerFiles>> {
        let checkpoints = self.dir.checkpoints();
        // Taken before anything is read: the run that holds it may be about to save.
        let lease = self.dir.0.exists().then(|| Lease::take(&self.dir.0)).transpose()?;
        let has_history = !checkpoint::list(&checkpoints).is_empty();
        let source = match resume {
            Resume::Auto => has_history.then(|| self.dir.0.clone()),
            // Another run's checkpoint is only where this run begins.
            Resume::From(path) if has_history && path.exists() && !is_within(path, &self.dir.0) => {
                info!("{} holds checkpoints: going on with its own newest", self.dir.0.display());
                Some(self.dir.0.clone())
            }
            Resume::From(path) => Some(path.clone()),
            Resume::Never if !has_history => None,
            Resume::Never => {
                return Err(Error::Usage(format!(
                    "{} holds checkpoints, and --resume never would start a new run over them; use another --run-dir",
                    self.dir.0.display()
                ))
                .into())
            }
        };
        // All checks come before the first change, so that a refused command leaves the run as it was.
        if !has_history {
            self.dir.check_logs(self.plan.config.train.save_every)?;
        }
        let block_size = self.plan.config.data.block_size;
        // Another run may go on, and remove what is read here.
        let found = match (&source, self.plan.config.train.init_from.clone()) {
            (Some(source), _) => {
                let find = || find_checkpoint(source);
                Some(checkpoint::read_chosen(find, |path| self.load(path, has_history, allowed))?)
            }
            (None, Some(from)) => {
                let find = || find_checkpoint(&from).map_err(|e| e.context("train.init_from"));
                checkpoint::read_chosen(find, |path| {
                    self.check_vocabulary(path, &checkpoint::load_state(path)?)?;
                    let positions = checkpoint::load_first_positions(path, &mut self.model.parameters)?;
                    info!("beginning with the weights of {}", path.display());
                    if positions > block_size {
                        info!("of its {positions} positions, the first {block_size} are used: data.block_size");
                    }
                    Ok(())
                })?;
                None
            }
            (None, None) => None,
        };
        let kept = if has_history { self.state.step } else { 0 };
        self.dir.check_tables(kept, &self.plan.config.train)?;
        let lease = match lease {
            Some(lease) => lease,
            None => Lease::take(&self.dir.0)?,
        };
        // Reading may have taken long, and a new directory may have become another's before it was taken.
        lease.check()?;
        if has_history == checkpoint::list(&checkpoints).is_empty() {
            let path = self.dir.0.display();
            let message = format!("another process trained in {path} just now; start the same command again");
            return Err(Error::Usage(message).into());
        }
        if has_history {
            self.dir.note_changes(&self.plan.config, self.state.step)?;
        }
        self.dir.claim(&self.plan.config, &self.tokenizer_file)?;
        let Config { train, fault, .. } = &self.plan.config;
        if self.state.step < train.steps {
            restarts::note_start(&self.dir.0, self.state.step, fault.max_restarts_without_progress)?;
        }
        checkpoint::set_aside_after(&checkpoints, self.state.step)?;
        self.recorder = Some(Recorder::open(&self.dir, lease, kept, &self.plan.config.train)?);
        Ok(found)
    }

    fn load(&mut self, path: &Path, is_own: bool, allowed: &[String]) -> Result<OptimizerFiles> {
        let saved = checkpoint::load_state(path)?;
        if saved.is_imported() {
            let path = path.display();
            return Err(Error::Usage(format!(
                "{path} holds imported weights and no optimizer's state, so no run can resume from it; begin a new run with \
                 them: another --run-dir, and --set train.init_from={path}"
            ))
            .into());
        }
        if is_own {
            self.dir.check(&self.plan.config, &self.tokenizer_file, allowed, &saved, &self.state)?;
        }
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
        self.check_vocabulary(path, &saved)?;
        self.warn_of_jump(path, saved.step);
        for (name, then, now) in saved.conditions.differences(&self.state.conditions) {
            warn!(
                "resuming with {name} {now}, which was {then}: the run goes on, but not bit for bit as it would have"
            );
        }
        checkpoint::load_model(path, &mut self.model.parameters)?;
        let moments = OptimizerFiles::open(path, self.model.parameters.numel())?;
        let State { step, tokens, elapsed_s, .. } = saved;
        self.state = State { step, tokens, elapsed_s, ..self.state.clone() };
        info!("resuming from {} after {step} steps", path.display());
        Ok(moments)
    }

    /// Refuses weights that were trained on ids of another tokenizer: as many as here may mean quite other text.
    fn check_vocabulary(&self, checkpoint: &Path, saved: &State) -> Result<()> {
        match RunDir::of_checkpoint(checkpoint) {
            // The digest of the tokens covers their tokenizer's.
            _ if saved.data_sha256 == self.state.data_sha256 => Ok(()),
            Some(dir) if dir.tokenizer().is_file() => dir.check_tokenizer(&self.tokenizer_file),
            _ => {
                warn!(
                    "{} does not lie in a run directory with its tokenizer.json: make sure that it was trained with {}",
                    checkpoint.display(),
                    self.tokenizer_file.display()
                );
                Ok(())
            }
        }
    }

    /// Says so if the configuration takes the learning rate elsewhere than where the checkpoint's own run left it.
    fn warn_of_jump(&self, checkpoint: &Path, step: usize) {
        let config = &self.plan.config;
        let Some(older) = RunDir::of_checkpoint(checkpoint).and_then(|dir| dir.load_config().ok()) else { return };
        let steps = older.train.steps;
        let found = jump((&older.optim, steps), (&config.optim, config.train.steps), step);
        let Some((then, now)) = found.filter(|_| step < config.train.steps) else { return };
        let mut changes = config.differences(&older).unwrap_or_default();
        changes.retain(|(key, ..)| key.starts_with("optim.") || key == "train.steps");
        let changes: Vec<String> =
            changes.iter().map(|(key, then, now)| format!("{key} was {then} and is {now}")).collect();
        // The remedy is one only if it would keep the old rate.
        let kept = Optim { decay_steps: steps, ..config.optim.clone() };
        let remedy = match older.optim.schedule {
            Schedule::Cosine | Schedule::Linear
                if jump((&older.optim, steps), (&kept, config.train.steps), step).is_none() =>
            {
                format!(
                    "; --set optim.decay_steps={steps} --allow-config-change optim.decay_steps keeps to the old course"
                )
            }
            _ => String::new(),
        };
        warn!(
            "the learning rate jumps at step {}: it is {now:.1e} there, and would have been {then:.1e} ({}){remedy}",
            step + 1,
            changes.join(", ")
        );
    }

    /// What hardly anybody means, in the configuration and in how it meets the data.
    fn oddities(&self) -> Vec<String> {
        let Data { layout, block_size, batch_size, .. } = &self.plan.config.data;
        let mut found = self.plan.oddities();
        let samples = self.loader.samples.len();
        if *batch_size > samples {
            found.push(format!(
                "data.batch_size is {batch_size}, the training split has {samples} samples: a step sees some of them more than \
                 once"
            ));
        }
        let tokens = self.valid.as_ref().map(|valid| valid.samples.shards().n_tokens());
        if let Some(tokens) = tokens.filter(|tokens| *layout == Layout::Packed && tokens <= block_size) {
            found.push(format!(
                "data.block_size is {block_size}, the validation split has {tokens} tokens: it is evaluated as one block that \
                 is shorter"
            ));
        }
        found
    }

    /// Says what is about to be trained.
    pub(super) fn announce(&self) {
        match &self.recorder {
            Some(recorder) => recorder.say(|| self.describe()),
            None => self.describe(),
        }
    }

    fn describe(&self) {
        let State { step, conditions, .. } = &self.state;
        let train = &self.plan.config.train;
        if *step >= train.steps {
            info!("the run in {} is complete: {step} steps; --set train.steps=N goes on", self.dir.0.display());
            return;
        }
        info!(
            "{} parameters, vocabulary {}, on {:?} ({}), {} x {} threads (ranks, threads of each), {} sequences a step as {} x {} x {} (ranks, \
             micro-steps, sequences)",
            self.model.parameters.numel(),
            self.model.shape.vocab_size,
            self.device,
            conditions.hardware,
            conditions.world_size,
            conditions.threads,
            self.plan.config.data.batch_size,
            conditions.world_size,
            self.plan.accumulation,
            self.plan.micro_batch,
        );
        let (rank, dir) = (self.comm.rank, self.plan.config.data.dir.display());
        match self.verifier {
            _ if self.comm.world_size == 1 => {}
            verifier if verifier == rank => info!("rank {rank} has verified {dir} for the ranks of its node"),
            verifier => info!("rank {rank} has waited for the word of rank {verifier}, which has verified {dir}"),
        }
        if let Some(text) = torch::describe_peak(self.device, self.model.kind(), self.peak) {
            info!("{text}");
        }
        if self.comm.is_root() {
            self.oddities().iter().for_each(|odd| warn!("{odd}"));
        }
        let global = self.loader.global_batch(*step);
        let mine = self.loader.share(&global);
        let (rank, step) = (self.comm.rank, step + 1);
        info!("rank {rank} computes {} of the {} sequences of each step", mine.len(), global.len());
        debug!("of step {step}, rank {rank} computes samples {mine:?}");
        self.say_messages();
    }
}

/// The keys in which two resolved configurations differ, with both values.
fn differences(theirs: &str, ours: &str) -> Result<String> {
    let changes = Config::parse(theirs, &[])?.differences(&Config::parse(ours, &[])?)?;
    let say = |(key, ours, theirs): (String, String, String)| format!("{key} is {theirs} there and {ours} here");
    Ok(changes.into_iter().map(say).collect::<Vec<_>>().join(", "))
}

fn is_within(path: &Path, folder: &Path) -> bool {
    matches!((path.canonicalize(), folder.canonicalize()), (Ok(path), Ok(folder)) if path.starts_with(&folder))
}
