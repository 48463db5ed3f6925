//! One run directory, one job: who is refused, who takes over and when, and that whoever was replaced writes no more.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use crate::common::{binary, numbers, snapshot, table, Output, Workspace};

/// Steps of some milliseconds, and more of them than any test waits for.
const ENDLESS: &str = "--set train.steps=1000000 --set train.eval_every=0 --set train.sample_every=0";

/// A training that goes on while the test does something else; it is killed if the test ends before it.
struct Process(Child);

impl Process {
    /// Trains `tiny.yaml` into `run`, as this start of a job of Slurm's or as none.
    fn train(work: &Workspace, more: &str, job: Option<(u32, u32)>) -> Self {
        let mut command = Command::new(binary());
        command.args(["train", "--config", "tiny.yaml", "--run-dir", "run"]).args(more.split_whitespace());
        command.current_dir(work.path("")).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
        // These tests may themselves run in a job.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("SLURM_") {
                command.env_remove(name);
            }
        }
        if let Some((job, restarts)) = job {
            command.env("SLURM_JOB_ID", job.to_string()).env("SLURM_RESTART_COUNT", restarts.to_string());
        }
        Self(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Waits for the end.
    fn end(mut self) -> Output {
        let mut stderr = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let code = self.0.wait().unwrap().code().unwrap_or(-1);
        Output { code, stdout: String::new(), stderr }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `run` has the row of a step.
fn reach(work: &Workspace, step: usize) {
    let start = Instant::now();
    while fs::read_to_string(work.path("run/train.csv")).map_or(0, |text| text.lines().count()) <= step {
        assert!(start.elapsed() < Duration::from_secs(300), "step {step} was not reached");
        sleep(Duration::from_millis(5));
    }
}

/// The names in `run` that begin with the lease's.
fn leases(work: &Workspace) -> Vec<String> {
    let names = fs::read_dir(work.path("run")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("lease.json")).collect()
}

/// The lease of a process on a machine that nobody here can look into.
fn elsewhere(counter: u64, since: &str) -> Value {
    json!({
        "cluster": null, "job": "4711", "array": null, "restart_count": 0, "host": "node7", "machine": "another boot",
        "pid": 1, "started": 1, "token": "0123456789abcdef", "counter": counter, "since": since
    })
}

/// Gives `run` another holder, as holders do it.
fn put(work: &Workspace, lease: &str) {
    fs::write(work.path("other"), lease).unwrap();
    fs::rename(work.path("other"), work.path("run/lease.json")).unwrap();
}

#[test]
fn a_second_process_is_refused_with_the_name_of_the_first() {
    let work = Workspace::new();
    let first = Process::train(&work, ENDLESS, Some((77, 2)));
    reach(&work, 5);
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let name = format!("job 77 (restart 2), process {} on {} since 20", first.0.id(), host.trim());
    let parts = ["run is in use", &name, "which is alive", "stop it, or use another --run-dir"];
    work.train("run", ENDLESS).fails(2, &parts);
    // Neither the same start of the job nor an earlier one takes over.
    for restarts in [1, 2] {
        Process::train(&work, ENDLESS, Some((77, restarts))).end().fails(2, &[&name]);
    }
    // A renewal may be in progress.
    let start = Instant::now();
    while leases(&work) != ["lease.json"] {
        assert!(start.elapsed() < Duration::from_secs(60), "left behind: {:?}", leases(&work));
        sleep(Duration::from_millis(5));
    }
    // The first has not noticed, and its end makes room.
    first.signal("TERM");
    first.end().fails(75, &["saved in run/checkpoints"]);
    assert_eq!(leases(&work), [""; 0]);
    let steps = numbers(&work.path("run/train.csv"), "step").len();
    let said = work.train("run", &format!("--set train.steps={}", steps + 2)).ok();
    assert!(!said.stderr.contains("taking over"), "{}", said.stderr);
    assert_eq!(leases(&work), [""; 0]);
    // A start that fails leaves nothing either.
    work.train("run", "--resume never").fails(2, &["holds checkpoints"]);
    assert_eq!(leases(&work), [""; 0]);
}

#[test]
fn a_killed_process_is_replaced_at_once_on_its_machine() {
    let work = Workspace::new();
    let killed = Process::train(&work, ENDLESS, None);
    reach(&work, 10);
    let pid = killed.0.id();
    killed.signal("KILL");
    assert_eq!(killed.end().code, -1);
    assert!(work.path("run/lease.json").exists());
    // What it may leave if it is killed amid a renewal.
    fs::write(work.path("run/lease.json.0123"), "half a le").unwrap();
    let parts = ["taking over run/lease.json from process", &pid.to_string(), "its process no longer exists"];
    let said = work.train("run", "").ok().says(&parts);
    assert!(!said.stderr.contains("waiting"), "{}", said.stderr);
    assert_eq!(leases(&work), [""; 0]);
}

#[test]
fn a_lease_of_another_machine_expires_by_the_observers_clock_alone() {
    let leases = [
        elsewhere(5, "1970-01-01 00:00:00 UTC").to_string(),
        elsewhere(5, "2999-01-01 00:00:00 UTC").to_string(),
        "{\"cluster\": nu".into(),
        String::new(),
    ];
    let works: Vec<Workspace> = leases.iter().map(|_| Workspace::new()).collect();
    let mut running = Vec::new();
    for (work, lease) in works.iter().zip(&leases) {
        work.trained("run");
        put(work, lease);
    }
    let start = Instant::now();
    for work in &works {
        // The file's own time, a day back.
        let file = fs::File::options().write(true).open(work.path("run/lease.json")).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(86_400)).unwrap();
        running.push(Process::train(work, "--set train.steps=14", None));
    }
    sleep(Duration::from_secs(8).saturating_sub(start.elapsed()));
    for (work, lease) in works.iter().zip(&leases) {
        assert_eq!(fs::read_to_string(work.path("run/lease.json")).unwrap(), *lease, "taken before its time");
        assert_eq!(numbers(&work.path("run/train.csv"), "step").len(), 12);
    }
    for (process, lease) in running.into_iter().zip(&leases) {
        let name = if lease.contains("node7") { "job 4711, process 1 on node7" } else { "the file is damaged" };
        let said = process.end().ok();
        said.says(&["waiting up to 12 s", "taking over run/lease.json from", name, "it stood still for 12 s"]);
    }
    for work in &works {
        assert_eq!(numbers(&work.path("run/train.csv"), "step").len(), 14);
        assert!(!work.path("run/lease.json").exists());
    }
}

#[test]
fn a_lease_of_another_machine_that_is_renewed_is_respected() {
    let work = Workspace::new();
    work.trained("run");
    let before = snapshot(&work.path("run"));
    let parts = ["run is in use", "job 4711, process 1 on node7 since", "which is alive", "another --run-dir"];
    for lease in [elsewhere(0, "2999-01-01 00:00:00 UTC").to_string(), "half a le".into()] {
        put(&work, &lease);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut counter = 0;
                while !done.load(Ordering::Relaxed) {
                    sleep(Duration::from_secs(2));
                    counter += 1;
                    put(&work, &elsewhere(counter, "1970-01-01 00:00:00 UTC").to_string());
                }
            });
            let said = work.train("run", "--set train.steps=14");
            done.store(true, Ordering::Relaxed);
            said.fails(2, &parts);
        });
    }
    fs::remove_file(work.path("run/lease.json")).unwrap();
    assert!(snapshot(&work.path("run")) == before, "a refused command changed the run");
}

