//! Checkpoints: a folder a step, complete or absent, every byte of it accounted for.
//!
//! `step-00001000/` holds `model.safetensors` (GPT-2's names, linear weights (out, in)), `optimizer.safetensors` (Adam's
//! two moments, flat, with their ranges of the flat buffer in the metadata; under ZeRO-1 each rank writes its own,
//! `optimizer.rank-0000-of-0004.safetensors`), `state.json` and `MANIFEST.json` (size and SHA-256 of each other file).
//! It is written under another name, made durable file by file, and renamed.

mod find;
mod tensors;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

pub use find::{is_complete, latest, list, read_chosen, removed_too_fast, ATTEMPTS};
pub use tensors::{load_first_positions, load_model, parse_tensors, write_tensors, OptimizerFiles, MOMENTS};

use crate::comm::Comm;
use crate::error::{Error, Result};
use crate::files;
use crate::host;
use crate::model::parameters::Parameters;
use crate::optim::adamw::AdamW;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer";
/// The optimizer's file if it is not spread over ranks.
const WHOLE: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const MANIFEST: &str = "MANIFEST.json";
const TEMPORARY: &str = ".tmp";
/// No larger JSON file is read; a hundred thousand ranks' manifest has 13 MB.
const MAX_JSON: u64 = 16 << 20;

/// What a run needs besides the tensors to go on, and what must be equal for it to go on bit for bit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Version of the checkpoint's format.
    pub format_version: u32,
    /// Optimizer steps done.
    pub step: usize,
    /// Targets counted so far, over all ranks.
    pub tokens: u64,
    /// Training time so far, seconds.
    pub elapsed_s: f64,
    /// SHA-256 of the training tokens; empty if the weights were imported.
    pub data_sha256: String,
    /// What the arithmetic ran on.
    pub conditions: Conditions,
}

impl State {
    /// The state of weights that were not trained here: there is no optimizer's state beside them.
    pub fn imported(conditions: Conditions) -> Self {
        let format_version = FORMAT_VERSION;
        Self { format_version, step: 0, tokens: 0, elapsed_s: 0.0, data_sha256: String::new(), conditions }
    }

    /// Whether the weights were imported: a run can begin with them, but none can resume from them.
    pub fn is_imported(&self) -> bool {
        self.data_sha256.is_empty()
    }
}

/// If these are equal, a resumed run equals an undisturbed one bit for bit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Conditions {
    pub lockstep: String,
    pub libtorch: String,
    pub device: String,
    /// Processor or GPU model.
    pub hardware: String,
    pub world_size: usize,
    pub threads: usize,
    pub micro_batch: usize,
}

impl Conditions {
    /// (name, then, now) of each condition that is not what it was.
    pub fn differences(&self, now: &Self) -> Vec<(&'static str, String, String)> {
        let pairs = [
            ("lockstep", self.lockstep.clone(), now.lockstep.clone()),
            ("libtorch", self.libtorch.clone(), now.libtorch.clone()),
            ("device", self.device.clone(), now.device.clone()),
            ("hardware", self.hardware.clone(), now.hardware.clone()),
            ("world_size", self.world_size.to_string(), now.world_size.to_string()),
            ("threads", self.threads.to_string(), now.threads.to_string()),
            ("micro_batch", self.micro_batch.to_string(), now.micro_batch.to_string()),
        ];
        pairs.into_iter().filter(|(_, then, now)| then != now).collect()
    }
}

/// The name of a step's checkpoint.
pub fn name(step: usize) -> String {
    format!("step-{step:08}")
}

/// The format that this version writes and reads.
pub const FORMAT_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format_version: u32,
    files: BTreeMap<String, Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    size: u64,
    sha256: String,
}

impl Manifest {
    /// Reads a checkpoint's manifest; it must name the files of a checkpoint, each once and no other.
    fn read(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(MANIFEST);
        let manifest: Self = read_json(&path)?;
        let parts = manifest.files.len().saturating_sub(2);
        let mut expected: BTreeSet<String> = (0..parts).map(|rank| name_of_part(rank, parts)).collect();
        if manifest.files.contains_key(WHOLE) {
            expected = BTreeSet::from([WHOLE.into()]);
        }
        expected.extend([MODEL.into(), STATE.into()]);
        if parts == 0 || !manifest.files.keys().eq(&expected) {
            let found: Vec<&String> = manifest.files.keys().take(4).collect();
            let what = format!("does not name {MODEL}, {STATE} and the optimizer's files, and no other: {found:?}");
            return damaged(&path, &what);
        }
        Ok(manifest)
    }
}

impl Entry {
    /// As the ranks send it to rank 0: the size, and the digest's letters. Each is exact in a float.
    fn as_numbers(&self) -> Vec<f64> {
        [self.size as f64].into_iter().chain(self.sha256.bytes().map(f64::from)).collect()
    }

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { size: numbers[0] as u64, sha256: numbers[1..].iter().map(|&letter| char::from(letter as u8)).collect() }
    }
}

