//! Learns a byte-level BPE vocabulary from text (Sennrich et al., 2016).
//!
//! The merges are those of Hugging Face's `BpeTrainer` with a byte-level pre-tokenizer and
//! `<|endoftext|>` as its one special token: the most frequent pair of neighbouring tokens becomes
//! a token, among equally frequent ones the pair with the smaller ids. A heap of candidates, each
//! with the words in which it occurs, gives the next pair; only those words are visited, never the
//! whole corpus.

use std::cmp::Reverse;
use std::collections::binary_heap::{BinaryHeap, PeekMut};

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use super::pretokenize::for_each_word;
use super::{byte_alphabet, Pair, Tokenizer, Tokens, END_OF_TEXT};
use crate::error::{Error, Result};

/// How often each word occurs in a text; filled batch by batch, so the text need not fit into
/// memory. Neither need its words: if they become too many, the rarest are forgotten (lossy counting, Manku and Motwani
/// 2002). A word that is met again counts from one.
#[derive(Default)]
pub struct WordCounts {
    counts: FxHashMap<Box<str>, u64>,
    /// Bytes of these words.
    bytes: usize,
    /// Words that had been counted at most this often were forgotten.
    forgotten: u64,
}

/// More different words than these are not counted: they and the pairs in them take some hundred bytes each.
const MAX_WORDS: usize = 1_800_000;
/// Nor words of more bytes together.
const MAX_BYTES: usize = 64 << 20;

impl WordCounts {
    /// Counts the words of some lines, each with its newline, on all cores.
    pub fn add_lines(&mut self, lines: &[&str]) {
        let counted = lines
            .par_iter()
            .with_min_len(512)
            .fold(FxHashMap::<&str, u64>::default, |mut counts, line| {
                for_each_word(line, |start, end| *counts.entry(&line[start..end]).or_default() += 1);
                counts
            })
            .reduce(FxHashMap::default, |a, b| {
                let (mut counts, fewer) = if a.len() < b.len() { (b, a) } else { (a, b) };
                for (word, count) in fewer {
                    *counts.entry(word).or_default() += count;
                }
                counts
            });
        self.counts.reserve(counted.len().saturating_sub(self.counts.len()));
        for (word, count) in counted {
            match self.counts.get_mut(word) {
                Some(total) => *total += count,
                None => {
                    self.counts.insert(word.into(), count);
                    self.bytes += word.len();
                }
            }
        }
        self.forget_rare(MAX_WORDS, MAX_BYTES);
    }

    /// Words that had been counted at most this often were forgotten; 0 if all were counted.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// If there are too many words, forgets the rarest, until half of what is allowed is left.
    fn forget_rare(&mut self, max_words: usize, max_bytes: usize) {
        if self.counts.len() <= max_words && self.bytes <= max_bytes {
            return;
        }
        let mut rarest = 0;
        while self.counts.len() > max_words / 2 || self.bytes > max_bytes / 2 {
            rarest += 1;
            self.counts.retain(|_, count| *count > rarest);
            self.bytes = self.counts.keys().map(|word| word.len()).sum();
        }
        self.forgotten = self.forgotten.max(rarest);
    }
}

/// Learns a vocabulary of `vocab_size` tokens: `<|endoftext|>` (id 0), the 256 bytes, and merges.
///
/// The result depends on the counts alone, not on the number of threads.
///
/// # Errors
/// Usage if `vocab_size` is under 257; Data if the text has too few pairs to merge, with the
/// largest vocabulary that it allows.
pub fn train(counts: &WordCounts, vocab_size: usize) -> Result<Tokenizer> {
    let mut tokens = Tokens::default();
    tokens.push(END_OF_TEXT.as_bytes());
    byte_alphabet().for_each(|(byte, _)| tokens.push(&[byte]));
    if vocab_size < tokens.len() {
        return Err(Error::Usage(format!(
            "a vocabulary of {vocab_size} tokens was asked for; expected at least {}, for the 256 bytes and {END_OF_TEXT}",
            tokens.len()
        ))
        .into());
    }

    let mut corpus = Corpus::new(counts, &tokens);
    let mut merges = Vec::new();
    while tokens.len() < vocab_size {
        let Some(best) = corpus.most_frequent() else {
            return Err(Error::Data(format!(
                "the training text allows a vocabulary of at most {} tokens, and {vocab_size} were asked for; \
                 ask for fewer or give more text",
                tokens.len()
            ))
            .into());
        };
        let Reverse(pair) = best.pair;
        corpus.merge(&best, tokens.len() as u32);
        tokens.push_merged(pair);
        merges.push(pair);
    }
    Tokenizer::new(tokens, merges, 0)
}

/// A pair waiting to be merged. The greatest is the most frequent, then the one with the smaller
/// ids.
///
/// Each pair is queued once, by the merge that makes the younger of its tokens: that merge makes
/// all there will ever be of it, and later ones only use them up.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    /// The pair's count when last looked at; never less than it is now.
    count: u64,
    pair: Reverse<Pair>,
    /// The words in which it was made.
    words: Vec<u32>,
}

/// The distinct words of the text as tokens, merged so far.
struct Corpus {
    words: Vec<Word>,
    /// How often each pair that is not merged yet occurs in the text.
    counts: FxHashMap<Pair, u64>,
    queue: BinaryHeap<Candidate>,
}

