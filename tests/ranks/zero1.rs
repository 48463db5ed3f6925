//! ZeRO-1 on two ranks; `full/zero1.rs` has more of them.

use std::fs;

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
