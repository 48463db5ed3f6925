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
pub use self::stragglers::{Straggler, Stragglers};
use crate::config::Fault;
use crate::error::{exit_code, Error, Result};
use crate::host;
use crate::patience::{within, Patience};
use crate::stop::exit_now;

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

/// Between two heartbeats.
const BEAT: Duration = Duration::from_secs(1);

/// How long other ranks' heartbeats are looked at: three beats.
const LISTENING: Duration = Duration::from_secs(3);

/// How long it may take to find out or to say anything: the file system, or whoever reads stderr, may be what hangs.
const PATIENCE: Duration = Duration::from_millis(4500);

/// How the trainer reports its progress.
pub struct Watchdog(Arc<Shared>);

struct Shared {
    rank: usize,
    host: String,
    world_size: usize,
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
    pub fn start(rank: usize, host: String, world_size: usize, fault: &Fault) -> Result<Self> {
        let shared = Arc::new(Shared {
            rank,
            host,
            world_size,
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
            if waited >= mark.phase.deadline(&self.fault) + GRACE {
                self.give_up(mark, waited)
            }
        }
    }

    fn give_up(self: Arc<Self>, mark: Mark, waited: Duration) -> ! {
        let line = format!(
            "rank {} on {} hangs: no progress for {} s at step {}, {} (allowed are {} s and {} s more)",
            self.rank,
            self.host,
            waited.as_secs(),
            mark.step,
            mark.phase.name(),
            mark.phase.deadline(&self.fault).as_secs(),
            GRACE.as_secs(),
        );
        let others = self.others().map_or(String::new(), |others| format!("; {others}"));
        within(PATIENCE, move || tracing::error!("{line}{others}"));
        exit_now(HANGS)
    }

    /// What the other ranks' heartbeats say; `None` if there are none.
    fn others(self: Arc<Self>) -> Option<String> {
        if self.world_size == 1 {
            return None;
        }
        let folder = self.folder().clone()?;
        let listen = move || {
            let read = || (0..self.world_size).map(|rank| heartbeats::read(&folder, rank)).collect::<Vec<_>>();
            let before = read();
            thread::sleep(LISTENING);
            heartbeats::judge(self.rank, &before, &read())
        };
        Some(within(PATIENCE, listen).unwrap_or_else(|| "the heartbeats in the run directory cannot be read".into()))
    }

    /// Leaves heartbeats for as long as the process lives.
    fn beat(self: Arc<Self>) {
        let mut failed = false;
        for beat in 1.. {
            let beating = self.beating.lock();
            let Some(folder) = self.folder().clone() else { return };
            let mark = *self.mark();
            let heartbeat = Heartbeat {
                rank: self.rank,
                host: self.host.clone(),
                pid: std::process::id(),
                step: mark.step,
                phase: mark.phase,
                phase_s: mark.since.elapsed().as_secs(),
                beat,
            };
            match heartbeats::write(&folder, &heartbeat) {
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
            thread::sleep(BEAT);
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
        let watchdog = Watchdog::start(0, "n0".into(), 1, &Fault::default()).unwrap();
        watchdog.leave_heartbeats(folder.path().into()).unwrap();
        let beat = || folder.path().join("rank-0000.json").exists();
        while !beat() {
            thread::sleep(Duration::from_millis(1));
        }
        watchdog.stop_heartbeats();
        std::fs::remove_file(folder.path().join("rank-0000.json")).unwrap();
        thread::sleep(BEAT * 3 / 2);
        assert!(!beat());
    }
}
