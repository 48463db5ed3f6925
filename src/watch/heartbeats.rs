//! What each rank leaves in the run directory, so that the others can tell which one has stopped, and where.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Phase;

/// The last that is known of a rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Heartbeat {
    pub rank: usize,
    pub host: String,
    pub pid: u32,
    /// The step that it computes, or has done.
    pub step: usize,
    pub phase: Phase,
    /// Seconds since the last progress of the rank.
    pub phase_s: u64,
    /// Goes up as long as the process runs, whatever its main thread does.
    pub beat: u64,
}

impl Heartbeat {
    fn describe(&self) -> String {
        format!("step {}, {}, {} s into it", self.step, self.phase.name(), self.phase_s)
    }
}

/// Heartbeats that a rank that lives leaves while the others listen, at the least. A launcher that ends a job wakes stopped
/// processes first, and they may leave one more.
const EXPECTED: u64 = 2;

fn beats(before: &Option<Heartbeat>, after: &Option<Heartbeat>) -> u64 {
    let count = |seen: &Option<Heartbeat>| seen.as_ref().map_or(0, |seen| seen.beat);
    count(after).saturating_sub(count(before))
}

fn path(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank:04}.json"))
}

/// Replaces a rank's heartbeat. It is not made durable: it means nothing after a crash of the machine.
pub fn write(folder: &Path, heartbeat: &Heartbeat) -> io::Result<()> {
    let path = path(folder, heartbeat.rank);
    let temporary = path.with_extension("json.tmp");
    let text = serde_json::to_string(heartbeat)? + "\n";
    let written = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// `None` if there is none, or none that can be read.
pub fn read(folder: &Path, rank: usize) -> Option<Heartbeat> {
    serde_json::from_slice(&fs::read(path(folder, rank)).ok()?).ok()
}

/// Those of all ranks that have left one that can be read.
pub fn all(folder: &Path) -> Vec<Heartbeat> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let number = |name: &str| name.strip_prefix("rank-")?.strip_suffix(".json")?.parse().ok();
    files.filter_map(|file| read(folder, number(file.file_name().to_str()?)?)).collect()
}

/// Names the ranks that hold up rank `me`, by the heartbeats of all ranks before and after some seconds: those whose
/// heartbeats have stopped; else those that are busy with something of their own; else those that are behind.
///
/// No clock is compared: those of the nodes may differ.
pub fn judge(me: usize, before: &[Option<Heartbeat>], after: &[Option<Heartbeat>]) -> String {
    let ranks = || after.iter().enumerate().filter(|(rank, _)| *rank != me);
    let silent: Vec<String> = ranks()
        .filter(|(rank, now)| beats(&before[*rank], now) < EXPECTED)
        .map(|(rank, now)| match now {
            Some(last) => {
                format!("rank {rank} on {} (process {}) has stopped: {}", last.host, last.pid, last.describe())
            }
            None => format!("rank {rank} has left no heartbeat"),
        })
        .collect();
    if !silent.is_empty() {
        return list(&silent);
    }
    let name = |what: &str, chosen: &dyn Fn(&Heartbeat) -> bool| -> Vec<String> {
        let found = ranks().filter_map(|(rank, now)| Some((rank, now.as_ref()?))).filter(|(_, now)| chosen(now));
        found.map(|(rank, now)| format!("rank {rank} on {} {what}: {}", now.host, now.describe())).collect()
    };
    let busy = name("lives but is not here", &|now| !now.phase.waits());
    if !busy.is_empty() {
        return list(&busy);
    }
    let newest = after.iter().flatten().map(|now| now.step).max().unwrap_or(0);
    let behind = name("is behind", &|now| now.step < newest);
    match behind.is_empty() {
        false => list(&behind),
        true => "all other ranks live and wait, too: the network between them may be at fault".into(),
    }
}

/// As many as a person will read.
fn list(found: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = found.len().saturating_sub(SHOWN);
    let rest = if more > 0 { format!("; and {more} more ranks") } else { String::new() };
    found[..found.len().min(SHOWN)].join("; ") + &rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heartbeat(rank: usize, step: usize, phase: Phase, beat: u64) -> Option<Heartbeat> {
        Some(Heartbeat { rank, host: format!("n{rank}"), pid: 100, step, phase, phase_s: 4, beat })
    }

    #[test]
    fn the_one_that_stopped_is_named_before_those_that_only_wait() {
        let before: Vec<_> = (0..4).map(|rank| heartbeat(rank, 7, Phase::Exchange, 10)).collect();
        let mut after: Vec<_> = (0..4).map(|rank| heartbeat(rank, 7, Phase::Exchange, 12)).collect();
        assert!(judge(0, &before, &after).contains("all other ranks live"));
        after[2] = before[2].clone();
        let said = judge(0, &before, &after);
        assert_eq!(said, "rank 2 on n2 (process 100) has stopped: step 7, exchange with the other ranks, 4 s into it");
        after[2].as_mut().unwrap().beat += 1;
        assert!(judge(0, &before, &after).contains("rank 2 on n2 (process 100) has stopped"));
        after[3] = None;
        assert!(judge(0, &before, &after).ends_with("; rank 3 has left no heartbeat"));
        // Nobody names itself.
        after[0] = before[0].clone();
        assert!(!judge(0, &before, &after).contains("rank 0"));
    }

    #[test]
    fn a_rank_that_lives_is_named_where_it_is_busy_or_behind() {
        let before: Vec<_> = (0..3).map(|rank| heartbeat(rank, 7, Phase::Exchange, 10)).collect();
        let mut after: Vec<_> = (0..3).map(|rank| heartbeat(rank, 7, Phase::Exchange, 12)).collect();
        after[1] = heartbeat(1, 6, Phase::Exchange, 12);
        assert_eq!(
            judge(0, &before, &after),
            "rank 1 on n1 is behind: step 6, exchange with the other ranks, 4 s into it"
        );
        after[2] = heartbeat(2, 7, Phase::Sampling, 12);
        assert_eq!(judge(0, &before, &after), "rank 2 on n2 lives but is not here: step 7, sampling, 4 s into it");
    }

    #[test]
    fn a_thousand_silent_ranks_are_a_line() {
        let said = judge(0, &vec![None; 1000], &vec![None; 1000]);
        assert!(said.len() < 500 && said.ends_with("and 991 more ranks"), "{said}");
    }

    #[test]
    fn a_heartbeat_is_replaced_and_read() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path(), 3), None);
        for beat in 1..=3 {
            let heartbeat = heartbeat(3, 5, Phase::StartUp, beat);
            write(folder.path(), heartbeat.as_ref().unwrap()).unwrap();
            assert_eq!(read(folder.path(), 3), heartbeat);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let text = fs::read_to_string(folder.path().join("rank-0003.json")).unwrap();
        assert!(text.contains("\"phase\":\"start-up\""), "{text}");
        fs::write(folder.path().join("rank-0003.json"), "{\"rank\":").unwrap();
        assert_eq!(read(folder.path(), 3), None);
        assert!(write(&folder.path().join("absent"), &heartbeat(0, 1, Phase::Step, 1).unwrap()).is_err());
    }
}
