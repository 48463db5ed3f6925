//! Turns words into token ids by merging pairs in the order in which they were learnt.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use super::pretokenize::words;
use super::Pair;

/// The merges of a vocabulary, ready to be applied.
pub(super) struct Encoder {
    /// The id of each byte.
    bytes: [u32; 256],
    /// When each pair is merged: the lower, the earlier.
    ranks: FxHashMap<Pair, u32>,
    /// The token that the pair of each rank becomes.
    merged: Vec<u32>,
}

/// No pair here that merges.
const NEVER: u32 = u32::MAX;

/// Words of more bytes than this are merged through a heap: n log n steps, while scanning takes n².
const SCANNED: usize = 48;

impl Encoder {
    /// An encoder that knows single bytes only.
    pub(super) fn new(bytes: [u32; 256]) -> Self {
        Self { bytes, ranks: FxHashMap::default(), merged: Vec::new() }
    }

    /// Adds the next merge; false if that pair is already one.
    pub(super) fn add_merge(&mut self, pair: Pair, id: u32) -> bool {
        let rank = self.merged.len() as u32;
        self.merged.push(id);
        self.ranks.insert(pair, rank).is_none()
    }

    /// Appends the ids of a text by itself (one line).
    pub(super) fn encode(&self, text: &str, cache: &mut Cache, ids: &mut Vec<u32>) {
        for word in words(text) {
            let word = word.as_bytes();
            if let [byte] = *word {
                ids.push(self.bytes[usize::from(byte)]);
            } else if let Some(key) = Key::new(word) {
                let slot = cache.slot(key);
                if slot.key != key {
                    let start = ids.len();
                    self.encode_word(word, ids);
                    slot.store(key, &ids[start..]);
                } else {
                    ids.extend_from_slice(slot.ids());
                }
            } else {
                self.encode_word(word, ids);
            }
        }
    }

    /// Appends the ids of one word.
    pub(super) fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) {
        let start = ids.len();
        ids.extend(word.iter().map(|&byte| self.bytes[usize::from(byte)]));
        if word.len() <= SCANNED {
            let length = self.merge_scanning(&mut ids[start..]);
            ids.truncate(start + length);
        } else {
            self.merge_long(ids, start);
        }
    }

    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.get(&(left, right)).copied().unwrap_or(NEVER)
    }

    /// Merges a word in place, the lowest rank first and from the left; returns how many tokens are
    /// left.
    fn merge_scanning(&self, tokens: &mut [u32]) -> usize {
        let mut length = tokens.len();
        // The rank of the pair that starts at each token.
        let mut ranks = [NEVER; SCANNED];
        for (rank, pair) in ranks.iter_mut().zip(tokens.windows(2)) {
            *rank = self.rank(pair[0], pair[1]);
        }
        loop {
            let lowest = ranks[..length].iter().enumerate().min_by_key(|(_, &rank)| rank);
            let Some((at, &rank)) = lowest.filter(|(_, &rank)| rank != NEVER) else {
                return length;
            };
            tokens[at] = self.merged[rank as usize];
            tokens.copy_within(at + 2..length, at + 1);
            ranks.copy_within(at + 2..length, at + 1);
            length -= 1;
            ranks[length] = NEVER;
            ranks[at] = if at + 1 < length { self.rank(tokens[at], tokens[at + 1]) } else { NEVER };
            if at > 0 {
                ranks[at - 1] = self.rank(tokens[at - 1], tokens[at]);
            }
        }
    }

    /// The same for a word of any length, which is `ids` from `start` on: a linked list of tokens,
    /// and a heap of the pairs in it.
    fn merge_long(&self, ids: &mut Vec<u32>, start: usize) {
        let end = ids.len() - start;
        let mut tokens = ids.split_off(start);
        let mut next: Vec<usize> = (1..=end).collect();
        let mut previous: Vec<usize> = (0..end).map(|at| at.wrapping_sub(1)).collect();
        let mut ranks: Vec<u32> = tokens.windows(2).map(|pair| self.rank(pair[0], pair[1])).collect();
        ranks.push(NEVER);
        let mut queue: BinaryHeap<Reverse<(u32, usize)>> =
            (0..end).filter(|&at| ranks[at] != NEVER).map(|at| Reverse((ranks[at], at))).collect();

        while let Some(Reverse((rank, at))) = queue.pop() {
            // A merge next to it may have made another pair of this one since.
            if ranks[at] != rank {
                continue;
            }
            let gone = next[at];
            tokens[at] = self.merged[rank as usize];
            ranks[gone] = NEVER;
            next[at] = next[gone];
            if next[at] < end {
                previous[next[at]] = at;
            }
            for left in [previous[at], at].into_iter().filter(|&left| left < end) {
                let right = next[left];
                ranks[left] = if right < end { self.rank(tokens[left], tokens[right]) } else { NEVER };
                if ranks[left] != NEVER {
                    queue.push(Reverse((ranks[left], left)));
                }
            }
        }
        let mut at = 0;
        while at < end {
            ids.push(tokens[at]);
            at = next[at];
        }
    }
}

/// Short words met before and their ids. A word has one slot, which the last one to be hashed there
/// holds, so the cache never grows.
pub(super) struct Cache {
    slots: Vec<Slot>,
}

/// A word of up to 15 bytes, padded with zeros, and its length.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Key([u8; 16]);

impl Key {
    fn new(word: &[u8]) -> Option<Self> {
        let mut key = [0; 16];
        key[..15].get_mut(..word.len())?.copy_from_slice(word);
        key[15] = word.len() as u8;
        Some(Self(key))
    }

    fn hash(self) -> usize {
        let bits = u128::from_le_bytes(self.0);
        let folded = (bits as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (bits >> 64) as u64;
        (folded.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32) as usize
    }
}

/// Most words are few tokens; longer ones are merged each time.
const SLOT_IDS: usize = 4;

#[derive(Clone, Copy, Default)]
struct Slot {
    key: Key,
    ids: [u32; SLOT_IDS],
    length: u8,
}

impl Slot {
    fn store(&mut self, key: Key, ids: &[u32]) {
        if let Some(room) = self.ids.get_mut(..ids.len()) {
            room.copy_from_slice(ids);
            self.key = key;
            self.length = ids.len() as u8;
        }
    }

    fn ids(&self) -> &[u32] {
        &self.ids[..usize::from(self.length)]
    }
}

impl Cache {
    /// A cache fit for a text of so many bytes.
    pub(super) fn for_text(bytes: usize) -> Self {
        let slots = (bytes / 8).next_power_of_two().clamp(1 << 6, 1 << 16);
        Self { slots: vec![Slot::default(); slots] }
    }

    fn slot(&mut self, key: Key) -> &mut Slot {
        let at = key.hash() & (self.slots.len() - 1);
        &mut self.slots[at]
    }
}
