//! Several CPU ranks through `launch/local`: the run is the same for any number of ranks, and each computes its share.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::runs::{heartbeat, Run};
use crate::common::{files, rows};

#[test]
fn one_to_four_ranks_learn_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let config = "seed: 1\ndata: {layout: packed, block_size: 32, batch_size: 24}\nmodel: {preset: gpt-nano, tied_head: false}\n\
                  optim: {lr: 5.0e-4}\ntrain: {steps: 50, eval_every: 25, save_every: 0}\n";
    let mut curves = Vec::new();
    for ranks in 1..=4 {
        let run = Run::new(folder.path(), &format!("ranks-{ranks}"), config, ranks);
        assert_eq!(run.start(&["-v"]).code(), Some(0), "{ranks} ranks");
        let numbers = |file: &str, column: &str| -> Vec<f64> {
            rows(&run.dir.join(file)).iter().map(|row| row[column].parse().unwrap()).collect()
        };
        assert!(numbers("train.csv", "world_size").iter().all(|&n| n == ranks as f64));
        curves.push(
            [numbers("train.csv", "loss"), numbers("train.csv", "grad_norm"), numbers("eval.csv", "loss")].concat(),
        );
        check_shares(&run.dir, ranks);
    }
    assert_eq!(curves[0].len(), 102);
    for (ranks, curve) in curves.iter().enumerate().skip(1) {
        for (step, (found, alone)) in curve.iter().zip(&curves[0]).enumerate() {
            let distance = (found / alone - 1.0).abs();
            assert!(distance < 1e-5, "{} ranks, number {step}: {found}, alone {alone}", ranks + 1);
        }
    }
}

/// Reads each rank's log. Each must have computed its share of the run. The ranks' samples of the first step must be
/// disjoint, equal in number, and together the whole batch.
fn check_shares(run_dir: &Path, ranks: usize) {
    let mut seen = BTreeSet::new();
    for rank in 0..ranks {
        let log = std::fs::read_to_string(run_dir.join(format!("logs/rank-{rank:04}.log"))).unwrap();
        let share = 24 / ranks;
        assert!(log.contains(&format!("rank {rank} computes {share} of the 24 sequences of each step\n")), "{log}");
        let says = format!("of step 1, rank {rank} computes samples [");
        let list = log.split_once(&says).unwrap_or_else(|| panic!("no `{says}` in {log}")).1;
        let list = list.split_once(']').unwrap().0;
        let samples: Vec<u32> = list.split(", ").map(|sample| sample.parse().unwrap()).collect();
        assert_eq!(samples.len(), share);
        // The last line of steps has none left.
        let steps: Vec<&str> = log.lines().filter(|line| line.contains("/50: loss ")).collect();
        assert_eq!(!steps.is_empty(), rank == 0);
        assert!(steps.iter().rev().skip(1).all(|line| line.ends_with(" left")), "{steps:?}");
        let computed = format!("rank {rank} computed {} of the {} sequences of steps 1 to 50", share * 50, 24 * 50);
        assert!(log.contains(&computed), "no `{computed}` in {log}");
        for sample in samples {
            assert!(seen.insert(sample), "sample {sample} is computed by two ranks");
        }
    }
    assert_eq!(seen.len(), 24);
}

