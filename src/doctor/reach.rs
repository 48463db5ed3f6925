//! Whether the nodes reach each other through the networks that MPI would take, tried before MPI starts: Open MPI ends the
//! job itself, without naming a reason, if they do not.
//!
//! The ranks meet in the run directory, the one thing that they share before MPI joins them. Each opens a door on each of
//! its interfaces and knocks at the next rank's; rank 0 collects what all have found and passes it on to all.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::{de::DeserializeOwned, Deserialize, Serialize};

use super::network::Interface;
use crate::patience::{until, Patience};

/// How long ranks wait for each other's files. They are started together, but a folder may be slow to show them.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a door may take to answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// Something about a network, and whether it keeps the job from training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub is_fault: bool,
    pub what: String,
}

/// A rank's place in a meeting of all.
pub struct Meeting {
    folder: PathBuf,
    /// What names the job, and is its password.
    job: String,
    rank: usize,
    ranks: usize,
}

/// A rank's node, and where it can be knocked at: (interface, address).
#[derive(Serialize, Deserialize)]
struct Doors {
    host: String,
    open: Vec<(String, SocketAddr)>,
}

impl Meeting {
    pub fn new(run_dir: &Path, job: &str, rank: usize, ranks: usize) -> Self {
        let job: String = job.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let run_dir = std::path::absolute(run_dir).unwrap_or_else(|_| run_dir.to_path_buf());
        Self { folder: run_dir.join(format!(".doctor-{job}")), job, rank, ranks }
    }

    /// Tries the networks of these interfaces, and returns what all ranks have found, `mine` included. Just that if the
    /// ranks do not meet: then the run directory is not shared, which is found out later.
    pub fn hold(&self, host: &str, interfaces: &[&Interface], were_chosen: bool, mine: Vec<Finding>) -> Vec<Finding> {
        let before = self.missing();
        if self.rank == 0 && fs::create_dir_all(&self.folder).is_err() {
            return mine;
        }
        let met = self.meet(host, interfaces, were_chosen, &mine);
        if self.rank == 0 {
            // The others take their file away once they know.
            until(ANSWERS_WITHIN, || (1..self.ranks).all(|rank| !self.file("found", rank).exists()).then_some(()));
            let _ = fs::remove_dir_all(&self.folder);
            before.iter().for_each(|folder| drop(fs::remove_dir(folder)));
        }
        met.unwrap_or(mine)
    }

    /// The folders that are not there yet, innermost first.
    fn missing(&self) -> Vec<PathBuf> {
        self.folder.ancestors().skip(1).take_while(|folder| !folder.exists()).map(Path::to_path_buf).collect()
    }

    fn meet(&self, host: &str, interfaces: &[&Interface], were_chosen: bool, mine: &[Finding]) -> Option<Vec<Finding>> {
        let answer = |rank: usize| format!("{} {rank}", self.job);
        let open = interfaces.iter().filter_map(|interface| {
            let door = open(interface.address?, answer(self.rank)).ok()?;
            Some((interface.name.clone(), door))
        });
        self.post("doors", self.rank, &Doors { host: host.into(), open: open.collect() }).ok()?;
        let next = (self.rank + 1) % self.ranks;
        let doors: Doors = self.read("doors", next, PATIENCE)?;
        let mut found = mine.to_vec();
        if doors.host != host {
            let tried = doors.open.iter().map(|(name, door)| (name.as_str(), *door, knock(*door, &answer(next))));
            found.extend(judge(host, &doors.host, were_chosen, &tried.collect::<Vec<_>>()));
        }
        self.post("found", self.rank, &found).ok()?;
        if self.rank == 0 {
            let mut all = Vec::new();
            let mut patience = Patience::begin();
            for rank in 0..self.ranks {
                let left = PATIENCE.saturating_sub(patience.waited());
                all.extend(self.read::<Vec<Finding>>("found", rank, left)?);
            }
            self.post("all", 0, &all).ok()?;
            return Some(all);
        }
        let all = self.read("all", 0, PATIENCE + PATIENCE);
        let _ = fs::remove_file(self.file("found", self.rank));
        all
    }

    fn file(&self, what: &str, rank: usize) -> PathBuf {
        self.folder.join(format!("{what}-{rank}"))
    }

    /// Complete or absent, as a rename is.
    fn post(&self, what: &str, rank: usize, content: &impl Serialize) -> io::Result<()> {
        let unfinished = self.folder.join(format!("{what}-{rank}.tmp"));
        let content = serde_json::to_vec(content)?;
        // The others wait for rank 0 to make the folder.
        let written = until(PATIENCE, || fs::write(&unfinished, &content).ok());
        written.ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))?;
        fs::rename(unfinished, self.file(what, rank))
    }

    fn read<T: DeserializeOwned>(&self, what: &str, rank: usize, patience: Duration) -> Option<T> {
        let bytes = until(patience, || fs::read(self.file(what, rank)).ok())?;
        serde_json::from_slice(&bytes).ok()
    }
}

