//! How a process comes to its end: signals, as requests to stop that all ranks decide on together, and the end at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

use crate::error::{Error, Result};

/// Whether this rank was asked to save and stop.
pub struct StopRequest(Arc<AtomicBool>);

impl StopRequest {
    /// Notes SIGUSR1, SIGTERM and SIGINT from now on; a second SIGTERM or SIGINT ends the process at once.
    ///
    /// # Errors
    /// Usage, where the system refuses signal handlers.
    pub fn install() -> Result<Self> {
        let raised = Arc::new(AtomicBool::new(false));
        // Of its own: Slurm may send USR1 first and TERM later, while the save that USR1 asked for still goes on.
        let insisted = Arc::new(AtomicBool::new(false));
        let register = || -> std::io::Result<()> {
            for signal in [SIGTERM, SIGINT] {
                flag::register_conditional_shutdown(signal, 128 + signal, insisted.clone())?;
                flag::register(signal, insisted.clone())?;
            }
            for signal in [SIGUSR1, SIGTERM, SIGINT] {
                flag::register(signal, raised.clone())?;
            }
            Ok(())
        };
        register().map_err(refused)?;
        Ok(Self(raised))
    }

    /// Lets SIGUSR1 end the process, for what has nothing to save: `launch/rank` begins with it ignored.
    ///
    /// # Errors
    /// Usage, where the system refuses signal handlers.
    pub fn end_at_once() -> Result<()> {
        let always = Arc::new(AtomicBool::new(true));
        flag::register_conditional_shutdown(SIGUSR1, 128 + SIGUSR1, always).map_err(refused)?;
        Ok(())
    }

    /// Whether a signal has come.
    pub fn raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Ends this process now, without its destructors and exit handlers, which may wait for a peer or a GPU that no longer
/// answers.
pub fn exit_now(code: u8) -> ! {
    signal_hook::low_level::exit(code.into())
}

fn refused(e: std::io::Error) -> Error {
    Error::Usage(format!("cannot handle signals: {e}"))
}
