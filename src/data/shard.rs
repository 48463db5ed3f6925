//! Shards: the token ids of one split in one file, written as a stream and read through a memory map.
//!
//! # Format, version 1 (all numbers little endian)
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic, `LOCKSTEP` |
//! | 8..12 | u32 format version, 1 |
//! | 12..16 | u32 token width in bytes: 2 if vocab_size is at most 65,536, else 4 |
//! | 16..24 | u64 n_tokens |
//! | 24..32 | u64 n_lines |
//! | 32..40 | u64 n_words, the whitespace-separated words of the text |
//! | 40..72 | SHA-256 of the tokenizer's `tokenizer.json` |
//! | 72..104 | SHA-256 of the payload followed by the header's bytes 0..72 and 104..128 |
//! | 104..108 | u32 vocab_size; every token id is below it |
//! | 108..128 | zero |
//!
//! The payload is n_tokens ids, zeros up to a multiple of 8 bytes, then n_lines + 1 u64 line offsets
//! counted in tokens: the first is 0, the last n_tokens, none below its predecessor. A line is a line
//! of the text with its newline, tokenized alone.
//!
//! A reader trusts nothing: each header field is checked before it is used, the file's size must be
//! the one that the counts give, and the checksum, every line offset and every id are checked once,
//! when the shard is opened.

// The memory map is this file's one unsafe call.
#![allow(unsafe_code)]

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::files::hex;

/// The first bytes of every shard.
pub const MAGIC: &[u8; 8] = b"LOCKSTEP";
const VERSION: u32 = 1;
const HEADER: usize = 128;
/// The header's places: see the table at the top.
const TOKENIZER_DIGEST: Range<usize> = 40..72;
const CHECKSUM: Range<usize> = 72..104;
const RESERVED: Range<usize> = 108..HEADER;

/// Bytes of one token id in a shard of this vocabulary.
fn token_width(vocab_size: u32) -> usize {
    if vocab_size <= 1 << 16 {
        2
    } else {
        4
    }
}

/// The size that a shard's file must have; None if the counts overflow a u64.
fn file_size(n_tokens: u64, n_lines: u64, width: usize) -> Option<u64> {
    let ids = n_tokens.checked_mul(width as u64)?.checked_next_multiple_of(8)?;
    let offsets = n_lines.checked_add(1)?.checked_mul(8)?;
    ids.checked_add(offsets)?.checked_add(HEADER as u64)
}

/// Completes the checksum of a payload with the header's bytes, its own place left out.
fn checksum(mut payload: Sha256, header: &[u8]) -> [u8; 32] {
    payload.update(&header[..CHECKSUM.start]);
    payload.update(&header[CHECKSUM.end..]);
    payload.finalize().into()
}

/// What a shard holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Token ids.
    pub tokens: u64,
    /// Lines of the text.
    pub lines: u64,
    /// Whitespace-separated words of the text.
    pub words: u64,
}

impl Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tokens, {} lines, {} words", self.tokens, self.lines, self.words)
    }
}

/// Writes a shard line by line; memory grows by 8 bytes a line, whatever the lines hold.
///
/// Everything goes to a temporary sibling, which [`ShardWriter::finish`] completes, syncs to disk and
/// renames; without it the sibling is removed and no shard appears.
pub struct ShardWriter {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    payload: Sha256,
    vocab_size: u32,
    tokenizer_digest: [u8; 32],
    /// Where each line starts, in tokens; the last entry is the number of tokens so far.
    offsets: Vec<u64>,
    words: u64,
    /// The current line's ids as bytes, kept between lines.
    bytes: Vec<u8>,
}

impl ShardWriter {
    /// Starts a shard at `path` of ids below `vocab_size`, made by the tokenizer of this digest.
    ///
    /// # Errors
    /// Storage if the file cannot be created, Data if the vocabulary is beyond a u32.
    pub fn create(path: &Path, vocab_size: usize, tokenizer_digest: [u8; 32]) -> Result<Self> {
        let vocab_size = u32::try_from(vocab_size).map_err(|_| {
            Error::Data(format!(
                "a vocabulary of {vocab_size} tokens: at most {} fit into a shard; use a smaller tokenizer",
                u32::MAX
            ))
        })?;
        let mut name = path.as_os_str().to_owned();
        name.push(".tmp");
        let temporary = PathBuf::from(name);
        let file = File::create(&temporary).map_err(|e| Error::write(&temporary, e))?;
        let mut writer = Self {
            path: path.to_owned(),
            temporary,
            file: BufWriter::with_capacity(1 << 20, file),
            payload: Sha256::new(),
            vocab_size,
            tokenizer_digest,
            offsets: vec![0],
            words: 0,
            bytes: Vec::new(),
        };
        // The header's place; its content is known at the end.
        writer.put(&[0; HEADER])?;
        Ok(writer)
    }

