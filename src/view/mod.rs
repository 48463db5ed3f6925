//! What people look at in a terminal: a table of runs ([`runs`]), and one run while it goes on ([`live`], drawn by `draw`
//! on a `screen`). Runs are only read.

mod draw;
pub mod live;
pub mod runs;
pub mod screen;

use std::io::{self, IsTerminal};

/// The width of the terminal that standard output is, if it is one.
pub fn terminal_width() -> Option<usize> {
    let is_terminal = io::stdout().is_terminal();
    is_terminal
        .then(ratatui::crossterm::terminal::size)?
        .ok()
        .map(|(columns, _)| columns.into())
        .filter(|&columns| columns > 0)
}
