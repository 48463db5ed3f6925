//! The same run in bf16, and on a GPU, or a note that there is none; and the threads that compute.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use crate::common::runs::Run;
use crate::common::{binary, finish, not_run, rows, Workspace};

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
        // Bypasses the test runner's capture, so nobody mistakes this for a check.
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

/// Trains `tiny.yaml` with these variables; also returns what OpenMP read, start after start.
fn trained_with(work: &Workspace, run: &str, more: &str, variables: &[(&str, &str)]) -> (String, Vec<String>) {
    let arguments = format!("train --config tiny.yaml --run-dir {run} --set train.steps=2 {more}");
    train_and_ask(work.command(&arguments.split_whitespace().collect::<Vec<_>>()), variables)
}

fn train_and_ask(mut command: Command, variables: &[(&str, &str)]) -> (String, Vec<String>) {
    command.env("OMP_DISPLAY_ENV", "verbose").envs(variables.iter().copied());
    for name in ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"] {
        if !variables.iter().any(|(set, _)| *set == name) {
            command.env_remove(name);
        }
    }
    let said = finish(command).ok().stderr;
    let spins = said.lines().filter_map(|line| line.split_once("GOMP_SPINCOUNT = '"));
    let spins = spins.map(|(_, rest)| rest.trim_end_matches('\'').to_owned()).collect();
    (said, spins)
}

#[test]
fn threads_wait_for_a_bounded_time_unless_the_user_decides() {
    let work = Workspace::new();
    let (_, spins) = trained_with(&work, "plain", "", &[("OMP_NUM_THREADS", "2")]);
    assert_eq!(spins.last().map(String::as_str), Some("10000"), "{spins:?}");
    // The configuration works too.
    let (_, spins) = trained_with(&work, "key", "--set threads=2", &[]);
    assert_eq!(spins.last().map(String::as_str), Some("10000"), "{spins:?}");
    for (name, value) in [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "passive"), ("KMP_BLOCKTIME", "1")] {
        let (_, spins) = trained_with(&work, name, "", &[("OMP_NUM_THREADS", "2"), (name, value)]);
        assert!(spins.len() == 1 && spins[0] != "10000", "{name}: {spins:?}");
    }
    // A single thread never waits.
    let (_, spins) = trained_with(&work, "alone", "", &[]);
    assert_eq!(spins.len(), 1, "{spins:?}");
    // A launcher's rank need not start twice.
    let mut rank = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/rank"));
    rank.args(["train", "--config", "tiny.yaml", "--run-dir", "rank", "--set", "train.steps=2"]);
    rank.current_dir(work.path("")).env("LOCKSTEP_BIN", binary());
    let (_, spins) = train_and_ask(rank, &[("OMP_NUM_THREADS", "2")]);
    assert_eq!(spins, ["10000"]);
}

#[test]
fn more_threads_than_the_machine_can_use_are_not_started() {
    let work = Workspace::new();
    let cores: usize = std::thread::available_parallelism().unwrap().into();
    let many = [("OMP_NUM_THREADS", "999999"), ("RAYON_NUM_THREADS", "999999")];
    for (run, more, variables, source) in [
        ("variable", "", &many[..], "OMP_NUM_THREADS asks for 999999 threads"),
        ("key", "--set threads=1024", &many[1..], "threads asks for 1024 threads"),
    ] {
        if cores * 4 >= 1024 {
            return not_run("this machine has too many cores");
        }
        let (said, _) = trained_with(&work, run, more, variables);
        assert!(said.contains(source) && said.contains(&format!("{cores} cores")), "{said}");
        let state = fs::read_to_string(work.path(run).join("checkpoints/step-00000002/state.json")).unwrap();
        assert!(state.contains(&format!("\"threads\": {},", cores * 4)), "{state}");
    }
}

/// Root has no limit of processes, so the program runs as nobody.
#[test]
fn a_machine_without_a_thread_to_give_is_named() {
    let work = Workspace::new();
    let limited = |arguments: &str| {
        let mut command = Command::new("sh");
        let as_nobody = "exec setpriv --reuid 65534 --clear-groups bash -c 'ulimit -u 1; exec \"$0\" \"$@\"' \"$@\"";
        command.args(["-c", as_nobody, "sh", binary()]).args(arguments.split_whitespace());
        command.current_dir(work.path("")).env("OMP_NUM_THREADS", "2").env("GOMP_SPINCOUNT", "10000");
        finish(command)
    };
    let version = limited("--version");
    if version.code != 0 {
        return not_run(&format!("the program cannot be started as nobody: {}", version.stderr.trim()));
    }
    let parts = ["no more threads", "ulimit -u"];
    limited("prepare --source sample --tokenizer bpe:512 --out /dev/shm/never").fails(2, &parts);
    limited("train --config tiny.yaml --run-dir /dev/shm/never").fails(2, &parts);
}
