//! README.md keeps its word: each command in it is run, in order, in a folder that looks like a clone; its tables of
//! keys, presets and columns are those of the program.
//!
//! Commands for a cluster stand in blocks of another kind; `tests/test_slurm.py` runs their like on one.
//!
//! To be fast and to need no network, a command is run with these substitutions:
//! - `--source wikitext-2` becomes the folder that LOCKSTEP_WIKITEXT2 names, where it is set, and any other corpus the
//!   sample's;
//! - `--set train.steps=N` becomes 4 steps, and a `train` without it does 2.

use std::fs;
use std::path::Path;

use lockstep::compare::CompareRow;
use lockstep::config::{Config, PRESETS};
use lockstep::run::tables::{header, EvalRow, RankRow, TrainRow};

/// Commands that are not run: how they begin, and why.
#[cfg(feature = "mpi")]
const NOT_RUN: [(&str, &str); 4] = [
    ("launch/quickstart", "it builds, and trains for minutes"),
    ("launch/test", "it runs this test"),
    ("target/release/lockstep train --config configs/gpt2-124m.yaml", "it wants a GPU"),
    ("target/release/lockstep compare", "it wants a GPU"),
];

/// What the commands must leave behind.
#[cfg(feature = "mpi")]
const LEFT: [&str; 8] = [
    "data/wikitext-2/meta.json",
    "data/wikitext-103-raw-gpt2/meta.json",
    "runs/wikitext2/checkpoints/step-00000004/model.safetensors",
    "runs/wikitext2/logs/rank-0001.log",
    "runs/wikitext2/plots/loss.png",
    "runs/homework/plots/ppl.png",
    "runs/four-ranks/logs/rank-0003.log",
    "runs/comparison/ppl.png",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

/// The rows of all tables whose head begins with `head`: their cells, without backticks.
fn table(head: &str) -> Vec<Vec<String>> {
    let readme = readme();
    let start = readme.find(&format!("| {head} |")).unwrap_or_else(|| panic!("no table of {head}"));
    let rows = readme[start..].lines().skip(2).take_while(|line| line.starts_with('|'));
    let cells = |row: &str| row.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect();
    rows.map(cells).collect()
}

fn first_cells(head: &str) -> Vec<String> {
    table(head).into_iter().map(|mut row| row.swap_remove(0)).collect()
}

#[cfg(feature = "mpi")]
#[test]
fn every_command_runs() {
    use std::os::unix::fs::symlink;

    let readme = readme();
    let blocks = readme.split("\n```sh\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    let commands: Vec<&str> = blocks.flat_map(str::lines).collect();
    assert!(commands.len() > 10, "{} commands", commands.len());

    let clone = tempfile::tempdir().unwrap();
    for name in ["analysis", "configs", "launch", ".venv"] {
        let place = root().join(name);
        assert!(place.exists(), "{name} is not there; run launch/setup");
        symlink(place, clone.path().join(name)).unwrap();
    }
    let binary = env!("CARGO_BIN_EXE_lockstep");
    fs::create_dir_all(clone.path().join("target/release")).unwrap();
    symlink(binary, clone.path().join("target/release/lockstep")).unwrap();

    for command in commands {
        let program = clone.path().join(command.split(' ').next().unwrap());
        if NOT_RUN.iter().any(|(beginning, _)| command.starts_with(beginning)) {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(&program).unwrap_or_else(|e| panic!("{command}: {e}")).permissions().mode();
            assert!(mode & 0o111 != 0, "{command} is not executable");
            continue;
        }
        let run = substituted(command);
        let start = std::time::Instant::now();
        let output = std::process::Command::new("timeout")
            .args(["--kill-after=5", "1200", "bash", "-euo", "pipefail", "-c", &run])
            .current_dir(&clone)
            .env("LOCKSTEP_BIN", binary)
            // Threads that wait would rob those of other processes on a machine with much to do.
            .env("OMP_WAIT_POLICY", "passive")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}\nrun as: {run}\n{}\n{said}", output.status);
        println!("{:5.1} s  {run}", start.elapsed().as_secs_f64());
    }
    for name in LEFT {
        assert!(clone.path().join(name).is_file(), "{name} was not left behind");
    }
}

#[cfg(feature = "mpi")]
fn substituted(command: &str) -> String {
    let sample = root().join("src/data/sample");
    let wikitext2 = std::env::var("LOCKSTEP_WIKITEXT2").map(|folder| fs::canonicalize(folder).unwrap());
    let mut run = command
        .replace("--source wikitext-2 ", &format!("--source '{}' ", wikitext2.as_ref().unwrap_or(&sample).display()))
        .replace("--source wikitext-103-raw ", &format!("--source '{}' ", sample.display()));
    assert!(!run.contains("--source wikitext"), "{command}: this test downloads nothing, tell it what to read");
    if let Some((before, after)) = run.split_once("train.steps=") {
        run = format!("{before}train.steps=4{}", after.trim_start_matches(|c: char| c.is_ascii_digit()));
    } else if run.contains(" train ") {
        run += " --set train.steps=2";
    }
    run
}

#[test]
fn every_configuration_is_listed_and_legal() {
    let listed = first_cells("file");
    let mut names: Vec<String> = fs::read_dir(root().join("configs"))
        .unwrap()
        .map(|entry| format!("configs/{}", entry.unwrap().file_name().to_str().unwrap()))
        .collect();
    names.sort();
    for name in &names {
        for world_size in [1, 2, 4] {
            let config = Config::load(&root().join(name), &[]).unwrap();
            assert!(config.validate(world_size).is_ok(), "{name} with {world_size} ranks");
        }
    }
    let mut sorted = listed.clone();
    sorted.sort();
    assert_eq!(sorted, names);
}

#[test]
fn every_key_is_listed_with_its_default() {
    let default = Config::default();
    for row in table("key") {
        let given = Config::parse("", &[format!("{}={}", row[0], row[1])]);
        assert_eq!(given.unwrap_or_else(|e| panic!("{}: {e:#}", row[0])), default, "the default of {}", row[0]);
    }
    let mut keys = Vec::new();
    leaves(&serde_yaml::to_value(&default).unwrap(), "", &mut keys);
    // Left out of a configuration's text while they have no value.
    keys.extend(["preset", "n_layer", "n_head", "n_embd"].map(|key| format!("model.{key}")));
    let mut listed = first_cells("key");
    keys.sort();
    listed.sort();
    assert_eq!(listed, keys);
}

fn leaves(value: &serde_yaml::Value, prefix: &str, found: &mut Vec<String>) {
    match value.as_mapping() {
        Some(map) => {
            for (key, inner) in map {
                let dot = if prefix.is_empty() { "" } else { "." };
                leaves(inner, &format!("{prefix}{dot}{}", key.as_str().unwrap()), found);
            }
        }
        None => found.push(prefix.to_owned()),
    }
}

#[test]
fn presets_and_columns_are_the_programs() {
    let presets = PRESETS.map(|(name, layers, heads, width)| {
        vec![name.to_owned(), layers.to_string(), heads.to_string(), width.to_string()]
    });
    assert_eq!(table("preset"), presets);
    assert_eq!(first_cells("train.csv").join(","), header::<TrainRow>());
    assert_eq!(first_cells("eval.csv").join(","), header::<EvalRow>());
    assert_eq!(first_cells("ranks.csv").join(","), header::<RankRow>());
    assert_eq!(first_cells("compare.csv").join(","), header::<CompareRow>());
}
