//! One's own text in many files: formats, documents, splits, shards, ids of other trainers, and what is refused.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::slice::from_ref;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lockstep::config::{Layout, Loss};
use lockstep::data::corpus::Choices;
use lockstep::data::documents::Documents;
use lockstep::data::folder::{DataDir, Meta};
use lockstep::data::inputs::Aside;
use lockstep::data::loader::{Loader, Samples};
use lockstep::data::prepare::prepare;
use lockstep::data::shard::Shards;
use lockstep::data::wikitext::Source;
use lockstep::error::exit_code;
use lockstep::tokenizer::{Tokenizer, END_OF_TEXT};
use tch::{Device, Tensor};
use tempfile::TempDir;

use crate::common::{binary, finish, not_run};

/// What pyarrow wrote: see `make.py` beside the files.
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/text");
const GOLDEN_TEXTS: [&str; 3] = [
    "A river ran past the mill .\nNobody knew its name .\n",
    "Caf\u{e9} \u{65e5}\u{672c} \u{1f680}",
    "The last of them .",
];

/// A folder with texts and room for data folders.
struct Bench(TempDir);

impl Bench {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().into()
    }

    /// Prepares `names`; the data folder is `out`.
    fn prepare(&self, names: &[String], choices: &Choices) -> anyhow::Result<Meta> {
        self.prepare_with("gpt2", names, choices)
    }

    fn prepare_with(&self, tokenizer: &str, names: &[String], choices: &Choices) -> anyhow::Result<Meta> {
        prepare(&Source::parse(names, None, choices)?, choices, tokenizer, &self.path("out"))
    }

    /// The text of the three splits of `out`.
    fn texts(&self) -> [String; 3] {
        let data = DataDir::open(&self.path("out")).unwrap();
        let tokenizer = Tokenizer::from_file(&data.tokenizer).unwrap();
        [&data.train, &data.valid, &data.test].map(|shards| {
            let text = tokenizer.decode(&ids(shards).into_iter().map(|id| id as u32).collect::<Vec<_>>()).unwrap();
            String::from_utf8(text).unwrap()
        })
    }

    #[track_caller]
    fn refused(&self, names: &[String], choices: &Choices, code: u8, parts: &[&str]) {
        let error = self.prepare(names, choices).expect_err("an error");
        let text = format!("{error:#}");
        assert_eq!(exit_code(&error), code, "{text}");
        for part in parts {
            assert!(text.contains(part), "{part:?} in {text:?}");
        }
        assert!(!self.path("out").exists() && !self.path("out.lockstep-partial").exists());
    }
}

fn ids(shards: &Shards) -> Vec<i64> {
    let mut ids = Vec::new();
    shards.tokens(0..shards.n_tokens(), &mut ids).unwrap();
    ids
}

/// Half for validation, of documents that end visibly.
fn halves() -> Choices {
    Choices { valid: vec![Aside::Share(0.5)], document_ends: true, ..Choices::default() }
}

fn share(valid: f64) -> Choices {
    Choices { valid: vec![Aside::Share(valid)], ..Choices::default() }
}

/// The documents of texts that end visibly.
fn documents(texts: &[String]) -> Vec<&str> {
    texts.iter().flat_map(|text| text.split_terminator(END_OF_TEXT)).collect()
}

fn gzip(text: &str) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(text.as_bytes()).unwrap();
    packed.finish().unwrap()
}

fn zstd(text: &str) -> Vec<u8> {
    zstd::encode_all(text.as_bytes(), 1).unwrap()
}

#[test]
fn a_compressed_text_gives_the_same_bytes_as_the_text() {
    let bench = Bench::new();
    let text: String = (0..2000).map(|line| format!("line {line} of the book\n")).collect();
    // Compressed files may consist of several parts.
    let (first, rest) = text.split_at(1005);
    let files = [
        bench.write("book.txt", &text),
        bench.write("book.txt.gz", [gzip(first), gzip(rest)].concat()),
        bench.write("packed.txt.zst", [zstd(first), zstd(rest)].concat()),
    ];
    let made = files.map(|file| {
        bench.prepare(&[file], &Choices { test: vec![Aside::Share(0.1)], ..share(0.2) }).unwrap();
        assert_eq!(bench.texts().concat(), text);
        ["train.bin", "valid.bin", "test.bin"].map(|name| fs::read(bench.path("out").join(name)).unwrap())
    });
    assert!(made[0] == made[1] && made[1] == made[2]);
    let cut = bench.write("cut.txt.gz", &gzip(&text)[..500]);
    let fresh = Bench::new();
    fresh.refused(&[cut], &share(0.2), 3, &["cannot read ", "cut.txt.gz"]);
}

