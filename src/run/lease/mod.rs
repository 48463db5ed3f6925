//! The run directory's lease: one job trains there at a time, even if several machines see the directory.
//!
//! `lease.json` names its holder, who counts up a number in it every two seconds. It appears by link(2) and changes by
//! rename(2), which are atomic on NFS, too; locks may not be. Clocks are never compared: who finds a lease watches it,
//! and only one that does not change for twelve seconds of the observer's own monotonic clock has expired. A holder
//! that was replaced nevertheless, since it was stopped for long or its job was queued again, sees so before it writes
//! on.

mod holder;
mod observer;
mod watch;

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{sleep, JoinHandle};
use std::time::{Duration, Instant};

use tracing::warn;

use self::holder::Holder;
pub use self::observer::{Held, Observer};
use self::watch::{Sight, Verdict, Watch, EXPIRY, FRESH};
use crate::error::{Error, Result};
use crate::host;

/// The file's name in the run directory. Its siblings of a longer name are on their way to it.
pub const FILE: &str = "lease.json";

/// Between two renewals.
const RENEWAL: Duration = Duration::from_secs(2);
/// Between two looks at another's lease.
const POLL: Duration = Duration::from_millis(50);

/// The right to write into a run directory: renewed until it is dropped, then given back.
pub struct Lease {
    own: Arc<Own>,
    /// Ends the thread when dropped.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Lease {
    /// Takes the lease of a folder, which is made if need be. Says what it waits for.
    ///
    /// # Errors
    /// Usage, if another holder proves that it is alive; storage, if the file cannot be written.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let mine = Holder::this_process();
        let candidate = path.with_extension(format!("json.{}", mine.token));
        let made = fs::create_dir_all(folder).or_else(|e| if folder.exists() { Ok(()) } else { Err(e) });
        let taken = made.map_err(|e| Error::write(&path, e)).and_then(|()| {
            let mut clock = Monotonic(Instant::now());
            acquire(&path, &candidate, &mine, &mut clock)
        });
        let _ = fs::remove_file(&candidate);
        taken?;
        clear_siblings(folder);

        let own =
            Own { path, candidate, token: mine.token.clone(), seen: Mutex::new(Instant::now()), lost: OnceLock::new() };
        let own = Arc::new(own);
        let (stop, stopped) = channel();
        let renewed = own.clone();
        match host::spawn("lease", move || renewed.keep(mine, &stopped)) {
            Ok(thread) => Ok(Self { own, stop: Some(stop), thread: Some(thread) }),
            Err(e) => {
                own.release();
                Err(e)
            }
        }
    }

    /// Makes sure that the directory is still this process's to write to; to be called before anything is written there.
    ///
    /// # Errors
    /// Communication, if another process has taken the directory over; storage, if the lease could not be read for
    /// so long that one may have.
    pub fn check(&self) -> Result<()> {
        let own = &self.own;
        if own.lost.get().is_none() && own.since_seen() >= FRESH {
            let _ = own.look(); // one that fails for long is told below
        }
        let path = own.path.display();
        if let Some(lost) = own.lost.get() {
            let message =
                format!("{path} {lost}; this process writes nothing more and ends, so that only one of them trains");
            return Err(Error::Communication(message).into());
        }
        let silence = own.since_seen();
        if silence > EXPIRY / 2 {
            return Err(Error::Storage(format!(
                "{path} should name this process, but could not be read or written for {} s, and another process may \
                 soon take this run over; make sure that the file system works, and start the same command again",
                silence.as_secs()
            ))
            .into());
        }
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.own.release();
    }
}

/// What the holder's threads share.
struct Own {
    path: PathBuf,
    candidate: PathBuf,
    token: String,
    /// When the file last bore this process's token.
    seen: Mutex<Instant>,
    /// What the file says instead.
    lost: OnceLock<String>,
}

impl Own {
    fn seen(&self) -> MutexGuard<'_, Instant> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_seen(&self) -> Duration {
        self.seen().elapsed()
    }

    /// Looks at the file, and notes whose it is; whether it is this process's. One that is gone is lost, too: who took over may have ended already. A
    /// damaged one proves nothing, and is mended by the next renewal.
    fn look(&self) -> io::Result<bool> {
        let now = Instant::now();
        let lost = match Sight::of(&self.path)? {
            Some(Sight { holder: Some(holder), .. }) if holder.token == self.token => {
                *self.seen() = now;
                return Ok(true);
            }
            Some(Sight { holder: Some(holder), .. }) => format!("now names {holder}, which has taken this run over"),
            Some(_) => return Ok(false),
            None => "is gone: another process has taken this run over and ended, or somebody removed it".into(),
        };
        let _ = self.lost.set(lost);
        Ok(false)
    }

    /// Renews the lease until it is dropped or lost.
    fn keep(&self, mut mine: Holder, stopped: &Receiver<()>) {
        let mut failing = false;
        while stopped.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) {
            mine.counter += 1;
            let renewed = self.renew(&mine);
            if self.lost.get().is_some() {
                return; // `check` says so
            }
            if let (Err(e), false) = (&renewed, failing) {
                let path = self.path.display();
                warn!("cannot renew {path}: {e}; if that stays so, another job may take this run over");
            }
            failing = renewed.is_err();
        }
    }

    fn renew(&self, mine: &Holder) -> io::Result<()> {
        // The slow part first: between the look and the renaming there must be no time for a takeover.
        write_durably(&self.candidate, mine)?;
        let renewed = self.look().and_then(|_| match self.lost.get() {
            None => fs::rename(&self.candidate, &self.path),
            Some(_) => Ok(()),
        });
        let _ = fs::remove_file(&self.candidate);
        renewed
    }

    /// Removes the file if it is still this process's.
    fn release(&self) {
        if matches!(self.look(), Ok(true)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The observer's clock. A test has one that does not wait.
trait Clock {
    fn now(&self) -> Duration;
    fn sleep(&mut self, pause: Duration);
}

struct Monotonic(Instant);

impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&mut self, pause: Duration) {
        sleep(pause);
    }
}

