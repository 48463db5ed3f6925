//! Ways to handle gradients that must not change what is learnt: buckets, overlap, ZeRO-1's sharded optimizer state.

use std::fs;
use std::path::{Path, PathBuf};

use super::alike::{assert_alike, assert_learnt_alike};
use super::runs::Run;

/// 4.5 MiB of gradients, which make several buckets of 1 MiB, the last of them odd.
const BUCKETS: &str = "seed: 5\ndata: {layout: packed, block_size: 16, batch_size: 12, micro_batch: MICRO}\n\
    model: {n_layer: 5, n_head: 2, n_embd: 134, dropout: 0.1, tied_head: false}\n\
    optim: {lr: 1.0e-3, grad_clip: 0.5}\ntrain: {steps: 6, eval_every: 3, save_every: 3}\n\
    comm: {bucket_mib: 1}\n";

/// A run whose gradients travel in several buckets, with dropout and accumulation.
pub fn bucketed(folder: &Path, name: &str, ranks: usize) -> Run {
    // Two micro-steps of each rank.
    Run::new(folder, name, &BUCKETS.replace("MICRO", &(6 / ranks).to_string()), ranks)
}

/// The optimizer's files of a checkpoint, in order.
pub fn optimizer_files(run: &Run, step: usize) -> Vec<PathBuf> {
    let folder = run.dir.join(format!("checkpoints/step-{step:08}"));
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("optimizer"));
    files.sort();
    files
}

/// Trains on `ranks` ranks with and without overlap, buckets and ZeRO-1, and asserts that all of them learn the same.
pub fn assert_ways_alike(ranks: usize) {
    let folder = tempfile::tempdir().unwrap();
    let plain = bucketed(folder.path(), &format!("plain-{ranks}"), ranks);
    assert!(plain.start(&["--set", "comm.overlap=false", "--set", "comm.bucket_mib=64"]).success());
    let whole = optimizer_files(&plain, 6);
    assert_eq!(whole.len(), 1);
    let size = |path: &PathBuf| fs::metadata(path).unwrap().len();

    let overlapped = bucketed(folder.path(), &format!("overlapped-{ranks}"), ranks);
    assert!(overlapped.start(&[]).success());
    assert_alike(&overlapped.dir, &plain.dir);

    for (name, more) in [("zero1", "comm.overlap=true"), ("zero1-later", "comm.overlap=false")] {
        let sharded = bucketed(folder.path(), &format!("{name}-{ranks}"), ranks);
        assert!(sharded.start(&["--set", "optim.zero1=true", "--set", more]).success());
        assert_learnt_alike(&sharded.dir, &plain.dir);
        let parts = optimizer_files(&sharded, 6);
        let names: Vec<_> = parts.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
        let expected: Vec<String> =
            (0..ranks).map(|rank| format!("optimizer.rank-{rank:04}-of-{ranks:04}.safetensors")).collect();
        assert_eq!(names, expected);
        for part in &parts {
            // At most a unit of 16 KiB more for each bucket and moment, and the header.
            let most = size(&whole[0]) / ranks as u64 + 5 * 2 * 16384 + 4096;
            assert!(size(part) < most, "{} has {} bytes of {}", part.display(), size(part), size(&whole[0]));
        }
    }
}