#[test]
fn files_of_every_kind_become_documents() {
    let bench = Bench::new();
    let lines = |name: &str| {
        format!("{{\"id\": 1, \"text\": \"{name} \\u00e9\\nmore\", \"more\": [1]}}\n\n{{\"text\": \"\"}}\n")
    };
    bench.write("in/a.txt", "text a\n");
    bench.write("in/deep/b.txt.gz", gzip("text b"));
    bench.write("in/c.txt.zst", zstd("text c\n"));
    bench.write("in/d.jsonl", lines("d"));
    bench.write("in/e.jsonl.gz", gzip(&lines("e")));
    bench.write("in/f.jsonl.zst", zstd(&lines("f")));
    fs::copy(format!("{GOLDEN}/snappy.parquet"), bench.path("in/g.parquet")).unwrap();
    // Neither is read.
    bench.write("in/notes.pdf", "x");
    bench.write("in/.hidden.txt", "x");
    let folder = bench.path("in").to_str().unwrap().to_owned();
    let meta = bench.prepare(from_ref(&folder), &halves()).unwrap();
    let texts = bench.texts();
    let found: BTreeSet<&str> = documents(&texts).into_iter().collect();
    let mut expected =
        BTreeSet::from(["text a\n", "text b", "text c\n", "d \u{e9}\nmore", "e \u{e9}\nmore", "f \u{e9}\nmore"]);
    expected.extend(GOLDEN_TEXTS);
    assert_eq!(found, expected);
    assert_eq!(documents(&texts[1..2]).len(), 4);
    let bytes: usize = expected.iter().map(|text| text.len()).sum();
    assert_eq!((meta.train.bytes + meta.valid.bytes) as usize, bytes);
    assert_eq!(meta.source, folder);

    // Without visible ends, none runs into the next; named one by one or by a pattern, they are the same.
    let names =
        ["in/a.txt", "in/deep/b.txt.gz", "in/c.txt.zst"].map(|name| bench.path(name).to_str().unwrap().to_owned());
    bench.prepare(&names, &share(0.3)).unwrap();
    let listed = bench.texts();
    let found: BTreeSet<&str> = listed.iter().flat_map(|text| text.split_inclusive('\n')).collect();
    assert_eq!(found, BTreeSet::from(["text a\n", "text b\n", "text c\n"]));
    let patterns = [format!("{folder}/[ac].txt*"), format!("{folder}/*/*.gz")];
    bench.prepare(&patterns, &share(0.3)).unwrap();
    let found: BTreeSet<String> =
        bench.texts().iter().flat_map(|text| text.split_inclusive('\n')).map(String::from).collect();
    assert_eq!(found.len(), 3);
}

#[test]
fn parquet_is_read_as_pyarrow_wrote_it() {
    for compression in ["none", "snappy", "gzip", "zstd", "lz4"] {
        let bench = Bench::new();
        let file = format!("{GOLDEN}/{compression}.parquet");
        bench.prepare(from_ref(&file), &halves()).unwrap();
        let texts = bench.texts();
        let found: BTreeSet<&str> = documents(&texts).into_iter().collect();
        assert_eq!(found, BTreeSet::from(GOLDEN_TEXTS), "{compression}");
        let titles = Choices { text_field: Some("title".into()), ..halves() };
        bench.prepare(from_ref(&file), &titles).unwrap();
        let texts = bench.texts();
        assert_eq!(documents(&texts).len(), 5);
        assert!(documents(&texts).iter().all(|title| title.starts_with("Title ")));

        let bench = Bench::new();
        for wrong in ["none", "id", "tags", "tags.list.element"] {
            let choices = Choices { text_field: Some(wrong.into()), ..halves() };
            let expected = format!("expected a column \"{wrong}\" of texts");
            bench.refused(from_ref(&file), &choices, 3, &[&expected, "text (BYTE_ARRAY)", "--text-field"]);
        }
    }
}

