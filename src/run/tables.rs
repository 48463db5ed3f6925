//! The CSV files of a run: what a row holds, and how a resumed run takes a file up again.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::write_durably;

/// A row of train.csv. An unknown number is an empty cell.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TrainRow {
    /// Optimizer steps done; the first row is 1.
    pub step: usize,
    /// Tokens predicted so far, over all ranks.
    pub tokens: u64,
    /// The loss that this step minimises (`train.loss`), over the whole batch, with dropout.
    pub loss: f64,
    /// exp(loss).
    pub ppl: f64,
    /// Learning rate.
    pub lr: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
    /// Rank 0's time for the step, without evaluation, saving and sampling. The next four columns add up to it.
    pub step_ms: f64,
    /// Reading the batch; on a GPU, the part that the computation did not hide.
    pub data_ms: f64,
    /// Forward and backward pass.
    pub compute_ms: f64,
    /// Adding gradients over the ranks, the part that the backward pass did not hide; includes waiting for slower ranks.
    pub comm_exposed_ms: f64,
    /// Clipping and update.
    pub optimizer_ms: f64,
    /// Tokens a second of all ranks together, since the row before.
    pub tokens_per_s: f64,
    /// Model FLOP/s utilisation: the share of the speed at which this machine multiplies large matrices, measured at the
    /// start. The log compares that speed with the data sheet's at the start, if it knows the card.
    pub mfu: Option<f64>,
    /// The most memory of any rank so far: resident on a CPU; on a GPU what its tensors took, as PyTorch's
    /// `max_memory_allocated` counts, without what CUDA, NCCL and the allocator's cache hold besides.
    pub memory_mib: Option<f64>,
    /// Number of ranks.
    pub world_size: usize,
    /// Training time so far, over all restarts.
    pub elapsed_s: f64,
}

/// A row of eval.csv.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EvalRow {
    /// Optimizer steps done.
    pub step: usize,
    /// `valid` or `test`.
    pub split: String,
    /// Mean over all tokens of the split, without dropout.
    pub loss: f64,
    /// exp(loss): perplexity for each token, to compare runs with the same vocabulary.
    pub ppl: f64,
    /// Perplexity for each word, to compare any vocabularies; only with `data.layout: packed`.
    pub word_ppl: Option<f64>,
    /// Tokens predicted.
    pub tokens: u64,
    /// Time that the evaluation took.
    pub eval_s: f64,
}

/// A row of ranks.csv: a rank that has become slow.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RankRow {
    /// The step at whose end the rank was found to have become slow.
    pub step: usize,
    /// The rank.
    pub rank: usize,
    /// Its node.
    pub host: String,
    /// Its time for the forward and backward pass of a step: the median of the last ten.
    pub compute_ms: f64,
    /// The median rank's; of an even number of ranks, the faster one of the two in the middle.
    pub median_ms: f64,
    /// `compute_ms` divided by `median_ms`.
    pub factor: f64,
}

/// A row that belongs to a step.
pub trait Row: Default + Serialize + DeserializeOwned {
    /// The step that the row is about.
    fn step(&self) -> usize;
}

impl Row for TrainRow {
    fn step(&self) -> usize {
        self.step
    }
}

impl Row for EvalRow {
    fn step(&self) -> usize {
        self.step
    }
}

impl Row for RankRow {
    fn step(&self) -> usize {
        self.step
    }
}

