//! Runs every command in the documents, in order, in a folder that looks like a clone. Git must ignore all that they
//! leave.
//!
//! Commands are in blocks marked `sh`. Those marked `bash` need a cluster, a GPU or hours; `tests/test_slurm.py` runs
//! similar ones on a cluster.
//!
//! To be fast and need no network, commands run with the substitutions of [`substituted`].

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::common::binary;
use crate::common::documents::{documents, root};

/// Commands that are not run: how they begin, and why they are left out.
const NOT_RUN: [(&str, &str); 5] = [
    ("launch/quickstart", "it builds, and trains for minutes"),
    ("launch/homework", "so does it; tests/test_launch.py runs a rehearsal"),
    ("launch/test", "it runs this test"),
    (".venv/bin/python analysis/scaling", "analysis/tests/test_documented.py runs it, on runs with more steps"),
    (".venv/bin/python analysis/bench", "analysis/tests/test_documented.py runs it, if PyTorch is whole here"),
];

/// What the commands must leave behind.
const LEFT: [&str; 9] = [
    "data/wikitext-2/meta.json",
    "data/wikitext-103-raw-gpt2/meta.json",
    "runs/wikitext2/checkpoints/step-00000004/model.safetensors",
    "runs/wikitext2/logs/rank-0000.log",
    "runs/wikitext2/plots/loss.png",
    "runs/four-ranks/logs/rank-0000.log",
    "runs/comparison/ppl.png",
    "runs/by-hours/step_time.svg",
    "runs/comparison/report.html",
];

/// The commands of all documents, each once.
fn commands() -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    for name in documents() {
        let text = fs::read_to_string(root().join(name)).unwrap();
        let blocks = text.split("\n```sh\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
        for line in blocks.flat_map(str::lines) {
            if !commands.iter().any(|command| command == line) {
                commands.push(line.into());
            }
        }
    }
    assert!(commands.len() > 20, "{} commands", commands.len());
    commands
}

#[test]
fn every_command_runs() {
    let clone = tempfile::tempdir().unwrap();
    // Copied, because git does not follow a link to it.
    fs::copy(root().join(".gitignore"), clone.path().join(".gitignore")).unwrap();
    for name in ["analysis", "configs", "launch", ".venv"] {
        let place = root().join(name);
        assert!(place.exists(), "{name} is not there; run launch/setup");
        symlink(place, clone.path().join(name)).unwrap();
    }
    fs::create_dir_all(clone.path().join("target/release")).unwrap();
    symlink(binary(), clone.path().join("target/release/lockstep")).unwrap();
    shell(clone.path(), "git init -q && git add -A").unwrap();
    // The quick start, which is not run, would leave it.
    let sample = "target/release/lockstep -q prepare --source sample --tokenizer bpe:800 --out data/sample";
    shell(clone.path(), sample).unwrap();

    for command in commands() {
        if NOT_RUN.iter().any(|(beginning, _)| command.starts_with(beginning)) {
            continue;
        }
        let run = substituted(&command);
        let start = Instant::now();
        shell(clone.path(), &run).unwrap_or_else(|e| panic!("{command}\nrun as: {run}\n{e}"));
        println!("{:5.1} s  {run}", start.elapsed().as_secs_f64());
    }
    for name in LEFT {
        assert!(clone.path().join(name).is_file(), "{name} was not left behind");
    }
    let left =
        shell(clone.path(), "git status --porcelain --untracked-files=all | { grep -v '^A ' || true; }").unwrap();
    assert_eq!(left, "", "git does not ignore what these commands leave");
}

/// What a command printed to standard output, or why it failed.
fn shell(folder: &Path, command: &str) -> Result<String, String> {
    let output = Command::new("timeout")
        .args(["--kill-after=5", "1200", "bash", "-euo", "pipefail", "-c", command])
        .current_dir(folder)
        .env("LOCKSTEP_BIN", binary())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(format!("{}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr))),
    }
}

/// Makes every corpus the sample, whose few words allow a small vocabulary only. A training has two steps, four if it gives
/// a number, or the epochs that it gives. There is no GPU: commands that need one are made small enough for the CPU.
fn substituted(command: &str) -> String {
    let sample = "--source sample ";
    let mut run = command
        .replace("--source wikitext-2 ", sample)
        .replace("--source wikitext-2-raw ", sample)
        .replace("--source wikitext-103-raw ", sample)
        .replace("bpe:8192", "bpe:800")
        .replace("--from downloads/gpt2", "--from exports/wikitext2")
        .replace("configs/finetune.yaml", "configs/finetune.yaml --set model.preset=gpt-micro --set data.block_size=64")
        .replace("--steps 50 --devices cpu,cuda", "--steps 2 --devices cpu")
        .replace(
            "configs/gpt2-124m.yaml",
            "configs/gpt2-124m.yaml --set model.preset=gpt-nano --set data.batch_size=2 --set data.micro_batch=1",
        );
    assert!(!run.contains("--source wikitext"), "{command}: this test downloads nothing, tell it what to read");
    if let Some((before, after)) = run.split_once("train.steps=") {
        run = format!("{before}train.steps=4{}", after.trim_start_matches(|c: char| c.is_ascii_digit()));
    } else if run.contains(" train ") && !run.contains("train.epochs=") {
        run += " --set train.steps=2";
    } else if run.contains(" checkpoint prove ") {
        run += " --steps 2";
    }
    run
}
