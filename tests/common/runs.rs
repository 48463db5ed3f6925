//! Runs through the binary, for tests of several ranks and of resuming.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use lockstep::watch::heartbeats::{self, Heartbeat};

use super::{binary, sample};

/// Steps of milliseconds, and far too many to finish.
pub const ENDLESS: &str =
    "device: cpu\ndata: {block_size: 32, batch_size: 8}\nmodel: {n_layer: 2, n_head: 2, n_embd: 32}\n\
    train: {steps: 1000000, eval_every: 0, save_every: 0}\n";

/// Dropout, accumulation, an epoch's end inside the run, and evaluation, saving and sampling at different steps.
pub const VARIED: &str = "seed: 11\ndata: {layout: packed, block_size: 32, batch_size: 32, micro_batch: MICRO}\n\
    model: {n_layer: 2, n_head: 2, n_embd: 32, dropout: 0.1}\n\
    optim: {lr: 1.0e-3, schedule: cosine, warmup_steps: 10}\n\
    train: {steps: 100, eval_every: 14, save_every: 6, sample_every: 9, keep_last: 3, prompts: [' A', ' The']}\n";

/// Longer than anything here takes on any machine, so only what hangs fails.
const PATIENCE: Duration = Duration::from_secs(600);

/// More steps than any test waits for. A run begun with them may end earlier: they do not affect its learning rate.
pub const NO_END: [&str; 4] = ["--set", "optim.schedule=constant", "--set", "train.steps=1000000"];

/// A training run in its own folder.
pub struct Run {
    pub config: PathBuf,
    pub dir: PathBuf,
    pub ranks: usize,
    /// CPU threads of each rank.
    pub threads: usize,
}

impl Run {
    /// Writes the configuration, with the sample's data folder.
    pub fn new(folder: &Path, name: &str, config: &str, ranks: usize) -> Self {
        let path = folder.join(format!("{name}.yaml"));
        let folder_key = format!("data: {{dir: {}, ", sample().display());
        fs::write(&path, config.replace("data: {", &folder_key)).unwrap();
        Self { config: path, dir: folder.join(name), ranks, threads: 1 }
    }

    /// The command that starts or resumes the run.
    pub fn command(&self, more: &[&str]) -> Command {
        let mut command = self.verb("train");
        command.arg("--config").arg(&self.config).args(more).arg("--run-dir").arg(&self.dir);
        command
    }

