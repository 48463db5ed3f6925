//! The best evaluation of a run, whose checkpoint is spared.

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
    /// The best evaluation whose checkpoint is among those there.
    pub fn of(rows: &[EvalRow], checkpoints: &[(usize, PathBuf)]) -> Option<Self> {
        let there = |step: usize| checkpoints.iter().any(|(saved, _)| *saved == step);
        let valid = rows.iter().filter(|row| row.split == "valid" && row.loss.is_finite() && there(row.step));
        let best = valid.min_by(|a, b| a.loss.total_cmp(&b.loss))?;
        Some(Self { step: best.step, loss: best.loss })
    }

    /// Writes `best.json`.
    ///
    /// # Errors
    /// Storage, if it cannot be written.
    pub fn publish(&self, dir: &RunDir) -> Result<()> {
        write_durably(&dir.best(), (serde_json::to_string_pretty(self)? + "\n").as_bytes())
    }
}