/// The names of a row's columns, in order, with commas between them: as its type has them.
pub fn header<R: Default + Serialize>() -> String {
    let mut writer = csv::Writer::from_writer(Vec::new());
    // Into memory, and of numbers and texts only: nothing can fail.
    let _ = writer.serialize(R::default());
    let text = String::from_utf8(writer.into_inner().unwrap_or_default()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// A CSV file that grows by a row at a time, each written whole or not at all.
pub struct Table {
    path: PathBuf,
    file: File,
}

impl Table {
    /// Opens a file for a run that goes on after `step` steps: later rows and a half-written one are dropped, so that
    /// every step will stand once. Returns the rows kept.
    ///
    /// # Errors
    /// Storage, where the file cannot be written, or holds something else than this log.
    pub fn open<R: Row>(path: &Path, step: usize) -> Result<(Self, Vec<R>)> {
        let mut rows: Vec<R> = Self::rows(path)?;
        rows.retain(|row| row.step() <= step);
        let mut text = (header::<R>() + "\n").into_bytes();
        for row in &rows {
            text.extend(line(row)?);
        }
        write_durably(path, &text)?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::write(path, e))?;
        Ok((Self { path: path.to_path_buf(), file }, rows))
    }

    /// The rows of a file, without a half-written one at its end; none where there is no file.
    ///
    /// # Errors
    /// Storage, where the file holds something else than this log.
    pub fn rows<R: Row>(path: &Path) -> Result<Vec<R>> {
        match fs::read(path) {
            Ok(bytes) => read(path, &bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(Error::Storage(format!("cannot read {}: {e}", path.display())).into()),
        }
    }

    /// Makes the rows written so far durable.
    ///
    /// # Errors
    /// Storage, where the file cannot be synchronised.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::write(&self.path, e))
    }

    /// Appends a row.
    ///
    /// # Errors
    /// Storage, where the row cannot be written.
    pub fn append<R: Row>(&mut self, row: &R) -> Result<()> {
        let line = line(row)?;
        let length = self.file.metadata().map_err(|e| Error::write(&self.path, e))?.len();
        self.file.write_all(&line).map_err(|e| {
            // A full disk takes a part of a row; the file keeps whole ones.
            let _ = self.file.set_len(length);
            Error::write(&self.path, e)
        })
    }
}

fn line(row: &impl Serialize) -> Result<Vec<u8>> {
    let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
    writer.serialize(row)?;
    Ok(writer.into_inner()?)
}

/// The rows of a file. An end that does not parse, or has no newline, is what a crash left: it is dropped. A header of
/// other columns, or rows after one that does not parse, are nothing that this program leaves.
fn read<R: Row>(path: &Path, bytes: &[u8]) -> Result<Vec<R>> {
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
    if whole == 0 {
        return Ok(Vec::new());
    }
    let (found, rest) = bytes[..whole].split_at(bytes.iter().position(|&b| b == b'\n').map_or(0, |end| end + 1));
    let expected = header::<R>();
    if found.trim_ascii_end() != expected.as_bytes() {
        let found: String = String::from_utf8_lossy(&found[..found.len().min(300)]).trim_end().into();
        return Err(Error::Storage(format!(
            "{} does not have the columns of this log: expected {expected}, found {}; move it away or use another \
             --run-dir",
            path.display(),
            found.escape_debug()
        ))
        .into());
    }
    let columns = expected.split(',').count();
    // No cell of ours has a comma or is quoted: damage stays within its line.
    let parse = |line: &[u8]| -> Option<R> {
        let line = std::str::from_utf8(line).ok()?;
        let cells: Vec<&str> = line.split(',').take(columns + 1).collect();
        let whole = cells.len() == columns;
        whole.then(|| csv::StringRecord::from(cells).deserialize(None).ok()).flatten()
    };
    let mut lines = rest.split_inclusive(|&b| b == b'\n').map(|line| parse(line.trim_ascii_end()));
    let rows: Vec<R> = lines.by_ref().map_while(|row| row).collect();
    if lines.any(|row| row.is_some()) {
        return Err(Error::Storage(format!(
            "{}, line {}: this is no row of the log, and rows follow it; repair the line or move the file away",
            path.display(),
            rows.len() + 2
        ))
        .into());
    }
    Ok(rows)
}

/// A measured number as a CSV shows it: three decimals.
pub fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: usize) -> EvalRow {
        EvalRow { step, split: "valid".into(), loss: 1.5, ppl: 4.5, word_ppl: None, tokens: 9, eval_s: 0.1 }
    }

    #[test]
    fn a_resumed_log_drops_later_and_half_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eval.csv");
        let (mut log, kept) = Table::open::<EvalRow>(&path, 0).unwrap();
        assert!(kept.is_empty());
        for step in 1..=4 {
            log.append(&row(step)).unwrap();
        }
        drop(log);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (_, kept) = Table::open::<EvalRow>(&path, 3).unwrap();
            let lines = whole[..cut].iter().filter(|&&b| b == b'\n').count();
            assert_eq!(kept.len(), lines.saturating_sub(1).min(3), "cut at byte {cut}");
            let text = fs::read_to_string(&path).unwrap();
            assert_eq!(text.lines().count(), kept.len() + 1);
            assert!(text.starts_with("step,split,loss,ppl,word_ppl,tokens,eval_s\n"));
        }
    }

    #[test]
    fn a_damaged_row_amid_others_is_named_and_a_damaged_end_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eval.csv");
        let (mut log, _) = Table::open::<EvalRow>(&path, 0).unwrap();
        for step in 1..=3 {
            log.append(&row(step)).unwrap();
        }
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, whole.replace("\n2,valid", "\n2,va\0\0,x")).unwrap();
        let error = Table::open::<EvalRow>(&path, 3).err().unwrap().to_string();
        assert!(error.contains("line 3"), "{error}");
        // One flipped bit makes a 2 a quote; the rows that follow are not in it.
        fs::write(&path, whole.replace("\n2,valid", "\n\",valid")).unwrap();
        assert!(Table::open::<EvalRow>(&path, 3).is_err());
        fs::write(&path, whole.replace("\n3,valid", "\nx,valid")).unwrap();
        assert_eq!(Table::open::<EvalRow>(&path, 3).unwrap().1.len(), 2);
    }

    #[test]
    fn another_programs_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eval.csv");
        fs::write(&path, "a,b\n1,2\n").unwrap();
        assert!(Table::open::<EvalRow>(&path, 0).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "a,b\n1,2\n");
    }
}
