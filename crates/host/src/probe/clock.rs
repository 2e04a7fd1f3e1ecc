//! The clock that probes are timed by: it begins as the time of day and is never set, so that setting this machine's clock
//! is not taken for a jump of all others'. It goes on while the machine sleeps.

use rustix::time::{ClockId, clock_gettime};

/// The clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What it shows while the time since boot is 0.
    base_us: u64,
}

fn read(id: ClockId) -> u64 {
    let time = clock_gettime(id);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds * 1_000_000 + nanoseconds / 1000
}

impl Clock {
    /// One that shows the time of day, as far as it is known now.
    #[must_use]
    pub fn start() -> Self {
        Self {
            base_us: read(ClockId::Realtime).saturating_sub(read(ClockId::Boottime)),
        }
    }

    /// What it shows, in microseconds since 1970.
    #[must_use]
    pub fn now_us(&self) -> u64 {
        self.base_us + read(ClockId::Boottime)
    }

    /// What it has shown when the time of day was that; nothing if that is not past or was before `since_us`, which shows
    /// that the time of day was set since. It takes what it shows now as well.
    pub(crate) fn at(&self, of_day_us: u64, since_us: u64) -> Option<u64> {
        let now_us = self.now_us();
        let ago_us = read(ClockId::Realtime).checked_sub(of_day_us)?;
        let at_us = now_us.checked_sub(ago_us)?;
        (at_us >= since_us).then_some(at_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_of_the_day_is_found_and_one_that_cannot_be_is_not() {
        let clock = Clock::start();
        let before_us = clock.now_us();
        let of_day_us = read(ClockId::Realtime);
        let at_us = clock.at(of_day_us, before_us.saturating_sub(1000)).unwrap();
        assert!(at_us.abs_diff(before_us) < 1_000_000);
        assert_eq!(clock.at(of_day_us + 60_000_000, 0), None);
        assert_eq!(clock.at(of_day_us - 60_000_000, before_us), None);
    }
}
