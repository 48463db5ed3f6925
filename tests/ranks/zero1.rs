//! ZeRO-1 on two ranks; `full/zero1.rs` has more of them.

use std::fs;
use std::process::Stdio;

use crate::common::alike::assert_learnt_alike;
use crate::common::runs::Run;
use crate::common::zero1::{assert_ways_alike, bucketed, optimizer_files};

#[test]
fn neither_overlap_nor_buckets_nor_zero1_change_a_bit() {
    assert_ways_alike(2);
}

/// In bf16 a step hands round only the copy that is computed with.
#[test]
fn in_bf16_the_fp32_weights_are_whole_where_they_are_saved_and_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["--set", "precision=bf16", "--set", "train.sample_every=4"];
    let [plain, sharded] = ["false", "true"].map(|zero1| {
        let run = bucketed(folder.path(), zero1, 2);
        let zero1 = format!("optim.zero1={zero1}");
        assert!(run.start(&[&settings[..], &["--set", &zero1]].concat()).success());
        run
    });
    assert_learnt_alike(&sharded.dir, &plain.dir);
    // No sample is made at this save's step, which would have made them whole for it.
    for file in ["samples/step-00000004.txt", "checkpoints/step-00000003/model.safetensors"] {
        let read = |run: &Run| fs::read(run.dir.join(file)).unwrap();
        assert!(read(&sharded) == read(&plain), "{file} differs");
    }
}

#[test]
fn a_lost_part_of_the_state_is_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let sharded = bucketed(folder.path(), "sharded", 2);
    assert!(sharded.start(&["--set", "optim.zero1=true"]).success());
    fs::remove_file(&optimizer_files(&sharded, 6)[1]).unwrap();
    let output = sharded.command(&["--set", "optim.zero1=true", "--set", "train.steps=7"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("passing over a checkpoint") && text.contains("rank-0001-of-0002"), "{text}");
    assert!(text.contains("resuming from") && text.contains("after 3 steps"), "{text}");
}

#[test]
fn a_dry_run_counts_each_ranks_part_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let run = bucketed(folder.path(), "planned", 2);
    let moments = |zero1: &str| -> f64 {
        let mut command = run.command(&["--dry-run", "--set", zero1]);
        let output = command.stdout(Stdio::piped()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(text.matches("12 sequences a step: 2 x 2 x 3 (ranks, micro-steps, sequences").count(), 1, "{text}");
        text.lines().find_map(|line| line.strip_suffix("  moments")).unwrap().trim().parse().unwrap()
    };
    let (whole, part) = (moments("optim.zero1=false"), moments("optim.zero1=true"));
    // Rank 0 has at most a unit of 16 KiB more than half of each bucket and moment.
    assert!((whole / 2.0 - 0.1..whole / 2.0 + 0.3).contains(&part), "{part} of {whole} MiB");
    assert!(!run.dir.exists());
}
