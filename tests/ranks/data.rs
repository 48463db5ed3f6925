//! Data that changes while ranks read it.

use std::fs::{self, File};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::runs::Run;
use crate::common::{copy_folder, sample};

/// Steps of milliseconds, and no end in sight.
const CONFIG: &str = "device: cpu\ndata: {block_size: 32, batch_size: 8}\nmodel: {n_layer: 1, n_head: 1, n_embd: 16}\n\
    train: {steps: 1000000, eval_every: 0, save_every: 0}\n";

#[test]
fn a_shard_that_is_cut_under_a_run_ends_it_with_3_and_is_named() {
    for ranks in [1, 2] {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        copy_folder(&sample(), &data);
        let run = Run::new(folder.path(), "run", CONFIG, ranks);
        let stderr = folder.path().join("stderr");
        let mut command = run.command(&["--set", &format!("data.dir={}", data.display())]);
        let mut child = command.stderr(File::create(&stderr).unwrap()).spawn().unwrap();
        let begun = Instant::now();
        while fs::read_to_string(run.dir.join("train.csv")).unwrap_or_default().lines().count() < 3 {
            assert!(child.try_wait().unwrap().is_none(), "{}", fs::read_to_string(&stderr).unwrap());
            assert!(begun.elapsed() < Duration::from_secs(300), "no step");
            sleep(Duration::from_millis(10));
        }
        File::options().write(true).open(data.join("train.bin")).unwrap().set_len(1000).unwrap();
        let code = child.wait().unwrap().code();
        let said = fs::read_to_string(&stderr).unwrap();
        assert_eq!(code, Some(3), "{said}");
        let logs: Vec<String> = (0..ranks)
            .map(|rank| fs::read_to_string(run.dir.join(format!("logs/rank-{rank:04}.log"))).unwrap())
            .collect();
        // One rank may be ended by the other's error before it reads again.
        for text in [said, logs.concat()] {
            assert!(
                text.contains("data/train.bin: expected ") && text.contains("found 1000: the file was cut"),
                "{text}"
            );
        }
    }
}
