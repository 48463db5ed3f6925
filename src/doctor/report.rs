//! What the examination found, as a table and a verdict in plain ASCII.

use crate::error::{Error, Result};

/// Columns that a row's name takes.
const NAME_WIDTH: usize = 12;

/// The rows so far, and what is wrong.
pub struct Report {
    verdicts: [&'static str; 2],
    lines: Vec<String>,
    warnings: Vec<Finding>,
    faults: Vec<(Place, Finding)>,
}

struct Finding {
    what: String,
    remedy: String,
}

/// Where a fault is, which decides the exit code.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In how the job was started, or in what a machine has: exit code 2.
    Setup,
    /// Between the ranks: they differ, or do not reach each other: exit code 6.
    Peers,
}

impl Default for Report {
    fn default() -> Self {
        Self::about("this job can train", "this job cannot train")
    }
}

impl Report {
    /// An empty one, with the words for its verdict: without faults, and with some.
    pub fn about(good: &'static str, bad: &'static str) -> Self {
        Self { verdicts: [good, bad], lines: Vec::new(), warnings: Vec::new(), faults: Vec::new() }
    }

    /// Adds a row; each line of `text` becomes one.
    pub fn row(&mut self, name: &str, text: &str) {
        for (number, line) in text.lines().enumerate() {
            let name = if number == 0 { name } else { "" };
            self.lines.push(format!("{name:NAME_WIDTH$}{line}"));
        }
    }

    /// Adds a table with a head; columns of numbers are aligned on the right.
    pub fn table<const N: usize>(&mut self, head: [&str; N], rows: &[[String; N]]) {
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([head[column].len()]).max().unwrap_or(0)
        };
        let is_number = |cell: &String| cell.parse::<f64>().is_ok();
        let right = |column: usize| rows.iter().all(|row| is_number(&row[column]));
        let mut line = |cells: [&str; N]| {
            let aligned = cells.iter().enumerate().map(|(column, cell)| match right(column) {
                true => format!("{cell:>width$}", width = width(column)),
                false => format!("{cell:width$}", width = width(column)),
            });
            let text = aligned.collect::<Vec<_>>().join("  ");
            self.lines.push(text.trim_end().to_string());
        };
        line(head);
        rows.iter().for_each(|row| line(row.each_ref().map(String::as_str)));
    }

    /// Adds an empty line.
    pub fn gap(&mut self) {
        self.lines.push(String::new());
    }

    /// Notes what slows a job down or may surprise, and does not stop it.
    pub fn warn(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.warnings.push(Finding { what: what.into(), remedy: remedy.into() });
    }

    /// Notes what keeps the job from training.
    pub fn fault(&mut self, place: Place, what: impl Into<String>, remedy: impl Into<String>) {
        self.faults.push((place, Finding { what: what.into(), remedy: remedy.into() }));
    }

    pub fn is_faulty(&self) -> bool {
        !self.faults.is_empty()
    }

    /// The whole text.
    pub fn text(&self) -> String {
        let mut text = self.lines.join("\n") + "\n\n";
        let faults = self.faults.iter().map(|(_, finding)| ("fault", finding));
        for (kind, Finding { what, remedy }) in self.warnings.iter().map(|finding| ("warning", finding)).chain(faults) {
            text += &format!("{:NAME_WIDTH$}{what}\n{:NAME_WIDTH$}remedy: {remedy}\n", format!("{kind}:"), "");
        }
        let [good, bad] = self.verdicts;
        text + &match self.faults.len() {
            0 => format!("verdict:    {good}"),
            n => format!("verdict:    {bad}: {}", faults_in_words(n)),
        }
    }

    /// The verdict as the process's end.
    ///
    /// # Errors
    /// Communication, if a fault is between the ranks; usage, if all are in the setup.
    pub fn verdict(&self) -> Result<()> {
        let Some((_, Finding { what, remedy })) = self.faults.first() else { return Ok(()) };
        let more = match self.faults.len() {
            1 => "",
            _ => "; the report has the others",
        };
        let text = format!("doctor found {}: {what} (remedy: {remedy}){more}", faults_in_words(self.faults.len()));
        Err(match self.faults.iter().any(|(place, _)| *place == Place::Peers) {
            true => Error::Communication(text),
            false => Error::Usage(text),
        }
        .into())
    }
}

fn faults_in_words(n: usize) -> String {
    format!("{n} fault{}", if n == 1 { "" } else { "s" })
}

/// Ranks in ascending order as text: "rank 3", "ranks 0-2, 5".
pub fn ranks(numbers: &[usize]) -> String {
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match spans.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => spans.push((number, number)),
        }
    }
    let words: Vec<String> = spans
        .iter()
        .map(|(start, end)| if start == end { start.to_string() } else { format!("{start}-{end}") })
        .collect();
    format!("rank{} {}", if numbers.len() == 1 { "" } else { "s" }, words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::exit_code;

    #[test]
    fn ranks_are_written_as_spans() {
        assert_eq!(ranks(&[3]), "rank 3");
        assert_eq!(ranks(&[0, 1, 2, 5, 7, 8]), "ranks 0-2, 5, 7-8");
    }

    #[test]
    fn the_worst_fault_decides_the_exit_code() {
        let mut report = Report::default();
        report.row("LibTorch", "2.11\nelsewhere 2.10");
        report.table(["a", "bytes"], &[["x".into(), "12345".into()], ["long".into(), "1".into()]]);
        assert!(report.verdict().is_ok());
        report.warn("slow", "wait");
        let expected = "LibTorch    2.11\n            elsewhere 2.10\na     bytes\nx     12345\nlong      1\n\n\
                        warning:    slow\n            remedy: wait\nverdict:    this job can train";
        assert_eq!(report.text(), expected);
        report.fault(Place::Setup, "no GPU", "buy one");
        assert_eq!(exit_code(&report.verdict().unwrap_err()), 2);
        report.fault(Place::Peers, "rank 1 is deaf", "shout");
        let error = report.verdict().unwrap_err();
        assert_eq!(exit_code(&error), 6);
        assert_eq!(error.to_string(), "doctor found 2 faults: no GPU (remedy: buy one); the report has the others");
        assert!(report.text().ends_with("remedy: shout\nverdict:    this job cannot train: 2 faults"));
    }
}
