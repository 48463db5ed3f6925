//! The shards of one split, written and read as if they were one.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Counts, Shard, ShardWriter};
use crate::error::{Error, Result};
use crate::files::hex;

/// A shard has no more lines than this, since its writer holds 8 bytes for each until the shard is finished.
const MAX_LINES: usize = 1 << 24;

/// One of several shards, as the index of a data folder lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The file's name.
    pub file: String,
    /// Token ids in it.
    pub tokens: u64,
    /// The checksum in its header, in lower-case hexadecimal digits.
    pub checksum: String,
}

/// Writes a split: into NAME.bin, or, as soon as that would be larger than the limit, into NAME-00000.bin, NAME-00001.bin and
/// so on.
pub struct ShardsWriter {
    folder: PathBuf,
    limit: u64,
    vocab_size: usize,
    tokenizer_digest: [u8; 32],
    current: ShardWriter,
    finished: Finished,
}

/// The shards before the current one, if the split is in several.
struct Finished {
    name: String,
    entries: Vec<Entry>,
    counts: Counts,
}

impl ShardsWriter {
    /// Starts the split `name` in a folder, of ids below `vocab_size` that the tokenizer of this digest made. No file gets
    /// larger than `limit` bytes, unless a single line is.
    ///
    /// # Errors
    /// As [`ShardWriter::create`].
    pub fn create(
        folder: &Path,
        name: &str,
        vocab_size: usize,
        tokenizer_digest: [u8; 32],
        limit: u64,
    ) -> Result<Self> {
        let current = ShardWriter::create(&folder.join(format!("{name}.bin")), vocab_size, tokenizer_digest)?;
        let counts = Counts { tokens: 0, lines: 0, words: 0 };
        let finished = Finished { name: name.to_owned(), entries: Vec::new(), counts };
        Ok(Self { folder: folder.to_owned(), limit, vocab_size, tokenizer_digest, current, finished })
    }

    /// Appends a line, as [`ShardWriter::write_line`].
    ///
    /// # Errors
    /// As [`ShardWriter::write_line`].
    pub fn write_line(&mut self, ids: &[u32], words: u64) -> Result<()> {
        // One more token may come to end the document.
        let is_full = self.current.size_with_line(ids.len() + 1) > self.limit || self.current.n_lines() == MAX_LINES;
        if is_full && self.current.n_lines() > 0 {
            self.next_shard()?;
        }
        self.current.write_line(ids, words)
    }

    /// Appends the token that ends a document to its last line; the document has one.
    ///
    /// # Errors
    /// As [`ShardWriter::write_line`].
    pub fn end_document(&mut self, end_of_text: u32) -> Result<()> {
        self.current.lengthen_line(end_of_text)
    }

    fn next_shard(&mut self) -> Result<()> {
        let number = self.finished.entries.len();
        let next = self.folder.join(self.finished.file(number + 1));
        let next = ShardWriter::create(&next, self.vocab_size, self.tokenizer_digest)?;
        self.finished.add(std::mem::replace(&mut self.current, next))?;
        if number == 0 {
            // It was begun as the only one.
            let alone = self.folder.join(format!("{}.bin", self.finished.name));
            let first = self.folder.join(self.finished.file(0));
            fs::rename(&alone, &first).map_err(|e| Error::write(&first, e))?;
        }
        Ok(())
    }

    /// Completes the split; gives what it holds, and its shards if there are several.
    ///
    /// # Errors
    /// As [`ShardWriter::finish`].
    pub fn finish(self) -> Result<(Counts, Vec<Entry>)> {
        let Self { current, mut finished, .. } = self;
        if finished.entries.is_empty() {
            return Ok((current.finish()?.0, Vec::new()));
        }
        finished.add(current)?;
        Ok((finished.counts, finished.entries))
    }
}

impl Finished {
    fn file(&self, number: usize) -> String {
        format!("{}-{number:05}.bin", self.name)
    }

