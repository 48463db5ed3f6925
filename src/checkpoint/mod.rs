//! Checkpoints: a folder a step, complete or absent, every byte of it accounted for.
//!
//! `step-00001000/` holds `model.safetensors` (GPT-2's names, linear weights (out, in)), `optimizer.safetensors` (Adam's
//! two moments, flat, with their ranges of the flat buffer in the metadata; under ZeRO-1 each rank writes its own,
//! `optimizer.rank-0000-of-0004.safetensors`), `state.json` and `MANIFEST.json` (size and SHA-256 of each other file).
//! It is written under another name, made durable file by file, and renamed.

mod tensors;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;

pub use tensors::{load_model, OptimizerFiles, MOMENTS};

use crate::comm::Comm;
use crate::error::{Error, Result};
use crate::model::parameters::Parameters;
use crate::train::optimizer::AdamW;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer";
const STATE: &str = "state.json";
const MANIFEST: &str = "MANIFEST.json";
const TEMPORARY: &str = ".tmp";

/// What a run needs beside the tensors in order to go on, and what must be equal for it to go on bit for bit.
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
    /// SHA-256 of the training tokens.
    pub data_sha256: String,
    /// What the arithmetic ran on.
    pub conditions: Conditions,
}

/// Where these are equal, a resumed run equals an undisturbed one bit for bit.
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

impl Entry {
    /// As the ranks send it to rank 0: the size, and the digest's letters. Each is exact in a float.
    fn as_numbers(&self) -> Vec<f64> {
        [self.size as f64].into_iter().chain(self.sha256.bytes().map(f64::from)).collect()
    }

    fn from_numbers(numbers: &[f64]) -> Self {
        Self { size: numbers[0] as u64, sha256: numbers[1..].iter().map(|&letter| char::from(letter as u8)).collect() }
    }
}

/// Writes a checkpoint of `state.step` into the folder `checkpoints`, and returns its path. Where the optimizer's state is
/// spread over ranks, `ranks` are these, and all of them must call this.
///
/// # Errors
/// Storage, where a file cannot be written; nothing but a temporary folder is then left behind.
pub fn save(
    checkpoints: &Path,
    state: &State,
    parameters: &Parameters,
    optimizer: &AdamW,
    ranks: Option<&Comm>,
) -> Result<PathBuf> {
    let target = checkpoints.join(format!("step-{:08}", state.step));
    let temporary = checkpoints.join(format!("step-{:08}{TEMPORARY}", state.step));
    let root = ranks.is_none_or(Comm::is_root);
    if root {
        clear_temporaries(checkpoints);
    }
    if let Some(comm) = ranks {
        comm.barrier()?; // nobody writes before that is done
    }
    if let Err(error) = write(&temporary, state, parameters, optimizer, ranks) {
        // Room on a full disk.
        let _ = fs::remove_dir_all(&temporary);
        return Err(error);
    }
    if !root {
        return Ok(target);
    }
    if target.exists() {
        // A folder of that name without a manifest, which is no checkpoint.
        fs::remove_dir_all(&target).map_err(|e| Error::write(&target, e))?;
    }
    fs::rename(&temporary, &target).map_err(|e| Error::write(&target, e))?;
    sync(checkpoints)?;
    Ok(target)
}

/// Writes the files of a checkpoint, the manifest last, and makes them durable.
fn write(folder: &Path, state: &State, parameters: &Parameters, optimizer: &AdamW, ranks: Option<&Comm>) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
    let name_of = |rank: usize, ranks: usize| format!("{OPTIMIZER}.rank-{rank:04}-of-{ranks:04}.safetensors");
    let optimizer_file = ranks.map_or(format!("{OPTIMIZER}.safetensors"), |comm| name_of(comm.rank, comm.world_size));
    let mut files = BTreeMap::new();
    let entry = tensors::write_optimizer(&folder.join(&optimizer_file), optimizer)?;
    match ranks {
        None => drop(files.insert(optimizer_file, entry)),
        Some(comm) => {
            for (rank, numbers) in comm.gather(&entry.as_numbers())?.into_iter().enumerate() {
                files.insert(name_of(rank, comm.world_size), Entry::from_numbers(&numbers));
            }
            if !comm.is_root() {
                return Ok(());
            }
        }
    }
    files.insert(MODEL.into(), tensors::write_model(&folder.join(MODEL), parameters)?);
    let path = folder.join(STATE);
    write_json(&path, state)?;
    sync(&path)?;
    files.insert(STATE.into(), digest(&path).map_err(|e| Error::write(&path, e))?);
    write_json(&folder.join(MANIFEST), &Manifest { format_version: FORMAT_VERSION, files })?;
    sync(&folder.join(MANIFEST))?;
    sync(folder)
}

