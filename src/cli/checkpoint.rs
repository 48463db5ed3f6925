//! `lockstep checkpoint list` and `verify`.

use std::fs;
use std::path::{Path, PathBuf};

use super::print;
use crate::error::{Error, Result};
use crate::run::{checkpoint, RunDir};

/// Prints step, size and folder of each checkpoint of a run.
pub fn list(run_dir: &Path) -> Result<()> {
    let size = |path: &Path| -> u64 {
        let files = fs::read_dir(path).into_iter().flatten().flatten();
        files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
    };
    let show = |step, path: &Path, bytes: u64| {
        print::line(&format!("{step}\t{:.1} MiB\t{}", bytes as f64 / 1048576.0, path.display()))
    };
    for_each(run_dir, size, show)
}

/// Compares every byte of a run's checkpoints with what was written.
pub fn verify(run_dir: &Path) -> Result<()> {
    let (mut looked_at, mut bad) = (0, Vec::new());
    for_each(run_dir, checkpoint::verify, |step, path, verified| {
        looked_at += 1;
        match verified {
            Ok(()) => print::line(&format!("{step}\tgood\t{}", path.display()))?,
            Err(error) => bad.push(format!("{error:#}")),
        }
        Ok(())
    })?;
    match bad.is_empty() {
        true => Ok(()),
        false => Err(Error::Storage(format!(
            "{} of {looked_at} checkpoints are damaged: {}; `--resume auto` passes over them",
            bad.len(),
            bad.join("; ")
        ))
        .into()),
    }
}

/// Looks at each checkpoint of a run and shows what was seen, unless the run that goes on has removed it meanwhile.
fn for_each<T>(
    run_dir: &Path,
    look: impl Fn(&Path) -> T,
    mut show: impl FnMut(usize, &Path, T) -> Result<()>,
) -> Result<()> {
    for _ in 0..checkpoint::ATTEMPTS {
        let mut is_shown = false;
        for (step, path) in checkpoints(run_dir)? {
            let seen = look(&path);
            if checkpoint::is_complete(&path) {
                show(step, &path, seen)?;
                is_shown = true;
            }
        }
        if is_shown {
            return Ok(());
        }
    }
    Err(checkpoint::removed_too_fast(&RunDir(run_dir.to_path_buf()).checkpoints()))
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
