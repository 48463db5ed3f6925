//! Hostile files: valid files are changed at random. Their reader must not panic, hang, take more memory than the file
//! has bytes (times a small factor, plus a constant), or write anywhere.
//!
//! Each target runs for a few seconds. To run longer, or to repeat one input:
//!
//! ```text
//! LOCKSTEP_FUZZ_RUNS=1000000 cargo test --release --test fuzz -- --nocapture
//! LOCKSTEP_FUZZ_SEED=12345 LOCKSTEP_FUZZ_RUNS=1 cargo test --release --test fuzz shard
//! ```
//!
//! The changes do not know what code they reach (coverage needs a nightly compiler). So each target prints how many
//! inputs were accepted, and half of them get a corrected digest over the changed bytes, as from an attacker.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lockstep::config::{Activation, Config, Norm, Optim, Shape};
use lockstep::data::corpus::Choices;
use lockstep::data::folder::DataDir;
use lockstep::data::prepare::prepare;
use lockstep::data::shard::Shard;
use lockstep::data::wikitext::{Archive, Source};
use lockstep::files::hex;
use lockstep::model::Gpt;
use lockstep::optim::adamw::AdamW;
use lockstep::run::checkpoint::{self, Conditions, OptimizerFiles, Saving, State};
use lockstep::run::tables::{EvalRow, Table, TrainRow};
use lockstep::tokenizer::Tokenizer;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::ZipWriter;

#[path = "../common/mod.rs"]
mod common;
mod memory;
mod mutation;

use mutation::{fuzz, Limit};

/// Runs one target at a time, because the memory of the whole process is counted.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const SMALL: Shape = Shape {
    n_layer: 1,
    n_head: 1,
    n_embd: 8,
    block_size: 8,
    vocab_size: 20,
    dropout: 0.0,
    norm: Norm::Pre,
    activation: Activation::Gelu,
    tied_head: true,
    bias: true,
    recompute: false,
};

/// A checkpoint of a small model, and that model.
fn saved(folder: &Path) -> (PathBuf, Gpt) {
    let mut model = Gpt::new(SMALL, Device::Cpu, Kind::Float);
    model.initialize(1);
    let all = 0..model.parameters.numel();
    let optimizer = AdamW::new(&model.parameters, vec![all], &Optim::default());
    let conditions = Conditions {
        lockstep: "0.1.0".into(),
        libtorch: "2".into(),
        device: "cpu".into(),
        hardware: "a processor".into(),
        world_size: 1,
        threads: 1,
        micro_batch: 4,
    };
    let state =
        State { format_version: 1, step: 7, tokens: 99, elapsed_s: 1.5, data_sha256: hex(&[3; 32]), conditions };
    let saving = Saving::begin(folder, &state, &model.parameters, &optimizer, None).unwrap();
    (saving.publish(None, || Ok(())).unwrap(), model)
}

/// Asserts that no file but `changed` was created, removed or changed.
fn assert_untouched(folder: &Path, before: &BTreeMap<String, Vec<u8>>, changed: &str) {
    let mut after = common::snapshot(folder);
    after.remove(changed);
    assert!(&after == before, "files were written: {:?}", after.keys());
}

