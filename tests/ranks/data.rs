//! Data that changes while ranks read it.

use std::fs::{self, File};

use crate::common::runs::{last_step, Going, Run, ENDLESS};
use crate::common::{copy_folder, sample};

#[test]
fn a_shard_that_is_cut_under_a_run_ends_it_with_3_and_is_named() {
    for ranks in [1, 2] {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        copy_folder(&sample(), &data);
        let run = Run::new(folder.path(), "run", ENDLESS, ranks);
        let mut going = Going::start(&run, &["--set", &format!("data.dir={}", data.display())]);
        going.until("step 2", || (last_step(&run.dir) >= 2).then_some(()));
        File::options().write(true).open(data.join("train.bin")).unwrap().set_len(1000).unwrap();
        let (code, said) = going.ends();
        assert_eq!(code, Some(3), "{said}");
        let logs: Vec<String> = (0..ranks)
            .map(|rank| fs::read_to_string(run.dir.join(format!("logs/rank-{rank:04}.log"))).unwrap())
            .collect();
        // The other rank's error may end a rank before it reads again.
        for text in [said, logs.concat()] {
            assert!(
                text.contains("data/train.bin: expected ") && text.contains("found 1000: the file was cut"),
                "{text}"
            );
        }
    }
}