/// Complete checkpoints in a folder, by step; a folder without a manifest is not one.
pub fn list(checkpoints: &Path) -> Vec<(usize, PathBuf)> {
    let Ok(entries) = fs::read_dir(checkpoints) else { return Vec::new() };
    let mut found: Vec<(usize, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            entry.path().join(MANIFEST).is_file().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// The newest checkpoint whose every byte is what was written; bad ones are named aloud and passed over.
///
/// # Errors
/// Storage, where there are checkpoints but none is good.
pub fn latest(checkpoints: &Path) -> Result<Option<PathBuf>> {
    let mut bad = Vec::new();
    for (_, path) in list(checkpoints).into_iter().rev() {
        match verify(&path) {
            Ok(()) => return Ok(Some(path)),
            Err(error) => {
                warn!("passing over a checkpoint: {error:#}");
                bad.push(format!("{error:#}"));
            }
        }
    }
    match bad.is_empty() {
        true => Ok(None),
        false => Err(Error::Storage(format!(
            "no checkpoint in {} can be used: {}; restore one, or start anew in another --run-dir",
            checkpoints.display(),
            bad.join("; ")
        ))
        .into()),
    }
}

/// Compares size and SHA-256 of every file with the manifest.
///
/// # Errors
/// Storage: the file, what was expected and what was found.
pub fn verify(checkpoint: &Path) -> Result<()> {
    let manifest: Manifest = read_json(&checkpoint.join(MANIFEST))?;
    let named = |wanted: &dyn Fn(&str) -> bool| manifest.files.keys().any(|name| wanted(name));
    let manifest_path = checkpoint.join(MANIFEST);
    if !(named(&|name| name == MODEL) && named(&|name| name == STATE) && named(&is_optimizer)) {
        return damaged(&manifest_path, &format!("does not name {MODEL}, {STATE} and an optimizer's file"));
    }
    if let Some(name) = manifest.files.keys().find(|name| name.contains('/') || name.as_str() == "..") {
        return damaged(&manifest_path, &format!("names `{name}`, which is no file of this folder"));
    }
    for (name, expected) in &manifest.files {
        let path = checkpoint.join(name);
        let found = digest(&path).map_err(|e| Error::Storage(format!("cannot read {}: {e}", path.display())))?;
        if found.size != expected.size {
            return damaged(&path, &format!("has {} bytes, {} were written", found.size, expected.size));
        }
        if found.sha256 != expected.sha256 {
            return damaged(&path, &format!("has SHA-256 {}, {} was written", found.sha256, expected.sha256));
        }
    }
    Ok(())
}

/// Reads a verified checkpoint's state.
///
/// # Errors
/// Storage, where the file is not what this version writes.
pub fn load_state(checkpoint: &Path) -> Result<State> {
    read_json(&checkpoint.join(STATE))
}

/// Removes all complete checkpoints but the newest `keep` and those of the steps to `spare`.
///
/// Each is renamed first, so that an interrupted removal leaves nothing that looks complete, and the next save clears it.
pub fn purge(checkpoints: &Path, keep: usize, spare: Option<usize>) -> Result<()> {
    let found = list(checkpoints);
    for (step, path) in found.iter().rev().skip(keep) {
        if Some(*step) != spare {
            let going = path.with_extension(&TEMPORARY[1..]);
            fs::rename(path, &going).and_then(|()| fs::remove_dir_all(&going)).map_err(|e| Error::write(path, e))?;
        }
    }
    Ok(())
}

/// Moves checkpoints of steps after `step` out of the way of a run that goes on from there; nothing is deleted.
pub fn set_aside_after(checkpoints: &Path, step: usize) -> Result<()> {
    for (later, path) in list(checkpoints).into_iter().filter(|(later, _)| *later > step) {
        let aside = (1..)
            .map(|n| checkpoints.join(format!("set-aside-{n}-step-{later:08}")))
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
    let fail = |e: serde_json::Error| Error::Storage(format!("{}: {e}", path.display()));
    let value: serde_json::Value = serde_json::from_slice(&read(path)?).map_err(fail)?;
    match value["format_version"].as_u64() {
        Some(version) if version != u64::from(FORMAT_VERSION) => {
            damaged(path, &format!("is of format version {version}, this binary reads {FORMAT_VERSION}"))
        }
        _ => Ok(serde_json::from_value(value).map_err(fail)?),
    }
}

fn digest(path: &Path) -> std::io::Result<Entry> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        size += n as u64;
    }
    let sha256 = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Entry { size, sha256 })
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
