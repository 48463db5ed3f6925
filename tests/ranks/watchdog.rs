//! Ranks that hang, and ranks that are slow: each is named, and nothing waits for ever.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::rows;
use crate::common::runs::Run;

/// Steps of milliseconds, and no end in sight.
const TINY: &str = "device: cpu\ndata: {block_size: 32, batch_size: 8}\nmodel: {n_layer: 2, n_head: 2, n_embd: 32}\n\
    train: {steps: 1000000, eval_every: 0, save_every: 0}\n";

/// For what takes seconds on a machine that has nothing else to do, and must end on any.
const PATIENCE: Duration = Duration::from_secs(300);

/// The tests take turns: they measure time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A run under way, whose processes end with it.
struct Going<'a> {
    run: &'a Run,
    child: std::process::Child,
    stderr: PathBuf,
}

impl<'a> Going<'a> {
    fn start(run: &'a Run, more: &[&str]) -> Self {
        let stderr = run.dir.with_extension("stderr");
        let child = run.command(more).stderr(File::create(&stderr).unwrap()).spawn().unwrap();
        Self { run, child, stderr }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap()
    }

    /// Waits for its end; the exit code and what was said.
    #[track_caller]
    fn ends(mut self) -> (Option<i32>, String) {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let gone =
                    || (0..1500).any(|_| !is_alive(&self.run.dir) || (sleep(Duration::from_millis(20)), false).1);
                assert!(gone(), "a process is left: {}", self.said());
                return (status.code(), self.said());
            }
            assert!(begun.elapsed() < PATIENCE, "the run goes on after {PATIENCE:?}: {}", self.said());
            sleep(Duration::from_millis(20));
        }
    }

    /// A number of a rank's heartbeat, and the rank's node.
    fn heartbeat(&self, rank: usize, field: &str) -> Option<(u64, String)> {
        let text = fs::read(self.run.dir.join(format!("heartbeats/rank-{rank:04}.json"))).ok()?;
        let value: serde_json::Value = serde_json::from_slice(&text).ok()?;
        assert_eq!(value["rank"].as_u64(), Some(rank as u64));
        Some((value[field].as_u64()?, value["host"].as_str()?.to_owned()))
    }

    /// Whether a rank's heartbeat says that it is in a phase.
    fn is_in(&self, rank: usize, phase: &str) -> bool {
        let text = fs::read_to_string(self.run.dir.join(format!("heartbeats/rank-{rank:04}.json")));
        text.is_ok_and(|text| text.contains(&format!("\"phase\":\"{phase}\"")))
    }

    /// Waits until the run is where a test needs it.
    #[track_caller]
    fn reaches(&mut self, what: &str, is_there: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_there(self) {
            assert!(self.child.try_wait().unwrap().is_none(), "the run has ended: {}", self.said());
            assert!(begun.elapsed() < PATIENCE, "no {what} within {PATIENCE:?}: {}", self.said());
            sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a rank trains, and returns its process and its node.
    #[track_caller]
    fn trains(&mut self, rank: usize) -> (String, String) {
        self.reaches("step", |going| going.heartbeat(rank, "step").is_some_and(|(step, _)| step >= 3));
        let (pid, host) = self.heartbeat(rank, "pid").unwrap();
        (pid.to_string(), host)
    }
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        // Every process of the run, mpirun too, has the run directory at the end of its command line.
        let pattern = format!("{}$", self.run.dir.display());
        let _ = Command::new("pkill").args(["-KILL", "-f", &pattern]).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_alive(dir: &Path) -> bool {
    Command::new("pgrep").args(["-f", &format!("{}$", dir.display())]).stdout(Stdio::null()).status().unwrap().success()
}

fn signal(name: &str, pid: &str) {
    assert!(Command::new("kill").args([&format!("-{name}"), pid]).status().unwrap().success(), "kill -{name} {pid}");
}

#[track_caller]
fn says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
}

fn fifo(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn a_stopped_rank_is_named_by_the_other() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path(), "stopped", &format!("{TINY}fault: {{step_deadline_s: 5}}\n"), 2);
    let mut going = Going::start(&run, &[]);
    let (pid, host) = going.trains(1);
    signal("STOP", &pid);
    let (code, said) = going.ends();
    assert_eq!(code, Some(6), "{said}");
    let named = format!("rank 1 on {host} (process {pid}) has stopped: step ");
    says(&said, &["rank 0: exchanging with the other ranks took longer than 5 s", &named, " s into it"]);
    let phase = said.split(&named).nth(1).unwrap();
    assert!(["computing", "exchange with the other ranks"].iter().any(|name| phase.contains(name)), "{said}");
    assert!(!said.contains("rank 0 on"), "{said}");
    says(&fs::read_to_string(run.dir.join("logs/rank-0000.log")).unwrap(), &[&named]);
}

