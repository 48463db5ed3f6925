//! Ways for the gradients that must not change what is learnt: buckets, overlap, and ZeRO-1's sharded optimizer state.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::alike::{assert_alike, assert_learnt_alike};
use crate::common::runs::Run;

/// 4.5 MiB of gradients, so that there are several buckets of 1 MiB, the last of them odd; dropout and accumulation.
const CONFIG: &str = "seed: 5\ndata: {layout: packed, block_size: 16, batch_size: 12, micro_batch: MICRO}\n\
    model: {n_layer: 5, n_head: 2, n_embd: 134, dropout: 0.1, tied_head: false}\n\
    optim: {lr: 1.0e-3, grad_clip: 0.5}\ntrain: {steps: 6, eval_every: 3, save_every: 3}\n\
    comm: {bucket_mib: 1}\n";

fn run(folder: &Path, name: &str, ranks: usize) -> Run {
    // Two micro-steps of each rank.
    Run::new(folder, name, &CONFIG.replace("MICRO", &(6 / ranks).to_string()), ranks)
}

/// The optimizer's files of a checkpoint, in order.
fn optimizer_files(run: &Run, step: usize) -> Vec<PathBuf> {
    let folder = run.dir.join(format!("checkpoints/step-{step:08}"));
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("optimizer"));
    files.sort();
    files
}

#[test]
fn neither_overlap_nor_buckets_nor_zero1_change_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    for ranks in [2, 3] {
        let plain = run(folder.path(), &format!("plain-{ranks}"), ranks);
        assert!(plain.start(&["--set", "comm.overlap=false", "--set", "comm.bucket_mib=64"]).success());
        let whole = optimizer_files(&plain, 6);
        assert_eq!(whole.len(), 1);
        let size = |path: &PathBuf| fs::metadata(path).unwrap().len();

        let overlapped = run(folder.path(), &format!("overlapped-{ranks}"), ranks);
        assert!(overlapped.start(&[]).success());
        assert_alike(&overlapped.dir, &plain.dir);

        for (name, more) in [("zero1", "comm.overlap=true"), ("zero1-later", "comm.overlap=false")] {
            let sharded = run(folder.path(), &format!("{name}-{ranks}"), ranks);
            assert!(sharded.start(&["--set", "optim.zero1=true", "--set", more]).success());
            assert_learnt_alike(&sharded.dir, &plain.dir);
            let parts = optimizer_files(&sharded, 6);
            let names: Vec<_> =
                parts.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
            let expected: Vec<String> =
                (0..ranks).map(|rank| format!("optimizer.rank-{rank:04}-of-{ranks:04}.safetensors")).collect();
            assert_eq!(names, expected);
            for part in &parts {
                // A unit of 16 KiB more for each bucket and moment, at most, and the header.
                let most = size(&whole[0]) / ranks as u64 + 5 * 2 * 16384 + 4096;
                assert!(size(part) < most, "{} has {} bytes of {}", part.display(), size(part), size(&whole[0]));
            }
        }
    }
}

#[test]
fn a_sharded_state_is_taken_up_by_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let sharded = run(folder.path(), "sharded", 3);
    assert!(sharded.start(&["--set", "optim.zero1=true", "--set", "train.steps=3"]).success());
    let whole = run(folder.path(), "whole", 3);
    assert!(whole.start(&["--set", "train.steps=3"]).success());
    assert_learnt_alike(&sharded.dir, &whole.dir);

    // Both states, written in three parts and in one, are the same state: whoever goes on from them learns the same.
    for (ranks, zero1) in [(1, "false"), (1, "true"), (2, "true"), (3, "true"), (2, "false")] {
        let setting = format!("optim.zero1={zero1}");
        let go_on = |from: &Run, name: &str| {
            let next = run(folder.path(), &format!("{name}-{ranks}-{zero1}"), ranks);
            fs::create_dir(&next.dir).unwrap();
            let copied = std::process::Command::new("cp").arg("-r").arg(from.dir.join(".")).arg(&next.dir).status();
            assert!(copied.unwrap().success());
            let allowed = ["--allow-config-change", "optim.zero1", "--allow-config-change", "data.micro_batch"];
            assert!(next.start(&[&allowed[..], &["--set", &setting]].concat()).success(), "{name}, {ranks} ranks");
            next
        };
        let found = go_on(&sharded, "from-parts");
        assert_learnt_alike(&found.dir, &go_on(&whole, "from-one").dir);
        assert_eq!(optimizer_files(&found, 6).len(), if zero1 == "true" { ranks } else { 1 });
    }
}

#[test]
fn a_lost_part_of_the_state_is_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let sharded = run(folder.path(), "sharded", 2);
    assert!(sharded.start(&["--set", "optim.zero1=true"]).success());
    fs::remove_file(&optimizer_files(&sharded, 6)[1]).unwrap();
    let output = sharded.command(&["--set", "optim.zero1=true", "--set", "train.steps=7"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("passing over a checkpoint") && text.contains("rank-0001-of-0002"), "{text}");
    assert!(text.contains("resuming from") && text.contains("after 3 steps"), "{text}");
}