/// Makes `path` this process's, through `candidate`.
fn acquire(path: &Path, candidate: &Path, mine: &Holder, clock: &mut impl Clock) -> Result<()> {
    let storage = |e| Error::write(path, e);
    let mut watch = Watch::default();
    let mut said = false;
    loop {
        // Again each time: a new holder clears what others left.
        if !candidate.exists() {
            write_durably(candidate, mine).map_err(storage)?;
        }
        let sight = Sight::of(path).map_err(storage)?;
        let name = sight.as_ref().map_or(String::new(), Sight::name);
        match watch.judge(sight.as_ref(), clock.now(), mine, Holder::is_gone) {
            Verdict::Free => match link(candidate, path, mine) {
                Ok(true) => return Ok(()),
                Err(e) if candidate.exists() => return Err(storage(e)),
                _ => {}
            },
            Verdict::TakeOver(why, pause) => {
                warn!("taking over {} from {name}: {why}", path.display());
                match fs::rename(candidate, path) {
                    Err(e) if candidate.exists() => return Err(storage(e)),
                    _ => clock.sleep(pause),
                }
                let now = Sight::of(path).map_err(storage)?.and_then(|sight| sight.holder);
                if now.is_some_and(|holder| holder.token == mine.token) {
                    return Ok(());
                }
            }
            Verdict::Alive => {
                return Err(Error::Usage(format!(
                    "{} is in use: {} names {name}, which is alive; wait for it, stop it, or use another --run-dir",
                    path.parent().unwrap_or(path).display(),
                    path.display()
                ))
                .into())
            }
            Verdict::Wait => {
                if !said {
                    let path = path.display();
                    warn!("{path} names {name}; waiting up to {} s to see whether it is alive", EXPIRY.as_secs());
                    said = true;
                }
                clock.sleep(POLL);
            }
        }
    }
}

/// Gives the candidate its name if there is none of that name; whether it did.
fn link(candidate: &Path, path: &Path, mine: &Holder) -> io::Result<bool> {
    match fs::hard_link(candidate, path) {
        Ok(()) => Ok(true),
        // NFS repeats a request whose answer was lost, and then finds what it made: the links tell.
        Err(_) if fs::metadata(candidate).is_ok_and(|file| file.nlink() == 2) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        // A file system without links: whoever reads half of it waits for the rest.
        Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => create(path, mine),
        Err(e) => Err(e),
    }
}

