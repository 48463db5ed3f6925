//! Where everything is in a run directory, and whose it is.

use std::fs;
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::checkpoint::{self, State};
use super::tables::{gap, EvalRow, RankRow, Table, TrainRow};
use crate::config::{Config, Train};
use crate::error::{Error, Result};
use crate::files::{sync_name, write_durably};
use crate::optim::schedule::decay;

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

    /// The checkpoint of a step.
    pub fn checkpoint(&self, step: usize) -> PathBuf {
        self.checkpoints().join(checkpoint::name(step))
    }

    /// A row for each step.
    pub fn train_csv(&self) -> PathBuf {
        self.0.join("train.csv")
    }

    /// A row for each evaluation.
    pub fn eval_csv(&self) -> PathBuf {
        self.0.join("eval.csv")
    }

    /// A row each time that a rank has become slow.
    pub fn ranks_csv(&self) -> PathBuf {
        self.0.join("ranks.csv")
    }

    /// Text generated along the way.
    pub fn samples(&self) -> PathBuf {
        self.0.join("samples")
    }

    /// Text generated at a step.
    pub fn sample(&self, step: usize) -> PathBuf {
        self.samples().join(format!("{}.txt", checkpoint::name(step)))
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.yaml")
    }

    /// The configuration that the run had until a step, if it learns something else from there on.
    pub fn config_until(&self, step: usize) -> PathBuf {
        self.0.join(format!("config.{}.yaml", checkpoint::name(step)))
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
    /// Storage, if a folder or a file cannot be made.
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
        let _ = sync_name(&self.0);
        sync_name(&self.checkpoints()).map_err(|e| Error::write(&self.checkpoints(), e))?;
        write_durably(&self.config(), (config.to_yaml()? + END_OF_CONFIG).as_bytes())?;
        write_durably(&self.tokenizer(), &fs::read(tokenizer).map_err(|e| Error::read(tokenizer, e))?)?;
        // An earlier job's heartbeats are not mistaken for this one's.
        let _ = fs::remove_dir_all(self.heartbeats());
        make(&self.heartbeats())
    }

    /// The configuration that the run was last started with.
    ///
    /// # Errors
    /// Storage, if the file is not whole; usage, as [`Config::load`].
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

    /// Says in which keys `config` differs from what the run had until `step`, and keeps the older configuration if the run
    /// learns something else from here on.
    ///
    /// # Errors
    /// Storage, if the older configuration is not whole or its copy cannot be written.
    pub fn note_changes(&self, config: &Config, step: usize) -> Result<()> {
        if !self.config().exists() {
            return Ok(());
        }
        let older = self.load_config()?;
        for (key, then, now) in config.differences(&older)? {
            info!("{key} {then} -> {now} from step {step}");
        }
        let copy = self.config_until(step);
        // Of several changes after the same step, only the first replaces what the run was trained with.
        if !config.changes_since(&older)?.is_empty() && !copy.exists() {
            write_durably(&copy, (older.to_yaml()? + END_OF_CONFIG).as_bytes())?;
        }
        Ok(())
    }

    /// Refuses logs that reach further than a run without a checkpoint can have come: its checkpoints are missing.
    ///
    /// # Errors
    /// Storage, with what to do.
    pub fn check_logs(&self, save_every: usize) -> Result<()> {
        let rows: Vec<TrainRow> = Table::rows(&self.train_csv())?;
        match rows.last() {
            // The first save may still have been on its way when the second was due.
            Some(row) if save_every > 0 && row.step > 2 * save_every => Err(Error::Storage(format!(
                "{} has the log of {} steps but no checkpoint; bring its checkpoints back, or start a new run in another \
                 --run-dir",
                self.0.display(),
                row.step
            ))
            .into()),
            _ => Ok(()),
        }
    }

    /// Refuses tables that a run which goes on after `step` could not take up, before anything is changed; names rows that are
    /// missing.
    ///
    /// # Errors
    /// Storage, with the file and the line.
    pub fn check_tables(&self, step: usize, train: &Train) -> Result<()> {
        let rows: Vec<TrainRow> = Table::rows(&self.train_csv())?;
        let evaluations: Vec<EvalRow> = Table::rows(&self.eval_csv())?;
        let _: Vec<RankRow> = Table::rows(&self.ranks_csv())?;
        // An evaluation of the last step may still be due.
        let gaps = [
            (self.train_csv(), gap(rows.iter().map(|row| row.step), train.log_every, step)),
            (self.eval_csv(), gap(evaluations.iter().map(|row| row.step), train.eval_every, step.saturating_sub(1))),
        ];
        for (path, gap) in gaps {
            let Some((first, last)) = gap else { continue };
            warn!(
                "{} has no row of steps {first} to {last}: it was changed; the run goes on without them",
                path.display()
            );
        }
        Ok(())
    }

    /// Refuses another tokenizer, and a configuration that differs from the directory's own in what is learnt. `then` is the
    /// state that the run goes on from, `now` that of this start: what `auto` and a path stood for then, and stand for now.
    ///
    /// # Errors
    /// Usage, with each key and both values; data, where the ids of the data folder mean other text than the model's.
    pub fn check(
        &self,
        config: &Config,
        tokenizer: &Path,
        allowed: &[String],
        then: &State,
        now: &State,
    ) -> Result<()> {
        self.check_tokenizer(tokenizer)?;
        if !self.config().exists() {
            return Ok(());
        }
        let older = self.load_config()?;
        let alike = |key: &str| match key {
            "device" => then.conditions.device == now.conditions.device,
            "data.micro_batch" => then.conditions.micro_batch == now.conditions.micro_batch,
            "data.dir" => then.data_sha256 == now.data_sha256,
            "optim.decay_steps" => decay(&older.optim, older.train.steps) == decay(&config.optim, config.train.steps),
            _ => false,
        };
        let mut changes = config.changes_since(&older)?;
        changes.retain(|(key, ..)| !allowed.contains(key) && !alike(key));
        if changes.is_empty() {
            return Ok(());
        }
        let flags: Vec<String> = changes.iter().map(|(key, ..)| format!("--allow-config-change {key}")).collect();
        let changes: Vec<String> =
            changes.iter().map(|(key, then, now)| format!("{key} was {then} and is {now}")).collect();
        Err(Error::Usage(format!(
            "{} belongs to a run with another configuration: {}; use another --run-dir, or allow it with {}",
            self.0.display(),
            changes.join(", "),
            flags.join(" ")
        ))
        .into())
    }

    /// Refuses another tokenizer than the run's; a run that has none yet takes any.
    ///
    /// # Errors
    /// Data, with both files: the same ids would mean other text.
    pub fn check_tokenizer(&self, tokenizer: &Path) -> Result<()> {
        let read = |path: &Path| fs::read(path).map_err(|e| Error::read(path, e));
        let own = self.tokenizer();
        if !own.exists() || read(&own)? == read(tokenizer)? {
            return Ok(());
        }
        Err(Error::Data(format!(
            "{} is not the tokenizer that {} was trained with ({}); prepare the text with --tokenizer {}",
            tokenizer.display(),
            self.0.display(),
            own.display(),
            own.display()
        ))
        .into())
    }

    /// The run that a checkpoint lies in.
    pub fn of_checkpoint(checkpoint: &Path) -> Option<Self> {
        // Shown as it was named, unless that leads nowhere: a link, or the checkpoint's bare name.
        let above = |path: &Path| Some(Self(path.parent()?.parent()?.to_path_buf()));
        let named = above(checkpoint).filter(|dir| dir.config().is_file());
        named.or_else(|| above(&checkpoint.canonicalize().ok()?).filter(|dir| dir.config().is_file()))
    }
}

/// The verified checkpoint that a path names: the checkpoint's folder itself, or a run's newest good one.
///
/// # Errors
/// Storage, if there is none, or a byte of it is not what was written.
pub fn find_checkpoint(path: &Path) -> Result<PathBuf> {
    if checkpoint::is_complete(path) {
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
