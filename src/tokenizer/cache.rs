//! Words met before, and their ids.

use rustc_hash::FxHashMap;

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
        // 32 bits, so that counting on from there never overflows.
        (product as u64 ^ (product >> 64) as u64) as u32 as usize
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

/// Most words are few tokens, which lie beside them.
pub(super) const FEW: usize = 4;

/// In place of the number of ids: they lie elsewhere, and `ids` says where they start and how many they are.
const ELSEWHERE: u64 = 8;

/// Added to the number of a word's ids if it ends a line, so that whoever encodes need not ask it of the others.
const ENDS_LINE: u64 = 10;

// A number of ids must be told from these two, and fit into the bits of a key that are left.
const _: () =
    assert!((FEW as u64) < ELSEWHERE && ELSEWHERE < ENDS_LINE && ENDS_LINE + (FEW as u64) < 1 << (64 - COUNT_BIT));

/// A word and its ids. The key of an empty entry is no word's.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// With the number of ids.
    key: Key,
    ids: [u32; FEW],
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.key == Key::default()
    }

    /// Whether the word is this one; the number of ids does not matter.
    #[inline]
    fn is(&self, key: Key) -> bool {
        (self.key.low ^ key.low) | (self.key.high ^ key.high) << (64 - COUNT_BIT) == 0
    }

    fn count(&self) -> u64 {
        self.key.high >> COUNT_BIT
    }
}

/// As many as there is room for in a line of the processor's cache.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Bucket([Entry; 2]);

/// Buckets of an empty cache, 2 MiB, and of one that grows no more.
const FIRST: usize = 1 << 15;
const MOST: usize = 1 << 17;

/// Ids that lie elsewhere, and those of the longest word there.
const MOST_ELSEWHERE: usize = 1 << 18;
const LONGEST: usize = 64;

/// Words met before and their ids: short ones in a hash table of open addresses, at most three quarters full, and
/// longer ones in a map. One that is full begins anew: frequent words are soon met again.
pub(super) struct Cache {
    buckets: Vec<Bucket>,
    /// Short words.
    count: usize,
    long: FxHashMap<Box<[u8]>, [u32; 2]>,
    /// The ids of long words and of those that have many.
    elsewhere: Vec<u32>,
}

impl Cache {
    pub(super) fn new() -> Self {
        let buckets = vec![Bucket::default(); FIRST];
        Self { buckets, count: 0, long: FxHashMap::default(), elsewhere: Vec::new() }
    }

    /// Where a word is, or belongs: there, or after it. That is fetched, so that it is at hand a little later.
    #[inline]
    pub(super) fn place(&self, key: Key) -> usize {
        let place = key.hash();
        prefetch(&self.buckets[self.at(place)]);
        place
    }

    #[inline]
    fn at(&self, place: usize) -> usize {
        place & (self.buckets.len() - 1)
    }

    /// The ids of nearly every word, of which the first so many count; 0 if [`Self::append`] has to look for it. A word
    /// that ends a line is none of these.
    #[inline]
    pub(super) fn few(&self, key: Key, place: usize) -> (&[u32; FEW], usize) {
        let Bucket([first, second]) = &self.buckets[self.at(place)];
        // Which of the two it is cannot be predicted, so there is no branch here.
        let is_first = first.is(key);
        let entry = if is_first { first } else { second };
        let is_one = is_first | second.is(key);
        let is_few = is_one & (entry.count() <= FEW as u64);
        (&entry.ids, if is_few { entry.count() as usize } else { 0 })
    }

    /// Appends the ids of a word; false if it is not known.
    pub(super) fn append(&self, key: Key, place: usize, word: &[u8], ids: &mut Vec<u32>) -> bool {
        let elsewhere = if key.is_short() {
            match self.find(key, place) {
                None => None,
                Some(entry) if entry.count() == ELSEWHERE => Some([entry.ids[0], entry.ids[1]]),
                Some(entry) => {
                    ids.extend_from_slice(&entry.ids[..(entry.count() % ENDS_LINE) as usize]);
                    return true;
                }
            }
        } else {
            self.long.get(word).copied()
        };
        let Some([start, count]) = elsewhere else { return false };
        ids.extend_from_slice(&self.elsewhere[start as usize..][..count as usize]);
        true
    }

    /// Finds a short word: it is in the first entry that is not another's, or not there.
    fn find(&self, key: Key, place: usize) -> Option<&Entry> {
        let mut entries = (place..).flat_map(|at| &self.buckets[self.at(at)].0);
        entries.find(|entry| entry.is(key) || entry.is_empty()).filter(|entry| !entry.is_empty())
    }