#[test]
fn a_damaged_parquet_file_is_refused_or_read_and_nothing_worse() {
    let bench = Bench::new();
    let whole = fs::read(format!("{GOLDEN}/snappy.parquet")).unwrap();
    let try_it = |bytes: &[u8]| {
        let file = bench.write("x.parquet", bytes);
        match bench.prepare(&[file], &halves()) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(exit_code(&error), 3, "{error:#}");
                assert!(format!("{error:#}").contains("x.parquet"), "{error:#}");
                false
            }
        }
    };
    assert!(try_it(&whole));
    for length in (0..whole.len()).step_by(97) {
        assert!(!try_it(&whole[..length]), "{length}");
    }
    for at in (0..whole.len()).step_by(41) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        try_it(&bytes);
    }
}

#[test]
fn a_record_without_text_is_named_by_its_line() {
    let bench = Bench::new();
    let good = "{\"text\": \"a b\"}\n";
    for (line, part) in [
        (
            "{\"body\": \"x\", \"id\": 7}",
            "line 3: expected an object with a text in \"text\", found body, id; name the field",
        ),
        ("{\"text\": 7}", "line 3: expected an object with a text in \"text\", found 7 there"),
        ("{\"text\": \"a", "EOF while parsing a string"),
        ("{\"text\": \"\\ud800\"}", "line 3"),
        ("[1]", "line 3"),
        ("{\"text\": \"a\"} {}", "line 3"),
    ] {
        let file = bench.write("x.jsonl", format!("{good}\n{line}\n{good}"));
        bench.refused(&[file], &halves(), 3, &["x.jsonl, line 3", part]);
    }
    let file = bench.write("x.jsonl", [good.as_bytes(), b"{\"text\": \"\xe9\"}\n"].concat());
    bench.refused(&[file], &halves(), 3, &["x.jsonl", "expected UTF-8", "byte offset 26"]);
    // Another field, and null for a document that is missing.
    let file = bench.write("x.jsonl", "{\"body\": \"a b\"}\n{\"body\": null}\n{\"body\": \"c\"}");
    bench.prepare(&[file], &Choices { text_field: Some("body".into()), ..halves() }).unwrap();
    assert_eq!(documents(&bench.texts()).into_iter().collect::<BTreeSet<_>>(), BTreeSet::from(["a b", "c"]));
}

#[test]
fn documents_are_split_and_each_is_in_one_split() {
    let bench = Bench::new();
    let poem = |n: usize| format!("poem {n}\nits second line {n}\n\n \n");
    let text: String = (0..400).map(poem).collect();
    let file = bench.write("poems.txt", &text);
    for (unit, count) in [(Documents::BlankLine, 400), (Documents::Line, 1600)] {
        let choices =
            Choices { test: vec![Aside::Share(0.1)], documents: Some(unit), document_ends: true, ..share(0.05) };
        bench.prepare(from_ref(&file), &choices).unwrap();
        let texts = bench.texts();
        let [train, valid, test] = texts.each_ref().map(|text| documents(from_ref(text)).len());
        assert_eq!(train + valid + test, count);
        assert!(valid.abs_diff(count / 20) <= 1 && test.abs_diff(count / 10) <= 1, "{valid} {test}");
        if unit == Documents::BlankLine {
            let all: BTreeSet<String> = documents(&texts).into_iter().map(String::from).collect();
            assert_eq!(all, (0..400).map(poem).collect());
        }
        // Asked again, the same.
        bench.prepare(from_ref(&file), &choices).unwrap();
        assert_eq!(bench.texts(), texts);
    }
    // A folder that has its splits keeps them; its documents may end visibly, too.
    for split in ["train", "valid", "test"] {
        bench.write(&format!("splits/{split}.txt"), format!("{split} a\n\n{split} b\n"));
    }
    let choices = Choices { documents: Some(Documents::BlankLine), document_ends: true, ..Choices::default() };
    bench.prepare(&[bench.path("splits").to_str().unwrap().into()], &choices).unwrap();
    assert_eq!(bench.texts()[1], format!("valid a\n\n{END_OF_TEXT}valid b\n{END_OF_TEXT}"));
}

