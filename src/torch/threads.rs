//! How many threads compute, and how busily they wait for each other.

use std::env;
use std::error::Error as _;
use std::os::unix::process::CommandExt;
use std::process::Command;

use tracing::warn;

use crate::error::{Error, Result};

/// How often a thread of libgomp looks for work before it lets go of its core. On two cores a step of 70 ms took half as
/// long again beside two busy programs with libgomp's own 300,000 (three milliseconds and more), and no less time on a quiet
/// machine.
const SPIN: (&str, &str) = ("GOMP_SPINCOUNT", "10000");

/// Variables with which a user has decided how threads wait, whichever OpenMP LibTorch was built with.
const WAITING: [&str; 3] = [SPIN.0, "OMP_WAIT_POLICY", "KMP_BLOCKTIME"];

/// More threads than so many for each core only wait for each other.
const MOST_PER_CORE: usize = 4;

/// Lets this program's threads wait for each other for a bounded time, unless the user has decided that otherwise. libgomp
/// reads its environment when it is loaded, before `main`: the program begins anew, as the same process. To be called before
/// anything else has begun, with the threads that [`set_threads`] will be given.
pub fn bound_waiting(threads: Option<usize>) {
    // A thread alone waits for nobody, and a start costs some tenths of a second.
    if asked_for(threads) == 1 || WAITING.iter().any(|name| env::var_os(name).is_some()) {
        return;
    }
    let Ok(program) = env::current_exe() else { return };
    let mut arguments = env::args_os();
    let mut again = Command::new(program);
    again.arg0(arguments.next().unwrap_or_default()).args(arguments).env(SPIN.0, SPIN.1);
    // Returns only if that is impossible; then the threads wait as libgomp lets them.
    let _ = again.exec();
}

/// Sets the threads that this process computes with, in LibTorch and in rayon alike.
///
/// `None` leaves the choice to `OMP_NUM_THREADS` or, if that is unset, to the cores this process may use.
/// Returns the number in force.
///
/// # Errors
/// Usage, if the system gives no thread.
pub fn set_threads(threads: Option<usize>) -> Result<usize> {
    let (asked, cores) = (asked_for(threads), cores());
    let threads = asked.min(cores * MOST_PER_CORE);
    if threads < asked {
        let source = if threads_of_environment() == Some(asked) { "OMP_NUM_THREADS" } else { "threads" };
        warn!("{source} asks for {asked} threads, and this process may use {cores} cores: {threads} threads compute");
    }
    // Rayon's threads call LibTorch from one core each. Asking for LibTorch's number first matters: it makes the thread
    // take the process' setting, which it would otherwise do later, over this one.
    let alone = |_| {
        tch::get_num_threads();
        tch::set_num_threads(1);
    };
    let built = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(alone).build_global();
    // A second call finds the pool built; the number of threads is then what the first one set. That error has no source.
    let reason = built.err().and_then(|e| e.source().map(Error::thread));
    if let Some(error) = reason {
        return Err(error);
    }
    // Each thread's setting is the process' too until the next: wait for them all, then set this one's.
    rayon::broadcast(|_| ());
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    Ok(threads)
}

fn asked_for(threads: Option<usize>) -> usize {
    threads.or_else(threads_of_environment).unwrap_or_else(cores)
}

/// OpenMP allows a list, a number for each level of nesting; there is one level here.
fn threads_of_environment() -> Option<usize> {
    env::var("OMP_NUM_THREADS").ok()?.split(',').next()?.trim().parse().ok().filter(|&n| n > 0)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}
