//! Damage and traps in a run's files: every truncation of small files, bits flipped anywhere, links to elsewhere.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use lockstep::data::folder::DataDir;
use lockstep::data::shard::Shard;
use lockstep::files::hex;
use lockstep::random::mix;
use lockstep::run::checkpoint;
use lockstep::run::{Best, RunDir};
use lockstep::tokenizer::Tokenizer;
use sha2::{Digest, Sha256};

use crate::common::{snapshot, Workspace};

const NEWEST: &str = "run/checkpoints/step-00000012";
const FILES: [&str; 4] = ["MANIFEST.json", "state.json", "model.safetensors", "optimizer.safetensors"];
const PASSED_OVER: &str = "passing over a checkpoint";

/// Asserts that the newest checkpoint is refused, naming the damaged file, and that the previous one is used.
#[track_caller]
fn falls_back(work: &Workspace, name: &str, what: &str) {
    let error = checkpoint::verify(&work.path(NEWEST)).expect_err(what).to_string();
    // A changed manifest may blame another file.
    assert!(error.contains(NEWEST) && (name == FILES[0] || error.contains(name)), "{what}: {error}");
    let taken = checkpoint::latest(&work.path("run/checkpoints")).unwrap().unwrap();
    assert!(taken.ends_with("step-00000008"), "{what}: {}", taken.display());
}

/// Checks every truncation of a file that removes more than its final newline.
fn beginnings(path: &Path, mut check: impl FnMut(&str)) {
    let whole = fs::read(path).unwrap();
    let needed = whole.trim_ascii_end().len();
    for length in 0..needed {
        fs::write(path, &whole[..length]).unwrap();
        check(&format!("{}, the first {length} of {needed} bytes", path.display()));
    }
    fs::write(path, whole).unwrap();
}

#[test]
fn every_truncation_of_each_small_file_is_caught() {
    let work = Workspace::new();
    work.trained("run");
    for name in &FILES[..2] {
        beginnings(&work.path(NEWEST).join(name), |what| falls_back(&work, name, what));
    }
    let run = RunDir(work.path("run"));
    beginnings(&run.config(), |what| assert!(run.load_config().is_err(), "{what}"));
    beginnings(&run.tokenizer(), |what| assert!(Tokenizer::from_file(&run.tokenizer()).is_err(), "{what}"));
    beginnings(&run.best(), |what| {
        assert!(serde_json::from_slice::<Best>(&fs::read(run.best()).unwrap()).is_err(), "{what}");
    });
    let data = work.own_data("mine");
    beginnings(&data.join("meta.json"), |what| assert!(DataDir::open(&data).is_err(), "{what}"));

    // The same through the binary, for one file each.
    let config = fs::read_to_string(run.config()).unwrap();
    fs::write(run.config(), &config[..config.find("fault:").unwrap()]).unwrap();
    for command in ["eval --run-dir run", "train --config tiny.yaml --run-dir run"] {
        work.lockstep(command).fails(4, &["run/config.yaml is cut short", "remove it"]);
    }
    fs::write(run.config(), config).unwrap();
    fs::write(work.path(NEWEST).join("state.json"), "{").unwrap();
    let said = work.train("run", "").ok();
    said.says(&[PASSED_OVER, "step-00000012/state.json", "resuming from run/checkpoints/step-00000008"]);
}

#[test]
fn a_thousand_flipped_bits_of_a_checkpoint_are_caught() {
    let work = Workspace::new();
    work.trained("run");
    for flip in 0..1000 {
        let name = FILES[flip as usize % FILES.len()];
        let path = work.path(NEWEST).join(name);
        let whole = fs::read(&path).unwrap();
        let bit = mix(flip, 1) as usize % (whole.len() * 8);
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, bytes).unwrap();
        let what = format!("{name}, bit {bit}");
        falls_back(&work, name, &what);
        if flip % 250 < 4 {
            work.lockstep("checkpoint verify --run-dir run")
                .fails(4, &["1 of 3 checkpoints are damaged", "step-00000012"]);
            let said = work.lockstep("generate --run-dir run --checkpoint latest --prompt A --tokens 1").ok();
            said.says(&[PASSED_OVER, "step-00000012"]);
        }
        fs::write(&path, whole).unwrap();
    }
    work.lockstep("checkpoint verify --run-dir run").ok();
}