#[test]
fn splits_may_be_files_of_their_own() {
    let bench = Bench::new();
    let [train, valid, test] =
        ["train", "valid", "test"].map(|name| bench.write(&format!("my-{name}.txt"), format!("{name}\n")));
    let named = |names: &[&String]| names.iter().map(|name| Aside::Named(name.to_string())).collect::<Vec<_>>();
    let choices = Choices { valid: named(&[&valid]), test: named(&[&test]), ..Choices::default() };
    bench.prepare(from_ref(&train), &choices).unwrap();
    assert_eq!(bench.texts(), ["train\n", "valid\n", "test\n"].map(String::from));
    // A share of the documents beside a file.
    let lines = bench.write("lines.txt", "a b\n".repeat(100));
    let choices = Choices {
        valid: named(&[&valid]),
        test: vec![Aside::Share(0.1)],
        documents: Some(Documents::Line),
        ..Choices::default()
    };
    let meta = bench.prepare(&[lines], &choices).unwrap();
    assert_eq!((meta.train.lines, meta.valid.lines, meta.test.lines), (90, 1, 10));

    let fresh = Bench::new();
    let twice = "expected each file once, so that no document is in two splits";
    let link = fresh.path("link.txt");
    std::os::unix::fs::symlink(&train, &link).unwrap();
    for twin in [&train, &link.to_str().unwrap().to_owned()] {
        let choices = Choices { valid: named(&[twin]), ..Choices::default() };
        fresh.refused(from_ref(&train), &choices, 2, &["--valid ", "the same file as --source", twice]);
    }
    fresh.refused(&[train.clone(), train.clone()], &share(0.5), 2, &[twice]);
    let both = Choices { valid: vec![Aside::Share(0.1), Aside::Named(valid.clone())], ..Choices::default() };
    fresh.refused(from_ref(&train), &both, 2, &["--valid: expected one percentage, or files, found both"]);
    let much = Choices { test: vec![Aside::Share(0.5)], ..share(0.5) };
    fresh.refused(from_ref(&train), &much, 2, &["leave nothing to train on"]);
    fresh.refused(
        from_ref(&train),
        &Choices::default(),
        2,
        &["my-train.txt: nothing is set aside for validation", "--valid 5%"],
    );
    let empty = fresh.write("empty.txt", "");
    fresh.refused(from_ref(&empty), &share(0.5), 3, &["empty.txt", "not a single word"]);
    fresh.refused(from_ref(&train), &Choices { valid: named(&[&empty]), ..Choices::default() }, 3, &["empty.txt"]);
    let record = Choices { documents: Some(Documents::Record), ..share(0.5) };
    fresh.refused(from_ref(&train), &record, 2, &["my-train.txt has no records"]);
    let parquet = format!("{GOLDEN}/none.parquet");
    let line = Choices { documents: Some(Documents::Line), ..share(0.5) };
    fresh.refused(&[parquet], &line, 2, &["--documents: expected record"]);
    let field = Choices { text_field: Some("x".into()), ..share(0.5) };
    fresh.refused(from_ref(&train), &field, 2, &["--text-field: expected a .jsonl or .parquet file"]);
    fresh.refused(&["sample".into()], &record, 2, &["--valid and --test split a file; sample"]);
    let few = Choices { documents: Some(Documents::File), ..share(0.01) };
    fresh.refused(&[train], &few, 3, &["not a single word is left for the valid split", "--valid"]);
}

