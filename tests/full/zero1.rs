//! ZeRO-1 on three ranks, and states that a different number of ranks resumes.

use crate::common::alike::assert_learnt_alike;
use crate::common::copy_folder;
use crate::common::runs::Run;
use crate::common::zero1::{assert_ways_alike, bucketed, optimizer_files};

#[test]
fn neither_overlap_nor_buckets_nor_zero1_change_a_bit_on_three_ranks() {
    assert_ways_alike(3);
}

#[test]
fn a_sharded_state_is_taken_up_by_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let sharded = bucketed(folder.path(), "sharded", 3);
    assert!(sharded.start(&["--set", "optim.zero1=true", "--set", "train.steps=3"]).success());
    let whole = bucketed(folder.path(), "whole", 3);
    assert!(whole.start(&["--set", "train.steps=3"]).success());
    assert_learnt_alike(&sharded.dir, &whole.dir);

    // Both states, one written in three parts and one in one, are equal: runs that go on from them learn the same.
    for (ranks, zero1) in [(1, "false"), (1, "true"), (2, "true"), (3, "true"), (2, "false")] {
        let setting = format!("optim.zero1={zero1}");
        let go_on = |from: &Run, name: &str| {
            let next = bucketed(folder.path(), &format!("{name}-{ranks}-{zero1}"), ranks);
            copy_folder(&from.dir, &next.dir);
            let allowed = ["--allow-config-change", "optim.zero1", "--allow-config-change", "data.micro_batch"];
            assert!(next.start(&[&allowed[..], &["--set", &setting]].concat()).success(), "{name}, {ranks} ranks");
            next
        };
        let found = go_on(&sharded, "from-parts");
        assert_learnt_alike(&found.dir, &go_on(&whole, "from-one").dir);
        assert_eq!(optimizer_files(&found, 6).len(), if zero1 == "true" { ranks } else { 1 });
    }
}