    /// Appends a line: its ids, and the number of whitespace-separated words of its text.
    ///
    /// # Errors
    /// Data for an id outside the vocabulary, Storage if the file cannot be written.
    pub fn write_line(&mut self, ids: &[u32], words: u64) -> Result<()> {
        if let Some(id) = ids.iter().find(|&&id| id >= self.vocab_size) {
            return Err(Error::Data(format!(
                "token id {id} on line {} of {}: ids below the vocabulary size {} expected; the tokenizer \
                 is at fault, make it again",
                self.offsets.len(),
                self.path.display(),
                self.vocab_size
            ))
            .into());
        }
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        match token_width(self.vocab_size) {
            // The cast keeps the id: it is below a vocabulary size that a u16 can index.
            2 => bytes.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
            _ => bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
        }
        self.payload.update(&bytes);
        self.put(&bytes)?;
        self.bytes = bytes;
        self.offsets.push(self.n_tokens() + ids.len() as u64);
        self.words += words;
        Ok(())
    }

    /// Completes the shard: padding, line offsets, header, sync, rename.
    ///
    /// # Errors
    /// Storage if the file cannot be written.
    pub fn finish(mut self) -> Result<Counts> {
        let counts = Counts { tokens: self.n_tokens(), lines: self.offsets.len() as u64 - 1, words: self.words };
        let width = token_width(self.vocab_size);
        let ids = counts.tokens * width as u64;
        let mut tail = vec![0; (ids.next_multiple_of(8) - ids) as usize];
        tail.extend(self.offsets.iter().flat_map(|offset| offset.to_le_bytes()));
        self.payload.update(&tail);
        self.put(&tail)?;

        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(width as u32).to_le_bytes());
        header[16..24].copy_from_slice(&counts.tokens.to_le_bytes());
        header[24..32].copy_from_slice(&counts.lines.to_le_bytes());
        header[32..40].copy_from_slice(&counts.words.to_le_bytes());
        header[TOKENIZER_DIGEST].copy_from_slice(&self.tokenizer_digest);
        header[104..108].copy_from_slice(&self.vocab_size.to_le_bytes());
        let sum = checksum(std::mem::take(&mut self.payload), &header);
        header[CHECKSUM].copy_from_slice(&sum);

        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.write_all(&header))
            .and_then(|()| self.file.flush())
            .and_then(|()| self.file.get_ref().sync_all())
            .and_then(|()| fs::rename(&self.temporary, &self.path))
            .map_err(|e| Error::write(&self.path, e))?;
        Ok(counts)
    }

    fn n_tokens(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::write(&self.path, e))
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        // After `finish` the name is gone already, and there is nobody to tell of another failure.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// One split's token ids, memory-mapped and checked; `Send` and `Sync`, so threads may share it.
#[derive(Debug)]
pub struct Shard {
    map: Mmap,
    width: usize,
    n_tokens: usize,
    n_lines: usize,
    n_words: u64,
    vocab_size: u32,
    /// Where the line offsets start, in bytes.
    offsets: usize,
}

/// A field of a shard that is not what it must be; `offset` is in bytes.
fn damaged(path: &Path, field: &str, offset: usize, expected: impl Display, found: impl Display) -> anyhow::Error {
    Error::Data(format!(
        "{}: {field} at byte {offset}: expected {expected}, found {found}; the file is damaged or not a \
         Lockstep shard: run `lockstep prepare` again",
        path.display()
    ))
    .into()
}

