//! Results, on standard output. A reader that has seen enough and is gone, as `head` is, is no fault of anybody: what is left
//! goes nowhere, and the verb ends as it would have.

use std::io::{self, Write};

use crate::error::{Error, Result};

/// Prints a text.
///
/// # Errors
/// Storage, if it cannot be written to the end, on a full disk for example.
pub fn text(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    taken(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())).map(drop)
}

/// Prints a line.
///
/// # Errors
/// As [`text`].
pub fn line(line: &str) -> Result<()> {
    text(&format!("{line}\n"))
}

/// What became of a write to standard output: false if nobody reads it any more.
///
/// # Errors
/// As [`text`].
pub fn taken(written: io::Result<()>) -> Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::Storage(format!("cannot write to standard output: {e}")).into()),
    }
}
