//! One run directory, one job: who is refused, who takes over and when, and that a replaced job writes nothing more.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use crate::common::alike::assert_alike;
use crate::common::{binary, numbers, snapshot, Output, Workspace};

/// Steps of some milliseconds, and more than any test waits for.
const ENDLESS: &str = "--set train.steps=1000000 --set train.eval_every=0 --set train.sample_every=0";

/// A holder trusts its last look at the lease for so long, so millisecond steps do not each look at it.
const LOOKED_AT: Duration = Duration::from_millis(100);

/// A training that runs while the test does something else; it is killed if the test ends first.
struct Process(Child);

impl Process {
    /// Trains `tiny.yaml` into `run`, as this start of a Slurm job or outside of any job.
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

    /// Stops it, and waits until each of its threads has stopped.
    fn stop(&self) {
        self.signal("STOP");
        let stopped = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T"))
        };
        let tasks = format!("/proc/{}/task", self.0.id());
        while !fs::read_dir(&tasks).unwrap().all(|task| stopped(task.unwrap())) {
            sleep(Duration::from_millis(1));
        }
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
        assert!(start.elapsed() < Duration::from_secs(600), "step {step} was not reached");
        sleep(Duration::from_millis(5));
    }
}

/// The names in `run` that begin with the lease's.
fn leases(work: &Workspace) -> Vec<String> {
    let names = fs::read_dir(work.path("run")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("lease.json")).collect()
}

/// The lease of a process on a machine that cannot be inspected from here.
fn elsewhere(counter: u64, since: &str) -> Value {
    json!({
        "cluster": null, "job": "4711", "array": null, "restart_count": 0, "host": "node7", "machine": "another boot",
        "pid": 1, "started": 1, "token": "0123456789abcdef", "counter": counter, "since": since
    })
}

/// Gives `run` another holder, in the way that holders do it.
fn put(work: &Workspace, lease: &str) {
    fs::write(work.path("other"), lease).unwrap();
    fs::rename(work.path("other"), work.path("run/lease.json")).unwrap();
}

#[test]
fn a_second_process_is_refused_with_the_name_of_the_first() {
    let work = Workspace::in_memory();
    let first = Process::train(&work, ENDLESS, Some((77, 2)));
    reach(&work, 5);
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let name = format!("job 77 (restart 2), process {} on {} since 20", first.0.id(), host.trim());
    let parts = ["run is in use", &name, "which is alive", "stop it, or use another --run-dir"];
    work.train("run", ENDLESS).fails(2, &parts);
    // The same start of the job does not take over either.
    Process::train(&work, ENDLESS, Some((77, 2))).end().fails(2, &[&name]);
    // A renewal may be in progress.
    let start = Instant::now();
    while leases(&work) != ["lease.json"] {
        assert!(start.elapsed() < Duration::from_secs(600), "left behind: {:?}", leases(&work));
        sleep(Duration::from_millis(5));
    }
    // The first has not noticed, and its end frees the run directory.
    first.signal("TERM");
    first.end().fails(75, &["saved in run/checkpoints"]);
    assert_eq!(leases(&work), [""; 0]);
    let steps = numbers(&work.path("run/train.csv"), "step").len();
    let said = work.train("run", &format!("--set train.steps={}", steps + 2)).ok();
    assert!(!said.stderr.contains("taking over"), "{}", said.stderr);
    assert_eq!(leases(&work), [""; 0]);
    // A start that fails leaves no lease either.
    work.train("run", "--resume never").fails(2, &["holds checkpoints"]);
    assert_eq!(leases(&work), [""; 0]);
}

#[test]
fn a_killed_process_is_replaced_at_once_on_its_machine() {
    let work = Workspace::in_memory();
    let killed = Process::train(&work, ENDLESS, None);
    reach(&work, 10);
    let pid = killed.0.id();
    killed.signal("KILL");
    assert_eq!(killed.end().code, -1);
    assert!(work.path("run/lease.json").exists());
    // A process that is killed during a renewal may leave this.
    fs::write(work.path("run/lease.json.0123"), "half a le").unwrap();
    let parts = ["taking over run/lease.json from process", &pid.to_string(), "its process no longer exists"];
    let said = work.train("run", "").ok().says(&parts);
    assert!(!said.stderr.contains("waiting"), "{}", said.stderr);
    assert_eq!(leases(&work), [""; 0]);
}

#[test]
fn a_lease_of_another_machine_that_is_renewed_is_respected() {
    let work = Workspace::in_memory();
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
                    sleep(Duration::from_millis(100));
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
    let work = Workspace::in_memory();
    let more = format!("{ENDLESS} --set train.save_every=10");
    let old = Process::train(&work, &more, Some((77, 0)));
    reach(&work, 30);
    let new = Process::train(&work, &more, Some((77, 1)));
    let new_pid = new.0.id();
    let said = old.end();
    let name = format!("run/lease.json now names job 77 (restart 1), process {new_pid} on");
    said.fails(6, &[&name, "writes nothing more"]);
    // Past the last row of the old one; the new one starts before that row.
    reach(&work, numbers(&work.path("run/train.csv"), "step").len() + 20);
    new.signal("TERM");
    new.end().fails(75, &["taking over run/lease.json from job 77, process", "queued again", "resuming from"]);
    assert_eq!(leases(&work), [""; 0]);

    // As if there had been no takeover.
    work.lockstep("checkpoint verify --run-dir run").ok();
    let steps = numbers(&work.path("run/train.csv"), "step").len();
    work.train("straight", &format!("{more} --set train.steps={steps}")).ok();
    assert_alike(&work.path("run"), &work.path("straight"));
}

#[test]
fn a_stopped_process_that_was_replaced_writes_nothing_when_it_wakes() {
    // Another still trains there, or nobody does any more.
    replaced_while_stopped(Some("run/lease.json now names job 4711, process 1 on node7"));
    replaced_while_stopped(None);
}

fn replaced_while_stopped(holder: Option<&str>) {
    let work = Workspace::in_memory();
    // It must not be stopped during a save: what was begun before the stop cannot be undone.
    let asleep = Process::train(&work, &format!("{ENDLESS} --set train.save_every=0"), None);
    reach(&work, 10);
    asleep.stop();
    fs::remove_file(work.path("run/lease.json")).unwrap();
    if holder.is_some() {
        put(&work, &elsewhere(0, "1970-01-01 00:00:00 UTC").to_string());
    }
    // It may have been about to renew its own lease.
    let others = || {
        let mut files = snapshot(&work.path("run"));
        files.retain(|name, _| !name.starts_with("lease.json."));
        files
    };
    let before = others();
    sleep(LOOKED_AT);
    asleep.signal("CONT");
    asleep.end().fails(6, &[holder.unwrap_or("run/lease.json is gone"), "writes nothing more"]);
    assert!(others() == before, "it wrote after it had lost its lease");
    assert_eq!(leases(&work).len(), usize::from(holder.is_some()));
}
