//! A limit on the rate of all streams together, and the flag that ends them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How far the streams may run ahead of the rate, so that scheduling hiccups don't lower it.
const BURST: Duration = Duration::from_millis(20);

/// Shared by the streams of one migration.
pub struct Pace {
    bytes_per_s: Option<u64>,
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    cancelled: bool,
    next: Instant,
}

impl Pace {
    /// A limit in bytes per second, or none.
    pub fn new(bytes_per_s: Option<u64>) -> Self {
        let bytes_per_s = bytes_per_s.map(|rate| rate.max(1));
        let state = Mutex::new(State {
            cancelled: false,
            next: Instant::now(),
        });
        Self {
            bytes_per_s,
            state,
            wake: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until that many bytes may go out; false once cancelled.
    pub fn admit(&self, bytes: usize) -> bool {
        let mut state = self.lock();
        let Some(rate) = self.bytes_per_s else {
            return !state.cancelled;
        };
        let now = Instant::now();
        let from = state.next.max(now.checked_sub(BURST).unwrap_or(now));
        let until = from;
        state.next = from + Duration::from_secs_f64(bytes as f64 / rate as f64);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if state.cancelled || left.is_zero() {
                return !state.cancelled;
            }
            state = self
                .wake
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
    }

    /// Ends all waits, and every later one at once.
    pub fn cancel(&self) {
        self.lock().cancelled = true;
        self.wake.notify_all();
    }

    /// Whether [`Pace::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_many_small_pieces() {
        let pace = Pace::new(Some(10_000_000));
        let began = Instant::now();
        for _ in 0..100 {
            assert!(pace.admit(20_000));
        }
        // 2 MB at 10 MB/s; the burst may run ahead.
        assert!(
            began.elapsed() >= Duration::from_millis(170),
            "{:?}",
            began.elapsed()
        );
    }

    #[test]
    fn a_cancelled_pace_admits_nothing_and_wakes_who_waits() {
        let pace = Pace::new(Some(1));
        assert!(pace.admit(1000));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pace.admit(1));
            pace.cancel();
            assert!(!waiting.join().unwrap());
        });
        assert!(!pace.admit(1));
    }
}
