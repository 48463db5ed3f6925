//! The tokenizer against Hugging Face `tokenizers` (golden files, made by tests/golden/bpe/make.py)
//! and tiktoken.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use lockstep::error::exit_code;
use lockstep::tokenizer::{train, Tokenizer, WordCounts};
use proptest::prelude::*;
use serde_json::{json, Value};
use tiktoken_rs::CoreBPE;

static GPT2: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::gpt2().unwrap());
static TIKTOKEN: LazyLock<CoreBPE> = LazyLock::new(|| tiktoken_rs::r50k_base().unwrap());

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bpe").join(name)
}

fn golden_json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(name)).unwrap()).unwrap()
}

fn golden_tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_file(&golden(&format!("{name}.tokenizer.json"))).unwrap()
}

fn lines_of(text: &str) -> Vec<&str> {
    text.split_inclusive('\n').collect()
}

/// The ids that tiktoken finds, line by line.
fn tiktokens_ids(text: &str) -> Vec<u32> {
    lines_of(text).into_iter().flat_map(|line| TIKTOKEN.encode_ordinary(line)).collect()
}

/// Our ids of each line of some texts.
fn ids_of_lines(texts: &[&str]) -> Vec<Vec<u32>> {
    GPT2.encode_lines(texts).iter().map(<[u32]>::to_vec).collect()
}

fn train_on(text: &str, vocab_size: usize) -> Tokenizer {
    let mut counts = WordCounts::default();
    counts.add_lines(&lines_of(text));
    train(&counts, vocab_size).unwrap()
}

/// The merges of a tokenizer.json in order, each as "a b" whatever its form there.
fn merges_of(file: &Value) -> Vec<String> {
    let form = |merge: &Value| match merge {
        Value::String(text) => text.clone(),
        parts => format!("{} {}", parts[0].as_str().unwrap(), parts[1].as_str().unwrap()),
    };
    file["model"]["merges"].as_array().unwrap().iter().map(form).collect()
}

fn to_value(tokenizer: &Tokenizer) -> Value {
    serde_json::from_str(&tokenizer.to_json()).unwrap()
}

/// A split of WikiText-2, which is not part of the project; without it the calling test says
/// so and ends.
fn wikitext2(split: &str) -> Option<String> {
    match std::env::var_os("LOCKSTEP_WIKITEXT2") {
        Some(folder) => {
            let path = Path::new(&folder).join(format!("wiki.{split}.tokens"));
            Some(std::fs::read_to_string(path).unwrap())
        }
        None => {
            eprintln!("NOT RUN: set LOCKSTEP_WIKITEXT2 to the folder with wiki.{split}.tokens");
            None
        }
    }
}

#[test]
fn small_texts_give_hugging_faces_vocabulary() {
    for (name, vocab_size) in [("english", 500), ("unicode", 600)] {
        let text = std::fs::read_to_string(golden(&format!("{name}.txt"))).unwrap();
        let (ours, theirs) = (to_value(&train_on(&text, vocab_size)), golden_json(&format!("{name}.tokenizer.json")));
        assert_eq!(merges_of(&ours), merges_of(&theirs), "{name}");
        assert_eq!(ours["model"]["vocab"], theirs["model"]["vocab"], "{name}");
        assert_eq!(ours["added_tokens"], theirs["added_tokens"], "{name}");
    }
}

