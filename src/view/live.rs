//! `lockstep watch`: what is known of a run, again and again while it goes on.

use std::collections::{BTreeMap, VecDeque};
use std::env;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{draw, screen};
use crate::config::Train;
use crate::error::{Error, Result};
use crate::run::growing::Growing;
use crate::run::lease::{Held, Observer};
use crate::run::survey::{is_run, State, Survey};
use crate::run::tables::{EvalRow, TrainRow};
use crate::run::RunDir;
use crate::watch::heartbeats::{self, Heartbeat};

/// A rank that has missed so many heartbeats is silent.
const MISSED: u64 = 5;

/// Rows that the time left is reckoned from.
const RECENT: usize = 100;

/// Between two looks at a lease of another machine.
const POLL: Duration = Duration::from_millis(200);

/// Shows a run until the user leaves; prints what it would show, once, if standard output is no terminal.
///
/// # Errors
/// Usage, if there is no run, or the terminal cannot be drawn on.
pub fn watch(run_dir: &Path, print: impl Fn(&str) -> Result<()>) -> Result<()> {
    let mut live = Live::open(run_dir)?;
    // Emacs' shell, for one, is a terminal on which nothing can be drawn.
    let can_draw = io::stdout().is_terminal() && env::var_os("TERM").is_none_or(|name| name != "dumb");
    if can_draw {
        return screen::show(&mut live, |live| live.look(Instant::now()), draw::draw);
    }
    live.look(Instant::now());
    while live.state.is_none() {
        sleep(POLL);
        live.look(Instant::now());
    }
    print(&draw::snapshot(&live, 80, 24))
}

/// A rank, by its heartbeats.
pub struct Rank {
    /// The last that was seen.
    pub last: Heartbeat,
    /// When it was new.
    seen: Instant,
}

/// What is known of a run.
pub struct Live {
    /// The run directory, as it was named.
    pub dir: RunDir,
    /// `None` until it is known whether a process trains there.
    pub state: Option<State>,
    /// What it has come to, but for the rows that were added since it was last started.
    pub survey: Survey,
    /// Its keys of the section `train`, if they can be read.
    pub train: Option<Train>,
    /// The training loss of each row, by step.
    pub loss: Vec<(f64, f64)>,
    /// Tokens a second of each row, by step.
    pub speed: Vec<(f64, f64)>,
    /// The loss of each evaluation on the validation split, by step.
    pub valid: Vec<(f64, f64)>,
    /// The last rows.
    pub recent: VecDeque<TrainRow>,
    /// The ranks by their numbers.
    pub ranks: BTreeMap<usize, Rank>,
    /// What cannot be read.
    pub trouble: Option<String>,
    /// When the last look was.
    pub now: Instant,
    /// When there was a new row.
    pub progressed: Instant,
    eval_s: (f64, usize),
    observer: Observer,
    train_rows: Growing<TrainRow>,
    eval_rows: Growing<EvalRow>,
}

impl Live {
    /// A run that nothing is known of yet.
    ///
    /// # Errors
    /// Usage, if the folder is no run directory.
    pub fn open(run_dir: &Path) -> Result<Self> {
        if !is_run(run_dir) {
            let path = run_dir.display();
            return Err(Error::Usage(format!(
                "{path} is not a run directory: it has no config.yaml with checkpoints/ or train.csv; `lockstep runs` lists \
                 the runs in a folder"
            ))
            .into());
        }
        let (dir, now) = (RunDir(run_dir.to_path_buf()), Instant::now());
        Ok(Self {
            state: None,
            survey: Survey::of(&dir, false),
            train: None,
            loss: Vec::new(),
            speed: Vec::new(),
            valid: Vec::new(),
            recent: VecDeque::new(),
            ranks: BTreeMap::new(),
            trouble: None,
            now,
            progressed: now,
            eval_s: (0.0, 0),
            observer: Observer::new(run_dir),
            train_rows: Growing::new(dir.train_csv()),
            eval_rows: Growing::new(dir.eval_csv()),
            dir,
        })
    }

