//! `lockstep runs`: a table of the runs in a folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::error::{Error, Result};
use crate::run::lease::{Held, Observer};
use crate::run::progress::span;
use crate::run::survey::{is_run, Survey};
use crate::run::tables::with_header;
use crate::run::RunDir;

/// How far below the folder runs are looked for: a sweep's lie in a folder of their own.
const DEPTH: usize = 3;

/// Between two looks at the leases of other machines.
const POLL: Duration = Duration::from_millis(200);

/// A run, and what it has come to: a row of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    /// Its folder, as seen from the one that was asked for.
    pub run: String,
    #[allow(missing_docs)]
    pub survey: Survey,
}

/// The runs in a folder, or the run that the folder is; those that were written to last come first. `wait` is told if it takes
/// up to 12 seconds to see whether some of them go on, on other machines.
///
/// # Errors
/// Usage, if there is no such folder, or it cannot be read.
pub fn list(folder: &Path, wait: impl FnOnce(usize)) -> Result<Vec<Listed>> {
    if let Err(e) = fs::read_dir(folder) {
        let path = folder.display();
        return Err(Error::Usage(format!("{path} cannot be listed: {e}; name the folder that runs lie in")).into());
    }
    let mut found = Vec::new();
    find(folder, DEPTH, &mut found);
    let mut seen: Vec<(PathBuf, Observer, Held)> =
        found.into_iter().map(|path| (path.clone(), Observer::new(&path), Held::Unknown)).collect();
    let mut wait = Some(wait);
    loop {
        for (_, observer, held) in seen.iter_mut().filter(|(.., held)| *held == Held::Unknown) {
            *held = observer.look(Instant::now());
        }
        let unknown = seen.iter().filter(|(.., held)| *held == Held::Unknown).count();
        if unknown == 0 {
            break;
        }
        if let Some(wait) = wait.take() {
            wait(unknown);
        }
        sleep(POLL);
    }
    let mut listed: Vec<Listed> = seen
        .into_iter()
        .map(|(path, _, held)| {
            let name = path.strip_prefix(folder).ok().filter(|name| !name.as_os_str().is_empty());
            let run = name.unwrap_or(&path).display().to_string();
            Listed { run, survey: Survey::of(&RunDir(path), held == Held::Yes) }
        })
        .collect();
    listed.sort_by(|a, b| (a.survey.age_s, &a.run).cmp(&(b.survey.age_s, &b.run)));
    Ok(listed)
}

fn find(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if is_run(folder) {
        found.push(folder.to_path_buf());
    } else if depth > 0 {
        let inside = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        // A link may lead to a run, but not in a circle.
        inside.filter(|path| path.is_dir() && (!path.is_symlink() || is_run(path))).for_each(|path| {
            find(&path, depth - 1, found);
        });
    }
}

/// The rows as CSV, with a header even if there are none.
///
/// # Errors
/// None that rows of numbers and texts meet.
pub fn csv(listed: &[Listed]) -> Result<String> {
    let rows: Vec<Row> = listed.iter().map(Row::of).collect();
    match rows.is_empty() {
        true => Ok(with_header(&[Row::default()])?.lines().take(1).map(|head| format!("{head}\n")).collect()),
        false => with_header(&rows),
    }
}

/// [`Listed`], flat, as the csv crate needs it.
#[derive(Default, Serialize)]
struct Row<'a> {
    run: &'a str,
    state: &'a str,
    step: usize,
    steps: Option<usize>,
    loss: Option<f64>,
    best_ppl: Option<f64>,
    tokens_per_s: Option<f64>,
    restarts: usize,
    age_s: Option<u64>,
}

impl<'a> Row<'a> {
    fn of(listed: &'a Listed) -> Self {
        let Survey { state, step, steps, loss, best_ppl, tokens_per_s, restarts, age_s } = listed.survey;
        Self { run: &listed.run, state: state.name(), step, steps, loss, best_ppl, tokens_per_s, restarts, age_s }
    }
}

const HEAD: [&str; 8] = ["run", "state", "step", "loss", "best ppl", "tokens/s", "restarts", "age"];

/// The columns that are left out of a narrow table, in this order.
const LEFT_OUT: [usize; 5] = [6, 5, 7, 4, 3];

/// A run's name is not cut to fewer columns than these.
const SHORTEST_NAME: usize = 8;

