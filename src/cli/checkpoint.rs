//! `lockstep checkpoint list` and `verify`.

use std::fs;
use std::path::{Path, PathBuf};

use super::print;
use crate::error::{Error, Result};
use crate::run::{checkpoint, RunDir};

/// Prints step, size and folder of each checkpoint of a run.
pub fn list(run_dir: &Path) -> Result<()> {
    for (step, path) in checkpoints(run_dir)? {
        let files = fs::read_dir(&path).into_iter().flatten().flatten();
        let bytes: u64 = files.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
        print(&format!("{step}\t{:.1} MiB\t{}", bytes as f64 / 1048576.0, path.display()))?;
    }
    Ok(())
}

/// Compares every byte of a run's checkpoints with what was written.
pub fn verify(run_dir: &Path) -> Result<()> {
    let found = checkpoints(run_dir)?;
    let mut bad = Vec::new();
    for (step, path) in &found {
        match checkpoint::verify(path) {
            Ok(()) => print(&format!("{step}\tgood\t{}", path.display()))?,
            Err(error) => bad.push(format!("{error:#}")),
        }
    }
    match bad.is_empty() {
        true => Ok(()),
        false => Err(Error::Storage(format!(
            "{} of {} checkpoints are damaged: {}; `--resume auto` passes over them",
            bad.len(),
            found.len(),
            bad.join("; ")
        ))
        .into()),
    }
}

/// A run's checkpoints by step; there is at least one.
pub fn checkpoints(run_dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let found = checkpoint::list(&RunDir(run_dir.to_path_buf()).checkpoints());
    if found.is_empty() {
        let message = format!("{} holds no checkpoint; name the folder that `lockstep train` wrote", run_dir.display());
        return Err(Error::Storage(message).into());
    }
    Ok(found)
}
