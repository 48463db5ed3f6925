//! How a process comes to its end: signals, as requests to stop that all ranks decide on together, and the end at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::error::{Error, Result};

/// Whether this rank was asked to save and stop, and where it is with its work.
pub struct StopRequest {
    raised: Arc<AtomicBool>,
    place: Arc<Place>,
}

/// What is being computed: micro-step `micro_step` (from 0) of `micro_steps` of a step.
#[derive(Default)]
struct Place {
    step: AtomicUsize,
    micro_step: AtomicUsize,
    micro_steps: AtomicUsize,
}

impl StopRequest {
    /// Notes SIGUSR1, SIGTERM and SIGINT from now on; a second SIGTERM or SIGINT ends the process at once.
    ///
    /// # Errors
    /// Usage, if the system refuses signal handlers.
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
        Ok(Self { raised, place: Arc::default() })
    }

    /// Lets SIGUSR1 end the process, for what has nothing to save: `launch/rank` begins with it ignored.
    ///
    /// # Errors
    /// Usage, if the system refuses signal handlers.
    pub fn end_at_once() -> Result<()> {
        let always = Arc::new(AtomicBool::new(true));
        flag::register_conditional_shutdown(SIGUSR1, 128 + SIGUSR1, always).map_err(refused)?;
        Ok(())
    }

    /// Lets `clean_up` run before SIGINT or SIGTERM end the process, for what would leave something half-made.
    ///
    /// # Errors
    /// Usage, if the system refuses signal handlers or a thread.
    pub fn end_cleanly(clean_up: impl FnOnce() + Send + 'static) -> Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(refused)?;
        let wait = move || {
            if let Some(signal) = signals.forever().next() {
                clean_up();
                signal_hook::low_level::exit(128 + signal);
            }
        };
        thread::Builder::new().name("signals".into()).spawn(wait).map(drop).map_err(Error::thread)
    }

    /// Whether a signal has come.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Relaxed)
    }

    /// Marks where the work is.
    pub fn note(&self, step: usize, micro_step: usize, micro_steps: usize) {
        self.place.step.store(step, Ordering::Relaxed);
        self.place.micro_step.store(micro_step, Ordering::Relaxed);
        self.place.micro_steps.store(micro_steps, Ordering::Relaxed);
    }

    /// Says at once when the first request comes, or that one has come already: a step may take long, and whoever asked
    /// should not have to ask again. Only one rank needs to.
    ///
    /// # Errors
    /// Usage, if the system refuses signal handlers or a thread.
    pub fn acknowledge(&self) -> Result<()> {
        if self.is_raised() {
            self.place.say();
            return Ok(());
        }
        let mut signals = Signals::new([SIGUSR1, SIGTERM, SIGINT]).map_err(refused)?;
        let place = self.place.clone();
        let wait = move || {
            if signals.forever().next().is_some() {
                place.say();
            }
        };
        thread::Builder::new().name("signals".into()).spawn(wait).map(drop).map_err(Error::thread)
    }
}

impl Place {
    fn say(&self) {
        let [step, micro_step, micro_steps] =
            [&self.step, &self.micro_step, &self.micro_steps].map(|number| number.load(Ordering::Relaxed));
        let place = match (step, micro_steps) {
            (0, _) => "before the first step".into(),
            (_, 1) => format!("at step {step}"),
            _ => format!("at step {step}, micro-batch {} of {micro_steps}", micro_step + 1),
        };
        tracing::info!(
            "asked to stop {place}: saving as soon as that is done, or earlier if a step takes many seconds; a second SIGTERM \
             or Ctrl-C ends this rank at once"
        );
    }
}

/// Exit code of a process that SIGTERM ended.
pub const SIGTERM_EXIT: u8 = 128 + SIGTERM as u8;

/// Notes SIGTERM from now on instead of ending at once, for what has a terminal to restore. SIGHUP, with which a terminal
/// goes, ends the process at once, even one that was started to ignore it: whoever reads from no terminal reads for ever.
///
/// # Errors
/// Usage, if the system refuses signal handlers.
pub fn note_sigterm() -> Result<Arc<AtomicBool>> {
    let noted = Arc::new(AtomicBool::new(false));
    flag::register(SIGTERM, noted.clone()).map_err(refused)?;
    let always = Arc::new(AtomicBool::new(true));
    flag::register_conditional_shutdown(SIGHUP, 128 + SIGHUP, always).map_err(refused)?;
    Ok(noted)
}

/// Ends this process now, without its destructors and exit handlers, which may wait for a peer or a GPU that no longer
/// answers.
pub fn exit_now(code: u8) -> ! {
    signal_hook::low_level::exit(code.into())
}

fn refused(e: std::io::Error) -> Error {
    Error::Usage(format!("cannot handle signals: {e}"))
}