#[test]
fn a_thousand_flipped_bits_of_a_shard_are_caught() {
    let work = Workspace::new();
    let path = work.own_data("mine").join("train.bin");
    let whole = fs::read(&path).unwrap();
    let flipped = work.path("flipped.bin");
    for flip in 0..1000 {
        // Half of the flips are in the header, which is small.
        let bytes = if flip % 2 == 0 { 128 } else { whole.len() };
        let bit = mix(flip, 2) as usize % (bytes * 8);
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let _ = fs::remove_file(&flipped);
        fs::write(&flipped, bytes).unwrap();
        let error = Shard::open(&flipped).expect_err(&format!("bit {bit}")).to_string();
        assert!(error.contains("flipped.bin") && error.contains("expected"), "bit {bit}: {error}");
    }
}

/// The names in a manifest have no checksum. Under ZeRO-1 one flipped bit turns a rank's file name into another rank's.
#[test]
fn every_flipped_bit_of_a_manifest_of_two_ranks_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("MANIFEST.json");
    let names = [
        "model.safetensors",
        "optimizer.rank-0000-of-0002.safetensors",
        "optimizer.rank-0001-of-0002.safetensors",
        "state.json",
    ];
    let entries: Vec<String> = names
        .iter()
        .map(|name| {
            fs::write(folder.path().join(name), name).unwrap();
            let sha256 = hex(&Sha256::digest(name));
            format!("    {name:?}: {{\n      \"size\": {},\n      \"sha256\": {sha256:?}\n    }}", name.len())
        })
        .collect();
    let whole =
        format!("{{\n  \"format_version\": 1,\n  \"files\": {{\n{}\n  }}\n}}\n", entries.join(",\n")).into_bytes();
    fs::write(&path, &whole).unwrap();
    checkpoint::verify(folder.path()).unwrap();
    // The last byte is only a newline.
    for bit in 0..(whole.len() - 1) * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bytes).unwrap();
        assert!(checkpoint::verify(folder.path()).is_err(), "bit {bit}: {}", String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn nothing_is_written_through_links_in_a_run_directory() {
    let work = Workspace::new();
    let outside = work.path("outside");
    fs::create_dir_all(outside.join("folder")).unwrap();
    fs::write(outside.join("folder/step-00000006.txt"), "a text").unwrap();
    fs::write(outside.join("file"), "a file").unwrap();
    let before = snapshot(&outside);
    let plant = |name: &str, to: &str| {
        let path = work.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(outside.join(to), path).unwrap();
    };
    // Links to an existing file and, in another run, to one that a write would create.
    for (run, to) in [("one", "file"), ("two", "new")] {
        let files = ["train.csv", "eval.csv", "best.json", "restarts.json", "config.yaml", "tokenizer.json"];
        for file in files.into_iter().chain(["samples/step-00000006.txt"]) {
            plant(&format!("{run}/{file}.tmp"), to);
            if run == "two" {
                plant(&format!("{run}/{file}"), to);
            }
        }
        plant(&format!("{run}/logs/rank-0000.log"), to);
        plant(&format!("{run}/checkpoints/step-00000004.tmp"), "folder");
        plant(&format!("{run}/checkpoints/step-00000008"), "folder");
        plant(&format!("{run}/checkpoints/step-00000012"), to);
        work.train(run, "").ok();
        work.lockstep(&format!("checkpoint verify --run-dir {run}")).ok();
        assert_eq!(snapshot(&outside), before, "{run}");
    }
    // A log that is a link to a file with the right content: rows would be appended to that file.
    let row_of = |run: &str| fs::read(work.path(run).join("train.csv")).unwrap();
    fs::write(outside.join("train.csv"), row_of("one")).unwrap();
    fs::remove_file(work.path("one/train.csv")).unwrap();
    plant("one/train.csv", "train.csv");
    let before = snapshot(&outside);
    work.train("one", "--set train.steps=14").ok();
    assert_eq!(snapshot(&outside), before);
    assert!(row_of("one").len() > before["train.csv"].len());

    for folder in ["samples", "checkpoints", "logs"] {
        plant(&format!("three-{folder}/{folder}"), "folder");
        let said = work.train(&format!("three-{folder}"), "");
        said.fails(4, &[&format!("three-{folder}/{folder} is a link"), "link the whole run directory instead"]);
        assert_eq!(snapshot(&outside), before, "{folder}");
    }
    // A link to the whole run directory is the user's own choice.
    fs::create_dir(work.path("disk")).unwrap();
    symlink(work.path("disk"), work.path("four")).unwrap();
    work.train("four", "").ok();
}
