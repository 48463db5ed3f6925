//! What a person sees during a run.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tracing::info;

use super::tables::TrainRow;

/// A bar on a terminal, a line now and then elsewhere.
pub struct Progress {
    bar: ProgressBar,
    steps: usize,
    last_line: Option<Instant>,
}

impl Progress {
    const BETWEEN_LINES: Duration = Duration::from_secs(10);

    /// At `step` of `steps`.
    pub fn new(step: usize, steps: usize) -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(steps as u64) } else { ProgressBar::hidden() };
        let template = "{bar:30} {pos}/{len} steps, {msg}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_position(step as u64);
        bar.reset_eta();
        Self { bar, steps, last_line: None }
    }

    /// A step is done; `row` is its row of train.csv, if it has one.
    pub fn step(&mut self, step: usize, loss: f64, row: Option<&TrainRow>) {
        let speed = row.map_or(String::new(), |row| format!(", {:.0} tokens/s", row.tokens_per_s));
        if !self.bar.is_hidden() {
            self.bar.set_message(format!("loss {loss:.4}{speed}"));
            self.bar.set_position(step as u64);
            if step == self.steps {
                self.bar.finish();
            }
            return;
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= Self::BETWEEN_LINES);
        if due || step == self.steps {
            info!("step {step}/{}: loss {loss:.4}{speed}", self.steps);
            self.last_line = Some(Instant::now());
        }
    }

    /// Says something without tearing the bar.
    pub fn say(&self, say: impl FnOnce()) {
        self.bar.suspend(say);
    }
}
