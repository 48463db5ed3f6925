//! The same run in bf16, and on a GPU: where there is one, and said plainly where there is none.

use std::io::Write;

use crate::common::rows;
use crate::common::runs::Run;

const CONFIG: &str = "seed: 5\ndata: {layout: packed, block_size: 32, batch_size: 16, micro_batch: 8}\n\
    model: {preset: gpt-nano, tied_head: false}\noptim: {lr: 1.0e-3}\ntrain: {steps: 20, eval_every: 10, save_every: 0}\n";

fn losses(run: &Run, more: &[&str]) -> Vec<f64> {
    assert!(run.start(more).success(), "{}", run.dir.display());
    let numbers =
        |file: &str| -> Vec<f64> { rows(&run.dir.join(file)).iter().map(|row| row["loss"].parse().unwrap()).collect() };
    [numbers("train.csv"), numbers("eval.csv")].concat()
}

fn assert_near(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!((found.len(), expected.len()), (22, 22));
    for (place, (found, expected)) in found.iter().zip(expected).enumerate() {
        let distance = (found / expected - 1.0).abs();
        assert!(distance < tolerance, "number {place}: {found}, on the CPU in fp32 {expected}");
    }
}

#[test]
fn bf16_learns_what_fp32_learns() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| Run::new(folder.path(), name, CONFIG, 1);
    let expected = losses(&run("fp32"), &["--set", "device=cpu"]);
    let bf16 = losses(&run("bf16"), &["--set", "device=cpu", "--set", "precision=bf16"]);
    assert_near(&bf16, &expected, 0.02);
    assert_ne!(bf16, expected, "the precision had no effect");
}

#[test]
fn a_gpu_learns_what_a_cpu_learns() {
    if !lockstep::torch::has_driver() {
        // Past the capture of the test runner, so that nobody takes this for a check.
        let _ =
            writeln!(std::io::stderr(), "NOT RUN: a_gpu_learns_what_a_cpu_learns: this machine has no NVIDIA driver");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| Run::new(folder.path(), name, CONFIG, 1);
    let expected = losses(&run("cpu"), &["--set", "device=cpu"]);
    let fp32 = losses(&run("fp32"), &["--set", "device=cuda"]);
    let bf16 = losses(&run("bf16"), &["--set", "device=cuda", "--set", "precision=bf16"]);
    assert_near(&fp32, &expected, 1e-4);
    assert_near(&bf16, &expected, 0.02);
}