/// A checkpoint on its way to the disk: its state was copied, so that training goes on while a thread writes it.
pub struct Saving {
    temporary: PathBuf,
    target: PathBuf,
    state: State,
    /// The name and the entry of this rank's files, once written.
    thread: JoinHandle<Result<BTreeMap<String, Entry>>>,
}

impl Saving {
    /// Copies what is to be saved and begins to write it into the folder `checkpoints`. If the optimizer's state is
    /// spread over ranks, `ranks` are these, and all of them must call this, and [`Saving::publish`].
    ///
    /// # Errors
    /// Storage, if no thread can be started; communication, if a rank does not answer.
    pub fn begin(
        checkpoints: &Path,
        state: &State,
        parameters: &Parameters,
        optimizer: &AdamW,
        ranks: Option<&Comm>,
    ) -> Result<Self> {
        let target = checkpoints.join(name(state.step));
        let temporary = checkpoints.join(name(state.step) + TEMPORARY);
        let root = ranks.is_none_or(Comm::is_root);
        if root {
            clear_temporaries(checkpoints);
        }
        let mut optimizer_file = WHOLE.to_string();
        if let Some(comm) = ranks {
            comm.barrier(comm.deadlines.save)?; // nobody writes before the old is cleared
            optimizer_file = name_of_part(comm.rank, comm.world_size);
        }
        let begun = Instant::now();
        let moments = tensors::Copied::of_optimizer(optimizer);
        let model = root.then(|| tensors::Copied::of_model(parameters));
        debug!("step {}: the state was copied in {:.0} ms", state.step, begun.elapsed().as_secs_f64() * 1000.0);
        let folder = temporary.clone();
        let write = move || -> Result<BTreeMap<String, Entry>> {
            let begun = Instant::now();
            fs::create_dir_all(&folder).map_err(|e| Error::write(&folder, e))?;
            let mut files = BTreeMap::new();
            files.insert(optimizer_file.clone(), moments.write(&folder.join(optimizer_file))?);
            if let Some(model) = model {
                files.insert(MODEL.into(), model.write(&folder.join(MODEL))?);
            }
            let (bytes, seconds) = (files.values().map(|entry| entry.size).sum::<u64>(), begun.elapsed().as_secs_f64());
            debug!("wrote {:.1} MB in {seconds:.2} s, {:.0} MB/s", bytes as f64 / 1e6, bytes as f64 / 1e6 / seconds);
            Ok(files)
        };
        Ok(Self { temporary, target, state: state.clone(), thread: host::spawn("save", write)? })
    }

