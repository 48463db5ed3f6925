//! `prepare`: text becomes a data folder, and a data folder is opened with every check.
//!
//! It holds `train.bin`, `valid.bin` and `test.bin` (see [`super::shard`]), the `tokenizer.json` that
//! made them, and `meta.json`, which says what they are ([`Meta`]). It is built beside its place and
//! appears there complete or not at all.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::download::{byte_bar, sha256_of};
use super::shard::{Counts, Shard, ShardWriter, MAGIC};
use super::wikitext::{Source, Split, Text};
use crate::error::{Error, Result};
use crate::files::{hex, resolve, sibling, write_synced, Partial};
use crate::tokenizer::{train, Tokenizer, WordCounts};

const FORMAT_VERSION: u32 = 1;
const META: &str = "meta.json";
const TOKENIZER: &str = "tokenizer.json";

fn shard_name(split: Split) -> String {
    format!("{split}.bin")
}

/// What a data folder holds: `meta.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Version of this description and of the shards, 1.
    pub format_version: u32,
    /// What `--source` named.
    pub source: String,
    /// What `--tokenizer` named, such as `gpt2` or `bpe:8192`.
    pub tokenizer: String,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// SHA-256 of `tokenizer.json` in lower-case hexadecimal digits.
    pub tokenizer_sha256: String,
    /// The training split.
    pub train: SplitMeta,
    /// The validation split.
    pub valid: SplitMeta,
    /// The test split.
    pub test: SplitMeta,
}

/// The size of one split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitMeta {
    /// Token ids.
    pub tokens: u64,
    /// Lines of the text.
    pub lines: u64,
    /// Whitespace-separated words of the text.
    pub words: u64,
    /// Bytes of the text.
    pub bytes: u64,
}

impl Meta {
    /// The size of a split.
    pub fn split(&self, split: Split) -> &SplitMeta {
        match split {
            Split::Train => &self.train,
            Split::Valid => &self.valid,
            Split::Test => &self.test,
        }
    }
}

/// Tokenizes a corpus into the data folder `out`, over all cores and as a stream: memory is that of
/// the tokenizer and of some MiB of text. A data folder at `out` is replaced once the new one is
/// complete.
///
/// `tokenizer` is `gpt2`, `bpe:N` (N tokens, trained here on the training split) or a tokenizer.json.
///
/// # Errors
/// Usage for another tokenizer, where `out` holds something else than a data folder, and where another process makes it; Data
/// where the source cannot be read or is not UTF-8; Storage where `out` cannot be written.
pub fn prepare(source: &Source, tokenizer: &str, out: &Path) -> Result<Meta> {
    let out = resolve(out)?;
    let _lock = Lock::take(&out)?;
    refuse_foreign(&out)?;
    let recipe = Recipe::parse(tokenizer)?;
    let downloads = sibling(&out, ".download");
    let texts = source.texts(&downloads)?;
    let [train_text, _, _] = &texts;
    let made = recipe.make(train_text)?;

    let partial = Partial::beside(&out)?;
    write_synced(&partial.path().join(TOKENIZER), made.to_json().as_bytes())?;
    let digest = made.digest();
    let encode = |split: Split, text: &Text| {
        let shard = partial.path().join(shard_name(split));
        encode_split(split, text, &made, ShardWriter::create(&shard, made.vocab_size(), digest)?)
    };
    let [train, valid, test] = &texts;
    let meta = Meta {
        format_version: FORMAT_VERSION,
        source: source.to_string(),
        tokenizer: tokenizer.to_owned(),
        vocab_size: made.vocab_size(),
        tokenizer_sha256: hex(&digest),
        train: encode(Split::Train, train)?,
        valid: encode(Split::Valid, valid)?,
        test: encode(Split::Test, test)?,
    };
    let json = serde_json::to_string_pretty(&meta)? + "\n";
    write_synced(&partial.path().join(META), json.as_bytes())?;
    partial.replace()?;
    if let Source::Published(archive) = source {
        archive.remove_download(&downloads)?;
    }
    Ok(meta)
}

/// The right to make a data folder, which one process at a time has. The system takes it back when a process ends, however
/// that happens.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(out: &Path) -> Result<Self> {
        let path = sibling(out, ".lockstep-lock");
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
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock goes, so that nobody else's is removed.
        let _ = fs::remove_file(&self.path);
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

    /// Loads the tokenizer, or trains it on this text.
    fn make(&self, text: &Text) -> Result<Tokenizer> {
        let size = match self {
            Self::Gpt2 => return Tokenizer::gpt2(),
            Self::File(path) => return Tokenizer::from_file(path),
            Self::Bpe(size) => *size,
        };
        tracing::info!("training a tokenizer of {size} tokens on {text}");
        let mut counts = WordCounts::default();
        let bar = byte_bar("count", text.size()?);
        text.for_each_chunk(|chunk| {
            let lines: Vec<&str> = chunk.split_inclusive('\n').collect();
            counts.add_lines(&lines);
            bar.inc(chunk.len() as u64);
            Ok(())
        })?;
        bar.finish_and_clear();
        train(&counts, size)
    }
}

