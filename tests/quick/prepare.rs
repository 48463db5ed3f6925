//! From text to a data folder: every source, what is refused, and that a folder is replaced whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use lockstep::config::Layout;
use lockstep::data::corpus::Choices;
use lockstep::data::folder::{DataDir, Meta};
use lockstep::data::inputs::{Aside, Packing};
use lockstep::data::loader::Samples;
use lockstep::data::prepare::prepare as prepare_with;
use lockstep::data::sample;
use lockstep::data::shard::Shards;
use lockstep::data::wikitext::{Source, Split, Text};
use lockstep::error::exit_code;
use lockstep::tokenizer::Tokenizer;
use tempfile::TempDir;

use crate::common::{binary, finish, Output};

const TEXT: &str = " = A title = \n \n Some words , and more of them . \n";

/// What names, and nothing else, lead to.
fn parse(name: &str) -> anyhow::Result<Source> {
    Source::parse(&[name.into()], None, &Choices::default())
}

fn prepare(source: &Source, tokenizer: &str, out: &Path) -> anyhow::Result<Meta> {
    prepare_with(source, &Choices::default(), tokenizer, out)
}

/// A folder of three texts named by `pattern`, with the split's name in place of the star.
fn corpus(folder: &Path, pattern: &str, texts: [&[u8]; 3]) -> Source {
    let path = folder.join("text");
    fs::create_dir_all(&path).unwrap();
    for (split, text) in Split::ALL.into_iter().zip(texts) {
        fs::write(path.join(pattern.replace('*', split.name())), text).unwrap();
    }
    parse(path.to_str().unwrap()).unwrap()
}

fn small(folder: &Path) -> Source {
    let train = TEXT.repeat(20);
    corpus(folder, "wiki.*.tokens", [train.as_bytes(), TEXT.as_bytes(), TEXT.as_bytes()])
}

fn fails<T>(result: anyhow::Result<T>, code: u8, parts: &[&str]) {
    let error = result.err().expect("an error");
    let text = format!("{error:#}");
    assert_eq!(exit_code(&error), code, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} in {text:?}");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The text of a shard's ids, line by line.
fn text_of(shard: &Shards, tokenizer: &Tokenizer) -> Vec<u8> {
    let mut text = Vec::new();
    let mut lines = Vec::new();
    shard.for_each_line(|line| lines.push(line)).unwrap();
    for line in lines {
        let mut ids = Vec::new();
        shard.tokens(line, &mut ids).unwrap();
        let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        text.extend(tokenizer.decode(&ids).unwrap());
    }
    text
}

#[test]
fn the_sample_becomes_a_data_folder_that_gives_back_its_text() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("deep/er/out");
    let source = parse("sample").unwrap();
    let meta = prepare(&source, "bpe:512", &out).unwrap();
    assert_eq!(names(&out), ["meta.json", "test.bin", "tokenizer.json", "train.bin", "valid.bin"]);
    assert_eq!(names(out.parent().unwrap()), ["out"]);

    let data = DataDir::open(&out).unwrap();
    assert_eq!(data.meta, meta);
    assert_eq!((meta.source.as_str(), meta.tokenizer.as_str(), meta.vocab_size), ("sample", "bpe:512", 512));
    let tokenizer = Tokenizer::from_file(&data.tokenizer).unwrap();
    assert_eq!(tokenizer.digest(), data.train.tokenizer_digest());
    for (split, shard) in [(Split::Train, &data.train), (Split::Valid, &data.valid), (Split::Test, &data.test)] {
        let text = sample::text(split, sample::BYTES);
        assert!(text_of(shard, &tokenizer) == text.as_bytes(), "{split}");
        let said = meta.split(split);
        assert_eq!(said.bytes, text.len() as u64);
        assert_eq!(said.lines, text.lines().count() as u64);
        assert_eq!(said.words, text.split_whitespace().count() as u64);
    }

    // The tokenizer's file, given as the tokenizer, makes the same shards.
    let again = folder.path().join("again");
    prepare(&source, data.tokenizer.to_str().unwrap(), &again).unwrap();
    assert_eq!(fs::read(again.join("valid.bin")).unwrap(), fs::read(out.join("valid.bin")).unwrap());
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let folder = TempDir::new().unwrap();
    let source = parse("sample").unwrap();
    let [one, three] = [1, 3].map(|threads| {
        let out = folder.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| prepare(&source, "bpe:400", &out)).unwrap();
        names(&out).iter().map(|name| fs::read(out.join(name)).unwrap()).collect::<Vec<_>>()
    });
    assert!(one == three);
}

