//! Whether two runs did the same, bit for bit. All tests that compare runs use this.

use std::collections::BTreeMap;
use std::path::Path;

use super::{rows, snapshot};

/// The columns of each log that do not depend on time.
const CURVES: [(&str, &[&str]); 2] = [
    ("train.csv", &["step", "tokens", "loss", "ppl", "lr", "grad_norm", "world_size"]),
    ("eval.csv", &["step", "split", "loss", "ppl", "word_ppl", "tokens"]),
];

/// Asserts that two runs have learnt the same: the rows of their logs, the best step, and the last checkpoint's tensors.
/// The optimizer's are left out if the runs cut them into different files.
#[track_caller]
pub fn assert_learnt_alike(found: &Path, expected: &Path) {
    for (log, names) in CURVES {
        let [found, expected] = [found, expected].map(|run| columns(&run.join(log), names));
        assert_eq!(found, expected, "{log}: {names:?}");
    }
    let [mut found, mut expected] = [found, expected].map(|run| {
        let mut files = outcome(run);
        let last =
            files.keys().filter_map(|name| name.split_once("/step-")?.1.split_once('/')).map(|step| step.0).max();
        let last = format!("checkpoints/step-{}/", last.expect("a run without a checkpoint"));
        files.retain(|name, _| name.starts_with(&last) || name == "best.json");
        files
    });
    if found.keys().ne(expected.keys()) {
        for files in [&mut found, &mut expected] {
            files.retain(|name, _| !name.contains("/optimizer."));
        }
    }
    assert_equal(&found, &expected);
}

/// Asserts that two runs differ only in times: as [`assert_learnt_alike`], but also every checkpoint and sample.
#[track_caller]
pub fn assert_alike(found: &Path, expected: &Path) {
    assert_learnt_alike(found, expected);
    assert_equal(&outcome(found), &outcome(expected));
}

/// The files of a run that do not depend on time.
fn outcome(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = snapshot(run);
    files.retain(|name, _| name == "best.json" || name.starts_with("samples/") || name.ends_with(".safetensors"));
    files
}

#[track_caller]
fn assert_equal(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, bytes) in expected {
        assert!(&found[name] == bytes, "{name} differs");
    }
}

/// Some columns of a log, row by row.
pub fn columns(log: &Path, names: &[&str]) -> Vec<Vec<String>> {
    rows(log).iter().map(|row| names.iter().map(|&name| row[name].clone()).collect()).collect()
}
