//! Who holds a lease, as the file says it.

use std::fmt;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::host;
use crate::launcher::SlurmJob;

/// The content of `lease.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Slurm's names: of the cluster, since two may share a file system, of the job, and of its place in an array.
    pub cluster: Option<String>,
    #[allow(missing_docs)]
    pub job: Option<String>,
    #[allow(missing_docs)]
    pub array: Option<String>,
    /// How often Slurm has queued the job again.
    pub restart_count: u64,
    #[allow(missing_docs)]
    pub host: String,
    /// A boot of a machine and a table of processes in it: if it is equal, so is what `pid` and `started` mean.
    pub machine: Option<String>,
    #[allow(missing_docs)]
    pub pid: u32,
    /// Clock ticks from boot to the process's start: a later process may have the same number.
    pub started: Option<u64>,
    /// A name that no other process has.
    pub token: String,
    /// Renewals so far.
    pub counter: u64,
    /// Wall time of the taking, for people only.
    pub since: String,
}

impl Holder {
    /// This process, at its first renewal.
    pub fn this_process() -> Self {
        let slurm = SlurmJob::from_environment();
        let pid = std::process::id();
        // The standard library draws the keys of its hash tables from the system.
        let random = || RandomState::new().hash_one(pid);
        Self {
            cluster: slurm.as_ref().and_then(|job| job.cluster.clone()),
            array: slurm.as_ref().and_then(|job| job.array.clone()),
            restart_count: slurm.as_ref().map_or(0, |job| job.restarts),
            job: slurm.map(|job| job.id),
            host: host::name(),
            machine: machine(),
            pid,
            started: started(pid).ok().flatten(),
            token: format!("{:016x}{:016x}", random(), random()),
            counter: 0,
            since: Timestamp::now().strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
        }
    }

    /// The holder that a file's bytes name; `None`, if they are no lease.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let holder: Self = serde_json::from_slice(bytes).ok()?;
        // They are shown on terminals.
        let texts = [&holder.cluster, &holder.job, &holder.array].into_iter().flatten();
        let plain = texts.chain([&holder.host, &holder.since]).all(|text| is_plain(text));
        plain.then_some(holder)
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Numbers and texts always have a JSON form.
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Whether this is the same job as `other`, before Slurm queued it again.
    pub fn is_earlier_start_of(&self, other: &Self) -> bool {
        let same = self.job.is_some() && (&self.cluster, &self.job) == (&other.cluster, &other.job);
        same && self.restart_count < other.restart_count
    }

    /// Whether the process is known to have ended.
    pub fn is_gone(&self) -> bool {
        self.lives() == Some(false)
    }

    /// Whether the process lives, if that is known: only on its own machine can it be seen.
    pub fn lives(&self) -> Option<bool> {
        // If /proc shows the first process, it hides none.
        let visible = || Path::new("/proc/1/stat").exists();
        if self.machine.is_none() || self.machine != machine() || !visible() {
            return None;
        }
        match started(self.pid) {
            Ok(None) => Some(false),
            Ok(now) => self.started.is_some().then(|| now == self.started),
            Err(_) => None,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(job) = &self.job {
            write!(f, "job {job}")?;
            match (&self.array, self.restart_count) {
                (Some(array), 0) => write!(f, " ({array})")?,
                (None, 0) => {}
                (Some(array), count) => write!(f, " ({array}, restart {count})")?,
                (None, count) => write!(f, " (restart {count})")?,
            }
            write!(f, ", ")?;
        }
        write!(f, "process {} on {} since {}", self.pid, self.host, self.since)
    }
}

fn is_plain(text: &str) -> bool {
    text.len() <= 256 && !text.chars().any(char::is_control)
}

/// `None`, if the system is not Linux.
fn machine() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let processes = fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), processes.display()))
}

/// When a process started, in clock ticks after boot; `None`, if there is none of that number that still runs.
fn started(pid: u32) -> io::Result<Option<u64>> {
    let stat = match fs::read(format!("/proc/{pid}/stat")) {
        Ok(stat) => String::from_utf8_lossy(&stat).into_owned(),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    // The second field is the program's name in parentheses, of any letters; the third is the state.
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ended = matches!(fields.next(), Some("Z" | "X"));
    let ticks = fields.nth(18).and_then(|field| field.parse().ok());
    match ticks {
        _ if ended => Ok(None),
        Some(ticks) => Ok(Some(ticks)),
        None => Err(ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn a_holder_is_read_as_it_was_written_and_nothing_else_is() {
        let holder = Holder { job: Some("7".into()), counter: 3, ..Holder::this_process() };
        let bytes = holder.to_bytes();
        assert_eq!(Holder::parse(&bytes), Some(holder.clone()));
        for cut in 0..bytes.len() - 2 {
            assert_eq!(Holder::parse(&bytes[..cut]), None, "cut at byte {cut}");
        }
        for damaged in [&b"{}"[..], b"[]", b"\xff", b"{\"token\": 3}"] {
            assert_eq!(Holder::parse(damaged), None);
        }
        // A terminal's escapes are no host's name.
        assert_eq!(Holder::parse(&Holder { host: "\x1b[2J".into(), ..holder.clone() }.to_bytes()), None);
        assert_eq!(Holder::parse(&Holder { since: "x".repeat(300), ..holder }.to_bytes()), None);
    }

    #[test]
    fn two_processes_of_one_number_are_two() {
        let me = Holder::this_process();
        assert!(!me.is_gone());
        assert!(Holder { started: me.started.map(|ticks| ticks + 1), ..me.clone() }.is_gone());
        assert!(!Holder { machine: Some("another".into()), pid: u32::MAX, ..me.clone() }.is_gone());
        assert!(!Holder { machine: None, pid: u32::MAX, ..me.clone() }.is_gone());
        assert!(Holder { pid: u32::MAX, ..me.clone() }.is_gone());
        // Dead, but nobody has asked for its exit code yet.
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let of_child = Holder { pid: child.id(), started: started(child.id()).unwrap(), ..me };
        assert!(!of_child.is_gone());
        child.kill().unwrap();
        while !of_child.is_gone() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.wait().unwrap();
        assert!(of_child.is_gone());
    }

    #[test]
    fn only_a_higher_restart_count_of_the_same_job_comes_later() {
        let start = |job: Option<&str>, restart_count| {
            let cluster = Some("here".into());
            Holder { cluster, job: job.map(Into::into), restart_count, ..Holder::this_process() }
        };
        assert!(start(Some("7"), 0).is_earlier_start_of(&start(Some("7"), 1)));
        assert!(!start(Some("7"), 1).is_earlier_start_of(&start(Some("7"), 1)));
        assert!(!start(Some("7"), 2).is_earlier_start_of(&start(Some("7"), 1)));
        assert!(!start(Some("8"), 0).is_earlier_start_of(&start(Some("7"), 1)));
        assert!(!start(None, 0).is_earlier_start_of(&start(None, 1)));
        let elsewhere = Holder { cluster: Some("there".into()), ..start(Some("7"), 0) };
        assert!(!elsewhere.is_earlier_start_of(&start(Some("7"), 1)));
    }
}
