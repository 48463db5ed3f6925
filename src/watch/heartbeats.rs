//! What each rank leaves in the run directory, so that the others can tell which one has stopped, and where.
//!
//! The ranks of a node share a file, which is named after the first of them. Each has two records there, of fixed length, and
//! writes them in turn: whoever reads finds one of them whole, also if the rank dies while it writes. A record is a line:
//! the first digits of the SHA-256 of a JSON object, and that object. One whose digits do not fit is not believed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Phase, Place};
use crate::files::hex;

/// Files that the nodes of a job write in a second, at the most: what one server of a shared file system takes without
/// noticing.
const FILES_A_SECOND: usize = 100;

/// Bytes of a record. A page of memory holds a whole number of them.
const RECORD: usize = 512;

/// Digits of the check that a record begins with.
const CHECK: usize = 8;

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
    /// Seconds until it goes up again.
    pub every_s: u64,
}

impl Heartbeat {
    fn describe(&self) -> String {
        format!("step {}, {}, {} s into it", self.step, self.phase.name(), self.phase_s)
    }

    fn to_record(&self) -> io::Result<Vec<u8>> {
        let text = serde_json::to_string(self)?;
        let line = format!("{} {text}", check(&text));
        match line.len() < RECORD {
            true => Ok(format!("{line:<width$}\n", width = RECORD - 1).into_bytes()),
            false => Err(io::Error::other(format!("{line:?} has more than the {RECORD} bytes of a record"))),
        }
    }

    fn from_record(record: &[u8]) -> Option<Self> {
        let (digits, text) = std::str::from_utf8(record).ok()?.trim_end().split_once(' ')?;
        (digits == check(text)).then(|| serde_json::from_str(text).ok())?
    }
}

fn check(text: &str) -> String {
    hex(&Sha256::digest(text)[..CHECK / 2])
}

/// Heartbeats that a rank that lives leaves while the others listen, at the least. A launcher that ends a job wakes stopped
/// processes first, and they may leave one more.
const EXPECTED: u64 = 2;

fn beats(before: &Option<Heartbeat>, after: &Option<Heartbeat>) -> u64 {
    let count = |seen: &Option<Heartbeat>| seen.as_ref().map_or(0, |seen| seen.beat);
    count(after).saturating_sub(count(before))
}

/// Between two heartbeats of a rank, in whole seconds: so long that all nodes together write no more than
/// [`FILES_A_SECOND`].
pub fn interval(nodes: usize) -> Duration {
    Duration::from_secs(nodes.div_ceil(FILES_A_SECOND).max(1) as u64)
}

/// Leaves a rank's heartbeat. It is not made durable: it means nothing after a crash of the machine.
///
/// # Errors
/// The file system's; one if the heartbeat does not fit, because of a node's long name.
pub fn write(folder: &Path, place: &Place, heartbeat: &Heartbeat) -> io::Result<()> {
    let record = heartbeat.to_record()?;
    let slot = 2 * place.local_rank as u64 + heartbeat.beat % 2;
    let path = folder.join(format!("node-{:04}.txt", place.node));
    // NFS shows other nodes what was written once the file is closed, which it is here.
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    file.write_all_at(&record, slot * RECORD as u64)
}

/// The last heartbeat of each rank that has left one.
pub fn all(folder: &Path) -> BTreeMap<usize, Heartbeat> {
    let mut found = BTreeMap::new();
    for file in fs::read_dir(folder).into_iter().flatten().flatten() {
        let records = fs::read(file.path()).unwrap_or_default();
        for heartbeat in records.chunks_exact(RECORD).filter_map(Heartbeat::from_record) {
            let known: &mut Heartbeat = found.entry(heartbeat.rank).or_insert_with(|| heartbeat.clone());
            if known.beat < heartbeat.beat {
                *known = heartbeat;
            }
        }
    }
    found
}

