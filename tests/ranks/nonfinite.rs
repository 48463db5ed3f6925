//! A loss that is not finite on one rank is named, with its samples. No rank's weights change. It can be skipped.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::runs::Run;
use crate::common::{rows, sample};
use lockstep::data::shard::Shard;
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

const CONFIG: &str = "seed: 3\ndata: {layout: packed, block_size: 16, batch_size: 32}\n\
    model: {n_layer: 1, n_head: 2, n_embd: 16, tied_head: false}\ntrain: {steps: 30, eval_every: 0, save_every: 0}\n";

/// A checkpoint whose embedding of one rare token is NaN, and that token. Every batch that contains it is bad, on the
/// rank that reads it.
fn poisoned(folder: &Path) -> (PathBuf, i64) {
    let run = Run::new(folder, "healthy", CONFIG, 1);
    assert!(run.start(&["--set", "train.steps=1"]).success());
    let shard = Shard::open(&sample().join("train.bin")).unwrap();
    let mut counts = vec![0; 512];
    // The 30 steps read only part of the epoch, so take a token that occurs now and then.
    tokens(&shard).iter().for_each(|&id| counts[id as usize] += 1);
    let token = counts.iter().position(|&count| (20..=40).contains(&count)).unwrap();

    let checkpoint = run.dir.join("checkpoints/step-00000001");
    let path = checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let start = {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let embedding = tensors.tensor("transformer.wte.weight").unwrap().data().as_ptr() as usize;
        embedding - bytes.as_ptr() as usize + token * 16 * 4
    };
    bytes[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let before: String = hex(&fs::read(&path).unwrap());
    fs::write(&path, &bytes).unwrap();
    let manifest = checkpoint.join("MANIFEST.json");
    let text = fs::read_to_string(&manifest).unwrap();
    assert!(text.contains(&before));
    fs::write(&manifest, text.replace(&before, &hex(&bytes))).unwrap();
    (checkpoint, token as i64)
}

fn tokens(shard: &Shard) -> Vec<i64> {
    let mut all = Vec::new();
    shard.tokens(0..shard.n_tokens(), &mut all).unwrap();
    all
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The samples in a line such as `... its samples: [3, 14] ...`.
fn samples(line: &str) -> Vec<usize> {
    let list = line.split_once("its samples: [").unwrap().1.split_once(']').unwrap().0;
    list.split(", ").map(|sample| sample.parse().unwrap()).collect()
}

#[test]
fn a_rank_whose_loss_is_not_finite_is_named_with_its_samples() {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, token) = poisoned(folder.path());
    let text = tokens(&Shard::open(&sample().join("train.bin")).unwrap());
    let run = Run::new(folder.path(), "stops", CONFIG, 2);
    let from = format!("train.init_from={}", checkpoint.display());
    let done = run.command(&["--set", &from]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(5), "{said}");

    let bad = |sample: usize| text[sample * 16..sample * 16 + 16].contains(&token);
    let mut named = Vec::new();
    for rank in 0..2 {
        if let Some(line) =
            said.lines().find(|line| line.contains(&format!(" rank {rank}: step ")) && line.contains("its samples"))
        {
            assert!(samples(line).into_iter().any(bad), "none of these has the token {token}: {line}");
            assert!(
                line.contains("its loss is NaN") && line.contains("first gradients that are not finite:"),
                "{line}"
            );
            named.push(rank);
        }
    }
    assert!(!named.is_empty(), "{said}");
    assert!(said.contains(&format!("because of ranks {named:?}; nothing was changed")), "{said}");
    assert!(rows(&run.dir.join("train.csv")).iter().all(|row| row["loss"] != "NaN"));
}

#[test]
fn bad_batches_are_skipped_where_that_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, token) = poisoned(folder.path());
    let from = format!("train.init_from={}", checkpoint.display());
    let mut ends = Vec::new();
    for (name, more) in [("skips", "optim.zero1=false"), ("skips-sharded", "optim.zero1=true")] {
        let run = Run::new(folder.path(), name, CONFIG, 2);
        let arguments = ["--set", &from, "--set", "fault.nonfinite=skip", "--set", more];
        let done = run.command(&arguments).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(0), "{said}");
        let steps = rows(&run.dir.join("train.csv"));
        assert_eq!(steps.len(), 30);
        let skipped = steps.iter().filter(|row| row["loss"] == "NaN").count();
        assert!((1..25).contains(&skipped), "{skipped} of 30 batches have the token {token}");
        assert_eq!(said.matches("the batch is skipped").count(), skipped, "{said}");

        let path = run.dir.join("checkpoints/step-00000030/model.safetensors");
        let bytes = fs::read(path).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            let bad = values.filter(|value| !value.is_finite()).count();
            assert_eq!(bad, usize::from(name == "transformer.wte.weight"), "{name}");
        }
        ends.push(bytes);
    }
    assert!(ends[0] == ends[1], "ZeRO-1 changes what is learnt");
}

#[test]
fn a_job_that_slurm_restarts_in_vain_comes_to_an_end() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path(), "vain", CONFIG, 1);
    let start = |job: &str, restarts: usize, lr: &str| {
        let mut command = run.command(&["--set", lr, "--set", "fault.max_restarts_without_progress=2"]);
        let done = command.env("SLURM_JOB_ID", job).env("SLURM_RESTART_COUNT", restarts.to_string()).output().unwrap();
        (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    // Each start fails at its second step, before any checkpoint.
    for restarts in 0..=2 {
        let (code, said) = start("71", restarts, "optim.lr=1e30");
        assert!(code == Some(5) && said.contains("the loss is"), "{restarts}: {said}");
    }
    let (code, said) = start("71", 3, "optim.lr=1e30");
    assert!(code == Some(4) && said.contains("started this job 3 times again after step 0"), "{said}");
    // A new submission may try again.
    let (code, said) = start("72", 0, "optim.lr=1e30");
    assert!(code == Some(5) && said.contains("the loss is"), "{said}");
}

#[test]
fn too_many_bad_batches_in_a_row_end_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path(), "hopeless", CONFIG, 1);
    let done = run.command(&["--set", "optim.lr=1e30", "--set", "fault.nonfinite=skip"]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(5), "{said}");
    assert!(said.contains("10 batches before it were skipped"), "{said}");
}