#[test]
fn shard() {
    let _alone = alone();
    let folder = common::in_memory();
    let path = folder.path().join("x.bin");
    let corpus: Vec<Vec<u8>> = [300, 70_000]
        .map(|vocab_size| {
            let mut writer = lockstep::data::shard::ShardWriter::create(&path, vocab_size, [7; 32]).unwrap();
            for line in [&[1, 2, 3][..], &[], &[4, 299], &[5; 40]] {
                writer.write_line(line, 2).unwrap();
            }
            writer.finish().unwrap();
            fs::read(&path).unwrap()
        })
        .into();
    let seal = |bytes: &mut Vec<u8>| {
        if bytes.len() >= 128 {
            let sum = Sha256::digest([&bytes[128..], &bytes[..72], &bytes[104..128]].concat());
            bytes[72..104].copy_from_slice(&sum);
        }
    };
    fuzz(&corpus, 5_000, &Limit { factor: 0, constant: 64 << 10 }, seal, |bytes| {
        fs::write(&path, bytes).unwrap();
        let Ok(shard) = Shard::open(&path) else { return false };
        let mut ids = Vec::new();
        let mut lines = Vec::new();
        shard.for_each_line(|line| lines.push(line)).unwrap();
        for line in lines.into_iter().filter(|line| line.len() < 1000) {
            ids.clear();
            shard.tokens(line, &mut ids).unwrap();
            assert!(ids.iter().all(|&id| (0..shard.vocab_size() as i64).contains(&id)));
        }
        true
    });
}

#[test]
fn safetensors() {
    let _alone = alone();
    let folder = common::in_memory();
    let (checkpoint, mut model) = saved(folder.path());
    let numel = model.parameters.numel();
    let names = ["model.safetensors", "optimizer.safetensors"];
    let corpus = names.map(|name| fs::read(checkpoint.join(name)).unwrap());
    // Corrects the header's length to its new value, so the changed header is read.
    let fit = |bytes: &mut Vec<u8>| {
        if let Some(end) = bytes.windows(2).rposition(|pair| pair == b"}}") {
            let length = (end + 2).saturating_sub(8) as u64;
            bytes.splice(..8, length.to_le_bytes());
        }
    };
    fuzz(&corpus, 5_000, &Limit { factor: 8, constant: 256 << 10 }, fit, |bytes| {
        for name in names {
            fs::write(checkpoint.join(name), bytes).unwrap();
        }
        let model = checkpoint::load_model(&checkpoint, &mut model.parameters).is_ok();
        let mut moment = Tensor::zeros([numel], (Kind::Float, Device::Cpu));
        let optimizer = OptimizerFiles::open(&checkpoint, numel).and_then(|files| {
            files.read("exp_avg", 0, &mut moment).and(files.read("exp_avg_sq", 3, &mut moment.slice(0, 3, 9, 1)))
        });
        model || optimizer.is_ok()
    });
}

/// The checkpoint's JSON files, changed one at a time.
fn json(name: &str, limit: &Limit) {
    let _alone = alone();
    let folder = common::in_memory();
    let (checkpoint, model) = saved(&folder.path().join("checkpoints"));
    fs::write(folder.path().join("outside"), "x").unwrap();
    let path = checkpoint.join(name);
    let corpus = [fs::read(&path).unwrap()];
    let changed = format!("checkpoints/step-00000007/{name}");
    let mut before = common::snapshot(folder.path());
    before.remove(&changed);
    let numel = model.parameters.numel();
    let escape = |bytes: &mut Vec<u8>| {
        let text = String::from_utf8_lossy(bytes).replacen("state.json", "../../outside", 1);
        *bytes = text.into();
    };
    fuzz(&corpus, 5_000, limit, escape, |bytes| {
        fs::write(&path, bytes).unwrap();
        let state = checkpoint::load_state(&checkpoint);
        let good = checkpoint::verify(&checkpoint).is_ok();
        assert_eq!(checkpoint::latest(&folder.path().join("checkpoints")).is_ok_and(|found| found.is_some()), good);
        let optimizer = OptimizerFiles::open(&checkpoint, numel);
        match name {
            "state.json" => state.is_ok(),
            _ => good && optimizer.is_ok(),
        }
    });
    assert_untouched(folder.path(), &before, &changed);
}

#[test]
fn manifest_json() {
    json("MANIFEST.json", &Limit { factor: 16, constant: 2 << 20 });
}

#[test]
fn state_json() {
    json("state.json", &Limit { factor: 16, constant: 2 << 20 });
}

