//! What rank 0 writes: the run directory.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::checkpoint;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::fault::lease::Lease;
use crate::fault::watchdog::Stragglers;
use crate::metrics::{replace, rounded, sync_folder, EvalRow, Log, RankRow, TrainRow};

/// YAML's mark of a document's end: a configuration that was cut short may be a configuration still.
const END_OF_CONFIG: &str = "...\n";

/// The places in a run directory.
#[derive(Debug, Clone)]
pub struct RunDir(pub PathBuf);

impl RunDir {
    #[allow(missing_docs)]
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.yaml")
    }

    /// A copy of the data folder's tokenizer, so that the run can speak without its data.
    pub fn tokenizer(&self) -> PathBuf {
        self.0.join("tokenizer.json")
    }

    #[allow(missing_docs)]
    pub fn best(&self) -> PathBuf {
        self.0.join("best.json")
    }

    /// The log of one rank.
    pub fn log(&self, rank: usize) -> PathBuf {
        self.0.join("logs").join(format!("rank-{rank:04}.log"))
    }

    /// What each rank is doing.
    pub fn heartbeats(&self) -> PathBuf {
        self.0.join("heartbeats")
    }

    /// Makes the folders of a run and writes its configuration and its tokenizer there.
    ///
    /// # Errors
    /// Storage, where a folder or a file cannot be made.
    pub fn claim(&self, config: &Config, tokenizer: &Path) -> Result<()> {
        let make = |folder: &Path| fs::create_dir_all(folder).map_err(|e| Error::write(folder, e));
        for folder in ["checkpoints", "logs", "samples"] {
            let folder = self.0.join(folder);
            if folder.is_symlink() {
                let message = "is a link; a run writes into its own folder only: link the whole run directory instead";
                return Err(Error::Storage(format!("{} {message}", folder.display())).into());
            }
            make(&folder)?;
        }
        // What is durable in a folder without a durable name is lost. The folder above may be one that nobody may read.
        let _ = sync_folder(&self.0);
        sync_folder(&self.checkpoints()).map_err(|e| Error::write(&self.checkpoints(), e))?;
        replace(&self.config(), (config.to_yaml()? + END_OF_CONFIG).as_bytes())?;
        replace(&self.tokenizer(), &fs::read(tokenizer).map_err(|e| Error::read(tokenizer, e))?)?;
        // An earlier job's heartbeats are not mistaken for this one's.
        let _ = fs::remove_dir_all(self.heartbeats());
        make(&self.heartbeats())
    }

    /// The configuration that the run was last started with.
    ///
    /// # Errors
    /// Storage, where the file is not whole; usage, as [`Config::load`].
    pub fn load_config(&self) -> Result<Config> {
        let path = self.config();
        let config = Config::load(&path, &[])?;
        let text = fs::read_to_string(&path).unwrap_or_default();
        if !text.trim_end().ends_with(END_OF_CONFIG.trim_end()) {
            return Err(Error::Storage(format!(
                "{} is cut short: its last line is not `{}`; restore it, or remove it and let `lockstep train --config` \
                 write it again",
                path.display(),
                END_OF_CONFIG.trim_end()
            ))
            .into());
        }
        Ok(config)
    }

    /// Refuses logs that reach further than a run without a checkpoint can have come: its checkpoints are missing.
    ///
    /// # Errors
    /// Storage, with what to do.
    pub fn check_logs(&self, save_every: usize) -> Result<()> {
        let rows: Vec<TrainRow> = Log::rows(&self.0.join("train.csv"))?;
        match rows.last() {
            // The first save may still have been on its way when the second was due.
            Some(row) if save_every > 0 && row.step > 2 * save_every => Err(Error::Storage(format!(
                "{} has the log of {} steps but no checkpoint; bring its checkpoints back, or begin anew in another --run-dir",
                self.0.display(),
                row.step
            ))
            .into()),
            _ => Ok(()),
        }
    }

    /// Refuses a configuration that differs from the directory's own in what is learnt, and another tokenizer.
    ///
    /// # Errors
    /// Usage, with each key and both values; data, where the ids of the data folder mean other text than the model's.
    pub fn check(&self, config: &Config, tokenizer: &Path, allowed: &[String]) -> Result<()> {
        let read = |path: &Path| fs::read(path).map_err(|e| Error::read(path, e));
        if self.tokenizer().exists() && read(&self.tokenizer())? != read(tokenizer)? {
            return Err(Error::Data(format!(
                "{} is not the tokenizer that {} was trained with ({}); prepare the text with --tokenizer {}",
                tokenizer.display(),
                self.0.display(),
                self.tokenizer().display(),
                self.tokenizer().display()
            ))
            .into());
        }
        if self.config().exists() {
            let older = self.load_config()?;
            let changes: Vec<String> = config
                .changes_since(&older)?
                .into_iter()
                .filter(|(key, ..)| !allowed.contains(key))
                .map(|(key, then, now)| format!("{key} was {then} and is {now}"))
                .collect();
            if !changes.is_empty() {
                return Err(Error::Usage(format!(
                    "{} belongs to a run with another configuration: {}; use another --run-dir, or allow it with \
                     --allow-config-change KEY",
                    self.0.display(),
                    changes.join(", ")
                ))
                .into());
            }
        }
        Ok(())
    }
}