/// The table as text; as wide as it must be, or no wider than `width` by leaving columns out and cutting names.
pub fn text(listed: &[Listed], width: Option<usize>) -> String {
    let rows: Vec<[String; 8]> = listed.iter().map(cells).collect();
    let head = HEAD.map(str::to_owned);
    let wide = |column: usize| rows.iter().chain([&head]).map(|row| row[column].width()).max().unwrap_or(0);
    let mut widths: Vec<usize> = (0..HEAD.len()).map(wide).collect();
    let mut shown: Vec<usize> = (0..HEAD.len()).collect();
    if let Some(width) = width {
        let total = |widths: &[usize], shown: &[usize]| {
            shown.iter().map(|&column| widths[column] + 2).sum::<usize>().saturating_sub(2)
        };
        for column in LEFT_OUT {
            let others = total(&widths, &shown) - widths[0];
            if others + widths[0].min(2 * SHORTEST_NAME) > width {
                shown.retain(|&kept| kept != column);
            }
        }
        let others = total(&widths, &shown) - widths[0];
        widths[0] = widths[0].min(width.saturating_sub(others).max(SHORTEST_NAME));
    }
    let line = |row: &[String; 8]| {
        let cells: Vec<String> = shown
            .iter()
            .map(|&column| {
                let cell = fit(&row[column], widths[column]);
                let space = " ".repeat(widths[column] - cell.width());
                // Words to the left, numbers to the right.
                if column < 2 {
                    cell + &space
                } else {
                    space + &cell
                }
            })
            .collect();
        let line = cells.join("  ");
        let line = line.trim_end();
        width.map_or(line.to_owned(), |width| fit(line, width)) + "\n"
    };
    [&head].into_iter().chain(&rows).map(line).collect()
}

fn cells(listed: &Listed) -> [String; 8] {
    let Survey { state, step, steps, loss, best_ppl, tokens_per_s, restarts, age_s } = listed.survey;
    let unknown = || "-".to_owned();
    [
        printable(&listed.run),
        state.name().into(),
        steps.map_or(step.to_string(), |steps| format!("{step}/{steps}")),
        loss.map_or_else(unknown, |loss| format!("{loss:.4}")),
        best_ppl.map_or_else(unknown, |ppl| format!("{ppl:.2}")),
        tokens_per_s.map_or_else(unknown, |speed| format!("{speed:.0}")),
        restarts.to_string(),
        age_s.map_or_else(unknown, |age| span(age as f64)),
    ]
}

/// A name without what a terminal would obey.
pub(super) fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// As much of a text as fits, and a mark if that is not all.
pub(super) fn fit(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut used = 0;
    let fits = |c: &char| {
        used += c.width().unwrap_or(0);
        used < width
    };
    let mut cut: String = text.chars().take_while(fits).collect();
    if width > 0 {
        cut.push('…');
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::survey::State;

    fn listed(run: &str, state: State) -> Listed {
        let survey = Survey {
            state,
            step: 1200,
            steps: Some(20_000),
            loss: Some(4.851),
            best_ppl: Some(130.2),
            tokens_per_s: Some(25_000.4),
            restarts: 2,
            age_s: Some(75),
        };
        Listed { run: run.into(), survey }
    }

    #[test]
    fn a_table_is_never_wider_than_the_terminal() {
        let rows = [listed("homework", State::Running), listed("a/very/long/name/of/a/run/\x1b[2J漢字", State::Failed)];
        let all = text(&rows, None);
        assert!(all.lines().next().unwrap().ends_with("age") && !all.contains('\x1b'), "{all}");
        for width in 1..120 {
            let narrow = text(&rows, Some(width));
            assert!(narrow.lines().all(|line| line.width() <= width), "{width}:\n{narrow}");
            if width >= 40 {
                assert!(narrow.contains("1200/20000") && narrow.contains("running"), "{width}:\n{narrow}");
            }
            if width >= 80 {
                assert!(narrow.contains("25000") && narrow.contains("1 min 15 s"), "{width}:\n{narrow}");
            }
        }
    }

    #[test]
    fn no_runs_are_a_header() {
        let head = "run,state,step,steps,loss,best_ppl,tokens_per_s,restarts,age_s\n";
        assert_eq!(csv(&[]).unwrap(), head);
        let row = csv(&[Listed { run: "a,b".into(), ..listed("", State::Killed) }]).unwrap();
        assert_eq!(row, format!("{head}\"a,b\",killed,1200,20000,4.851,130.2,25000.4,2,75\n"));
    }
}