#[test]
fn ranks_that_were_all_stopped_for_longer_than_the_deadline_go_on() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path(), "suspended", &format!("{TINY}fault: {{step_deadline_s: 5}}\n"), 2);
    let mut going = Going::start(&run, &[]);
    let pids = [0, 1].map(|rank| going.trains(rank).0);
    // As `scontrol suspend`, but so that rank 0 waits for rank 1 at that time.
    signal("STOP", &pids[1]);
    going.reaches("rank 0 waits", |going| going.is_in(0, "exchange"));
    signal("STOP", &pids[0]);
    // Longer than the watchdog allows, too.
    sleep(Duration::from_secs(12));
    let stopped_at = going.heartbeat(0, "step").unwrap().0;
    pids.iter().for_each(|pid| signal("CONT", pid));
    going.reaches("a later step", |going| going.heartbeat(0, "step").is_some_and(|(step, _)| step > stopped_at + 3));
    let launcher = going.child.id().to_string();
    signal("USR1", &launcher);
    let (code, said) = going.ends();
    assert_eq!(code, Some(75), "{said}");
}

#[test]
fn a_rank_that_hangs_with_work_of_its_own_is_named_by_the_other() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let config =
        format!("{TINY}fault: {{step_deadline_s: 8}}\n").replace("save_every: 0", "save_every: 0, sample_every: 4");
    let run = Run::new(folder.path(), "sampling", &config, 2);
    // Whoever opens this to write into it waits for a reader, as for a file server that is gone.
    fifo(&run.dir.join("samples/step-00000004.txt.tmp"));
    let (code, said) = Going::start(&run, &[]).ends();
    assert_eq!(code, Some(6), "{said}");
    says(&said, &["rank 1: exchanging with the other ranks took longer than 8 s", "rank 0 on "]);
    // By its heartbeats it lives; on a disk that takes a second for each it may seem to have stopped.
    assert!(
        [" lives but is not here", " has stopped"]
            .iter()
            .any(|how| said.contains(&format!("{how}: step 4, sampling, "))),
        "{said}"
    );
}

#[test]
fn a_rank_alone_that_hangs_ends_itself() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let config =
        format!("{TINY}fault: {{step_deadline_s: 1}}\n").replace("save_every: 0", "save_every: 0, sample_every: 4");
    let run = Run::new(folder.path(), "alone", &config, 1);
    fifo(&run.dir.join("samples/step-00000004.txt.tmp"));
    let (code, said) = Going::start(&run, &[]).ends();
    assert_eq!(code, Some(6), "{said}");
    let parts = ["rank 0 on ", " hangs: no progress for ", "at step 4, sampling (allowed are 1 s and 5 s more)"];
    says(&said, &parts);
    says(&fs::read_to_string(run.dir.join("logs/rank-0000.log")).unwrap(), &parts);
}

#[test]
fn a_start_that_hangs_ends_the_job() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path(), "start", &format!("{TINY}fault: {{startup_deadline_s: 15}}\n"), 2);
    fifo(&run.dir.join("train.csv"));
    let (code, said) = Going::start(&run, &[]).ends();
    assert_eq!(code, Some(6), "{said}");
    says(&said, &["rank 1: exchanging with the other ranks took longer than 15 s"]);
}

#[test]
fn a_stderr_that_nobody_reads_does_not_keep_a_hanging_rank_alive() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path(), "deaf", &format!("{TINY}fault: {{step_deadline_s: 1}}\n"), 1);
    let pipe = folder.path().join("pipe");
    fifo(&pipe);
    // Open, and never read: once it is full, whoever writes a line waits.
    let _reader = File::options().read(true).write(true).open(&pipe).unwrap();
    let stderr = File::options().write(true).open(&pipe).unwrap();
    let mut command = run.command(&[]);
    command.stderr(stderr.try_clone().unwrap());
    let mut going = Going { run: &run, child: command.spawn().unwrap(), stderr: run.config.clone() };
    going.trains(0);
    // A pipe holds 64 KiB by default.
    let mut fill = Command::new("timeout").args(["2", "cat", "/dev/zero"]).stdout(stderr).spawn().unwrap();
    fill.wait().unwrap();
    let (code, _) = going.ends();
    assert_eq!(code, Some(6));
}

