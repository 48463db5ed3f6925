//! Who verifies the data, and data that changes while ranks read it.

use std::fs::{self, File};
use std::path::PathBuf;

use tempfile::TempDir;

use crate::common::runs::{last_step, Going, Run, ENDLESS};
use crate::common::{copy_folder, flip, sample};

/// A run on a copy of the sample's data folder.
struct Place {
    folder: TempDir,
    run: Run,
}

impl Place {
    fn new(ranks: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&sample(), &folder.path().join("data"));
        let run = Run::new(folder.path(), "run", ENDLESS, ranks);
        Self { folder, run }
    }

    fn shard(&self) -> PathBuf {
        self.folder.path().join("data/train.bin")
    }

    fn start(&self, more: &[&str]) -> Going<'_> {
        let data = format!("data.dir={}", self.folder.path().join("data").display());
        Going::start(&self.run, &[&["--set", &data], more].concat())
    }

    fn logs(&self) -> Vec<String> {
        let log = |rank| self.run.dir.join(format!("logs/rank-{rank:04}.log"));
        (0..self.run.ranks).map(|rank| fs::read_to_string(log(rank)).unwrap_or_default()).collect()
    }

    /// Runs a few steps, changes the shard, and asserts that the run ends with 3 and says this of it.
    fn disturbed(&self, change: impl FnOnce(&File), reason: &str) {
        let mut going = self.start(&[]);
        going.until("step 2", || (last_step(&self.run.dir) >= 2).then_some(()));
        change(&File::options().write(true).open(self.shard()).unwrap());
        let (code, said) = going.ends();
        assert_eq!(code, Some(3), "{said}");
        // The other rank's error may end a rank before it reads again.
        for text in [said, self.logs().concat()] {
            assert!(text.contains("data/train.bin: expected ") && text.contains(reason), "{text}");
        }
    }
}

#[test]
fn a_shard_that_is_cut_under_a_run_ends_it_with_3_and_is_named() {
    for ranks in [1, 2] {
        Place::new(ranks).disturbed(|shard| shard.set_len(1000).unwrap(), "found 1000: the file was cut");
    }
}

#[test]
fn a_shard_that_is_changed_under_a_run_ends_it_with_3_and_is_named() {
    for ranks in [1, 2] {
        // Ids beyond the vocabulary must not reach the model.
        let change = |shard: &File| std::os::unix::fs::FileExt::write_all_at(shard, &[0xff; 4096], 128).unwrap();
        Place::new(ranks).disturbed(change, "found it written to: the file was changed");
    }
}

#[test]
fn one_rank_of_a_node_verifies_the_data_for_all() {
    let place = Place::new(4);
    let mut going = place.start(&["-v"]);
    going.until("step 1", || (last_step(&place.run.dir) >= 1).then_some(()));
    let said = going.said();
    assert!(said.contains("rank 0 verifies ") && said.contains("for ranks [0, 1, 2, 3]"), "{said}");
    for (rank, log) in place.logs().iter().enumerate() {
        let expected = match rank {
            0 => "rank 0 has verified ".into(),
            _ => format!("rank {rank} has waited for the word of rank 0, which has verified "),
        };
        assert!(log.contains(&expected), "{log}");
    }
    drop(going);

    // Damage that only the checksum shows, found by one, ends all.
    let place = Place::new(4);
    flip(&place.shard(), 1001);
    let (code, said) = place.start(&[]).ends();
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("data/train.bin: checksum") && said.contains("lockstep prepare"), "{said}");
}
