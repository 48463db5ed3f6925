//! `prepare`: text becomes a data folder (see [`super::folder`]). It is built beside its place and appears there complete or
//! not at all.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use super::corpus::{Choices, Corpus};
use super::documents::Event;
use super::folder::{is_shard_name, shard_name, Meta, SplitMeta, FORMAT_VERSION, META, TOKENIZER};
use super::shard::{Shard, Shards, ShardsWriter, MAGIC};
use super::wikitext::{Source, Split};
use crate::error::{Error, Result};
use crate::files::{hex, resolve, sibling, write_synced, Partial};
use crate::tokenizer::{train, Tokenizer, WordCounts};

/// Tokenizes a corpus into the data folder `out`, over all cores and as a stream: memory is that of
/// the tokenizer and of some MiB of text. A data folder at `out` is replaced once the new one is
/// complete.
///
/// `tokenizer` is `gpt2`, `bpe:N` (N tokens, trained here on the training split) or a tokenizer.json.
///
/// # Errors
/// Usage for another tokenizer, where `out` holds something else than a data folder, and where another process makes it; Data
/// where the source cannot be read or is not UTF-8; Storage where `out` cannot be written.
pub fn prepare(source: &Source, choices: &Choices, tokenizer: &str, out: &Path) -> Result<Meta> {
    let out = resolve(out)?;
    let _lock = Lock::take(&out)?;
    refuse_foreign(&out)?;
    let recipe = Recipe::parse(tokenizer)?;
    let downloads = sibling(&out, ".download");
    let corpus = source.corpus(choices, &downloads)?;
    let made = recipe.make(&corpus)?;

    let partial = Partial::beside(&out)?;
    write_synced(&partial.path().join(TOKENIZER), made.to_json().as_bytes())?;
    let [train, valid, test] = encode(&corpus, &made, partial.path(), choices.shard_bytes)?;
    let all_bytes = (train.bytes + valid.bytes + test.bytes).max(1) as f64;
    for (split, part) in Split::ALL.into_iter().zip([&train, &valid, &test]) {
        let share = 100.0 * part.bytes as f64 / all_bytes;
        let SplitMeta { tokens, lines, words, .. } = part;
        tracing::info!("{split}: {tokens} tokens, {lines} lines, {words} words; {share:.1} % of the text");
    }
    let meta = Meta {
        format_version: FORMAT_VERSION,
        source: source.to_string(),
        tokenizer: tokenizer.to_owned(),
        vocab_size: made.vocab_size(),
        tokenizer_sha256: hex(&made.digest()),
        train,
        valid,
        test,
    };
    let json = serde_json::to_string_pretty(&meta)? + "\n";
    write_synced(&partial.path().join(META), json.as_bytes())?;
    {
        // Whoever asks this process to end waits, or neither folder would be in its place.
        let _in_place = making();
        partial.replace()?;
    }
    if let Source::Published(archive) = source {
        archive.remove_download(&downloads)?;
    }
    Ok(meta)
}

/// The folders that this process is making.
fn making() -> MutexGuard<'static, Vec<PathBuf>> {
    static MAKING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    MAKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what this process has half made, for when it is asked to end. Nothing may be made afterwards.
pub fn abandon() {
    let making = making();
    for out in &*making {
        Partial::discard(out);
        let _ = fs::remove_file(lock_of(out));
    }
    // What is still being written must not take its place.
    std::mem::forget(making);
}

fn lock_of(out: &Path) -> PathBuf {
    sibling(out, ".lockstep-lock")
}

/// The right to make a data folder, which one process at a time has. The system takes it back when a process ends, however
/// that happens.
struct Lock {
    out: PathBuf,
    _file: File,
}

