//! Turns words into token ids by merging pairs in the order in which they were learnt.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::cache::{Cache, Key, FEW};
use super::pretokenize::{Scanner, ROOM};
use super::Pair;

/// The merges of a vocabulary, ready to be applied.
pub(super) struct Encoder {
    /// The id of each byte.
    bytes: [u32; 256],
    merges: Merges,
    /// The same for two bytes, at 256 times the first plus the second: these are in all words.
    byte_ranks: Vec<u32>,
}

/// No pair here that merges.
const NEVER: u32 = u32::MAX;

/// Words of more bytes than this are merged through a heap: n log n steps, while scanning takes n².
const SCANNED: usize = 48;

impl Encoder {
    /// An encoder of the tokens of the bytes and those that the merges make.
    ///
    /// # Errors
    /// The rank of a merge that is there twice.
    pub(super) fn new(bytes: [u32; 256], merges: &[Pair], merged: Vec<u32>) -> Result<Self, usize> {
        let mut table = Merges::new(merges.len());
        for (rank, (&pair, becomes)) in merges.iter().zip(merged).enumerate() {
            if !table.insert(Merge { pair, becomes }) {
                return Err(rank);
            }
        }
        let byte_ranks = bytes.iter().flat_map(|&left| bytes.map(|right| table.rank((left, right)))).collect();
        Ok(Self { bytes, merges: table, byte_ranks })
    }

    /// Appends the ids of a text, and says how many ids there are at the end of each of its lines.
    pub(super) fn encode(&self, text: &str, cache: &mut Cache, ids: &mut Vec<u32>, mut ends: impl FnMut(usize)) {
        let bytes = text.as_bytes();
        // Words are cut first and looked up then, many at a time, so that memory fetches their places meanwhile.
        let (mut scanner, mut room) = (Scanner::new(text), [0; ROOM]);
        let mut words = [(Key::default(), 0); ROOM];
        // Ids on their way to `ids`: four are written for each word, and those that do not exist are written over.
        let (mut recent, mut count) = ([0; ROOM * FEW], 0);
        let mut start = 0;
        loop {
            let cut = scanner.next_words(&mut room);
            if cut.is_empty() {
                break;
            }
            let mut before = start;
            for (word, &end) in words.iter_mut().zip(cut) {
                let key = Key::new(bytes, before, end);
                *word = (key, cache.place(key));
                before = end;
            }
            for (&(key, place), &end) in words.iter().zip(cut) {
                let (few, number) = cache.few(key, place);
                if number > 0 {
                    recent[count..count + FEW].copy_from_slice(few);
                    count += number;
                } else {
                    ids.extend_from_slice(&recent[..count]);
                    count = 0;
                    self.append_word(key, place, &bytes[start..end], cache, ids);
                    // No word that ends a line is among the few.
                    if bytes[end - 1] == b'\n' {
                        ends(ids.len());
                    }
                }
                start = end;
            }
            ids.extend_from_slice(&recent[..count]);
            count = 0;
        }
        if !text.is_empty() && !text.ends_with('\n') {
            ends(ids.len());
        }
    }

    /// Appends the ids of a word that is not among the few: it ends a line, say, or is new.
    #[inline(never)]
    fn append_word(&self, key: Key, place: usize, word: &[u8], cache: &mut Cache, ids: &mut Vec<u32>) {
        if !cache.append(key, place, word, ids) {
            let before = ids.len();
            self.encode_word(word, ids);
            cache.store(key, place, word, &ids[before..]);
        }
    }