/// A data folder of the embedded sample's validation split.
fn data_folder(folder: &Path) -> PathBuf {
    let text = folder.join("text");
    fs::create_dir(&text).unwrap();
    for split in ["train", "valid", "test"] {
        fs::write(text.join(format!("{split}.txt")), "A line of words.\nAnd one more line.\n".repeat(9)).unwrap();
    }
    prepare(&Source::Folder(text), &Choices::default(), "bpe:270", &folder.join("data")).unwrap();
    folder.join("data")
}

#[test]
fn tokenizer_json() {
    let _alone = alone();
    let folder = common::in_memory();
    let path = data_folder(folder.path()).join("tokenizer.json");
    let corpus = [fs::read(&path).unwrap()];
    fuzz(
        &corpus,
        4_000,
        // The encoder's table of words takes 3.5 MB, whatever the vocabulary.
        &Limit { factor: 40, constant: 6 << 20 },
        |_| {},
        |bytes| {
            fs::write(&path, bytes).unwrap();
            let Ok(tokenizer) = Tokenizer::from_file(&path) else { return false };
            let text = "A line of words, naïve ones \u{1f600} <|endoftext|>\nand \r\n more  lines\0";
            let ids = tokenizer.encode(text);
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size() && id != tokenizer.end_of_text()));
            assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
            fs::write(&path, tokenizer.to_json()).unwrap();
            assert_eq!(Tokenizer::from_file(&path).unwrap().digest(), tokenizer.digest());
            true
        },
    );
}

#[test]
fn meta_json() {
    let _alone = alone();
    let folder = common::in_memory();
    let data = data_folder(folder.path());
    let path = data.join("meta.json");
    let corpus = [fs::read(&path).unwrap()];
    fuzz(
        &corpus,
        4_000,
        &Limit { factor: 16, constant: 128 << 10 },
        |_| {},
        |bytes| {
            fs::write(&path, bytes).unwrap();
            DataDir::open(&data).is_ok()
        },
    );
}

#[test]
fn config_yaml() {
    let _alone = alone();
    let folder = common::in_memory();
    let path = folder.path().join("x.yaml");
    let whole = Config::parse("model: {preset: gpt-nano}", &[]).unwrap().to_yaml().unwrap();
    let bomb = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n";
    let corpus =
        [common::TINY, &whole, bomb, "optim: {lr: 3e-4, betas: [.9, .95]}\n"].map(|text| text.as_bytes().to_vec());
    fuzz(
        &corpus,
        5_000,
        &Limit { factor: 0, constant: 32 << 20 },
        |_| {},
        |bytes| {
            fs::write(&path, bytes).unwrap();
            let overrides = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).replacen(':', "=", 1);
            let _ = Config::parse("", &[overrides]);
            let Ok(config) = Config::load(&path, &[]) else { return false };
            let yaml = config.to_yaml().unwrap();
            assert_eq!(Config::parse(&yaml, &[]).unwrap().to_yaml().unwrap(), yaml);
            (1..4).filter(|&ranks| config.clone().validate(ranks).is_ok()).count() > 0
        },
    );
}

#[test]
fn archive() {
    let _alone = alone();
    let folder = common::in_memory();
    let downloads = folder.path().join("out.download");
    fs::create_dir(&downloads).unwrap();
    let path = downloads.join("wikitext-2.zip");
    let text = "A line of words.\nAnd one more line.\n".repeat(20);
    let corpus = ["wikitext-2/", "../wikitext-2/", "/etc/", "C:\\wikitext-2\\"].map(|place| {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for split in ["train", "valid", "test"] {
            zip.start_file("wikitext-2/wiki.".to_owned() + split + ".tokens", SimpleFileOptions::default()).unwrap();
            zip.write_all(text.as_bytes()).unwrap();
        }
        zip.start_file(place.to_owned() + "more", SimpleFileOptions::default()).unwrap();
        if place == "/etc/" {
            zip.add_symlink("wikitext-2/link", "/etc/passwd", SimpleFileOptions::default()).unwrap();
        }
        zip.finish().unwrap().into_inner()
    });
    fuzz(
        &corpus,
        4_000,
        &Limit { factor: 16, constant: 1 << 20 },
        |_| {},
        |bytes| {
            fs::write(&path, bytes).unwrap();
            let sha256 = hex(&Sha256::digest(bytes));
            let archive = Archive { name: "wikitext-2".into(), url: "http://127.0.0.1:9/".into(), sha256 };
            let corpus = Source::Published(archive).corpus(&Choices::default(), &downloads);
            let read = corpus.is_ok_and(|corpus| corpus.for_each_text("read", |_| Ok(())).is_ok());
            let there: Vec<_> = fs::read_dir(folder.path()).unwrap().chain(fs::read_dir(&downloads).unwrap()).collect();
            assert_eq!(there.len(), 2);
            read
        },
    );
}

