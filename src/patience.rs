//! Deadlines that a stopped process does not miss.

use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// The most that counts of the time between two looks. Whoever waits looks several times a second; after a longer pause this
/// process itself was stopped, by Ctrl-Z or `scontrol suspend` for example, and so were perhaps those that it waits for.
const LONGEST: Duration = Duration::from_secs(1);

/// Between two looks of [`receive`].
const TICK: Duration = Duration::from_millis(200);

/// How long this process has waited for something, while it ran.
pub struct Patience {
    last: Instant,
    waited: Duration,
}

impl Patience {
    /// Begins to wait.
    pub fn begin() -> Self {
        Self::begin_at(Instant::now())
    }

    /// Begins to wait at a time.
    pub fn begin_at(now: Instant) -> Self {
        Self { last: now, waited: Duration::ZERO }
    }

    /// How long it has waited. To be asked several times a second.
    pub fn waited(&mut self) -> Duration {
        self.waited_at(Instant::now())
    }

    /// How long it has waited at a time, which no later call may be before.
    pub fn waited_at(&mut self, now: Instant) -> Duration {
        self.waited += now.saturating_duration_since(self.last).min(LONGEST);
        self.last = now;
        self.waited
    }
}

/// Receives what another thread sends within a deadline.
///
/// # Errors
/// As [`Receiver::recv_timeout`].
pub fn receive<T>(from: &Receiver<T>, deadline: Duration) -> Result<T, RecvTimeoutError> {
    let mut patience = Patience::begin();
    loop {
        let left = deadline.saturating_sub(patience.waited());
        match from.recv_timeout(left.min(TICK)) {
            Err(RecvTimeoutError::Timeout) if !left.is_zero() => {}
            done => return done,
        }
    }
}

/// Does something that may never return, such as asking a file system whose server is gone, in a thread of its own.
/// `None` if it has not returned within the deadline, or the system gives no thread.
pub fn within<T: Send + 'static>(deadline: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (tell, told) = channel();
    let work = move || drop(tell.send(work()));
    thread::Builder::new().name("aside".into()).spawn(work).ok()?;
    receive(&told, deadline).ok()
}

/// Looks again and again until `look` finds something; `None` if it has not within the deadline. It looks once at least.
pub fn until<T>(deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    const PAUSE: Duration = Duration::from_millis(20);
    let mut patience = Patience::begin();
    loop {
        let found = look();
        if found.is_some() || patience.waited() >= deadline {
            return found;
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_this_process_was_stopped_does_not_count() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut patience = Patience::begin_at(start);
        let mut waited = |millis| patience.waited_at(at(millis)).as_millis();
        assert_eq!([200, 400, 1400].map(&mut waited), [200, 400, 1400]);
        // Stopped for an hour: a second of it counts, and then all again.
        assert_eq!([3_601_400, 3_601_900].map(waited), [2400, 2900]);
    }

    #[test]
    fn what_never_returns_is_given_up() {
        let long = Duration::from_secs(600);
        assert_eq!(within(long, || 7), Some(7));
        assert_eq!(within(Duration::from_millis(10), move || thread::sleep(long)), None);
        assert_eq!(until(Duration::ZERO, || Some(7)), Some(7));
        assert_eq!(until(Duration::from_millis(50), || None::<u8>), None);
        let mut looks = 0;
        let third = || {
            looks += 1;
            (looks == 3).then_some(looks)
        };
        assert_eq!(until(long, third), Some(3));
    }

    #[test]
    fn what_is_sent_in_time_is_received_and_what_is_not_is_late() {
        let (send, receiver) = channel();
        send.send(7).unwrap();
        assert_eq!(receive(&receiver, Duration::ZERO), Ok(7));
        assert_eq!(receive(&receiver, Duration::from_millis(300)), Err(RecvTimeoutError::Timeout));
        drop(send);
        assert_eq!(receive(&receiver, Duration::from_secs(600)), Err(RecvTimeoutError::Disconnected));
    }
}
