//! Short words met before, and their ids.

use crate::host::prefetch;

/// A word of up to 15 bytes: padded with zeros, and its length in the last byte.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Key {
    low: u64,
    high: u64,
}

/// Where the length begins in `high`, and above it, in a table, the number of ids.
const LENGTH_BIT: u32 = 56;
const COUNT_BIT: u32 = 60;

impl Key {
    /// The word of a text that starts and ends there, if it is short; else a key that no word has.
    #[inline]
    pub(super) fn new(text: &[u8], start: usize, end: usize) -> Self {
        let length = end - start;
        let Some(&[low_mask, high_mask]) = MASKS.get(length) else {
            return Self { low: 1, high: 0 };
        };
        let bytes = match text.get(start..).and_then(|rest| rest.first_chunk::<16>()) {
            Some(bytes) => *bytes,
            None => {
                let mut bytes = [0; 16];
                bytes[..length].copy_from_slice(&text[start..end]);
                bytes
            }
        };
        let bytes = u128::from_le_bytes(bytes);
        let low = bytes as u64 & low_mask;
        let high = (bytes >> 64) as u64 & high_mask | (length as u64) << LENGTH_BIT;
        Self { low, high }
    }

    /// Whether it stands for a short word.
    pub(super) fn is_short(self) -> bool {
        self.high != 0
    }

    #[inline]
    fn hash(self) -> usize {
        let product = u128::from(self.low ^ 0x9e37_79b9_7f4a_7c15) * u128::from(self.high ^ 0xd6e8_feb8_6659_fd93);
        (product as u64 ^ (product >> 64) as u64) as usize
    }
}

/// The bits of a word of each length.
const MASKS: [[u64; 2]; 16] = {
    let mut masks = [[0; 2]; 16];
    let mut length = 1;
    while length < 16 {
        let mask = u128::MAX >> (128 - 8 * length);
        masks[length] = [mask as u64, (mask >> 64) as u64];
        length += 1;
    }
    masks
};

/// Most words are few tokens; longer ones are merged each time.
const FEW: usize = 4;

/// In place of the number of ids: two that are together in 32 bits.
const TWO_SMALL: u64 = 15;

/// The words that hash to the same place: those that came first, which are likely to be frequent ones, and the last.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Bucket {
    keys: [Key; WAYS],
    /// The id of a word of one token; both ids of a word of two, if they are below 2^16: the first in the upper half.
    ids: [u32; WAYS],
}

/// As many as there is room for in a line of the processor's cache.
const WAYS: usize = 3;
const BUCKETS: usize = 1 << 15;

/// Short words met before and their ids, in a table that never grows.
pub(super) struct Cache {
    buckets: Box<[Bucket; BUCKETS]>,
    /// The ids of words of more tokens, or larger ones. Memory is taken where there are such words only.
    several: Vec<[u32; FEW]>,
}

impl Cache {
    pub(super) fn new() -> Self {
        let buckets = vec![Bucket::default(); BUCKETS].into_boxed_slice();
        let buckets = buckets.try_into().unwrap_or_else(|_| unreachable!("the slice has as many"));
        Self { buckets, several: vec![[0; FEW]; BUCKETS * WAYS] }
    }

    /// Where a word is, or belongs: there, or next to it. That is fetched, so that it is at hand a little later.
    #[inline]
    pub(super) fn place(&self, key: Key) -> usize {
        let at = key.hash() % BUCKETS;
        prefetch(&self.buckets[at]);
        at
    }

    /// Appends the ids of a word; false if it is not known.
    #[inline]
    pub(super) fn append(&self, key: Key, place: usize, ids: &mut Vec<u32>) -> bool {
        let Some((at, way)) = self.find(key, place).or_else(|| self.find(key, place ^ 1)) else {
            return false;
        };
        let Bucket { keys, ids: found } = &self.buckets[at];
        match keys[way].high >> COUNT_BIT {
            1 => ids.push(found[way]),
            TWO_SMALL => ids.extend_from_slice(&[found[way] >> 16, found[way] & 0xffff]),
            count => {
                ids.extend_from_slice(&self.several[at * WAYS + way]);
                ids.truncate(ids.len() - FEW + count as usize);
            }
        }
        true
    }

    /// Finds a word in a bucket.
    #[inline]
    fn find(&self, key: Key, at: usize) -> Option<(usize, usize)> {
        let at = at % BUCKETS;
        // The number of ids, above the length, does not matter.
        let is = |way: usize| {
            let found = self.buckets[at].keys[way];
            (found.low ^ key.low) | (found.high ^ key.high) << (64 - COUNT_BIT) == 0
        };
        // Without a branch, since no one could predict it.
        let way = usize::from(!is(0)) * (1 + usize::from(!is(1)));
        is(way).then_some((at, way))
    }

    /// Notes the ids of a word, if they are few.
    pub(super) fn store(&mut self, key: Key, place: usize, ids: &[u32]) {
        let free = |at: usize| Some((at, self.buckets[at].keys.iter().position(|key| *key == Key::default())?));
        let (at, way) = free(place).or_else(|| free(place ^ 1)).unwrap_or((place, WAYS - 1));
        let mut count = ids.len() as u64;
        match *ids {
            [id] => self.buckets[at].ids[way] = id,
            [first @ 0..=0xffff, second @ 0..=0xffff] => {
                self.buckets[at].ids[way] = first << 16 | second;
                count = TWO_SMALL;
            }
            _ => match self.several[at * WAYS + way].get_mut(..ids.len()) {
                Some(room) => room.copy_from_slice(ids),
                None => return,
            },
        }
        self.buckets[at].keys[way] = Key { low: key.low, high: key.high | count << COUNT_BIT };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(word: &str) -> Key {
        // With text around it, and at the end of one.
        let text = format!("<{word}>{}", "#".repeat(word.len()));
        let (start, end) = (1, 1 + word.len());
        let alone = Key::new(word.as_bytes(), 0, word.len());
        assert!(alone.is_short() && alone == Key::new(text.as_bytes(), start, end));
        alone
    }

    #[test]
    fn a_cache_gives_the_ids_of_the_word_itself_or_none() {
        let mut cache = Cache::new();
        // More words than there is room for, some of which differ in zeros at their end or in the last byte only.
        let words: Vec<String> = (0..200_000_u32)
            .map(|number| format!("{number:x}{}", ["", "\0", "\0\0", "-------"][number as usize % 4]))
            .collect();
        // Two are below 2^16 now and then, both or one of them.
        let ids = |at: usize| (0..1 + at % (FEW + 1)).map(|n| at as u32 + 3 * n as u32).collect::<Vec<_>>();
        let mut found = Vec::new();
        for (at, word) in words.iter().enumerate() {
            assert!(!cache.append(key(word), cache.place(key(word)), &mut found), "{word}");
            cache.store(key(word), cache.place(key(word)), &ids(at));
        }
        assert!(found.is_empty());
        let mut known = 0;
        for (at, word) in words.iter().enumerate() {
            found.clear();
            if cache.append(key(word), cache.place(key(word)), &mut found) {
                assert_eq!(found, ids(at));
                known += 1;
            }
        }
        assert!((2 * BUCKETS..=WAYS * BUCKETS).contains(&known), "{known}");
        let long = Key::new(b"sixteen letters.", 0, 16);
        assert!(!long.is_short() && !cache.append(long, cache.place(long), &mut found));
    }
}
