//! A data folder: what it holds, and how it is opened, with every check.
//!
//! It holds the token ids of each split (see [`super::shard`]), the `tokenizer.json` that made them, and `meta.json`, which
//! says what they are ([`Meta`]).

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::download::sha256_of;
use super::shard::{Counts, Entry, Shard, Shards};
use super::wikitext::Split;
use crate::error::{Error, Result};
use crate::files::hex;

pub(super) const FORMAT_VERSION: u32 = 1;
pub(super) const META: &str = "meta.json";
pub(super) const TOKENIZER: &str = "tokenizer.json";

/// The file of a split that is in one shard.
pub(super) fn shard_name(split: Split) -> String {
    format!("{split}.bin")
}

/// Whether a shard of this split may be called so, if there are several: `train-00000.bin`.
pub(super) fn is_shard_name(split: Split, name: &str) -> bool {
    let digits = name.strip_prefix(split.name()).and_then(|rest| rest.strip_prefix('-'));
    let digits = digits.and_then(|rest| rest.strip_suffix(".bin"));
    digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
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
    /// The shards in their order, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<Entry>,
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

/// A data folder, opened and checked.
#[derive(Debug)]
pub struct DataDir {
    /// What `meta.json` says; the shards agree.
    pub meta: Meta,
    /// Where the tokenizer's file is; its digest is that of the shards.
    pub tokenizer: PathBuf,
    /// The training split.
    pub train: Shards,
    /// The validation split.
    pub valid: Shards,
    /// The test split.
    pub test: Shards,
}

impl DataDir {
    /// Opens the folder at `path` and checks that its files are whole and belong together.
    ///
    /// # Errors
    /// Data, naming the file, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Self> {
        let data = Self::open_unverified(path)?;
        data.verify(|| ())?;
        Ok(data)
    }

    /// Opens the folder at `path` and checks that its files belong together, but not each byte of the shards:
    /// [`DataDir::verify`] does that, here or in another process that has opened the same files ([`DataDir::identity`]).
    ///
    /// # Errors
    /// As [`DataDir::open`].
    pub fn open_unverified(path: &Path) -> Result<Self> {
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
        let shard = |name: &str| -> Result<Shard> {
            let file = path.join(name);
            let shard = Shard::open_unverified(&file)?;
            let made_by = hex(&shard.tokenizer_digest());
            if (&made_by, shard.vocab_size()) != (&digest, meta.vocab_size) {
                let expected =
                    format!("a shard of the folder's tokenizer {digest}, with a vocabulary of {}", meta.vocab_size);
                let found = format!("one of {made_by}, with a vocabulary of {}", shard.vocab_size());
                return Err(wrong(&file, &expected, &found));
            }
            Ok(shard)
        };
        let open = |split: Split| {
            let said = meta.split(split);
            let mut shards = Vec::new();
            for entry in &said.shards {
                // Nothing outside of the folder is read.
                if !is_shard_name(split, &entry.file) {
                    let expected = format!("shards named {split}-00000.bin and so on");
                    return Err(wrong(&file, &expected, &format!("{:?}", entry.file)));
                }
                let shard = shard(&entry.file)?;
                let found = (shard.n_tokens() as u64, hex(&shard.digest()));
                if found != (entry.tokens, entry.checksum.clone()) {
                    let expected = format!("{} tokens, checksum {}, as meta.json says", entry.tokens, entry.checksum);
                    let found = format!("{} tokens, checksum {}", found.0, found.1);
                    return Err(wrong(&path.join(&entry.file), &expected, &found));
                }
                shards.push(shard);
            }
            if shards.is_empty() {
                shards.push(shard(&shard_name(split))?);
            }
            let shards = Shards::new(shards);
            let expected = Counts { tokens: said.tokens, lines: said.lines, words: said.words };
            if shards.counts() != expected {
                let expected = format!("{expected}, as meta.json says");
                return Err(wrong(&path.join(shard_name(split)), &expected, &shards.counts().to_string()));
            }
            Ok(shards)
        };
        let (train, valid, test) = (open(Split::Train)?, open(Split::Valid)?, open(Split::Test)?);
        Ok(Self { meta, tokenizer, train, valid, test })
    }

    fn splits(&self) -> [&Shards; 3] {
        [&self.train, &self.valid, &self.test]
    }

    /// Checks every byte of the shards; calls `next` before each.
    ///
    /// # Errors
    /// As [`DataDir::open`].
    pub fn verify(&self, mut next: impl FnMut()) -> Result<()> {
        self.splits().into_iter().try_for_each(|shards| shards.verify(&mut next))
    }

    /// Names the open files and their content among those of this machine: what one process has verified, another that finds
    /// the same need not.
    pub fn identity(&self) -> String {
        let shards = self.splits().into_iter().flat_map(Shards::shards);
        hex(&shards.fold(Sha256::new(), |hash, shard| hash.chain_update(shard.identity())).finalize())
    }
}
