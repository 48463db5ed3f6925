//! Shards: the token ids of one split in one file, written as a stream and read where they are wanted.
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
//! when the shard is opened. Later reads go through the file too, not through a memory map: a file that is cut, or a disk
//! that fails, is then an error of this program, where a map would be a signal that ends it without a word.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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
/// Bytes read at a time where a range is read through: a multiple of every number's size.
const PIECE: usize = 1 << 16;

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

/// One split's token ids, checked; `Send` and `Sync`, so threads may share it.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    file: File,
    header: [u8; HEADER],
    /// Bytes of the file.
    size: usize,
    width: usize,
    n_tokens: usize,
    n_lines: usize,
    vocab_size: u32,
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
    /// Opens the shard at `path` and checks every byte of it.
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
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).map_err(|e| Error::read(path, e))?;
        let shard = Self::from_header(path, file, header, size)?;
        shard.check_payload()?;
        Ok(shard)
    }

    fn from_header(path: &Path, file: File, header: [u8; HEADER], size: u64) -> Result<Self> {
        if &header[..8] != MAGIC {
            let found = format!("{:?}", String::from_utf8_lossy(&header[..8]));
            return Err(damaged(path, "magic", 0, "\"LOCKSTEP\"", found));
        }
        let version = u32_at(&header, 8);
        if version != VERSION {
            return Err(damaged(path, "format version", 8, VERSION, version));
        }
        let vocab_size = u32_at(&header, 104);
        let width = token_width(vocab_size);
        if u32_at(&header, 12) != width as u32 {
            let expected = format!("{width} for a vocabulary of {vocab_size}");
            let found = u32_at(&header, 12);
            return Err(damaged(path, "token width", 12, expected, found));
        }
        if let Some(i) = RESERVED.into_iter().find(|&i| header[i] != 0) {
            return Err(damaged(path, "reserved byte", i, 0, header[i]));
        }
        let (n_tokens, n_lines) = (u64_at(&header, 16), u64_at(&header, 24));
        if file_size(n_tokens, n_lines, width) != Some(size) {
            let expected = format!("counts that fit the file's {size} bytes");
            let found = format!("{n_tokens} tokens of {width} bytes and {n_lines} lines");
            return Err(damaged(path, "token and line count", 16, expected, found));
        }
        // The counts fit the file's size, so they fit a usize too.
        let (size, n_tokens, n_lines) = (size as usize, n_tokens as usize, n_lines as usize);
        Ok(Self { path: path.to_owned(), file, header, size, width, n_tokens, n_lines, vocab_size })
    }

    /// Whoever can write a file can write its checksum; line offsets and ids are what later code
    /// relies on.
    fn check_payload(&self) -> Result<()> {
        let (path, ids, offsets) = (&self.path, self.ids(), self.offsets());
        let mut payload = Sha256::new();
        self.for_each_piece(HEADER..self.size, |_, bytes| {
            payload.update(bytes);
            Ok(())
        })?;
        let sum = checksum(payload, &self.header);
        if self.header[CHECKSUM] != sum {
            let expected = format!("{} as of its bytes", hex(&sum));
            let found = hex(&self.header[CHECKSUM]);
            return Err(damaged(path, "checksum", CHECKSUM.start, expected, found));
        }
        self.for_each_piece(ids.end..offsets.start, |at, bytes| match bytes.iter().position(|&byte| byte != 0) {
            Some(i) => Err(damaged(path, "padding", at + i, 0, bytes[i])),
            None => Ok(()),
        })?;
        let n_tokens = self.n_tokens as u64;
        let mut last = 0;
        self.for_each_piece(offsets.clone(), |at, bytes| {
            for (i, offset) in (at..).step_by(8).zip(bytes.chunks_exact(8).map(|bytes| u64_at(bytes, 0))) {
                let line = (i - offsets.start) / 8;
                let range = match line {
                    0 => 0..=0,
                    _ if line == self.n_lines => n_tokens..=n_tokens,
                    _ => last..=n_tokens,
                };
                if !range.contains(&offset) {
                    let expected = format!("{} to {}", range.start(), range.end());
                    let field = format!("offset of line {}", line + 1);
                    return Err(damaged(path, &field, i, expected, offset));
                }
                last = offset;
            }
            Ok(())
        })?;
        self.for_each_piece(ids, |at, bytes| {
            let wrong = bytes.chunks_exact(self.width).position(|id| self.id(id) >= self.vocab_size);
            let Some(i) = wrong.map(|i| i * self.width) else { return Ok(()) };
            let expected = format!("an id below {}", self.vocab_size);
            Err(damaged(path, "token id", at + i, expected, self.id(&bytes[i..])))
        })
    }

    /// Where the token ids are, in bytes.
    fn ids(&self) -> Range<usize> {
        HEADER..HEADER + self.n_tokens * self.width
    }

    /// Where the line offsets are, in bytes.
    fn offsets(&self) -> Range<usize> {
        self.size - (self.n_lines + 1) * 8..self.size
    }

    /// Calls `each` with the place of a piece and its bytes, piece after piece of a range whose places count from the first;
    /// every piece but the last has [`PIECE`] bytes.
    fn for_each_piece(&self, range: Range<usize>, mut each: impl FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; PIECE.min(range.len())];
        for at in range.clone().step_by(PIECE) {
            let bytes = &mut buffer[..PIECE.min(range.end - at)];
            self.read(at, bytes)?;
            each(at, bytes)?;
        }
        Ok(())
    }

    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, at as u64).map_err(|e| {
            let now = self.file.metadata().map_or(0, |file| file.len());
            match e.kind() {
                ErrorKind::UnexpectedEof => Error::Data(format!(
                    "{}: expected {} bytes, as when it was opened, found {now}: the file was cut while it was in use; run \
                     `lockstep prepare` again",
                    self.path.display(),
                    self.size
                ))
                .into(),
                _ => Error::read(&self.path, e),
            }
        })
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
        u64_at(&self.header, 32)
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
        Counts { tokens: self.n_tokens as u64, lines: self.n_lines as u64, words: self.n_words() }
    }

    /// Calls `each` with the tokens of each line in order, to be read with [`Shard::tokens`].
    ///
    /// # Errors
    /// Data, if the file was cut or cannot be read.
    pub fn for_each_line(&self, mut each: impl FnMut(Range<usize>)) -> Result<()> {
        let offsets = self.offsets();
        let mut start = 0;
        // The first is where the first line starts.
        self.for_each_piece(offsets.start + 8..offsets.end, |_, bytes| {
            for end in bytes.chunks_exact(8).map(|bytes| u64_at(bytes, 0) as usize) {
                each(start..end);
                start = end;
            }
            Ok(())
        })
    }

    /// Appends the ids of a range of tokens to `out`; panics if the range is not within
    /// [`Shard::n_tokens`], as slicing would.
    ///
    /// # Errors
    /// As [`Shard::for_each_line`].
    pub fn tokens(&self, range: Range<usize>, out: &mut Vec<i64>) -> Result<()> {
        assert!(range.end <= self.n_tokens, "tokens {range:?} of {}", self.n_tokens);
        let mut bytes = vec![0; range.len() * self.width];
        self.read(HEADER + range.start * self.width, &mut bytes)?;
        out.extend(bytes.chunks_exact(self.width).map(|id| i64::from(self.id(id))));
        Ok(())
    }

    /// The id at the start of some bytes.
    fn id(&self, bytes: &[u8]) -> u32 {
        match self.width {
            2 => u16_at(bytes, 0).into(),
            _ => u32_at(bytes, 0),
        }
    }

    fn bytes32(&self, place: Range<usize>) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(&self.header[place]);
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
