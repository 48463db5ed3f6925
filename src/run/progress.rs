//! What a person sees during a run.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use ratatui::crossterm::terminal;
use tracing::info;

use super::tables::TrainRow;
use crate::host;

/// Between two lines, if there is no bar.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// The steps of a run: a bar on a terminal, a line now and then elsewhere.
pub struct Progress {
    bar: ProgressBar,
    steps: usize,
    last_line: Option<Instant>,
    pace: Pace,
}

impl Progress {
    /// At `step` of `steps`.
    pub fn new(step: usize, steps: usize) -> Self {
        let bar = bar(steps, "{pos}/{len} steps{wide_msg}");
        bar.set_position(step as u64);
        Self { bar, steps, last_line: None, pace: Pace::from(step, Instant::now()) }
    }

    /// A step is done; `row` is its row of train.csv, if it has one.
    pub fn step(&mut self, step: usize, loss: f64, row: Option<&TrainRow>) {
        let left_s = self.pace.left_s(step, self.steps, Instant::now());
        let due = self.last_line.is_none_or(|last| last.elapsed() >= BETWEEN_LINES);
        if self.bar.is_hidden() && !due && step < self.steps {
            return;
        }
        let tokens_per_s = row.map(|row| row.tokens_per_s);
        let speed = tokens_per_s.map_or(String::new(), |speed| format!(", {speed:.0} tokens/s"));
        let left = if step < self.steps { format!(", {} left", span(left_s)) } else { String::new() };
        if self.bar.is_hidden() {
            let steps = self.steps;
            info!(step, steps, loss, tokens_per_s, left_s, "step {step}/{steps}: loss {loss:.4}{speed}{left}");
            self.last_line = Some(Instant::now());
            return;
        }
        self.bar.set_message(format!(", loss {loss:.4}{left}{speed}"));
        self.bar.set_position(step as u64);
        if step == self.steps {
            self.bar.finish();
        }
    }

    /// Says something without tearing the bar.
    pub fn say(&self, say: impl FnOnce()) {
        BARS.suspend(say);
    }
}

/// The batches of an evaluation: a bar on a terminal, elsewhere a line now and then if it takes long.
pub struct EvaluationProgress<'a> {
    bar: ProgressBar,
    split: &'a str,
    batches: usize,
    last_line: Instant,
    pace: Pace,
}

impl<'a> EvaluationProgress<'a> {
    /// Before the first of a rank's batches of a split.
    pub fn new(split: &'a str, batches: usize) -> Self {
        let now = Instant::now();
        let bar = bar(batches, "evaluating: {pos}/{len} batches, {wide_msg}");
        Self { bar, split, batches, last_line: now, pace: Pace::from(0, now) }
    }

    /// So many batches are done.
    pub fn batches(&mut self, done: usize) {
        let Self { split, batches, .. } = *self;
        let left_s = self.pace.left_s(done, batches, Instant::now());
        let left = span(left_s);
        self.bar.set_message(format!("{split} split, {left} left"));
        self.bar.set_position(done as u64);
        if self.bar.is_hidden() && self.last_line.elapsed() >= BETWEEN_LINES {
            info!(split, done, batches, left_s, "evaluating {split}: {done} of {batches} batches, {left} left");
            self.last_line = Instant::now();
        }
    }
}

impl Drop for EvaluationProgress<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
    }
}

/// All bars on stderr, which share its last lines.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// The bar itself comes last, if the terminal has room for it; the words are cut to what fits.
fn bar(length: usize, words: &str) -> ProgressBar {
    const ROOM: u16 = 80;
    if !host::shows_bars() {
        return ProgressBar::hidden();
    }
    let bar = BARS.add(ProgressBar::new(length as u64));
    let is_wide = terminal::size().is_ok_and(|(columns, _)| columns >= ROOM);
    let template = if is_wide { format!("{words} {{bar:24}}") } else { words.to_owned() };
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}

/// How fast something goes.
struct Pace {
    from: usize,
    since: Instant,
    is_warm: bool,
}

impl Pace {
    /// After `from` of its parts.
    fn from(from: usize, since: Instant) -> Self {
        Self { from, since, is_warm: false }
    }

    /// Seconds until the last part is done, now that another one is. Later on, the first one does not count: it warms up.
    fn left_s(&mut self, done: usize, all: usize, now: Instant) -> f64 {
        let each =
            now.saturating_duration_since(self.since).as_secs_f64() / done.saturating_sub(self.from).max(1) as f64;
        if !self.is_warm {
            *self = Self { from: done, since: now, is_warm: true };
        }
        all.saturating_sub(done) as f64 * each
    }
}

/// So many seconds, as people say them.
pub fn span(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64; // a number that is not finite becomes one that is
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    match minutes {
        0 => format!("{seconds} s"),
        1..10 => format!("{minutes} min {:02} s", seconds % 60),
        10..60 => format!("{minutes} min"),
        _ if hours < 48 => format!("{hours} h {:02} min", minutes % 60),
        _ => format!("{} d {:02} h", hours / 24, hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_with_two_units_at_most() {
        let said = [0.4, 59.0, 75.0, 599.0, 600.0, 3599.0, 3661.0, 172_799.0, 180_000.0, -5.0].map(span);
        let expected = ["0 s", "59 s", "1 min 15 s", "9 min 59 s", "10 min", "59 min", "1 h 01 min", "47 h 59 min"];
        assert_eq!(said[..8], expected);
        assert_eq!(said[8..], ["2 d 02 h", "0 s"]);
    }

    #[test]
    fn the_time_left_follows_from_the_steps_after_the_first() {
        let start = Instant::now();
        let mut pace = Pace::from(100, start);
        let mut left = |done, after: f64| pace.left_s(done, 200, start + Duration::from_secs_f64(after));
        // The first step took 5 s, the others take 1 s.
        assert_eq!(left(101, 5.0), 99.0 * 5.0);
        assert_eq!(left(102, 6.0), 98.0);
        assert_eq!(left(151, 55.0), 49.0);
        assert_eq!(left(200, 104.0), 0.0);
    }
}
