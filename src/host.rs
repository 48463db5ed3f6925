//! What this program has of the machine: a name, its own file, threads.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use crate::error::{Error, Result};
use crate::files;

/// This node's name.
pub fn name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "this node".into(),
        name => name.into(),
    }
}

/// Asks the processor to fetch the line of memory that an element is in, which is read soon. Where this program does not know
/// how to ask (Arm), nothing is done.
#[inline(always)]
pub fn prefetch<T>(element: &T) {
    #[cfg(target_arch = "x86_64")]
    safe_arch::prefetch_t0(element);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = element;
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

static NO_BARS: AtomicBool = AtomicBool::new(false);

/// Shows no progress bars from now on: the user asked for quiet, or for lines that programs read.
pub fn show_no_bars() {
    NO_BARS.store(true, Ordering::Relaxed);
}

/// Whether progress bars are shown: stderr is a terminal, and nobody asked for none.
pub fn shows_bars() -> bool {
    io::stderr().is_terminal() && !NO_BARS.load(Ordering::Relaxed)
}

/// Starts a thread.
///
/// # Errors
/// Usage, if the system gives no thread.
pub fn spawn<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(work).map_err(Error::thread)
}
