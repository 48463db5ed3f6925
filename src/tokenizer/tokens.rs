//! The bytes of each token.

use super::Pair;

/// The bytes of each token, by id: all in one place, since there are many and they are short.
#[derive(Default)]
pub(super) struct Tokens {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
}

impl Tokens {
    pub(super) fn push(&mut self, token: &[u8]) {
        self.bytes.extend_from_slice(token);
        self.ends.push(self.bytes.len());
    }

    /// Adds the token that two others become.
    pub(super) fn push_merged(&mut self, (left, right): Pair) {
        for part in [left, right] {
            let range = self.range(part as usize);
            self.bytes.extend_from_within(range);
        }
        self.ends.push(self.bytes.len());
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// A token's bytes; None if there is no such id.
    pub(super) fn get(&self, id: u32) -> Option<&[u8]> {
        ((id as usize) < self.len()).then(|| &self[id])
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|id| &self.bytes[self.range(id)])
    }

    fn range(&self, id: usize) -> std::ops::Range<usize> {
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        start..self.ends[id]
    }
}

impl std::ops::Index<u32> for Tokens {
    type Output = [u8];

    fn index(&self, id: u32) -> &[u8] {
        &self.bytes[self.range(id as usize)]
    }
}
