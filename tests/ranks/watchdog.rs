//! Ranks that hang or are slow are named, and nothing waits for ever. `full/watchdog.rs` has more.

use std::fs;
use std::process::Command;

use crate::common::runs::{but_for_stragglers, fifo, says, signal, Going, Run, ENDLESS};
use crate::common::{in_memory, rows};

#[test]
fn a_stopped_rank_is_named_by_the_other() {
    let folder = in_memory();
    let run = Run::new(folder.path(), "stopped", &format!("{ENDLESS}fault: {{step_deadline_s: 5}}\n"), 2);
    let mut going = Going::start(&run, &[]);
    let (pid, host) = going.trains(1);
    signal("STOP", pid);
    let (code, said) = going.ends();
    let said = but_for_stragglers(&said);
    assert_eq!(code, Some(6), "{said}");
    let named = format!("rank 1 on {host} (process {pid}) has stopped: step ");
    says(&said, &["rank 0: exchanging with the other ranks took longer than 5 s", &named, " s into it"]);
    let phase = said.split(&named).nth(1).unwrap();
    assert!(["computing", "exchange with the other ranks"].iter().any(|name| phase.contains(name)), "{said}");
    assert!(!said.contains("rank 0 on"), "{said}");
    says(&fs::read_to_string(run.dir.join("logs/rank-0000.log")).unwrap(), &[&named]);
}

#[test]
fn a_rank_alone_that_hangs_ends_itself() {
    let folder = in_memory();
    let config =
        format!("{ENDLESS}fault: {{step_deadline_s: 1}}\n").replace("save_every: 0", "save_every: 0, sample_every: 4");
    let run = Run::new(folder.path(), "alone", &config, 1);
    fifo(&run.dir.join("samples/step-00000004.txt.tmp"));
    let (code, said) = Going::start(&run, &[]).ends();
    assert_eq!(code, Some(6), "{said}");
    let parts = ["rank 0 on ", " hangs: no progress for ", "at step 4, sampling (allowed are 1 s and 5 s more)"];
    says(&said, &parts);
    says(&fs::read_to_string(run.dir.join("logs/rank-0000.log")).unwrap(), &parts);
}

/// `watch::stragglers` tests, with given times, within how many steps this happens and that no other rank is named.
#[test]
fn a_slowed_rank_is_named() {
    let folder = in_memory();
    let config = ENDLESS.replace("batch_size: 8", "batch_size: 64").replace("n_embd: 32", "n_embd: 128");
    let run = Run::new(folder.path(), "slowed", &config, 2);
    let mut going = Going::start(&run, &[]);
    let (pid, host) = going.trains(1);
    // It runs a tenth of the time: nothing else on the machine slows the other rank as much.
    let slowing = "while kill -STOP $0; do sleep 0.09; kill -CONT $0; sleep 0.01; done 2>/dev/null";
    let mut slower = Command::new("sh").args(["-c", slowing, &pid.to_string()]).spawn().unwrap();
    let slow = going.until("rank 1 is in ranks.csv", || {
        rows(&run.dir.join("ranks.csv")).into_iter().find(|row| row["rank"] == "1")
    });
    let _ = slower.kill();
    let _ = slower.wait();
    // launch/local passes it on a moment later.
    let named = format!("rank 1 on {host} computes ");
    let stderr = going.stderr.clone();
    let said = going.until("the warning", || fs::read_to_string(&stderr).ok().filter(|said| said.contains(&named)));
    drop(going);
    let number = |column: &str| slow[column].parse::<f64>().unwrap();
    assert_eq!(slow["host"], host);
    assert!(number("factor") >= 1.5 && number("compute_ms") > number("median_ms"), "{slow:?}");
    says(&said, &["WARN", &named, "times as long as the median rank"]);
}
