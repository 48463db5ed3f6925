//! Ends a rank that no longer gets anywhere, and says which rank it was.
//!
//! The thread that trains marks each thing that it begins. One thread of the watchdog looks at these marks, and ends the
//! process if no new one has come for too long; another leaves them as heartbeats for the other ranks. A wait for the
//! other ranks has a deadline of its own in `comm`, and that one comes first: its error is explained here.

pub mod heartbeats;
mod stragglers;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::heartbeats::Heartbeat;
pub use self::stragglers::{Pace, Straggler, Stragglers};
use crate::config::Fault;
use crate::error::{exit_code, Error, Result};
use crate::host;
use crate::patience::{within, Patience};
use crate::stop::exit_now;

/// A rank's place in its job.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Place {
    pub rank: usize,
    pub world_size: usize,
    /// Its number among the ranks of its node.
    pub local_rank: usize,
    /// The first rank of its node.
    pub node: usize,
    pub nodes: usize,
    /// The name of its node.
    pub host: String,
}

/// Of so many nodes, one rank each reads the heartbeats when something is wrong. More would read as many files again, and
/// only if all of these have stopped would nobody be named.
const JUDGES: usize = 8;

impl Place {
    /// Whether it is for this rank to find out who has stopped.
    fn is_judge(&self) -> bool {
        // The nodes' numbers are reckoned: ranks are spread over them as evenly as can be.
        self.nodes <= JUDGES || self.local_rank == 0 && self.node * self.nodes < JUDGES * self.world_size
    }
}

/// What a rank is doing. Each has its deadline, which a mark restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Opening data, model and checkpoint.
    StartUp,
    /// Computing a micro-batch, an update, or writing the step's row.
    Step,
    /// Exchanging with the other ranks.
    Exchange,
    /// Computing a micro-batch of an evaluation, or writing its row.
    Evaluation,
    /// Generating text.
    Sampling,
    /// Copying or writing a checkpoint.
    Save,
    /// Waiting for the ranks that save.
    Waiting,
    /// Leaving.
    End,
}

impl Phase {
    /// Whether it is for the other ranks that one waits in this phase.
    fn waits(self) -> bool {
        matches!(self, Self::Exchange | Self::Waiting | Self::End)
    }

    /// As logs and views say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::StartUp => "start-up",
            Self::Step => "computing",
            Self::Exchange => "exchange with the other ranks",
            Self::Evaluation => "evaluation",
            Self::Sampling => "sampling",
            Self::Save => "save",
            Self::Waiting => "waiting for a save",
            Self::End => "end",
        }
    }

    fn deadline(self, fault: &Fault) -> Duration {
        let seconds = match self {
            Self::StartUp => fault.startup_deadline_s,
            Self::Step | Self::Exchange | Self::Evaluation | Self::Sampling => fault.step_deadline_s,
            Self::Save => fault.save_deadline_s,
            Self::Waiting => fault.step_deadline_s.max(fault.save_deadline_s),
            Self::End => ENDING_S,
        };
        Duration::from_secs(seconds)
    }
}

/// Seconds that a rank may take to leave, once its work is done or has failed.
const ENDING_S: u64 = 60;

/// The exit code of a rank that hangs: `Error::Communication`'s.
const HANGS: u8 = 6;

/// By how much a deadline here is longer than the one of the same length in `comm`.
const GRACE: Duration = Duration::from_secs(5);

/// Between two looks at the marks.
const TICK: Duration = Duration::from_millis(200);

/// How long it may take to say anything: whoever reads stderr may be what hangs.
const PATIENCE: Duration = Duration::from_millis(4500);

/// How long it may take to read the heartbeats, beside what each node's file takes: the file system may be what hangs.
const READING: Duration = Duration::from_millis(1500);

/// How long it may take to read the file of a node.
const READING_A_FILE: Duration = Duration::from_millis(5);

/// How the trainer reports its progress.
pub struct Watchdog(Arc<Shared>);

struct Shared {
    place: Place,
    fault: Fault,
    mark: Mutex<Mark>,
    /// Where the heartbeats are, once a run directory is this job's.
    heartbeats: Mutex<Option<PathBuf>>,
    /// Held while a heartbeat is being written.
    beating: Mutex<()>,
}

#[derive(Clone, Copy)]
struct Mark {
    phase: Phase,
    step: usize,
    since: Instant,
    /// Marks so far.
    count: u64,
}

impl Watchdog {
    /// Begins to watch this process, until it ends. It is starting up.
    ///
    /// # Errors
    /// Usage, if the system gives no thread.
    pub fn start(place: Place, fault: &Fault) -> Result<Self> {
        let shared = Arc::new(Shared {
            place,
            fault: fault.clone(),
            mark: Mutex::new(Mark { phase: Phase::StartUp, step: 0, since: Instant::now(), count: 0 }),
            heartbeats: Mutex::new(None),
            beating: Mutex::new(()),
        });
        let watched = shared.clone();
        host::spawn("watchdog", move || watched.watch())?;
        Ok(Self(shared))
    }