fn encode_split(split: Split, text: &Text, tokenizer: &Tokenizer, mut shard: ShardWriter) -> Result<SplitMeta> {
    let bar = byte_bar(split.name(), text.size()?);
    let bytes = text.for_each_chunk(|chunk| {
        let lines: Vec<&str> = chunk.split_inclusive('\n').collect();
        let ids = tokenizer.encode_lines(&lines);
        let words: Vec<u64> = lines.par_iter().map(|line| line.split_whitespace().count() as u64).collect();
        bar.inc(chunk.len() as u64);
        ids.iter().zip(words).try_for_each(|(ids, words)| shard.write_line(ids, words))
    })?;
    bar.finish_and_clear();
    let counts = shard.finish()?;
    if counts.words == 0 && !matches!(text, Text::Nothing) {
        return Err(text.empty());
    }
    tracing::info!("{split}: {counts}");
    Ok(SplitMeta { tokens: counts.tokens, lines: counts.lines, words: counts.words, bytes })
}

/// Tokenizes a text file, which is no part of a data folder. Its ids lie in a file without a name, which goes with them.
///
/// # Errors
/// Data if the text cannot be read, is not UTF-8 or has no word, Storage if there is no space for the ids.
pub fn encode_file(path: &Path, tokenizer: &Tokenizer) -> Result<(Shard, SplitMeta)> {
    // Ranks of one machine must not meet.
    let ids = std::env::temp_dir().join(format!("lockstep-eval-{}.bin", std::process::id()));
    let writer = ShardWriter::create(&ids, tokenizer.vocab_size(), tokenizer.digest())?;
    let size = encode_split(Split::Test, &Text::File(path.into()), tokenizer, writer)?;
    let shard = Shard::open(&ids);
    fs::remove_file(&ids).map_err(|e| Error::write(&ids, e))?;
    Ok((shard?, size))
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
    let shards = Split::ALL.map(shard_name);
    let mut names = Vec::new();
    for entry in fs::read_dir(out).map_err(|e| Error::read(out, e))? {
        let name = entry.map_err(|e| Error::read(out, e))?.file_name();
        let known = [META, TOKENIZER].into_iter().chain(shards.iter().map(String::as_str));
        if !known.into_iter().any(|known| name == known) {
            return Err(refused(&format!("{:?} in it", name.to_string_lossy())).into());
        }
        names.push(name);
    }
    let is_shard = |name: &String| {
        let mut start = [0; MAGIC.len()];
        let file = File::open(out.join(name));
        file.and_then(|mut file| file.read_exact(&mut start)).is_ok() && &start == MAGIC
    };
    match names.is_empty() || shards.iter().any(is_shard) {
        true => Ok(()),
        false => Err(refused("no shard in it").into()),
    }
}

/// A data folder, opened and checked.
#[derive(Debug)]
pub struct DataDir {
    /// What `meta.json` says; the shards agree.
    pub meta: Meta,
    /// Where the tokenizer's file is; its digest is that of the shards.
    pub tokenizer: PathBuf,
    /// The training split.
    pub train: Shard,
    /// The validation split.
    pub valid: Shard,
    /// The test split.
    pub test: Shard,
}

impl DataDir {
    /// Opens the folder at `path` and checks that its files are whole and belong together.
    ///
    /// # Errors
    /// Data, naming the file, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Self> {
        let wrong = |file: &Path, expected: &str, found: &str| -> anyhow::Error {
            Error::Data(format!(
                "{}: expected {expected}, found {found}; make the data folder with `lockstep prepare --out {}`",
                file.display(),
                path.display()
            ))
            .into()
        };
        let file = path.join(META);
        if !file.is_file() {
            let found = match path.exists() {
                true => "no meta.json in it",
                false => "nothing",
            };
            return Err(wrong(path, "a data folder", found));
        }
        let text = fs::read_to_string(&file).map_err(|e| Error::read(&file, e))?;
        let meta: Meta = serde_json::from_str(&text)
            .map_err(|e| wrong(&file, "the description of a data folder", &e.to_string()))?;
        if meta.format_version != FORMAT_VERSION {
            let found = format!("{}", meta.format_version);
            return Err(wrong(&file, "format_version 1", &found));
        }
        let tokenizer = path.join(TOKENIZER);
        if !tokenizer.is_file() {
            return Err(wrong(&tokenizer, "the tokenizer's file", "nothing"));
        }
        let digest = sha256_of(&tokenizer)?;
        if digest != meta.tokenizer_sha256 {
            let expected = format!("SHA-256 {}, as meta.json says", meta.tokenizer_sha256);
            return Err(wrong(&tokenizer, &expected, &digest));
        }
        let open = |split: Split| {
            let file = path.join(shard_name(split));
            let shard = Shard::open(&file)?;
            let made_by = hex(&shard.tokenizer_digest());
            if made_by != digest {
                let expected = format!("a shard of the folder's tokenizer {digest}");
                return Err(wrong(&file, &expected, &format!("one of {made_by}")));
            }
            let said = meta.split(split);
            let expected = Counts { tokens: said.tokens, lines: said.lines, words: said.words };
            if (shard.vocab_size(), shard.counts()) != (meta.vocab_size, expected) {
                let expected = format!("{expected} of a vocabulary of {}, as meta.json says", meta.vocab_size);
                let found = format!("{} of {}", shard.counts(), shard.vocab_size());
                return Err(wrong(&file, &expected, &found));
            }
            Ok(shard)
        };
        let (train, valid, test) = (open(Split::Train)?, open(Split::Valid)?, open(Split::Test)?);
        Ok(Self { meta, tokenizer, train, valid, test })
    }
}