    /// The command for a verb on the run's ranks; one rank needs no launcher.
    pub fn verb(&self, verb: &str) -> Command {
        let mut command = if self.ranks == 1 {
            Command::new(binary())
        } else {
            let mut local = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/local"));
            local.arg(self.ranks.to_string()).env("LOCKSTEP_BIN", binary());
            local
        };
        command
            .arg(verb)
            .env("OMP_NUM_THREADS", self.threads.to_string())
            .env("OMP_WAIT_POLICY", "passive")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    pub fn start(&self, more: &[&str]) -> ExitStatus {
        self.command(more).stderr(Stdio::null()).status().unwrap()
    }

    /// Starts the run and, once train.csv has the row of `step`, kills all of its processes. It must not end first.
    pub fn kill_at(&self, step: usize, more: &[&str]) -> ExitStatus {
        // Every process of the run, mpirun too, has the run directory at the end of its command line.
        let pattern = format!("{}$", self.dir.display());
        self.strike_at(step, more, |_| Command::new("pkill").args(["-KILL", "-f", &pattern]).status())
    }

    /// Starts the run and, once train.csv has the row of `step`, asks it to stop as Slurm or a person would.
    pub fn stop_at(&self, step: usize, more: &[&str], signal: &str) -> ExitStatus {
        self.strike_at(step, more, |pid| kill(signal, pid))
    }

    /// Starts the run and, once rank 0's log has this text, asks it to stop.
    pub fn stop_once_logged(&self, text: &str, signal: &str) -> ExitStatus {
        let log = self.dir.join("logs/rank-0000.log");
        let logged = || fs::read_to_string(&log).unwrap_or_default().contains(text);
        self.strike_once(text, logged, &[], |pid| kill(signal, pid))
    }

    fn strike_at(&self, step: usize, more: &[&str], strike: impl Fn(u32) -> io::Result<ExitStatus>) -> ExitStatus {
        self.strike_once(&format!("step {step}"), || last_step(&self.dir) >= step, more, strike)
    }

    fn strike_once(
        &self,
        what: &str,
        happened: impl Fn() -> bool,
        more: &[&str],
        strike: impl Fn(u32) -> io::Result<ExitStatus>,
    ) -> ExitStatus {
        let mut going = Going::start(self, more);
        going.until(what, || happened().then_some(()));
        assert!(strike(going.child.id()).unwrap().success(), "no process was struck: {}", going.said());
        going.child.wait().unwrap()
    }
}

/// The last step in the run's log; 0 if there is none yet.
pub fn last_step(dir: &Path) -> usize {
    let text = fs::read_to_string(dir.join("train.csv")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().next_back().and_then(|line| line.split(',').next()?.parse().ok()).unwrap_or(0)
}

/// A run under way. Dropping it ends its processes.
pub struct Going<'a> {
    pub run: &'a Run,
    pub child: Child,
    pub stderr: PathBuf,
}

impl<'a> Going<'a> {
    pub fn start(run: &'a Run, more: &[&str]) -> Self {
        let stderr = run.dir.with_extension("stderr");
        let child = run.command(more).stderr(File::create(&stderr).unwrap()).spawn().unwrap();
        Self { run, child, stderr }
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap()
    }

    /// Waits for its end; returns the exit code and what it printed.
    #[track_caller]
    pub fn ends(mut self) -> (Option<i32>, String) {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                while is_alive(&self.run.dir) {
                    assert!(begun.elapsed() < PATIENCE, "a process is left: {}", self.said());
                    sleep(Duration::from_millis(20));
                }
                return (status.code(), self.said());
            }
            assert!(begun.elapsed() < PATIENCE, "the run goes on after {PATIENCE:?}: {}", self.said());
            sleep(Duration::from_millis(20));
        }
    }

    /// Waits until `event` returns something, and returns that.
    #[track_caller]
    pub fn until<T>(&mut self, what: &str, event: impl Fn() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = event() {
                return found;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "the run ended before {what}: {}", self.said());
            assert!(begun.elapsed() < PATIENCE, "{PATIENCE:?} passed before {what}: {}", self.said());
            sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a rank trains, and returns its process and its node.
    #[track_caller]
    pub fn trains(&mut self, rank: usize) -> (u32, String) {
        let dir = self.run.dir.clone();
        let beat = self.until("it trains", || heartbeat(&dir, rank).filter(|beat| beat.step >= 3));
        (beat.pid, beat.host)
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

/// What a rank is doing.
pub fn heartbeat(dir: &Path, rank: usize) -> Option<Heartbeat> {
    heartbeats::all(&dir.join("heartbeats")).remove(&rank)
}

fn is_alive(dir: &Path) -> bool {
    Command::new("pgrep").args(["-f", &format!("{}$", dir.display())]).stdout(Stdio::null()).status().unwrap().success()
}

fn kill(signal: &str, pid: u32) -> io::Result<ExitStatus> {
    Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status()
}

pub fn signal(name: &str, pid: u32) {
    assert!(kill(name, pid).unwrap().success(), "kill -{name} {pid}");
}

#[track_caller]
pub fn says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
}

/// What was printed, without the lines about slow ranks: on a busy machine any rank may be slow for a while.
pub fn but_for_stragglers(said: &str) -> String {
    said.lines().filter(|line| !line.contains("times as long as the median rank")).collect::<Vec<_>>().join("\n")
}

/// A pipe in place of a file. Opening it to write waits for a reader, as for a file server that is gone.
pub fn fifo(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}
