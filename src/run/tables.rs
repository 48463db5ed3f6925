//! The CSV files of a run: what a row holds, and how a resumed run takes a file up again.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::files::write_durably;

/// A row of train.csv. An unknown number is an empty cell.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TrainRow {
    /// Optimizer steps done; the first row is 1.
    #[serde(deserialize_with = "whole")]
    pub step: usize,
    /// Tokens predicted so far, over all ranks.
    #[serde(deserialize_with = "whole")]
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
    #[serde(deserialize_with = "whole")]
    pub world_size: usize,
    /// Training time so far, over all restarts.
    pub elapsed_s: f64,
}

/// A row of eval.csv.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EvalRow {
    /// Optimizer steps done.
    #[serde(deserialize_with = "whole")]
    pub step: usize,
    /// `valid` or `test`; with `eval --file` the file.
    pub split: String,
    /// Mean over all tokens of the split, without dropout.
    pub loss: f64,
    /// exp(loss): perplexity for each token, to compare runs with the same vocabulary.
    pub ppl: f64,
    /// Perplexity for each word, to compare any vocabularies; only with `data.layout: packed`.
    pub word_ppl: Option<f64>,
    /// Tokens predicted.
    #[serde(deserialize_with = "whole")]
    pub tokens: u64,
    /// Time that the evaluation took.
    pub eval_s: f64,
    /// Total negative log-likelihood in bits, over the bytes of the split's text: to compare any vocabularies. The total is
    /// over the tokens that `tokens` counts; with `data.layout: paragraphs` that leaves out the first of each piece.
    pub bits_per_byte: Option<f64>,
}

/// A row of ranks.csv: a rank that has become slow.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RankRow {
    /// The step at whose end the rank was found to have become slow.
    #[serde(deserialize_with = "whole")]
    pub step: usize,
    /// The rank.
    #[serde(deserialize_with = "whole")]
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
    /// How many columns the first version of the table had, if later ones have more.
    const FIRST_COLUMNS: Option<usize> = None;

    /// The step that the row is about.
    fn step(&self) -> usize;
}

impl Row for TrainRow {
    fn step(&self) -> usize {
        self.step
    }
}

impl Row for EvalRow {
    const FIRST_COLUMNS: Option<usize> = Some(7);

    fn step(&self) -> usize {
        self.step
    }
}

impl Row for RankRow {
    fn step(&self) -> usize {
        self.step
    }
}

