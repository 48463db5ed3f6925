//! Whether a run directory has a holder, seen from outside: nothing is ever written.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::watch::{Sight, EXPIRY};
use super::FILE;

/// What is known of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Its holder lives.
    Yes,
    /// There is none, or its holder has ended.
    No,
    /// It is another machine's, and it takes up to 12 seconds to see whether it is renewed.
    Unknown,
}

/// A lease whose file is older than this is not waited for: clocks that differ by so much are broken.
const OLD: Duration = Duration::from_secs(600);

/// Looks at a run directory's lease again and again.
pub struct Observer {
    path: PathBuf,
    last: Option<(Sight, Instant)>,
    has_changed: bool,
}

impl Observer {
    /// Of this run directory.
    pub fn new(folder: &Path) -> Self {
        Self { path: folder.join(FILE), last: None, has_changed: false }
    }

    /// What is known at this time.
    pub fn look(&mut self, now: Instant) -> Held {
        // One that cannot be read proves nothing, as one that is gone.
        let Ok(Some(sight)) = Sight::of(&self.path) else {
            self.last = None;
            return Held::No;
        };
        if let Some(lives) = sight.holder.as_ref().and_then(|holder| holder.lives()) {
            return if lives { Held::Yes } else { Held::No };
        }
        let since = match &self.last {
            Some((seen, since)) if *seen == sight => *since,
            Some(_) => {
                self.has_changed = true;
                now
            }
            None => {
                self.has_changed = false;
                now
            }
        };
        self.last = Some((sight, since));
        match self.has_changed {
            _ if now.saturating_duration_since(since) >= EXPIRY => Held::No,
            true => Held::Yes,
            false if self.is_old() => Held::No,
            false => Held::Unknown,
        }
    }

    fn is_old(&self) -> bool {
        let changed = fs::metadata(&self.path).and_then(|file| file.modified());
        changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age > OLD))
    }
}

#[cfg(test)]
mod tests {
    use super::super::holder::Holder;
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn a_lease_of_this_machine_is_known_at_once_and_anothers_by_its_renewals() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let start = Instant::now();
        let mut observer = Observer::new(folder.path());
        let mut look = |after: Duration| observer.look(start + after);
        assert_eq!(look(Duration::ZERO), Held::No);
        let mine = Holder::this_process();
        fs::write(&path, mine.to_bytes()).unwrap();
        assert_eq!(look(Duration::ZERO), Held::Yes);
        fs::write(&path, Holder { pid: u32::MAX, ..mine.clone() }.to_bytes()).unwrap();
        assert_eq!(look(Duration::ZERO), Held::No);
        let other = |counter| Holder { machine: None, counter, ..mine.clone() }.to_bytes();
        for (counter, first) in [(0, Held::Unknown), (1, Held::Yes), (2, Held::Yes)] {
            let begin = EXPIRY * counter as u32;
            fs::write(&path, other(counter)).unwrap();
            assert_eq!(look(begin), first);
            assert_eq!(look(begin + EXPIRY / 2), first);
        }
        assert_eq!(look(EXPIRY * 3), Held::No);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        // What a run left long ago, on a machine that is gone.
        let day = SystemTime::now() - Duration::from_secs(86_400);
        fs::File::options().write(true).open(&path).unwrap().set_modified(day).unwrap();
        assert_eq!(Observer::new(folder.path()).look(start), Held::No);
    }
}
