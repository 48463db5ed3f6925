//! What a process that finds another's lease makes of it.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;
use std::time::Duration;

use super::holder::Holder;

/// A lease that does not change for so long has expired.
pub const EXPIRY: Duration = Duration::from_secs(12);
/// How long a look at the own lease holds good, so that steps of a millisecond do not each ask the file system.
pub const FRESH: Duration = Duration::from_millis(100);
/// From a takeover to the first use: longer than [`FRESH`], so that a holder who may still live has seen it, and whatever
/// it was writing is written.
const HANDOVER: Duration = Duration::from_secs(1);
/// The same if the holder is dead: only for another observer that came to this conclusion in the same moment.
const SETTLING: Duration = Duration::from_millis(100);
/// Longer than any lease; more is not read.
const MAX_BYTES: u64 = 1 << 14;

/// What is in the lease's place.
#[derive(Debug, Clone, PartialEq)]
pub struct Sight {
    #[allow(missing_docs)]
    pub bytes: Vec<u8>,
    /// `None`, if the bytes are no lease.
    pub holder: Option<Holder>,
}

impl Sight {
    /// Reads what is there; `None`, if nothing is.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        let read = || -> io::Result<Vec<u8>> {
            // Neither followed nor waited for: a link or a pipe is nothing that this program makes.
            if !path.symlink_metadata()?.is_file() {
                return Ok(Vec::new());
            }
            let mut bytes = Vec::new();
            File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        for _ in 0..3 {
            match read() {
                Ok(bytes) => return Ok(Some(Self { holder: Holder::parse(&bytes), bytes })),
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
                // NFS: the file was replaced while it was read.
                Err(e) if e.kind() == ErrorKind::StaleNetworkFileHandle => {}
                Err(e) => return Err(e),
            }
        }
        Err(ErrorKind::StaleNetworkFileHandle.into())
    }

    /// The holder's name, for people.
    pub fn name(&self) -> String {
        self.holder.as_ref().map_or("an unknown holder (the file is damaged)".into(), Holder::to_string)
    }
}

/// What may be done about a lease.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// There is none.
    Free,
    /// It may be replaced, for this reason; the new holder begins after this pause.
    TakeOver(&'static str, Duration),
    /// Its holder has just proved it.
    Alive,
    /// It cannot be told yet.
    Wait,
}

/// Watches another's lease.
#[derive(Default)]
pub struct Watch {
    first: Option<(Sight, Duration)>,
}

impl Watch {
    /// Judges what is there at a time since some start. Any change since the first sight is proof of life: of the
    /// holder's, or of that of another who has just become it.
    pub fn judge(
        &mut self,
        now: Option<&Sight>,
        at: Duration,
        me: &Holder,
        is_gone: impl Fn(&Holder) -> bool,
    ) -> Verdict {
        let Some(now) = now else { return Verdict::Free };
        if let Some(holder) = &now.holder {
            if holder.is_earlier_start_of(me) {
                return Verdict::TakeOver("it is an earlier start of this job, which was queued again", HANDOVER);
            }
            if is_gone(holder) {
                return Verdict::TakeOver("its process no longer exists", SETTLING);
            }
        }
        let (first, since) = self.first.get_or_insert_with(|| (now.clone(), at));
        if first != now {
            Verdict::Alive
        } else if at.saturating_sub(*since) >= EXPIRY {
            Verdict::TakeOver("it stood still for 12 s", SETTLING)
        } else {
            Verdict::Wait
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn sight(token: &str, counter: u64) -> Sight {
        let holder = Holder { machine: None, token: token.into(), counter, ..Holder::this_process() };
        Sight { bytes: holder.to_bytes(), holder: Some(holder) }
    }

    fn damaged() -> Sight {
        Sight { bytes: b"half a le".to_vec(), holder: None }
    }

    /// Judges what is seen in turn, at seconds of the observer's clock.
    fn judge(sights: &[(u64, &Sight)]) -> Vec<Verdict> {
        let (mut watch, me) = (Watch::default(), Holder::this_process());
        let at = Duration::from_secs;
        sights.iter().map(|&(second, sight)| watch.judge(Some(sight), at(second), &me, |_| false)).collect()
    }

    const EXPIRED: Verdict = Verdict::TakeOver("it stood still for 12 s", SETTLING);

    #[test]
    fn only_a_lease_that_stands_still_expires() {
        use Verdict::{Alive, Wait};
        let (first, renewed, other) = (sight("a", 4), sight("a", 5), sight("b", 4));
        assert_eq!(judge(&[(3, &first), (14, &first), (15, &first)]), [Wait, Wait, EXPIRED]);
        assert_eq!(judge(&[(3, &first), (14, &renewed)]), [Wait, Alive]);
        assert_eq!(judge(&[(3, &first), (20, &renewed)]), [Wait, Alive]);
        assert_eq!(judge(&[(3, &first), (4, &other)]), [Wait, Alive]);
        // A clock that was set back, or a day ahead, is in the file and nowhere else.
        let mut later = first.clone();
        for since in ["1970-01-01 00:00:00 UTC", "2999-01-01 00:00:00 UTC"] {
            later.holder.as_mut().unwrap().since = since.into();
            assert_eq!(judge(&[(0, &later), (11, &later), (12, &later)]), [Wait, Wait, EXPIRED]);
        }
        // The holder of a damaged file may be alive, and then mends it.
        assert_eq!(judge(&[(0, &damaged()), (11, &damaged()), (12, &damaged())]), [Wait, Wait, EXPIRED]);
        assert_eq!(judge(&[(0, &damaged()), (2, &first)]), [Wait, Alive]);
    }

    #[test]
    fn a_dead_holder_and_an_earlier_start_are_replaced_at_once() {
        let me = Holder { job: Some("7".into()), restart_count: 1, ..Holder::this_process() };
        let mut seen = sight("a", 0);
        let judge = |seen: &Sight, gone| Watch::default().judge(Some(seen), Duration::ZERO, &me, |_| gone);
        assert!(matches!(judge(&seen, true), Verdict::TakeOver(_, SETTLING)));
        assert_eq!(judge(&damaged(), true), Verdict::Wait);
        for (restart_count, taken) in [(0, true), (1, false), (2, false)] {
            let holder = seen.holder.as_mut().unwrap();
            (holder.job, holder.restart_count) = (Some("7".into()), restart_count);
            assert_eq!(matches!(judge(&seen, false), Verdict::TakeOver(_, HANDOVER)), taken);
        }
        assert_eq!(Watch::default().judge(None, Duration::ZERO, &me, |_| false), Verdict::Free);
    }

    #[test]
    fn what_is_no_file_is_neither_followed_nor_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lease.json");
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert_eq!(Sight::of(&path).unwrap(), Some(Sight { bytes: Vec::new(), holder: None }));
        fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert_eq!(Sight::of(&path).unwrap(), Some(Sight { bytes: Vec::new(), holder: None }));
    }
}