#[test]
fn folders_are_read_in_every_ending() {
    for pattern in ["wiki.*.tokens", "wiki.*.raw", "wiki.*.txt", "*.txt"] {
        let folder = TempDir::new().unwrap();
        // Windows line ends stay, and a last line needs none.
        let train = format!("{}Caf\u{e9} with no end of line", TEXT.repeat(9).replace('\n', "\r\n"));
        let source = corpus(folder.path(), pattern, [train.as_bytes(), b"a\n", b"b"]);
        let out = folder.path().join("out");
        let meta = prepare(&source, "bpe:260", &out).unwrap();
        let data = DataDir::open(&out).unwrap();
        let tokenizer = Tokenizer::from_file(&data.tokenizer).unwrap();
        assert!(text_of(&data.train, &tokenizer) == train.as_bytes(), "{pattern}");
        assert_eq!(text_of(&data.test, &tokenizer), b"b");
        assert_eq!((meta.train.lines, meta.valid.lines, meta.test.lines), (28, 1, 1));
    }
}

#[test]
fn a_file_is_cut_into_splits_at_its_lines() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("book.txt");
    let text: String = (0..1000).map(|line| format!("line {line} of the book\n")).collect();
    fs::write(&path, format!("\u{feff}{text}")).unwrap();
    let splits = |valid, test| {
        let aside = |share: Option<f64>| share.map(Aside::Share).into_iter().collect();
        let choices = Choices { valid: aside(valid), test: aside(test), ..Choices::default() };
        let source = Source::parse(&[path.to_str().unwrap().into()], None, &choices).unwrap();
        let out = folder.path().join("out");
        let meta = prepare_with(&source, &choices, "bpe:260", &out).unwrap();
        let data = DataDir::open(&out).unwrap();
        let tokenizer = Tokenizer::from_file(&data.tokenizer).unwrap();
        let texts = [&data.train, &data.valid, &data.test].map(|shard| text_of(shard, &tokenizer));
        assert_eq!(
            [meta.train.bytes, meta.valid.bytes, meta.test.bytes],
            texts.each_ref().map(|text| text.len() as u64)
        );
        assert!(texts.concat() == text.as_bytes(), "the splits are not the text without its mark");
        assert!(texts.iter().all(|text| text.is_empty() || text.ends_with(b"\n")));
        texts.map(|text| text.iter().filter(|&&byte| byte == b'\n').count())
    };
    let [train, valid, test] = splits(Some(0.1), Some(0.05));
    assert!(train.abs_diff(850) < 5 && valid.abs_diff(100) < 3 && test.abs_diff(50) < 3, "{train}, {valid}, {test}");
    assert_eq!(splits(Some(0.1), Some(0.05)), [train, valid, test]);
    let [train, valid, test] = splits(Some(0.1), None);
    assert!(train.abs_diff(900) < 5 && valid.abs_diff(100) < 3 && test == 0, "{train}, {valid}, {test}");
    let data = DataDir::open(&folder.path().join("out")).unwrap();
    let none = Samples::for_evaluation(data.test, Layout::Packed, 8).err().unwrap();
    fails(Err::<(), _>(none), 3, &["the split is empty", "--test 5%"]);

    // A single line cannot be split.
    fs::write(&path, "a single line").unwrap();
    let choices = Choices { valid: vec![Aside::Share(0.5)], ..Choices::default() };
    let source = Source::parse(&[path.to_str().unwrap().into()], None, &choices).unwrap();
    let parts = ["book.txt: not a single word is left for the valid split", "--valid"];
    fails(prepare_with(&source, &choices, "bpe:257", &folder.path().join("out")), 3, &parts);
}

