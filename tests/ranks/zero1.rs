//! ZeRO-1 on two ranks; `full/zero1.rs` has more of them.

use std::fs;
use std::process::Stdio;

use crate::common::zero1::{assert_ways_alike, bucketed, optimizer_files};

#[test]
fn neither_overlap_nor_buckets_nor_zero1_change_a_bit() {
    assert_ways_alike(2);
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
