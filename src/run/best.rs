//! The best evaluation of a run, whose checkpoint is spared.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::tables::EvalRow;
use super::RunDir;
use crate::error::Result;
use crate::files::write_durably;

/// The best evaluation so far: `best.json`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step whose checkpoint is spared.
    pub step: usize,
    /// Token mean over the validation split.
    pub loss: f64,
}

impl Best {
    /// The best evaluation whose checkpoint is among those there: of the rows, and of the one noted before, whose row may be
    /// missing.
    pub fn of(rows: &[EvalRow], noted: Option<Self>, checkpoints: &[(usize, PathBuf)]) -> Option<Self> {
        let there = |step: usize| checkpoints.iter().any(|(saved, _)| *saved == step);
        let valid = rows.iter().filter(|row| row.split == "valid").map(|row| Self { step: row.step, loss: row.loss });
        let all = valid.chain(noted).filter(|best| best.loss.is_finite() && there(best.step));
        all.min_by(|a, b| a.loss.total_cmp(&b.loss))
    }

    /// What `best.json` notes; `None` if it is damaged or missing.
    pub fn noted(dir: &RunDir) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.best()).ok()?).ok()
    }

    /// Writes `best.json`.
    ///
    /// # Errors
    /// Storage, if it cannot be written.
    pub fn publish(&self, dir: &RunDir) -> Result<()> {
        write_durably(&dir.best(), (serde_json::to_string_pretty(self)? + "\n").as_bytes())
    }
}