/// The best evaluation so far: `best.json`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step whose checkpoint is spared.
    pub step: usize,
    /// Token mean over the validation split.
    pub loss: f64,
}

impl Best {
    /// The best evaluation whose checkpoint is among those there.
    fn of(rows: &[EvalRow], checkpoints: &[(usize, PathBuf)]) -> Option<Self> {
        let there = |step: usize| checkpoints.iter().any(|(saved, _)| *saved == step);
        let valid = rows.iter().filter(|row| row.split == "valid" && row.loss.is_finite() && there(row.step));
        let best = valid.min_by(|a, b| a.loss.total_cmp(&b.loss))?;
        Some(Self { step: best.step, loss: best.loss })
    }

    fn publish(&self, dir: &RunDir) -> Result<()> {
        replace(&dir.best(), (serde_json::to_string_pretty(self)? + "\n").as_bytes())
    }
}

/// The files that grow while a run goes on, and what a person sees of it.
pub struct Recorder {
    dir: RunDir,
    train: Log,
    eval: Log,
    slow: Log,
    stragglers: Stragglers,
    /// The node of each rank.
    pub hosts: Vec<String>,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// The step of the last evaluation.
    evaluated: Option<usize>,
    progress: Progress,
    lease: Lease,
}

impl Recorder {
    /// Takes up the files of a run that goes on after `step` of `steps` steps.
    ///
    /// # Errors
    /// Storage, where a file cannot be written.
    pub fn open(dir: &RunDir, lease: Lease, step: usize, steps: usize) -> Result<Self> {
        let (train, _) = Log::open::<TrainRow>(&dir.0.join("train.csv"), step)?;
        let (eval, rows) = Log::open::<EvalRow>(&dir.0.join("eval.csv"), step)?;
        let (slow, _) = Log::open::<RankRow>(&dir.0.join("ranks.csv"), step)?;
        let best = Best::of(&rows, &checkpoint::list(&dir.checkpoints()));
        match best {
            Some(best) => best.publish(dir)?,
            // What a run left that was killed after its first evaluation and before its first checkpoint.
            None if dir.best().exists() => fs::remove_file(dir.best()).map_err(|e| Error::write(&dir.best(), e))?,
            None => {}
        }
        // Later samples belong to steps that will be done again, perhaps otherwise.
        for later in fs::read_dir(dir.0.join("samples")).into_iter().flatten().flatten() {
            let name = later.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("step-")?.strip_suffix(".txt")?.parse().ok());
            if number.is_some_and(|number: usize| number > step) {
                fs::remove_file(later.path()).map_err(|e| Error::write(&later.path(), e))?;
            }
        }
        let evaluated = rows.last().map(|row| row.step);
        Ok(Self {
            dir: dir.clone(),
            train,
            eval,
            slow,
            stragglers: Stragglers::default(),
            hosts: Vec::new(),
            best,
            evaluated,
            progress: Progress::new(step, steps),
            lease,
        })
    }

    /// Makes sure that the directory is still this run's to write to.
    ///
    /// # Errors
    /// Communication, where another process has taken the run over.
    pub fn check(&self) -> Result<()> {
        self.lease.check()
    }

    /// Notes a step; it becomes a row of train.csv where `row` is given.
    pub fn step(&mut self, step: usize, loss: f64, row: Option<&TrainRow>) -> Result<()> {
        self.check()?;
        if let Some(row) = row {
            self.train.append(row)?;
        }
        self.progress.step(step, loss, row);
        Ok(())
    }

    /// Takes each rank's milliseconds of computing in a step, and names those that have become slow.
    pub fn compute_times(&mut self, step: usize, times: &[f64]) -> Result<()> {
        for slow in self.stragglers.step(times) {
            let row = RankRow {
                step,
                rank: slow.rank,
                host: self.hosts.get(slow.rank).cloned().unwrap_or_default(),
                compute_ms: rounded(slow.compute_ms),
                median_ms: rounded(slow.median_ms),
                factor: rounded(slow.factor()),
            };
            let RankRow { rank, host, compute_ms, median_ms, factor, .. } = &row;
            self.progress.say(|| {
                warn!(
                    "step {step}: rank {rank} on {host} computes {factor:.1} times as long as the median rank, \
                     {compute_ms:.0} ms and not {median_ms:.0} ms a step, and all wait for it; see what else runs there, \
                     or leave that node out"
                )
            });
            self.slow.append(&row)?;
        }
        Ok(())
    }

    /// Whether the evaluation of a step has been written.
    pub fn has_evaluation(&self, step: usize) -> bool {
        self.evaluated.is_some_and(|last| last >= step)
    }

    /// Whether the text generated at a step has been written.
    pub fn has_sample(&self, step: usize) -> bool {
        self.sample_path(step).exists()
    }

    fn sample_path(&self, step: usize) -> PathBuf {
        self.dir.0.join("samples").join(format!("step-{step:08}.txt"))
    }

    /// Writes an evaluation; whether it is the best so far.
    pub fn evaluation(&mut self, row: &EvalRow) -> Result<bool> {
        self.check()?;
        self.eval.append(row)?;
        self.evaluated = Some(row.step);
        let EvalRow { step, loss, ppl, .. } = *row;
        let improved = loss.is_finite() && self.best.is_none_or(|best| loss < best.loss);
        let mark = if improved { ", the best so far" } else { "" };
        self.progress.say(|| info!("step {step}: {} loss {loss:.4}, perplexity {ppl:.2}{mark}", row.split));
        if improved {
            self.best = Some(Best { step, loss });
        }
        Ok(improved)
    }

    /// Makes the rows so far durable: before a checkpoint is, so that none can outlive the rows of its steps.
    pub fn sync(&self) -> Result<()> {
        self.check()?;
        self.train.sync()?;
        self.eval.sync()
    }

    /// Publishes the best evaluation, once its checkpoint is there, and clears checkpoints no longer kept.
    pub fn saved(&mut self, keep_last: usize) -> Result<()> {
        self.check()?;
        if let Some(best) = &self.best {
            best.publish(&self.dir)?;
        }
        checkpoint::purge(&self.dir.checkpoints(), keep_last, self.best.map(|best| best.step))
    }

    /// Writes the text generated at a step.
    pub fn sample(&mut self, step: usize, text: &str) -> Result<()> {
        self.check()?;
        replace(&self.sample_path(step), text.as_bytes())
    }

    /// Says something without tearing the progress bar.
    pub fn say(&self, say: impl FnOnce()) {
        self.progress.say(say);
    }
}

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    steps: usize,
    last_line: Option<Instant>,
}

