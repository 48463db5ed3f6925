//! The memory that `train --dry-run` predicts is what runs take: its peak, whatever the machine's speed.

use std::fs;

use crate::common::{finish, numbers, Workspace};

/// Predicts and trains GPT-2's vocabulary under a preset; the last row's peak includes a checkpoint on its way.
fn predicts_within_15_percent(more: &str) {
    let work = Workspace::new();
    work.lockstep("prepare --source sample --tokenizer gpt2 --out gpt2").ok();
    fs::write(
        work.path("run.yaml"),
        "device: cpu\ndata: {dir: gpt2, block_size: 256, batch_size: 8}\ntrain: {steps: 4, eval_every: 0, save_every: 2}\n",
    )
    .unwrap();
    let run = |last: &str| {
        let line = format!("train --config run.yaml --run-dir run {more} {last}");
        let mut command = work.command(&line.split_whitespace().collect::<Vec<_>>());
        command.env("OMP_NUM_THREADS", "2");
        finish(command).ok().stdout
    };
    let said = run("--dry-run");
    let total = said.lines().find_map(|line| line.trim().strip_suffix("  in all")).unwrap();
    let predicted: f64 = total.trim().parse().unwrap();
    run("");
    let peak = *numbers(&work.path("run/train.csv"), "memory_mib").last().unwrap();
    assert!((predicted / peak - 1.0).abs() < 0.15, "{more}: predicted {predicted} MiB, took {peak} MiB\n{said}");
}

#[test]
fn memory_of_gpt_nano() {
    predicts_within_15_percent("--set model.preset=gpt-nano");
}

#[test]
fn memory_of_gpt_micro_and_gpt_mini() {
    predicts_within_15_percent("--set model.preset=gpt-micro");
    predicts_within_15_percent("--set model.preset=gpt-mini");
}
