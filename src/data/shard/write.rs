//! Writes one shard as a stream.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{checksum, file_size, token_width, Counts, CHECKSUM, HEADER, MAGIC, TOKENIZER_DIGEST, VERSION};
use crate::error::{Error, Result};
use crate::files::sibling;

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
        let temporary = sibling(path, ".tmp");
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

    /// Appends a token to the line that was written last, such as the one that ends a document.
    ///
    /// # Errors
    /// As [`ShardWriter::write_line`].
    pub(super) fn lengthen_line(&mut self, id: u32) -> Result<()> {
        // The line's end moves: the token is written as a line of its own, whose start is then forgotten.
        self.write_line(&[id], 0)?;
        let start = self.offsets.len() - 2;
        self.offsets.remove(start);
        Ok(())
    }

    /// The size of the file if it were finished with another line of so many tokens.
    pub(super) fn size_with_line(&self, tokens: usize) -> u64 {
        let lines = self.offsets.len() as u64;
        file_size(self.n_tokens() + tokens as u64, lines, token_width(self.vocab_size)).unwrap_or(u64::MAX)
    }

    /// Lines so far.
    pub(super) fn n_lines(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Completes the shard: padding, line offsets, header, sync, rename. Returns what it holds, and its checksum.
    ///
    /// # Errors
    /// Storage if the file cannot be written.
    pub fn finish(mut self) -> Result<(Counts, [u8; 32])> {
        let counts = Counts { tokens: self.n_tokens(), lines: self.n_lines() as u64, words: self.words };
        let width = token_width(self.vocab_size);
        let ids = counts.tokens * width as u64;
        let padding = vec![0; (ids.next_multiple_of(8) - ids) as usize];
        self.payload.update(&padding);
        self.put(&padding)?;
        // Piece by piece: as bytes, all of them would take as much memory once more.
        for offsets in std::mem::take(&mut self.offsets).chunks(1 << 16) {
            let bytes: Vec<u8> = offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
            self.payload.update(&bytes);
            self.put(&bytes)?;
        }

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
        Ok((counts, sum))
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