#[test]
fn more_ranks_leave_no_more_files_unless_they_have_something_to_say() {
    let folder = tempfile::tempdir().unwrap();
    let config = "data: {block_size: 16, batch_size: 8}\nmodel: {n_layer: 1, n_head: 2, n_embd: 16}\n\
                  train: {steps: 3, eval_every: 3, save_every: 2}\n";
    let [one, four] = [1, 4].map(|ranks| {
        let run = Run::new(folder.path(), &format!("ranks-{ranks}"), config, ranks);
        assert!(run.start(&[]).success(), "{ranks} ranks");
        run
    });
    let names = |run: &Run| files(&run.dir).into_keys().collect::<Vec<_>>();
    assert_eq!(names(&four), names(&one));
    for name in ["logs/rank-0000.log", "heartbeats/node-0000.txt"] {
        assert!(names(&four).iter().any(|other| other == name), "{:?}", names(&four));
    }
    for rank in 0..4 {
        assert_eq!(heartbeat(&four.dir, rank).unwrap().rank, rank);
    }
    // Whoever asks gets a log of each rank, which tells what it has sent before its first step and in all.
    let more = ["train.steps=50", "train.eval_every=0", "train.save_every=0"].map(|key| ["--set", key]).concat();
    assert!(four.start(&[&["-v"], &more[..]].concat()).success());
    for rank in 0..4 {
        let log = std::fs::read_to_string(four.dir.join(format!("logs/rank-{rank:04}.log"))).unwrap();
        let says = format!("DEBUG rank {rank} has sent ");
        let sent = log.lines().filter_map(|line| line.split_once(&says)?.1.split(' ').next()?.parse().ok());
        let [before, after]: [usize; 2] = sent.collect::<Vec<_>>().try_into().unwrap();
        // The tree's two leaves send one message a step, the others two; and twice as many when the run saves at its end.
        let once = if rank % 2 == 1 { 1 } else { 2 };
        assert_eq!(after - before, (47 + 2) * once, "rank {rank}");
    }
}

#[test]
fn a_rank_that_warns_leaves_a_log_which_later_starts_go_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let config = "data: {block_size: 16, batch_size: 9}\nmodel: {n_layer: 1, n_head: 2, n_embd: 16}\n\
                  train: {steps: 2, eval_every: 0, save_every: 1}\n";
    let run = Run::new(folder.path(), "warns", config, 3);
    let log = |rank| std::fs::read_to_string(run.dir.join(format!("logs/rank-{rank:04}.log"))).ok();
    assert!(run.start(&[]).success());
    assert_eq!([1, 2].map(log), [None, None]);
    let script =
        wrapper(folder.path(), "if [ \"$OMPI_COMM_WORLD_RANK$PMI_RANK\" = 2 ]; then export OMP_NUM_THREADS=9999; fi");
    let done = run.command(&["--set", "train.steps=3"]).env("LOCKSTEP_BIN", script).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let warned = log(2).unwrap();
    assert!(warned.contains(" WARN OMP_NUM_THREADS asks for 9999 threads"), "{warned}");
    assert_eq!(log(1), None);
    // The next start has nothing to say, but says where it begins.
    assert!(run.start(&["--set", "train.steps=4"]).success());
    let text = log(2).unwrap();
    let later = text.strip_prefix(&warned).unwrap();
    assert!(later.contains(" INFO rank 2 computes ") && !later.contains("WARN"), "{later}");
    assert_eq!(log(1), None);
}

#[test]
fn an_error_of_the_ranks_ends_them_all_with_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let run =
        Run::new(folder.path(), "indivisible", "data: {block_size: 16, batch_size: 7}\nmodel: {preset: gpt-nano}\n", 2);
    let done = run.command(&[]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(2), "{said}");
    assert!(said.contains("7 sequences cannot be shared evenly by 2 ranks"), "{said}");
    assert!(said.contains("6 or 8"), "{said}");

    // As JSON: an object for each rank that came to say it, and none of mpirun's words.
    let done = run.command(&["--log-format", "json"]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    let ends: Vec<serde_json::Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!ends.is_empty() && ends.iter().all(|end| end["exit_code"] == 2 && end["rank"].is_number()), "{said}");
}

/// A program that does `first` in a shell and then becomes the binary.
fn wrapper(folder: &Path, first: &str) -> PathBuf {
    let script = folder.join("lockstep");
    std::fs::write(&script, format!("#!/bin/sh\n{first}\nexec {} \"$@\"\n", env!("CARGO_BIN_EXE_lockstep"))).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    script
}

