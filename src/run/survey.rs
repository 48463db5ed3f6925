//! What a run has come to, seen from outside: nothing is written, nothing is waited for, and nothing need be whole.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::checkpoint;
use super::growing::last_row;
use super::tables::{EvalRow, Table, TrainRow};
use super::{Best, RunDir};

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// A process trains there.
    Running,
    /// All steps are done and saved.
    Finished,
    /// Stopped on request, with its state saved.
    Stopped,
    /// Ended with an error, which its logs tell.
    Failed,
    /// Ended without a word.
    Killed,
    /// Never trained: its weights come from elsewhere.
    Imported,
}

impl State {
    /// As tables show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Killed => "killed",
            Self::Imported => "imported",
        }
    }
}

/// What a run has come to. What is unknown is `None`.
#[derive(Debug, Clone, PartialEq)]
pub struct Survey {
    #[allow(missing_docs)]
    pub state: State,
    /// Optimizer steps done.
    pub step: usize,
    /// Steps that the run is to have.
    pub steps: Option<usize>,
    /// Of the last row of train.csv.
    pub loss: Option<f64>,
    /// The lowest perplexity of the validation split.
    pub best_ppl: Option<f64>,
    /// Of the last row of train.csv.
    pub tokens_per_s: Option<f64>,
    /// How often the run was resumed.
    pub restarts: usize,
    /// Seconds since its last row, or since it was started if it has none, by this machine's clock.
    pub age_s: Option<u64>,
}

/// Whether a folder is a run directory, perhaps one that was begun just now.
pub fn is_run(folder: &Path) -> bool {
    let dir = RunDir(folder.to_path_buf());
    dir.config().is_file() && (dir.checkpoints().is_dir() || dir.train_csv().is_file())
}

impl Survey {
    /// Looks at a run; `is_held` says whether a process trains there.
    pub fn of(dir: &RunDir, is_held: bool) -> Self {
        let last: Option<TrainRow> = last_row(&dir.train_csv()).ok().flatten();
        let steps = dir.load_config().ok().map(|config| config.train.steps);
        let saved = checkpoint::list(&dir.checkpoints());
        let saved = saved.last();
        let saved_step = saved.map_or(0, |(step, _)| *step);
        let is_imported = || saved.is_some_and(|(_, path)| checkpoint::load_state(path).is_ok_and(|s| s.is_imported()));
        let state = if is_held {
            State::Running
        } else if last.is_none() && is_imported() {
            State::Imported
        } else if steps.is_some_and(|steps| saved_step >= steps) {
            State::Finished
        } else {
            ending(dir, last.as_ref().map(|row| row.world_size))
        };
        Self {
            state,
            step: last.as_ref().map_or(0, |row| row.step).max(saved_step),
            steps: steps.filter(|_| state != State::Imported),
            loss: last.as_ref().map(|row| row.loss),
            best_ppl: best_ppl(dir),
            tokens_per_s: last.map(|row| row.tokens_per_s),
            restarts: restarts(&dir.log(0)),
            age_s: age(dir).map(|age| age.as_secs()),
        }
    }
}

fn best_ppl(dir: &RunDir) -> Option<f64> {
    let rows: Vec<EvalRow> = Table::rows(&dir.eval_csv()).unwrap_or_default();
    let valid = rows.iter().filter(|row| row.split == "valid").map(|row| row.ppl);
    let noted = Best::noted(dir).map(|best| best.loss.exp());
    valid.chain(noted).filter(|ppl| ppl.is_finite()).min_by(f64::total_cmp)
}

/// How a run ended that is neither going on nor finished, by each rank's log.
fn ending(dir: &RunDir, world_size: Option<usize>) -> State {
    let logs = dir.log(0).parent().map(Path::to_path_buf).unwrap_or_default();
    let logs = fs::read_dir(logs).into_iter().flatten().flatten().map(|entry| entry.path());
    // An earlier start may have had more ranks.
    let is_of_these = |path: &PathBuf| world_size.is_none_or(|n| (0..n).any(|rank| dir.log(rank) == *path));
    let last_words: Vec<String> = logs.filter(is_of_these).filter_map(|path| last_error(&path)).collect();
    match last_words.iter().any(|line| !line.contains("stopped on request")) {
        true => State::Failed,
        false if last_words.is_empty() => State::Killed,
        false => State::Stopped,
    }
}