    /// Notes the ids of a word, unless they are very many.
    pub(super) fn store(&mut self, key: Key, place: usize, word: &[u8], ids: &[u32]) {
        if ids.len() > LONGEST {
            return;
        }
        let is_full = self.count == self.buckets.len() * 3 / 2;
        if is_full && self.buckets.len() == MOST || self.elsewhere.len() + ids.len() > MOST_ELSEWHERE {
            self.buckets.fill(Bucket::default());
            self.count = 0;
            self.long.clear();
            self.elsewhere.clear();
        } else if is_full {
            self.grow();
        }
        let mut count = ids.len() as u64;
        let mut entry = Entry { key, ids: [0; FEW] };
        if key.is_short() && ids.len() <= FEW {
            entry.ids[..ids.len()].copy_from_slice(ids);
            count += if word.ends_with(b"\n") { ENDS_LINE } else { 0 };
        } else {
            let span = [self.elsewhere.len() as u32, ids.len() as u32];
            self.elsewhere.extend_from_slice(ids);
            if !key.is_short() {
                self.long.insert(word.into(), span);
                return;
            }
            entry.ids[..2].copy_from_slice(&span);
            count = ELSEWHERE;
        }
        entry.key.high |= count << COUNT_BIT;
        self.count += 1;
        *self.empty(place) = entry;
    }

    /// The first empty entry from a word's place on.
    fn empty(&mut self, place: usize) -> &mut Entry {
        let is_full = |at: usize| self.buckets[self.at(at)].0.iter().all(|entry| !entry.is_empty());
        let at = (place..).find(|&at| !is_full(at)).unwrap_or(place);
        let at = self.at(at);
        let [first, second] = &mut self.buckets[at].0;
        if first.is_empty() {
            first
        } else {
            second
        }
    }

    /// Doubles the room.
    fn grow(&mut self) {
        let buckets = vec![Bucket::default(); 2 * self.buckets.len()];
        for entry in std::mem::replace(&mut self.buckets, buckets).into_iter().flat_map(|bucket| bucket.0) {
            if !entry.is_empty() {
                let Key { low, high } = entry.key;
                *self.empty(Key { low, high: high & ((1 << COUNT_BIT) - 1) }.hash()) = entry;
            }
        }
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
        assert_eq!(alone.is_short(), word.len() < 16);
        assert!(alone == Key::new(text.as_bytes(), start, end));
        alone
    }

    #[test]
    fn a_cache_gives_the_ids_of_the_word_itself_or_none() {
        let mut cache = Cache::new();
        // Some end in a zero or a line, and some are long.
        let ends = ["", "\0", "\n", "-------", "----------------"];
        let words: Vec<String> =
            (0..100_000_u32).map(|number| format!("{number:x}{}", ends[number as usize % ends.len()])).collect();
        let ids = |at: usize| (0..1 + at % (FEW + 2)).map(|n| (at + 3 * n) as u32).collect::<Vec<_>>();
        let find = |cache: &Cache, word: &str, ids: &mut Vec<u32>| {
            let (key, place) = (key(word), cache.place(key(word)));
            let (few, number) = cache.few(key, place);
            let known = cache.append(key, place, word.as_bytes(), ids);
            // What is quickly found is the same.
            assert!(number == 0 || known && ids.ends_with(&few[..number]) && !word.ends_with('\n'), "{word}");
            (known, number > 0)
        };
        let mut found = Vec::new();
        for (at, word) in words.iter().enumerate() {
            assert!(!find(&cache, word, &mut found).0, "{word}");
            cache.store(key(word), cache.place(key(word)), word.as_bytes(), &ids(at));
        }
        assert!(found.is_empty());
        let mut quickly = 0;
        for (at, word) in words.iter().enumerate() {
            found.clear();
            let (known, was_quick) = find(&cache, word, &mut found);
            assert!(known && found == ids(at), "{word}");
            quickly += usize::from(was_quick);
        }
        assert!(quickly > words.len() / 3, "{quickly}");
        assert!(cache.buckets.len() > FIRST);
    }

    #[test]
    fn a_full_cache_begins_anew() {
        let store = |cache: &mut Cache, word: &str, ids: &[u32]| {
            cache.store(key(word), cache.place(key(word)), word.as_bytes(), ids);
        };
        let knows = |cache: &Cache, word: &str| {
            cache.append(key(word), cache.place(key(word)), word.as_bytes(), &mut Vec::new())
        };
        let short = |number: usize| format!("{number}");
        let long = |number: usize| format!("{number:16}");
        for (word, ids) in [(&short as &dyn Fn(usize) -> String, 1), (&short, FEW + 1), (&long, LONGEST)] {
            let mut cache = Cache::new();
            let room = if ids == 1 { 2 * MOST * 3 / 4 } else { MOST_ELSEWHERE / ids };
            for number in 0..room {
                store(&mut cache, &word(number), &vec![7; ids]);
            }
            assert!((0..room).all(|number| knows(&cache, &word(number))));
            store(&mut cache, &word(room), &vec![7; ids]);
            assert!(knows(&cache, &word(room)) && !(0..room).any(|number| knows(&cache, &word(number))));
            store(&mut cache, &word(0), &vec![7; LONGEST + 1]);
            assert!(!knows(&cache, &word(0)));
        }
    }
}