    /// Appends the ids of one word.
    #[inline(never)]
    pub(super) fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) {
        if word.len() <= SCANNED {
            self.merge_scanning(word, ids);
        } else {
            self.merge_long(word, ids);
        }
    }

    /// Merges a word, the lowest rank first and from the left.
    fn merge_scanning(&self, word: &[u8], ids: &mut Vec<u32>) {
        let length = word.len();
        let mut tokens = [0; SCANNED];
        // The tokens on either side of each; a token that has become part of the one before is skipped.
        let (mut next, mut previous) = ([0_u8; SCANNED], [0_u8; SCANNED]);
        // The rank of the pair that starts at each token.
        let mut ranks = [NEVER; SCANNED];
        for (at, byte) in word.iter().enumerate() {
            tokens[at] = self.bytes[usize::from(*byte)];
            next[at] = at as u8 + 1;
            previous[at] = (at as u8).wrapping_sub(1);
        }
        for (rank, pair) in ranks.iter_mut().zip(word.windows(2)) {
            *rank = self.byte_ranks[usize::from(pair[0]) << 8 | usize::from(pair[1])];
        }
        loop {
            let (mut lowest, mut at) = (NEVER, 0);
            for (here, &rank) in ranks[..length].iter().enumerate() {
                if rank < lowest {
                    (lowest, at) = (rank, here);
                }
            }
            if lowest == NEVER {
                break;
            }
            let gone = usize::from(next[at]);
            let after = usize::from(next[gone]);
            let token = self.merges.all[lowest as usize].becomes;
            tokens[at] = token;
            ranks[gone] = NEVER;
            next[at] = after as u8;
            let before = usize::from(previous[at]);
            // Both are looked up at the same time.
            let (left, right) = (tokens.get(before), tokens[..length].get(after));
            let (left, right) = (left.map(|&left| (left, token)), right.map(|&right| (token, right)));
            let [with_left, with_right] = self.merges.ranks([left.unwrap_or(NO_PAIR), right.unwrap_or(NO_PAIR)]);
            ranks[at] = with_right;
            if right.is_some() {
                previous[after] = at as u8;
            }
            if left.is_some() {
                ranks[before] = with_left;
            }
        }
        let mut at = 0;
        while at < length {
            ids.push(tokens[at]);
            at = usize::from(next[at]);
        }
    }

    /// The same for a word of any length: a linked list of tokens, and a heap of the pairs in it.
    fn merge_long(&self, word: &[u8], ids: &mut Vec<u32>) {
        let end = word.len();
        let mut tokens: Vec<u32> = word.iter().map(|&byte| self.bytes[usize::from(byte)]).collect();
        let mut next: Vec<usize> = (1..=end).collect();
        let mut previous: Vec<usize> = (0..end).map(|at| at.wrapping_sub(1)).collect();
        let mut ranks: Vec<u32> = tokens.windows(2).map(|pair| self.merges.rank((pair[0], pair[1]))).collect();
        ranks.push(NEVER);
        let mut queue: BinaryHeap<Reverse<(u32, usize)>> =
            (0..end).filter(|&at| ranks[at] != NEVER).map(|at| Reverse((ranks[at], at))).collect();

        while let Some(Reverse((rank, at))) = queue.pop() {
            // A merge next to it may have made another pair of this one since.
            if ranks[at] != rank {
                continue;
            }
            let gone = next[at];
            tokens[at] = self.merges.all[rank as usize].becomes;
            ranks[gone] = NEVER;
            next[at] = next[gone];
            if next[at] < end {
                previous[next[at]] = at;
            }
            for left in [previous[at], at].into_iter().filter(|&left| left < end) {
                let right = next[left];
                ranks[left] = if right < end { self.merges.rank((tokens[left], tokens[right])) } else { NEVER };
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

/// A pair of tokens, and the token that it becomes.
#[derive(Clone, Copy)]
struct Merge {
    pair: Pair,
    becomes: u32,
}

/// No pair: there are fewer tokens.
const NO_PAIR: Pair = (NEVER, NEVER);

/// The merges in the order in which they were learnt, and a hash table of open addresses that knows where each pair is.
/// More than half of it is empty, so that most pairs that do not merge are known after one look.
struct Merges {
    all: Vec<Merge>,
    /// A merge's rank in the lower bits, and in those above a part of its pair's hash.
    slots: Vec<u32>,
}

impl Merges {
    fn new(merges: usize) -> Self {
        Self { all: Vec::with_capacity(merges), slots: vec![NEVER; (2 * merges + 2).next_power_of_two()] }
    }

    /// Where the search for a pair begins, and what its slot holds above the rank.
    #[inline]
    fn hash(&self, (left, right): Pair) -> (usize, u32) {
        let bits = self.slots.len().trailing_zeros();
        let hash = (u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((hash >> (64 - bits)) as usize, (hash << bits >> 32) as u32 >> bits << bits)
    }

    #[inline]
    fn slot(&self, at: usize) -> u32 {
        self.slots[at & (self.slots.len() - 1)]
    }

    /// When pairs are merged: the lower, the earlier.
    #[inline]
    fn ranks<const N: usize>(&self, pairs: [Pair; N]) -> [u32; N] {
        let found = pairs.map(|pair| {
            let (at, above) = self.hash(pair);
            (pair, at, above, self.slot(at))
        });
        found.map(|(pair, mut at, above, mut slot)| {
            while slot != NEVER {
                let rank = slot ^ above;
                if self.all.get(rank as usize).is_some_and(|merge| merge.pair == pair) {
                    return rank;
                }
                at += 1;
                slot = self.slot(at);
            }
            NEVER
        })
    }

    fn rank(&self, pair: Pair) -> u32 {
        self.ranks([pair])[0]
    }

    /// Adds the merge after all others; false if its pair is there already.
    fn insert(&mut self, merge: Merge) -> bool {
        let (mut at, above) = self.hash(merge.pair);
        if self.rank(merge.pair) != NEVER {
            return false;
        }
        while self.slot(at) != NEVER {
            at += 1;
        }
        let mask = self.slots.len() - 1;
        self.slots[at & mask] = above | self.all.len() as u32;
        self.all.push(merge);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes, and merges of them and of each other: an encoder, and the merges with the tokens that they make.
    fn vocabulary(pairs: &[(u8, u8)]) -> (Encoder, Vec<(Pair, u32)>) {
        let mut merges: Vec<(Pair, u32)> = Vec::new();
        // Few tokens, so that they meet: the bytes a to d, and the tokens made so far.
        let token = |number: u8, made: usize| match usize::from(number) % (4 + made) {
            letter @ 0..4 => u32::from(b'a') + letter as u32,
            other => 256 + other as u32 - 4,
        };
        for &(left, right) in pairs {
            let pair = (token(left, merges.len()), token(right, merges.len()));
            if merges.iter().all(|(other, _)| *other != pair) {
                merges.push((pair, 256 + merges.len() as u32));
            }
        }
        let (pairs, ids): (Vec<_>, Vec<_>) = merges.iter().copied().unzip();
        let encoder = Encoder::new(std::array::from_fn(|byte| byte as u32), &pairs, ids);
        (encoder.unwrap_or_else(|rank| panic!("{rank}")), merges)
    }

    /// A pass over the word for each merge.
    fn encode_plainly(word: &[u8], merges: &[(Pair, u32)]) -> Vec<u32> {
        let mut tokens: Vec<u32> = word.iter().map(|&byte| byte.into()).collect();
        while let Some((pair, id)) =
            merges.iter().find(|(pair, _)| tokens.windows(2).any(|two| (two[0], two[1]) == *pair))
        {
            let at = tokens.windows(2).position(|two| (two[0], two[1]) == *pair).unwrap();
            tokens.splice(at..at + 2, [*id]);
        }
        tokens
    }

    proptest! {
        #[test]
        fn words_are_merged_as_by_a_pass_for_each_merge(
            pairs in prop::collection::vec(any::<(u8, u8)>(), 0..40),
            words in prop::collection::vec("[a-d]{1,60}|[ab]{1,9}|[a-e]{1,4}", 1..20),
        ) {
            let (encoder, merges) = vocabulary(&pairs);
            let expected: Vec<_> = words.iter().map(|word| encode_plainly(word.as_bytes(), &merges)).collect();
            for (word, expected) in words.iter().zip(&expected) {
                let (mut scanned, mut queued) = (Vec::new(), Vec::new());
                encoder.encode_word(word.as_bytes(), &mut scanned);
                encoder.merge_long(word.as_bytes(), &mut queued);
                prop_assert_eq!(&scanned, expected, "{}", word);
                prop_assert_eq!(&queued, expected, "{}", word);
            }
            // As lines, and again with the words in the cache.
            let mut cache = Cache::new();
            let texts = [words.join("\n"), words.join("\n") + "\n"];
            for text in texts.iter().chain(&texts) {
                let (mut ids, mut ends) = (Vec::new(), vec![0]);
                encoder.encode(text, &mut cache, &mut ids, |end| ends.push(end));
                let lines: Vec<_> = ends.windows(2).map(|line| ids[line[0]..line[1]].to_vec()).collect();
                let newline = |at| at + 1 < words.len() || text.ends_with('\n');
                let with_newlines = |(at, ids): (usize, &Vec<u32>)| {
                    ids.iter().copied().chain(newline(at).then_some(b'\n'.into())).collect::<Vec<_>>()
                };
                prop_assert_eq!(lines, expected.iter().enumerate().map(with_newlines).collect::<Vec<_>>());
            }
        }
    }
}