#[test]
fn a_byte_order_mark_is_no_text() {
    let folder = TempDir::new().unwrap();
    let marked = format!("\u{feff}{}", TEXT.repeat(20));
    let source = corpus(folder.path(), "*.txt", [marked.as_bytes(), TEXT.as_bytes(), "\u{feff}b".as_bytes()]);
    let out = folder.path().join("out");
    let meta = prepare(&source, "bpe:260", &out).unwrap();
    let data = DataDir::open(&out).unwrap();
    let tokenizer = Tokenizer::from_file(&data.tokenizer).unwrap();
    assert!(text_of(&data.train, &tokenizer) == marked.as_bytes()[3..]);
    assert_eq!((text_of(&data.test, &tokenizer), meta.test.bytes), (b"b".to_vec(), 1));
    // A file with only a mark counts as empty.
    let source = corpus(folder.path(), "*.txt", [TEXT.as_bytes(), "\u{feff}".as_bytes(), TEXT.as_bytes()]);
    fails(prepare(&source, "bpe:260", &out), 3, &["valid.txt", "not a single word"]);
    // The mark is reported once for each file.
    let mut command = std::process::Command::new(binary());
    command.args(["prepare", "--tokenizer", "bpe:260", "--source"]).arg(folder.path().join("text"));
    corpus(folder.path(), "*.txt", [marked.as_bytes(), TEXT.as_bytes(), TEXT.as_bytes()]);
    let said = finish({
        command.arg("--out").arg(&out);
        command
    })
    .ok();
    assert_eq!(said.stderr.matches("train.txt begins with a byte order mark, which is left out").count(), 1);
}

#[test]
fn one_process_at_a_time_makes_a_data_folder() {
    let folder = TempDir::new().unwrap();
    let (source, out) = (small(folder.path()), folder.path().join("out"));
    let lock = folder.path().join("out.lockstep-lock");
    // As if another process held it in the middle of its work.
    let held = fs::File::create(&lock).unwrap();
    held.lock().unwrap();
    fails(prepare(&source, "bpe:260", &out), 2, &["--out ", "/out: another `lockstep prepare`", "wait for it"]);
    assert!(lock.exists() && !out.exists());
    // As if that process was killed: its lock is released, although the file remains.
    drop(held);
    prepare(&source, "bpe:260", &out).unwrap();
    assert_eq!(names(folder.path()), ["out", "text"]);

    let begin = |_| {
        let mut command = std::process::Command::new(binary());
        command.args(["-q", "prepare", "--source", "sample", "--tokenizer", "bpe:512", "--out"]).arg(&out);
        std::thread::spawn(|| finish(command))
    };
    let said: Vec<Output> = [0; 4].map(begin).into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(said.iter().any(|said| said.code == 0));
    for said in said.iter().filter(|said| said.code != 0) {
        assert!(said.code == 2 && said.stderr.contains("another `lockstep prepare`"), "{}", said.stderr);
    }
    assert_eq!(DataDir::open(&out).unwrap().meta.vocab_size, 512);
    assert_eq!(names(folder.path()), ["out", "text"]);
}

#[test]
fn a_folder_must_hold_each_split_once() {
    let folder = TempDir::new().unwrap();
    let source = small(folder.path());
    let text = folder.path().join("text");
    let out = folder.path().join("out");
    fs::rename(text.join("wiki.test.tokens"), text.join("wiki.test.raw")).unwrap();
    fails(prepare(&source, "bpe:260", &out), 3, &[text.to_str().unwrap(), "wiki.*.raw", "without wiki.test.tokens"]);
    small(folder.path());
    corpus(folder.path(), "*.txt", [b"a", b"b", b"c"]);
    fails(prepare(&source, "bpe:260", &out), 3, &["found wiki.*.tokens and *.txt", "keep one"]);
    assert_eq!(names(folder.path()), ["text"]);
}

#[test]
fn a_source_or_tokenizer_that_is_none_is_a_usage_error() {
    fails(parse("wikitext-3"), 2, &["wikitext-3", "sample", "wikitext-103-raw", "a folder"]);
    fails(
        Source::parse(&["sample".into()], Some("http://x"), &Choices::default()),
        2,
        &["--url http://x", "leave --url out"],
    );
    let folder = TempDir::new().unwrap();
    let source = small(folder.path());
    let out = folder.path().join("out");
    for tokenizer in ["bpe:", "bpe:x", "bpe:-1", "bpe:256", "gpt3", "missing/tokenizer.json"] {
        fails(prepare(&source, tokenizer, &out), 2, &[]);
    }
    fails(prepare(&source, "gpt3", &out), 2, &["--tokenizer gpt3", "gpt2", "bpe:8192", "tokenizer.json"]);
    assert_eq!(names(folder.path()), ["text"]);
}

