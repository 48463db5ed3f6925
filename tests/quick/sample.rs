//! The embedded sample corpus: WikiText's format, large and varied enough, and no repetitions.

use std::collections::{HashMap, HashSet};
use std::fs;

const SPLITS: [&str; 3] = ["train", "valid", "test"];

fn texts() -> [(&'static str, String); 3] {
    SPLITS.map(|split| {
        let path = format!("{}/src/data/sample/{split}.txt", env!("CARGO_MANIFEST_DIR"));
        (split, fs::read_to_string(path).unwrap())
    })
}

/// The title of a line ` = Title = `; sections have more equals signs.
fn title(line: &str) -> Option<&str> {
    let title = line.strip_prefix(" = ")?.strip_suffix(" = ")?;
    (!title.starts_with('=')).then_some(title)
}

fn is_heading(line: &str) -> bool {
    line.starts_with(" = ") && line.ends_with(" = ")
}

/// The sentences of a paragraph, split at each token that is a full stop.
fn sentences(line: &str) -> impl Iterator<Item = &str> {
    line.split(" . ").map(str::trim).filter(|sentence| !sentence.is_empty())
}

#[test]
fn there_are_enough_articles_each_with_its_own_title() {
    let mut titles = HashSet::new();
    let mut bytes = 0;
    for (split, text) in texts() {
        bytes += text.len();
        let before = titles.len();
        for name in text.lines().filter_map(title) {
            assert!(titles.insert(name.to_lowercase()), "{split}: {name} is there twice");
        }
        assert!(titles.len() > before, "{split} has no article");
    }
    assert!(titles.len() >= 60, "{} articles", titles.len());
    assert!(bytes >= 90_000, "{bytes} bytes");
}

#[test]
fn no_sentence_is_there_twice() {
    let mut seen = HashMap::new();
    let texts = texts();
    for (split, text) in &texts {
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !is_heading(line)) {
            for sentence in sentences(line) {
                let place = format!("{split}.txt:{}", i + 1);
                if let Some(first) = seen.insert(sentence, place.clone()) {
                    panic!("{place} and {first}: {sentence}");
                }
            }
        }
    }
    assert!(seen.len() > 600, "{} sentences", seen.len());
}

#[test]
fn it_is_written_as_wikitext_is() {
    for (split, text) in texts() {
        assert!(text.ends_with('\n'), "{split}");
        let lines: Vec<&str> = text.split_terminator('\n').collect();
        for (i, &line) in lines.iter().enumerate() {
            let place = format!("{split}.txt:{}: {line:?}", i + 1);
            // Blank lines hold one space; every other line is tokens between spaces.
            assert!(line.starts_with(' ') && line.ends_with(' '), "{place}");
            assert!(line == " " || !line.contains("  "), "{place}");
            assert!(!line.contains(['\t', '\r']), "{place}");
            if is_heading(line) {
                assert_eq!((lines[i - 1], lines.get(i + 1)), (" ", Some(&" ")), "{place}");
                continue;
            }
            for token in line.split(' ').filter(|token| token.len() > 1) {
                // Marks are separate tokens, between numbers @,@ and @.@; abbreviations and titles have a full stop.
                assert!(!token.ends_with([',', ';', '?', '!', ')']), "{place}: {token}");
                assert!(!token.starts_with(['(', '"']), "{place}: {token}");
            }
            assert!(line == " " || line.trim_end().ends_with(['.', '?', '!', '"', ':']), "{place}");
        }
    }
}
