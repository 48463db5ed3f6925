//! `train --dry-run` says what a run takes, and leaves no trace.

use std::fs;

use crate::common::{numbers, snapshot, Workspace};

#[test]
fn what_it_says_is_what_the_run_does() {
    let work = Workspace::new();
    let before: Vec<_> = snapshot(&work.path("")).into_keys().collect();
    let set = "--set train.tokens=2000 --set data.micro_batch=2 --set train.save_every=3 --set train.eval_every=0";
    let said = work.train("run", &format!("{set} --dry-run")).ok().stdout;
    assert_eq!(snapshot(&work.path("")).into_keys().collect::<Vec<_>>(), before);
    // 512 words and 32 positions of 32 channels; each block has two norms, and 12 C^2 + 13 C altogether.
    let (embeddings, block) = (544 * 32, 12 * 32 * 32 + 13 * 32);
    let parameters = embeddings + 2 * block + 2 * 32;
    for line in [
        format!("parameters  {parameters}, of which {embeddings} are embeddings\n"),
        "8 sequences a step: 1 x 4 x 2 (ranks, micro-steps, sequences of at most 32 tokens)\n".into(),
        "length      8 steps, 2.05 k tokens, ".into(),
        // Steps 3, 6 and 8.
        format!("B for a checkpoint, {:.2} MB for the 3 ", 36.0 * f64::from(parameters) / 1e6),
        "program and libraries\n".into(),
        "in all\n".into(),
    ] {
        assert!(said.contains(&line), "no {line:?} in {said}");
    }
    let flop = 6 * (parameters - embeddings + 512 * 32) + 12 * 2 * 32 * 32;
    assert!(said.contains(&format!("compute     {:.1} MFLOP a step", f64::from(flop * 256) / 1e6)), "{said}");
    work.train("run", set).ok();
    assert_eq!(numbers(&work.path("run/train.csv"), "tokens").last(), Some(&2048.0));
    let sizes = |name: &str| fs::metadata(work.path("run/checkpoints/step-00000008").join(name)).unwrap().len();
    let size = sizes("model.safetensors") + sizes("optimizer.safetensors");
    let counted = 12 * parameters as u64;
    assert!((counted..counted + 10_000).contains(&size), "{size} bytes, counted {counted}");
}

#[test]
fn a_gpu_that_is_not_here_can_be_planned_for_and_mistakes_are_found() {
    let work = Workspace::new();
    let mut command = work.command(&["train", "--config", "tiny.yaml", "--dry-run", "--set", "device=cuda"]);
    command.env("CUDA_VISIBLE_DEVICES", "");
    let said = crate::common::finish(command).ok().stdout;
    assert!(said.contains("GPU memory") && said.contains("this machine has no GPU to measure"), "{said}");
    work.train("run", "--dry-run --set data.dir=nowhere").fails(3, &["nowhere", "lockstep prepare"]);
    work.train("run", "--dry-run --set data.micro_batch=3").fails(2, &["data.micro_batch", "these do: 1, 2, 4, 8"]);
    assert!(!work.path("run").exists());
}