#[test]
fn text_that_is_not_utf8_is_named_with_file_and_offset() {
    let folder = TempDir::new().unwrap();
    // Beyond the first piece, so the offset must count the pieces before.
    let mut bad = TEXT.repeat(350_000).into_bytes();
    let offset = bad.len() - 3;
    bad[offset] = 0xe9;
    let source = corpus(folder.path(), "wiki.*.raw", [&bad, b"a\n", b"a\n"]);
    let out = folder.path().join("out");
    let place = format!("byte offset {offset};");
    fails(prepare(&source, "bpe:257", &out), 3, &["wiki.train.raw", "UTF-8", "0xe9", &place, "convert"]);
    // A character cut by the end of the file.
    let source = corpus(folder.path(), "wiki.*.raw", [TEXT.as_bytes(), b"a\n", b"ab\xc3"]);
    fails(prepare(&source, "bpe:257", &out), 3, &["wiki.test.raw", "byte offset 2;"]);
    assert_eq!(names(folder.path()), ["text"]);
}

#[test]
fn a_split_without_words_is_an_error() {
    let folder = TempDir::new().unwrap();
    for nothing in [&b""[..], b" \n\n \n"] {
        let source = corpus(folder.path(), "wiki.*.raw", [TEXT.as_bytes(), nothing, b"a\n"]);
        let out = folder.path().join("out");
        fails(prepare(&source, "bpe:257", &out), 3, &["wiki.valid.raw", "not a single word"]);
        assert_eq!(names(folder.path()), ["text"]);
    }
}

#[test]
fn pieces_are_whole_lines_and_make_up_the_text() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("x");
    let long = "a long line ".repeat(1_500_000);
    for text in [format!("{TEXT}{long}\n{}", TEXT.repeat(400_000)), long, TEXT.repeat(400_000)] {
        fs::write(&path, &text).unwrap();
        let mut pieces: Vec<String> = Vec::new();
        let bytes = Text::File(path.clone(), Packing::Plain).for_each_chunk(&ProgressBar::hidden(), |piece, place| {
            assert_eq!(place, pieces.iter().map(|piece| piece.len() as u64).sum::<u64>());
            pieces.push(piece.to_owned());
            Ok(())
        });
        assert_eq!(bytes.unwrap(), text.len() as u64);
        assert!(pieces.concat() == text);
        assert!(pieces[..pieces.len() - 1].iter().all(|piece| piece.ends_with('\n')));
    }
}

#[test]
fn a_data_folder_is_replaced_only_by_a_whole_one() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let first = prepare(&small(folder.path()), "bpe:260", &out).unwrap();

    let bad = corpus(folder.path(), "wiki.*.tokens", [TEXT.as_bytes(), TEXT.as_bytes(), b"\xff"]);
    fails(prepare(&bad, "bpe:258", &out), 3, &["wiki.test.tokens"]);
    assert_eq!(DataDir::open(&out).unwrap().meta, first);
    assert_eq!(names(folder.path()), ["out", "text"]);

    // What killed runs left behind is removed; a damaged folder is replaced too.
    fs::create_dir(folder.path().join("out.lockstep-partial")).unwrap();
    fs::create_dir_all(folder.path().join("out.lockstep-replaced/x")).unwrap();
    fs::write(out.join("meta.json"), "").unwrap();
    let second = prepare(&small(folder.path()), "bpe:258", &out).unwrap();
    assert_eq!(DataDir::open(&out).unwrap().meta, second);
    assert_eq!(second.vocab_size, 258);
    assert_eq!(names(folder.path()), ["out", "text"]);

    // A link stays a link to the replaced folder.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&out, &link).unwrap();
    let third = prepare(&small(folder.path()), "bpe:259", &link).unwrap();
    assert!(link.is_symlink());
    assert_eq!(DataDir::open(&out).unwrap().meta, third);
}