    /// Marks that something new begins at a step.
    pub fn enter(&self, phase: Phase, step: usize) {
        let mut mark = self.0.mark();
        *mark = Mark { phase, step, since: Instant::now(), count: mark.count + 1 };
    }

    /// Leaves heartbeats in this folder from now on. Not before the run directory is this job's: another may train there.
    ///
    /// # Errors
    /// Usage, if the system gives no thread.
    pub fn leave_heartbeats(&self, folder: PathBuf) -> Result<()> {
        let before = self.0.folder().replace(folder);
        let shared = self.0.clone();
        match before {
            // The same thread goes on in the new folder.
            Some(_) => Ok(()),
            None => host::spawn("heartbeat", move || shared.beat()).map(drop),
        }
    }

    /// Leaves no more heartbeats, so that their folder can be removed.
    pub fn stop_heartbeats(&self) {
        *self.0.folder() = None;
        drop(self.0.beating.lock());
    }

    /// Marks the end of this rank's work. A communication error is returned with what the heartbeats say of the others.
    ///
    /// # Errors
    /// Those of the work.
    pub fn end(&self, done: Result<()>) -> Result<()> {
        let step = self.0.mark().step;
        self.enter(Phase::End, step);
        let Err(error) = done else { return Ok(()) };
        let others = if exit_code(&error) == HANGS { self.0.clone().others() } else { None };
        Err(match others {
            Some(others) => Error::Communication(format!("{error:#}. At step {step}: {others}")).into(),
            None => error,
        })
    }
}

impl Shared {
    fn mark(&self) -> MutexGuard<'_, Mark> {
        self.mark.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self) -> MutexGuard<'_, Option<PathBuf>> {
        self.heartbeats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the process once there is no new mark within the deadline of the last.
    fn watch(self: Arc<Self>) {
        let mut still = Still { count: 0, patience: Patience::begin() };
        loop {
            thread::sleep(TICK);
            let mark = *self.mark();
            let waited = still.since(mark.count, Instant::now());
            if waited >= self.deadline(mark.phase) + GRACE {
                self.give_up(mark, waited)
            }
        }
    }

    /// A rank that ends may have to find out first who has stopped.
    fn deadline(&self, phase: Phase) -> Duration {
        phase.deadline(&self.fault) + if phase == Phase::End { self.finding_out() } else { Duration::ZERO }
    }

    /// How long the others' heartbeats are looked at: three beats.
    fn listening(&self) -> Duration {
        3 * heartbeats::interval(self.place.nodes)
    }

    /// How long it may take to find out who has stopped.
    fn finding_out(&self) -> Duration {
        self.listening() + READING + 2 * READING_A_FILE * self.place.nodes as u32
    }

    fn give_up(self: Arc<Self>, mark: Mark, waited: Duration) -> ! {
        let line = format!(
            "rank {} on {} hangs: no progress for {} s at step {}, {} (allowed are {} s and {} s more)",
            self.place.rank,
            self.place.host,
            waited.as_secs(),
            mark.step,
            mark.phase.name(),
            self.deadline(mark.phase).as_secs(),
            GRACE.as_secs(),
        );
        let others = self.others().map_or(String::new(), |others| format!("; {others}"));
        within(PATIENCE, move || tracing::error!("{line}{others}"));
        exit_now(HANGS)
    }

    /// What the other ranks' heartbeats say; `None` if there are none, or if it is for other ranks to say it.
    fn others(self: Arc<Self>) -> Option<String> {
        if self.place.world_size == 1 {
            return None;
        }
        let folder = self.folder().clone()?;
        let deadline = self.finding_out();
        if !self.place.is_judge() {
            // A launcher ends the job with the first rank that leaves, and the judges would say nothing.
            thread::sleep(deadline);
            return None;
        }
        let listen = move || {
            let read = || heartbeats::of_ranks(&folder, self.place.world_size);
            let before = read();
            thread::sleep(self.listening());
            heartbeats::judge(self.place.rank, &before, &read())
        };
        Some(within(deadline, listen).unwrap_or_else(|| "the heartbeats in the run directory cannot be read".into()))
    }

    /// Leaves heartbeats for as long as the process lives.
    fn beat(self: Arc<Self>) {
        let interval = heartbeats::interval(self.place.nodes);
        // But for the first time, so that a short run is seen too, not all nodes write at the same moment.
        let early = interval.mul_f64(self.place.node as f64 / self.place.world_size as f64);
        let mut failed = false;
        for beat in 1.. {
            let beating = self.beating.lock();
            let Some(folder) = self.folder().clone() else { return };
            let mark = *self.mark();
            let heartbeat = Heartbeat {
                rank: self.place.rank,
                host: self.place.host.clone(),
                pid: std::process::id(),
                step: mark.step,
                phase: mark.phase,
                phase_s: mark.since.elapsed().as_secs(),
                beat,
                every_s: interval.as_secs(),
            };
            match heartbeats::write(&folder, &self.place, &heartbeat) {
                Err(e) if !failed => {
                    tracing::warn!(
                        "cannot leave a heartbeat in {}: {e}; should this rank hang, the others cannot name it",
                        folder.display()
                    );
                    failed = true;
                }
                _ => {}
            }
            drop(beating);
            thread::sleep(if beat == 1 { interval - early } else { interval });
        }
    }
}

