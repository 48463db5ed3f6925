//! Runs that are killed again and again end bit for bit like one that was not.

use crate::common::alike::assert_alike;
use crate::common::runs::{last_step, Run, NO_END, VARIED};
use crate::common::sample;
use lockstep::data::shard::Shard;

fn killed_and_resumed(ranks: usize) {
    let folder = tempfile::tempdir().unwrap();
    let config = VARIED.replace("MICRO", &(16 / ranks).to_string());
    let epoch = Shard::open(&sample().join("train.bin")).unwrap().n_tokens() / 32 / 32;
    assert!((80..105).contains(&epoch), "an epoch of {epoch} steps does not end amid the kills");
    let broken = Run::new(folder.path(), "broken", &config, ranks);
    // Inside an epoch, at an evaluation, a sample and a save, and past an epoch's end.
    for step in [3, 14, 18, 24, 27, 40, 56, 77, 110] {
        broken.kill_at(step, &NO_END);
    }
    let steps = format!("train.steps={}", last_step(&broken.dir) + 10);
    let straight = Run::new(folder.path(), "straight", &config, ranks);
    for run in [&broken, &straight] {
        assert!(run.start(&[&NO_END[..2], &["--set", &steps]].concat()).success());
    }
    assert_alike(&broken.dir, &straight.dir);
}

#[test]
fn one_rank_killed_and_resumed() {
    killed_and_resumed(1);
}

#[test]
#[cfg(feature = "mpi")]
fn two_ranks_killed_and_resumed() {
    killed_and_resumed(2);
}