#[test]
fn anything_else_in_the_place_is_left_alone() {
    let folder = TempDir::new().unwrap();
    let source = small(folder.path());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.tex"), "years of work").unwrap();
    fails(prepare(&source, "bpe:260", &out), 2, &[out.to_str().unwrap(), "thesis.tex", "nothing was touched"]);
    assert_eq!(fs::read_to_string(out.join("thesis.tex")).unwrap(), "years of work");

    // Another program's files of the same names.
    fs::remove_file(out.join("thesis.tex")).unwrap();
    fs::write(out.join("meta.json"), "{}").unwrap();
    fails(prepare(&source, "bpe:260", &out), 2, &["no shard in it"]);

    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    fails(prepare(&source, "bpe:260", &file), 2, &["found a file"]);
    fails(prepare(&source, "bpe:260", &file.join("out")), 4, &["file/out", "name a folder"]);

    // An empty folder counts as none.
    fs::remove_file(out.join("meta.json")).unwrap();
    prepare(&source, "bpe:260", &out).unwrap();
}

#[test]
fn a_data_folder_is_checked_when_it_is_opened() {
    let folder = TempDir::new().unwrap();
    let source = small(folder.path());
    let make = |name: &str, tokenizer: &str| -> PathBuf {
        let out = folder.path().join(name);
        prepare(&source, tokenizer, &out).unwrap();
        out
    };
    let remedy = "lockstep prepare";
    fails(DataDir::open(&folder.path().join("none")), 3, &["none", "found nothing", remedy]);
    fails(DataDir::open(&folder.path().join("text")), 3, &["text", "no meta.json", remedy]);

    let other = make("other", "bpe:258");
    let out = make("out", "bpe:260");
    let swapped = |name: &str, from: &Path, parts: &[&str]| {
        make("out", "bpe:260");
        fs::copy(from, out.join(name)).unwrap();
        fails(DataDir::open(&out), 3, parts);
    };
    swapped("train.bin", &other.join("train.bin"), &["train.bin", "a shard of the folder's tokenizer", remedy]);
    swapped(
        "train.bin",
        &out.join("valid.bin"),
        &["train.bin", "found 43 tokens, 3 lines", "as meta.json says", remedy],
    );
    swapped("tokenizer.json", &other.join("tokenizer.json"), &["tokenizer.json", "SHA-256", remedy]);

    for name in ["train.bin", "valid.bin", "test.bin", "tokenizer.json", "meta.json"] {
        make("out", "bpe:260");
        fs::remove_file(out.join(name)).unwrap();
        fails(DataDir::open(&out), 3, &[name, remedy]);
    }
    make("out", "bpe:260");
    let path = out.join("meta.json");
    let text = fs::read_to_string(&path).unwrap();
    for (old, new, part) in [
        ("\"format_version\": 1", "\"format_version\": 2", "format_version 1, found 2"),
        ("\"vocab_size\": 260", "\"vocab_size\": 261", "vocabulary of 261"),
        ("\"vocab_size\"", "\"size\"", "vocab_size"),
        ("{", "", "description of a data folder"),
    ] {
        fs::write(&path, text.replacen(old, new, 1)).unwrap();
        fails(DataDir::open(&out), 3, &[part, remedy]);
    }
}

#[test]
fn wikitext_2_has_its_published_size() {
    let Some(text) = std::env::var_os("LOCKSTEP_WIKITEXT2") else {
        eprintln!("NOT RUN: LOCKSTEP_WIKITEXT2 does not name a folder with wiki.{{train,valid,test}}.tokens");
        return;
    };
    let folder = TempDir::new().unwrap();
    let source = parse(text.to_str().unwrap()).unwrap();
    let meta: Meta = prepare(&source, "gpt2", &folder.path().join("out")).unwrap();
    assert_eq!(meta.vocab_size, 50_257);
    assert_eq!((meta.valid.words, meta.valid.lines), (213_886, 3_760));
    let data = DataDir::open(&folder.path().join("out")).unwrap();
    let tokenizer = Tokenizer::gpt2().unwrap();
    let path = Path::new(&text).join("wiki.valid.tokens");
    assert!(text_of(&data.valid, &tokenizer) == fs::read(path).unwrap());
}