/// As numpy's `tofile` writes it.
fn bin(ids: &[u16]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

/// llm.c's header for so many ids.
fn header(magic: u32, version: u32, count: u32) -> Vec<u8> {
    let mut header = vec![0; 1024];
    for (at, number) in [magic, version, count].into_iter().enumerate() {
        header[4 * at..4 * at + 4].copy_from_slice(&number.to_le_bytes());
    }
    header
}

#[test]
fn ids_of_other_trainers_are_taken_as_they_are() {
    let bench = Bench::new();
    let gpt2 = Tokenizer::gpt2().unwrap();
    let end = gpt2.end_of_text() as u16;
    let story = |n: usize| format!("Story {n} caf\u{e9}.\nIts second line\n\nand its end");
    // nanoGPT puts the end of text after each document, llm.c before it.
    let nano: Vec<u16> = (0..40)
        .flat_map(|n| gpt2.encode(&story(n)).into_iter().map(|id| id as u16).chain([end]).collect::<Vec<_>>())
        .collect();
    let llm: Vec<u16> = [&[end], &nano[..nano.len() - 1]].concat();
    let plain = bench.write("train.bin", bin(&nano));
    let headed = bench.write("headed.bin", [header(20_240_520, 1, llm.len() as u32), bin(&llm)].concat());
    let wide = |ids: &[u16]| ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>();

    let valid = [Aside::Named(headed.clone())].into();
    let meta = bench.prepare(from_ref(&plain), &Choices { valid, ..Choices::default() }).unwrap();
    let data = DataDir::open(&bench.path("out")).unwrap();
    assert_eq!((ids(&data.train), ids(&data.valid)), (wide(&nano), wide(&llm)));
    let text: String = (0..40).map(story).collect();
    assert_eq!(meta.train.bytes, text.len() as u64);
    assert_eq!(meta.train.words, 40 * story(0).split_whitespace().count() as u64);
    // A line ends with a token that ends in a newline, or with the document.
    assert_eq!(meta.train.lines, 40 * 4);

    // Split by documents.
    bench.prepare(from_ref(&plain), &share(0.25)).unwrap();
    let texts = bench.texts();
    assert_eq!(texts.each_ref().map(|text| documents(from_ref(text)).len()), [30, 10, 0]);
    assert_eq!(documents(&texts).into_iter().map(String::from).collect::<BTreeSet<_>>(), (0..40).map(story).collect());

    let fresh = Bench::new();
    let error = fresh.prepare_with("bpe:300", &[plain], &share(0.25)).unwrap_err();
    assert_eq!(exit_code(&error), 2);
    assert!(error.to_string().contains("no text to train a tokenizer on"), "{error}");
    let mut wrong = nano.repeat(3);
    wrong[1001] = 50_257;
    for (name, bytes, parts) in [
        ("beyond", bin(&wrong), &["expected ids below 50257", "found 50257 at byte offset 2002"][..]),
        ("headed", [header(20_240_520, 1, 1500), bin(&wrong[..1500])].concat(), &["found 50257 at byte offset 3026"]),
        ("odd", vec![1; 2047], &["GPT-2's ids", "an odd number of bytes, 2047"]),
        (
            "short",
            [header(20_240_520, 1, 99), bin(&nano[..98])].concat(),
            &["expected a file of 1222 bytes", "found 1220"],
        ),
        (
            "newer",
            [header(20_240_520, 2, 9), bin(&nano[..9])].concat(),
            &["expected version 1 of llm.c's files, found 2"],
        ),
        ("llama", header(20_240_801, 7, 0), &["llm.c's ids for Llama 3"]),
        ("own", fs::read(bench.path("out/train.bin")).unwrap(), &["`lockstep prepare` has made already"]),
    ] {
        let file = fresh.write(&format!("{name}.bin"), bytes);
        fresh.refused(&[file], &share(0.25), 3, &[&[&format!("{name}.bin")[..]], parts].concat());
    }
}

#[test]
fn a_split_in_several_shards_is_the_same_split() {
    let bench = Bench::new();
    let text: String = (0..3000).map(|n| format!("line {n} {}\n", "word ".repeat(n % 9))).collect();
    let file = bench.write("book.txt", &text);
    let open = || DataDir::open(&bench.path("out")).unwrap();
    let loader = |data: DataDir, layout| Loader {
        samples: Samples::for_training(data.train, layout, 7).unwrap(),
        seed: 1,
        batch_size: 900,
        micro_batch: 900,
        loss: Loss::TokenMean,
        padding: 0,
        rank: 0,
        world_size: 1,
    };
    let read = |layout| {
        let loader = loader(open(), layout);
        let global: Vec<usize> = (0..3).flat_map(|step| loader.global_batch(step)).collect();
        let batch = loader.samples.batch(&global, 0, Device::Cpu, |_| 1.0).unwrap();
        Vec::<i64>::try_from(Tensor::stack(&[batch.inputs, batch.targets], 0).reshape([-1])).unwrap()
    };
    let one = bench.prepare(from_ref(&file), &share(0.1)).unwrap();
    let expected = (ids(&open().train), [Layout::Packed, Layout::Paragraphs].map(read));
    assert!(one.train.shards.is_empty());

    let small = Choices { shard_bytes: 20_000, ..share(0.1) };
    let several = bench.prepare(&[file], &small).unwrap();
    assert!(several.train.shards.len() > 3 && several.valid.shards.is_empty(), "{several:?}");
    assert_eq!(
        (one.train.tokens, one.train.lines, one.train.words),
        (several.train.tokens, several.train.lines, several.train.words)
    );
    let out = bench.path("out");
    for entry in &several.train.shards {
        assert!(fs::metadata(out.join(&entry.file)).unwrap().len() <= 20_000, "{}", entry.file);
    }
    assert!(out.join("train-00000.bin").is_file() && !out.join("train.bin").exists());
    assert!(expected == (ids(&open().train), [Layout::Packed, Layout::Paragraphs].map(read)));

    // The index holds each shard to its place, and names what is wrong.
    let refused = |parts: &[&str]| {
        let error = DataDir::open(&out).expect_err("an error");
        assert_eq!(exit_code(&error), 3);
        assert!(parts.iter().all(|part| error.to_string().contains(part)), "{error}");
    };
    let [a, b, spare] = ["train-00001.bin", "train-00002.bin", "spare"].map(|name| out.join(name));
    for (from, to) in [(&a, &spare), (&b, &a), (&spare, &b)] {
        fs::rename(from, to).unwrap();
    }
    refused(&["train-00001.bin", "as meta.json says", "lockstep prepare"]);
    for (from, to) in [(&a, &spare), (&b, &a), (&spare, &b)] {
        fs::rename(from, to).unwrap();
    }
    open();
    fs::rename(&b, &spare).unwrap();
    refused(&["train-00002.bin", "lockstep prepare"]);
    fs::rename(&spare, &b).unwrap();
    let meta = fs::read_to_string(out.join("meta.json")).unwrap();
    fs::write(out.join("meta.json"), meta.replace("train-00001.bin", "../train-00001.bin")).unwrap();
    refused(&["shards named train-00000.bin", "\"../train-00001.bin\""]);
}

#[test]
fn a_folder_of_several_shards_is_replaced_whole() {
    let bench = Bench::new();
    let file = bench.write("book.txt", "some words on a line\n".repeat(3000));
    bench.prepare(from_ref(&file), &Choices { shard_bytes: 10_000, ..share(0.1) }).unwrap();
    bench.prepare(&[file], &share(0.1)).unwrap();
    let mut names: Vec<_> = fs::read_dir(bench.path("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["meta.json", "test.bin", "tokenizer.json", "train.bin", "valid.bin"]);
}

/// A small file that holds gigabytes of text, as many parts that are alike.
fn endless(bench: &Bench) -> String {
    let part = zstd(&"Some words on a line , and more of them .\n".repeat(400_000));
    bench.write("endless.txt.zst", part.repeat(400))
}

fn command(bench: &Bench, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("prepare").args(arguments).current_dir(bench.0.path()).stdin(Stdio::null());
    command
}

#[test]
fn interrupted_it_leaves_nothing() {
    let bench = Bench::new();
    endless(&bench);
    bench.write("few.txt", "a b\n");
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let arguments = ["--source", "endless.txt.zst", "--valid", "few.txt", "--tokenizer", "gpt2", "--out", "out"];
        let mut child = command(&bench, &arguments).stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        let has_begun =
            || fs::metadata(bench.path("out.lockstep-partial/train.bin.tmp")).is_ok_and(|file| file.len() > 0);
        while !has_begun() {
            assert!(begun.elapsed() < Duration::from_secs(300) && child.try_wait().unwrap().is_none());
            sleep(Duration::from_millis(5));
        }
        assert!(Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(code));
        let left: BTreeSet<_> = fs::read_dir(bench.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, BTreeSet::from(["endless.txt.zst".into(), "few.txt".into()]));
    }
    // Asked again, it starts over.
    let arguments =
        ["--source", "few.txt", "--documents", "line", "--valid", "few.txt", "--tokenizer", "gpt2", "--out", "out"];
    finish(command(&bench, &arguments)).fails(2, &["the same file"]);
    bench.write("more.txt", "c d\n");
    finish(command(&bench, &["--source", "more.txt", "--valid", "few.txt", "--tokenizer", "gpt2", "--out", "out"]))
        .ok();
    assert_eq!(bench.texts(), ["c d\n", "a b\n", ""].map(String::from));
}

#[test]
fn the_command_line_takes_files_patterns_and_percentages() {
    let bench = Bench::new();
    for n in 0..10 {
        bench.write(&format!("in/{n}.txt"), format!("text {n}\n"));
    }
    let rest = ["--tokenizer", "gpt2", "--out", "out"];
    let run = |arguments: &[&str]| finish(command(&bench, &[arguments, &rest].concat()));
    run(&["--source", "in/*.txt", "--valid", "10%", "--test", "10%"]).ok();
    let quoted = bench.texts();
    run(&["--source", "in/0.txt", "in/1.txt", "in/2.txt", "--valid", "in/3.txt", "in/4.txt", "--document-ends"]).ok();
    let texts = bench.texts();
    assert_eq!(quoted.each_ref().map(|text| text.lines().count()), [8, 1, 1]);
    assert_eq!(texts[1], format!("text 3\n{END_OF_TEXT}text 4\n{END_OF_TEXT}"));
    let refused = |arguments: &[&str], parts: &[&str]| drop(run(arguments).fails(2, parts));
    refused(&["--source", "in", "--valid", "0%"], &["a percentage above 0% and below 100%"]);
    refused(&["--source", "in", "--valid", "x%"], &["a percentage above 0% and below 100%"]);
    refused(&["--source", "in", "--valid", "5"], &["--valid 5: expected a percentage, for example 5%, or files"]);
    refused(&["--source", "in/*.pdf", "--valid", "5%"], &["--source in/*.pdf", ".parquet", "there is none"]);
    fs::create_dir(bench.path("empty")).unwrap();
    refused(
        &["--source", "empty", "--valid", "5%"],
        &["--source empty: expected files that end with .txt", "there is none"],
    );
    refused(&["--source", "in", "--valid", "5%", "--url", "http://x"], &["--url http://x", "leave --url out"]);
    refused(&["--source", "wikitext-3", "--valid", "5%"], &["wikitext-3", "wikitext-103-raw", "no such file"]);
}

#[test]
fn a_terminal_shows_the_rate_and_the_time_left() {
    let bench = Bench::new();
    bench.write("few.txt", "a b\n");
    bench.write("book.txt", "Some words on a line , and more of them .\n".repeat(400_000));
    let arguments = ["--source", "book.txt", "--valid", "few.txt", "--tokenizer", "gpt2", "--out", "out"];
    let said = finish(command(&bench, &arguments)).ok();
    assert!(!said.stderr.contains("MB/s") && !said.stderr.contains('\r'), "{}", said.stderr);
    let Ok(there) = Command::new("script").arg("--version").output() else { return not_run("there is no `script`") };
    assert!(there.status.success());
    let mut terminal = Command::new("script");
    let inner = format!("stty cols 120; {} prepare {}", binary(), arguments.join(" "));
    terminal.args(["-qec", &inner, "/dev/null"]).env("TERM", "xterm").current_dir(bench.0.path()).stdin(Stdio::null());
    let said = finish(terminal).ok();
    assert!(said.stdout.contains("MB/s") && said.stdout.contains("left"), "{}", said.stdout);
}