#[test]
fn a_job_that_is_queued_again_takes_over_from_its_earlier_start() {
    let work = Workspace::new();
    let more = "--set train.steps=400 --set data.batch_size=64 --set train.save_every=10 --set train.eval_every=0";
    let old = Process::train(&work, more, Some((77, 0)));
    reach(&work, 30);
    let new = Process::train(&work, more, Some((77, 1)));
    let new_pid = new.0.id();
    let said = old.end();
    let at_its_end = numbers(&work.path("run/train.csv"), "step").len();
    assert!(at_its_end < 400, "the old one did all its steps");
    let name = format!("run/lease.json now names job 77 (restart 1), process {new_pid} on");
    said.fails(6, &[&name, "writes nothing more"]);
    new.end().ok().says(&["taking over run/lease.json from job 77, process", "queued again", "resuming from"]);
    assert_eq!(leases(&work), [""; 0]);

    // Each step stands once, as if nobody had come between, and every checkpoint is whole.
    work.lockstep("checkpoint verify --run-dir run").ok();
    work.train("straight", more).ok();
    let columns = |run: &str| {
        let (_, rows) = table(&fs::read_to_string(work.path(run).join("train.csv")).unwrap());
        rows.iter().map(|row| (row["step"].clone(), row["loss"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(columns("run").len(), 400);
    assert_eq!(columns("run"), columns("straight"));
    let checkpoints = |run: &str| {
        let mut names: Vec<_> =
            fs::read_dir(work.path(run).join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(checkpoints("run"), checkpoints("straight"));
    let name = "checkpoints/step-00000400/model.safetensors";
    assert!(snapshot(&work.path("run"))[name] == snapshot(&work.path("straight"))[name]);
}

#[test]
fn a_stopped_process_that_was_replaced_writes_nothing_when_it_wakes() {
    // Whether another still trains there, or nobody any more.
    let cases = [Some("run/lease.json now names job 4711, process 1 on node7"), None];
    std::thread::scope(|scope| {
        for holder in cases {
            scope.spawn(move || replaced_while_stopped(holder));
        }
    });
}

fn replaced_while_stopped(holder: Option<&str>) {
    let work = Workspace::new();
    // It is not to be stopped amid a save: what was begun before the stop cannot be taken back.
    let asleep = Process::train(&work, &format!("{ENDLESS} --set train.save_every=1000"), None);
    reach(&work, 10);
    asleep.signal("STOP");
    let steps = numbers(&work.path("run/train.csv"), "step").len();
    let start = Instant::now();
    let more = format!("{ENDLESS} --set train.save_every=1000 --set train.steps={}", steps + 20);
    work.train("run", &more).ok().says(&["it stood still for 12 s"]);
    assert!(start.elapsed() >= Duration::from_secs(12), "taken over after {:?}", start.elapsed());
    let before = snapshot(&work.path("run"));
    if holder.is_some() {
        put(&work, &elsewhere(0, "1970-01-01 00:00:00 UTC").to_string());
    }
    asleep.signal("CONT");
    asleep.end().fails(6, &[holder.unwrap_or("run/lease.json is gone"), "writes nothing more"]);
    assert_eq!(leases(&work).len(), usize::from(holder.is_some()));
    let _ = fs::remove_file(work.path("run/lease.json"));
    assert!(snapshot(&work.path("run")) == before, "it wrote after it had lost its lease");
}
