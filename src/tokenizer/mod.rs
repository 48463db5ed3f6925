//! Text to token ids and back: byte-level byte-pair encoding (BPE), from scratch.
//!
//! A text is cut into lines, each with its newline; a line into words (`pretokenize`); a word's
//! bytes are tokens, and learnt pairs of neighbouring tokens are merged, in the order in which they
//! were learnt (`encode`). A vocabulary is learnt here ([`train()`]), read from a `tokenizer.json`
//! ([`Tokenizer::from_file`]), or GPT-2's.

mod encode;
mod gpt2;
mod json;
mod pretokenize;
mod train;

use std::path::Path;

use rayon::prelude::*;
use rustc_hash::FxHashMap;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use encode::{Cache, Encoder};
pub use train::{train, WordCounts};

/// The one special token: it ends a text and pads; no text is ever encoded to it.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Two neighbouring tokens.
type Pair = (u32, u32);

/// A vocabulary and its merges: encodes text, decodes ids.
pub struct Tokenizer {
    /// The bytes of each token, by id.
    tokens: Vec<Vec<u8>>,
    /// The pairs that merge, earliest first.
    merges: Vec<Pair>,
    end_of_text: u32,
    encoder: Encoder,
}

impl Tokenizer {
    /// Checks that tokens and merges fit together. The token of a merge is the one with both parts'
    /// bytes.
    fn new(tokens: Vec<Vec<u8>>, merges: Vec<Pair>, end_of_text: u32) -> Result<Self> {
        let ids: FxHashMap<&[u8], u32> =
            (0..).zip(&tokens).filter(|(id, _)| *id != end_of_text).map(|(id, token)| (&token[..], id)).collect();
        let mut bytes = [0; 256];
        for (byte, id) in (0..=255).zip(&mut bytes) {
            *id = *ids.get(&[byte][..]).ok_or_else(|| {
                Error::Data(format!(
                    "the vocabulary lacks byte {byte:#04x}; expected a token for each of the 256 bytes"
                ))
            })?;
        }
        let mut encoder = Encoder::new(bytes);
        for (rank, &(left, right)) in merges.iter().enumerate() {
            let (a, b) = (&tokens[left as usize], &tokens[right as usize]);
            let defect = |what| Error::Data(format!("merge {rank}, of tokens {left} and {right}, {what}"));
            let token = [&a[..], b].concat();
            let id = ids.get(&token[..]).ok_or_else(|| defect("makes no token of the vocabulary; expected one"))?;
            if left == end_of_text || right == end_of_text {
                return Err(defect("has the special token; expected others").into());
            }
            if !encoder.add_merge((left, right), *id) {
                return Err(defect("is in it twice; expected each pair once").into());
            }
        }
        Ok(Self { tokens, merges, end_of_text, encoder })
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
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut cache = Cache::for_text(text.len());
        for line in text.split_inclusive('\n') {
            self.encoder.encode(line, &mut cache, &mut ids);
        }
        ids
    }

    /// The ids of each line, on all cores. Every line should carry its newline.
    pub fn encode_lines(&self, lines: &[&str]) -> Vec<Vec<u32>> {
        // Few enough chunks to fill their caches, enough of them that no core waits for another.
        let chunk = lines.len().div_ceil(4 * rayon::current_num_threads()).max(1);
        lines
            .par_chunks(chunk)
            .flat_map_iter(|lines| {
                let mut cache = Cache::for_text(lines.iter().map(|line| line.len()).sum());
                let mut ids = Vec::new();
                lines.iter().map(move |line| {
                    ids.clear();
                    self.encoder.encode(line, &mut cache, &mut ids);
                    ids.clone()
                })
            })
            .collect()
    }

    /// The bytes that the ids stand for: UTF-8 if they come from [`Self::encode`], perhaps not
    /// if a model drew them. [`END_OF_TEXT`] appears as it is written.
    ///
    /// # Errors
    /// Data if an id is outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for (at, &id) in ids.iter().enumerate() {
            let token = self.tokens.get(id as usize).ok_or_else(|| {
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

/// The 256 bytes in the order of vocabularies, each with the character that stands for it in a
/// `tokenizer.json`: itself if it prints, else one from U+0100 on, so that no token's name has a
/// space (GPT-2's `encoder.py`).
fn byte_alphabet() -> impl Iterator<Item = (u8, char)> {
    let prints = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let printing = (0..=255).filter(prints).map(|byte| (byte, char::from(byte)));
    let others = (0..=255).filter(move |byte| !prints(byte));
    printing.chain(others.zip('\u{100}'..))
}
