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
use std::ops::Range;

use sha2::{Digest, Sha256};

mod many;
mod read;
mod write;

pub use many::{Entry, Shards, ShardsWriter};
pub use read::Shard;
pub use write::ShardWriter;

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

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
