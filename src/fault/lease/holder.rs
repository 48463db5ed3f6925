//! Who holds a lease, as the file says it.

use std::fmt;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::device;

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
    /// A boot of a machine and a table of processes in it: where it is equal, so is what `pid` and `started` mean.
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
        let of_slurm = |name: &str| std::env::var(name).ok().filter(|value| is_plain(value));
        let task = of_slurm("SLURM_ARRAY_TASK_ID");
        let array = of_slurm("SLURM_ARRAY_JOB_ID").zip(task).map(|(job, task)| format!("{job}_{task}"));
        let pid = std::process::id();
        // The standard library draws the keys of its hash tables from the system.
        let random = || RandomState::new().hash_one(pid);
        Self {
            cluster: of_slurm("SLURM_CLUSTER_NAME"),
            job: of_slurm("SLURM_JOB_ID"),
            array,
            restart_count: of_slurm("SLURM_RESTART_COUNT").and_then(|count| count.parse().ok()).unwrap_or(0),
            host: device::host(),
            machine: machine(),
            pid,
            started: started(pid).ok().flatten(),
            token: format!("{:016x}{:016x}", random(), random()),
            counter: 0,
            since: utc(SystemTime::now()),
        }
    }

    /// The holder that a file's bytes name; `None`, where they are no lease.
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

    /// Whether the process is known to have ended: only on its own machine can that be seen.
    pub fn is_gone(&self) -> bool {
        // Where /proc shows the first process, it hides none.
        let visible = || Path::new("/proc/1/stat").exists();
        if self.machine.is_none() || self.machine != machine() || !visible() {
            return false;
        }
        match started(self.pid) {
            Ok(None) => true,
            Ok(now) => self.started.is_some() && now != self.started,
            Err(_) => false,
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

/// `None`, where the system is not Linux.
fn machine() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let processes = fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), processes.display()))
}

/// When a process started, in clock ticks after boot; `None`, where there is none of that number that still runs.
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

/// A time as people read it, such as `2026-03-01 12:00:00 UTC`. The days' way to a date begins years in March, so that
/// the odd day comes last.
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400); // from the first of March of the year 0
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // from March
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (era * 400 + year + u64::from(month > 9), if month > 9 { month - 9 } else { month + 3 });
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
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

    #[test]
    fn dates_are_the_calendars() {
        let at = |seconds| utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(at(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(at(1_772_366_400), "2026-03-01 12:00:00 UTC");
        assert_eq!(at(1_798_761_599), "2026-12-31 23:59:59 UTC");
    }
}