    /// Looks at the run.
    pub fn look(&mut self, now: Instant) {
        self.now = now;
        self.trouble = None;
        let held = self.observer.look(now);
        let anew = self.read_rows();
        // A run that begins, resumes or ends.
        let is_running = self.state == Some(State::Running);
        if anew || self.train.is_none() || held != Held::Unknown && is_running != (held == Held::Yes) {
            self.survey = Survey::of(&self.dir, held == Held::Yes);
            self.train = self.dir.load_config().ok().map(|config| config.train);
        }
        self.state = match held {
            Held::Unknown => self.state,
            _ => Some(self.survey.state),
        };
        self.hear();
    }

    /// Takes up new rows; whether they are all that there are.
    fn read_rows(&mut self) -> bool {
        let (train, eval) = (self.train_rows.more(), self.eval_rows.more());
        let mut anew = false;
        match train {
            Ok((all, rows)) => {
                if all {
                    self.loss.clear();
                    self.speed.clear();
                    self.recent.clear();
                }
                anew = all;
                for row in rows {
                    let step = row.step as f64;
                    self.loss.push((step, row.loss));
                    self.speed.push((step, row.tokens_per_s));
                    self.progressed = self.now;
                    self.recent.push_back(row);
                }
                self.recent.drain(..self.recent.len().saturating_sub(RECENT));
            }
            Err(e) => self.trouble = Some(format!("{e:#}")),
        }
        match eval {
            Ok((all, rows)) => {
                if all {
                    self.valid.clear();
                    self.eval_s = (0.0, 0);
                }
                for row in rows.iter().filter(|row| row.split == "valid") {
                    self.valid.push((row.step as f64, row.loss));
                    self.eval_s = (self.eval_s.0 + row.eval_s, self.eval_s.1 + 1);
                }
            }
            Err(e) => self.trouble = Some(format!("{e:#}")),
        }
        anew
    }

    /// Takes up the ranks' heartbeats.
    fn hear(&mut self) {
        let mut before = std::mem::take(&mut self.ranks);
        for (rank, last) in heartbeats::all(&self.dir.heartbeats()) {
            let known = before.remove(&rank).filter(|known| known.last.beat == last.beat);
            let seen = known.map_or(self.now, |known| known.seen);
            self.ranks.insert(rank, Rank { last, seen });
        }
    }

    /// Optimizer steps done.
    pub fn step(&self) -> usize {
        self.recent.back().map_or(0, |row| row.step).max(self.survey.step)
    }

    /// Seconds until the last step is done, evaluations counted in; `None` if the run does not go on, or it is not known.
    pub fn left_s(&self) -> Option<f64> {
        let (train, step) = (self.train.as_ref()?, self.step());
        let (first, last) = (self.recent.front()?, self.recent.back()?);
        if self.state != Some(State::Running) || last.step <= first.step || last.elapsed_s < first.elapsed_s {
            return None;
        }
        let step_s = (last.elapsed_s - first.elapsed_s) / (last.step - first.step) as f64;
        let eval_s = if self.eval_s.1 > 0 { self.eval_s.0 / self.eval_s.1 as f64 } else { 0.0 };
        let evaluations = (train.steps / train.eval_every.max(1)).saturating_sub(step / train.eval_every.max(1));
        let evaluations = if train.eval_every == 0 { 0 } else { evaluations };
        Some(train.steps.saturating_sub(step) as f64 * step_s + evaluations as f64 * eval_s)
    }

    /// How long a rank has been silent, if so long that something is wrong with it.
    pub fn silence(&self, rank: &Rank) -> Option<Duration> {
        let silence = self.now.saturating_duration_since(rank.seen);
        let missed = silence.as_secs() / rank.last.every_s.max(1);
        (self.state == Some(State::Running) && missed >= MISSED).then_some(silence)
    }
}