/// Rows as CSV, under a header.
///
/// # Errors
/// Those of the csv crate, which rows of numbers and texts do not meet.
pub fn with_header<R: Serialize>(rows: &[R]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        writer.serialize(row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// The names of a row's columns, in order, with commas between them: as its type has them.
pub fn header<R: Default + Serialize>() -> String {
    // Into memory, and of numbers and texts only: nothing can fail.
    let text = with_header(&[R::default()]).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// A CSV file that grows by a row at a time, each written whole or not at all.
pub struct Table {
    path: PathBuf,
    file: File,
    /// How many columns the file has: fewer than the rows if an older version began it.
    columns: usize,
}

impl Table {
    /// Opens a file for a run that resumes after `step` steps: later rows and a half-written one are dropped, so that
    /// every step will be there once. Returns the rows kept.
    ///
    /// # Errors
    /// Storage, if the file cannot be written, or holds something else than this log; then nothing is changed.
    pub fn open<R: Row>(path: &Path, step: usize) -> Result<(Self, Vec<R>)> {
        let (mut rows, columns) = Self::read::<R>(path)?;
        rows.retain(|row| row.step() <= step);
        let mut text = first_cells(&header::<R>(), columns);
        for row in &rows {
            text += &line(row, columns)?;
        }
        write_durably(path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::write(path, e))?;
        Ok((Self { path: path.to_path_buf(), file, columns }, rows))
    }

    /// The rows of a file, without a half-written one at its end; none if there is no file.
    ///
    /// # Errors
    /// Storage, if the file holds something else than this log.
    pub fn rows<R: Row>(path: &Path) -> Result<Vec<R>> {
        Ok(Self::read(path)?.0)
    }

    /// The rows of a file, and how many columns it has.
    fn read<R: Row>(path: &Path) -> Result<(Vec<R>, usize)> {
        match fs::read(path) {
            Ok(bytes) => read(path, &bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => read(path, &[]),
            Err(e) => Err(Error::Storage(format!("cannot read {}: {e}", path.display())).into()),
        }
    }

    /// Makes the rows written so far durable.
    ///
    /// # Errors
    /// Storage, if the file cannot be synchronised.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::write(&self.path, e))
    }

    /// Appends a row.
    ///
    /// # Errors
    /// Storage, if the row cannot be written.
    pub fn append<R: Row>(&mut self, row: &R) -> Result<()> {
        let line = line(row, self.columns)?;
        let length = self.file.metadata().map_err(|e| Error::write(&self.path, e))?.len();
        self.file.write_all(line.as_bytes()).map_err(|e| {
            // A full disk takes a part of a row; the file keeps whole ones.
            let _ = self.file.set_len(length);
            Error::write(&self.path, e)
        })
    }
}

/// A row's line in a file of so many columns.
fn line(row: &impl Serialize, columns: usize) -> Result<String> {
    let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
    writer.serialize(row)?;
    Ok(first_cells(&String::from_utf8(writer.into_inner()?)?, columns))
}

/// The first cells of a line, as a line. No cell of ours has a comma.
fn first_cells(line: &str, columns: usize) -> String {
    line.trim_end().split(',').take(columns).collect::<Vec<_>>().join(",") + "\n"
}

/// A whole number; a spreadsheet may have saved it as 3.07E+04.
fn whole<'de, D: Deserializer<'de>, N: TryFrom<u64>>(cell: D) -> std::result::Result<N, D::Error> {
    let number = f64::deserialize(cell)?;
    // Those that a float has exactly.
    let exact = number.fract() == 0.0 && (0.0..=(1_u64 << 53) as f64).contains(&number);
    let number = exact.then_some(number as u64).and_then(|number| N::try_from(number).ok());
    number.ok_or_else(|| D::Error::custom("expected a whole number"))
}

/// The rows of a file, as this program or a spreadsheet has written it. Part of a row at its end is what a crash left: it is
/// dropped. Nothing else is, since it may be somebody's. Also returns how many columns the file has: columns that came later
/// than the file are unknown in its rows.
pub(super) fn read<R: Row>(path: &Path, bytes: &[u8]) -> Result<(Vec<R>, usize)> {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    let bytes = bytes.strip_prefix(MARK).unwrap_or(bytes);
    let expected = header::<R>();
    let all = expected.split(',').count();
    if expected.as_bytes().starts_with(bytes) {
        return Ok((Vec::new(), all));
    }
    let mut lines = bytes.split_inclusive(|&b| b == b'\n').peekable();
    let found = lines.next().unwrap_or_default();
    let names = cells(found, all);
    let columns = names.len();
    let is_known = (R::FIRST_COLUMNS.unwrap_or(all)..=all).contains(&columns);
    if !(is_known && names.into_iter().eq(expected.split(',').take(columns))) {
        let found: String = String::from_utf8_lossy(&found[..found.len().min(300)]).trim_end().into();
        return Err(Error::Storage(format!(
            "{} does not have the columns of this log: expected {expected}, found {}; move it away or use another \
             --run-dir",
            path.display(),
            found.escape_debug()
        ))
        .into());
    }
    let mut rows: Vec<R> = Vec::new();
    let refuse = |line: usize, what: String| -> Result<(Vec<R>, usize)> {
        let path = path.display();
        let remedy = "nothing was changed; repair the line, or move the file away to go on without it";
        Err(Error::Storage(format!("{path}, line {line}: {what}; {remedy}")).into())
    };
    while let Some(line) = lines.next() {
        let cells = cells(line, columns);
        if lines.peek().is_none() && (!line.ends_with(b"\n") || cells.len() < columns) {
            break;
        }
        let number = rows.len() + 2;
        let mut record = csv::StringRecord::from(cells.clone());
        (columns..all).for_each(|_| record.push_field(""));
        let row: R = match record.deserialize(None) {
            Ok(row) if cells.len() == columns => row,
            _ => {
                let found: String = String::from_utf8_lossy(&line[..line.len().min(300)]).trim_end().into();
                let found = found.escape_debug();
                return refuse(number, format!("expected a row of {columns} cells ({expected}), found {found}"));
            }
        };
        match rows.last() {
            Some(last) if last.step() > row.step() => {
                return refuse(number, format!("step {} stands after step {}", row.step(), last.step()));
            }
            _ => rows.push(row),
        }
    }
    Ok((rows, columns))
}

/// A line's cells, without the quotes that a spreadsheet may put around them, up to one more than there are columns. No cell of
/// ours has a comma: damage stays within its line. None of a line that is no text.
fn cells(line: &[u8], columns: usize) -> Vec<&str> {
    let Ok(line) = std::str::from_utf8(line) else { return Vec::new() };
    fn bare(cell: &str) -> &str {
        cell.strip_prefix('"').and_then(|cell| cell.strip_suffix('"')).unwrap_or(cell)
    }
    line.trim_end().split(',').take(columns + 1).map(|cell| bare(cell.trim())).collect()
}

/// The steps of the first gap among those that have rows, for a run that goes on after `until` and writes one every so many
/// steps: (first, last). Where a run was told to write them more or less often, that is none.
pub fn gap(steps: impl Iterator<Item = usize>, every: usize, until: usize) -> Option<(usize, usize)> {
    if every == 0 {
        return None;
    }
    let next = (until / every + 1) * every;
    let mut points = vec![0];
    points.extend(steps.filter(|&step| step <= until));
    points.push(next);
    let distances: Vec<usize> = points.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let distance = |index: usize| distances.get(index).copied().unwrap_or(0);
    let is_gap = |&index: &usize| {
        let before = index.checked_sub(1).map_or(0, distance);
        distances[index] > every.max(before).max(distance(index + 1))
    };
    let found = (0..distances.len()).find(is_gap)?;
    Some((points[found] + 1, (points[found + 1] - 1).min(until)))
}

/// A measured number as a CSV shows it: three decimals.
pub fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: usize) -> EvalRow {
        EvalRow { step, split: "valid".into(), loss: 1.5, ppl: 4.5, tokens: 9, eval_s: 0.1, ..EvalRow::default() }
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
            assert!(text.starts_with("step,split,loss,ppl,word_ppl,tokens,eval_s,bits_per_byte\n"));
        }
    }

    #[test]
    fn a_damaged_row_is_named_and_nothing_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eval.csv");
        let (mut log, _) = Table::open::<EvalRow>(&path, 0).unwrap();
        for step in 1..=3 {
            log.append(&row(step)).unwrap();
        }
        let whole = fs::read_to_string(&path).unwrap();
        for (from, to, line) in [
            ("\n2,valid", "\n2,va\0\0,x", 3),
            // One flipped bit makes a 2 a quote; the rows that follow are not in it.
            ("\n2,valid", "\n\",valid", 3),
            ("\n3,valid", "\nx,valid", 4),
            ("\n3,valid", "\n2.5,valid", 4),
            ("\n3,valid", "\n-3,valid", 4),
            ("\n2,valid", "\n4,valid", 4),
            ("\n2,valid", "\n\n2,valid", 3),
            (",valid", ";valid", 2),
        ] {
            let damaged = whole.replace(from, to);
            fs::write(&path, &damaged).unwrap();
            let error = Table::open::<EvalRow>(&path, 3).err().unwrap().to_string();
            assert!(error.contains(&format!("eval.csv, line {line}: ")), "{to:?}: {error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
        }
    }

    #[test]
    fn what_a_spreadsheet_saves_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eval.csv");
        let head = header::<EvalRow>();
        let rows = ["4,valid,1.5,4.5,,9,0.1,1.75", "8,valid,1.25,3.5,,30700,0.1,1.5"];
        let ours = format!("{head}\n{}\n{}\n", rows[0], rows[1]);
        let theirs = ours.replace("30700", "3.07E+04").replace("\n8,", "\n8.0,").replace("1.25", "1.25E0");
        let quoted = theirs.replace("valid", "\"valid\"").replace("step,split", "\"step\",\"split\"");
        for text in [theirs.replace('\n', "\r\n"), format!("\u{feff}{theirs}"), quoted] {
            fs::write(&path, &text).unwrap();
            let (_, kept) = Table::open::<EvalRow>(&path, 8).unwrap();
            assert_eq!((kept.len(), kept[1].step, kept[1].tokens), (2, 8, 30700), "{text:?}");
            let kept = fs::read_to_string(&path).unwrap();
            assert_eq!(kept.replace(".0,", ","), ours.replace(".0,", ","), "{text:?}");
        }
    }

    #[test]
    fn an_older_versions_file_goes_on_under_its_own_header() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eval.csv");
        let older = "step,split,loss,ppl,word_ppl,tokens,eval_s\n4,valid,1.5,4.5,,9,0.1\n";
        fs::write(&path, older).unwrap();
        let (mut log, kept) = Table::open::<EvalRow>(&path, 4).unwrap();
        assert_eq!(kept, [row(4)]);
        log.append(&EvalRow { bits_per_byte: Some(1.25), ..row(8) }).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{older}8,valid,1.5,4.5,,9,0.1\n"));
        assert_eq!(Table::rows::<EvalRow>(&path).unwrap(), [row(4), row(8)]);
        for other in [older.replace(",eval_s", ""), older.replace("eval_s", "bits_per_byte"), "step,loss\n".into()] {
            fs::write(&path, &other).unwrap();
            assert!(Table::open::<EvalRow>(&path, 4).is_err(), "{other}");
            assert_eq!(fs::read_to_string(&path).unwrap(), other);
        }
    }

    #[test]
    fn a_gap_is_found_and_another_rhythm_is_none() {
        let gap = |steps: &[usize], every, until| gap(steps.iter().copied(), every, until);
        let all: Vec<usize> = (1..=60).collect();
        assert_eq!(gap(&all, 1, 60), None);
        assert_eq!(gap(&all[..40], 1, 60), Some((41, 60)));
        assert_eq!(gap(&[], 1, 60), Some((1, 60)));
        assert_eq!(gap(&all[5..], 1, 60), Some((1, 5)));
        assert_eq!(gap(&[&all[..10], &all[12..]].concat(), 1, 60), Some((11, 12)));
        assert_eq!(gap(&all[..59], 1, 60), Some((60, 60)));
        // The rows after `until` are those of steps that will be done again.
        assert_eq!(gap(&all, 1, 30), None);
        assert_eq!(gap(&[10, 20, 30], 10, 39), None);
        assert_eq!(gap(&[10, 20], 10, 39), Some((21, 39)));
        assert_eq!(gap(&[], 10, 9), None);
        assert_eq!(gap(&[], 0, 100), None);
        // From every tenth step to each, and back; the last of a run that was made longer.
        assert_eq!(gap(&[10, 20], 1, 25), None);
        assert_eq!(gap(&all[..25], 10, 25), None);
        assert_eq!(gap(&[4, 8, 10, 12], 4, 13), None);
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
