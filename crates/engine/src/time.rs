//! Time as an argument.

use std::ops::{Add, Sub};
use std::time::Duration;

/// Microseconds since an origin that the driver chose; monotonic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// That many microseconds after the origin.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds since the origin.
    pub const fn as_micros(self) -> u64 {
        self.0
    }
}

impl Add<Duration> for Time {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(micros))
    }
}

impl Sub for Time {
    type Output = Duration;

    /// Zero when `earlier` is not earlier.
    fn sub(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Deadlines of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Silence of the other side after which the connection counts as lost; a third of it is the interval
    /// of pings. Default 10 s.
    pub silence: Duration,
    /// Longest wait for a connection, a greeting or the data streams. Default 10 s.
    pub handshake: Duration,
    /// Longest wait for the destination's container. Default 60 s.
    pub reservation: Duration,
    /// Longest time from the pause to `Ready`; then the VM is resumed on the source. Also the longest wait for `Running`
    /// after the commit; then the source asks on a new connection. Default 30 s.
    pub switchover: Duration,
    /// First delay before a source in doubt dials again; doubles up to `redial_max`. Default 200 ms.
    pub redial_min: Duration,
    /// Longest delay before dialling again. Default 5 s.
    pub redial_max: Duration,
    /// How long a source whose connection broke while it copies dials again before it gives the migration up; zero: it
    /// gives it up at once. Default 30 s.
    pub redial: Duration,
    /// How long a destination whose connection broke while it receives keeps what has arrived; zero: not at all. Longer
    /// than `redial` by the time that either side may take to notice. Default 50 s.
    pub rejoin: Duration,
    /// How long a destination holds a place for a VM that is still being copied, from its offer on, whatever its source
    /// says meanwhile; then it gives the migration up. Once the VM could run there it is four times
    /// `switchover` from then until the commit instead. Default 24 h.
    pub copying: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(10),
            handshake: Duration::from_secs(10),
            reservation: Duration::from_secs(60),
            switchover: Duration::from_secs(30),
            redial_min: Duration::from_millis(200),
            redial_max: Duration::from_secs(5),
            redial: Duration::from_secs(30),
            rejoin: Duration::from_secs(50),
            copying: Duration::from_secs(24 * 3600),
        }
    }
}

/// Who was last heard and spoken to, on one connection.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct Liveness {
    heard: Time,
    spoke: Time,
    silence: Duration,
}

/// What a connection's timers ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pulse {
    /// Nothing yet.
    Quiet,
    /// Say something.
    Ping,
    /// The other side is gone.
    Lost,
}

impl Liveness {
    pub(crate) fn new(now: Time, silence: Duration) -> Self {
        Self {
            heard: now,
            spoke: now,
            silence,
        }
    }

    pub(crate) fn heard(&mut self, now: Time) {
        self.heard = now;
    }

    pub(crate) fn spoke(&mut self, now: Time) {
        self.spoke = now;
    }

    pub(crate) fn next(&self) -> Time {
        (self.heard + self.silence).min(self.spoke + self.silence / 3)
    }

    pub(crate) fn pulse(&self, now: Time) -> Pulse {
        if now >= self.heard + self.silence {
            Pulse::Lost
        } else if now >= self.spoke + self.silence / 3 {
            Pulse::Ping
        } else {
            Pulse::Quiet
        }
    }
}
