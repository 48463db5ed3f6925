//! What rank 0 writes during a run.

use std::fs;

use tracing::{info, warn};

use super::checkpoint;
use super::events::Events;
use super::lease::Lease;
use super::progress::Progress;
use super::tables::{rounded, EvalRow, RankRow, Table, TrainRow};
use super::{Best, RunDir};
use crate::config::Train;
use crate::error::{Error, Result};
use crate::files::write_durably;
use crate::watch::Stragglers;

/// The files that grow during a run, and what a person sees of it.
pub struct Recorder {
    dir: RunDir,
    train: Table,
    eval: Table,
    slow: Table,
    events: Option<Events>,
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
    /// Opens the files of a run that resumes after `step` steps.
    ///
    /// # Errors
    /// Storage, if a file cannot be written.
    pub fn open(dir: &RunDir, lease: Lease, step: usize, train_keys: &Train) -> Result<Self> {
        let (train, _) = Table::open::<TrainRow>(&dir.train_csv(), step)?;
        let (eval, rows) = Table::open::<EvalRow>(&dir.eval_csv(), step)?;
        let (slow, _) = Table::open::<RankRow>(&dir.ranks_csv(), step)?;
        let best = Best::of(&rows, Best::noted(dir), &checkpoint::list(&dir.checkpoints()));
        match best {
            Some(best) => best.publish(dir)?,
            // What a run left that was killed after its first evaluation and before its first checkpoint.
            None if dir.best().exists() => fs::remove_file(dir.best()).map_err(|e| Error::write(&dir.best(), e))?,
            None => {}
        }
        // Later samples belong to steps that will be done again, perhaps otherwise.
        for later in fs::read_dir(dir.samples()).into_iter().flatten().flatten() {
            let name = later.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("step-")?.strip_suffix(".txt")?.parse().ok());
            if number.is_some_and(|number: usize| number > step) {
                fs::remove_file(later.path()).map_err(|e| Error::write(&later.path(), e))?;
            }
        }
        let events = train_keys.tensorboard.then(|| Events::begin(&dir.0, step)).transpose()?;
        let evaluated = rows.last().map(|row| row.step);
        Ok(Self {
            dir: dir.clone(),
            train,
            eval,
            slow,
            events,
            stragglers: Stragglers::default(),
            hosts: Vec::new(),
            best,
            evaluated,
            progress: Progress::new(step, train_keys.steps),
            lease,
        })
    }

    /// Makes sure that the directory is still this run's to write to.
    ///
    /// # Errors
    /// Communication, if another process has taken the run over.
    pub fn check(&self) -> Result<()> {
        self.lease.check()
    }

    /// Notes a step; it becomes a row of train.csv if `row` is given.
    pub fn step(&mut self, step: usize, loss: f64, row: Option<&TrainRow>) -> Result<()> {
        self.check()?;
        if let Some(row) = row {
            self.train.append(row)?;
            self.events.as_mut().map_or(Ok(()), |events| events.row("train", row))?;
        }
        self.progress.step(step, loss, row);
        Ok(())
    }

    /// Takes each rank's pace of computing after a step, and names those that have become slow.
    pub fn paces(&mut self, step: usize, paces: &[f64]) -> Result<()> {
        for slow in self.stragglers.step(paces) {
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
        self.dir.sample(step).exists()
    }

    /// Writes an evaluation; whether it is the best so far.
    pub fn evaluation(&mut self, row: &EvalRow) -> Result<bool> {
        self.check()?;
        self.eval.append(row)?;
        self.events.as_mut().map_or(Ok(()), |events| events.row(&row.split, row))?;
        self.evaluated = Some(row.step);
        let EvalRow { step, loss, ppl, .. } = *row;
        let improved = loss.is_finite() && self.best.is_none_or(|best| loss < best.loss);
        let mark = if improved { ", the best so far" } else { "" };
        let split = &row.split;
        self.progress.say(|| {
            info!(step, split, loss, ppl, "step {step}: {split} loss {loss:.4}, perplexity {ppl:.2}{mark}");
        });
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
        write_durably(&self.dir.sample(step), text.as_bytes())
    }

    /// Says something without tearing the progress bar.
    pub fn say(&self, say: impl FnOnce()) {
        self.progress.say(say);
    }
}