#[test]
fn a_place_that_slurm_and_mpi_see_differently_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = "data: {block_size: 16, batch_size: 8}\nmodel: {preset: gpt-nano}\ntrain: {steps: 2, eval_every: 0}\n";
    // As under srun: Slurm's variables, and PMIx's for MPI, but none of mpirun's.
    let as_slurm = |places: &str| {
        format!("rank=$OMPI_COMM_WORLD_RANK; unset OMPI_COMM_WORLD_SIZE; export SLURM_STEP_NUM_TASKS=2 {places}")
    };
    let agreeing = wrapper(folder.path(), &as_slurm("SLURM_PROCID=$rank SLURM_LOCALID=$rank"));
    let run = Run::new(folder.path(), "agreeing", config, 2);
    let done = run.command(&[]).env("LOCKSTEP_BIN", agreeing).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));

    let swapped = wrapper(folder.path(), &as_slurm("SLURM_PROCID=$((1 - rank)) SLURM_LOCALID=$((1 - rank))"));
    let run = Run::new(folder.path(), "swapped", config, 2);
    let done = run.command(&[]).env("LOCKSTEP_BIN", swapped).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(6), "{said}");
    assert!(said.contains("MPI says") && said.contains("Slurm says that it is task"), "{said}");
    assert!(!run.dir.exists());
}

#[test]
fn ranks_that_disagree_are_refused_before_they_train() {
    let folder = tempfile::tempdir().unwrap();
    let run =
        Run::new(folder.path(), "disagree", "data: {block_size: 16, batch_size: 8}\nmodel: {preset: gpt-nano}\n", 2);
    // Rank 1 gets another seed, as on a node with an older copy of the configuration.
    let script = wrapper(folder.path(), "[ \"$OMPI_COMM_WORLD_RANK$PMI_RANK\" = 1 ] && set -- \"$@\" --set seed=99");
    let done = run.command(&[]).env("LOCKSTEP_BIN", &script).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(6), "{said}");
    assert!(
        said.contains("ranks [1] have another configuration than rank 0: seed is 99 there and 3407 here"),
        "{said}"
    );
    assert!(!run.dir.exists(), "a refused job made a run directory");
}

#[test]
fn ranks_that_mpi_does_not_join_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path(), "alone", "data: {block_size: 16}\nmodel: {preset: gpt-nano}\n", 1);
    // As `srun` without PMIx would start it: one of two tasks, with no way for MPI to find the other.
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.args(["train", "--config"]).arg(&run.config).arg("--run-dir").arg(&run.dir);
    let done = command.env("SLURM_STEP_NUM_TASKS", "2").env("SLURM_PROCID", "0").stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(2), "{said}");
    assert!(said.contains("mpirun") && said.contains("--mpi=pmix"), "{said}");
    assert!(!run.dir.exists(), "nothing may be written by a rank that trains a model of its own");
}

#[test]
fn ranks_share_an_evaluation_of_any_text() {
    let folder = tempfile::tempdir().unwrap();
    let config = "data: {block_size: 32, batch_size: 8, micro_batch: 4}\nmodel: {preset: gpt-nano}\n\
                  train: {steps: 2, eval_every: 0}\n";
    let text = folder.path().join("text");
    let article = "The water rose above the bridge , and people left their houses for the hills . ".repeat(20);
    std::fs::write(&text, format!(" = One = \n \n {article}\n \n = Two = \n \n {article}{article}\n")).unwrap();
    let evaluate = |ranks: usize| {
        let run = Run::new(folder.path(), "run", config, ranks);
        if ranks == 1 {
            assert!(run.start(&[]).success());
        }
        let table = folder.path().join(format!("documents-{ranks}.csv"));
        let mut command = run.verb("eval");
        command.arg("--run-dir").arg(&run.dir).arg("--file").arg(&text).args(["--stride", "7"]);
        let output = command.arg("--by-document").arg(&table).stdout(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let printed = folder.path().join("printed.csv");
        std::fs::write(&printed, output.stdout).unwrap();
        [rows(&printed), rows(&table)].concat()
    };
    let (alone, shared) = (evaluate(1), evaluate(3));
    assert_eq!((alone.len(), shared.len()), (3, 3));
    for (alone, shared) in alone.iter().zip(&shared) {
        for column in ["loss", "tokens", "bits_per_byte", "accuracy"] {
            let [one, three] = [alone, shared].map(|row| row[column].parse::<f64>().unwrap());
            assert!((one - three).abs() <= 1e-9 * one, "{column}: {one} and {three}");
        }
    }
}
