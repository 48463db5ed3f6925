//! The sample corpus: the same bytes everywhere, WikiText's format, few words, no story twice, any size.

use std::collections::HashSet;

use lockstep::data::sample::{text, BYTES};
use lockstep::data::wikitext::Split;
use lockstep::files::hex;
use sha2::{Digest, Sha256};

/// SHA-256 of training, validation and test split.
const DIGESTS: [&str; 3] = [
    "6a690540f9fad945ce48ea5850f59b31ac2090ed8bac9889ef7270864b07af3f",
    "aea30bb3e04146cdaddfb4f72f6addb72a7c6e80c8c8df6d9fb21c6493afddac",
    "035e15f31634f434b93acfdb2269e23d73cb34d811ba2f15ee7c61428aa579bd",
];

fn texts() -> [String; 3] {
    Split::ALL.map(|split| text(split, BYTES))
}

/// The stories of a text, each with its title.
fn stories(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive("\n \n = ")
}

#[test]
fn it_is_the_same_everywhere() {
    let digests = texts().map(|text| hex(&Sha256::digest(text)));
    assert_eq!(digests, DIGESTS);
    let lengths = texts().map(|text| text.len());
    assert!(lengths[0] > 9 * (lengths[1] + lengths[2]) / 2 && lengths[1] > 10_000, "{lengths:?}");
}

#[test]
fn no_story_is_there_twice_and_the_splits_speak_the_same_language() {
    let texts = texts();
    let mut seen = HashSet::new();
    for story in texts.iter().flat_map(|text| stories(text)) {
        assert!(seen.insert(story), "{story}");
    }
    assert!(seen.len() > 800, "{} stories", seen.len());
    let [train, valid, test] = texts.each_ref().map(|text| text.split_whitespace().collect::<HashSet<_>>());
    assert!((300..500).contains(&train.len()), "{} words", train.len());
    assert!(valid.is_subset(&train) && test.is_subset(&train));
}

#[test]
fn more_of_it_begins_as_less_of_it() {
    for split in Split::ALL {
        let (less, more) = (text(split, BYTES), text(split, 5 * BYTES));
        assert!(more.starts_with(&less) && more.len() > 4 * less.len(), "{split}");
    }
}

#[test]
fn it_is_written_as_wikitext_is() {
    for (split, text) in Split::ALL.iter().zip(texts()) {
        assert!(text.ends_with('\n'), "{split}");
        let lines: Vec<&str> = text.split_terminator('\n').collect();
        for (i, &line) in lines.iter().enumerate() {
            let place = format!("{split}, line {}: {line:?}", i + 1);
            // Blank lines hold one space; every other line is tokens between spaces.
            assert!(line.starts_with(' ') && line.ends_with(' '), "{place}");
            assert!(line == " " || !line.contains("  "), "{place}");
            let words = line.trim();
            if words.starts_with('=') {
                assert!(words.ends_with('=') && words.len() > 4, "{place}");
                assert_eq!((lines[i - 1], lines.get(i + 1)), (" ", Some(&" ")), "{place}");
            } else if line != " " {
                assert!(words.ends_with(['.', '"']), "{place}");
                assert!(words.chars().next().is_some_and(|first| first.is_uppercase() || first == '"'), "{place}");
                // Nothing of the grammar is left over, and marks are tokens of their own.
                for token in words.split(' ') {
                    let plain = token.chars().all(|each| each.is_ascii_alphabetic());
                    assert!(plain || [".", ",", "?", "!", "\""].contains(&token), "{place}: {token}");
                }
            }
        }
    }
}
