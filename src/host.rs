//! This machine's name, and this program's file.

use std::io;

use crate::files;

/// This node's name.
pub fn name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "this node".into(),
        name => name.into(),
    }
}

/// This program's file, and the SHA-256 of what it holds.
///
/// # Errors
/// The system's, if it does not say where the program is, or the file cannot be read.
pub fn binary() -> io::Result<(String, String)> {
    let path = std::env::current_exe()?;
    let (_, sha256) = files::digest(&path)?;
    Ok((path.display().to_string(), sha256))
}