    fn add(&mut self, shard: ShardWriter) -> Result<()> {
        let (counts, checksum) = shard.finish()?;
        let file = self.file(self.entries.len());
        self.entries.push(Entry { file, tokens: counts.tokens, checksum: hex(&checksum) });
        self.counts.tokens += counts.tokens;
        self.counts.lines += counts.lines;
        self.counts.words += counts.words;
        Ok(())
    }
}

/// The token ids of one split, in one shard or in several; `Send` and `Sync`.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Shard>,
    /// The number of tokens before each shard, and in all.
    starts: Vec<usize>,
}

impl From<Shard> for Shards {
    fn from(shard: Shard) -> Self {
        Self::new(vec![shard])
    }
}

impl Shards {
    /// Joins shards of one tokenizer, at least one, in their order.
    pub fn new(shards: Vec<Shard>) -> Self {
        let ends = shards.iter().scan(0, |end, shard| {
            *end += shard.n_tokens();
            Some(*end)
        });
        let starts = std::iter::once(0).chain(ends).collect();
        Self { shards, starts }
    }

    /// The shards, in their order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Token ids in the split.
    pub fn n_tokens(&self) -> usize {
        self.starts[self.shards.len()]
    }

    /// Lines of the text.
    pub fn n_lines(&self) -> usize {
        self.shards.iter().map(Shard::n_lines).sum()
    }

    /// Whitespace-separated words of the text.
    pub fn n_words(&self) -> u64 {
        self.shards.iter().map(Shard::n_words).sum()
    }

    /// Size of the vocabulary; every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.shards[0].vocab_size()
    }

    /// SHA-256 of the tokenizer.json that made the ids.
    pub fn tokenizer_digest(&self) -> [u8; 32] {
        self.shards[0].tokenizer_digest()
    }

    /// What stands for the whole content: the checksum of a single shard, the SHA-256 of the checksums of several.
    pub fn digest(&self) -> [u8; 32] {
        match &self.shards[..] {
            [only] => only.digest(),
            several => {
                several.iter().fold(Sha256::new(), |hash, shard| hash.chain_update(shard.digest())).finalize().into()
            }
        }
    }

    /// The counts of all shards together.
    pub fn counts(&self) -> Counts {
        Counts { tokens: self.n_tokens() as u64, lines: self.n_lines() as u64, words: self.n_words() }
    }

    /// As [`Shard::verify`], shard by shard; calls `next` before each.
    ///
    /// # Errors
    /// As [`Shard::verify`].
    pub fn verify(&self, mut next: impl FnMut()) -> Result<()> {
        self.shards.iter().try_for_each(|shard| {
            next();
            shard.verify()
        })
    }

    /// As [`Shard::check_unchanged`], for all shards.
    ///
    /// # Errors
    /// As [`Shard::check_unchanged`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards.iter().try_for_each(Shard::check_unchanged)
    }

    /// As [`Shard::for_each_line`], with places in the whole split.
    ///
    /// # Errors
    /// As [`Shard::for_each_line`].
    pub fn for_each_line(&self, mut each: impl FnMut(Range<usize>)) -> Result<()> {
        self.shards
            .iter()
            .zip(&self.starts)
            .try_for_each(|(shard, start)| shard.for_each_line(|line| each(start + line.start..start + line.end)))
    }

    /// As [`Shard::tokens`], of a range of the whole split.
    ///
    /// # Errors
    /// As [`Shard::tokens`].
    pub fn tokens(&self, range: Range<usize>, out: &mut Vec<i64>) -> Result<()> {
        let mut number = self.starts.partition_point(|&start| start <= range.start).saturating_sub(1);
        let mut place = range.start;
        while place < range.end {
            let (start, end) = (self.starts[number], self.starts[number + 1]);
            self.shards[number].tokens(place - start..range.end.min(end) - start, out)?;
            (place, number) = (end, number + 1);
        }
        Ok(())
    }
}