/// How long there has been no new mark.
struct Still {
    count: u64,
    patience: Patience,
}

impl Still {
    /// That time, at a look that sees this count of marks.
    fn since(&mut self, count: u64, now: Instant) -> Duration {
        if count != self.count {
            *self = Self { count, patience: Patience::begin_at(now) };
        }
        self.patience.waited_at(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_begins_the_wait_anew_and_a_stopped_process_is_not_blamed() {
        let start = Instant::now();
        let mut still = Still { count: 0, patience: Patience::begin_at(start) };
        let mut since = |count, millis| still.since(count, start + Duration::from_millis(millis)).as_millis();
        assert_eq!([500, 1000, 1500].map(|millis| since(0, millis)), [500, 1000, 1500]);
        assert_eq!(since(1, 2000), 0);
        assert_eq!(since(1, 3_602_000), 1000);
        assert_eq!(since(1, 3_602_500), 1500);
    }

    /// The place of a rank of a job with as many ranks on each node.
    fn place(rank: usize, world_size: usize, nodes: usize) -> Place {
        let ranks = world_size / nodes;
        let (local_rank, node) = (rank % ranks, rank / ranks * ranks);
        Place { rank, world_size, local_rank, node, nodes, host: format!("n{node}") }
    }

    #[test]
    fn on_few_nodes_every_rank_finds_out_who_has_stopped_and_on_many_one_rank_of_eight_nodes() {
        let judges = |world_size, nodes| {
            (0..world_size).filter(|&rank| place(rank, world_size, nodes).is_judge()).collect::<Vec<_>>()
        };
        assert_eq!(judges(64, 8), (0..64).collect::<Vec<_>>());
        assert_eq!(judges(16_384, 2048), (0..8).map(|node| 8 * node).collect::<Vec<_>>());
        // One rank has stopped, whichever: another says so.
        assert!(judges(9, 9).len() > 1);
    }

    #[test]
    fn whoever_ends_may_listen_to_slow_heartbeats_first() {
        for (nodes, seconds) in [(1, 60 + 3), (2048, 60 + 3 * 21)] {
            let shared = Shared {
                place: place(0, nodes, nodes),
                fault: Fault::default(),
                mark: Mutex::new(Mark { phase: Phase::End, step: 0, since: Instant::now(), count: 0 }),
                heartbeats: Mutex::default(),
                beating: Mutex::default(),
            };
            assert!(shared.deadline(Phase::End) > Duration::from_secs(seconds) + READING);
            assert_eq!(shared.deadline(Phase::Step).as_secs(), 300);
        }
    }

    #[test]
    fn each_phase_has_its_deadline() {
        let fault = Fault { startup_deadline_s: 1, step_deadline_s: 2, save_deadline_s: 3, ..Fault::default() };
        let all = [Phase::StartUp, Phase::Step, Phase::Exchange, Phase::Evaluation, Phase::Sampling, Phase::Save];
        assert_eq!(all.map(|phase| phase.deadline(&fault).as_secs()), [1, 2, 2, 2, 2, 3]);
        // Others may write for as long as their save or their step allows.
        assert_eq!(Phase::Waiting.deadline(&fault).as_secs(), 3);
        assert_eq!(Phase::Waiting.deadline(&Fault { step_deadline_s: 9, ..fault }).as_secs(), 9);
    }

    #[test]
    fn a_folder_of_heartbeats_can_be_removed_once_they_have_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let watchdog = Watchdog::start(place(0, 1, 1), &Fault::default()).unwrap();
        watchdog.leave_heartbeats(folder.path().into()).unwrap();
        let file = folder.path().join("node-0000.txt");
        let beat = || file.exists();
        while !beat() {
            thread::sleep(Duration::from_millis(1));
        }
        watchdog.stop_heartbeats();
        std::fs::remove_file(&file).unwrap();
        thread::sleep(heartbeats::interval(1) * 3 / 2);
        assert!(!beat());
    }
}
