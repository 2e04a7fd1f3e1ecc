//! The clocks that the kernel has, and the processor's counter.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

use super::rtc::Rtc;
use crate::sys::tsc::tsc;

/// Times that the clocks are read anew if something came between.
const TRIES: u32 = 5;
/// Reading all of them takes less if nothing comes between.
const QUICK_NS: i64 = 100_000;

/// A moment at which the hardware clock went on to its next second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// What the hardware clock showed then, in seconds since 1970.
    pub rtc_s: i64,
    /// When, in nanoseconds of `CLOCK_MONOTONIC_RAW`.
    pub at_ns: i64,
    /// Within so many nanoseconds, before or after.
    pub error_ns: i64,
}

/// All clocks, read at about the same time. Nanoseconds since whatever each counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// `CLOCK_MONOTONIC_RAW`: what the machine's counter says, never corrected.
    pub raw_ns: i64,
    /// `CLOCK_MONOTONIC`: the same, slewed by adjtime(3) and NTP.
    pub monotonic_ns: i64,
    /// `CLOCK_BOOTTIME`: the same, and it counts while the machine is suspended.
    pub boottime_ns: i64,
    /// `CLOCK_REALTIME`: the time of day, which can be set.
    pub realtime_ns: i64,
    /// The processor's counter, in ticks.
    pub tsc: Option<u64>,
    /// They were all read within so many nanoseconds.
    pub error_ns: i64,
    /// The hardware clock, which the hypervisor's host keeps going while the guest stands still.
    pub rtc: Option<Edge>,
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec)
}

pub(super) fn raw_ns() -> i64 {
    nanoseconds(clock_gettime(ClockId::MonotonicRaw))
}

/// Reads them all; the hardware clock only if there is one, which waits until it goes on to its next second, at most
/// `patience`.
#[must_use]
pub fn read(rtc: Option<&mut Rtc>, patience: Duration) -> Clocks {
    let edge = rtc.and_then(|rtc| rtc.edge(patience));
    let mut best: Option<Clocks> = None;
    for _ in 0..TRIES {
        let raw_ns = raw_ns();
        let clocks = Clocks {
            raw_ns,
            monotonic_ns: nanoseconds(clock_gettime(ClockId::Monotonic)),
            boottime_ns: nanoseconds(clock_gettime(ClockId::Boottime)),
            realtime_ns: nanoseconds(clock_gettime(ClockId::Realtime)),
            tsc: tsc(),
            error_ns: self::raw_ns().saturating_sub(raw_ns),
            rtc: edge,
        };
        if best.is_none_or(|best| clocks.error_ns < best.error_ns) {
            best = Some(clocks);
        }
        if clocks.error_ns < QUICK_NS {
            break;
        }
    }
    // There was one try at least.
    best.unwrap_or(Clocks {
        raw_ns: raw_ns(),
        monotonic_ns: 0,
        boottime_ns: 0,
        realtime_ns: 0,
        tsc: None,
        error_ns: i64::MAX,
        rtc: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_go_on_do_so_together() {
        let first = read(None, Duration::ZERO);
        let mut last = first;
        while last.raw_ns - first.raw_ns < 20_000_000 {
            last = read(None, Duration::ZERO);
        }
        let went = |of: fn(&Clocks) -> i64| of(&last) - of(&first);
        let raw = went(|clocks| clocks.raw_ns);
        let slack = raw / 10 + first.error_ns + last.error_ns;
        for other in [
            went(|clocks| clocks.monotonic_ns),
            went(|clocks| clocks.boottime_ns),
        ] {
            assert!((other - raw).abs() <= slack, "{other} and {raw}");
        }
        assert!(
            last.tsc
                .zip(first.tsc)
                .is_none_or(|(last, first)| last > first)
        );
    }

    #[test]
    fn a_time_beyond_all_bounds_is_the_last_one() {
        let far = Timespec {
            tv_sec: i64::MAX,
            tv_nsec: 5,
        };
        assert_eq!(nanoseconds(far), i64::MAX);
    }
}