    /// Whether this rank's files are written, or could not be.
    pub fn is_written(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the files, and makes them a checkpoint, whose path this returns: rank 0 writes the manifest, which names
    /// them all, and gives the folder its name, if `may_publish` has nothing against it.
    ///
    /// # Errors
    /// Storage, if a file cannot be written; nothing but a temporary folder is then left behind. What `may_publish`
    /// says.
    pub fn publish(self, ranks: Option<&Comm>, may_publish: impl Fn() -> Result<()>) -> Result<PathBuf> {
        let Self { temporary, target, state, thread } = self;
        let written = thread.join().unwrap_or_else(|panic| Err(crate::error::from_panic(panic.as_ref())));
        may_publish()?;
        let done = written.and_then(|mut files| {
            if let Some(comm) = ranks {
                comm.barrier(comm.deadlines.save)?; // the others' files may be larger, or their disks slower
                let mine = files.get(&name_of_part(comm.rank, comm.world_size)).map(Entry::as_numbers);
                for (rank, numbers) in comm.gather(&mine.unwrap_or_default())?.into_iter().enumerate() {
                    files.insert(name_of_part(rank, comm.world_size), Entry::from_numbers(&numbers));
                }
                if !comm.is_root() {
                    return Ok(());
                }
            }
            complete(&temporary, &target, &state, files, &may_publish)
        });
        if done.is_err() {
            // Else the folder may be another's by now. Its removal makes room on a full disk.
            may_publish()?;
            let _ = fs::remove_dir_all(&temporary);
        }
        done.map(|()| target)
    }
}

fn name_of_part(rank: usize, ranks: usize) -> String {
    format!("{OPTIMIZER}.rank-{rank:04}-of-{ranks:04}.safetensors")
}

/// Completes a folder of durable tensors, the manifest last, and renames it.
fn complete(
    temporary: &Path,
    target: &Path,
    state: &State,
    mut files: BTreeMap<String, Entry>,
    may_publish: &impl Fn() -> Result<()>,
) -> Result<()> {
    let path = temporary.join(STATE);
    write_json(&path, state)?;
    sync(&path)?;
    files.insert(STATE.into(), digest(&path).map_err(|e| Error::write(&path, e))?);
    let path = temporary.join(MANIFEST);
    write_json(&path, &Manifest { format_version: FORMAT_VERSION, files })?;
    sync(&path)?;
    sync(temporary)?;
    may_publish()?;
    if target.symlink_metadata().is_ok() {
        // A folder of that name without a manifest, which is no checkpoint.
        fs::remove_dir_all(target).map_err(|e| Error::write(target, e))?;
    }
    fs::rename(temporary, target).map_err(|e| Error::write(target, e))?;
    sync(target.parent().unwrap_or(target))
}

/// Compares size and SHA-256 of every file with the manifest.
///
/// # Errors
/// Storage: the file, what was expected and what was found.
pub fn verify(checkpoint: &Path) -> Result<()> {
    for (name, expected) in &Manifest::read(checkpoint)?.files {
        let path = checkpoint.join(name);
        let unreadable = |e| Error::Storage(format!("cannot read {}: {e}", path.display()));
        let found = path.metadata().map_err(unreadable)?;
        if !found.is_file() {
            return damaged(&path, "is no file"); // and might never end
        }
        if found.len() != expected.size {
            return damaged(&path, &format!("has {} bytes, {} were written", found.len(), expected.size));
        }
        let found = digest(&path).map_err(unreadable)?;
        if found.sha256 != expected.sha256 {
            return damaged(&path, &format!("has SHA-256 {}, {} was written", found.sha256, expected.sha256));
        }
    }
    Ok(())
}

/// The names of the files that hold a checkpoint's tensors.
///
/// # Errors
/// Storage, if the manifest is not what this version writes.
pub fn tensor_files(checkpoint: &Path) -> Result<Vec<String>> {
    Ok(Manifest::read(checkpoint)?.files.into_keys().filter(|name| name != STATE).collect())
}

/// Reads a verified checkpoint's state.
///
/// # Errors
/// Storage, if the file is not what this version writes.
pub fn load_state(checkpoint: &Path) -> Result<State> {
    let path = checkpoint.join(STATE);
    let state: State = read_json(&path)?;
    // Ranks tell each other these numbers as floats.
    let exact = |number: u64| number < 1 << 53;
    if !exact(state.step as u64) || !exact(state.tokens) || state.elapsed_s < 0.0 {
        let State { step, tokens, elapsed_s, .. } = state;
        return damaged(
            &path,
            &format!("has step {step}, tokens {tokens} and elapsed_s {elapsed_s}: no run got there"),
        );
    }
    Ok(state)
}

/// Removes all complete checkpoints but the newest `keep` and those of the steps to `spare`, and what interrupted saves and
/// removals left; to be called while no save is under way.
///
/// Each is renamed first, so that an interrupted removal leaves nothing that looks complete, and the next one clears it.
pub fn purge(checkpoints: &Path, keep: usize, spare: Option<usize>) -> Result<()> {
    clear_temporaries(checkpoints);
    let found = list(checkpoints);
    for (step, path) in found.iter().rev().skip(keep) {
        if Some(*step) != spare {
            let going = path.with_extension(&TEMPORARY[1..]);
            fs::rename(path, &going).and_then(|()| fs::remove_dir_all(&going)).map_err(|e| Error::write(path, e))?;
        }
    }
    Ok(())
}

/// Moves checkpoints of steps after `step` out of the way of a run that resumes there; nothing is deleted.
pub fn set_aside_after(checkpoints: &Path, step: usize) -> Result<()> {
    for (later, path) in list(checkpoints).into_iter().filter(|(later, _)| *later > step) {
        let aside = (1..)
            .map(|n| checkpoints.join(format!("set-aside-{n}-{}", name(later))))
            .find(|path| !path.exists())
            .unwrap_or_default();
        fs::rename(&path, &aside).map_err(|e| Error::write(&path, e))?;
        warn!("set the later checkpoint {} aside as {}", path.display(), aside.display());
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::Storage(format!("cannot read {}: {e}", path.display())).into())
}

fn is_optimizer(name: &str) -> bool {
    name.starts_with(OPTIMIZER) && name.ends_with(".safetensors")
}

fn damaged<T>(path: &Path, what: &str) -> Result<T> {
    Err(Error::Storage(format!("{} {what}", path.display())).into())
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    fs::write(path, text).map_err(|e| Error::write(path, e))
}

/// Reads a JSON file of this format version. The version is looked at first: another's fields may have other names.
fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    #[derive(Deserialize)]
    struct Versioned {
        format_version: u64,
    }
    let size = path.metadata().map_or(0, |found| found.len());
    if size > MAX_JSON {
        return damaged(path, &format!("has {size} bytes, expected at most {MAX_JSON}"));
    }
    let text = read(path)?;
    match serde_json::from_slice(&text) {
        Ok(Versioned { format_version: version }) if version != u64::from(FORMAT_VERSION) => {
            damaged(path, &format!("is of format version {version}, this binary reads {FORMAT_VERSION}"))
        }
        _ => serde_json::from_slice(&text).map_err(|e| Error::Storage(format!("{}: {e}", path.display())).into()),
    }
}

fn digest(path: &Path) -> std::io::Result<Entry> {
    files::digest(path).map(|(size, sha256)| Entry { size, sha256 })
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| Error::write(path, e))
}

/// What interrupted saves left behind.
fn clear_temporaries(checkpoints: &Path) {
    let entries = fs::read_dir(checkpoints).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(TEMPORARY)) {
        let _ = fs::remove_dir_all(entry.path());
    }
}