impl Shard {
    /// Maps the shard at `path` and checks every byte of it.
    ///
    /// # Errors
    /// Data, naming the field, its place, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Self> {
        let missing = |e| Error::read(path, format!("{e}; run `lockstep prepare` to make it"));
        let file = File::open(path).map_err(missing)?;
        let size = file.metadata().map_err(|e| Error::read(path, e))?.len();
        if size < HEADER as u64 {
            let (expected, found) = (format!("{HEADER} bytes or more"), format!("{size} in all"));
            return Err(damaged(path, "header", 0, expected, found));
        }
        // SAFETY: a map is sound as long as the file's bytes do not change under it. A shard is never
        // changed in place: `ShardWriter` writes a file of another name and renames it when complete,
        // and `prepare` replaces whole folders, so a shard's inode keeps its bytes until its last map
        // is gone. The map is read-only and private to `Shard`, and its bytes are only read as
        // integers, any of whose bit patterns is valid.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::read(path, e))?;
        Self::check(path, map)
    }

    fn check(path: &Path, map: Mmap) -> Result<Self> {
        let header = &map[..HEADER];
        if &header[..8] != MAGIC {
            let found = format!("{:?}", String::from_utf8_lossy(&header[..8]));
            return Err(damaged(path, "magic", 0, "\"LOCKSTEP\"", found));
        }
        let version = u32_at(header, 8);
        if version != VERSION {
            return Err(damaged(path, "format version", 8, VERSION, version));
        }
        let vocab_size = u32_at(header, 104);
        let width = token_width(vocab_size);
        if u32_at(header, 12) != width as u32 {
            let expected = format!("{width} for a vocabulary of {vocab_size}");
            let found = u32_at(header, 12);
            return Err(damaged(path, "token width", 12, expected, found));
        }
        if let Some(i) = RESERVED.into_iter().find(|&i| header[i] != 0) {
            return Err(damaged(path, "reserved byte", i, 0, header[i]));
        }
        let (n_tokens, n_lines) = (u64_at(header, 16), u64_at(header, 24));
        if file_size(n_tokens, n_lines, width) != Some(map.len() as u64) {
            let expected = format!("counts that fit the file's {} bytes", map.len());
            let found = format!("{n_tokens} tokens of {width} bytes and {n_lines} lines");
            return Err(damaged(path, "token and line count", 16, expected, found));
        }
        let sum = checksum(Sha256::new_with_prefix(&map[HEADER..]), header);
        if header[CHECKSUM] != sum {
            let expected = format!("{} as of its bytes", hex(&sum));
            let found = hex(&header[CHECKSUM]);
            return Err(damaged(path, "checksum", CHECKSUM.start, expected, found));
        }
        // The counts fit the map's length, so they fit a usize too.
        let (n_tokens, n_lines) = (n_tokens as usize, n_lines as usize);
        let shard = Self {
            width,
            n_tokens,
            n_lines,
            n_words: u64_at(header, 32),
            vocab_size,
            offsets: map.len() - (n_lines + 1) * 8,
            map,
        };
        shard.check_payload(path)?;
        Ok(shard)
    }

    /// Whoever can write a file can write its checksum; line offsets and ids are what later code
    /// relies on.
    fn check_payload(&self, path: &Path) -> Result<()> {
        let ids = HEADER..HEADER + self.n_tokens * self.width;
        if let Some(i) = (ids.end..self.offsets).find(|&i| self.map[i] != 0) {
            return Err(damaged(path, "padding", i, 0, self.map[i]));
        }
        let n_tokens = self.n_tokens as u64;
        let mut last = 0;
        for i in 0..=self.n_lines {
            let at = self.offsets + 8 * i;
            let offset = u64_at(&self.map, at);
            let range = match i {
                0 => 0..=0,
                _ if i == self.n_lines => n_tokens..=n_tokens,
                _ => last..=n_tokens,
            };
            if !range.contains(&offset) {
                let expected = format!("{} to {}", range.start(), range.end());
                let field = format!("offset of line {}", i + 1);
                return Err(damaged(path, &field, at, expected, offset));
            }
            last = offset;
        }
        let vocab_size = self.vocab_size;
        if let Some(i) = (0..self.n_tokens).find(|&i| self.id(i) >= vocab_size) {
            let at = HEADER + i * self.width;
            let expected = format!("an id below {vocab_size}");
            return Err(damaged(path, "token id", at, expected, self.id(i)));
        }
        Ok(())
    }

    /// Token ids in the shard.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Lines of the text.
    pub fn n_lines(&self) -> usize {
        self.n_lines
    }

    /// Whitespace-separated words of the text.
    pub fn n_words(&self) -> u64 {
        self.n_words
    }

    /// Size of the vocabulary; every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size as usize
    }

    /// SHA-256 of the tokenizer.json that made the ids.
    pub fn tokenizer_digest(&self) -> [u8; 32] {
        self.bytes32(TOKENIZER_DIGEST)
    }

    /// The shard's checksum, which stands for its whole content.
    pub fn digest(&self) -> [u8; 32] {
        self.bytes32(CHECKSUM)
    }

    /// The counts, as [`ShardWriter::finish`] gave them.
    pub fn counts(&self) -> Counts {
        Counts { tokens: self.n_tokens as u64, lines: self.n_lines as u64, words: self.n_words }
    }

    /// The tokens of line `i`, to be read with [`Shard::tokens`]; panics unless `i` is below
    /// [`Shard::n_lines`], as indexing a slice would.
    pub fn line(&self, i: usize) -> Range<usize> {
        assert!(i < self.n_lines, "line {i} of {}", self.n_lines);
        let at = self.offsets + 8 * i;
        u64_at(&self.map, at) as usize..u64_at(&self.map, at + 8) as usize
    }

    /// Appends the ids of a range of tokens to `out`; panics if the range is not within
    /// [`Shard::n_tokens`], as slicing would.
    pub fn tokens(&self, range: Range<usize>, out: &mut Vec<i64>) {
        let ids = &self.map[HEADER..HEADER + self.n_tokens * self.width];
        let bytes = &ids[range.start * self.width..range.end * self.width];
        match self.width {
            2 => out.extend(bytes.chunks_exact(2).map(|b| i64::from(u16_at(b, 0)))),
            _ => out.extend(bytes.chunks_exact(4).map(|b| i64::from(u32_at(b, 0)))),
        }
    }

    fn id(&self, i: usize) -> u32 {
        let at = HEADER + i * self.width;
        match self.width {
            2 => u16_at(&self.map, at).into(),
            _ => u32_at(&self.map, at),
        }
    }

    fn bytes32(&self, place: Range<usize>) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(&self.map[place]);
        bytes
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
