//! The key-value cache: what attention needs to know of the tokens before.

use tch::Tensor;

/// Keys and values of the tokens seen so far, per layer (B, H, past, D) each. Made by
/// [`Gpt::cache`](super::Gpt::cache), filled by [`Gpt::hidden`](super::Gpt::hidden).
pub struct Cache {
    pub(super) layers: Vec<(Tensor, Tensor)>,
}

impl Cache {
    /// Tokens seen so far.
    pub fn len(&self) -> i64 {
        self.layers.first().map_or(0, |(keys, _)| keys.size()[2])
    }

    /// Whether no token was seen yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
