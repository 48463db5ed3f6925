//! The terminal that a live view has for itself, until the user leaves.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::Frame;

use crate::error::{Error, Result};
use crate::stop::{exit_now, note_sigterm, SIGTERM_EXIT};

/// Between two looks.
const REFRESH: Duration = Duration::from_secs(1);

/// Between two questions whether SIGTERM has come.
const POLL: Duration = Duration::from_millis(200);

/// Looks and draws once a second, until the user leaves with `q`, Escape or Ctrl-C, or SIGTERM comes. The terminal is left as
/// it was.
///
/// # Errors
/// Usage, if the terminal cannot be drawn on or read from.
pub fn show<T>(seen: &mut T, look: impl Fn(&mut T), draw: impl Fn(&mut Frame, &T)) -> Result<()> {
    let failed = |e: io::Error| {
        let remedy = "`lockstep watch RUN | cat` prints one look";
        Error::Usage(format!("cannot use this terminal: {e}; {remedy}"))
    };
    let ended = note_sigterm()?;
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let mut until_left = || -> io::Result<bool> {
        loop {
            look(seen);
            terminal.draw(|frame| draw(frame, seen))?;
            let due = Instant::now() + REFRESH;
            loop {
                if ended.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                if event::poll(due.saturating_duration_since(Instant::now()).min(POLL))? {
                    match event::read()? {
                        Event::Key(key) if leaves(&key) => return Ok(true),
                        // Drawn anew at once, in the new size.
                        Event::Resize(..) => break,
                        _ => {}
                    }
                } else if Instant::now() >= due {
                    break;
                }
            }
        }
    };
    let left = until_left();
    let restored = ratatui::try_restore();
    drop(terminal); // shows the cursor again
    if !left.map_err(failed)? {
        exit_now(SIGTERM_EXIT);
    }
    restored.map_err(failed)?;
    Ok(())
}

fn leaves(key: &KeyEvent) -> bool {
    let ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press && (ctrl_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}
