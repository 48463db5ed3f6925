//! GPT-2's vocabulary, from the ranks that come with the crate tiktoken-rs.

use super::{byte_alphabet, Tokenizer, Tokens, END_OF_TEXT};
use crate::error::Result;

/// The two tokens of each merge, as `build.rs` works them out.
const MERGES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gpt2.merges"));

/// Builds the tokenizer: bytes, merges, and [`END_OF_TEXT`] at the end.
pub(super) fn load() -> Result<Tokenizer> {
    let mut tokens = Tokens::default();
    for (byte, _) in byte_alphabet() {
        tokens.push(&[byte]);
    }
    let mut merges = Vec::with_capacity(MERGES.len() / 4);
    for &[a, b, c, d] in MERGES.as_chunks().0 {
        let pair = (u16::from_le_bytes([a, b]).into(), u16::from_le_bytes([c, d]).into());
        tokens.push_merged(pair);
        merges.push(pair);
    }
    tokens.push(END_OF_TEXT.as_bytes());
    let end_of_text = tokens.len() as u32 - 1;
    Tokenizer::new(tokens, merges, end_of_text)
}