impl Progress {
    const BETWEEN_LINES: Duration = Duration::from_secs(10);

    fn new(step: usize, steps: usize) -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(steps as u64) } else { ProgressBar::hidden() };
        let template = "{bar:30} {pos}/{len} steps, {msg}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_position(step as u64);
        bar.reset_eta();
        Self { bar, steps, last_line: None }
    }

    fn step(&mut self, step: usize, loss: f64, row: Option<&TrainRow>) {
        let speed = row.map_or(String::new(), |row| format!(", {:.0} tokens/s", row.tokens_per_s));
        if !self.bar.is_hidden() {
            self.bar.set_message(format!("loss {loss:.4}{speed}"));
            self.bar.set_position(step as u64);
            if step == self.steps {
                self.bar.finish();
            }
            return;
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= Self::BETWEEN_LINES);
        if due || step == self.steps {
            info!("step {step}/{}: loss {loss:.4}{speed}", self.steps);
            self.last_line = Some(Instant::now());
        }
    }

    fn say(&self, say: impl FnOnce()) {
        self.bar.suspend(say);
    }
}

/// The verified checkpoint that a path names: the checkpoint's folder itself, or a run's newest good one.
///
/// # Errors
/// Storage, where there is none, or a byte of it is not what was written.
pub fn find_checkpoint(path: &Path) -> Result<PathBuf> {
    if path.join("MANIFEST.json").is_file() {
        checkpoint::verify(path)?;
        return Ok(path.to_path_buf());
    }
    checkpoint::latest(&path.join("checkpoints"))?.ok_or_else(|| {
        Error::Storage(format!(
            "{} is neither a checkpoint nor a run directory with one; name what `lockstep train` wrote",
            path.display()
        ))
        .into()
    })
}