/// An archive of a few thousand bytes that unpack to one line of a gigabyte: reading it must not exhaust memory.
#[test]
fn archive_of_one_endless_line() {
    let _alone = alone();
    let folder = common::in_memory();
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for split in ["train", "valid", "test"] {
        zip.start_file(format!("wikitext-2/wiki.{split}.tokens"), SimpleFileOptions::default()).unwrap();
        for _ in 0..300 {
            zip.write_all(&[b'x'; 1 << 20]).unwrap();
        }
    }
    let bytes = zip.finish().unwrap().into_inner();
    fs::write(folder.path().join("wikitext-2.zip"), &bytes).unwrap();
    let sha256 = hex(&Sha256::digest(&bytes));
    let archive = Archive { name: "wikitext-2".into(), url: "http://127.0.0.1:9/".into(), sha256 };
    let (error, peak) = memory::peak(|| {
        let corpus = Source::Published(archive).corpus(&Choices::default(), folder.path()).unwrap();
        corpus.for_each_text("read", |_| Ok(())).unwrap_err().to_string()
    });
    assert!(error.contains("a line has more than"), "{error}");
    assert!(peak < 256 << 20, "{peak} bytes");
}

#[test]
fn csv_repair() {
    let _alone = alone();
    let folder = common::in_memory();
    let path = folder.path().join("train.csv");
    let numbers = "64,6.2,510.1,0.0005,1.5,10,1,7,1,1,5000,,120.5,1,0.3";
    let (mut train, _) = Table::open::<TrainRow>(&path, 0).unwrap();
    for step in 1..=6 {
        let cells = format!("{step},{numbers}");
        let record = csv::StringRecord::from(cells.split(',').collect::<Vec<_>>());
        train.append(&record.deserialize::<TrainRow>(None).unwrap()).unwrap();
    }
    let evaluated = "step,split,loss,ppl,word_ppl,tokens,eval_s,bits_per_byte\n4,valid,6.1,445.8,,900,0.1,2.5\n\
        8,valid,5.5,244.7,,900,0.1,2.25\n";
    let corpus = [fs::read(&path).unwrap(), evaluated.into()];
    fuzz(
        &corpus,
        4_000,
        &Limit { factor: 16, constant: 128 << 10 },
        |_| {},
        |bytes| {
            let mut taken = false;
            fs::write(&path, bytes).unwrap();
            if let Ok((_, rows)) = Table::open::<TrainRow>(&path, 4) {
                let kept = fs::read(&path).unwrap();
                assert!(kept.ends_with(b"\n") && rows.iter().all(|row| row.step <= 4));
                assert_eq!(Table::rows::<TrainRow>(&path).unwrap().len(), rows.len());
                taken = true;
            } else {
                assert_eq!(fs::read(&path).unwrap(), bytes, "what cannot be repaired stays");
            }
            fs::write(&path, bytes).unwrap();
            if let Ok((_, rows)) = Table::open::<EvalRow>(&path, 4) {
                assert_eq!(Table::rows::<EvalRow>(&path).unwrap().len(), rows.len());
                taken = true;
            }
            taken
        },
    );
}
