//! Event files that TensorBoard reads, beside the CSVs and with the same numbers: `train.tensorboard`.
//!
//! A file is a series of records: the length of the data, the length's checksum, the data, its checksum. The data are
//! protocol buffers of the type `Event` in TensorFlow's `event.proto`, of which a few fields are written here. Each start of
//! a run has a file of its own, whose second event tells TensorBoard to forget the steps that will be done again.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::tables::{with_header, Row};
use crate::error::{Error, Result};
use crate::host;

/// What the name of each file begins with; then come a number, by which TensorBoard sorts them, and the node.
const PREFIX: &str = "events.out.tfevents.";

/// The event file of one start of a run.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Begins a file in a run directory, for a run that goes on after `step` steps.
    ///
    /// # Errors
    /// Storage, if it cannot be written.
    pub fn begin(run_dir: &Path, step: usize) -> Result<Self> {
        // After those of earlier starts, whatever the clock of this node says.
        let number = numbers(run_dir).max().map_or(0, |newest| newest + 1).max(now() as u64);
        let path = run_dir.join(format!("{PREFIX}{number:010}.{}", host::name()));
        let file = File::create_new(&path).map_err(|e| Error::write(&path, e))?;
        let mut events = Self { path, file };
        events.write(&event(now(), 0, |event| text(event, FILE_VERSION, "brain.Event:2")))?;
        events.write(&event(now(), step + 1, |event| {
            message(event, SESSION_LOG, |session| integer(session, STATUS, SESSION_START));
        }))?;
        Ok(events)
    }

    /// Adds a row of a CSV: each of its numbers under its column's name, below the name of the group.
    ///
    /// # Errors
    /// Storage, if it cannot be written.
    pub fn row<R: Row>(&mut self, group: &str, row: &R) -> Result<()> {
        let csv = with_header(std::slice::from_ref(row))?;
        let mut lines = csv.lines().map(|line| line.split(','));
        let (names, cells) = (lines.next().into_iter().flatten(), lines.next().into_iter().flatten());
        // Unknown numbers are empty cells, and the split is no number.
        let scalars = names.zip(cells).filter(|(name, _)| *name != "step");
        let scalars = scalars.filter_map(|(name, cell)| Some((format!("{group}/{name}"), cell.parse().ok()?)));
        self.write(&scalar_event(now(), row.step(), scalars))
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        let failed = |e| Error::write(&self.path, e);
        let length = self.file.metadata().map_err(failed)?.len();
        self.file.write_all(&record(event)).map_err(|e| {
            // TensorBoard reads nothing behind half a record.
            let _ = self.file.set_len(length);
            failed(e)
        })
    }
}

/// The numbers in the names of the event files that are there.
fn numbers(run_dir: &Path) -> impl Iterator<Item = u64> {
    let number = |name: &str| name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok();
    fs::read_dir(run_dir).into_iter().flatten().flatten().filter_map(move |file| number(file.file_name().to_str()?))
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

// Fields of Event, of SessionLog, and of Summary and its values.
const WALL_TIME: u8 = 1;
const STEP: u8 = 2;
const FILE_VERSION: u8 = 3;
const SUMMARY: u8 = 5;
const SESSION_LOG: u8 = 7;
const STATUS: u8 = 1;
const SESSION_START: u64 = 1;
const VALUE: u8 = 1;
const TAG: u8 = 1;
const SIMPLE_VALUE: u8 = 2;

// How a field's content follows its key.
const VARINT: u8 = 0;
const EIGHT_BYTES: u8 = 1;
const LENGTH_AND_BYTES: u8 = 2;
const FOUR_BYTES: u8 = 5;

fn event(wall_time: f64, step: usize, content: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut event = vec![key(WALL_TIME, EIGHT_BYTES)];
    event.extend(wall_time.to_le_bytes());
    if step > 0 {
        integer(&mut event, STEP, step as u64);
    }
    content(&mut event);
    event
}

fn scalar_event(wall_time: f64, step: usize, scalars: impl Iterator<Item = (String, f32)>) -> Vec<u8> {
    event(wall_time, step, |event| {
        message(event, SUMMARY, |summary| {
            for (tag, number) in scalars {
                message(summary, VALUE, |value| {
                    text(value, TAG, &tag);
                    value.push(key(SIMPLE_VALUE, FOUR_BYTES));
                    value.extend(number.to_le_bytes());
                });
            }
        });
    })
}

/// Fields have numbers below 16 here, so that a key is one byte.
fn key(field: u8, kind: u8) -> u8 {
    field << 3 | kind
}

fn varint(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn integer(to: &mut Vec<u8>, field: u8, number: u64) {
    to.push(key(field, VARINT));
    varint(to, number);
}

fn bytes(to: &mut Vec<u8>, field: u8, content: &[u8]) {
    to.push(key(field, LENGTH_AND_BYTES));
    varint(to, content.len() as u64);
    to.extend(content);
}

fn text(to: &mut Vec<u8>, field: u8, content: &str) {
    bytes(to, field, content.as_bytes());
}

fn message(to: &mut Vec<u8>, field: u8, content: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    content(&mut inner);
    bytes(to, field, &inner);
}

/// Data as a record.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length, &masked(&length).to_le_bytes()[..], data, &masked(data).to_le_bytes()].concat()
}

/// A checksum that may stand among the data that it is of.
fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), a bit at a time: a row has few hundred bytes.
fn crc32c(data: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    !data.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The records are those that TensorBoard 2.21 writes with its `RecordWriter` for
    /// `Event(wall_time=1700000000.25, file_version="brain.Event:2")`,
    /// `Event(wall_time=1700000000.25, step=301, session_log=SessionLog(status=SessionLog.START))`, and
    /// `Event(wall_time=1700000001.5, step=301)` with the values "train/loss", 4.851, and "train/ppl", infinity.
    #[test]
    fn records_are_tensorboards_own_byte_for_byte() {
        let at = 1_700_000_000.25;
        let version = event(at, 0, |event| text(event, FILE_VERSION, "brain.Event:2"));
        let start = event(at, 301, |event| {
            message(event, SESSION_LOG, |session| integer(session, STATUS, SESSION_START));
        });
        let scalars = [("train/loss".to_owned(), 4.851), ("train/ppl".to_owned(), f32::INFINITY)];
        let row = scalar_event(1_700_000_001.5, 301, scalars.into_iter());
        assert_eq!(
            [version, start, row].map(|event| hex(&record(&event))),
            [
                "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9",
                "100000000000000095fbfe180900001040fc54d94110ad023a020801cb79b93b",
                "33000000000000000ca720560900006040fc54d94110ad022a250a110a0a747261696e2f6c6f737315643b9b400a100a0974\
                 7261696e2f70706c150000807fa4c761d6",
            ]
        );
    }

    #[test]
    fn the_file_of_a_later_start_sorts_behind_the_others_on_a_node_whose_clock_is_slow() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(format!("{PREFIX}9000000000.node1")), "").unwrap();
        fs::write(folder.path().join(format!("{PREFIX}x.node1")), "").unwrap();
        let names: Vec<PathBuf> = (0..2).map(|step| Events::begin(folder.path(), step).unwrap().path).collect();
        let number = |number: u64| folder.path().join(format!("{PREFIX}{number}.{}", host::name()));
        assert_eq!(names, [number(9_000_000_001), number(9_000_000_002)]);
    }
}
