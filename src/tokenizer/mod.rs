//! Text to token ids and back: byte-level byte-pair encoding (BPE), from scratch.
//!
//! A text is cut into lines, each with its newline; a line into words (`pretokenize`); a word's
//! bytes are tokens, and learnt pairs of neighbouring tokens are merged, in the order in which they
//! were learnt (`encode`). A vocabulary is learnt here ([`train()`]), read from a `tokenizer.json`
//! ([`Tokenizer::from_file`]), or GPT-2's.

mod cache;
mod encode;
mod gpt2;
mod json;
mod pretokenize;
mod tokens;
mod train;

use std::cell::LazyCell;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use rustc_hash::FxHashMap;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use cache::Cache;
use encode::Encoder;
use tokens::Tokens;
pub use train::{train, WordCounts};

/// The one special token: it ends a text and pads; no text is ever encoded to it.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Two neighbouring tokens.
type Pair = (u32, u32);

/// A vocabulary and its merges: encodes text, decodes ids.
pub struct Tokenizer {
    tokens: Tokens,
    /// The pairs that merge, earliest first.
    merges: Vec<Pair>,
    end_of_text: u32,
    encoder: Encoder,
    kept: Mutex<Kept>,
}

/// What one call has used, for the next: a page of memory that the system gives anew takes longer to get than to fill.
#[derive(Default)]
struct Kept {
    /// Words that were met; as many as have encoded at a time.
    caches: Vec<Cache>,
    pieces: Vec<Piece>,
}

impl Tokenizer {
    /// Checks that tokens and merges fit together. The token of a merge is the one with both parts'
    /// bytes.
    fn new(tokens: Tokens, merges: Vec<Pair>, end_of_text: u32) -> Result<Self> {
        let mut bytes = [None; 256];
        for (id, token) in (0..).zip(tokens.iter()).filter(|(id, _)| *id != end_of_text) {
            if let [byte] = *token {
                bytes[usize::from(byte)] = Some(id);
            }
        }
        if let Some(byte) = bytes.iter().position(Option::is_none) {
            let message = format!("the vocabulary lacks byte {byte:#04x}; expected a token for each of the 256 bytes");
            return Err(Error::Data(message).into());
        }
        let ids = LazyCell::new(|| -> FxHashMap<&[u8], u32> {
            let ordinary = (0..).zip(tokens.iter()).filter(|(id, _)| *id != end_of_text);
            ordinary.map(|(id, token)| (token, id)).collect()
        });
        let mut made = Vec::with_capacity(merges.len());
        // Nearly always, a merge's token is the one after the last merge's: it is looked for there first.
        let mut next = 256 + u32::from(end_of_text <= 256);
        let mut both = Vec::new();
        let defect = |rank: usize, what| {
            let (left, right) = merges[rank];
            Error::Data(format!("merge {rank}, of tokens {left} and {right}, {what}"))
        };
        for (rank, &(left, right)) in merges.iter().enumerate() {
            both.clear();
            both.extend_from_slice(&tokens[left]);
            both.extend_from_slice(&tokens[right]);
            let id = match tokens.get(next) {
                Some(token) if token == both && next != end_of_text => next,
                _ => {
                    *ids.get(&both[..]).ok_or_else(|| defect(rank, "makes no token of the vocabulary; expected one"))?
                }
            };
            if left == end_of_text || right == end_of_text {
                return Err(defect(rank, "has the special token; expected others").into());
            }
            made.push(id);
            next = id + 1;
        }
        let bytes = bytes.map(Option::unwrap_or_default);
        let encoder = Encoder::new(bytes, &merges, made)
            .map_err(|rank| defect(rank, "is in it twice; expected each pair once"))?;
        Ok(Self { tokens, merges, end_of_text, encoder, kept: Mutex::default() })
    }

    /// GPT-2's vocabulary: 50,257 tokens, [`END_OF_TEXT`] the last.
    ///
    /// # Errors
    /// None that a user can cause: the vocabulary is part of the program.
    pub fn gpt2() -> Result<Self> {
        gpt2::load()
    }

    /// Reads a `tokenizer.json` in Hugging Face's format, written by [`Self::save`] or by Hugging
    /// Face `tokenizers`.
    ///
    /// # Errors
    /// Data if the file cannot be read, is malformed, or asks for something other than
    /// byte-level BPE as GPT-2 does it.
    pub fn from_file(path: &Path) -> Result<Self> {
        json::read(path).map_err(|reason| Error::read(path, reason))
    }

