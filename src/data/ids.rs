//! Token ids that other trainers' scripts have made: nanoGPT's `.bin`, which is nothing but ids, and llm.c's, which has a
//! header. Both hold GPT-2's ids, 2 bytes each, little endian, with an end of text between documents.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use indicatif::ProgressBar;

use super::shard;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// llm.c's header: 256 numbers of 4 bytes, of which the first three are the magic number, the version, and how many ids follow.
const HEADER: usize = 1024;
const MAGIC: u32 = 20_240_520;
const VERSION: u32 = 1;
/// The magic number of llm.c's files for Llama 3, whose ids have 4 bytes.
const LLAMA: u32 = 20_240_801;
/// Ids that are read at a time.
const PIECE: usize = 1 << 20;

/// Calls `each` with pieces of the ids in a file, and whether the document ends with the piece: after each end of text, which
/// is part of the piece.
///
/// # Errors
/// Those of `each`; data, naming the place, if the file is not such a one, or holds an id that the tokenizer does not have.
pub fn for_each_piece(
    path: &Path,
    tokenizer: &Tokenizer,
    bar: &ProgressBar,
    mut each: impl FnMut(&[u32], bool) -> Result<()>,
) -> Result<()> {
    let unreadable = |e| Error::read(path, e);
    let file = File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    let mut start = vec![0; size.min(HEADER as u64) as usize];
    file.read_exact_at(&mut start, 0).map_err(unreadable)?;
    let header = header_of(path, &start, size)?;

    let mut place = header;
    let mut ids = Vec::with_capacity(PIECE);
    let mut bytes = vec![0; 2 * PIECE];
    while place < size {
        let wanted = (bytes.len() as u64).min(size - place) as usize;
        file.read_exact_at(&mut bytes[..wanted], place).map_err(unreadable)?;
        ids.clear();
        ids.extend(bytes[..wanted].chunks_exact(2).map(|id| u32::from(u16::from_le_bytes([id[0], id[1]]))));
        if let Some(at) = ids.iter().position(|&id| id as usize >= tokenizer.vocab_size()) {
            return Err(Error::Data(format!(
                "{}: expected ids below {}, the tokenizer's vocabulary, found {} at byte offset {}; was the file made with \
                 another tokenizer, or for another program?",
                path.display(),
                tokenizer.vocab_size(),
                ids[at],
                place + 2 * at as u64
            ))
            .into());
        }
        place += wanted as u64;
        bar.inc(wanted as u64);
        for piece in ids.split_inclusive(|&id| id == tokenizer.end_of_text()) {
            each(piece, piece.last() == Some(&tokenizer.end_of_text()))?;
        }
    }
    Ok(())
}

/// Bytes of the header, 0 if there is none.
fn header_of(path: &Path, start: &[u8], size: u64) -> Result<u64> {
    let wrong = |expected: &str, found: String| -> Result<u64> {
        Err(Error::Data(format!("{}: expected {expected}, found {found}", path.display())).into())
    };
    let number = |at: usize| start.get(4 * at..4 * at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let ids = "GPT-2's ids of 2 bytes each, as nanoGPT or llm.c writes them";
    match number(0) {
        _ if start.starts_with(shard::MAGIC) => {
            wrong(ids, "a file of a data folder, which `lockstep prepare` has made already".into())
        }
        Some(LLAMA) => wrong(ids, "llm.c's ids for Llama 3, of 4 bytes each".into()),
        Some(MAGIC) => match (number(1), number(2)) {
            (Some(VERSION), Some(count)) if size == HEADER as u64 + 2 * u64::from(count) => Ok(HEADER as u64),
            (Some(VERSION), Some(count)) => {
                let expected =
                    format!("a file of {} bytes, for the {count} ids of its header", 2 * u64::from(count) + 1024);
                wrong(&expected, format!("{size} bytes; make the file again"))
            }
            (version, _) => wrong("version 1 of llm.c's files", version.unwrap_or(0).to_string()),
        },
        _ if size % 2 == 1 => wrong(ids, format!("an odd number of bytes, {size}")),
        _ => Ok(0),
    }
}