#[test]
fn small_texts_give_hugging_faces_ids() {
    for name in ["english", "unicode"] {
        let tokenizer = golden_tokenizer(name);
        for row in golden_json(&format!("{name}.ids.json")).as_array().unwrap() {
            let line = row[0].as_str().unwrap();
            let ids = tokenizer.encode(line);
            assert_eq!(json!(ids), row[1], "{name}: {line:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), line.as_bytes());
        }
    }
}

#[test]
fn wikitext2_gives_hugging_faces_merges() {
    let Some(text) = wikitext2("train") else { return };
    let merges = std::fs::read_to_string(golden("wikitext-2.merges.txt")).unwrap();
    let merges: Vec<&str> = merges.lines().collect();
    assert_eq!(merges_of(&to_value(&train_on(&text, 8192))), merges);
}

#[test]
fn wikitext2_gives_tiktokens_ids() {
    for split in ["train", "valid", "test"] {
        let Some(text) = wikitext2(split) else { return };
        let (lines, encoded) = (lines_of(&text), ids_of_lines(&[&text]));
        assert_eq!(lines.len(), encoded.len());
        for (line, ids) in lines.iter().zip(&encoded) {
            assert_eq!(*ids, TIKTOKEN.encode_ordinary(line), "{line:?}");
        }
        assert_eq!(GPT2.encode(&text), encoded.concat());
    }
}

#[test]
fn gpt2_has_its_size_and_its_end_of_text() {
    assert_eq!((GPT2.vocab_size(), GPT2.end_of_text()), (50_257, 50_256));
    assert_eq!(GPT2.decode(&[50_256]).unwrap(), b"<|endoftext|>");
    assert_eq!(GPT2.encode("Hello world"), [15496, 995]);
    // Every token that is text and no more than a line encodes to itself, so no merge is lost or misplaced.
    let texts: Vec<(u32, String)> =
        (0..50_256).filter_map(|id| Some((id, String::from_utf8(GPT2.decode(&[id]).unwrap()).ok()?))).collect();
    let lines: Vec<_> = texts.iter().filter(|(_, text)| lines_of(text).len() == 1).collect();
    assert!(lines.len() > 49_000);
    for (id, text) in lines {
        assert_eq!(GPT2.encode(text), [*id], "{text:?}");
    }
}

#[test]
fn every_character_is_cut_as_tiktoken_cuts_it() {
    // Each with a letter, a digit, a space and a mark on either side. Unassigned planes behave
    // alike; one is enough.
    let points: Vec<char> = ('\0'..='\u{3ffff}').chain('\u{e0000}'..='\u{e01ff}').collect();
    for points in points.chunks(64) {
        let text: String = points.iter().map(|c| format!("a{c}1{c} {c}!{c}")).collect();
        assert_eq!(GPT2.encode(&text), tiktokens_ids(&text), "{:?}", points[0]);
    }
}

#[test]
fn long_words_are_merged_like_short_ones() {
    // The longest word that is merged by scanning, the first that is not, and words for which
    // quadratic time would be too slow.
    for length in [47, 48, 49, 50, 1000, 20_000] {
        for unit in ["a", "ab", "the", "é", "漢字"] {
            let text: String = unit.chars().cycle().take(length).collect();
            assert_eq!(GPT2.encode(&text), TIKTOKEN.encode_ordinary(&text), "{unit} to {length}");
        }
    }
    assert_eq!(GPT2.decode(&GPT2.encode(&"a".repeat(500_000))).unwrap().len(), 500_000);
}

#[test]
fn end_of_text_is_never_made_by_text() {
    let text = "a<|endoftext|>b <|endoftext|>\n<|endoftext|>";
    for tokenizer in [&*GPT2, &golden_tokenizer("english"), &train_on(&text.repeat(99), 268)] {
        let ids = tokenizer.encode(text);
        assert!(!ids.contains(&tokenizer.end_of_text()));
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
    }
}

#[test]
fn a_line_is_a_unit() {
    let text = "one\n\n two\r\nthree";
    let lines = ["one\n", "\n", " two\r\n", "three"].map(|line| TIKTOKEN.encode_ordinary(line));
    assert_eq!(GPT2.encode(text), lines.concat());
    assert_eq!(ids_of_lines(&[text]), lines);
    assert_eq!(ids_of_lines(&[text, text]), [lines.clone(), lines].concat());
    assert!(GPT2.encode("").is_empty());
    assert_eq!(ids_of_lines(&["", "a"]), [[64]]);
    assert!(ids_of_lines(&[]).is_empty());
}

#[test]
fn the_thread_count_changes_nothing() {
    let text = ["english.txt", "unicode.txt"].map(|name| std::fs::read_to_string(golden(name)).unwrap());
    let text = text.concat().repeat(40);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| (train_on(&text, 700).to_json(), ids_of_lines(&[&text, &text.repeat(40)])))
    };
    let alone = run(1);
    assert!([2, 3, 8].into_iter().all(|threads| run(threads) == alone));
}

#[test]
fn counting_in_batches_is_counting_at_once() {
    let text = std::fs::read_to_string(golden("unicode.txt")).unwrap();
    let mut counts = WordCounts::default();
    for batch in lines_of(&text).chunks(3) {
        counts.add_lines(batch);
    }
    assert_eq!(train(&counts, 500).unwrap().to_json(), train_on(&text, 500).to_json());
}

#[test]
fn training_says_what_it_cannot_do() {
    let mut counts = WordCounts::default();
    counts.add_lines(&["abc abc\n"]);
    let error = train(&counts, 256).err().unwrap();
    assert_eq!(exit_code(&error), 2);
    assert!(error.to_string().contains("at least 257"), "{error}");
    // "abc" and " abc" allow only ab, abc and " abc".
    let error = train(&counts, 8192).err().unwrap();
    assert_eq!(exit_code(&error), 3);
    assert!(error.to_string().contains("at most 260 tokens, and 8192"), "{error}");
    assert_eq!(train(&counts, 260).unwrap().encode("abc abc"), [258, 259]);
    assert_eq!(train(&WordCounts::default(), 257).unwrap().vocab_size(), 257);
}