#[test]
fn a_long_evaluation_makes_progress() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    // A validation split as long as the training split, in short pieces.
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/data/sample/train.txt");
    for split in ["train", "valid", "test"] {
        fs::create_dir_all(folder.path().join("text")).unwrap();
        fs::copy(&text, folder.path().join(format!("text/{split}.txt"))).unwrap();
    }
    let mut prepare = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    prepare.args(["-q", "prepare", "--tokenizer", "bpe:512", "--source", "text", "--out", "data"]);
    assert!(prepare.current_dir(folder.path()).stdout(Stdio::null()).status().unwrap().success());
    let config = "device: cpu\ndata: {block_size: 4, batch_size: 1}\nmodel: {n_layer: 6, n_head: 8, n_embd: 320}\n\
        train: {steps: 1, eval_every: 1, save_every: 0}\nfault: {step_deadline_s: 1}\n";
    let run = Run::new(folder.path(), "evaluation", config, 1);
    let (code, said) = Going::start(&run, &[]).ends();
    assert_eq!(code, Some(0), "{said}");
    let seconds: f64 = rows(&run.dir.join("eval.csv"))[0]["eval_s"].parse().unwrap();
    assert!(seconds > 7.0, "the evaluation took {seconds} s only, and shows nothing");
}

/// What other work on the machine may spoil is tried up to three times, in runs of these names.
fn in_three_tries(attempt: impl Fn(&str) -> Result<(), String>) {
    let failed: Vec<String> = ["first", "second", "third"].iter().map_while(|name| attempt(name).err()).collect();
    assert!(failed.len() < 3, "{failed:?}");
}

#[test]
fn a_slowed_rank_is_named_within_twenty_steps() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let config = TINY.replace("batch_size: 8", "batch_size: 64").replace("n_embd: 32", "n_embd: 128");
    in_three_tries(|name| {
        let run = Run::new(folder.path(), name, &config, 2);
        let mut going = Going::start(&run, &[]);
        let (pid, host) = going.trains(1);
        // It runs a third of the time. (That twofold is enough is shown where times are given, and by launch/faults.)
        let slowing = "while kill -STOP $0; do sleep 0.02; kill -CONT $0; sleep 0.01; done 2>/dev/null";
        let begun = rows(&run.dir.join("train.csv")).len();
        let mut slower = Command::new("sh").args(["-c", slowing, &pid]).spawn().unwrap();
        let file = run.dir.join("ranks.csv");
        let limit = Instant::now() + PATIENCE;
        while rows(&file).is_empty() && rows(&run.dir.join("train.csv")).len() < begun + 30 && Instant::now() < limit {
            sleep(Duration::from_millis(20));
        }
        let _ = slower.kill();
        let _ = slower.wait();
        let found = rows(&file);
        let said = going.said();
        drop(going);
        let [slow] = &found[..] else { return Err(format!("named: {found:?}; {said}")) };
        let number = |column: &str| slow[column].parse::<f64>().unwrap();
        let steps = number("step") - begun as f64;
        if number("rank") != 1.0 || !(1.0..=20.0).contains(&steps) {
            return Err(format!("named {steps} steps after rank 1 became slow: {slow:?}"));
        }
        assert_eq!(slow["host"], host);
        assert!(number("factor") >= 1.5 && number("compute_ms") > number("median_ms"), "{slow:?}");
        says(&said, &["WARN", &format!("rank 1 on {host} computes "), "times as long as the median rank"]);
        Ok(())
    });
}

#[test]
fn a_quiet_run_names_nobody() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    in_three_tries(|name| {
        let run = Run::new(folder.path(), name, &TINY.replace("1000000", "300"), 2);
        let (code, said) = Going::start(&run, &[]).ends();
        assert_eq!(code, Some(0), "{said}");
        let found = rows(&run.dir.join("ranks.csv"));
        assert_eq!(said.contains("WARN"), !found.is_empty(), "{found:?} {said}");
        if found.is_empty() {
            Ok(())
        } else {
            Err(format!("{found:?}"))
        }
    });
}