/// The last heartbeat of each of `ranks` ranks; `None` for one that has left none.
pub fn of_ranks(folder: &Path, ranks: usize) -> Vec<Option<Heartbeat>> {
    let mut all = all(folder);
    (0..ranks).map(|rank| all.remove(&rank)).collect()
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
        Some(Heartbeat { rank, host: format!("n{rank}"), pid: 100, step, phase, phase_s: 4, beat, every_s: 1 })
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

    /// The place of a rank in a job of four ranks on two nodes.
    fn place(rank: usize) -> Place {
        let (local_rank, node) = (rank % 2, rank / 2 * 2);
        Place { rank, world_size: 4, local_rank, node, nodes: 2, host: format!("n{node}") }
    }

    fn leave(folder: &Path, rank: usize, beat: u64) -> Option<Heartbeat> {
        let heartbeat = heartbeat(rank, 5, Phase::StartUp, beat);
        write(folder, &place(rank), heartbeat.as_ref().unwrap()).unwrap();
        heartbeat
    }

    #[test]
    fn the_ranks_of_a_node_share_a_file_that_does_not_grow() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(of_ranks(folder, 4), vec![None; 4]);
        for beat in 1..=5 {
            // The last two ranks of each beat come before the first two.
            let mut left: Vec<_> = [3, 2, 1, 0].map(|rank| leave(folder, rank, beat + rank as u64)).into();
            left.reverse();
            assert_eq!(of_ranks(folder, 4), left);
        }
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap()).collect();
        files.sort_by_key(fs::DirEntry::file_name);
        assert_eq!(files.iter().map(fs::DirEntry::file_name).collect::<Vec<_>>(), ["node-0000.txt", "node-0002.txt"]);
        for file in files {
            let text = fs::read_to_string(file.path()).unwrap();
            assert_eq!(text.len(), 4 * RECORD);
            assert!(text.lines().all(|line| line[CHECK..].starts_with(" {\"rank\":")), "{text}");
            assert!(text.contains("\"phase\":\"start-up\""), "{text}");
        }
        let absent = write(&folder.join("absent"), &place(0), &heartbeat(0, 1, Phase::Step, 1).unwrap());
        assert!(absent.is_err());
    }

    #[test]
    fn what_is_written_in_part_is_not_believed_and_what_was_there_before_is() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let file = folder.join("node-0000.txt");
        leave(folder, 0, 8);
        let (before, other) = (leave(folder, 0, 9), leave(folder, 1, 1));
        let old = fs::read(&file).unwrap();
        // Beat 10 goes where beat 8 was, and as long a record's beginning or end may be there already.
        leave(folder, 0, 10);
        let new = fs::read(&file).unwrap();
        let differ: Vec<usize> = (0..RECORD).filter(|&at| old[at] != new[at]).collect();
        let (first, last) = (differ[0], differ[differ.len() - 1]);
        assert!(first < CHECK && last > CHECK, "{first} to {last}");
        for cut in 0..RECORD {
            for torn in [[&new[..cut], &old[cut..]].concat(), [&old[..cut], &new[cut..RECORD], &old[RECORD..]].concat()]
            {
                fs::write(&file, &torn).unwrap();
                let found = of_ranks(folder, 2);
                let (is_old, is_new) = (torn == old, torn[..RECORD] == new[..RECORD]);
                let beat = found[0].as_ref().unwrap().beat;
                assert_eq!((beat, &found[1]), (if is_new { 10 } else { 9 }, &other), "cut at {cut}, old: {is_old}");
            }
            // A file that is cut short loses only what it lost.
            fs::write(&file, &new[..RECORD + cut]).unwrap();
            assert_eq!(of_ranks(folder, 2), [heartbeat(0, 5, Phase::StartUp, 10), None]);
        }
        // Nothing but the record of beat 9 is left, and a hole.
        fs::write(&file, [&vec![0; RECORD], &old[RECORD..2 * RECORD]].concat()).unwrap();
        assert_eq!(of_ranks(folder, 2), [before, None]);
    }

    #[test]
    fn a_name_that_does_not_fit_is_said_and_harms_no_neighbour() {
        let folder = tempfile::tempdir().unwrap();
        let kept = leave(folder.path(), 1, 1);
        let long = Heartbeat { host: "n".repeat(RECORD), ..heartbeat(0, 1, Phase::Step, 1).unwrap() };
        let said = write(folder.path(), &place(0), &long).unwrap_err().to_string();
        assert!(said.contains("more than the 512 bytes"), "{said}");
        assert_eq!(of_ranks(folder.path(), 2), [None, kept]);
        // The longest name that DNS has, and the largest numbers, do fit.
        let most = u32::MAX as usize;
        let host = "n".repeat(253);
        let largest = Heartbeat { rank: most, host, pid: u32::MAX, step: most, ..long };
        let largest = Heartbeat { phase_s: u64::MAX, beat: u64::MAX, every_s: u64::MAX, ..largest };
        assert_eq!(Heartbeat::from_record(&largest.to_record().unwrap()), Some(largest));
    }

    #[test]
    fn many_nodes_beat_seldom_and_never_write_more_than_a_hundred_files_a_second() {
        assert_eq!([1, 2, 100].map(|nodes| interval(nodes).as_secs()), [1, 1, 1]);
        assert_eq!([101, 128, 1024, 2048].map(|nodes| interval(nodes).as_secs()), [2, 2, 11, 21]);
        for nodes in 1..=20_000 {
            assert!(nodes as f64 / interval(nodes).as_secs_f64() <= 100.0, "{nodes} nodes");
        }
    }
}