#[test]
fn an_id_outside_the_vocabulary_is_a_data_error() {
    let error = GPT2.decode(&[1, 50_257]).unwrap_err();
    assert_eq!(exit_code(&error), 3);
    assert!(error.to_string().contains("id 50257"), "{error}");
}

#[test]
fn a_saved_tokenizer_is_the_same_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    for tokenizer in [&*GPT2, &golden_tokenizer("unicode")] {
        tokenizer.save(&path).unwrap();
        let read = Tokenizer::from_file(&path).unwrap();
        assert_eq!(read.digest(), tokenizer.digest());
        assert_eq!(read.encode("It's 12 o'clock — 時\n"), tokenizer.encode("It's 12 o'clock — 時\n"));
    }
    assert_ne!(GPT2.digest(), golden_tokenizer("unicode").digest());
    let error = GPT2.save(&folder.path().join("missing/tokenizer.json")).unwrap_err();
    assert_eq!(exit_code(&error), 4);
}

/// Writes the file and reads it as a tokenizer.
fn read(content: &[u8]) -> anyhow::Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, content).unwrap();
    Tokenizer::from_file(&path)
}

#[test]
fn hugging_faces_gpt2_file_is_read_in_both_forms() {
    // As published since 2019: no model type, empty affixes, merges as strings, a post-processor;
    // and as today's version writes it, with merges as lists.
    let mut file = to_value(&GPT2);
    file["model"].as_object_mut().unwrap().retain(|key, _| ["vocab", "merges"].contains(&key.as_str()));
    for (key, value) in [("dropout", Value::Null), ("unk_token", Value::Null), ("fuse_unk", json!(false))] {
        file["model"][key] = value;
    }
    file["model"]["continuing_subword_prefix"] = json!("");
    file["model"]["end_of_word_suffix"] = json!("");
    file["added_tokens"][0]["normalized"] = json!(true);
    file["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    file["decoder"] = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true});
    file["post_processor"] = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false});
    assert_eq!(read(file.to_string().as_bytes()).unwrap().digest(), GPT2.digest());

    let lists: Vec<Vec<String>> =
        merges_of(&file).iter().map(|merge| merge.split(' ').map(String::from).collect()).collect();
    file["model"]["merges"] = json!(lists);
    assert_eq!(read(file.to_string().as_bytes()).unwrap().digest(), GPT2.digest());

    // As transformers 5 writes it: a template that adds nothing.
    let sequence = |id: &str, number: u32| json!({"Sequence": {"id": id, "type_id": number}});
    let single = [sequence("A", 0)];
    let pair = [sequence("A", 0), sequence("B", 1)];
    file["post_processor"] =
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}});
    assert_eq!(read(file.to_string().as_bytes()).unwrap().digest(), GPT2.digest());

    // The special token is only among the added ones.
    file["model"]["vocab"].as_object_mut().unwrap().remove("<|endoftext|>");
    assert_eq!(read(file.to_string().as_bytes()).unwrap().digest(), GPT2.digest());
}

