//! Ranks that hang in places other than in `ranks/watchdog.rs`, and what takes long but does not hang.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use lockstep::data::sample;
use lockstep::data::wikitext::Split;
use lockstep::watch::heartbeats::Heartbeat;
use lockstep::watch::Phase;

use crate::common::runs::{fifo, heartbeat, last_step, says, signal, Going, Run, ENDLESS};
use crate::common::{binary, finish, in_memory, rows, sample};

/// Linux's flag for opening a file without blocking.
const O_NONBLOCK: i32 = 0o4000;

#[test]
fn a_rank_that_hangs_with_work_of_its_own_is_named_by_the_other() {
    let folder = in_memory();
    let config =
        format!("{ENDLESS}fault: {{step_deadline_s: 8}}\n").replace("save_every: 0", "save_every: 0, sample_every: 4");
    let run = Run::new(folder.path(), "sampling", &config, 2);
    fifo(&run.dir.join("samples/step-00000004.txt.tmp"));
    let (code, said) = Going::start(&run, &[]).ends();
    assert_eq!(code, Some(6), "{said}");
    says(&said, &["rank 1: exchanging with the other ranks took longer than 8 s", "rank 0 on "]);
    // Its heartbeats show that it lives. If the disk takes a second for each, it may seem to have stopped.
    assert!(
        [" lives but is not here", " has stopped"]
            .iter()
            .any(|how| said.contains(&format!("{how}: step 4, sampling, "))),
        "{said}"
    );
}

#[test]
fn a_start_that_hangs_ends_the_job() {
    let folder = in_memory();
    let run = Run::new(folder.path(), "start", &format!("{ENDLESS}fault: {{startup_deadline_s: 15}}\n"), 2);
    fifo(&run.dir.join("train.csv"));
    let (code, said) = Going::start(&run, &[]).ends();
    assert_eq!(code, Some(6), "{said}");
    says(&said, &["rank 1: exchanging with the other ranks took longer than 15 s"]);
}

#[test]
fn a_stderr_that_nobody_reads_does_not_keep_a_hanging_rank_alive() {
    let folder = in_memory();
    let run = Run::new(folder.path(), "deaf", &format!("{ENDLESS}fault: {{step_deadline_s: 1}}\n"), 1);
    let pipe = folder.path().join("pipe");
    fifo(&pipe);
    // Open but never read: once it is full, writing a line blocks.
    let _reader = File::options().read(true).write(true).open(&pipe).unwrap();
    let stderr = File::options().write(true).open(&pipe).unwrap();
    let mut command = run.command(&[]);
    command.stderr(stderr.try_clone().unwrap());
    let mut going = Going { run: &run, child: command.spawn().unwrap(), stderr: run.config.clone() };
    drop((command, stderr));
    going.trains(0);
    // Fills it up, through a separate file description that does not block.
    let mut full = File::options().write(true).custom_flags(O_NONBLOCK).open(&pipe).unwrap();
    while full.write(&[0]).is_ok() {}
    let (code, _) = going.ends();
    assert_eq!(code, Some(6));
}

#[test]
fn a_long_evaluation_makes_progress() {
    let folder = in_memory();
    let text = sample::text(Split::Valid, sample::BYTES);
    // More and more text, until this machine needs longer than the allowed 1 s plus the watchdog's 5 s.
    for doublings in 0.. {
        let data = folder.path().join(format!("data-{doublings}"));
        for split in ["train", "valid", "test"] {
            fs::create_dir_all(folder.path().join("text")).unwrap();
            fs::write(folder.path().join(format!("text/{split}.txt")), text.repeat(1 << doublings)).unwrap();
        }
        let mut prepare = Command::new(binary());
        prepare.args(["-q", "prepare", "--tokenizer"]).arg(sample().join("tokenizer.json"));
        prepare.arg("--source").arg(folder.path().join("text")).arg("--out").arg(&data);
        finish(prepare).ok();
        let config = "device: cpu\ndata: {block_size: 4, batch_size: 1}\nmodel: {n_layer: 6, n_head: 8, n_embd: 320}\n\
            train: {steps: 1, eval_every: 1, save_every: 0}\nfault: {step_deadline_s: 1}\n";
        let run = Run::new(folder.path(), &format!("evaluation-{doublings}"), config, 1);
        let (code, said) = Going::start(&run, &["--set", &format!("data.dir={}", data.display())]).ends();
        assert_eq!(code, Some(0), "{said}");
        let seconds: f64 = rows(&run.dir.join("eval.csv"))[0]["eval_s"].parse().unwrap();
        if seconds > 7.0 {
            return;
        }
    }
}

#[test]
fn ranks_that_were_all_stopped_for_longer_than_the_deadline_go_on() {
    let folder = in_memory();
    let run = Run::new(folder.path(), "suspended", &format!("{ENDLESS}fault: {{step_deadline_s: 5}}\n"), 2);
    let mut going = Going::start(&run, &[]);
    let pids = [0, 1].map(|rank| going.trains(rank).0);
    // Like `scontrol suspend`, but while rank 0 waits for rank 1.
    signal("STOP", pids[1]);
    let waits = |beat: Heartbeat| (beat.phase == Phase::Exchange).then_some(());
    going.until("rank 0 waits", || heartbeat(&run.dir, 0).and_then(waits));
    signal("STOP", pids[0]);
    // Longer than the watchdog allows.
    sleep(Duration::from_secs(12));
    let stopped_at = last_step(&run.dir);
    pids.iter().for_each(|&pid| signal("CONT", pid));
    going.until("a later step", || (last_step(&run.dir) > stopped_at + 3).then_some(()));
    signal("USR1", going.child.id());
    let (code, said) = going.ends();
    assert_eq!(code, Some(75), "{said}");
}
