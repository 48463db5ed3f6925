//! Opens one shard, checks it, and reads from it.

use std::fmt::Display;
use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{
    checksum, file_size, token_width, u16_at, u32_at, u64_at, Counts, CHECKSUM, HEADER, MAGIC, RESERVED,
    TOKENIZER_DIGEST, VERSION,
};
use crate::error::{Error, Result};
use crate::files::hex;

/// Bytes read at a time where a range is read through: a multiple of every number's size.
const PIECE: usize = 1 << 16;

/// One split's token ids, checked; `Send` and `Sync`, so threads may share it.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    file: File,
    /// The file as it was when it was opened.
    identity: Identity,
    header: [u8; HEADER],
    /// Bytes of the file.
    size: usize,
    width: usize,
    n_tokens: usize,
    n_lines: usize,
    vocab_size: u32,
}

/// What changes with a file's content, as far as the system says it without reading the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl From<&Metadata> for Identity {
    fn from(file: &Metadata) -> Self {
        Self { device: file.dev(), inode: file.ino(), size: file.len(), modified: (file.mtime(), file.mtime_nsec()) }
    }
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
        let shard = Self::open_unverified(path)?;
        shard.verify()?;
        Ok(shard)
    }

    /// Opens the shard at `path` and checks its header and its size. [`Shard::verify`] checks the rest, here or in another
    /// process that has opened the same file ([`Shard::identity`]).
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub fn open_unverified(path: &Path) -> Result<Self> {
        let missing = |e| Error::read(path, format!("{e}; run `lockstep prepare` to make it"));
        let file = File::open(path).map_err(missing)?;
        let identity = Identity::from(&file.metadata().map_err(|e| Error::read(path, e))?);
        let size = identity.size;
        if size < HEADER as u64 {
            let (expected, found) = (format!("{HEADER} bytes or more"), format!("{size} in all"));
            return Err(damaged(path, "header", 0, expected, found));
        }
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).map_err(|e| Error::read(path, e))?;
        Self::from_header(path, file, header, identity)
    }

    fn from_header(path: &Path, file: File, header: [u8; HEADER], identity: Identity) -> Result<Self> {
        let size = identity.size;
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
        Ok(Self { path: path.to_owned(), file, identity, header, size, width, n_tokens, n_lines, vocab_size })
    }

    /// Checks every byte: the checksum, and, since whoever can write a file can write its checksum, the line offsets and ids
    /// that later code relies on.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub fn verify(&self) -> Result<()> {
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
        })?;
        self.check_unchanged()
    }

    /// Names the file and its content among those of this machine, without a look at the content.
    pub fn identity(&self) -> String {
        format!("{:?} {}", self.identity, hex(&self.digest()))
    }

    /// Checks that the file is as it was when it was opened, as far as the system knows: one call, no reading. To be asked
    /// after reading, before what was read is used.
    ///
    /// # Errors
    /// Data, naming the file.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|e| Error::read(&self.path, e))?;
        match now.len() {
            size if size < self.identity.size => Err(self.cut(size)),
            _ if Identity::from(&now) != self.identity => Err(Error::Data(format!(
                "{}: expected the file as it was when it was opened, found it written to: the file was changed while it was \
                 in use; run `lockstep prepare` again",
                self.path.display()
            ))
            .into()),
            _ => Ok(()),
        }
    }

    fn cut(&self, now: u64) -> anyhow::Error {
        Error::Data(format!(
            "{}: expected {} bytes, as when it was opened, found {now}: the file was cut while it was in use; run \
             `lockstep prepare` again",
            self.path.display(),
            self.size
        ))
        .into()
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
        self.file.read_exact_at(bytes, at as u64).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => self.cut(self.file.metadata().map_or(0, |file| file.len())),
            _ => Error::read(&self.path, e),
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