#[test]
fn a_tokenizer_that_cannot_be_represented_is_refused() {
    let good = golden_json("english.tokenizer.json");
    assert!(read(good.to_string().as_bytes()).is_ok());
    let merge = |a: &str, b: &str| json!([[a, b]]);
    let bert = json!({"type": "BertPreTokenizer"});
    let prefix_space = json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true});
    let begin = json!({"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}});
    let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
    let cases = [
        ("/version", json!("2.0")),
        ("/truncation", json!({"max_length": 8})),
        ("/padding", json!({"length": 8})),
        ("/normalizer", json!({"type": "NFC"})),
        ("/pre_tokenizer", bert),
        ("/pre_tokenizer", prefix_space),
        ("/pre_tokenizer", json!({"type": "Sequence", "pretokenizers": []})),
        ("/pre_tokenizer/use_regex", json!(false)),
        ("/pre_tokenizer", Value::Null),
        ("/post_processor", json!({"type": "TemplateProcessing", "single": [begin, sequence], "special_tokens": {}})),
        ("/post_processor", json!({"type": "TemplateProcessing", "special_tokens": {"<|endoftext|>": {}}})),
        ("/post_processor", json!("ByteLevel")),
        ("/decoder", Value::Null),
        ("/model/type", json!("Unigram")),
        ("/model/dropout", json!(0.1)),
        ("/model/unk_token", json!("<unk>")),
        ("/model/continuing_subword_prefix", json!("##")),
        ("/model/end_of_word_suffix", json!("</w>")),
        ("/model/byte_fallback", json!(true)),
        ("/model/ignore_merges", json!(true)),
        ("/model/cutoff", json!(1)),
        ("/surprise", json!({})),
        ("/model/vocab/日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日日", json!(500)),
        ("/added_tokens", json!([])),
        ("/added_tokens", json!([good["added_tokens"][0], good["added_tokens"][0]])),
        ("/added_tokens/0/content", json!("<s>")),
        ("/added_tokens/0/special", json!(false)),
        ("/added_tokens/0/id", json!(-1)),
        ("/added_tokens/0/id", json!(7)),
        ("/model", Value::Null),
        ("/model/vocab", json!(["a"])),
        ("/model/vocab/a", json!(0)),
        ("/model/vocab/a", json!(500)),
        ("/model/vocab/a", json!(4_294_967_296_u64)),
        ("/model/vocab/a", json!("66")),
        ("/model/vocab/a", Value::Null),
        ("/model/vocab/日", json!(500)),
        ("/model/vocab/", json!(500)),
        ("/model/merges", json!({})),
        ("/model/merges", json!(["ab"])),
        ("/model/merges", json!(["a b c"])),
        ("/model/merges", json!([["a"]])),
        ("/model/merges", json!([["a", 1]])),
        ("/model/merges", merge("a", "zzz")),
        ("/model/merges", json!(["Ġ t", "Ġ t"])),
        ("/model/merges", json!(["Q Q"])),
        ("/model/merges", merge("a", "<|endoftext|>")),
    ];
    for (place, value) in cases {
        let mut file = good.clone();
        let (parent, key) = place.rsplit_once('/').unwrap();
        match file.pointer_mut(parent).unwrap() {
            Value::Array(items) => items[key.parse::<usize>().unwrap()] = Value::Null,
            part => part[key] = value.clone(),
        }
        let error = read(file.to_string().as_bytes()).err();
        let error = error.unwrap_or_else(|| panic!("{place} = {value} was accepted"));
        let message = format!("{error:#}");
        assert_eq!(exit_code(&error), 3, "{message}");
        assert!(message.contains("tokenizer.json") && message.contains("expected"), "{place}: {message}");
        assert!(message.len() < 600, "{message}");
    }
}

#[test]
fn a_file_that_is_no_tokenizer_is_a_data_error() {
    let good = std::fs::read(golden("english.tokenizer.json")).unwrap();
    let deep = "[".repeat(100_000);
    for content in [&b""[..], b"null", b"[]", b"{}", b"\xff\xfe", deep.as_bytes(), &good[..good.len() / 2]] {
        let error = read(content).err().unwrap();
        assert_eq!(exit_code(&error), 3, "{error:#}");
    }
    for path in [golden("nowhere.json"), golden("")] {
        let error = Tokenizer::from_file(&path).err().unwrap();
        assert_eq!(exit_code(&error), 3, "{error:#}");
        assert!(error.to_string().contains("golden"), "{error:#}");
    }
}

/// Text rich in what pre-tokenization looks at, mixed with characters of any kind.
fn any_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<String>(),
        "[a-z]{1,12}",
        "'(s|t|re|ve|m|ll|d|S|x)?",
        "[ \t\r\n\u{a0}\u{3000}\u{85}]{1,4}",
        "[0-9²½Ⅷ٣]{1,5}",
        "[\u{300}-\u{340}\u{200b}-\u{200f}]{1,3}",
        "\\p{L}{1,70}",
        "[!-/]{1,5}",
        Just("<|endoftext|>".to_string()),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_text_gives_tiktokens_ids(text in any_text()) {
        prop_assert_eq!(GPT2.encode(&text), tiktokens_ids(&text));
    }

    #[test]
    fn decoding_gives_any_text_back(text in any_text()) {
        prop_assert_eq!(GPT2.decode(&GPT2.encode(&text)).unwrap(), text.as_bytes());
        let small = train_on(&text, 257);
        prop_assert_eq!(small.decode(&small.encode(&text)).unwrap(), text.as_bytes());
    }

    #[test]
    fn a_damaged_file_never_panics(at in 0_usize..8000, byte: u8) {
        let mut content = std::fs::read(golden("english.tokenizer.json")).unwrap();
        content[at] = byte;
        if let Err(error) = read(&content) {
            prop_assert_eq!(exit_code(&error), 3);
        }
    }
}
