//! `checkpoint prove`: whether a run that is resumed ends with the bits of one that was never stopped, for a user's own
//! configuration, on the ranks and the device that it is started on.

use std::fs;
use std::path::Path;

use super::{train, Resume};
use crate::comm::Comm;
use crate::config::{Config, Train};
use crate::error::{Error, Result};
use crate::run::tables::{Table, TrainRow};
use crate::run::{checkpoint, RunDir};
use crate::stop::StopRequest;
use crate::watch::{Phase, Watchdog};

/// Trains `steps` steps straight, then the second half of them again from the checkpoint in the middle, and compares both
/// ends. The runs are in `folder`, which must not exist, and is removed once they are alike. `show` gets what was
/// compared, on rank 0.
///
/// # Errors
/// Storage, with the first difference, or if the folder exists; as [`train`].
pub fn prove(
    comm: &mut Comm,
    watchdog: &Watchdog,
    stop: &StopRequest,
    config: &Config,
    steps: usize,
    folder: &Path,
    mut show: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let half = steps / 2;
    let mut config = config.clone();
    // As short as can be: what does not change the weights is left out, and the learning rate follows from `steps`.
    let brief = Train {
        log_every: 1,
        eval_every: 0,
        save_every: half,
        sample_every: 0,
        keep_last: 2,
        tensorboard: false,
        ..config.train
    };
    config.train = brief.of_steps(steps);
    if comm.is_root() {
        let made = folder.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::create_dir(folder));
        made.map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::Storage(format!("{} exists, from an earlier proof; remove it first", folder.display())).into()
            }
            _ => Error::write(folder, e),
        })?;
    }
    let [straight, resumed] = ["straight", "resumed"].map(|name| RunDir(folder.join(name)));
    let middle = straight.checkpoint(half);
    for (dir, resume) in [(&straight, Resume::Never), (&resumed, Resume::From(middle))] {
        let plan = config.clone().validate(comm.world_size)?;
        train(comm, watchdog, stop, plan, &dir.0, &resume, &[])?;
    }
    watchdog.enter(Phase::Waiting, steps);
    watchdog.stop_heartbeats();
    comm.barrier(comm.deadlines.step)?; // no rank writes there any more
    watchdog.enter(Phase::Save, steps);
    if comm.is_root() {
        for line in compare(&straight, &resumed, half, steps)? {
            show(&line)?;
        }
        show(&format!("a run with this configuration resumes bit for bit: {} ranks", comm.world_size))?;
        fs::remove_dir_all(folder).map_err(|e| Error::write(folder, e))?;
    }
    // A launcher may end the job as soon as one rank leaves.
    comm.barrier(comm.deadlines.save)
}

/// What is alike; the first difference is an error.
fn compare(straight: &RunDir, resumed: &RunDir, half: usize, steps: usize) -> Result<Vec<String>> {
    let different = |what: String| {
        Error::Storage(format!(
            "the resumed run is not the straight one: {what}. On a GPU, `deterministic: true` picks kernels that add in a fixed \
             order; on a CPU, nothing but a defect explains this, please report it. Both runs are kept in {}",
            straight.0.parent().unwrap_or(&straight.0).display()
        ))
    };
    let rows = |dir: &RunDir| Table::rows::<TrainRow>(&dir.0.join("train.csv"));
    let (expected, found) = (rows(straight)?, rows(resumed)?);
    if expected.len() != steps || found.len() != steps - half {
        return Err(different(format!("{} rows after step {half}, expected {}", found.len(), steps - half)).into());
    }
    for (expected, found) in expected[half..].iter().zip(&found) {
        let numbers = |row: &TrainRow| {
            [("loss", row.loss), ("lr", row.lr), ("grad_norm", row.grad_norm), ("tokens", row.tokens as f64)]
        };
        for ((name, then), (_, now)) in numbers(expected).into_iter().zip(numbers(found)) {
            if then.to_bits() != now.to_bits() {
                return Err(different(format!("{name} of step {} is {now}, was {then}", expected.step)).into());
            }
        }
    }
    let mut alike = vec![format!("steps {} to {steps}: tokens, loss, lr and grad_norm are alike", half + 1)];
    for name in checkpoint::tensor_files(&straight.checkpoint(steps))? {
        let read = |dir: &RunDir| {
            let path = dir.checkpoint(steps).join(&name);
            fs::read(&path).map_err(|e| different(format!("cannot read {}: {e}", path.display())))
        };
        if read(straight)? != read(resumed)? {
            return Err(different(format!("{name} of step {steps} has other bytes")).into());
        }
        alike.push(format!("step {steps}, {name}: alike"));
    }
    Ok(alike)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The log and the last checkpoint of steps `from` to 4.
    fn run(folder: &Path, name: &str, from: usize, loss: f64, weights: &str) -> RunDir {
        let dir = RunDir(folder.join(name));
        let last = dir.checkpoint(4);
        fs::create_dir_all(&last).unwrap();
        let (mut log, _) = Table::open::<TrainRow>(&dir.0.join("train.csv"), 0).unwrap();
        for step in from..=4 {
            let loss = if step == 3 { loss } else { 2.0 };
            let row = TrainRow { step, tokens: 8 * step as u64, loss, lr: 0.1, grad_norm: 1.0, ..TrainRow::default() };
            log.append(&row).unwrap();
        }
        let names = ["model.safetensors", "optimizer.safetensors", "state.json"];
        let entries = names.map(|name| format!(r#""{name}": {{"size": 1, "sha256": ""}}"#)).join(", ");
        fs::write(last.join("MANIFEST.json"), format!(r#"{{"format_version": 1, "files": {{{entries}}}}}"#)).unwrap();
        fs::write(last.join("model.safetensors"), weights).unwrap();
        fs::write(last.join("optimizer.safetensors"), "o").unwrap();
        dir
    }

    #[test]
    fn the_first_difference_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let straight = run(folder.path(), "straight", 1, 1.5, "w");
        let same = run(folder.path(), "same", 3, 1.5, "w");
        assert_eq!(compare(&straight, &same, 2, 4).unwrap().len(), 3);
        let fails = |other: &RunDir| {
            let error = compare(&straight, other, 2, 4).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 4);
            error.to_string()
        };
        let said = fails(&run(folder.path(), "loss", 3, 1.5000000000000002, "w"));
        assert!(said.contains("loss of step 3 is 1.5000000000000002, was 1.5"), "{said}");
        let said = fails(&run(folder.path(), "weights", 3, 1.5, "v"));
        assert!(said.contains("model.safetensors of step 4 has other bytes"), "{said}");
        let said = fails(&run(folder.path(), "short", 4, 1.5, "w"));
        assert!(said.contains("1 rows after step 2, expected 2"), "{said}");
    }
}