/// Creates the file if there is none; whether it did.
fn create(path: &Path, mine: &Holder) -> io::Result<bool> {
    match File::create_new(path) {
        Ok(mut file) => file.write_all(&mine.to_bytes()).and_then(|()| file.sync_all()).map(|()| true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

/// Writes a candidate. The folder is not made durable: after a power cut there is no holder left.
fn write_durably(candidate: &Path, mine: &Holder) -> io::Result<()> {
    let write = || {
        let mut file = File::create(candidate)?;
        file.write_all(&mine.to_bytes())?;
        file.sync_all()
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(candidate);
    })
}

/// Removes what killed processes left on its way; one that is alive writes its own again.
fn clear_siblings(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_sibling = |name: &str| name.strip_prefix(FILE).is_some_and(|rest| rest.starts_with('.'));
        if entry.file_name().to_str().is_some_and(is_sibling) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that goes on by itself as far as it is asked to sleep; `passes` sees its times.
    struct Scripted<F> {
        now: Duration,
        passes: F,
    }

    impl<F: FnMut(Duration)> Clock for Scripted<F> {
        fn now(&self) -> Duration {
            self.now
        }

        fn sleep(&mut self, pause: Duration) {
            self.now += pause;
            (self.passes)(self.now);
        }
    }

    /// Tries to take the lease at `path`; how that ends, and how much time of the observer's clock it takes.
    fn observe(path: &Path, passes: impl FnMut(Duration)) -> (Result<()>, Duration) {
        let mine = Holder::this_process();
        let candidate = path.with_extension("json.mine");
        let mut clock = Scripted { now: Duration::ZERO, passes };
        let taken = acquire(path, &candidate, &mine, &mut clock);
        if taken.is_ok() {
            assert_eq!(Sight::of(path).unwrap().unwrap().holder, Some(mine));
        }
        (taken, clock.now)
    }

    /// A lease of another machine, as one at that time would have written it.
    fn elsewhere(since: &str) -> Holder {
        Holder { machine: None, host: "node7".into(), since: since.into(), ..Holder::this_process() }
    }

    #[test]
    fn a_lease_of_another_machine_expires_by_the_observers_clock_alone() {
        let leases = ["1970-01-01 00:00:00 UTC", "2999-01-01 00:00:00 UTC"].map(|since| elsewhere(since).to_bytes());
        for lease in leases.into_iter().chain([b"{\"cluster\": nu".to_vec(), Vec::new()]) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(FILE);
            fs::write(&path, &lease).unwrap();
            // The file's own time, a day back.
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(std::time::SystemTime::now() - Duration::from_secs(86_400)).unwrap();
            let untouched = |now| assert!(now >= EXPIRY || fs::read(&path).unwrap() == lease, "taken after {now:?}");
            let (taken, after) = observe(&path, untouched);
            taken.unwrap();
            assert!(after < EXPIRY + Duration::from_secs(1), "taken after {after:?}");
        }
    }

    #[test]
    fn a_lease_of_another_machine_that_is_renewed_is_respected() {
        for first in [elsewhere("2999-01-01 00:00:00 UTC").to_bytes(), b"half a le".to_vec()] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(FILE);
            fs::write(&path, first).unwrap();
            let renewed = Holder { counter: 1, ..elsewhere("1970-01-01 00:00:00 UTC") };
            let renew = |now| {
                if now >= EXPIRY - 2 * POLL {
                    write_and_rename(&path, &renewed.to_bytes());
                }
            };
            let error = observe(&path, renew).0.unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 2);
            let said = error.to_string();
            assert!(said.contains("on node7 since") && said.contains("which is alive"), "{said}");
            assert_eq!(fs::read(&path).unwrap(), renewed.to_bytes());
        }
    }

    #[test]
    fn a_lease_is_renewed_mended_and_given_back() {
        // In memory: on a disk that stops for seconds the lease would rightly be in doubt.
        let folder = tempfile::TempDir::new_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let path = folder.path().join("run").join(FILE);
        let lease = Lease::take(path.parent().unwrap()).unwrap();
        let now = || Sight::of(&path).unwrap().and_then(|sight| sight.holder);
        let until = |done: &dyn Fn() -> bool| {
            let start = Instant::now();
            while !done() {
                assert!(start.elapsed() < 300 * RENEWAL, "not renewed");
                sleep(POLL);
            }
        };
        let first = now().unwrap();
        until(&|| now().is_some_and(|holder| holder.counter > 0 && holder.token == first.token));
        fs::write(&path, "half a le").unwrap();
        lease.check().unwrap();
        until(&|| now().is_some());
        drop(lease);
        assert_eq!(fs::read_dir(folder.path().join("run")).unwrap().count(), 0);
    }

    #[test]
    fn a_lost_lease_is_seen_before_the_next_write_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let lease = Lease::take(folder.path()).unwrap();
        lease.check().unwrap();
        let other = Holder::this_process().to_bytes();
        write_and_rename(&folder.path().join(FILE), &other);
        sleep(FRESH);
        let error = lease.check().unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 6, "{error}");
        sleep(RENEWAL + FRESH);
        drop(lease);
        assert_eq!(fs::read(folder.path().join(FILE)).unwrap(), other);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

        // Who took over may have ended already.
        fs::remove_file(folder.path().join(FILE)).unwrap();
        let lease = Lease::take(folder.path()).unwrap();
        fs::remove_file(folder.path().join(FILE)).unwrap();
        sleep(RENEWAL + FRESH);
        let error = lease.check().unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 6, "{error}");
        drop(lease); // waits for a renewal in progress
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    fn write_and_rename(path: &Path, bytes: &[u8]) {
        let temporary = path.with_extension("other");
        fs::write(&temporary, bytes).unwrap();
        fs::rename(temporary, path).unwrap();
    }

    #[test]
    fn of_many_that_find_a_dead_lease_one_takes_it() {
        let folder = tempfile::tempdir().unwrap();
        let dead = Holder { pid: u32::MAX, ..Holder::this_process() };
        fs::write(folder.path().join(FILE), dead.to_bytes()).unwrap();
        let done = std::sync::Barrier::new(8);
        let takers: Vec<Result<Lease>> = std::thread::scope(|scope| {
            let take = || {
                done.wait();
                Lease::take(folder.path())
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let held = takers.iter().flatten().filter(|lease| lease.check().is_ok()).count();
        assert_eq!(held, 1, "{:?}", takers.iter().map(|taken| taken.as_ref().map(drop)).collect::<Vec<_>>());
    }

    #[test]
    fn without_links_a_file_is_created_once() {
        let folder = tempfile::tempdir().unwrap();
        let (path, mine) = (folder.path().join(FILE), Holder::this_process());
        assert!(create(&path, &mine).unwrap());
        assert!(!create(&path, &mine).unwrap());
        assert_eq!(Sight::of(&path).unwrap().unwrap().holder, Some(mine));
    }
}
