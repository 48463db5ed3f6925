//! Which checkpoints there are, and the one that somebody wants, while the run that they are of may go on: it keeps few, and
//! removes the others under whoever reads them.

use std::fs;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::{verify, MANIFEST};
use crate::error::{Error, Result};

/// Complete checkpoints in a folder, by step; a folder without a manifest is not one.
pub fn list(checkpoints: &Path) -> Vec<(usize, PathBuf)> {
    for _ in 1..ATTEMPTS {
        let (complete, others): (Vec<_>, Vec<_>) =
            named(checkpoints).into_iter().partition(|(_, path)| is_complete(path));
        // If the only one was removed just now, the one for which it was is there.
        if !complete.is_empty() || others.iter().all(|(_, path)| path.exists()) {
            return complete;
        }
    }
    Vec::new()
}

/// The folders that bear a checkpoint's name, by step.
fn named(checkpoints: &Path) -> Vec<(usize, PathBuf)> {
    let entries = fs::read_dir(checkpoints).into_iter().flatten().flatten();
    let step = |entry: &fs::DirEntry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
    let mut found: Vec<(usize, PathBuf)> = entries.filter_map(|entry| Some((step(&entry)?, entry.path()))).collect();
    found.sort();
    found
}

/// Whether a checkpoint is there, and not removed meanwhile by the run that it is of: a run that goes on keeps few.
pub fn is_complete(checkpoint: &Path) -> bool {
    checkpoint.join(MANIFEST).is_file()
}

/// How often a checkpoint is looked for again that was removed while it was read.
pub const ATTEMPTS: usize = 20;

/// Chooses a checkpoint and reads it; chooses again if it was removed meanwhile.
///
/// # Errors
/// Those of `choose` and `read`. Storage, if one after another was removed.
pub fn read_chosen<T>(choose: impl Fn() -> Result<PathBuf>, mut read: impl FnMut(&Path) -> Result<T>) -> Result<T> {
    let mut removed = PathBuf::new();
    for _ in 0..ATTEMPTS {
        let path = choose()?;
        match read(&path) {
            // The same again is no other's to remove: it was never there.
            Err(_) if !is_complete(&path) && path != removed => removed = path,
            done => return done,
        }
    }
    Err(removed_too_fast(removed.parent().unwrap_or(&removed)))
}

/// The error of a reader that a run's removals outran.
pub fn removed_too_fast(checkpoints: &Path) -> anyhow::Error {
    Error::Storage(format!(
        "{ATTEMPTS} times, a checkpoint in {} was removed while it was read; the run that saves there keeps more with a larger \
         train.keep_last",
        checkpoints.display()
    ))
    .into()
}

/// The newest checkpoint whose every byte is what was written; bad ones are named aloud and passed over.
///
/// # Errors
/// Storage, where there are checkpoints but none is good.
pub fn latest(checkpoints: &Path) -> Result<Option<PathBuf>> {
    'again: for _ in 0..ATTEMPTS {
        let mut bad = Vec::new();
        for (_, path) in list(checkpoints).into_iter().rev() {
            match verify(&path) {
                Ok(()) => {
                    bad.iter().for_each(|error| warn!("passing over a checkpoint: {error}"));
                    return Ok(Some(path));
                }
                // There is a newer one.
                Err(_) if !is_complete(&path) => continue 'again,
                Err(error) => bad.push(format!("{error:#}")),
            }
        }
        if bad.is_empty() {
            return Ok(None);
        }
        return Err(Error::Storage(format!(
            "no checkpoint in {} can be used: {}; restore one, or start anew in another --run-dir",
            checkpoints.display(),
            bad.join("; ")
        ))
        .into());
    }
    Err(removed_too_fast(checkpoints))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::*;
    use super::*;

    /// Saves a checkpoint as a run that keeps one does: the one before it goes.
    fn save(checkpoints: &Path, step: usize) -> PathBuf {
        let (target, temporary) = (checkpoints.join(name(step)), checkpoints.join(name(step) + TEMPORARY));
        fs::create_dir_all(&temporary).unwrap();
        let files = [MODEL, WHOLE].map(|file| {
            fs::write(temporary.join(file), "tensors").unwrap();
            (file.to_owned(), digest(&temporary.join(file)).unwrap())
        });
        let conditions = Conditions {
            lockstep: String::new(),
            libtorch: String::new(),
            device: String::new(),
            hardware: String::new(),
            world_size: 1,
            threads: 1,
            micro_batch: 1,
        };
        let data_sha256 = String::new();
        let state = State { format_version: FORMAT_VERSION, step, tokens: 0, elapsed_s: 0.0, data_sha256, conditions };
        complete(&temporary, &target, &state, BTreeMap::from(files), &|| Ok(())).unwrap();
        purge(checkpoints, 1, None).unwrap();
        target
    }

    #[test]
    fn a_reader_takes_the_next_checkpoint_if_one_is_removed_under_it() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = folder.path();
        save(checkpoints, 1);
        let choose = || Ok(latest(checkpoints)?.unwrap());
        let mut seen = Vec::new();
        let read = |path: &Path| {
            seen.push(path.file_name().unwrap().to_str().unwrap().to_owned());
            // The run goes on while the first three are read.
            if seen.len() <= 3 {
                save(checkpoints, seen.len() + 1);
            }
            verify(path).and_then(|()| load_state(path))
        };
        assert_eq!(read_chosen(choose, read).unwrap().step, 4);
        assert_eq!(seen, [1, 2, 3, 4].map(name));
    }

    #[test]
    fn a_reader_that_is_outrun_gives_up_and_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = folder.path();
        let mut step = 1;
        save(checkpoints, step);
        let read = |path: &Path| {
            step += 1;
            save(checkpoints, step);
            verify(path)
        };
        let error = read_chosen(|| Ok(latest(checkpoints)?.unwrap()), read).unwrap_err().to_string();
        assert!(error.contains("20 times") && error.contains("train.keep_last"), "{error}");
    }

    #[test]
    fn what_is_damaged_or_was_never_there_is_not_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let damaged = save(folder.path(), 1);
        fs::write(damaged.join(MODEL), "tensorz").unwrap();
        for path in [damaged, folder.path().join(name(2))] {
            let mut times = 0;
            let read = |path: &Path| {
                times += 1;
                verify(path)
            };
            let error = read_chosen(|| Ok(path.clone()), read).unwrap_err().to_string();
            assert!(times <= 2 && error.contains(&path.display().to_string()), "{times}: {error}");
        }
    }
}
