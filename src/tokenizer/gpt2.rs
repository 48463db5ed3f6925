//! GPT-2's vocabulary, from the ranks that come with the crate tiktoken-rs.

use super::encode::Encoder;
use super::{byte_alphabet, Tokenizer, END_OF_TEXT};
use crate::error::{Error, Result};

/// The ids below this are bytes and merges; it is END_OF_TEXT's.
const END_OF_TEXT_ID: u32 = 50_256;

/// Builds the tokenizer. tiktoken lists tokens only; a merge's parts are what the merges before it
/// leave of its token.
pub(super) fn load() -> Result<Tokenizer> {
    let defect = |what: &str| Error::Data(format!("the built-in GPT-2 vocabulary is damaged: {what}"));
    let ranks = tiktoken_rs::r50k_base().map_err(|reason| defect(&reason.to_string()))?;
    let mut tokens = (0..END_OF_TEXT_ID)
        .map(|id| ranks.decode_bytes(&[id]).map_err(|_| defect(&format!("no token {id}"))))
        .collect::<std::result::Result<Vec<_>, _>>()?;

    let mut bytes = [0; 256];
    for (id, (byte, _)) in (0..).zip(byte_alphabet()) {
        bytes[usize::from(byte)] = id;
    }
    let mut earlier = Encoder::new(bytes);
    let mut merges = Vec::with_capacity(tokens.len() - bytes.len());
    let mut parts = Vec::new();
    for (id, token) in (0..).zip(&tokens).skip(bytes.len()) {
        parts.clear();
        earlier.encode_word(token, &mut parts);
        let [left, right] = parts[..] else {
            return Err(defect(&format!("token {id} is not a merge of two")).into());
        };
        merges.push((left, right));
        earlier.add_merge((left, right), id);
    }
    tokens.push(END_OF_TEXT.into());
    Tokenizer::new(tokens, merges, END_OF_TEXT_ID)
}
