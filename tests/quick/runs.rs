//! `runs` and `watch`: what they show of runs of every kind, and that they only look. `tests/test_terminal.py` has the
//! live view in a terminal.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use lockstep::run::tables::{EvalRow, Table};

use crate::common::runs::{last_step, Going, Run, ENDLESS};
use crate::common::{copy_folder, snapshot, table, Workspace};

/// Runs of every kind in `runs`, but for one that goes on, and folders that are none.
fn with_runs() -> Workspace {
    let work = Workspace::new();
    work.trained("runs/done");
    // The same run is to go on, and was killed, stopped, or failed.
    let longer = |name: &str, last_words: &str| {
        copy_folder(&work.path("runs/done"), &work.path(&format!("runs/sweep/{name}")));
        let path = |file: &str| work.path(&format!("runs/sweep/{name}/{file}"));
        let config = fs::read_to_string(path("config.yaml")).unwrap();
        assert!(config.contains("steps: 12\n"), "{config}");
        fs::write(path("config.yaml"), config.replace("steps: 12\n", "steps: 24\n")).unwrap();
        let log = fs::read_to_string(path("logs/rank-0000.log")).unwrap();
        fs::write(path("logs/rank-0000.log"), log + last_words).unwrap();
    };
    let resumed = "10:00:00Z  INFO resuming from runs/sweep/killed/checkpoints/step-00000008 after 8 steps\n\
        10:00:00Z  INFO rank 0 computes 8 of the 8 sequences of each step\n";
    longer("killed", resumed);
    longer("stopped", "10:00:00Z ERROR stopped on request after step 12 of 24\n");
    longer("failed", "10:00:00Z ERROR cannot write runs/failed/train.csv: no space\n");
    // A job takes the lease before anything else.
    fs::create_dir_all(work.path("runs/begun")).unwrap();
    fs::write(work.path("runs/begun/lease.json"), "{\"cluster\": nu").unwrap();
    // Of other programs.
    fs::create_dir_all(work.path("runs/foreign")).unwrap();
    fs::write(work.path("runs/foreign/config.yaml"), "learning rate: [").unwrap();
    fs::write(work.path("runs/foreign/train.csv"), "epoch,loss\n1,2\n").unwrap();
    fs::create_dir_all(work.path("runs/notes")).unwrap();
    fs::write(work.path("runs/notes/train.csv"), "not a run").unwrap();
    work
}

/// The table as CSV, each row by the run's name.
fn listed(csv: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let (columns, rows) = table(csv);
    assert_eq!(columns.join(","), "run,state,step,steps,loss,best_ppl,tokens_per_s,restarts,age_s");
    rows.into_iter().map(|row| (row["run"].clone(), row)).collect()
}

#[test]
fn runs_of_every_kind_are_listed_and_none_is_touched() {
    let work = with_runs();
    let before = snapshot(&work.path("runs"));
    let said = work.lockstep("runs --csv").ok();
    let rows = listed(&said.stdout);
    let of = |column: &str| -> Vec<(&str, &str)> {
        rows.iter().map(|(name, row)| (name.as_str(), row[column].as_str())).collect()
    };
    let names = ["done", "foreign", "sweep/failed", "sweep/killed", "sweep/stopped"];
    let expected = |values: [&'static str; 5]| names.into_iter().zip(values).collect::<Vec<_>>();
    assert_eq!(of("state"), expected(["finished", "killed", "failed", "killed", "stopped"]));
    assert_eq!(of("step"), expected(["12", "0", "12", "12", "12"]));
    assert_eq!(of("steps"), expected(["12", "", "24", "24", "24"]));
    assert_eq!(of("restarts"), expected(["0", "0", "0", "1", "0"]));
    let evaluations: Vec<EvalRow> = Table::rows(&work.path("runs/done/eval.csv")).unwrap();
    let best = evaluations.iter().map(|row| row.ppl).fold(f64::INFINITY, f64::min);
    assert!((rows["done"]["best_ppl"].parse::<f64>().unwrap() / best - 1.0).abs() < 1e-9);
    assert_eq!((rows["foreign"]["loss"].as_str(), rows["foreign"]["best_ppl"].as_str()), ("", ""));

    let text = work.lockstep("runs").ok().stdout;
    assert!(text.starts_with("run ") && text.lines().count() == 6, "{text}");
    let row = text.lines().find(|line| line.starts_with("sweep/killed ")).unwrap();
    assert!(row.split_whitespace().collect::<Vec<_>>().starts_with(&["sweep/killed", "killed", "12/24"]), "{row}");
    // A run itself, and a folder without any.
    assert!(work.lockstep("runs runs/done").ok().stdout.contains("finished"));
    fs::create_dir(work.path("circle")).unwrap();
    std::os::unix::fs::symlink(".", work.path("circle/again")).unwrap();
    work.lockstep("runs circle").ok().says(&["circle holds no run"]);
    let none = work.lockstep("runs runs/notes").ok().says(&["runs/notes holds no run"]);
    assert_eq!(none.stdout.lines().count(), 1);
    work.lockstep("runs nowhere").fails(2, &["nowhere cannot be listed", "name the folder"]);
    assert_eq!(snapshot(&work.path("runs")), before);
}

#[test]
fn a_run_that_goes_on_is_seen_and_goes_on() {
    let work = with_runs();
    let run = Run::new(&work.path("runs"), "going", ENDLESS, 1);
    let mut going = Going::start(&run, &[]);
    going.trains(0);
    for round in 1..=3 {
        let rows = listed(&work.lockstep("runs --csv").ok().stdout);
        assert_eq!(rows["going"]["state"], "running");
        assert!(rows["going"]["step"].parse::<usize>().unwrap() >= 3);
        let shown = work.lockstep("watch runs/going").ok().stdout;
        assert!(shown.starts_with("runs/going: running") && shown.contains(" left"), "{shown}");
        assert!(shown.contains(": step ") && shown.contains("tokens/s"), "{shown}");
        let seen = last_step(&run.dir);
        going.until("it goes on", || (last_step(&run.dir) > seen + round).then_some(()));
    }
    let pid = going.child.id().to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    let (code, _) = going.ends();
    assert_eq!(code, None);
    assert_eq!(listed(&work.lockstep("runs --csv").ok().stdout)["going"]["state"], "killed");
}

#[test]
fn a_folder_that_cannot_be_written_to_is_read() {
    let work = with_runs();
    let script = "mount --bind runs mnt && mount -o remount,ro,bind mnt && ! touch mnt/x 2>/dev/null && \
                  \"$lockstep\" runs mnt && \"$lockstep\" watch mnt/sweep/stopped";
    let Some(said) = work.with_mounts(script) else { return };
    said.ok().reports(&["sweep/stopped", "finished", "mnt/sweep/stopped: stopped", "step 12 of 24"]);
}

#[test]
fn what_is_no_terminal_gets_one_picture() {
    let work = with_runs();
    let shown = work.lockstep("watch runs/done").ok().stdout;
    assert_eq!(shown.lines().count(), 24, "{shown}");
    assert!(shown.lines().all(|line| line.chars().count() <= 80) && !shown.contains('\x1b'), "{shown}");
    for part in ["runs/done: finished", "step 12 of 12", "loss: training, and validation as o", "best ppl"] {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
    }
    assert!(!shown.contains(" left"), "{shown}");
    assert!(work.lockstep("watch runs/foreign").ok().stdout.contains("no step is done yet"));
    work.lockstep("watch runs").fails(2, &["runs is not a run directory", "`lockstep runs`"]);
}
