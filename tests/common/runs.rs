//! Runs through the binary, for tests of several ranks and of resuming.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::{binary, sample};

/// A training run in a folder of its own.
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
        std::fs::write(&path, config.replace("data: {", &folder_key)).unwrap();
        Self { config: path, dir: folder.join(name), ranks, threads: 1 }
    }

    /// The command that starts or resumes the run.
    pub fn command(&self, more: &[&str]) -> Command {
        let mut command = self.verb("train");
        command.arg("--config").arg(&self.config).args(more).arg("--run-dir").arg(&self.dir);
        command
    }

    /// A verb on the run's ranks; one rank needs no launcher.
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

    /// Starts the run and, once train.csv holds the row of `step`, kills every process of it.
    ///
    /// `None` where the run was done before that.
    pub fn kill_at(&self, step: usize) -> Option<ExitStatus> {
        // Every process of the run, mpirun too, has the run directory at the end of its command line.
        let pattern = format!("{}$", self.dir.display());
        self.strike_at(step, |_| Command::new("pkill").args(["-KILL", "-f", &pattern]).status().unwrap().success())
    }

    /// Starts the run and, once train.csv holds the row of `step`, asks it to stop as Slurm or a person would.
    pub fn stop_at(&self, step: usize, signal: &str) -> Option<ExitStatus> {
        let signal = format!("-{signal}");
        self.strike_at(step, |pid| Command::new("kill").args([&signal, &pid.to_string()]).status().unwrap().success())
    }

    /// Starts the run and, once rank 0's log has this text, asks it to stop.
    pub fn stop_once_logged(&self, text: &str, signal: &str) -> ExitStatus {
        let mut child = self.command(&[]).stderr(Stdio::null()).spawn().unwrap();
        let log = self.dir.join("logs/rank-0000.log");
        while !std::fs::read_to_string(&log).unwrap_or_default().contains(text) {
            assert_eq!(child.try_wait().unwrap(), None, "the run ended before it said {text:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        let kill = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        child.wait().unwrap()
    }

    fn strike_at(&self, step: usize, strike: impl Fn(u32) -> bool) -> Option<ExitStatus> {
        let mut child = self.command(&[]).stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(600);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "the run ended by itself with {status}");
                return None;
            }
            if last_step(&self.dir) >= step {
                let struck = strike(child.id());
                let status = child.wait().unwrap();
                assert!(struck || status.success(), "no process was struck, and the run ended with {status}");
                return struck.then_some(status);
            }
            assert!(Instant::now() < deadline, "step {step} was not reached in time");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn last_step(dir: &Path) -> usize {
    let text = std::fs::read_to_string(dir.join("train.csv")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().next_back().and_then(|line| line.split(',').next()?.parse().ok()).unwrap_or(0)
}