/// The error that a rank's last training ended with. A command that was refused afterwards has trained nothing.
fn last_error(log: &Path) -> Option<String> {
    let mut error = None;
    for line in lines(log) {
        match level(&line) {
            "ERROR" => error = Some(line),
            "INFO" if is_begin(&line) => error = None,
            _ => {}
        }
    }
    error
}

fn lines(log: &Path) -> impl Iterator<Item = String> {
    let lines = File::open(log).ok().into_iter().flat_map(|file| BufReader::new(file).split(b'\n'));
    lines.map_while(Result::ok).map(|line| String::from_utf8_lossy(&line).into_owned())
}

/// Whether a rank says that it begins to train.
fn is_begin(line: &str) -> bool {
    line.contains(" INFO rank ") && line.contains(" computes ")
}

/// The level of a line of a log, which begins with a time as 12:30:00Z; empty if it does not.
fn level(line: &str) -> &str {
    let mut words = line.split_whitespace();
    let time = words.next().unwrap_or_default();
    match time.len() == 9 && time.ends_with('Z') && time.split(':').count() == 3 {
        true => words.next().unwrap_or_default(),
        false => "",
    }
}

/// How often the log of rank 0 tells that the run was resumed and trained on.
fn restarts(log: &Path) -> usize {
    let (mut resumes, mut restarts) = (false, 0);
    for line in lines(log) {
        if line.contains(" INFO resuming from ") {
            resumes = true;
        } else if is_begin(&line) {
            restarts += usize::from(std::mem::take(&mut resumes));
        } else if line.contains(" INFO ") && line.contains(" is complete: ") {
            resumes = false;
        }
    }
    restarts
}

fn age(dir: &RunDir) -> Option<Duration> {
    let changed = |path: PathBuf| fs::metadata(path).ok()?.modified().ok();
    let last = changed(dir.train_csv()).or_else(|| changed(dir.config()))?;
    // A clock that is ahead of this one means: just now.
    Some(last.elapsed().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_run_is_read_in_the_logs_of_all_ranks() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir(folder.path().into());
        fs::create_dir(folder.path().join("logs")).unwrap();
        let write = |rank, text: &str| fs::write(dir.log(rank), text).unwrap();
        assert_eq!(ending(&dir, None), State::Killed);
        write(0, "10:00:00Z  INFO step 3/9: loss 5.1\n");
        write(1, "");
        assert_eq!(ending(&dir, None), State::Killed);
        let stop = "10:00:05Z ERROR stopped on request after step 3 of 9\n";
        write(0, stop);
        write(1, stop);
        assert_eq!(ending(&dir, None), State::Stopped);
        write(1, "10:00:05Z ERROR cannot write x: no space\nand a line more ERROR\n");
        assert_eq!(ending(&dir, None), State::Failed);
        // Rank 1 was of an earlier start.
        assert_eq!(ending(&dir, Some(1)), State::Stopped);
        // It was started again after its error.
        write(1, "10:00:05Z ERROR cannot write x\n10:01:00Z  INFO rank 1 computes 4 of the 8 sequences of each step\n");
        let resumed = "10:00:05Z ERROR lost\n10:01:00Z  INFO resuming from x after 2 steps\n\
            10:01:00Z  INFO rank 0 computes 4 of the 8 sequences of each step\n10:02:00Z  WARN slow\n";
        write(0, resumed);
        assert_eq!(ending(&dir, None), State::Killed);
        assert_eq!(restarts(&dir.log(0)), 1);
        // Then a command was refused, and one found nothing to do.
        let more = "10:03:00Z  WARN refused: x was 1 and is 2\n10:04:00Z  INFO resuming from x after 2 steps\n\
            10:04:00Z  INFO the run in x is complete: 2 steps; --set train.steps=N goes on\n";
        write(0, &format!("{resumed}{more}"));
        assert_eq!(ending(&dir, None), State::Killed);
        assert_eq!(restarts(&dir.log(0)), 1);
        write(0, &format!("{resumed}10:02:30Z ERROR stopped on request after step 4 of 9\n{more}"));
        assert_eq!(ending(&dir, Some(1)), State::Stopped);
    }
}