impl Lock {
    fn take(out: &Path) -> Result<Self> {
        let path = lock_of(out);
        loop {
            let opened = File::options().create(true).truncate(false).write(true).open(&path);
            let file = opened.map_err(|e| Error::write(out, e))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Usage(format!(
                        "--out {}: another `lockstep prepare` is making this folder; wait for it, or name another",
                        out.display()
                    ))
                    .into())
                }
                Err(TryLockError::Error(e)) => tracing::warn!(
                    "{} cannot be locked ({e}): see to it that no other `lockstep prepare` makes the same folder",
                    path.display()
                ),
            }
            // Whoever had it until now has removed its name, and another may have made it anew.
            let place = |found: io::Result<Metadata>| found.map(|found| (found.dev(), found.ino())).ok();
            if place(path.metadata()) == place(file.metadata()) {
                making().push(out.to_owned());
                return Ok(Self { out: out.to_owned(), _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        making().retain(|out| *out != self.out);
        // Before the lock goes, so that nobody else's is removed.
        let _ = fs::remove_file(lock_of(&self.out));
    }
}

/// A checked `--tokenizer`.
enum Recipe {
    Gpt2,
    Bpe(usize),
    File(PathBuf),
}

impl Recipe {
    fn parse(text: &str) -> Result<Self> {
        let expected = "expected gpt2, bpe:N with N tokens (bpe:8192), or a tokenizer.json";
        if text == "gpt2" {
            return Ok(Self::Gpt2);
        }
        if let Some(size) = text.strip_prefix("bpe:") {
            return match size.parse() {
                Ok(size) => Ok(Self::Bpe(size)),
                Err(e) => Err(Error::Usage(format!("--tokenizer {text}: {expected}; {e}")).into()),
            };
        }
        match Path::new(text).is_file() {
            true => Ok(Self::File(text.into())),
            false => {
                let message = format!("--tokenizer {text}: {expected}; there is no such file");
                Err(Error::Usage(message).into())
            }
        }
    }

    /// Loads the tokenizer, or trains it on the training split.
    fn make(&self, corpus: &Corpus) -> Result<Tokenizer> {
        let size = match self {
            Self::Gpt2 => return Tokenizer::gpt2(),
            Self::File(path) => return Tokenizer::from_file(path),
            Self::Bpe(size) => *size,
        };
        if let Some(path) = corpus.ids() {
            return Err(Error::Usage(format!(
                "--tokenizer bpe:{size}: {} holds token ids, and no text to train a tokenizer on; expected the tokenizer that \
                 made them: --tokenizer gpt2",
                path.display()
            ))
            .into());
        }
        tracing::info!("training a tokenizer of {size} tokens on the training split");
        let mut counts = WordCounts::default();
        corpus.for_each_text("count", |events| {
            let lines = events.iter().filter_map(|event| match event {
                Event::Text(Split::Train, text) => Some(text.split_inclusive('\n')),
                _ => None,
            });
            counts.add_lines(&lines.flatten().collect::<Vec<_>>());
            Ok(())
        })?;
        if counts.forgotten() > 0 {
            tracing::info!(
                "the text has more different words than are counted at a time: words that had come at most {} times were \
                 forgotten",
                counts.forgotten()
            );
        }
        train(&counts, size)
    }
}

/// Writes the ids of a corpus into the folder, and says what each split holds.
fn encode(corpus: &Corpus, tokenizer: &Tokenizer, folder: &Path, shard_bytes: u64) -> Result<[SplitMeta; 3]> {
    let (vocab_size, digest) = (tokenizer.vocab_size(), tokenizer.digest());
    let mut writers = Vec::new();
    for split in Split::ALL {
        writers.push(ShardsWriter::create(folder, split.name(), vocab_size, digest, shard_bytes)?);
    }
    let mut bytes = [0; 3];
    corpus.for_each_text("encode", |events| {
        let texts = events.iter().filter_map(|event| match event {
            Event::Text(_, text) => Some(&**text),
            Event::End(_) => None,
        });
        let texts: Vec<&str> = texts.collect();
        let ids = tokenizer.encode_lines(&texts);
        let lines: Vec<&str> = texts.iter().flat_map(|text| text.split_inclusive('\n')).collect();
        let words: Vec<u64> = lines.par_iter().map(|line| line.split_whitespace().count() as u64).collect();
        let mut encoded = ids.iter().zip(words);
        for event in events {
            match event {
                Event::Text(split, text) => {
                    bytes[*split as usize] += text.len() as u64;
                    for (ids, words) in encoded.by_ref().take(text.split_inclusive('\n').count()) {
                        writers[*split as usize].write_line(ids, words)?;
                    }
                }
                Event::End(split) if corpus.marks_ends() => {
                    writers[*split as usize].end_document(tokenizer.end_of_text())?;
                }
                Event::End(_) => {}
            }
        }
        Ok(())
    })?;
    let all = (0..vocab_size as u32).map(|id| tokenizer.decode(&[id]));
    let ends_line: Vec<bool> = all.map(|bytes| Ok(bytes?.ends_with(b"\n"))).collect::<Result<_>>()?;
    corpus.for_each_ids(tokenizer, |split, ids| {
        let writer = &mut writers[split as usize];
        let text = ids.strip_suffix(&[tokenizer.end_of_text()]).unwrap_or(ids);
        for line in text.split_inclusive(|&id| ends_line[id as usize]) {
            let text = tokenizer.decode(line)?;
            bytes[split as usize] += text.len() as u64;
            writer.write_line(line, String::from_utf8_lossy(&text).split_whitespace().count() as u64)?;
        }
        match text {
            // A document of nothing else.
            [] => writer.write_line(ids, 0),
            _ if text.len() < ids.len() => writer.end_document(tokenizer.end_of_text()),
            _ => Ok(()),
        }
    })?;

    let mut finished = Vec::new();
    for ((split, writer), bytes) in Split::ALL.into_iter().zip(writers).zip(bytes) {
        let (counts, shards) = writer.finish()?;
        if counts.words == 0 && corpus.has(split) {
            return Err(corpus.empty(split));
        }
        let (tokens, lines, words) = (counts.tokens, counts.lines, counts.words);
        finished.push(SplitMeta { tokens, lines, words, bytes, shards });
    }
    finished.try_into().map_err(|_| anyhow::anyhow!("there are three splits"))
}

/// Tokenizes a file, which is no part of a data folder. Its ids lie in files without a name, which go with them.
///
/// # Errors
/// Data if the file cannot be read, is not UTF-8 or has no word, Storage if there is no space for the ids.
pub fn encode_file(path: &Path, tokenizer: &Tokenizer) -> Result<(Shards, SplitMeta)> {
    let split = Split::Test;
    let scratch = tempfile::Builder::new().prefix("lockstep-eval-").tempdir();
    let scratch = scratch.map_err(|e| Error::write(&std::env::temp_dir(), e))?;
    let folder = scratch.path();
    // A pipe can be read only once.
    let is_pipe = path.metadata().is_ok_and(|file| !file.is_file() && !file.is_dir());
    let whole = if is_pipe { &folder.join("piped") } else { path };
    if is_pipe {
        let mut piped = File::open(path).map_err(|e| Error::read(path, e))?;
        let mut file = File::create(whole).map_err(|e| Error::write(whole, e))?;
        io::copy(&mut piped, &mut file).map_err(|e| Error::write(whole, e))?;
    }
    let corpus = Corpus::of_file(whole, split)?;
    let [_, _, size] = encode(&corpus, tokenizer, folder, Choices::default().shard_bytes)?;
    let mut names: Vec<String> = size.shards.iter().map(|entry| entry.file.clone()).collect();
    if names.is_empty() {
        names.push(shard_name(split));
    }
    let shards: Result<_> = names.iter().map(|name| Shard::open(&folder.join(name))).collect();
    Ok((Shards::new(shards?), size))
}

/// Only an absent or empty folder, or one that holds a data folder's files and nothing else, may be
/// replaced; damage is no hindrance, as long as one shard still begins like one.
fn refuse_foreign(out: &Path) -> Result<()> {
    if !out.exists() {
        return Ok(());
    }
    let refused = |found: &str| {
        Error::Usage(format!(
            "--out {}: expected a new folder or one that `lockstep prepare` wrote, found {found}; nothing \
             was touched, name another folder",
            out.display()
        ))
    };
    if !out.is_dir() {
        return Err(refused("a file").into());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(out).map_err(|e| Error::read(out, e))? {
        let name = entry.map_err(|e| Error::read(out, e))?.file_name().to_string_lossy().into_owned();
        let is_shards = |split| name == shard_name(split) || is_shard_name(split, &name);
        if name != META && name != TOKENIZER && !Split::ALL.into_iter().any(is_shards) {
            return Err(refused(&format!("{name:?} in it")).into());
        }
        names.push(name);
    }
    let is_shard = |name: &String| {
        let mut start = [0; MAGIC.len()];
        let file = File::open(out.join(name));
        file.and_then(|mut file| file.read_exact(&mut start)).is_ok() && &start == MAGIC
    };
    match names.is_empty() || names.iter().any(is_shard) {
        true => Ok(()),
        false => Err(refused("no shard in it").into()),
    }
}