    /// Reads the older pair of files of a GPT-2's tokenizer: tokens and their ids, and a merge in each line.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_vocab_and_merges(vocab: &Path, merges: &Path) -> Result<Self> {
        json::read_pair(vocab, merges)
    }

    /// Writes a `tokenizer.json` that Hugging Face `tokenizers` loads.
    ///
    /// # Errors
    /// Storage if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.to_json()).map_err(|reason| Error::write(path, reason))
    }

    /// The content of [`Self::save`]'s file.
    pub fn to_json(&self) -> String {
        json::write(self)
    }

    /// How many ids there are, [`END_OF_TEXT`]'s included; an id is less than this.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The id of [`END_OF_TEXT`].
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// SHA-256 of [`Self::to_json`]: equal digests, equal tokenizers.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.to_json()).into()
    }

    /// The ids of a text of any number of lines. "<|endoftext|>" in it is text like any other.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_piece(text, Piece::default()).ids
    }

    /// The ids of each line of some texts, on all cores.
    pub fn encode_lines(&self, texts: &[&str]) -> Lines<'_> {
        // Cut first: within one text, rayon would not share the pieces out.
        let pieces: Vec<&str> = texts.iter().flat_map(|text| pieces(text)).collect();
        let encode = |piece: &&str| {
            let kept = self.kept().pieces.pop();
            self.encode_piece(piece, kept.unwrap_or_default())
        };
        Lines { pieces: pieces.par_iter().map(encode).collect(), tokenizer: self }
    }

    /// Fills an empty piece.
    fn encode_piece(&self, text: &str, mut piece: Piece) -> Piece {
        let kept = self.kept().caches.pop();
        let mut cache = kept.unwrap_or_else(Cache::new);
        // Rounded, so that memory that is kept suffices for the next piece, too.
        piece.ids.reserve((text.len() / 3).next_power_of_two());
        self.encoder.encode(text, &mut cache, &mut piece.ids, |end| piece.ends.push(end));
        self.kept().caches.push(cache);
        piece
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes that the ids stand for: UTF-8 if they come from [`Self::encode`], perhaps not
    /// if a model drew them. [`END_OF_TEXT`] appears as it is written.
    ///
    /// # Errors
    /// Data if an id is outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for (at, &id) in ids.iter().enumerate() {
            let token = self.tokens.get(id).ok_or_else(|| {
                Error::Data(format!(
                    "id {id} (number {at} of those to decode) is not in the vocabulary; expected 0 to {}: \
                     were the ids made with another tokenizer?",
                    self.tokens.len() - 1
                ))
            })?;
            bytes.extend_from_slice(token);
        }
        Ok(bytes)
    }
}

/// The ids of lines, in order.
pub struct Lines<'a> {
    pieces: Vec<Piece>,
    tokenizer: &'a Tokenizer,
}

impl Drop for Lines<'_> {
    fn drop(&mut self) {
        for piece in &mut self.pieces {
            piece.ids.clear();
            piece.ends.clear();
        }
        let mut kept = self.tokenizer.kept();
        let mut bytes: usize = kept.pieces.iter().map(Piece::bytes).sum();
        for piece in self.pieces.drain(..) {
            bytes += piece.bytes();
            if bytes > MOST_KEPT {
                break;
            }
            kept.pieces.push(piece);
        }
    }
}

/// The ids of a text, and how many there are up to the end of each of its lines.
#[derive(Default)]
struct Piece {
    ids: Vec<u32>,
    ends: Vec<usize>,
}

impl Piece {
    /// The memory that it has.
    fn bytes(&self) -> usize {
        size_of::<u32>() * self.ids.capacity() + size_of::<usize>() * self.ends.capacity()
    }
}

impl Lines<'_> {
    /// The ids of each line.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.pieces.iter().flat_map(|piece| {
            let starts = std::iter::once(&0).chain(&piece.ends);
            starts.zip(&piece.ends).map(|(&start, &end)| &piece.ids[start..end])
        })
    }
}

/// So many bytes for ids are kept from one call to the next: twice what `prepare` takes at a time needs.
const MOST_KEPT: usize = 64 << 20;

/// At most so many bytes of text, and the rest of a line, are encoded at a time by one core.
const PIECE: usize = 1 << 20;

/// A text, cut into pieces of whole lines for many cores.
fn pieces(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let bytes = text.as_bytes();
        let line = bytes.iter().skip(PIECE - 1).position(|&byte| byte == b'\n');
        let (piece, rest) = text.split_at(line.map_or(bytes.len(), |at| PIECE + at));
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// The 256 bytes in the order of vocabularies, each with the character that stands for it in a
/// `tokenizer.json`: itself if it prints, else one from U+0100 on, so that no token's name has a
/// space (GPT-2's `encoder.py`).
fn byte_alphabet() -> impl Iterator<Item = (u8, char)> {
    let prints = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let printing = (0..=255).filter(prints).map(|byte| (byte, char::from(byte)));
    let others = (0..=255).filter(move |byte| !prints(byte));
    printing.chain(others.zip('\u{100}'..))
}

#[cfg(test)]
mod tests {
    use super::{pieces, PIECE};

    #[test]
    fn a_text_is_cut_after_lines() {
        let line = "x".repeat(999) + "\n";
        let text = line.repeat(2 * PIECE / 1000 + 3) + &"y".repeat(PIECE) + "z\n end";
        let found: Vec<&str> = pieces(&text).collect();
        assert_eq!(found.concat(), text);
        assert!(found.len() == 4 && found.iter().take(3).all(|piece| piece.len() >= PIECE && piece.ends_with('\n')));
        assert_eq!(pieces("").count(), 0);
        assert_eq!(pieces("a\nb").collect::<Vec<_>>(), ["a\nb"]);
    }
}