/// Opens a door at this address that gives everyone this answer, for as long as the process lives.
fn open(address: Ipv4Addr, answer: String) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((IpAddr::V4(address), 0))?;
    let door = listener.local_addr()?;
    let serve = move || {
        for mut visitor in listener.incoming().flatten() {
            let _ = visitor.write_all(answer.as_bytes());
        }
    };
    thread::Builder::new().name("door".into()).spawn(serve)?;
    Ok(door)
}

/// Whether behind this door is who should be.
fn knock(door: SocketAddr, expected: &str) -> std::result::Result<(), String> {
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&door, ANSWERS_WITHIN)?;
        stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    match ask() {
        Ok(answer) if answer == expected => Ok(()),
        Ok(_) => Err("another process answers there".into()),
        Err(error) => {
            let error: io::Error = error;
            Err(error.to_string())
        }
    }
}

/// What a node's doors say: a fault if MPI must use these networks and none of them leads there.
fn judge(
    from: &str,
    to: &str,
    were_chosen: bool,
    tried: &[(&str, SocketAddr, std::result::Result<(), String>)],
) -> Option<Finding> {
    let good: Vec<&str> = tried.iter().filter(|(_, _, answer)| answer.is_ok()).map(|(name, ..)| *name).collect();
    let bad: Vec<String> = tried
        .iter()
        .filter_map(|(name, door, answer)| Some(format!("{name} at {} ({})", door.ip(), answer.as_ref().err()?)))
        .collect();
    let what = match (bad.is_empty(), good.is_empty()) {
        (true, false) => return None,
        (true, true) if !were_chosen => return None,
        (true, true) => format!("{to} has no address by which {from} could reach it"),
        (false, true) => format!("{from} does not reach {to} through {}", bad.join(", ")),
        (false, false) => {
            format!("{from} reaches {to} through {}, but not through {}", good.join(", "), bad.join(", "))
        }
    };
    Some(Finding { is_fault: were_chosen && good.is_empty(), what })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, address: [u8; 4]) -> Interface {
        Interface { name: name.into(), address: Some(address.into()) }
    }

    /// Holds a meeting of threads, each on a node of its own; what each learnt.
    fn meeting(doors: &[Vec<Interface>], were_chosen: bool) -> Vec<Vec<Finding>> {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("runs");
        let found = thread::scope(|scope| {
            let ranks: Vec<_> = doors
                .iter()
                .enumerate()
                .map(|(rank, doors)| {
                    let meeting = Meeting::new(&dir, "job@1", rank, 3);
                    scope.spawn(move || {
                        let doors: Vec<&Interface> = doors.iter().collect();
                        let mine = Finding { is_fault: false, what: format!("mine {rank}") };
                        meeting.hold(&format!("n{rank}"), &doors, were_chosen, vec![mine])
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(!dir.exists(), "the meeting left something behind");
        found
    }

    #[test]
    fn ranks_that_meet_learn_what_all_have_found() {
        let doors = vec![vec![interface("lo", [127, 0, 0, 1])]; 3];
        let expected: Vec<Finding> =
            (0..3).map(|rank| Finding { is_fault: false, what: format!("mine {rank}") }).collect();
        assert_eq!(meeting(&doors, true), vec![expected; 3]);
    }

    #[test]
    fn a_node_without_a_way_to_it_is_a_fault_for_all() {
        // Rank 1's interface is gone, and nobody can open a door on it.
        let mut doors = vec![vec![interface("lo", [127, 0, 0, 1])]; 3];
        doors[1] = vec![interface("gone0", [192, 0, 2, 77])];
        for found in meeting(&doors, true) {
            let faults: Vec<&str> = found.iter().filter(|f| f.is_fault).map(|f| f.what.as_str()).collect();
            assert_eq!(faults, ["n1 has no address by which n0 could reach it"]);
        }
        assert!(meeting(&doors, false).iter().all(|found| found.len() == 3));
    }

    #[test]
    fn a_door_must_be_the_right_one() {
        let door = open(Ipv4Addr::LOCALHOST, "job 1".into()).unwrap();
        assert_eq!(knock(door, "job 1"), Ok(()));
        // As on a cluster whose nodes all have a bridge with the same address.
        let wrong = knock(door, "job 2");
        assert_eq!(wrong, Err("another process answers there".into()));
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(knock(closed, "job 1").unwrap_err().contains("refused"));

        let said = |tried: &[_], chosen| judge("n1", "n2", chosen, tried).map(|found| (found.is_fault, found.what));
        assert_eq!(said(&[("eth0", door, Ok(()))], true), None);
        let bad = ("docker0", door, wrong);
        let reason = "docker0 at 127.0.0.1 (another process answers there)";
        let tried = [bad.clone()];
        assert_eq!(said(&tried, true), Some((true, format!("n1 does not reach n2 through {reason}"))));
        assert!(!said(&tried, false).unwrap().0);
        let mixed = said(&[("eth0", door, Ok(())), bad], true).unwrap();
        assert_eq!(mixed, (false, format!("n1 reaches n2 through eth0, but not through {reason}")));
    }
}