struct Word {
    tokens: Vec<u32>,
    count: u64,
}

impl Corpus {
    fn new(word_counts: &WordCounts, tokens: &Tokens) -> Self {
        let mut ids = [0; 256];
        for (id, token) in (0..).zip(tokens.iter()) {
            if let [byte] = *token {
                ids[usize::from(byte)] = id;
            }
        }
        let words = word_counts
            .counts
            .iter()
            .map(|(word, &count)| Word { tokens: word.bytes().map(|byte| ids[usize::from(byte)]).collect(), count })
            .collect();
        let mut corpus = Self { words, counts: FxHashMap::default(), queue: BinaryHeap::new() };
        let mut made = Made::default();
        for (index, word) in (0..).zip(&corpus.words) {
            for pair in word.tokens.windows(2) {
                let pair = (pair[0], pair[1]);
                *corpus.counts.entry(pair).or_default() += word.count;
                made.add(pair, index);
            }
        }
        corpus.enqueue(made);
        corpus
    }

    /// Takes the next pair to merge off the queue; None if no two tokens stand side by side.
    fn most_frequent(&mut self) -> Option<Candidate> {
        loop {
            let mut top = self.queue.peek_mut()?;
            let count = self.counts[&top.pair.0];
            if top.count == count {
                return Some(PeekMut::pop(top));
            }
            // Merges have used up some of it since it was queued: back to where it belongs now.
            if count == 0 {
                PeekMut::pop(top);
            } else {
                top.count = count;
            }
        }
    }

    /// Puts token `id` in place of the pair in the candidate's words, and queues the pairs that
    /// this makes.
    fn merge(&mut self, candidate: &Candidate, id: u32) {
        self.counts.remove(&candidate.pair.0);
        let mut made = Made::default();
        for &index in &candidate.words {
            let Word { tokens, count } = &mut self.words[index as usize];
            merge_pair(tokens, candidate.pair.0, id, |lost, gained| {
                // Not there: the pair being merged, which overlaps itself in "aaa".
                if let Some(total) = self.counts.get_mut(&lost) {
                    *total -= *count;
                }
                *self.counts.entry(gained).or_default() += *count;
                made.add(gained, index);
            });
        }
        self.enqueue(made);
    }

    fn enqueue(&mut self, made: Made) {
        for (pair, words) in made.words {
            let count = self.counts[&pair];
            if count > 0 {
                self.queue.push(Candidate { count, pair: Reverse(pair), words });
            }
        }
    }
}

/// The words in which pairs have come to be, each word once.
#[derive(Default)]
struct Made {
    words: FxHashMap<Pair, Vec<u32>>,
}

impl Made {
    /// Notes a pair in a word; the words come in ascending order.
    fn add(&mut self, pair: Pair, word: u32) {
        let words = self.words.entry(pair).or_default();
        if words.last() != Some(&word) {
            words.push(word);
        }
    }
}

/// Replaces each `pair` in `tokens` by `id`, from left to right. Tells `change(lost, gained)` of
/// each neighbouring pair that becomes another.
fn merge_pair(tokens: &mut Vec<u32>, pair: Pair, id: u32, mut change: impl FnMut(Pair, Pair)) {
    let (left, right) = pair;
    let (mut read, mut write) = (0, 0);
    while read < tokens.len() {
        if tokens[read] == left && tokens.get(read + 1) == Some(&right) {
            if write > 0 {
                let before = tokens[write - 1];
                change((before, left), (before, id));
            }
            if let Some(&after) = tokens.get(read + 2) {
                change((right, after), (id, after));
            }
            tokens[write] = id;
            read += 2;
        } else {
            tokens[write] = tokens[read];
            read += 1;
        }
        write += 1;
    }
    tokens.truncate(write);
}

#[cfg(test)]
mod tests {
    use super::{merge_pair, WordCounts};

    #[test]
    fn the_rarest_words_are_forgotten_if_there_are_too_many() {
        let mut counts = WordCounts::default();
        let often: Vec<String> = (1..=50).map(|length| "o".repeat(length)).collect();
        let rare: Vec<String> = (1..=60).map(|length| "r".repeat(length)).collect();
        let lines: Vec<&str> = often.iter().chain(&often).chain(&rare).map(String::as_str).collect();
        counts.add_lines(&lines);
        counts.forget_rare(110, usize::MAX);
        assert_eq!((counts.counts.len(), counts.forgotten()), (110, 0));
        counts.forget_rare(109, usize::MAX);
        assert_eq!((counts.counts.len(), counts.forgotten()), (50, 1));
        assert!(counts.counts.values().all(|&count| count == 2));
        assert_eq!(counts.bytes, counts.counts.keys().map(|word| word.len()).sum::<usize>());
        counts.forget_rare(usize::MAX, 10);
        assert!(counts.bytes <= 5);
    }

    #[test]
    fn a_pair_is_merged_from_the_left_and_its_neighbours_change() {
        let mut tokens = vec![1, 1, 1, 2, 1, 1];
        let mut changes = Vec::new();
        merge_pair(&mut tokens, (1, 1), 9, |lost, gained| changes.push((lost, gained)));
        assert_eq!(tokens, [9, 1, 2, 9]);
        assert_eq!(changes, [((1, 1), (9, 1)), ((2, 1), (2, 9))]);
    }
}
